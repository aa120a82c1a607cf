//! Reductions along any dimensions: here sums, means, products and truth values; extremes, moments and norms, and scans beside.
//!
//! Each takes `impl Into<Dims>`: `()` for all dimensions, `-1`, or `[0, 2]`; the `_keepdim` form leaves the dimensions with extent 1.

mod extreme;
mod moments;
mod scan;

pub(super) use scan::axis_of;

use crate::autocast::raised;
use crate::graph::{Ctx, Grads, Op, record};
use crate::ops::movement::PadMode;
use crate::profile::{Cost, operation};
use crate::{Bool, DType, Dims, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::lanes::Numeric;
use kiln_kernels::cpu::reduce;
use kiln_kernels::cuda::reduce as gpu_reduce;
use kiln_kernels::cuda::{CudaError, Gpu, SliceMut, View};

/// What a reduction does to a shape.
pub(super) struct Axes {
    from: Shape,
    /// Which dimensions are reduced.
    pub(super) reduced: Vec<bool>,
    /// The shape in which they have extent 1.
    keepdim: Shape,
    /// Elements of each output.
    pub(super) count: usize,
}

impl Axes {
    pub(super) fn new(op: &str, from: Shape, dims: Dims) -> Result<Self> {
        let dims = dims.resolve(op, &from)?;
        let mut keepdim = from;
        let mut count = 1;
        for &d in &dims {
            keepdim = keepdim.with_dim(d, 1)?;
            count *= from[d];
        }
        Ok(Self { from, reduced: (0..from.rank()).map(|d| dims.contains(&d)).collect(), keepdim, count })
    }

    /// The reduced dimensions.
    fn dims(&self) -> Vec<usize> {
        (0..self.from.rank()).filter(|&d| self.reduced[d]).collect()
    }

    /// The shape without the reduced dimensions.
    pub(super) fn kept(&self) -> Shape {
        let dims: Vec<usize> = (0..self.from.rank()).filter(|&d| !self.reduced[d]).map(|d| self.from[d]).collect();
        Shape::from_checked(&dims)
    }

    /// An error if outputs would be reduced from nothing by an operation without a neutral element.
    fn refuse_empty(&self, op: &str) -> Result<()> {
        if self.count == 0 && self.keepdim.numel() > 0 {
            return Err(Error::shape(op, format!("no elements along dimensions {:?} of shape {}", self.dims(), self.from)));
        }
        Ok(())
    }

    /// The reduction `kernel` of `x` to `shape`, if a GPU holds it.
    fn on_gpu(
        &self,
        x: &Tensor,
        shape: Shape,
        dtype: DType,
        kernel: impl FnOnce(&'static Gpu, View<'_>, &[bool], SliceMut<'_>) -> std::result::Result<(), CudaError>,
    ) -> Result<Option<Tensor>> {
        let Some(gpu) = x.gpu()? else { return Ok(None) };
        let layout = Layout::contiguous(shape);
        Tensor::build_on_gpu(gpu, layout, dtype, |out| Ok(kernel(gpu, x.gpu_view()?, &self.reduced, out)?)).map(Some)
    }

    /// The gradient of an output for each element that it was made of.
    fn spread(&self, grad: &Tensor) -> Result<Tensor> {
        grad.reshape(self.keepdim)?.expand(self.from)
    }
}

/// The dtype of sums and products.
fn total_dtype(dtype: DType) -> DType {
    if dtype.is_float() { dtype } else { DType::I64 }
}

/// The gradient of a sum is repeated along the summed dimensions; that of a mean is divided by their number.
pub(super) struct Sum {
    pub(super) name: &'static str,
    pub(super) axes: Axes,
    pub(super) divisor: f64,
}

impl Sum {
    /// The gradient of each element from that of its output.
    pub(super) fn gradient(&self, grad: &Tensor) -> Result<Tensor> {
        if self.divisor == 1.0 { self.axes.spread(grad) } else { self.axes.spread(&grad.div_scalar(self.divisor)?) }
    }
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(self.gradient(grad)?)])
    }
}

/// The gradient of a product for one factor is the product of the others.
struct Product {
    x: Tensor,
    output: Tensor,
    axes: Axes,
}

impl Op for Product {
    fn name(&self) -> &'static str {
        "prod"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let has_zero = self.x.detach().eq_scalar(0.0)?.any(())?.item::<bool>()?;
        if !has_zero {
            let output = ctx.output(&self.output).reshape(self.axes.keepdim)?;
            return Ok(vec![Some(self.axes.spread(grad)?.mul(&output.div(&self.x)?)?)]);
        }
        Ok(vec![Some(self.axes.spread(grad)?.mul(&self.products_of_others()?)?)])
    }
}

impl Product {
    /// The product of all other factors for each, without division: up a tree of pairs the products of what is below, and down again those of
    /// what is beside. Taken only where a factor is zero.
    fn products_of_others(&self) -> Result<Tensor> {
        let rank = self.x.rank();
        let (kept, reduced): (Vec<usize>, Vec<usize>) = (0..rank).partition(|&d| !self.axes.reduced[d]);
        let order: Vec<isize> = kept.iter().chain(&reduced).map(|&d| d as isize).collect();
        let mut back = vec![0; rank];
        order.iter().enumerate().for_each(|(at, &d)| back[d as usize] = at as isize);
        let permuted = self.x.permute(&order)?;
        let n = self.axes.count;
        let lines = self.x.numel() / n.max(1);
        // Ones make the line a power of two long. Products of half types are f32 until the end, as those of the forward pass are.
        let mut level = permuted.reshape([lines, n])?.to_dtype(self.x.dtype().accumulator())?;
        level = level.pad(&[0, (n.next_power_of_two() - n) as isize], PadMode::Constant(1.0))?;
        let mut siblings = Vec::new();
        for pairs in (0..n.next_power_of_two().ilog2()).rev().map(|log| 1usize << log) {
            let two = level.reshape([lines, pairs, 2])?;
            siblings.push(two.flip(2)?);
            level = two.select(2, 0)?.mul(&two.select(2, 1)?)?;
        }
        let mut others = level.detach().ones_like()?;
        for beside in siblings.iter().rev() {
            others = others.unsqueeze(2)?.mul(beside)?.flatten(1, 2)?;
        }
        let others = others.narrow(1, 0, n)?.to_dtype(self.x.dtype())?;
        others.reshape(permuted.shape())?.permute(&back)
    }
}

