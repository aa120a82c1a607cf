//! Products of matrices of a few elements, in batches: plain sums where the factors lie, for packing them would take longer, and a tile of vectors
//! would be mostly empty.

use super::{Gemm, GemmElement, Item, Out};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use crate::element::Float;
use std::ops::Range;

/// Multiply-adds of an item, and terms of a sum, at most: beyond, vectors are faster.
const MOST_MACS: usize = 128;
const MOST_TERMS: usize = 8;

/// Multiply-adds of a task: some 10 µs.
const TASK_MACS: usize = 1 << 14;

/// Computes the product if it is small.
pub(super) fn try_gemm<T: GemmElement + Float<Compute = f32>>(gemm: &Gemm<T>, out: &mut [T], row_stride: usize) -> bool {
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let macs = m.saturating_mul(n).saturating_mul(k);
    if macs > MOST_MACS || k > MOST_TERMS {
        return false;
    }
    let (c, per_task) = (SharedMut::new(out), TASK_MACS / macs);
    for_each(gemm.batch().div_ceil(per_task), gemm.batch() * macs, |task| {
        let items = task * per_task..gemm.batch().min((task + 1) * per_task);
        dispatch(Items { gemm, items, c, row_stride });
    });
    true
}

/// Some items of a batch.
struct Items<'a, T> {
    gemm: &'a Gemm<'a, T>,
    items: Range<usize>,
    c: SharedMut<T>,
    row_stride: usize,
}

impl<T: GemmElement + Float<Compute = f32>> WithSimd for Items<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for i in self.items.clone() {
            let item = self.gemm.item(i);
            let out = Out { c: self.c.get().wrapping_add(i * item.m * self.row_stride), row_stride: self.row_stride };
            for row in 0..item.m {
                for col in 0..item.n {
                    // SAFETY: the elements lie inside their factors and C, whose extents `Gemm::run` checked, and the item is this task's.
                    unsafe { out.at(row, col).write(self.value(&item, row, col, out.at(row, col))) };
                }
            }
            // SAFETY: as above; all of the item was written.
            unsafe { self.gemm.finish(out, 0..item.m, 0..item.n) };
        }
    }
}

impl<T: GemmElement + Float<Compute = f32>> Items<'_, T> {
    /// An element of C, before the activation; `at` is where it lies.
    ///
    /// # Safety
    /// The row, the column and `at` must be readable.
    #[inline(always)]
    unsafe fn value(&self, item: &Item<T>, row: usize, col: usize, at: *const T) -> T {
        let mut sum = 0f32;
        for k in 0..item.k {
            // SAFETY: the caller's contract.
            let (x, y) = unsafe { (item.a.at(row, k).read().widen(), item.b.at(k, col).read().widen()) };
            sum = x.mul_add(y, sum);
        }
        let value = self.gemm.alpha as f32 * sum;
        match self.gemm.bias {
            Some(bias) => Float::narrow(value + bias[col].widen()),
            // SAFETY: the caller's contract.
            None if self.gemm.accumulate => Float::narrow(unsafe { at.read() }.widen() + value),
            None => Float::narrow(value),
        }
    }
}
