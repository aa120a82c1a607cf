//! One training step of generator and discriminator, and all the state that a run must save to continue bit for bit.

use super::{DcganConfig, DcganDiscriminator, DcganGenerator, GanLoss, gradient_penalty};
use crate::nn::{Init, LoadMode, Params, ParamsOptions, StateDict};
use crate::optim::{Adam, AdamOptions, Optimizer};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{DType, Generator, Result, Tensor, generator::GeneratorState, profile_scope};

/// How a [`GanTrainer`] trains.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GanTrainerOptions {
    /// The networks.
    pub model: DcganConfig,
    /// The objectives.
    pub loss: GanLoss,
    /// Adam's learning rate, for both.
    pub lr: f64,
    /// Adam's decay rates.
    pub betas: (f64, f64),
    /// The generator is trained at every `critic_steps`th step of the discriminator.
    pub critic_steps: u64,
    /// Weight of the gradient penalty (wgan-gp only).
    pub penalty: f64,
    /// Seed of the weights and of all noise.
    pub seed: u64,
    /// Dtype of the weights.
    pub dtype: DType,
}

impl GanTrainerOptions {
    /// The published settings for `loss`: DCGAN's for bce and hinge (2e-4, β 0.5 and 0.999), those of WGAN-GP (1e-4, β 0 and
    /// 0.9, five critic steps, penalty 10, no batch norm in the critic) for wgan-gp.
    pub fn new(loss: GanLoss, classes: Option<usize>, seed: u64) -> Self {
        let wasserstein = loss == GanLoss::WganGp;
        Self {
            model: DcganConfig { classes, discriminator_norm: !wasserstein, ..DcganConfig::default() },
            loss,
            lr: if wasserstein { 1e-4 } else { 2e-4 },
            betas: if wasserstein { (0.0, 0.9) } else { (0.5, 0.999) },
            critic_steps: if wasserstein { 5 } else { 1 },
            penalty: 10.0,
            seed,
            dtype: DType::F32,
        }
    }
}

/// What a step minimised.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct StepLosses {
    /// The discriminator's loss, the penalty included.
    pub discriminator: f64,
    /// The generator's loss; of the last step that trained it, 0 before the first.
    pub generator: f64,
}

/// Both networks with their optimisers and the source of noise.
pub struct GanTrainer {
    options: GanTrainerOptions,
    generator_params: Params,
    discriminator_params: Params,
    generator: DcganGenerator,
    discriminator: DcganDiscriminator,
    generator_optimizer: Adam,
    discriminator_optimizer: Adam,
    noise: Generator,
    steps: u64,
    last_generator_loss: f64,
}

impl GanTrainer {
    /// Fresh networks.
    pub fn new(options: GanTrainerOptions) -> Result<Self> {
        let noise = Generator::new(options.seed);
        let scope = || Params::with(ParamsOptions { dtype: options.dtype, generator: noise.clone(), ..ParamsOptions::default() });
        let (generator_params, discriminator_params) = (scope(), scope());
        let generator = DcganGenerator::new(&generator_params, options.model)?;
        let discriminator = DcganDiscriminator::new(&discriminator_params, options.model)?;
        initialise(&generator_params)?;
        initialise(&discriminator_params)?;
        let adam = AdamOptions { lr: options.lr, betas: options.betas, ..AdamOptions::default() };
        Ok(Self {
            generator_optimizer: Adam::new(generator_params.params(), adam)?,
            discriminator_optimizer: Adam::new(discriminator_params.params(), adam)?,
            options,
            generator_params,
            discriminator_params,
            generator,
            discriminator,
            noise,
            steps: 0,
            last_generator_loss: 0.0,
        })
    }

    /// Steps of the discriminator so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The options it was made with.
    pub fn options(&self) -> &GanTrainerOptions {
        &self.options
    }

    /// The weights of the generator.
    pub fn generator_params(&self) -> &Params {
        &self.generator_params
    }

    /// The weights of the discriminator.
    pub fn discriminator_params(&self) -> &Params {
        &self.discriminator_params
    }

    /// One step on real pictures (B, 1, 28, 28) in [-1, 1], with `labels` (B) for a conditional model.
    pub fn step(&mut self, real: &Tensor, labels: Option<&Tensor>) -> Result<StepLosses> {
        let batch = real.dim(0)?;
        let noise = self.noise.randn([batch, self.options.model.latent], real.dtype())?;
        self.step_from(real, labels, &noise)
    }

