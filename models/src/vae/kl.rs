//! The autoencoder of Stable Diffusion: pictures to a normal distribution of latents an eighth their size, and back.

use super::networks::{Decoder, Encoder};
use super::{AutoencoderKlConfig, DiagonalGaussian, Tiling};
use crate::nn::{Conv2d, Module, Params};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// Pictures (B, C, H, W) in [−1, 1] to a [`DiagonalGaussian`] of latents (B, L, H / s, W / s), and back; s = 2^(levels − 1).
///
/// Source: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022; names of `diffusers`' `AutoencoderKL`.
pub struct AutoencoderKl {
    config: AutoencoderKlConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    tiling: Option<Tiling>,
    slicing: bool,
}

impl AutoencoderKl {
    /// The model, of the weights of `params`.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn new(params: &Params, config: &AutoencoderKlConfig) -> Result<Self> {
        let (encoder, decoder) = (config.encoder()?, config.decoder()?);
        config.latent_norm()?;
        let square = |name: &str, channels| Conv2d::new(&params.scope(name), channels, channels, 1, ());
        Ok(Self {
            encoder: Encoder::new(&params.scope("encoder"), &encoder)?,
            quant_conv: config.use_quant_conv.then(|| square("quant_conv", encoder.outputs)).transpose()?,
            post_quant_conv: config.use_post_quant_conv.then(|| square("post_quant_conv", config.latent_channels)).transpose()?,
            decoder: Decoder::new(&params.scope("decoder"), &decoder)?,
            config: config.clone(),
            tiling: None,
            slicing: false,
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &AutoencoderKlConfig {
        &self.config
    }

    /// Takes pictures that are larger than `sample_size` apart into tiles with blended seams.
    pub fn enable_tiling(&mut self) {
        self.tiling = Some(self.config.tiling());
    }

    /// Tiles of other extents, or none.
    ///
    /// # Errors
    /// If such tiles cannot cover a picture.
    pub fn set_tiling(&mut self, tiling: Option<Tiling>) -> Result<()> {
        if let Some(tiling) = &tiling {
            tiling.encoding()?;
            tiling.decoding()?;
        }
        self.tiling = tiling;
        Ok(())
    }

    /// Takes batches apart into single pictures, to save memory.
    pub fn set_slicing(&mut self, slicing: bool) {
        self.slicing = slicing;
    }

    /// The distribution of the latents of pictures (B, in_channels, H, W) in [−1, 1].
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn encode(&self, x: &Tensor) -> Result<DiagonalGaussian> {
        DiagonalGaussian::new(&self.each(x, |x| self.encode_all(x))?)
    }

    /// Pictures (B, out_channels, s·H, s·W) of latents (B, latent_channels, H, W), not scaled: see [`unscale`](Self::unscale).
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        self.each(z, |z| self.decode_all(z))
    }

    /// The reconstruction of pictures from samples of their latents, and the distribution of those.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn reconstruct(&self, x: &Tensor, generator: &Generator) -> Result<(Tensor, DiagonalGaussian)> {
        let posterior = self.encode(x)?;
        Ok((self.decode(&posterior.sample(generator)?)?, posterior))
    }

    /// (z − shift_factor − latents_mean) · scaling_factor / latents_std, of latents (B, latent_channels, H, W): as a diffusion model
    /// knows them. What the configuration does not give is left out.
    ///
    /// # Errors
    /// If there is a mean for each channel and z has others.
    pub fn scale(&self, z: &Tensor) -> Result<Tensor> {
        let z = match self.config.shift_factor {
            Some(shift) => z.add_scalar(-shift)?,
            None => z.clone(),
        };
        match self.latent_norm(&z)? {
            Some([mean, std]) => z.sub(&mean)?.mul_scalar(self.config.scaling_factor)?.div(&std),
            None => z.mul_scalar(self.config.scaling_factor),
        }
    }

    /// z · latents_std / scaling_factor + latents_mean + shift_factor: the inverse of [`scale`](Self::scale).
    ///
    /// # Errors
    /// As [`scale`](Self::scale).
    pub fn unscale(&self, z: &Tensor) -> Result<Tensor> {
        let z = match self.latent_norm(z)? {
            Some([mean, std]) => z.mul(&std)?.div_scalar(self.config.scaling_factor)?.add(&mean)?,
            None => z.div_scalar(self.config.scaling_factor)?,
        };
        self.config.shift_factor.map_or(Ok(z.clone()), |shift| z.add_scalar(shift))
    }

    /// Mean and deviation of the channels, (1, L, 1, 1), as the latents `z` are computed with, if the configuration has them.
    fn latent_norm(&self, z: &Tensor) -> Result<Option<[Tensor; 2]>> {
        let Some([mean, std]) = self.config.latent_norm()? else { return Ok(None) };
        let [_, channels, _, _] = z.dims_n::<4>("autoencoder")?;
        if channels != mean.len() {
            return Err(Error::shape("autoencoder", format!("latents have {} channels, got {}", mean.len(), z.shape())));
        }
        let by_channel = |values: &[f64]| Tensor::from_slice(values, [1, channels, 1, 1])?.to_dtype(z.dtype())?.to_device(z.device());
        Ok(Some([by_channel(mean)?, by_channel(std)?]))
    }

    /// The weight of the decoder's last convolution.
    pub fn last_weight(&self) -> Tensor {
        self.decoder.last_weight()
    }

    /// `f` of the batch, or of each of its pictures.
    fn each(&self, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let [batch, ..] = x.dims_n::<4>("autoencoder")?;
        if !self.slicing || batch < 2 {
            return f(x);
        }
        let parts = (0..batch).map(|i| f(&x.narrow(0, i, 1)?)).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&parts, 0)
    }

    fn encode_all(&self, x: &Tensor) -> Result<Tensor> {
        let Some(tiling) = &self.tiling else { return self.encode_tile(x) };
        let tiles = tiling.encoding()?;
        if tiles.divide(x)? { tiles.map(x, |tile| self.encode_tile(tile)) } else { self.encode_tile(x) }
    }

    fn decode_all(&self, z: &Tensor) -> Result<Tensor> {
        let Some(tiling) = &self.tiling else { return self.decode_tile(z) };
        let tiles = tiling.decoding()?;
        if tiles.divide(z)? { tiles.map(z, |tile| self.decode_tile(tile)) } else { self.decode_tile(z) }
    }

    /// (B, C, H, W) → (B, 2L, H / s, W / s)
    fn encode_tile(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.encoder.forward(x)?;
        self.quant_conv.as_ref().map_or(Ok(h.clone()), |conv| conv.forward(&h))
    }

    fn decode_tile(&self, z: &Tensor) -> Result<Tensor> {
        match &self.post_quant_conv {
            Some(conv) => self.decoder.forward(&conv.forward(z)?),
            None => self.decoder.forward(z),
        }
    }
}
