//! What a network knows of the time: sines of the timestep, and two layers on top.

use crate::nn::{Linear, Module, Params};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// Sines and cosines of the timesteps (B) as (B, width), in f32: with half = width / 2 and
/// f(i) = 10000^(−i / (half − `shift`)), the row of t is [sin(t f), cos(t f)], or the other way round with `flip` (Stable Diffusion's
/// way).
///
/// Source: Ho et al., *Denoising Diffusion Probabilistic Models*, 2020.
pub(crate) fn timestep_waves(timesteps: &Tensor, width: usize, flip: bool, shift: f64) -> Result<Tensor> {
    let half = width / 2;
    if half == 0 || width % 2 == 1 || half as f64 - shift <= 0.0 {
        return Err(Error::argument("timestep embedding", format!("{width} is no width for sines and cosines with shift {shift}")));
    }
    // Exponents in f32, as the reference has them: at timesteps of hundreds their rounding moves the waves by 1e-4.
    let exponent = |i: usize| -(1e4f64.ln() as f32) * i as f32 / (half as f64 - shift) as f32;
    let frequencies: Vec<f32> = (0..half).map(|i| f64::from(exponent(i)).exp() as f32).collect();
    let frequencies = Tensor::from_vec(frequencies, half)?.to_device(timesteps.device())?;
    let angles = timesteps.to_dtype(kiln_tensor::DType::F32)?.unsqueeze(-1)?.mul(&frequencies)?;
    let (sin, cos) = (angles.sin()?, angles.cos()?);
    if flip { Tensor::cat(&[&cos, &sin], -1) } else { Tensor::cat(&[&sin, &cos], -1) }
}

/// linear_2(silu(linear_1(x))): (B, inputs) → (B, width).
pub(crate) struct TimestepEmbedding {
    linear_1: Linear,
    linear_2: Linear,
}

impl TimestepEmbedding {
    pub fn new(params: &Params, inputs: usize, width: usize) -> Result<Self> {
        let linear_1 = Linear::new(&params.scope("linear_1"), inputs, width, true)?;
        Ok(Self { linear_1, linear_2: Linear::new(&params.scope("linear_2"), width, width, true)? })
    }
}

impl Module for TimestepEmbedding {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.linear_2.forward(&self.linear_1.forward_activated(x, Activation::Silu)?)
    }
}
