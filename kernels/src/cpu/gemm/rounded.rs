//! Products of f16 and bf16: converted as they are packed or read, summed in f32, and rounded once.

use super::blocked::{Part, Place, Target, multiply};
use super::micro::MicroKernels;
use super::packing::{Packing, Pairs, Widened};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Gemm, GemmElement, Out, dot, tiny};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::cast::Stored;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each_chunk};
use crate::cpu::simd::Simd;
use crate::element::Float;
use half::{bf16, f16};

/// Sums that a task rounds: some 10 µs.
const CHUNK: usize = 1 << 15;

impl GemmElement for f16 {
    fn gemm(gemm: &Gemm<f16>, out: &mut [f16], row_stride: usize) -> Result<(), OutOfMemory> {
        if tiny::try_gemm(gemm, out, row_stride) {
            return Ok(());
        }
        #[cfg(target_arch = "x86_64")]
        if tiles::pay(2, gemm.a.rows(), gemm.b.cols(), gemm.a.cols()) {
            // Two parts hold an f16 exactly.
            return rounded::<tiles::Split<f16, 2>>(gemm, out, row_stride);
        }
        rounded::<Widened<f16>>(gemm, out, row_stride)
    }
}

impl GemmElement for bf16 {
    fn gemm(gemm: &Gemm<bf16>, out: &mut [bf16], row_stride: usize) -> Result<(), OutOfMemory> {
        if tiny::try_gemm(gemm, out, row_stride) {
            return Ok(());
        }
        #[cfg(target_arch = "x86_64")]
        if tiles::pay(1, gemm.a.rows(), gemm.b.cols(), gemm.a.cols()) {
            // Few rows, too: reading them as dot products is bound by arithmetic from about eight on.
            return by_panels::<tiles::Split<bf16, 1>>(gemm, out, row_stride);
        }
        if MicroKernels::has_bf16_pairs() {
            rounded::<Pairs>(gemm, out, row_stride)
        } else {
            rounded::<Widened<bf16>>(gemm, out, row_stride)
        }
    }
}

/// The product by way of f32 sums.
pub(super) fn rounded<P: Packing<Element: dot::Lanes + Float<Compute = f32> + Stored<Compute = f32>>>(
    gemm: &Gemm<P::Element>,
    out: &mut [P::Element],
    row_stride: usize,
) -> Result<(), OutOfMemory> {
    let (m, n) = (gemm.a.rows(), gemm.b.cols());
    let bias = widened_bias(gemm);
    let product = of_sums(gemm, bias.as_deref());
    if !dot::is_one(&product, n) {
        return by_panels::<P>(gemm, out, row_stride);
    }
    let rows = gemm.batch() * m;
    let mut sums = Buffer::new(rows * n * size_of::<f32>())?;
    let sums = sums.as_slice_mut::<f32>();
    dot::try_gemm(&product, sums, n);
    let rows_per_task = (CHUNK / n).max(1);
    let sums = &*sums;
    for_each_chunk(&mut out[..(rows - 1) * row_stride + n], rows_per_task * row_stride, rows * n / 8, |i, out| {
        let sums = &sums[i * rows_per_task * n..];
        let first = Out { c: out.as_mut_ptr(), row_stride };
        let rows = out.len().div_ceil(row_stride);
        let out = out.chunks_mut(row_stride).map(|row| &mut row[..n]);
        dispatch(Narrow { sums: sums.chunks(n), out, accumulate: gemm.accumulate });
        // SAFETY: the rows are this task's, and were written.
        unsafe { gemm.finish(first, 0..rows, 0..n) };
    });
    Ok(())
}

/// The same by packed panels, whatever the shape.
fn by_panels<P: Packing<Element: Float<Compute = f32> + Stored<Compute = f32>>>(
    gemm: &Gemm<P::Element>,
    out: &mut [P::Element],
    row_stride: usize,
) -> Result<(), OutOfMemory> {
    let bias = widened_bias(gemm);
    let whole_tiles = gemm.a.cols() <= P::KC * P::TERMS && !gemm.accumulate;
    let place: fn(Out<P::Element>) -> Option<Place> = if whole_tiles { P::rounding } else { |_| None };
    multiply::<P>(&of_sums(gemm, bias.as_deref()), &Rounded { gemm, c: SharedMut::new(out), row_stride, place })
}

