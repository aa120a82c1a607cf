//! DPM-Solver and DPM-Solver++: exponential integrators of the diffusion ODE or SDE, linear multistep.

use super::Scheduler;
use super::config::{SchedulerConfig, Settings};
use super::flow::{set_mu, wide_noise};
use super::multistep::{Choice, Multistep, Past, dpm_flow_sigmas, mixture, original};
use super::names::{AlgorithmType, FinalSigmas, PredictionType, SolverType, VarianceType};
use super::sampling::{combine, expect_prediction, inputs};
use kiln_tensor::{Error, Generator, Result, Tensor};

/// Runs of fewer steps end with steps of lower order, if `lower_order_final` says so.
const FEW_STEPS: usize = 15;

/// DPM-Solver++(2M) and its relatives: order 1 to 3, the ODE or the SDE, predicting x₀ (`…++`) or ε.
///
/// Source: Lu et al., *DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling*, 2022, and *DPM-Solver++: Fast Solver for
/// Guided Sampling of Diffusion Probabilistic Models*, 2022.
pub struct DpmSolverMultistep {
    config: SchedulerConfig,
    settings: Settings,
    mu: Option<f64>,
    state: Multistep,
    past: Past,
}

/// The coefficients of one step: x_t = `of_sample` x + Σ `of_past`ᵢ Dᵢ + `of_noise` z.
struct Step {
    of_sample: f64,
    of_past: [f64; 3],
    of_noise: f64,
}

impl DpmSolverMultistep {
    /// From its configuration.
    ///
    /// # Errors
    /// If a field is out of its domain, or two do not go together.
    pub fn new(config: &SchedulerConfig) -> Result<Self> {
        const NAME: &str = "DPMSolverMultistepScheduler";
        let settings = config.settings();
        let predicts_original = predicts_original(settings.algorithm_type);
        let mut known = vec![PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];
        if predicts_original {
            known.push(PredictionType::FlowPrediction);
        }
        expect_prediction(NAME, settings.prediction_type, &known)?;
        if !predicts_original && settings.final_sigmas_type == FinalSigmas::Zero {
            let message = format!("with algorithm_type {} final_sigmas_type must be sigma_min", settings.algorithm_type);
            return Err(Error::argument(NAME, message));
        }
        if settings.algorithm_type == AlgorithmType::SdeDpmSolver && settings.solver_order == 3 {
            return Err(Error::argument(NAME, "sde-dpmsolver has no third order; expected solver_order 1 or 2"));
        }
        let state = Multistep::new(&settings)?;
        Ok(Self { config: config.clone(), settings, mu: None, state, past: Past::default() })
    }

    /// The network's output as x₀ or as ε.
    fn converted(&self, output: &Tensor, x: &Tensor, level: f64) -> Result<Tensor> {
        let settings = &self.settings;
        if predicts_original(settings.algorithm_type) {
            return original(settings, level, output, x);
        }
        let mixture = mixture(settings, level);
        let epsilon = mixture.noise(settings.prediction_type, output, x)?;
        if !settings.thresholding {
            return Ok(epsilon);
        }
        let limited = super::sampling::threshold(settings, &mixture.original(PredictionType::Epsilon, &epsilon, x)?)?;
        mixture.noise(PredictionType::Sample, &limited, x)
    }

    /// The order of the step at `index`: what the past allows, and lower at the end.
    fn order(&self, index: usize) -> usize {
        let count = self.state.run.timesteps.len();
        let settings = &self.settings;
        let few = settings.lower_order_final && count < FEW_STEPS;
        let ends = settings.euler_at_final || few || settings.final_sigmas_type == FinalSigmas::Zero;
        let limit = match count - index.min(count) {
            1 if ends => 1,
            2 if few => 2,
            _ => 3,
        };
        settings.solver_order.min(self.past.len()).min(limit)
    }

    /// The outputs' differences D₀, D₁, D₂, as many as the order.
    fn differences(&self, index: usize, order: usize, h: f64) -> Result<Vec<Tensor>> {
        let newest = self.past.get(0)?;
        let mut result = vec![newest.clone()];
        if order == 1 {
            return Ok(result);
        }
        let ratio = |back: usize| Ok::<f64, Error>((self.lambda(index - back + 1)? - self.lambda(index - back)?) / h);
        let (r0, second) = (ratio(1)?, self.past.get(1)?);
        let first = combine([(1.0 / r0, newest), (-1.0 / r0, second)])?;
        if order == 2 {
            result.push(first);
            return Ok(result);
        }
        let (r1, third) = (ratio(2)?, self.past.get(2)?);
        let before = combine([(1.0 / r1, second), (-1.0 / r1, third)])?;
        let share = r0 / (r0 + r1);
        result.push(combine([(1.0 + share, &first), (-share, &before)])?);
        result.push(combine([(1.0 / (r0 + r1), &first), (-1.0 / (r0 + r1), &before)])?);
        Ok(result)
    }

