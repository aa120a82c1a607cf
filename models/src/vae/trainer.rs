//! One training step of an autoencoder, with or without a discriminator, and all the state that continues a run bit for bit.

use super::loss::{Features, ReconstructionLoss, adaptive_weight, perceptual_loss};
use super::{AutoencoderKl, DiagonalGaussian, DigitVae, PatchGan, PatchGanConfig, VqVae};
use crate::gan::{GanLoss, initialise};
use crate::nn::{LoadMode, Module, Params, ParamsOptions, StateDict};
use crate::optim::{Adam, AdamOptions, Optimizer, Schedule};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{Error, Generator, Result, Tensor, profile_scope};

/// What an autoencoder makes of pictures in training.
#[derive(Clone, Debug)]
pub struct Reconstruction {
    /// The pictures again, (B, C, H, W).
    pub output: Tensor,
    /// The scalar that the latents cost, per element of a picture: the divergence or the codebook's loss.
    pub penalty: Tensor,
}

/// An autoencoder that a [`VaeTrainer`] trains.
pub trait Autoencoder {
    /// The reconstruction of pictures `x`, and what their latents cost; noise comes from `generator`.
    ///
    /// # Errors
    /// If the shape does not fit.
    fn reconstruct(&self, x: &Tensor, generator: &Generator) -> Result<Reconstruction>;

    /// The weight of the last layer, which balances an adversarial loss.
    fn last_weight(&self) -> Tensor;
}

/// The mean divergence of a picture's latents from N(0, 1), per element of the picture: in the unit of a mean over pixels.
fn divergence(posterior: &DiagonalGaussian, x: &Tensor) -> Result<Tensor> {
    let elements = x.numel() / x.dim(0)?.max(1);
    posterior.kl()?.mean(())?.mul_scalar(1.0 / elements.max(1) as f64)
}

impl Autoencoder for AutoencoderKl {
    fn reconstruct(&self, x: &Tensor, generator: &Generator) -> Result<Reconstruction> {
        let (output, posterior) = AutoencoderKl::reconstruct(self, x, generator)?;
        Ok(Reconstruction { output, penalty: divergence(&posterior, x)? })
    }

    fn last_weight(&self) -> Tensor {
        AutoencoderKl::last_weight(self)
    }
}

impl Autoencoder for DigitVae {
    fn reconstruct(&self, x: &Tensor, generator: &Generator) -> Result<Reconstruction> {
        let posterior = self.encode(x)?;
        Ok(Reconstruction { output: self.decode(&posterior.sample(generator)?)?, penalty: divergence(&posterior, x)? })
    }

    fn last_weight(&self) -> Tensor {
        DigitVae::last_weight(self)
    }
}

impl Autoencoder for VqVae {
    fn reconstruct(&self, x: &Tensor, _: &Generator) -> Result<Reconstruction> {
        let (output, quantized) = self.forward(x)?;
        Ok(Reconstruction { output, penalty: quantized.loss })
    }

    fn last_weight(&self) -> Tensor {
        VqVae::last_weight(self)
    }
}

/// A discriminator beside the autoencoder.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdversarialOptions {
    /// The discriminator.
    pub model: PatchGanConfig,
    /// Weight of the adversarial loss, on top of the [`adaptive_weight`].
    pub weight: f64,
    /// The step from which on it is trained and heeded: a reconstruction must be good before it can be judged.
    pub start: u64,
}

/// How a [`VaeTrainer`] trains.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct VaeTrainerOptions {
    /// Adam's learning rate at its height, for both networks.
    pub lr: f64,
    /// Adam's decay rates.
    pub betas: (f64, f64),
    /// Steps of the whole run, over which the rate falls along a cosine to a tenth; `None`: it stays.
    pub steps: Option<u64>,
    /// The norm that the autoencoder's gradients are clipped to.
    pub max_norm: f64,
    /// The distance of pixels.
    pub reconstruction: ReconstructionLoss,
    /// Weight of what the latents cost. For a divergence beside the squared error it is 2σ², twice the variance that pixels are taken to
    /// have about the reconstruction.
    pub penalty_weight: f64,
    /// Weight of the perceptual loss, where there are [features](VaeTrainer::with_features).
    pub perceptual_weight: f64,
    /// The discriminator; `None`: no adversarial loss.
    pub adversarial: Option<AdversarialOptions>,
}

