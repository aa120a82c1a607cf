//! Reading and writing at positions, and sorting.

use crate::harness::{Case, DTypes, case};
use crate::reference::{Array, indices};
use kiln_tensor::{DType, Generator, Result, Tensor};

/// A fixed index tensor of `shape` with positions below `size`, some of them repeated.
fn index(shape: &[usize], size: usize) -> Result<Tensor> {
    Tensor::from_vec((0..shape.iter().product()).map(|i| place(i, size) as i64).collect(), shape)
}

fn place(i: usize, size: usize) -> usize {
    (i * 5 + i / 3) % size
}

/// The positions of [`index`] as an array.
fn index_array(shape: &[usize], size: usize) -> Array {
    Array::new(shape, (0..shape.iter().product()).map(|i| place(i, size) as f64).collect())
}

/// `f(target, source)` at each place that a scatter of `source` by `index` along `dim` names, in order.
fn scattered(target: &Array, dim: usize, index: &Array, source: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
    let mut out = target.clone();
    for i in indices(&index.shape) {
        let mut to = i.clone();
        to[dim] = index.at(&i) as usize;
        let at = to.iter().zip(&target.shape).fold(0, |at, (i, n)| at * n + i);
        out.data[at] = f(out.data[at], source.at(&i));
    }
    out
}

pub fn cases() -> Vec<Case> {
    [by_slices(), by_elements(), sorted()].into_iter().flatten().collect()
}

fn by_slices() -> Vec<Case> {
    vec![
        case(
            "index_select",
            |x| x[0].index_select(1, &index(&[4], 3)?),
            |x| {
                let shape = [x[0].shape[0], 4, x[0].shape[2]];
                Array::from_fn(&shape, |i| x[0].at(&[i[0], place(i[1], 3), i[2]]))
            },
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3, 2]])
        .sample(&[&[2, 3, 0]])
        .large(&[&[100, 3, 700]]),
        case(
            "index_add",
            |x| x[0].index_add(0, &index(&[x[1].dims()[0]], x[0].dims()[0])?, &x[1]),
            |x| scattered(&x[0], 0, &Array::from_fn(&x[1].shape, |i| place(i[0], x[0].shape[0]) as f64), &x[1], |a, b| a + b),
        )
        .dtypes(DTypes::Numbers)
        .domain(&[(0.0, 2.0)])
        .sample(&[&[3, 2], &[4, 2]])
        .sample(&[&[3, 2], &[0, 2]])
        .large(&[&[30, 301], &[400, 301]]),
        case(
            "embedding",
            |x| index(&[2, 3], 4)?.embedding(&x[0]),
            |x| Array::from_fn(&[2, 3, 2], |i| x[0].at(&[place(i[0] * 3 + i[1], 4), i[2]])),
        )
        .sample(&[&[4, 2]])
        .large(&[&[4, 30_000]]),
        case(
            "masked_select",
            |x| x[0].masked_select(&Tensor::from_vec(vec![true, false, true], [3])?),
            |x| Array::new(&[4], vec![x[0].at(&[0, 0]), x[0].at(&[0, 2]), x[0].at(&[1, 0]), x[0].at(&[1, 2])]),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]]),
        case(
            "nonzero",
            |x| x[0].nonzero(),
            |x| {
                let found: Vec<Vec<usize>> = indices(&x[0].shape).filter(|i| x[0].at(i) != 0.0).collect();
                Array::from_fn(&[found.len(), x[0].shape.len()], |i| found[i[0]][i[1]] as f64)
            },
        )
        .dtypes(DTypes::All)
        .not_differentiable()
        .sample(&[&[3, 4]])
        .sample(&[&[0, 4]]),
        case(
            "one_hot",
            |x| x[0].to_dtype(DType::I64)?.one_hot(3),
            |x| Array::from_fn(&[2, 2, 3], |i| (x[0].at(&[i[0], i[1]]) as usize == i[2]) as u8 as f64),
        )
        .not_differentiable()
        .domain(&[(0.0, 2.9)])
        .sample(&[&[2, 2]]),
    ]
}

