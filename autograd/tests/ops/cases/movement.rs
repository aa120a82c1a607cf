//! Views and copies.

use crate::harness::{Case, DTypes, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("reshape", |x| x[0].reshape([3, -1]), |x| x[0].reshape(&[3, x[0].data.len() / 3]))
            .also(&["view"])
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 2]])
            .sample(&[&[6]]),
        case("permute", |x| x[0].permute(&[2, 0, -2]), |x| x[0].permute(&[2, 0, 1]))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 4]])
            .sample(&[&[2, 0, 4]]),
        case("transpose", |x| x[0].transpose(-1, 0), |x| x[0].permute(&[1, 0]))
            .also(&["t"])
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]])
            .large(&[&[301, 517]]),
        case("expand", |x| x[0].expand([2, 3, 4]), |x| x[0].zip(&crate::reference::Array::from_fn(&[2, 3, 4], |_| 0.0), |a, _| a))
            .dtypes(DTypes::All)
            .sample(&[&[3, 1]])
            .sample(&[&[2, 1, 4]]),
        case("contiguous", |x| x[0].transpose(0, 1)?.contiguous(), |x| x[0].permute(&[1, 0]))
            .also(&["copy", "identity", "to_memory_order"])
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]]),
        case("flatten", |x| x[0].unsqueeze(1)?.flatten(1, -1)?.squeeze(0), |x| x[0].clone())
            .also(&["unsqueeze", "squeeze"])
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]]),
        case(
            "sum_to_shape",
            |x| x[0].sum_to_shape(&kiln_tensor::Shape::new(&[3, 1])?),
            |x| x[0].fold_keepdim(&[0, 2], |v| v.iter().sum()).reshape(&[3, 1]),
        )
        .sample(&[&[2, 3, 4]]),
    ]
}
