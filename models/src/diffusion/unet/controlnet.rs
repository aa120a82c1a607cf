//! ControlNet: a copy of a U-Net's way down that sees another image, and speaks to the U-Net through convolutions that start as zeros.

use super::condition::UNet2dConditionModel;
use super::conditioning::{Conditioning, Fields, UNetConditions};
use super::config::{OneOrMore, expect_extent, unsupported, wrong};
use super::network::{Encoder, Plan};
use crate::nn::{Conv2d, ConvOptions, Init, LoadMode, Module, Params, StateDict};
use kiln_tensor::{Activation, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The hyper-parameters of a [`ControlNetModel`]: names, meanings and defaults of `ControlNetModel` of `diffusers`. Those of the U-Net mean
/// what they mean [there](super::UNet2dConditionConfig).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ControlNetConfig {
    /// Channels of the sample.
    pub in_channels: usize,
    /// Channels of the image that controls.
    pub conditioning_channels: usize,
    /// As of the U-Net.
    pub flip_sin_to_cos: bool,
    /// As of the U-Net.
    pub freq_shift: i64,
    /// As of the U-Net.
    pub down_block_types: Vec<String>,
    /// As of the U-Net.
    pub mid_block_type: Option<String>,
    /// As of the U-Net.
    pub block_out_channels: Vec<usize>,
    /// As of the U-Net.
    pub layers_per_block: OneOrMore<usize>,
    /// As of the U-Net.
    pub downsample_padding: usize,
    /// As of the U-Net.
    pub mid_block_scale_factor: f64,
    /// As of the U-Net.
    pub act_fn: String,
    /// As of the U-Net.
    pub norm_num_groups: usize,
    /// As of the U-Net.
    pub norm_eps: f64,
    /// As of the U-Net.
    pub cross_attention_dim: OneOrMore<usize>,
    /// As of the U-Net.
    pub transformer_layers_per_block: OneOrMore<usize>,
    /// The **number** of heads, as of the U-Net.
    pub attention_head_dim: OneOrMore<usize>,
    /// The number of heads, where a file says it by this name.
    pub num_attention_heads: Option<OneOrMore<usize>>,
    /// As of the U-Net.
    pub use_linear_projection: bool,
    /// As of the U-Net.
    pub class_embed_type: Option<String>,
    /// As of the U-Net.
    pub num_class_embeds: Option<usize>,
    /// As of the U-Net.
    pub addition_embed_type: Option<String>,
    /// As of the U-Net.
    pub addition_time_embed_dim: Option<usize>,
    /// As of the U-Net.
    pub projection_class_embeddings_input_dim: Option<usize>,
    /// As of the U-Net.
    pub resnet_time_scale_shift: String,
    /// The order of the image's channels that the network was trained with: `rgb`, or `bgr`, into which it is turned.
    pub controlnet_conditioning_channel_order: String,
    /// Channels of the convolutions that bring the image to the resolution of the latents, which all but the last halve.
    pub conditioning_embedding_out_channels: Vec<usize>,
    /// Whether the network gives one value for each channel instead of an image.
    pub global_pool_conditions: bool,
    /// What else the file says.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Default for ControlNetConfig {
    fn default() -> Self {
        Self::of_unet(&super::UNet2dConditionConfig::default(), &ControlNetInput::default())
    }
}

/// What a [`ControlNetModel`] takes that its U-Net does not.
#[derive(Clone, PartialEq, Debug)]
pub struct ControlNetInput {
    /// Channels of the image that controls.
    pub conditioning_channels: usize,
    /// The order of its channels in training: `rgb` or `bgr`.
    pub controlnet_conditioning_channel_order: String,
    /// Channels of the convolutions that bring it to the resolution of the latents, which all but the last halve.
    pub conditioning_embedding_out_channels: Vec<usize>,
}

impl Default for ControlNetInput {
    /// An RGB image, eight times as high and wide as the latents.
    fn default() -> Self {
        Self {
            conditioning_channels: 3,
            controlnet_conditioning_channel_order: "rgb".into(),
            conditioning_embedding_out_channels: vec![16, 32, 96, 256],
        }
    }
}

