//! Reading and writing at positions that are data. Positions are i64 tensors; one that is out of range is an error that names it.
//! Where several sources meet in one element, they are taken in the order of the index: results are the same on any number of threads.
//!
//! On a GPU a kernel cannot return an error, so an index is looked through before: once, its limits stay with its memory. Nothing waits for that if
//! the values came from the host, or from an operation that knows what it makes (`argsort`, `randint`, `arange`, …).

use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::storage::Storage;
use crate::{Bool, DType, Device, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::index::{self as kernel, OutOfRange};
use kiln_kernels::cuda::index as gpu_kernel;
use kiln_kernels::cuda::{CudaError, Gpu, SliceMut};

/// The index as a row-major i64 tensor of the device.
fn positions(op: &str, index: &Tensor, device: Device) -> Result<Tensor> {
    if index.dtype() != DType::I64 {
        return Err(Error::unsupported_dtype(op, index.dtype(), "i64 positions"));
    }
    let dense = index.to_device(device)?.contiguous()?;
    // Limits of all elements are limits of those that were copied.
    if let Some(bounds) = index.storage().known_bounds() {
        dense.storage().set_bounds(bounds);
    }
    Ok(dense)
}

/// [`positions`] of one dimension.
fn positions_1d(op: &str, index: &Tensor, device: Device) -> Result<Tensor> {
    if index.rank() != 1 {
        return Err(Error::shape(op, format!("expected an index of one dimension, got shape {}", index.shape())));
    }
    positions(op, index, device)
}

/// An error that names the first position of a GPU's index that is outside of `0..size`.
fn expect_in_range(op: &'static str, index: &Tensor, size: usize) -> Result<()> {
    if index.numel() == 0 || index.storage().bounds()?.is_some_and(|(least, greatest)| least >= 0 && (greatest as u64) < size as u64) {
        return Ok(());
    }
    kernel::check_indices(&index.to_vec::<i64>()?, size).map_err(out_of_range(op))
}

/// The elements that a GPU's kernel picked from `source`, in its dtype.
fn picked(
    gpu: &'static Gpu,
    source: &Tensor,
    shape: &Shape,
    pick: impl FnOnce(&mut SliceMut<'_>) -> std::result::Result<(), CudaError>,
) -> Result<Tensor> {
    let out = Tensor::build_on_gpu(gpu, Layout::contiguous(*shape), source.dtype(), |mut out| Ok(pick(&mut out)?))?;
    if let Some(bounds) = source.storage().known_bounds() {
        out.storage().set_bounds(bounds);
    }
    Ok(out)
}

fn expect_number(op: &str, dtype: DType) -> Result<()> {
    if dtype == DType::Bool { Err(Error::unsupported_dtype(op, dtype, "a numeric dtype")) } else { Ok(()) }
}

fn out_of_range(op: &'static str) -> impl Fn(OutOfRange) -> Error {
    move |e| Error::index(op, e.to_string()).with_source(e)
}

struct IndexSelect {
    dim: usize,
    index: Tensor,
    from: Shape,
}

impl Op for IndexSelect {
    fn name(&self) -> &'static str {
        "index_select"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(index_sum(self.from, self.dim, &self.index, grad)?)])
    }
}

struct IndexAdd {
    dim: usize,
    index: Tensor,
}

/// `index_add` to zeros, in place: the gradient of a selection.
struct IndexSum {
    dim: usize,
    index: Tensor,
}

impl Op for IndexSum {
    fn name(&self) -> &'static str {
        "index_add"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.index_select(self.dim as isize, &self.index)?)])
    }
}

/// Zeros of `shape` to whose slices `index` (row-major, in range) of dimension `dim` those of `source` were added.
pub(crate) fn index_sum(shape: Shape, dim: usize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
    let out = index_add_to(Tensor::zeros(shape, source)?, dim, index, source)?;
    record("index_add", out, &[source], |_| IndexSum { dim, index: index.clone() })
}

