//! Few queries over many keys, as in decoding: each key is read once and multiplied where it lies, for all queries of all heads that share it.

use super::block::cut;
use super::entries::widen_rows;
use super::forward::KEYS;
use super::online::{Online, Scores};
use super::{Attended, Attention, Extents, LOG2_E};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::dot::Lanes;
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
    let (rows, stride) = (heads.len() * x.queries, x.width.next_multiple_of(S::LANES));
    let (k, v) = (attention.k.matrix(heads.start / x.group), attention.v.matrix(heads.start / x.group));
    let scattered = [&k, &v].map(|m| if m.col_stride() == 1 { 0 } else { KEYS * m.cols() });
    let sizes = [rows * stride, rows * KEYS, scattered[0].max(scattered[1])];
    let mut buffer = Buffer::new(sizes.iter().sum::<usize>() * size_of::<f32>())?;
    let [q, scores, gathered] = cut(buffer.as_slice_mut(), sizes);
    for (head, q) in heads.clone().zip(q.chunks_exact_mut(x.queries * stride)) {
        widen_rows(s, &attention.q.matrix(head), 0..x.queries, stride, q);
    }
    let alpha = attention.scale * LOG2_E;
    for first in keys.clone().step_by(KEYS) {
        let block = first..keys.end.min(first + KEYS);
        if k.col_stride() == 1 {
            multiply(s, q, &k, block.clone(), alpha, scores);
        } else {
            widen_rows(s, &k, block.clone(), x.width, gathered);
            // A closure would be compiled without the instructions.
            if let Some(k) = MatView::new(&gathered[..], block.len(), x.width, x.width, 1) {
                multiply(s, q, &k, 0..block.len(), alpha, scores);
            }
        }
        for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
            let of = Scores { head: heads.start + row / x.queries, query: row % x.queries, first_key: first, keys: block.len() };
            of.weigh(s, attention, x, scores, (row, online));
        }
        if v.col_stride() == 1 {
            add(s, scores, &v, block, online.values);
        } else {
            widen_rows(s, &v, block.clone(), x.value_width, gathered);
            if let Some(v) = MatView::new(&gathered[..], block.len(), x.value_width, x.value_width, 1) {
                add(s, scores, &v, 0..block.len(), online.values);
            }
        }
    }
    Ok(())
}

/// Rows that are in work together: each row of keys and values is read for all of them.
const ROWS: usize = 4;

/// `scores[row][j] = alpha · q[row] · k[keys.start + j]`, rows of `q` being whole vectors, and those of `scores` [`KEYS`] long.
#[inline(always)]
fn multiply<T: Lanes, S: Simd>(s: S, q: &[f32], k: &MatView<T>, keys: Range<usize>, alpha: f32, scores: &mut [f32]) {
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

/// `sums[row] += Σ_j weights[row][j] · v[keys.start + j]`, rows of `weights` being [`KEYS`] long.
#[inline(always)]
fn add<T: Lanes, S: Simd>(s: S, weights: &[f32], v: &MatView<T>, keys: Range<usize>, sums: &mut [f32]) {
    for (weights, sums) in weights.chunks(ROWS * KEYS).zip(sums.chunks_mut(ROWS * v.cols())) {
        match weights.len() / KEYS {
            1 => add_rows::<T, S, 1>(s, weights, v, keys.clone(), sums),
            2 => add_rows::<T, S, 2>(s, weights, v, keys.clone(), sums),
            3 => add_rows::<T, S, 3>(s, weights, v, keys.clone(), sums),
            _ => add_rows::<T, S, ROWS>(s, weights, v, keys.clone(), sums),
        }
    }
}

#[inline(always)]
fn add_rows<T: Lanes, S: Simd, const R: usize>(s: S, weights: &[f32], v: &MatView<T>, keys: Range<usize>, sums: &mut [f32]) {
    /// Enough sums for their additions to overlap, few enough for registers.
    const VECTORS: usize = 4;
    let mut col = 0;
    while col + VECTORS * S::LANES <= v.cols() {
        add_columns::<T, S, R, VECTORS>(s, weights, v, keys.clone(), sums, col, S::LANES);
        col += VECTORS * S::LANES;
    }
    while col < v.cols() {
        add_columns::<T, S, R, 1>(s, weights, v, keys.clone(), sums, col, S::LANES.min(v.cols() - col));
        col += S::LANES;
    }
}

/// [`add`] for `N` vectors of columns from `col` on, the last of which has `last` columns.
#[inline(always)]
fn add_columns<T: Lanes, S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: &[f32],
    v: &MatView<T>,
    keys: Range<usize>,
    sums: &mut [f32],
    col: usize,
    last: usize,
) {
    let width = v.cols();
    let mut acc = [[s.zero(); N]; R];
    for (j, key) in keys.enumerate() {
        let values = &v.data()[key * v.row_stride()..][col..col + (N - 1) * S::LANES + last];
        // By number, so that the sums stay in registers.
        for n in 0..N {
            let count = if n + 1 < N { S::LANES } else { last };
            // SAFETY: so many values are left.
            let values = unsafe { T::load(s, values[n * S::LANES..].as_ptr(), count) };
            for (r, acc) in acc.iter_mut().enumerate() {
                acc[n] = s.splat(weights[r * KEYS + j]).mul_add(values, acc[n]);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        let sums = &mut sums[r * width + col..][..(N - 1) * S::LANES + last];
        for (sums, acc) in sums.chunks_mut(S::LANES).zip(acc) {
            (s.load_slice_partial(sums) + acc).store_slice(sums, sums.len());
        }
    }
}
