//! Products of i8 with i32 sums, for quantised weights: exact but for wrapping around beyond i32.

use super::{MatView, Matrix, span};
#[cfg(target_arch = "x86_64")]
use crate::cpu::alloc::Buffer;
use crate::cpu::alloc::OutOfMemory;
#[cfg(target_arch = "x86_64")]
use crate::cpu::amx::{self, CHUNK, SIDE, Session, Sums};
#[cfg(target_arch = "x86_64")]
use crate::cpu::isa::{Isa, isa};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::for_each_chunk;
#[cfg(target_arch = "x86_64")]
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;

/// Multiply-adds that a core does in a nanosecond at the least.
const MACS_PER_NS: usize = 16;

/// Columns of a panel of B, and the terms that are summed before a panel gives way to the next: 16 KiB of L1.
const COLS: usize = 64;
const KC: usize = 256;

/// `out[i][j] = Σ_k a[i][k] · b[k][j]` with i32 sums, which wrap around. Rows of `out` are `row_stride` apart; values between them are left alone.
///
/// # Errors
/// If the memory for packed factors cannot be had; `out` is then unspecified.
///
/// # Panics
/// If the inner extents differ, `row_stride` is less than the columns of `b`, `out` is too short, or a factor leaves its data.
pub fn gemm_i8(a: MatView<i8>, b: MatView<i8>, out: &mut [i32], row_stride: usize) -> Result<(), OutOfMemory> {
    let (m, k, n) = (a.rows(), a.cols(), b.cols());
    assert_eq!(k, b.rows(), "inner extents");
    assert!(row_stride >= n, "rows of C overlap");
    if m == 0 || n == 0 {
        return Ok(());
    }
    let out = &mut out[..(m - 1) * row_stride + n];
    if k == 0 {
        out.chunks_mut(row_stride).for_each(|row| row[..n].fill(0));
        return Ok(());
    }
    assert!(span(&a) <= a.data().len() && span(&b) <= b.data().len(), "a factor leaves its data");
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Amx && m > 4 && n > 4 {
        return on_tiles(a, b, out, row_stride);
    }
    on_vectors(a, b, out, row_stride);
    Ok(())
}

/// The factor as the other paths take it.
fn matrix<T>(view: &MatView<T>) -> Matrix<T> {
    Matrix { data: view.data().as_ptr(), row_stride: view.row_stride(), col_stride: view.col_stride() }
}

/// A few rows of C a task.
fn on_vectors(a: MatView<i8>, b: MatView<i8>, out: &mut [i32], row_stride: usize) {
    let macs = a.rows() * b.cols() * a.cols();
    let rows = a.rows().div_ceil(macs.div_ceil(1 << 20).clamp(1, 32));
    for_each_chunk(out, rows * row_stride, macs / MACS_PER_NS, |task, out| {
        dispatch(Rows { a: matrix(&a), b: matrix(&b), first: task * rows, n: b.cols(), k: a.cols(), out, row_stride });
    });
}

struct Rows<'a> {
    a: Matrix<i8>,
    b: Matrix<i8>,
    first: usize,
    n: usize,
    k: usize,
    out: &'a mut [i32],
    row_stride: usize,
}

impl WithSimd for Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut panel = [[0i16; COLS]; KC];
        for first_k in (0..self.k).step_by(KC) {
            let terms = KC.min(self.k - first_k);
            for col in (0..self.n).step_by(COLS) {
                let cols = COLS.min(self.n - col);
                for (k, to) in panel.iter_mut().enumerate().take(terms) {
                    for (j, to) in to.iter_mut().enumerate().take(cols) {
                        // SAFETY: the element lies inside B, whose extent was checked.
                        *to = unsafe { self.b.at(first_k + k, col + j).read() } as i16;
                    }
                }
                for (row, out) in self.out.chunks_mut(self.row_stride).enumerate() {
                    let mut sums = [0i32; COLS];
                    for (k, values) in panel.iter().enumerate().take(terms) {
                        // SAFETY: as above, for A.
                        let x = unsafe { self.a.at(self.first + row, first_k + k).read() } as i32;
                        for (sum, &y) in sums.iter_mut().zip(values) {
                            *sum = sum.wrapping_add(x * y as i32);
                        }
                    }
                    for (out, sum) in out[col..col + cols].iter_mut().zip(sums) {
                        *out = if first_k == 0 { sum } else { out.wrapping_add(sum) };
                    }
                }
            }
        }
    }
}

