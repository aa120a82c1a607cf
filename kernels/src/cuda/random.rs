//! Counter-based random numbers on a GPU. The stream and its distributions are those of [`cpu::random`](crate::cpu::random): words, integers, uniforms, booleans,
//! permutations and single-precision normals (f32, f16, bf16) are the processor's, bit for bit; f64 normals are to rounding.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Launch, impl_arg};
use super::memory::{Slice, SliceMut, Type};
use super::sort;
use crate::cpu::random::{self as cpu, Stream, threshold};

const SOURCE: Source = Source { name: "random", text: include_str!("random.cu") };
const THREADS: u32 = 256;

/// `Stream` of `philox.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct KernelStream {
    seed: u64,
    offset: u64,
}
impl_arg!(KernelStream);

impl From<Stream> for KernelStream {
    fn from(Stream { seed, offset }: Stream) -> Self {
        Self { seed, offset }
    }
}

/// Enough blocks for every tile of a warp, and no more than are resident together: each warp strides over its share.
fn over_tiles(gpu: &Gpu, n: usize, tile: usize) -> Launch {
    let warps = n.div_ceil(tile);
    Launch::blocks(warps.div_ceil(THREADS as usize / 32).min(8 * gpu.multiprocessors() as usize), THREADS)
}

/// Groups of the stream that filling `n` floats of a type uses up.
pub fn groups(ty: Type, n: usize) -> u64 {
    if ty == Type::F64 { cpu::groups_of_longs(n) } else { cpu::groups_of_words(n) }
}

/// Uniform in [0, 1), for any float type.
pub fn uniform(gpu: &'static Gpu, stream: Stream, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    floats(gpu, "uniform", stream, out)
}

/// Standard normal, for any float type.
pub fn normal(gpu: &'static Gpu, stream: Stream, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    floats(gpu, "normal", stream, out)
}

fn floats(gpu: &'static Gpu, name: &str, stream: Stream, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert!(out.ty().is_float(), "{name} makes floats");
    if out.is_empty() {
        return Ok(());
    }
    let kernel = gpu.module(&SOURCE, &[("T", out.ty().name()), ("FLOAT", "1")])?.kernel(name)?;
    let launch = over_tiles(gpu, out.len(), 512 / out.ty().size());
    // SAFETY: the kernel writes the slice's elements.
    unsafe { kernel.launch(launch, &[&KernelStream::from(stream), &out.ptr(), &(out.len() as i64)]) }
}

/// Integers in `[low, low + range)`, as i64; sums wrap. A range of 0 gives `low`.
pub fn integers(gpu: &'static Gpu, stream: Stream, low: i64, range: u64, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert_eq!(out.ty(), Type::I64);
    if out.is_empty() {
        return Ok(());
    }
    let kernel = gpu.module(&SOURCE, &[("T", "i64"), ("INTEGERS", "1")])?.kernel("integers")?;
    // SAFETY: the kernel writes the slice's elements.
    unsafe { kernel.launch(over_tiles(gpu, out.len(), 64), &[&KernelStream::from(stream), &out.ptr(), &(out.len() as i64), &low, &range]) }
}

/// True with probability `p`.
pub fn bernoulli(gpu: &'static Gpu, stream: Stream, p: f64, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert_eq!(out.ty(), Type::Bool);
    if out.is_empty() {
        return Ok(());
    }
    let kernel = gpu.module(&SOURCE, &[("T", "u8")])?.kernel("bernoulli")?;
    let launch = over_tiles(gpu, out.len(), 128);
    // SAFETY: the kernel writes the slice's elements.
    unsafe { kernel.launch(launch, &[&KernelStream::from(stream), &out.ptr(), &(out.len() as i64), &threshold(p)]) }
}

