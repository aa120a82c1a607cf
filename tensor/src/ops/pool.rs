//! Max, average and adaptive pooling in one, two and three dimensions.

use super::spatial::{Extents, PerAxis, by_image, by_wide_image, for_real, pixels};
use super::upsample::resample;
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{DType, Error, Result, Tensor};
use kiln_kernels::cpu::pool::{MaxPool, PoolAxis, adaptive_axis};
use kiln_kernels::cpu::resample::AxisMap;
use kiln_kernels::cuda::pool as gpu_pool;
use std::sync::Arc;

/// How pooling windows slide: `PoolOptions::new(3).stride(2).padding(1)`, or just the kernel's extent (windows side by side).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolOptions {
    kernel: PerAxis,
    stride: Option<PerAxis>,
    padding: PerAxis,
    dilation: PerAxis,
    ceil_mode: bool,
    count_include_pad: bool,
}

impl<T: Into<PerAxis>> From<T> for PoolOptions {
    fn from(kernel: T) -> Self {
        Self::new(kernel)
    }
}

impl PoolOptions {
    /// Windows of `kernel` positions, side by side, without padding.
    pub fn new(kernel: impl Into<PerAxis>) -> Self {
        Self { kernel: kernel.into(), stride: None, padding: 0.into(), dilation: 1.into(), ceil_mode: false, count_include_pad: true }
    }

    /// Distance between windows; the kernel's extent by default.
    pub fn stride(mut self, stride: impl Into<PerAxis>) -> Self {
        self.stride = Some(stride.into());
        self
    }

    /// Positions added at both ends, at most half of the kernel: −∞ for a maximum, 0 for an average.
    pub fn padding(mut self, padding: impl Into<PerAxis>) -> Self {
        self.padding = padding.into();
        self
    }

    /// Distance between the positions of a window (max pooling only).
    pub fn dilation(mut self, dilation: impl Into<PerAxis>) -> Self {
        self.dilation = dilation.into();
        self
    }

    /// Whether a last window that reaches beyond the padding counts.
    pub fn ceil_mode(mut self, ceil_mode: bool) -> Self {
        self.ceil_mode = ceil_mode;
        self
    }

    /// Whether an average divides by the positions of the window including padding (the default), or by those inside of the image.
    pub fn count_include_pad(mut self, count_include_pad: bool) -> Self {
        self.count_include_pad = count_include_pad;
        self
    }

    fn windows(&self, op: &str, image: &Extents) -> Result<[AxisMap; 3]> {
        let rank = image.rank;
        let kernel = self.kernel.resolve(op, "kernel", rank, 1)?;
        let stride = self.stride.unwrap_or(self.kernel).resolve(op, "stride", rank, 1)?;
        let padding = self.padding.resolve(op, "padding", rank, 0)?;
        let dilation = self.dilation.resolve(op, "dilation", rank, 1)?;
        let mut maps = [AxisMap::unit(), AxisMap::unit(), AxisMap::unit()];
        for i in 0..3 {
            let axis =
                PoolAxis { kernel: kernel[i], stride: stride[i], padding: padding[i], dilation: dilation[i], ceil_mode: self.ceil_mode };
            if padding[i] > kernel[i] / 2 {
                return Err(Error::argument(op, format!("padding {} must be at most half of the kernel's {}", padding[i], kernel[i])));
            }
            let extent = image.axes[i];
            let outputs = axis.outputs(extent).ok_or_else(|| {
                Error::shape(
                    op,
                    format!(
                        "no window fits an axis of {extent}: kernel {}, stride {}, padding {}, dilation {}",
                        kernel[i], stride[i], padding[i], dilation[i]
                    ),
                )
            })?;
            maps[i] = axis.map(extent, outputs, self.count_include_pad);
        }
        Ok(maps)
    }
}

fn adaptive_windows(op: &str, image: &Extents, outputs: PerAxis) -> Result<[AxisMap; 3]> {
    let outputs = outputs.resolve(op, "output size", image.rank, 1)?;
    if image.axes.contains(&0) {
        return Err(Error::shape(op, "the image has an axis of no positions"));
    }
    Ok(std::array::from_fn(|i| adaptive_axis(image.axes[i], outputs[i])))
}

/// The windows of a max pooling, and where the maximum of each lies, in the order of the result's pixels. Choosing by fixed
/// indices is linear, so two operations are closed under differentiation: scattering to the indices and reading at them.
#[derive(Clone)]
struct Chosen {
    name: &'static str,
    windows: Arc<[AxisMap; 3]>,
    input: Extents,
    output: Extents,
    indices: Tensor,
}