/// Sources that are added at places: each is read, as is what is there, and the sum written.
fn moved(source: &Tensor, index: &Tensor) -> Cost {
    Cost::flops(source.numel() as u64).bytes((3 * source.numel() * source.dtype().size() + 8 * index.numel()) as u64)
}

/// `out` with the slices of `source` added, untracked. The index is row-major, and its length fits.
fn index_add_to(mut out: Tensor, dim: usize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
    let _running = operation("index_add", &[source, index], || moved(source, index));
    let (outer, n, inner) = out.shape().around(dim);
    let dense = source.detach().contiguous()?;
    match out.gpu()? {
        Some(gpu) => {
            expect_number("index_add", out.dtype())?;
            expect_in_range("index_add", index, n)?;
            gpu_kernel::index_add(gpu, &mut out.gpu_slice_mut()?, [outer, n, inner], index.gpu_slice()?, dense.gpu_slice()?)?;
        }
        None => for_number!(out.dtype(), "index_add", T => {
            kernel::index_add(out.as_slice_mut::<T>()?, [outer, n, inner], index.as_slice()?, dense.as_slice()?)
                .map_err(out_of_range("index_add"))
        })?,
    }
    Ok(out)
}

impl Op for IndexAdd {
    fn name(&self) -> &'static str {
        "index_add"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let source = ctx.needs(1).then(|| grad.index_select(self.dim as isize, &self.index)).transpose()?;
        Ok(vec![Some(grad.clone()), source])
    }
}

struct Gather {
    dim: usize,
    index: Tensor,
    from: Shape,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(scatter_sum(self.from, self.dim, &self.index, grad)?)])
    }
}

struct ScatterAdd {
    dim: usize,
    index: Tensor,
}

/// `scatter_add` to zeros, in place: the gradient of a gathering.
struct ScatterSum {
    dim: usize,
    index: Tensor,
}

impl Op for ScatterSum {
    fn name(&self) -> &'static str {
        "scatter_add"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.gather(self.dim as isize, &self.index)?)])
    }
}

/// Whether sums of a tensor's elements must be kept in f32: a GPU's kernel adds to elements in memory.
fn is_summed_widened(x: &Tensor) -> bool {
    x.device() != Device::Cpu && matches!(x.dtype(), DType::F16 | DType::BF16)
}

/// Zeros of `shape` with `source` added where `index` says. f16 and bf16 are summed in f32.
fn scatter_sum(shape: Shape, dim: usize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
    if is_summed_widened(source) {
        return scatter_sum(shape, dim, index, &source.to_dtype(DType::F32)?)?.to_dtype(source.dtype());
    }
    let out = scatter_add_to(Tensor::zeros(shape, source)?, dim, index, source)?;
    record("scatter_add", out, &[source], |_| ScatterSum { dim, index: index.clone() })
}

/// `out` with `source` added where `index` says, untracked. The index is row-major, and the shapes fit.
fn scatter_add_to(mut out: Tensor, dim: usize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
    let _running = operation("scatter_add", &[source, index], || moved(source, index));
    let (dense, shape) = (source.detach().contiguous()?, *out.shape());
    match out.gpu()? {
        Some(gpu) => {
            expect_number("scatter_add", out.dtype())?;
            expect_in_range("scatter_add", index, shape[dim])?;
            let (at, source) = (index.gpu_slice()?, dense.gpu_slice()?);
            gpu_kernel::scatter_add(gpu, &mut out.gpu_slice_mut()?, shape.dims(), dim, at, index.dims(), source)?;
        }
        None => for_number!(out.dtype(), "scatter_add", T => {
            kernel::scatter_add(out.as_slice_mut::<T>()?, shape.dims(), dim, index.as_slice()?, index.dims(), dense.as_slice()?)
                .map_err(out_of_range("scatter_add"))
        })?,
    }
    Ok(out)
}

impl Op for ScatterAdd {
    fn name(&self) -> &'static str {
        "scatter_add"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let source = ctx.needs(1).then(|| grad.gather(self.dim as isize, &self.index)).transpose()?;
        Ok(vec![Some(grad.clone()), source])
    }
}

