//! Reductions.

use crate::harness::{Case, DTypes, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("sum", |x| x[0].sum([0, -1]), |x| x[0].fold(&[0, 2], |v| v.iter().sum()))
            .dtypes(DTypes::Numbers)
            .sample(&[&[2, 3, 4]])
            .sample(&[&[2, 0, 4]]),
        case("sum_keepdim", |x| x[0].sum_keepdim(1), |x| x[0].fold_keepdim(&[1], |v| v.iter().sum()))
            .sample(&[&[2, 3]])
            .large(&[&[1000, 1001]]),
    ]
}
