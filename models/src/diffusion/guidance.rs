//! Classifier-free guidance: how a condition is made to count for more than the network says.

use super::schedulers::sampling::{raised, same_shape};
use kiln_tensor::{Dims, Error, Result, Tensor};

/// u + s (c − u): from the outputs without and with the condition. A scale of 1 gives `conditional`; of 0, `unconditional`.
///
/// Source: Ho and Salimans, *Classifier-Free Diffusion Guidance*, 2022.
///
/// # Errors
/// If the shapes differ.
pub fn classifier_free(unconditional: &Tensor, conditional: &Tensor, scale: f64) -> Result<Tensor> {
    same_shape("guidance", ("unconditional", unconditional), ("conditional", conditional))?;
    let (u, c) = (raised("guidance", unconditional)?, raised("guidance", conditional)?);
    u.add(&c.sub(&u)?.mul_scalar(scale)?)?.to_dtype(conditional.dtype())
}

/// `guided` with the standard deviation of each picture brought back to that of `conditional`, and mixed with itself:
/// φ g σ(c) / σ(g) + (1 − φ) g. A φ of 0 leaves it as it is.
///
/// Source: Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2024, section 3.4.
///
/// # Errors
/// If the shapes differ or have no batch dimension, or φ is not from 0 to 1.
pub fn rescale(guided: &Tensor, conditional: &Tensor, phi: f64) -> Result<Tensor> {
    same_shape("guidance rescale", ("guided", guided), ("conditional", conditional))?;
    if !(0.0..=1.0).contains(&phi) || guided.rank() < 2 {
        return Err(Error::argument("guidance rescale", format!("phi = {phi} for {}, expected 0 to 1 and (B, …)", guided.shape())));
    }
    let picture = Dims::from((1..guided.rank() as isize).collect::<Vec<_>>());
    let (g, c) = (raised("guidance rescale", guided)?, raised("guidance rescale", conditional)?);
    let ratio = c.std_keepdim(picture.clone(), 1.0)?.div(&g.std_keepdim(picture, 1.0)?)?; // (B, 1, …)
    g.mul(&ratio.mul_scalar(phi)?.add_scalar(1.0 - phi)?)?.to_dtype(guided.dtype())
}
