//! Reductions over any set of dimensions of any strided view; see [`cpu::reduce`](crate::cpu::reduce), which says what each computes.
//!
//! Two patterns of access, as there: *rows*, where neighbours in memory belong to the same output, and *columns*, where they belong to
//! different ones. With few outputs the reduced elements are cut into parts that a second kernel merges. How, follows from shape and strides
//! only, so that the bits are the same on every GPU.

use super::compile::expand_text;
use super::launch::{Arg, Module, impl_arg};
use super::memory::{DevicePtr, SliceMut, Type, View};
use super::pointwise::ChainResults;
use super::{CudaError, Gpu, Launch, Source};
use crate::cpu::pointwise::chain::MAX_OPERANDS;
use crate::iter::Walk;

const SOURCE: Source = Source { name: "reduce", text: include_str!("reduce.cu") };

/// Threads of a block, packs of a batch, rows of a batch of columns: as in the kernel file.
const THREADS: usize = 256;
const UNROLL: usize = 4;
const ROWS: usize = 8;

/// Blocks that keep every multiprocessor of the largest GPUs busy: below, the reduced elements are cut too.
const ENOUGH_BLOCKS: usize = 1024;

/// Rows of no more packs are folded by a warp or less of it, longer ones by a block.
const LANE_PACKS: usize = 32 * UNROLL * 2;

/// So many rows keep every multiprocessor busy with a warp each, which streams without waiting for others, up to so many packs.
const MANY_ROWS: usize = 8 * ENOUGH_BLOCKS;
const WARP_PACKS: usize = 32 * UNROLL * 64;

/// Room for the largest accumulator.
const ACCUMULATOR: usize = 24;

/// `Results` of the kernel file.
#[derive(Clone, Copy)]
#[repr(C)]
struct Results {
    out: DevicePtr,
    second: DevicePtr,
    third: DevicePtr,
    a: f64,
    b: f64,
    mode: i32,
}

impl Results {
    fn new(out: &SliceMut<'_>) -> Self {
        Self { out: out.ptr(), second: DevicePtr::NULL, third: DevicePtr::NULL, a: 0.0, b: 0.0, mode: 0 }
    }
}

/// `Plan` of the kernel file.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Plan {
    kept_rank: i32,
    reduced_rank: i32,
    kept_shape: [i64; 8],
    kept_strides: [i64; 8],
    out_strides: [i64; 8],
    reduced_shape: [i64; 8],
    reduced_strides: [i64; 8],
    outputs: i64,
    run: i64,
    stride: i64,
    units: i64,
    part: i64,
    parts: i64,
    lanes: i32,
    tiles: i64,
}

impl_arg!(Results, Plan);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pattern {
    Lanes,
    Blocks,
    Columns,
    /// There is nothing to fold.
    Nothing,
}

/// What a reduction reads: elements in memory, or the results of a chain of pointwise functions, made as they are read.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Elements in memory.
    View(View<'a>),
    /// Results of a chain.
    Chain(&'a ChainResults<'a>),
}

impl<'a> From<View<'a>> for Input<'a> {
    fn from(view: View<'a>) -> Self {
        Input::View(view)
    }
}

impl Input<'_> {
    fn ty(&self) -> Type {
        match self {
            Input::View(x) => x.ty(),
            Input::Chain(x) => x.ty(),
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Input::View(x) => x.shape(),
            Input::Chain(x) => x.shape(),
        }
    }

    fn strides(&self) -> &[usize] {
        match self {
            Input::View(x) => x.strides(),
            Input::Chain(x) => x.strides(),
        }
    }

    /// Whether packs of `bytes` may be read as one, from multiples of their length on.
    fn is_aligned(&self, bytes: usize) -> bool {
        match self {
            Input::View(x) => x.ptr().is_aligned(bytes as u64),
            Input::Chain(x) => x.is_wide(),
        }
    }

    /// The compiled kernels. A chain's steps are rounded one by one, so its product and sum are not contracted.
    fn module(&self, gpu: &'static Gpu, defines: &[(&str, &str)]) -> Result<Module, CudaError> {
        match self {
            Input::View(_) => gpu.module(&SOURCE, defines),
            Input::Chain(x) => {
                let defined = defines.iter().flat_map(|(name, value)| [*name, "=", *value, " "]);
                let key = std::iter::once("reduced chain ").chain(defined).chain([x.text()]);
                gpu.module_of(key, SOURCE.name, false, || {
                    let text = format!("#include \"operands.cuh\"\n{}{}", x.text(), SOURCE.text);
                    let operands = MAX_OPERANDS.to_string();
                    expand_text(&text, &[defines, &[("CHAIN", "1"), ("OPERANDS", &operands)]].concat())
                })
            }
        }
    }

    /// Calls `f` with the kernels' first argument.
    fn with_arg<R>(&self, f: impl FnOnce(&dyn Arg) -> R) -> R {
        match self {
            Input::View(x) => f(&x.ptr()),
            Input::Chain(x) => f(x.arg()),
        }
    }
}

