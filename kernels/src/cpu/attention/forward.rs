//! The output, and the logarithm of each query's sum of exponentials.

use super::block::{Left, Right, cut, load_rows, pack_transposed, padded, product};
use super::{Attended, Attention, Extents};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::micro::MicroKernels;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::math;
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::reduce::row_max;
use crate::cpu::simd::{F32s, Simd};
use std::ops::Range;
use std::sync::OnceLock;

/// Keys of a block.
const KEYS: usize = 256;

/// Queries of a task at most; a block of keys is packed once for them.
const QUERIES: usize = 192;

/// Queries whose scores are in work at a time: with [`KEYS`], 24 KiB of first-level cache.
const ROWS: usize = 24;

/// Tasks that there should be at least, to keep threads evenly busy.
const TASKS: usize = 16;

/// `out = dropout(softmax(scale · Q·Kᵀ + mask)) · V`, head after head without gaps, L×V each, and `lse`, L a head, the logarithm of the sum
/// of the exponentials of a query's scores. A query that looks at no key gives zeros, and ∞ in `lse`.
///
/// # Errors
/// If the memory for a task's blocks cannot be had.
///
/// # Panics
/// If inputs and outputs do not fit together.
pub fn forward<T: Attended>(attention: &Attention<'_, T>, out: &mut [T], lse: &mut [f32]) -> Result<(), OutOfMemory> {
    let x = attention.extents();
    assert!(out.len() == x.heads * x.queries * x.value_width && lse.len() == x.heads * x.queries);
    if x.keys == 0 || x.value_width == 0 || x.width == 0 || out.is_empty() {
        assert!(x.keys == 0 || out.is_empty(), "queries without values");
        out.fill(T::narrow(0.0));
        lse.fill(f32::INFINITY);
        return Ok(());
    }
    let rows = (x.heads * x.queries).div_ceil(TASKS).next_multiple_of(ROWS).clamp(ROWS, QUERIES);
    let chunks = x.queries.div_ceil(rows);
    let (out, lse) = (SharedMut::new(out), SharedMut::new(lse));
    let failure = OnceLock::new();
    let macs = x.heads * x.queries * x.keys * (x.width + x.value_width);
    for_each(x.heads * chunks, macs / 32, |task| {
        let (head, chunk) = (task / chunks, task % chunks);
        let queries = chunk * rows..x.queries.min((chunk + 1) * rows);
        let first = head * x.queries + queries.start;
        // SAFETY: these rows of the outputs lie inside of them (their lengths were checked), and belong to this task alone.
        let (out, lse) = unsafe {
            (
                std::slice::from_raw_parts_mut(out.get().add(first * x.value_width), queries.len() * x.value_width),
                std::slice::from_raw_parts_mut(lse.get().add(first), queries.len()),
            )
        };
        if let Err(error) = dispatch(Task { attention, x, head, queries, out, lse }) {
            failure.get_or_init(|| error);
        }
    });
    failure.get().map_or(Ok(()), |&error| Err(error))
}

/// Some queries of a head.
struct Task<'a, T> {
    attention: &'a Attention<'a, T>,
    x: Extents,
    head: usize,
    queries: Range<usize>,
    out: &'a mut [T],
    lse: &'a mut [f32],
}

/// A task's blocks.
struct Scratch<'a> {
    /// Scaled queries, `[queries][width]`.
    q: &'a mut [f32],
    /// Keys, `[KEYS][width]`.
    keys: &'a mut [f32],
    /// Their transpose in panels.
    panels: &'a mut [f32],
    /// Values, `[KEYS][padded value width]`.
    values: &'a mut [f32],
    /// Scores and then their exponentials, `[ROWS][KEYS]`.
    scores: &'a mut [f32],
    /// Sums of values, `[queries][value width]`.
    sums: &'a mut [f32],
    /// Largest score and sum of exponentials of each query.
    max: &'a mut [f32],
    total: &'a mut [f32],
}