impl Default for VaeTrainerOptions {
    /// Squared error with σ² = 0.05, Adam at 1e-3 with β 0.9 and 0.999, clipping at 1, no adversarial loss.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            betas: (0.9, 0.999),
            steps: None,
            max_norm: 1.0,
            reconstruction: ReconstructionLoss::Mse,
            penalty_weight: 0.1,
            perceptual_weight: 1.0,
            adversarial: None,
        }
    }
}

/// What a step minimised.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct VaeStep {
    /// The autoencoder's whole loss.
    pub loss: f64,
    /// The distance of pixels.
    pub reconstruction: f64,
    /// What the latents cost, before its weight.
    pub penalty: f64,
    /// The perceptual loss, before its weight; 0 without features.
    pub perceptual: f64,
    /// −mean D(output); 0 before the discriminator starts.
    pub adversarial: f64,
    /// The factor of the adversarial loss.
    pub adversarial_weight: f64,
    /// The discriminator's loss; 0 before it starts.
    pub discriminator: f64,
    /// Norm of the autoencoder's gradient before clipping.
    pub grad_norm: f64,
}

/// The discriminator with its optimiser.
struct Critic {
    params: Params,
    model: PatchGan,
    optimizer: Adam,
    options: AdversarialOptions,
}

impl Critic {
    fn new(options: AdversarialOptions, adam: AdamOptions, autoencoder: &Params) -> Result<Self> {
        let own = autoencoder.options();
        let params = Params::with(ParamsOptions { dtype: own.dtype, device: own.device, generator: autoencoder.generator().clone() });
        let model = PatchGan::new(&params, options.model)?;
        initialise(&params)?;
        Ok(Self { optimizer: Adam::new(params.params(), adam)?, params, model, options })
    }

    /// −mean D(`output`). The discriminator only judges here: its weights get no gradients.
    fn judge(&self, output: &Tensor) -> Result<Tensor> {
        self.params.while_frozen(|| self.model.forward(output).and_then(|score| GanLoss::Hinge.generator(&score)))
    }

    /// A step on ½ (mean max(0, 1 − D(real)) + mean max(0, 1 + D(fake))).
    fn train(&mut self, real: &Tensor, fake: &Tensor) -> Result<f64> {
        self.params.zero_grad();
        let (real, fake) = (self.model.forward(real)?, self.model.forward(fake)?);
        let loss = GanLoss::Hinge.discriminator(&real, &fake)?.mul_scalar(0.5)?;
        loss.backward()?;
        self.optimizer.step()?;
        loss.item_f64()
    }
}

/// An autoencoder with its optimiser, and the discriminator with its own.
///
/// The loss is reconstruction + penalty_weight · penalty + perceptual_weight · perceptual + w · λ · adversarial, with λ the
/// [`adaptive_weight`] (Esser et al. 2021, Rombach et al. 2022).
pub struct VaeTrainer<M> {
    model: M,
    params: Params,
    options: VaeTrainerOptions,
    optimizer: Adam,
    schedule: Schedule,
    critic: Option<Critic>,
    features: Option<Features>,
    steps: u64,
}

