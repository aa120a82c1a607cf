//! What a network is to those who train it and draw with it, and drawing: from noise to pictures along any scheduler, with guidance.

use super::Dit;
use super::guidance::{classifier_free, rescale};
use super::schedulers::Scheduler;
use super::unet::{UNet2dConditionModel, UNet2dModel, UNetConditions};
use kiln_autograd::no_grad;
use kiln_tensor::{DType, Error, Generator, Result, Tensor, autocast};

/// A network that says what a noisy sample hides.
///
/// Plain closures are denoisers too: what a U-Net says under the eyes of a ControlNet, for example.
pub trait Denoiser: Send + Sync {
    /// What it says of `x` (B, C, …) at `timesteps` (B), i64 or of f32: ε, x₀, v or the velocity of a flow, of the shape of `x`.
    ///
    /// `condition` has a row for each sample, of what it is to show: labels, i64 (B), or what a text became, (B, S, C), or its tokens.
    ///
    /// # Errors
    /// If shapes do not fit, or the network cannot do without a condition and gets none, or the other way round.
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor>;
}

impl<F: Fn(&Tensor, &Tensor, Option<&Tensor>) -> Result<Tensor> + Send + Sync> Denoiser for F {
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        self(x, timesteps, condition)
    }
}

impl Denoiser for Box<dyn Denoiser> {
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        self.as_ref().predict(x, timesteps, condition)
    }
}

impl Denoiser for UNet2dModel {
    /// The condition is the class labels.
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        self.forward(x, timesteps, condition)
    }
}

impl Denoiser for UNet2dConditionModel {
    /// The condition is the sequence that the pixels look at, (B, S, C): what a text became.
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        self.forward(x, timesteps, condition, &UNetConditions::default())
    }
}

impl Denoiser for Dit {
    /// The condition is the class labels.
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        self.forward(x, timesteps, condition)
    }
}

/// How pictures are drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Steps of the scheduler.
    pub steps: usize,
    /// What each picture is to show, a row for each.
    pub condition: Option<Tensor>,
    /// The row that stands for nothing: the label of no class (), or what an empty text became (S, C). Guidance needs it.
    pub unconditional: Option<Tensor>,
    /// How much more the condition counts than the network says, from where it counts as it says: 1. See [`classifier_free`].
    pub guidance: f64,
    /// How far the contrast that guidance adds is taken back, 0 to 1. See [`rescale`].
    pub guidance_rescale: f64,
    /// States between noise and picture to keep, both among them; 0 keeps none.
    pub frames: usize,
    /// The half type of products (see [`autocast`]).
    pub autocast: Option<DType>,
}

impl Default for Sampling {
    /// 25 steps without condition.
    fn default() -> Self {
        Self { steps: 25, condition: None, unconditional: None, guidance: 1.0, guidance_rescale: 0.0, frames: 0, autocast: None }
    }
}

/// What was drawn.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The pictures, as the noise was shaped.
    pub pictures: Tensor,
    /// States on the way, as the network saw them: the first is the noise, the last the pictures.
    pub frames: Vec<Tensor>,
}

/// Draws from `noise` (B, C, …) of variance 1. `generator` is asked by schedulers that add noise on the way.
///
/// With guidance the network sees all pictures twice in one batch, without their condition and with it. Where it tells a variance too (twice
/// the channels), that is left out. Nothing is recorded.
///
/// # Errors
/// If shapes do not fit, guidance is asked for without a condition and the row for none, or the scheduler cannot make such a run.
///
/// ```
/// # use kiln_models::diffusion::{Sampling, sample};
/// # use kiln_models::diffusion::schedulers::{PredictionType, SchedulerClass, SchedulerConfig};
/// # use kiln_tensor::{Generator, Result, Tensor};
/// # fn main() -> Result<()> {
/// // A network that always knows the answer.
/// let network = |x: &Tensor, _: &Tensor, _: Option<&Tensor>| x.full_like(0.25);
/// let config = SchedulerConfig { prediction_type: Some(PredictionType::Sample), ..SchedulerConfig::new(SchedulerClass::Ddim) };
/// let generator = Generator::new(0);
/// let noise = generator.randn([2, 1, 4, 4], ())?;
/// let samples = sample(&network, config.build()?.as_mut(), &noise, &Sampling { frames: 3, ..Sampling::default() }, &generator)?;
/// assert!(samples.pictures.to_vec::<f32>()?.iter().all(|x| (x - 0.25).abs() < 1e-5));
/// assert_eq!(samples.frames.len(), 3);
/// # Ok(()) }
/// ```
pub fn sample(
    network: &(impl Denoiser + ?Sized),
    scheduler: &mut dyn Scheduler,
    noise: &Tensor,
    sampling: &Sampling,
    generator: &Generator,
) -> Result<Samples> {
    let guide = Guide::new(network, sampling, noise)?;
    scheduler.set_timesteps(sampling.steps)?;
    let times = scheduler.timesteps().to_vec();
    no_grad(|| {
        let mut x = noise.mul_scalar(scheduler.init_noise_sigma())?;
        let (kept, mut frames) = (kept_states(times.len(), sampling.frames), Vec::new());
        for (i, &time) in times.iter().enumerate() {
            let input = scheduler.scale_model_input(&x, i)?;
            if kept.contains(&i) {
                frames.push(input.clone());
            }
            let output = guide.predict(&input, time)?;
            x = scheduler.step(&output, i, &x, generator)?;
        }
        if sampling.frames > 0 {
            frames.push(x.clone());
        }
        Ok(Samples { pictures: x, frames })
    })
}

