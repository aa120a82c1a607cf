//! Proximal policy optimisation of a language model with a value model, and scores that the caller computes, e.g. with a reward model.

use super::batch::{TokenBatch, learned, parts};
use super::grpo::expect_temperature;
use super::learner::{Learner, TrainOptions, counters, get_counters, part, put, put_counters};
use super::reward::ValueModel;
use super::rollout::{Completion, Rollout, RolloutRequest, mean, next_seed, shuffled};
use crate::align::logprobs::{KlEstimator, masked_mean, masked_sum, whiten};
use crate::align::ppo::{gae, policy_loss, token_rewards, value_loss};
use crate::data::TokenSequence;
use crate::nn::StateDict;
use crate::transformer::CausalLm;
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{Error, Generator, Result, Tensor};
use std::sync::Arc;

/// The price of a nat of KL to the reference.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum KlControl {
    /// The same throughout.
    Fixed(f64),
    /// Starts at `init` and moves so that the KL of an answer comes to `target`: after a round of n answers it is multiplied by 1 + e·n/`horizon`, e
    /// being KL/`target` − 1 held in ±0.2 (Ziegler et al. 2019).
    Adaptive {
        /// The price at first.
        init: f64,
        /// The KL of an answer to come to, in nats.
        target: f64,
        /// Answers over which the price moves.
        horizon: f64,
    },
}

impl KlControl {
    fn first(self) -> f64 {
        match self {
            KlControl::Fixed(price) | KlControl::Adaptive { init: price, .. } => price,
        }
    }

    /// The price after a round of `answers`, whose KL was `kl` on average.
    fn next(self, price: f64, kl: f64, answers: usize) -> f64 {
        match self {
            KlControl::Fixed(_) => price,
            KlControl::Adaptive { target, horizon, .. } => price * (1.0 + (kl / target - 1.0).clamp(-0.2, 0.2) * answers as f64 / horizon),
        }
    }

    fn check(self) -> Result<()> {
        let numbers = match self {
            KlControl::Fixed(price) => [price, 1.0, 1.0],
            KlControl::Adaptive { init, target, horizon } => [init, target, horizon],
        };
        let [price, target, horizon] = numbers;
        if numbers.iter().all(|x| x.is_finite()) && price >= 0.0 && target > 0.0 && horizon > 0.0 {
            return Ok(());
        }
        Err(Error::argument("ppo", format!("{self:?}: expected a price ≥ 0, and a target and a horizon > 0")))
    }
}

/// How a [`PpoTrainer`] trains.
#[derive(Clone, Debug)]
pub struct PpoOptions {
    /// How the weights of the policy and of the value model are trained.
    pub train: TrainOptions,
    /// The value model's learning rate, if it is another.
    pub value_lr: Option<f64>,
    /// How often each batch of answers is learned from.
    pub num_ppo_epochs: usize,
    /// Optimiser steps of an epoch.
    pub num_mini_batches: usize,
    /// The price of leaving the reference.
    pub kl: KlControl,
    /// How the KL of a token is estimated: k1 or k3.
    pub kl_estimator: KlEstimator,
    /// Taken from the score of an answer that did not come to an end.
    pub missing_eos_penalty: Option<f64>,
    /// Whether rewards are scaled to variance 1 within the batch.
    pub whiten_rewards: bool,
    /// ε of the policy's loss.
    pub cliprange: f64,
    /// ε of the value's loss.
    pub cliprange_value: f64,
    /// The weight of the value's loss.
    pub vf_coef: f64,
    /// γ: what a later reward is worth.
    pub gamma: f64,
    /// λ of the advantage estimation.
    pub lambda: f64,
    /// What logits are divided by, in draws and in losses.
    pub temperature: f64,
    /// Tokens of an answer at most.
    pub response_length: usize,
    /// Of the draws and the order of answers.
    pub seed: u64,
}

