//! Convolutions and transposed convolutions in one, two and three dimensions.

use super::{Adapter, Init, Module, Param, Params};
use kiln_tensor::ops::{PerAxis, conv};
use kiln_tensor::{Error, Result, Tensor};
use std::any::Any;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// How a convolutional layer of `N` spatial dimensions slides. The `with_…` methods set all axes alike; the fields differ by axis.
///
/// ```
/// # use kiln_models::nn::ConvOptions;
/// const HALVE: ConvOptions<2> = ConvOptions::new().with_stride(2).with_padding(1);
/// let wide = ConvOptions { stride: [1, 2], ..HALVE };
/// # assert_eq!(wide.padding, [1, 1]);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvOptions<const N: usize> {
    /// Distance between the windows of neighbouring outputs (of neighbouring inputs, if transposed).
    pub stride: [usize; N],
    /// Zeros added at both ends of each axis (taken away from the result, if transposed).
    pub padding: [usize; N],
    /// Distance between neighbouring taps of the kernel.
    pub dilation: [usize; N],
    /// Rows added at the end of each axis of a transposed convolution's result; must be 0 otherwise.
    pub output_padding: [usize; N],
    /// Groups of channels that are convolved apart; must divide the channels of input and output.
    pub groups: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl<const N: usize> ConvOptions<N> {
    /// Stride 1, no padding, dilation 1, one group, with bias.
    pub const fn new() -> Self {
        Self { stride: [1; N], padding: [0; N], dilation: [1; N], output_padding: [0; N], groups: 1, bias: true }
    }

    /// The same stride along every axis.
    pub const fn with_stride(self, stride: usize) -> Self {
        Self { stride: [stride; N], ..self }
    }

    /// The same padding along every axis.
    pub const fn with_padding(self, padding: usize) -> Self {
        Self { padding: [padding; N], ..self }
    }

    /// The same dilation along every axis.
    pub const fn with_dilation(self, dilation: usize) -> Self {
        Self { dilation: [dilation; N], ..self }
    }

    /// The same output padding along every axis.
    pub const fn with_output_padding(self, output_padding: usize) -> Self {
        Self { output_padding: [output_padding; N], ..self }
    }

    /// The number of groups.
    pub const fn with_groups(self, groups: usize) -> Self {
        Self { groups, ..self }
    }

    /// With or without bias.
    pub const fn with_bias(self, bias: bool) -> Self {
        Self { bias, ..self }
    }

    /// What the operation takes.
    fn lower(&self) -> Result<conv::ConvOptions> {
        Ok(conv::ConvOptions::new()
            .stride(axes(self.stride)?)
            .padding(axes(self.padding)?)
            .dilation(axes(self.dilation)?)
            .output_padding(axes(self.output_padding)?)
            .groups(self.groups))
    }
}

impl<const N: usize> Default for ConvOptions<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> From<()> for ConvOptions<N> {
    fn from((): ()) -> Self {
        Self::new()
    }
}

/// Extents of a kernel of `N` dimensions: one number for all axes, or an array.
pub trait IntoKernel<const N: usize> {
    /// The extent along each axis.
    fn into_kernel(self) -> [usize; N];
}

impl<const N: usize> IntoKernel<N> for usize {
    fn into_kernel(self) -> [usize; N] {
        [self; N]
    }
}

impl<const N: usize> IntoKernel<N> for [usize; N] {
    fn into_kernel(self) -> [usize; N] {
        self
    }
}

fn axes<const N: usize>(values: [usize; N]) -> Result<PerAxis> {
    match values[..] {
        [a] => Ok([a].into()),
        [a, b] => Ok([a, b].into()),
        [a, b, c] => Ok([a, b, c].into()),
        _ => Err(dimensions::<N>()),
    }
}

fn dimensions<const N: usize>() -> Error {
    Error::argument("conv", format!("convolutions have 1, 2 or 3 spatial dimensions, not {N}"))
}

/// The channels of a group: an error unless `groups` divides both.
fn per_group(inputs: usize, outputs: usize, groups: usize) -> Result<(usize, usize)> {
    if groups == 0 || !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
        return Err(Error::argument("conv", format!("{groups} groups do not divide {inputs} input and {outputs} output channels")));
    }
    Ok((inputs / groups, outputs / groups))
}

