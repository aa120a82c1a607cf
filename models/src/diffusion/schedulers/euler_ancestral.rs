//! Euler's method with fresh noise at every step.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::PredictionType;
use super::sampling::{combine, expect_prediction, inputs, noise_like};
use super::schedules::{round32, spaced};
use super::sigmas::{SigmaRun, denoised};
use kiln_tensor::{Generator, Result, Tensor};

/// Ancestral Euler: a step from σ to below the next level σ′, to σ_down, and noise σ_up on top, where σ_up² = σ′² (σ² − σ′²) / σ² and
/// σ_down² = σ′² − σ_up².
///
/// Source: Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, as in k-diffusion.
pub struct EulerAncestral {
    config: SchedulerConfig,
    settings: Settings,
    state: SigmaRun,
}

impl EulerAncestral {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("EulerAncestralDiscreteScheduler", settings.prediction_type, &known)?;
        let state = SigmaRun::new(&settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { config: config.clone(), settings, state })
    }
}

impl Scheduler for EulerAncestral {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let timesteps = spaced(&self.settings, steps)?.into_iter().map(round32).collect::<Vec<_>>();
        let mut sigmas = timesteps.iter().map(|&t| self.state.levels.sigma(t)).collect::<Vec<_>>();
        sigmas.push(0.0);
        self.state.start(timesteps, sigmas);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.state.run.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.state.init_noise_sigma(self.settings.timestep_spacing)
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.state.scaled_input(sample, index)
    }

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, generator: &Generator) -> Result<Tensor> {
        self.state.run.turn(index)?;
        let (output, x) = inputs(model_output, sample)?;
        let (sigma, next) = (self.state.sigma(index)?, self.state.sigma(index + 1)?);
        let original = denoised(self.settings.prediction_type, &output, &x, sigma)?;
        let up = next * (1.0 - (next / sigma).powi(2)).max(0.0).sqrt();
        let down = (next * next - up * up).max(0.0).sqrt();
        let noise = noise_like(sample, generator)?;
        let previous = combine([(down / sigma, &x), (1.0 - down / sigma, &original), (up, &noise)])?;
        self.state.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        self.state.noised(original, noise, timestep)
    }

    fn add_noise_at(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.state.noised_at(original, noise, index)
    }
}
