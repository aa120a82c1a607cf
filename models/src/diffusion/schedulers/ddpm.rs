//! Ancestral sampling of the diffusion process that the network was trained on.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::{PredictionType, VarianceType};
use super::sampling::{Mixture, Run, combine, expect_prediction, inputs, limited, mix, noise_like, raised, whole_timestep};
use super::schedules::{alphas_cumprod, spaced_whole};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// DDPM: x_{t−1} drawn from the posterior N(μ̃(x_t, x₀), Σ), with x₀ as the network sees it. With the variance type `learned` or
/// `learned_range` the network's output has twice the channels of the sample; the second half is the variance.
///
/// Source: Ho et al., *Denoising Diffusion Probabilistic Models*, 2020.
pub struct Ddpm {
    config: SchedulerConfig,
    settings: Settings,
    alphas_cumprod: Vec<f64>,
    run: Run,
}

impl Ddpm {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("DDPMScheduler", settings.prediction_type, &known)?;
        let alphas_cumprod = alphas_cumprod(&settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { config: config.clone(), settings, alphas_cumprod, run: Run::default() })
    }

    fn alpha_bar(&self, timestep: f64) -> f64 {
        self.alphas_cumprod.get(timestep as usize).copied().unwrap_or(1.0)
    }

    fn learns_variance(&self) -> bool {
        matches!(self.settings.variance_type, VarianceType::Learned | VarianceType::LearnedRange)
    }

    /// The output's two halves of channels, if the second is the variance.
    fn split(&self, model_output: &Tensor, sample: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        if !self.learns_variance() {
            return Ok((model_output.clone(), None));
        }
        let channels = sample.dim(1)?;
        if model_output.dim(1)? != 2 * channels {
            return Err(Error::shape(
                "step",
                format!(
                    "with variance_type {} the model output must have {} channels, it is {}",
                    self.settings.variance_type,
                    2 * channels,
                    model_output.shape()
                ),
            ));
        }
        let variance = raised("step", &model_output.narrow(1, channels, channels)?)?;
        Ok((model_output.narrow(1, 0, channels)?, Some(variance)))
    }

    /// The noise times the standard deviation of the step from ᾱ to ᾱ of the step before it.
    fn scaled_noise(&self, alpha_bar: f64, before: f64, predicted: Option<Tensor>, noise: &Tensor) -> Result<Tensor> {
        let beta = 1.0 - alpha_bar / before;
        let posterior = ((1.0 - before) / (1.0 - alpha_bar) * beta).max(1e-20);
        match (self.settings.variance_type, predicted) {
            (VarianceType::Learned, Some(variance)) => variance.sqrt()?.mul(noise),
            (VarianceType::LearnedRange, Some(variance)) => {
                // (v + 1) / 2 of the way from log β̃ to log β, halved for the deviation.
                let (low, high) = (posterior.ln(), beta.ln());
                variance.mul_scalar((high - low) / 4.0)?.add_scalar((high + low) / 4.0)?.exp()?.mul(noise)
            }
            (VarianceType::FixedLarge, _) => noise.mul_scalar(beta.sqrt()),
            _ => noise.mul_scalar(posterior.sqrt()),
        }
    }
}

impl Scheduler for Ddpm {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        self.run = Run::new(spaced_whole(&self.settings, steps)?);
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.run.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.run.timestep("scale_model_input", index)?;
        Ok(sample.clone())
    }

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, generator: &Generator) -> Result<Tensor> {
        let timestep = self.run.turn(index)?;
        let (output, variance) = self.split(model_output, sample)?;
        let (output, x) = inputs(&output, sample)?;
        let alpha_bar = self.alpha_bar(timestep);
        let before = self.run.timesteps.get(index + 1).map_or(1.0, |&t| self.alpha_bar(t));
        let alpha = alpha_bar / before;
        let original = Mixture::of_alpha_bar(alpha_bar).original(self.settings.prediction_type, &output, &x)?;
        let original = limited(&self.settings, original)?;
        // The posterior's mean, equation 7 of the paper.
        let of_original = before.sqrt() * (1.0 - alpha) / (1.0 - alpha_bar);
        let of_sample = alpha.sqrt() * (1.0 - before) / (1.0 - alpha_bar);
        let mut previous = combine([(of_original, &original), (of_sample, &x)])?;
        if timestep > 0.0 {
            let noise = noise_like(sample, generator)?;
            previous = previous.add(&self.scaled_noise(alpha_bar, before, variance, &noise)?)?;
        }
        self.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let alpha_bar = self.alpha_bar(whole_timestep("add_noise", timestep, self.alphas_cumprod.len())? as f64);
        mix("add_noise", original, alpha_bar.sqrt(), noise, (1.0 - alpha_bar).sqrt())
    }
}
