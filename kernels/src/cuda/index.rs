//! Reading and writing at positions that are data, on a GPU: index_select, index_add, gather, scatter, nonzero; and triangles of matrices.
//!
//! A kernel cannot return an error without making the host wait, so range checks are apart: [`bounds`] gives the least and the greatest position, once, and whoever holds the
//! index remembers them. The other functions take checked positions. None leaves its arrays for others: they read as zero and write nothing.
//!
//! Sums take their sources in the order of the index. Positions are sorted for that (stably, by digits), and each target sums its own: no atomics on floats.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Arg, Launch, Module, impl_arg};
use super::memory::{DeviceBuffer, DevicePtr, Slice, SliceMut, Strided, Type, View};
use super::sort;
use crate::cpu::index::Triangle;

const SOURCE: Source = Source { name: "index", text: include_str!("index.cu") };
const THREADS: u32 = 256;
/// Columns that a thread takes: `COLUMNS_EACH` of the kernel file.
const COLUMNS_EACH: usize = 8;
/// Elements of a block that looks for nonzero ones: `CHUNK` of the kernel file.
const CHUNK: usize = 4096;

/// A target of more sources is summed by a block; one stands at every so many sources: as in the kernel file.
const LONG: usize = 128;
const SPACING: usize = 64;

/// `Rows` of the kernel file.
#[repr(C)]
struct Rows {
    rows: i64,
    columns: i64,
    lanes: i32,
    parts: i32,
}

/// `Extents` of the kernel file.
#[repr(C)]
struct Extents {
    rank: i32,
    shape: [i64; 8],
}
impl_arg!(Rows, Extents);

impl Rows {
    fn new(rows: usize, columns: usize) -> (Self, Launch) {
        let fewest = columns.next_power_of_two().min(32);
        let lanes = columns.div_ceil(COLUMNS_EACH).next_power_of_two().clamp(fewest, THREADS as usize);
        let parts = columns.div_ceil(lanes * COLUMNS_EACH);
        let blocks = rows.div_ceil(THREADS as usize / lanes) * parts;
        let shape = Self { rows: rows as i64, columns: columns as i64, lanes: lanes as i32, parts: parts as i32 };
        (shape, Launch::blocks(blocks, THREADS))
    }
}

fn index_module(gpu: &'static Gpu) -> Result<Module, CudaError> {
    gpu.module(&SOURCE, &[("INDEX", "1")])
}

/// The kernels that move words of so many bytes.
fn move_module(gpu: &'static Gpu, bytes: usize) -> Result<Module, CudaError> {
    match bytes {
        1 => gpu.module(&SOURCE, &[("T", "u8"), ("MOVE", "1")]),
        2 => gpu.module(&SOURCE, &[("T", "u16"), ("MOVE", "1")]),
        4 => gpu.module(&SOURCE, &[("T", "u32"), ("MOVE", "1")]),
        8 => gpu.module(&SOURCE, &[("T", "u64"), ("MOVE", "1")]),
        _ => gpu.module(&SOURCE, &[("WIDE", "1"), ("MOVE", "1")]),
    }
}

/// The least and the greatest position; `None` if there are none. Waits for all that is queued.
pub fn bounds(gpu: &'static Gpu, index: Slice<'_>) -> Result<Option<(i64, i64)>, CudaError> {
    assert_eq!(index.ty(), Type::I64);
    if index.is_empty() {
        return Ok(None);
    }
    let bytes = |least: i64, greatest: i64| [least.to_le_bytes(), greatest.to_le_bytes()];
    let found = gpu.upload(bytes(i64::MAX, i64::MIN).as_flattened())?;
    let launch = Launch::over(index.len().div_ceil(4), THREADS);
    let kernel = index_module(gpu)?.kernel("bounds")?;
    // SAFETY: the index has `len` positions, `found` two numbers.
    unsafe { kernel.launch(launch, &[&index.ptr(), &(index.len() as i64), &found.ptr()])? };
    let mut result = bytes(0, 0);
    gpu.download(&found, 0, result.as_flattened_mut())?;
    Ok(Some((i64::from_le_bytes(result[0]), i64::from_le_bytes(result[1]))))
}