impl Tensor {
    /// The sum along `dims`, which stay with extent 1. Sums of integers and booleans are i64 and wrap.
    pub fn sum_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        raised(self)?.sum_over(dims.into())
    }

    fn sum_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("sum", &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new("sum", *self.shape(), dims)?;
        let out = match axes.on_gpu(self, axes.keepdim, total_dtype(self.dtype()), gpu_reduce::sum)? {
            Some(out) => out,
            None => for_any!(self.dtype(), T => Tensor::build::<<T as Numeric>::Total>(self.device(), &axes.keepdim, |out| {
                reduce::sum::<T>(self.view_of()?, &axes.reduced, out);
                Ok(())
            }))?,
        };
        record("sum", out, &[self], |_| Sum { name: "sum", axes, divisor: 1.0 })
    }

    /// The sum along `dims` (`()` for all). Sums of integers and booleans are i64 and wrap.
    pub fn sum(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("sum", dims.into(), &|x, dims| raised(x)?.sum_over(dims))
    }

    /// The mean along `dims`, which stay with extent 1; NaN for no elements. Floats only.
    pub fn mean_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        raised(self)?.mean_over(dims.into())
    }

    /// [`mean_keepdim`](Tensor::mean_keepdim) in the dtype that it has, under autocast, too.
    pub(in crate::ops) fn mean_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("mean", &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new("mean", *self.shape(), dims)?;
        let out = for_float!(self.dtype(), "mean", T => match axes.on_gpu(self, axes.keepdim, self.dtype(), gpu_reduce::mean)? {
            Some(out) => Ok(out),
            None => Tensor::build::<T>(self.device(), &axes.keepdim, |out| {
                reduce::mean(self.view_of::<T>()?, &axes.reduced, out);
                Ok(())
            }),
        })?;
        let divisor = axes.count as f64;
        record("mean", out, &[self], |_| Sum { name: "mean", axes, divisor })
    }

    /// The mean along `dims` (`()` for all); NaN for no elements. Floats only.
    pub fn mean(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("mean", dims.into(), &|x, dims| raised(x)?.mean_over(dims))
    }

    /// The product along `dims`, which stay with extent 1. Products of integers and booleans are i64 and wrap.
    pub fn prod_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        raised(self)?.prod_over(dims.into())
    }

    fn prod_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("prod", &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new("prod", *self.shape(), dims)?;
        let out = match axes.on_gpu(self, axes.keepdim, total_dtype(self.dtype()), gpu_reduce::prod)? {
            Some(out) => out,
            None => for_any!(self.dtype(), T => Tensor::build::<<T as Numeric>::Total>(self.device(), &axes.keepdim, |out| {
                reduce::prod::<T>(self.view_of()?, &axes.reduced, out);
                Ok(())
            }))?,
        };
        let output = out.clone();
        record("prod", out, &[self], |_| Product { x: self.clone(), output, axes })
    }

    /// The product along `dims` (`()` for all). Products of integers and booleans are i64 and wrap. The gradient is right where
    /// factors are zero, too.
    pub fn prod(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("prod", dims.into(), &|x, dims| raised(x)?.prod_over(dims))
    }

    /// Whether any element along `dims` (`()` for all) is not zero; false for none.
    pub fn any(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.any_over(dims.into())
    }

    fn any_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("any", &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new("any", *self.shape(), dims)?;
        if let Some(out) = axes.on_gpu(self, axes.kept(), DType::Bool, gpu_reduce::any)? {
            return Ok(out);
        }
        for_any!(self.dtype(), T => Tensor::build::<Bool>(self.device(), &axes.kept(), |out| {
            reduce::any(self.view_of::<T>()?, &axes.reduced, out);
            Ok(())
        }))
    }

    /// Whether all elements along `dims` (`()` for all) are not zero; true for none.
    pub fn all(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.all_over(dims.into())
    }

    fn all_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("all", &[self], || Cost::flops(self.numel() as u64));
        let axes = Axes::new("all", *self.shape(), dims)?;
        if let Some(out) = axes.on_gpu(self, axes.kept(), DType::Bool, gpu_reduce::all)? {
            return Ok(out);
        }
        for_any!(self.dtype(), T => Tensor::build::<Bool>(self.device(), &axes.kept(), |out| {
            reduce::all(self.view_of::<T>()?, &axes.reduced, out);
            Ok(())
        }))
    }

    /// A reduction without the dimensions that its `keepdim` form leaves.
    fn without_dims(&self, op: &str, dims: Dims, keepdim: &dyn Fn(&Tensor, Dims) -> Result<Tensor>) -> Result<Tensor> {
        let kept = Axes::new(op, *self.shape(), dims.clone())?.kept();
        keepdim(self, dims)?.reshape(kept)
    }
}
