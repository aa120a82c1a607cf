//! Heun's method along the probability-flow ODE: two calls of the network for each step.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::PredictionType;
use super::sampling::{combine, expect_prediction, inputs};
use super::schedules::{round32, spaced, spaced_sigmas};
use super::sigmas::{SigmaRun, denoised};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// Heun: an Euler step to the next level, and then from where it began with the mean of the slopes at both ends. The last step, to no
/// noise, is Euler's. All but the first timestep are there twice: the second time the step itself begins.
///
/// Source: Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*, 2022, algorithm 1.
pub struct Heun {
    config: SchedulerConfig,
    settings: Settings,
    state: SigmaRun,
    /// Sample and slope at the begin of a step that waits for its second half.
    began: Option<(Tensor, Tensor)>,
}

impl Heun {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let known = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        expect_prediction("HeunDiscreteScheduler", settings.prediction_type, &known)?;
        let state = SigmaRun::new(&settings, false)?;
        Ok(Self { config: config.clone(), settings, state, began: None })
    }

    /// (x − x₀) / σ.
    fn slope(&self, output: &Tensor, x: &Tensor, sigma: f64) -> Result<Tensor> {
        let mut original = denoised(self.settings.prediction_type, output, x, sigma)?;
        if self.settings.clip_sample {
            let range = self.settings.clip_sample_range;
            original = original.clamp(-range, range)?;
        }
        combine([(1.0 / sigma, x), (-1.0 / sigma, &original)])
    }
}

impl Scheduler for Heun {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn order(&self) -> usize {
        2
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let levels = &self.state.levels;
        let mut timesteps = spaced(&self.settings, steps)?.into_iter().map(round32).collect::<Vec<_>>();
        let mut sigmas = timesteps.iter().map(|&t| levels.sigma(t)).collect::<Vec<_>>();
        let ends = (sigmas.first().copied().unwrap_or(0.0), sigmas.last().copied().unwrap_or(0.0));
        if let Some(spaced) = spaced_sigmas(&self.settings, ends.0, ends.1, steps)? {
            timesteps = spaced.iter().map(|&sigma| round32(levels.timestep(sigma))).collect();
            sigmas = spaced;
        }
        let twice = |values: Vec<f64>| values.into_iter().enumerate().flat_map(|(i, v)| std::iter::repeat_n(v, if i == 0 { 1 } else { 2 }));
        let sigmas = twice(sigmas).chain([0.0]).collect();
        self.state.start(twice(timesteps).collect(), sigmas);
        self.began = None;
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
        let sigma = self.state.sigma(index)?;
        let slope = self.slope(&output, &x, sigma)?;
        let previous = match &self.began {
            None if index % 2 == 1 => {
                return Err(Error::index("step", format!("index {index} is the second half of a step; begin at an even one")));
            }
            None => {
                let previous = combine([(1.0, &x), (self.state.sigma(index + 1)? - sigma, &slope)])?;
                self.began = Some((x, slope));
                previous
            }
            Some((start, first)) => {
                let half = (sigma - self.state.sigma(index - 1)?) / 2.0;
                let previous = combine([(1.0, start), (half, first), (half, &slope)])?;
                self.began = None;
                previous
            }
        };
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
