//! Softmax and log-softmax along the middle of `[outer, n, inner]`, forward and backward; see [`cpu::softmax`](crate::cpu::softmax).
//!
//! A line that fits is held in the registers of up to 1024 threads, and memory is touched once for each element. Longer ones are read twice.

use super::compile::number;
use super::memory::{Slice, SliceMut};
use super::{CudaError, Gpu, Launch, Source};
pub use crate::cpu::softmax::Axis;

const SOURCE: Source = Source { name: "softmax", text: include_str!("softmax.cu") };

/// y = softmax(x), or log softmax(x) if `log`.
pub fn softmax(gpu: &'static Gpu, axis: Axis, log: bool, x: Slice<'_>, y: SliceMut<'_>) -> Result<(), CudaError> {
    run(gpu, axis, if log { Kind::LogForward } else { Kind::Forward }, [x, x], y)
}

/// The gradient of the input, from that of the output `g` and the output `y`:
/// y·(g − Σ g·y), and g − exp(y)·Σ g for the logarithm.
pub fn softmax_backward(gpu: &'static Gpu, axis: Axis, log: bool, g: Slice<'_>, y: Slice<'_>, dx: SliceMut<'_>) -> Result<(), CudaError> {
    run(gpu, axis, if log { Kind::LogBackward } else { Kind::Backward }, [g, y], dx)
}

/// `KIND` of the kernel file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    LogForward,
    Backward,
    LogBackward,
}

/// The macros of the kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    kernel: &'static str,
    pattern: usize,
    lanes: usize,
    block: usize,
    vec: usize,
    items: usize,
}

/// The greatest power of two up to `most` (one itself) that divides `n`.
pub(super) fn divisor(n: usize, most: usize) -> usize {
    most.min(1 << n.trailing_zeros().min(8))
}

impl Variant {
    /// `values` is how many numbers of a line a thread may hold.
    fn new(axis: Axis, size: usize, values: usize) -> Self {
        if axis.inner == 1 { Self::rows(axis.n, size, values) } else { Self::columns(axis, size, values) }
    }

    fn rows(n: usize, size: usize, values: usize) -> Self {
        let vec = divisor(n, 16 / size);
        let (packs, most) = (n / vec, values / vec);
        let (pattern, kernel) = (0, "softmax_rows");
        if packs <= 32 * most {
            // Enough lanes that each has about 32 bytes, or the whole warp.
            let lanes = packs.div_ceil((32 / (vec * size)).max(1)).next_power_of_two().min(32);
            return Self { kernel, pattern, lanes, block: 256, vec, items: packs.div_ceil(lanes) };
        }
        if packs <= 1024 * most {
            let lanes = packs.div_ceil((most / 2).max(1)).next_power_of_two().clamp(64, 1024);
            return Self { kernel, pattern, lanes, block: lanes, vec, items: packs.div_ceil(lanes) };
        }
        Self { kernel: "softmax_long_rows", pattern: 1, lanes: 1024, block: 1024, vec, items: (most / 2).max(1) }
    }

    fn columns(axis: Axis, size: usize, values: usize) -> Self {
        let vec = divisor(axis.inner, (16 / size).min(4));
        let most = (values / vec).min(16);
        let down = axis.n.div_ceil(most).next_power_of_two();
        // At least 8 threads side by side: with four columns each they read 128 bytes.
        let block = (8 * down).max(256);
        if block <= 1024 {
            return Self { kernel: "softmax_columns", pattern: 2, lanes: block / down, block, vec, items: axis.n.div_ceil(down) };
        }
        Self { kernel: "softmax_long_columns", pattern: 3, lanes: 8, block: 256, vec, items: most / 2 }
    }
}

