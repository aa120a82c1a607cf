//! Reductions over any set of dimensions of any strided view: sums, products, extremes and where they are, truth, norms, moments, log-sum-exp.
//!
//! `axes[d]` says whether dimension `d` is reduced; outputs are row-major over the other dimensions. Sums are taken in short
//! blocks (pairwise within them), and the blocks' sums in f64 or i64. The order of the elements follows shape and strides only.
//! Sums and means also take elements that are made as they are read ([`Elements`]): the results of a chain of pointwise functions.

mod fold;
mod plan;

use super::lanes::{FloatElement, Numeric};
use super::parallel::SharedMut;
use super::simd::Simd;
use crate::element::Bool;
use crate::view::StridedView;
use fold::{
    AbsExtreme, AbsSum, ArgExtreme, CountNonzero, Each, Extreme, Fold, Found, LogSumExp, Moments, PowerSum, Product, SquareSum, Sum, Truth,
};
use plan::Plan;

pub use fold::Spread;
pub use plan::{Elements, Source};

/// Reduces `x` by `fold` and writes what `finish` makes of each result and the number of elements.
fn reduce<T: Numeric, F: Fold<T::Lane>, O: Copy + Send>(
    x: impl Elements<T>,
    axes: &[bool],
    fold: F,
    out: &mut [O],
    finish: impl Fn(F::Acc, usize) -> O + Sync,
) {
    let len = out.len();
    let out = SharedMut::new(out);
    // SAFETY: `at` is below the length and comes once, and `out` is borrowed until all are written.
    reduce_each(x, axes, fold, len, |at, acc, count| unsafe { out.get().add(at).write(finish(acc, count)) });
}

/// Reduces `x` by `fold` and calls `put` with the number of each of the `len` outputs, once, its result and the number of elements.
fn reduce_each<T: Numeric, F: Fold<T::Lane>>(
    x: impl Elements<T>,
    axes: &[bool],
    fold: F,
    len: usize,
    put: impl Fn(usize, F::Acc, usize) + Sync,
) {
    let plan = Plan::new(&x, axes);
    assert_eq!(len, plan.outputs(), "one output for each index of the kept dimensions");
    let count = plan.reduced();
    let emit = |first: usize, stride: usize, accs: &[F::Acc]| {
        assert!(accs.is_empty() || first + (accs.len() - 1) * stride < len);
        if stride == 1 {
            // A case of its own, which the compiler vectorises.
            accs.iter().enumerate().for_each(|(i, &acc)| put(first + i, acc, count));
        } else {
            accs.iter().enumerate().for_each(|(i, &acc)| put(first + i * stride, acc, count));
        }
    };
    x.with_source(|source| plan.run(source, fold, &emit));
}

/// Σ x. Sums of integers and booleans are i64 and wrap.
pub fn sum<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T::Total]) {
    sum_of(x, axes, out);
}

/// [`sum`], of elements that need not be in memory.
pub fn sum_of<T: Numeric>(x: impl Elements<T>, axes: &[bool], out: &mut [T::Total]) {
    reduce(x, axes, Each(Sum), out, |acc, _| T::total(acc));
}

/// Σ x / n; NaN for no elements.
pub fn mean<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T]) {
    mean_of(x, axes, out);
}

/// [`mean`], of elements that need not be in memory.
pub fn mean_of<T: FloatElement>(x: impl Elements<T>, axes: &[bool], out: &mut [T]) {
    reduce(x, axes, Each(Sum), out, |acc, n| T::total(acc / n as f64));
}

/// Π x. Products of integers and booleans are i64 and wrap.
pub fn prod<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T::Total]) {
    reduce(x, axes, Each(Product), out, |acc, _| T::total(acc));
}

/// The largest element; NaN if any is. The caller refuses reductions over nothing.
pub fn max<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T]) {
    reduce(x, axes, Each(Extreme::<true>), out, |acc, _| T::from_lane(acc));
}

/// The smallest element; NaN if any is. The caller refuses reductions over nothing.
pub fn min<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T]) {
    reduce(x, axes, Each(Extreme::<false>), out, |acc, _| T::from_lane(acc));
}