/// Both factors are packed as chunks of 64 terms, then multiplied block by block.
#[cfg(target_arch = "x86_64")]
fn on_tiles(a: MatView<i8>, b: MatView<i8>, out: &mut [i32], row_stride: usize) -> Result<(), OutOfMemory> {
    const TERMS: usize = CHUNK / SIDE;
    let (m, n, k) = (a.rows(), b.cols(), a.cols());
    let (rows, cols, steps) = (m.div_ceil(SIDE), n.div_ceil(SIDE), k.div_ceil(TERMS));
    let panel = steps * CHUNK;
    let mut packed = Buffer::new((rows + cols) * panel)?;
    let packed = packed.as_slice_mut::<u8>();
    for_each_chunk(packed, panel, (m + n) * k, |i, panel| {
        let (lanes, of_a) =
            if i < rows { (i * SIDE..m.min((i + 1) * SIDE), true) } else { ((i - rows) * SIDE..n.min((i - rows + 1) * SIDE), false) };
        let from = if of_a { matrix(&a) } else { matrix(&b).t() };
        panel.fill(0);
        for (lane, at) in lanes.enumerate() {
            for term in 0..k {
                let (entry, byte) = (term % TERMS / 4, term % 4);
                let word = if of_a { lane * amx::ENTRIES + entry } else { entry * SIDE + lane };
                // SAFETY: the element lies inside its factor, whose extent was checked.
                panel[term / TERMS * CHUNK + 4 * word + byte] = unsafe { from.at(at, term).read() } as u8;
            }
        }
    });
    let (a, b) = packed.split_at(rows * panel);
    let c = SharedMut::new(out);
    for_each(rows * cols, m * n * k / (MACS_PER_NS * 64), |i| {
        let (row, col) = (i % rows, i / rows);
        let session = Session::begin();
        let mut sums = Sums::default();
        let (a, b) = (a[row * panel..].as_ptr(), b[col * panel..].as_ptr());
        // SAFETY: both panels hold `steps` chunks.
        unsafe { amx::i8_products(&session, a, b, steps, sums.block()) };
        for (r, sums) in sums.0.as_chunks::<SIDE>().0.iter().enumerate().take(m - (row * SIDE).min(m)) {
            let width = SIDE.min(n - col * SIDE);
            // SAFETY: the row and its columns lie in C, whose extent was checked; no two tasks share a block.
            unsafe { std::ptr::copy_nonoverlapping(sums.as_ptr(), c.get().add((row * SIDE + r) * row_stride + col * SIDE), width) };
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Product = fn(MatView<i8>, MatView<i8>, &mut [i32], usize);

    fn check(product: Product) {
        for (m, n, k) in [(1, 1, 1), (5, 70, 3), (33, 64, 65), (64, 40, 600), (100, 130, 257)] {
            for (a_strides, b_strides) in [((k, 1), (n, 1)), ((1, m), (1, k)), ((2 * k, 2), (2 * n, 2))] {
                let bytes = |len: usize, step: usize| -> Vec<i8> { (0..len).map(|i| (i * step % 256) as u8 as i8).collect() };
                let (a, b) = (bytes(2 * m * k, 89), bytes(2 * k * n, 57));
                let gap = 3;
                let mut c = vec![7; m * (n + gap)];
                let view = |data, rows, cols, (row, col)| MatView::new(data, rows, cols, row, col).unwrap();
                product(view(&a, m, k, a_strides), view(&b, k, n, b_strides), &mut c, n + gap);
                for (at, &c) in c.iter().enumerate() {
                    let (i, j) = (at / (n + gap), at % (n + gap));
                    let term = |p: usize| a[i * a_strides.0 + p * a_strides.1] as i32 * b[p * b_strides.0 + j * b_strides.1] as i32;
                    let want = if j < n { (0..k).map(term).sum() } else { 7 };
                    assert_eq!(c, want, "{m}x{n}x{k}: C[{i}][{j}]");
                }
            }
        }
    }

    #[test]
    fn products_are_exact() {
        check(|a, b, out, row_stride| gemm_i8(a, b, out, row_stride).unwrap());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn products_on_tiles_are_exact() {
        check(|a, b, out, row_stride| on_tiles(a, b, out, row_stride).unwrap());
    }

    #[test]
    fn empty_products() {
        let (a, b) = (MatView::new(&[][..], 2, 0, 0, 1).unwrap(), MatView::new(&[][..], 0, 3, 3, 1).unwrap());
        let mut c = [5; 6];
        gemm_i8(a, b, &mut c, 3).unwrap();
        assert_eq!(c, [0; 6]);
    }
}
