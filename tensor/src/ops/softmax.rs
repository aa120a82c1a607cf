//! Softmax and log-softmax.

use super::reduce::axis_of;
use crate::autocast::raised;
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record};
use crate::profile::{Cost, operation};
use crate::{Error, Layout, Result, Tensor};
use kiln_kernels::cpu::softmax;
use kiln_kernels::cuda::softmax as gpu_softmax;

/// With y the output: dx = y·(g − Σ g·y), and for the logarithm dx = g − exp(y)·Σ g.
struct Softmax {
    dim: usize,
    log: bool,
    output: Tensor,
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax" } else { "softmax" }
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        if !is_grad_enabled() {
            return Ok(vec![Some(self.fused(grad)?)]);
        }
        let y = ctx.output(&self.output);
        let dx = if self.log {
            grad.sub(&y.exp()?.mul(&grad.sum_keepdim(self.dim)?)?)?
        } else {
            y.mul(&grad.sub(&grad.mul(&y)?.sum_keepdim(self.dim)?)?)?
        };
        Ok(vec![Some(dx)])
    }
}

impl Softmax {
    fn fused(&self, grad: &Tensor) -> Result<Tensor> {
        let _running = operation("softmax_backward", &[grad, &self.output], || Cost::per_element(4));
        let axis = axis_of(grad.shape(), self.dim);
        let (grad, y) = (grad.detach().contiguous()?, &self.output);
        if let Some(gpu) = y.gpu()? {
            return Tensor::build_on_gpu(gpu, Layout::contiguous(*y.shape()), y.dtype(), |dx| {
                Ok(gpu_softmax::softmax_backward(gpu, axis, self.log, grad.gpu_slice()?, y.gpu_slice()?, dx)?)
            });
        }
        for_float!(y.dtype(), self.name(), T => Tensor::build::<T>(grad.device(), y.shape(), |dx| {
            softmax::softmax_backward(axis, self.log, grad.as_slice::<T>()?, y.as_slice::<T>()?, dx);
            Ok(())
        }))
    }
}

impl Tensor {
    /// exp(x) / Σ exp(x) along `dim`. Never overflows; a line of −∞ alone gives NaN. Floats only.
    pub fn softmax(&self, dim: isize) -> Result<Tensor> {
        raised(self)?.soft("softmax", dim, false)
    }

    /// x − log Σ exp(x) along `dim`. Never overflows; a line of −∞ alone gives NaN. Floats only.
    pub fn log_softmax(&self, dim: isize) -> Result<Tensor> {
        raised(self)?.soft("log_softmax", dim, true)
    }

    fn soft(&self, op: &'static str, dim: isize, log: bool) -> Result<Tensor> {
        if self.rank() == 0 {
            return Err(Error::shape(op, "a scalar has no dimension to normalise along"));
        }
        let dim = self.shape().dim(op, dim)?;
        let _running = operation(op, &[self], || Cost::per_element(5));
        let x = self.detach().contiguous()?;
        let axis = axis_of(self.shape(), dim);
        let out = for_float!(self.dtype(), op, T => match x.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*self.shape()), self.dtype(), |y| {
                Ok(gpu_softmax::softmax(gpu, axis, log, x.gpu_slice()?, y)?)
            }),
            None => Tensor::build::<T>(self.device(), self.shape(), |y| {
                softmax::softmax(axis, log, x.as_slice::<T>()?, y);
                Ok(())
            }),
        })?;
        let output = out.clone();
        record(op, out, &[self], |_| Softmax { dim, log, output })
    }
}