impl<T: Attended> WithSimd for Task<'_, T> {
    type Output = Result<(), OutOfMemory>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let Self { attention, x, head, queries, out, lse } = self;
        let kernels = MicroKernels::get();
        let (count, value_stride) = (queries.len(), padded(kernels, x.value_width));
        let sizes = [
            count * x.width,
            KEYS * x.width,
            x.width * padded(kernels, KEYS),
            KEYS * value_stride,
            ROWS * KEYS,
            count * x.value_width,
            count,
            count,
        ];
        let mut buffer = Buffer::new(sizes.iter().sum::<usize>() * size_of::<f32>())?;
        let [q, keys, panels, values, scores, sums, max, total] = cut(buffer.as_slice_mut(), sizes);
        sums.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        total.fill(0.0);
        load_rows(&attention.q.matrix(head), queries.clone(), attention.scale, x.width, q);
        let scratch = &mut Scratch { q, keys, panels, values, scores, sums, max, total };
        let (k, v) = (attention.k.matrix(head / x.group), attention.v.matrix(head / x.group));
        let reach = attention.reach(queries.end - 1, &(0..x.keys));
        for first in (0..reach).step_by(KEYS) {
            let block = first..reach.min(first + KEYS);
            load_rows(&k, block.clone(), 1.0, x.width, scratch.keys);
            load_rows(&v, block.clone(), 1.0, value_stride, scratch.values);
            pack_transposed(s, kernels, scratch.keys, block.len(), x.width, x.width, scratch.panels);
            for row in (0..count).step_by(ROWS) {
                let rows = row..count.min(row + ROWS);
                let reach = attention.reach(queries.start + rows.end - 1, &block);
                if reach > 0 {
                    Rows { attention, x, head, first_query: queries.start, rows, first_key: first, packed: block.len(), reach }
                        .run(s, scratch);
                }
            }
        }
        for (i, (out, lse)) in out.chunks_exact_mut(x.value_width).zip(lse).enumerate() {
            let total = scratch.total[i];
            // A query that looks at no key has a total of zero.
            *lse = if total == 0.0 { f32::INFINITY } else { scratch.max[i] + total.ln() };
            let factor = if total == 0.0 { 0.0 } else { 1.0 / total };
            out.iter_mut().zip(&scratch.sums[i * x.value_width..]).for_each(|(out, &sum)| *out = T::narrow(sum * factor));
        }
        Ok(())
    }
}

/// Some queries of a task against the first `reach` keys of a block.
struct Rows<'a, T> {
    attention: &'a Attention<'a, T>,
    x: Extents,
    head: usize,
    first_query: usize,
    rows: Range<usize>,
    first_key: usize,
    /// Keys of the block.
    packed: usize,
    reach: usize,
}

impl<T: Attended> Rows<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, scratch: &mut Scratch) {
        let kernels = MicroKernels::get();
        let Extents { width, value_width, .. } = self.x;
        let count = self.rows.len();
        let q = Left { data: &scratch.q[self.rows.start * width..], row_stride: width, k_stride: 1 };
        product(kernels, [count, width, self.panel_end(kernels)], q, Right::Panels(scratch.panels), scratch.scores, KEYS, false);
        for (i, row) in self.rows.clone().enumerate() {
            let scores = &mut scratch.scores[i * KEYS..(i + 1) * KEYS];
            let sums = &mut scratch.sums[row * value_width..(row + 1) * value_width];
            self.weigh(s, row, scores, &mut scratch.max[row], &mut scratch.total[row], sums);
        }
        let weights = Left { data: scratch.scores, row_stride: KEYS, k_stride: 1 };
        let values = Right::Rows(scratch.values, padded(kernels, value_width));
        let sums = &mut scratch.sums[self.rows.start * value_width..];
        product(kernels, [count, self.reach, value_width], weights, values, sums, value_width, true);
    }

    /// The keys that are computed: whole panels, so that panels are read as they were packed.
    fn panel_end(&self, kernels: &MicroKernels) -> usize {
        self.reach.next_multiple_of(kernels.nr).min(self.packed)
    }

    /// Turns a query's scores into exponentials relative to its largest score so far, and what it has summed to the same scale.
    #[inline(always)]
    fn weigh<S: Simd>(&self, s: S, row: usize, scores: &mut [f32], max: &mut f32, total: &mut f32, sums: &mut [f32]) {
        let query = self.first_query + row;
        let own = self.attention.reach(query, &(self.first_key..self.first_key + self.reach));
        let end = self.reach.next_multiple_of(S::LANES).min(scores.len());
        let (open, shut) = scores.split_at_mut(own);
        shut[..end - own].fill(f32::NEG_INFINITY);
        self.attention.mask_scores(self.head, query, self.first_key, open);
        let largest = row_max::<f32, S>(s, open);
        // NaN wins, so that it reaches the output.
        let new = if largest > *max || largest.is_nan() { largest } else { *max };
        if new == f32::NEG_INFINITY {
            return scores[..end].fill(0.0);
        }
        let factor = (*max - new).exp();
        let sum = exponentials(s, &mut scores[..end], new);
        // The sum is that of all weights, dropped or not.
        self.attention.drop(s, &self.x, self.head, query, self.first_key, &mut scores[..own]);
        *total = *total * factor + sum;
        *max = new;
        if factor != 1.0 {
            sums.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

/// Replaces each x by exp(x − shift), and returns their sum. `x` is a whole number of vectors long.
#[inline(always)]
fn exponentials<S: Simd>(s: S, x: &mut [f32], shift: f32) -> f32 {
    let shift = s.splat(shift);
    let mut sum = s.zero();
    for x in x.chunks_exact_mut(S::LANES) {
        let e = math::exp(s, s.load_slice(x) - shift);
        e.store_slice(x, S::LANES);
        sum = sum + e;
    }
    sum.reduce_sum()
}
