//! What clipping does to gradients, on a GPU: sums of squares in f64 over a whole list of tensors, and scaling and clamping in place.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Arg, Launch, impl_arg};
use super::memory::{DeviceBuffer, Slice, SliceMut, Type};
use crate::element::{Element, Float};
use half::{bf16, f16};

const SOURCE: Source = Source { name: "gradient", text: include_str!("gradient.cu") };

/// Elements of a block: `CHUNK` of the kernel file.
const CHUNK: usize = 16384;
const THREADS: u32 = 256;

/// `Table` of the kernel file.
#[repr(C)]
struct Table([u64; 480]);
impl_arg!(Table);

/// Σ x² over all elements of all slices (floats of any types) in f64, as one f64 in new memory: nothing waits for it.
/// The order of the sum depends on types and lengths only. f64 values beyond 1e154 overflow to ∞.
pub fn sum_squares(gpu: &'static Gpu, slices: &[Slice<'_>]) -> Result<DeviceBuffer, CudaError> {
    let chunks: usize = slices.iter().map(|x| x.len().div_ceil(CHUNK)).sum();
    let partials = gpu.alloc(chunks * 8)?;
    let sum = gpu.alloc(8)?;
    let mut first = 0;
    for ty in [Type::F32, Type::F64, Type::F16, Type::BF16] {
        let mut of_type = slices.iter().filter(|x| x.ty() == ty && !x.is_empty()).peekable();
        while of_type.peek().is_some() {
            let mut table = Table([0; 480]);
            let (mut count, mut blocks) = (0, 0);
            for (words, x) in table.0.chunks_exact_mut(3).zip(&mut of_type) {
                words.copy_from_slice(&[x.len() as u64, blocks as u64, x.ptr().address()]);
                blocks += x.len().div_ceil(CHUNK);
                count += 1;
            }
            let kernel = gpu.module(&SOURCE, &[("T", ty.name())])?.kernel("squares")?;
            let to = partials.ptr().add_bytes(first * 8);
            // SAFETY: the table holds `count` slices, whose blocks add up to the grid; each block writes one of `chunks` partial sums.
            unsafe { kernel.launch(Launch::blocks(blocks, THREADS), &[&table, &count, &to])? };
            first += blocks;
        }
    }
    assert_eq!(first, chunks, "sum_squares takes floats");
    let kernel = gpu.module(&SOURCE, &[("T", "float")])?.kernel("total")?;
    // SAFETY: every partial sum was written; the result has room for one f64.
    unsafe { kernel.launch(Launch::blocks(1, THREADS), &[&partials.ptr(), &(chunks as i64), &sum.ptr()])? };
    Ok(sum)
}

/// From a sum of squares: its root, and the factor that brings it to `max_norm` (1 if it is not larger, NaN if it is not finite), each one f64.
/// Nothing waits for them.
///
/// # Panics
/// If an output is not one f64.
pub fn clip_factor(
    gpu: &'static Gpu,
    sum: &DeviceBuffer,
    max_norm: f64,
    norm: SliceMut<'_>,
    factor: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!([&norm, &factor].iter().all(|x| x.ty() == Type::F64 && x.len() == 1) && sum.len() >= 8, "one f64 each");
    let kernel = gpu.module(&SOURCE, &[("T", "float")])?.kernel("clip_factor")?;
    // SAFETY: the kernel reads the sum and writes one f64 to each output (asserted above).
    unsafe { kernel.launch(Launch::blocks(1, 1), &[&sum.ptr(), &max_norm, &norm.ptr(), &factor.ptr()]) }
}

/// A number as a kernel's `Compute<T>` takes it.
enum Computed {
    Single(f32),
    Double(f64),
}

impl Computed {
    fn arg(&self) -> &dyn Arg {
        match self {
            Computed::Single(x) => x,
            Computed::Double(x) => x,
        }
    }
}

/// `x ← x · factor`, rounded once from the compute type (the factor is rounded to that type first).
pub fn scale(gpu: &'static Gpu, x: &mut SliceMut<'_>, factor: f64) -> Result<(), CudaError> {
    let factor = if x.ty() == Type::F64 { Computed::Double(factor) } else { Computed::Single(factor as f32) };
    in_place(gpu, "scale", x, &[factor])
}

