//! The noise levels of a run, for the schedulers of Karras et al.'s form x = x₀ + σ ε.

use super::config::Settings;
use super::names::{PredictionType, TimestepSpacing};
use super::sampling::{Run, combine, mix, raised};
use super::schedules::{Levels, round32};
use kiln_tensor::{Error, Result, Tensor};

/// The levels of training, and those of a run with the timesteps that they belong to.
pub(super) struct SigmaRun {
    pub levels: Levels,
    /// One for each timestep, and the one that the run ends at.
    pub sigmas: Vec<f64>,
    pub run: Run,
}

impl SigmaRun {
    pub fn new(settings: &Settings, rescaled: bool) -> Result<Self> {
        Ok(Self { levels: Levels::new(settings, rescaled)?, sigmas: Vec::new(), run: Run::default() })
    }

    /// Starts a run.
    pub fn start(&mut self, timesteps: Vec<f64>, sigmas: Vec<f64>) {
        self.sigmas = sigmas.into_iter().map(round32).collect();
        self.run = Run::new(timesteps);
    }

    /// The level at `index`, from 0 to the number of timesteps.
    pub fn sigma(&self, index: usize) -> Result<f64> {
        let none = || Error::index("step", format!("index {index} of a run of {} noise levels", self.sigmas.len()));
        self.sigmas.get(index).copied().ok_or_else(none)
    }

    /// The highest level; of the run if there is one, of training otherwise.
    pub fn sigma_max(&self) -> f64 {
        self.sigmas.iter().copied().reduce(f64::max).unwrap_or(self.levels.sigma_max())
    }

    /// Standard deviation of what a run starts from.
    pub fn init_noise_sigma(&self, spacing: TimestepSpacing) -> f64 {
        let max = self.sigma_max();
        if spacing == TimestepSpacing::Leading { max.hypot(1.0) } else { max }
    }

    /// x / √(σ² + 1).
    pub fn scaled_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.run.timestep("scale_model_input", index)?;
        let wide = raised("scale_model_input", sample)?;
        wide.div_scalar(self.sigma(index)?.hypot(1.0))?.to_dtype(sample.dtype())
    }

    /// The level of a timestep: of the run, or of training.
    pub fn sigma_of(&self, timestep: f64) -> Result<f64> {
        if let Some(sigma) = self.run.position(timestep).and_then(|i| self.sigmas.get(i)) {
            return Ok(*sigma);
        }
        let last = self.levels.sigmas.len().saturating_sub(1) as f64;
        if (0.0..=last).contains(&timestep) {
            return Ok(round32(self.levels.sigma(timestep)));
        }
        Err(Error::index("add_noise", format!("timestep {timestep}, expected one of the run's, or 0 to {last}")))
    }

    /// x₀ + σ n.
    pub fn noised(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        mix("add_noise", original, 1.0, noise, self.sigma_of(timestep)?)
    }

    /// x₀ + σ n at the `index`th timestep.
    pub fn noised_at(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.run.timestep("add_noise", index)?;
        mix("add_noise", original, 1.0, noise, self.sigma(index)?)
    }
}

/// x₀ from the network's output at x = x₀ + σ ε.
pub(super) fn denoised(prediction: PredictionType, output: &Tensor, x: &Tensor, sigma: f64) -> Result<Tensor> {
    match prediction {
        PredictionType::Epsilon | PredictionType::FlowPrediction => combine([(1.0, x), (-sigma, output)]),
        PredictionType::Sample => Ok(output.clone()),
        PredictionType::VPrediction => {
            let variance = sigma * sigma + 1.0;
            combine([(-sigma / variance.sqrt(), output), (1.0 / variance, x)])
        }
    }
}
