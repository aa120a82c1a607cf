//! Properties over random chains of views, against a model that knows of no strides: where each element comes from, kept as a list.
//! Values are small integers, so that every comparison is exact.

use kiln_autograd::grad;
use kiln_tensor::{DType, Result, Tensor, broadcast_shapes};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// A view of a row-major base, element by element.
#[derive(Clone, Debug)]
struct Model {
    shape: Vec<usize>,
    /// The base's index of each element.
    from: Vec<usize>,
}

impl Model {
    fn base(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), from: (0..shape.iter().product()).collect() }
    }

    /// The view whose element at an index is this one's at `old(index)`.
    fn view(&self, shape: Vec<usize>, old: impl Fn(&[usize]) -> Vec<usize>) -> Self {
        let from = indices(&shape).map(|index| self.from[place(&self.shape, &old(&index))]).collect();
        Self { shape, from }
    }
}

/// All indices of a shape in row-major order.
fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    (0..shape.iter().product()).map(move |mut at: usize| {
        let mut index = vec![0; shape.len()];
        for (i, &extent) in index.iter_mut().zip(shape).rev() {
            (*i, at) = (at % extent, at / extent);
        }
        index
    })
}

/// The row-major place of an index.
fn place(shape: &[usize], index: &[usize]) -> usize {
    shape.iter().zip(index).fold(0, |at, (&extent, &i)| at * extent + i)
}