impl Chosen {
    fn pool(&self) -> MaxPool<'_> {
        MaxPool { n: self.input.n, c: self.input.c, windows: &self.windows }
    }

    /// From an image of the result's extents to one of the input's.
    fn scatter(&self, g: &Tensor) -> Result<Tensor> {
        let _running = operation(self.name, &[g, &self.indices], || Cost::NONE);
        let (source, indices) = (pixels(g)?, pixels(&self.indices)?);
        let out = match g.gpu()? {
            Some(gpu) => self.input.build_on_gpu(gpu, g.dtype(), |mut out| {
                Ok(gpu_pool::backward(gpu, &self.pool(), source.gpu_slice()?, indices.gpu_slice()?, &mut out)?)
            }),
            None => for_real!(g.dtype(), self.name, T => self.input.build::<T>(g.device(), |out| {
                self.pool().backward(source.as_slice::<T>()?, indices.as_slice()?, out);
                Ok(())
            })),
        }?;
        record(self.name, out, &[g], |_| Scatter(self.clone()))
    }

    /// From an image of the input's extents to one of the result's.
    fn gather(&self, x: &Tensor) -> Result<Tensor> {
        let _running = operation(self.name, &[x, &self.indices], || Cost::NONE);
        let (source, indices) = (pixels(x)?, pixels(&self.indices)?);
        let out = match x.gpu()? {
            Some(gpu) => self.output.build_on_gpu(gpu, x.dtype(), |mut out| {
                Ok(gpu_pool::gather(gpu, &self.pool(), source.gpu_slice()?, indices.gpu_slice()?, &mut out)?)
            }),
            None => for_real!(x.dtype(), self.name, T => self.output.build::<T>(x.device(), |out| {
                self.pool().gather(source.as_slice::<T>()?, indices.as_slice()?, out);
                Ok(())
            })),
        }?;
        record(self.name, out, &[x], |_| Gather(self.clone()))
    }
}

/// The rule of max pooling, and of reading at its indices.
struct Gather(Chosen);

impl Op for Gather {
    fn name(&self) -> &'static str {
        self.0.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(self.0.scatter(grad)?)])
    }
}

struct Scatter(Chosen);

impl Op for Scatter {
    fn name(&self) -> &'static str {
        self.0.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(self.0.gather(grad)?)])
    }
}

/// How the windows of a pooling are found.
#[derive(Clone, Copy)]
enum Windows {
    Sliding(PoolOptions),
    Adaptive(PerAxis),
}

impl Windows {
    fn of(&self, op: &str, image: &Extents) -> Result<[AxisMap; 3]> {
        match self {
            Windows::Sliding(options) => options.windows(op, image),
            Windows::Adaptive(outputs) => adaptive_windows(op, image, *outputs),
        }
    }
}

/// The maximum of each window, and the indices of the maxima as i32.
fn max_pool(name: &'static str, x: &Tensor, rank: usize, windows: Windows) -> Result<(Tensor, Tensor)> {
    let input = Extents::of(name, x, rank)?;
    let windows = Arc::new(windows.of(name, &input)?);
    if input.axes.iter().try_fold(1usize, |n, &e| n.checked_mul(e)).is_none_or(|n| n > i32::MAX as usize) {
        return Err(Error::shape(name, format!("an image of {:?} has more positions than an i32 can index", input.axes)));
    }
    let output = Extents { axes: windows.each_ref().map(AxisMap::outputs), ..input };
    let _running = operation(name, &[x], || Cost::flops(x.numel() as u64));
    let source = pixels(x)?;
    let pool = MaxPool { n: input.n, c: input.c, windows: &windows };
    let mut values = None;
    let indices = match x.gpu()? {
        Some(gpu) => output.build_on_gpu(gpu, DType::I32, |mut indices| {
            values = Some(output.build_on_gpu(gpu, x.dtype(), |mut values| {
                Ok(gpu_pool::forward(gpu, &pool, source.gpu_slice()?, &mut values, &mut indices)?)
            })?);
            Ok(())
        }),
        None => output.build::<i32>(x.device(), |indices| {
            values = Some(for_real!(x.dtype(), name, T => output.build::<T>(x.device(), |values| {
                pool.forward(source.as_slice::<T>()?, values, indices);
                Ok(())
            }))?);
            Ok(())
        }),
    }?;
    let values = values.ok_or_else(|| Error::graph(name, "no result"))?;
    let chosen = Chosen { name, windows: windows.clone(), input, output, indices: indices.clone() };
    Ok((record(name, values, &[x], |_| Gather(chosen))?, indices))
}

impl Tensor {
    fn max_pool(&self, name: &'static str, rank: usize, windows: Windows) -> Result<Tensor> {
        by_wide_image(name, self, rank, |x| Ok(max_pool(name, x, rank, windows)?.0))
    }

    fn avg_pool(&self, name: &'static str, rank: usize, windows: Windows) -> Result<Tensor> {
        if matches!(windows, Windows::Sliding(o) if o.dilation != PerAxis::from(1)) {
            return Err(Error::argument(name, "average pooling takes no dilation"));
        }
        by_image(name, self, rank, |x| {
            let image = Extents::of(name, x, rank)?;
            let maps = windows.of(name, &image)?;
            if matches!(windows, Windows::Adaptive(outputs) if outputs == PerAxis::from(1)) {
                let axes: Vec<isize> = (1..=rank as isize).map(|d| -d).collect();
                return x.mean_over(axes.into());
            }
            resample(name, x, Arc::new(maps), rank)
        })
    }

