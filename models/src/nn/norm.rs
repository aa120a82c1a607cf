//! Normalisation: over the batch, over features, over groups of channels.

use super::{Buffer, Init, Mode, Module, Param, Params};
use kiln_tensor::graph::is_recomputing;
use kiln_tensor::{Activation, DType, Error, IntoShape, Result, Shape, Tensor};

/// PyTorch's ε of all its normalisations but RMS norm.
const EPS: f64 = 1e-5;

/// A scale that starts as ones and a shift that starts as zeros, of one shape.
#[derive(Clone, Debug, Default)]
struct Affine {
    weight: Option<Param>,
    bias: Option<Param>,
}

impl Affine {
    fn new(params: &Params, shape: Shape, weight: bool, bias: bool) -> Result<Self> {
        let weight = weight.then(|| params.param("weight", shape, Init::Ones)).transpose()?;
        Ok(Self { weight, bias: bias.then(|| params.param("bias", shape, Init::Zeros)).transpose()? })
    }

    fn get(&self) -> (Option<Tensor>, Option<Tensor>) {
        (self.weight.as_ref().map(Param::get), self.bias.as_ref().map(Param::get))
    }
}

/// How a [`BatchNorm`] normalises.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BatchNormOptions {
    /// Added to the variance.
    pub eps: f64,
    /// Share of each new batch in the running statistics; `None` for the plain average of all batches.
    pub momentum: Option<f64>,
    /// Whether there are a scale and a shift.
    pub affine: bool,
    /// Whether running statistics are kept. Without them the batch's own are used in evaluation too.
    pub track_running_stats: bool,
}

impl Default for BatchNormOptions {
    /// ε = 1e-5, momentum 0.1, affine, with running statistics.
    fn default() -> Self {
        Self { eps: EPS, momentum: Some(0.1), affine: true, track_running_stats: true }
    }
}

#[derive(Clone, Debug)]
struct RunningStats {
    mean: Buffer,
    var: Buffer,
    batches: Buffer,
}

impl RunningStats {
    fn new(params: &Params, channels: usize) -> Result<Self> {
        Ok(Self {
            mean: params.buffer("running_mean", [channels], Init::Zeros)?,
            var: params.buffer("running_var", [channels], Init::Ones)?,
            batches: params.buffer_from("num_batches_tracked", &Tensor::zeros((), DType::I64)?)?,
        })
    }

    /// Moves the statistics towards the `mean` and the unbiased `variance` of a batch.
    fn update(&self, mean: &Tensor, variance: &Tensor, momentum: Option<f64>) -> Result<()> {
        self.batches.update(|n| n.add_scalar(1.0))?;
        let share = match momentum {
            Some(share) => share,
            None => 1.0 / self.batches.get().item_f64()?,
        };
        for (buffer, batch) in [(&self.mean, mean), (&self.var, variance)] {
            buffer.update(|old| old.mul_scalar(1.0 - share)?.add(&batch.to_dtype(old.dtype())?.mul_scalar(share)?))?;
        }
        Ok(())
    }
}

/// y = (x − mean) / √(variance + ε) · weight + bias, for each channel of (B, C, …) with `N` spatial dimensions (Ioffe and Szegedy 2015).
///
/// In training, mean and biased variance are the batch's, and the running statistics move towards them:
/// running = (1 − momentum) · running + momentum · batch, with the unbiased variance. In evaluation the running statistics are used.
///
/// Parameters: `weight` (C), ones at first, and `bias` (C), zeros at first. Buffers: `running_mean`, `running_var` (C) and
/// `num_batches_tracked`.
///
/// ```
/// # use kiln_models::nn::{BatchNorm2d, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let params = Params::new();
/// let layer = BatchNorm2d::new(&params, 3)?;
/// let x = Tensor::full([4, 3, 2, 2], 5.0, ())?;
/// assert_eq!(layer.forward(&x)?.to_vec::<f32>()?, [0f32; 48]);
/// params.eval();
/// assert!(layer.forward(&x)?.to_vec::<f32>()?[0] > 4.0); // running_mean is 0.5, running_var 0.9
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct BatchNorm<const N: usize> {
    channels: usize,
    options: BatchNormOptions,
    affine: Affine,
    running: Option<RunningStats>,
    mode: Mode,
}

/// Batch norm of (B, C) or (B, C, L): see [`BatchNorm`].
pub type BatchNorm1d = BatchNorm<1>;
/// Batch norm of images (B, C, H, W): see [`BatchNorm`].
pub type BatchNorm2d = BatchNorm<2>;
/// Batch norm of volumes (B, C, D, H, W): see [`BatchNorm`].
pub type BatchNorm3d = BatchNorm<3>;

impl<const N: usize> BatchNorm<N> {
    /// A layer for `channels` channels with PyTorch's defaults.
    pub fn new(params: &Params, channels: usize) -> Result<Self> {
        Self::with_options(params, channels, BatchNormOptions::default())
    }

    /// A layer with other settings.
    pub fn with_options(params: &Params, channels: usize, options: BatchNormOptions) -> Result<Self> {
        let affine = Affine::new(params, [channels].into_shape()?, options.affine, options.affine)?;
        let running = options.track_running_stats.then(|| RunningStats::new(params, channels)).transpose()?;
        Ok(Self { channels, options, affine, running, mode: params.mode() })
    }

    fn expect_channels(&self, x: &Tensor) -> Result<()> {
        let rank = x.rank();
        // As in PyTorch, sequences of length one may come without their last dimension.
        if (rank == N + 2 || (N == 1 && rank == 2)) && x.dims()[1] == self.channels {
            return Ok(());
        }
        let message = format!("expected (B, {}, …) with {N} spatial dimensions, got shape {}", self.channels, x.shape());
        Err(Error::shape("batch_norm", message))
    }
}