impl<M: Autoencoder> VaeTrainer<M> {
    /// A trainer of `model`, whose weights are those of `params`. Noise comes from the generator of `params`.
    ///
    /// # Errors
    /// If an option is out of its domain.
    pub fn new(model: M, params: Params, options: VaeTrainerOptions) -> Result<Self> {
        for (name, weight) in [("penalty_weight", options.penalty_weight), ("perceptual_weight", options.perceptual_weight)] {
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(Error::argument("VaeTrainer", format!("{name} = {weight}, expected a finite value ≥ 0")));
            }
        }
        let adam = AdamOptions { lr: options.lr, betas: options.betas, ..AdamOptions::default() };
        let critic = options.adversarial.map(|adversarial| Critic::new(adversarial, adam, &params)).transpose()?;
        let optimizer = Adam::new(params.trainable(), adam)?;
        let schedule = options.steps.map_or_else(Schedule::constant, |steps| Schedule::cosine(steps, 0.1));
        Ok(Self { model, params, options, optimizer, schedule, critic, features: None, steps: 0 })
    }

    /// With a perceptual loss in these features.
    pub fn with_features(mut self, features: Features) -> Self {
        self.features = Some(features);
        self
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The options it was made with.
    pub fn options(&self) -> &VaeTrainerOptions {
        &self.options
    }

    /// The autoencoder.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The autoencoder's weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// What `f` makes of the autoencoder in evaluation mode, without recording: nothing that the next step depends on changes.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn evaluate<R>(&self, f: impl FnOnce(&M) -> Result<R>) -> Result<R> {
        self.params.evaluating(|| no_grad(|| f(&self.model)))
    }

    /// One step on pictures (B, C, H, W) in [−1, 1].
    ///
    /// # Errors
    /// If the shape does not fit, or the loss is not finite.
    pub fn step(&mut self, x: &Tensor) -> Result<VaeStep> {
        let lr = self.options.lr * self.schedule.factor(self.steps);
        self.optimizer.set_lr(lr)?;
        let (mut step, output) = self.train_autoencoder(x)?;
        if let Some(critic) = self.critic.as_mut().filter(|critic| self.steps >= critic.options.start) {
            let _scope = profile_scope("discriminator");
            critic.optimizer.set_lr(lr)?;
            step.discriminator = critic.train(x, &output.detach())?;
        }
        self.steps += 1;
        Ok(step)
    }

    fn train_autoencoder(&mut self, x: &Tensor) -> Result<(VaeStep, Tensor)> {
        let _scope = profile_scope("autoencoder");
        self.optimizer.zero_grad();
        let options = &self.options;
        let Reconstruction { output, penalty } = self.model.reconstruct(x, self.params.generator())?;
        let reconstruction = options.reconstruction.of(&output, x)?;
        let mut likeness = reconstruction.clone();
        let mut perceptual = 0.0;
        if let Some(features) = &self.features {
            let distance = perceptual_loss(features, &output, x)?;
            perceptual = distance.item_f64()?;
            likeness = likeness.add(&distance.mul_scalar(options.perceptual_weight)?)?;
        }
        let mut loss = likeness.add(&penalty.mul_scalar(options.penalty_weight)?)?;
        let (mut adversarial, mut adversarial_weight) = (0.0, 0.0);
        if let Some(critic) = self.critic.as_ref().filter(|critic| self.steps >= critic.options.start) {
            let judgement = critic.judge(&output)?;
            adversarial = judgement.item_f64()?;
            adversarial_weight = critic.options.weight * adaptive_weight(&likeness, &judgement, &self.model.last_weight())?;
            loss = loss.add(&judgement.mul_scalar(adversarial_weight)?)?;
        }
        let value = loss.item_f64()?;
        if !value.is_finite() {
            return Err(Error::argument("VaeTrainer", format!("the loss of step {} is {value}; lower the learning rate", self.steps + 1)));
        }
        loss.backward()?;
        let grad_norm = self.optimizer.step_clipped(options.max_norm)?.item_f64()?;
        let (reconstruction, penalty) = (reconstruction.item_f64()?, penalty.item_f64()?);
        let step =
            VaeStep { loss: value, reconstruction, penalty, perceptual, adversarial, adversarial_weight, discriminator: 0.0, grad_norm };
        Ok((step, output))
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
        if let Some(critic) = &self.critic {
            put("discriminator", critic.params.state_dict());
            put("discriminator_optimizer", critic.optimizer.state_dict()?);
        }
        let GeneratorState { seed, offset } = self.params.generator().state();
        state.insert("trainer.counters".into(), Tensor::from_vec(vec![self.steps as i64, seed as i64, offset as i64], 3)?);
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
        let missing = || Error::format("vae checkpoint", "trainer.counters is missing or no three numbers");
        let counters = state.get("trainer.counters").ok_or_else(missing)?.to_vec::<i64>()?;
        let [steps, seed, offset] = counters[..] else { return Err(missing()) };
        self.params.load_state_dict(&part("model"), LoadMode::Strict)?;
        self.params.load_adapter_state_dict(&part("adapter"), LoadMode::Strict)?;
        self.optimizer.load_state_dict(&part("optimizer"))?;
        if let Some(critic) = &mut self.critic {
            critic.params.load_state_dict(&part("discriminator"), LoadMode::Strict)?;
            critic.optimizer.load_state_dict(&part("discriminator_optimizer"))?;
        }
        self.params.generator().set_state(GeneratorState { seed: seed as u64, offset: offset as u64 });
        self.steps = steps as u64;
        Ok(())
    }
}