/// What both kinds of convolution hold.
#[derive(Clone, Debug)]
struct Taps {
    weight: Param,
    bias: Option<Param>,
    options: conv::ConvOptions,
    groups: usize,
}

impl Taps {
    fn new<const N: usize>(
        params: &Params,
        channels: [usize; 2],
        kernel: [usize; N],
        outputs: usize,
        options: &ConvOptions<N>,
        init: Option<[Init; 2]>,
    ) -> Result<Self> {
        let shape = [&channels[..], &kernel].concat();
        let lowered = options.lower()?;
        let [of_weight, of_bias] = init.unwrap_or_else(|| [Init::default_weight(), Init::default_bias(&shape)]);
        let weight = params.param("weight", &shape, of_weight)?;
        let bias = options.bias.then(|| params.param("bias", [outputs], of_bias)).transpose()?;
        Ok(Self { weight, bias, options: lowered, groups: options.groups })
    }
}

/// Convolution with `N` spatial dimensions: (B, inputs, …) → (B, outputs, …), along each axis
/// ⌊(size + 2 padding − dilation (kernel − 1) − 1) / stride⌋ + 1 positions.
///
/// y(b, o, p) = bias(o) + Σ over c and k of weight(o, c, k) · x(b, c, p · stride + k · dilation − padding).
///
/// Parameters: `weight` (outputs, inputs / groups, kernel…) and `bias` (outputs), uniform in ±1/√(inputs / groups · taps) at first.
///
/// Clones are one layer; [`Params::convs`] lists a model's convolutions of images, and [`set_adapter`](Conv::set_adapter) changes one for
/// every holder.
///
/// ```
/// # use kiln_models::nn::{Conv2d, ConvOptions, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = Conv2d::new(&Params::seeded(0), 3, 8, 3, ConvOptions::new().with_stride(2).with_padding(1))?;
/// assert_eq!(layer.forward(&Tensor::ones([1, 3, 8, 6], ())?)?.dims(), [1, 8, 4, 3]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Conv<const N: usize>(Arc<Layer<N>>);

struct Layer<const N: usize> {
    name: String,
    taps: Taps,
    adapter: RwLock<Option<Arc<dyn Adapter<Conv<N>>>>>,
}

/// Convolution of sequences (B, C, L): see [`Conv`].
pub type Conv1d = Conv<1>;
/// Convolution of images (B, C, H, W): see [`Conv`].
pub type Conv2d = Conv<2>;
/// Convolution of volumes (B, C, D, H, W): see [`Conv`].
pub type Conv3d = Conv<3>;

impl<const N: usize> Conv<N> {
    /// A layer from `inputs` to `outputs` channels; `kernel` is a number or an array of one for each axis.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: impl IntoKernel<N>,
        options: impl Into<ConvOptions<N>>,
    ) -> Result<Self> {
        Self::make(params, [inputs, outputs], kernel.into_kernel(), &options.into(), None)
    }

    /// A layer whose weight and bias (if it has one) start as `init` says.
    pub fn with_init(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: impl IntoKernel<N>,
        options: impl Into<ConvOptions<N>>,
        init: [Init; 2],
    ) -> Result<Self> {
        Self::make(params, [inputs, outputs], kernel.into_kernel(), &options.into(), Some(init))
    }

    fn make(
        params: &Params,
        [inputs, outputs]: [usize; 2],
        kernel: [usize; N],
        options: &ConvOptions<N>,
        init: Option<[Init; 2]>,
    ) -> Result<Self> {
        if options.output_padding != [0; N] {
            return Err(Error::argument("conv", "output padding is for transposed convolutions"));
        }
        let (inputs, _) = per_group(inputs, outputs, options.groups)?;
        let taps = Taps::new(params, [outputs, inputs], kernel, outputs, options, init)?;
        let layer = Self(Arc::new(Layer { name: params.name().to_owned(), taps, adapter: RwLock::default() }));
        if let Some(layer) = (&layer as &dyn Any).downcast_ref::<Conv2d>() {
            params.register_conv(layer);
        }
        Ok(layer)
    }

    /// The full name of the layer's scope, e.g. `down_blocks.0.resnets.0.conv1`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The weight, (outputs, inputs / groups, kernel…).
    pub fn weight(&self) -> &Param {
        &self.0.taps.weight
    }

    /// The bias, (outputs).
    pub fn bias(&self) -> Option<&Param> {
        self.0.taps.bias.as_ref()
    }

    /// Groups of channels that are convolved apart.
    pub(crate) fn groups(&self) -> usize {
        self.0.taps.groups
    }

    /// Puts an adapter into the layer, for all who hold it, or takes it away; returns the one that was there.
    pub fn set_adapter(&self, adapter: Option<Arc<dyn Adapter<Conv<N>>>>) -> Option<Arc<dyn Adapter<Conv<N>>>> {
        std::mem::replace(&mut *self.0.adapter.write().unwrap_or_else(PoisonError::into_inner), adapter)
    }

    /// The adapter that is in the layer.
    pub fn adapter(&self) -> Option<Arc<dyn Adapter<Conv<N>>>> {
        self.0.adapter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The convolution with bias, as without an adapter.
    pub fn base(&self, x: &Tensor) -> Result<Tensor> {
        self.convolve(x, &self.weight().get(), self.bias().map(Param::get).as_ref())
    }

    /// The convolution with another weight, that slides over `x` as this layer's own.
    pub fn convolve(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let options = self.0.taps.options;
        match N {
            1 => x.conv1d(weight, bias, options),
            2 => x.conv2d(weight, bias, options),
            3 => x.conv3d(weight, bias, options),
            _ => Err(dimensions::<N>()),
        }
    }
}

