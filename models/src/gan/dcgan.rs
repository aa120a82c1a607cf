//! The networks of DCGAN for 28 × 28 pictures (Radford et al. 2015), class-conditional on request.

use crate::nn::{BatchNorm2d, Conv2d, ConvOptions, ConvTranspose2d, Embedding, Linear, Module, Params};
use kiln_tensor::{Activation, Error, Result, Tensor};

/// The shape of both networks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DcganConfig {
    /// Length of the noise vector that a picture is drawn from.
    pub latent: usize,
    /// Channels of the larger feature map; the deeper one has twice as many.
    pub width: usize,
    /// Number of classes of a conditional model.
    pub classes: Option<usize>,
    /// Batch norm in the discriminator. A critic that is trained with a gradient penalty must not have it: the penalty is
    /// on the gradient of each sample alone, and batch norm mixes samples.
    pub discriminator_norm: bool,
}

impl Default for DcganConfig {
    fn default() -> Self {
        Self { latent: 100, width: 64, classes: None, discriminator_norm: true }
    }
}

/// A 4 × 4 kernel with these options halves the size, or doubles it when transposed.
fn halving() -> ConvOptions<2> {
    ConvOptions::new().with_stride(2).with_padding(1)
}

/// Noise to picture: two transposed convolutions, each of which doubles the size.
pub struct DcganGenerator {
    config: DcganConfig,
    fc: Linear,
    b0: BatchNorm2d,
    c1: ConvTranspose2d,
    b1: BatchNorm2d,
    c2: ConvTranspose2d,
}

impl DcganGenerator {
    /// A generator whose weights come from `params`.
    pub fn new(params: &Params, config: DcganConfig) -> Result<Self> {
        let (deep, wide) = (2 * config.width, config.width);
        Ok(Self {
            config,
            fc: Linear::new(&params.scope("fc"), config.latent + config.classes.unwrap_or(0), deep * 7 * 7, false)?,
            b0: BatchNorm2d::new(&params.scope("b0"), deep)?,
            c1: ConvTranspose2d::new(&params.scope("c1"), deep, wide, 4, halving().with_bias(false))?,
            b1: BatchNorm2d::new(&params.scope("b1"), wide)?,
            c2: ConvTranspose2d::new(&params.scope("c2"), wide, 1, 4, halving())?,
        })
    }

    /// Pictures (B, 1, 28, 28) in (-1, 1) from `noise` (B, latent) and, for a conditional model, `labels` (B) of dtype i64.
    pub fn forward(&self, noise: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let noise = match (self.config.classes, labels) {
            (Some(classes), Some(labels)) => Tensor::cat(&[noise, &labels.one_hot(classes)?.to_dtype(noise.dtype())?], 1)?,
            (None, None) => noise.clone(),
            (classes, _) => return Err(labels_mismatch(classes)),
        };
        let h = self.fc.forward(&noise)?.reshape([-1, 2 * self.config.width as isize, 7, 7])?; // (B, 2w, 7, 7)
        let h = self.b0.forward_activated(&h, Activation::Relu)?;
        let h = self.b1.forward_activated(&self.c1.forward(&h)?, Activation::Relu)?; // (B, w, 14, 14)
        self.c2.forward(&h)?.tanh() // (B, 1, 28, 28)
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &DcganConfig {
        &self.config
    }
}

/// Picture to score: two convolutions, each of which halves the size, and a linear layer.
///
/// A conditional one adds the inner product of the features with a learned vector of the class (the projection
/// discriminator of Miyato and Koyama 2018).
pub struct DcganDiscriminator {
    config: DcganConfig,
    c1: Conv2d,
    c2: Conv2d,
    b2: Option<BatchNorm2d>,
    fc: Linear,
    class: Option<Embedding>,
}

impl DcganDiscriminator {
    /// A discriminator whose weights come from `params`.
    pub fn new(params: &Params, config: DcganConfig) -> Result<Self> {
        let (deep, wide) = (2 * config.width, config.width);
        let norm = config.discriminator_norm;
        Ok(Self {
            config,
            c1: Conv2d::new(&params.scope("c1"), 1, wide, 4, halving())?,
            c2: Conv2d::new(&params.scope("c2"), wide, deep, 4, halving().with_bias(!norm))?,
            b2: norm.then(|| BatchNorm2d::new(&params.scope("b2"), deep)).transpose()?,
            fc: Linear::new(&params.scope("fc"), deep * 7 * 7, 1, true)?,
            class: config.classes.map(|n| Embedding::new(&params.scope("class"), n, deep * 7 * 7)).transpose()?,
        })
    }

    /// Scores (B, 1), not squashed, of pictures (B, 1, 28, 28): large for real ones.
    pub fn forward(&self, pictures: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let h = self.c1.forward(pictures)?.leaky_relu(0.2)?; // (B, w, 14, 14)
        let h = self.c2.forward(&h)?; // (B, 2w, 7, 7)
        let h = match &self.b2 {
            Some(norm) => norm.forward_activated(&h, Activation::LeakyRelu(0.2))?,
            None => h.leaky_relu(0.2)?,
        };
        let h = h.flatten(1, -1)?; // (B, 2w·49)
        let score = self.fc.forward(&h)?;
        match (&self.class, labels) {
            (Some(class), Some(labels)) => score.add(&class.forward(labels)?.mul(&h)?.sum_keepdim(1)?),
            (None, None) => Ok(score),
            (class, _) => Err(labels_mismatch(class.as_ref().and(self.config.classes))),
        }
    }
}

fn labels_mismatch(classes: Option<usize>) -> Error {
    Error::argument(
        "dcgan",
        match classes {
            Some(classes) => format!("the model is conditional on {classes} classes: it needs labels"),
            None => "labels were given to a model that is not conditional; set DcganConfig::classes".to_string(),
        },
    )
}
