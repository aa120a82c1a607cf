//! Convolution over channels-last images, as [`crate::cpu::conv`] describes it: forward pass, input gradient and weight gradient, each as a
//! product whose factors are gathered from the images while they are loaded.
//!
//! - `gather.cu`: forward pass and input gradient, the tiles of a product by multiply-adds or on tensor cores (`tile.cuh`);
//! - `thin.cu`: the same to up to [`THIN`] channels a group;
//! - `weight.cu`: the weight gradient, over parts of the pixels;
//! - `depthwise.cu`: one channel a group, all passes;
//! - `pack.cu`: weights put into the order of the sums, and sums of parts added up.
//!
//! Which one runs, and in how many parts, depends on shape, type and precision alone.

mod plan;
#[cfg(test)]
mod tests;

use super::launch::impl_arg;
use super::{CudaError, DeviceBuffer, DevicePtr, Gpu, Launch, Slice, SliceMut, Source, Type};
use crate::cpu::conv::ConvShape;
use plan::Math;

/// By multiply-adds, on tensor cores, on Hopper's.
static GATHER: [Source; 3] = {
    const TEXT: &str = include_str!("gather.cu");
    [
        Source { name: "conv_gather", text: TEXT },
        Source { name: "conv_gather_mma", text: TEXT },
        Source { name: "conv_gather_hopper", text: TEXT },
    ]
};
static WEIGHT: [Source; 3] = {
    const TEXT: &str = include_str!("weight.cu");
    [
        Source { name: "conv_weight", text: TEXT },
        Source { name: "conv_weight_mma", text: TEXT },
        Source { name: "conv_weight_hopper", text: TEXT },
    ]
};
const THIN_SOURCE: Source = Source { name: "conv_thin", text: include_str!("thin.cu") };
const DEPTHWISE: Source = Source { name: "conv_depthwise", text: include_str!("depthwise.cu") };
const PACK: Source = Source { name: "conv_pack", text: include_str!("pack.cu") };

/// Target channels of a group up to which `thin.cu` is used: a tile of a product would be mostly empty.
const THIN: usize = 4;

/// `ConvAxis` of `geometry.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Axis {
    source: i32,
    target: i32,
    kernel: i32,
    stride: i32,
    padding: i32,
    dilation: i32,
    period: i32,
    tap_step: i32,
    target_step: i32,
    source_step: i32,
}

/// `ConvGather` of `geometry.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Gather {
    n: i64,
    groups: i32,
    cin: i32,
    cout: i32,
    transposed: i32,
    in_stride: i64,
    out_stride: i64,
    axis: [Axis; 3],
}

impl_arg!(Gather);

