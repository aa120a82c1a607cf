//! Batch, group and instance norm in both memory orders.

use super::super::compile::number;
use super::super::launch::impl_arg;
use super::super::memory::{DevicePtr, Slice, SliceMut, Type};
use super::super::reduce::{self, statistics_type};
use super::super::{Arg, CudaError, DeviceBuffer, Gpu, Kernel, Launch, Source};
use super::{Channels, Grouping, divisor, gradient, parameter};

const SOURCE: Source = Source { name: "norm_channels", text: include_str!("channels.cu") };

/// As in the kernel file.
const THREADS: usize = 256;
const UNROLL: usize = 4;

/// Blocks that keep every multiprocessor of the largest GPUs busy: below, what a block sums over is cut.
const ENOUGH_BLOCKS: usize = 1024;

/// `Shape` of the kernel file.
#[derive(Clone, Copy)]
#[repr(C)]
struct Shape {
    n: i64,
    c: i64,
    s: i64,
    groups: i64,
}

/// `Constants` of the kernel file.
#[derive(Clone, Copy)]
#[repr(C)]
struct Constants {
    mean: DevicePtr,
    rstd: DevicePtr,
    weight: DevicePtr,
    bias: DevicePtr,
    table: DevicePtr,
}

impl_arg!(Shape, Constants);

/// The statistics of each group, as [`Channels::statistics`] counts them.
#[derive(Clone, Copy, Debug)]
pub struct Statistics<'a> {
    /// What shares them.
    pub grouping: Grouping,
    /// Means.
    pub mean: Slice<'a>,
    /// 1/√(variance + ε).
    pub rstd: Slice<'a>,
}

fn does_not_fit() -> CudaError {
    CudaError::Unavailable("group_moments: the layout does not fit the data".into())
}

