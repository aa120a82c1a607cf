//! The training side of diffusion: noise at a timestep per sample, what the network is to predict, and how much each timestep counts.

use super::schedulers::sampling::{raised, same_shape};
use super::schedulers::schedules::alphas_cumprod;
use super::schedulers::{PredictionType, SchedulerConfig};
use kiln_tensor::{DType, Error, Generator, Result, Tensor};

/// ᾱ of every timestep of training: x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε.
///
/// Timesteps are an i64 tensor (B), one for each sample.
pub struct NoiseSchedule {
    prediction: PredictionType,
    alphas_cumprod: Vec<f64>,
    /// √ᾱ, √(1 − ᾱ) and ᾱ / (1 − ᾱ), each (T).
    signal: Tensor,
    noise: Tensor,
    snr: Tensor,
}

impl NoiseSchedule {
    /// That of a scheduler's configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let alphas_cumprod = alphas_cumprod(&settings, settings.rescale_betas_zero_snr)?;
        let table = |f: fn(f64) -> f64| {
            let values = alphas_cumprod.iter().map(|&alpha| f(alpha) as f32).collect::<Vec<_>>();
            Tensor::from_vec(values, alphas_cumprod.len())
        };
        let (signal, noise) = (table(f64::sqrt)?, table(|alpha| (1.0 - alpha).sqrt())?);
        let snr = table(|alpha| alpha / (1.0 - alpha))?;
        Ok(Self { prediction: settings.prediction_type, alphas_cumprod, signal, noise, snr })
    }

    /// What the network is to predict, as the configuration says.
    pub fn prediction_type(&self) -> PredictionType {
        self.prediction
    }

    /// Timesteps of training, T.
    pub fn num_train_timesteps(&self) -> usize {
        self.alphas_cumprod.len()
    }

    /// ᾱ of every timestep.
    pub fn alphas_cumprod(&self) -> &[f64] {
        &self.alphas_cumprod
    }

    /// Timesteps for a batch, every one as likely: i64 (B).
    ///
    /// # Errors
    /// If memory runs out.
    pub fn sample_timesteps(&self, batch: usize, generator: &Generator) -> Result<Tensor> {
        generator.randint(0, self.alphas_cumprod.len() as i64, batch)
    }

    /// The table's values at the timesteps, shaped (B, 1, …) to go with `like`, in its wide dtype.
    fn at(&self, op: &str, table: &Tensor, timesteps: &Tensor, like: &Tensor) -> Result<Tensor> {
        if timesteps.rank() != 1 || like.rank() == 0 || timesteps.dim(0)? != like.dim(0)? {
            return Err(Error::shape(op, format!("timesteps {} for samples {}, expected (B) and (B, …)", timesteps.shape(), like.shape())));
        }
        let mut shape = vec![1; like.rank()];
        shape[0] = timesteps.dim(0)?;
        let values =
            table.to_device(timesteps.device())?.index_select(0, timesteps).map_err(|e| Error::index(op, format!("timesteps: {e}")))?;
        values.to_device(like.device())?.to_dtype(wide(like))?.reshape(&shape[..])
    }

    /// a(t) x + b(t) y in the dtype of `x`.
    fn mixed(&self, op: &str, (a, x): (&Tensor, &Tensor), (b, y): (&Tensor, &Tensor), timesteps: &Tensor) -> Result<Tensor> {
        same_shape(op, ("sample", x), ("noise", y))?;
        let (a, b) = (self.at(op, a, timesteps, x)?, self.at(op, b, timesteps, x)?);
        let (wide_x, wide_y) = (raised(op, x)?, raised(op, y)?.to_dtype(wide(x))?);
        wide_x.mul(&a)?.add(&wide_y.mul(&b)?)?.to_dtype(x.dtype())
    }

    /// x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε, for `original` and `noise` (B, …).
    ///
    /// # Errors
    /// If shapes differ, or a timestep is not one of training.
    pub fn add_noise(&self, original: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        self.mixed("add_noise", (&self.signal, original), (&self.noise, noise), timesteps)
    }

    /// v = √ᾱ_t ε − √(1 − ᾱ_t) x₀ (Salimans and Ho, *Progressive Distillation for Fast Sampling of Diffusion Models*, 2022).
    ///
    /// # Errors
    /// As [`add_noise`](Self::add_noise).
    pub fn velocity(&self, original: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        self.mixed("velocity", (&self.noise, &original.neg()?), (&self.signal, noise), timesteps)
    }

    /// What a network of the given prediction type is to say at x_t: ε, x₀, v, or ε − x₀.
    ///
    /// # Errors
    /// As [`add_noise`](Self::add_noise).
    pub fn target(&self, prediction: PredictionType, original: &Tensor, noise: &Tensor, timesteps: &Tensor) -> Result<Tensor> {
        same_shape("target", ("sample", original), ("noise", noise))?;
        match prediction {
            PredictionType::Epsilon => Ok(noise.clone()),
            PredictionType::Sample => Ok(original.clone()),
            PredictionType::VPrediction => self.velocity(original, noise, timesteps),
            PredictionType::FlowPrediction => flow_target(original, noise),
        }
    }

    /// The signal-to-noise ratio ᾱ / (1 − ᾱ) at the timesteps: f32 (B).
    ///
    /// # Errors
    /// If a timestep is not one of training.
    pub fn snr(&self, timesteps: &Tensor) -> Result<Tensor> {
        self.snr.to_device(timesteps.device())?.index_select(0, timesteps).map_err(|e| Error::index("snr", format!("timesteps: {e}")))
    }

    /// Weights of the squared error at each timestep, f32 (B): min(SNR, γ) for x₀, that over SNR for ε, over SNR + 1 for v. All three weigh
    /// the error of x₀ alike, and keep the easy timesteps from outweighing the rest.
    ///
    /// Source: Hang et al., *Efficient Diffusion Training via Min-SNR Weighting Strategy*, 2023 (γ = 5).
    ///
    /// # Errors
    /// If γ is not above 0, a timestep is not one of training, or the prediction is that of a flow.
    pub fn min_snr_weights(&self, prediction: PredictionType, gamma: f64, timesteps: &Tensor) -> Result<Tensor> {
        if gamma.is_nan() || gamma <= 0.0 {
            return Err(Error::argument("min_snr_weights", format!("gamma = {gamma}, expected above 0")));
        }
        let snr = self.snr(timesteps)?;
        let least = snr.clamp(None, gamma)?;
        match prediction {
            PredictionType::Sample => Ok(least),
            // min(1, γ / SNR), which is 1 where nothing but noise is left, and not 0 / 0.
            PredictionType::Epsilon => snr.rdiv_scalar(gamma)?.clamp(None, 1.0),
            PredictionType::VPrediction => least.div(&snr.add_scalar(1.0)?),
            PredictionType::FlowPrediction => Err(Error::argument("min_snr_weights", "defined for epsilon, sample and v_prediction")),
        }
    }
}

