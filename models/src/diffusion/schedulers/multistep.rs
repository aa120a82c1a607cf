//! What DPM-Solver and UniPC share: the timesteps and noise levels of a run, and the log-SNR that they step in.

use super::config::Settings;
use super::flow::{flow_sigma, run_shift, shifted, stretched};
use super::names::{BetaSchedule, PredictionType, TimestepSpacing};
use super::sampling::{Mixture, Run, mix, threshold};
use super::schedules::{Levels, check_steps, exponential_sigmas, linspace, round32, spaced_sigmas, trailing, within};
use kiln_tensor::{Error, Result, Tensor};

/// x = α x₀ + σ ε as a function of the level: of a flow, or of Karras's σ.
pub(super) fn mixture(settings: &Settings, sigma: f64) -> Mixture {
    if settings.use_flow_sigmas {
        return Mixture { alpha: 1.0 - sigma, sigma };
    }
    let alpha = 1.0 / sigma.hypot(1.0);
    Mixture { alpha, sigma: sigma * alpha }
}

impl Mixture {
    /// Half the logarithm of the signal-to-noise ratio, λ = log α − log σ.
    pub fn lambda(&self) -> f64 {
        self.alpha.ln() - self.sigma.ln()
    }
}

/// x₀ at a level, thresholded if the settings say so.
pub(super) fn original(settings: &Settings, level: f64, output: &Tensor, x: &Tensor) -> Result<Tensor> {
    let prediction = settings.prediction_type;
    let mut mixture = mixture(settings, level);
    if prediction == PredictionType::FlowPrediction {
        mixture.sigma = level;
    }
    let original = mixture.original(prediction, output, x)?;
    if settings.thresholding { threshold(settings, &original) } else { Ok(original) }
}

/// The levels of a run, and the state of its indices.
pub(super) struct Multistep {
    pub levels: Levels,
    /// One for each timestep, and the one that the run ends at.
    pub sigmas: Vec<f64>,
    pub run: Run,
}

/// How a class chooses the levels of a run.
pub(super) struct Choice {
    /// Timesteps of training that may be visited.
    pub last: usize,
    /// The level that a run of respaced levels ends at; that of training if none.
    pub ends_at_last_level: bool,
    /// The levels of a flow, falling, without the final one: for `use_flow_sigmas`.
    pub flow: Vec<f64>,
    /// Whether timesteps of Karras's levels are rounded with every schedule.
    pub always_rounds: bool,
}

impl Multistep {
    pub fn new(settings: &Settings) -> Result<Self> {
        if !(1..=3).contains(&settings.solver_order) {
            return Err(Error::argument("multistep scheduler", format!("solver_order = {}, expected 1 to 3", settings.solver_order)));
        }
        let levels = Levels::new(settings, settings.rescale_betas_zero_snr)?;
        Ok(Self { levels, sigmas: Vec::new(), run: Run::default() })
    }

    /// The level at `index`, from 0 to the number of timesteps.
    pub fn sigma(&self, index: usize) -> Result<f64> {
        let none = || Error::index("step", format!("index {index} of a run of {} noise levels", self.sigmas.len()));
        self.sigmas.get(index).copied().ok_or_else(none)
    }

    /// Starts a run.
    pub fn start(&mut self, settings: &Settings, steps: usize, choice: Choice, final_zero: bool) -> Result<()> {
        let (timesteps, mut sigmas, respaced) = self.chosen(settings, steps, &choice)?;
        sigmas.push(match (final_zero, respaced && choice.ends_at_last_level) {
            (true, _) => 0.0,
            (false, true) => sigmas.last().copied().unwrap_or(0.0),
            (false, false) => self.levels.sigma_min(),
        });
        let sigmas = sigmas.into_iter().map(round32).collect::<Vec<_>>();
        let body = sigmas.split_last().map_or(&[][..], |(_, body)| body);
        if let Some((a, b)) = body.iter().zip(body.iter().skip(1)).find(|(a, b)| a <= b) {
            let message = format!("{steps} steps give the noise levels {a} and {b} in a row, expected to fall; take fewer steps");
            return Err(Error::argument("set_timesteps", message));
        }
        self.sigmas = sigmas;
        self.run = Run::new(timesteps.into_iter().map(f64::trunc).collect());
        Ok(())
    }

    /// Timesteps and levels without the final one, and whether the levels are other than those of the timesteps.
    fn chosen(&self, settings: &Settings, steps: usize, choice: &Choice) -> Result<(Vec<f64>, Vec<f64>, bool)> {
        let timesteps = timesteps(settings, steps, choice.last)?;
        let levels = &self.levels;
        if settings.use_lu_lambdas {
            let sigmas = exponential_sigmas(levels.sigma_max(), levels.sigma_min(), steps);
            let timesteps = sigmas.iter().map(|&sigma| self.timestep_of(settings, sigma, true, choice)).collect();
            return Ok((timesteps, sigmas, true));
        }
        if let Some(mut sigmas) = spaced_sigmas(settings, levels.sigma_max(), levels.sigma_min(), steps)? {
            let timestep = |&sigma: &f64| self.timestep_of(settings, sigma, settings.use_karras_sigmas, choice);
            let mut timesteps = sigmas.iter().map(timestep).collect::<Vec<_>>();
            if settings.use_flow_sigmas && settings.use_karras_sigmas {
                sigmas = sigmas.into_iter().map(|sigma| sigma / (sigma + 1.0)).collect();
                timesteps = sigmas.iter().map(|sigma| sigma * settings.num_train_timesteps as f64).collect();
            }
            return Ok((timesteps, sigmas, true));
        }
        if settings.use_flow_sigmas {
            let sigmas = choice.flow.clone();
            let timesteps = sigmas.iter().map(|sigma| sigma * settings.num_train_timesteps as f64).collect();
            return Ok((timesteps, sigmas, true));
        }
        let sigmas = timesteps.iter().map(|&t| levels.sigma(t)).collect();
        Ok((timesteps, sigmas, false))
    }

