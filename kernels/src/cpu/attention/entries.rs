//! What the factors of attention's products are made of, 32 bits an entry: a value as f32, or on machines that multiply them twice as fast,
//! a pair of bf16 that are neighbours along the sum.

use super::Attended;
use crate::cpu::cast::Stored;
use crate::cpu::gemm::dot::Lanes;
use crate::cpu::gemm::micro::MicroKernels;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::Avx512Bf16;
use crate::cpu::simd::{F32s, Simd};
use crate::view::MatView;
use half::bf16;
use std::ops::Range;

/// How many columns a row-major block of `cols` columns needs for the micro-kernels to read whole panels of it.
pub(super) fn padded(kernels: &MicroKernels, cols: usize) -> usize {
    let rest = cols % kernels.nr;
    cols - rest + if rest > 0 { kernels.panel_width(rest) } else { 0 }
}

/// A kind of entries, made of the elements of matrices or of f32 that were computed.
///
/// Summed over columns, an entry has neighbours of a row, and there are `cols.div_ceil(TERMS)` to a row; summed over rows, an entry has neighbours
/// of a column, and there are `rows.div_ceil(TERMS)` rows of entries. What the last entry lacks is zero.
pub trait Entries<T>: Copy + Send + Sync + 'static {
    /// Values of an entry.
    const TERMS: usize;

    /// The micro-kernels that multiply such entries.
    fn kernels() -> &'static MicroKernels;

    /// Some rows, to be summed over their columns: one after the other.
    fn load_rows<S: Simd>(s: S, from: &MatView<T>, rows: Range<usize>, to: &mut [f32]);

    /// Some rows, to be summed over: rows of `stride` entries, zero beyond the matrix's columns.
    fn load_columns<S: Simd>(s: S, from: &MatView<T>, rows: Range<usize>, stride: usize, to: &mut [f32]);

    /// Some rows, to be summed over either way: [`load_columns`](Self::load_columns) into `by_columns` and, where an entry is more than one value, so that
    /// these do not serve for both, [`load_rows`](Self::load_rows) into `by_rows`.
    #[inline(always)]
    fn load_both<'a, S: Simd>(
        s: S,
        from: &MatView<T>,
        rows: Range<usize>,
        stride: usize,
        by_rows: &'a mut [f32],
        by_columns: &'a mut [f32],
    ) -> Loaded<'a> {
        Self::load_columns(s, from, rows.clone(), stride, by_columns);
        if Self::TERMS == 1 {
            return Loaded { rows: (by_columns, stride), columns: by_columns };
        }
        Self::load_rows(s, from, rows, by_rows);
        Loaded { rows: (by_rows, from.cols().div_ceil(Self::TERMS)), columns: by_columns }
    }

    /// `rows` rows of `cols` computed values, `stride` apart, to be summed over their columns, and the distance of the rows of entries. `to` has room for
    /// all rows' entries, rows `stride / TERMS` apart.
    fn rows_of<'a>(from: &'a [f32], extents: [usize; 2], stride: usize, to: &'a mut [f32]) -> (&'a [f32], usize);

    /// The same, to be summed over the rows: rows of entries `stride` apart.
    fn columns_of<'a>(from: &'a [f32], extents: [usize; 2], stride: usize, to: &'a mut [f32]) -> &'a [f32];
}

/// Rows of a matrix as entries.
#[derive(Clone, Copy, Debug)]
pub struct Loaded<'a> {
    /// To be summed over their columns, and the distance of rows.
    pub rows: (&'a [f32], usize),
    /// To be summed over.
    pub columns: &'a [f32],
}

/// Values as f32.
#[derive(Clone, Copy, Debug)]
pub struct Single;

impl<T: Attended> Entries<T> for Single {
    const TERMS: usize = 1;

