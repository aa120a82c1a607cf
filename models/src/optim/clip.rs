//! Gradient clipping, between the backward pass and the optimiser's step.

use crate::nn::Param;
use kiln_autograd::no_grad;
use kiln_tensor::ops::optim::{clamp_, global_norm, scale_};
use kiln_tensor::{Error, Result, Tensor};

/// The norm √Σ g² over the gradients of all parameters, as if they were one vector; 0 if there is none.
/// Summed in f64, in an order that depends on the shapes only.
pub fn grad_norm(params: &[Param]) -> Result<f64> {
    let grads: Vec<Tensor> = params.iter().filter_map(Param::grad).collect();
    global_norm(&grads)
}

/// Multiplies all gradients by `max_norm / (norm + 1e-6)` if that is less than 1 (Pascanu et al., "On the difficulty of training
/// recurrent neural networks", 2013; the 1e-6 is PyTorch's), where `norm` is that of [`grad_norm`], and returns `norm`.
///
/// If the norm is infinite or NaN, the gradients are left as they are: whether to skip the step or to stop is the caller's choice,
/// e.g. `if !clip_grad_norm(&params, 1.0)?.is_finite() { optimizer.zero_grad(); continue; }`.
///
/// [`Optimizer::step_clipped`](super::Optimizer::step_clipped) does this and the step without the pass that scales.
pub fn clip_grad_norm(params: &[Param], max_norm: f64) -> Result<f64> {
    expect_norm("clip_grad_norm", max_norm)?;
    let norm = grad_norm(params)?;
    let factor = max_norm / (norm + 1e-6);
    if norm.is_finite() && factor < 1.0 {
        for_each_grad(params, |grad| scale_(grad, factor))?;
    }
    Ok(norm)
}

/// An error unless `max_norm` is a norm.
pub(super) fn expect_norm(op: &str, max_norm: f64) -> Result<()> {
    if max_norm >= 0.0 { Ok(()) } else { Err(Error::argument(op, format!("max_norm = {max_norm}, expected a value ≥ 0"))) }
}

/// [`clip_grad_norm`], but a norm that is infinite or NaN is an error.
pub fn clip_finite_grad_norm(params: &[Param], max_norm: f64) -> Result<f64> {
    let norm = clip_grad_norm(params, max_norm)?;
    if norm.is_finite() { Ok(norm) } else { Err(Error::argument("clip_grad_norm", format!("the norm of the gradients is {norm}"))) }
}

/// Clamps every element of every gradient to [−`limit`, `limit`]; NaN stays NaN.
pub fn clip_grad_value(params: &[Param], limit: f64) -> Result<()> {
    if limit.is_nan() || limit < 0.0 {
        return Err(Error::argument("clip_grad_value", format!("limit = {limit}, expected a value ≥ 0")));
    }
    for_each_grad(params, |grad| clamp_(grad, -limit, limit))
}

/// Changes each gradient by `f`, without recording, in place if nobody else holds it.
pub(super) fn for_each_grad(params: &[Param], f: impl Fn(&mut Tensor) -> Result<()>) -> Result<()> {
    for param in params {
        let Some(mut grad) = param.grad() else { continue };
        // The parameter lets go of it, so that it need not be copied.
        param.zero_grad();
        let result = no_grad(|| f(&mut grad));
        param.set_grad(Some(grad))?;
        result?;
    }
    Ok(())
}
