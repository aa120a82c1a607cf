//! What the losses demand of their operands: without it a (B) beside a (B, 1) would broadcast to (B, B) in silence.

use kiln_tensor::{Error, Result, Shape, Tensor};

/// An error unless `tensor` has this shape.
pub(super) fn expect_shape(op: &str, name: &str, tensor: &Tensor, shape: &Shape) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(Error::shape(op, format!("{name} has shape {}, expected {shape}", tensor.shape())))
}

/// An error unless all have the shape of the first; returns it.
pub(super) fn expect_alike(op: &str, tensors: &[(&str, &Tensor)]) -> Result<()> {
    let Some(((first_name, first), rest)) = tensors.split_first() else { return Ok(()) };
    for (name, tensor) in rest {
        if tensor.shape() != first.shape() {
            let message = format!("{name} has shape {}, expected that of {first_name}, {}", tensor.shape(), first.shape());
            return Err(Error::shape(op, message));
        }
    }
    Ok(())
}

/// An error unless `value` is finite and ≥ 0.
pub(super) fn expect_not_negative(op: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::argument(op, format!("{name} = {value}, expected a finite value ≥ 0")))
}

/// An error unless `value` is finite and > 0.
pub(super) fn expect_positive(op: &str, name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::argument(op, format!("{name} = {value}, expected a finite value > 0")))
}
