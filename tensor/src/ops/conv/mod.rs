//! Convolution and transposed convolution in one, two and three dimensions. Here are options, checks and shapes; the
//! operations with their rules are in [`rules`].

mod rules;

use super::spatial::{Extents, PerAxis};
use crate::autocast::{lowered, lowered_option};
use crate::{Error, Result, Tensor};
use kiln_kernels::cpu::conv::{output_extent, transposed_extent};
use rules::Conv;

/// How a convolution slides: `ConvOptions::new().stride(2).padding(1)`. Each parameter is a number, or an array of one for each axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvOptions {
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    output_padding: PerAxis,
    groups: usize,
}

impl Default for ConvOptions {
    fn default() -> Self {
        Self { stride: 1.into(), padding: 0.into(), dilation: 1.into(), output_padding: 0.into(), groups: 1 }
    }
}

impl From<()> for ConvOptions {
    fn from((): ()) -> Self {
        Self::default()
    }
}

impl ConvOptions {
    /// Stride 1, no padding, dilation 1, one group.
    pub fn new() -> Self {
        Self::default()
    }

    /// Distance between the windows of neighbouring outputs (of neighbouring inputs, if transposed).
    pub fn stride(mut self, stride: impl Into<PerAxis>) -> Self {
        self.stride = stride.into();
        self
    }

    /// Zeros added at both ends of each axis (taken away from the result, if transposed).
    pub fn padding(mut self, padding: impl Into<PerAxis>) -> Self {
        self.padding = padding.into();
        self
    }

    /// Distance between neighbouring taps of the kernel.
    pub fn dilation(mut self, dilation: impl Into<PerAxis>) -> Self {
        self.dilation = dilation.into();
        self
    }

    /// Groups of channels that are convolved apart; must divide the channels of input and output.
    pub fn groups(mut self, groups: usize) -> Self {
        self.groups = groups;
        self
    }

    /// Extent added at the end of each axis of a transposed convolution's result, to choose among the extents that a strided
    /// convolution would map to the same one. Less than stride or dilation.
    pub fn output_padding(mut self, output_padding: impl Into<PerAxis>) -> Self {
        self.output_padding = output_padding.into();
        self
    }
}

/// A checked convolution: how it slides, and the extents of the image that it is applied to and of its result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Geometry {
    groups: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
    padding: [usize; 3],
    dilation: [usize; 3],
    /// The image that a convolution reads and a transposed one writes.
    wide: Extents,
    /// The image that a convolution writes and a transposed one reads.
    narrow: Extents,
}

/// Where a convolution's window would be placed for extents `e`, for messages.
fn spatial(extents: &[usize; 3], rank: usize) -> &[usize] {
    &extents[3 - rank..]
}

impl Geometry {
    /// The geometry of `x` convolved with `weight`, or with `transposed` the other way round.
    fn new(op: &str, x: &Tensor, weight: &Tensor, rank: usize, options: &ConvOptions, transposed: bool) -> Result<Self> {
        x.expect_same(op, weight)?;
        let from = Extents::of(op, x, rank)?;
        let w = Extents::of(op, weight, rank).map_err(|_| {
            let expected = if transposed { "[in channels, out channels / groups" } else { "[out channels, in channels / groups" };
            Error::shape(op, format!("expected a weight of shape {expected}, {rank} kernel extents], got {}", weight.shape()))
        })?;
        let stride = options.stride.resolve(op, "stride", rank, 1)?;
        let padding = options.padding.resolve(op, "padding", rank, 0)?;
        let dilation = options.dilation.resolve(op, "dilation", rank, 1)?;
        let output_padding = options.output_padding.resolve(op, "output_padding", rank, 0)?;
        let (groups, kernel) = (options.groups, w.axes);
        if groups == 0 || w.n % groups != 0 || kernel.contains(&0) {
            return Err(Error::argument(
                op,
                format!("{groups} groups do not divide the weight {}, or its kernel is empty", weight.shape()),
            ));
        }
        let expected = if transposed { w.n } else { w.c * groups };
        if from.c != expected {
            let message =
                format!("input {} has {} channels, weight {} with {groups} groups takes {expected}", x.shape(), from.c, weight.shape());
            return Err(Error::shape(op, message));
        }
        if !transposed && output_padding != [0; 3] {
            return Err(Error::argument(op, "output_padding belongs to transposed convolutions"));
        }
        let mut axes = [0; 3];
        for i in 0..3 {
            let (extent, kernel, stride, padding, dilation) = (from.axes[i], kernel[i], stride[i], padding[i], dilation[i]);
            let extent = if transposed {
                transposed_extent(extent, kernel, stride, padding, dilation, output_padding[i])
            } else {
                output_extent(extent, kernel, stride, padding, dilation)
            };
            axes[i] = extent.filter(|&e| e <= i32::MAX as usize).ok_or_else(|| {
                let from = spatial(&from.axes, rank);
                let kernel = spatial(&w.axes, rank);
                Error::shape(op, format!("a kernel of {kernel:?} does not fit an image of {from:?} with {options:?}"))
            })?;
        }
        let c = if transposed { w.c * groups } else { w.n };
        let to = Extents { c, axes, ..from };
        let (wide, narrow) = if transposed { (to, from) } else { (from, to) };
        Ok(Self { groups, kernel, stride, padding, dilation, wide, narrow })
    }
}

