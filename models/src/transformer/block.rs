//! The blocks that all families are stacked from: attention and a feed-forward part, each with its norm and its way around.

use super::attention::Attention;
use super::context::{Context, Visible};
use super::{KvCache, Seq2SeqCache};
use crate::nn::{Dropout, Embedding, Init, LayerNorm, Linear, Module, Params, RmsNorm};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// A norm of the hidden states.
pub(crate) enum Norm {
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
pub(crate) enum Mlp {
    /// down(act(up(x)))
    Plain { up: Linear, down: Linear, activation: Activation },
    /// down(y σ(1.702 y)) with y = up(x): the approximation of GELU that OpenAI's CLIP was trained with.
    QuickGelu { up: Linear, down: Linear },
    /// down(act(gate(x)) · up(x)): Shazeer, *GLU Variants Improve Transformer*, 2020.
    Gated { gate: Linear, up: Linear, down: Linear, activation: Activation },
}

/// The constant of [`Mlp::QuickGelu`].
const QUICK: f64 = 1.702;

impl Mlp {
    /// `inner` is applied before the last matrix.
    pub fn forward(&self, x: &Tensor, inner: Option<&Dropout>) -> Result<Tensor> {
        let (hidden, down) = match self {
            Mlp::Plain { up, down, activation } => (up.forward_activated(x, *activation)?, down),
            // y σ(c y) = silu(c y) / c.
            Mlp::QuickGelu { up, down } => (up.forward(x)?.mul_scalar(QUICK)?.silu()?.mul_scalar(1.0 / QUICK)?, down),
            Mlp::Gated { gate, up, down, activation } => {
                let (gate, up) = (gate.forward(x)?, up.forward(x)?);
                let hidden = match activation {
                    Activation::Silu => gate.swiglu(&up)?,
                    Activation::Gelu => gate.geglu(&up)?,
                    Activation::GeluTanh => gate.geglu_tanh(&up)?,
                    other => gate.activate(*other)?.mul(&up)?,
                };
                (hidden, down)
            }
        };
        match inner {
            Some(dropout) => down.forward(&dropout.forward(&hidden)?),
            None => down.forward(&hidden),
        }
    }
}

/// Attention and feed-forward part.
pub(crate) struct Block {
    pub attention: Attention,
    pub mlp: Mlp,
    pub norms: [Norm; 2],
    /// Of what each part adds.
    pub dropout: Dropout,
    /// Inside of the feed-forward part.
    pub inner_dropout: Option<Dropout>,
    /// Whether norms stand behind the sums (as in the first transformers) instead of before the parts.
    pub post_norm: bool,
}

impl Block {
    /// (B, T, C) → (B, T, C)
    pub fn forward(&self, x: &Tensor, context: &Context, cache: Option<(&mut KvCache, usize)>) -> Result<Tensor> {
        self.feed(&self.look(x, context, cache)?)
    }

    /// A part on its way around: x + part(norm(x)), or norm(x + part(x)).
    fn around(&self, norm: &Norm, x: &Tensor, part: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        if self.post_norm {
            norm.forward(&x.add(&self.dropout.forward(&part(x)?)?)?)
        } else {
            x.add(&self.dropout.forward(&part(&norm.forward(x)?)?)?)
        }
    }

    fn look(&self, x: &Tensor, context: &Context, cache: Option<(&mut KvCache, usize)>) -> Result<Tensor> {
        self.around(&self.norms[0], x, |x| self.attention.forward(x, context, cache))
    }

    fn feed(&self, x: &Tensor) -> Result<Tensor> {
        self.around(&self.norms[1], x, |x| self.mlp.forward(x, self.inner_dropout.as_ref()))
    }
}

/// A block that looks at a source as well, between its two parts.
pub(crate) struct CrossBlock {
    pub block: Block,
    pub cross: Attention,
    pub norm: Norm,
}

/// The sequence that cross-attention looks at.
pub(crate) struct Source<'a> {
    /// (B, S, C)
    pub hidden: &'a Tensor,
    pub visible: Visible,
}

impl CrossBlock {
    /// (B, T, C) → (B, T, C)
    pub fn forward(
        &self,
        x: &Tensor,
        context: &Context,
        source: &Source<'_>,
        mut cache: Option<(&mut Seq2SeqCache, usize)>,
    ) -> Result<Tensor> {
        let x = self.block.look(x, context, cache.as_mut().map(|(cache, layer)| (cache.own(), *layer)))?;
        let project = || self.cross.keys_and_values(source.hidden);
        let held = match cache {
            Some((cache, layer)) => cache.source(layer, project)?,
            None => project()?,
        };
        let x = self.block.around(&self.norm, &x, |x| self.cross.across(x, held, &source.visible))?;
        self.block.feed(&x)
    }
}

/// Makes layers whose weights start normal with one deviation, as language models do.
#[derive(Clone, Copy)]
pub(crate) struct NormalInit(pub f64);

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
pub(crate) fn activation(name: &str) -> Result<Activation> {
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
