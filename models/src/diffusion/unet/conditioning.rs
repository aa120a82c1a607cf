//! What the U-Net of Stable Diffusion and its ControlNet share: their options, and how the conditions of a pass become its [`Signal`].

use super::config::{Common, OneOrMore, expect_extent, expect_supported, time_extents, unsupported, wrong};
use super::embedding::{ClassEmbedding, ClassPlan, TimeEmbedding, Waves};
use super::network::Plan;
use super::stage::{AttentionPlan, Signal, StagePlan};
use crate::diffusion::blocks::{ResnetOptions, TimestepEmbedding};
use crate::nn::{Module, Params};
use kiln_tensor::{Error, Result, Tensor};
use serde_json::{Map, Value};

/// What a U-Net is told besides the sample, the time and the sequence.
#[derive(Clone, Copy, Default)]
pub struct UNetConditions<'a> {
    /// The class of each sample, for a model with classes: i64 (B) for a table, numbers (B) for `timestep`, vectors (B, width) for
    /// `identity` and `projection`.
    pub class_labels: Option<&'a Tensor>,
    /// One vector for each prompt, (B, width): SDXL's pooled text. With `time_ids`.
    pub text_embeds: Option<&'a Tensor>,
    /// Numbers that are embedded as the time is, (B, n): SDXL's original height and width, top and left crop, height and width.
    pub time_ids: Option<&'a Tensor>,
    /// Added to the waves of the time through `time_cond_proj_dim`, (B, width): the guidance scale that LCM was distilled with.
    pub timestep_cond: Option<&'a Tensor>,
    /// Added to the ways around, in the order in which they are made: see [`Residuals`](super::Residuals).
    pub down_residuals: Option<&'a [Tensor]>,
    /// Added at the bottom.
    pub mid_residual: Option<&'a Tensor>,
}

/// Fields that are supported with these values only.
const FIXED: &[(&str, &[&str])] = &[
    ("only_cross_attention", &["false"]),
    ("mid_block_only_cross_attention", &["null", "false"]),
    ("encoder_hid_dim", &["null"]),
    ("encoder_hid_dim_type", &["null"]),
    ("dual_cross_attention", &["false"]),
    ("resnet_skip_time_act", &["false"]),
    ("resnet_out_scale_factor", &["1", "1.0"]),
    ("time_embedding_type", &["\"positional\""]),
    ("time_embedding_act_fn", &["null"]),
    ("timestep_post_act", &["null"]),
    ("attention_type", &["\"default\""]),
    ("class_embeddings_concat", &["false"]),
    ("cross_attention_norm", &["null"]),
    ("reverse_transformer_layers_per_block", &["null"]),
];