    /// The maximum of each window of sequences `[n, c, length]`. See [`max_pool2d`](Tensor::max_pool2d).
    pub fn max_pool1d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.max_pool("max_pool1d", 1, Windows::Sliding(options.into()))
    }

    /// The maximum of each window of images `[n, c, h, w]` (or `[c, h, w]`). NaN is above everything; the gradient goes to the first maximum
    /// of a window. Each axis of the result has `⌊(extent + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1` positions.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::arange(0., 16., 1., DType::F32)?.reshape([1, 1, 4, 4])?;
    /// assert_eq!(x.max_pool2d(2)?.to_vec::<f32>()?, [5., 7., 13., 15.]);
    /// # Ok(()) }
    /// ```
    pub fn max_pool2d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.max_pool("max_pool2d", 2, Windows::Sliding(options.into()))
    }

    /// The maximum of each window of volumes `[n, c, d, h, w]`. See [`max_pool2d`](Tensor::max_pool2d).
    pub fn max_pool3d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.max_pool("max_pool3d", 3, Windows::Sliding(options.into()))
    }

    /// [`max_pool2d`](Tensor::max_pool2d) of `[n, c, h, w]`, and where each maximum lies: i64 indices into the `h · w` positions of its channel.
    pub fn max_pool2d_with_indices(&self, options: impl Into<PoolOptions>) -> Result<(Tensor, Tensor)> {
        self.max_pool_with_indices("max_pool2d_with_indices", Windows::Sliding(options.into()))
    }

    fn max_pool_with_indices(&self, name: &'static str, options: Windows) -> Result<(Tensor, Tensor)> {
        let mut indices = None;
        let values = by_wide_image(name, self, 2, |x| {
            let (values, at) = max_pool(name, x, 2, options)?;
            indices = Some(at);
            Ok(values)
        })?;
        let indices = indices.ok_or_else(|| Error::graph(name, "no result"))?;
        Ok((values.clone(), indices.reshape(values.shape())?.to_dtype(DType::I64)?))
    }

    /// The average of each window of sequences `[n, c, length]`. See [`avg_pool2d`](Tensor::avg_pool2d).
    pub fn avg_pool1d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.avg_pool("avg_pool1d", 1, Windows::Sliding(options.into()))
    }

    /// The average of each window of images `[n, c, h, w]` (or `[c, h, w]`); the divisor counts padding unless `count_include_pad(false)`.
    pub fn avg_pool2d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.avg_pool("avg_pool2d", 2, Windows::Sliding(options.into()))
    }

    /// The average of each window of volumes `[n, c, d, h, w]`. See [`avg_pool2d`](Tensor::avg_pool2d).
    pub fn avg_pool3d(&self, options: impl Into<PoolOptions>) -> Result<Tensor> {
        self.avg_pool("avg_pool3d", 3, Windows::Sliding(options.into()))
    }

    /// The average of `outputs` windows that cover sequences `[n, c, length]` evenly. See [`adaptive_avg_pool2d`](Tensor::adaptive_avg_pool2d).
    pub fn adaptive_avg_pool1d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.avg_pool("adaptive_avg_pool1d", 1, Windows::Adaptive(outputs.into()))
    }

    /// The averages of a grid of `outputs` windows that cover images `[n, c, h, w]` evenly: window `o` of an axis spans
    /// `⌊o·extent/outputs⌋ .. ⌈(o+1)·extent/outputs⌉`.
    pub fn adaptive_avg_pool2d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.avg_pool("adaptive_avg_pool2d", 2, Windows::Adaptive(outputs.into()))
    }

    /// The averages of a grid of windows that cover volumes evenly. See [`adaptive_avg_pool2d`](Tensor::adaptive_avg_pool2d).
    pub fn adaptive_avg_pool3d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.avg_pool("adaptive_avg_pool3d", 3, Windows::Adaptive(outputs.into()))
    }

    /// The maxima of the windows of [`adaptive_avg_pool1d`](Tensor::adaptive_avg_pool1d).
    pub fn adaptive_max_pool1d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.max_pool("adaptive_max_pool1d", 1, Windows::Adaptive(outputs.into()))
    }

    /// The maxima of the windows of [`adaptive_avg_pool2d`](Tensor::adaptive_avg_pool2d).
    pub fn adaptive_max_pool2d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.max_pool("adaptive_max_pool2d", 2, Windows::Adaptive(outputs.into()))
    }

    /// The maxima of the windows of [`adaptive_avg_pool3d`](Tensor::adaptive_avg_pool3d).
    pub fn adaptive_max_pool3d(&self, outputs: impl Into<PerAxis>) -> Result<Tensor> {
        self.max_pool("adaptive_max_pool3d", 3, Windows::Adaptive(outputs.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    #[test]
    fn pooling_keeps_its_dtype_under_autocast() {
        let x = Tensor::ones([1, 2, 4, 4], DType::BF16).unwrap();
        for outputs in [1, 2] {
            let y = crate::autocast(DType::BF16, || x.adaptive_avg_pool2d(outputs)).unwrap().unwrap();
            assert_eq!(y.dtype(), DType::BF16, "{outputs}");
        }
    }
}