impl ControlNetConfig {
    /// The configuration for a U-Net.
    pub fn of_unet(unet: &super::UNet2dConditionConfig, input: &ControlNetInput) -> Self {
        let unet = unet.clone();
        let is_shared =
            |field: &str| matches!(field, "upcast_attention" | "only_cross_attention" | "encoder_hid_dim" | "encoder_hid_dim_type");
        let other = unet.other.into_iter().filter(|(field, _)| is_shared(field)).collect();
        Self {
            in_channels: unet.in_channels,
            conditioning_channels: input.conditioning_channels,
            flip_sin_to_cos: unet.flip_sin_to_cos,
            freq_shift: unet.freq_shift,
            down_block_types: unet.down_block_types,
            mid_block_type: unet.mid_block_type,
            block_out_channels: unet.block_out_channels,
            layers_per_block: unet.layers_per_block,
            downsample_padding: unet.downsample_padding,
            mid_block_scale_factor: unet.mid_block_scale_factor,
            act_fn: unet.act_fn,
            norm_num_groups: unet.norm_num_groups,
            norm_eps: unet.norm_eps,
            cross_attention_dim: unet.cross_attention_dim,
            transformer_layers_per_block: unet.transformer_layers_per_block,
            attention_head_dim: unet.attention_head_dim,
            num_attention_heads: unet.num_attention_heads,
            use_linear_projection: unet.use_linear_projection,
            class_embed_type: unet.class_embed_type,
            num_class_embeds: unet.num_class_embeds,
            addition_embed_type: unet.addition_embed_type,
            addition_time_embed_dim: unet.addition_time_embed_dim,
            projection_class_embeddings_input_dim: unet.projection_class_embeddings_input_dim,
            resnet_time_scale_shift: unet.resnet_time_scale_shift,
            controlnet_conditioning_channel_order: input.controlnet_conditioning_channel_order.clone(),
            conditioning_embedding_out_channels: input.conditioning_embedding_out_channels.clone(),
            global_pool_conditions: false,
            other,
        }
    }

    fn fields(&self) -> Fields<'_> {
        Fields {
            in_channels: self.in_channels,
            conv_in_kernel: 3,
            block_out_channels: &self.block_out_channels,
            layers_per_block: &self.layers_per_block,
            down_block_types: &self.down_block_types,
            mid_block_type: self.mid_block_type.as_deref(),
            downsample_padding: self.downsample_padding,
            mid_block_scale_factor: self.mid_block_scale_factor,
            dropout: 0.0,
            act_fn: &self.act_fn,
            norm_num_groups: self.norm_num_groups,
            norm_eps: self.norm_eps,
            resnet_time_scale_shift: &self.resnet_time_scale_shift,
            cross_attention_dim: &self.cross_attention_dim,
            transformer_layers_per_block: &self.transformer_layers_per_block,
            num_heads: self.num_attention_heads.as_ref().unwrap_or(&self.attention_head_dim),
            use_linear_projection: self.use_linear_projection,
            time_embedding_dim: None,
            time_cond_proj_dim: None,
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

/// A convolution that is all zeros at first.
fn zero_conv(params: &Params, inputs: usize, outputs: usize, kernel: usize) -> Result<Conv2d> {
    let options = ConvOptions::new().with_padding(kernel / 2);
    Conv2d::with_init(params, inputs, outputs, kernel, options, [Init::Zeros, Init::Zeros])
}

/// Brings the image that controls to the latents' resolution and the first stage's channels. Named `conv_in`, `blocks.N`, `conv_out`.
struct ConditioningEmbedding {
    /// All but the last, each followed by silu.
    convs: Vec<Conv2d>,
    conv_out: Conv2d,
    channels: usize,
}

impl ConditioningEmbedding {
    fn new(params: &Params, config: &ControlNetConfig, outputs: usize) -> Result<Self> {
        let field = "conditioning_embedding_out_channels";
        let widths = &config.conditioning_embedding_out_channels;
        widths.iter().try_for_each(|&width| expect_extent(field, width).map(|_| ()))?;
        let (Some(&first), Some(&last)) = (widths.first(), widths.last()) else {
            return Err(wrong(format!("{field} is empty: there must be one convolution at least")));
        };
        let channels = expect_extent("conditioning_channels", config.conditioning_channels)?;
        let same = ConvOptions::new().with_padding(1);
        let mut convs = vec![Conv2d::new(&params.scope("conv_in"), channels, first, 3, same)?];
        let blocks = params.scope("blocks");
        for (i, pair) in widths.windows(2).enumerate() {
            let &[inputs, outputs] = pair else { continue };
            convs.push(Conv2d::new(&blocks.index(2 * i), inputs, inputs, 3, same)?);
            convs.push(Conv2d::new(&blocks.index(2 * i + 1), inputs, outputs, 3, same.with_stride(2))?);
        }
        Ok(Self { convs, conv_out: zero_conv(&params.scope("conv_out"), last, outputs, 3)?, channels })
    }

    /// (B, channels, H 2ⁿ, W 2ⁿ) → (B, outputs, H, W)
    fn forward(&self, image: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let ([batch, _, h, w], halvings) = (sample.dims_n("controlnet")?, self.convs.len() / 2);
        let halved = |extent: usize| (0..halvings).fold(extent, |extent, _| extent.div_ceil(2));
        let fits = matches!(*image.dims(), [b, c, ih, iw] if b == batch && c == self.channels && halved(ih) == h && halved(iw) == w);
        if !fits {
            let message = format!(
                "the image {} must be ({batch}, {}, H, W) with a height and width that {halvings} halvings bring to the {h}×{w} of the sample",
                image.shape(),
                self.channels
            );
            return Err(Error::shape("controlnet", message));
        }
        let x = self.convs.iter().try_fold(image.clone(), |x, conv| conv.forward_activated(&x, Activation::Silu))?;
        self.conv_out.forward(&x)
    }
}

/// The image that controls a pass, and how much.
#[derive(Clone, Copy)]
pub struct Control<'a> {
    /// (B, conditioning_channels, 8 H, 8 W) for latents of H×W, in 0 to 1.
    pub image: &'a Tensor,
    /// What the network says is multiplied by this.
    pub conditioning_scale: f64,
    /// Weakens what is said at high resolutions: residual i of n + 1 is multiplied by 10^(i/n − 1), so that the network may lead without a
    /// prompt. Means nothing with `global_pool_conditions`.
    pub guess_mode: bool,
}

impl<'a> Control<'a> {
    /// By this image, with scale 1, not in guess mode.
    pub fn new(image: &'a Tensor) -> Self {
        Self { image, conditioning_scale: 1.0, guess_mode: false }
    }
}

/// What a ControlNet says to a U-Net: [`UNetConditions::down_residuals`] and [`UNetConditions::mid_residual`].
#[derive(Clone, Debug)]
pub struct Residuals {
    /// Of each way around, in the order in which they are made.
    pub down: Vec<Tensor>,
    /// Of the bottom.
    pub mid: Tensor,
}

impl Residuals {
    /// `conditions` with these residuals.
    pub fn with<'a>(&'a self, conditions: UNetConditions<'a>) -> UNetConditions<'a> {
        UNetConditions { down_residuals: Some(&self.down), mid_residual: Some(&self.mid), ..conditions }
    }

