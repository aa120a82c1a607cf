//! Products of many rows: panels of the matrix are decoded into the type of the input and multiplied by the library's own kernel.
//!
//! A panel takes at most [`PANEL_BYTES`], or the least that it can have: 16 rows, or (of the transposed product) 256 columns.

use super::dots::{self, MAX_DOT_ROWS};
use super::{Blocks, MAX_UNIT, Rows};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::cast::Stored;
use crate::cpu::gemm::{Gemm, GemmElement};
use crate::element::Float;
use crate::view::MatView;
use half::{bf16, f16};
use std::ops::Range;

/// Decoded values that are held at once: a share of the second-level cache and the third, and nothing beside a model.
const PANEL_BYTES: usize = 8 << 20;

/// Rows of the least panel.
const MIN_PANEL_ROWS: usize = 16;

/// An element type of inputs and outputs. What takes time are functions of the types themselves, so that they are compiled here.
pub trait Input: GemmElement + Float {
    /// Values to f32: `to` is as long as `from`.
    fn to_f32(from: &[Self], to: &mut [f32]);
    /// Values from f32, rounded once: `to` is as long as `from`.
    fn from_f32(from: &[f32], to: &mut [Self]);
    /// The product of few rows, if they can be widened to f32 without loss.
    fn few(matrix: &Blocks<'_>, x: &[Self], bias: Option<&[Self]>, out: &mut [Self]) -> Option<Result<(), OutOfMemory>>;
    /// See [`Blocks::dequantize`].
    fn decode(matrix: &Blocks<'_>, rows: &dyn Rows, cols: Range<usize>, out: &mut [Self]);
}

macro_rules! input_through_f32 {
    ($($t:ty),*) => { $(
        impl Input for $t {
            #[inline(always)]
            fn to_f32(from: &[Self], to: &mut [f32]) {
                assert_eq!(from.len(), to.len());
                // SAFETY: both have that length, and one of them is borrowed mutably.
                unsafe { <$t as Stored>::widen(from.as_ptr(), to.as_mut_ptr(), to.len()) }
            }
            #[inline(always)]
            fn from_f32(from: &[f32], to: &mut [Self]) {
                assert_eq!(from.len(), to.len());
                // SAFETY: as above.
                unsafe { <$t as Stored>::narrow(from.as_ptr(), to.as_mut_ptr(), to.len()) }
            }
            fn few(matrix: &Blocks<'_>, x: &[Self], bias: Option<&[Self]>, out: &mut [Self]) -> Option<Result<(), OutOfMemory>> {
                Some(dots::product(matrix, x, bias, out))
            }
            fn decode(matrix: &Blocks<'_>, rows: &dyn Rows, cols: Range<usize>, out: &mut [Self]) {
                matrix.decode(rows, cols, out);
            }
        }
    )* };
}
input_through_f32!(f32, f16, bf16);

impl Input for f64 {
    #[inline(always)]
    fn to_f32(from: &[Self], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, &x)| *to = x as f32);
    }
    #[inline(always)]
    fn from_f32(from: &[f32], to: &mut [Self]) {
        to.iter_mut().zip(from).for_each(|(to, &x)| *to = f64::from(x));
    }
    fn few(_: &Blocks<'_>, _: &[Self], _: Option<&[Self]>, _: &mut [Self]) -> Option<Result<(), OutOfMemory>> {
        None
    }
    fn decode(matrix: &Blocks<'_>, rows: &dyn Rows, cols: Range<usize>, out: &mut [Self]) {
        matrix.decode(rows, cols, out);
    }
}

impl Blocks<'_> {
    /// `out[b][row] = bias[row] + Σ_col x[b][col] · w[row][col]`: `x` is row-major `[b, cols]`, `out` `[b, rows]`.
    ///
    /// Few rows of at most 32-bit values are multiplied by the exact weights, in f32, and rounded once at the end. For many, weights are
    /// first rounded to the type of the input.
    ///
    /// # Errors
    /// If the memory for a panel cannot be had; `out` is then unspecified.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn linear<T: Input>(&self, x: &[T], bias: Option<&[T]>, out: &mut [T]) -> Result<(), OutOfMemory> {
        let (rows, cols) = (self.rows, self.cols);
        let count = out.len().checked_div(rows).unwrap_or(0);
        assert_eq!(out.len(), count * rows, "rows of results");
        assert!(bias.is_none_or(|bias| bias.len() == rows), "bias");
        if out.is_empty() {
            return Ok(());
        }
        assert_eq!(x.len(), count * cols, "rows of the input");
        if count <= MAX_DOT_ROWS
            && cols > 0
            && let Some(done) = T::few(self, x, bias, out)
        {
            return done;
        }
        let height = (PANEL_BYTES / size_of::<T>() / cols.max(1)).max(MIN_PANEL_ROWS).min(rows);
        let mut panel = Buffer::new(height * cols * size_of::<T>())?;
        let panel = panel.as_slice_mut::<T>();
        for first in (0..rows).step_by(height) {
            let height = height.min(rows - first);
            let panel = &mut panel[..height * cols];
            self.dequantize(&(first..first + height), 0..cols, panel);
            let gemm = Gemm::new(whole(x, count, cols), whole(panel, height, cols).t());
            Gemm { bias: bias.map(|bias| &bias[first..first + height]), ..gemm }.run(&mut out[first..], rows)?;
        }
        Ok(())
    }

    /// The transposed product, `out[b][col] = Σ_row x[b][row] · w[row][col]`: `x` is row-major `[b, rows]`, `out` `[b, cols]`. Weights are
    /// rounded to the type of the input.
    ///
    /// # Errors
    /// If the memory for a panel cannot be had; `out` is then unspecified.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn linear_transposed<T: Input>(&self, x: &[T], out: &mut [T]) -> Result<(), OutOfMemory> {
        let (rows, cols) = (self.rows, self.cols);
        let count = out.len().checked_div(cols).unwrap_or(0);
        assert_eq!(out.len(), count * cols, "rows of results");
        if out.is_empty() {
            return Ok(());
        }
        assert_eq!(x.len(), count * rows, "rows of the input");
        // Whole columns, so that a sum is done in one product and rounded once.
        let width = (PANEL_BYTES / size_of::<T>() / rows.max(1) / MAX_UNIT * MAX_UNIT).max(MAX_UNIT).min(cols);
        let mut panel = Buffer::new(rows * width * size_of::<T>())?;
        let panel = panel.as_slice_mut::<T>();
        for first in (0..cols).step_by(width) {
            let width = width.min(cols - first);
            let panel = &mut panel[..rows * width];
            self.dequantize(&(0..rows), first..first + width, panel);
            Gemm::new(whole(x, count, rows), whole(panel, rows, width)).run(&mut out[first..], cols)?;
        }
        Ok(())
    }
}

/// A row-major matrix whose length was checked.
fn whole<T>(data: &[T], rows: usize, cols: usize) -> MatView<'_, T> {
    match MatView::row_major(data, rows, cols) {
        Some(view) => view,
        None => panic!("{} values are no {rows} rows of {cols}", data.len()),
    }
}
