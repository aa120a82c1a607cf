//! VQ-VAE: pictures to a grid of codes, and back.

use super::config::{first_side, up_block_names};
use super::networks::{CoderShape, Decoder, Encoder};
use super::{CodebookOptions, CoderBlock, Quantized, VectorQuantizer};
use crate::nn::{Conv2d, Module, Params};
use kiln_tensor::{Result, Tensor};
use serde::{Deserialize, Serialize};

/// The hyper-parameters, by the names of `VQModel` in `diffusers`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct VqVaeConfig {
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
    /// Channels between the networks and the codebook.
    pub latent_channels: usize,
    /// Number of codes.
    pub num_vq_embeddings: usize,
    /// Width of a code; `latent_channels` if absent.
    pub vq_embed_dim: Option<usize>,
    /// Groups of the norms.
    pub norm_num_groups: usize,
    /// The kind of the decoder's norms; only `group` is known.
    pub norm_type: String,
    /// The side of the pictures that it was trained on.
    #[serde(deserialize_with = "first_side")]
    pub sample_size: usize,
    /// Latents × this have about unit variance: what a diffusion model is trained on.
    pub scaling_factor: f64,
    /// Whether the middle blocks look at all pixels.
    pub mid_block_add_attention: bool,
    /// How the codebook learns, which the file does not say.
    #[serde(skip)]
    pub codebook: CodebookOptions,
    /// What else the file says.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for VqVaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![CoderBlock::Plain],
            up_block_types: vec![CoderBlock::Plain],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 3,
            num_vq_embeddings: 256,
            vq_embed_dim: None,
            norm_num_groups: 32,
            norm_type: "group".into(),
            sample_size: 32,
            scaling_factor: 0.18215,
            mid_block_add_attention: true,
            codebook: CodebookOptions::default(),
            other: serde_json::Map::new(),
        }
    }
}

impl VqVaeConfig {
    /// The model, of the weights of `params`.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<VqVae> {
        VqVae::new(params, self)
    }

    fn coder<'a>(&'a self, blocks: &'a [CoderBlock], [inputs, outputs]: [usize; 2]) -> Result<CoderShape<'a>> {
        let (channels, layers, groups) = (&self.block_out_channels, self.layers_per_block, self.norm_num_groups);
        let shape = CoderShape { inputs, outputs, blocks, channels, layers, groups, mid_attention: self.mid_block_add_attention };
        shape.check("VqVae", &self.act_fn)
    }
}

/// Pictures (B, C, H, W) in [−1, 1] to codes (B, H / s, W / s), and back; s = 2^(levels − 1).
///
/// Source: van den Oord et al., *Neural Discrete Representation Learning*, 2017, with the networks and names of `diffusers`' `VQModel`.
pub struct VqVae {
    config: VqVaeConfig,
    encoder: Encoder,
    quant_conv: Conv2d,
    quantize: VectorQuantizer,
    post_quant_conv: Conv2d,
    decoder: Decoder,
}

impl VqVae {
    /// The model, of the weights of `params`.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn new(params: &Params, config: &VqVaeConfig) -> Result<Self> {
        if config.norm_type != "group" {
            let message = format!("norm_type `{}` is not known; there is `group`", config.norm_type);
            return Err(kiln_tensor::Error::argument("VqVae", message));
        }
        let (latent, width) = (config.latent_channels, config.vq_embed_dim.unwrap_or(config.latent_channels));
        let encoder = config.coder(&config.down_block_types, [config.in_channels, latent])?;
        let decoder = config.coder(&config.up_block_types, [latent, config.out_channels])?;
        Ok(Self {
            encoder: Encoder::new(&params.scope("encoder"), &encoder)?,
            quant_conv: Conv2d::new(&params.scope("quant_conv"), latent, width, 1, ())?,
            quantize: VectorQuantizer::new(&params.scope("quantize"), config.num_vq_embeddings, width, config.codebook)?,
            post_quant_conv: Conv2d::new(&params.scope("post_quant_conv"), width, latent, 1, ())?,
            decoder: Decoder::new(&params.scope("decoder"), &decoder)?,
            config: config.clone(),
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &VqVaeConfig {
        &self.config
    }

    /// The codebook.
    pub fn quantizer(&self) -> &VectorQuantizer {
        &self.quantize
    }

    /// Latents (B, vq_embed_dim, H / s, W / s) of pictures, before they are quantised.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        self.quant_conv.forward(&self.encoder.forward(x)?)
    }

    /// Pictures of codes or latents (B, vq_embed_dim, H / s, W / s) as they are.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        self.decoder.forward(&self.post_quant_conv.forward(codes)?)
    }

    /// Pictures of the numbers of codes, (B, H / s, W / s).
    ///
    /// # Errors
    /// If a number is out of range.
    pub fn decode_indices(&self, indices: &Tensor) -> Result<Tensor> {
        self.decode(&self.quantize.lookup(indices)?)
    }

    /// The reconstruction of pictures, and the codes that it is made from.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Quantized)> {
        let quantized = self.quantize.forward(&self.encode(x)?)?;
        Ok((self.decode(&quantized.output)?, quantized))
    }

    /// The weight of the decoder's last convolution.
    pub fn last_weight(&self) -> Tensor {
        self.decoder.last_weight()
    }
}
