//! Normalisation: layer and RMS norm over the last dimensions, batch, group and instance norm over channels.
//!
//! Each is a fused kernel in both directions. Its composed reference is [`composed_gradient`]: the same rule in plain operations,
//! taken when the backward pass is itself recorded, so that second derivatives flow through the statistics.

mod channels;
mod rows;

pub use channels::BatchNorm;

use crate::{Error, Result, Tensor};

/// An error unless a parameter has the input's dtype and `shape`.
fn expect_parameter(op: &str, what: &str, x: &Tensor, parameter: Option<&Tensor>, shape: &[usize]) -> Result<()> {
    let Some(parameter) = parameter else { return Ok(()) };
    x.expect_same(op, parameter)?;
    if parameter.dims() != shape {
        return Err(Error::shape(
            op,
            format!("{what} must have shape {shape:?} for an input of shape {}, got {}", x.shape(), parameter.shape()),
        ));
    }
    Ok(())
}

/// A normalisation's inputs as tensors of one rank: the input, and parameters that broadcast to it.
struct Normalised<'a> {
    x: &'a Tensor,
    /// Broadcasts to `x`.
    weight: Option<Tensor>,
    /// The dimensions that statistics are taken over.
    dims: &'a [usize],
    eps: f64,
    /// Whether the mean is taken off.
    centered: bool,
}

/// The gradients of input, weight and bias (the last two in the shape of `x`, for the engine to sum down), in differentiable
/// operations. With h = (x − mean)·rstd and means over `dims`: dx = rstd·(g·w − mean(g·w) − h·mean(g·w·h)), dw = g·h, db = g.
/// Those of half types are computed in f32, as the kernel does: a square may lie far out of the range of f16.
fn composed_gradient(norm: &Normalised<'_>, grad: &Tensor) -> Result<[Tensor; 3]> {
    let (dtype, wide) = (norm.x.dtype(), norm.x.dtype().accumulator());
    if dtype == wide {
        return composed_gradient_of(norm, grad);
    }
    let weight = norm.weight.as_ref().map(|weight| weight.to_dtype(wide)).transpose()?;
    let gradients = composed_gradient_of(&Normalised { x: &norm.x.to_dtype(wide)?, weight, ..*norm }, &grad.to_dtype(wide)?)?;
    let [x, weight, bias] = gradients.map(|gradient| gradient.to_dtype(dtype));
    Ok([x?, weight?, bias?])
}

fn composed_gradient_of(norm: &Normalised<'_>, grad: &Tensor) -> Result<[Tensor; 3]> {
    let Normalised { x, weight, dims, eps, centered } = norm;
    let centred = if *centered { x.sub(&x.mean_keepdim(*dims)?)? } else { (*x).clone() };
    let rstd = centred.square()?.mean_keepdim(*dims)?.add_scalar(*eps)?.rsqrt()?;
    let h = centred.mul(&rstd)?;
    let gw = match weight {
        Some(weight) => grad.mul(weight)?,
        None => grad.clone(),
    };
    let along = h.mul(&gw.mul(&h)?.mean_keepdim(*dims)?)?;
    let rest = if *centered { gw.sub(&gw.mean_keepdim(*dims)?)? } else { gw };
    Ok([rest.sub(&along)?.mul(&rstd)?, grad.mul(&h)?, grad.clone()])
}
