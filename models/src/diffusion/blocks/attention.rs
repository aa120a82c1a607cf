//! Attention between the pixels of an image, and from them to a sequence that describes it.

use crate::nn::{Conv2d, GroupNorm, LayerNorm, Linear, Module, Params};
use kiln_tensor::{AttentionOptions, Error, Result, Tensor};

/// Extents of an [`Attention`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    /// Width of what asks, and of the result.
    pub width: usize,
    /// Width of what is looked at.
    pub context_width: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Whether query, key and value have biases; the output always has.
    pub bias: bool,
}

/// softmax(q kᵀ / √hs) v of each head, between projections `to_q`, `to_k`, `to_v`, `to_out.0`.
pub(crate) struct Attention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    heads: usize,
}

impl Attention {
    pub fn new(params: &Params, shape: AttentionShape) -> Result<Self> {
        let AttentionShape { width, context_width, heads, head_width, bias } = shape;
        if heads == 0 || head_width == 0 {
            return Err(Error::argument(
                "attention",
                format!("{heads} heads of {head_width} elements: there must be at least one of each"),
            ));
        }
        let inner = heads * head_width;
        Ok(Self {
            to_q: Linear::new(&params.scope("to_q"), width, inner, bias)?,
            to_k: Linear::new(&params.scope("to_k"), context_width, inner, bias)?,
            to_v: Linear::new(&params.scope("to_v"), context_width, inner, bias)?,
            to_out: Linear::new(&params.scope("to_out").index(0), inner, width, true)?,
            heads,
        })
    }

    /// (B, T, C) → (B, T, C), looking at `context` (B, S, Cc), or at itself.
    pub fn forward(&self, x: &Tensor, context: Option<&Tensor>) -> Result<Tensor> {
        let context = context.unwrap_or(x);
        let heads = |x: Tensor| {
            let [b, t, inner] = x.dims_n("attention")?;
            x.reshape([b, t, self.heads, inner / self.heads])?.transpose(1, 2) // (B, nh, T, hs)
        };
        let (q, k, v) = (heads(self.to_q.forward(x)?)?, heads(self.to_k.forward(context)?)?, heads(self.to_v.forward(context)?)?);
        let y = q.scaled_dot_product_attention(&k, &v, &AttentionOptions::default())?;
        let [b, n, t, hs] = y.dims_n("attention")?;
        self.to_out.forward(&y.transpose(1, 2)?.reshape([b, t, n * hs])?)
    }
}

/// (B, C, H, W) → (B, H·W, C)
fn to_sequence(x: &Tensor) -> Result<Tensor> {
    let [b, c, h, w] = x.dims_n("attention")?;
    x.reshape([b, c, h * w])?.transpose(1, 2)
}

/// (B, H·W, C) → (B, C, H, W)
fn to_image(x: &Tensor, [h, w]: [usize; 2]) -> Result<Tensor> {
    let [b, _, c] = x.dims_n("attention")?;
    x.transpose(1, 2)?.reshape([b, c, h, w])
}

/// How a [`SpatialAttention`] is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpatialAttentionOptions {
    /// Channels of the image.
    pub channels: usize,
    /// Number of heads, which divides the channels.
    pub heads: usize,
    /// Groups of the norm; there is none if absent.
    pub groups: Option<usize>,
    /// ε of the norm.
    pub eps: f64,
    /// The sum of both ways is divided by this.
    pub output_scale: f64,
}

/// x + attention(group_norm(x)) between all pixels, named as one `Attention` of `diffusers`: (B, C, H, W) → (B, C, H, W).
pub(crate) struct SpatialAttention {
    group_norm: Option<GroupNorm>,
    attention: Attention,
    output_scale: f64,
}

impl SpatialAttention {
    pub fn new(params: &Params, channels: usize, heads: usize, groups: usize, eps: f64) -> Result<Self> {
        Self::with_options(params, SpatialAttentionOptions { channels, heads, groups: Some(groups), eps, output_scale: 1.0 })
    }

    pub fn with_options(params: &Params, options: SpatialAttentionOptions) -> Result<Self> {
        let SpatialAttentionOptions { channels, heads, groups, eps, output_scale } = options;
        if heads == 0 || !channels.is_multiple_of(heads) {
            return Err(Error::argument("attention", format!("{heads} heads do not divide {channels} channels")));
        }
        let shape = AttentionShape { width: channels, context_width: channels, heads, head_width: channels / heads, bias: true };
        let norm = |groups| GroupNorm::with_options(&params.scope("group_norm"), groups, channels, eps, true);
        Ok(Self { group_norm: groups.map(norm).transpose()?, attention: Attention::new(params, shape)?, output_scale })
    }
}

impl Module for SpatialAttention {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [_, _, h, w] = x.dims_n("attention")?;
        let normed = self.group_norm.as_ref().map(|norm| norm.forward(x)).transpose()?;
        let y = self.attention.forward(&to_sequence(normed.as_ref().unwrap_or(x))?, None)?;
        let sum = x.add(&to_image(&y, [h, w])?)?;
        if self.output_scale == 1.0 { Ok(sum) } else { sum.mul_scalar(1.0 / self.output_scale) }
    }
}

