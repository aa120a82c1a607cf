//! Pseudo numerical methods: linear multistep after a Runge–Kutta start, or after one repeated step.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::names::PredictionType;
use super::sampling::{Mixture, Run, combine, expect_prediction, inputs, mix, whole_timestep};
use super::schedules::{alphas_cumprod, spaced_whole};
use kiln_tensor::{Error, Generator, Result, Tensor};
use std::collections::VecDeque;

/// Timesteps at which the Runge–Kutta start calls the network: four for each of three steps.
const PRK_CALLS: usize = 12;

/// PNDM. With `skip_prk_steps` (PLMS, Stable Diffusion's way) the second timestep comes twice, to make up for the missing past; without it
/// the first three steps are Runge–Kutta's, with four calls of the network each.
///
/// Source: Liu et al., *Pseudo Numerical Methods for Diffusion Models on Manifolds*, 2022.
pub struct Pndm {
    config: SchedulerConfig,
    settings: Settings,
    alphas_cumprod: Vec<f64>,
    /// Timesteps of training that a step crosses.
    stride: usize,
    run: Run,
    /// Steps made in this run.
    made: usize,
    /// Earlier outputs of the network, newest last.
    outputs: VecDeque<Tensor>,
    /// The sample that the step in progress began at.
    start: Option<Tensor>,
    /// The weighted sum of a Runge–Kutta step's outputs so far.
    sum: Option<Tensor>,
}

impl Pndm {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        expect_prediction("PNDMScheduler", settings.prediction_type, &[PredictionType::Epsilon, PredictionType::VPrediction])?;
        let alphas_cumprod = alphas_cumprod(&settings, false)?;
        let (run, outputs) = (Run::default(), VecDeque::new());
        Ok(Self { config: config.clone(), settings, alphas_cumprod, stride: 1, run, made: 0, outputs, start: None, sum: None })
    }

    fn alpha_bar(&self, timestep: f64) -> Result<f64> {
        if timestep < 0.0 && self.settings.set_alpha_to_one {
            return Ok(1.0);
        }
        let none = || Error::index("step", format!("timestep {timestep} lies beyond the {} of training", self.alphas_cumprod.len()));
        self.alphas_cumprod.get(timestep.max(0.0) as usize).copied().ok_or_else(none)
    }

    /// The sample at `to` from that at `from` (equation 9 of the paper).
    fn transfer(&self, x: &Tensor, from: f64, to: f64, output: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.alpha_bar(from)?, self.alpha_bar(to)?);
        let epsilon = Mixture::of_alpha_bar(a).noise(self.settings.prediction_type, output, x)?;
        let divisor = a * (1.0 - b).sqrt() + (a * (1.0 - a) * b).sqrt();
        combine([((b / a).sqrt(), x), (-(b - a) / divisor, &epsilon)])
    }

    /// One of the four calls of a Runge–Kutta step.
    fn step_prk(&mut self, index: usize, timestep: f64, output: Tensor, x: Tensor) -> Result<Tensor> {
        let call = index % 4;
        let from = self.run.timestep("step", index - call)?;
        let to = if index % 2 == 1 { timestep } else { timestep - (self.stride / 2) as f64 };
        let weighted = output.mul_scalar(if call == 0 || call == 3 { 1.0 / 6.0 } else { 1.0 / 3.0 })?;
        let sum = match &self.sum {
            Some(sum) if call > 0 => sum.add(&weighted)?,
            _ => weighted,
        };
        let start = self.start.clone().filter(|_| call > 0).unwrap_or(x);
        let previous = self.transfer(&start, from, to, if call == 3 { &sum } else { &output })?;
        if call == 0 {
            self.remember(output);
        }
        (self.start, self.sum) = (Some(start), Some(sum));
        Ok(previous)
    }

    fn remember(&mut self, output: Tensor) {
        self.outputs.push_back(output);
        if self.outputs.len() > 4 {
            self.outputs.pop_front();
        }
    }

    /// A step of the Adams–Bashforth kind, of as high an order as there are outputs.
    fn step_plms(&mut self, timestep: f64, output: Tensor, x: Tensor) -> Result<Tensor> {
        let stride = self.stride as f64;
        if self.made == 1 {
            // The same step again, with the mean of the slopes at its two ends.
            let first = self.outputs.back().unwrap_or(&output);
            let mean = combine([(0.5, &output), (0.5, first)])?;
            let start = self.start.take().unwrap_or(x);
            return self.transfer(&start, timestep + stride, timestep, &mean);
        }
        self.remember(output);
        let of = |i: usize| self.outputs.get(self.outputs.len().wrapping_sub(i));
        let mean = match (of(1), of(2), of(3), of(4)) {
            (Some(a), Some(b), Some(c), Some(d)) => combine([(55.0 / 24.0, a), (-59.0 / 24.0, b), (37.0 / 24.0, c), (-9.0 / 24.0, d)])?,
            (Some(a), Some(b), Some(c), None) => combine([(23.0 / 12.0, a), (-16.0 / 12.0, b), (5.0 / 12.0, c)])?,
            (Some(a), Some(b), None, _) => combine([(1.5, a), (-0.5, b)])?,
            (Some(a), ..) => a.clone(),
            (None, ..) => return Err(Error::index("step", "no output of the network to step with")),
        };
        if self.made == 0 {
            self.start = Some(x.clone());
        }
        self.transfer(&x, timestep, timestep - stride, &mean)
    }
}

impl Scheduler for Pndm {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let whole = spaced_whole(&self.settings, steps)?;
        let stride = self.settings.num_train_timesteps / steps;
        let timesteps = if self.settings.skip_prk_steps {
            let again = whole.get(1).copied();
            let (first, rest) = whole.split_at(1);
            first.iter().copied().chain(again).chain(rest.iter().copied()).collect()
        } else {
            let [t0, t1, t2, t3, ..] = whole[..] else {
                return Err(Error::argument("set_timesteps", format!("{steps} steps, expected 4 or more; or set skip_prk_steps")));
            };
            let half = (stride / 2) as f64;
            let prk = [(t0, t1), (t1, t2), (t2, t3)].into_iter().flat_map(|(from, to)| [from, to + half, to + half, to]);
            prk.chain(whole.iter().copied().skip(3)).collect()
        };
        (self.run, self.stride, self.made) = (Run::new(timesteps), stride, 0);
        self.outputs.clear();
        (self.start, self.sum) = (None, None);
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

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, _: &Generator) -> Result<Tensor> {
        let timestep = self.run.turn(index)?;
        let (output, x) = inputs(model_output, sample)?;
        let prk = !self.settings.skip_prk_steps;
        if prk && index != self.made {
            return Err(Error::index(
                "step",
                format!("index {index} to begin with; the Runge–Kutta start begins at 0; or set skip_prk_steps"),
            ));
        }
        let previous =
            if prk && index < PRK_CALLS { self.step_prk(index, timestep, output, x)? } else { self.step_plms(timestep, output, x)? };
        self.made += 1;
        self.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let alpha_bar = self.alpha_bar(whole_timestep("add_noise", timestep, self.alphas_cumprod.len())? as f64)?;
        mix("add_noise", original, alpha_bar.sqrt(), noise, (1.0 - alpha_bar).sqrt())
    }
}