/// The largest element along dimension `axis` and its first index there; a NaN counts as the largest.
///
/// # Panics
/// If the dimension is empty and there are outputs.
pub fn max_with_index<T: Numeric>(x: StridedView<'_, T>, axis: usize, out: &mut [T], index: &mut [i64]) {
    extreme_with_index::<T, true>(x, axis, out, index);
}

/// The smallest element along dimension `axis` and its first index there; a NaN counts as the smallest.
///
/// # Panics
/// If the dimension is empty and there are outputs.
pub fn min_with_index<T: Numeric>(x: StridedView<'_, T>, axis: usize, out: &mut [T], index: &mut [i64]) {
    extreme_with_index::<T, false>(x, axis, out, index);
}

fn extreme_with_index<T: Numeric, const MAX: bool>(x: StridedView<'_, T>, axis: usize, out: &mut [T], index: &mut [i64]) {
    let axes: Vec<bool> = (0..x.shape().len()).map(|d| d == axis).collect();
    assert!(out.is_empty() || x.shape()[axis] > 0, "no element along the dimension");
    assert_eq!(out.len(), index.len());
    let len = out.len();
    let (out, index) = (SharedMut::new(out), SharedMut::new(index));
    reduce_each(x, &axes, ArgExtreme::<MAX>, len, |at, found: Found<T::Lane>, _| {
        // SAFETY: `at` is below the length of both and comes once, and both are borrowed until all are written.
        unsafe {
            out.get().add(at).write(T::from_lane(found.value));
            index.get().add(at).write(found.index as i64);
        }
    });
}

/// Whether any element is not zero; false for none.
pub fn any<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [Bool]) {
    reduce(x, axes, Each(Truth::<true>), out, |acc, _| Bool::from(acc != T::Lane::default()));
}

/// Whether all elements are not zero; true for none.
pub fn all<T: Numeric>(x: StridedView<'_, T>, axes: &[bool], out: &mut [Bool]) {
    reduce(x, axes, Each(Truth::<false>), out, |acc, _| Bool::from(acc != T::Lane::default()));
}

/// Mean, squared deviations and number of elements, in f64.
pub fn moments<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], out: &mut [Spread]) {
    reduce(x, axes, Moments, out, |acc, _| acc);
}

/// Σ (x − mean)² / (n − correction); the divisor is 0 where the correction exceeds n.
pub fn var<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], correction: f64, out: &mut [T]) {
    reduce(x, axes, Moments, out, |acc: Spread, _| T::total(acc.variance(correction)));
}

/// The square root of the variance.
pub fn std<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], correction: f64, out: &mut [T]) {
    reduce(x, axes, Moments, out, |acc: Spread, _| T::total(acc.variance(correction).sqrt()));
}

/// (Σ |x|^p)^(1/p); p = ∞ gives the largest |x|, −∞ the smallest, 0 the number of elements that are not zero.
pub fn norm<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], p: f64, out: &mut [T]) {
    if p == f64::INFINITY {
        reduce(x, axes, Each(AbsExtreme::<true>), out, |acc, _| T::from_lane(acc));
    } else if p == f64::NEG_INFINITY {
        reduce(x, axes, Each(AbsExtreme::<false>), out, |acc, _| T::from_lane(acc));
    } else if p == 0.0 {
        reduce(x, axes, Each(CountNonzero), out, |acc, _| T::total(acc));
    } else if p == 1.0 {
        reduce(x, axes, Each(AbsSum), out, |acc, _| T::total(acc));
    } else if p == 2.0 {
        reduce(x, axes, Each(SquareSum), out, |acc: f64, _| T::total(acc.sqrt()));
    } else {
        reduce(x, axes, Each(PowerSum(p)), out, |acc: f64, _| T::total(acc.powf(1.0 / p)));
    }
}

/// log Σ exp(x), which never overflows; −∞ for no elements.
pub fn logsumexp<T: FloatElement>(x: StridedView<'_, T>, axes: &[bool], out: &mut [T]) {
    reduce(x, axes, LogSumExp, out, |acc, _| T::total(acc.log()));
}

/// The largest of `x`; NaN if any is, −∞ for none.
#[inline(always)]
pub(crate) fn row_max<T: FloatElement, S: Simd>(s: S, x: &[T]) -> T::Lane {
    Each(Extreme::<true>).row(s, x, 0)
}

#[cfg(test)]
mod tests;