    fn kernels() -> &'static MicroKernels {
        MicroKernels::get()
    }

    #[inline(always)]
    fn load_rows<S: Simd>(s: S, from: &MatView<T>, rows: Range<usize>, to: &mut [f32]) {
        widen_rows(s, from, rows, from.cols(), to);
    }

    #[inline(always)]
    fn load_columns<S: Simd>(s: S, from: &MatView<T>, rows: Range<usize>, stride: usize, to: &mut [f32]) {
        widen_rows(s, from, rows, stride, to);
    }

    #[inline(always)]
    fn rows_of<'a>(from: &'a [f32], _: [usize; 2], stride: usize, _: &'a mut [f32]) -> (&'a [f32], usize) {
        (from, stride)
    }

    #[inline(always)]
    fn columns_of<'a>(from: &'a [f32], _: [usize; 2], _: usize, _: &'a mut [f32]) -> &'a [f32] {
        from
    }
}

/// Rounds computed values.
pub(super) fn round<T: Attended>(from: &[f32], to: &mut [T]) {
    assert_eq!(from.len(), to.len());
    // SAFETY: both have that many values.
    unsafe { <T as Stored>::narrow(from.as_ptr(), to.as_mut_ptr(), to.len()) }
}

/// Some rows as f32, `stride` apart in `to`; what is beyond the matrix's columns becomes zero.
#[inline(always)]
pub(super) fn widen_rows<T: Attended, S: Simd>(s: S, from: &MatView<T>, rows: Range<usize>, stride: usize, to: &mut [f32]) {
    let (cols, col_stride) = (from.cols(), from.col_stride());
    for (row, to) in rows.zip(to.chunks_exact_mut(stride)) {
        let from = &from.data()[row * from.row_stride()..];
        let (values, rest) = to.split_at_mut(cols);
        if col_stride == 1 {
            let (mut from, mut values) = (from[..cols].chunks_exact(S::LANES), values.chunks_exact_mut(S::LANES));
            for (from, to) in from.by_ref().zip(values.by_ref()) {
                // SAFETY: the chunk has that many values.
                unsafe { <T as Lanes>::load(s, from.as_ptr(), S::LANES) }.store_slice(to, S::LANES);
            }
            let (from, to) = (from.remainder(), values.into_remainder());
            if !from.is_empty() {
                // SAFETY: as above.
                unsafe { <T as Lanes>::load(s, from.as_ptr(), from.len()) }.store_slice(to, from.len());
            }
        } else {
            values.iter_mut().enumerate().for_each(|(j, to)| *to = from[j * col_stride].widen());
        }
        rest.fill(0.0);
    }
}

/// Pairs of bf16, the first in the lower half. Weights and gradients of scores are rounded to bf16 to become factors, as FlashAttention does; sums are f32.
#[derive(Clone, Copy, Debug)]
pub struct Pairs;

#[inline(always)]
fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(low.to_bits() as u32 | (high.to_bits() as u32) << 16)
}

impl Entries<bf16> for Pairs {
    const TERMS: usize = 2;

