//! An autoencoder that gives grey pictures their colours, and the colour space that it works in.

use crate::diffusion::blocks::{Downsample, ResnetBlock, ResnetOptions, SpatialAttention, Upsample};
use crate::nn::{Conv2d, ConvOptions, GroupNorm, Module, Params};
use crate::vae::{Autoencoder, Reconstruction};
use kiln_tensor::{Activation, ConvOptions as ConvolutionOptions, Error, Generator, Result, Tensor};

/// Brightness Y, and the colour differences Cb = (B − Y) / 1.772 and Cr = (R − Y) / 1.402, of red, green and blue (Rec. 601).
const TO_YCBCR: [f32; 9] = [0.299, 0.587, 0.114, -0.168736, -0.331264, 0.5, 0.5, -0.418688, -0.081312];
/// The inverse.
const TO_RGB: [f32; 9] = [1.0, 0.0, 1.402, 1.0, -0.344136, -0.714136, 1.0, 1.772, 0.0];

/// Times a matrix at each pixel: (B, 3, H, W) → (B, 3, H, W).
fn convert(x: &Tensor, matrix: [f32; 9]) -> Result<Tensor> {
    let weight = Tensor::from_vec(matrix.to_vec(), [3, 3, 1, 1])?.to_dtype(x.dtype())?.to_device(x.device())?;
    x.conv2d(&weight, None, ConvolutionOptions::new())
}

/// Brightness (B, 1, H, W) and colour differences Cb, Cr (B, 2, H, W) of pictures (B, 3, H, W), all of the pictures' range about 0.
///
/// Source: ITU-R BT.601.
///
/// # Errors
/// If there are not three channels.
pub fn split_colour(rgb: &Tensor) -> Result<(Tensor, Tensor)> {
    let ycbcr = convert(rgb, TO_YCBCR)?;
    Ok((ycbcr.narrow(1, 0, 1)?, ycbcr.narrow(1, 1, 2)?))
}

/// The inverse of [`split_colour`].
///
/// # Errors
/// If the shapes do not fit.
pub fn join_colour(grey: &Tensor, chroma: &Tensor) -> Result<Tensor> {
    convert(&Tensor::cat(&[grey, chroma], 1)?, TO_RGB)
}

/// The shape of a [`Colorizer`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ColorizerConfig {
    /// Channels at the full resolution, a multiple of 4; they double at each of the `levels`, up to four times as many.
    pub width: usize,
    /// How often the size is halved, at most 8 times.
    pub levels: usize,
}

impl Default for ColorizerConfig {
    fn default() -> Self {
        Self { width: 16, levels: 3 }
    }
}

/// Grey pictures (B, 1, H, W) to coloured ones (B, 3, H, W): an encoder that halves the size, attention between all places at the lowest
/// resolution, and a decoder that doubles it again and sees what the encoder had at each size. It draws the colour differences only: the
/// brightness of a coloured picture is the grey one, to the last bit of rounding.
///
/// Sources: Ronneberger et al., *U-Net*, 2015; Zhang et al., *Colorful Image Colorization*, 2016, for the split into brightness and colour.
pub struct Colorizer {
    conv_in: Conv2d,
    down: Vec<(ResnetBlock, Downsample)>,
    middle: ResnetBlock,
    attention: SpatialAttention,
    up: Vec<(Upsample, ResnetBlock)>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

/// Groups of the norms.
const GROUPS: usize = 4;

impl Colorizer {
    /// A model whose weights come from `params`.
    ///
    /// # Errors
    /// If the width is no multiple of 4, or the levels are too many.
    pub fn new(params: &Params, config: ColorizerConfig) -> Result<Self> {
        let ColorizerConfig { width, levels } = config;
        if levels > 8 || width.checked_mul(8).is_none() {
            return Err(Error::argument("Colorizer", format!("{levels} levels from {width} channels; there may be at most 8")));
        }
        let same = ConvOptions::<2>::new().with_padding(1);
        let channels = |level: usize| width * (1 << level.min(2));
        let options = ResnetOptions { groups: GROUPS, eps: 1e-6, time_width: None, scale_shift: false, dropout: 0.0, output_scale: 1.0 };
        let encoder = params.scope("encoder");
        let down = |level: usize| -> Result<_> {
            let (block, inner, outer) = (encoder.index(level), channels(level), channels(level + 1));
            Ok((ResnetBlock::new(&block.scope("resnet"), inner, inner, options)?, Downsample::new(&block, inner, outer, false)?))
        };
        let decoder = params.scope("decoder");
        let up = |level: usize| -> Result<_> {
            let (block, inner, outer) = (decoder.index(level), channels(level), channels(level + 1));
            Ok((Upsample::new(&block, outer, inner)?, ResnetBlock::new(&block.scope("resnet"), 2 * inner, inner, options)?))
        };
        let deepest = channels(levels);
        Ok(Self {
            conv_in: Conv2d::new(&params.scope("conv_in"), 1, width, 3, same)?,
            down: (0..levels).map(down).collect::<Result<_>>()?,
            middle: ResnetBlock::new(&params.scope("middle"), deepest, deepest, options)?,
            attention: SpatialAttention::new(&params.scope("attention"), deepest, 1, GROUPS, 1e-6)?,
            up: (0..levels).rev().map(up).collect::<Result<_>>()?,
            norm_out: GroupNorm::new(&params.scope("norm_out"), GROUPS, width)?,
            conv_out: Conv2d::new(&params.scope("conv_out"), width, 2, 3, same)?,
        })
    }

    /// The colour differences Cb, Cr (B, 2, H, W) in (−1, 1) of grey pictures (B, 1, H, W) in [−1, 1].
    ///
    /// # Errors
    /// If the shape does not fit.
    pub fn chroma(&self, grey: &Tensor) -> Result<Tensor> {
        let mut h = self.conv_in.forward(grey)?;
        let mut skips = Vec::new();
        for (resnet, downsample) in &self.down {
            let skip = resnet.forward(&h, None)?;
            h = downsample.forward(&skip)?;
            skips.push(skip);
        }
        h = self.attention.forward(&self.middle.forward(&h, None)?)?;
        for ((upsample, resnet), skip) in self.up.iter().zip(skips.iter().rev()) {
            let larger = upsample.forward_to(&h, [skip.dim(-2)?, skip.dim(-1)?])?;
            h = resnet.forward(&Tensor::cat(&[&larger, skip], 1)?, None)?;
        }
        self.conv_out.forward(&self.norm_out.forward_activated(&h, Activation::Silu)?)?.tanh()
    }
}

impl Module for Colorizer {
    /// Coloured pictures (B, 3, H, W) of grey ones (B, 1, H, W) in [−1, 1]; where brightness and colour leave the range, values do too.
    fn forward(&self, grey: &Tensor) -> Result<Tensor> {
        join_colour(grey, &self.chroma(grey)?)
    }
}

impl Autoencoder for Colorizer {
    /// Colours the brightness of pictures (B, 3, H, W); latents cost nothing.
    fn reconstruct(&self, x: &Tensor, _: &Generator) -> Result<Reconstruction> {
        let (grey, _) = split_colour(x)?;
        Ok(Reconstruction { output: self.forward(&grey)?, penalty: Tensor::zeros((), x)? })
    }

    fn last_weight(&self) -> Tensor {
        self.conv_out.weight().get()
    }
}
