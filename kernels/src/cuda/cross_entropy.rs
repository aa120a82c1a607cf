//! Losses of integer classes: the weights of targets, the elements that they pick, and the cross-entropy of rows of logits in one pass.
//!
//! Targets are not known to the host. [`weigh`] finds the first that is no class; until somebody reads that, such targets give NaN.

use super::compile::number;
use super::launch::impl_arg;
use super::memory::{DevicePtr, Slice, SliceMut, Type};
use super::reduce::statistics_type;
use super::softmax::divisor;
use super::{CudaError, Gpu, Kernel, Launch, Source};

const SOURCE: Source = Source { name: "cross_entropy", text: include_str!("cross_entropy.cu") };

const THREADS: usize = 256;

/// Targets that a block weighs.
const CHUNK: usize = 16 * THREADS;

/// Rows of more groups of elements are a block's work, not a warp's.
const WARP_PACKS: usize = 32 * 16;

/// Targets `[n, s]` (i64) that name classes of `[n, c, s]`.
#[derive(Clone, Copy, Debug)]
pub struct Classes<'a> {
    /// The classes.
    pub targets: Slice<'a>,
    /// Targets of this class count nothing.
    pub ignored: i64,
    /// Samples.
    pub n: usize,
    /// Classes.
    pub c: usize,
    /// Pixels.
    pub s: usize,
}

/// `Classes` of the kernel file.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arg {
    targets: DevicePtr,
    ignored: i64,
    n: i64,
    c: i64,
    s: i64,
}

impl_arg!(Arg);

impl Classes<'_> {
    fn count(&self) -> usize {
        self.n * self.s
    }

    fn arg(&self) -> Arg {
        assert!(self.targets.ty() == Type::I64 && self.targets.len() == self.count(), "a target for each element");
        Arg { targets: self.targets.ptr(), ignored: self.ignored, n: self.n as i64, c: self.c as i64, s: self.s as i64 }
    }
}

/// The macros of the kernel file.
#[derive(Clone, Copy)]
struct Macros {
    lanes: usize,
    vec: usize,
    items: usize,
    aligned: bool,
}

const PLAIN: Macros = Macros { lanes: 32, vec: 1, items: 1, aligned: true };

fn kernel(gpu: &'static Gpu, ty: Type, macros: Macros, name: &str) -> Result<Kernel, CudaError> {
    assert!(ty.is_float(), "floats only");
    let defines = [
        ("T", ty.name()),
        ("LANES", number(macros.lanes)),
        ("VEC", number(macros.vec)),
        ("ITEMS", number(macros.items)),
        ("ALIGNED", number(macros.aligned.into())),
    ];
    gpu.module(&SOURCE, &defines)?.kernel(name)
}

/// Each target's factor: its class's weight, 1 without weights, 0 where it is ignored; their sum (one f64); and the place of the first target
/// that is no class, −1 if there is none (one i64).
pub fn weigh(
    gpu: &'static Gpu,
    classes: &Classes<'_>,
    weight: Option<Slice<'_>>,
    weights: SliceMut<'_>,
    total: SliceMut<'_>,
    bad: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (ty, count) = (weights.ty(), classes.count());
    assert!(weights.len() == count && total.ty() == Type::F64 && total.len() == 1 && bad.ty() == Type::I64 && bad.len() == 1);
    let weight = weight.map_or(DevicePtr::NULL, |weight| {
        assert!(weight.ty() == ty && weight.len() == classes.c, "a weight for each class");
        weight.ptr()
    });
    let blocks = count.div_ceil(CHUNK);
    let found = gpu.alloc(blocks * 16)?;
    let args: [&dyn super::Arg; 5] = [&classes.arg(), &weight, &weights.ptr(), &found.ptr(), &(CHUNK as i64)];
    // SAFETY: there are `count` targets and weights, a weight for each class if there are any, and room for what each block finds.
    unsafe { kernel(gpu, ty, PLAIN, "weigh")?.launch(Launch::blocks(blocks, THREADS as u32), &args)? };
    let args: [&dyn super::Arg; 5] = [&found.ptr(), &(blocks as i64), &(count as i64), &total.ptr(), &bad.ptr()];
    // SAFETY: each block wrote what it found; `total` and `bad` have one element.
    unsafe { kernel(gpu, ty, PLAIN, "weighed")?.launch(Launch::blocks(1, THREADS as u32), &args) }
}

/// out\[n, s\] = x\[n, target, s\]; 0 where it is ignored.
pub fn pick(gpu: &'static Gpu, classes: &Classes<'_>, x: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    let count = classes.count();
    assert!(x.len() == count * classes.c && out.len() == count && out.ty() == x.ty());
    // SAFETY: there are `count` targets and outputs, and elements for each class.
    unsafe { kernel(gpu, x.ty(), PLAIN, "pick")?.launch(Launch::over(count, THREADS as u32), &[&classes.arg(), &x.ptr(), &out.ptr()]) }
}