impl Plan {
    /// The plan, its pattern, the blocks to launch, and whether packs are aligned.
    fn new(x: &Input<'_>, axes: &[bool]) -> (Self, Pattern, usize, bool) {
        let (shape, strides) = (x.shape(), x.strides());
        assert_eq!(axes.len(), shape.len(), "one flag for each dimension");
        let part = |of: &[usize], reduced: bool| -> Vec<usize> { (0..of.len()).filter(|&d| axes[d] == reduced).map(|d| of[d]).collect() };
        let (kept_shape, kept_strides) = (part(shape, false), part(strides, false));
        let mut out_strides = vec![1; kept_shape.len()];
        for d in (1..kept_shape.len()).rev() {
            out_strides[d - 1] = out_strides[d] * kept_shape[d];
        }
        let kept = Walk::in_memory_order(&kept_shape, [&kept_strides, &out_strides], [0; 2]);
        let reduced = Walk::in_memory_order(&part(shape, true), [&part(strides, true)], [0]);
        let (kept_dims, reduced_dims) = (kept.dimensions(), reduced.dimensions());
        let outputs: usize = kept_shape.iter().product();
        let mut plan = Self { outputs: outputs as i64, ..Self::default() };
        plan.kept_rank = kept_dims.len() as i32;
        for (d, &(extent, [from, to])) in kept_dims.iter().enumerate() {
            (plan.kept_shape[d], plan.kept_strides[d], plan.out_strides[d]) = (extent as i64, from as i64, to as i64);
        }
        plan.reduced_rank = reduced_dims.len() as i32;
        for (d, &(extent, [from])) in reduced_dims.iter().enumerate() {
            (plan.reduced_shape[d], plan.reduced_strides[d]) = (extent as i64, from as i64);
        }
        if outputs == 0 || reduced.numel() == 0 {
            return (plan, Pattern::Nothing, 0, false);
        }
        // Stride 0 repeats an element: there is nothing to be gained from walking it first.
        let rank = |stride: usize| if stride == 0 { usize::MAX } else { stride };
        let inner = (rank(reduced.inner_strides()[0]), rank(kept.inner_strides()[0]));
        let rows = (reduced.numel() > 1 && (kept.run_len() < 2 || inner.0 <= inner.1)) || outputs == 1;
        let size = x.ty().size();
        if rows {
            let pack = 16 / size;
            let units = reduced.numel() / reduced.run_len() * reduced.run_len().div_ceil(pack);
            (plan.run, plan.stride, plan.units) = (reduced.run_len() as i64, reduced.inner_strides()[0] as i64, units as i64);
            let mut others = kept_dims.iter().filter(|d| d.0 > 1).map(|d| d.1[0]).chain(reduced_dims.iter().rev().skip(1).map(|d| d.1[0]));
            let vector = plan.stride == 1 && x.is_aligned(16) && others.all(|stride| stride.is_multiple_of(pack));
            if units <= LANE_PACKS || (outputs >= MANY_ROWS && units <= WARP_PACKS) {
                plan.lanes = units.div_ceil(UNROLL).next_power_of_two().min(32) as i32;
                return (plan, Pattern::Lanes, outputs.div_ceil(THREADS / plan.lanes as usize), vector);
            }
            plan.cut(outputs, units, THREADS * UNROLL);
            return (plan, Pattern::Blocks, outputs * plan.parts as usize, vector);
        }
        let (columns, units, run) = ((16 / size).min(4), reduced.numel(), kept.run_len());
        (plan.run, plan.stride, plan.units) = (run as i64, kept.inner_strides()[0] as i64, units as i64);
        let down = units.div_ceil(ROWS).next_power_of_two().min(8);
        let across = run.div_ceil(columns).next_power_of_two().min(THREADS / down);
        let tiles = run.div_ceil(columns * across);
        (plan.lanes, plan.tiles) = (across as i32, tiles as i64);
        let blocks = outputs / run * tiles;
        plan.cut(blocks, units, THREADS / across * ROWS);
        let mut others = reduced_dims.iter().filter(|d| d.0 > 1).map(|d| d.1[0]).chain(kept_dims.iter().rev().skip(1).map(|d| d.1[0]));
        let vector = plan.stride == 1 && x.is_aligned(columns * size) && others.all(|stride| stride.is_multiple_of(columns));
        (plan, Pattern::Columns, blocks * plan.parts as usize, vector)
    }

