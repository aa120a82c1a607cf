//! −log softmax(x) at a class of each row, forward and backward, without a tensor of probabilities: of each row two numbers are kept, from which
//! the backward pass makes them again. Exponents are taken relative to the maximum, so nothing overflows.

use super::isa::WithSimd;
use super::lanes::{FloatElement, FloatLane, Lane, Pack, at, sums, sweep};
use super::parallel::{self, SharedMut};
use super::reduce::row_max;
use super::simd::Simd;

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// Rows of `classes` logits, and where in `x` each row's target is; `None` for a row that is ignored.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    /// Logits of a row.
    pub classes: usize,
    /// All logits, row by row.
    pub x: &'a [T],
    /// The offset of each target.
    pub targets: &'a [Option<usize>],
}

impl<T> Rows<'_, T> {
    fn check(&self) {
        let fits = |(row, target): (usize, &Option<usize>)| target.is_none_or(|at| at / self.classes.max(1) == row);
        assert!(self.x.len() == self.classes * self.targets.len() && self.targets.iter().enumerate().all(fits), "a target in each row");
    }

    fn per_task(&self) -> usize {
        TASK.div_ceil(self.classes.max(1))
    }
}

/// Writes log Σ exp(x) − x at the target of each row, 0 if it is ignored, and keeps each row's maximum and the logarithm of the sum relative to it.
///
/// # Panics
/// If the lengths do not fit, or a target is not in its row.
pub fn cross_entropy<T: FloatElement>(rows: Rows<'_, T>, loss: &mut [T], max: &mut [T::Lane], log: &mut [T::Lane]) {
    rows.check();
    assert!(loss.len() == rows.targets.len() && max.len() == loss.len() && log.len() == loss.len());
    let (per_task, count) = (rows.per_task(), loss.len());
    let (max, log) = (SharedMut::new(max), SharedMut::new(log));
    parallel::for_each_chunk(loss, per_task, rows.x.len() / 2, |i, loss| {
        let (first, len) = (i * per_task, loss.len());
        debug_assert!(first + len <= count);
        // SAFETY: chunk `i` is about rows `first..first + len`, which exist and belong to no other chunk.
        let (max, log) = unsafe {
            (std::slice::from_raw_parts_mut(max.get().add(first), len), std::slice::from_raw_parts_mut(log.get().add(first), len))
        };
        T::Lane::dispatch(Forward { rows, first, loss, max, log });
    });
}

struct Forward<'a, T: FloatElement> {
    rows: Rows<'a, T>,
    first: usize,
    loss: &'a mut [T],
    max: &'a mut [T::Lane],
    log: &'a mut [T::Lane],
}

impl<T: FloatElement> WithSimd for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Rows { classes, x, targets } = self.rows;
        let kept = self.max.iter_mut().zip(self.log.iter_mut());
        for (i, (loss, (max, log))) in self.loss.iter_mut().zip(kept).enumerate() {
            let row = self.first + i;
            let x_row = &x[row * classes..][..classes];
            *max = row_max(s, x_row);
            let splat = T::Lane::splat(s, *max);
            let [sum] = sums!(s, 1, T::Lane, S, classes, |j, count| [T::Lane::exp_pack(s, at(s, x_row, j, count).sub(splat))]);
            *log = T::Lane::round_from(sum.ln());
            *loss = match targets[row] {
                Some(target) => T::from_lane(-(x_row[target - row * classes].to_lane() - *max - *log)),
                None => T::default(),
            };
        }
    }
}

/// The gradient of the logits, (softmax(x) − 1 at the target)·g with the gradient `g` of each row's loss; 0 in ignored rows.
///
/// # Panics
/// If the lengths do not fit, or a target is not in its row.
pub fn cross_entropy_backward<T: FloatElement>(rows: Rows<'_, T>, max: &[T::Lane], log: &[T::Lane], g: &[T], dx: &mut [T]) {
    rows.check();
    assert!(g.len() == rows.targets.len() && max.len() == g.len() && log.len() == g.len() && dx.len() == rows.x.len());
    let per_task = rows.per_task();
    parallel::for_each_chunk(dx, per_task * rows.classes, rows.x.len() / 2, |i, dx| {
        T::Lane::dispatch(Backward { rows, first: i * per_task, max, log, g, dx });
    });
}

struct Backward<'a, T: FloatElement> {
    rows: Rows<'a, T>,
    first: usize,
    max: &'a [T::Lane],
    log: &'a [T::Lane],
    g: &'a [T],
    dx: &'a mut [T],
}

