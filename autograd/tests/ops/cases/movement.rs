//! Views, copies, and what joins tensors.

use crate::harness::{Case, DTypes, case};
use crate::reference::Array;
use kiln_tensor::ops::movement::{Ellipsis, NewAxis, PadMode};
use kiln_tensor::{DType, Device, Tensor, default_device};

pub fn cases() -> Vec<Case> {
    [views(), parts(), joined(), padded()].into_iter().flatten().collect()
}

fn views() -> Vec<Case> {
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
        case("expand", |x| x[0].expand([2, 3, 4]), |x| x[0].zip(&Array::from_fn(&[2, 3, 4], |_| 0.0), |a, _| a))
            .dtypes(DTypes::All)
            .sample(&[&[3, 1]])
            .sample(&[&[2, 1, 4]]),
        case("contiguous", |x| x[0].transpose(0, 1)?.contiguous(), |x| x[0].permute(&[1, 0]))
            .also(&["copy", "identity", "to_memory_order"])
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]]),
        case("to_device", |x| x[0].t()?.to_device(Device::Cpu)?.to_device(default_device()), |x| x[0].permute(&[1, 0]))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]])
            .sample(&[&[2, 0]]),
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

/// `x[start..][..len]` with a step, along `dim`.
fn part(x: &Array, dim: usize, start: usize, len: usize, step: usize) -> Array {
    let mut shape = x.shape.clone();
    shape[dim] = len;
    Array::from_fn(&shape, |i| {
        let mut i = i.to_vec();
        i[dim] = start + step * i[dim];
        x.at(&i)
    })
}

/// The arrays one behind the other along `dim`.
fn joined_along(parts: &[&Array], dim: usize) -> Array {
    let mut shape = parts[0].shape.clone();
    shape[dim] = parts.iter().map(|p| p.shape[dim]).sum();
    Array::from_fn(&shape, |i| {
        let mut i = i.to_vec();
        let mut k = 0;
        while i[dim] >= parts[k].shape[dim] {
            i[dim] -= parts[k].shape[dim];
            k += 1;
        }
        parts[k].at(&i)
    })
}

fn parts() -> Vec<Case> {
    vec![
        case("narrow", |x| x[0].narrow(-2, 1, 2), |x| part(&x[0], 1, 1, 2, 1))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 4]])
            .sample(&[&[2, 3, 0]])
            .large(&[&[200, 3, 300]]),
        case(
            "write_slice",
            |x| {
                let mut out = x[0].detach().copy()?;
                out.write_slice(-2, 1, &x[1].detach())?;
                Ok(out)
            },
            |x| {
                Array::from_fn(&x[0].shape, |i| {
                    let (dim, len) = (i.len() - 2, x[1].shape[i.len() - 2]);
                    let mut at = i.to_vec();
                    at[dim] = at[dim].wrapping_sub(1);
                    if at[dim] < len { x[1].at(&at) } else { x[0].at(i) }
                })
            },
        )
        .dtypes(DTypes::All)
        .not_differentiable()
        .sample(&[&[2, 4, 3], &[2, 2, 3]])
        .sample(&[&[3, 5], &[0, 5]])
        .sample(&[&[2, 1, 0], &[2, 0, 0]])
        .large(&[&[200, 40, 30], &[200, 17, 30]]),
        case("slice", |x| x[0].slice(1, 1, -1, 2), |x| part(&x[0], 1, 1, 2, 2))
            .dtypes(DTypes::All)
            .sample(&[&[2, 5, 3]])
            .sample(&[&[1, 6]]),
        case("select", |x| x[0].select(1, -1), |x| part(&x[0], 1, 2, 1, 1).reshape(&[2, 4])).dtypes(DTypes::All).sample(&[&[2, 3, 4]]),
        case(
            "i",
            |x| x[0].i((1.., -1, NewAxis, (.., 2), Ellipsis)),
            |x| part(&part(&part(&x[0], 0, 1, 2, 1), 1, 2, 1, 1), 2, 0, 2, 2).reshape(&[2, 1, 2, 2]),
        )
        .dtypes(DTypes::All)
        .sample(&[&[3, 3, 4, 2]]),
        case(
            "i",
            |x| x[0].i((.., &Tensor::from_vec(vec![2i64, 0, 2], [3])?)),
            |x| joined_along(&[&part(&x[0], 1, 2, 1, 1), &part(&x[0], 1, 0, 1, 1), &part(&x[0], 1, 2, 1, 1)], 1),
        )
        .label("positions")
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]]),
        case(
            "split",
            |x| Tensor::stack(&[&x[0].split(&[1, 2, 3], 1)?[1], &x[0].chunk(3, 1)?[2]], 0),
            |x| {
                let (a, b) = (part(&x[0], 1, 1, 2, 1), part(&x[0], 1, 4, 2, 1));
                joined_along(&[&a.reshape(&[1, 2, 2]), &b.reshape(&[1, 2, 2])], 0)
            },
        )
        .also(&["chunk"])
        .dtypes(DTypes::All)
        .sample(&[&[2, 6]]),
        case("diagonal", |x| x[0].diagonal(1, 0, -1), |x| Array::from_fn(&[3, 2], |i| x[0].at(&[i[1], i[0], i[1] + 1])))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 4]]),
        case("diagonal", |x| x[0].diagonal(-1, 0, 1), |x| Array::from_fn(&[2], |i| x[0].at(&[i[0] + 1, i[0]])))
            .label("below")
            .sample(&[&[3, 3]]),
        case("unfold", |x| x[0].unfold(1, 3, 2), |x| Array::from_fn(&[2, 3, 2, 3], |i| x[0].at(&[i[0], i[1] * 2 + i[3], i[2]])))
            .dtypes(DTypes::All)
            .sample(&[&[2, 7, 2]]),
        case("movedim", |x| x[0].movedim(0, -1), |x| x[0].permute(&[1, 2, 0])).dtypes(DTypes::All).sample(&[&[2, 3, 4]]),
    ]
}