fn gcd(mut a: usize, mut b: usize) -> usize {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Gather {
    /// The forward pass (targets are outputs), or with `transposed` the input gradient (targets are inputs). An error if a position does not fit 32 bits.
    fn new(shape: &ConvShape, transposed: bool) -> Result<Self, CudaError> {
        let too_large = |what: &str| CudaError::Unavailable(format!("a convolution on the GPU counts {what} in 32 bits: {shape:?}"));
        let (ci, co, taps) = (shape.ci / shape.groups, shape.co / shape.groups, shape.taps());
        // Positions and what is added to them stay below the mark for pixels outside of the tile.
        let limit = 1 << 30;
        for i in 0..3 {
            let reach = [shape.input[i], 2 * shape.padding[i], shape.stride[i], shape.dilation[i] * shape.kernel[i], shape.output[i]];
            if reach.iter().sum::<usize>() > limit {
                return Err(too_large("positions"));
            }
        }
        if shape.ci.max(shape.co).max(1).saturating_mul(taps) > i32::MAX as usize {
            return Err(too_large("taps times channels"));
        }
        let axis = std::array::from_fn(|i| {
            let (stride, dilation) = (shape.stride[i], shape.dilation[i]);
            let common = gcd(stride, dilation);
            let (source, target) = if transposed { (shape.output[i], shape.input[i]) } else { (shape.input[i], shape.output[i]) };
            let (period, tap_step, target_step) = if transposed { (stride, stride / common, 1) } else { (1, 1, stride) };
            let source_step = if transposed { -((dilation / common) as i32) } else { dilation as i32 };
            Axis {
                source: source as i32,
                target: target as i32,
                kernel: shape.kernel[i] as i32,
                stride: stride as i32,
                padding: shape.padding[i] as i32,
                dilation: dilation as i32,
                period: period as i32,
                tap_step: tap_step as i32,
                target_step: target_step as i32,
                source_step,
            }
        });
        let (cin, cout) = if transposed { (co, ci) } else { (ci, co) };
        let (in_stride, out_stride) = if transposed { (ci * taps, taps) } else { (taps, ci * taps) };
        Ok(Self {
            n: shape.n as i64,
            groups: shape.groups as i32,
            cin: cin as i32,
            cout: cout as i32,
            transposed: transposed as i32,
            in_stride: in_stride as i64,
            out_stride: out_stride as i64,
            axis,
        })
    }

    fn groups(&self) -> usize {
        self.groups as usize
    }

    fn cin(&self) -> usize {
        self.cin as usize
    }

    fn cout(&self) -> usize {
        self.cout as usize
    }

    fn taps(&self) -> usize {
        self.axis.iter().map(|a| a.kernel as usize).product()
    }

    fn target_pixels(&self) -> usize {
        self.n as usize * self.axis.iter().map(|a| a.target as usize).product::<usize>()
    }

    /// Phases of targets, and the pixels of the largest.
    fn phases(&self) -> (usize, usize) {
        let phases = self.axis.iter().map(|a| a.period.min(a.target) as usize).product();
        let pixels = self.axis.iter().map(|a| (a.target as usize).div_ceil(a.period as usize)).product::<usize>();
        (phases, self.n as usize * pixels)
    }

    fn is_depthwise(&self) -> bool {
        self.cin == 1 && self.cout == 1 && self.groups > 1
    }
}

/// The convolution `y` of `x` with the weights `w`, plus `bias`: see [`crate::cpu::conv::forward`].
pub fn forward(
    gpu: &'static Gpu,
    shape: &ConvShape,
    x: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    y: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    shape.assert_valid();
    assert!(x.len() == shape.input_len() && w.len() == shape.weight_len() && y.len() == shape.output_len());
    assert!(bias.is_none_or(|b| b.len() == shape.co));
    gather(gpu, &Gather::new(shape, false)?, Math::of(gpu, y.ty()), x, w, bias, y)
}

/// The gradient of [`forward`] by its input, plus `bias`: see [`crate::cpu::conv::input_grad`].
pub fn input_grad(
    gpu: &'static Gpu,
    shape: &ConvShape,
    gy: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    gx: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    shape.assert_valid();
    assert!(gx.len() == shape.input_len() && w.len() == shape.weight_len() && gy.len() == shape.output_len());
    assert!(bias.is_none_or(|b| b.len() == shape.ci));
    gather(gpu, &Gather::new(shape, true)?, Math::of(gpu, gx.ty()), gy, w, bias, gx)
}

/// The gradient of [`forward`] by its weights: see [`crate::cpu::conv::weight_grad`].
pub fn weight_grad(gpu: &'static Gpu, shape: &ConvShape, x: Slice<'_>, gy: Slice<'_>, gw: &mut SliceMut<'_>) -> Result<(), CudaError> {
    shape.assert_valid();
    assert!(x.len() == shape.input_len() && gw.len() == shape.weight_len() && gy.len() == shape.output_len());
    let ty = gw.ty();
    assert!(ty.is_float() && x.ty() == ty && gy.ty() == ty, "one float type");
    if gw.is_empty() {
        return Ok(());
    }
    if x.is_empty() || gy.is_empty() {
        return gpu.zero(gw);
    }
    weights(gpu, &Gather::new(shape, false)?, &Gather::new(shape, true)?, Math::of(gpu, ty), x, gy, gw)
}

/// Bytes of a sum of products.
fn sum_size(ty: Type) -> usize {
    if ty == Type::F64 { 8 } else { 4 }
}

/// Whether lines of `channels` channels a group, in pixels from `ptr` on, can be read by 16 bytes.
fn by_lines(ptr: DevicePtr, channels: usize, ty: Type) -> bool {
    channels > 0 && ptr.is_aligned(16) && (channels * ty.size()).is_multiple_of(16)
}

fn flag(value: bool) -> &'static str {
    if value { "1" } else { "0" }
}