/// A step of a chain. The numbers choose among what the shape at hand allows.
#[derive(Clone, Copy, Debug)]
enum Step {
    Transpose(usize, usize),
    Narrow(usize, usize, usize),
    Slice(usize, usize, usize),
    Flip(usize),
    Select(usize, usize),
    Unsqueeze(usize),
    Expand(usize, usize),
    Diagonal(usize, usize),
    Unfold(usize, usize, usize),
    Merge(usize),
    Contiguous,
    Ordered(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let n = || 0usize..64;
    prop_oneof![
        (n(), n()).prop_map(|(a, b)| Step::Transpose(a, b)),
        (n(), n(), n()).prop_map(|(a, b, c)| Step::Narrow(a, b, c)),
        (n(), n(), n()).prop_map(|(a, b, c)| Step::Slice(a, b, c)),
        n().prop_map(Step::Flip),
        (n(), n()).prop_map(|(a, b)| Step::Select(a, b)),
        n().prop_map(Step::Unsqueeze),
        (n(), n()).prop_map(|(a, b)| Step::Expand(a, b)),
        (n(), n()).prop_map(|(a, b)| Step::Diagonal(a, b)),
        (n(), n(), n()).prop_map(|(a, b, c)| Step::Unfold(a, b, c)),
        n().prop_map(Step::Merge),
        Just(Step::Contiguous),
        (n(), n()).prop_map(|(a, b)| Step::Ordered(a, b)),
    ]
}

/// A base's shape, with a dimension of no elements now and then, and a chain of steps.
fn chain() -> impl Strategy<Value = (Vec<usize>, Vec<Step>)> {
    let extent = prop_oneof![1 => Just(0usize), 3 => Just(1usize), 12 => 2usize..6];
    (prop::collection::vec(extent, 0..5), prop::collection::vec(step(), 0..6))
}

/// Takes a step on both sides; steps that the shape does not allow are left out.
fn take(step: Step, x: Tensor, model: Model) -> Result<(Tensor, Model)> {
    let (shape, rank) = (model.shape.clone(), model.shape.len());
    let with = |dim: usize, extent: usize| {
        let mut shape = shape.clone();
        shape[dim] = extent;
        shape
    };
    let moved = |index: &[usize], dim: usize, to: usize| {
        let mut index = index.to_vec();
        index[dim] = to;
        index
    };
    Ok(match step {
        Step::Contiguous => (x.contiguous()?, model),
        Step::Unsqueeze(a) if rank < 6 => {
            let dim = a % (rank + 1);
            let mut new = shape.clone();
            new.insert(dim, 1);
            let model = model.view(new, |index| [&index[..dim], &index[dim + 1..]].concat());
            (x.unsqueeze(dim as isize)?, model)
        }
        _ if rank == 0 => (x, model),
        Step::Ordered(a, b) => {
            let mut order: Vec<usize> = (0..rank).collect();
            order.swap(a % rank, b % rank);
            order.rotate_left(b % rank);
            let ordered = x.to_memory_order(&order)?;
            assert!(ordered.permute(&order.iter().map(|&d| d as isize).collect::<Vec<_>>())?.is_contiguous());
            (ordered, model)
        }
        Step::Transpose(a, b) => {
            let (a, b) = (a % rank, b % rank);
            let swap = |index: &[usize]| {
                let mut index = index.to_vec();
                index.swap(a, b);
                index
            };
            (x.transpose(a as isize, b as isize)?, model.view(swap(&shape), swap))
        }
        Step::Narrow(a, b, c) => {
            let dim = a % rank;
            let start = b % (shape[dim] + 1);
            let len = c % (shape[dim] - start + 1);
            let model = model.view(with(dim, len), |index| moved(index, dim, start + index[dim]));
            (x.narrow(dim as isize, start, len)?, model)
        }
        Step::Slice(a, b, c) => {
            let dim = a % rank;
            let (start, step) = (b % (shape[dim] + 1), 1 + c % 3);
            let len = (shape[dim] - start).div_ceil(step);
            let model = model.view(with(dim, len), |index| moved(index, dim, start + step * index[dim]));
            (x.slice(dim as isize, start as isize, shape[dim] as isize, step)?, model)
        }
        Step::Flip(a) => {
            let dim = a % rank;
            let model = model.view(shape.clone(), |index| moved(index, dim, shape[dim] - 1 - index[dim]));
            (x.flip(dim as isize)?, model)
        }
        Step::Select(a, b) if shape[a % rank] > 0 => {
            let (dim, at) = (a % rank, b % shape[a % rank]);
            let mut new = shape.clone();
            new.remove(dim);
            let model = model.view(new, |index| [&index[..dim], &[at], &index[dim..]].concat());
            (x.select(dim as isize, at as isize)?, model)
        }
        Step::Expand(a, b) if shape[a % rank] == 1 && model.from.len() < 512 => {
            let dim = a % rank;
            let new = with(dim, b % 4);
            (x.expand(&new[..])?, model.view(new, |index| moved(index, dim, 0)))
        }
        Step::Diagonal(a, b) if rank >= 2 && a % rank != b % rank => {
            let (one, two) = (a % rank, b % rank);
            let len = shape[one].min(shape[two]);
            let rest: Vec<usize> = (0..rank).filter(|&d| d != one && d != two).collect();
            let new = rest.iter().map(|&d| shape[d]).chain([len]).collect();
            let model = model.view(new, |index| {
                let mut old = vec![index[rank - 2]; rank];
                rest.iter().zip(index).for_each(|(&d, &i)| old[d] = i);
                old
            });
            (x.diagonal(0, one as isize, two as isize)?, model)
        }
        Step::Unfold(a, b, c) if rank < 6 && shape[a % rank] > 0 && model.from.len() < 512 => {
            let dim = a % rank;
            let (size, step) = (1 + b % shape[dim], 1 + c % 3);
            let mut new = with(dim, (shape[dim] - size) / step + 1);
            new.push(size);
            let model = model.view(new, |index| moved(&index[..rank], dim, index[dim] * step + index[rank]));
            (x.unfold(dim as isize, size, step)?, model)
        }
        Step::Merge(a) if rank >= 2 => {
            let dim = a % (rank - 1);
            let mut new = shape.clone();
            new[dim] *= new.remove(dim + 1);
            let shape: Vec<isize> = new.iter().map(|&extent| extent as isize).collect();
            (x.reshape(&shape[..])?, Model { shape: new, from: model.from })
        }
        _ => (x, model),
    })
}

fn apply(steps: &[Step], x: &Tensor, shape: &[usize]) -> Result<(Tensor, Model)> {
    steps.iter().try_fold((x.clone(), Model::base(shape)), |(x, model), &step| take(step, x, model))
}

/// A base of distinct small integers.
fn base(shape: &[usize]) -> Result<Tensor> {
    let n = shape.iter().product::<usize>();
    Tensor::from_vec((0..n).map(|i| i as f64 - 3.0).collect(), shape)
}

fn values(model: &Model) -> Vec<f64> {
    model.from.iter().map(|&i| i as f64 - 3.0).collect()
}

/// The model's values spread over a shape that it broadcasts to.
fn spread(model: &Model, to: &[usize]) -> Vec<f64> {
    let own = &model.shape;
    indices(to)
        .map(|index| {
            let tail = &index[to.len() - own.len()..];
            let own_index: Vec<usize> = tail.iter().zip(own).map(|(&i, &extent)| if extent == 1 { 0 } else { i }).collect();
            model.from[place(own, &own_index)] as f64 - 3.0
        })
        .collect()
}

/// NumPy's rule, from its definition.
fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let extent = |s: &[usize], d: usize| if d + s.len() < rank { 1 } else { s[d + s.len() - rank] };
    (0..rank)
        .map(|d| match (extent(a, d), extent(b, d)) {
            (x, y) if x == y => Some(x),
            (1, x) | (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

fn shows_its_elements(shape: &[usize], steps: &[Step]) -> Result<()> {
    let (y, model) = apply(steps, &base(shape)?, shape)?;
    assert_eq!(y.dims(), model.shape);
    assert_eq!(y.to_vec::<f64>()?, values(&model));
    Ok(())
}

fn gradient_returns(shape: &[usize], steps: &[Step]) -> Result<()> {
    let x = base(shape)?.requires_grad_()?;
    let (y, model) = apply(steps, &x, shape)?;
    let weights: Vec<f64> = (0..model.from.len()).map(|i| (i % 17) as f64 - 8.0).collect();
    let mut expected = vec![0.0; x.numel()];
    model.from.iter().zip(&weights).for_each(|(&at, w)| expected[at] += w);
    let weighted = y.mul(&Tensor::from_vec(weights, &model.shape[..])?)?.sum(())?;
    assert_eq!(grad(&weighted, &[&x])?[0].to_vec::<f64>()?, expected);
    Ok(())
}

fn broadcasts((one, first): (&[usize], &[Step]), (two, second): (&[usize], &[Step])) -> Result<()> {
    let (x, a) = apply(first, &base(one)?, one)?;
    let (y, b) = apply(second, &base(two)?, two)?;
    let (difference, common) = (x.sub(&y), broadcast_shapes("test", x.shape(), y.shape()));
    match broadcast(&a.shape, &b.shape) {
        None => assert!(difference.is_err() && common.is_err()),
        Some(shape) => {
            let expected: Vec<f64> = spread(&a, &shape).iter().zip(spread(&b, &shape)).map(|(x, y)| x - y).collect();
            assert_eq!((difference.as_ref().map(Tensor::dims).ok(), common?.dims()), (Some(&shape[..]), &shape[..]));
            assert_eq!(difference?.to_vec::<f64>()?, expected);
        }
    }
    Ok(())
}

fn reduces(shape: &[usize], steps: &[Step], axes: [bool; 6]) -> Result<()> {
    let (y, model) = apply(steps, &base(shape)?, shape)?;
    let (reduced, kept): (Vec<usize>, Vec<usize>) = (0..model.shape.len()).partition(|&d| axes[d]);
    if reduced.is_empty() {
        return Ok(());
    }
    let dims: Vec<isize> = reduced.iter().map(|&d| d as isize).collect();
    let kept_shape: Vec<usize> = kept.iter().map(|&d| model.shape[d]).collect();
    let mut sums = vec![0.0; kept_shape.iter().product()];
    let mut largest = vec![f64::NEG_INFINITY; sums.len()];
    for (index, value) in indices(&model.shape).zip(values(&model)) {
        let at = place(&kept_shape, &kept.iter().map(|&d| index[d]).collect::<Vec<_>>());
        sums[at] += value;
        largest[at] = f64::max(largest[at], value);
    }
    // Each has its own lanes: f32 those of the instruction set, f16 and i32 are widened first.
    for dtype in [DType::F64, DType::F32, DType::F16, DType::I32] {
        let typed = y.to_dtype(dtype)?;
        let sum = typed.sum(&dims[..])?;
        assert_eq!(sum.dims(), kept_shape);
        // Sums in f16 may be rounded.
        if dtype != DType::F16 {
            assert_eq!(sum.to_dtype(DType::F64)?.to_vec::<f64>()?, sums);
        }
        if !model.from.is_empty() {
            assert_eq!(typed.max(&dims[..])?.to_dtype(DType::F64)?.to_vec::<f64>()?, largest);
        }
    }
    Ok(())
}

#[test]
fn an_order_names_each_dimension_once() -> Result<()> {
    let x = base(&[2, 3, 4])?;
    for order in [&[][..], &[0, 1], &[0, 1, 1], &[0, 1, 3], &[0, 1, 2, 0], &[usize::MAX, 1, 2]] {
        let error = x.to_memory_order(order).unwrap_err().to_string();
        assert!(error.contains("to_memory_order") && error.contains("[2, 3, 4]"), "{order:?}: {error}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_of_views_shows_the_elements_it_should((shape, steps) in chain()) {
        shows_its_elements(&shape, &steps).unwrap();
    }

    #[test]
    fn the_gradient_of_a_chain_returns_each_element_to_its_place((shape, steps) in chain()) {
        gradient_returns(&shape, &steps).unwrap();
    }

    #[test]
    fn operands_broadcast_as_numpy_says((one, first) in chain(), (two, second) in chain()) {
        broadcasts((&one, &first), (&two, &second)).unwrap();
    }

    #[test]
    fn reductions_see_every_element_of_any_layout((shape, steps) in chain(), axes in any::<[bool; 6]>()) {
        reduces(&shape, &steps, axes).unwrap();
    }
}