/// What was overwritten gets no gradient: the elements of the target that the index names, and the sources that a later one replaced.
struct Scatter {
    dim: usize,
    index: Tensor,
    /// Ones for the sources that remain, saved if the source is tracked.
    remain: Option<Tensor>,
}

impl Op for Scatter {
    fn name(&self) -> &'static str {
        "scatter"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let dim = self.dim as isize;
        let target = ctx.needs(0).then(|| grad.scatter(dim, &self.index, &Tensor::zeros(self.index.shape(), grad)?)).transpose()?;
        let source = self.remain.as_ref().filter(|_| ctx.needs(1)).map(|remain| grad.gather(dim, &self.index)?.mul(remain)).transpose()?;
        Ok(vec![target, source])
    }
}

/// Ones where a source of a scatter is the last at its place, else zeros.
fn remaining(dim: usize, index: &Tensor, target: &Shape, dtype: DType) -> Result<Tensor> {
    let numbers = Tensor::arange(0.0, index.numel() as f64, 1.0, index)?.reshape(index.shape())?;
    let last = Tensor::zeros(target, index)?.scatter(dim as isize, index, &numbers)?.gather(dim as isize, index)?;
    last.eq(&numbers)?.to_dtype(dtype)
}

impl Tensor {
    /// The slices of dimension `dim` that `index` (i64, one dimension) names, in its order.
    pub fn index_select(&self, dim: isize, index: &Tensor) -> Result<Tensor> {
        let _running = operation("index_select", &[self, index], || {
            let rows = self.numel().checked_div(self.dim(dim).unwrap_or(0)).unwrap_or(0) * index.numel();
            Cost::NONE.bytes((2 * rows * self.dtype().size() + 8 * index.numel()) as u64)
        });
        let dim = self.shape().dim("index_select", dim)?;
        let index = positions_1d("index_select", index, self.device())?;
        let (outer, n, inner) = self.shape().around(dim);
        let shape = self.shape().with_dim(dim, index.numel())?;
        let dense = self.detach().contiguous()?;
        let out = match self.gpu()? {
            Some(gpu) => {
                expect_in_range("index_select", &index, n)?;
                let (source, index) = (dense.gpu_slice()?, index.gpu_slice()?);
                picked(gpu, &dense, &shape, |out| gpu_kernel::index_select(gpu, source, [outer, n, inner], index, out))
            }
            None => for_any!(self.dtype(), T => Tensor::build::<T>(Device::Cpu, &shape, |out| {
                kernel::index_select(dense.as_slice::<T>()?, [outer, n, inner], index.as_slice()?, out).map_err(out_of_range("index_select"))
            })),
        }?;
        record("index_select", out, &[self], |_| IndexSelect { dim, index, from: *self.shape() })
    }

    /// A copy to whose slice `index[j]` of dimension `dim` the slice j of `source` was added, for each j. f16 and bf16 are summed in f32.
    pub fn index_add(&self, dim: isize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        self.expect_same("index_add", source)?;
        let dim = self.shape().dim("index_add", dim)?;
        let index = positions_1d("index_add", index, self.device())?;
        if self.shape().with_dim(dim, index.numel())? != *source.shape() {
            let message = format!(
                "a source of shape {} does not fit {} slices of dimension {dim} of shape {}",
                source.shape(),
                index.numel(),
                self.shape()
            );
            return Err(Error::shape("index_add", message));
        }
        let out = index_add_to(self.detach().copy()?, dim, &index, source)?;
        record("index_add", out, &[self, source], |_| IndexAdd { dim, index })
    }

    /// An error unless `index` fits: as many dimensions, and nowhere but in `dim` larger than the tensor.
    fn check_index_shape(&self, op: &str, dim: usize, index: &Tensor) -> Result<()> {
        let fits = index.rank() == self.rank() && (0..self.rank()).all(|d| d == dim || index.dims()[d] <= self.dims()[d]);
        if fits {
            return Ok(());
        }
        let message = format!("an index of shape {} is larger than shape {} in another dimension than {dim}", index.shape(), self.shape());
        Err(Error::shape(op, message))
    }

