//! Few queries over many keys, as in decoding: each key is read once and multiplied where it lies, for all queries of all heads that share it.

use super::block::{Left, Right, Sums, cut, product};
use super::entries::{padded, widen_rows};
use super::forward::KEYS;
use super::online::{Online, Scores};
use super::{Attended, Attention, Extents, LOG2_E};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::dot::Lanes;
use crate::cpu::gemm::micro::MicroKernels;
use crate::cpu::simd::{F32s, Simd};
use crate::view::MatView;
use std::ops::Range;

/// Whether a problem has so few queries: with more than four a head, packing keys pays.
pub(super) fn serves(x: &Extents) -> bool {
    x.queries <= 4 && x.group * x.queries <= 16
}

/// Sums the values of `keys` for all queries of `heads`, which share a key head.
#[inline(always)]
pub(super) fn sum<T: Attended, S: Simd>(
    s: S,
    attention: &Attention<'_, T>,
    x: &Extents,
    heads: Range<usize>,
    keys: Range<usize>,
    online: &mut Online<'_>,
) -> Result<(), OutOfMemory> {
    let kernels = MicroKernels::get();
    let (rows, stride, value_stride) = (heads.len() * x.queries, x.width.next_multiple_of(S::LANES), padded(kernels, x.value_width));
    let sizes = [rows * stride, rows * KEYS, KEYS * stride.max(value_stride)];
    let mut buffer = Buffer::new(sizes.iter().sum::<usize>() * size_of::<f32>())?;
    let [q, scores, block_rows] = cut(buffer.as_slice_mut(), sizes);
    for (head, q) in heads.clone().zip(q.chunks_exact_mut(x.queries * stride)) {
        widen_rows(s, &attention.q.matrix(head), 0..x.queries, stride, q);
    }
    let (k, v) = (attention.k.matrix(heads.start / x.group), attention.v.matrix(heads.start / x.group));
    for first in keys.clone().step_by(KEYS) {
        let block = first..keys.end.min(first + KEYS);
        if k.col_stride() == 1 {
            multiply(s, q, &k, block.clone(), attention.scale * LOG2_E, scores);
        } else {
            widen_rows(s, &k, block.clone(), x.width, block_rows);
            let widened = MatView::new(&block_rows[..], block.len(), x.width, x.width, 1);
            widened.iter().for_each(|k| multiply(s, q, k, 0..block.len(), attention.scale * LOG2_E, scores));
        }
        for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
            let of = Scores { head: heads.start + row / x.queries, query: row % x.queries, first_key: first, keys: block.len() };
            of.weigh(s, attention, x, scores, (row, online));
        }
        widen_rows(s, &v, block.clone(), value_stride, block_rows);
        let weights = Left::rows(scores, KEYS);
        let to = Sums { data: online.values, stride: x.value_width, alpha: 1.0, add: true };
        product(kernels, [rows, block.len(), x.value_width], weights, Right::Rows(block_rows, value_stride), to);
    }
    Ok(())
}

/// `scores[row][j] = alpha · q[row] · k[keys.start + j]`, rows of `q` being whole vectors, and those of `scores` [`KEYS`] long.
#[inline(always)]
fn multiply<T: Lanes, S: Simd>(s: S, q: &[f32], k: &MatView<T>, keys: Range<usize>, alpha: f32, scores: &mut [f32]) {
    const ROWS: usize = 4;
    let stride = k.cols().next_multiple_of(S::LANES);
    for (q, scores) in q.chunks(ROWS * stride).zip(scores.chunks_mut(ROWS * KEYS)) {
        match q.len() / stride {
            1 => multiply_rows::<T, S, 1>(s, q, k, keys.clone(), alpha, scores),
            2 => multiply_rows::<T, S, 2>(s, q, k, keys.clone(), alpha, scores),
            3 => multiply_rows::<T, S, 3>(s, q, k, keys.clone(), alpha, scores),
            _ => multiply_rows::<T, S, ROWS>(s, q, k, keys.clone(), alpha, scores),
        }
    }
}

#[inline(always)]
fn multiply_rows<T: Lanes, S: Simd, const R: usize>(s: S, q: &[f32], k: &MatView<T>, keys: Range<usize>, alpha: f32, scores: &mut [f32]) {
    let stride = k.cols().next_multiple_of(S::LANES);
    for (j, key) in keys.enumerate() {
        let key = &k.data()[key * k.row_stride()..][..k.cols()];
        let mut sums = [s.zero(); R];
        for (i, key) in key.chunks(S::LANES).enumerate() {
            // SAFETY: the chunk has that many values.
            let key = unsafe { T::load(s, key.as_ptr(), key.len()) };
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = key.mul_add(s.load_slice(&q[r * stride + i * S::LANES..]), *sum);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            scores[r * KEYS + j] = alpha * sum.reduce_sum();
        }
    }
}