fn run(gpu: &'static Gpu, axis: Axis, kind: Kind, inputs: [Slice<'_>; 2], out: SliceMut<'_>) -> Result<(), CudaError> {
    let ty = out.ty();
    assert!(ty.is_float() && out.len() == axis.numel(), "floats, as many as the axis says");
    assert!(inputs.iter().all(|x| x.ty() == ty && x.len() == out.len()), "operands of one type and length");
    if out.is_empty() {
        return Ok(());
    }
    // 128 bytes of registers for the operands' numbers.
    let values = 32 / ty.size().div_ceil(4) / if matches!(kind, Kind::Forward | Kind::LogForward) { 1 } else { 2 };
    let variant = Variant::new(axis, ty.size(), values);
    let bytes = (variant.vec * ty.size()) as u64;
    let aligned = inputs.iter().all(|x| x.ptr().is_aligned(bytes)) && out.ptr().is_aligned(bytes);
    let defines = [
        ("T", ty.name()),
        ("KIND", number(kind as usize)),
        ("PATTERN", number(variant.pattern)),
        ("LANES", number(variant.lanes)),
        ("BLOCK", number(variant.block)),
        ("VEC", number(variant.vec)),
        ("ITEMS", number(variant.items)),
        ("ALIGNED", number(aligned.into())),
    ];
    let kernel = gpu.module(&SOURCE, &defines)?.kernel(variant.kernel)?;
    let [a, b] = inputs.map(|x| x.ptr());
    let (outer, n, inner) = (axis.outer as i64, axis.n as i64, axis.inner as i64);
    if axis.inner == 1 {
        let launch = Launch::blocks(axis.outer.div_ceil(variant.block / variant.lanes), variant.block as u32);
        // SAFETY: operands and output have `outer · n` elements, checked above, and the kernel touches no others.
        return unsafe { kernel.launch(launch, &[&a, &b, &out.ptr(), &outer, &n]) };
    }
    let launch = Launch::blocks((axis.outer * (axis.inner / variant.vec)).div_ceil(variant.lanes), variant.block as u32);
    // SAFETY: operands and output have `outer · n · inner` elements, checked above, and the kernel touches no others.
    unsafe { kernel.launch(launch, &[&a, &b, &out.ptr(), &outer, &n, &inner]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Type;
    use crate::cuda::testing::{Values, device};

    /// Numbers that f16 and bf16 hold exactly.
    fn samples(n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|i| (((i * 7919 + i / 5) % 127) as f64 - 63.0) / 64.0 * scale).collect()
    }

    fn check(gpu: &'static Gpu, ty: Type, axis: Axis, offset: usize) {
        let n = axis.numel();
        let tolerance = match ty {
            Type::F64 => 1e-12,
            Type::F32 => 2e-6,
            Type::F16 => 4e-3,
            _ => 3e-2,
        };
        let shifted = |values: &[f64]| Values::new(gpu, ty, &[&vec![0.0; offset], values].concat());
        let (x, g) = (samples(n, 4.0), samples(n, 1.0));
        let (on_gpu, g_on_gpu) = (shifted(&x), shifted(&g));
        for log in [false, true] {
            let (mut y, mut dx) = (Values::unwritten(gpu, ty, n), Values::unwritten(gpu, ty, n));
            softmax(gpu, axis, log, Slice::new(on_gpu.buffer(), ty, offset, n).unwrap(), y.slice_mut()).unwrap();
            softmax_backward(gpu, axis, log, Slice::new(g_on_gpu.buffer(), ty, offset, n).unwrap(), y.slice(), dx.slice_mut()).unwrap();
            let (y, dx) = (y.read(), dx.read());
            for line in 0..axis.outer * axis.inner {
                let index = |i: usize| (line / axis.inner * axis.n + i) * axis.inner + line % axis.inner;
                let max = (0..axis.n).map(|i| x[index(i)]).fold(f64::MIN, f64::max);
                let sum: f64 = (0..axis.n).map(|i| (x[index(i)] - max).exp()).sum();
                let p = |i: usize| (x[index(i)] - max).exp() / sum;
                let total: f64 = (0..axis.n).map(|i| g[index(i)] * if log { 1.0 } else { p(i) }).sum();
                for i in 0..axis.n {
                    let want = if log { p(i).ln() } else { p(i) };
                    let slope = if log { g[index(i)] - p(i) * total } else { p(i) * (g[index(i)] - total) };
                    for (got, want) in [(y[index(i)], want), (dx[index(i)], slope)] {
                        let close = (got - want).abs() <= tolerance * want.abs().max(1.0);
                        assert!(close, "{got} not {want} at {i} of line {line}: {ty:?} {axis:?} log {log}");
                    }
                }
            }
        }
    }

    #[test]
    fn both_directions_match_f64() {
        let Some(gpu) = device() else { return };
        for (outer, n, inner) in [
            (3, 1, 1),
            (40, 17, 1),
            (7, 96, 1),
            (3, 1000, 1),
            (2, 5000, 1),
            (300, 4, 1),
            (2, 5, 3),
            (3, 21, 12),
            (2, 200, 7),
            (1, 7, 256),
            (0, 4, 1),
            (2, 0, 3),
        ] {
            let axis = Axis { outer, n, inner };
            for ty in [Type::F32, Type::F64, Type::F16, Type::BF16] {
                check(gpu, ty, axis, 0);
            }
        }
        check(gpu, Type::F32, Axis { outer: 2, n: 64, inner: 1 }, 1);
        check(gpu, Type::F16, Axis { outer: 2, n: 5, inner: 4 }, 1);
    }

    #[test]
    fn long_lines() {
        let Some(gpu) = device() else { return };
        for (ty, outer, n, inner) in [
            (Type::F32, 1, 40_000, 1),
            (Type::F32, 1, 33_001, 1),
            (Type::F64, 1, 33_000, 1),
            (Type::F32, 1, 1500, 4),
            (Type::BF16, 1, 40_001, 1),
        ] {
            check(gpu, ty, Axis { outer, n, inner }, 0);
        }
    }

    #[test]
    fn extreme_rows() {
        let Some(gpu) = device() else { return };
        let inf = f64::INFINITY;
        for (n, inner) in [(3, 1), (3, 2), (40_000, 1), (2000, 2)] {
            let axis = Axis { outer: 1, n, inner };
            let run = |x: [f64; 3], log| {
                let x: Vec<f64> = x.into_iter().chain(std::iter::repeat_n(-inf, n - 3)).flat_map(|x| vec![x; inner]).collect();
                let (x, mut y) = (Values::new(gpu, Type::F32, &x), Values::unwritten(gpu, Type::F32, x.len()));
                softmax(gpu, axis, log, x.slice(), y.slice_mut()).unwrap();
                let y = y.read();
                [y[0], y[inner], y[2 * inner]]
            };
            assert!(run([-inf; 3], false).iter().all(|y| y.is_nan()));
            assert_eq!(run([1e38, -1e38, 0.0], false), [1.0, 0.0, 0.0]);
            assert_eq!(run([-inf, 5.0, -inf], false), [0.0, 1.0, 0.0]);
            assert_eq!(run([-inf, 5.0, -inf], true), [-inf, 0.0, -inf]);
            assert!(run([f64::NAN, 5.0, 1.0], true).iter().all(|y| y.is_nan()));
            assert!(run([5.0, 1.0, f64::NAN], false).iter().all(|y| y.is_nan()));
        }
    }

    /// A row of the widths that matter is read as few 16-byte accesses a thread.
    #[test]
    fn variants() {
        let of = |n, inner, size, values| Variant::new(Axis { outer: 1, n, inner }, size, values);
        let rows = |lanes, block, vec, items| Variant { kernel: "softmax_rows", pattern: 0, lanes, block, vec, items };
        assert_eq!(of(1024, 1, 4, 32), rows(32, 256, 4, 8));
        assert_eq!(of(768, 1, 4, 32), rows(32, 256, 4, 6));
        assert_eq!(of(64, 1, 2, 32), rows(4, 256, 8, 2));
        assert_eq!(of(4096, 1, 4, 32), rows(256, 256, 4, 4));
        assert_eq!(of(32768, 1, 2, 32), rows(1024, 1024, 8, 4));
        assert_eq!(of(50257, 1, 2, 32).kernel, "softmax_long_rows");
        assert_eq!(of(10, 1024, 4, 32), Variant { kernel: "softmax_columns", pattern: 2, lanes: 128, block: 256, vec: 4, items: 5 });
    }
}