    /// For every index i of `index` (i64): the element whose coordinate `dim` is `index[i]` and whose others are i's.
    /// `index` has as many dimensions as the tensor and is nowhere larger, except in `dim`. PyTorch's `take_along_dim` is the same.
    pub fn gather(&self, dim: isize, index: &Tensor) -> Result<Tensor> {
        let _running = operation("gather", &[self, index], || Cost::NONE.bytes((index.numel() * (2 * self.dtype().size() + 8)) as u64));
        let dim = self.shape().dim("gather", dim)?;
        let index = positions("gather", index, self.device())?;
        self.check_index_shape("gather", dim, &index)?;
        let out = match self.gpu()? {
            Some(gpu) => {
                expect_in_range("gather", &index, self.shape()[dim])?;
                let (source, at) = (self.gpu_view()?, index.gpu_slice()?);
                picked(gpu, self, index.shape(), |out| gpu_kernel::gather(gpu, source, dim, at, index.dims(), out))
            }
            None => for_any!(self.dtype(), T => Tensor::build::<T>(Device::Cpu, index.shape(), |out| {
                kernel::gather(self.view_of::<T>()?, dim, index.as_slice()?, index.dims(), out).map_err(out_of_range("gather"))
            })),
        }?;
        record("gather", out, &[self], |_| Gather { dim, index, from: *self.shape() })
    }

    /// A copy in which, for every index i of `index` (i64), the element whose coordinate `dim` is `index[i]` and whose others are i's is `source[i]`:
    /// the last of several in `dim`'s order. `source` has the shape of `index`.
    pub fn scatter(&self, dim: isize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        let (dim, index) = self.scatter_arguments("scatter", dim, index, source)?;
        let dense = source.detach().contiguous()?;
        let mut out = self.detach().copy()?;
        let _running = operation("scatter", &[source, &index], || Cost::NONE.bytes((index.numel() * (2 * self.dtype().size() + 8)) as u64));
        match self.gpu()? {
            Some(gpu) => {
                expect_in_range("scatter", &index, self.shape()[dim])?;
                let (at, source) = (index.gpu_slice()?, dense.gpu_slice()?);
                gpu_kernel::scatter(gpu, &mut out.gpu_slice_mut()?, self.dims(), dim, at, index.dims(), source)?;
            }
            None => for_any!(self.dtype(), T => {
                kernel::scatter(out.as_slice_mut::<T>()?, self.dims(), dim, index.as_slice()?, index.dims(), dense.as_slice()?)
                    .map_err(out_of_range("scatter"))
            })?,
        }
        let remain = match source.is_tracked() {
            true => Some(remaining(dim, &index, self.shape(), self.dtype())?),
            false => None,
        };
        record("scatter", out, &[self, source], |_| Scatter { dim, index, remain })
    }

    /// As [`scatter`](Tensor::scatter), but adds. f16 and bf16 are summed in f32.
    pub fn scatter_add(&self, dim: isize, index: &Tensor, source: &Tensor) -> Result<Tensor> {
        if is_summed_widened(self) {
            self.expect_same("scatter_add", source)?;
            return self.to_dtype(DType::F32)?.scatter_add(dim, index, &source.to_dtype(DType::F32)?)?.to_dtype(self.dtype());
        }
        let (dim, index) = self.scatter_arguments("scatter_add", dim, index, source)?;
        let out = scatter_add_to(self.detach().copy()?, dim, &index, source)?;
        record("scatter_add", out, &[self, source], |_| ScatterAdd { dim, index })
    }

    /// The checks of a scatter: dimension and positions.
    fn scatter_arguments(&self, op: &str, dim: isize, index: &Tensor, source: &Tensor) -> Result<(usize, Tensor)> {
        self.expect_same(op, source)?;
        let dim = self.shape().dim(op, dim)?;
        let index = positions(op, index, self.device())?;
        self.check_index_shape(op, dim, &index)?;
        if index.shape() != source.shape() {
            return Err(Error::shape(op, format!("the index has shape {}, the source {}", index.shape(), source.shape())));
        }
        Ok((dim, index))
    }