    /// The sums of these and `other`'s.
    ///
    /// # Errors
    /// If they are of networks of other shapes.
    pub fn add(&self, other: &Residuals) -> Result<Residuals> {
        if self.down.len() != other.down.len() {
            let message = format!("residuals of {} and {} ways around cannot be added", self.down.len(), other.down.len());
            return Err(Error::argument("controlnet", message));
        }
        let down = self.down.iter().zip(&other.down).map(|(a, b)| a.add(b)).collect::<Result<_>>()?;
        Ok(Residuals { down, mid: self.mid.add(&other.mid)? })
    }
}

/// A network that steers a [`UNet2dConditionModel`] by an image: edges, depth, poses. The names of its parameters are those of
/// `ControlNetModel` of `diffusers`.
///
/// Source: Zhang et al., *Adding Conditional Control to Text-to-Image Diffusion Models*, 2023.
///
/// ```
/// # use kiln_models::diffusion::unet::{Control, ControlNetInput, ControlNetModel, UNet2dConditionConfig, UNet2dConditionModel, UNetConditions};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// # let config = UNet2dConditionConfig {
/// #     block_out_channels: vec![8, 16],
/// #     down_block_types: vec!["CrossAttnDownBlock2D".into(), "DownBlock2D".into()],
/// #     up_block_types: vec!["UpBlock2D".into(), "CrossAttnUpBlock2D".into()],
/// #     cross_attention_dim: 12.into(),
/// #     attention_head_dim: 2.into(),
/// #     norm_num_groups: 4,
/// #     ..UNet2dConditionConfig::default()
/// # };
/// let unet = UNet2dConditionModel::new(&Params::seeded(0), &config)?;
/// let controlnet = ControlNetModel::from_unet(&Params::seeded(1), &unet, &ControlNetInput::default())?;
/// let (latents, text, edges) = (Tensor::ones([1, 4, 8, 8], ())?, Tensor::ones([1, 5, 12], ())?, Tensor::ones([1, 3, 64, 64], ())?);
/// let (step, conditions) = (Tensor::from_vec(vec![801i64], [1])?, UNetConditions::default());
/// let residuals = controlnet.forward(&latents, &step, &text, &Control::new(&edges), &conditions)?;
/// let steered = unet.forward(&latents, &step, &text, &residuals.with(conditions))?;
/// // At first it says nothing.
/// assert_eq!(steered.to_vec::<f32>()?, unet.forward(&latents, &step, &text, &conditions)?.to_vec::<f32>()?);
/// # Ok(()) }
/// ```
pub struct ControlNetModel {
    config: ControlNetConfig,
    params: Params,
    conditioning: Conditioning,
    encoder: Encoder,
    controlnet_cond_embedding: ConditioningEmbedding,
    controlnet_down_blocks: Vec<Conv2d>,
    controlnet_mid_block: Conv2d,
    is_bgr: bool,
}

/// Channels of the ways around of a network of this plan, in order.
fn skip_channels(plan: &Plan) -> Vec<usize> {
    let stages = plan.channels.len();
    let of_stage =
        |(i, (&channels, &layers)): (usize, (&usize, &usize))| std::iter::repeat_n(channels, layers + usize::from(i + 1 < stages));
    plan.channels.first().copied().into_iter().chain(plan.channels.iter().zip(&plan.layers).enumerate().flat_map(of_stage)).collect()
}

impl ControlNetModel {
    /// A network whose weights are those of `params`: fresh, or from a state dictionary that is being built from. To train one, start
    /// [from the U-Net](Self::from_unet).
    ///
    /// # Errors
    /// As [`UNet2dConditionModel::new`].
    pub fn new(params: &Params, config: &ControlNetConfig) -> Result<Self> {
        let fields = config.fields();
        let (plan, _) = fields.plan(&[])?;
        let is_bgr = match config.controlnet_conditioning_channel_order.as_str() {
            "rgb" => false,
            "bgr" => true,
            other => return Err(unsupported("controlnet_conditioning_channel_order", other, "\"rgb\" or \"bgr\"")),
        };
        let (Some(&first), Some(&last)) = (plan.channels.first(), plan.channels.last()) else {
            return Err(wrong("block_out_channels is empty: there must be one stage at least"));
        };
        let conditioning = Conditioning::new(params, &fields, &plan, &[])?;
        let encoder = Encoder::new(params, &plan)?;
        let blocks = params.scope("controlnet_down_blocks");
        let zero = |(i, channels)| zero_conv(&blocks.index(i), channels, channels, 1);
        Ok(Self {
            config: config.clone(),
            params: params.clone(),
            conditioning,
            encoder,
            controlnet_cond_embedding: ConditioningEmbedding::new(&params.scope("controlnet_cond_embedding"), config, first)?,
            controlnet_down_blocks: skip_channels(&plan).into_iter().enumerate().map(zero).collect::<Result<_>>()?,
            controlnet_mid_block: zero_conv(&params.scope("controlnet_mid_block"), last, last, 1)?,
            is_bgr,
        })
    }

