//! A gather of bf16, or of f32 that may be rounded to it, on machines that multiply pairs of bf16 faster than f32: the values of two neighbouring
//! source channels, as they lie in memory, are a word, and the words go the way of f32 through `direct` with micro-kernels for pairs.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::cast::Stored;
use super::super::gemm::MatmulPrecision;
use super::super::gemm::micro::MicroKernels;
use super::super::parallel;
use super::pack::Pairs;
use super::{Gather, direct};
use half::bf16;

/// Values that a task converts: some 10 µs.
const CHUNK: usize = 1 << 15;

/// Whether pairs are faster, and exact enough.
pub(super) fn pay(g: &Gather) -> bool {
    g.precision == MatmulPrecision::Medium && MicroKernels::has_bf16_pairs() && g.cin.is_multiple_of(2) && g.cin >= 16 && g.cout >= 8
}

/// See [`super::forward`]; the number of source channels of a group is even.
pub(super) fn gather<T: direct::Target>(
    g: &Gather,
    x: &[bf16],
    w: &[bf16],
    bias: Option<&[f32]>,
    y: &mut [T],
) -> Result<(), OutOfMemory> {
    let words = Gather { cin: g.cin / 2, ..g.clone() };
    direct::gather(&words, x.as_chunks::<2>().0, &Pairs { g, w }, bias, y)
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
