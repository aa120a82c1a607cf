//! The stack of blocks that both towers have.

use crate::nn::{Dropout, Params};
use crate::transformer::attention::{Attention, AttentionParts, Projection};
use crate::transformer::block::{Block, Mlp, Norm, NormalInit, activation};
use crate::transformer::context::Context;
use kiln_tensor::{Error, Result, Tensor};

/// The extents of an [`Encoder`].
pub(super) struct EncoderShape<'a> {
    pub width: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub hidden_act: &'a str,
    pub eps: f64,
    pub dropout: f64,
    /// Factor of the first weights.
    pub factor: f64,
}

/// Blocks whose norms stand before their parts, named `layers.i.{layer_norm1, self_attn, layer_norm2, mlp}`.
pub(super) struct Encoder(Vec<Block>);

impl Encoder {
    pub fn new(params: &Params, shape: &EncoderShape<'_>) -> Result<Self> {
        let EncoderShape { width, heads, layers, .. } = *shape;
        if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
            let message = format!("hidden_size {width} must be a multiple of num_attention_heads {heads}");
            return Err(Error::format("config.json", message));
        }
        let list = params.scope("layers");
        Ok(Self((0..layers).map(|i| block(&list.index(i), shape)).collect::<Result<_>>()?))
    }

    /// The states before the first block and after each, all (B, T, C).
    pub fn forward(&self, x: Tensor, context: &Context) -> Result<Vec<Tensor>> {
        let mut states = vec![x];
        for block in &self.0 {
            let next = states.last().map(|x| block.forward(x, context, None)).transpose()?;
            states.extend(next);
        }
        Ok(states)
    }
}

/// The first weights are those of the reference: the deeper the stack, the smaller what each part adds.
fn block(params: &Params, shape: &EncoderShape<'_>) -> Result<Block> {
    let EncoderShape { width, inner, layers, heads, hidden_act, eps, dropout, factor } = *shape;
    let of_width = (width as f64).powf(-0.5) * factor;
    let of_depth = NormalInit(of_width * (2.0 * layers as f64).powf(-0.5));
    let of_inner = NormalInit((2.0 * width as f64).powf(-0.5) * factor);
    let (attention, mlp) = (params.scope("self_attn"), params.scope("mlp"));
    let project = |name: &str| of_depth.linear(&attention.scope(name), width, width, true);
    let parts = AttentionParts {
        projection: Projection::Separate([project("q_proj")?, project("k_proj")?, project("v_proj")?]),
        out: NormalInit(of_width).linear(&attention.scope("out_proj"), width, width, true)?,
        norms: None,
        num_heads: heads,
        num_key_value_heads: heads,
        head_dim: width / heads,
        scale: None,
        dropout,
        windowed: false,
    };
    let up = of_inner.linear(&mlp.scope("fc1"), width, inner, true)?;
    let down = of_depth.linear(&mlp.scope("fc2"), inner, width, true)?;
    let mlp = match hidden_act {
        "quick_gelu" => Mlp::QuickGelu { up, down },
        other => Mlp::Plain { up, down, activation: activation(other)? },
    };
    let norm = |name: &str| Norm::layer(&params.scope(name), width, eps);
    Ok(Block {
        attention: Attention::new(params, parts)?,
        mlp,
        norms: [norm("layer_norm1")?, norm("layer_norm2")?],
        dropout: Dropout::new(params, 0.0)?,
        inner_dropout: None,
        post_norm: false,
    })
}