fn by_elements() -> Vec<Case> {
    vec![
        case(
            "gather",
            |x| x[0].gather(1, &index(&[x[0].dims()[0], 5, 1], 3)?),
            |x| Array::from_fn(&[2, 5, 1], |i| x[0].at(&[i[0], place(i[0] * 5 + i[1], 3), i[2]])),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3, 2]])
        .large(&[&[20_000, 3, 2]]),
        case(
            "scatter",
            |x| x[0].scatter(0, &index(x[1].dims(), 3)?, &x[1]),
            |x| scattered(&x[0], 0, &index_array(&x[1].shape, 3), &x[1], |_, b| b),
        )
        .dtypes(DTypes::All)
        .sample(&[&[3, 2], &[4, 2]])
        .sample(&[&[3, 2], &[0, 2]]),
        case(
            "scatter_add",
            |x| x[0].scatter_add(-1, &index(x[1].dims(), 3)?, &x[1]),
            |x| scattered(&x[0], 1, &index_array(&x[1].shape, 3), &x[1], |a, b| a + b),
        )
        .dtypes(DTypes::Numbers)
        .domain(&[(0.0, 2.0)])
        .sample(&[&[3, 3], &[2, 4]])
        .sample(&[&[3, 3], &[2, 0]])
        .large(&[&[300, 3], &[300, 400]]),
        case(
            "scatter_add",
            |x| x[0].scatter_add(0, &index(x[1].dims(), 3)?, &x[1]),
            |x| scattered(&x[0], 0, &index_array(&x[1].shape, 3), &x[1], |a, b| a + b),
        )
        .label("columns")
        .dtypes(DTypes::Numbers)
        .domain(&[(0.0, 2.0)])
        .sample(&[&[3, 3], &[4, 2]])
        .sample(&[&[3, 3], &[0, 2]])
        .large(&[&[3, 301], &[400, 300]]),
    ]
}

/// The rows of a matrix, each in order.
fn sorted_rows(x: &Array, descending: bool) -> Array {
    let n = x.shape[1];
    let mut data = x.data.clone();
    for row in data.chunks_mut(n) {
        row.sort_by(|a, b| if descending { b.total_cmp(a) } else { a.total_cmp(b) });
    }
    Array::new(&x.shape, data)
}

fn sorted() -> Vec<Case> {
    vec![
        case("sort", |x| Ok(x[0].sort(-1, false)?.0), |x| sorted_rows(&x[0], false)).distinct().sample(&[&[2, 5]]).large(&[&[300, 301]]),
        case("sort", |x| Ok(x[0].sort(0, true)?.0), |x| sorted_rows(&x[0].permute(&[1, 0]), true).permute(&[1, 0]))
            .label("descending columns")
            .distinct()
            .sample(&[&[4, 3]]),
        case("argsort", |x| x[0].gather(1, &x[0].argsort(1, false)?), |x| sorted_rows(&x[0], false))
            .distinct()
            .dtypes(DTypes::All)
            .sample(&[&[3, 4]]),
        case(
            "topk",
            |x| Ok(x[0].topk(2, 1, true)?.0),
            |x| {
                let sorted = sorted_rows(&x[0], true);
                Array::from_fn(&[3, 2], |i| sorted.at(i))
            },
        )
        .distinct()
        .sample(&[&[3, 5]]),
        case(
            "dropout",
            |x| Generator::new(3).dropout(&x[0], 0.5),
            |x| {
                let kept = Generator::new(3).rand_bool(0.5, x[0].shape.as_slice()).unwrap().to_vec::<bool>().unwrap();
                Array::new(&x[0].shape, x[0].data.iter().zip(kept).map(|(x, dropped)| if dropped { 0.0 } else { 2.0 * x }).collect())
            },
        )
        .sample(&[&[3, 5]])
        .sample(&[&[0, 5]])
        .large(&[&[300, 301]]),
    ]
}

/// A position out of range is an error that names it, never a panic.
#[test]
fn bad_positions_are_errors() {
    let x = Tensor::zeros([2, 3], ()).unwrap();
    let at = |positions: &[i64]| Tensor::from_slice(positions, positions.len()).unwrap();
    let error = x.index_select(1, &at(&[0, 3])).unwrap_err();
    assert_eq!(error.to_string(), "index_select: index 3 is out of range for a dimension of 3 elements");
    let grid = |p: i64| Tensor::from_vec(vec![0, p], [2, 1]).unwrap();
    let source = Tensor::zeros([2, 1], ()).unwrap();
    for bad in [-1, 3, i64::MIN, i64::MAX] {
        assert!(x.index_select(1, &at(&[bad])).is_err());
        assert!(x.index_add(1, &at(&[bad]), &source).is_err());
        assert!(x.gather(1, &grid(bad)).is_err());
        assert!(x.scatter(1, &grid(bad), &source).is_err());
        assert!(x.scatter_add(1, &grid(bad), &source).is_err());
        assert!(at(&[bad]).one_hot(3).is_err());
        assert!(at(&[bad]).embedding(&x.t().unwrap()).is_err());
    }
    assert!(x.index_select(1, &x).is_err() && x.gather(1, &x).is_err() && x.gather(1, &at(&[0])).is_err());
    assert!(x.masked_select(&x).is_err() && x.topk(4, 1, true).is_err());
    assert!(Tensor::zeros([0, 3], ()).unwrap().gather(0, &grid(0)).is_err());
}