/// Zeroes each element with probability `p` and multiplies the others by `1 / (1 − p)`: where [`bernoulli`] of the same stream is true, so
/// the backward pass needs no mask: it is the same call.
///
/// # Panics
/// If lengths or types differ.
pub fn dropout(gpu: &'static Gpu, stream: Stream, p: f64, x: Slice<'_>, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert!(x.len() == out.len() && x.ty() == out.ty() && x.ty().is_float());
    if out.is_empty() {
        return Ok(());
    }
    let kernel = gpu.module(&SOURCE, &[("T", x.ty().name()), ("FLOAT", "1")])?.kernel("dropout")?;
    let launch = over_tiles(gpu, out.len(), if x.ty().size() == 2 { 256 } else { 128 });
    let scale = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
    let (stream, n, threshold) = (KernelStream::from(stream), out.len() as i64, threshold(p));
    // SAFETY: both slices have `n` elements; the scale has the type that the kernel computes in.
    unsafe {
        match x.ty() {
            Type::F64 => kernel.launch(launch, &[&stream, &x.ptr(), &out.ptr(), &n, &threshold, &scale]),
            _ => kernel.launch(launch, &[&stream, &x.ptr(), &out.ptr(), &n, &threshold, &(scale as f32)]),
        }
    }
}

