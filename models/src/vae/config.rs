//! The hyper-parameters of [`AutoencoderKl`], as `diffusers` names them in `vae/config.json`.

use super::AutoencoderKl;
use super::networks::CoderShape;
use super::tiling::Tiling;
use crate::nn::Params;
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize};

/// A level of the encoder or of the decoder: residual blocks at one resolution.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum CoderBlock {
    /// `DownEncoderBlock2D` and `UpDecoderBlock2D`: residual blocks only.
    #[serde(rename = "DownEncoderBlock2D", alias = "UpDecoderBlock2D")]
    Plain,
    /// `AttnDownEncoderBlock2D` and `AttnUpDecoderBlock2D`: attention between the pixels after each of them.
    #[serde(rename = "AttnDownEncoderBlock2D", alias = "AttnUpDecoderBlock2D")]
    Attention,
}

/// The hyper-parameters, by the names of `config.json`. The defaults are those of the class in `diffusers`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct AutoencoderKlConfig {
    /// Channels of the pictures that are encoded.
    pub in_channels: usize,
    /// Channels of the pictures that are decoded.
    pub out_channels: usize,
    /// The encoder's levels, from the full resolution on.
    pub down_block_types: Vec<CoderBlock>,
    /// The decoder's levels, from the lowest resolution on.
    #[serde(serialize_with = "up_block_names")]
    pub up_block_types: Vec<CoderBlock>,
    /// Channels at each level, from the full resolution on.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks at each level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// The activation; only `silu` is known.
    pub act_fn: String,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// The side of the pictures that it was trained on, which is that of a tile.
    #[serde(deserialize_with = "first_side")]
    pub sample_size: usize,
    /// Latents × this have about unit variance: what a diffusion model is trained on.
    pub scaling_factor: f64,
    /// What is taken from latents before they are scaled.
    pub shift_factor: Option<f64>,
    /// What is taken from each channel of the latents before they are scaled; comes with `latents_std`.
    pub latents_mean: Option<Vec<f64>>,
    /// What each channel of the latents is divided by; comes with `latents_mean`.
    pub latents_std: Option<Vec<f64>>,
    /// Whether pictures of high resolution need f32.
    pub force_upcast: bool,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks look at all pixels.
    pub mid_block_add_attention: bool,
    /// What else the file says.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for AutoencoderKlConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![CoderBlock::Plain],
            up_block_types: vec![CoderBlock::Plain],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
            other: serde_json::Map::new(),
        }
    }
}

impl AutoencoderKlConfig {
    /// The model, of the weights of `params`.
    ///
    /// ```
    /// use kiln_models::nn::Params;
    /// use kiln_models::vae::{AutoencoderKlConfig, CoderBlock};
    /// # use kiln_tensor::{Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let levels = vec![CoderBlock::Plain; 2];
    /// let config = AutoencoderKlConfig {
    ///     down_block_types: levels.clone(),
    ///     up_block_types: levels,
    ///     block_out_channels: vec![8, 16],
    ///     norm_num_groups: 4,
    ///     ..AutoencoderKlConfig::default()
    /// };
    /// let vae = config.build(&Params::seeded(0))?;
    /// let latent = vae.encode(&Tensor::zeros([1, 3, 16, 16], ())?)?.mode();
    /// assert_eq!(latent.dims(), [1, 4, 8, 8]);
    /// assert_eq!(vae.decode(&latent)?.dims(), [1, 3, 16, 16]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<AutoencoderKl> {
        AutoencoderKl::new(params, self)
    }

    /// How many pixels of a picture, along each axis, a latent stands for: 2^(levels − 1).
    pub fn vae_scale_factor(&self) -> usize {
        1usize.checked_shl(self.block_out_channels.len().saturating_sub(1) as u32).unwrap_or(usize::MAX)
    }

    /// Tiles of `sample_size`, a quarter of which overlaps the next: `diffusers`' defaults.
    pub fn tiling(&self) -> Tiling {
        Tiling { sample_min_size: self.sample_size, latent_min_size: self.sample_size / self.vae_scale_factor(), overlap_factor: 0.25 }
    }

    /// `latents_mean` and `latents_std`, if the latents are normed by channel.
    ///
    /// # Errors
    /// If there is only one of them, or one is not a number for each channel: finite, and of deviations above 0.
    pub(super) fn latent_norm(&self) -> Result<Option<[&[f64]; 2]>> {
        let wrong = |field: &str, problem: String| Error::argument("AutoencoderKl", format!("{field}: {problem}"));
        let alone = |field: &str, other: &str| wrong(field, format!("missing beside {other}"));
        let (mean, std) = match (&self.latents_mean, &self.latents_std) {
            (None, None) => return Ok(None),
            (Some(mean), Some(std)) => (mean.as_slice(), std.as_slice()),
            (None, Some(_)) => return Err(alone("latents_mean", "latents_std")),
            (Some(_), None) => return Err(alone("latents_std", "latents_mean")),
        };
        for (field, values) in [("latents_mean", mean), ("latents_std", std)] {
            if values.len() != self.latent_channels {
                return Err(wrong(field, format!("{} numbers for {} latent_channels", values.len(), self.latent_channels)));
            }
        }
        if let Some(value) = mean.iter().find(|value| !value.is_finite()) {
            return Err(wrong("latents_mean", format!("{value} is no mean")));
        }
        if let Some(value) = std.iter().find(|value| !value.is_finite() || **value <= 0.0) {
            return Err(wrong("latents_std", format!("{value} is no deviation; they are above 0")));
        }
        Ok(Some([mean, std]))
    }

    pub(super) fn encoder(&self) -> Result<CoderShape<'_>> {
        let moments = self.latent_channels.checked_mul(2);
        let moments = moments.ok_or_else(|| Error::argument("AutoencoderKl", format!("latent_channels = {}", self.latent_channels)))?;
        self.coder(&self.down_block_types, [self.in_channels, moments])
    }

    pub(super) fn decoder(&self) -> Result<CoderShape<'_>> {
        self.coder(&self.up_block_types, [self.latent_channels, self.out_channels])
    }

    fn coder<'a>(&'a self, blocks: &'a [CoderBlock], [inputs, outputs]: [usize; 2]) -> Result<CoderShape<'a>> {
        let (channels, layers, groups) = (&self.block_out_channels, self.layers_per_block, self.norm_num_groups);
        let shape = CoderShape { inputs, outputs, blocks, channels, layers, groups, mid_attention: self.mid_block_add_attention };
        shape.check("AutoencoderKl", &self.act_fn)
    }
}

/// A number, or the first of a list of sides.
pub(super) fn first_side<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<usize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Sides {
        One(usize),
        All(Vec<usize>),
    }
    match Sides::deserialize(deserializer)? {
        Sides::One(side) => Ok(side),
        Sides::All(sides) => sides.first().copied().ok_or_else(|| serde::de::Error::custom("sample_size is an empty list")),
    }
}

pub(super) fn up_block_names<S: serde::Serializer>(blocks: &[CoderBlock], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(blocks.iter().map(|block| match block {
        CoderBlock::Plain => "UpDecoderBlock2D",
        CoderBlock::Attention => "AttnUpDecoderBlock2D",
    }))
}