/// `out[o, j, ..] = src[o, index[j], ..]` for `src` of shape `[outer, n, inner]`.
///
/// # Panics
/// If a length does not fit the shape, or types differ.
pub fn index_select(
    gpu: &'static Gpu,
    src: Slice<'_>,
    shape: [usize; 3],
    index: Slice<'_>,
    out: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let [outer, n, inner] = shape;
    assert!(src.len() == outer * n * inner && out.len() == outer * index.len() * inner, "lengths");
    assert!(src.ty() == out.ty() && index.ty() == Type::I64, "types");
    if out.is_empty() {
        return Ok(());
    }
    // Words as wide as rows and addresses allow.
    let row = inner * src.ty().size();
    let word = [16, 8, 4, 2]
        .into_iter()
        .find(|&w| row.is_multiple_of(w) && src.ptr().is_aligned(w as u64) && out.ptr().is_aligned(w as u64))
        .unwrap_or(1);
    let (rows, launch) = Rows::new(outer * index.len(), row / word);
    let kernel = move_module(gpu, word)?.kernel("select_rows")?;
    // SAFETY: rows of `src` and `out` are `row` bytes long; `src` has `outer * n` of them and `out` `outer * len`, as many as were counted. The kernel reads no row beyond `n`.
    unsafe { kernel.launch(launch, &[&src.ptr(), &index.ptr(), &out.ptr(), &rows, &(index.len() as i64), &(n as i64)]) }
}

/// `out[o, index[j], ..] += src[o, j, ..]` for `out` of shape `[outer, n, inner]`, j ascending. Sums of f16 and bf16 are rounded once.
///
/// # Errors
/// If the index has 2³² − 1 positions or more, or n is as large.
///
/// # Panics
/// If a length does not fit the shape, or types differ or are not numbers.
pub fn index_add(gpu: &'static Gpu, out: &mut SliceMut<'_>, shape: [usize; 3], index: Slice<'_>, src: Slice<'_>) -> Result<(), CudaError> {
    let [outer, n, inner] = shape;
    assert!(out.len() == outer * n * inner && src.len() == outer * index.len() * inner, "lengths");
    assert!(src.ty() == out.ty() && index.ty() == Type::I64 && src.ty() != Type::Bool, "types");
    if src.is_empty() {
        return Ok(());
    }
    fits_keys(n)?;
    let count = index.len();
    let keys = gpu.alloc(count * 4)?;
    let kernel = index_module(gpu)?.kernel("position_keys")?;
    // SAFETY: as many keys as positions.
    unsafe { kernel.launch(Launch::over(count, THREADS), &[&index.ptr(), &(count as i64), &(n as i64), &keys.ptr()])? };
    add_sorted(gpu, out, [outer, n, inner], &keys, count, src)
}

/// An error unless keys of 32 bits can tell `n` targets and one more apart.
fn fits_keys(n: usize) -> Result<(), CudaError> {
    match u32::try_from(n) {
        Ok(n) if n < u32::MAX => Ok(()),
        _ => Err(CudaError::Unavailable(format!("adding into {n} places: a GPU tells fewer than 2^32 - 1 apart"))),
    }
}

/// Adds each source to the target that its key names; a key of n names none.
fn add_sorted(
    gpu: &'static Gpu,
    out: &mut SliceMut<'_>,
    [outer, n, inner]: [usize; 3],
    keys: &DeviceBuffer,
    count: usize,
    src: Slice<'_>,
) -> Result<(), CudaError> {
    let sorted = sort::sort_pairs(gpu, keys, count, usize::BITS - n.leading_zeros())?;
    let vector = 16 / src.ty().size();
    let aligned = inner.is_multiple_of(vector) && src.ptr().is_aligned(16) && out.ptr().is_aligned(16);
    let (name, threads) = match inner {
        0..32 => ("add_narrow", outer * count * inner),
        _ if aligned => ("add_vectors", outer * count * inner.div_ceil(32 * vector) * 32),
        _ => ("add_single", outer * count * inner.div_ceil(32) * 32),
    };
    let module = gpu.module(&SOURCE, &[("T", src.ty().name()), ("SUM", "1")])?;
    let sizes = [count, n, inner, outer].map(|x| x as i64);
    let width = inner.next_power_of_two().min(128);
    let args: [&dyn Arg; 9] =
        [&sorted.keys.ptr(), &sorted.places.ptr(), &sizes[0], &sizes[1], &sizes[2], &sizes[3], &src.ptr(), &out.ptr(), &(width as i32)];
    // SAFETY: sorted keys and places are `count` long, and the places below it; the shapes are those of `src` and `out`, as the callers checked.
    unsafe {
        module.kernel(name)?.launch(Launch::over(threads, THREADS), &args[..8])?;
        if count > LONG {
            let blocks = inner.div_ceil(width) * outer * count.div_ceil(SPACING);
            module.kernel("add_long")?.launch(Launch::blocks(blocks, THREADS), &args)?;
        }
    }
    Ok(())
}