impl<const N: usize> BatchNorm<N> {
    fn run(&self, x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
        self.expect_channels(x)?;
        let (weight, bias) = self.affine.get();
        let (weight, bias, eps) = (weight.as_ref(), bias.as_ref(), self.options.eps);
        let with_own_statistics = || match activation {
            Some(activation) => x.batch_norm_activation(weight, bias, eps, activation),
            None => x.batch_norm(weight, bias, eps),
        };
        match &self.running {
            Some(running) if !self.mode.is_training() => {
                let (mean, var) = (running.mean.get(), running.var.get());
                match activation {
                    Some(activation) => x.batch_norm_eval_activation([&mean, &var], weight, bias, eps, activation),
                    None => x.batch_norm_eval(&mean, &var, weight, bias, eps),
                }
            }
            Some(running) => {
                let batch = with_own_statistics()?;
                if !is_recomputing() {
                    running.update(&batch.mean, &batch.var, self.options.momentum)?;
                }
                Ok(batch.output)
            }
            None => Ok(with_own_statistics()?.output),
        }
    }
}

impl<const N: usize> Module for BatchNorm<N> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.run(x, Some(activation))
    }
}

/// y = (x − mean) / √(variance + ε) · weight + bias over the last dimensions of each sample (Ba et al. 2016): (…, shape) → (…, shape).
///
/// Parameters: `weight` and `bias` of the normalised shape, ones and zeros at first.
///
/// ```
/// # use kiln_models::nn::{LayerNorm, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let y = LayerNorm::new(&Params::new(), 2)?.forward(&Tensor::from_vec(vec![1f32, 3.], [1, 2])?)?;
/// assert!((y.to_vec::<f32>()?[1] - 1.0).abs() < 1e-4);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct LayerNorm {
    shape: Shape,
    eps: f64,
    affine: Affine,
}

impl LayerNorm {
    /// A layer over last dimensions of `shape` with ε = 1e-5, scale and shift.
    pub fn new(params: &Params, shape: impl IntoShape) -> Result<Self> {
        Self::with_options(params, shape, EPS, true, true)
    }

    /// A layer with another ε, with or without scale and shift.
    pub fn with_options(params: &Params, shape: impl IntoShape, eps: f64, weight: bool, bias: bool) -> Result<Self> {
        let shape = shape.into_shape()?;
        Ok(Self { shape, eps, affine: Affine::new(params, shape, weight, bias)? })
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.affine.get();
        x.layer_norm(self.shape, weight.as_ref(), bias.as_ref(), self.eps)
    }
}

/// y = x / √(mean of x² + ε) · weight over the last dimensions (Zhang and Sennrich 2019): (…, shape) → (…, shape).
///
/// Parameter: `weight` of the normalised shape, ones at first.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    shape: Shape,
    eps: f64,
    weight: Param,
}

impl RmsNorm {
    /// A layer over last dimensions of `shape`. Llama's ε is 1e-5 or 1e-6.
    pub fn new(params: &Params, shape: impl IntoShape, eps: f64) -> Result<Self> {
        let shape = shape.into_shape()?;
        Ok(Self { shape, eps, weight: params.param("weight", shape, Init::Ones)? })
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.rms_norm(self.shape, Some(&self.weight.get()), self.eps)
    }
}

/// y = (x − mean) / √(variance + ε) · weight + bias over groups of neighbouring channels of each sample (Wu and He 2018): (B, C, …) →
/// (B, C, …).
///
/// Parameters: `weight` and `bias` (C), ones and zeros at first.
#[derive(Clone, Debug)]
pub struct GroupNorm {
    groups: usize,
    eps: f64,
    affine: Affine,
}

impl GroupNorm {
    /// A layer of `groups` groups of `channels` channels with ε = 1e-5, scale and shift.
    pub fn new(params: &Params, groups: usize, channels: usize) -> Result<Self> {
        Self::with_options(params, groups, channels, EPS, true)
    }

    /// A layer with another ε, with or without scale and shift.
    pub fn with_options(params: &Params, groups: usize, channels: usize, eps: f64, affine: bool) -> Result<Self> {
        if groups == 0 || !channels.is_multiple_of(groups) {
            return Err(Error::argument("group_norm", format!("{groups} groups do not divide {channels} channels")));
        }
        Ok(Self { groups, eps, affine: Affine::new(params, [channels].into_shape()?, affine, affine)? })
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.affine.get();
        x.group_norm(self.groups, weight.as_ref(), bias.as_ref(), self.eps)
    }

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        let (weight, bias) = self.affine.get();
        x.group_norm_activation(self.groups, weight.as_ref(), bias.as_ref(), self.eps, activation)
    }
}

/// y = (x − mean) / √(variance + ε) · weight + bias over each channel of each sample (Ulyanov et al. 2016): (B, C, …) → (B, C, …).
///
/// Parameters, if affine: `weight` and `bias` (C), ones and zeros at first.
#[derive(Clone, Debug)]
pub struct InstanceNorm {
    eps: f64,
    affine: Affine,
}

impl InstanceNorm {
    /// A layer for `channels` channels with ε = 1e-5, with or without scale and shift (PyTorch's default is without).
    pub fn new(params: &Params, channels: usize, affine: bool) -> Result<Self> {
        Ok(Self { eps: EPS, affine: Affine::new(params, [channels].into_shape()?, affine, affine)? })
    }
}

impl Module for InstanceNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = self.affine.get();
        x.instance_norm(weight.as_ref(), bias.as_ref(), self.eps)
    }
}
