//! Cumulative sums along the middle of `[outer, n, inner]`, accumulated in f64 or i64, from either end.

use super::isa::{WithSimd, dispatch};
use super::lanes::{Lane, Numeric, Wide};
use super::parallel::{self, SharedMut};
use super::simd::Simd;
use super::softmax::Axis;

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// Neighbouring columns that a task takes: 2 KiB of running totals.
const STRIP: usize = 256;

/// Rows that are summed side by side: each addition waits for the one before it, those of other rows do not.
const ROWS: usize = 8;

/// Σ of the elements up to and including each; of those from it on if `reverse`.
pub fn cumsum<T: Numeric>(axis: Axis, reverse: bool, x: &[T], y: &mut [T::Total]) {
    assert!(x.len() == axis.numel() && y.len() == x.len());
    if x.is_empty() {
    } else if axis.inner == 1 {
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
        some_rows::<T, R>(self);
    }
}

#[inline(always)]
fn some_rows<T: Numeric, const R: usize>(SomeRows { n, reverse, x, y }: SomeRows<'_, T, R>) {
    let mut totals = [T::Lane::default().wide(); R];
    let mut from_x = x.chunks_exact(n);
    let x: [&[T]; R] = std::array::from_fn(|_| from_x.next().map_or(&[][..], |row| &row[..n]));
    let mut from_y = y.chunks_exact_mut(n);
    let y: [&mut [T::Total]; R] = std::array::from_fn(|_| from_y.next().map_or(&mut [][..], |row| &mut row[..n]));
    for i in 0..n {
        let i = if reverse { n - 1 - i } else { i };
        for r in 0..R {
            totals[r] = totals[r].plus(x[r][i].to_lane().wide());
            y[r][i] = T::total(totals[r]);
        }
    }
}

/// Along any other dimension: the sums of neighbouring columns go on together.
fn columns<T: Numeric>(axis: Axis, reverse: bool, x: &[T], y: &mut [T::Total]) {
    let Axis { outer, n, inner } = axis;
    let strips = inner.div_ceil(STRIP);
    let group = TASK.div_ceil(n * inner.min(STRIP));
    let out = SharedMut::new(y);
    parallel::for_each((outer * strips).div_ceil(group), x.len(), |task| {
        let mut totals = [T::Lane::default().wide(); STRIP];
        for line in task * group..(outer * strips).min((task + 1) * group) {
            let column = line % strips * STRIP;
            let width = STRIP.min(inner - column);
            let totals = &mut totals[..width];
            totals.fill(T::Lane::default().wide());
            for i in 0..n {
                let row = if reverse { n - 1 - i } else { i };
                let at = (line / strips * n + row) * inner + column;
                for (j, (total, &x)) in totals.iter_mut().zip(&x[at..at + width]).enumerate() {
                    *total = total.plus(x.to_lane().wide());
                    // SAFETY: `at + j` is an element's index (`x` was just read there), strips share no columns, and `y`, which
                    // is as long as `x`, stays borrowed until all are done.
                    unsafe { out.get().add(at + j).write(T::total(*total)) }
                }
            }
        }
    });
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
