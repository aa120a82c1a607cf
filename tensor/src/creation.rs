//! Tensors from values: constants, ranges, vectors.

use crate::device::default_device;
use crate::graph::refuse_tracked;
use crate::profile::{Cost, operation};
use crate::{DType, Device, Error, IntoShape, Layout, Result, Scalar, Shape, Tensor, WithDType};
use kiln_kernels::cuda;
use kiln_kernels::element::Element;

/// Dtype and device of a new tensor: `DType::F64`, `(DType::F16, device)`, a device (then f32), or `()` for f32; without a device, the
/// [default](crate::set_default_device) one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TensorOptions {
    /// The dtype.
    pub dtype: DType,
    /// The device.
    pub device: Device,
}

impl Default for TensorOptions {
    fn default() -> Self {
        Self { dtype: DType::F32, device: default_device() }
    }
}

impl From<()> for TensorOptions {
    fn from((): ()) -> Self {
        Self::default()
    }
}
impl From<DType> for TensorOptions {
    fn from(dtype: DType) -> Self {
        Self { dtype, ..Self::default() }
    }
}
impl From<Device> for TensorOptions {
    fn from(device: Device) -> Self {
        Self { device, ..Self::default() }
    }
}
impl From<(DType, Device)> for TensorOptions {
    fn from((dtype, device): (DType, Device)) -> Self {
        Self { dtype, device }
    }
}
impl From<&Tensor> for TensorOptions {
    /// Those of another tensor.
    fn from(like: &Tensor) -> Self {
        Self { dtype: like.dtype(), device: like.device() }
    }
}

impl Tensor {
    /// A tensor of `shape` with every element `value` (rounded to the dtype).
    pub fn full(shape: impl IntoShape, value: f64, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::filled(shape.into_shape()?, value, options.into())
    }

    fn filled(shape: Shape, value: f64, options: TensorOptions) -> Result<Tensor> {
        Self::filled_as(Layout::contiguous(shape), value, options)
    }

    fn filled_as(layout: Layout, value: f64, TensorOptions { dtype, device }: TensorOptions) -> Result<Tensor> {
        let _running = operation("full", &[], || Cost::NONE);
        match device.gpu()? {
            Some(gpu) => {
                let out = Tensor::build_on_gpu(gpu, layout, dtype, |mut out| Ok(cuda::fill::fill(gpu, &mut out, value)?))?;
                Ok(if dtype == DType::I64 { out.within(value as i64, value as i64) } else { out })
            }
            None => for_any!(dtype, T => Tensor::build_with_layout::<T>(device, layout, |out| {
                out.fill(<T as Element>::from_f64(value));
                Ok(())
            })),
        }
    }

    /// Zeros of `shape`.
    pub fn zeros(shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::full(shape, 0.0, options)
    }

    /// Ones of `shape`.
    pub fn ones(shape: impl IntoShape, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::full(shape, 1.0, options)
    }

    /// Zeros of this tensor's shape, dtype and device, untracked.
    pub fn zeros_like(&self) -> Result<Tensor> {
        self.full_like(0.0)
    }

    /// Ones of this tensor's shape, dtype and device, untracked.
    pub fn ones_like(&self) -> Result<Tensor> {
        self.full_like(1.0)
    }

    /// `value` in this tensor's shape, memory order, dtype and device, untracked.
    pub fn full_like(&self, value: f64) -> Result<Tensor> {
        Self::filled_as(self.layout().dense_like(), value, self.into())
    }

    /// A scalar tensor (no dimensions).
    pub fn scalar(value: f64, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::full((), value, options)
    }

    /// The values of `data` in row-major order.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::from_vec(vec![1f32, 2., 3., 4., 5., 6.], [2, 3])?;
    /// assert_eq!(x.dims(), [2, 3]);
    /// # Ok(()) }
    /// ```
    pub fn from_vec<S: Scalar>(data: Vec<S>, shape: impl IntoShape) -> Result<Tensor> {
        Self::from_slice(&data, shape)
    }

    /// The values of `data` in row-major order.
    pub fn from_slice<S: Scalar>(data: &[S], shape: impl IntoShape) -> Result<Tensor> {
        let shape = shape.into_shape()?;
        if data.len() != shape.numel() {
            return Err(Error::shape("from_vec", format!("{} values do not fill shape {shape} of {} elements", data.len(), shape.numel())));
        }
        let _running = operation("from_slice", &[], || Cost::NONE);
        Tensor::build::<S::Stored>(default_device(), &shape, |out| {
            for (o, &x) in out.iter_mut().zip(data) {
                *o = x.to_stored();
            }
            Ok(())
        })
    }

    /// `values` (in row-major order) in this tensor's shape, with the strides of this tensor: a repeated element takes the
    /// last value that falls on it. For checks that need odd memory layouts.
    pub fn with_values<S: Scalar>(&self, values: &[S]) -> Result<Tensor> {
        let stored: Vec<S::Stored> = values.iter().map(|v| v.to_stored()).collect();
        self.with_stored_values(&stored)
    }

