//! The convolutional encoder and decoder that all autoencoders of `diffusers`' form share.

use super::CoderBlock;
use crate::diffusion::blocks::{Downsample, ResnetBlock, ResnetOptions, SpatialAttention, Upsample};
use crate::nn::{Conv2d, ConvOptions, GroupNorm, Module, Params};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// ε of every norm.
const EPS: f64 = 1e-6;
const SAME: ConvOptions<2> = ConvOptions::new().with_padding(1);

/// The extents of an encoder or decoder.
#[derive(Clone, Copy)]
pub(super) struct CoderShape<'a> {
    /// Channels of its input.
    pub inputs: usize,
    /// Channels of its output.
    pub outputs: usize,
    /// Its levels, in its order.
    pub blocks: &'a [CoderBlock],
    /// Channels of the levels, from the full resolution on; as many as `blocks`.
    pub channels: &'a [usize],
    /// Residual blocks at each level of the encoder; one less than the decoder's.
    pub layers: usize,
    pub groups: usize,
    pub mid_attention: bool,
}

impl<'a> CoderShape<'a> {
    /// The shape, unless its lists or the activation do not fit the networks.
    pub fn check(self, model: &str, activation: &str) -> Result<CoderShape<'a>> {
        let (blocks, levels) = (self.blocks.len(), self.channels.len());
        if blocks != levels {
            let message =
                format!("there are {blocks} block types and block_out_channels has {levels} entries: each level needs one of both");
            return Err(Error::argument(model, message));
        }
        if activation != "silu" {
            return Err(Error::argument(model, format!("act_fn `{activation}` is not known; there is `silu`")));
        }
        Ok(self)
    }

    /// Channels at the full and at the lowest resolution.
    fn ends(&self) -> Result<(usize, usize)> {
        let none = || Error::argument("autoencoder", "block_out_channels is empty: there must be at least one level");
        self.channels.first().copied().zip(self.channels.last().copied()).ok_or_else(none)
    }

    fn resnet(&self, params: &Params, inputs: usize, outputs: usize) -> Result<ResnetBlock> {
        let options =
            ResnetOptions { groups: self.groups, eps: EPS, time_width: None, scale_shift: false, dropout: 0.0, output_scale: 1.0 };
        ResnetBlock::new(params, inputs, outputs, options)
    }

    fn attention(&self, params: &Params, channels: usize) -> Result<SpatialAttention> {
        SpatialAttention::new(params, channels, 1, self.groups, EPS)
    }

    fn level(&self, params: &Params, kind: CoderBlock, layers: usize, inputs: usize, outputs: usize) -> Result<Level> {
        let (resnets, attentions) = (params.scope("resnets"), params.scope("attentions"));
        let layer = |i| {
            let resnet = self.resnet(&resnets.index(i), if i == 0 { inputs } else { outputs }, outputs)?;
            let attention = (kind == CoderBlock::Attention).then(|| self.attention(&attentions.index(i), outputs)).transpose()?;
            Ok((resnet, attention))
        };
        Ok(Level { layers: (0..layers).map(layer).collect::<Result<_>>()? })
    }

    fn tail(&self, params: &Params, channels: usize) -> Result<Tail> {
        Ok(Tail {
            conv_norm_out: GroupNorm::with_options(&params.scope("conv_norm_out"), self.groups, channels, EPS, true)?,
            conv_out: Conv2d::new(&params.scope("conv_out"), channels, self.outputs, 3, SAME)?,
        })
    }
}

/// Residual blocks, each perhaps with attention behind it.
struct Level {
    layers: Vec<(ResnetBlock, Option<SpatialAttention>)>,
}

impl Module for Level {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.clone();
        for (resnet, attention) in &self.layers {
            h = resnet.forward(&h, None)?;
            if let Some(attention) = attention {
                h = attention.forward(&h)?;
            }
        }
        Ok(h)
    }
}

/// The block at the lowest resolution: `resnets.0`, `attentions.0`, `resnets.1`.
struct Middle {
    first: ResnetBlock,
    attention: Option<SpatialAttention>,
    second: ResnetBlock,
}

