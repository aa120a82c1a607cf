//! A discriminator that judges patches of a picture, each by itself.

use crate::nn::{BatchNorm2d, Conv2d, ConvOptions, LeakyRelu, Module, Params, Sequential};
use kiln_tensor::{Error, Result, Tensor};

/// The shape of a [`PatchGan`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PatchGanConfig {
    /// Channels of the pictures.
    pub channels: usize,
    /// Channels of the first feature map; they double at each further layer, up to eight times as many.
    pub width: usize,
    /// Layers that halve the size. Three see patches of 70 pixels, two of 34.
    pub layers: usize,
}

impl Default for PatchGanConfig {
    /// Three layers from 64 channels, for colour pictures.
    fn default() -> Self {
        Self { channels: 3, width: 64, layers: 3 }
    }
}

/// Pictures (B, C, H, W) to scores (B, 1, h, w), not squashed, of their patches: large for real ones. Parameters are `main.N`.
///
/// Source: Isola et al., *Image-to-Image Translation with Conditional Adversarial Networks*, 2017.
pub struct PatchGan {
    main: Sequential,
}

impl PatchGan {
    /// A discriminator whose weights come from `params`.
    ///
    /// # Errors
    /// If there is no layer, or more than a picture could have.
    pub fn new(params: &Params, config: PatchGanConfig) -> Result<Self> {
        let PatchGanConfig { channels, width, layers } = config;
        let widest = width.checked_mul(8).filter(|_| (1..=16).contains(&layers));
        widest.ok_or_else(|| Error::argument("PatchGan", format!("{layers} layers from {width} channels; there must be 1 to 16")))?;
        let leaky = LeakyRelu(0.2);
        let halving = ConvOptions::<2>::new().with_stride(2).with_padding(1);
        let mut main = Sequential::new(&params.scope("main")).push(|p| Conv2d::new(p, channels, width, 4, halving))?.then(leaky);
        let mut inputs = width;
        for layer in 1..=layers {
            let outputs = width * (1 << layer.min(3));
            let options = if layer < layers { halving } else { halving.with_stride(1) }.with_bias(false);
            main = main.push(|p| Conv2d::new(p, inputs, outputs, 4, options))?.push(|p| BatchNorm2d::new(p, outputs))?.then(leaky);
            inputs = outputs;
        }
        Ok(Self { main: main.push(|p| Conv2d::new(p, inputs, 1, 4, halving.with_stride(1)))? })
    }
}

impl Module for PatchGan {
    fn forward(&self, pictures: &Tensor) -> Result<Tensor> {
        self.main.forward(pictures)
    }
}
