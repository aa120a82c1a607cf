//! The stages of a U-Net: layers of one resolution on the way down, at the bottom, and on the way up, which several networks are built from.

use crate::diffusion::blocks::{
    Downsample, ResnetBlock, ResnetOptions, SpatialAttention, SpatialAttentionOptions, Transformer2d, Transformer2dOptions, Upsample,
};
use crate::nn::{Module, Params};
use kiln_autograd::checkpoint;
use kiln_tensor::{Error, Result, Tensor};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// What every layer of a pass sees besides its input.
#[derive(Clone)]
pub(super) struct Signal {
    /// silu of the embedding of the time and what else conditions the whole image, (B, width).
    pub time: Tensor,
    /// The sequence that cross-attention looks at, (B, S, C).
    pub context: Option<Tensor>,
}

/// What follows a residual block.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum AttentionPlan {
    None,
    /// Between the pixels.
    Pixels {
        /// Width of a head.
        head_width: usize,
        /// Groups of the norm, if it has one.
        groups: Option<usize>,
    },
    /// Between the pixels, and from them to the context.
    Context {
        heads: usize,
        context_width: usize,
        layers: usize,
        linear_projection: bool,
    },
}

/// How the layers of a stage are made.
#[derive(Clone, Copy, Debug)]
pub(super) struct StagePlan {
    pub attention: AttentionPlan,
    pub resnet: ResnetOptions,
}

/// Whether a training pass computes each layer again in the backward pass instead of keeping what is inside.
#[derive(Default)]
pub(super) struct Recomputes(AtomicBool);

impl Recomputes {
    pub fn set(&self, on: bool) {
        self.0.store(on, Relaxed);
    }

    fn applies(&self) -> bool {
        self.0.load(Relaxed)
    }
}

enum AttentionLayer {
    Pixels(SpatialAttention),
    Context(Box<Transformer2d>),
}

impl AttentionLayer {
    fn new(params: &Params, channels: usize, plan: &StagePlan) -> Result<Option<Self>> {
        let ResnetOptions { groups: resnet_groups, eps, output_scale, .. } = plan.resnet;
        Ok(match plan.attention {
            AttentionPlan::None => None,
            AttentionPlan::Pixels { head_width, groups } => {
                let heads = channels.checked_div(head_width).unwrap_or(0);
                if heads == 0 || !channels.is_multiple_of(head_width) {
                    let message = format!("`{}`: attention_head_dim {head_width} does not divide {channels} channels", params.name());
                    return Err(Error::argument("unet", message));
                }
                let options = SpatialAttentionOptions { channels, heads, groups, eps, output_scale };
                Some(AttentionLayer::Pixels(SpatialAttention::with_options(params, options)?))
            }
            AttentionPlan::Context { heads, context_width, layers, linear_projection } => {
                if heads == 0 || !channels.is_multiple_of(heads) {
                    let what = "heads (which the configuration calls attention_head_dim)";
                    return Err(Error::argument("unet", format!("`{}`: {heads} {what} do not divide {channels} channels", params.name())));
                }
                let head_width = channels / heads;
                let groups = resnet_groups;
                let options = Transformer2dOptions { channels, context_width, heads, head_width, layers, groups, linear_projection };
                Some(AttentionLayer::Context(Box::new(Transformer2d::new(params, options)?)))
            }
        })
    }

    fn forward(&self, x: &Tensor, signal: &Signal) -> Result<Tensor> {
        match self {
            AttentionLayer::Pixels(attention) => attention.forward(x),
            AttentionLayer::Context(transformer) => transformer.forward(x, signal.context.as_ref()),
        }
    }
}

/// A residual block, and attention before or after it.
struct Layer {
    resnet: ResnetBlock,
    attention: Option<AttentionLayer>,
    attention_first: bool,
}

impl Layer {
    fn compute(&self, x: &Tensor, signal: &Signal) -> Result<Tensor> {
        let resnet = |x: &Tensor| self.resnet.forward(x, Some(&signal.time));
        match &self.attention {
            None => resnet(x),
            Some(attention) if self.attention_first => resnet(&attention.forward(x, signal)?),
            Some(attention) => attention.forward(&resnet(x)?, signal),
        }
    }

    fn forward(self: &Arc<Self>, x: &Tensor, signal: &Signal, recomputes: &Recomputes) -> Result<Tensor> {
        if !recomputes.applies() {
            return self.compute(x, signal);
        }
        let (layer, signal) = (self.clone(), signal.clone());
        checkpoint(move |x| layer.compute(&x[0], &signal), &[x])
    }
}

