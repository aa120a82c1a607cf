//! The non-Markovian process with DDPM's marginals: deterministic, or with a share η of DDPM's noise.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::PredictionType;
use super::sampling::{Mixture, Run, combine, expect_prediction, inputs, limited, mix, noise_like, whole_timestep};
use super::schedules::{alphas_cumprod, spaced_whole};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// DDIM: x_{t−1} = √ᾱ_{t−1} x₀ + √(1 − ᾱ_{t−1} − σ²) ε + σ z, with σ = η √((1 − ᾱ_{t−1}) / (1 − ᾱ_t) (1 − ᾱ_t / ᾱ_{t−1})). η is 0 unless
/// [set](Scheduler::set_eta).
///
/// Source: Song et al., *Denoising Diffusion Implicit Models*, 2021, equation 12.
pub struct Ddim {
    config: SchedulerConfig,
    settings: Settings,
    alphas_cumprod: Vec<f64>,
    eta: f64,
    /// Timesteps of training that a step crosses.
    stride: f64,
    run: Run,
}

impl Ddim {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("DDIMScheduler", settings.prediction_type, &known)?;
        let alphas_cumprod = alphas_cumprod(&settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { config: config.clone(), settings, alphas_cumprod, eta: 0.0, stride: 1.0, run: Run::default() })
    }

    /// ᾱ of a timestep, or what the configuration says of those below the first.
    fn alpha_bar(&self, timestep: f64) -> f64 {
        let below = timestep < 0.0;
        if below && self.settings.set_alpha_to_one { 1.0 } else { self.alphas_cumprod.get(timestep as usize).copied().unwrap_or(1.0) }
    }
}

impl Scheduler for Ddim {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        self.run = Run::new(spaced_whole(&self.settings, steps)?);
        self.stride = (self.settings.num_train_timesteps / steps) as f64;
        Ok(())
    }

    fn set_eta(&mut self, eta: f64) -> Result<()> {
        if !(0.0..=1.0).contains(&eta) {
            return Err(Error::argument("DDIMScheduler", format!("eta = {eta}, expected 0 to 1")));
        }
        self.eta = eta;
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
        let (alpha_bar, before) = (self.alpha_bar(timestep), self.alpha_bar(timestep - self.stride));
        let mixture = Mixture::of_alpha_bar(alpha_bar);
        let original = mixture.original(self.settings.prediction_type, &output, &x)?;
        let epsilon = mixture.noise(self.settings.prediction_type, &output, &x)?;
        let original = limited(&self.settings, original)?;
        let deviation = self.eta * ((1.0 - before) / (1.0 - alpha_bar) * (1.0 - alpha_bar / before)).max(0.0).sqrt();
        let towards = (1.0 - before - deviation * deviation).max(0.0).sqrt();
        let mut previous = combine([(before.sqrt(), &original), (towards, &epsilon)])?;
        if self.eta > 0.0 {
            previous = combine([(1.0, &previous), (deviation, &noise_like(sample, generator)?)])?;
        }
        self.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let alpha_bar = self.alpha_bar(whole_timestep("add_noise", timestep, self.alphas_cumprod.len())? as f64);
        mix("add_noise", original, alpha_bar.sqrt(), noise, (1.0 - alpha_bar).sqrt())
    }
}
