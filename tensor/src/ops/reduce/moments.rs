//! Variance and standard deviation, norms, and log-sum-exp.

use super::Axes;
use crate::autocast::raised;
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{Dims, Result, Tensor};
use kiln_kernels::cpu::reduce;
use kiln_kernels::cuda::reduce as gpu_reduce;

/// var = Σ (x − mean)² / (n − correction); its gradient is 2·(x − mean) / (n − correction).
/// For the standard deviation, half of that over the output, and 0 where that is 0.
struct Var {
    x: Tensor,
    /// The standard deviation, if it is the output.
    deviation: Option<Tensor>,
    axes: Axes,
    divisor: f64,
}

impl Op for Var {
    fn name(&self) -> &'static str {
        if self.deviation.is_some() { "std" } else { "var" }
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let centred = self.x.sub(&self.x.mean_keepdim(self.axes.dims())?)?;
        let grad = match &self.deviation {
            None => grad.mul_scalar(2.0 / self.divisor)?,
            Some(output) => {
                let constant = output.eq_scalar(0.0)?;
                let output = ctx.output(output).masked_fill(&constant, f64::INFINITY)?;
                grad.div(&output)?.mul_scalar(1.0 / self.divisor)?
            }
        };
        Ok(vec![Some(self.axes.spread(&grad)?.mul(&centred)?)])
    }
}

/// The gradient of (Σ |x|^p)^(1/p) is sign(x)·|x|^(p−1) / norm^(p−1), and 0 where the norm is 0. For p = ±∞ the elements whose
/// magnitude is the norm share the gradient.
struct Norm {
    x: Tensor,
    output: Tensor,
    axes: Axes,
    p: f64,
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let grad = self.axes.spread(grad)?;
        let sign = self.x.detach().sign()?;
        if self.p == 0.0 {
            return Ok(vec![Some(grad.mul_scalar(0.0)?)]);
        }
        if self.p == 1.0 {
            return Ok(vec![Some(grad.mul(&sign)?)]);
        }
        if self.p.is_infinite() {
            let chosen = self.x.detach().abs()?.eq(&self.output)?.to_dtype(self.x.dtype())?;
            let share = chosen.div(&chosen.sum_keepdim(self.axes.dims())?)?;
            return Ok(vec![Some(grad.mul(&sign.mul(&share)?)?)]);
        }
        let zero = self.output.eq_scalar(0.0)?;
        let output = ctx.output(&self.output).masked_fill(&zero, f64::INFINITY)?;
        if self.p == 2.0 {
            return Ok(vec![Some(grad.mul(&self.x.div(&output)?)?)]);
        }
        // The magnitude of a zero is kept off the power, whose own derivative is infinite there for p < 2.
        let at_zero = self.x.detach().eq_scalar(0.0)?;
        let powers = self.x.abs()?.masked_fill(&at_zero, 1.0)?.powf(self.p - 1.0)?;
        Ok(vec![Some(grad.mul(&powers.mul(&sign)?)?.div(&output.powf(self.p - 1.0)?)?)])
    }
}

/// The gradient of log Σ exp(x) is softmax(x).
struct LogSumExp {
    x: Tensor,
    output: Tensor,
    axes: Axes,
}

impl Op for LogSumExp {
    fn name(&self) -> &'static str {
        "logsumexp"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let empty = self.output.eq_scalar(f64::NEG_INFINITY)?;
        let output = ctx.output(&self.output).masked_fill(&empty, 0.0)?;
        Ok(vec![Some(self.axes.spread(grad)?.mul(&self.x.sub(&output)?.exp()?)?)])
    }
}

impl Tensor {
    /// The variance along `dims` (`()` for all): Σ (x − mean)² / (n − correction). Bessel's correction is 1; 0 gives the
    /// variance of a whole population. Floats only.
    pub fn var(&self, dims: impl Into<Dims>, correction: f64) -> Result<Tensor> {
        self.without_dims("var", dims.into(), &|x, dims| raised(x)?.spread_keepdim("var", dims, correction, false))
    }

    /// [`var`](Tensor::var) that leaves the dimensions with extent 1.
    pub fn var_keepdim(&self, dims: impl Into<Dims>, correction: f64) -> Result<Tensor> {
        raised(self)?.spread_keepdim("var", dims.into(), correction, false)
    }

    /// The standard deviation along `dims` (`()` for all): the square root of [`var`](Tensor::var). Floats only.
    pub fn std(&self, dims: impl Into<Dims>, correction: f64) -> Result<Tensor> {
        self.without_dims("std", dims.into(), &|x, dims| raised(x)?.spread_keepdim("std", dims, correction, true))
    }

