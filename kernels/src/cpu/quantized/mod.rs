//! Matrices of weights in 8, 6 and 4 bits: a row is a run of groups, each with codes and what they mean. Nothing here quantises activations.
//!
//! [`Quantization`] says how a matrix lies in memory and [`Blocks`] is one that was checked; `formats` decodes a vector at a time. On
//! that rest [`Blocks::dequantize`], the products of few rows (`dots`: the codes are streamed once) and those of many (`panels`).

mod dots;
mod encode;
mod formats;
mod panels;
#[cfg(test)]
mod tests;

pub use encode::{NotFinite, quantize};
pub use panels::Input;

use super::isa::{WithSimd, dispatch};
use super::parallel::{SharedMut, for_each};
use super::simd::Simd;
use formats::{Format, Row, Store};
use std::fmt;
use std::ops::Range;

/// The most values that any format decodes together, and a multiple of what each does.
pub(crate) const MAX_UNIT: usize = 256;

/// How a matrix of weights is quantised along its rows.
///
/// `Int8` and `Int4` are this library's own: any number of columns, the last group of a row being shorter. The others are the blocks of
/// ggml, as GGUF files hold them: columns must fill whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Quantization {
    /// w = s·q for q in −127..=127 and a bf16 scale s for each `group` (64 or 128) of a row.
    ///
    /// A scale costs nothing but range: it is rounded up before the codes are chosen by it, so that its own rounding is no error of the
    /// weights, and bf16 has the range of f32, which f16 has not.
    Int8 {
        /// Columns that share a scale.
        group: usize,
    },
    /// w = s·q + m for q in 0..=15, with s and m in bf16 for each `group` (64 or 128) of a row.
    Int4 {
        /// Columns that share a scale and a minimum.
        group: usize,
    },
    /// w = d·q in blocks of 32: d in f16, q in 8 bits.
    Q8_0,
    /// w = d·(q − 8) in blocks of 32: d in f16, q in 4 bits.
    Q4_0,
    /// w = d·sᵢ·q − dₘ·mᵢ in blocks of 256: d and dₘ in f16, sᵢ and mᵢ in 6 bits for each 32 values, q in 4 bits.
    Q4K,
    /// w = d·sᵢ·(q − 32) in blocks of 256: d in f16, sᵢ in 8 bits for each 16 values, q in 6 bits.
    Q6K,
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 { group } => write!(f, "int8 in groups of {group}"),
            Self::Int4 { group } => write!(f, "int4 in groups of {group}"),
            Self::Q8_0 => f.write_str("Q8_0"),
            Self::Q4_0 => f.write_str("Q4_0"),
            Self::Q4K => f.write_str("Q4_K"),
            Self::Q6K => f.write_str("Q6_K"),
        }
    }
}

/// Evaluates `$body` with `$format` bound to the [`Format`] of a quantisation.
macro_rules! for_format {
    ($kind:expr, $format:ident => $body:expr) => {
        match $kind {
            $crate::cpu::quantized::Quantization::Int8 { group } => {
                let $format = $crate::cpu::quantized::formats::Int8::new(group);
                $body
            }
            $crate::cpu::quantized::Quantization::Int4 { group } => {
                let $format = $crate::cpu::quantized::formats::Int4::new(group);
                $body
            }
            $crate::cpu::quantized::Quantization::Q8_0 => {
                let $format = $crate::cpu::quantized::formats::Q8_0;
                $body
            }
            $crate::cpu::quantized::Quantization::Q4_0 => {
                let $format = $crate::cpu::quantized::formats::Q4_0;
                $body
            }
            $crate::cpu::quantized::Quantization::Q4K => {
                let $format = $crate::cpu::quantized::formats::Q4K;
                $body
            }
            $crate::cpu::quantized::Quantization::Q6K => {
                let $format = $crate::cpu::quantized::formats::Q6K;
                $body
            }
        }
    };
}
pub(crate) use for_format;

/// Where the parts of a matrix lie in its bytes.
#[derive(Clone, Copy, Debug)]
struct Places {
    /// Bytes from the codes of one row to those of the next.
    codes: usize,
    /// The same for the scales that lie apart, behind all codes; 0 if there are none.
    scales: usize,
    /// All of it.
    total: usize,
}

impl Quantization {
    /// Columns and bytes of a block of ggml.
    fn block(self) -> Option<[usize; 2]> {
        match self {
            Self::Int8 { .. } | Self::Int4 { .. } => None,
            Self::Q8_0 => Some([32, 34]),
            Self::Q4_0 => Some([32, 18]),
            Self::Q4K => Some([256, 144]),
            Self::Q6K => Some([256, 210]),
        }
    }

    /// What is wrong with a matrix of `cols` columns in this form, if anything is.
    pub fn refuses(self, cols: usize) -> Option<String> {
        match (self, self.block()) {
            (Self::Int8 { group } | Self::Int4 { group }, _) if !matches!(group, 64 | 128) => {
                Some(format!("groups are of 64 or 128 columns, not of {group}"))
            }
            (_, Some([block, _])) if !cols.is_multiple_of(block) => Some(format!("{cols} columns do not fill {self} blocks of {block}")),
            _ => None,
        }
    }