/// The steps before which a state is kept: `frames` evenly spread ones, the last of which is the state after all steps.
fn kept_states(steps: usize, frames: usize) -> Vec<usize> {
    let gaps = frames.min(steps.saturating_add(1)).saturating_sub(1);
    (0..gaps).map(|frame| frame * steps / gaps).collect()
}

/// A network with its conditions.
struct Guide<'a, N: ?Sized> {
    network: &'a N,
    sampling: &'a Sampling,
    /// What the network gets: with guidance, the rows for nothing first.
    condition: Option<Tensor>,
    is_guided: bool,
}

impl<'a, N: Denoiser + ?Sized> Guide<'a, N> {
    fn new(network: &'a N, sampling: &'a Sampling, noise: &Tensor) -> Result<Self> {
        let batch = noise.dim(0)?;
        if let Some(condition) = &sampling.condition
            && (condition.rank() == 0 || condition.dim(0)? != batch)
        {
            return Err(Error::shape(
                "sample",
                format!("the condition is {}, expected a row for each of {batch} pictures", condition.shape()),
            ));
        }
        if !sampling.guidance.is_finite() {
            return Err(Error::argument("sample", format!("guidance = {}, expected a number", sampling.guidance)));
        }
        let is_guided = sampling.guidance != 1.0;
        if !is_guided {
            return Ok(Self { network, sampling, condition: sampling.condition.clone(), is_guided });
        }
        let (Some(condition), Some(unconditional)) = (&sampling.condition, &sampling.unconditional) else {
            let hint = "needs a condition, and the row that stands for none";
            return Err(Error::argument("sample", format!("guidance = {} {hint}", sampling.guidance)));
        };
        let nothing = rows_of(unconditional, condition)?;
        Ok(Self { network, sampling, condition: Some(Tensor::cat(&[&nothing, condition], 0)?), is_guided })
    }

    fn call(&self, x: &Tensor, time: f64) -> Result<Tensor> {
        let times = Tensor::full([x.dim(0)?], time, (DType::F32, x.device()))?;
        let output = in_half(self.sampling.autocast, || self.network.predict(x, &times, self.condition.as_ref()))?;
        let output = if output.rank() > 1 && output.dim(1)? == 2 * x.dim(1)? { output.narrow(1, 0, x.dim(1)?)? } else { output };
        output.to_dtype(x.dtype())
    }

    fn predict(&self, x: &Tensor, time: f64) -> Result<Tensor> {
        if !self.is_guided {
            return self.call(x, time);
        }
        let batch = x.dim(0)?;
        let both = self.call(&Tensor::cat(&[x, x], 0)?, time)?;
        let (without, with) = (both.narrow(0, 0, batch)?, both.narrow(0, batch, batch)?);
        let guided = classifier_free(&without, &with, self.sampling.guidance)?;
        if self.sampling.guidance_rescale == 0.0 { Ok(guided) } else { rescale(&guided, &with, self.sampling.guidance_rescale) }
    }
}

/// Runs `f` under [`autocast`] to `dtype`, or as it is.
pub(super) fn in_half<R>(dtype: Option<DType>, f: impl FnOnce() -> Result<R>) -> Result<R> {
    match dtype {
        Some(dtype) => autocast(dtype, f)?,
        None => f(),
    }
}

/// The row `unconditional` as often as `condition` has rows, or an error that compares both.
pub(super) fn rows_of(unconditional: &Tensor, condition: &Tensor) -> Result<Tensor> {
    let fits = condition.rank() > 0 && unconditional.dims() == &condition.dims()[1..] && unconditional.dtype() == condition.dtype();
    if !fits {
        let (dtype, shape) = (unconditional.dtype(), unconditional.shape());
        let message =
            format!("the row for no condition is {dtype} {shape}, the conditions are {} {}", condition.dtype(), condition.shape());
        return Err(Error::shape("condition", message));
    }
    unconditional.to_device(condition.device())?.expand(*condition.shape())
}
