//! The blocks that all families are stacked from: attention and a feed-forward part, each with its norm and its way around.

use super::KvCache;
use super::attention::Attention;
use super::context::Context;
use crate::nn::{Dropout, Embedding, Init, LayerNorm, Linear, Module, Params, RmsNorm};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// A norm of the hidden states.
pub(super) enum Norm {
    Layer(LayerNorm),
    Rms(RmsNorm),
}

impl Norm {
    pub fn layer(params: &Params, width: usize, eps: f64) -> Result<Self> {
        Ok(Self::Layer(LayerNorm::with_options(params, width, eps, true, true)?))
    }

    pub fn rms(params: &Params, width: usize, eps: f64) -> Result<Self> {
        Ok(Self::Rms(RmsNorm::new(params, width, eps)?))
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Norm::Layer(norm) => norm.forward(x),
            Norm::Rms(norm) => norm.forward(x),
        }
    }
}

/// The position-wise feed-forward part.
pub(super) enum Mlp {
    /// down(act(up(x)))
    Plain { up: Linear, down: Linear, activation: Activation },
    /// down(act(gate(x)) · up(x)): Shazeer, *GLU Variants Improve Transformer*, 2020.
    Gated { gate: Linear, up: Linear, down: Linear, activation: Activation },
}

impl Mlp {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Mlp::Plain { up, down, activation } => down.forward(&up.forward_activated(x, *activation)?),
            Mlp::Gated { gate, up, down, activation } => {
                let (gate, up) = (gate.forward(x)?, up.forward(x)?);
                let inner = match activation {
                    Activation::Silu => gate.swiglu(&up)?,
                    Activation::Gelu => gate.geglu(&up)?,
                    Activation::GeluTanh => gate.geglu_tanh(&up)?,
                    other => gate.activate(*other)?.mul(&up)?,
                };
                down.forward(&inner)
            }
        }
    }
}

/// Attention and feed-forward part of a decoder.
pub(super) struct Block {
    pub attention: Attention,
    pub mlp: Mlp,
    pub norms: [Norm; 2],
    /// Of what each part adds.
    pub dropout: Dropout,
    /// Whether norms stand behind the sums (as in the first transformers) instead of before the parts.
    pub post_norm: bool,
}

impl Block {
    /// (B, T, C) → (B, T, C)
    pub fn forward(&self, x: &Tensor, context: &Context, cache: Option<(&mut KvCache, usize)>) -> Result<Tensor> {
        let [first, second] = &self.norms;
        if self.post_norm {
            let x = first.forward(&x.add(&self.dropout.forward(&self.attention.forward(x, context, cache)?)?)?)?;
            second.forward(&x.add(&self.dropout.forward(&self.mlp.forward(&x)?)?)?)
        } else {
            let x = x.add(&self.dropout.forward(&self.attention.forward(&first.forward(x)?, context, cache)?)?)?;
            x.add(&self.dropout.forward(&self.mlp.forward(&second.forward(&x)?)?)?)
        }
    }
}

/// Makes layers whose weights start normal with one deviation, as language models do.
#[derive(Clone, Copy)]
pub(super) struct NormalInit(pub f64);

impl NormalInit {
    fn init(self) -> Init {
        Init::Normal { mean: 0.0, std: self.0 }
    }

    pub fn linear(self, params: &Params, inputs: usize, outputs: usize, bias: bool) -> Result<Linear> {
        Linear::with_init(params, inputs, outputs, self.init(), bias.then_some(Init::Zeros))
    }

    pub fn embedding(self, params: &Params, entries: usize, width: usize) -> Result<Embedding> {
        Embedding::with_init(params, entries, width, self.init())
    }
}

/// The activation that a `config.json` names.
pub(super) fn activation(name: &str) -> Result<Activation> {
    match name {
        "relu" => Ok(Activation::Relu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "silu" | "swish" => Ok(Activation::Silu),
        other => {
            let message = format!("activation `{other}` is not known; there are relu, gelu, gelu_new, gelu_pytorch_tanh, silu");
            Err(Error::format("config.json", message))
        }
    }
}
