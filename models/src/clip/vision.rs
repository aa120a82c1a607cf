//! The image tower: a vision transformer whose first token stands for the picture.

use super::ClipVisionConfig;
use super::encoder::{Encoder, EncoderShape};
use super::text::project;
use crate::nn::{Conv2d, ConvOptions, Embedding, Init, LayerNorm, Linear, Module, Param, Params};
use crate::transformer::block::NormalInit;
use crate::transformer::context::Context;
use kiln_tensor::{Error, Result, Tensor};

/// CLIP's image tower, with or without the projection into the space that both towers share.
pub struct ClipVisionModel {
    params: Params,
    class_embedding: Param,
    patch_embedding: Conv2d,
    position_embedding: Embedding,
    /// The reference's name of it is `pre_layrnorm`.
    pre_layer_norm: LayerNorm,
    encoder: Encoder,
    post_layer_norm: LayerNorm,
    projection: Option<Linear>,
    /// Channels, height, width.
    picture: [usize; 3],
}

/// What the image tower makes of pictures (B, C, H, W).
pub struct ClipVisionOutput {
    /// The states of the picture's token and of all patches, not normed, (B, 1 + patches, C).
    pub last_hidden_state: Tensor,
    /// The states before the first block and after each, each (B, 1 + patches, C). With n blocks there are n + 1.
    pub hidden_states: Vec<Tensor>,
    /// The normed state of the picture's token, (B, C).
    pub pooler_output: Tensor,
    /// It, projected, (B, P); `None` of a tower without projection.
    pub image_embeds: Option<Tensor>,
}

impl ClipVisionModel {
    /// A tower whose weights are those of `params`: fresh, or from a state dictionary that is being built from. With `projection`, it
    /// has one to that width.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn new(config: &ClipVisionConfig, projection: Option<usize>, params: &Params) -> Result<Self> {
        let ClipVisionConfig { hidden_size: width, image_size: side, patch_size: patch, num_channels: channels, .. } = *config;
        if patch == 0 || side == 0 || !side.is_multiple_of(patch) {
            let message = format!("image_size {side} must be a multiple of patch_size {patch}");
            return Err(Error::format("config.json", message));
        }
        let too_many = || Error::format("config.json", format!("image_size {side} and patch_size {patch} make too many patches"));
        let patches = (side / patch).checked_mul(side / patch).and_then(|n| n.checked_add(1)).ok_or_else(too_many)?;
        let (scope, factor) = (params.scope("vision_model"), config.initializer_factor);
        let embeddings = scope.scope("embeddings");
        let shape = EncoderShape {
            width,
            inner: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            hidden_act: &config.hidden_act,
            eps: config.layer_norm_eps,
            dropout: config.attention_dropout,
            factor,
        };
        let norm = |name: &str| LayerNorm::with_options(&scope.scope(name), width, config.layer_norm_eps, true, true);
        let of_width = Init::Normal { mean: 0.0, std: (width as f64).powf(-0.5) * factor };
        let strided = ConvOptions::new().with_stride(patch).with_bias(false);
        let places = NormalInit(config.initializer_range * factor);
        let project = |outputs| project(&params.scope("visual_projection"), width, outputs, factor);
        Ok(Self {
            params: params.clone(),
            class_embedding: embeddings.param("class_embedding", [width], of_width)?,
            patch_embedding: Conv2d::new(&embeddings.scope("patch_embedding"), channels, width, patch, strided)?,
            position_embedding: places.embedding(&embeddings.scope("position_embedding"), patches, width)?,
            pre_layer_norm: norm("pre_layrnorm")?,
            encoder: Encoder::new(&scope.scope("encoder"), &shape)?,
            post_layer_norm: norm("post_layernorm")?,
            projection: projection.map(project).transpose()?,
            picture: [channels, side, side],
        })
    }

    /// What it makes of pictures (B, C, H, W), scaled as [`ClipImageProcessor`](super::ClipImageProcessor) does for trained weights.
    ///
    /// # Errors
    /// If the pictures have another size.
    pub fn forward(&self, pictures: &Tensor) -> Result<ClipVisionOutput> {
        let [batch, channels, height, width] = pictures.dims_n("clip")?;
        if [channels, height, width] != self.picture || batch == 0 {
            let [c, h, w] = self.picture;
            return Err(Error::shape("clip", format!("pictures {} must be [at least 1, {c}, {h}, {w}]", pictures.shape())));
        }
        let patches = self.patch_embedding.forward(pictures)?.flatten(2, 3)?.transpose(1, 2)?; // (B, patches, C)
        let class = self.class_embedding.get();
        let class = class.reshape([1, 1, class.numel()])?.expand([batch, 1, class.numel()])?.to_dtype(patches.dtype())?;
        let x = Tensor::cat(&[&class, &patches], 1)?;
        let x = x.add(&self.position_embedding.rows(0, x.dim(1)?)?)?;
        let hidden_states = self.encoder.forward(self.pre_layer_norm.forward(&x)?, &Context::default())?;
        let last = hidden_states.last().ok_or_else(|| Error::argument("clip", "there are no states"))?.clone();
        let pooler_output = self.post_layer_norm.forward(&last.select(1, 0)?)?;
        let image_embeds = self.projection.as_ref().map(|projection| projection.forward(&pooler_output)).transpose()?;
        Ok(ClipVisionOutput { last_hidden_state: last, hidden_states, pooler_output, image_embeds })
    }

    /// The scope that holds the weights; its switch between training and evaluation.
    pub fn params(&self) -> &Params {
        &self.params
    }
}