fn joined() -> Vec<Case> {
    vec![
        case("cat", |x| Tensor::cat(x, 1), |x| joined_along(&x.iter().collect::<Vec<_>>(), 1))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 2], &[2, 1, 2], &[2, 0, 2]])
            .sample(&[&[2, 3], &[2, 2]])
            .large(&[&[300, 200], &[300, 301]]),
        case(
            "stack",
            |x| Tensor::stack(x, -1),
            |x| Array::from_fn(&[&x[0].shape[..], &[x.len()]].concat(), |i| x[i[i.len() - 1]].at(&i[..i.len() - 1])),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3], &[2, 3]])
        .sample(&[&[], &[], &[]]),
        case(
            "repeat",
            |x| x[0].repeat(&[2, 1, 3]),
            |x| Array::from_fn(&[2, x[0].shape[0], 3 * x[0].shape[1]], |i| x[0].at(&[i[1], i[2] % x[0].shape[1]])),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]])
        .sample(&[&[0, 2]]),
        case(
            "repeat",
            |x| x[0].repeat(&[2, 2, 3, 2, 2]),
            |x| {
                let shape: Vec<usize> = x[0].shape.iter().zip([2, 2, 3, 2, 2]).map(|(n, count)| n * count).collect();
                Array::from_fn(&shape, |i| x[0].at(&i.iter().zip(&x[0].shape).map(|(i, n)| i % n).collect::<Vec<_>>()))
            },
        )
        .label("more dimensions than a copy has")
        .sample(&[&[1, 2, 1, 2, 2]]),
        case(
            "flip",
            |x| x[0].flip([0, -1]),
            |x| Array::from_fn(&x[0].shape, |i| x[0].at(&[x[0].shape[0] - 1 - i[0], i[1], x[0].shape[2] - 1 - i[2]])),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 2, 3]]),
        case("roll", |x| x[0].roll(-2, 1), |x| Array::from_fn(&x[0].shape, |i| x[0].at(&[i[0], (i[1] + 2) % x[0].shape[1]])))
            .dtypes(DTypes::All)
            .sample(&[&[2, 5]])
            .sample(&[&[2, 0]]),
        case("tril", |x| x[0].tril(1), |x| Array::from_fn(&x[0].shape, |i| if i[2] <= i[1] + 1 { x[0].at(i) } else { 0.0 }))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 4]])
            .large(&[&[3, 200, 300]]),
        case("triu", |x| x[0].triu(-1), |x| Array::from_fn(&x[0].shape, |i| if i[1] + 1 >= i[0] { x[0].at(i) } else { 0.0 }))
            .dtypes(DTypes::All)
            .sample(&[&[4, 3]]),
    ]
}

/// The array with a border: `source(i, n)` says where element i (which may lie outside of 0..n) of each dimension comes from.
fn bordered(x: &Array, before: &[isize], shape: &[usize], outside: f64, source: impl Fn(isize, isize) -> Option<isize>) -> Array {
    Array::from_fn(shape, |i| {
        let from: Option<Vec<usize>> =
            (0..i.len()).map(|d| source(i[d] as isize - before[d], x.shape[d] as isize).map(|at| at as usize)).collect();
        from.map_or(outside, |at| x.at(&at))
    })
}

