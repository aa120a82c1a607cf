//! A gather of values that are bf16, or may be rounded to it, on machines that multiply pairs of bf16 faster than f32: two neighbouring source
//! channels become one word, and the words go the way of f32 through `direct` with micro-kernels for pairs.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::MatmulPrecision;
use super::super::gemm::micro::MicroKernels;
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel;
use super::super::simd::{F32s, I32s, Simd};
use super::{Gather, direct};

/// Values that a task converts: some 10 µs.
const CHUNK: usize = 1 << 15;

/// Whether pairs are faster, and exact enough.
pub(super) fn pay(g: &Gather) -> bool {
    g.precision == MatmulPrecision::Medium && MicroKernels::has_bf16_pairs() && g.cin.is_multiple_of(2) && g.cin >= 16 && g.cout >= 8
}

/// See [`super::forward`]; the number of source channels of a group is even.
pub(super) fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    let mut sources = Buffer::new(size_of_val(x) / 2)?;
    let sources = sources.as_slice_mut::<f32>();
    parallel::for_each_chunk(sources, CHUNK / 2, x.len() / 8, |i, to| {
        dispatch(Pairs { from: &x[i * CHUNK..][..2 * to.len()], to });
    });
    // A target channel's weights lie apart from the next one's by those of all source channels, or of none.
    let out_stride = if g.out_stride > g.in_stride { g.out_stride / 2 } else { g.out_stride };
    let words = Gather { cin: g.cin / 2, out_stride, ..g.clone() };
    let mut weights = Buffer::new(size_of_val(w) / 2)?;
    let weights = weights.as_slice_mut::<f32>();
    // What follows one another of both channels of a pair: a target channel's taps, or all target channels'.
    let run = if g.in_stride == g.taps() { g.taps() } else { g.in_stride };
    if run == 1 {
        parallel::for_each_chunk(weights, CHUNK / 2, w.len() / 8, |i, to| {
            dispatch(Pairs { from: &w[i * CHUNK..][..2 * to.len()], to });
        });
    } else {
        let per_chunk = (CHUNK / 2 / run).max(1);
        parallel::for_each_chunk(weights, per_chunk * run, w.len() / 8, |i, to| {
            dispatch(Runs { from: &w[2 * i * per_chunk * run..][..2 * to.len()], run, to });
        });
    }
    direct::gather(&words, MicroKernels::bf16_pairs(), sources, weights, bias, y)
}

/// Neighbouring values as words.
struct Pairs<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl WithSimd for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (from, to) in self.from.as_chunks::<2>().0.iter().zip(self.to) {
            *to = pair(from[0], from[1]);
        }
    }
}

/// Runs of values and the runs after them as words.
struct Runs<'a> {
    from: &'a [f32],
    run: usize,
    to: &'a mut [f32],
}

impl WithSimd for Runs<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for (from, to) in self.from.chunks_exact(2 * self.run).zip(self.to.chunks_exact_mut(self.run)) {
            let (first, second) = from.split_at(self.run);
            for at in (0..self.run).step_by(S::LANES) {
                let count = S::LANES.min(self.run - at);
                // SAFETY: `count` values follow in both halves and in the words.
                unsafe {
                    let low = rounded_lanes(s, s.load_partial(first.as_ptr().add(at), count));
                    let high = rounded_lanes(s, s.load_partial(second.as_ptr().add(at), count));
                    let words = low.shr_logical::<16>() | high & s.splat_i32(0xFFFF_0000u32 as i32);
                    words.from_bits().store_partial(to.as_mut_ptr().add(at), count);
                }
            }
        }
    }
}

/// [`rounded`], of each lane.
#[inline(always)]
fn rounded_lanes<S: Simd>(s: S, x: S::F32) -> S::I32 {
    let bits = x.to_bits();
    let nearest = bits + s.splat_i32(0x7FFF) + (bits.shr_logical::<16>() & s.splat_i32(1));
    (bits | s.splat_i32(1 << 22)).or_else(x.is_nan(), nearest)
}

/// The nearest bf16 of both, the first in the lower half.
#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    f32::from_bits(rounded(first) >> 16 | rounded(second) & 0xFFFF_0000)
}

/// Bits whose upper half is the nearest bf16, ties to even.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    if x.is_nan() { bits | 1 << 22 } else { nearest }
}