/// out\[n, c, s\] = x\[n, s\] if c is the target there and not ignored, else 0.
pub fn place(gpu: &'static Gpu, classes: &Classes<'_>, x: Slice<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    let count = classes.count();
    assert!(out.len() == count * classes.c && x.len() == count && out.ty() == x.ty());
    if out.is_empty() {
        return Ok(());
    }
    let ty = x.ty();
    let vec = divisor(classes.c * classes.s, 16 / ty.size());
    let aligned = out.ptr().is_aligned((vec * ty.size()) as u64);
    let launch = Launch::over(out.len() / vec, THREADS as u32);
    // SAFETY: there are `count` targets and elements, and outputs for each class.
    unsafe { kernel(gpu, ty, Macros { vec, aligned, ..PLAIN }, "place")?.launch(launch, &[&classes.arg(), &x.ptr(), &out.ptr()]) }
}

/// log Σ exp(x) − x\[target\] of each row of logits, 0 where it is ignored: `classes.s` is 1. `kept` gets two numbers for each row, of
/// [`statistics_type`], for the backward pass.
pub fn cross_entropy(
    gpu: &'static Gpu,
    classes: &Classes<'_>,
    x: Slice<'_>,
    loss: SliceMut<'_>,
    kept: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (ty, rows, c) = (x.ty(), classes.n, classes.c);
    assert!(classes.s == 1 && x.len() == rows * c && loss.len() == rows && loss.ty() == ty);
    assert!(kept.len() == 2 * rows && kept.ty() == statistics_type(ty), "two numbers for each row");
    let vec = divisor(c, 16 / ty.size());
    let packs = c / vec;
    let lanes = match packs {
        0..=WARP_PACKS => 32,
        _ if packs <= 4 * WARP_PACKS => THREADS,
        _ => 1024,
    };
    let values = 16 / ty.size().div_ceil(4);
    let macros = Macros { lanes, vec, items: values / vec, aligned: x.ptr().is_aligned((vec * ty.size()) as u64) };
    let block = lanes.max(THREADS);
    let launch = Launch::blocks(rows.div_ceil(block / lanes), block as u32);
    // SAFETY: there are `rows` targets and losses, `c` logits for each, and two numbers.
    unsafe { kernel(gpu, ty, macros, "cross_entropy_rows")?.launch(launch, &[&classes.arg(), &x.ptr(), &loss.ptr(), &kept.ptr()]) }
}

