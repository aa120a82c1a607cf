//! The way down of a U-Net, which a ControlNet copies, and the whole of it: what is left when the conditions have become a [`Signal`].

use super::stage::{DownBlock, MidBlock, Recomputes, Signal, StagePlan, UpBlock, UpChannels};
use crate::nn::{Conv2d, ConvOptions, GroupNorm, Module, Params};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// How a network is made, whatever its configuration.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub in_channels: usize,
    /// Of the first convolution; odd.
    pub conv_in_kernel: usize,
    /// Of each stage on the way down.
    pub channels: Vec<usize>,
    /// Layers of each stage on the way down; those on the way up have one more.
    pub layers: Vec<usize>,
    pub down: Vec<StagePlan>,
    /// With the layers besides its first block.
    pub mid: Option<(usize, StagePlan)>,
    pub pads_ends: bool,
}

/// How the way up is made, from the bottom on.
#[derive(Clone, Debug)]
pub(super) struct UpPlan {
    pub up: Vec<StagePlan>,
    pub out_channels: usize,
    /// Of the last convolution; odd.
    pub conv_out_kernel: usize,
}

/// A convolution that keeps the resolution.
fn same(params: &Params, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv2d> {
    Conv2d::new(params, inputs, outputs, kernel, ConvOptions::new().with_padding(kernel / 2))
}

/// The way down and the bottom. Named `conv_in`, `down_blocks.N`, `mid_block`.
pub(super) struct Encoder {
    conv_in: Conv2d,
    down: Vec<DownBlock>,
    mid: Option<MidBlock>,
    in_channels: usize,
    recomputes: Recomputes,
}

impl Encoder {
    pub fn new(params: &Params, plan: &Plan) -> Result<Self> {
        let Plan { in_channels, conv_in_kernel, channels, layers, down, mid, pads_ends } = plan;
        let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else {
            return Err(Error::argument("unet", "block_out_channels is empty: there must be one stage at least"));
        };
        let conv_in = same(&params.scope("conv_in"), *in_channels, first, *conv_in_kernel)?;
        let blocks = params.scope("down_blocks");
        let mut inputs = first;
        let mut stages = Vec::new();
        for (i, ((&outputs, &layers), stage)) in channels.iter().zip(layers).zip(down).enumerate() {
            let downsample = (i + 1 < channels.len()).then_some(*pads_ends);
            stages.push(DownBlock::new(&blocks.index(i), [inputs, outputs], layers, stage, downsample)?);
            inputs = outputs;
        }
        let mid = mid.as_ref().map(|(count, stage)| MidBlock::new(&params.scope("mid_block"), last, *count, stage)).transpose()?;
        Ok(Self { conv_in, down: stages, mid, in_channels: *in_channels, recomputes: Recomputes::default() })
    }

    pub fn recomputes(&self) -> &Recomputes {
        &self.recomputes
    }

    /// The first convolution of a sample (B, inputs, H, W), which is checked.
    pub fn enter(&self, sample: &Tensor) -> Result<Tensor> {
        let fits = matches!(sample.dims(), [batch, channels, h, w] if *channels == self.in_channels && batch * h * w > 0);
        if !fits {
            let message = format!("the sample {} must be (B, {}, H, W)", sample.shape(), self.in_channels);
            return Err(Error::shape("unet", message));
        }
        self.conv_in.forward(sample)
    }

    /// What [`enter`](Self::enter) gave and what each part of the way down makes of it, in order: the ways around.
    pub fn descend(&self, entered: Tensor, signal: &Signal) -> Result<Vec<Tensor>> {
        let mut skips = vec![entered.clone()];
        self.down.iter().try_fold(entered, |x, block| block.forward(x, signal, &self.recomputes, &mut skips))?;
        Ok(skips)
    }

    /// The bottom, of the last of the ways around.
    pub fn bottom(&self, skips: &[Tensor], signal: &Signal) -> Result<Tensor> {
        let x = skips.last().ok_or_else(|| Error::shape("unet", "the way down gave nothing"))?.clone();
        match &self.mid {
            Some(mid) => mid.forward(x, signal, &self.recomputes),
            None => Ok(x),
        }
    }
}

/// What is added to a pass from outside: to each of the ways around, and at the bottom.
#[derive(Clone, Copy, Default)]
pub(super) struct Additions<'a> {
    pub down: Option<&'a [Tensor]>,
    pub mid: Option<&'a Tensor>,
}