    /// A network for `unet` that is to be trained: its way down is a copy of the U-Net's, and it says nothing yet.
    ///
    /// # Errors
    /// If the U-Net has options that a ControlNet has not, or quantised weights.
    pub fn from_unet(params: &Params, unet: &UNet2dConditionModel, input: &ControlNetInput) -> Result<Self> {
        const COPIED: [&str; 6] = ["conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block"];
        let config = ControlNetConfig::of_unet(unet.config(), input);
        let inside = |scope: &Params, name: &str| match scope.name() {
            "" => Some(name.to_owned()),
            scope => name.strip_prefix(scope)?.strip_prefix('.').map(str::to_owned),
        };
        let own = |name: String| if params.name().is_empty() { name } else { format!("{}.{name}", params.name()) };
        let mut state = StateDict::new();
        for param in unet.params().params() {
            let Some(name) = inside(unet.params(), param.name()) else { continue };
            if COPIED.iter().any(|scope| name.split('.').next() == Some(scope)) {
                state.insert(own(name), param.get().detach());
            }
        }
        let (model, report) = params.build_from(state, LoadMode::Partial, |params| Self::new(params, &config))?;
        let is_new = |name: &&String| inside(params, name).is_some_and(|name| name.starts_with("controlnet_"));
        if let Some(missing) = report.missing.iter().find(|name| !is_new(name)) {
            let hint = "a quantised one must be dequantised first";
            return Err(Error::argument("controlnet", format!("the U-Net has no parameter for `{missing}`; {hint}")));
        }
        if let Some(other) = report.mismatched.first() {
            let ((_, expected), (_, found)) = (other.expected, other.found);
            let message = format!("`{}` is {found} in the U-Net, and {expected} in a ControlNet of its configuration", other.name);
            return Err(Error::shape("controlnet", message));
        }
        Ok(model)
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// The scope of the parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Whether the backward pass of training computes each layer again instead of keeping what is inside: less memory, a third more time.
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.encoder.recomputes().set(on);
    }

