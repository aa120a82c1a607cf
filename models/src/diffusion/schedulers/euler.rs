//! Euler's method along the probability-flow ODE.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::{FinalSigmas, InterpolationType, PredictionType, TimestepType};
use super::sampling::{combine, expect_prediction, inputs};
use super::schedules::{exponential_sigmas, round32, spaced, spaced_sigmas};
use super::sigmas::{SigmaRun, denoised};
use kiln_tensor::{Generator, Result, Tensor};

/// Euler: x ← x + (σ′ − σ) (x − x₀) / σ.
///
/// Source: Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, algorithm 2 without churn and
/// correction.
pub struct Euler {
    config: SchedulerConfig,
    settings: Settings,
    state: SigmaRun,
}

impl Euler {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("EulerDiscreteScheduler", settings.prediction_type, &known)?;
        let state = SigmaRun::new(&settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { config: config.clone(), settings, state })
    }
}

impl Scheduler for Euler {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let settings = &self.settings;
        let levels = &self.state.levels;
        let mut timesteps = spaced(settings, steps)?.into_iter().map(round32).collect::<Vec<_>>();
        let mut sigmas = match settings.interpolation_type {
            InterpolationType::Linear => timesteps.iter().map(|&t| levels.sigma(t)).collect::<Vec<_>>(),
            InterpolationType::LogLinear => exponential_sigmas(levels.sigma_max(), levels.sigma_min(), steps + 1),
        };
        let ends = (sigmas.first().copied().unwrap_or(0.0), sigmas.last().copied().unwrap_or(0.0));
        if let Some(spaced) = spaced_sigmas(settings, ends.0, ends.1, steps)? {
            timesteps = spaced.iter().map(|&sigma| levels.timestep(sigma)).collect();
            sigmas = spaced;
        }
        sigmas.push(match settings.final_sigmas_type {
            FinalSigmas::Zero => 0.0,
            FinalSigmas::SigmaMin => levels.sigma_min(),
        });
        if settings.timestep_type == TimestepType::Continuous && settings.prediction_type == PredictionType::VPrediction {
            timesteps = sigmas.iter().take(timesteps.len()).map(|sigma| sigma.ln() / 4.0).collect();
        }
        self.state.start(timesteps.into_iter().map(round32).collect(), sigmas);
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

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, _: &Generator) -> Result<Tensor> {
        self.state.run.turn(index)?;
        let (output, x) = inputs(model_output, sample)?;
        let (sigma, next) = (self.state.sigma(index)?, self.state.sigma(index + 1)?);
        let original = denoised(self.settings.prediction_type, &output, &x, sigma)?;
        // x + (σ′ − σ) (x − x₀) / σ, with the terms collected.
        let previous = combine([(next / sigma, &x), (1.0 - next / sigma, &original)])?;
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
