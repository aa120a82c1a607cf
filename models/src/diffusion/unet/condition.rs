//! The U-Net of Stable Diffusion: latents in, latents out, looking at the text.

use super::conditioning::{Conditioning, Fields, UNetConditions};
use super::config::{OneOrMore, expect_count, expect_extent, expect_kernel};
use super::network::{Additions, Network, UpPlan};
use crate::nn::Params;
use kiln_tensor::{Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The hyper-parameters of a [`UNet2dConditionModel`]: names, meanings and defaults of `UNet2DConditionModel` of `diffusers`. The default is
/// nearly Stable Diffusion 1 (whose `cross_attention_dim` is 768).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct UNet2dConditionConfig {
    /// Height and width of the latents that it was trained on. Others work as well.
    pub sample_size: Option<OneOrMore<usize>>,
    /// Channels of the sample.
    pub in_channels: usize,
    /// Channels of the result.
    pub out_channels: usize,
    /// Whether samples lie in 0 to 1 and are brought to −1 to 1 first.
    pub center_input_sample: bool,
    /// The order of the waves: see [`UNet2dConfig::flip_sin_to_cos`](super::UNet2dConfig::flip_sin_to_cos).
    pub flip_sin_to_cos: bool,
    /// Shift of their frequencies.
    pub freq_shift: i64,
    /// Stages on the way down: `DownBlock2D`, or `CrossAttnDownBlock2D` with transformer blocks after each residual block.
    pub down_block_types: Vec<String>,
    /// `UNetMidBlock2DCrossAttn`, `UNetMidBlock2D` (one residual block), or nothing.
    pub mid_block_type: Option<String>,
    /// Stages on the way up: `UpBlock2D` or `CrossAttnUpBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels of each stage.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks of each stage on the way down; those on the way up have one more.
    pub layers_per_block: OneOrMore<usize>,
    /// Zeros around an image before its resolution is halved; 0 for one at its right and lower end only.
    pub downsample_padding: usize,
    /// What sums of residual blocks in the middle are divided by.
    pub mid_block_scale_factor: f64,
    /// Dropout in the residual blocks.
    pub dropout: f64,
    /// The activation: `silu`.
    pub act_fn: String,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// ε of the norms.
    pub norm_eps: f64,
    /// Width of the sequence that the pixels look at.
    pub cross_attention_dim: OneOrMore<usize>,
    /// Transformer blocks after each residual block.
    pub transformer_layers_per_block: OneOrMore<usize>,
    /// The **number** of heads: the name is a mistake that the files of all models keep.
    pub attention_head_dim: OneOrMore<usize>,
    /// The number of heads, where a file says it by this name.
    pub num_attention_heads: Option<OneOrMore<usize>>,
    /// Whether transformers are entered and left through linear layers instead of 1×1 convolutions.
    pub use_linear_projection: bool,
    /// What classes are: see [`UNet2dConfig::class_embed_type`](super::UNet2dConfig::class_embed_type); also vectors of
    /// `projection_class_embeddings_input_dim` (`projection`).
    pub class_embed_type: Option<String>,
    /// Number of classes.
    pub num_class_embeds: Option<usize>,
    /// `text_time` for SDXL's conditions.
    pub addition_embed_type: Option<String>,
    /// Width of each number of `time_ids`.
    pub addition_time_embed_dim: Option<usize>,
    /// Width of the vectors that are projected: of classes, or of `text_embeds` with the embedded `time_ids`.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// How the time enters residual blocks: added (`default`), or as scale and shift after the second norm (`scale_shift`).
    pub resnet_time_scale_shift: String,
    /// Width of the embedding of the time; four times the channels of the first stage if absent.
    pub time_embedding_dim: Option<usize>,
    /// Width of `timestep_cond`.
    pub time_cond_proj_dim: Option<usize>,
    /// Extent of the first convolution.
    pub conv_in_kernel: usize,
    /// Extent of the last convolution.
    pub conv_out_kernel: usize,
    /// What else the file says. `upcast_attention` means nothing here: attention is computed in f32 in any case.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for UNet2dConditionConfig {
    fn default() -> Self {
        let stages = |[plain, attending]: [&str; 2], plain_at: usize| {
            (0..4).map(|i| if i == plain_at { plain } else { attending }.to_owned()).collect()
        };
        Self {
            sample_size: None,
            in_channels: 4,
            out_channels: 4,
            center_input_sample: false,
            flip_sin_to_cos: true,
            freq_shift: 0,
            down_block_types: stages(["DownBlock2D", "CrossAttnDownBlock2D"], 3),
            mid_block_type: Some("UNetMidBlock2DCrossAttn".into()),
            up_block_types: stages(["UpBlock2D", "CrossAttnUpBlock2D"], 0),
            block_out_channels: vec![320, 640, 1280, 1280],
            layers_per_block: 2.into(),
            downsample_padding: 1,
            mid_block_scale_factor: 1.0,
            dropout: 0.0,
            act_fn: "silu".into(),
            norm_num_groups: 32,
            norm_eps: 1e-5,
            cross_attention_dim: 1280.into(),
            transformer_layers_per_block: 1.into(),
            attention_head_dim: 8.into(),
            num_attention_heads: None,
            use_linear_projection: false,
            class_embed_type: None,
            num_class_embeds: None,
            addition_embed_type: None,
            addition_time_embed_dim: None,
            projection_class_embeddings_input_dim: None,
            resnet_time_scale_shift: "default".into(),
            time_embedding_dim: None,
            time_cond_proj_dim: None,
            conv_in_kernel: 3,
            conv_out_kernel: 3,
            other: Map::new(),
        }
    }
}

