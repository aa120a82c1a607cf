//! Dropout of elements and of whole channels.

use super::{Mode, Module, Params};
use kiln_tensor::{Error, Generator, Result, Tensor};

fn probability(p: f64) -> Result<f64> {
    if (0.0..=1.0).contains(&p) { Ok(p) } else { Err(Error::argument("dropout", format!("{p} is no probability"))) }
}

/// In training, zeroes each element with probability p and multiplies the others by 1/(1 − p) (Srivastava et al. 2014); else the
/// identity. Draws from the scope's generator.
#[derive(Clone, Debug)]
pub struct Dropout {
    p: f64,
    mode: Mode,
    generator: Generator,
}

impl Dropout {
    /// A layer that drops with probability `p`. An error unless it lies in [0, 1].
    pub fn new(params: &Params, p: f64) -> Result<Self> {
        Ok(Self { p: probability(p)?, mode: params.mode(), generator: params.generator().clone() })
    }
}

impl Module for Dropout {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.mode.is_training() && self.p > 0.0 { self.generator.dropout(x, self.p) } else { Ok(x.clone()) }
    }
}

/// In training, zeroes each channel of (B, C, …) with probability p and multiplies the others by 1/(1 − p) (Tompson et al. 2015);
/// else the identity.
#[derive(Clone, Debug)]
pub struct ChannelDropout(Dropout);

impl ChannelDropout {
    /// A layer that drops with probability `p`. An error unless it lies in [0, 1].
    pub fn new(params: &Params, p: f64) -> Result<Self> {
        Ok(Self(Dropout::new(params, p)?))
    }
}

impl Module for ChannelDropout {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let &[batch, channels, ref spatial @ ..] = x.dims() else {
            return Err(Error::shape("channel_dropout", format!("expected (B, C, …), got shape {}", x.shape())));
        };
        if !self.0.mode.is_training() {
            return Ok(x.clone());
        }
        let shape = [&[batch, channels][..], &vec![1; spatial.len()]].concat();
        x.mul(&self.0.forward(&Tensor::ones(shape, x)?)?)
    }
}
