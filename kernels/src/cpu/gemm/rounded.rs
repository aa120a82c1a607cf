//! Products of f16 and bf16: converted as they are packed or read, summed in f32, and rounded once.

use super::blocked::multiply;
use super::micro::MicroKernels;
use super::packing::{Packing, Pairs, Widened};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Gemm, GemmElement, dot};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::Simd;
use crate::element::Float;
use half::{bf16, f16};

/// Sums that a task rounds: some 10 µs.
const CHUNK: usize = 1 << 15;

impl GemmElement for f16 {
    fn gemm(gemm: &Gemm<f16>, out: &mut [f16], row_stride: usize) -> Result<(), OutOfMemory> {
        #[cfg(target_arch = "x86_64")]
        if tiles::pay(gemm.a.rows(), gemm.b.cols(), gemm.a.cols()) {
            // Two parts hold an f16 exactly.
            return rounded::<tiles::Split<f16, 2>>(gemm, out, row_stride);
        }
        rounded::<Widened<f16>>(gemm, out, row_stride)
    }
}

impl GemmElement for bf16 {
    fn gemm(gemm: &Gemm<bf16>, out: &mut [bf16], row_stride: usize) -> Result<(), OutOfMemory> {
        #[cfg(target_arch = "x86_64")]
        if tiles::pay(gemm.a.rows(), gemm.b.cols(), gemm.a.cols()) {
            return rounded::<tiles::Split<bf16, 1>>(gemm, out, row_stride);
        }
        if MicroKernels::has_bf16_pairs() {
            rounded::<Pairs>(gemm, out, row_stride)
        } else {
            rounded::<Widened<bf16>>(gemm, out, row_stride)
        }
    }
}

/// The product by way of f32 sums.
pub(super) fn rounded<P: Packing<Element: dot::Lanes + Float<Compute = f32>>>(
    gemm: &Gemm<P::Element>,
    out: &mut [P::Element],
    row_stride: usize,
) -> Result<(), OutOfMemory> {
    let bias = gemm.bias.map(|bias| bias.iter().map(|x| x.widen()).collect::<Vec<_>>());
    let (rows, n) = (gemm.batch() * gemm.a.rows(), gemm.b.cols());
    let mut sums = Buffer::new(rows * n * size_of::<f32>())?;
    let sums = sums.as_slice_mut::<f32>();
    let Gemm { a, b, a_offsets, b_offsets, alpha, accumulate, .. } = *gemm;
    let product = Gemm { a, b, a_offsets, b_offsets, alpha, bias: bias.as_deref(), accumulate: false };
    if !dot::try_gemm(&product, sums, n) {
        multiply::<P>(&product, sums, n)?;
    }
    let rows_per_task = (CHUNK / n).max(1);
    let sums = &*sums;
    for_each_chunk(&mut out[..(rows - 1) * row_stride + n], rows_per_task * row_stride, rows * n / 8, |i, out| {
        let sums = &sums[i * rows_per_task * n..];
        for (out, sums) in out.chunks_mut(row_stride).zip(sums.chunks(n)) {
            dispatch(Narrow { sums, out: &mut out[..n], accumulate });
        }
    });
    Ok(())
}

struct Narrow<'a, T> {
    sums: &'a [f32],
    out: &'a mut [T],
    accumulate: bool,
}

impl<T: Float<Compute = f32>> WithSimd for Narrow<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, &sum) in self.out.iter_mut().zip(self.sums) {
            *out = T::narrow(if self.accumulate { out.widen() + sum } else { sum });
        }
    }
}