impl UNet2dConditionConfig {
    fn fields(&self) -> Fields<'_> {
        Fields {
            in_channels: self.in_channels,
            conv_in_kernel: self.conv_in_kernel,
            block_out_channels: &self.block_out_channels,
            layers_per_block: &self.layers_per_block,
            down_block_types: &self.down_block_types,
            mid_block_type: self.mid_block_type.as_deref(),
            downsample_padding: self.downsample_padding,
            mid_block_scale_factor: self.mid_block_scale_factor,
            dropout: self.dropout,
            act_fn: &self.act_fn,
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            resnet_time_scale_shift: &self.resnet_time_scale_shift,
            cross_attention_dim: &self.cross_attention_dim,
            transformer_layers_per_block: &self.transformer_layers_per_block,
            num_heads: self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim),
            use_linear_projection: self.use_linear_projection,
            time_embedding_dim: self.time_embedding_dim,
            time_cond_proj_dim: self.time_cond_proj_dim,
            flip_sin_to_cos: self.flip_sin_to_cos,
            freq_shift: self.freq_shift,
            class_embed_type: self.class_embed_type.as_deref(),
            num_class_embeds: self.num_class_embeds,
            addition_embed_type: self.addition_embed_type.as_deref(),
            addition_time_embed_dim: self.addition_time_embed_dim,
            projection_class_embeddings_input_dim: self.projection_class_embeddings_input_dim,
            other: &self.other,
        }
    }
}

/// The U-Net of Stable Diffusion 1, 2 and XL: from noisy latents, their timestep and a sequence that describes the image, what the model is
/// trained to say of the noise. The names of its parameters are those of `UNet2DConditionModel` of `diffusers`.
///
/// Sources: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022; Podell et al., *SDXL: Improving Latent
/// Diffusion Models for High-Resolution Image Synthesis*, 2023.
///
/// ```
/// # use kiln_models::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel, UNetConditions};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let config = UNet2dConditionConfig {
///     block_out_channels: vec![8, 16],
///     down_block_types: vec!["CrossAttnDownBlock2D".into(), "DownBlock2D".into()],
///     up_block_types: vec!["UpBlock2D".into(), "CrossAttnUpBlock2D".into()],
///     layers_per_block: 1.into(),
///     cross_attention_dim: 12.into(),
///     attention_head_dim: 2.into(), // heads
///     norm_num_groups: 4,
///     ..UNet2dConditionConfig::default()
/// };
/// let model = UNet2dConditionModel::new(&Params::seeded(0), &config)?;
/// let (latents, text) = (Tensor::ones([2, 4, 8, 8], ())?, Tensor::ones([2, 5, 12], ())?);
/// let noise = model.forward(&latents, &Tensor::from_vec(vec![801i64], [1])?, &text, &UNetConditions::default())?;
/// assert_eq!(noise.dims(), [2, 4, 8, 8]);
/// # Ok(()) }
/// ```
pub struct UNet2dConditionModel {
    config: UNet2dConditionConfig,
    params: Params,
    conditioning: Conditioning,
    network: Network,
}

impl UNet2dConditionModel {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If an option is not supported (the error names the field and its value), the extents do not fit each other, or the weights do not
    /// fit them.
    pub fn new(params: &Params, config: &UNet2dConditionConfig) -> Result<Self> {
        let fields = config.fields();
        expect_count("up_block_types", config.up_block_types.len(), config.block_out_channels.len())?;
        expect_kernel("conv_out_kernel", config.conv_out_kernel)?;
        let (plan, up) = fields.plan(&config.up_block_types)?;
        let conditioning = Conditioning::new(params, &fields, &plan, &up)?;
        let out_channels = expect_extent("out_channels", config.out_channels)?;
        let up = UpPlan { up, out_channels, conv_out_kernel: config.conv_out_kernel };
        let network = Network::new(params, &plan, &up)?;
        Ok(Self { config: config.clone(), params: params.clone(), conditioning, network })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &UNet2dConditionConfig {
        &self.config
    }

    /// The scope of the parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Whether the backward pass computes each layer again instead of keeping what is inside: less memory, a third more time.
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.network.recomputes().set(on);
    }

    /// What the model says of noisy latents `sample` (B, in_channels, H, W) at `timesteps` (B), or one for all: (B, out_channels, H, W).
    ///
    /// `encoder_hidden_states` (B, S, cross_attention_dim) is what cross-attention looks at; a model without such takes `None`. Heights and
    /// widths that a stage cannot halve are rounded up, and met again on the way up.
    ///
    /// # Errors
    /// If shapes do not fit, or `conditions` lacks what the model needs or has what it does not know.
    pub fn forward<'a>(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        encoder_hidden_states: impl Into<Option<&'a Tensor>>,
        conditions: &UNetConditions<'_>,
    ) -> Result<Tensor> {
        let centered = if self.config.center_input_sample { Some(sample.mul_scalar(2.0)?.add_scalar(-1.0)?) } else { None };
        let sample = centered.as_ref().unwrap_or(sample);
        let signal = self.conditioning.signal(sample, timesteps, encoder_hidden_states.into(), conditions)?;
        self.network.forward(sample, &signal, Additions { down: conditions.down_residuals, mid: conditions.mid_residual })
    }
}