    fn kernels() -> &'static MicroKernels {
        MicroKernels::bf16_pairs()
    }

    #[inline(always)]
    fn load_rows<S: Simd>(_: S, from: &MatView<bf16>, rows: Range<usize>, to: &mut [f32]) {
        let (cols, col_stride) = (from.cols(), from.col_stride());
        for (row, to) in rows.zip(to.chunks_exact_mut(cols.div_ceil(2))) {
            let from = &from.data()[row * from.row_stride()..];
            if col_stride == 1 {
                let (pairs, rest) = from[..cols].as_chunks::<2>();
                to.iter_mut().zip(pairs).for_each(|(to, &[low, high])| *to = pair(low, high));
                if let (Some(to), &[last]) = (to.last_mut(), rest) {
                    *to = pair(last, bf16::ZERO);
                }
            } else {
                let at = |j: usize| if j < cols { from[j * col_stride] } else { bf16::ZERO };
                to.iter_mut().enumerate().for_each(|(j, to)| *to = pair(at(2 * j), at(2 * j + 1)));
            }
        }
    }

    #[inline(always)]
    fn load_columns<S: Simd>(_: S, from: &MatView<bf16>, rows: Range<usize>, stride: usize, to: &mut [f32]) {
        let (cols, col_stride) = (from.cols(), from.col_stride());
        for (first, to) in rows.clone().step_by(2).zip(to.chunks_exact_mut(stride)) {
            let row = |row: usize| &from.data()[row * from.row_stride()..];
            let (low, high) = (row(first), (first + 1 < rows.end).then(|| row(first + 1)));
            let (values, rest) = to.split_at_mut(cols);
            match high {
                Some(high) if col_stride == 1 => {
                    let pairs = low[..cols].iter().zip(&high[..cols]);
                    values.iter_mut().zip(pairs).for_each(|(to, (&low, &high))| *to = pair(low, high));
                }
                _ => {
                    let high = |j: usize| high.map_or(bf16::ZERO, |high| high[j * col_stride]);
                    values.iter_mut().enumerate().for_each(|(j, to)| *to = pair(low[j * col_stride], high(j)));
                }
            }
            rest.fill(0.0);
        }
    }

    #[inline(always)]
    fn rows_of<'a>(from: &'a [f32], [rows, cols]: [usize; 2], stride: usize, to: &'a mut [f32]) -> (&'a [f32], usize) {
        let (entries, rounding) = (stride / 2, Rounding::get());
        for (from, to) in from.chunks(stride).zip(to.chunks_exact_mut(entries)).take(rows) {
            rounding.narrow(&from[..cols], &mut to[..cols.div_ceil(2)]);
        }
        (to, entries)
    }

    #[inline(always)]
    fn columns_of<'a>(from: &'a [f32], [rows, cols]: [usize; 2], stride: usize, to: &'a mut [f32]) -> &'a [f32] {
        let rounding = Rounding::get();
        for (first, to) in (0..rows).step_by(2).zip(to.chunks_mut(stride)) {
            let row = |row: usize| &from[row * stride..][..cols];
            rounding.interleave(row(first), (first + 1 < rows).then(|| row(first + 1)), &mut to[..cols]);
        }
        to
    }
}

/// Rounds computed values to pairs.
struct Rounding {
    #[cfg(target_arch = "x86_64")]
    fast: Option<Avx512Bf16>,
}

impl Rounding {
    fn get() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            fast: Avx512Bf16::detect().filter(|_| MicroKernels::has_bf16_pairs()),
        }
    }

    /// Neighbours as pairs.
    fn narrow(&self, from: &[f32], to: &mut [f32]) {
        let (pairs, rest) = from.as_chunks::<2>();
        assert_eq!(to.len(), from.len().div_ceil(2));
        if let (Some(to), &[last]) = (to.last_mut(), rest) {
            *to = pair(bf16::from_f32(last), bf16::ZERO);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(bf16) = self.fast {
            return bf16.narrow(pairs.as_flattened(), &mut to[..pairs.len()]);
        }
        to.iter_mut().zip(pairs).for_each(|(to, &[low, high])| *to = pair(bf16::from_f32(low), bf16::from_f32(high)));
    }

    /// Values of two rows as pairs; zeros where there is no second.
    fn interleave(&self, low: &[f32], high: Option<&[f32]>, to: &mut [f32]) {
        let Some(high) = high else {
            return to.iter_mut().zip(low).for_each(|(to, &low)| *to = pair(bf16::from_f32(low), bf16::ZERO));
        };
        #[cfg(target_arch = "x86_64")]
        if let Some(bf16) = self.fast {
            return bf16.interleave(low, high, to);
        }
        to.iter_mut().zip(low.iter().zip(high)).for_each(|(to, (&low, &high))| *to = pair(bf16::from_f32(low), bf16::from_f32(high)));
    }
}
