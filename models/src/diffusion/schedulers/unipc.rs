//! UniPC: a multistep predictor, and a corrector that uses the same call of the network.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::flow::set_mu;
use super::multistep::{Choice, Multistep, Past, mixture, original, unipc_flow_sigmas};
use super::names::{FinalSigmas, PredictionType, SolverType};
use super::sampling::{combine, expect_prediction, inputs};
use kiln_tensor::{Error, Generator, Result, Tensor};

const NAME: &str = "UniPCMultistepScheduler";

/// UniPC of order 1 to 3, with B(h) = h (`bh1`) or eʰ − 1 (`bh2`), predicting x₀ or ε.
///
/// Source: Zhao et al., *UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models*, 2023.
pub struct UniPcMultistep {
    config: SchedulerConfig,
    settings: Settings,
    mu: Option<f64>,
    state: Multistep,
    past: Past,
    /// The sample that the last step began at, and that step's order.
    last: Option<(Tensor, usize)>,
}

/// A step between two levels: what its formulas need, in the terms of the paper.
struct Stride {
    /// Coefficients of the sample and of the output at the start.
    of_sample: f64,
    of_output: f64,
    /// What the differences are multiplied by: − α B(h), or − σ B(h).
    of_differences: f64,
    /// rₖ of the earlier outputs, and 1.
    ratios: Vec<f64>,
    /// The right-hand sides bₖ.
    b: Vec<f64>,
}

impl UniPcMultistep {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain, or two do not go together.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        let settings = config.settings();
        let mut known = vec![PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        if settings.predict_x0 {
            known.push(PredictionType::FlowPrediction);
        }
        expect_prediction(NAME, settings.prediction_type, &known)?;
        let higher_at_end = !settings.lower_order_final && settings.solver_order > 1;
        if settings.final_sigmas_type == FinalSigmas::Zero && (!settings.predict_x0 || higher_at_end) {
            let message =
                "without predict_x0 or lower_order_final the last step cannot go to no noise: final_sigmas_type must be sigma_min";
            return Err(Error::argument(NAME, message));
        }
        if settings.shift_terminal.is_some() && !settings.use_flow_sigmas {
            return Err(Error::argument(NAME, "shift_terminal is for use_flow_sigmas only"));
        }
        if config.extra.get("solver_p").is_some_and(|solver| !solver.is_null()) {
            return Err(Error::argument(NAME, "solver_p (another solver as the predictor) is not implemented; expected null"));
        }
        let state = Multistep::new(&settings)?;
        Ok(Self { config: config.clone(), settings, mu: None, state, past: Past::default(), last: None })
    }

    /// The step from the level at `index` to the next, of the given order.
    fn stride(&self, index: usize, order: usize) -> Result<Stride> {
        let at = |index: usize| Ok::<_, Error>(mixture(&self.settings, self.state.sigma(index)?));
        let (from, to) = (at(index)?, at(index + 1)?);
        let lambda = from.lambda();
        let h = to.lambda() - lambda;
        let mut ratios = Vec::new();
        for back in 1..order {
            let earlier = index.checked_sub(back).ok_or_else(|| Error::index("step", format!("no level {back} steps before {index}")))?;
            ratios.push((at(earlier)?.lambda() - lambda) / h);
        }
        ratios.push(1.0);
        let hh = if self.settings.predict_x0 { -h } else { h };
        let phi = hh.exp_m1();
        let scale = if self.settings.solver_type == SolverType::Bh1 { hh } else { phi };
        let (mut next_phi, mut factorial, mut b) = (phi / hh - 1.0, 1.0, Vec::new());
        for k in 1..=order {
            b.push(next_phi * factorial / scale);
            factorial *= (k + 1) as f64;
            next_phi = next_phi / hh - 1.0 / factorial;
        }
        let (of_sample, weight) =
            if self.settings.predict_x0 { (to.sigma / from.sigma, to.alpha) } else { (to.alpha / from.alpha, to.sigma) };
        Ok(Stride { of_sample, of_output: -weight * phi, of_differences: -weight * scale, ratios, b })
    }

    /// The start of a step: its first-order part, plus the earlier outputs' differences to the newest with the given weights.
    fn along(&self, stride: &Stride, x: &Tensor, weights: &[f64]) -> Result<Tensor> {
        let newest = self.past.get(0)?;
        let mut sum = combine([(stride.of_sample, x), (stride.of_output, newest)])?;
        for (back, (weight, ratio)) in weights.iter().zip(&stride.ratios).enumerate() {
            let factor = stride.of_differences * weight / ratio;
            sum = sum.add(&combine([(factor, self.past.get(back + 1)?), (-factor, newest)])?)?;
        }
        Ok(sum)
    }