/// `strides` with that of dimension `dim` set to zero: the index supplies it.
fn without_dim(strides: &[usize], dim: usize) -> [usize; 8] {
    let mut without = [0; 8];
    without.iter_mut().zip(strides).enumerate().filter(|(d, _)| *d != dim).for_each(|(_, (to, &stride))| *to = stride);
    without
}

fn row_major(shape: &[usize]) -> [usize; 8] {
    let mut strides = [1; 8];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d].max(1);
    }
    strides
}

/// `out[i] = src[i with coordinate dim replaced by index[i]]` for every index i of `shape`, the shape of `index` and `out`, which is
/// nowhere larger than `src`'s except in `dim`.
///
/// # Panics
/// If ranks, lengths, extents or types do not fit.
pub fn gather(
    gpu: &'static Gpu,
    src: View<'_>,
    dim: usize,
    index: Slice<'_>,
    shape: &[usize],
    out: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(shape.len() == src.shape().len() && (0..shape.len()).all(|d| d == dim || shape[d] <= src.shape()[d]), "extents");
    assert!(index.len() == out.len() && out.len() == shape.iter().product(), "lengths");
    assert!(src.ty() == out.ty() && index.ty() == Type::I64, "types");
    if out.is_empty() {
        return Ok(());
    }
    let view = Strided::new(shape, &without_dim(src.strides(), dim)[..shape.len()]);
    let (extent, stride, n) = (src.shape()[dim] as i64, src.strides()[dim] as i64, out.len() as i64);
    let kernel = move_module(gpu, src.ty().size())?.kernel("gather")?;
    // SAFETY: the other coordinates lie inside of `src`, whose extent in `dim` the kernel does not leave; index and output have `n` elements.
    unsafe { kernel.launch(Launch::over(out.len(), THREADS), &[&src.ptr(), &view, &extent, &stride, &index.ptr(), &out.ptr(), &n]) }
}

/// Where the sources of a scatter go.
struct Targets<'a> {
    index: Slice<'a>,
    /// Of the target, without the dimension that the index supplies.
    view: Strided,
    extent: i64,
    stride: i64,
    n: i64,
    /// Elements of the target.
    numel: usize,
    /// Sources along the dimension, and the number of other coordinates.
    sources: usize,
    columns: usize,
}

impl<'a> Targets<'a> {
    fn new(out: &SliceMut<'_>, out_shape: &[usize], dim: usize, index: Slice<'a>, shape: &[usize], src: Slice<'_>) -> Self {
        assert!(shape.len() == out_shape.len() && (0..shape.len()).all(|d| d == dim || shape[d] <= out_shape[d]), "extents");
        let numel = shape.iter().product();
        assert!(out.len() == out_shape.iter().product() && index.len() == src.len() && src.len() == numel, "lengths");
        assert!(src.ty() == out.ty() && index.ty() == Type::I64, "types");
        let strides = row_major(out_shape);
        Self {
            index,
            view: Strided::new(shape, &without_dim(&strides, dim)[..shape.len()]),
            extent: out_shape[dim] as i64,
            stride: strides[dim] as i64,
            n: numel as i64,
            numel: out.len(),
            sources: shape[dim],
            columns: numel / shape[dim].max(1),
        }
    }

    fn launch(&self) -> Launch {
        Launch::over(self.n as usize, THREADS)
    }
}