impl Default for PpoOptions {
    /// TRL's: a rate of 5e-5, no dropout, four epochs of one step, price 0.05, ranges 0.2, γ 1, λ 0.95, temperature 0.7, 53 tokens. Gradients are
    /// clipped at 1, each model's on its own; TRL clips none here.
    fn default() -> Self {
        Self {
            train: TrainOptions { disable_dropout: true, ..TrainOptions::new(5e-5) },
            value_lr: None,
            num_ppo_epochs: 4,
            num_mini_batches: 1,
            kl: KlControl::Fixed(0.05),
            kl_estimator: KlEstimator::K1,
            missing_eos_penalty: None,
            whiten_rewards: false,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            gamma: 1.0,
            lambda: 0.95,
            temperature: 0.7,
            response_length: 53,
            seed: 42,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct PpoMetrics {
    /// The mean score, without price and penalty.
    pub score: f64,
    /// The mean over answers of the KL to the reference, summed over tokens.
    pub kl: f64,
    /// The price of it in this round.
    pub kl_coef: f64,
    /// The mean over answers of the sum of their tokens' rewards, before whitening.
    pub reward: f64,
    /// −mean log π of the answers' tokens: an estimate of the entropy.
    pub entropy: f64,
    /// The policy's loss, averaged over the optimiser's steps.
    pub policy_loss: f64,
    /// The value's loss, averaged over the optimiser's steps.
    pub value_loss: f64,
    /// The share of tokens at which the policy's loss was clipped.
    pub clip_fraction: f64,
    /// The share of tokens at which the value's loss was clipped.
    pub value_clip_fraction: f64,
    /// ½ mean (log π − log π_old)²: how far the steps of this round went.
    pub approx_kl: f64,
    /// The mean number of tokens of an answer.
    pub length: f64,
    /// The share of answers that came to an end.
    pub finished: f64,
    /// The norm of the policy's gradient before clipping, of the last step.
    pub grad_norm: f64,
    /// The learning rate, of the last step.
    pub lr: f64,
}

/// Trains a policy and a value model on the scores of the policy's own answers: [`policy_loss`] + `vf_coef` · [`value_loss`].
pub struct PpoTrainer {
    policy: Arc<dyn CausalLm>,
    reference: Arc<dyn CausalLm>,
    value: ValueModel,
    options: PpoOptions,
    policy_learner: Learner,
    value_learner: Learner,
    generator: Generator,
    kl_coef: f64,
}

/// A batch of answers, as the losses read it: tensors are (B, T − 1).
struct Experience {
    samples: Vec<TokenSequence>,
    width: usize,
    log_probs: Tensor,
    values: Tensor,
    advantages: Tensor,
    returns: Tensor,
}

impl PpoTrainer {
    /// A trainer of the parameters of policy and value model that are not frozen. The `reference` is a model of its own, with the weights that
    /// the policy has at first; the value model shares none with the policy.
    ///
    /// # Errors
    /// If all parameters of a model are frozen, or an option is out of its range.
    pub fn new(policy: Arc<dyn CausalLm>, reference: Arc<dyn CausalLm>, value: ValueModel, options: PpoOptions) -> Result<Self> {
        options.kl.check()?;
        expect_temperature("ppo", options.temperature)?;
        let value_options = TrainOptions { lr: options.value_lr.unwrap_or(options.train.lr), ..options.train.clone() };
        Ok(Self {
            policy_learner: Learner::new("ppo", policy.params(), &options.train)?,
            value_learner: Learner::new("ppo", value.params(), &value_options)?,
            generator: Generator::new(options.seed),
            kl_coef: options.kl.first(),
            policy,
            reference,
            value,
            options,
        })
    }

    /// Optimiser steps so far.
    pub fn steps(&self) -> u64 {
        self.policy_learner.steps()
    }

    /// The value model.
    pub fn value_model(&self) -> &ValueModel {
        &self.value
    }

    /// The present price of a nat of KL.
    pub fn kl_coef(&self) -> f64 {
        self.kl_coef
    }

    /// One round: an answer to each prompt, their scores, and the optimiser's steps.
    ///
    /// `generate` draws an answer to each prompt of the request from the policy; `score` judges each answer, from prompts and answers in the same
    /// order.
    ///
    /// # Errors
    /// If there are no prompts or one is empty, `generate` or `score` fail or return another number than asked for, no answer has a token, a text
    /// is longer than the model's context, or a score or a loss is not finite.
    pub fn step(
        &mut self,
        prompts: &[Vec<u32>],
        generate: impl FnMut(&dyn CausalLm, &RolloutRequest<'_>) -> Result<Vec<Completion>>,
        score: impl FnMut(&[Vec<u32>], &[Completion]) -> Result<Vec<f64>>,
    ) -> Result<PpoMetrics> {
        let request = RolloutRequest {
            prompts,
            max_new_tokens: self.options.response_length,
            temperature: self.options.temperature,
            seed: next_seed(&self.generator),
        };
        let rollout = Rollout::collect("ppo", &*self.policy, &request, generate, score)?;
        let (experience, mut metrics) = self.experience(&rollout)?;
        self.optimise(&experience, &mut metrics)?;
        self.kl_coef = self.options.kl.next(self.kl_coef, metrics.kl, rollout.scores.len());
        Ok(metrics)
    }

    /// Log-probabilities and values of the answers before the first step, and what follows from them.
    fn experience(&self, rollout: &Rollout) -> Result<(Experience, PpoMetrics)> {
        let options = &self.options;
        let samples = rollout.samples.clone();
        if samples.iter().all(|sample| learned(sample) == 0) {
            return Err(Error::argument("ppo", "no answer has a token"));
        }
        let width = samples.iter().map(|sample| sample.len()).max().unwrap_or(0);
        let log_probs = |model: &dyn CausalLm| self.of_all(&samples, width, |batch| batch.log_probs(model, options.temperature));
        let quietly = |model: &Arc<dyn CausalLm>| model.params().evaluating(|| no_grad(|| log_probs(&**model)));
        let (old, reference) = (quietly(&self.policy)?, quietly(&self.reference)?);
        let values = self.value.params().evaluating(|| no_grad(|| self.of_all(&samples, width, |batch| self.values(batch))))?;
        let mask = TokenBatch::new("ppo", &*self.policy, &samples.iter().collect::<Vec<_>>(), Some(width))?.mask;
        let kl = options.kl_estimator.estimate(&old, &reference)?;
        let scores = self.penalised(rollout);
        let scores = Tensor::from_vec(scores, rollout.scores.len())?.to_dtype(kl.dtype())?.to_device(kl.device())?;
        let rewards = token_rewards(&kl, &scores, &mask, self.kl_coef)?;
        let metrics = PpoMetrics {
            score: mean(rollout.scores.iter().copied()),
            kl: masked_sum(&kl, &mask, 1)?.mean(())?.item_f64()?,
            kl_coef: self.kl_coef,
            reward: rewards.sum(1)?.mean(())?.item_f64()?,
            entropy: -masked_mean(&old, &mask, ())?.item_f64()?,
            length: rollout.mean_length(),
            finished: rollout.finished(),
            ..PpoMetrics::default()
        };
        let rewards = if options.whiten_rewards { whiten(&rewards, &mask, false)? } else { rewards };
        let (advantages, returns) = gae(&rewards, &values, &mask, options.gamma, options.lambda)?;
        let advantages = whiten(&advantages, &mask, true)?;
        Ok((Experience { samples, width, log_probs: old, values, advantages, returns }, metrics))
    }

    /// Scores, less what a missing end costs.
    fn penalised(&self, rollout: &Rollout) -> Vec<f64> {
        let penalty = self.options.missing_eos_penalty.unwrap_or(0.0);
        let score = |(score, completion): (&f64, &Completion)| if completion.finished { *score } else { score - penalty };
        rollout.scores.iter().zip(&rollout.completions).map(score).collect()
    }

    /// What `f` gives of samples, (B, T − 1), a part at a time.
    fn of_all(&self, samples: &[TokenSequence], width: usize, f: impl Fn(&TokenBatch) -> Result<Tensor>) -> Result<Tensor> {
        let count = self.options.num_mini_batches.max(1).saturating_mul(self.options.train.gradient_accumulation_steps.max(1));
        let part = |part: &[TokenSequence]| {
            let batch = TokenBatch::new("ppo", &*self.policy, &part.iter().collect::<Vec<_>>(), Some(width))?;
            self.options.train.autocast(|| f(&batch))
        };
        Tensor::cat(&parts(samples, count).map(part).collect::<Result<Vec<_>>>()?, 0)
    }

    /// The value of what stands before each token, (B, T − 1).
    fn values(&self, batch: &TokenBatch) -> Result<Tensor> {
        self.value.values(&batch.tokens)?.narrow(1, 0, batch.mask.dim(1)?)
    }

    fn optimise(&mut self, experience: &Experience, metrics: &mut PpoMetrics) -> Result<()> {
        let mut steps = 0;
        for _ in 0..self.options.num_ppo_epochs {
            let order = shuffled(&self.generator, experience.samples.len())?;
            for rows in parts(&order, self.options.num_mini_batches) {
                if rows.iter().any(|&row| learned(&experience.samples[row]) > 0) {
                    self.mini_batch(experience, rows, metrics)?;
                    steps += 1;
                }
            }
        }
        let share = 1.0 / f64::from(steps.max(1));
        let PpoMetrics { policy_loss, value_loss, clip_fraction, value_clip_fraction, approx_kl, .. } = metrics;
        for number in [policy_loss, value_loss, clip_fraction, value_clip_fraction, approx_kl] {
            *number *= share;
        }
        Ok(())
    }

    /// One step of both optimisers; adds to the sums.
    fn mini_batch(&mut self, experience: &Experience, rows: &[usize], sum: &mut PpoMetrics) -> Result<()> {
        let options = &self.options;
        let tokens: usize = rows.iter().map(|&row| learned(&experience.samples[row])).sum();
        self.policy_learner.begin()?;
        self.value_learner.begin()?;
        let mut total = 0.0;
        for part in parts(rows, options.train.gradient_accumulation_steps) {
            let samples: Vec<&TokenSequence> = part.iter().map(|&row| &experience.samples[row]).collect();
            let batch = TokenBatch::new("ppo", &*self.policy, &samples, Some(experience.width))?;
            if batch.count == 0 {
                continue;
            }
            let share = batch.count as f64 / tokens as f64;
            let index = Tensor::from_vec(part.iter().map(|&row| row as i64).collect(), part.len())?.to_device(batch.mask.device())?;
            let of = |x: &Tensor| x.index_select(0, &index);
            let (old, advantages) = (of(&experience.log_probs)?, of(&experience.advantages)?);
            let (old_values, returns) = (of(&experience.values)?, of(&experience.returns)?);
            let log_probs = options.train.autocast(|| batch.log_probs(&*self.policy, options.temperature))?;
            let values = options.train.autocast(|| self.values(&batch))?;
            let policy = policy_loss(&log_probs, &old, &advantages, &batch.mask, options.cliprange)?;
            let value = value_loss(&values, &old_values, &returns, &batch.mask, options.cliprange_value)?;
            let loss = policy.loss.add(&value.loss.mul_scalar(options.vf_coef)?)?.mul_scalar(share)?;
            total += loss.item_f64()?;
            sum.policy_loss += share * policy.loss.item_f64()?;
            sum.value_loss += share * value.loss.item_f64()?;
            sum.clip_fraction += share * policy.clip_fraction.item_f64()?;
            sum.value_clip_fraction += share * value.clip_fraction.item_f64()?;
            let moved = KlEstimator::K2.estimate(&log_probs.detach(), &old)?;
            sum.approx_kl += share * masked_mean(&moved, &batch.mask, ())?.item_f64()?;
            loss.backward()?;
        }
        let update = self.policy_learner.finish(total)?;
        self.value_learner.finish(total)?;
        (sum.grad_norm, sum.lr) = (update.grad_norm, update.lr);
        Ok(())
    }

    /// Everything that the next step depends on: weights, optimisers, generators, the price of KL; the reference excepted.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        put(&mut state, "policy", self.policy_learner.state_dict()?);
        put(&mut state, "value", self.value_learner.state_dict()?);
        put_counters(&mut state, "trainer", &counters(self.kl_coef.to_bits(), &self.generator))?;
        Ok(state)
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let [kl_coef, seed, offset] = get_counters("ppo", state, "trainer")?;
        self.policy_learner.load_state_dict(&part(state, "policy"))?;
        self.value_learner.load_state_dict(&part(state, "value"))?;
        self.kl_coef = f64::from_bits(kl_coef);
        self.generator.set_state(GeneratorState { seed, offset });
        Ok(())
    }
}