    /// What the network says to its U-Net, of the sample, timesteps, sequence and conditions that this gets as well.
    ///
    /// # Errors
    /// As [`UNet2dConditionModel::forward`], if the image does not fit the sample, or if `conditions` has residuals.
    pub fn forward<'a>(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        encoder_hidden_states: impl Into<Option<&'a Tensor>>,
        control: &Control<'_>,
        conditions: &UNetConditions<'_>,
    ) -> Result<Residuals> {
        if conditions.down_residuals.is_some() || conditions.mid_residual.is_some() {
            return Err(Error::argument("controlnet", "a ControlNet takes no residuals of another; `MultiControlNet` sums theirs"));
        }
        let signal = self.conditioning.signal(sample, timesteps, encoder_hidden_states.into(), conditions)?;
        let entered = self.encoder.enter(sample)?;
        let flipped = if self.is_bgr { Some(control.image.flip(1)?) } else { None };
        let image = self.controlnet_cond_embedding.forward(flipped.as_ref().unwrap_or(control.image), sample)?;
        let skips = self.encoder.descend(entered.add(&image)?, &signal)?;
        let bottom = self.encoder.bottom(&skips, &signal)?;
        let count = skips.len();
        let said = |i: usize, conv: &Conv2d, x: &Tensor| self.scaled(conv.forward(x)?, control, i as f64 / count as f64);
        let pairs = self.controlnet_down_blocks.iter().zip(&skips).enumerate();
        let down = pairs.map(|(i, (conv, skip))| said(i, conv, skip)).collect::<Result<_>>()?;
        Ok(Residuals { down, mid: said(count, &self.controlnet_mid_block, &bottom)? })
    }

    /// A residual as it is handed on; `depth` is 0 for the first and 1 at the bottom.
    fn scaled(&self, residual: Tensor, control: &Control<'_>, depth: f64) -> Result<Tensor> {
        let is_pooled = self.config.global_pool_conditions;
        let guessing = if control.guess_mode && !is_pooled { 10f64.powf(depth - 1.0) } else { 1.0 };
        let scale = guessing * control.conditioning_scale;
        let scaled = if scale == 1.0 { residual } else { residual.mul_scalar(scale)? };
        if is_pooled { scaled.mean_keepdim([2, 3]) } else { Ok(scaled) }
    }
}

/// Several ControlNets that steer one U-Net together: what they say is summed.
pub struct MultiControlNet {
    nets: Vec<ControlNetModel>,
}

impl MultiControlNet {
    /// Of these networks.
    ///
    /// # Errors
    /// If there are none.
    pub fn new(nets: Vec<ControlNetModel>) -> Result<Self> {
        if nets.is_empty() { Err(Error::argument("controlnet", "there must be one network at least")) } else { Ok(Self { nets }) }
    }

    /// The networks.
    pub fn nets(&self) -> &[ControlNetModel] {
        &self.nets
    }

    /// As [`ControlNetModel::forward`], with one image for each network.
    ///
    /// # Errors
    /// As there, and if there are more or fewer images than networks.
    pub fn forward<'a>(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        encoder_hidden_states: impl Into<Option<&'a Tensor>>,
        controls: &[Control<'_>],
        conditions: &UNetConditions<'_>,
    ) -> Result<Residuals> {
        if controls.len() != self.nets.len() {
            return Err(Error::argument("controlnet", format!("{} images for {} networks", controls.len(), self.nets.len())));
        }
        let context = encoder_hidden_states.into();
        let mut sum: Option<Residuals> = None;
        for (net, control) in self.nets.iter().zip(controls) {
            let said = net.forward(sample, timesteps, context, control, conditions)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&said)?,
                None => said,
            });
        }
        sum.ok_or_else(|| Error::argument("controlnet", "there are no networks"))
    }
}