    /// [`step`](GanTrainer::step) from given noise (B, latent).
    pub fn step_from(&mut self, real: &Tensor, labels: Option<&Tensor>, noise: &Tensor) -> Result<StepLosses> {
        let trains_generator = (self.steps + 1).is_multiple_of(self.options.critic_steps.max(1));
        let drawing = profile_scope("draw");
        let fake =
            if trains_generator { self.generator.forward(noise, labels)? } else { no_grad(|| self.generator.forward(noise, labels))? };
        drop(drawing);
        let discriminator = self.train_discriminator(real, &fake.detach(), labels)?;
        if trains_generator {
            self.last_generator_loss = self.train_generator(&fake, labels)?;
        }
        self.steps += 1;
        Ok(StepLosses { discriminator, generator: self.last_generator_loss })
    }

    fn train_discriminator(&mut self, real: &Tensor, fake: &Tensor, labels: Option<&Tensor>) -> Result<f64> {
        let _scope = profile_scope("discriminator");
        self.discriminator_params.zero_grad();
        let score = |pictures: &Tensor| self.discriminator.forward(pictures, labels);
        let mut loss = self.options.loss.discriminator(&score(real)?, &score(fake)?)?;
        if self.options.loss == GanLoss::WganGp {
            let mix = self.noise.rand([real.dim(0)?, 1, 1, 1], real.dtype())?;
            loss = loss.add(&gradient_penalty(score, real, fake, &mix)?.mul_scalar(self.options.penalty)?)?;
        }
        loss.backward()?;
        self.discriminator_optimizer.step()?;
        loss.item_f64()
    }

    fn train_generator(&mut self, fake: &Tensor, labels: Option<&Tensor>) -> Result<f64> {
        let _scope = profile_scope("generator");
        self.generator_params.zero_grad();
        let score = || self.discriminator.forward(fake, labels).and_then(|score| self.options.loss.generator(&score));
        let loss = self.discriminator_params.while_frozen(score)?;
        loss.backward()?;
        self.generator_optimizer.step()?;
        loss.item_f64()
    }

    /// Pictures from `noise` with the running statistics of the batch norms, as (B, 1, 28, 28) in (-1, 1).
    pub fn sample(&self, noise: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        self.generator_params.evaluating(|| no_grad(|| self.generator.forward(noise, labels)))
    }

    /// Everything that the next step depends on.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let mut put =
            |prefix: &str, part: StateDict| state.extend(part.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
        put("generator", self.generator_params.state_dict());
        put("discriminator", self.discriminator_params.state_dict());
        put("generator_optimizer", self.generator_optimizer.state_dict()?);
        put("discriminator_optimizer", self.discriminator_optimizer.state_dict()?);
        let GeneratorState { seed, offset } = self.noise.state();
        state.insert("trainer.counters".into(), Tensor::from_vec(vec![self.steps as i64, seed as i64, offset as i64], 3)?);
        state.insert("trainer.generator_loss".into(), Tensor::from_vec(vec![self.last_generator_loss], 1)?);
        Ok(state)
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape: then the state is of another model.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let part = |prefix: &str| -> StateDict {
            let prefix = format!("{prefix}.");
            state.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor.clone()))).collect()
        };
        self.generator_params.load_state_dict(&part("generator"), LoadMode::Strict)?;
        self.discriminator_params.load_state_dict(&part("discriminator"), LoadMode::Strict)?;
        self.generator_optimizer.load_state_dict(&part("generator_optimizer"))?;
        self.discriminator_optimizer.load_state_dict(&part("discriminator_optimizer"))?;
        let trainer = part("trainer");
        let missing = |name: &str| kiln_tensor::Error::format("gan checkpoint", format!("trainer.{name} is missing or malformed"));
        let counters = trainer.get("counters").ok_or_else(|| missing("counters"))?.to_vec::<i64>()?;
        let [steps, seed, offset] = counters[..] else { return Err(missing("counters")) };
        self.steps = steps as u64;
        self.noise.set_state(GeneratorState { seed: seed as u64, offset: offset as u64 });
        self.last_generator_loss = trainer.get("generator_loss").ok_or_else(|| missing("generator_loss"))?.item()?;
        Ok(())
    }
}

/// The published start: weights of matrices and kernels from N(0, 0.02²), scales of batch norms from N(1, 0.02²), biases 0.
pub(crate) fn initialise(params: &Params) -> Result<()> {
    for param in params.params() {
        let is_weight = param.name().ends_with("weight");
        let is_scale = is_weight && param.shape().rank() == 1;
        let init = if is_weight { Init::Normal { mean: if is_scale { 1.0 } else { 0.0 }, std: 0.02 } } else { Init::Zeros };
        param.set(&init.make(&param.shape(), params.options(), params.generator())?)?;
    }
    Ok(())
}