impl<const N: usize> Module for Conv<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.adapter().filter(|adapter| adapter.is_active()) {
            Some(adapter) => adapter.forward(self, x),
            None => self.base(x),
        }
    }
}

impl<const N: usize> fmt::Debug for Conv<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Taps { weight, bias, options, .. } = &self.0.taps;
        write!(f, "Conv({weight:?}, {bias:?}, {options:?}, adapter {})", self.adapter().is_some())
    }
}

/// Transposed convolution with `N` spatial dimensions, the gradient of [`Conv`] with respect to its input as a layer: (B, inputs, …) →
/// (B, outputs, …), along each axis (size − 1) stride − 2 padding + dilation (kernel − 1) + output_padding + 1 positions.
///
/// Parameters: `weight` (inputs, outputs / groups, kernel…) and `bias` (outputs), uniform in ±1/√(outputs / groups · taps) at first.
///
/// ```
/// # use kiln_models::nn::{ConvOptions, ConvTranspose2d, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = ConvTranspose2d::new(&Params::seeded(0), 8, 3, 4, ConvOptions::new().with_stride(2).with_padding(1))?;
/// assert_eq!(layer.forward(&Tensor::ones([1, 8, 4, 3], ())?)?.dims(), [1, 3, 8, 6]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct ConvTranspose<const N: usize>(Taps);

/// Transposed convolution of sequences (B, C, L): see [`ConvTranspose`].
pub type ConvTranspose1d = ConvTranspose<1>;
/// Transposed convolution of images (B, C, H, W): see [`ConvTranspose`].
pub type ConvTranspose2d = ConvTranspose<2>;
/// Transposed convolution of volumes (B, C, D, H, W): see [`ConvTranspose`].
pub type ConvTranspose3d = ConvTranspose<3>;

impl<const N: usize> ConvTranspose<N> {
    /// A layer from `inputs` to `outputs` channels; `kernel` is a number or an array of one for each axis.
    pub fn new(
        params: &Params,
        inputs: usize,
        outputs: usize,
        kernel: impl IntoKernel<N>,
        options: impl Into<ConvOptions<N>>,
    ) -> Result<Self> {
        let options = options.into();
        let (_, group_outputs) = per_group(inputs, outputs, options.groups)?;
        Ok(Self(Taps::new(params, [inputs, group_outputs], kernel.into_kernel(), outputs, &options, None)?))
    }

    /// The weight, (inputs, outputs / groups, kernel…).
    pub fn weight(&self) -> &Param {
        &self.0.weight
    }

    /// The bias, (outputs).
    pub fn bias(&self) -> Option<&Param> {
        self.0.bias.as_ref()
    }
}

impl<const N: usize> Module for ConvTranspose<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.0.weight.get(), self.0.bias.as_ref().map(Param::get));
        match N {
            1 => x.conv_transpose1d(&weight, bias.as_ref(), self.0.options),
            2 => x.conv_transpose2d(&weight, bias.as_ref(), self.0.options),
            3 => x.conv_transpose3d(&weight, bias.as_ref(), self.0.options),
            _ => Err(dimensions::<N>()),
        }
    }
}
