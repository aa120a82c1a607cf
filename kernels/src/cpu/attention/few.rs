//! Few queries over many keys, as in decoding: each key is read once and multiplied where it lies, for all queries of all heads that share it.

use super::block::cut;
use super::entries::widen_rows;
use super::forward::KEYS;
use super::online::{Online, Scores, Weigh};
use super::{Attended, Attention, Extents, LOG2_E};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::dot::Lanes;
use crate::cpu::gemm::read_ahead;
use crate::cpu::isa::WithSimd;
use crate::cpu::simd::{CACHE_LINE, F32s, Simd};
use crate::view::MatView;
use std::ops::Range;

/// Whether a problem has so few queries: with more than four a head, packing keys pays.
pub(super) fn serves(x: &Extents) -> bool {
    x.queries <= 4 && x.group * x.queries <= 16
}

/// Sums the values of `keys` for all queries of `heads`, which share a key head.
pub(super) struct Few<'a, 'o, T> {
    pub attention: &'a Attention<'a, T>,
    pub x: &'a Extents,
    pub heads: Range<usize>,
    pub keys: Range<usize>,
    pub online: &'a mut Online<'o>,
}

impl<T: Attended> WithSimd for Few<'_, '_, T> {
    type Output = Result<(), OutOfMemory>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        sum(s, self.attention, self.x, self.heads, self.keys, self.online)
    }
}

#[inline(always)]
fn sum<T: Attended, S: Simd>(
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
    let ahead = read_ahead(x.heads / x.group * x.keys * (x.width + x.value_width) * size_of::<T>());
    // As a rule the next head's keys are this thread's, too.
    let after = (heads.end < x.heads).then(|| attention.k.matrix(heads.end / x.group));
    for first in keys.clone().step_by(KEYS) {
        let block = first..keys.end.min(first + KEYS);
        if k.col_stride() == 1 {
            for (keys, mut coming) in phases((&k, block.clone()), (&v, block.clone()), ahead).into_iter().flatten() {
                let scores = &mut scores[keys.start - first..];
                multiply(s, q, &k, keys, alpha, scores, &mut coming);
            }
        } else {
            widen_rows(s, &k, block.clone(), x.width, gathered);
            // A closure would be compiled without the instructions.
            if let Some(k) = MatView::new(&gathered[..], block.len(), x.width, x.width, 1) {
                multiply(s, q, &k, 0..block.len(), alpha, scores, &mut Coming::default());
            }
        }
        for (row, scores) in scores.chunks_exact_mut(KEYS).enumerate() {
            let of = Scores { head: heads.start + row / x.queries, query: row % x.queries, first_key: first, keys: block.len(), unit: 1.0 };
            s.call(Weigh { of, attention, x, scores, row, online });
        }
        if v.col_stride() == 1 {
            let next = match &after {
                Some(after) if block.end == keys.end => (after, keys.clone()),
                _ => (&k, block.end..keys.end),
            };
            for (keys, mut coming) in phases((&v, block.clone()), next, ahead).into_iter().flatten() {
                let weights = &scores[keys.start - first..];
                add(s, weights, &v, keys, online.values, &mut coming);
            }
        } else {
            widen_rows(s, &v, block.clone(), x.value_width, gathered);
            if let Some(v) = MatView::new(&gathered[..], block.len(), x.value_width, x.value_width, 1) {
                add(s, scores, &v, 0..block.len(), online.values, &mut Coming::default());
            }
        }
    }
    Ok(())
}

/// Rows of a matrix.
type Rows<'a, T> = (&'a MatView<'a, T>, Range<usize>);

