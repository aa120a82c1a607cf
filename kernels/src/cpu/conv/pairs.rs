//! A gather of values that are bf16, or may be rounded to it, on machines that multiply pairs of bf16 faster than f32: two neighbouring source
//! channels become one word, and the words go the way of f32 through `direct` with micro-kernels for pairs.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::MatmulPrecision;
use super::super::gemm::micro::MicroKernels;
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel::{self, SharedMut};
use super::super::simd::Simd;
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
    let mut weights = Buffer::new(size_of_val(w) / 2)?;
    let weights = weights.as_slice_mut::<f32>();
    // A target channel's weights lie apart from the next one's by those of all source channels, or of none.
    let out_stride = if g.out_stride > g.in_stride { g.out_stride / 2 } else { g.out_stride };
    let words = Gather { cin: g.cin / 2, out_stride, ..g.clone() };
    let to = SharedMut::new(weights);
    parallel::for_each(g.groups * g.cout, w.len(), |i| {
        let (group, j) = (i / g.cout, i % g.cout);
        for c in 0..words.cin {
            let first = g.group_start(group) + 2 * c * g.in_stride + j * g.out_stride;
            let at = words.group_start(group) + c * words.in_stride + j * words.out_stride;
            for tap in 0..g.taps() {
                // SAFETY: the words are as many as the pairs of weights, and each is written once.
                unsafe { to.add(at + tap).get().write(pair(w[first + tap], w[first + g.in_stride + tap])) };
            }
        }
    });
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