fn padded() -> Vec<Case> {
    let inside = |i, n| (0..n).contains(&i).then_some(i);
    vec![
        case(
            "pad",
            |x| x[0].pad(&[1, 2, 0, 1], PadMode::Constant(3.0)),
            move |x| bordered(&x[0], &[0, 0, 1], &[2, 3, x[0].shape[2] + 3], 3.0, inside),
        )
        .sample(&[&[2, 2, 3]])
        .sample(&[&[2, 2, 0]])
        .large(&[&[30, 20, 301]]),
        case(
            "pad",
            |x| x[0].pad(&[-1, 2, 1, -2], PadMode::Constant(0.0)),
            move |x| {
                let cropped = part(&part(&x[0], 0, 0, 1, 1), 1, 1, 3, 1);
                bordered(&cropped, &[1, 0], &[2, 5], 0.0, inside)
            },
        )
        .label("crop")
        .dtypes(DTypes::All)
        .sample(&[&[3, 4]]),
        case(
            "pad",
            |x| x[0].pad(&[2, 1, 1, 0], PadMode::Reflect),
            |x| bordered(&x[0], &[1, 2], &[4, 6], 0.0, |i: isize, n| Some(if i.abs() < n { i.abs() } else { 2 * (n - 1) - i })),
        )
        .label("reflect")
        .dtypes(DTypes::All)
        .sample(&[&[3, 3]]),
        case(
            "pad",
            |x| x[0].pad(&[4, 1], PadMode::Replicate),
            |x| bordered(&x[0], &[0, 4], &[2, 8], 0.0, |i: isize, n| Some(i.clamp(0, n - 1))),
        )
        .label("replicate")
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]]),
        case(
            "pad",
            |x| x[0].pad(&[2, 3], PadMode::Circular),
            |x| bordered(&x[0], &[0, 2], &[2, 8], 0.0, |i: isize, n| Some(i.rem_euclid(n))),
        )
        .label("circular")
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]]),
    ]
}

/// What lies outside of a tensor is an error that says so, never a panic.
#[test]
fn bad_arguments_are_errors() {
    let x = Tensor::zeros([2, 3], ()).unwrap();
    let text = |r: kiln_tensor::Result<Tensor>| r.unwrap_err().to_string();
    assert_eq!(text(x.narrow(1, 2, 2)), "narrow: 2 elements from 2 on leave dimension 1 of shape [2, 3]");
    assert_eq!(text(x.select(0, -3)), "select: index -3 is out of range for dimension 0 of shape [2, 3]");
    assert!(x.narrow(1, usize::MAX, 2).is_err() && x.slice(0, 0, 2, 0).is_err() && x.select(0, isize::MIN).is_err());
    let mut filled = x.detach().copy().unwrap();
    assert!(filled.write_slice(1, 2, &Tensor::zeros([2, 2], ()).unwrap()).unwrap_err().to_string().contains("does not fit"));
    assert!(filled.write_slice(0, usize::MAX, &x).is_err() && filled.write_slice(0, 0, &Tensor::zeros([3], ()).unwrap()).is_err());
    assert!(filled.write_slice(0, 0, &x.to_dtype(DType::F64).unwrap()).is_err());
    let tracked = x.requires_grad_().unwrap();
    assert!(filled.write_slice(0, 0, &tracked).unwrap_err().to_string().contains("gradient"));
    assert!(tracked.clone().write_slice(0, 0, &x).is_err());
    assert!(x.i((0, 0, 0)).is_err() && x.i((Ellipsis, Ellipsis)).is_err() && x.i(5).is_err());
    assert!(x.split(&[1, 3], 1).is_err() && x.split(&[usize::MAX, 4], 1).is_err() && x.chunk(0, 1).is_err());
    assert!(Tensor::cat::<Tensor>(&[], 0).is_err() && Tensor::cat(&[&x, &x.t().unwrap()], 0).is_err());
    assert!(x.pad(&[1], PadMode::Reflect).is_err() && x.pad(&[3, 0], PadMode::Reflect).is_err());
    assert!(x.pad(&[isize::MAX, 1], PadMode::Replicate).is_err() && x.pad(&[1, isize::MAX], PadMode::Circular).is_err());
    assert!(x.pad(&[-2, -2], PadMode::Constant(0.0)).is_err() && x.pad(&[isize::MAX, isize::MAX], PadMode::Constant(0.0)).is_err());
    assert!(x.unfold(0, 3, 1).is_err() && x.unfold(0, 1, 0).is_err() && x.diagonal(0, 1, 1).is_err());
    assert_eq!(x.diagonal(isize::MAX, 0, 1).unwrap().dims(), [0]);
    assert!(x.repeat(&[2]).is_err() && x.repeat(&[usize::MAX, 2]).is_err());
    assert_eq!(x.slice(1, isize::MIN, isize::MAX, usize::MAX).unwrap().dims(), [2, 1]);
}
