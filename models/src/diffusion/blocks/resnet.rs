//! Residual blocks of convolutions, and the layers that change the resolution between them.

use crate::nn::{Conv2d, ConvOptions, Dropout, GroupNorm, Linear, Module, Params};
use kiln_tensor::ops::movement::PadMode;
use kiln_tensor::ops::upsample::Interpolation;
use kiln_tensor::{Activation, Error, Result, Tensor};

const SAME: ConvOptions<2> = ConvOptions::new().with_padding(1);

/// How a [`ResnetBlock`] is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResnetOptions {
    /// Groups of the norms.
    pub groups: usize,
    /// ε of the norms.
    pub eps: f64,
    /// Width of the time embedding, if there is one.
    pub time_width: Option<usize>,
    /// The time scales and shifts the second norm's output instead of being added before it.
    pub scale_shift: bool,
    /// Before the second convolution.
    pub dropout: f64,
    /// The sum of both ways is divided by this.
    pub output_scale: f64,
}

/// x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))): (B, inputs, H, W) → (B, outputs, H, W).
pub(crate) struct ResnetBlock {
    norm1: GroupNorm,
    conv1: Conv2d,
    time_emb_proj: Option<Linear>,
    norm2: GroupNorm,
    dropout: Dropout,
    conv2: Conv2d,
    conv_shortcut: Option<Conv2d>,
    options: ResnetOptions,
}

impl ResnetBlock {
    pub fn new(params: &Params, inputs: usize, outputs: usize, options: ResnetOptions) -> Result<Self> {
        let ResnetOptions { groups, eps, .. } = options;
        let time_outputs = if options.scale_shift { 2 * outputs } else { outputs };
        let time = |width| Linear::new(&params.scope("time_emb_proj"), width, time_outputs, true);
        let shortcut = || Conv2d::new(&params.scope("conv_shortcut"), inputs, outputs, 1, ());
        Ok(Self {
            norm1: GroupNorm::with_options(&params.scope("norm1"), groups, inputs, eps, true)?,
            conv1: Conv2d::new(&params.scope("conv1"), inputs, outputs, 3, SAME)?,
            time_emb_proj: options.time_width.map(time).transpose()?,
            norm2: GroupNorm::with_options(&params.scope("norm2"), groups, outputs, eps, true)?,
            dropout: Dropout::new(params, options.dropout)?,
            conv2: Conv2d::new(&params.scope("conv2"), outputs, outputs, 3, SAME)?,
            conv_shortcut: if inputs == outputs { None } else { Some(shortcut()?) },
            options,
        })
    }

    /// `time` is silu of the time embedding (B, width): all blocks of a network take the same.
    pub fn forward(&self, x: &Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_activated(x, Activation::Silu)?)?;
        let h = self.conv2.forward(&self.dropout.forward(&self.middle(h, time)?)?)?;
        let sum = match &self.conv_shortcut {
            Some(shortcut) => shortcut.forward(x)?.add(&h)?,
            None => x.add(&h)?,
        };
        if self.options.output_scale == 1.0 { Ok(sum) } else { sum.mul_scalar(1.0 / self.options.output_scale) }
    }

    /// silu(norm2(h)) with the time's part.
    fn middle(&self, h: Tensor, time: Option<&Tensor>) -> Result<Tensor> {
        let Some(projection) = &self.time_emb_proj else { return self.norm2.forward_activated(&h, Activation::Silu) };
        let time = time.ok_or_else(|| Error::argument("resnet block", "the block was made for a time embedding and got none"))?;
        let t = projection.forward(time)?.unsqueeze(-1)?.unsqueeze(-1)?; // (B, C or 2C, 1, 1)
        if !self.options.scale_shift {
            return self.norm2.forward_activated(&h.add(&t)?, Activation::Silu);
        }
        let [scale, shift] = halves(&t)?;
        self.norm2.forward(&h)?.mul(&scale.add_scalar(1.0)?)?.add(&shift)?.silu()
    }
}

/// Both halves of the channels.
pub(super) fn halves(x: &Tensor) -> Result<[Tensor; 2]> {
    <[Tensor; 2]>::try_from(x.chunk(2, 1)?).map_err(|_| Error::shape("chunk", "an even number of channels is needed"))
}

/// A convolution of stride 2, named `conv`: (B, C, H, W) → (B, outputs, H/2, W/2), rounded up.
pub(crate) struct Downsample {
    conv: Conv2d,
    /// Zeros on the right and below only, as autoencoders pad; on all sides otherwise.
    pads_ends: bool,
}

impl Downsample {
    pub fn new(params: &Params, inputs: usize, outputs: usize, pads_ends: bool) -> Result<Self> {
        let options = ConvOptions::new().with_stride(2).with_padding(if pads_ends { 0 } else { 1 });
        Ok(Self { conv: Conv2d::new(&params.scope("conv"), inputs, outputs, 3, options)?, pads_ends })
    }
}

impl Module for Downsample {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        if self.pads_ends { self.conv.forward(&x.pad(&[0, 1, 0, 1], PadMode::Constant(0.0))?) } else { self.conv.forward(x) }
    }
}

/// Each pixel four times, then a convolution named `conv`: (B, C, H, W) → (B, outputs, 2H, 2W).
pub(crate) struct Upsample {
    conv: Conv2d,
}

impl Upsample {
    pub fn new(params: &Params, inputs: usize, outputs: usize) -> Result<Self> {
        Ok(Self { conv: Conv2d::new(&params.scope("conv"), inputs, outputs, 3, SAME)? })
    }

    /// To a height and width of `size` instead of twice the input's, where an odd one was halved on the way down.
    pub fn forward_to(&self, x: &Tensor, size: [usize; 2]) -> Result<Tensor> {
        self.conv.forward(&x.interpolate(size, Interpolation::Nearest)?)
    }
}

impl Module for Upsample {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_to(x, [2 * x.dim(-2)?, 2 * x.dim(-1)?])
    }
}
