//! A set of weights that is being trained, whatever the loss: optimiser, rate, precision, clipping, and what resumes it.

use crate::nn::{LoadMode, Params, StateDict};
use crate::optim::{AdamW, AdamWOptions, Optimizer, Schedule};
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{DType, Error, Generator, Result, Tensor, with_autocast};

/// How weights are trained: Hugging Face's `TrainingArguments`, as far as they concern a step.
#[derive(Clone, Debug)]
pub struct TrainOptions {
    /// AdamW's learning rate.
    pub lr: f64,
    /// AdamW's decay rates.
    pub betas: (f64, f64),
    /// AdamW's ε.
    pub eps: f64,
    /// AdamW's decay of weights.
    pub weight_decay: f64,
    /// The norm that gradients are clipped to; infinity for none.
    pub max_grad_norm: f64,
    /// The parts that a batch passes in, one after the other: less memory, the same step up to rounding.
    pub gradient_accumulation_steps: usize,
    /// Products in bf16 (see [`autocast`](kiln_tensor::autocast)); weights and losses stay in f32.
    pub bf16: bool,
    /// Whether dropout rests while training.
    pub disable_dropout: bool,
    /// The factor of the rate at each step. Hugging Face's default is [`linear_decay`], which needs the number of steps; here it is constant.
    pub schedule: Schedule,
}

impl TrainOptions {
    /// Hugging Face's defaults at this rate: β 0.9 and 0.999, ε 1e-8, no decay, clipping at 1.
    pub fn new(lr: f64) -> Self {
        Self {
            lr,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            gradient_accumulation_steps: 1,
            bf16: false,
            disable_dropout: false,
            schedule: Schedule::constant(),
        }
    }

    /// Runs a forward pass in the precision asked for.
    pub(crate) fn autocast<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        with_autocast(self.bf16.then_some(DType::BF16), f)
    }
}

/// A rise from 0 over `warmup` steps, then a fall to 0 until step `steps` (Hugging Face's `get_linear_schedule_with_warmup`).
pub fn linear_decay(steps: u64, warmup: u64) -> Schedule {
    Schedule::lambda(move |t| {
        if t < warmup { t as f64 / warmup as f64 } else { steps.saturating_sub(t) as f64 / steps.saturating_sub(warmup).max(1) as f64 }
    })
}

/// What a step of the optimiser did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update {
    pub grad_norm: f64,
    pub lr: f64,
}

/// Weights with their optimiser.
pub(crate) struct Learner {
    op: &'static str,
    params: Params,
    options: TrainOptions,
    optimizer: AdamW,
    steps: u64,
}

impl Learner {
    /// Of the parameters that are not frozen, and of adapters.
    pub fn new(op: &'static str, params: &Params, options: &TrainOptions) -> Result<Self> {
        let trained = params.trainable();
        if trained.is_empty() {
            return Err(Error::argument(op, "all parameters of the model are frozen: there is nothing to train"));
        }
        let TrainOptions { lr, betas, eps, weight_decay, .. } = *options;
        let optimizer = AdamW::new(trained, AdamWOptions { lr, betas, eps, weight_decay, ..AdamWOptions::default() })?;
        Ok(Self { op, params: params.clone(), options: options.clone(), optimizer, steps: 0 })
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Prepares the backward passes of a step.
    pub fn begin(&mut self) -> Result<()> {
        self.optimizer.set_lr(self.options.lr * self.options.schedule.factor(self.steps))?;
        self.optimizer.zero_grad();
        if self.options.disable_dropout {
            self.params.eval()
        } else {
            self.params.train()
        }
        Ok(())
    }

    /// Ends a step whose loss was `loss`: the weights move along the gradients.
    pub fn finish(&mut self, loss: f64) -> Result<Update> {
        let step = self.steps + 1;
        if !loss.is_finite() {
            return Err(Error::argument(self.op, format!("the loss of step {step} is {loss}; lower the learning rate")));
        }
        let grad_norm = self.optimizer.step_clipped(self.options.max_grad_norm)?.item_f64()?;
        if !grad_norm.is_finite() {
            return Err(Error::argument(
                self.op,
                format!("the gradient of step {step} has a norm of {grad_norm}; lower the learning rate"),
            ));
        }
        self.optimizer.zero_grad();
        self.steps = step;
        Ok(Update { grad_norm, lr: self.optimizer.lr() })
    }

    /// Weights, adapters, optimiser, step, and the generator that dropout draws from.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        put(&mut state, "model", self.params.state_dict());
        put(&mut state, "adapter", self.params.adapter_state_dict());
        put(&mut state, "optimizer", self.optimizer.state_dict()?);
        put_counters(&mut state, "counters", &counters(self.steps, self.params.generator()))?;
        Ok(state)
    }

    /// Continues from [`state_dict`](Self::state_dict).
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let [steps, seed, offset] = get_counters(self.op, state, "counters")?;
        self.params.load_state_dict(&part(state, "model"), LoadMode::Strict)?;
        self.params.load_adapter_state_dict(&part(state, "adapter"), LoadMode::Strict)?;
        self.optimizer.load_state_dict(&part(state, "optimizer"))?;
        self.params.generator().set_state(GeneratorState { seed, offset });
        self.steps = steps;
        Ok(())
    }
}

/// A count and a generator's state, to save.
pub(super) fn counters(count: u64, generator: &Generator) -> [u64; 3] {
    let GeneratorState { seed, offset } = generator.state();
    [count, seed, offset]
}

/// Adds `tensors` as `prefix.…`.
pub(super) fn put(state: &mut StateDict, prefix: &str, tensors: StateDict) {
    state.extend(tensors.into_iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor)));
}

/// What is called `prefix.…`, without that.
pub(super) fn part(state: &StateDict, prefix: &str) -> StateDict {
    state.iter().filter_map(|(name, x)| Some((name.strip_prefix(prefix)?.strip_prefix('.')?.to_owned(), x.clone()))).collect()
}

/// Adds numbers, bit for bit.
pub(super) fn put_counters<const N: usize>(state: &mut StateDict, name: &str, numbers: &[u64; N]) -> Result<()> {
    state.insert(name.to_owned(), Tensor::from_vec(numbers.map(|x| x as i64).to_vec(), N)?);
    Ok(())
}

/// Reads what [`put_counters`] added.
pub(super) fn get_counters<const N: usize>(op: &str, state: &StateDict, name: &str) -> Result<[u64; N]> {
    let wrong = || Error::format(op, format!("the checkpoint's {name} are missing or not {N} numbers"));
    let numbers = state.get(name).ok_or_else(wrong)?.to_vec::<i64>()?;
    let numbers: [i64; N] = numbers.try_into().map_err(|_| wrong())?;
    Ok(numbers.map(|x| x as u64))
}
