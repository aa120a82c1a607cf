//! A gather of bf16, or of f32 that may be rounded to it, on machines that multiply pairs of bf16 faster than f32: the values of two neighbouring
//! source channels, as they lie in memory, are a word, and the words go the way of f32 through `direct` with micro-kernels for pairs. In a weight
//! gradient, which sums over pixels, the values of two images at the same place are a word.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::cast::Stored;
use super::super::gemm::MatmulPrecision;
use super::super::gemm::micro::MicroKernels;
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel::{self, SharedMut};
use super::super::simd::Simd;
use super::pack::InMemory;
use super::{Gather, direct, weight};
use half::bf16;

/// Values that a task converts: some 10 µs.
const CHUNK: usize = 1 << 15;

/// Fewer channels go by the way of few, or fill no tile.
const MIN_CHANNELS: usize = 8;

/// Whether pairs are faster, and exact enough.
pub(super) fn pay(g: &Gather) -> bool {
    g.precision == MatmulPrecision::Medium && MicroKernels::has_bf16_pairs() && g.cin.is_multiple_of(2) && g.cin >= 16 && g.cout >= 8
}

/// See [`super::forward`]; the number of source channels of a group is even.
pub(super) fn gather<T: direct::Target>(g: &Gather, x: &[bf16], w: &[bf16], bias: Option<&[f32]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    let words = Gather { cin: g.cin / 2, ..g.clone() };
    direct::gather(&words, x.as_chunks::<2>().0, &InMemory { g, w }, bias, y)
}

/// Whether [`weight_grad`] is faster than the gradient of widened values.
pub(super) fn pay_for_weights(g: &Gather) -> bool {
    g.precision == MatmulPrecision::Medium && MicroKernels::has_bf16_pairs() && g.n >= 2 && g.cin.min(g.cout) >= MIN_CHANNELS
}

/// See [`super::weight_grad`]; sums are f32.
pub(super) fn weight_grad(forward: &Gather, transposed: &Gather, x: &[bf16], gy: &[bf16], gw: &mut [f32]) -> Result<(), OutOfMemory> {
    let images = forward.n;
    let (x, gy) = (of_two_images(x, images)?, of_two_images(gy, images)?);
    let [forward, transposed] = [forward, transposed].map(|g| Gather { n: images.div_ceil(2), ..g.clone() });
    weight::weight_grad(MicroKernels::bf16_pairs(), &forward, &transposed, x.as_slice(), gy.as_slice(), gw)
}

/// Each image and the one after it as one of words; after the last, if it is left alone, zeros.
fn of_two_images(values: &[bf16], images: usize) -> Result<Buffer, OutOfMemory> {
    let len = values.len() / images;
    let mut buffer = Buffer::new(size_of::<f32>() * len * images.div_ceil(2))?;
    let chunks = len.div_ceil(CHUNK).max(1);
    let chunk = len.div_ceil(chunks).max(1);
    let words = SharedMut::new(buffer.as_slice_mut::<f32>());
    parallel::for_each(images.div_ceil(2) * chunks, values.len() / 8, |i| {
        let (pair, start) = (i / chunks, i % chunks * chunk);
        let part = start.min(len)..len.min(start + chunk);
        let image = |i: usize| (i < images).then(|| &values[i * len..][part.clone()]);
        let (first, second) = (image(2 * pair).unwrap_or_default(), image(2 * pair + 1));
        // SAFETY: the part of the words is inside of the buffer, and no other task's.
        let to = unsafe { std::slice::from_raw_parts_mut(words.get().add(pair * len + part.start), part.len()) };
        dispatch(Interleave { first, second, to });
    });
    Ok(buffer)
}

/// Words of two runs of values, or of one and zeros.
struct Interleave<'a> {
    first: &'a [bf16],
    second: Option<&'a [bf16]>,
    to: &'a mut [f32],
}

impl WithSimd for Interleave<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let word = |low: bf16, high: bf16| f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
        match self.second {
            Some(second) => self.to.iter_mut().zip(self.first).zip(second).for_each(|((to, &low), &high)| *to = word(low, high)),
            None => self.to.iter_mut().zip(self.first).for_each(|(to, &low)| *to = word(low, bf16::ZERO)),
        }
    }
}

/// [`gather`] of what images and weights are as bf16.
pub(super) fn gather_rounded(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    let (x, w) = (rounded(x)?, rounded(w)?);
    gather(g, x.as_slice(), w.as_slice(), bias, y)
}

fn rounded(values: &[f32]) -> Result<Buffer, OutOfMemory> {
    let mut buffer = Buffer::new(size_of_val(values) / 2)?;
    let halves = &mut buffer.as_slice_mut::<bf16>()[..values.len()];
    parallel::for_each_chunk(halves, CHUNK, values.len() / 8, |i, to| {
        // SAFETY: a chunk and the values at its place are equally long.
        unsafe { bf16::narrow(values[i * CHUNK..][..to.len()].as_ptr(), to.as_mut_ptr(), to.len()) }
    });
    Ok(buffer)
}
