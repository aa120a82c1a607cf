//! Layer norm and RMS norm over rows.

use super::super::compile::number;
use super::super::fill;
use super::super::memory::{DevicePtr, Slice, SliceMut, Type};
use super::super::reduce::statistics_type;
use super::super::{Arg, CudaError, Gpu, Kernel, Launch, Source};
use super::{Rows, divisor, gradient, parameter};

const SOURCE: Source = Source { name: "norm_rows", text: include_str!("rows.cu") };

/// Threads of a block where several rows share it, and of the blocks that take a long row.
const SHARED_BLOCK: usize = 256;
const LONG_BLOCK: usize = 1024;

/// Rows that a lane sums the parameters' gradients over: enough that the partial sums are little beside the data, no more than keeps f32 exact enough.
const CHAIN: std::ops::RangeInclusive<usize> = 8..=128;

/// The macros of the kernel file.
#[derive(Clone, Copy)]
struct Variant {
    pattern: usize,
    lanes: usize,
    vec: usize,
    items: usize,
    parameters: bool,
}

impl Variant {
    /// A row of `packs` groups of `vec` elements in registers, if `most_lanes` threads with `most` groups each hold it; at best with `wanted` each.
    fn in_registers(pattern: usize, n: usize, vec: usize, wanted: usize, most: usize, most_lanes: usize) -> Option<Self> {
        let packs = n / vec;
        let lanes = packs.div_ceil(wanted).next_power_of_two().min(most_lanes);
        let lanes = if lanes <= 32 || packs.div_ceil(32) > most { lanes } else { 32 };
        let items = packs.div_ceil(lanes);
        (items <= most).then_some(Self { pattern, lanes, vec, items, parameters: false })
    }

    fn threads(self) -> usize {
        if self.lanes > 32 { self.lanes } else { SHARED_BLOCK }
    }

    fn rows_per_block(self) -> usize {
        self.threads() / self.lanes
    }

    fn kernel(self, gpu: &'static Gpu, ty: Type, pointers: &[DevicePtr], name: &str) -> Result<Kernel, CudaError> {
        let aligned = pointers.iter().all(|p| p.is_aligned((self.vec * ty.size()) as u64));
        let defines = [
            ("T", ty.name()),
            ("PATTERN", number(self.pattern)),
            ("LANES", number(self.lanes)),
            ("VEC", number(self.vec)),
            ("ITEMS", number(self.items)),
            ("ALIGNED", number(aligned.into())),
            ("PARAMETERS", number(self.parameters.into())),
        ];
        gpu.module(&SOURCE, &defines)?.kernel(name)
    }
}

fn expect_statistics(ty: Type, mean: Type, rstd: Type) {
    assert!(ty.is_float() && mean == statistics_type(ty) && rstd == mean, "floats, and statistics of their type");
}

/// Normalises each row of `x`, times `weight`, plus `bias` (each of `n` elements), and keeps each row's mean (0 if not centred) and rstd.
#[allow(clippy::too_many_arguments)] // The operands of one formula.
pub fn layer_norm(
    gpu: &'static Gpu,
    rows: Rows,
    x: Slice<'_>,
    weight: Option<Slice<'_>>,
    bias: Option<Slice<'_>>,
    y: SliceMut<'_>,
    mut mean: SliceMut<'_>,
    mut rstd: SliceMut<'_>,
) -> Result<(), CudaError> {
    let (n, ty, count) = (rows.n, x.ty(), mean.len());
    assert!(x.len() == y.len() && y.ty() == ty && count == rstd.len() && x.len() == n * count);
    expect_statistics(ty, mean.ty(), rstd.ty());
    if x.is_empty() {
        fill::fill(gpu, &mut mean, f64::NAN)?;
        return fill::fill(gpu, &mut rstd, f64::NAN);
    }
    let (w, b) = (parameter(weight.as_ref(), ty, n), parameter(bias.as_ref(), ty, n));
    let vec = divisor(n, 16 / ty.size());
    let values = 32 / ty.size().div_ceil(4);
    let long = Variant { pattern: 1, lanes: LONG_BLOCK, vec, items: values / vec / 2, parameters: false };
    let variant = Variant::in_registers(0, n, vec, values / vec / 2, values / vec, 1024).unwrap_or(long);
    let name = if variant.pattern == 0 { "layer_norm_rows" } else { "layer_norm_long_rows" };
    let kernel = variant.kernel(gpu, ty, &[x.ptr(), y.ptr(), w, b], name)?;
    let launch = Launch::blocks(count.div_ceil(variant.rows_per_block()), variant.threads() as u32);
    let centered = i32::from(rows.centered);
    let (count, n) = (count as i64, n as i64);
    // SAFETY: x and y have `count · n` elements, the statistics `count`, and parameters that are there `n`, all checked above.
    unsafe { kernel.launch(launch, &[&x.ptr(), &w, &b, &y.ptr(), &mean.ptr(), &rstd.ptr(), &count, &n, &rows.eps, &centered]) }
}