/// A random order of `0..out.len()`: the processor's, for the same stream.
///
/// # Errors
/// If there are 2³² − 1 numbers or more.
pub fn permutation(gpu: &'static Gpu, stream: Stream, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert_eq!(out.ty(), Type::I64);
    let n = out.len();
    if n >= u32::MAX as usize {
        return Err(CudaError::Unavailable(format!("a permutation of {n} numbers: a GPU makes them of fewer than 2^32 - 1")));
    }
    if n == 0 {
        return Ok(());
    }
    let count = n as i64;
    let module = gpu.module(&SOURCE, &[("T", "i64"), ("INTEGERS", "1")])?;
    let each = Launch::over(n, THREADS);
    let (targets, next, mut above) = (gpu.alloc(n * 4)?, gpu.alloc(n * 4)?, gpu.alloc(n * 4)?);
    if let Some(mut above) = SliceMut::new(&mut above, Type::I32, 0, n) {
        super::fill::fill(gpu, &mut above, -1.0)?;
    }
    // SAFETY: every array has `n` elements of the kernels' types.
    unsafe {
        module
            .kernel("shuffle_targets")?
            .launch(Launch::over(n.div_ceil(2), THREADS), &[&KernelStream::from(stream), &targets.ptr(), &count])?
    };
    let bits = usize::BITS - (n - 1).leading_zeros();
    let sorted = sort::sort_pairs(gpu, &targets, n, bits)?;
    // SAFETY: as above; the sorted places and targets are below `n`.
    unsafe {
        let args: [&dyn super::Arg; 5] = [&sorted.keys.ptr(), &sorted.places.ptr(), &count, &next.ptr(), &above.ptr()];
        module.kernel("shuffle_links")?.launch(each, &args)?;
        module.kernel("shuffle_walk")?.launch(each, &[&targets.ptr(), &next.ptr(), &above.ptr(), &out.ptr(), &count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::random::RandomFloat;
    use crate::cuda::testing::{Values, device};
    use crate::element::Bool;
    use half::{bf16, f16};

    const STREAM: Stream = Stream { seed: 0x1234_5678_9ABC_DEF0, offset: 0xFFFF_FFFF_FFF0_0003 };
    /// Partial tiles, partial groups, and more tiles than there are warps.
    const SIZES: [usize; 8] = [0, 1, 15, 64, 127, 1000, 4099, 50_003];
    const FLOATS: [Type; 4] = [Type::F32, Type::F64, Type::F16, Type::BF16];

    fn on_host<T: RandomFloat>(n: usize, fill: impl Fn(Stream, &mut [T])) -> Vec<f64> {
        let mut out = vec![T::from_f64(9.0); n];
        fill(STREAM, &mut out);
        out.iter().map(|x| x.to_f64()).collect()
    }

    #[test]
    fn uniforms_are_the_processors() {
        let Some(gpu) = device() else { return };
        for (ty, n) in FLOATS.into_iter().flat_map(|ty| SIZES.map(|n| (ty, n))) {
            let mut out = Values::unwritten(gpu, ty, n);
            uniform(gpu, STREAM, &mut out.slice_mut()).unwrap();
            let expected = match ty {
                Type::F64 => on_host(n, f64::uniform),
                Type::F16 => on_host(n, f16::uniform),
                Type::BF16 => on_host(n, bf16::uniform),
                _ => on_host(n, f32::uniform),
            };
            assert!(out.read() == expected, "{ty:?} {n}");
        }
    }

    #[test]
    fn normals_are_the_processors() {
        let Some(gpu) = device() else { return };
        for (ty, n) in FLOATS.into_iter().flat_map(|ty| SIZES.map(|n| (ty, n))) {
            let mut out = Values::unwritten(gpu, ty, n);
            normal(gpu, STREAM, &mut out.slice_mut()).unwrap();
            let out = out.read();
            match ty {
                Type::F64 => assert!(out.iter().zip(on_host(n, f64::normal)).all(|(a, b)| (a - b).abs() < 1e-13), "{n}"),
                Type::F16 => assert!(out == on_host(n, f16::normal), "{n}"),
                Type::BF16 => assert!(out == on_host(n, bf16::normal), "{n}"),
                _ => assert!(out == on_host(n, f32::normal), "{n}"),
            }
        }
    }

    #[test]
    fn integers_are_the_processors() {
        let Some(gpu) = device() else { return };
        for n in SIZES {
            for (low, range) in [(-3, 7), (i64::MIN, u64::MAX), (5, 1), (5, 0)] {
                let mut out = Values::unwritten(gpu, Type::I64, n);
                integers(gpu, STREAM, low, range, &mut out.slice_mut()).unwrap();
                let mut expected = vec![0; n];
                cpu::integers(STREAM, low, range, &mut expected);
                assert!(out.read().into_iter().eq(expected.into_iter().map(|x| x as f64)), "{n}");
            }
        }
    }

    #[test]
    fn booleans_and_dropout_are_the_processors() {
        let Some(gpu) = device() else { return };
        for n in SIZES {
            for p in [0.0, 0.3, 1.0] {
                let mut out = Values::unwritten(gpu, Type::Bool, n);
                bernoulli(gpu, STREAM, p, &mut out.slice_mut()).unwrap();
                let mut expected = vec![Bool(9); n];
                cpu::bernoulli(STREAM, p, &mut expected);
                assert!(out.read().into_iter().eq(expected.iter().map(|b| b.0 as f64)), "{n} {p}");
                for ty in FLOATS {
                    let x = Values::new(gpu, ty, &(0..n).map(|i| (i % 1000) as f64 / 3.0 + 1.0).collect::<Vec<_>>());
                    let mut out = Values::unwritten(gpu, ty, n);
                    dropout(gpu, STREAM, p, x.slice(), &mut out.slice_mut()).unwrap();
                    let expected = match ty {
                        Type::F64 => dropped::<f64>(&x.read(), p),
                        Type::F16 => dropped::<f16>(&x.read(), p),
                        Type::BF16 => dropped::<bf16>(&x.read(), p),
                        _ => dropped::<f32>(&x.read(), p),
                    };
                    assert!(out.read() == expected, "{ty:?} {n} {p}");
                }
            }
        }
    }

    fn dropped<T: RandomFloat>(x: &[f64], p: f64) -> Vec<f64> {
        let x: Vec<T> = x.iter().map(|&x| T::from_f64(x)).collect();
        let mut out = x.clone();
        cpu::dropout(STREAM, p, &x, &mut out);
        out.iter().map(|x| x.to_f64()).collect()
    }

    #[test]
    fn permutations_are_the_processors() {
        let Some(gpu) = device() else { return };
        for n in [0, 1, 2, 3, 31, 257, 5000] {
            for offset in 0..4 {
                let stream = Stream { offset, ..STREAM };
                let mut out = Values::unwritten(gpu, Type::I64, n);
                permutation(gpu, stream, &mut out.slice_mut()).unwrap();
                let mut expected = vec![0; n];
                cpu::permutation(stream, &mut expected);
                assert!(out.read().into_iter().eq(expected.into_iter().map(|x| x as f64)), "{n}");
            }
        }
    }
}