fn widened_bias<T: Float<Compute = f32>>(gemm: &Gemm<T>) -> Option<Vec<f32>> {
    gemm.bias.map(|bias| bias.iter().map(|x| x.widen()).collect())
}

/// The product whose results are sums, with nothing added to them but a bias.
fn of_sums<'a, T: Copy>(gemm: &Gemm<'a, T>, bias: Option<&'a [f32]>) -> Gemm<'a, T, f32> {
    let Gemm { a, b, a_offsets, b_offsets, alpha, .. } = *gemm;
    Gemm { a, b, a_offsets, b_offsets, alpha, bias, accumulate: false, activation: None }
}

/// C of a narrower type: a part's sums are rounded as they leave the registers, or else stay in the cache until they are.
struct Rounded<'a, T> {
    gemm: &'a Gemm<'a, T>,
    c: SharedMut<T>,
    row_stride: usize,
    /// What the micro-kernels may store an item's results in, if they can.
    place: fn(Out<T>) -> Option<Place>,
}

impl<T: Float<Compute = f32> + Stored<Compute = f32>> Rounded<'_, T> {
    /// Computes a part's sums into a buffer, and rounds them from there.
    fn round(&self, part: &Part, compute: &dyn Fn(Place) -> Result<(), OutOfMemory>, item: Out<T>) -> Result<(), OutOfMemory> {
        let (rows, cols) = (part.rows.clone(), part.cols.clone());
        let mut sums = Buffer::new(rows.len() * cols.len() * size_of::<f32>())?;
        let sums = sums.as_slice_mut::<f32>();
        // The part lies at the start of the buffer, not where it would in its item.
        let first = sums.as_mut_ptr().wrapping_sub(rows.start * cols.len() + cols.start);
        compute(Place::F32(Out { c: first, row_stride: cols.len() }))?;
        let out = rows.map(|row| {
            // SAFETY: the row's part lies in C, whose extent `Gemm::run` checked, and no two tasks share a part.
            unsafe { std::slice::from_raw_parts_mut(item.at(row, cols.start), cols.len()) }
        });
        dispatch(Narrow { sums: sums.chunks(cols.len()), out, accumulate: self.gemm.accumulate });
        Ok(())
    }
}

impl<T: Float<Compute = f32> + Stored<Compute = f32>> Target for Rounded<'_, T> {
    fn takes_whole_sums(&self) -> bool {
        true
    }

    fn take(&self, part: &Part, compute: &dyn Fn(Place) -> Result<(), OutOfMemory>) -> Result<(), OutOfMemory> {
        let item = Out { c: self.c.get().wrapping_add(part.item * self.gemm.a.rows() * self.row_stride), row_stride: self.row_stride };
        match (self.place)(item) {
            Some(place) => compute(place)?,
            None => self.round(part, compute, item)?,
        }
        // SAFETY: the part lies in C, whose extent `Gemm::run` checked, and no two tasks share a part.
        unsafe { self.gemm.finish(item, part.rows.clone(), part.cols.clone()) };
        Ok(())
    }
}

struct Narrow<A, B> {
    sums: A,
    out: B,
    accumulate: bool,
}

impl<'a, T: Float<Compute = f32> + Stored<Compute = f32>, A: Iterator<Item = &'a [f32]>, B: Iterator<Item = &'a mut [T]>> WithSimd
    for Narrow<A, B>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (out, sums) in self.out.zip(self.sums) {
            if self.accumulate {
                out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = Float::narrow(out.widen() + sum));
            } else {
                // SAFETY: both have this many elements.
                unsafe { Stored::narrow(sums.as_ptr(), out.as_mut_ptr(), out.len().min(sums.len())) };
            }
        }
    }
}