    fn places(self, rows: usize, cols: usize) -> Option<Places> {
        if self.refuses(cols).is_some() {
            return None;
        }
        let (codes, scales) = match (self, self.block()) {
            (_, Some([block, bytes])) => ((cols / block).checked_mul(bytes)?, 0),
            // Rows of whole cache lines.
            (Self::Int8 { group }, _) => (cols.checked_next_multiple_of(64)?, cols.div_ceil(group) * 2),
            (Self::Int4 { group }, _) => {
                let padded = cols.checked_next_multiple_of(128)?;
                (padded / 2, padded / group * 4)
            }
            _ => return None,
        };
        let total = rows.checked_mul(codes.checked_add(scales)?)?;
        Some(Places { codes, scales, total })
    }

    /// Bytes of a matrix: `None` if it cannot be in this form, or its size overflows.
    pub fn nbytes(self, rows: usize, cols: usize) -> Option<usize> {
        self.places(rows, cols).map(|places| places.total)
    }

    /// Bytes that a row of `cols` columns has among the codes, and among the scales behind all codes (none in ggml's blocks); `None` as of
    /// [`nbytes`](Self::nbytes).
    pub fn row_bytes(self, cols: usize) -> Option<[usize; 2]> {
        self.places(1, cols).map(|places| [places.codes, places.scales])
    }

    /// Columns after which a panel may begin.
    fn unit(self) -> usize {
        for_format!(self, format => unit_of(format))
    }
}

fn unit_of<F: Format>(_: F) -> usize {
    F::UNIT
}

/// A quantised matrix `[rows, cols]` in memory.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    kind: Quantization,
    rows: usize,
    cols: usize,
    places: Places,
    bytes: &'a [u8],
}

impl<'a> Blocks<'a> {
    /// A view of `bytes`, or `None` unless there are as many as [`Quantization::nbytes`] says. Every byte is a valid code or scale.
    pub fn new(kind: Quantization, rows: usize, cols: usize, bytes: &'a [u8]) -> Option<Self> {
        let places = kind.places(rows, cols)?;
        (places.total == bytes.len()).then_some(Self { kind, rows, cols, places, bytes })
    }

    /// Number of rows: outputs of a layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: inputs of a layer.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Where a row lies.
    fn row(&self, row: usize) -> Row {
        debug_assert!(row < self.rows);
        let base = self.bytes.as_ptr();
        let scales = self.rows * self.places.codes + row * self.places.scales;
        Row { codes: base.wrapping_add(row * self.places.codes), scales: base.wrapping_add(scales) }
    }

    /// Writes rows `rows[i]` of the columns `cols` to `out[i · cols.len()..]`, each value rounded once from the f32 that it stands for.
    ///
    /// # Panics
    /// If a row or the columns are out of range, the columns do not begin where groups do (multiples of 256 always do), or `out` is not as
    /// long as all values together.
    pub fn dequantize<T: Input>(&self, rows: &dyn Rows, cols: Range<usize>, out: &mut [T]) {
        T::decode(self, rows, cols, out);
    }

    fn decode<T: Input>(&self, rows: &dyn Rows, cols: Range<usize>, out: &mut [T]) {
        let unit = self.kind.unit();
        assert!(cols.start <= cols.end && cols.end <= self.cols && cols.start.is_multiple_of(unit), "columns {cols:?}");
        let width = cols.len();
        assert_eq!(out.len(), rows.count() * width, "room for the values");
        if out.is_empty() {
            return;
        }
        let shared = SharedMut::new(out);
        // A task of about 10 µs.
        let chunk = ((1 << 15) / width).max(1);
        for_each(rows.count().div_ceil(chunk), rows.count() * width / 4, |task| {
            for i in task * chunk..rows.count().min((task + 1) * chunk) {
                let row = rows.at(i);
                assert!(row < self.rows, "row {row} of {}", self.rows);
                // SAFETY: this stretch of `out` is inside of it, by the assertion on its length, and no other task's.
                let out = unsafe { std::slice::from_raw_parts_mut(shared.get().add(i * width), width) };
                for_format!(self.kind, format => dispatch(DecodeRow { format, row: self.row(row), first: cols.start, out }));
            }
        });
    }
}

/// Which rows are wanted: a range, or a list.
pub trait Rows: Sync {
    /// How many.
    fn count(&self) -> usize;
    /// The `i`th of them.
    fn at(&self, i: usize) -> usize;
}

impl Rows for Range<usize> {
    fn count(&self) -> usize {
        self.len()
    }
    fn at(&self, i: usize) -> usize {
        self.start + i
    }
}

impl Rows for Vec<i64> {
    fn count(&self) -> usize {
        self.len()
    }
    fn at(&self, i: usize) -> usize {
        usize::try_from(self[i]).unwrap_or(usize::MAX)
    }
}

/// Decodes columns of one row, from the beginning of a unit on.
struct DecodeRow<'a, F, T> {
    format: F,
    row: Row,
    first: usize,
    out: &'a mut [T],
}

impl<F: Format, T: Input> WithSimd for DecodeRow<'_, F, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let mut values = [0f32; MAX_UNIT];
        for (i, out) in self.out.chunks_mut(MAX_UNIT).enumerate() {
            let first = self.first / F::UNIT + i * (MAX_UNIT / F::UNIT);
            for unit in 0..out.len().div_ceil(F::UNIT) {
                // SAFETY: a unit that holds columns of the matrix lies in its memory, as padding does, and `values` has room for all of them.
                unsafe { self.format.decode(s, self.row, first + unit, &mut Store(values.as_mut_ptr().add(unit * F::UNIT))) };
            }
            T::from_f32(&values[..out.len()], out);
        }
    }
}