/// The rows `now` in one run or two, and what is asked for with each: the rows that lie `ahead` bytes further, at the end the first of `next`. So
/// memory and arithmetic overlap. The hardware's own prefetching begins anew with each head's keys and values.
fn phases<T>(now: Rows<'_, T>, next: Rows<'_, T>, ahead: usize) -> [Option<(Range<usize>, Coming)>; 2] {
    let (matrix, Range { start, end }) = now;
    if ahead == 0 {
        return [Some((start..end, Coming::default())), None];
    }
    let further = (ahead / (matrix.cols() * size_of::<T>())).clamp(1, end - start);
    let (next, rows) = next;
    let middle = end - further;
    let own = (start < middle).then(|| (start..middle, Coming::new(matrix, start + further..end)));
    [own, Some((middle..end, Coming::new(next, rows.start..rows.end.min(rows.start + further))))]
}

/// Rows that are asked for one by one while others are in work.
struct Coming {
    /// Where the next begins, and how many bytes further each of the others.
    next: *const u8,
    stride: usize,
    /// Bytes of each.
    len: usize,
    left: usize,
}

impl Default for Coming {
    fn default() -> Self {
        Self { next: std::ptr::null(), stride: 0, len: 0, left: 0 }
    }
}

impl Coming {
    /// Rows of a matrix, or none if they are not whole stretches of memory.
    fn new<T>(matrix: &MatView<T>, rows: Range<usize>) -> Self {
        let next = matrix.data().as_ptr().wrapping_add(rows.start * matrix.row_stride()).cast();
        let (stride, len) = (matrix.row_stride() * size_of::<T>(), matrix.cols() * size_of::<T>());
        Self { next, stride, len, left: if matrix.col_stride() == 1 { rows.len() } else { 0 } }
    }

    #[inline(always)]
    fn ask<S: Simd>(&mut self, s: S) {
        if self.left > 0 {
            for at in (0..self.len).step_by(CACHE_LINE) {
                s.prefetch(self.next.wrapping_add(at).cast());
            }
            self.next = self.next.wrapping_add(self.stride);
            self.left -= 1;
        }
    }
}

/// Rows that are in work together: each row of keys and values is read for all of them.
const ROWS: usize = 4;

/// `scores[row][j] = alpha · q[row] · k[keys.start + j]`, rows of `q` being whole vectors, and those of `scores` [`KEYS`] apart.
#[inline(always)]
fn multiply<T: Lanes, S: Simd>(s: S, q: &[f32], k: &MatView<T>, keys: Range<usize>, alpha: f32, scores: &mut [f32], coming: &mut Coming) {
    let stride = k.cols().next_multiple_of(S::LANES);
    for (q, scores) in q.chunks(ROWS * stride).zip(scores.chunks_mut(ROWS * KEYS)) {
        match q.len() / stride {
            1 => multiply_rows::<T, S, 1>(s, q, k, keys.clone(), alpha, scores, coming),
            2 => multiply_rows::<T, S, 2>(s, q, k, keys.clone(), alpha, scores, coming),
            3 => multiply_rows::<T, S, 3>(s, q, k, keys.clone(), alpha, scores, coming),
            _ => multiply_rows::<T, S, ROWS>(s, q, k, keys.clone(), alpha, scores, coming),
        }
    }
}

#[inline(always)]
fn multiply_rows<T: Lanes, S: Simd, const R: usize>(
    s: S,
    q: &[f32],
    k: &MatView<T>,
    keys: Range<usize>,
    alpha: f32,
    scores: &mut [f32],
    coming: &mut Coming,
) {
    let (width, stride) = (k.cols(), k.cols().next_multiple_of(S::LANES));
    let whole = width / S::LANES * S::LANES;
    let q = &q[..R * stride];
    for (j, key) in keys.enumerate() {
        coming.ask(s);
        let key = &k.data()[key * k.row_stride()..][..width];
        let mut sums = [s.zero(); R];
        for i in (0..whole).step_by(S::LANES) {
            // SAFETY: a whole vector is left of the key and of each row of `q`, which was cut to `R` of them.
            unsafe {
                let key = T::load(s, key.as_ptr().add(i), S::LANES);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = key.mul_add(s.load(q.as_ptr().add(r * stride + i)), *sum);
                }
            }
        }
        if whole < width {
            // SAFETY: as above; so many values are left of the key, and rows of `q` are whole vectors.
            unsafe {
                let key = T::load(s, key.as_ptr().add(whole), width - whole);
                for (r, sum) in sums.iter_mut().enumerate() {
                    *sum = key.mul_add(s.load(q.as_ptr().add(r * stride + whole)), *sum);
                }
            }
        }
        for r in 0..R {
            scores[r * KEYS + j] = alpha * sums[r].reduce_sum();
        }
    }
}

