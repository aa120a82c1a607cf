//! A small autoencoder of 28 × 28 pictures.

use super::DiagonalGaussian;
use crate::nn::{Conv2d, ConvOptions, ConvTranspose2d, Linear, Module, Params};
use kiln_tensor::{Activation, Result, Tensor};

/// Width of the layer between pixels and latents.
const HIDDEN: usize = 256;

/// The shape of a [`DigitVae`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DigitVaeConfig {
    /// Length of a latent vector.
    pub latent: usize,
    /// Channels of the larger feature map; the deeper one has twice as many.
    pub width: usize,
}

impl Default for DigitVaeConfig {
    fn default() -> Self {
        Self { latent: 16, width: 32 }
    }
}

/// Pictures (B, 1, 28, 28) in [−1, 1] to a normal distribution of latents (B, latent), and back: two convolutions that halve the size,
/// two that double it, and linear layers between.
///
/// Source: Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014.
pub struct DigitVae {
    config: DigitVaeConfig,
    c1: Conv2d,
    c2: Conv2d,
    hidden: Linear,
    moments: Linear,
    f1: Linear,
    f2: Linear,
    t1: ConvTranspose2d,
    t2: ConvTranspose2d,
}

impl DigitVae {
    /// A model whose weights come from `params`.
    ///
    /// # Errors
    /// If weights that are loaded have other extents.
    pub fn new(params: &Params, config: DigitVaeConfig) -> Result<Self> {
        let DigitVaeConfig { latent, width } = config;
        let (deep, halving) = (2 * width, ConvOptions::<2>::new().with_stride(2).with_padding(1));
        let (encoder, decoder) = (params.scope("encoder"), params.scope("decoder"));
        Ok(Self {
            config,
            c1: Conv2d::new(&encoder.scope("c1"), 1, width, 4, halving)?,
            c2: Conv2d::new(&encoder.scope("c2"), width, deep, 4, halving)?,
            hidden: Linear::new(&encoder.scope("hidden"), deep * 7 * 7, HIDDEN, true)?,
            moments: Linear::new(&encoder.scope("moments"), HIDDEN, 2 * latent, true)?,
            f1: Linear::new(&decoder.scope("f1"), latent, HIDDEN, true)?,
            f2: Linear::new(&decoder.scope("f2"), HIDDEN, deep * 7 * 7, true)?,
            t1: ConvTranspose2d::new(&decoder.scope("t1"), deep, width, 4, halving)?,
            t2: ConvTranspose2d::new(&decoder.scope("t2"), width, 1, 4, halving)?,
        })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &DigitVaeConfig {
        &self.config
    }

    /// The distribution of the latents (B, latent) of pictures (B, 1, 28, 28).
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn encode(&self, x: &Tensor) -> Result<DiagonalGaussian> {
        let h = self.c1.forward_activated(x, Activation::Relu)?; // (B, w, 14, 14)
        let h = self.c2.forward_activated(&h, Activation::Relu)?; // (B, 2w, 7, 7)
        let h = self.hidden.forward_activated(&h.flatten(1, -1)?, Activation::Relu)?;
        DiagonalGaussian::new(&self.moments.forward(&h)?)
    }

    /// Pictures (B, 1, 28, 28) in (−1, 1) of latents (B, latent).
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn decode(&self, z: &Tensor) -> Result<Tensor> {
        let h = self.f1.forward_activated(z, Activation::Relu)?;
        let h = self.f2.forward_activated(&h, Activation::Relu)?;
        let h = h.reshape([-1, 2 * self.config.width as isize, 7, 7])?; // (B, 2w, 7, 7)
        let h = self.t1.forward_activated(&h, Activation::Relu)?; // (B, w, 14, 14)
        self.t2.forward(&h)?.tanh() // (B, 1, 28, 28)
    }

    /// The weight of the decoder's last layer.
    pub fn last_weight(&self) -> Tensor {
        self.t2.weight().get()
    }
}