/// `x ← min(max(x, low), high)`; NaN stays NaN. The bounds are rounded to the type of x first.
pub fn clamp(gpu: &'static Gpu, x: &mut SliceMut<'_>, low: f64, high: f64) -> Result<(), CudaError> {
    let ty = x.ty();
    in_place(
        gpu,
        "clamp",
        x,
        &[low, high].map(|bound| match ty {
            Type::F64 => Computed::Double(bound),
            Type::F16 => Computed::Single(f16::from_f64(bound).widen()),
            Type::BF16 => Computed::Single(<bf16 as Element>::from_f64(bound).widen()),
            _ => Computed::Single(bound as f32),
        }),
    )
}

fn in_place(gpu: &'static Gpu, name: &str, x: &mut SliceMut<'_>, numbers: &[Computed]) -> Result<(), CudaError> {
    assert!(x.ty().is_float(), "{name} takes floats");
    if x.is_empty() {
        return Ok(());
    }
    let kernel = gpu.module(&SOURCE, &[("T", x.ty().name())])?.kernel(name)?;
    let (ptr, n) = (x.ptr(), x.len() as i64);
    let launch = Launch::over(x.len().div_ceil(16 / x.ty().size()), THREADS);
    // SAFETY: the kernel reads and writes the slice's elements; the numbers have the type that it computes in.
    unsafe {
        match numbers {
            [factor] => kernel.launch(launch, &[&ptr, &n, factor.arg()]),
            [low, high] => kernel.launch(launch, &[&ptr, &n, low.arg(), high.arg()]),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::testing::{Values, device};

    const FLOATS: [Type; 4] = [Type::F32, Type::F64, Type::F16, Type::BF16];

    fn values(n: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7919) % 4001) as f64 / 1000.0 - 2.0).collect()
    }

    fn squares(gpu: &'static Gpu, slices: &[Slice<'_>]) -> f64 {
        let mut bytes = [0; 8];
        gpu.download(&sum_squares(gpu, slices).unwrap(), 0, &mut bytes).unwrap();
        f64::from_le_bytes(bytes)
    }

    #[test]
    fn squares_of_lists() {
        let Some(gpu) = device() else { return };
        assert_eq!(squares(gpu, &[]), 0.0);
        let lists: Vec<Values> =
            FLOATS.iter().flat_map(|&ty| [0, 1, 7, 255, CHUNK - 1, 2 * CHUNK + 5].map(|n| Values::new(gpu, ty, &values(n)))).collect();
        let expected: f64 = lists.iter().flat_map(|x| x.read()).map(|x| x * x).sum();
        let slices: Vec<Slice<'_>> = lists.iter().map(|x| x.slice()).collect();
        let sum = squares(gpu, &slices);
        assert!((sum - expected).abs() <= 1e-12 * expected, "{sum} instead of {expected}");
        let large = Values::new(gpu, Type::F32, &[3e38, 3e38]);
        assert_eq!(squares(gpu, &[large.slice()]), 2.0 * (3e38f32 as f64).powi(2));
        let many = vec![large.slice(); 400];
        assert_eq!(squares(gpu, &many), 800.0 * (3e38f32 as f64).powi(2));
    }

    #[test]
    fn scaled_and_clamped_as_on_the_processor() {
        let Some(gpu) = device() else { return };
        for ty in FLOATS {
            for n in [0, 1, 9, 1003] {
                let mut numbers = values(n);
                numbers.iter_mut().step_by(5).for_each(|x| *x = f64::NAN);
                let mut x = Values::new(gpu, ty, &numbers);
                let before = x.read();
                scale(gpu, &mut x.slice_mut(), 1.0 / 3.0).unwrap();
                let scaled = x.read();
                clamp(gpu, &mut x.slice_mut(), -0.3, 0.4).unwrap();
                for ((x, scaled), before) in x.read().iter().zip(scaled).zip(before) {
                    let (s, c) = match ty {
                        Type::F64 => of_type::<f64>(before),
                        Type::F16 => of_type::<f16>(before),
                        Type::BF16 => of_type::<bf16>(before),
                        _ => of_type::<f32>(before),
                    };
                    assert!(scaled == s || (scaled.is_nan() && s.is_nan()), "{ty:?}: {scaled} instead of {s}");
                    assert!(*x == c || (x.is_nan() && c.is_nan()), "{ty:?}: {x} instead of {c}");
                }
            }
        }
    }

    fn of_type<T: Float>(x: f64) -> (f64, f64) {
        let mut x = [T::from_f64(x)];
        crate::cpu::gradient::scale(&mut x, 1.0 / 3.0);
        let scaled = x[0].to_f64();
        crate::cpu::gradient::clamp(&mut x, -0.3, 0.4);
        (scaled, x[0].to_f64())
    }
}