/// `sums[row] += Σ_j weights[row][j] · v[keys.start + j]`, rows of `weights` being [`KEYS`] apart.
#[inline(always)]
fn add<T: Lanes, S: Simd>(s: S, weights: &[f32], v: &MatView<T>, keys: Range<usize>, sums: &mut [f32], coming: &mut Coming) {
    for (weights, sums) in weights.chunks(ROWS * KEYS).zip(sums.chunks_mut(ROWS * v.cols())) {
        match sums.len() / v.cols() {
            1 => add_rows::<T, S, 1>(s, weights, v, keys.clone(), sums, coming),
            2 => add_rows::<T, S, 2>(s, weights, v, keys.clone(), sums, coming),
            3 => add_rows::<T, S, 3>(s, weights, v, keys.clone(), sums, coming),
            _ => add_rows::<T, S, ROWS>(s, weights, v, keys.clone(), sums, coming),
        }
    }
}

#[inline(always)]
fn add_rows<T: Lanes, S: Simd, const R: usize>(
    s: S,
    weights: &[f32],
    v: &MatView<T>,
    keys: Range<usize>,
    sums: &mut [f32],
    coming: &mut Coming,
) {
    /// Enough sums for their additions to overlap, few enough for registers.
    const VECTORS: usize = 4;
    let mut col = 0;
    while col + VECTORS * S::LANES <= v.cols() {
        add_columns::<T, S, R, VECTORS>(s, weights, v, keys.clone(), sums, [col, S::LANES], coming);
        col += VECTORS * S::LANES;
    }
    while col + S::LANES <= v.cols() {
        add_columns::<T, S, R, 1>(s, weights, v, keys.clone(), sums, [col, S::LANES], coming);
        col += S::LANES;
    }
    if col < v.cols() {
        add_columns::<T, S, R, 1>(s, weights, v, keys, sums, [col, v.cols() - col], coming);
    }
}

/// [`add`] for `N` vectors of columns from `col` on, of `lanes` columns each.
#[inline(always)]
fn add_columns<T: Lanes, S: Simd, const R: usize, const N: usize>(
    s: S,
    weights: &[f32],
    v: &MatView<T>,
    keys: Range<usize>,
    sums: &mut [f32],
    [col, lanes]: [usize; 2],
    coming: &mut Coming,
) {
    let width = v.cols();
    assert!(weights.len() >= (R - 1) * KEYS + keys.len());
    let mut acc = [[s.zero(); N]; R];
    for (r, acc) in acc.iter_mut().enumerate() {
        for (n, acc) in acc.iter_mut().enumerate() {
            *acc = s.load_slice_partial(&sums[r * width + col + n * lanes..][..lanes]);
        }
    }
    for (j, key) in keys.enumerate() {
        coming.ask(s);
        let values = &v.data()[key * v.row_stride()..][col..col + N * lanes];
        for n in 0..N {
            // SAFETY: so many values are there, and weights of all keys in each of the `R` rows.
            unsafe {
                let values = T::load(s, values.as_ptr().add(n * lanes), lanes);
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[n] = s.splat(*weights.as_ptr().add(r * KEYS + j)).mul_add(values, acc[n]);
                }
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        let sums = &mut sums[r * width + col..][..N * lanes];
        for (sums, acc) in sums.chunks_mut(S::LANES).zip(acc) {
            acc.store_slice(sums, sums.len());
        }
    }
}
