//! Interpolation: images resized by the nearest neighbour or linearly along each axis.

use super::spatial::{Extents, PerAxis, by_image, pixels};
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{Error, Result, Tensor};
use kiln_kernels::cpu::resample::{self, AxisMap};
use kiln_kernels::cpu::upsample::{linear_axis, nearest_axis};
use kiln_kernels::cuda::resample as gpu_resample;
use std::sync::Arc;

/// How values between the pixels of an image are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interpolation {
    /// The value of the nearest pixel (towards the start).
    Nearest,
    /// Linear along each axis: linear, bilinear or trilinear.
    Linear {
        /// Whether the first and last pixels of input and result coincide; if not, pixels are areas and the images' borders do.
        align_corners: bool,
    },
}

/// A linear map of images along their axes. Its gradient is the transposed map.
struct Resample {
    name: &'static str,
    maps: Arc<[AxisMap; 3]>,
    rank: usize,
}

impl Op for Resample {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let transposed = self.maps.each_ref().map(AxisMap::transpose);
        Ok(vec![Some(resample(self.name, grad, Arc::new(transposed), self.rank)?)])
    }
}

/// Applies a map along each axis to an image `[n, c, …]`, differentiably.
pub(super) fn resample(name: &'static str, x: &Tensor, maps: Arc<[AxisMap; 3]>, rank: usize) -> Result<Tensor> {
    let input = Extents::of(name, x, rank)?;
    let output = Extents { axes: maps.each_ref().map(AxisMap::outputs), ..input };
    let _running = operation(name, &[x], || Cost::flops(x.numel() as u64));
    let source = pixels(x)?;
    let out = match x.gpu()? {
        Some(gpu) => output.build_on_gpu(gpu, x.dtype(), |mut out| {
            Ok(gpu_resample::resample(gpu, &maps, input.n, input.c, source.gpu_slice()?, &mut out)?)
        }),
        None => for_float!(x.dtype(), name, T => output.build::<T>(x.device(), |out| {
            resample::resample(&maps, input.n, input.c, source.as_slice::<T>()?, out);
            Ok(())
        })),
    }?;
    record(name, out, &[x], |_| Resample { name, maps, rank })
}

impl Tensor {
    /// Images `[n, c, …]` with one to three spatial dimensions, resized to `size`.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result, ops::upsample::Interpolation};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::from_vec(vec![0f32, 4.], [1, 1, 2])?;
    /// let linear = Interpolation::Linear { align_corners: false };
    /// assert_eq!(x.interpolate(4, linear)?.to_vec::<f32>()?, [0., 1., 3., 4.]);
    /// # Ok(()) }
    /// ```
    pub fn interpolate(&self, size: impl Into<PerAxis>, mode: Interpolation) -> Result<Tensor> {
        self.resized(size.into(), mode)
    }

    fn resized(&self, size: PerAxis, mode: Interpolation) -> Result<Tensor> {
        let rank = image_rank("interpolate", self)?;
        let size = size.resolve("interpolate", "size", rank, 1)?;
        by_image("interpolate", self, rank, |x| {
            let input = Extents::of("interpolate", x, rank)?;
            if input.axes.contains(&0) || size.contains(&0) {
                return Err(Error::shape("interpolate", format!("cannot resize an image of {:?} to {size:?}", input.axes)));
            }
            let maps = std::array::from_fn(|i| match mode {
                Interpolation::Nearest => nearest_axis(input.axes[i], size[i]),
                Interpolation::Linear { align_corners } => linear_axis(input.axes[i], size[i], align_corners),
            });
            resample("interpolate", x, Arc::new(maps), rank)
        })
    }

    /// Each pixel of `[n, c, …]` repeated `factor` times along each axis.
    pub fn upsample_nearest(&self, factor: impl Into<PerAxis>) -> Result<Tensor> {
        self.resized(self.scaled("upsample_nearest", factor.into())?, Interpolation::Nearest)
    }

    /// Images `[n, c, h, w]` enlarged by `factor`, bilinearly.
    pub fn upsample_bilinear(&self, factor: impl Into<PerAxis>, align_corners: bool) -> Result<Tensor> {
        self.resized(self.scaled("upsample_bilinear", factor.into())?, Interpolation::Linear { align_corners })
    }

    /// The extents of the spatial axes times `factor`.
    fn scaled(&self, op: &str, factor: PerAxis) -> Result<PerAxis> {
        let rank = image_rank(op, self)?;
        let factor = factor.resolve(op, "factor", rank, 1)?;
        let axes = Extents::of(op, self, rank)?.axes;
        let overflow = || Error::shape(op, format!("shape {} times {factor:?} is too large", self.shape()));
        let mut size = [1; 3];
        for i in 0..3 {
            size[i] = axes[i].checked_mul(factor[i]).ok_or_else(overflow)?;
        }
        Ok(match rank {
            1 => [size[2]].into(),
            2 => [size[1], size[2]].into(),
            _ => size.into(),
        })
    }
}

/// Spatial dimensions of a batch of images.
fn image_rank(op: &str, x: &Tensor) -> Result<usize> {
    match x.rank() {
        rank @ 3..=5 => Ok(rank - 2),
        _ => Err(Error::shape(op, format!("expected [n, c, …] with one to three spatial dimensions, got {}", x.shape()))),
    }
}