/// `out[i with coordinate dim replaced by index[i]] = src[i]` for every index i of `shape`, the shape of `index` and `src`: along `dim`
/// the last of several wins. `out_shape` is nowhere smaller than `shape` except in `dim`.
///
/// # Errors
/// If there are 2³² − 1 sources or more.
///
/// # Panics
/// If ranks, lengths, extents or types do not fit.
pub fn scatter(
    gpu: &'static Gpu,
    out: &mut SliceMut<'_>,
    out_shape: &[usize],
    dim: usize,
    index: Slice<'_>,
    shape: &[usize],
    src: Slice<'_>,
) -> Result<(), CudaError> {
    let to = Targets::new(out, out_shape, dim, index, shape, src);
    if src.is_empty() {
        return Ok(());
    }
    let winners = if to.sources > 1 {
        fits_keys(src.len())?;
        let mut winners = gpu.alloc(to.numel * 4)?;
        if let Some(mut winners) = SliceMut::new(&mut winners, Type::I32, 0, to.numel) {
            gpu.zero(&mut winners)?;
        }
        let kernel = index_module(gpu)?.kernel("find_winners")?;
        // SAFETY: the other coordinates lie inside of the target, whose extent in `dim` the kernel does not leave; there is a winner for each of its elements.
        unsafe { kernel.launch(to.launch(), &[&to.view, &to.extent, &to.stride, &to.index.ptr(), &to.n, &winners.ptr()])? };
        Some(winners)
    } else {
        None
    };
    let winners = winners.as_ref().map_or(DevicePtr::NULL, |winners| winners.ptr());
    let kernel = move_module(gpu, src.ty().size())?.kernel("scatter")?;
    // SAFETY: as above; sources and index have `n` elements.
    unsafe {
        let args: [&dyn Arg; 8] = [&src.ptr(), &to.view, &to.extent, &to.stride, &to.index.ptr(), &out.ptr(), &winners, &to.n];
        kernel.launch(to.launch(), &args)
    }
}

/// As [`scatter`], but adds. f16 and bf16 are not taken: they would be rounded at each step.
///
/// # Errors
/// If there are 2³² − 1 sources or more.
///
/// # Panics
/// If ranks, lengths, extents or types do not fit.
pub fn scatter_add(
    gpu: &'static Gpu,
    out: &mut SliceMut<'_>,
    out_shape: &[usize],
    dim: usize,
    index: Slice<'_>,
    shape: &[usize],
    src: Slice<'_>,
) -> Result<(), CudaError> {
    let to = Targets::new(out, out_shape, dim, index, shape, src);
    assert!(!matches!(src.ty(), Type::F16 | Type::BF16 | Type::Bool), "types");
    if src.is_empty() {
        return Ok(());
    }
    // A thread each for the other coordinates, if they are many or have little to do; else the sources are sorted by where they go.
    if to.sources <= 32 || to.columns >= 1 << 15 {
        let mut others = [0; 8];
        let others = &mut others[..shape.len()];
        others.copy_from_slice(shape);
        others[dim] = 1;
        let (from_strides, to_strides) = (row_major(shape), row_major(out_shape));
        let [from, target] = Strided::together(others, [&from_strides[..shape.len()], &to_strides[..shape.len()]]);
        let sizes = [to.columns, to.sources, from_strides[dim]].map(|x| x as i64);
        let kernel = gpu.module(&SOURCE, &[("T", src.ty().name()), ("SUM", "1")])?.kernel("scatter_add_columns")?;
        // SAFETY: the other coordinates lie inside of sources and target; the kernel leaves neither's extent in `dim`.
        unsafe {
            let args: [&dyn Arg; 10] =
                [&from, &target, &sizes[0], &sizes[1], &sizes[2], &to.extent, &to.stride, &to.index.ptr(), &src.ptr(), &out.ptr()];
            return kernel.launch(Launch::over(to.columns, THREADS), &args);
        }
    }
    fits_keys(to.numel)?;
    let keys = gpu.alloc(src.len() * 4)?;
    let kernel = index_module(gpu)?.kernel("place_keys")?;
    // SAFETY: as many keys as positions.
    unsafe {
        let args: [&dyn Arg; 7] = [&to.view, &to.extent, &to.stride, &to.index.ptr(), &to.n, &(to.numel as i64), &keys.ptr()];
        kernel.launch(to.launch(), &args)?;
    }
    add_sorted(gpu, out, [1, to.numel, 1], &keys, src.len(), src)
}