    fn timestep_of(&self, settings: &Settings, sigma: f64, rounds: bool, choice: &Choice) -> f64 {
        let timestep = self.levels.timestep(sigma);
        let rounds = rounds && (choice.always_rounds || settings.beta_schedule != BetaSchedule::SquaredcosCapV2);
        if rounds { timestep.round_ties_even() } else { timestep }
    }

    /// α x₀ + σ ε.
    pub fn noised(&self, settings: &Settings, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor> {
        let last = self.levels.sigmas.len().saturating_sub(1);
        let sigma = match self.run.position(timestep) {
            Some(index) => self.sigma(index)?,
            None if settings.use_flow_sigmas => flow_sigma(timestep, settings.num_train_timesteps)?,
            None if (0.0..=last as f64).contains(&timestep) => round32(self.levels.sigma(timestep)),
            None => return Err(Error::index("add_noise", format!("timestep {timestep}, expected one of the run's, or 0 to {last}"))),
        };
        mixed(settings, original, noise, sigma)
    }

    /// α x₀ + σ ε at the `index`th timestep.
    pub fn noised_at(&self, settings: &Settings, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        self.run.timestep("add_noise", index)?;
        mixed(settings, original, noise, self.sigma(index)?)
    }
}

fn mixed(settings: &Settings, original: &Tensor, noise: &Tensor, level: f64) -> Result<Tensor> {
    let mixture = mixture(settings, level);
    mix("add_noise", original, mixture.alpha, noise, mixture.sigma)
}

/// Timesteps of a run: of the first `last` of training, with room for the step to no noise.
fn timesteps(settings: &Settings, steps: usize, last: usize) -> Result<Vec<f64>> {
    let train = settings.num_train_timesteps;
    check_steps(steps, train.min(last))?;
    let timesteps = match settings.timestep_spacing {
        TimestepSpacing::Linspace => {
            linspace(0.0, last as f64 - 1.0, steps + 1).into_iter().skip(1).rev().map(f64::round_ties_even).collect()
        }
        TimestepSpacing::Leading => {
            let ratio = last / (steps + 1);
            (1..=steps).rev().map(|i| (i * ratio) as f64 + settings.steps_offset as f64).collect()
        }
        TimestepSpacing::Trailing => trailing(last, train as f64 / steps as f64),
    };
    within(timesteps, train)
}

/// The levels of a flow for DPM-Solver: from near 1 down, without the last.
pub(super) fn dpm_flow_sigmas(settings: &Settings, steps: usize, mu: Option<f64>) -> Result<Vec<f64>> {
    let factor = if mu.is_some() { run_shift(settings, mu, settings.flow_shift)? } else { settings.flow_shift };
    let levels = linspace(1.0, 1.0 / settings.num_train_timesteps as f64, steps + 1);
    Ok(levels.into_iter().skip(1).rev().map(|level| shifted(1.0 - level, factor)).collect())
}

/// The levels of a flow for UniPC: from 1 down, without the last.
pub(super) fn unipc_flow_sigmas(settings: &Settings, steps: usize, mu: Option<f64>) -> Result<Vec<f64>> {
    /// How far below 1 the first level is kept, where α would be 0.
    const MARGIN: f64 = 1e-6;
    let factor = run_shift(settings, mu, settings.flow_shift)?;
    let levels = linspace(1.0, 1.0 / settings.num_train_timesteps as f64, steps + 1);
    let mut sigmas = levels.into_iter().take(steps).map(|level| shifted(level, factor)).collect::<Vec<_>>();
    if let Some(terminal) = settings.shift_terminal.filter(|&terminal| terminal != 0.0) {
        sigmas = stretched(sigmas, terminal);
    }
    if let Some(first) = sigmas.first_mut().filter(|first| (**first - 1.0).abs() < MARGIN) {
        *first -= MARGIN;
    }
    Ok(sigmas)
}

/// The last outputs of the network, converted, newest first.
#[derive(Default)]
pub(super) struct Past(Vec<Tensor>);

impl Past {
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Puts one in front, and forgets all but `order`.
    pub fn push(&mut self, output: Tensor, order: usize) {
        self.0.insert(0, output);
        self.0.truncate(order);
    }

    /// The one `back` steps ago.
    pub fn get(&self, back: usize) -> Result<&Tensor> {
        self.0.get(back).ok_or_else(|| Error::index("step", format!("there is no output of {back} steps ago")))
    }
}
