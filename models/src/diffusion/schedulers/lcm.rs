//! Sampling with a consistency model: to x₀ in one leap, and back to a lower level with fresh noise.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::PredictionType;
use super::sampling::{Mixture, Run, combine, expect_prediction, inputs, limited, mix, noise_like, whole_timestep};
use super::schedules::{alphas_cumprod, check_steps};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// Standard deviation of the data in the boundary condition.
const SIGMA_DATA: f64 = 0.5;

/// LCM: x̂ = c_skip(t) x + c_out(t) x₀, then noised to the next of the run's timesteps, which are some of those that the model was
/// distilled with.
///
/// Source: Luo et al., *Latent Consistency Models*, 2023.
pub struct Lcm {
    config: SchedulerConfig,
    settings: Settings,
    alphas_cumprod: Vec<f64>,
    run: Run,
}

impl Lcm {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("LCMScheduler", settings.prediction_type, &known)?;
        let (original, train) = (settings.original_inference_steps, settings.num_train_timesteps);
        if original == 0 || original > train {
            let message = format!("original_inference_steps = {original}, expected 1 to {train} (num_train_timesteps)");
            return Err(Error::argument("LCMScheduler", message));
        }
        let alphas_cumprod = alphas_cumprod(&settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { config: config.clone(), settings, alphas_cumprod, run: Run::default() })
    }

    fn alpha_bar(&self, timestep: f64) -> f64 {
        self.alphas_cumprod.get(timestep as usize).copied().unwrap_or(1.0)
    }
}

impl Scheduler for Lcm {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let (original, train) = (self.settings.original_inference_steps, self.settings.num_train_timesteps);
        check_steps(steps, train)?;
        if steps > original {
            return Err(Error::argument("set_timesteps", format!("{steps} steps, expected 1 to {original} (original_inference_steps)")));
        }
        let stride = train / original;
        let ratio = original as f64 / steps as f64;
        let timestep = |i: usize| ((original - (i as f64 * ratio).floor() as usize) * stride) as f64 - 1.0;
        self.run = Run::new((0..steps).map(timestep).collect());
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
        let (output, x) = inputs(model_output, sample)?;
        let mixture = Mixture::of_alpha_bar(self.alpha_bar(timestep));
        let original = limited(&self.settings, mixture.original(self.settings.prediction_type, &output, &x)?)?;
        let time = timestep * self.settings.timestep_scaling;
        let norm = time * time + SIGMA_DATA * SIGMA_DATA;
        let mut previous = combine([(time / norm.sqrt(), &original), (SIGMA_DATA * SIGMA_DATA / norm, &x)])?;
        if let Some(&next) = self.run.timesteps.get(index + 1) {
            let next = Mixture::of_alpha_bar(self.alpha_bar(next));
            previous = combine([(next.alpha, &previous), (next.sigma, &noise_like(sample, generator)?)])?;
        }
        self.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let alpha_bar = self.alpha_bar(whole_timestep("add_noise", timestep, self.alphas_cumprod.len())? as f64);
        mix("add_noise", original, alpha_bar.sqrt(), noise, (1.0 - alpha_bar).sqrt())
    }
}
