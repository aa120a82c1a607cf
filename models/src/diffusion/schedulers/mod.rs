//! Schedulers: which noise levels a sampler visits, and how it steps from one to the next. The rules are those of `diffusers`, a file each.

mod config;
mod ddim;
mod ddpm;
mod dpm_solver;
mod euler;
mod euler_ancestral;
mod flow;
mod heun;
mod lcm;
mod multistep;
mod names;
mod pndm;
pub(crate) mod sampling;
pub(crate) mod schedules;
mod sigmas;
mod unipc;

pub use config::SchedulerConfig;
pub use ddim::Ddim;
pub use ddpm::Ddpm;
pub use dpm_solver::DpmSolverMultistep;
pub use euler::Euler;
pub use euler_ancestral::EulerAncestral;
pub use flow::FlowEuler;
pub use heun::Heun;
pub use lcm::Lcm;
pub use names::{
    AlgorithmType, BetaSchedule, FinalSigmas, InterpolationType, PredictionType, SchedulerClass, SchedulerKind, SolverType, TimeShiftType,
    TimestepSpacing, TimestepType, VarianceType,
};
pub use pndm::Pndm;
pub use unipc::UniPcMultistep;

use kiln_tensor::{Error, Generator, Result, Tensor};

impl SchedulerConfig {
    /// The scheduler that it configures.
    ///
    /// # Errors
    /// If a field is out of its domain, or the scheduler knows no such prediction type.
    pub fn build(&self) -> Result<Box<dyn Scheduler>> {
        Ok(match self.class {
            SchedulerClass::Ddpm => Box::new(Ddpm::new(self)?),
            SchedulerClass::Ddim => Box::new(Ddim::new(self)?),
            SchedulerClass::Pndm => Box::new(Pndm::new(self)?),
            SchedulerClass::Euler => Box::new(Euler::new(self)?),
            SchedulerClass::EulerAncestral => Box::new(EulerAncestral::new(self)?),
            SchedulerClass::Heun => Box::new(Heun::new(self)?),
            SchedulerClass::DpmSolverMultistep => Box::new(DpmSolverMultistep::new(self)?),
            SchedulerClass::UniPcMultistep => Box::new(UniPcMultistep::new(self)?),
            SchedulerClass::Lcm => Box::new(Lcm::new(self)?),
            SchedulerClass::FlowEuler => Box::new(FlowEuler::new(self)?),
        })
    }
}

/// The scheduler of a configuration: the text of a `scheduler_config.json` (it starts with a brace), or the path of one or of its folder.
///
/// # Errors
/// As [`SchedulerConfig::load`] and [`SchedulerConfig::build`].
pub fn from_config(text_or_path: &str) -> Result<Box<dyn Scheduler>> {
    let is_text = text_or_path.trim_start().starts_with('{');
    let config = if is_text { SchedulerConfig::from_json(text_or_path)? } else { SchedulerConfig::load(text_or_path)? };
    config.build()
}

/// A way from noise to a sample in a given number of steps.
///
/// ```text
/// scheduler.set_timesteps(25)?;
/// let mut sample = noise.mul_scalar(scheduler.init_noise_sigma())?;
/// for i in 0..scheduler.timesteps().len() {
///     let input = scheduler.scale_model_input(&sample, i)?;
///     let output = model(&input, scheduler.timesteps()[i])?;
///     sample = scheduler.step(&output, i, &sample, &generator)?;
/// }
/// ```
pub trait Scheduler: Send {
    /// What it was made from: to save, or to make [another kind](SchedulerConfig::with_kind) for the same model.
    fn config(&self) -> &SchedulerConfig;

    /// How many timesteps one step of a run has: a run that starts later starts at a multiple of it.
    fn order(&self) -> usize {
        1
    }

    /// The share η of DDPM's noise that DDIM adds, from 0 to 1.
    ///
    /// # Errors
    /// If it is out of range, or not 0 and the scheduler has none.
    fn set_eta(&mut self, eta: f64) -> Result<()> {
        if eta == 0.0 {
            return Ok(());
        }
        Err(Error::argument(self.config().class.name(), "only DDIM has an eta"))
    }

    /// The shift μ of the next runs of a flow whose configuration says `use_dynamic_shifting`; without it their
    /// [`set_timesteps`](Self::set_timesteps) is an error.
    ///
    /// # Errors
    /// If the scheduler has none.
    fn set_mu(&mut self, _mu: f64) -> Result<()> {
        Err(Error::argument(self.config().class.name(), "has no shift that depends on the picture: use_dynamic_shifting is not set"))
    }

    /// Chooses the timesteps of a run of `steps` steps and forgets what earlier steps left.
    ///
    /// # Errors
    /// If there are none, or more than the model was trained with.
    fn set_timesteps(&mut self, steps: usize) -> Result<()>;

    /// The timesteps of the run, first to last: what the network is told. Schedulers of higher order call it more often than `steps`.
    fn timesteps(&self) -> &[f64];

    /// Standard deviation of the noise that a run starts from.
    fn init_noise_sigma(&self) -> f64;

    /// What the network sees of `sample` at the `index`th timestep.
    ///
    /// # Errors
    /// If there is no such timestep.
    fn scale_model_input(&self, sample: &Tensor, index: usize) -> Result<Tensor>;

    /// The sample at the next timestep, from the network's output at the `index`th one. Indices go up from the first one used, one by one:
    /// the multistep methods remember what came before.
    ///
    /// # Errors
    /// If there is no such timestep, it is not the next one, or shapes differ.
    fn step(&mut self, model_output: &Tensor, index: usize, sample: &Tensor, generator: &Generator) -> Result<Tensor>;

    /// `original` with `noise` at the level of the given timestep of training (any of a run's [`timesteps`](Scheduler::timesteps) too).
    ///
    /// # Errors
    /// If there is no such timestep, or shapes differ.
    fn add_noise(&self, original: &Tensor, noise: &Tensor, timestep: f64) -> Result<Tensor>;

    /// `original` with `noise` at the level of the `index`th timestep of the run. Two timesteps that are equal after rounding can have levels
    /// of their own: the index says which is meant.
    ///
    /// # Errors
    /// If there is no such timestep, or shapes differ.
    fn add_noise_at(&self, original: &Tensor, noise: &Tensor, index: usize) -> Result<Tensor> {
        let count = self.timesteps().len();
        let none = || Error::index("add_noise", format!("index {index} of a run of {count} timesteps"));
        self.add_noise(original, noise, self.timesteps().get(index).copied().ok_or_else(none)?)
    }
}