/// The coordinates of the elements that are not zero (NaN is not), in row-major order: `shape.len()` numbers (i64) each; and how many elements there are.
/// Waits for all that is queued.
///
/// # Panics
/// If the shape does not fit, or has more than eight dimensions.
pub fn nonzero(gpu: &'static Gpu, x: Slice<'_>, shape: &[usize]) -> Result<(DeviceBuffer, usize), CudaError> {
    assert!(x.len() == shape.iter().product() && shape.len() <= 8);
    if x.is_empty() {
        return Ok((gpu.alloc(0)?, 0));
    }
    let chunks = x.len().div_ceil(CHUNK);
    let (counts, starts) = (gpu.alloc(chunks * 4)?, gpu.alloc((chunks + 1) * 8)?);
    let module = gpu.module(&SOURCE, &[("T", x.ty().name()), ("SCAN", "1")])?;
    let (each, n) = (Launch::blocks(chunks, THREADS), x.len() as i64);
    // SAFETY: the slice has `n` elements; there are as many counts as chunks, and one start more.
    unsafe {
        module.kernel("count_nonzero")?.launch(each, &[&x.ptr(), &n, &counts.ptr()])?;
        module.kernel("scan_nonzero")?.launch(Launch::blocks(1, THREADS), &[&counts.ptr(), &(chunks as i64), &starts.ptr()])?;
    }
    let mut bytes = [0; 8];
    gpu.download(&starts, chunks * 8, &mut bytes)?;
    let found = i64::from_le_bytes(bytes) as usize;
    let out = gpu.alloc(found * shape.len() * 8)?;
    let mut extents = Extents { rank: shape.len() as i32, shape: [1; 8] };
    extents.shape.iter_mut().zip(shape).for_each(|(to, &extent)| *to = extent as i64);
    // SAFETY: as above; the output has room for what was counted.
    unsafe { module.kernel("write_nonzero")?.launch(each, &[&x.ptr(), &n, &starts.ptr(), &extents, &out.ptr()])? };
    Ok((out, found))
}

/// Copies the kept part of each matrix of `rows` × `cols` and zeroes the rest.
///
/// # Panics
/// If lengths or types differ.
pub fn triangle(
    gpu: &'static Gpu,
    x: Slice<'_>,
    rows: usize,
    cols: usize,
    kept: Triangle,
    out: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    assert!(x.len() == out.len() && x.ty() == out.ty());
    if out.is_empty() {
        return Ok(());
    }
    let (from, to) = match kept {
        Triangle::Lower(k) => (i64::MIN, (k as i64).saturating_add(1)),
        Triangle::Upper(k) => (k as i64, i64::MAX),
    };
    let (shape, launch) = Rows::new(x.len() / cols, cols);
    let kernel = move_module(gpu, x.ty().size())?.kernel("triangle")?;
    // SAFETY: both slices have the rows and columns that were counted.
    unsafe { kernel.launch(launch, &[&x.ptr(), &out.ptr(), &shape, &(rows as i64), &from, &to]) }
}

/// `out[i, index[i]] = 1` and zero elsewhere, for `out` (i64) of shape `[len, classes]`.
///
/// # Panics
/// If the lengths do not fit.
pub fn one_hot(gpu: &'static Gpu, index: Slice<'_>, classes: usize, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert!(out.len() == index.len() * classes && index.ty() == Type::I64 && out.ty() == Type::I64);
    if out.is_empty() {
        return Ok(());
    }
    let (shape, launch) = Rows::new(index.len(), classes);
    let kernel = index_module(gpu)?.kernel("one_hot")?;
    // SAFETY: a row of `classes` elements for each position.
    unsafe { kernel.launch(launch, &[&index.ptr(), &out.ptr(), &shape]) }
}

#[cfg(test)]
mod tests;
