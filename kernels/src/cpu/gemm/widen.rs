//! Products of f16 and bf16: both factors are widened to f32, multiplied as f32, and the result is rounded once.

use super::{Gemm, GemmElement, span};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::for_each_chunk;
use crate::cpu::simd::Simd;
use crate::element::Float;
use crate::view::MatView;
use half::{bf16, f16};

/// Elements that a task converts: some 10 µs.
const CHUNK: usize = 1 << 15;

macro_rules! widened {
    ($($t:ty),*) => { $(
        impl GemmElement for $t {
            fn gemm(gemm: &Gemm<$t>, out: &mut [$t], row_stride: usize) -> Result<(), OutOfMemory> {
                widened(gemm, out, row_stride)
            }
        }
    )* };
}
widened!(f16, bf16);

fn widened<T: GemmElement + Float<Compute = f32>>(gemm: &Gemm<T>, out: &mut [T], row_stride: usize) -> Result<(), OutOfMemory> {
    let (a, b) = (Widened::new(&gemm.a, gemm.a_offsets)?, Widened::new(&gemm.b, gemm.b_offsets)?);
    let (a, b, bias) = (a.view(), b.view(), gemm.bias.map(|bias| bias.iter().map(|x| x.widen()).collect::<Vec<_>>()));
    let (rows, n) = (gemm.batch() * gemm.a.rows(), gemm.b.cols());
    let mut sums = Buffer::new(rows * n * size_of::<f32>())?;
    let sums = sums.as_slice_mut::<f32>();
    let (Some(a), Some(b)) = (a, b) else { unreachable!("the widened data is as long as what was checked") };
    let Gemm { a_offsets, b_offsets, alpha, accumulate, .. } = *gemm;
    Gemm { a, b, a_offsets, b_offsets, alpha, bias: bias.as_deref(), accumulate: false }.run(sums, n)?;
    let rows_per_task = (CHUNK / n).max(1);
    let sums = &*sums;
    for_each_chunk(&mut out[..(rows - 1) * row_stride + n], rows_per_task * row_stride, rows * n, |i, out| {
        let sums = &sums[i * rows_per_task * n..];
        for (out, sums) in out.chunks_mut(row_stride).zip(sums.chunks(n)) {
            dispatch(Narrow { sums, out: &mut out[..n], accumulate });
        }
    });
    Ok(())
}

/// The stretch of memory that a factor lies in, as f32: the same strides and offsets are valid in it.
struct Widened<'a, T> {
    of: &'a MatView<'a, T>,
    data: Buffer,
}

impl<'a, T: Float<Compute = f32>> Widened<'a, T> {
    fn new(of: &'a MatView<'a, T>, offsets: &[usize]) -> Result<Self, OutOfMemory> {
        let len = offsets.iter().copied().max().unwrap_or(0) + span(of);
        let mut data = Buffer::new(len * size_of::<f32>())?;
        for_each_chunk(data.as_slice_mut::<f32>(), CHUNK, len / 4, |i, to| dispatch(Widen { from: &of.data()[i * CHUNK..], to }));
        Ok(Self { of, data })
    }

    fn view(&self) -> Option<MatView<'_, f32>> {
        MatView::new(self.data.as_slice(), self.of.rows(), self.of.cols(), self.of.row_stride(), self.of.col_stride())
    }
}

struct Widen<'a, T> {
    from: &'a [T],
    to: &'a mut [f32],
}

impl<T: Float<Compute = f32>> WithSimd for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (to, from) in self.to.iter_mut().zip(self.from) {
            *to = from.widen();
        }
    }
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