    /// Cuts `units` into parts of whole multiples of `step` if there are only `blocks` blocks otherwise.
    fn cut(&mut self, blocks: usize, units: usize, step: usize) {
        let parts = (ENOUGH_BLOCKS / blocks).min(units / (2 * step)).max(1);
        let part = units.div_ceil(parts).next_multiple_of(step);
        (self.part, self.parts) = (part as i64, units.div_ceil(part) as i64);
    }
}

/// Reduces `x` by the fold of this name.
fn reduce(gpu: &'static Gpu, x: Input<'_>, axes: &[bool], fold: &'static str, results: Results, outputs: usize) -> Result<(), CudaError> {
    let (mut plan, pattern, blocks, vector) = Plan::new(&x, axes);
    assert_eq!(plan.outputs as usize, outputs, "one output for each index of the kept dimensions");
    if outputs == 0 {
        return Ok(());
    }
    let flag = |on: bool| if on { "1" } else { "0" };
    let number = match pattern {
        Pattern::Lanes | Pattern::Nothing => "0",
        Pattern::Blocks => "1",
        Pattern::Columns => "2",
    };
    let ty = x.ty();
    let defines = [("T", ty.name()), ("FLOAT_FOLDS", flag(ty.is_float())), ("FOLD", fold), ("VECTOR", flag(vector)), ("PATTERN", number)];
    let module = x.module(gpu, &defines)?;
    let launch = Launch::blocks(blocks, THREADS as u32);
    if pattern == Pattern::Lanes {
        let kernel = module.kernel("rows_by_lanes")?;
        // SAFETY: the view's elements lie in its buffer; the plan's offsets are those of the view, and of outputs whose number was checked
        // here and by the caller, who made `results` of slices of as many.
        return x.with_arg(|x| unsafe { kernel.launch(launch, &[x, &plan, &results]) });
    }
    let several = plan.parts > 1;
    let parts = gpu.alloc(if several { outputs * plan.parts as usize * ACCUMULATOR } else { 0 })?;
    if pattern != Pattern::Nothing {
        let kernel = module.kernel(if pattern == Pattern::Columns { "columns" } else { "rows_by_blocks" })?;
        // SAFETY: as above; with several parts, each output has as many accumulators in `parts`.
        x.with_arg(|x| unsafe { kernel.launch(launch, &[x, &plan, &results, &parts.ptr()]) })?;
        if !several {
            return Ok(());
        }
    }
    // One output of many parts is the usual case: a whole block merges them.
    plan.lanes = if plan.parts > 128 { THREADS as i32 } else { 32 };
    let launch = Launch::blocks(outputs.div_ceil(THREADS / plan.lanes as usize), THREADS as u32);
    // SAFETY: as above. Without elements there are no parts, and none are read.
    unsafe { module.kernel("finish")?.launch(launch, &[&parts.ptr(), &plan, &results]) }
}

/// The type of sums and products of elements of `ty`.
pub fn total_type(ty: Type) -> Type {
    if ty.is_float() { ty } else { Type::I64 }
}

/// A reduction to one output of type `ty` each.
fn to(
    gpu: &'static Gpu,
    x: Input<'_>,
    axes: &[bool],
    fold: &'static str,
    ty: Type,
    out: SliceMut<'_>,
    numbers: (f64, i32),
) -> Result<(), CudaError> {
    assert_eq!(out.ty(), ty, "the type of {fold}");
    let results = Results { a: numbers.0, mode: numbers.1, ..Results::new(&out) };
    reduce(gpu, x, axes, fold, results, out.len())
}

fn expect_float(x: &View<'_>) {
    assert!(x.ty().is_float(), "floats only");
}

/// Σ x. Sums of integers and booleans are i64 and wrap.
pub fn sum(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    sum_of(gpu, x.into(), axes, out)
}

/// [`sum`], of elements that need not be in memory.
pub fn sum_of(gpu: &'static Gpu, x: Input<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x, axes, "Sum", total_type(x.ty()), out, (0.0, 0))
}

/// Σ x / n; NaN for no elements.
pub fn mean(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    mean_of(gpu, x.into(), axes, out)
}

/// [`mean`], of elements that need not be in memory.
pub fn mean_of(gpu: &'static Gpu, x: Input<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    assert!(x.ty().is_float(), "floats only");
    let count: usize = x.shape().iter().zip(axes).filter(|(_, reduced)| **reduced).map(|(extent, _)| *extent).product();
    to(gpu, x, axes, "Sum", x.ty(), out, (count as f64, 1))
}

/// Π x. Products of integers and booleans are i64 and wrap.
pub fn prod(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x.into(), axes, "Product", total_type(x.ty()), out, (0.0, 0))
}

/// The largest element; NaN if any is. The caller refuses reductions over nothing.
pub fn max(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x.into(), axes, "Max", x.ty(), out, (0.0, 0))
}

/// The smallest element; NaN if any is. The caller refuses reductions over nothing.
pub fn min(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x.into(), axes, "Min", x.ty(), out, (0.0, 0))
}