    /// The elements where `mask` (bool, broadcast to this tensor's shape) is true, in row-major order, as one dimension.
    pub fn masked_select(&self, mask: &Tensor) -> Result<Tensor> {
        if mask.dtype() != DType::Bool {
            return Err(Error::unsupported_dtype("masked_select", mask.dtype(), "a bool mask"));
        }
        let mask = mask.to_device(self.device())?.expand(self.shape())?.contiguous()?;
        let index = match self.gpu()? {
            Some(_) => mask.reshape(-1)?.nonzero()?.reshape(-1)?,
            None => {
                let index = kernel::nonzero(mask.as_slice::<Bool>()?);
                Tensor::from_slice(&index, index.len())?
            }
        };
        self.reshape(-1)?.index_select(0, &index)
    }

    /// The indices of the elements that are not zero, in row-major order: i64 of shape (count, rank).
    pub fn nonzero(&self) -> Result<Tensor> {
        let _running = operation("nonzero", &[self], || Cost::NONE);
        let dense = self.detach().contiguous()?;
        if let Some(gpu) = self.gpu()? {
            let (coordinates, count) = gpu_kernel::nonzero(gpu, dense.gpu_slice()?, self.dims())?;
            let layout = Layout::contiguous(Shape::new(&[count, self.rank()])?);
            let most = self.dims().iter().max().map_or(0, |&d| d as i64 - 1);
            return Ok(Tensor::from_storage(Storage::from_device(coordinates), layout, DType::I64).within(0, most));
        }
        let flat = for_any!(self.dtype(), T => dense.as_slice::<T>().map(kernel::nonzero))?;
        let strides = self.shape().contiguous_strides();
        let (rank, line) = (self.rank(), self.dims().last().copied().unwrap_or(1) as i64);
        Tensor::build::<i64>(Device::Cpu, &Shape::new(&[flat.len(), rank])?, |out| {
            // Positions ascend: only that along the last dimension changes until the next line.
            let (mut coordinates, mut begin, mut end) = (vec![0i64; rank], 0, 0);
            for (row, at) in out.chunks_mut(rank.max(1)).zip(flat) {
                if at >= end {
                    coordinates.iter_mut().enumerate().for_each(|(d, c)| *c = at / strides[d] as i64 % self.dims()[d] as i64);
                    (begin, end) = (at / line * line, (at / line + 1) * line);
                }
                row.copy_from_slice(&coordinates);
                row.last_mut().into_iter().for_each(|last| *last = at - begin);
            }
            Ok(())
        })
    }

    /// A new last dimension of `classes` elements: one at the class that the (i64) element names, else zero, as i64.
    pub fn one_hot(&self, classes: usize) -> Result<Tensor> {
        let _running = operation("one_hot", &[self], || Cost::NONE);
        let index = positions("one_hot", self, self.device())?;
        let shape = self.shape().with_inserted(self.rank(), classes)?;
        if let Some(gpu) = self.gpu()? {
            expect_in_range("one_hot", &index, classes)?;
            return Tensor::build_on_gpu(gpu, Layout::contiguous(shape), DType::I64, |mut out| {
                Ok(gpu_kernel::one_hot(gpu, index.gpu_slice()?, classes, &mut out)?)
            });
        }
        Tensor::build::<i64>(Device::Cpu, &shape, |out| kernel::one_hot(index.as_slice()?, classes, out).map_err(out_of_range("one_hot")))
    }

    /// The rows of `weight` (shape (entries, width)) that this i64 tensor names: shape (…, width). The gradient sums the
    /// rows of each entry in the order in which they appear.
    pub fn embedding(&self, weight: &Tensor) -> Result<Tensor> {
        let [_, width] = weight.dims_n("embedding")?;
        let rows = weight.index_select(0, &self.reshape(-1)?)?;
        rows.reshape(self.shape().with_inserted(self.rank(), width)?)
    }
}
