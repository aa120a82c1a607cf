//! Schedulers: which noise levels a sampler visits, and how it steps from one to the next. The rules are those of `diffusers`, a file each.

use kiln_tensor::{Generator, Result, Tensor};

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
}
