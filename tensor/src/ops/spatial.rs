//! What convolution, pooling and interpolation share: parameters per axis, and images seen as channels-last pixels.
//!
//! An image of `rank` 1, 2 or 3 is `[n, c, …]` with `rank` more dimensions; kernels see `[n][d][h][w][c]`, where missing
//! leading axes have extent 1. Results have the logical shape `[n, c, …]` over that memory order.

use crate::{DType, Device, Error, Layout, Result, Shape, Tensor, WithDType};
use kiln_kernels::cuda::{Gpu, SliceMut};

/// A parameter of each spatial axis: one number for all of them, or an array of one for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PerAxis {
    values: [usize; 3],
    /// How many values were given; 0 if one number stands for every axis.
    count: usize,
}

impl From<usize> for PerAxis {
    fn from(value: usize) -> Self {
        Self { values: [value; 3], count: 0 }
    }
}

macro_rules! per_axis {
    ($($n:literal),*) => { $(
        impl From<[usize; $n]> for PerAxis {
            fn from(given: [usize; $n]) -> Self {
                let mut values = [0; 3];
                values[..$n].copy_from_slice(&given);
                Self { values, count: $n }
            }
        }
    )* };
}
per_axis!(1, 2, 3);

impl PerAxis {
    /// The values for three axes; those that an image of `rank` lacks get `missing`.
    pub(super) fn resolve(&self, op: &str, what: &str, rank: usize, missing: usize) -> Result<[usize; 3]> {
        if self.count != 0 && self.count != rank {
            let given = &self.values[..self.count];
            return Err(Error::argument(op, format!("{what} {given:?} must be one number, or one for each of {rank} axes")));
        }
        let mut all = [missing; 3];
        all[3 - rank..].copy_from_slice(&self.values[..rank]);
        if all.iter().any(|&v| v > i32::MAX as usize) {
            return Err(Error::argument(op, format!("{what} {:?} is too large", &all[3 - rank..])));
        }
        Ok(all)
    }
}

/// Evaluates `$body` with `$T` bound to f32 or f64: halves were widened by [`by_image`].
macro_rules! for_real {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err($crate::Error::unsupported_dtype($op, other, "a float dtype")),
        }
    };
}
pub(super) use for_real;

/// The extents of a batch of images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Extents {
    pub n: usize,
    pub c: usize,
    pub axes: [usize; 3],
    pub rank: usize,
}

impl Extents {
    /// Those of an `[n, c, …]` tensor with `rank` spatial dimensions.
    pub(super) fn of(op: &str, x: &Tensor, rank: usize) -> Result<Self> {
        let dims = x.dims();
        if dims.len() != rank + 2 {
            return Err(Error::shape(op, format!("expected an image of shape [n, c, {}], got {}", AXES[rank - 1], x.shape())));
        }
        let mut axes = [1; 3];
        axes[3 - rank..].copy_from_slice(&dims[2..]);
        if axes.iter().any(|&e| e > i32::MAX as usize) {
            return Err(Error::shape(op, format!("an axis of shape {} is too long", x.shape())));
        }
        Ok(Self { n: dims[0], c: dims[1], axes, rank })
    }

    /// The layout of an image of these extents whose pixels lie as `[n][d][h][w][c]`.
    pub(super) fn layout(&self) -> Result<Layout> {
        let shape = Shape::new(&[&[self.n, self.c], &self.axes[3 - self.rank..]].concat())?;
        Ok(Layout::with_memory_order(shape, &channels_last(self.rank)))
    }

    /// A new image on `device` whose pixels, `[n][d][h][w][c]`, `fill` writes.
    pub(super) fn build<T: WithDType>(&self, device: Device, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<Tensor> {
        Tensor::build_with_layout(device, self.layout()?, fill)
    }

    /// The same on a GPU, where `fill` queues the writing.
    pub(super) fn build_on_gpu(&self, gpu: &'static Gpu, dtype: DType, fill: impl FnOnce(SliceMut<'_>) -> Result<()>) -> Result<Tensor> {
        Tensor::build_on_gpu(gpu, self.layout()?, dtype, fill)
    }
}

/// How messages call the axes of an image.
const AXES: [&str; 3] = ["length", "height, width", "depth, height, width"];

/// The memory order of channels-last images.
fn channels_last(rank: usize) -> Vec<usize> {
    [0].into_iter().chain(2..rank + 2).chain([1]).collect()
}

/// The data of an `[n, c, …]` tensor as row-major `[n, …, c]`, copied only if it does not lie so already.
pub(super) fn pixels(x: &Tensor) -> Result<Tensor> {
    let order: Vec<isize> = channels_last(x.rank().saturating_sub(2)).into_iter().map(|d| d as isize).collect();
    x.detach().permute(&order)?.contiguous()
}

/// `x` with its pixels in memory as [`pixels`] wants them: what several operations read is copied for all of them at once.
pub(super) fn in_pixel_order(x: &Tensor) -> Result<Tensor> {
    x.to_memory_order(&channels_last(x.rank().saturating_sub(2)))
}

/// Calls `f` with `x` as a batch of images; one without batch dimension goes through as a batch of one.
pub(super) fn by_image(op: &str, x: &Tensor, rank: usize, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if x.rank() == rank + 1 && rank > 0 {
        return by_image(op, &x.unsqueeze(0)?, rank, f)?.squeeze(0);
    }
    match x.dtype() {
        dtype if dtype.is_float() => f(x),
        other => Err(Error::unsupported_dtype(op, other, "a float dtype")),
    }
}

/// [`by_image`] in f32 or f64 (on a GPU also in a half type, which its kernels widen themselves), with a result of `x`'s dtype.
pub(super) fn by_wide_image(op: &str, x: &Tensor, rank: usize, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    by_image(op, x, rank, |x| match x.dtype() {
        DType::F16 | DType::BF16 if x.device() == Device::Cpu => f(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype()),
        _ => f(x),
    })
}