/// The layers of a stage: layer `i` takes `inputs(i)` channels and gives `outputs`.
fn layers(params: &Params, count: usize, inputs: impl Fn(usize) -> usize, outputs: usize, plan: &StagePlan) -> Result<Vec<Arc<Layer>>> {
    let (resnets, attentions) = (params.scope("resnets"), params.scope("attentions"));
    let layer = |i| {
        let resnet = ResnetBlock::new(&resnets.index(i), inputs(i), outputs, plan.resnet)?;
        let attention = AttentionLayer::new(&attentions.index(i), outputs, plan)?;
        Ok(Arc::new(Layer { resnet, attention, attention_first: false }))
    };
    (0..count).map(layer).collect()
}

/// Layers, then half the resolution. Named `resnets.N`, `attentions.N`, `downsamplers.0`.
pub(super) struct DownBlock {
    layers: Vec<Arc<Layer>>,
    downsample: Option<Downsample>,
}

impl DownBlock {
    /// `downsample`: whether there is one, and then whether it pads the ends only.
    pub fn new(params: &Params, [inputs, outputs]: [usize; 2], count: usize, plan: &StagePlan, downsample: Option<bool>) -> Result<Self> {
        let down = |pads_ends| Downsample::new(&params.scope("downsamplers").index(0), outputs, outputs, pads_ends);
        let layers = layers(params, count, |i| if i == 0 { inputs } else { outputs }, outputs, plan)?;
        Ok(Self { layers, downsample: downsample.map(down).transpose()? })
    }

    /// (B, inputs, H, W) → (B, outputs, H/2, W/2); adds what each part gives to `skips`.
    pub fn forward(&self, mut x: Tensor, signal: &Signal, recomputes: &Recomputes, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            x = layer.forward(&x, signal, recomputes)?;
            skips.push(x.clone());
        }
        if let Some(downsample) = &self.downsample {
            x = downsample.forward(&x)?;
            skips.push(x.clone());
        }
        Ok(x)
    }
}

/// A residual block, then layers whose attention comes first. Named `resnets.N`, `attentions.N`.
pub(super) struct MidBlock {
    layers: Vec<Arc<Layer>>,
}

impl MidBlock {
    /// `count` layers besides the first block.
    pub fn new(params: &Params, channels: usize, count: usize, plan: &StagePlan) -> Result<Self> {
        let (resnets, attentions) = (params.scope("resnets"), params.scope("attentions"));
        let layer = |i: usize| {
            let attention = match i.checked_sub(1) {
                Some(i) => AttentionLayer::new(&attentions.index(i), channels, plan)?,
                None => None,
            };
            let resnet = ResnetBlock::new(&resnets.index(i), channels, channels, plan.resnet)?;
            Ok(Arc::new(Layer { resnet, attention, attention_first: true }))
        };
        Ok(Self { layers: (0..=count).map(layer).collect::<Result<_>>()? })
    }

    /// (B, C, H, W) → (B, C, H, W)
    pub fn forward(&self, x: Tensor, signal: &Signal, recomputes: &Recomputes) -> Result<Tensor> {
        self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, signal, recomputes))
    }
}

/// Channels of an [`UpBlock`].
#[derive(Clone, Copy)]
pub(super) struct UpChannels {
    /// Of what comes from below.
    pub below: usize,
    /// Of the way around into its last layer, which is that of the stage above; the others are as wide as the stage.
    pub last_skip: usize,
    pub outputs: usize,
}

/// Layers, each of which takes a way around from the way down, then twice the resolution. Named `resnets.N`, `attentions.N`,
/// `upsamplers.0`.
pub(super) struct UpBlock {
    layers: Vec<Arc<Layer>>,
    upsample: Option<Upsample>,
}

impl UpBlock {
    pub fn new(params: &Params, channels: UpChannels, count: usize, plan: &StagePlan, upsample: bool) -> Result<Self> {
        let UpChannels { below, last_skip, outputs } = channels;
        let inputs = |i: usize| {
            let skip = if i + 1 == count { last_skip } else { outputs };
            if i == 0 { below + skip } else { outputs + skip }
        };
        let up = || Upsample::new(&params.scope("upsamplers").index(0), outputs, outputs);
        Ok(Self { layers: layers(params, count, inputs, outputs, plan)?, upsample: upsample.then(up).transpose()? })
    }

    /// (B, below, H, W) → (B, outputs, 2H, 2W), or as large as the last of `skips` that it leaves.
    pub fn forward(&self, mut x: Tensor, signal: &Signal, recomputes: &Recomputes, skips: &mut Vec<Tensor>) -> Result<Tensor> {
        for layer in &self.layers {
            let skip = skips.pop().ok_or_else(|| Error::shape("unet", "there are more layers on the way up than ways around"))?;
            x = layer.forward(&Tensor::cat(&[&x, &skip], 1)?, signal, recomputes)?;
        }
        match (&self.upsample, skips.last()) {
            (Some(upsample), Some(next)) => upsample.forward_to(&x, [next.dim(-2)?, next.dim(-1)?]),
            (Some(upsample), None) => upsample.forward(&x),
            (None, _) => Ok(x),
        }
    }
}