/// The mean of each group, 1/√(variance + ε), and the variance with Bessel's correction.
pub fn group_moments(
    gpu: &'static Gpu,
    layout: Channels,
    grouping: Grouping,
    eps: f64,
    x: Slice<'_>,
    out: [SliceMut<'_>; 3],
) -> Result<(), CudaError> {
    let Channels { n, c, s, channels_last } = layout;
    let count = layout.statistics(grouping);
    assert!(x.len() == layout.numel() && out.iter().all(|part| part.len() == count && part.ty() == statistics_type(x.ty())));
    if count == 0 {
        return Ok(());
    }
    if let (Grouping::Groups(groups), true) = (grouping, channels_last) {
        // Channel by channel, which reads whole runs of memory, and then the channels of each group.
        let mut buffer = gpu.alloc(n * c * 3 * size_of::<f64>())?;
        let mut single = SliceMut::new(&mut buffer, Type::F64, 0, n * c * 3).ok_or_else(does_not_fit)?;
        let (shape, strides) = ([n, s, c], [s * c, c, 1]);
        let view = x.view(&shape, &strides).ok_or_else(does_not_fit)?;
        reduce::moments(gpu, view, &[false, true, false], single.reborrow())?;
        let kernel = kernel(gpu, x.ty(), Macros { pattern: 6, ..Macros::default() }, "group_statistics")?;
        let [mean, rstd, var] = out.map(|part| part.ptr());
        let launch = Launch::blocks(count.div_ceil(THREADS), THREADS as u32);
        let args: [&dyn Arg; 7] = [&single.ptr(), &(count as i64), &((c / groups) as i64), &eps, &mean, &rstd, &var];
        // SAFETY: `single` has moments for each of `count · c/groups` channels; the outputs have `count` elements, checked above.
        return unsafe { kernel.launch(launch, &args) };
    }
    let reduce = |shape: &[usize], strides: &[usize], axes: &[bool]| {
        let view = x.view(shape, strides).ok_or_else(does_not_fit)?;
        reduce::statistics(gpu, view, axes, eps, out)
    };
    match grouping {
        Grouping::Batch if channels_last => reduce(&[n * s, c], &[c, 1], &[true, false]),
        Grouping::Batch => reduce(&[n, c, s], &[c * s, s, 1], &[true, false, true]),
        Grouping::Groups(groups) => {
            let len = c / groups * s;
            reduce(&[n * groups, len], &[len, 1], &[false, true])
        }
    }
}

/// The macros of the kernel file.
#[derive(Clone, Copy)]
struct Macros {
    pattern: usize,
    vec: usize,
    aligned: bool,
    lanes: usize,
    backward: usize,
}

impl Default for Macros {
    fn default() -> Self {
        Self { pattern: 0, vec: 1, aligned: true, lanes: 32, backward: 1 }
    }
}

fn kernel(gpu: &'static Gpu, ty: Type, macros: Macros, name: &str) -> Result<Kernel, CudaError> {
    let defines = [
        ("T", ty.name()),
        ("PATTERN", number(macros.pattern)),
        ("VEC", number(macros.vec)),
        ("ALIGNED", number(macros.aligned.into())),
        ("LANES", number(macros.lanes)),
        ("BACKWARD", number(macros.backward)),
    ];
    gpu.module(&SOURCE, &defines)?.kernel(name)
}

/// A layout as the passes over elements see it, with its grouping and the type of its elements.
#[derive(Clone, Copy)]
struct Pass {
    layout: Channels,
    grouping: Grouping,
    ty: Type,
}

/// Packs of channels side by side in a block, blocks for all channels of a pixel, and parts of so many pixels that a block takes.
struct Tiles {
    across: usize,
    tiles: usize,
    parts: usize,
    chunk: usize,
}

impl Pass {
    fn new(layout: Channels, grouping: Grouping, ty: Type) -> Self {
        // A pass with constants for each channel may forget where samples end.
        let merged = layout.channels_last && grouping == Grouping::Batch;
        let layout = if merged { Channels { n: 1, s: layout.n * layout.s, ..layout } } else { layout };
        Self { layout, grouping, ty }
    }

    fn shape(&self) -> Shape {
        let groups = match self.grouping {
            Grouping::Batch => 0,
            Grouping::Groups(groups) => groups,
        };
        Shape { n: self.layout.n as i64, c: self.layout.c as i64, s: self.layout.s as i64, groups: groups as i64 }
    }

    /// Elements that move together.
    fn vec(&self) -> usize {
        divisor(if self.layout.channels_last { self.layout.c } else { self.layout.s }, 16 / self.ty.size())
    }

    fn is_aligned(&self, pointers: &[DevicePtr]) -> bool {
        pointers.iter().all(|p| p.is_aligned((self.vec() * self.ty.size()) as u64))
    }

    /// How the pixels are shared out, a thread taking at least `least` and no more than `most` of them.
    fn tiles(&self, least: usize, most: usize) -> Tiles {
        let Channels { n, c, s, .. } = self.layout;
        let packs = c / self.vec();
        let across = packs.next_power_of_two().min(THREADS / 8);
        let (tiles, down) = (packs.div_ceil(across), THREADS / across);
        let chunk = down * (s * n * tiles).div_ceil(down * ENOUGH_BLOCKS).clamp(least, most);
        Tiles { across, tiles, parts: s.div_ceil(chunk), chunk }
    }

    /// Writes what `constants` make of `g` and `x`: `backward` is the kernel file's macro.
    fn apply(
        &self,
        gpu: &'static Gpu,
        backward: usize,
        constants: Constants,
        g: DevicePtr,
        x: DevicePtr,
        out: DevicePtr,
    ) -> Result<(), CudaError> {
        let Channels { n, c, s, channels_last } = self.layout;
        let macros = Macros {
            pattern: channels_last.into(),
            vec: self.vec(),
            aligned: self.is_aligned(&[g, x, out]),
            backward,
            ..Macros::default()
        };
        if !channels_last {
            let kernel = kernel(gpu, self.ty, macros, "normalize_planes")?;
            let launch = Launch::blocks((n * c * (s / self.vec())).div_ceil(THREADS * UNROLL), THREADS as u32);
            // SAFETY: the callers checked that operands and output have the layout's elements, and the constants those of its channels.
            return unsafe { kernel.launch(launch, &[&self.shape(), &constants, &g, &x, &out]) };
        }
        let Tiles { across, tiles, parts, chunk } = self.tiles(2 * UNROLL, 16 * UNROLL);
        let kernel = kernel(gpu, self.ty, macros, "normalize_pixels")?;
        let launch = Launch::blocks(n * parts * tiles, THREADS as u32);
        let args: [&dyn Arg; 9] =
            [&self.shape(), &constants, &g, &x, &out, &(across as i32), &(tiles as i64), &(parts as i64), &(chunk as i64)];
        // SAFETY: as above.
        unsafe { kernel.launch(launch, &args) }
    }

    /// Σ g and Σ g·(x − mean) over parts of the pixels of each channel of each sample: the sums' memory, and the number of parts.
    fn sums(&self, gpu: &'static Gpu, mean: DevicePtr, g: DevicePtr, x: DevicePtr) -> Result<(DeviceBuffer, usize), CudaError> {
        let Channels { n, c, s, channels_last } = self.layout;
        let room = |parts: usize| gpu.alloc(parts * n * c * 2 * size_of::<f64>());
        let macros = Macros { vec: self.vec(), aligned: self.is_aligned(&[g, x]), ..Macros::default() };
        if channels_last {
            let Tiles { across, tiles, parts, chunk } = self.tiles(2 * UNROLL, usize::MAX / THREADS);
            let sums = room(parts)?;
            let kernel = kernel(gpu, self.ty, Macros { pattern: 3, ..macros }, "pixel_sums")?;
            let args: [&dyn Arg; 9] =
                [&self.shape(), &mean, &g, &x, &sums.ptr(), &(across as i32), &(tiles as i64), &(parts as i64), &(chunk as i64)];
            // SAFETY: the caller checked that the operands have the layout's elements; `sums` has two numbers for each channel of each sample and part.
            unsafe { kernel.launch(Launch::blocks(n * parts * tiles, THREADS as u32), &args)? };
            return Ok((sums, parts));
        }
        let packs = s / self.vec();
        // A plane of few packs is a warp's work.
        let lanes = if packs <= 32 * UNROLL * 2 { 32 } else { THREADS };
        let parts = (ENOUGH_BLOCKS / (n * c).max(1)).min(packs / (2 * lanes * UNROLL)).max(1);
        let chunk = packs.div_ceil(parts).next_multiple_of(lanes * UNROLL);
        let parts = packs.div_ceil(chunk);
        let sums = room(parts)?;
        let kernel = kernel(gpu, self.ty, Macros { pattern: 2, lanes, ..macros }, "plane_sums")?;
        let launch = Launch::blocks((n * c * parts).div_ceil(THREADS / lanes), THREADS as u32);
        // SAFETY: as above.
        unsafe { kernel.launch(launch, &[&self.shape(), &mean, &g, &x, &sums.ptr(), &(parts as i64), &(chunk as i64)])? };
        Ok((sums, parts))
    }
}

/// The addresses of means and rstds, checked.
fn statistics_of(layout: Channels, statistics: Statistics<'_>, ty: Type) -> [DevicePtr; 2] {
    let count = layout.statistics(statistics.grouping);
    for part in [statistics.mean, statistics.rstd] {
        assert!(part.len() == count && part.ty() == statistics_type(ty), "a statistic for each group");
    }
    [statistics.mean.ptr(), statistics.rstd.ptr()]
}

/// y = (x − mean)·rstd·weight + bias.
pub fn normalize(
    gpu: &'static Gpu,
    layout: Channels,
    statistics: Statistics<'_>,
    weight: Option<Slice<'_>>,
    bias: Option<Slice<'_>>,
    x: Slice<'_>,
    y: SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = x.ty();
    assert!(ty.is_float() && x.len() == layout.numel() && y.len() == x.len() && y.ty() == ty);
    if x.is_empty() {
        return Ok(());
    }
    let [mean, rstd] = statistics_of(layout, statistics, ty);
    let constants = Constants {
        mean,
        rstd,
        weight: parameter(weight.as_ref(), ty, layout.c),
        bias: parameter(bias.as_ref(), ty, layout.c),
        table: DevicePtr::NULL,
    };
    Pass::new(layout, statistics.grouping, ty).apply(gpu, 0, constants, x.ptr(), x.ptr(), y.ptr())
}

/// The gradients of input, weight and bias, from that of the output `g`. With h = (x − mean)·rstd and means over each group:
/// dx = rstd·(g·w − mean(g·w) − h·mean(g·w·h)); dw = Σ g·h and db = Σ g over each channel. If the statistics are `fixed`
/// (evaluation), dx = rstd·g·w.
#[allow(clippy::too_many_arguments)] // The operands of one formula.
pub fn normalize_backward(
    gpu: &'static Gpu,
    layout: Channels,
    statistics: Statistics<'_>,
    fixed: bool,
    weight: Option<Slice<'_>>,
    g: Slice<'_>,
    x: Slice<'_>,
    dx: Option<SliceMut<'_>>,
    dw: Option<SliceMut<'_>>,
    db: Option<SliceMut<'_>>,
) -> Result<(), CudaError> {
    let ty = x.ty();
    assert!(ty.is_float() && x.len() == layout.numel() && g.len() == x.len() && g.ty() == ty);
    assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len() && dx.ty() == ty));
    if g.is_empty() {
        return [dw, db].into_iter().flatten().try_for_each(|mut out| gpu.zero(&mut out));
    }
    let grouping = statistics.grouping;
    let [mean, rstd] = statistics_of(layout, statistics, ty);
    let w = parameter(weight.as_ref(), ty, layout.c);
    let (dw, db) = (gradient(dw.as_ref(), ty, layout.c), gradient(db.as_ref(), ty, layout.c));
    let wants_parameters = dw != DevicePtr::NULL || db != DevicePtr::NULL;
    let pass = Pass::new(layout, grouping, ty);
    let (sums, parts) =
        if wants_parameters || (dx.is_some() && !fixed) { pass.sums(gpu, mean, g.ptr(), x.ptr())? } else { (gpu.alloc(0)?, 0) };
    let (shape, parts) = (pass.shape(), parts as i64);
    let entries = if grouping == Grouping::Batch { layout.c } else { layout.n * layout.c };
    let table = gpu.alloc(if dx.is_some() { entries * 4 * statistics_type(ty).size() } else { 0 })?;
    let table_ptr = if dx.is_some() { table.ptr() } else { DevicePtr::NULL };
    let count = layout.statistics(grouping);
    if dx.is_some() || grouping == Grouping::Batch {
        let len = (layout.numel() / count) as f64;
        let kernel = kernel(gpu, ty, Macros { pattern: 4, ..Macros::default() }, "gradient_coefficients")?;
        let args: [&dyn Arg; 11] = [&shape, &sums.ptr(), &parts, &mean, &rstd, &w, &len, &table_ptr, &dw, &db, &i32::from(fixed)];
        // SAFETY: `sums` has `parts` pairs for each channel of each sample (none are read if there are no parts), the table an entry for each
        // channel, or for each channel of each sample, and statistics and parameters were checked above.
        unsafe { kernel.launch(Launch::blocks(count, THREADS as u32), &args)? };
    }
    if wants_parameters && grouping != Grouping::Batch {
        let kernel = kernel(gpu, ty, Macros { pattern: 5, ..Macros::default() }, "gradient_parameters")?;
        // SAFETY: as above.
        unsafe { kernel.launch(Launch::blocks(layout.c.div_ceil(8), THREADS as u32), &[&shape, &sums.ptr(), &parts, &rstd, &dw, &db])? };
    }
    let Some(dx) = dx else { return Ok(()) };
    let constants = Constants { mean, rstd, weight: DevicePtr::NULL, bias: DevicePtr::NULL, table: table_ptr };
    pass.apply(gpu, if fixed { 2 } else { 1 }, constants, g.ptr(), x.ptr(), dx.ptr())
}
