//! The noise levels of rectified flow, x_σ = (1 − σ) x₀ + σ ε, and Euler's method along it.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::{PredictionType, TimeShiftType};
use super::sampling::{Run, combine, expect_prediction, inputs, mix};
use super::schedules::{check_steps, linspace, round32, spaced_sigmas};
use kiln_tensor::{DType, Error, Generator, Result, Tensor};

/// The level σ shifted towards noise by the factor s: s σ / (1 + (s − 1) σ) (Esser et al., *Scaling Rectified Flow Transformers for
/// High-Resolution Image Synthesis*, 2024, equation 23).
pub(super) fn shifted(sigma: f64, factor: f64) -> f64 {
    factor * sigma / (1.0 + (factor - 1.0) * sigma)
}

/// The factor that the shift μ means: with it, [`shifted`] is e^μ / (e^μ + 1 / σ − 1).
pub(super) fn shift_factor(kind: TimeShiftType, mu: f64) -> f64 {
    match kind {
        TimeShiftType::Exponential => mu.exp(),
        TimeShiftType::Linear => mu,
    }
}

/// The factor by which a run's levels are shifted: that of μ, or the one of the configuration.
pub(super) fn run_shift(settings: &Settings, mu: Option<f64>, fixed: f64) -> Result<f64> {
    let factor = match mu {
        _ if !settings.use_dynamic_shifting => fixed,
        Some(mu) => shift_factor(settings.time_shift_type, mu),
        None => {
            return Err(Error::argument("set_timesteps", "with use_dynamic_shifting the shift depends on the picture; call set_mu first"));
        }
    };
    if factor > 0.0 && factor.is_finite() {
        return Ok(factor);
    }
    Err(Error::argument("set_timesteps", format!("a shift by the factor {factor}, expected above 0")))
}

/// Falling levels stretched so that the last becomes `terminal`.
pub(super) fn stretched(sigmas: Vec<f64>, terminal: f64) -> Vec<f64> {
    let scale = sigmas.last().map_or(1.0, |last| (1.0 - last) / (1.0 - terminal));
    sigmas.into_iter().map(|sigma| 1.0 - (1.0 - sigma) / scale).collect()
}

/// Euler along a flow: x ← x + (σ′ − σ) v. The network is told 1000 σ (`num_train_timesteps` σ), and predicts v = ε − x₀.
///
/// Source: Lipman et al., *Flow Matching for Generative Modeling*, 2023; Esser et al., 2024.
pub struct FlowEuler {
    config: SchedulerConfig,
    settings: Settings,
    mu: Option<f64>,
    sigmas: Vec<f64>,
    run: Run,
}

impl FlowEuler {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain, or the configuration is that of a model that predicts something else.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let given = config.prediction_type.unwrap_or(PredictionType::FlowPrediction);
        expect_prediction("FlowMatchEulerDiscreteScheduler", given, &[PredictionType::FlowPrediction])?;
        let settings = config.settings();
        if settings.num_train_timesteps == 0 || !(settings.shift > 0.0 && settings.shift.is_finite()) {
            let message =
                format!("num_train_timesteps = {} and shift = {}, expected above 0", settings.num_train_timesteps, settings.shift);
            return Err(Error::argument("FlowMatchEulerDiscreteScheduler", message));
        }
        Ok(Self { config: config.clone(), settings, mu: None, sigmas: Vec::new(), run: Run::default() })
    }

    fn sigma(&self, index: usize) -> Result<f64> {
        let none = || Error::index("step", format!("index {index} of a run of {} noise levels", self.sigmas.len()));
        self.sigmas.get(index).copied().ok_or_else(none)
    }
}

impl Scheduler for FlowEuler {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_mu(&mut self, mu: f64) -> Result<()> {
        set_mu(&self.config, &self.settings, &mut self.mu, mu)
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let settings = &self.settings;
        let train = settings.num_train_timesteps;
        check_steps(steps, train)?;
        let lowest = 1.0 / train as f64;
        // The levels of training are shifted already, if the shift is fixed.
        let lowest = if settings.use_dynamic_shifting { lowest } else { shifted(lowest, settings.shift) };
        let factor = run_shift(settings, self.mu, settings.shift)?;
        let mut sigmas = linspace(1.0, lowest, steps).into_iter().map(|sigma| shifted(sigma, factor)).collect::<Vec<_>>();
        if let Some(terminal) = settings.shift_terminal.filter(|&terminal| terminal != 0.0) {
            sigmas = stretched(sigmas, terminal);
        }
        let ends = (sigmas.first().copied().unwrap_or(1.0), sigmas.last().copied().unwrap_or(1.0));
        sigmas = spaced_sigmas(settings, ends.0, ends.1, steps)?.unwrap_or(sigmas);
        let last = if settings.invert_sigmas { 1.0 } else { 0.0 };
        let directed = |sigma: f64| round32(if settings.invert_sigmas { 1.0 - sigma } else { sigma });
        sigmas = sigmas.into_iter().map(directed).collect();
        if let Some(sigma) = sigmas.iter().find(|sigma| !sigma.is_finite()) {
            return Err(Error::argument("set_timesteps", format!("the configuration gives the noise level {sigma}")));
        }
        self.run = Run::new(sigmas.iter().map(|sigma| round32(sigma * train as f64)).collect());
        sigmas.push(last);
        self.sigmas = sigmas;
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
        self.run.turn(index)?;
        let (output, x) = inputs(model_output, sample)?;
        let (sigma, next) = (self.sigma(index)?, self.sigma(index + 1)?);
        let previous = if self.settings.stochastic_sampling {
            let noise = wide_noise(sample, generator)?;
            let original = combine([(1.0, &x), (-sigma, &output)])?;
            combine([(1.0 - next, &original), (next, &noise)])?
        } else {
            combine([(1.0, &x), (next - sigma, &output)])?
        };
        self.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let sigma = match self.run.position(timestep) {
            Some(index) => self.sigma(index)?,
            None => flow_sigma(timestep, self.settings.num_train_timesteps)?,
        };
        mix("add_noise", original, 1.0 - sigma, noise, sigma)
    }

    fn add_noise_at(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.run.timestep("add_noise", index)?;
        let sigma = self.sigma(index)?;
        mix("add_noise", original, 1.0 - sigma, noise, sigma)
    }
}

/// The level of a timestep, t / T.
pub(super) fn flow_sigma(timestep: f64, train: usize) -> Result<f64> {
    if (0.0..=train as f64).contains(&timestep) {
        return Ok(timestep / train as f64);
    }
    Err(Error::index("add_noise", format!("timestep {timestep}, expected 0 to {train}")))
}

/// Keeps μ for the next run, if the configuration has a use for it.
pub(super) fn set_mu(config: &SchedulerConfig, settings: &Settings, kept: &mut Option<f64>, mu: f64) -> Result<()> {
    if !settings.use_dynamic_shifting || !mu.is_finite() {
        return Err(Error::argument(config.class.name(), format!("a shift mu = {mu}: expected a number, and use_dynamic_shifting")));
    }
    *kept = Some(mu);
    Ok(())
}

/// Noise of the sample's shape, drawn in f32 whatever its dtype.
pub(super) fn wide_noise(sample: &Tensor, generator: &Generator) -> Result<Tensor> {
    let dtype = if sample.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    generator.randn(sample.shape(), (DType::F32, sample.device()))?.to_dtype(dtype)
}