fn bias_ptr(bias: Option<Slice<'_>>) -> DevicePtr {
    bias.map_or(DevicePtr::NULL, |b| b.ptr())
}

/// As many blocks in a row, if a grid can have them.
fn blocks(count: usize, threads: u32) -> Result<Launch, CudaError> {
    if count > i32::MAX as usize {
        return Err(CudaError::Unavailable(format!("a convolution of {count} tiles is too large for one launch")));
    }
    Ok(Launch::blocks(count, threads))
}

fn gather(
    gpu: &'static Gpu,
    g: &Gather,
    math: Math,
    x: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    y: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = y.ty();
    assert!(ty.is_float() && x.ty() == ty && w.ty() == ty && bias.is_none_or(|b| b.ty() == ty), "one float type");
    if y.is_empty() {
        Ok(())
    } else if g.is_depthwise() {
        depthwise(gpu, g, x, w, bias, y)
    } else if g.cout() <= THIN {
        thin(gpu, g, x, w, bias, y)
    } else {
        product(gpu, g, math, x, w, bias, y)
    }
}

/// The weights as rows of `width` for each tap and channel, or with `k_rows` as rows of taps and channels.
fn pack(gpu: &'static Gpu, g: &Gather, w: Slice<'_>, width: usize, k_rows: bool) -> Result<DeviceBuffer, CudaError> {
    let ty = w.ty();
    let packed = gpu.alloc(g.groups() * g.taps() * g.cin() * width * ty.size())?;
    if !w.is_empty() {
        let kernel = gpu.module(&PACK, &[("T", ty.name())])?.kernel("conv_pack")?;
        // Where there are few channels, a thread for each tap; where there are many, a thread reads the taps of a pair of channels in a row.
        let pairs = g.groups() * g.cin() * width;
        let parts = if pairs < 1 << 16 { g.taps() } else { 1 };
        let launch = Launch::over(pairs * parts, 128);
        // SAFETY: `w` has all weights, `packed` room for a row of `width` (at least `cout`) for each group, tap and channel.
        unsafe { kernel.launch(launch, &[g, &w.ptr(), &packed.ptr(), &(width as i32), &(k_rows as i32), &(parts as i32)])? };
    }
    Ok(packed)
}

/// The weight gradient by way of one of both gathers.
fn weights(
    gpu: &'static Gpu,
    forward: &Gather,
    transposed: &Gather,
    math: Math,
    x: Slice<'_>,
    gy: Slice<'_>,
    gw: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = gw.ty();
    let by_transposed = plan::weight_cost(transposed, math, ty) < plan::weight_cost(forward, math, ty);
    let (g, (partial, parts)) = if forward.is_depthwise() {
        (forward, depthwise_weight(gpu, forward, x, gy)?)
    } else if by_transposed {
        (transposed, weight_product(gpu, transposed, math, gy, x)?)
    } else {
        (forward, weight_product(gpu, forward, math, x, gy)?)
    };
    let kernel = gpu.module(&PACK, &[("T", ty.name())])?.kernel("conv_weight_finish")?;
    // SAFETY: `partial` holds `parts` times as many sums as there are weights, and `gw` all weights of the shape that `g` was made of.
    unsafe { kernel.launch(Launch::over(gw.len(), 256), &[g, &partial.ptr(), &gw.ptr(), &(parts as i32)]) }
}