/// Attention of a sequence to itself, then to a context, then a gated feed-forward part: each with its norm and its way around. Named
/// `norm1`, `attn1`, `norm2`, `attn2`, `norm3`, `ff.net.0.proj`, `ff.net.2`.
pub(crate) struct TransformerBlock {
    norms: [LayerNorm; 3],
    attn1: Attention,
    attn2: Attention,
    up: Linear,
    down: Linear,
}

impl TransformerBlock {
    /// `context_width` is that of what `attn2` looks at. The block widens by four in its feed-forward part.
    pub fn new(params: &Params, width: usize, context_width: usize, heads: usize, head_width: usize) -> Result<Self> {
        let norm = |name: &str| LayerNorm::new(&params.scope(name), width);
        let own = AttentionShape { width, context_width: width, heads, head_width, bias: false };
        let net = params.scope("ff").scope("net");
        Ok(Self {
            norms: [norm("norm1")?, norm("norm2")?, norm("norm3")?],
            attn1: Attention::new(&params.scope("attn1"), own)?,
            attn2: Attention::new(&params.scope("attn2"), AttentionShape { context_width, ..own })?,
            up: Linear::new(&net.index(0).scope("proj"), width, 8 * width, true)?,
            down: Linear::new(&net.index(2), 4 * width, width, true)?,
        })
    }

    /// (B, T, C) → (B, T, C); `attn2` looks at `context` (B, S, Cc), or at the sequence itself.
    pub fn forward(&self, x: &Tensor, context: Option<&Tensor>) -> Result<Tensor> {
        let x = x.add(&self.attn1.forward(&self.norms[0].forward(x)?, None)?)?;
        let x = x.add(&self.attn2.forward(&self.norms[1].forward(&x)?, context)?)?;
        let [up, gate] = last_halves(&self.up.forward(&self.norms[2].forward(&x)?)?)?;
        x.add(&self.down.forward(&gate.geglu(&up)?)?)
    }
}

fn last_halves(x: &Tensor) -> Result<[Tensor; 2]> {
    <[Tensor; 2]>::try_from(x.chunk(2, -1)?).map_err(|_| Error::shape("chunk", "an even width is needed"))
}

/// How a [`Transformer2d`] is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transformer2dOptions {
    /// Channels of the image.
    pub channels: usize,
    /// Width of the sequence that its pixels look at.
    pub context_width: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_width: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Groups of the norm.
    pub groups: usize,
    /// The projections are linear layers (Stable Diffusion 2, XL) instead of 1×1 convolutions. The values are the same.
    pub linear_projection: bool,
}

/// The projection at either end of a [`Transformer2d`].
enum Projection {
    Conv(Conv2d),
    Linear(Linear),
}

impl Projection {
    fn new(params: &Params, inputs: usize, outputs: usize, linear: bool) -> Result<Self> {
        Ok(if linear {
            Projection::Linear(Linear::new(params, inputs, outputs, true)?)
        } else {
            Projection::Conv(Conv2d::new(params, inputs, outputs, 1, ())?)
        })
    }
}

/// Pixels as a sequence through transformer blocks, and back, with a way around: (B, C, H, W) → (B, C, H, W). Named `norm`, `proj_in`,
/// `transformer_blocks.N`, `proj_out`.
///
/// Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022.
pub(crate) struct Transformer2d {
    norm: GroupNorm,
    proj_in: Projection,
    blocks: Vec<TransformerBlock>,
    proj_out: Projection,
}

impl Transformer2d {
    pub fn new(params: &Params, options: Transformer2dOptions) -> Result<Self> {
        let Transformer2dOptions { channels, context_width, heads, head_width, layers, groups, linear_projection } = options;
        let inner = heads * head_width;
        let list = params.scope("transformer_blocks");
        let block = |i| TransformerBlock::new(&list.index(i), inner, context_width, heads, head_width);
        Ok(Self {
            norm: GroupNorm::with_options(&params.scope("norm"), groups, channels, 1e-6, true)?,
            proj_in: Projection::new(&params.scope("proj_in"), channels, inner, linear_projection)?,
            blocks: (0..layers).map(block).collect::<Result<_>>()?,
            proj_out: Projection::new(&params.scope("proj_out"), inner, channels, linear_projection)?,
        })
    }

    pub fn forward(&self, x: &Tensor, context: Option<&Tensor>) -> Result<Tensor> {
        let [_, _, h, w] = x.dims_n("transformer")?;
        let normed = self.norm.forward(x)?;
        let mut y = match &self.proj_in {
            Projection::Conv(conv) => to_sequence(&conv.forward(&normed)?)?,
            Projection::Linear(linear) => linear.forward(&to_sequence(&normed)?)?,
        };
        for block in &self.blocks {
            y = block.forward(&y, context)?;
        }
        let y = match &self.proj_out {
            Projection::Conv(conv) => conv.forward(&to_image(&y, [h, w])?)?,
            Projection::Linear(linear) => to_image(&linear.forward(&y)?, [h, w])?,
        };
        x.add(&y)
    }
}
