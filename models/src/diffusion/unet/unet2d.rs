//! The U-Net of DDPM: pixels in, pixels out, attention between pixels at the low resolutions.

use super::config::{Common, OneOrMore, expect_count, expect_extent, expect_supported, time_extents, unsupported};
use super::embedding::{ClassEmbedding, ClassPlan, TimeEmbedding};
use super::network::{Additions, Network, Plan, UpPlan};
use super::stage::{AttentionPlan, Signal, StagePlan};
use crate::diffusion::blocks::ResnetOptions;
use crate::nn::Params;
use kiln_tensor::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The hyper-parameters of a [`UNet2dModel`]: names, meanings and defaults of `UNet2DModel` of `diffusers`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2dConfig {
    /// Height and width of the images that it was trained on. Others work as well.
    pub sample_size: Option<OneOrMore<usize>>,
    /// Channels of the sample.
    pub in_channels: usize,
    /// Channels of the result.
    pub out_channels: usize,
    /// Whether samples lie in 0 to 1 and are brought to −1 to 1 first.
    pub center_input_sample: bool,
    /// Width of the embedding of the time; four times the channels of the first stage if absent.
    pub time_embedding_dim: Option<usize>,
    /// Shift of the frequencies: see `flip_sin_to_cos`.
    pub freq_shift: i64,
    /// With half = channels of the first stage / 2, f(i) = 10000^(−i / (half − `freq_shift`)), a timestep t is [cos(t f), sin(t f)]; without
    /// the flip it is [sin(t f), cos(t f)], as in the paper (with a shift of 1).
    pub flip_sin_to_cos: bool,
    /// Stages on the way down: `DownBlock2D`, or `AttnDownBlock2D` with attention between pixels after each residual block.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2D`, or nothing.
    pub mid_block_type: Option<String>,
    /// Stages on the way up: `UpBlock2D` or `AttnUpBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels of each stage.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each stage on the way down; those on the way up have one more.
    pub layers_per_block: usize,
    /// What sums in the middle are divided by.
    pub mid_block_scale_factor: f64,
    /// Zeros around an image before its resolution is halved; 0 for one at its right and lower end only.
    pub downsample_padding: usize,
    /// Dropout in the residual blocks.
    pub dropout: f64,
    /// The activation: `silu`.
    pub act_fn: String,
    /// Width of a head; one head if absent.
    pub attention_head_dim: Option<usize>,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// Groups of the norm of the attention in the middle. If absent, those of the others, or no norm there with `scale_shift`.
    pub attn_norm_num_groups: Option<usize>,
    /// ε of the norms.
    pub norm_eps: f64,
    /// How the time enters residual blocks: added (`default`), or as scale and shift after the second norm (`scale_shift`).
    pub resnet_time_scale_shift: String,
    /// Whether there is attention in the middle.
    pub add_attention: bool,
    /// What classes are: rows of a table if absent and there are `num_class_embeds`; numbers that are embedded as the time is
    /// (`timestep`); or vectors of the time embedding's width (`identity`).
    pub class_embed_type: Option<String>,
    /// Number of classes.
    pub num_class_embeds: Option<usize>,
    /// What else the file says.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for UNet2dConfig {
    fn default() -> Self {
        let names = |names: [&str; 4]| names.map(str::to_owned).to_vec();
        Self {
            sample_size: None,
            in_channels: 3,
            out_channels: 3,
            center_input_sample: false,
            time_embedding_dim: None,
            freq_shift: 0,
            flip_sin_to_cos: true,
            down_block_types: names(["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]),
            mid_block_type: Some("UNetMidBlock2D".into()),
            up_block_types: names(["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"]),
            block_out_channels: vec![224, 448, 672, 896],
            layers_per_block: 2,
            mid_block_scale_factor: 1.0,
            downsample_padding: 1,
            dropout: 0.0,
            act_fn: "silu".into(),
            attention_head_dim: Some(8),
            norm_num_groups: 32,
            attn_norm_num_groups: None,
            norm_eps: 1e-5,
            resnet_time_scale_shift: "default".into(),
            add_attention: true,
            class_embed_type: None,
            num_class_embeds: None,
            other: Map::new(),
        }
    }
}

/// Fields that are supported with these values only.
const FIXED: &[(&str, &[&str])] =
    &[("time_embedding_type", &["\"positional\""]), ("downsample_type", &["\"conv\""]), ("upsample_type", &["\"conv\""])];

impl UNet2dConfig {
    fn common(&self, time_width: usize) -> Common<'_> {
        Common {
            in_channels: self.in_channels,
            conv_in_kernel: 3,
            channels: &self.block_out_channels,
            layers: vec![self.layers_per_block; self.block_out_channels.len()],
            down_block_types: &self.down_block_types,
            downsample_padding: self.downsample_padding,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            dropout: self.dropout,
            resnet_time_scale_shift: &self.resnet_time_scale_shift,
            act_fn: &self.act_fn,
            time_width,
        }
    }

    /// The attention of stage `i` from the top.
    fn attention(&self, i: usize, groups: Option<usize>) -> AttentionPlan {
        let one_head = || self.block_out_channels.get(i).copied().unwrap_or(0);
        AttentionPlan::Pixels { head_width: self.attention_head_dim.unwrap_or_else(one_head), groups }
    }

    fn mid(&self, resnet: ResnetOptions) -> Result<Option<(usize, StagePlan)>> {
        match self.mid_block_type.as_deref() {
            None => return Ok(None),
            Some("UNetMidBlock2D") => {}
            Some(other) => return Err(unsupported("mid_block_type", other, "\"UNetMidBlock2D\" or null")),
        }
        let groups = self.attn_norm_num_groups.or((!resnet.scale_shift).then_some(self.norm_num_groups));
        let last = self.block_out_channels.len().saturating_sub(1);
        let attention = if self.add_attention { self.attention(last, groups) } else { AttentionPlan::None };
        Ok(Some((1, StagePlan { attention, resnet: ResnetOptions { output_scale: self.mid_block_scale_factor, ..resnet } })))
    }

    fn plans(&self, time_width: usize) -> Result<(Plan, UpPlan)> {
        expect_supported(&self.other, FIXED)?;
        let (common, stages) = (self.common(time_width), self.block_out_channels.len());
        let resnet = common.resnet()?;
        let attending = |i| self.attention(i, Some(self.norm_num_groups));
        let plan = common.plan(self.mid(resnet)?, |kind, i| match kind {
            "DownBlock2D" => Ok(AttentionPlan::None),
            "AttnDownBlock2D" => Ok(attending(i)),
            other => Err(unsupported("down_block_types", other, "\"DownBlock2D\" or \"AttnDownBlock2D\"")),
        })?;
        expect_count("up_block_types", self.up_block_types.len(), stages)?;
        let up = self.up_block_types.iter().rev().enumerate().map(|(i, kind)| {
            let attention = match kind.as_str() {
                "UpBlock2D" => AttentionPlan::None,
                "AttnUpBlock2D" => attending(i),
                other => return Err(unsupported("up_block_types", other, "\"UpBlock2D\" or \"AttnUpBlock2D\"")),
            };
            Ok(StagePlan { attention, resnet })
        });
        let up = up.rev().collect::<Result<_>>()?;
        Ok((plan, UpPlan { up, out_channels: expect_extent("out_channels", self.out_channels)?, conv_out_kernel: 3 }))
    }
}

/// The U-Net that DDPM denoises pixels with, of any number of stages: from a noisy sample and its timestep the noise in it, or what else
/// it is trained to say. The names of its parameters are those of `UNet2DModel` of `diffusers`.
///
/// Sources: Ho et al., *Denoising Diffusion Probabilistic Models*, 2020; Dhariwal and Nichol, *Diffusion Models Beat GANs on Image
/// Synthesis*, 2021 (`scale_shift`).
///
/// ```
/// # use kiln_models::diffusion::unet::{UNet2dConfig, UNet2dModel};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let config = UNet2dConfig {
///     in_channels: 1,
///     out_channels: 1,
///     block_out_channels: vec![8, 16],
///     down_block_types: vec!["DownBlock2D".into(), "AttnDownBlock2D".into()],
///     up_block_types: vec!["AttnUpBlock2D".into(), "UpBlock2D".into()],
///     layers_per_block: 1,
///     norm_num_groups: 4,
///     num_class_embeds: Some(10),
///     ..UNet2dConfig::default()
/// };
/// let model = UNet2dModel::new(&Params::seeded(0), &config)?;
/// let (steps, classes) = (Tensor::from_vec(vec![10i64, 900], [2])?, Tensor::from_vec(vec![3i64, 7], [2])?);
/// let noise = model.forward(&Tensor::ones([2, 1, 8, 8], ())?, &steps, Some(&classes))?;
/// assert_eq!(noise.dims(), [2, 1, 8, 8]);
/// # Ok(()) }
/// ```
pub struct UNet2dModel {
    config: UNet2dConfig,
    params: Params,
    time_embedding: TimeEmbedding,
    class_embedding: ClassEmbedding,
    network: Network,
}

impl UNet2dModel {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If an option is not supported (the error names the field and its value), the extents do not fit each other, or the weights do not
    /// fit them.
    pub fn new(params: &Params, config: &UNet2dConfig) -> Result<Self> {
        let UNet2dConfig { block_out_channels, time_embedding_dim, flip_sin_to_cos, freq_shift, .. } = config;
        let (waves, width) = time_extents(block_out_channels, *time_embedding_dim, *flip_sin_to_cos, *freq_shift)?;
        let (plan, up) = config.plans(width)?;
        let kind = config.class_embed_type.as_deref();
        if kind == Some("projection") {
            return Err(unsupported("class_embed_type", "projection", "null, \"timestep\" or \"identity\""));
        }
        let classes = ClassPlan { kind, num_classes: config.num_class_embeds, projected: None, waves, width };
        Ok(Self {
            config: config.clone(),
            params: params.clone(),
            time_embedding: TimeEmbedding::new(&params.scope("time_embedding"), waves, width, None)?,
            class_embedding: ClassEmbedding::new(&params.scope("class_embedding"), &classes)?,
            network: Network::new(params, &plan, &up)?,
        })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &UNet2dConfig {
        &self.config
    }

    /// The scope of the parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Whether the backward pass of training computes each layer again instead of keeping what is inside: less memory, a third more time.
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.network.recomputes().set(on);
    }

    /// What the model says of a noisy `sample` (B, in_channels, H, W) at `timesteps` (B), or one for all: (B, out_channels, H, W).
    ///
    /// `class_labels`, which a model with classes needs: i64 (B) for a table, numbers (B) for `timestep`, vectors (B, width) for
    /// `identity`. Heights and widths that a stage cannot halve are rounded up, and met again on the way up.
    ///
    /// # Errors
    /// If shapes do not fit, a label is no class, or labels are missing or given where there are no classes.
    pub fn forward(&self, sample: &Tensor, timesteps: &Tensor, class_labels: Option<&Tensor>) -> Result<Tensor> {
        let centered = if self.config.center_input_sample { Some(sample.mul_scalar(2.0)?.add_scalar(-1.0)?) } else { None };
        let sample = centered.as_ref().unwrap_or(sample);
        let time = self.time_embedding.forward(timesteps, None, sample)?;
        let time = self.class_embedding.add_to(time, class_labels)?.silu()?;
        self.network.forward(sample, &Signal { time, context: None }, Additions::default())
    }
}
