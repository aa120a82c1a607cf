//! What every scheduler's step does: keep the order of indices, combine tensors in f32 or better, turn a prediction into x₀ or ε, and clip.

use super::config::Settings;
use super::names::PredictionType;
use kiln_tensor::{DType, Error, Generator, Result, Tensor};

/// The timesteps of a run, and the index whose turn it is.
#[derive(Default)]
pub(super) struct Run {
    pub timesteps: Vec<f64>,
    next: Option<usize>,
}

impl Run {
    pub fn new(timesteps: Vec<f64>) -> Self {
        Self { timesteps, next: None }
    }

    /// The `index`th timestep.
    pub fn timestep(&self, op: &str, index: usize) -> Result<f64> {
        self.timesteps.get(index).copied().ok_or_else(|| match self.timesteps.len() {
            0 => Error::index(op, "there are no timesteps yet; call set_timesteps first"),
            count => Error::index(op, format!("index {index} of a run of {count} timesteps")),
        })
    }

    /// The `index`th timestep, if it is its turn.
    pub fn turn(&self, index: usize) -> Result<f64> {
        let timestep = self.timestep("step", index)?;
        match self.next {
            Some(next) if next != index => {
                Err(Error::index("step", format!("index {index}, but it is the turn of {next}; set_timesteps starts over")))
            }
            _ => Ok(timestep),
        }
    }

    /// The step at `index` is done.
    pub fn advance(&mut self, index: usize) {
        self.next = Some(index + 1);
    }

    /// The index of a timestep; of two equal ones the second, where a higher-order step has come back to it.
    pub fn position(&self, timestep: f64) -> Option<usize> {
        let mut places = self.timesteps.iter().enumerate().filter(|(_, t)| **t == timestep).map(|(i, _)| i);
        let first = places.next();
        places.next().or(first)
    }
}

/// The whole number that a timestep of training is.
pub(super) fn whole_timestep(op: &str, timestep: f64, train: usize) -> Result<usize> {
    if timestep >= 0.0 && timestep < train as f64 && timestep.fract() == 0.0 {
        return Ok(timestep as usize);
    }
    Err(Error::index(op, format!("timestep {timestep}, expected a whole number from 0 to {}", train.saturating_sub(1))))
}

/// In the dtype that sums are made in: f32, or f64 if it is that already.
pub(crate) fn raised(op: &str, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => Ok(x.clone()),
        dtype if dtype.is_float() => x.to_dtype(DType::F32),
        dtype => Err(Error::unsupported_dtype(op, dtype, "a float")),
    }
}

pub(crate) fn same_shape(op: &str, (a_name, a): (&str, &Tensor), (b_name, b): (&str, &Tensor)) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    Err(Error::shape(op, format!("{a_name} {} and {b_name} {} must have one shape", a.shape(), b.shape())))
}

/// The model's output and the sample of a step, checked and raised.
pub(super) fn inputs(model_output: &Tensor, sample: &Tensor) -> Result<(Tensor, Tensor)> {
    same_shape("step", ("model output", model_output), ("sample", sample))?;
    Ok((raised("step", model_output)?.to_dtype(work(sample))?, raised("step", sample)?))
}

fn work(sample: &Tensor) -> DType {
    if sample.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Σ cᵢ xᵢ.
pub(super) fn combine<const N: usize>(terms: [(f64, &Tensor); N]) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for (factor, x) in terms {
        let term = x.mul_scalar(factor)?;
        sum = Some(match sum {
            Some(sum) => sum.add(&term)?,
            None => term,
        });
    }
    sum.ok_or_else(|| Error::argument("combine", "there is nothing to combine"))
}

/// Noise of the sample's shape, dtype and device, raised.
pub(super) fn noise_like(sample: &Tensor, generator: &Generator) -> Result<Tensor> {
    raised("step", &generator.randn(sample.shape(), sample)?)
}

/// a x + b n in the dtype of `x`.
pub(super) fn mix(op: &str, x: &Tensor, a: f64, noise: &Tensor, b: f64) -> Result<Tensor> {
    same_shape(op, ("sample", x), ("noise", noise))?;
    let wide = raised(op, x)?;
    combine([(a, &wide), (b, &raised(op, noise)?.to_dtype(wide.dtype())?)])?.to_dtype(x.dtype())
}

