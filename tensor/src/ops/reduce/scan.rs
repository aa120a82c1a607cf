//! Cumulative sums.

use super::total_dtype;
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::cumulative;
use kiln_kernels::cpu::lanes::Numeric;
use kiln_kernels::cpu::softmax::Axis;
use kiln_kernels::cuda;

/// The gradient of a cumulative sum is the cumulative sum of the gradient from the other end.
struct CumSum {
    dim: usize,
    reverse: bool,
}

impl Op for CumSum {
    fn name(&self) -> &'static str {
        "cumsum"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.scan(self.dim, !self.reverse)?)])
    }
}

/// A shape as a kernel that works along one dimension sees it.
pub(in crate::ops) fn axis_of(shape: &Shape, dim: usize) -> Axis {
    Axis { outer: shape[..dim].iter().product(), n: shape[dim], inner: shape[dim + 1..].iter().product() }
}

impl Tensor {
    /// The sums of all elements along `dim` up to and including each. Sums of integers and booleans are i64 and wrap.
    pub fn cumsum(&self, dim: isize) -> Result<Tensor> {
        crate::autocast::raised(self)?.scan(self.shape().dim("cumsum", dim)?, false)
    }

    fn scan(&self, dim: usize, reverse: bool) -> Result<Tensor> {
        let _running = operation("cumsum", &[self], || Cost::per_element(1));
        let x = self.detach().contiguous()?;
        let axis = axis_of(self.shape(), dim);
        let out = match x.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*self.shape()), total_dtype(self.dtype()), |out| {
                Ok(cuda::cumulative::cumsum(gpu, axis, reverse, x.gpu_slice()?, out)?)
            }),
            None => for_any!(self.dtype(), T => Tensor::build::<<T as Numeric>::Total>(self.device(), self.shape(), |out| {
                cumulative::cumsum::<T>(axis, reverse, x.as_slice()?, out);
                Ok(())
            })),
        }?;
        record("cumsum", out, &[self], |_| CumSum { dim, reverse })
    }
}
