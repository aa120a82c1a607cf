//! Matrix products `C = activation(alpha · A · B (+ C, or + bias))`, batched, of any strides and any numeric element type.
//!
//! This file holds the argument struct and the choice of a path; the work is done by [`micro`] (register tiles), `pack` and `packing`
//! (panels), `blocked` and `shared` (cache blocking and threads), `dot` (few rows or columns, at the speed of memory), `tiny` (few elements) and `generic`
//! (f64 and integers); `epilogue` is what follows a sum. On processors with matrix tiles, `tiles` takes what is large enough, in parts that `split` makes. f16 and bf16 (`rounded`) go the same ways: they are converted as they are packed, summed in f32, and rounded once.
//!
//! The path, the blocks and the order of every sum depend on shapes, strides, dtype and the
//! [precision](MatmulPrecision) only, and with tiles on whether values are extreme, never on the number of threads. Whether a factor is packed depends on the machine's first
//! cache, too, and changes no bits.

mod blocked;
pub(in crate::cpu) mod dot;
mod epilogue;
mod generic;
mod int8;
pub mod micro;
pub(in crate::cpu) mod pack;
mod packing;
mod precision;
mod rounded;
mod shared;
#[cfg(target_arch = "x86_64")]
pub(in crate::cpu) mod split;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod tiny;

pub(crate) use dot::read_ahead;
pub use epilogue::Activation;
pub use int8::gemm_i8;
pub use precision::{MatmulPrecision, matmul_precision, set_matmul_precision};

use super::alloc::OutOfMemory;
use super::cast::Stored;
use super::parallel::SharedMut;
use crate::view::MatView;

/// The arguments of a batched product: for each item `i` of the batch
/// `C_i[m][n] = init + alpha · Σ_k A_i[m][k] · B_i[k][n]`.
///
/// `A_i` is the matrix `a` moved by `a_offsets[i]` elements, and `B_i` is `b` moved by `b_offsets[i]`, so that any broadcast or strided batch
/// works without a copy; a transposed factor is `view.t()`. `B` is the type of the bias: inside, that of the sums.
#[derive(Clone, Copy, Debug)]
pub struct Gemm<'a, T, B = T> {
    /// The left factor, M×K: shape and strides of each item.
    pub a: MatView<'a, T>,
    /// The right factor, K×N.
    pub b: MatView<'a, T>,
    /// Where each item's `a` begins, relative to the view.
    pub a_offsets: &'a [usize],
    /// Where each item's `b` begins, relative to the view.
    pub b_offsets: &'a [usize],
    /// Factor of the product (of integers: truncated).
    pub alpha: f64,
    /// A value per column, added to every row.
    pub bias: Option<&'a [B]>,
    /// Adds to what C holds instead of overwriting it. Not together with a bias.
    pub accumulate: bool,
    /// A function of what has been computed so far, rounded to C's type before and after: bit for bit what a pass of its own over C would give. Not
    /// together with `accumulate`.
    pub activation: Option<Activation<B>>,
}

impl<'a, T: GemmElement> Gemm<'a, T> {
    /// The plain product of two matrices.
    pub fn new(a: MatView<'a, T>, b: MatView<'a, T>) -> Self {
        Self::batched(a, &[0], b, &[0])
    }

    /// A product per pair of offsets.
    pub fn batched(a: MatView<'a, T>, a_offsets: &'a [usize], b: MatView<'a, T>, b_offsets: &'a [usize]) -> Self {
        Self { a, b, a_offsets, b_offsets, alpha: 1.0, bias: None, accumulate: false, activation: None }
    }

    /// Computes into `out`: item `i` begins at `i · M · row_stride`, and its rows are `row_stride` elements apart
    /// (values between them are left alone).
    ///
    /// # Errors
    /// If the memory for packed factors cannot be had; `out` is then unspecified.
    ///
    /// # Panics
    /// If the inner extents or the batches differ, a bias is not N long or comes with `accumulate`, as an activation does, or that is not defined
    /// for `T`, `row_stride < N`, `out` is too short, or an offset leads out of a factor's data.
    pub fn run(&self, out: &mut [T], row_stride: usize) -> Result<(), OutOfMemory> {
        let (m, k, n) = (self.a.rows(), self.a.cols(), self.b.cols());
        assert_eq!(k, self.b.rows(), "inner extents");
        assert_eq!(self.a_offsets.len(), self.b_offsets.len(), "batches");
        assert!(self.bias.is_none_or(|bias| bias.len() == n && !self.accumulate), "bias");
        assert!(self.activation.is_none_or(|activation| activation.is_defined() && !self.accumulate), "activation");
        assert!(row_stride >= n, "rows of C overlap");
        if self.batch() == 0 || m == 0 || n == 0 {
            return Ok(());
        }
        assert!(out.len() >= (self.batch() * m - 1) * row_stride + n, "C is too short");
        if k == 0 {
            self.fill_init(out, row_stride);
            let out = Out { c: out.as_mut_ptr(), row_stride };
            // SAFETY: the rows lie in C, as was checked, and this is the only task.
            unsafe { self.finish(out, 0..self.batch() * m, 0..n) };
            return Ok(());
        }
        for (view, offsets) in [(self.a, self.a_offsets), (self.b, self.b_offsets)] {
            let furthest = offsets.iter().copied().max().unwrap_or(0);
            assert!(furthest.checked_add(span(&view)).is_some_and(|end| end <= view.data().len()), "a factor leaves its data");
        }
        T::gemm(&self.merge_batch(), out, row_stride)
    }

