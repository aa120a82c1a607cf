//! Both towers, and the loss that makes them agree.

use super::{ClipConfig, ClipTextModel, ClipVisionModel, normalize, similarity};
use crate::nn::{Init, Param, Params};
use kiln_tensor::{Error, Result, Tensor};

/// The largest factor of the similarities, beyond which training becomes unstable (Radford et al. 2021, section 2.5).
const MAX_SCALE: f64 = 100.0;

/// CLIP: a text tower and an image tower with projections into one space, and the factor of their similarities.
///
/// ```
/// # use kiln_models::clip::{ClipConfig, ClipModel, ClipTextConfig, ClipVisionConfig, contrastive_loss};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let text = ClipTextConfig { vocab_size: 30, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, ..ClipTextConfig::default() };
/// let image = ClipVisionConfig { hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, image_size: 8, patch_size: 4, ..ClipVisionConfig::default() };
/// let config = ClipConfig { text_config: text, vision_config: image, projection_dim: 8, ..ClipConfig::default() };
/// let model = ClipModel::new(&config, &Params::seeded(0))?;
/// let texts = Tensor::from_vec(vec![0i64, 7, 9, 0, 8, 9], [2, 3])?;
/// let output = model.forward(&texts, None, &Tensor::zeros([2, 3, 8, 8], ())?)?;
/// assert_eq!(output.logits_per_text.dims(), [2, 2]);
/// let loss = contrastive_loss(&output.logits_per_text)?;
/// # Ok(()) }
/// ```
pub struct ClipModel {
    text: ClipTextModel,
    vision: ClipVisionModel,
    logit_scale: Param,
    params: Params,
}

/// What the towers make of texts and pictures.
pub struct ClipOutput {
    /// The pictures' embeddings, of length 1, (N, P).
    pub image_embeds: Tensor,
    /// The texts' embeddings, of length 1, (M, P).
    pub text_embeds: Tensor,
    /// The scaled similarities, (N, M).
    pub logits_per_image: Tensor,
    /// The same, (M, N).
    pub logits_per_text: Tensor,
}

impl ClipModel {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn new(config: &ClipConfig, params: &Params) -> Result<Self> {
        Ok(Self {
            text: ClipTextModel::new(&config.text_config, Some(config.projection_dim), params)?,
            vision: ClipVisionModel::new(&config.vision_config, Some(config.projection_dim), params)?,
            logit_scale: params.param("logit_scale", (), Init::Constant(config.logit_scale_init_value))?,
            params: params.clone(),
        })
    }

    /// The similarities of texts, tokens (M, T) of i64 with an optional `mask` as in [`ClipTextModel::forward`], and pictures
    /// (N, C, H, W).
    ///
    /// # Errors
    /// As those of the towers.
    pub fn forward(&self, tokens: &Tensor, mask: Option<&Tensor>, pictures: &Tensor) -> Result<ClipOutput> {
        let image_embeds = normalize(&self.image_embeds(pictures)?)?;
        let text_embeds = normalize(&self.text_embeds(tokens, mask)?)?;
        let logits_per_text = text_embeds.matmul(&image_embeds.t()?)?.mul(&self.logit_scale.get().exp()?)?;
        Ok(ClipOutput { logits_per_image: logits_per_text.t()?, logits_per_text, image_embeds, text_embeds })
    }

    /// The embeddings of texts, (M, P), not normed.
    ///
    /// # Errors
    /// As [`ClipTextModel::forward`].
    pub fn text_embeds(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        self.text.forward(tokens, mask)?.text_embeds.ok_or_else(missing)
    }

    /// The embeddings of pictures, (N, P), not normed.
    ///
    /// # Errors
    /// As [`ClipVisionModel::forward`].
    pub fn image_embeds(&self, pictures: &Tensor) -> Result<Tensor> {
        self.vision.forward(pictures)?.image_embeds.ok_or_else(missing)
    }

    /// Holds the factor of the similarities, exp(`logit_scale`), to at most 100: to be called after each step of an optimiser.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn clamp_logit_scale(&self) -> Result<()> {
        self.logit_scale.set(&self.logit_scale.get().detach().clamp(None, MAX_SCALE.ln())?)
    }

    /// The factor of the similarities.
    ///
    /// # Errors
    /// If the device fails.
    pub fn scale(&self) -> Result<f64> {
        Ok(self.logit_scale.get().detach().item_f64()?.exp())
    }

    /// The logits of K classes for pictures (N, C, H, W): (N, K), whose softmax are the probabilities. `classes` (K, P) are
    /// those of [`zero_shot_classes`](super::zero_shot_classes).
    ///
    /// # Errors
    /// If the classes have another width, or as [`ClipVisionModel::forward`].
    pub fn classify(&self, pictures: &Tensor, classes: &Tensor) -> Result<Tensor> {
        similarity(&self.image_embeds(pictures)?, classes)?.mul(&self.logit_scale.get().exp()?)
    }

    /// The text tower.
    pub fn text(&self) -> &ClipTextModel {
        &self.text
    }

    /// The image tower.
    pub fn vision(&self) -> &ClipVisionModel {
        &self.vision
    }

    /// The scope that holds the weights; its switch between training and evaluation.
    pub fn params(&self) -> &Params {
        &self.params
    }
}

fn missing() -> Error {
    Error::argument("clip", "the tower has no projection")
}

/// The loss of N texts and the N pictures that belong to them, by their scaled similarities `logits` (N, N): the mean of the
/// cross-entropies of finding each text's picture and each picture's text among the N.
///
/// # Errors
/// If `logits` are not square.
pub fn contrastive_loss(logits: &Tensor) -> Result<Tensor> {
    let [n, m] = logits.dims_n("contrastive_loss")?;
    if n != m || n == 0 {
        return Err(Error::shape("contrastive_loss", format!("similarities {} must be of as many texts as pictures", logits.shape())));
    }
    let own = Tensor::from_vec((0..n as i64).collect::<Vec<i64>>(), [n])?.to_device(logits.device())?;
    logits.cross_entropy(&own)?.add(&logits.t()?.cross_entropy(&own)?)?.mul_scalar(0.5)
}
