//! Products of f64 and integers: plain Rust over register-sized tiles, left to the compiler to vectorise at the level of the machine.

use super::{Gemm, GemmElement, Item, Out};
use crate::cpu::alloc::OutOfMemory;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use std::ops::Range;

/// Rows and columns of a tile: 8 vectors of f64 at AVX-512, all 16 registers at AVX2.
const MR: usize = 4;
const NR: usize = 16;

/// Terms that a tile sums before it goes to C; a panel of B (KC × NR f64) fills 16 KiB of L1.
const KC: usize = 128;

/// Rows and columns of a task.
const ROWS: usize = 64;
const COLS: usize = 8 * NR;

/// What a product needs of an element.
trait Arithmetic: GemmElement {
    /// `self + a · b`; integers wrap around.
    fn add_product(self, a: Self, b: Self) -> Self;
}

impl Arithmetic for f64 {
    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        self + a * b
    }
}

macro_rules! integer {
    ($($t:ty),*) => { $(
        impl Arithmetic for $t {
            #[inline(always)]
            fn add_product(self, a: Self, b: Self) -> Self {
                self.wrapping_add(a.wrapping_mul(b))
            }
        }
    )* };
}
integer!(i32, i64, u8);

macro_rules! generic {
    ($($t:ty),*) => { $(
        impl GemmElement for $t {
            fn gemm(gemm: &Gemm<$t>, out: &mut [$t], row_stride: usize) -> Result<(), OutOfMemory> {
                blocks(gemm, SharedMut::new(out), row_stride);
                Ok(())
            }
        }
    )* };
}
generic!(f64, i32, i64, u8);

fn blocks<T: Arithmetic>(gemm: &Gemm<T>, c: SharedMut<T>, row_stride: usize) {
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let (row_blocks, col_blocks) = (m.div_ceil(ROWS), n.div_ceil(COLS));
    let blocks = row_blocks * col_blocks;
    for_each(gemm.batch() * blocks, gemm.batch() * m * n * k / 4, |task| {
        let (item, block) = (task / blocks, task % blocks);
        let (row, col) = (block % row_blocks * ROWS, block / row_blocks * COLS);
        let out = Out { c: c.get().wrapping_add(item * m * row_stride), row_stride };
        dispatch(Block { gemm, item: gemm.item(item), rows: row..m.min(row + ROWS), cols: col..n.min(col + COLS), out });
    });
}

/// One task: a block of C over all of K.
struct Block<'a, T> {
    gemm: &'a Gemm<'a, T>,
    item: Item<T>,
    rows: Range<usize>,
    cols: Range<usize>,
    out: Out<T>,
}

impl<T: Arithmetic> WithSimd for Block<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut panel = [[T::default(); NR]; KC];
        let mut strip = [[T::default(); MR]; KC];
        for k in (0..self.item.k).step_by(KC) {
            let kc = KC.min(self.item.k - k);
            for col in self.cols.clone().step_by(NR) {
                let cols = NR.min(self.cols.end - col);
                self.read(&mut panel[..kc], cols, |k_in, j| self.item.b.at(k + k_in, col + j));
                for row in self.rows.clone().step_by(MR) {
                    let rows = MR.min(self.rows.end - row);
                    self.read(&mut strip[..kc], rows, |k_in, i| self.item.a.at(row + i, k + k_in));
                    let sums = tile(&strip[..kc], &panel[..kc]);
                    self.store(&sums, row..row + rows, col..col + cols, k == 0);
                }
            }
        }
        // SAFETY: the block lies inside C, whose extent `Gemm::run` checked, and is this task's.
        unsafe { self.gemm.finish(self.out, self.rows.clone(), self.cols.clone()) };
    }
}

impl<T: Arithmetic> Block<'_, T> {
    /// Gathers the first `count` lanes of a panel; what the others hold is never stored.
    #[inline(always)]
    fn read<const W: usize>(&self, panel: &mut [[T; W]], count: usize, at: impl Fn(usize, usize) -> *const T) {
        for (k, values) in panel.iter_mut().enumerate() {
            for (i, value) in values.iter_mut().enumerate().take(count) {
                // SAFETY: the element lies inside its factor, whose extent `Gemm::run` checked.
                *value = unsafe { at(k, i).read() };
            }
        }
    }

    #[inline(always)]
    fn store(&self, sums: &[[T; NR]; MR], rows: Range<usize>, cols: Range<usize>, first_k: bool) {
        let alpha = T::from_f64(self.gemm.alpha);
        for (row, sums) in rows.zip(sums) {
            for (col, &sum) in cols.clone().zip(sums) {
                let at = self.out.at(row, col);
                // SAFETY: the element lies inside C, whose extent `Gemm::run` checked, and in this task's block.
                unsafe {
                    let init = match self.gemm.bias {
                        _ if !first_k || self.gemm.accumulate => at.read(),
                        Some(bias) => bias[col],
                        None => T::default(),
                    };
                    at.write(init.add_product(alpha, sum));
                }
            }
        }
    }
}

#[inline(always)]
fn tile<T: Arithmetic>(a: &[[T; MR]], b: &[[T; NR]]) -> [[T; NR]; MR] {
    let mut acc = [[T::default(); NR]; MR];
    for (a, b) in a.iter().zip(b) {
        for (sums, &x) in acc.iter_mut().zip(a) {
            for (sum, &y) in sums.iter_mut().zip(b) {
                *sum = sum.add_product(x, y);
            }
        }
    }
    acc
}
