//! Training of a language model: one optimiser step from one or several batches, and all the state that continues it bit for bit.

use super::{CausalLm, LmShape, Pass};
use crate::data::{IGNORE_INDEX, PackedBatch, TokenBatch};
use crate::nn::{LoadMode, Param, StateDict};
use crate::optim::{AdamW, AdamWOptions, GradScaler, GradScalerOptions, Optimizer, Schedule};
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{CrossEntropyOptions, DType, Error, Reduction, Result, Tensor, autocast, profile_scope};

/// How an [`LmTrainer`] trains.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LmTrainerOptions {
    /// AdamW's learning rate at its height.
    pub lr: f64,
    /// AdamW's decay rates.
    pub betas: (f64, f64),
    /// AdamW's ε.
    pub eps: f64,
    /// Decay of matrices; vectors (norms, biases) have none.
    pub weight_decay: f64,
    /// Steps of the whole run: the rate falls along a cosine until then.
    pub steps: u64,
    /// Steps of the linear rise before.
    pub warmup_steps: u64,
    /// The rate at the end, as a share of `lr`.
    pub min_lr: f64,
    /// The norm that gradients are clipped to.
    pub max_norm: f64,
    /// The half type of products (see [`autocast`]); `None` for f32 throughout. With f16 the loss is scaled.
    pub autocast: Option<DType>,
}

impl Default for LmTrainerOptions {
    /// GPT-2's and nanoGPT's: 6e-4, β 0.9 and 0.95, decay 0.1, clipping at 1, down to a tenth.
    fn default() -> Self {
        Self {
            lr: 6e-4,
            betas: (0.9, 0.95),
            eps: 1e-8,
            weight_decay: 0.1,
            steps: 1000,
            warmup_steps: 100,
            min_lr: 0.1,
            max_norm: 1.0,
            autocast: None,
        }
    }
}

/// Tokens and what is to follow each.
#[derive(Clone, Debug)]
pub struct LmBatch {
    /// i64 (B, T).
    pub tokens: Tensor,
    /// The next token at each place, i64 (B, T); [`IGNORE_INDEX`] where none is to be learned.
    pub targets: Tensor,
    /// Of packed sequences: the number of each token's (see [`Pass::segments`]).
    pub segments: Option<Tensor>,
}

impl From<TokenBatch> for LmBatch {
    fn from(batch: TokenBatch) -> Self {
        Self { tokens: batch.inputs, targets: batch.targets, segments: None }
    }
}

impl From<PackedBatch> for LmBatch {
    fn from(batch: PackedBatch) -> Self {
        Self { tokens: batch.inputs, targets: batch.targets, segments: Some(batch.segments) }
    }
}

