//! Training of a denoising network: one optimiser step from a batch, a moving average of the weights to draw with, and all the state that
//! continues a run bit for bit.

use super::denoiser::{Denoiser, Samples, Sampling, in_half, rows_of, sample};
use super::objective::{NoiseSchedule, flow_interpolate, flow_target};
use super::schedulers::{PredictionType, Scheduler, SchedulerClass, SchedulerConfig};
use crate::nn::{LoadMode, Param, Params, StateDict};
use crate::optim::{AdamW, AdamWOptions, Ema, GradScaler, GradScalerOptions, Optimizer, Schedule, grad_norm};
use kiln_autograd::TensorExt;
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{DType, Dims, Error, Generator, Result, Tensor, profile_scope};

/// How a [`DiffusionTrainer`] trains.
#[derive(Clone, Debug)]
pub struct DiffusionTrainerOptions {
    /// The noise of each timestep, and what the network predicts. A flow goes straight from the sample to the noise instead: of the schedule
    /// it has the number of timesteps and the shift. To draw with another class of scheduler, say `beta_start` and `beta_end`: the defaults
    /// of the classes differ.
    pub noise: SchedulerConfig,
    /// γ of the weights of [`NoiseSchedule::min_snr_weights`]; all timesteps count alike without it. Not for flows.
    pub min_snr_gamma: Option<f64>,
    /// The row that stands for no condition: the label of no class (), or what an empty text becomes (S, C).
    pub unconditional: Option<Tensor>,
    /// The share of samples whose condition is replaced by that row, if there is one, so that the network can be guided.
    pub condition_dropout: f64,
    /// AdamW's learning rate at its height.
    pub lr: f64,
    /// AdamW's decay rates.
    pub betas: (f64, f64),
    /// AdamW's ε.
    pub eps: f64,
    /// Decay of weights of two dimensions and more; vectors (norms, biases) have none.
    pub weight_decay: f64,
    /// Steps of the whole run: the rate falls along a cosine until then.
    pub steps: u64,
    /// Steps of the linear rise before.
    pub warmup_steps: u64,
    /// The rate at the end, as a share of `lr`; 1 for a constant one.
    pub min_lr: f64,
    /// The norm that gradients are clipped to.
    pub max_norm: f64,
    /// The decay of the average of the weights, after a warm-up (see [`Ema`]).
    pub ema_decay: f64,
    /// The half type of products (see [`autocast`](kiln_tensor::autocast)); `None` for f32 throughout. With f16 the loss is scaled.
    pub autocast: Option<DType>,
    /// Seed of timesteps, noise and dropped conditions.
    pub seed: u64,
}