    fn with_stored_values<T: WithDType>(&self, values: &[T]) -> Result<Tensor> {
        if values.len() != self.numel() {
            return Err(Error::shape("with_values", format!("{} values for shape {}", values.len(), self.shape())));
        }
        let last: usize = self.dims().iter().zip(self.layout().strides()).map(|(&d, &s)| d.saturating_sub(1) * s).sum();
        let extent = self.layout().offset() + last + 1;
        let _running = operation("with_values", &[], || Cost::NONE);
        let base = Tensor::build::<T>(self.device(), &Shape::new(&[extent])?, |out| {
            out.fill(T::default());
            let mut index = vec![0; self.rank()];
            for &value in values {
                let at: usize = index.iter().zip(self.layout().strides()).map(|(i, s)| i * s).sum();
                out[self.layout().offset() + at] = value;
                for d in (0..index.len()).rev() {
                    index[d] += 1;
                    if index[d] < self.dims()[d] {
                        break;
                    }
                    index[d] = 0;
                }
            }
            Ok(())
        })?;
        Ok(base.with_layout(*self.layout()))
    }

    /// The same values as every second element of a larger block, at an offset: for checks that need odd memory layouts.
    pub fn with_gaps(&self) -> Result<Tensor> {
        let twice: Vec<usize> = self.dims().iter().map(|&d| 2 * d + 1).collect();
        let mut layout = Layout::contiguous(Shape::new(&twice)?);
        for (d, &n) in self.dims().iter().enumerate() {
            layout = layout.slice(d, 1, n, 2);
        }
        refuse_tracked("with_gaps", &[self])?;
        let _running = operation("with_gaps", &[self], || Cost::NONE);
        for_any!(self.dtype(), T => {
            let values = self.stored_values::<T>()?;
            let base = Tensor::build::<T>(self.device(), &Shape::new(&twice)?, |out| {
                out.fill(T::default());
                Ok(())
            })?;
            base.with_layout(layout).with_stored_values(&values)
        })
    }

    /// `start, start + step, …` while before `end`.
    pub fn arange(start: f64, end: f64, step: f64, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::range(start, end, step, options.into())
    }

    fn range(start: f64, end: f64, step: f64, options: TensorOptions) -> Result<Tensor> {
        let count = ((end - start) / step).ceil();
        if step == 0.0 || !count.is_finite() || count >= isize::MAX as f64 {
            return Err(Error::argument("arange", format!("cannot step from {start} to {end} by {step}")));
        }
        let _running = operation("arange", &[], || Cost::NONE);
        let shape = Shape::new(&[count.max(0.0) as usize])?;
        if let Some(gpu) = options.device.gpu()? {
            let out = Tensor::build_on_gpu(gpu, Layout::contiguous(shape), options.dtype, |mut out| {
                Ok(cuda::fill::arange(gpu, &mut out, start, step)?)
            })?;
            let (first, last) = (start as i64, (start + (count - 1.0) * step) as i64);
            return Ok(if options.dtype == DType::I64 { out.within(first.min(last), first.max(last)) } else { out });
        }
        for_any!(options.dtype, T => Tensor::build::<T>(Device::Cpu, &shape, |out| {
            for (i, o) in out.iter_mut().enumerate() {
                *o = <T as Element>::from_f64(start + i as f64 * step);
            }
            Ok(())
        }))
    }

    /// `count` values from `start` to `end`, both included, evenly spaced.
    pub fn linspace(start: f64, end: f64, count: usize, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::spaced(start, end, count, options.into())
    }

    fn spaced(start: f64, end: f64, count: usize, options: TensorOptions) -> Result<Tensor> {
        let _running = operation("linspace", &[], || Cost::NONE);
        if let Some(gpu) = options.device.gpu()? {
            return Tensor::build_on_gpu(gpu, Layout::contiguous(Shape::new(&[count])?), options.dtype, |mut out| {
                Ok(cuda::fill::linspace(gpu, &mut out, start, end)?)
            });
        }
        let step = if count > 1 { (end - start) / (count - 1) as f64 } else { 0.0 };
        for_any!(options.dtype, T => Tensor::build::<T>(Device::Cpu, &Shape::new(&[count])?, |out| {
            for (i, o) in out.iter_mut().enumerate() {
                // From the nearer end, so that both ends are exact.
                let x = if i < count / 2 { start + i as f64 * step } else { end - (count - 1 - i) as f64 * step };
                *o = <T as Element>::from_f64(if count == 1 { start } else { x });
            }
            Ok(())
        }))
    }

    /// The identity matrix of `n` rows.
    pub fn eye(n: usize, options: impl Into<TensorOptions>) -> Result<Tensor> {
        Self::eye_of(n, options.into())
    }

    fn eye_of(n: usize, options: TensorOptions) -> Result<Tensor> {
        let _running = operation("eye", &[], || Cost::NONE);
        let shape = Shape::new(&[n, n])?;
        if let Some(gpu) = options.device.gpu()? {
            return Tensor::build_on_gpu(gpu, Layout::contiguous(shape), options.dtype, |mut out| Ok(cuda::fill::eye(gpu, &mut out, n)?));
        }
        for_any!(options.dtype, T => Tensor::build::<T>(Device::Cpu, &shape, |out| {
            out.fill(T::default());
            out.iter_mut().step_by(n + 1).for_each(|o| *o = <T as Element>::from_f64(1.0));
            Ok(())
        }))
    }
}