impl Middle {
    fn new(params: &Params, shape: &CoderShape<'_>, channels: usize) -> Result<Self> {
        let resnets = params.scope("resnets");
        let attention = || shape.attention(&params.scope("attentions").index(0), channels);
        Ok(Self {
            first: shape.resnet(&resnets.index(0), channels, channels)?,
            attention: shape.mid_attention.then(attention).transpose()?,
            second: shape.resnet(&resnets.index(1), channels, channels)?,
        })
    }
}

impl Module for Middle {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.first.forward(x, None)?;
        if let Some(attention) = &self.attention {
            h = attention.forward(&h)?;
        }
        self.second.forward(&h, None)
    }
}

/// conv_out(silu(conv_norm_out(x)))
struct Tail {
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Module for Tail {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.conv_out.forward(&self.conv_norm_out.forward_activated(x, Activation::Silu)?)
    }
}

/// (B, inputs, H, W) → (B, outputs, H / s, W / s) with s = 2^(levels − 1).
pub(super) struct Encoder {
    conv_in: Conv2d,
    down_blocks: Vec<(Level, Option<Downsample>)>,
    mid_block: Middle,
    tail: Tail,
}

impl Encoder {
    pub fn new(params: &Params, shape: &CoderShape<'_>) -> Result<Self> {
        let (first, last) = shape.ends()?;
        let conv_in = Conv2d::new(&params.scope("conv_in"), shape.inputs, first, 3, SAME)?;
        let list = params.scope("down_blocks");
        let mut inputs = first;
        let mut down_blocks = Vec::new();
        for (i, (&kind, &outputs)) in shape.blocks.iter().zip(shape.channels).enumerate() {
            let block = list.index(i);
            let level = shape.level(&block, kind, shape.layers, inputs, outputs)?;
            let halve = || Downsample::new(&block.scope("downsamplers").index(0), outputs, outputs, true);
            down_blocks.push((level, (i + 1 < shape.channels.len()).then(halve).transpose()?));
            inputs = outputs;
        }
        Ok(Self { conv_in, down_blocks, mid_block: Middle::new(&params.scope("mid_block"), shape, last)?, tail: shape.tail(params, last)? })
    }
}

impl Module for Encoder {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(x)?;
        for (level, downsample) in &self.down_blocks {
            h = level.forward(&h)?;
            if let Some(downsample) = downsample {
                h = downsample.forward(&h)?;
            }
        }
        self.tail.forward(&self.mid_block.forward(&h)?)
    }
}

/// (B, inputs, H, W) → (B, outputs, s·H, s·W) with s = 2^(levels − 1).
pub(super) struct Decoder {
    conv_in: Conv2d,
    mid_block: Middle,
    up_blocks: Vec<(Level, Option<Upsample>)>,
    tail: Tail,
}

impl Decoder {
    pub fn new(params: &Params, shape: &CoderShape<'_>) -> Result<Self> {
        let (first, last) = shape.ends()?;
        let conv_in = Conv2d::new(&params.scope("conv_in"), shape.inputs, last, 3, SAME)?;
        let mid_block = Middle::new(&params.scope("mid_block"), shape, last)?;
        let list = params.scope("up_blocks");
        let layers = shape.layers.saturating_add(1);
        let mut inputs = last;
        let mut up_blocks = Vec::new();
        for (i, (&kind, &outputs)) in shape.blocks.iter().zip(shape.channels.iter().rev()).enumerate() {
            let block = list.index(i);
            let level = shape.level(&block, kind, layers, inputs, outputs)?;
            let double = || Upsample::new(&block.scope("upsamplers").index(0), outputs, outputs);
            up_blocks.push((level, (i + 1 < shape.channels.len()).then(double).transpose()?));
            inputs = outputs;
        }
        Ok(Self { conv_in, mid_block, up_blocks, tail: shape.tail(params, first)? })
    }

    /// The weight of the last layer, whose gradients balance an adversarial loss.
    pub fn last_weight(&self) -> Tensor {
        self.tail.conv_out.weight().get()
    }
}

impl Module for Decoder {
    fn forward(&self, z: &Tensor) -> Result<Tensor> {
        let mut h = self.mid_block.forward(&self.conv_in.forward(z)?)?;
        for (level, upsample) in &self.up_blocks {
            h = level.forward(&h)?;
            if let Some(upsample) = upsample {
                h = upsample.forward(&h)?;
            }
        }
        self.tail.forward(&h)
    }
}