fn product(
    gpu: &'static Gpu,
    g: &Gather,
    math: Math,
    x: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    y: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = y.ty();
    let (phases, pixels) = g.phases();
    let (tile, parts) = plan::gather(g, math, ty);
    let (tiles_m, tiles_n) = (pixels.div_ceil(tile.m), g.cout().div_ceil(tile.n));
    let packed = pack(gpu, g, w, tiles_n * tile.n, false)?;
    let partial = gpu.alloc(if parts > 1 { parts * y.len() * sum_size(ty) } else { 0 })?;
    let vector = by_lines(x.ptr(), g.cin(), ty);
    let group_size = tile.group() * if parts > 1 { sum_size(ty) } else { ty.size() };
    let aligned = g.cout().is_multiple_of(tile.group()) && (parts > 1 || y.ptr().is_aligned(group_size as u64));
    let defines = tile.defines(math, &[("T", ty.name()), ("VECTOR", flag(vector)), ("PARTIAL", flag(parts > 1))]);
    let kernel = gpu.module(math.source(&GATHER), &defines)?.kernel("conv_gather")?;
    let count = tiles_m.saturating_mul(tiles_n).saturating_mul(g.groups()).saturating_mul(phases).saturating_mul(parts);
    let launch =
        blocks(count, tile.threads)?.with_shared((tile.stage_bytes(math, ty, true) * tile.stages + tile.m * size_of::<[i64; 4]>()) as u32);
    // SAFETY: the lengths of `x`, `bias` and `y` were checked against the shape that `g` was made of; `packed` is as wide as `tiles_n` tiles, and
    // `partial` holds `parts` times as many sums as `y` has elements.
    unsafe {
        kernel.launch(
            launch,
            &[
                g,
                &x.ptr(),
                &packed.ptr(),
                &bias_ptr(bias),
                &y.ptr(),
                &partial.ptr(),
                &(parts as i32),
                &(tiles_m as i32),
                &(tiles_n as i32),
                &(phases as i32),
                &(aligned as i32),
            ],
        )?;
    }
    if parts == 1 {
        return Ok(());
    }
    let kernel = gpu.module(&PACK, &[("T", ty.name())])?.kernel("conv_finish")?;
    let channels = (g.groups() * g.cout()) as i32;
    // SAFETY: as above; `bias` has `channels` elements.
    unsafe {
        kernel
            .launch(Launch::over(y.len(), 256), &[&partial.ptr(), &bias_ptr(bias), &y.ptr(), &(y.len() as i64), &channels, &(parts as i32)])
    }
}

fn thin(gpu: &'static Gpu, g: &Gather, x: Slice<'_>, w: Slice<'_>, bias: Option<Slice<'_>>, y: &mut SliceMut<'_>) -> Result<(), CudaError> {
    const NUMBERS: [&str; 33] = {
        let mut numbers = ["0"; 33];
        (numbers[1], numbers[2], numbers[3], numbers[4], numbers[8], numbers[16], numbers[32]) = ("1", "2", "3", "4", "8", "16", "32");
        numbers
    };
    // Pixels of a thread, as in thin.cu.
    const PIXELS: usize = 4;
    let ty = y.ty();
    let (phases, pixels) = g.phases();
    let packed = pack(gpu, g, w, g.cout(), true)?;
    let vector = by_lines(x.ptr(), g.cin(), ty);
    let lines = if vector { g.cin() * ty.size() / 16 } else { g.cin() };
    let lanes = lines.next_power_of_two().clamp(1, 32);
    let tiles = pixels.div_ceil(256 / lanes * PIXELS);
    let defines = [("T", ty.name()), ("VECTOR", flag(vector)), ("LANES", NUMBERS[lanes]), ("COUT", NUMBERS[g.cout()])];
    let kernel = gpu.module(&THIN_SOURCE, &defines)?.kernel("conv_thin")?;
    let launch = blocks(tiles.saturating_mul(g.groups()).saturating_mul(phases), 256)?;
    // SAFETY: the lengths of `x`, `bias` and `y` were checked against the shape that `g` was made of, and `packed` has a row for each target channel.
    unsafe { kernel.launch(launch, &[g, &x.ptr(), &packed.ptr(), &bias_ptr(bias), &y.ptr(), &(tiles as i32), &(phases as i32)]) }
}

