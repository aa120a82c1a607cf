//! New tensors on a GPU: constants, ranges, identity matrices. The values are the processor's, bit for bit.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Arg, Launch};
use super::memory::{SliceMut, Type};
use crate::element::{Bool, Element};
use half::{bf16, f16};

const SOURCE: Source = Source { name: "fill", text: include_str!("fill.cu") };
const THREADS: u32 = 256;

/// Every element becomes `value`, rounded to its type.
pub fn fill(gpu: &'static Gpu, out: &mut SliceMut<'_>, value: f64) -> Result<(), CudaError> {
    let bits = match out.ty() {
        Type::F32 => (value as f32).to_bits() as u64,
        Type::F64 => value.to_bits(),
        Type::F16 => <f16 as Element>::from_f64(value).to_bits() as u64,
        Type::BF16 => <bf16 as Element>::from_f64(value).to_bits() as u64,
        Type::I64 => value as i64 as u64,
        Type::I32 => value as i32 as u32 as u64,
        Type::U8 => value as u8 as u64,
        Type::Bool => Bool::from_f64(value).0 as u64,
    };
    if bits == 0 {
        return gpu.zero(out);
    }
    if out.is_empty() {
        return Ok(());
    }
    let word = match out.ty().size() {
        1 => "u8",
        2 => "u16",
        4 => "u32",
        _ => "u64",
    };
    let kernel = gpu.module(&SOURCE, &[("T", word), ("FILL", "1")])?.kernel("fill")?;
    let launch = Launch::over(out.len().div_ceil(16 / out.ty().size()), THREADS);
    // SAFETY: the kernel writes the slice's elements, which have the size of the type that it was compiled for.
    unsafe { kernel.launch(launch, &[&out.ptr(), &(out.len() as i64), &bits]) }
}

/// `start + i · step` for element i.
pub fn arange(gpu: &'static Gpu, out: &mut SliceMut<'_>, start: f64, step: f64) -> Result<(), CudaError> {
    let n = out.len() as i64;
    launch(gpu, "arange", out, &[&n, &start, &step])
}

/// Evenly spaced from `start` to `end`, both included.
pub fn linspace(gpu: &'static Gpu, out: &mut SliceMut<'_>, start: f64, end: f64) -> Result<(), CudaError> {
    let n = out.len();
    let step = if n > 1 { (end - start) / (n - 1) as f64 } else { 0.0 };
    launch(gpu, "linspace", out, &[&(n as i64), &start, &end, &step])
}

/// The identity matrix of `rows` rows.
///
/// # Panics
/// If `out` does not have rows² elements.
pub fn eye(gpu: &'static Gpu, out: &mut SliceMut<'_>, rows: usize) -> Result<(), CudaError> {
    assert_eq!(out.len(), rows * rows);
    launch(gpu, "eye", out, &[&(rows as i64)])
}

/// Launches a kernel that takes the output and `numbers`, its length among them.
fn launch(gpu: &'static Gpu, name: &str, out: &mut SliceMut<'_>, numbers: &[&dyn Arg]) -> Result<(), CudaError> {
    if out.is_empty() {
        return Ok(());
    }
    let defines = [("T", out.ty().name()), ("BOOL", "1")];
    let defines = if out.ty() == Type::Bool { &defines[..] } else { &defines[..1] };
    let kernel = gpu.module(&SOURCE, defines)?.kernel(name)?;
    let ptr = out.ptr();
    let args: Vec<&dyn Arg> = std::iter::once(&ptr as &dyn Arg).chain(numbers.iter().copied()).collect();
    // SAFETY: the kernels write as many elements as the slice has; the callers pass the numbers in the order of the signatures.
    unsafe { kernel.launch(Launch::over(out.len(), THREADS), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::testing::{Values, device};

    const ALL: [Type; 8] = [Type::F32, Type::F64, Type::F16, Type::BF16, Type::I64, Type::I32, Type::U8, Type::Bool];

    /// What the processor makes of an f64.
    fn rounded(ty: Type, x: f64) -> f64 {
        match ty {
            Type::F32 => f32::from_f64(x) as f64,
            Type::F64 => x,
            Type::F16 => <f16 as Element>::from_f64(x).to_f64(),
            Type::BF16 => <bf16 as Element>::from_f64(x).to_f64(),
            Type::I64 => i64::from_f64(x) as f64,
            Type::I32 => i32::from_f64(x) as f64,
            Type::U8 => u8::from_f64(x) as f64,
            Type::Bool => Bool::from_f64(x).to_f64(),
        }
    }

    fn check(ty: Type, n: usize, make: impl Fn(&mut SliceMut<'_>), expected: impl Fn(usize) -> f64) {
        let Some(gpu) = device() else { return };
        let mut out = Values::unwritten(gpu, ty, n);
        make(&mut out.slice_mut());
        for (i, x) in out.read().into_iter().enumerate() {
            let e = rounded(ty, expected(i));
            assert!(x == e || (x.is_nan() && e.is_nan()), "{ty:?} {i}: {x} instead of {e}");
        }
    }

    #[test]
    fn constants() {
        let Some(gpu) = device() else { return };
        for ty in ALL {
            for (n, value) in [(0, 1.0), (1, 2.5), (37, -1.1), (5000, 0.0), (100, f64::NAN), (17, 1e300)] {
                check(ty, n, |out| fill(gpu, out, value).unwrap(), |_| value);
            }
        }
    }

    #[test]
    fn ranges() {
        let Some(gpu) = device() else { return };
        for ty in ALL {
            for n in [1, 2, 9, 1000] {
                check(ty, n, |out| arange(gpu, out, -3.3, 0.1).unwrap(), |i| -3.3 + i as f64 * 0.1);
                check(ty, n, |out| arange(gpu, out, -1e19, 1e18).unwrap(), |i| -1e19 + i as f64 * 1e18);
                let step = if n > 1 { 7.7 / (n - 1) as f64 } else { 0.0 };
                let spaced = |i: usize| if i < n / 2 || n == 1 { -5.5 + i as f64 * step } else { 2.2 - (n - 1 - i) as f64 * step };
                check(ty, n, |out| linspace(gpu, out, -5.5, 2.2).unwrap(), spaced);
            }
        }
    }

    #[test]
    fn identity_matrices() {
        let Some(gpu) = device() else { return };
        for ty in ALL {
            for rows in [0, 1, 5, 40] {
                check(ty, rows * rows, |out| eye(gpu, out, rows).unwrap(), |i| (i % (rows + 1) == 0) as u8 as f64);
            }
        }
    }
}