/// The fields that both configurations have.
pub(super) struct Fields<'a> {
    pub in_channels: usize,
    pub conv_in_kernel: usize,
    pub block_out_channels: &'a [usize],
    pub layers_per_block: &'a OneOrMore<usize>,
    pub down_block_types: &'a [String],
    pub mid_block_type: Option<&'a str>,
    pub downsample_padding: usize,
    pub mid_block_scale_factor: f64,
    pub dropout: f64,
    pub act_fn: &'a str,
    pub norm_num_groups: usize,
    pub norm_eps: f64,
    pub resnet_time_scale_shift: &'a str,
    pub cross_attention_dim: &'a OneOrMore<usize>,
    pub transformer_layers_per_block: &'a OneOrMore<usize>,
    /// The number of heads, whatever the configuration calls it.
    pub num_heads: &'a OneOrMore<usize>,
    pub use_linear_projection: bool,
    pub time_embedding_dim: Option<usize>,
    pub time_cond_proj_dim: Option<usize>,
    pub flip_sin_to_cos: bool,
    pub freq_shift: i64,
    pub class_embed_type: Option<&'a str>,
    pub num_class_embeds: Option<usize>,
    pub addition_embed_type: Option<&'a str>,
    pub addition_time_embed_dim: Option<usize>,
    pub projection_class_embeddings_input_dim: Option<usize>,
    pub other: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn common(&self, time_width: usize) -> Result<Common<'_>> {
        Ok(Common {
            in_channels: self.in_channels,
            conv_in_kernel: self.conv_in_kernel,
            channels: self.block_out_channels,
            layers: self.layers_per_block.each("layers_per_block", self.block_out_channels.len())?,
            down_block_types: self.down_block_types,
            downsample_padding: self.downsample_padding,
            groups: self.norm_num_groups,
            eps: self.norm_eps,
            dropout: self.dropout,
            resnet_time_scale_shift: self.resnet_time_scale_shift,
            act_fn: self.act_fn,
            time_width,
        })
    }

    /// Cross-attention of each stage, from the top.
    fn attention(&self) -> Result<Vec<AttentionPlan>> {
        let stages = self.block_out_channels.len();
        let heads = self.num_heads.each("attention_head_dim", stages)?;
        let widths = self.cross_attention_dim.each("cross_attention_dim", stages)?;
        let layers = self.transformer_layers_per_block.each("transformer_layers_per_block", stages)?;
        let plan = |((heads, width), layers)| {
            let context_width = expect_extent("cross_attention_dim", width)?;
            Ok(AttentionPlan::Context { heads, context_width, layers, linear_projection: self.use_linear_projection })
        };
        heads.into_iter().zip(widths).zip(layers).map(plan).collect()
    }

    fn mid(&self, attention: AttentionPlan, resnet: ResnetOptions) -> Result<Option<(usize, StagePlan)>> {
        let resnet = ResnetOptions { output_scale: self.mid_block_scale_factor, ..resnet };
        match self.mid_block_type {
            None => Ok(None),
            Some("UNetMidBlock2DCrossAttn") => Ok(Some((1, StagePlan { attention, resnet }))),
            Some("UNetMidBlock2D") => Ok(Some((0, StagePlan { attention: AttentionPlan::None, resnet }))),
            Some(other) => Err(unsupported("mid_block_type", other, "\"UNetMidBlock2DCrossAttn\", \"UNetMidBlock2D\" or null")),
        }
    }

    /// The way down and the bottom; and how the stages of `up_block_types` are made, from the bottom on.
    pub fn plan(&self, up_block_types: &[String]) -> Result<(Plan, Vec<StagePlan>)> {
        expect_supported(self.other, FIXED)?;
        let (_, time_width) = self.time()?;
        let (common, attention) = (self.common(time_width)?, self.attention()?);
        let resnet = common.resnet()?;
        let of_stage = |field: &str, kind: &str, [plain, attending]: [&str; 2], i: usize| match attention.get(i) {
            Some(_) if kind == plain => Ok(AttentionPlan::None),
            Some(attention) if kind == attending => Ok(*attention),
            Some(_) => Err(unsupported(field, kind, &format!("{plain:?} or {attending:?}"))),
            None => Err(wrong(format!("{field} has more values than block_out_channels"))),
        };
        let last = attention.last().copied().unwrap_or(AttentionPlan::None);
        let down = |kind: &str, i| of_stage("down_block_types", kind, ["DownBlock2D", "CrossAttnDownBlock2D"], i);
        let plan = common.plan(self.mid(last, resnet)?, down)?;
        let up = up_block_types.iter().rev().enumerate().map(|(i, kind)| {
            let attention = of_stage("up_block_types", kind, ["UpBlock2D", "CrossAttnUpBlock2D"], i)?;
            Ok(StagePlan { attention, resnet })
        });
        Ok((plan, up.rev().collect::<Result<_>>()?))
    }

    fn time(&self) -> Result<(Waves, usize)> {
        time_extents(self.block_out_channels, self.time_embedding_dim, self.flip_sin_to_cos, self.freq_shift)
    }
}

/// The width of the sequence that `stages` look at, if one does.
fn context_width<'a>(stages: impl Iterator<Item = &'a StagePlan>) -> Result<Option<usize>> {
    let mut found = None;
    for stage in stages {
        let AttentionPlan::Context { context_width, .. } = stage.attention else { continue };
        if let Some(other) = found.replace(context_width).filter(|&other| other != context_width) {
            return Err(wrong(format!(
                "cross_attention_dim differs between stages ({other} and {context_width}), and all look at one sequence"
            )));
        }
    }
    Ok(found)
}

/// SDXL's conditions: a vector of the prompt beside numbers that are embedded as the time is. Named `linear_1`, `linear_2`.
struct TextTimeEmbedding {
    waves: Waves,
    layers: TimestepEmbedding,
    inputs: usize,
}

impl TextTimeEmbedding {
    fn new(params: &Params, fields: &Fields<'_>, waves: Waves, width: usize) -> Result<Option<Self>> {
        match fields.addition_embed_type {
            None => return Ok(None),
            Some("text_time") => {}
            Some(other) => return Err(unsupported("addition_embed_type", other, "null or \"text_time\"")),
        }
        let needed = |field: &str, value: Option<usize>| match value {
            Some(value) => expect_extent(field, value),
            None => Err(wrong(format!("addition_embed_type \"text_time\" needs {field}"))),
        };
        let of_ids = needed("addition_time_embed_dim", fields.addition_time_embed_dim)?;
        let inputs = needed("projection_class_embeddings_input_dim", fields.projection_class_embeddings_input_dim)?;
        let layers = TimestepEmbedding::new(params, inputs, width)?;
        Ok(Some(Self { waves: Waves { width: of_ids, ..waves }, layers, inputs }))
    }