    fn lambda(&self, index: usize) -> Result<f64> {
        Ok(mixture(&self.settings, self.state.sigma(index)?).lambda())
    }

    /// The coefficients of the step from `index` in log-SNR `h`.
    fn coefficients(&self, index: usize, order: usize, h: f64) -> Result<Step> {
        let from = mixture(&self.settings, self.state.sigma(index)?);
        let to = mixture(&self.settings, self.state.sigma(index + 1)?);
        // Of second order, the midpoint rule takes half of the first term for D₁.
        let midpoint = order == 2 && !matches!(self.settings.solver_type, SolverType::Heun);
        Ok(match self.settings.algorithm_type {
            AlgorithmType::DpmSolverPlusPlus => {
                let e = (-h).exp_m1();
                let first = -to.alpha * e;
                let second = if midpoint { first / 2.0 } else { to.alpha * (e / h + 1.0) };
                let third = -to.alpha * ((e + h) / (h * h) - 0.5);
                Step { of_sample: to.sigma / from.sigma, of_past: [first, second, third], of_noise: 0.0 }
            }
            AlgorithmType::DpmSolver => {
                let e = h.exp_m1();
                let first = -to.sigma * e;
                let second = if midpoint { first / 2.0 } else { -to.sigma * (e / h - 1.0) };
                let third = -to.sigma * ((e - h) / (h * h) - 0.5);
                Step { of_sample: to.alpha / from.alpha, of_past: [first, second, third], of_noise: 0.0 }
            }
            AlgorithmType::SdeDpmSolverPlusPlus => {
                let e = -(-2.0 * h).exp_m1();
                let first = to.alpha * e;
                let second = if midpoint { first / 2.0 } else { to.alpha * (e / (-2.0 * h) + 1.0) };
                let third = to.alpha * ((e - 2.0 * h) / (4.0 * h * h) - 0.5);
                Step { of_sample: to.sigma / from.sigma * (-h).exp(), of_past: [first, second, third], of_noise: to.sigma * e.sqrt() }
            }
            AlgorithmType::SdeDpmSolver => {
                let e = h.exp_m1();
                let first = -2.0 * to.sigma * e;
                let second = if midpoint { first / 2.0 } else { -2.0 * to.sigma * (e / h - 1.0) };
                let of_noise = to.sigma * (2.0 * h).exp_m1().sqrt();
                Step { of_sample: to.alpha / from.alpha, of_past: [first, second, 0.0], of_noise }
            }
        })
    }
}

fn predicts_original(algorithm: AlgorithmType) -> bool {
    matches!(algorithm, AlgorithmType::DpmSolverPlusPlus | AlgorithmType::SdeDpmSolverPlusPlus)
}

fn is_random(algorithm: AlgorithmType) -> bool {
    matches!(algorithm, AlgorithmType::SdeDpmSolver | AlgorithmType::SdeDpmSolverPlusPlus)
}

impl Scheduler for DpmSolverMultistep {
    fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    fn set_mu(&mut self, mu: f64) -> Result<()> {
        set_mu(&self.config, &self.settings, &mut self.mu, mu)
    }

    fn set_timesteps(&mut self, steps: usize) -> Result<()> {
        let settings = &self.settings;
        let train = settings.num_train_timesteps;
        let too_noisy = |&&sigma: &&f64| mixture(settings, sigma).lambda() < settings.lambda_min_clipped;
        let last = train - self.state.levels.sigmas.iter().rev().take_while(too_noisy).count();
        let flow = dpm_flow_sigmas(settings, steps.min(train), self.mu)?;
        let choice = Choice { last, ends_at_last_level: false, flow, always_rounds: false };
        self.state.start(settings, steps, choice, settings.final_sigmas_type == FinalSigmas::Zero)?;
        self.past.clear();
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

    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, generator: &Generator) -> Result<Tensor> {
        self.state.run.turn(index)?;
        let learned = matches!(self.settings.variance_type, VarianceType::Learned | VarianceType::LearnedRange);
        let output = if learned { model_output.narrow(1, 0, sample.dim(1)?)? } else { model_output.clone() };
        let (output, x) = inputs(&output, sample)?;
        let converted = self.converted(&output, &x, self.state.sigma(index)?)?;
        self.past.push(converted, self.settings.solver_order);
        let order = self.order(index);
        let h = self.lambda(index + 1)? - self.lambda(index)?;
        let step = self.coefficients(index, order, h)?;
        let mut previous = x.mul_scalar(step.of_sample)?;
        for (factor, difference) in step.of_past.into_iter().zip(self.differences(index, order, h)?) {
            previous = previous.add(&difference.mul_scalar(factor)?)?;
        }
        if is_random(self.settings.algorithm_type) {
            previous = previous.add(&wide_noise(sample, generator)?.mul_scalar(step.of_noise)?)?;
        }
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
