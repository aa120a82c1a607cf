//! Products of a few rows, at the speed of memory: each code is read once, decoded in registers and multiplied by every row.
//!
//! An input is widened to f32 and padded with zeros beforehand, so that no row of codes has a tail. A sum is over the lanes of one vector,
//! in the order of columns, whatever the number of rows or threads.

use super::formats::{Format, Sink};
use super::{Blocks, Input, MAX_UNIT, for_format};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::read_ahead;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::{CACHE_LINE, F32s, Simd};
use std::ops::Range;

/// Up to so many rows are multiplied here: beyond, what it costs to decode a matrix once is little beside its product.
pub(super) const MAX_DOT_ROWS: usize = 16;

/// Multiply-adds of a task at most: about 10 µs.
const TASK_MACS: usize = 1 << 18;

/// Bytes of codes of a task at most: about 3 µs, which is what a thread may have to wait for another at the end.
const TASK_BYTES: usize = 1 << 16;

/// Multiply-adds that a core does in a nanosecond.
const MACS_PER_NS: usize = 16;

/// Rows of the matrix whose sums are under way at once, which hides the latency of additions.
const TILE_ROWS: usize = 4;

/// Rows of the input that share what was decoded.
const TILE_INPUTS: usize = 4;

/// `out[b][row] = bias[row] + Σ_col x[b][col] · w[row][col]`.
pub(super) fn product<T: Input>(matrix: &Blocks<'_>, x: &[T], bias: Option<&[T]>, out: &mut [T]) -> Result<(), OutOfMemory> {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let count = out.len() / rows;
    let padded = cols.next_multiple_of(MAX_UNIT);
    let mut widened = Buffer::new(count * padded * size_of::<f32>())?;
    let widened = widened.as_slice_mut::<f32>();
    for (to, from) in widened.chunks_exact_mut(padded).zip(x.chunks_exact(cols)) {
        let (values, rest) = to.split_at_mut(cols);
        T::to_f32(from, values);
        rest.fill(0.0);
    }
    let x = &*widened;
    let shared = SharedMut::new(out);
    let chunk = (TASK_MACS / (count * cols)).min(TASK_BYTES / matrix.places.codes).next_multiple_of(TILE_ROWS).max(TILE_ROWS);
    for_each(rows.div_ceil(chunk), count * rows * cols / MACS_PER_NS, |task| {
        let range = task * chunk..rows.min((task + 1) * chunk);
        let out = shared.get();
        for_format!(matrix.kind, format => dispatch(Dots { format, matrix, x, padded, count, bias, rows: range, out }));
    });
    Ok(())
}

/// Some rows of the matrix with all of the input.
struct Dots<'a, F, T> {
    format: F,
    matrix: &'a Blocks<'a>,
    x: &'a [f32],
    padded: usize,
    count: usize,
    bias: Option<&'a [T]>,
    rows: Range<usize>,
    /// `count × matrix.rows`, of which this task owns the columns `rows`.
    out: *mut T,
}

impl<F: Format, T: Input> WithSimd for Dots<'_, F, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for row in self.rows.clone().step_by(TILE_ROWS) {
            if self.count == 1 {
                self.tile::<S, 1>(s, row, 0);
            } else {
                for input in (0..self.count).step_by(TILE_INPUTS) {
                    self.tile::<S, TILE_INPUTS>(s, row, input);
                }
            }
        }
    }
}

impl<F: Format, T: Input> Dots<'_, F, T> {
    /// A tile of results. What lies beyond the last row or input is computed as the last one, and dropped.
    #[inline(always)]
    fn tile<S: Simd, const B: usize>(&self, s: S, row: usize, input: usize) {
        let mut rows = [self.matrix.row(row); TILE_ROWS];
        for (r, place) in rows.iter_mut().enumerate() {
            *place = self.matrix.row((row + r).min(self.rows.end - 1));
        }
        let mut x = [self.x.as_ptr(); B];
        for (b, x) in x.iter_mut().enumerate() {
            *x = self.x[(input + b).min(self.count - 1) * self.padded..][..self.padded].as_ptr();
        }
        let mut sums = [[s.zero(); B]; TILE_ROWS];
        let units = self.matrix.cols.div_ceil(F::UNIT);
        let row_bytes = self.matrix.places.codes;
        // The first inputs ask for all.
        let ahead = if input == 0 { read_ahead(self.matrix.bytes.len()) } else { 0 };
        let tile_bytes = TILE_ROWS * row_bytes / units;
        for unit in 0..units {
            if ahead > 0 {
                for at in (0..tile_bytes).step_by(CACHE_LINE) {
                    s.prefetch(rows[0].codes.wrapping_add(unit * tile_bytes + at + ahead).cast());
                }
            }
            let mut at = x;
            for x in &mut at {
                *x = x.wrapping_add(unit * F::UNIT);
            }
            for r in 0..TILE_ROWS {
                // SAFETY: the unit holds columns of the matrix, so it lies in the row's memory, and in the padded rows of the input.
                unsafe { self.format.decode(s, rows[r], unit, &mut Products { x: at, sums: &mut sums[r] }) };
            }
        }
        for (r, sums) in sums.iter().enumerate().take(self.rows.end - row) {
            for (b, sum) in sums.iter().enumerate().take(self.count - input) {
                self.finish(input + b, row + r, sum.reduce_sum());
            }
        }
    }

    #[inline(always)]
    fn finish(&self, input: usize, row: usize, sum: f32) {
        let mut value = [sum];
        if let Some(bias) = self.bias {
            let mut wide = [0.0];
            T::to_f32(&bias[row..][..1], &mut wide);
            value[0] += wide[0];
        }
        // SAFETY: the element lies in `out`, and its column is this task's.
        T::from_f32(&value, unsafe { std::slice::from_raw_parts_mut(self.out.add(input * self.matrix.rows + row), 1) });
    }
}

/// Adds what is decoded, times the rows of the input, to sums.
struct Products<'a, S: Simd, const B: usize> {
    x: [*const f32; B],
    sums: &'a mut [S::F32; B],
}

impl<S: Simd, const B: usize> Sink<S> for Products<'_, S, B> {
    #[inline(always)]
    unsafe fn put(&mut self, s: S, at: usize, values: S::F32) {
        for b in 0..B {
            // SAFETY: the rows of the input have room for the unit, in which the vector lies.
            let x = unsafe { s.load(self.x[b].add(at)) };
            self.sums[b] = values.mul_add(x, self.sums[b]);
        }
    }
}