/// The gradients of input, weight and bias, from that of the output `g`. With h = (x − mean)·rstd:
/// dx = rstd·(g·w − mean(g·w) − h·mean(g·w·h)) (without the second term if not centred), dw = Σ g·h and db = Σ g over the rows.
/// `g` may be one row that stands for all.
#[allow(clippy::too_many_arguments)] // The operands of one formula.
pub fn layer_norm_backward(
    gpu: &'static Gpu,
    rows: Rows,
    g: Slice<'_>,
    x: Slice<'_>,
    weight: Option<Slice<'_>>,
    mean: Slice<'_>,
    rstd: Slice<'_>,
    dx: SliceMut<'_>,
    dw: Option<SliceMut<'_>>,
    db: Option<SliceMut<'_>>,
) -> Result<(), CudaError> {
    let (n, ty, count) = (rows.n, x.ty(), mean.len());
    assert!(dx.len() == x.len() && mean.len() == rstd.len() && x.len() == n * count);
    assert!(g.ty() == ty && dx.ty() == ty && (g.len() == x.len() || g.len() == n));
    expect_statistics(ty, mean.ty(), rstd.ty());
    let w = parameter(weight.as_ref(), ty, n);
    let (dw_ptr, db_ptr) = (gradient(dw.as_ref(), ty, n), gradient(db.as_ref(), ty, n));
    if x.is_empty() {
        return [dw, db].into_iter().flatten().try_for_each(|mut out| gpu.zero(&mut out));
    }
    let wants_parameters = dw.is_some() || db.is_some();
    let g_stride = if g.len() == x.len() { n as i64 } else { 0 };
    let vec = divisor(n, 16 / ty.size());
    let values = 16 / ty.size().div_ceil(4);
    let centered = i32::from(rows.centered);
    let (count_arg, n_arg) = (count as i64, n as i64);
    let pointers = [g.ptr(), x.ptr(), w, dx.ptr()];
    let parts_of = |chains: usize| gpu.alloc(if wants_parameters { chains * 2 * n * statistics_type(ty).size() } else { 0 });
    let (parts, chains) = if let Some(variant) = Variant::in_registers(2, n, vec, (values / 2 / vec).max(1), values / vec, 512) {
        let variant = Variant { parameters: wants_parameters, ..variant };
        let per_block = variant.rows_per_block();
        let chain = count.div_ceil(per_block * 1024).clamp(*CHAIN.start(), *CHAIN.end());
        let blocks = count.div_ceil(per_block * chain);
        let parts = parts_of(blocks)?;
        let kernel = variant.kernel(gpu, ty, &pointers, "layer_norm_backward_rows")?;
        let launch = Launch::blocks(blocks, variant.threads() as u32);
        // SAFETY: g has `count · n` elements, or `n` that are read with stride 0; x and dx have `count · n`, the statistics `count`, the weight `n` if
        // there is one, all checked above, and `parts` 2·n for each block if they are written.
        unsafe {
            kernel.launch(
                launch,
                &[
                    &g.ptr(),
                    &g_stride,
                    &x.ptr(),
                    &w,
                    &mean.ptr(),
                    &rstd.ptr(),
                    &dx.ptr(),
                    &parts.ptr(),
                    &count_arg,
                    &n_arg,
                    &(chain as i64),
                    &centered,
                ],
            )?;
        }
        (parts, blocks)
    } else {
        let long = Variant { pattern: 3, lanes: LONG_BLOCK, vec, items: 1, parameters: false };
        let kernel = long.kernel(gpu, ty, &pointers, "layer_norm_backward_long_rows")?;
        let launch = Launch::blocks(count, LONG_BLOCK as u32);
        // SAFETY: as above.
        unsafe {
            let args: [&dyn Arg; 10] =
                [&g.ptr(), &g_stride, &x.ptr(), &w, &mean.ptr(), &rstd.ptr(), &dx.ptr(), &count_arg, &n_arg, &centered];
            kernel.launch(launch, &args)?;
        }
        // Eight lanes of rows share a chain.
        let chain = 8 * count.div_ceil(8 * 64).clamp(*CHAIN.start(), *CHAIN.end());
        let chains = count.div_ceil(chain);
        let parts = parts_of(chains)?;
        if wants_parameters {
            let columns = Variant { pattern: 4, lanes: 32, vec, items: 1, parameters: true };
            let kernel = columns.kernel(gpu, ty, &pointers, "layer_norm_parameter_columns")?;
            let launch = Launch::blocks((n / vec).div_ceil(32) * chains, 256);
            // SAFETY: as above, and `parts` has 2·n sums for each chain.
            unsafe {
                let args: [&dyn Arg; 9] =
                    [&g.ptr(), &g_stride, &x.ptr(), &mean.ptr(), &rstd.ptr(), &parts.ptr(), &count_arg, &n_arg, &(chain as i64)];
                kernel.launch(launch, &args)?;
            }
        }
        (parts, chains)
    };
    if !wants_parameters {
        return Ok(());
    }
    let total = Variant { pattern: 5, lanes: 32, vec: 1, items: 1, parameters: true };
    let kernel = total.kernel(gpu, ty, &[], "layer_norm_parameters")?;
    let launch = Launch::blocks((2 * n).div_ceil(32), 1024);
    // SAFETY: `parts` has 2·n sums for each chain, and the gradients that are there `n` elements.
    unsafe { kernel.launch(launch, &[&parts.ptr(), &(chains as i64), &n_arg, &dw_ptr, &db_ptr]) }
}