/// All of a U-Net but what makes the signal. Named as [`Encoder`], and `up_blocks.N`, `conv_norm_out`, `conv_out`.
pub(super) struct Network {
    encoder: Encoder,
    up: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl Network {
    pub fn new(params: &Params, plan: &Plan, up: &UpPlan) -> Result<Self> {
        let encoder = Encoder::new(params, plan)?;
        let (channels, blocks) = (&plan.channels, params.scope("up_blocks"));
        let (Some(&first), Some(&last), Some(stage)) = (channels.first(), channels.last(), plan.down.first()) else {
            return Err(Error::argument("unet", "block_out_channels is empty: there must be one stage at least"));
        };
        let mut below = last;
        let mut stages = Vec::new();
        for (i, stage) in up.up.iter().enumerate() {
            let level = channels.len().saturating_sub(i + 1);
            let (Some(&outputs), Some(&layers)) = (channels.get(level), plan.layers.get(level)) else {
                return Err(Error::argument("unet", "there must be as many stages on the way up as on the way down"));
            };
            let last_skip = channels.get(level.saturating_sub(1)).copied().unwrap_or(outputs);
            let extents = UpChannels { below, last_skip, outputs };
            stages.push(UpBlock::new(&blocks.index(i), extents, layers + 1, stage, level > 0)?);
            below = outputs;
        }
        let norm = GroupNorm::with_options(&params.scope("conv_norm_out"), stage.resnet.groups, first, stage.resnet.eps, true)?;
        let conv_out = same(&params.scope("conv_out"), first, up.out_channels, up.conv_out_kernel)?;
        Ok(Self { encoder, up: stages, conv_norm_out: norm, conv_out })
    }

    pub fn recomputes(&self) -> &Recomputes {
        self.encoder.recomputes()
    }

    /// (B, inputs, H, W) → (B, outputs, H, W)
    pub fn forward(&self, sample: &Tensor, signal: &Signal, additions: Additions<'_>) -> Result<Tensor> {
        let mut skips = self.encoder.descend(self.encoder.enter(sample)?, signal)?;
        let mut x = self.encoder.bottom(&skips, signal)?;
        if let Some(residuals) = additions.down {
            skips = add_all(&skips, residuals)?;
        }
        if let Some(residual) = additions.mid {
            x = add(&x, residual, "the mid residual")?;
        }
        for block in &self.up {
            x = block.forward(x, signal, self.recomputes(), &mut skips)?;
        }
        self.conv_out.forward(&self.conv_norm_out.forward_activated(&x, Activation::Silu)?)
    }
}

fn add_all(skips: &[Tensor], residuals: &[Tensor]) -> Result<Vec<Tensor>> {
    if residuals.len() != skips.len() {
        let message = format!("{} down residuals, but the network has {} ways around", residuals.len(), skips.len());
        return Err(Error::argument("unet", message));
    }
    let pairs = skips.iter().zip(residuals).enumerate();
    pairs.map(|(i, (skip, residual))| add(skip, residual, &format!("down residual {i}"))).collect()
}

/// x + `residual`, which has the shape of x or is one value for each channel, (B, C, 1, 1).
fn add(x: &Tensor, residual: &Tensor, what: &str) -> Result<Tensor> {
    let [batch, channels, _, _] = x.dims_n("unet")?;
    if residual.shape() != x.shape() && residual.dims() != [batch, channels, 1, 1] {
        return Err(Error::shape(
            "unet",
            format!("{what} {} must have the shape {}, or 1 for height and width", residual.shape(), x.shape()),
        ));
    }
    x.add(residual)
}
