//! Maxima and minima, and where they are. A NaN counts as both, as in PyTorch.

use super::Axes;
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{DType, Dims, Error, Layout, Result, Tensor};
use kiln_kernels::cpu::reduce;
use kiln_kernels::cuda::reduce as gpu_reduce;

/// The gradient of a maximum is shared evenly by the elements that equal it.
struct Extreme {
    name: &'static str,
    x: Tensor,
    output: Tensor,
    axes: Axes,
}

impl Op for Extreme {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let (x, output) = (self.x.detach(), self.output.reshape(self.axes.keepdim)?);
        let chosen = x.eq(&output)?.logical_or(&x.ne(&x)?)?.to_dtype(x.dtype())?;
        let share = chosen.div(&chosen.sum_keepdim(self.axes.dims())?)?;
        Ok(vec![Some(self.axes.spread(grad)?.mul(&share)?)])
    }
}

/// The gradient of the element at an index goes to it alone.
struct AtIndex {
    name: &'static str,
    /// True at the element of each line that was chosen.
    chosen: Tensor,
    axes: Axes,
}

impl Op for AtIndex {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(self.axes.spread(grad)?.masked_fill(&self.chosen.logical_not()?, 0.0)?)])
    }
}

impl Tensor {
    /// The largest element along `dims` (`()` for all); NaN if any is. Equal maxima share the gradient evenly.
    pub fn max(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("max", dims.into(), &|x, dims| x.extreme("max", dims, true))
    }

    /// The smallest element along `dims` (`()` for all); NaN if any is. Equal minima share the gradient evenly.
    pub fn min(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("min", dims.into(), &|x, dims| x.extreme("min", dims, false))
    }

    /// [`max`](Tensor::max) that leaves the dimensions with extent 1.
    pub fn max_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.extreme("max", dims.into(), true)
    }

    /// [`min`](Tensor::min) that leaves the dimensions with extent 1.
    pub fn min_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.extreme("min", dims.into(), false)
    }

    fn extreme(&self, op: &'static str, dims: Dims, max: bool) -> Result<Tensor> {
        let _running = operation(op, &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new(op, *self.shape(), dims)?;
        axes.refuse_empty(op)?;
        let on_gpu = axes.on_gpu(self, axes.keepdim, self.dtype(), if max { gpu_reduce::max } else { gpu_reduce::min })?;
        let out = match on_gpu {
            Some(out) => out,
            None => for_any!(self.dtype(), T => Tensor::build::<T>(self.device(), &axes.keepdim, |out| {
                let view = self.view_of::<T>()?;
                if max { reduce::max(view, &axes.reduced, out) } else { reduce::min(view, &axes.reduced, out) }
                Ok(())
            }))?,
        };
        let output = out.clone();
        record(op, out, &[self], |_| Extreme { name: op, x: self.clone(), output, axes })
    }

    /// The largest elements along `dim` and their first indices (i64), without the dimension. The gradient goes to those elements.
    pub fn max_dim(&self, dim: isize) -> Result<(Tensor, Tensor)> {
        self.extreme_dim("max_dim", dim, true)
    }

    /// The smallest elements along `dim` and their first indices (i64), without the dimension. The gradient goes to those elements.
    pub fn min_dim(&self, dim: isize) -> Result<(Tensor, Tensor)> {
        self.extreme_dim("min_dim", dim, false)
    }

    fn extreme_dim(&self, op: &'static str, dim: isize, max: bool) -> Result<(Tensor, Tensor)> {
        let _running = operation(op, &[self], || Cost::flops(self.numel() as u64));
        let dim = self.shape().dim(op, dim)?;
        let axes = Axes::new(op, *self.shape(), dim.into())?;
        axes.refuse_empty(op)?;
        let kept = axes.kept();
        let (values, indices) = match self.gpu()? {
            Some(gpu) => {
                let mut indices = Tensor::stale_on_gpu(gpu, kept, DType::I64)?;
                let kernel = if max { gpu_reduce::max_with_index } else { gpu_reduce::min_with_index };
                let values = Tensor::build_on_gpu(gpu, Layout::contiguous(kept), self.dtype(), |out| {
                    Ok(kernel(gpu, self.gpu_view()?, dim, out, indices.gpu_slice_mut()?)?)
                })?;
                (values, indices)
            }
            None => {
                let mut indices = Vec::new();
                let no_room = |_| Error::argument(op, format!("there is no memory for indices of shape {kept}"));
                indices.try_reserve_exact(kept.numel()).map_err(no_room)?;
                indices.resize(kept.numel(), 0i64);
                let values = for_any!(self.dtype(), T => Tensor::build::<T>(self.device(), &kept, |out| {
                    let view = self.view_of::<T>()?;
                    if max { reduce::max_with_index(view, dim, out, &mut indices) } else { reduce::min_with_index(view, dim, out, &mut indices) }
                    Ok(())
                }))?;
                (values, Tensor::from_vec(indices, kept)?.to_device(self.device())?)
            }
        };
        let extent = axes.from[dim];
        let mut along = vec![1; axes.from.rank()];
        along[dim] = extent;
        let chosen = if self.is_tracked() {
            let places = Tensor::arange(0.0, extent as f64, 1.0, (DType::I64, self.device()))?.reshape(along)?;
            Some(indices.reshape(axes.keepdim)?.eq(&places)?)
        } else {
            None
        };
        let values = match chosen {
            Some(chosen) => record(op, values, &[self], |_| AtIndex { name: op, chosen, axes })?,
            None => values,
        };
        Ok((values, indices))
    }

    /// The first index (i64) of the largest element along a dimension, or in row-major order of all of them (`()`).
    pub fn argmax(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.arg("argmax", dims.into(), true)
    }

    /// The first index (i64) of the smallest element along a dimension, or in row-major order of all of them (`()`).
    pub fn argmin(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.arg("argmin", dims.into(), false)
    }

    fn arg(&self, op: &'static str, dims: Dims, max: bool) -> Result<Tensor> {
        let x = self.detach();
        let (x, dim) = match dims {
            Dims::All => (x.reshape([self.numel()])?, 0),
            Dims::Some(list) => match list[..] {
                [dim] => (x, dim),
                _ => return Err(Error::argument(op, format!("expected one dimension or (), got {list:?}"))),
            },
        };
        Ok(x.extreme_dim(op, dim, max)?.1)
    }
}
