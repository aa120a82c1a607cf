//! The online softmax: sums of values under weights that are relative to the largest score so far, and what becomes of them.
//!
//! Scores are in units of log₂ e, so that weights are powers of two.

use super::entries::round;
use super::{Attended, Attention, Extents, LOG2_E, LogSum, NO_KEYS};
use crate::cpu::gemm::dot::Lanes;
use crate::cpu::isa::WithSimd;
use crate::cpu::math;
use crate::cpu::simd::{F32s, Simd};

/// Of some rows (queries of one head or more).
pub(super) struct Online<'a> {
    /// Sums of values, `[rows][value_width]`.
    pub values: &'a mut [f32],
    /// The largest score of each row.
    pub max: &'a mut [f32],
    /// The sum of its weights.
    pub total: &'a mut [f32],
}

impl<'a> Online<'a> {
    /// The floats that `rows` rows take.
    pub fn size(rows: usize, value_width: usize) -> usize {
        rows * (value_width + 2)
    }

    /// Of no keys yet, in so many floats.
    pub fn new(memory: &'a mut [f32], rows: usize) -> Self {
        let online = Self::of(memory, rows);
        online.values.fill(0.0);
        online.max.fill(f32::NEG_INFINITY);
        online.total.fill(0.0);
        online
    }

    /// What is in memory already.
    pub fn of(memory: &'a mut [f32], rows: usize) -> Self {
        let (ends, values) = memory.split_at_mut(2 * rows);
        let (max, total) = ends.split_at_mut(rows);
        Self { values, max, total }
    }

    /// Adds what the same rows summed over further keys.
    #[inline(always)]
    pub fn merge(&mut self, further: &Online<'_>) {
        let width = self.values.len() / self.max.len();
        for row in 0..self.max.len() {
            let new = larger(self.max[row], further.max[row]);
            if new == f32::NEG_INFINITY {
                continue;
            }
            let (own, other) = ((self.max[row] - new).exp2(), (further.max[row] - new).exp2());
            self.max[row] = new;
            self.total[row] = self.total[row] * own + further.total[row] * other;
            let sums = self.values[row * width..(row + 1) * width].iter_mut().zip(&further.values[row * width..]);
            sums.for_each(|(sum, x)| *sum = *sum * own + x * other);
        }
    }

    /// Writes the rows of the output and the logarithms of the sums of exponentials.
    #[inline(always)]
    pub fn finish<T: Attended, S: Simd>(&mut self, s: S, out: &mut [T], lse: &mut [LogSum]) {
        let width = out.len() / lse.len();
        for (row, &total) in self.total.iter().enumerate() {
            let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
            self.values[row * width..(row + 1) * width].iter_mut().for_each(|sum| *sum *= factor);
        }
        for total in self.total.chunks_mut(S::LANES) {
            // SAFETY: the chunk has that many values.
            let log = math::log(s, unsafe { <f32 as Lanes>::load(s, total.as_ptr(), total.len()) }) * s.splat(LOG2_E);
            log.store_slice(total, total.len());
        }
        for ((lse, &max), &log) in lse.iter_mut().zip(&*self.max).zip(&*self.total) {
            // A query that looks at no key has a total of zero.
            *lse = if log == f32::NEG_INFINITY { NO_KEYS } else { [max, log] };
        }
        round(self.values, out);
    }
}

/// The larger; NaN wins, so that it reaches the output.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a || b.is_nan() { b } else { a }
}

/// A query's scores for some keys.
pub(super) struct Scores {
    pub head: usize,
    pub query: usize,
    pub first_key: usize,
    /// Keys that are computed; some may be shut to this query.
    pub keys: usize,
    /// What scores are still to be multiplied by: the second of [`Attention::units`].
    pub unit: f32,
}

/// Turns scores into weights relative to the row's largest score so far, and what the row has summed to the same scale. Weights are written up to
/// a whole vector (or the end of `scores`).
pub(super) struct Weigh<'a, 'o, T> {
    pub of: Scores,
    pub attention: &'a Attention<'a, T>,
    pub x: &'a Extents,
    pub scores: &'a mut [f32],
    pub row: usize,
    pub online: &'a mut Online<'o>,
}

impl<T: Attended> WithSimd for Weigh<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { of, attention, x, scores, row, online } = self;
        let Scores { head, query, first_key, keys, unit } = of;
        let own = attention.reach(query, &(first_key..first_key + keys));
        let end = keys.next_multiple_of(S::LANES).min(scores.len());
        let (open, shut) = scores.split_at_mut(own);
        shut[..end - own].fill(f32::NEG_INFINITY);
        attention.mask_scores(head, query, first_key, open);
        let max = &mut online.max[row];
        // The largest is a weight's reference only: a NaN among others gets into their sum by itself.
        let mut new = larger(*max, largest(s, &scores[..end]) * unit);
        if new == f32::NEG_INFINITY {
            if !scores[..own].iter().any(|score| score.is_nan()) {
                return scores[..end].fill(0.0);
            }
            new = f32::NAN;
        }
        let is_first = *max == f32::NEG_INFINITY;
        let factor = if is_first { 0.0 } else { (*max - new).exp2() };
        *max = new;
        // The sum is that of all weights, dropped or not.
        let sum = powers(s, &mut scores[..end], unit, new);
        attention.drop(s, x, head, query, first_key, &mut scores[..own]);
        online.total[row] = online.total[row] * factor + sum;
        // Before the first keys the sums are zero.
        if factor != 1.0 && !is_first {
            online.values[row * x.value_width..(row + 1) * x.value_width].iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// The largest that is not NaN, or −∞: [`row_max`](crate::cpu::reduce::row_max) keeps NaN, which takes short rows as long as their weights take. `x` is
/// a whole number of vectors long.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut max = s.splat(f32::NEG_INFINITY);
    for x in x.chunks_exact(S::LANES) {
        max = s.load_slice(x).max(max);
    }
    max.reduce_max()
}

/// Replaces each x by 2^(unit·x − shift), and returns their sum. `x` is a whole number of vectors long.
#[inline(always)]
fn powers<S: Simd>(s: S, x: &mut [f32], unit: f32, shift: f32) -> f32 {
    let (unit, shift) = (s.splat(unit), s.splat(-shift));
    let mut sum = s.zero();
    for x in x.chunks_exact_mut(S::LANES) {
        let e = math::exp2(s, s.load_slice(x).mul_add(unit, shift));
        e.store_slice(x, S::LANES);
        sum = sum + e;
    }
    sum.reduce_sum()
}