/// The gradient of the logits from that of each row's loss: (softmax(x) − 1 at the target)·g, 0 where it is ignored.
pub fn cross_entropy_backward(
    gpu: &'static Gpu,
    classes: &Classes<'_>,
    x: Slice<'_>,
    kept: Slice<'_>,
    g: Slice<'_>,
    dx: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (ty, rows, c) = (x.ty(), classes.n, classes.c);
    assert!(classes.s == 1 && x.len() == rows * c && dx.len() == x.len() && g.len() == rows && g.ty() == ty && dx.ty() == ty);
    assert!(kept.len() == 2 * rows && kept.ty() == statistics_type(ty), "two numbers for each row");
    if x.is_empty() {
        return Ok(());
    }
    let vec = divisor(c, 16 / ty.size());
    let bytes = (vec * ty.size()) as u64;
    let macros = Macros { vec, aligned: x.ptr().is_aligned(bytes) && dx.ptr().is_aligned(bytes), ..PLAIN };
    let launch = Launch::over((rows * (c / vec)).div_ceil(4), THREADS as u32);
    let args: [&dyn super::Arg; 5] = [&classes.arg(), &x.ptr(), &kept.ptr(), &g.ptr(), &dx.ptr()];
    // SAFETY: there are `rows` targets and slopes, `c` logits for each, and two numbers.
    unsafe { kernel(gpu, ty, macros, "cross_entropy_backward_rows")?.launch(launch, &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::testing::{Values, device};

    const FLOATS: [Type; 4] = [Type::F32, Type::F64, Type::F16, Type::BF16];

    fn samples(n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|i| (((i * 7919 + i / 5) % 61) as f64 - 30.0) / 32.0 * scale).collect()
    }

    /// Classes with an ignored target here and there.
    fn targets(n: usize, c: usize) -> Vec<f64> {
        (0..n).map(|i| if i % 5 == 3 { -100.0 } else { (i * 31 % c) as f64 }).collect()
    }

    #[test]
    fn classes_are_weighed_picked_and_placed() {
        let Some(gpu) = device() else { return };
        for (n, c, s) in [(1, 1, 1), (7, 10, 1), (3, 5, 9), (2, 8, 4), (9000, 3, 1), (0, 3, 1)] {
            let count = n * s;
            let t = targets(count, c);
            let on_gpu = Values::new(gpu, Type::I64, &t);
            let classes = Classes { targets: on_gpu.slice(), ignored: -100, n, c, s };
            for ty in FLOATS {
                let (x, w, g) = (samples(count * c, 1.0), samples(c, 1.0), samples(count, 1.0));
                let (xs, ws, gs) = (Values::new(gpu, ty, &x), Values::new(gpu, ty, &w), Values::new(gpu, ty, &g));
                let (mut weights, mut picked, mut placed) =
                    (Values::unwritten(gpu, ty, count), Values::unwritten(gpu, ty, count), Values::unwritten(gpu, ty, count * c));
                let (mut total, mut bad) = (Values::unwritten(gpu, Type::F64, 1), Values::unwritten(gpu, Type::I64, 1));
                weigh(gpu, &classes, Some(ws.slice()), weights.slice_mut(), total.slice_mut(), bad.slice_mut()).unwrap();
                pick(gpu, &classes, xs.slice(), picked.slice_mut()).unwrap();
                place(gpu, &classes, gs.slice(), placed.slice_mut()).unwrap();
                let place_of = |i: usize| (t[i] >= 0.0).then(|| (i / s * c + t[i] as usize) * s + i % s);
                let want: Vec<f64> = t.iter().map(|&t| if t < 0.0 { 0.0 } else { w[t as usize] }).collect();
                assert_eq!((weights.read(), bad.read()), (want.clone(), vec![-1.0]));
                assert!((total.read()[0] - want.iter().sum::<f64>()).abs() < 1e-9);
                assert_eq!(picked.read(), (0..count).map(|i| place_of(i).map_or(0.0, |at| x[at])).collect::<Vec<_>>());
                let mut want = vec![0.0; count * c];
                (0..count).for_each(|i| place_of(i).into_iter().for_each(|at| want[at] = g[i]));
                assert_eq!(placed.read(), want);
            }
        }
    }

    #[test]
    fn what_is_no_class_is_found() {
        let Some(gpu) = device() else { return };
        let mut t = targets(6000, 4);
        (t[5000], t[5500]) = (4.0, -1.0);
        let t = Values::new(gpu, Type::I64, &t);
        let classes = Classes { targets: t.slice(), ignored: -100, n: 6000, c: 4, s: 1 };
        let mut weights = Values::unwritten(gpu, Type::F32, 6000);
        let (mut total, mut bad) = (Values::unwritten(gpu, Type::F64, 1), Values::unwritten(gpu, Type::I64, 1));
        weigh(gpu, &classes, None, weights.slice_mut(), total.slice_mut(), bad.slice_mut()).unwrap();
        assert_eq!(bad.read(), [5000.0]);
        assert!(total.read()[0].is_nan() && weights.read()[5000].is_nan() && weights.read()[0] == 1.0);
    }

    #[test]
    fn cross_entropy_matches_f64() {
        let Some(gpu) = device() else { return };
        for (n, c) in [(1, 1), (20, 10), (3, 1000), (2, 3001), (2, 12_000), (40, 8)] {
            let t = targets(n, c);
            let on_gpu = Values::new(gpu, Type::I64, &t);
            let classes = Classes { targets: on_gpu.slice(), ignored: -100, n, c, s: 1 };
            for ty in FLOATS {
                let tolerance = match ty {
                    Type::F64 => 1e-12,
                    Type::F32 => 2e-6,
                    Type::F16 => 2e-3,
                    _ => 1e-2,
                };
                let (x, g) = (samples(n * c, 8.0), samples(n, 1.0));
                let (xs, gs) = (Values::new(gpu, ty, &x), Values::new(gpu, ty, &g));
                let (mut loss, mut kept, mut dx) =
                    (Values::unwritten(gpu, ty, n), Values::unwritten(gpu, statistics_type(ty), 2 * n), Values::unwritten(gpu, ty, n * c));
                cross_entropy(gpu, &classes, xs.slice(), loss.slice_mut(), kept.slice_mut()).unwrap();
                cross_entropy_backward(gpu, &classes, xs.slice(), kept.slice(), gs.slice(), dx.slice_mut()).unwrap();
                let (loss, dx) = (loss.read(), dx.read());
                for i in 0..n {
                    let x = &x[i * c..][..c];
                    let max = x.iter().copied().fold(f64::MIN, f64::max);
                    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
                    let target = (t[i] >= 0.0).then_some(t[i] as usize);
                    let want = target.map_or(0.0, |t| sum.ln() + max - x[t]);
                    assert!((loss[i] - want).abs() <= tolerance * want.abs().max(1.0), "{} not {want}: row {i} of {c}, {ty:?}", loss[i]);
                    for j in 0..c {
                        let want = target.map_or(0.0, |t| ((x[j] - max).exp() / sum - (t == j) as u8 as f64) * g[i]);
                        let got = dx[i * c + j];
                        assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{got} not {want}: element {j} of row {i}, {ty:?}");
                    }
                }
            }
        }
    }
}