/// An error unless the scheduler knows the prediction type.
pub(super) fn expect_prediction(scheduler: &str, given: PredictionType, known: &[PredictionType]) -> Result<()> {
    if known.contains(&given) {
        return Ok(());
    }
    let names = known.iter().map(|one| one.name()).collect::<Vec<_>>().join(", ");
    Err(Error::argument(scheduler, format!("prediction_type {given} is not possible here; expected one of {names}")))
}

/// x = α x₀ + σ ε at one timestep: what the network's output says of x₀ and of ε.
pub(super) struct Mixture {
    pub alpha: f64,
    pub sigma: f64,
}

impl Mixture {
    /// Of ᾱ: α = √ᾱ, σ = √(1 − ᾱ).
    pub fn of_alpha_bar(alpha_bar: f64) -> Self {
        Self { alpha: alpha_bar.sqrt(), sigma: (1.0 - alpha_bar).sqrt() }
    }

    /// x₀.
    pub fn original(&self, prediction: PredictionType, output: &Tensor, x: &Tensor) -> Result<Tensor> {
        let (alpha, sigma) = (self.alpha, self.sigma);
        match prediction {
            PredictionType::Epsilon if alpha == 0.0 => Err(Error::argument(
                "step",
                "with zero terminal SNR a network that predicts epsilon says nothing of the sample; use v_prediction or sample",
            )),
            PredictionType::Epsilon => combine([(1.0 / alpha, x), (-sigma / alpha, output)]),
            PredictionType::Sample => Ok(output.clone()),
            PredictionType::VPrediction => combine([(alpha, x), (-sigma, output)]),
            PredictionType::FlowPrediction => combine([(1.0, x), (-sigma, output)]),
        }
    }

    /// ε.
    pub fn noise(&self, prediction: PredictionType, output: &Tensor, x: &Tensor) -> Result<Tensor> {
        let (alpha, sigma) = (self.alpha, self.sigma);
        match prediction {
            PredictionType::Epsilon => Ok(output.clone()),
            PredictionType::Sample if sigma == 0.0 => {
                Err(Error::argument("step", "where there is no noise, a prediction of the sample says nothing of it"))
            }
            PredictionType::Sample => combine([(1.0 / sigma, x), (-alpha / sigma, output)]),
            PredictionType::VPrediction => combine([(alpha, output), (sigma, x)]),
            PredictionType::FlowPrediction => combine([(1.0, x), (1.0 - sigma, output)]),
        }
    }
}

/// x₀ thresholded or clipped, as the settings say.
pub(super) fn limited(settings: &Settings, original: Tensor) -> Result<Tensor> {
    if settings.thresholding {
        return threshold(settings, &original);
    }
    if settings.clip_sample {
        let range = settings.clip_sample_range;
        return original.clamp(-range, range);
    }
    Ok(original)
}

/// Dynamic thresholding: x₀ clipped to ± s and divided by s, where s is a quantile of |x₀| of each picture, but from 1 to
/// `sample_max_value` (Saharia et al., *Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding*, 2022).
pub(super) fn threshold(settings: &Settings, original: &Tensor) -> Result<Tensor> {
    let flat = original.flatten(1, -1)?; // (B, N)
    let ratio = settings.dynamic_thresholding_ratio;
    let count = flat.dim(1)?;
    if !(0.0..=1.0).contains(&ratio) || count == 0 {
        return Err(Error::argument("thresholding", format!("quantile {ratio} of {count} values, expected 0 to 1 of at least one")));
    }
    let rank = ratio as f32 * (count - 1) as f32;
    let (low, high) = ((rank.floor() as usize).min(count - 1), (rank.ceil() as usize).min(count - 1));
    let (sorted, _) = flat.abs()?.sort(1, false)?;
    let (a, b) = (sorted.narrow(1, low, 1)?, sorted.narrow(1, high, 1)?);
    let weight = rank.fract() as f64;
    // PyTorch's clamp: where the limits cross, the upper one holds.
    let range = combine([(1.0 - weight, &a), (weight, &b)])?.clamp(1.0, None)?.clamp(None, settings.sample_max_value)?; // (B, 1)
    flat.minimum(&range)?.maximum(&range.neg()?)?.div(&range)?.reshape(original.shape())
}