impl LmBatch {
    fn pass(&self) -> Pass<'_> {
        Pass { segments: self.segments.as_ref(), ..Pass::default() }
    }

    /// Targets that count.
    fn num_targets(&self) -> Result<f64> {
        self.targets.ne_scalar(IGNORE_INDEX as f64)?.to_dtype(DType::F64)?.sum(())?.item_f64()
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LmStep {
    /// Mean loss of its tokens, in nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Tokens that it learned from.
    pub tokens: u64,
}

/// The sum of −log p(target) over a batch's places that count.
///
/// # Errors
/// If shapes or dtypes do not fit the model.
pub fn lm_loss_sum(model: &dyn CausalLm, batch: &LmBatch) -> Result<Tensor> {
    let options = CrossEntropyOptions { ignore_index: IGNORE_INDEX, reduction: Reduction::Sum, ..CrossEntropyOptions::default() };
    model.loss(&batch.tokens, &batch.targets, batch.pass(), &options)
}

/// Arithmetic of training on one token, forward and backward: 6 for each weight of a matrix product, 12 · layers · heads · hs · T for
/// the attention (half of it, if only the causal half is computed, is not deducted).
///
/// Source: Chowdhery et al., *PaLM*, 2022, appendix B.
pub fn training_flops_per_token(shape: LmShape, num_parameters: usize, sequence: usize) -> f64 {
    let attention = 12 * shape.num_layers * shape.num_heads * shape.head_dim * sequence;
    6.0 * num_parameters as f64 + attention as f64
}

/// A model with its optimiser and schedule.
pub struct LmTrainer<M> {
    model: M,
    options: LmTrainerOptions,
    optimizer: AdamW,
    schedule: Schedule,
    scaler: Option<GradScaler>,
    steps: u64,
}

impl<M: CausalLm> LmTrainer<M> {
    /// A trainer of the model's parameters that are not frozen, and of its adapters.
    ///
    /// # Errors
    /// If an option is out of its domain.
    pub fn new(model: M, options: LmTrainerOptions) -> Result<Self> {
        let AdamWOptions { amsgrad, .. } = AdamWOptions::default();
        let adam = AdamWOptions { lr: options.lr, betas: options.betas, eps: options.eps, weight_decay: options.weight_decay, amsgrad };
        let is_matrix = |param: &Param| param.shape().rank() >= 2;
        let (matrices, vectors): (Vec<_>, Vec<_>) = model.params().trainable().into_iter().partition(is_matrix);
        let mut optimizer = AdamW::new(matrices, adam)?;
        optimizer.add_group(vectors, AdamWOptions { weight_decay: 0.0, ..adam })?;
        let falling = Schedule::cosine(options.steps.saturating_sub(options.warmup_steps), options.min_lr);
        let scaler = options.autocast.filter(|&dtype| dtype == DType::F16).map(|_| GradScaler::new(GradScalerOptions::default()));
        Ok(Self { schedule: falling.with_warmup(options.warmup_steps), model, options, optimizer, scaler: scaler.transpose()?, steps: 0 })
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model alone.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The options it was made with.
    pub fn options(&self) -> &LmTrainerOptions {
        &self.options
    }

    fn loss_sum(&self, batch: &LmBatch) -> Result<Tensor> {
        match self.options.autocast {
            Some(dtype) => autocast(dtype, || lm_loss_sum(&self.model, batch))?,
            None => lm_loss_sum(&self.model, batch),
        }
    }

    /// One step from the mean loss over the tokens of all `batches`, which pass one after the other (gradient accumulation).
    ///
    /// # Errors
    /// If no target counts, or the loss or gradient is not finite (with f16: only the loss; a gradient that overflows costs the step).
    pub fn step(&mut self, batches: &[LmBatch]) -> Result<LmStep> {
        let counts = batches.iter().map(LmBatch::num_targets).collect::<Result<Vec<_>>>()?;
        let tokens: f64 = counts.iter().sum();
        if tokens == 0.0 {
            return Err(Error::argument("lm_trainer", "no token of the step has a target; check the loss mask and the batches"));
        }
        let lr = self.options.lr * self.schedule.factor(self.steps);
        self.optimizer.set_lr(lr)?;
        self.optimizer.zero_grad();
        let mut loss = 0.0;
        for batch in batches {
            let forward = profile_scope("forward");
            let part = self.loss_sum(batch)?.mul_scalar(1.0 / tokens)?;
            drop(forward);
            let _backward = profile_scope("backward");
            match &self.scaler {
                Some(scaler) => scaler.scale(&part)?.backward()?,
                None => part.backward()?,
            }
            loss += part.item_f64()?;
        }
        if !loss.is_finite() {
            return Err(Error::argument("lm_trainer", format!("the loss of step {} is {loss}; lower the learning rate", self.steps + 1)));
        }
        let grad_norm = self.update()?;
        self.steps += 1;
        Ok(LmStep { loss, grad_norm, lr, tokens: tokens as u64 })
    }

    fn update(&mut self) -> Result<f64> {
        let _scope = profile_scope("optimizer");
        if let Some(scaler) = &mut self.scaler {
            let params = self.model.params().trainable();
            // The step leaves the gradients scaled, and may change the scale.
            let norm = crate::optim::grad_norm(&params)? / scaler.current_scale();
            scaler.step_clipped(&mut self.optimizer, &params, self.options.max_norm)?;
            scaler.update()?;
            return Ok(norm);
        }
        let norm = self.optimizer.step_clipped(self.options.max_norm)?.item_f64()?;
        if !norm.is_finite() {
            let message = format!("the gradient of step {} has a norm of {norm}; lower the learning rate", self.steps + 1);
            return Err(Error::argument("lm_trainer", message));
        }
        Ok(norm)
    }

    /// The mean loss of the tokens of `batches`, without dropout and gradient.
    ///
    /// # Errors
    /// If no target counts.
    pub fn evaluate(&self, batches: &[LmBatch]) -> Result<f64> {
        let sum = |batch: &LmBatch| Ok((self.loss_sum(batch)?.item_f64()?, batch.num_targets()?));
        let sums = || batches.iter().map(sum).collect::<Result<Vec<(f64, f64)>>>();
        let sums = self.model.params().evaluating(|| no_grad(sums))?;
        let (loss, count) = sums.into_iter().fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        if count == 0.0 {
            return Err(Error::argument("lm_trainer", "there is no token to evaluate on"));
        }
        Ok(loss / count)
    }

    /// Everything that the next step depends on.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        let mut put = |prefix: &str, part: StateDict| state.extend(part.into_iter().map(|(name, x)| (format!("{prefix}.{name}"), x)));
        put("model", self.model.params().state_dict());
        put("adapter", self.model.params().adapter_state_dict());
        put("optimizer", self.optimizer.state_dict()?);
        if let Some(scaler) = &self.scaler {
            put("scaler", scaler.state_dict()?);
        }
        let GeneratorState { seed, offset } = self.model.params().generator().state();
        let counters = vec![self.steps as i64, seed as i64, offset as i64];
        state.insert("trainer.counters".into(), Tensor::from_vec(counters, 3)?);
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
        let missing = || Error::format("lm checkpoint", "trainer.counters is missing or no three numbers");
        let counters = state.get("trainer.counters").ok_or_else(missing)?.to_vec::<i64>()?;
        let [steps, seed, offset] = counters[..] else { return Err(missing()) };
        self.model.params().load_state_dict(&part("model"), LoadMode::Strict)?;
        self.model.params().load_adapter_state_dict(&part("adapter"), LoadMode::Strict)?;
        self.optimizer.load_state_dict(&part("optimizer"))?;
        if let Some(scaler) = &mut self.scaler {
            scaler.load_state_dict(&part("scaler"))?;
        }
        self.model.params().generator().set_state(GeneratorState { seed: seed as u64, offset: offset as u64 });
        self.steps = steps as u64;
        Ok(())
    }
}