    /// UniP: the sample at the next level.
    fn predicted(&self, index: usize, order: usize, x: &Tensor) -> Result<Tensor> {
        let stride = self.stride(index, order)?;
        let weights = match order {
            1 => Vec::new(),
            2 => vec![0.5],
            _ => solve(&stride.ratios[..order - 1], &stride.b[..order - 1])?,
        };
        self.along(&stride, x, &weights)
    }

    /// UniC: the sample at `index` made again, knowing the network's output there.
    fn corrected(&self, index: usize, order: usize, start: &Tensor, output: &Tensor) -> Result<Tensor> {
        let stride = self.stride(index - 1, order)?;
        let weights = if order == 1 { vec![0.5] } else { solve(&stride.ratios, &stride.b)? };
        let (newest, earlier) = weights.split_last().ok_or_else(|| Error::argument("step", "an order of 0"))?;
        let factor = stride.of_differences * newest;
        self.along(&stride, start, earlier)?.add(&combine([(factor, output), (-factor, self.past.get(0)?)])?)
    }
}

/// ρ with Σᵢ ρᵢ rᵢᵏ = bₖ for k from 0: elimination with the largest pivot.
fn solve(ratios: &[f64], b: &[f64]) -> Result<Vec<f64>> {
    let n = ratios.len();
    let mut rows =
        b.iter().enumerate().map(|(k, &b)| ratios.iter().map(|r| r.powi(k as i32)).chain([b]).collect::<Vec<_>>()).collect::<Vec<_>>();
    for column in 0..n {
        let largest = (column..n).max_by(|&i, &j| rows[i][column].abs().total_cmp(&rows[j][column].abs())).unwrap_or(column);
        rows.swap(column, largest);
        let pivot = rows[column].clone();
        if pivot[column] == 0.0 || !pivot[column].is_finite() {
            return Err(Error::argument("step", "two noise levels of the past are equal; take fewer steps"));
        }
        for (i, row) in rows.iter_mut().enumerate() {
            let factor = if i == column { 0.0 } else { row[column] / pivot[column] };
            row.iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
        }
    }
    Ok(rows.iter().enumerate().map(|(i, row)| row[n] / row[i]).collect())
}

impl Scheduler for UniPcMultistep {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_mu(&mut self, mu: f64) -> Result<()> {
        set_mu(&self.config, &self.settings, &mut self.mu, mu)
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let settings = &self.settings;
        let train = settings.num_train_timesteps;
        let flow = unipc_flow_sigmas(settings, steps.min(train), self.mu)?;
        let choice = Choice { last: train, ends_at_last_level: true, flow, always_rounds: true };
        self.state.start(settings, steps, choice, settings.final_sigmas_type == FinalSigmas::Zero)?;
        self.past.clear();
        self.last = None;
        Ok(())
    }

    fn timesteps(&self) -> &[f64] {
        &self.state.run.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor> {
        self.state.run.timestep("scale_model_input", index)?;
        Ok(sample.clone())
    }

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, _: &Generator) -> Result<Tensor> {
        self.state.run.turn(index)?;
        let (output, mut x) = inputs(model_output, sample)?;
        let settings = &self.settings;
        let level = self.state.sigma(index)?;
        let converted = if settings.predict_x0 {
            original(settings, level, &output, &x)?
        } else {
            mixture(settings, level).noise(settings.prediction_type, &output, &x)?
        };
        if let Some((start, order)) = &self.last
            && !settings.disable_corrector.contains(&(index - 1))
        {
            x = self.corrected(index, *order, start, &converted)?;
        }
        self.past.push(converted, settings.solver_order);
        let left = self.state.run.timesteps.len() - index;
        let order = settings.solver_order.min(self.past.len()).min(if settings.lower_order_final { left } else { usize::MAX });
        let previous = self.predicted(index, order, &x)?;
        self.last = Some((x, order));
        self.state.run.advance(index);
        previous.to_dtype(sample.dtype())
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        self.state.noised(&self.settings, original, noise, timestep)
    }

    fn add_noise_at(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.state.noised_at(&self.settings, original, noise, index)
    }
}