    /// (B, T) and (B, n) → (B, width)
    fn forward(&self, text_embeds: &Tensor, time_ids: &Tensor, batch: usize) -> Result<Tensor> {
        let (text, ids) = (text_embeds.dims(), time_ids.dims());
        let fits = matches!((text, ids), (&[b, width], &[i, n]) if b == batch && i == batch
            && n.checked_mul(self.waves.width).and_then(|ids| ids.checked_add(width)) == Some(self.inputs));
        if !fits {
            let of_ids = self.waves.width;
            let message = format!(
                "text_embeds {} and time_ids {} must be ({batch}, T) and ({batch}, n) with T + {of_ids} n = {}",
                text_embeds.shape(),
                time_ids.shape(),
                self.inputs
            );
            return Err(Error::shape("unet", message));
        }
        let waves = self.waves.of(&time_ids.flatten(0, 1)?, text_embeds)?; // (B n, width)
        let waves = waves.reshape([batch, self.inputs - text_embeds.dim(1)?])?;
        self.layers.forward(&Tensor::cat(&[text_embeds, &waves], 1)?)
    }
}

/// Makes the signal of a pass. Named `time_embedding`, `class_embedding`, `add_embedding`.
pub(super) struct Conditioning {
    time_embedding: TimeEmbedding,
    class_embedding: ClassEmbedding,
    add_embedding: Option<TextTimeEmbedding>,
    context_width: Option<usize>,
}

impl Conditioning {
    /// For a network of this plan.
    pub fn new(params: &Params, fields: &Fields<'_>, plan: &Plan, up: &[StagePlan]) -> Result<Self> {
        let (waves, width) = fields.time()?;
        let cond = fields.time_cond_proj_dim.map(|value| expect_extent("time_cond_proj_dim", value)).transpose()?;
        let classes = ClassPlan {
            kind: fields.class_embed_type,
            num_classes: fields.num_class_embeds,
            projected: fields.projection_class_embeddings_input_dim,
            waves,
            width,
        };
        Ok(Self {
            time_embedding: TimeEmbedding::new(&params.scope("time_embedding"), waves, width, cond)?,
            class_embedding: ClassEmbedding::new(&params.scope("class_embedding"), &classes)?,
            add_embedding: TextTimeEmbedding::new(&params.scope("add_embedding"), fields, waves, width)?,
            context_width: context_width(plan.down.iter().chain(plan.mid.iter().map(|(_, stage)| stage)).chain(up))?,
        })
    }

    pub fn signal(&self, sample: &Tensor, timesteps: &Tensor, context: Option<&Tensor>, given: &UNetConditions<'_>) -> Result<Signal> {
        let [batch, ..] = sample.dims_n::<4>("unet")?;
        let time = self.time_embedding.forward(timesteps, given.timestep_cond, sample)?;
        let mut time = self.class_embedding.add_to(time, given.class_labels)?;
        match (&self.add_embedding, given.text_embeds, given.time_ids) {
            (None, None, None) => {}
            (Some(embedding), Some(text_embeds), Some(time_ids)) => {
                time = time.add(&embedding.forward(text_embeds, time_ids, batch)?.to_dtype(time.dtype())?)?;
            }
            (Some(_), ..) => {
                return Err(Error::argument("unet", "the model (addition_embed_type text_time) needs text_embeds and time_ids"));
            }
            (None, ..) => {
                let message = "text_embeds or time_ids are given, but the model (addition_embed_type null) takes none";
                return Err(Error::argument("unet", message));
            }
        }
        Ok(Signal { time: time.silu()?, context: self.context(batch, context)? })
    }

    /// The sequence, checked, if the network looks at one.
    fn context(&self, batch: usize, context: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(width) = self.context_width else { return Ok(None) };
        let Some(context) = context else {
            let message = format!("encoder_hidden_states are missing: the model looks at a sequence ({batch}, S, {width})");
            return Err(Error::argument("unet", message));
        };
        if !matches!(*context.dims(), [b, len, c] if b == batch && len > 0 && c == width) {
            let message = format!("encoder_hidden_states {} must be ({batch}, S, {width})", context.shape());
            return Err(Error::shape("unet", message));
        }
        Ok(Some(context.clone()))
    }
}
