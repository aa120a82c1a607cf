//! Pooling and resizing as modules, for [`Sequential`](super::Sequential).

use super::Module;
use kiln_tensor::ops::PerAxis;
use kiln_tensor::ops::pool::PoolOptions;
use kiln_tensor::ops::upsample::Interpolation;
use kiln_tensor::{Error, Result, Tensor};

fn dimensions<const N: usize>() -> Error {
    Error::argument("pool", format!("images have 1, 2 or 3 spatial dimensions, not {N}"))
}

/// The maximum of each window: `MaxPool2d::new(2)`, `MaxPool2d::new(PoolOptions::new(3).stride(2))`.
#[derive(Clone, Copy, Debug)]
pub struct MaxPool<const N: usize>(PoolOptions);

/// Maxima of windows of (B, C, L): see [`MaxPool`].
pub type MaxPool1d = MaxPool<1>;
/// Maxima of windows of (B, C, H, W): see [`MaxPool`].
pub type MaxPool2d = MaxPool<2>;
/// Maxima of windows of (B, C, D, H, W): see [`MaxPool`].
pub type MaxPool3d = MaxPool<3>;

impl<const N: usize> MaxPool<N> {
    /// Pooling with these windows.
    pub fn new(options: impl Into<PoolOptions>) -> Self {
        Self(options.into())
    }
}

impl<const N: usize> Module for MaxPool<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match N {
            1 => x.max_pool1d(self.0),
            2 => x.max_pool2d(self.0),
            3 => x.max_pool3d(self.0),
            _ => Err(dimensions::<N>()),
        }
    }
}

/// The average of each window: `AvgPool2d::new(2)`.
#[derive(Clone, Copy, Debug)]
pub struct AvgPool<const N: usize>(PoolOptions);

/// Averages of windows of (B, C, L): see [`AvgPool`].
pub type AvgPool1d = AvgPool<1>;
/// Averages of windows of (B, C, H, W): see [`AvgPool`].
pub type AvgPool2d = AvgPool<2>;
/// Averages of windows of (B, C, D, H, W): see [`AvgPool`].
pub type AvgPool3d = AvgPool<3>;

impl<const N: usize> AvgPool<N> {
    /// Pooling with these windows.
    pub fn new(options: impl Into<PoolOptions>) -> Self {
        Self(options.into())
    }
}

impl<const N: usize> Module for AvgPool<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match N {
            1 => x.avg_pool1d(self.0),
            2 => x.avg_pool2d(self.0),
            3 => x.avg_pool3d(self.0),
            _ => Err(dimensions::<N>()),
        }
    }
}

/// The averages of a given number of windows that cover the image evenly: `AdaptiveAvgPool2d::new(1)` for the average of each channel.
#[derive(Clone, Copy, Debug)]
pub struct AdaptiveAvgPool<const N: usize>(PerAxis);

/// (B, C, L) to a given length: see [`AdaptiveAvgPool`].
pub type AdaptiveAvgPool1d = AdaptiveAvgPool<1>;
/// (B, C, H, W) to a given size: see [`AdaptiveAvgPool`].
pub type AdaptiveAvgPool2d = AdaptiveAvgPool<2>;
/// (B, C, D, H, W) to a given size: see [`AdaptiveAvgPool`].
pub type AdaptiveAvgPool3d = AdaptiveAvgPool<3>;

impl<const N: usize> AdaptiveAvgPool<N> {
    /// Pooling to `outputs` positions along each axis.
    pub fn new(outputs: impl Into<PerAxis>) -> Self {
        Self(outputs.into())
    }
}

impl<const N: usize> Module for AdaptiveAvgPool<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match N {
            1 => x.adaptive_avg_pool1d(self.0),
            2 => x.adaptive_avg_pool2d(self.0),
            3 => x.adaptive_avg_pool3d(self.0),
            _ => Err(dimensions::<N>()),
        }
    }
}

/// Enlarges (B, C, …) by a whole factor along each spatial axis.
#[derive(Clone, Copy, Debug)]
pub struct Upsample {
    factor: PerAxis,
    mode: Interpolation,
}

impl Upsample {
    /// Enlargement by `factor` (a number, or an array of one for each axis).
    pub fn new(factor: impl Into<PerAxis>, mode: Interpolation) -> Self {
        Self { factor: factor.into(), mode }
    }
}

impl Module for Upsample {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.mode {
            Interpolation::Nearest => x.upsample_nearest(self.factor),
            Interpolation::Linear { align_corners } => x.upsample_bilinear(self.factor, align_corners),
        }
    }
}