impl<T: FloatElement> WithSimd for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Rows { classes, x, targets } = self.rows;
        for (i, dx) in self.dx.chunks_exact_mut(classes.max(1)).enumerate() {
            let row = self.first + i;
            let Some(target) = targets[row] else {
                dx.fill(T::default());
                continue;
            };
            let target = target - row * classes;
            let x_row = &x[row * classes..][..classes];
            let (max, log) = (T::Lane::splat(s, self.max[row]), T::Lane::splat(s, self.log[row]));
            let (g, zero) = (self.g[row].to_lane(), T::Lane::splat(s, T::Lane::default()));
            let scale = T::Lane::splat(s, g);
            sweep!(T::Lane, S, classes, |j, count| {
                let p = T::Lane::exp_pack(s, at(s, x_row, j, count).sub(max).sub(log));
                T::store_pack(p.mul_add(scale, zero), &mut dx[j..], count);
            });
            let p = T::Lane::exp_pack(s, at(s, x_row, target, 1).sub(max).sub(log));
            T::store_pack(p.mul_add(scale, T::Lane::splat(s, -g)), &mut dx[target..], 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::softmax::{Axis, softmax, softmax_backward};
    use super::super::testing::{at_thread_counts, values};
    use super::*;
    use half::bf16;

    /// Against log-softmax, its gradient, and picking and placing.
    fn check<T: FloatElement>(rows: usize, classes: usize, tolerance: f64) {
        let x: Vec<T> = values(rows * classes, 4.0).into_iter().map(T::from_f64).collect();
        let g: Vec<T> = values(rows, 1.0).into_iter().map(T::from_f64).collect();
        let targets: Vec<Option<usize>> = (0..rows).map(|i| (i % 5 != 3).then_some(i * classes + i * 7 % classes)).collect();
        let input = Rows { classes, x: &x, targets: &targets };
        let (loss, dx) = at_thread_counts(|| {
            let (mut loss, mut dx) = (vec![T::from_f64(9.0); rows], vec![T::from_f64(9.0); rows * classes]);
            let (mut max, mut log) = (vec![T::Lane::default(); rows], vec![T::Lane::default(); rows]);
            cross_entropy(input, &mut loss, &mut max, &mut log);
            cross_entropy_backward(input, &max, &log, &g, &mut dx);
            (loss, dx)
        });
        let axis = Axis { outer: rows, n: classes, inner: 1 };
        let (mut log_p, mut placed, mut expected) = (x.clone(), vec![T::default(); rows * classes], x.clone());
        softmax(axis, true, &x, &mut log_p);
        for (row, target) in targets.iter().enumerate() {
            let want = target.map_or(0.0, |at| -log_p[at].to_f64());
            assert!((loss[row].to_f64() - want).abs() <= tolerance * want.abs().max(1.0), "{rows}x{classes}: loss {row}");
            if let Some(at) = *target {
                placed[at] = T::from_f64(-g[row].to_f64());
            }
        }
        softmax_backward(axis, true, &placed, &log_p, &mut expected);
        for (i, (got, want)) in dx.iter().zip(&expected).enumerate() {
            assert!((got.to_f64() - want.to_f64()).abs() <= tolerance, "{rows}x{classes}: dx {i}: {got:?}, not {want:?}");
        }
    }

    #[test]
    fn losses_and_gradients_are_those_of_log_softmax() {
        for (rows, classes) in [(1, 1), (4, 3), (7, 65), (130, 1000)] {
            check::<f32>(rows, classes, 1e-6);
            check::<f64>(rows, classes, 1e-14);
            check::<bf16>(rows, classes, 0.02);
        }
    }

    #[test]
    fn rows_without_classes_and_ignored_rows_have_no_loss() {
        for (classes, x) in [(0, vec![]), (2, vec![f32::NAN; 4])] {
            let rows = Rows { classes, x: &x, targets: &[None, None] };
            let (mut loss, mut max, mut log) = ([9f32; 2], [9f32; 2], [9f32; 2]);
            cross_entropy(rows, &mut loss, &mut max, &mut log);
            assert_eq!(loss, [0.0; 2]);
            let mut dx = vec![9f32; x.len()];
            cross_entropy_backward(rows, &max, &log, &[1.0; 2], &mut dx);
            assert!(dx.iter().all(|&dx| dx == 0.0), "{dx:?}");
        }
    }
}