fn depthwise(
    gpu: &'static Gpu,
    g: &Gather,
    x: Slice<'_>,
    w: Slice<'_>,
    bias: Option<Slice<'_>>,
    y: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = y.ty();
    let line = 4 * ty.size() as u64;
    let four = g.groups().is_multiple_of(4) && x.ptr().is_aligned(line) && y.ptr().is_aligned(line);
    let kernel = gpu.module(&DEPTHWISE, &[("T", ty.name()), ("CHANNELS", if four { "4" } else { "1" })])?.kernel("conv_depthwise")?;
    let launch = Launch::over(if four { y.len() / 4 } else { y.len() }, 256);
    // SAFETY: the lengths of `x`, `w`, `bias` and `y` were checked against the shape that `g` was made of.
    unsafe { kernel.launch(launch, &[g, &x.ptr(), &w.ptr(), &bias_ptr(bias), &y.ptr()]) }
}

/// Sums for `conv_weight_finish`, and in how many parts they are. `source` and `target` are those of `g`.
fn weight_product(
    gpu: &'static Gpu,
    g: &Gather,
    math: Math,
    source: Slice<'_>,
    target: Slice<'_>,
) -> Result<(DeviceBuffer, usize), CudaError> {
    let ty = source.ty();
    let columns = g.taps() * g.cin();
    let (tile, parts) = plan::weight(g, math, ty);
    let (tiles_m, tiles_n) = (g.cout().div_ceil(tile.m), columns.div_ceil(tile.n));
    let partial = gpu.alloc(parts * g.groups() * g.cout() * columns * sum_size(ty))?;
    let defines = tile.defines(
        math,
        &[
            ("T", ty.name()),
            ("DENSE_VECTOR", flag(by_lines(target.ptr(), g.cout(), ty))),
            ("SOURCE_VECTOR", flag(by_lines(source.ptr(), g.cin(), ty))),
        ],
    );
    let kernel = gpu.module(math.source(&WEIGHT), &defines)?.kernel("conv_weight")?;
    let count = tiles_m.saturating_mul(tiles_n).saturating_mul(g.groups()).saturating_mul(parts);
    let table = 2 * tile.k * size_of::<[i64; 3]>();
    let launch = blocks(count, tile.threads)?.with_shared((tile.stage_bytes(math, ty, false) * tile.stages + table) as u32);
    let aligned = columns.is_multiple_of(tile.group());
    // SAFETY: the lengths of `source` and `target` were checked against the shape that `g` was made of; `partial` holds the sums of all parts.
    unsafe {
        kernel.launch(
            launch,
            &[g, &source.ptr(), &target.ptr(), &partial.ptr(), &(parts as i32), &(tiles_m as i32), &(tiles_n as i32), &(aligned as i32)],
        )?;
    }
    Ok((partial, parts))
}

/// As [`weight_product`].
fn depthwise_weight(gpu: &'static Gpu, g: &Gather, x: Slice<'_>, gy: Slice<'_>) -> Result<(DeviceBuffer, usize), CudaError> {
    let ty = x.ty();
    let units = g.groups().div_ceil(32) * g.taps();
    let parts = plan::parts(units, g.target_pixels().div_ceil(64), 4);
    let partial = gpu.alloc(parts * g.groups() * g.taps() * sum_size(ty))?;
    // The number of channels at once is that of the other kernel of the file.
    let kernel = gpu.module(&DEPTHWISE, &[("T", ty.name()), ("CHANNELS", "1")])?.kernel("conv_depthwise_weight")?;
    let launch = blocks(units.saturating_mul(parts), 256)?;
    // SAFETY: the lengths of `x` and `gy` were checked against the shape that `g` was made of; `partial` holds a sum for each part, channel and tap.
    unsafe { kernel.launch(launch, &[g, &x.ptr(), &gy.ptr(), &partial.ptr(), &(parts as i32)])? };
    Ok((partial, parts))
}