fn check_bias(op: &str, x: &Tensor, bias: Option<&Tensor>, channels: usize) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    x.expect_same(op, bias)?;
    if bias.dims() != [channels] {
        return Err(Error::shape(
            op,
            format!("bias must have shape [{channels}], one value a channel of the result, got {}", bias.shape()),
        ));
    }
    Ok(())
}

impl Tensor {
    /// Convolution of sequences `[n, c_in, length]` (or `[c_in, length]`) with `weight` `[c_out, c_in / groups, k]`.
    /// See [`conv2d`](Tensor::conv2d).
    pub fn conv1d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv1d", 1, weight, bias, &options.into(), false)
    }

    /// Convolution (in truth cross-correlation) of images `[n, c_in, h, w]` (or `[c_in, h, w]`) with `weight`
    /// `[c_out, c_in / groups, kh, kw]`, plus `bias` `[c_out]`:
    /// `y[n, j, p] = bias[j] + Σ_c Σ_k x[n, c, p·stride + k·dilation − padding] · weight[j, c, k]`.
    ///
    /// Each axis of the result has `⌊(extent + 2·padding − dilation·(k − 1) − 1) / stride⌋ + 1` positions. The result lies
    /// channels-last in memory; an input that does so too is not copied.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result, ops::conv::ConvOptions};
    /// # fn main() -> Result<()> {
    /// let (x, w) = (Tensor::ones([1, 3, 28, 28], DType::F32)?, Tensor::ones([8, 3, 4, 4], DType::F32)?);
    /// assert_eq!(x.conv2d(&w, None, ConvOptions::new().stride(2).padding(1))?.dims(), [1, 8, 14, 14]);
    /// # Ok(()) }
    /// ```
    pub fn conv2d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv2d", 2, weight, bias, &options.into(), false)
    }

    /// Convolution of volumes `[n, c_in, d, h, w]` (or `[c_in, d, h, w]`) with `weight` `[c_out, c_in / groups, kd, kh, kw]`.
    /// See [`conv2d`](Tensor::conv2d).
    pub fn conv3d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv3d", 3, weight, bias, &options.into(), false)
    }

    /// Transposed convolution of sequences. See [`conv_transpose2d`](Tensor::conv_transpose2d).
    pub fn conv_transpose1d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv_transpose1d", 1, weight, bias, &options.into(), true)
    }

    /// Transposed convolution of images `[n, c_in, h, w]` with `weight` `[c_in, c_out / groups, kh, kw]`, plus `bias` `[c_out]`:
    /// the gradient of [`conv2d`](Tensor::conv2d) by its input, as an operation of its own.
    ///
    /// Each axis of the result has `(extent − 1)·stride − 2·padding + dilation·(k − 1) + output_padding + 1` positions.
    pub fn conv_transpose2d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv_transpose2d", 2, weight, bias, &options.into(), true)
    }

    /// Transposed convolution of volumes. See [`conv_transpose2d`](Tensor::conv_transpose2d).
    pub fn conv_transpose3d(&self, weight: &Tensor, bias: Option<&Tensor>, options: impl Into<ConvOptions>) -> Result<Tensor> {
        self.conv("conv_transpose3d", 3, weight, bias, &options.into(), true)
    }

    fn conv(
        &self,
        op: &'static str,
        rank: usize,
        weight: &Tensor,
        bias: Option<&Tensor>,
        options: &ConvOptions,
        transposed: bool,
    ) -> Result<Tensor> {
        let (input, weight, bias) = (lowered(self)?, lowered(weight)?, lowered_option(bias)?);
        let (input, weight, bias) = (&*input, &*weight, bias.as_deref());
        if input.rank() == rank + 1 {
            return input.unsqueeze(0)?.conv(op, rank, weight, bias, options, transposed)?.squeeze(0);
        }
        let geometry = Geometry::new(op, input, weight, rank, options, transposed)?;
        check_bias(op, input, bias, if transposed { geometry.wide.c } else { geometry.narrow.c })?;
        let conv = Conv { name: op, geometry, dtype: input.dtype() };
        if transposed { conv.input_grad(input, weight, bias) } else { conv.forward(input, weight, bias) }
    }
}