impl DiffusionTrainerOptions {
    /// DDPM's objective on the noise of `noise`: AdamW at 2e-4, conditions dropped in a tenth of the samples, clipping at 1, an average of
    /// decay 0.999, a thousand steps.
    pub fn new(noise: SchedulerConfig) -> Self {
        Self {
            noise,
            min_snr_gamma: None,
            unconditional: None,
            condition_dropout: 0.1,
            lr: 2e-4,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            steps: 1000,
            warmup_steps: 100,
            min_lr: 0.0,
            max_norm: 1.0,
            ema_decay: 0.999,
            autocast: None,
            seed: 0,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DiffusionStep {
    /// The mean squared error of its batch, weighted.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// How a sample becomes noise, and what the network is to say on the way.
enum Path {
    Noise {
        schedule: NoiseSchedule,
        prediction: PredictionType,
        gamma: Option<f64>,
    },
    /// Straight, with as many timesteps and this shift of the times.
    Flow {
        timesteps: f64,
        shift: f64,
    },
}

/// A batch on its way to noise.
struct Noisy {
    x: Tensor,
    /// What the network is told.
    timesteps: Tensor,
    target: Tensor,
    /// (B), where samples do not count alike.
    weights: Option<Tensor>,
}

impl Path {
    fn new(options: &DiffusionTrainerOptions) -> Result<Self> {
        let settings = options.noise.settings();
        let of_flows = options.noise.class == SchedulerClass::FlowEuler;
        if !of_flows && settings.prediction_type != PredictionType::FlowPrediction {
            let schedule = NoiseSchedule::new(&options.noise)?;
            let path = Path::Noise { prediction: settings.prediction_type, schedule, gamma: options.min_snr_gamma };
            if let Path::Noise { schedule, prediction, gamma: Some(gamma) } = &path {
                // What is wrong with γ is wrong before the first step.
                schedule.min_snr_weights(*prediction, *gamma, &Tensor::zeros(1, DType::I64)?)?;
            }
            return Ok(path);
        }
        if options.min_snr_gamma.is_some() {
            return Err(Error::argument("diffusion_trainer", "min_snr_gamma: a flow has no such weights"));
        }
        let shift = if of_flows { settings.shift } else { settings.flow_shift };
        if !(shift.is_finite() && shift > 0.0) || settings.num_train_timesteps == 0 {
            let message = format!("shift = {shift}, num_train_timesteps = {}", settings.num_train_timesteps);
            return Err(Error::argument("diffusion_trainer", format!("{message}: a flow needs both above 0")));
        }
        Ok(Path::Flow { timesteps: settings.num_train_timesteps as f64, shift })
    }

    /// Draws a timestep for each sample, and then the noise.
    fn noisy(&self, original: &Tensor, generator: &Generator) -> Result<Noisy> {
        let batch = original.dim(0)?;
        match self {
            Path::Noise { schedule, prediction, gamma } => {
                let timesteps = schedule.sample_timesteps(batch, generator)?.to_device(original.device())?;
                let noise = generator.randn(*original.shape(), original)?;
                Ok(Noisy {
                    x: schedule.add_noise(original, &noise, &timesteps)?,
                    target: schedule.target(*prediction, original, &noise, &timesteps)?,
                    weights: gamma.map(|gamma| schedule.min_snr_weights(*prediction, gamma, &timesteps)).transpose()?,
                    timesteps,
                })
            }
            &Path::Flow { timesteps, shift } => {
                let times = generator.rand(batch, (DType::F32, original.device()))?;
                let noise = generator.randn(*original.shape(), original)?;
                // σ = s t / (1 + (s − 1) t)
                let times = times.mul_scalar(shift)?.div(&times.mul_scalar(shift - 1.0)?.add_scalar(1.0)?)?;
                Ok(Noisy {
                    x: flow_interpolate(original, &noise, &times)?,
                    target: flow_target(original, &noise)?,
                    weights: None,
                    timesteps: times.mul_scalar(timesteps)?,
                })
            }
        }
    }
}

/// A network with its optimiser, the average of its weights, and the source of noise.
///
/// ```
/// # use kiln_models::diffusion::schedulers::{SchedulerClass, SchedulerConfig, SchedulerKind};
/// # use kiln_models::diffusion::{DiffusionTrainer, DiffusionTrainerOptions, Dit, DitConfig, Sampling};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Generator, Result, Tensor};
/// # fn main() -> Result<()> {
/// let config = DitConfig {
///     num_attention_heads: 2, attention_head_dim: 8, in_channels: 1, num_layers: 1, sample_size: 8, num_embeds_ada_norm: 2, ..DitConfig::default()
/// };
/// let params = Params::seeded(0);
/// let dit = Dit::new(&params, &config)?;
/// let null = Tensor::from_vec(vec![dit.null_label()], ())?;
/// let noise = SchedulerConfig::new(SchedulerClass::Ddpm);
/// let options = DiffusionTrainerOptions { unconditional: Some(null), ..DiffusionTrainerOptions::new(noise.clone()) };
/// let mut trainer = DiffusionTrainer::new(dit, &params, options)?;
///
/// let (pictures, labels) = (Tensor::ones([4, 1, 8, 8], ())?, Tensor::from_vec(vec![0i64, 1, 0, 1], 4)?);
/// let step = trainer.step(&pictures, Some(&labels))?;
/// assert!(step.loss > 0.5);
///
/// let generator = Generator::new(1);
/// let wanted = Sampling { steps: 4, condition: Some(labels), guidance: 2.0, ..Sampling::default() };
/// let mut scheduler = noise.with_kind(SchedulerKind::Ddim).build()?;
/// let drawn = trainer.sample(scheduler.as_mut(), &generator.randn([4, 1, 8, 8], ())?, &wanted, &generator)?;
/// assert_eq!(drawn.pictures.dims(), [4, 1, 8, 8]);
/// # Ok(()) }
/// ```
pub struct DiffusionTrainer<N> {
    network: N,
    params: Params,
    options: DiffusionTrainerOptions,
    path: Path,
    optimizer: AdamW,
    schedule: Schedule,
    ema: Ema,
    scaler: Option<GradScaler>,
    noise: Generator,
    steps: u64,
}

impl<N: Denoiser> DiffusionTrainer<N> {
    /// A trainer of the parameters of `params` that are not frozen, and of its adapters: those that `network` reads.
    ///
    /// # Errors
    /// If an option is out of its domain.
    pub fn new(network: N, params: &Params, options: DiffusionTrainerOptions) -> Result<Self> {
        if !(0.0..=1.0).contains(&options.condition_dropout) {
            let message = format!("condition_dropout = {}, expected 0 to 1", options.condition_dropout);
            return Err(Error::argument("diffusion_trainer", message));
        }
        let AdamWOptions { amsgrad, .. } = AdamWOptions::default();
        let adam = AdamWOptions { lr: options.lr, betas: options.betas, eps: options.eps, weight_decay: options.weight_decay, amsgrad };
        let (matrices, vectors): (Vec<_>, Vec<_>) = params.trainable().into_iter().partition(|param: &Param| param.shape().rank() >= 2);
        let mut optimizer = AdamW::new(matrices, adam)?;
        optimizer.add_group(vectors, AdamWOptions { weight_decay: 0.0, ..adam })?;
        let falling = Schedule::cosine(options.steps.saturating_sub(options.warmup_steps), options.min_lr);
        let scaler = options.autocast.filter(|&dtype| dtype == DType::F16).map(|_| GradScaler::new(GradScalerOptions::default()));
        Ok(Self {
            path: Path::new(&options)?,
            ema: Ema::new(params.trainable(), options.ema_decay)?.with_buffers(params.buffers())?.with_warmup(),
            schedule: falling.with_warmup(options.warmup_steps),
            scaler: scaler.transpose()?,
            noise: Generator::new(options.seed),
            network,
            params: params.clone(),
            optimizer,
            options,
            steps: 0,
        })
    }

    /// The network, with the weights that are trained.
    pub fn network(&self) -> &N {
        &self.network
    }

    /// The options it was made with.
    pub fn options(&self) -> &DiffusionTrainerOptions {
        &self.options
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The average of the weights.
    pub fn ema(&mut self) -> &mut Ema {
        &mut self.ema
    }

    /// The mean squared error on a batch `original` (B, C, …) with the given conditions (a row for each sample), at timesteps and with noise
    /// from `generator`, recorded: what [`step`](Self::step) minimises.
    ///
    /// # Errors
    /// If shapes do not fit each other, or the network.
    pub fn loss(&self, original: &Tensor, condition: Option<&Tensor>, generator: &Generator) -> Result<Tensor> {
        if original.rank() < 2 || original.numel() == 0 {
            return Err(Error::shape("diffusion_trainer", format!("the batch is {}, expected (B, C, …)", original.shape())));
        }
        let Noisy { x, timesteps, target, weights } = self.path.noisy(original, generator)?;
        let condition = condition.map(|condition| self.with_dropout(condition, generator)).transpose()?;
        let output = in_half(self.options.autocast, || self.network.predict(&x, &timesteps, condition.as_ref()))?;
        if output.shape() != target.shape() {
            let message = format!("the network's output is {}, what it is to predict {}", output.shape(), target.shape());
            return Err(Error::shape("diffusion_trainer", message));
        }
        let output = output.to_dtype(target.dtype())?;
        let Some(weights) = weights else { return output.mse_loss(&target) };
        let pixels = Dims::from((1..output.rank() as isize).collect::<Vec<_>>());
        output.sub(&target)?.square()?.mean(pixels)?.mul(&weights.to_dtype(target.dtype())?)?.mean(())
    }

    /// The conditions with some rows replaced by that for none.
    fn with_dropout(&self, condition: &Tensor, generator: &Generator) -> Result<Tensor> {
        let Some(unconditional) = &self.options.unconditional else { return Ok(condition.clone()) };
        let nothing = rows_of(unconditional, condition)?;
        let mut shape = vec![1; condition.rank()];
        shape[0] = condition.dim(0)?;
        let is_dropped = generator.rand(&shape[..], (DType::F32, condition.device()))?.lt_scalar(self.options.condition_dropout)?;
        is_dropped.where_cond(&nothing, condition)
    }

    /// One step from a batch of samples (B, C, …) and what each shows, a row for each.
    ///
    /// # Errors
    /// If shapes do not fit, or the loss or gradient is not finite (with f16: only the loss; a gradient that overflows costs the step).
    pub fn step(&mut self, original: &Tensor, condition: Option<&Tensor>) -> Result<DiffusionStep> {
        let lr = self.options.lr * self.schedule.factor(self.steps);
        self.optimizer.set_lr(lr)?;
        self.optimizer.zero_grad();
        let forward = profile_scope("forward");
        let loss = self.loss(original, condition, &self.noise)?;
        drop(forward);
        let backward = profile_scope("backward");
        match &self.scaler {
            Some(scaler) => scaler.scale(&loss)?.backward()?,
            None => loss.backward()?,
        }
        drop(backward);
        let loss = loss.item_f64()?;
        if !loss.is_finite() {
            return Err(self.diverged("loss", loss));
        }
        let grad_norm = self.update()?;
        self.ema.update()?;
        self.steps += 1;
        Ok(DiffusionStep { loss, grad_norm, lr })
    }

    fn diverged(&self, what: &str, value: f64) -> Error {
        Error::argument("diffusion_trainer", format!("the {what} of step {} is {value}; lower the learning rate", self.steps + 1))
    }

    fn update(&mut self) -> Result<f64> {
        let _scope = profile_scope("optimizer");
        if let Some(scaler) = &mut self.scaler {
            let params = self.params.trainable();
            // The step leaves the gradients scaled, and may change the scale.
            let norm = grad_norm(&params)? / scaler.current_scale();
            scaler.step_clipped(&mut self.optimizer, &params, self.options.max_norm)?;
            scaler.update()?;
            return Ok(norm);
        }
        let norm = self.optimizer.step_clipped(self.options.max_norm)?.item_f64()?;
        if norm.is_finite() { Ok(norm) } else { Err(self.diverged("norm of the gradient", norm)) }
    }

    /// Draws with the average of the weights, in evaluation mode: see [`sample`]. The row for no condition is that of the options if
    /// `sampling` has none, and so is the type of products.
    ///
    /// # Errors
    /// As [`sample`].
    pub fn sample(&mut self, scheduler: &mut dyn Scheduler, noise: &Tensor, sampling: &Sampling, generator: &Generator) -> Result<Samples> {
        let sampling = Sampling {
            unconditional: sampling.unconditional.clone().or_else(|| self.options.unconditional.clone()),
            autocast: sampling.autocast.or(self.options.autocast),
            ..sampling.clone()
        };
        let Self { network, ema, params, .. } = self;
        params.evaluating(|| ema.evaluate(|| sample(network, scheduler, noise, &sampling, generator)))
    }

    /// Everything that the next step depends on.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let mut put = |prefix: &str, part: StateDict| state.extend(part.into_iter().map(|(name, x)| (format!("{prefix}.{name}"), x)));
        put("model", self.params.state_dict());
        put("adapter", self.params.adapter_state_dict());
        put("optimizer", self.optimizer.state_dict()?);
        put("ema", self.ema.state_dict()?);
        if let Some(scaler) = &self.scaler {
            put("scaler", scaler.state_dict()?);
        }
        let generators = [&self.noise, self.params.generator()].map(Generator::state);
        let counters = generators.iter().flat_map(|state| [state.seed as i64, state.offset as i64]);
        let counters = [self.steps as i64].into_iter().chain(counters).collect::<Vec<_>>();
        state.insert("trainer.counters".into(), Tensor::from_vec(counters, 5)?);
        Ok(state)
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape: then the state is of another model.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let part = |prefix: &str| -> StateDict {
            state.iter().filter_map(|(name, x)| Some((name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned(), x.clone()))).collect()
        };
        let missing = || Error::format("diffusion checkpoint", "trainer.counters is missing or no five numbers");
        let counters = state.get("trainer.counters").ok_or_else(missing)?.to_vec::<i64>()?;
        let [steps, noise_seed, noise_offset, seed, offset] = counters[..] else { return Err(missing()) };
        self.params.load_state_dict(&part("model"), LoadMode::Strict)?;
        self.params.load_adapter_state_dict(&part("adapter"), LoadMode::Strict)?;
        self.optimizer.load_state_dict(&part("optimizer"))?;
        self.ema.load_state_dict(&part("ema"))?;
        if let Some(scaler) = &mut self.scaler {
            scaler.load_state_dict(&part("scaler"))?;
        }
        self.noise.set_state(GeneratorState { seed: noise_seed as u64, offset: noise_offset as u64 });
        self.params.generator().set_state(GeneratorState { seed: seed as u64, offset: offset as u64 });
        self.steps = steps as u64;
        Ok(())
    }
}