    /// Computes [`run`](Self::run)'s results into `results`, and into `sums`, of the same layout, what the activation was computed from.
    ///
    /// # Errors
    /// As for `run`.
    ///
    /// # Panics
    /// As for `run`, or if there is no activation, or `results` is not as long as `sums`.
    pub fn run_keeping(&self, sums: &mut [T], results: &mut [T], row_stride: usize) -> Result<(), OutOfMemory> {
        assert!(self.activation.is_some() && sums.len() == results.len(), "sums and results of an activation");
        let (c, results) = (SharedMut::new(sums), SharedMut::new(results));
        Self { activation: self.activation.map(|activation| activation.keeping(c, results)), ..*self }.run(sums, row_stride)
    }

    /// The value of an empty sum.
    fn fill_init(&self, out: &mut [T], row_stride: usize) {
        if self.accumulate {
            return;
        }
        let n = self.b.cols();
        for row in out.chunks_mut(row_stride).take(self.batch() * self.a.rows()) {
            match self.bias {
                Some(bias) => row[..n].copy_from_slice(bias),
                None => row[..n].fill(T::default()),
            }
        }
    }
}

impl<'a, T: Copy, B: Copy> Gemm<'a, T, B> {
    /// Number of items.
    pub fn batch(&self) -> usize {
        self.a_offsets.len()
    }

    /// One tall product instead of a batch whose left factors follow one another and whose right factor is the same:
    /// the right factor is then packed once.
    fn merge_batch(&self) -> Self {
        let step = self.a.rows() * self.a.row_stride();
        let same_b = self.b_offsets.iter().all(|&o| o == self.b_offsets[0]);
        let in_line = self.a_offsets.iter().enumerate().all(|(i, &o)| o == self.a_offsets[0] + i * step);
        if self.batch() == 1 || !same_b || !in_line {
            return *self;
        }
        let a = MatView::new(
            &self.a.data()[self.a_offsets[0]..],
            self.batch() * self.a.rows(),
            self.a.cols(),
            self.a.row_stride(),
            self.a.col_stride(),
        );
        match a {
            Some(a) => Self { a, a_offsets: &[0], b_offsets: &self.b_offsets[..1], ..*self },
            None => *self,
        }
    }

    /// The factors of item `i`.
    fn item(&self, i: usize) -> Item<T> {
        let matrix = |view: &MatView<T>, offset: usize| Matrix {
            // A checked slice: `run` has shown that the offset lies inside.
            data: view.data()[offset..].as_ptr(),
            row_stride: view.row_stride(),
            col_stride: view.col_stride(),
        };
        Item {
            m: self.a.rows(),
            n: self.b.cols(),
            k: self.a.cols(),
            a: matrix(&self.a, self.a_offsets[i]),
            b: matrix(&self.b, self.b_offsets[i]),
        }
    }
}

/// How many elements of data a non-empty matrix reaches over.
fn span<T>(view: &MatView<T>) -> usize {
    (view.rows() - 1) * view.row_stride() + (view.cols() - 1) * view.col_stride() + 1
}

/// The address and strides of a factor whose elements `run` found to lie inside its data.
#[derive(Clone, Copy)]
struct Matrix<T> {
    data: *const T,
    row_stride: usize,
    col_stride: usize,
}

impl<T> Matrix<T> {
    fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// The address of an element: in bounds if the element is, and not dereferenced otherwise.
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *const T {
        self.data.wrapping_add(row * self.row_stride + col * self.col_stride)
    }
}

/// One product of a batch.
#[derive(Clone, Copy)]
struct Item<T> {
    m: usize,
    n: usize,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
}

/// Where an item's C lies.
#[derive(Clone, Copy)]
struct Out<T> {
    c: *mut T,
    row_stride: usize,
}

impl<T> Out<T> {
    #[inline(always)]
    fn at(self, row: usize, col: usize) -> *mut T {
        self.c.wrapping_add(row * self.row_stride + col)
    }
}

/// An element type that matrices can be multiplied in: f32, f64, f16, bf16, i64, i32, u8 (integers wrap around).
pub trait GemmElement: Stored {
    /// Computes a product whose arguments [`Gemm::run`] has checked and that is not empty; call that instead.
    #[doc(hidden)]
    fn gemm(gemm: &Gemm<Self>, out: &mut [Self], row_stride: usize) -> Result<(), OutOfMemory>;
}
