//! Cumulative sums along the middle of `[outer, n, inner]`, accumulated in f64 or i64, from either end.

use super::isa::{WithSimd, dispatch};
use super::lanes::{Lane, Numeric, Wide};
use super::parallel::{self, SharedMut};
use super::simd::Simd;
use super::softmax::Axis;
use std::ops::Range;

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// Neighbouring columns that a task takes: 2 KiB of running totals.
const STRIP: usize = 256;

/// Rows that are summed side by side: each addition waits for the one before it, those of other rows do not.
const ROWS: usize = 8;

/// Elements of a row whose sums are kept before they are rounded.
const TILE: usize = 32;

/// Σ of the elements up to and including each; of those from it on if `reverse`.
pub fn cumsum<T: Numeric>(axis: Axis, reverse: bool, x: &[T], y: &mut [T::Total]) {
    assert!(x.len() == axis.numel() && y.len() == x.len());
    if x.is_empty() {
        return;
    }
    if axis.inner == 1 {
        rows(axis.n, reverse, x, y);
    } else {
        columns(axis, reverse, x, y);
    }
}

/// Along rows of `n` neighbours.
fn rows<T: Numeric>(n: usize, reverse: bool, x: &[T], y: &mut [T::Total]) {
    let group = TASK.div_ceil(n * ROWS) * ROWS * n;
    parallel::for_each_chunk(y, group, x.len() / 2, |i, y| {
        let x = &x[i * group..][..y.len()];
        let whole = y.len() / (ROWS * n) * (ROWS * n);
        let (some, rest) = y.split_at_mut(whole);
        let some_x = x.chunks_exact(ROWS * n);
        some.chunks_exact_mut(ROWS * n).zip(some_x).for_each(|(y, x)| dispatch(SomeRows::<T, ROWS> { n, reverse, x, y }));
        rest.chunks_exact_mut(n).zip(x[whole..].chunks_exact(n)).for_each(|(y, x)| dispatch(SomeRows::<T, 1> { n, reverse, x, y }));
    });
}

/// `R` rows of `n` neighbours.
struct SomeRows<'a, T: Numeric, const R: usize> {
    n: usize,
    reverse: bool,
    x: &'a [T],
    y: &'a mut [T::Total],
}

impl<T: Numeric, const R: usize> WithSimd for SomeRows<'_, T, R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { n, reverse, x, y } = self;
        let mut totals = [T::Lane::default().wide(); R];
        let mut sums = [[T::Lane::default().wide(); TILE]; R];
        let tiles = n.div_ceil(TILE);
        for tile in 0..tiles {
            let start = if reverse { tiles - 1 - tile } else { tile } * TILE;
            let len = TILE.min(n - start);
            let x: [&[T]; R] = std::array::from_fn(|r| &x[r * n + start..][..len]);
            for i in 0..len {
                let i = if reverse { len - 1 - i } else { i };
                for r in 0..R {
                    totals[r] = totals[r].plus(x[r][i].to_lane().wide());
                    sums[r][i] = totals[r];
                }
            }
            // Rounded together, by vectors.
            for (sums, y) in sums.iter().zip(y.chunks_exact_mut(n)) {
                y[start..start + len].iter_mut().zip(sums).for_each(|(y, &sum)| *y = T::total(sum));
            }
        }
    }
}

/// Along any other dimension: the sums of neighbouring columns go on together.
fn columns<T: Numeric>(axis: Axis, reverse: bool, x: &[T], y: &mut [T::Total]) {
    let strips = axis.outer * axis.inner.div_ceil(STRIP);
    let group = TASK.div_ceil(axis.n * axis.inner.min(STRIP));
    let y = SharedMut::new(y);
    parallel::for_each(strips.div_ceil(group), x.len(), |task| {
        dispatch(Columns { axis, reverse, x, y, strips: task * group..strips.min((task + 1) * group) });
    });
}

/// Some strips of columns.
struct Columns<'a, T: Numeric> {
    axis: Axis,
    reverse: bool,
    x: &'a [T],
    y: SharedMut<T::Total>,
    strips: Range<usize>,
}

impl<T: Numeric> WithSimd for Columns<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { axis: Axis { n, inner, .. }, reverse, x, y, strips } = self;
        let across = inner.div_ceil(STRIP);
        let mut totals = [T::Lane::default().wide(); STRIP];
        for strip in strips {
            let column = strip % across * STRIP;
            let width = STRIP.min(inner - column);
            let totals = &mut totals[..width];
            totals.fill(T::Lane::default().wide());
            for i in 0..n {
                let row = if reverse { n - 1 - i } else { i };
                let at = (strip / across * n + row) * inner + column;
                let x = &x[at..at + width];
                // SAFETY: `x` has elements there, and `y`, which is as long, stays borrowed until all are done; strips share no columns,
                // and this slice ends before the next row's is made.
                let y = unsafe { std::slice::from_raw_parts_mut(y.get().add(at), width) };
                for ((total, &x), y) in totals.iter_mut().zip(x).zip(y) {
                    *total = total.plus(x.to_lane().wide());
                    *y = T::total(*total);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{at_thread_counts, values};

    #[test]
    fn scans_match_a_plain_loop() {
        for (outer, n, inner) in
            [(1, 1, 1), (3, 17, 1), (2, 9, 5), (1, 1000, 300), (500, 130, 1), (12, 5000, 1), (7, 3, 1), (0, 3, 1), (2, 0, 3)]
        {
            let axis = Axis { outer, n, inner };
            let x: Vec<f32> = values(axis.numel(), 1.0).into_iter().map(|x| x as f32).collect();
            for reverse in [false, true] {
                let y = at_thread_counts(|| {
                    let mut y = vec![0f32; x.len()];
                    cumsum(axis, reverse, &x, &mut y);
                    y
                });
                for line in 0..outer * inner {
                    let mut total = 0f64;
                    for i in 0..n {
                        let row = if reverse { n - 1 - i } else { i };
                        let at = (line / inner * n + row) * inner + line % inner;
                        total += x[at] as f64;
                        assert_eq!(y[at], total as f32);
                    }
                }
            }
        }
        let mut y = [0i64; 4];
        cumsum(Axis { outer: 1, n: 4, inner: 1 }, true, &[1u8, 2, 3, 255], &mut y);
        assert_eq!(y, [261, 260, 258, 255]);
    }
}
