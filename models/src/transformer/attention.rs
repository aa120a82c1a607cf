//! Multi-head attention with its projections: of a sequence to itself, or to another.

use super::KvCache;
use super::context::{Context, Visible};
use crate::nn::{Linear, Mode, Module, Params, RmsNorm};
use kiln_tensor::{AttentionOptions, Error, Generator, Result, Tensor};

/// Query, key and value from the input.
pub(crate) enum Projection {
    /// One matrix; its output is q|k|v.
    Fused(Linear),
    /// One each.
    Separate([Linear; 3]),
}

/// What an attention is made of.
pub(crate) struct AttentionParts {
    pub projection: Projection,
    pub out: Linear,
    /// Of each head's query and key, before they are turned.
    pub norms: Option<[RmsNorm; 2]>,
    pub num_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Factor of the scores; 1/√hs if `None`.
    pub scale: Option<f64>,
    pub dropout: f64,
    /// Whether it looks through the model's sliding window.
    pub windowed: bool,
}

/// softmax(q kᵀ · scale) v of each head, between projections.
///
/// Source: Vaswani et al., *Attention Is All You Need*, 2017; grouped queries: Ainslie et al., *GQA*, 2023.
pub(crate) struct Attention {
    parts: AttentionParts,
    mode: Mode,
    generator: Generator,
}

impl Attention {
    pub fn new(params: &Params, parts: AttentionParts) -> Result<Self> {
        let AttentionParts { num_heads, num_key_value_heads, head_dim, .. } = parts;
        if num_heads == 0 || num_key_value_heads == 0 || head_dim == 0 || !num_heads.is_multiple_of(num_key_value_heads) {
            let message =
                format!("{num_heads} heads of {head_dim} elements and {num_key_value_heads} of keys: the first must be a multiple");
            return Err(Error::argument("attention", message));
        }
        Ok(Self { parts, mode: params.mode(), generator: params.generator().clone() })
    }

    /// Whether it looks through the model's sliding window.
    pub fn is_windowed(&self) -> bool {
        self.parts.windowed
    }

    /// (B, T, heads · hs) → (B, heads, T, hs)
    fn split(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let [b, t, _] = x.dims_n("attention")?;
        x.reshape([b, t, heads, self.parts.head_dim])?.transpose(1, 2)
    }

    /// Queries (B, nh, T, hs), keys and values (B, nkv, T, hs) of the input (B, T, C).
    fn project(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let AttentionParts { num_heads: n, num_key_value_heads: kv, head_dim: hs, .. } = self.parts;
        let [q, k, v] = match &self.parts.projection {
            Projection::Fused(qkv) => {
                let parts = qkv.forward(x)?.split(&[n * hs, kv * hs, kv * hs], -1)?;
                <[Tensor; 3]>::try_from(parts).map_err(|_| Error::shape("attention", "q, k and v are three parts"))?
            }
            Projection::Separate([q, k, v]) => [q.forward(x)?, k.forward(x)?, v.forward(x)?],
        };
        let [mut q, mut k, v] = [self.split(&q, n)?, self.split(&k, kv)?, self.split(&v, kv)?];
        if let Some([of_queries, of_keys]) = &self.parts.norms {
            (q, k) = (of_queries.forward(&q)?, of_keys.forward(&k)?);
        }
        Ok([q, k, v])
    }

    fn attend(&self, [q, k, v]: [Tensor; 3], visible: &Visible) -> Result<Tensor> {
        let options = AttentionOptions {
            mask: visible.mask.as_ref(),
            causal: visible.causal,
            scale: self.parts.scale,
            enable_gqa: self.parts.num_heads != self.parts.num_key_value_heads,
            dropout_p: if self.mode.is_training() { self.parts.dropout } else { 0.0 },
            generator: Some(&self.generator),
        };
        let y = q.scaled_dot_product_attention(&k, &v, &options)?; // (B, nh, T, hs)
        let [b, n, t, hs] = y.dims_n("attention")?;
        self.parts.out.forward(&y.transpose(1, 2)?.reshape([b, t, n * hs])?)
    }

    /// Of a sequence to itself, (B, T, C) → (B, T, C). `cache` is the cache and the layer's place in it.
    pub fn forward(&self, x: &Tensor, context: &Context, cache: Option<(&mut KvCache, usize)>) -> Result<Tensor> {
        let [mut q, mut k, v] = self.project(x)?;
        if let Some([cos, sin]) = &context.rotary {
            (q, k) = (q.rotary_embedding(cos, sin, false)?, k.rotary_embedding(cos, sin, false)?);
        }
        let visible = context.windowed.as_ref().filter(|_| self.parts.windowed).unwrap_or(&context.full);
        let [k, v] = match cache {
            Some((cache, layer)) => cache.append(layer, &k, &v)?,
            None => [k, v],
        };
        self.attend([q, k, v], visible)
    }

    /// Keys and values (B, nkv, S, hs) of another sequence (B, S, C), for [`across`](Self::across).
    pub fn keys_and_values(&self, source: &Tensor) -> Result<[Tensor; 2]> {
        let [_, k, v] = self.separate()?;
        let heads = self.parts.num_key_value_heads;
        Ok([self.split(&k.forward(source)?, heads)?, self.split(&v.forward(source)?, heads)?])
    }

    /// Of a sequence (B, T, C) to another, whose keys and values are given.
    pub fn across(&self, x: &Tensor, [k, v]: [Tensor; 2], visible: &Visible) -> Result<Tensor> {
        let [q, ..] = self.separate()?;
        self.attend([self.split(&q.forward(x)?, self.parts.num_heads)?, k, v], visible)
    }

    fn separate(&self) -> Result<&[Linear; 3]> {
        match &self.parts.projection {
            Projection::Separate(projections) => Ok(projections),
            Projection::Fused(_) => Err(Error::argument("attention", "one matrix for q, k and v cannot look at another sequence")),
        }
    }
}