/// The largest element along dimension `axis` and its first index there (i64); a NaN counts as the largest.
///
/// # Panics
/// If the dimension is empty and there are outputs.
pub fn max_with_index(gpu: &'static Gpu, x: View<'_>, axis: usize, out: SliceMut<'_>, index: SliceMut<'_>) -> Result<(), CudaError> {
    extreme_with_index(gpu, x, axis, "ArgMax", out, index)
}

/// The smallest element along dimension `axis` and its first index there (i64); a NaN counts as the smallest.
///
/// # Panics
/// If the dimension is empty and there are outputs.
pub fn min_with_index(gpu: &'static Gpu, x: View<'_>, axis: usize, out: SliceMut<'_>, index: SliceMut<'_>) -> Result<(), CudaError> {
    extreme_with_index(gpu, x, axis, "ArgMin", out, index)
}

fn extreme_with_index(
    gpu: &'static Gpu,
    x: View<'_>,
    axis: usize,
    fold: &'static str,
    out: SliceMut<'_>,
    index: SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(out.is_empty() || x.shape()[axis] > 0, "no element along the dimension");
    assert!(out.ty() == x.ty() && index.ty() == Type::I64 && out.len() == index.len(), "a value and an index for each output");
    let mut axes = [false; 8];
    axes[axis] = true;
    let results = Results { second: index.ptr(), ..Results::new(&out) };
    reduce(gpu, x.into(), &axes[..x.shape().len()], fold, results, out.len())
}

/// Whether any element is not zero; false for none.
pub fn any(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x.into(), axes, "Any", Type::Bool, out, (0.0, 0))
}

/// Whether all elements are not zero; true for none.
pub fn all(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    to(gpu, x.into(), axes, "All", Type::Bool, out, (0.0, 0))
}

/// Number, mean and squared deviations: three f64 for each output.
pub fn moments(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    expect_float(&x);
    assert!(out.ty() == Type::F64 && out.len().is_multiple_of(3), "three numbers for each output");
    reduce(gpu, x.into(), axes, "Moments", Results::new(&out), out.len() / 3)
}

/// The type that statistics are kept in: f64 for f64, f32 for the others.
pub fn statistics_type(ty: Type) -> Type {
    if ty == Type::F64 { Type::F64 } else { Type::F32 }
}

/// The mean, 1/√(variance + ε), and the variance with Bessel's correction, each of [`statistics_type`].
pub(super) fn statistics(gpu: &'static Gpu, x: View<'_>, axes: &[bool], eps: f64, out: [SliceMut<'_>; 3]) -> Result<(), CudaError> {
    expect_float(&x);
    let [mean, rstd, var] = &out;
    for part in &out {
        assert!(part.ty() == statistics_type(x.ty()) && part.len() == mean.len(), "three statistics for each output");
    }
    let results = Results { second: rstd.ptr(), third: var.ptr(), a: 1.0, b: eps, mode: 3, ..Results::new(mean) };
    reduce(gpu, x.into(), axes, "Moments", results, mean.len())
}

/// Σ (x − mean)² / (n − correction); the divisor is 0 where the correction exceeds n.
pub fn var(gpu: &'static Gpu, x: View<'_>, axes: &[bool], correction: f64, out: SliceMut<'_>) -> Result<(), CudaError> {
    expect_float(&x);
    to(gpu, x.into(), axes, "Moments", x.ty(), out, (correction, 1))
}

/// The square root of the variance.
pub fn std(gpu: &'static Gpu, x: View<'_>, axes: &[bool], correction: f64, out: SliceMut<'_>) -> Result<(), CudaError> {
    expect_float(&x);
    to(gpu, x.into(), axes, "Moments", x.ty(), out, (correction, 2))
}

/// (Σ |x|^p)^(1/p); p = ∞ gives the largest |x|, −∞ the smallest, 0 the number of elements that are not zero.
pub fn norm(gpu: &'static Gpu, x: View<'_>, axes: &[bool], p: f64, out: SliceMut<'_>) -> Result<(), CudaError> {
    expect_float(&x);
    let fold = match p {
        f64::INFINITY => "AbsMax",
        f64::NEG_INFINITY => "AbsMin",
        0.0 => "CountNonzero",
        1.0 => "AbsSum",
        2.0 => "Euclidean",
        _ => "PowerNorm",
    };
    to(gpu, x.into(), axes, fold, x.ty(), out, (p, 0))
}

/// log Σ exp(x), which never overflows; −∞ for no elements.
pub fn logsumexp(gpu: &'static Gpu, x: View<'_>, axes: &[bool], out: SliceMut<'_>) -> Result<(), CudaError> {
    expect_float(&x);
    to(gpu, x.into(), axes, "LogSumExp", x.ty(), out, (0.0, 0))
}

#[cfg(test)]
mod tests;