    /// [`std`](Tensor::std) that leaves the dimensions with extent 1.
    pub fn std_keepdim(&self, dims: impl Into<Dims>, correction: f64) -> Result<Tensor> {
        raised(self)?.spread_keepdim("std", dims.into(), correction, true)
    }

    fn spread_keepdim(&self, op: &'static str, dims: Dims, correction: f64, root: bool) -> Result<Tensor> {
        let _running = operation(op, &[self], || Cost::flops(4 * self.numel() as u64));
        let axes = Axes::new(op, *self.shape(), dims)?;
        let divisor = (axes.count as f64 - correction).max(0.0);
        let kernel = if root { gpu_reduce::std } else { gpu_reduce::var };
        let out = for_float!(self.dtype(), op, T => {
            let on_gpu = axes.on_gpu(self, axes.keepdim, self.dtype(), |gpu, x, reduced, out| kernel(gpu, x, reduced, correction, out))?;
            match on_gpu {
                Some(out) => Ok(out),
                None => Tensor::build::<T>(self.device(), &axes.keepdim, |out| {
                    if root {
                        reduce::std(self.view_of::<T>()?, &axes.reduced, correction, out);
                    } else {
                        reduce::var(self.view_of::<T>()?, &axes.reduced, correction, out);
                    }
                    Ok(())
                }),
            }
        })?;
        let deviation = root.then(|| out.clone());
        record(op, out, &[self], |_| Var { x: self.clone(), deviation, axes, divisor })
    }

    /// The p-norm along `dims` (`()` for all): (Σ |x|^p)^(1/p); p = ∞ gives the largest |x|, −∞ the smallest, 0 the number of
    /// elements that are not zero. Floats only. The gradient is 0 where the norm is.
    pub fn norm(&self, p: f64, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("norm", dims.into(), &|x, dims| raised(x)?.norm_over(p, dims))
    }

    /// [`norm`](Tensor::norm) that leaves the dimensions with extent 1.
    pub fn norm_keepdim(&self, p: f64, dims: impl Into<Dims>) -> Result<Tensor> {
        raised(self)?.norm_over(p, dims.into())
    }

    fn norm_over(&self, p: f64, dims: Dims) -> Result<Tensor> {
        let _running = operation("norm", &[self], || Cost::flops(2 * self.numel() as u64));
        let axes = Axes::new("norm", *self.shape(), dims)?;
        if p == f64::NEG_INFINITY {
            axes.refuse_empty("norm")?;
        }
        let out = for_float!(self.dtype(), "norm", T => {
            let on_gpu = axes.on_gpu(self, axes.keepdim, self.dtype(), |gpu, x, reduced, out| gpu_reduce::norm(gpu, x, reduced, p, out))?;
            match on_gpu {
                Some(out) => Ok(out),
                None => Tensor::build::<T>(self.device(), &axes.keepdim, |out| {
                    reduce::norm(self.view_of::<T>()?, &axes.reduced, p, out);
                    Ok(())
                }),
            }
        })?;
        let output = out.clone();
        record("norm", out, &[self], |_| Norm { x: self.clone(), output, axes, p })
    }

    /// log Σ exp(x) along `dims` (`()` for all), which never overflows; −∞ for no elements. Floats only.
    pub fn logsumexp(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.without_dims("logsumexp", dims.into(), &|x, dims| raised(x)?.logsumexp_over(dims))
    }

    /// [`logsumexp`](Tensor::logsumexp) that leaves the dimensions with extent 1.
    pub fn logsumexp_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        raised(self)?.logsumexp_over(dims.into())
    }

    fn logsumexp_over(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("logsumexp", &[self], || Cost::flops(4 * self.numel() as u64));
        let axes = Axes::new("logsumexp", *self.shape(), dims)?;
        let out = for_float!(self.dtype(), "logsumexp", T => match axes.on_gpu(self, axes.keepdim, self.dtype(), gpu_reduce::logsumexp)? {
            Some(out) => Ok(out),
            None => Tensor::build::<T>(self.device(), &axes.keepdim, |out| {
                reduce::logsumexp(self.view_of::<T>()?, &axes.reduced, out);
                Ok(())
            }),
        })?;
        let output = out.clone();
        record("logsumexp", out, &[self], |_| LogSumExp { x: self.clone(), output, axes })
    }
}