fn wide(like: &Tensor) -> DType {
    if like.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The straight path of rectified flow: x_t = (1 − t) x₀ + t ε, for times (B) from 0 to 1.
///
/// Source: Liu et al., *Flow Straight and Fast*, 2023; Lipman et al., *Flow Matching for Generative Modeling*, 2023.
///
/// # Errors
/// If shapes differ.
pub fn flow_interpolate(original: &Tensor, noise: &Tensor, times: &Tensor) -> Result<Tensor> {
    const OP: &str = "flow_interpolate";
    same_shape(OP, ("sample", original), ("noise", noise))?;
    if times.rank() != 1 || original.rank() == 0 || times.dim(0)? != original.dim(0)? {
        return Err(Error::shape(OP, format!("times {} for samples {}, expected (B) and (B, …)", times.shape(), original.shape())));
    }
    let mut shape = vec![1; original.rank()];
    shape[0] = times.dim(0)?;
    let t = raised(OP, times)?.to_dtype(wide(original))?.reshape(&shape[..])?;
    let (x, n) = (raised(OP, original)?, raised(OP, noise)?.to_dtype(wide(original))?);
    x.mul(&t.rsub_scalar(1.0)?)?.add(&n.mul(&t)?)?.to_dtype(original.dtype())
}

/// What a network is to predict along that path: its direction, ε − x₀.
///
/// # Errors
/// If shapes differ.
pub fn flow_target(original: &Tensor, noise: &Tensor) -> Result<Tensor> {
    same_shape("flow_target", ("sample", original), ("noise", noise))?;
    noise.sub(original)
}
