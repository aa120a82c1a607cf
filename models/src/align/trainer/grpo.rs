//! Group relative policy optimisation of a language model with rewards that the caller computes.

use super::batch::{TokenBatch, learned, parts};
use super::learner::{Learner, TrainOptions, counters, get_counters, part, put, put_counters};
use super::rollout::{Completion, Rollout, RolloutRequest, mean, next_seed, shuffled};
use crate::align::grpo::{GrpoLoss, GrpoLossOptions, GrpoTokens, RewardScale, group_advantages, grpo_loss};
use crate::data::TokenSequence;
use crate::nn::StateDict;
use crate::transformer::CausalLm;
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::generator::GeneratorState;
use kiln_tensor::{Error, Generator, Result, Tensor};
use std::sync::Arc;

/// How a [`GrpoTrainer`] trains.
#[derive(Clone, Debug)]
pub struct GrpoOptions {
    /// How weights are trained.
    pub train: TrainOptions,
    /// The loss; its `max_completion_length` is also the limit of answers.
    pub loss: GrpoLossOptions,
    /// Answers to each prompt.
    pub num_generations: usize,
    /// What advantages are divided by.
    pub scale_rewards: RewardScale,
    /// What logits are divided by, in draws and in losses.
    pub temperature: f64,
    /// How often each batch of answers is learned from.
    pub num_iterations: usize,
    /// Optimiser steps that a batch of answers is cut into, each time.
    pub num_mini_batches: usize,
    /// Whether answers that came to the limit of their length are left out of the loss.
    pub mask_truncated_completions: bool,
    /// Of the draws and the order of answers.
    pub seed: u64,
}

impl Default for GrpoOptions {
    /// TRL's: a rate of 1e-6, groups of 8, temperature 1, one step for each batch of answers.
    fn default() -> Self {
        Self {
            train: TrainOptions::new(1e-6),
            loss: GrpoLossOptions::default(),
            num_generations: 8,
            scale_rewards: RewardScale::Group,
            temperature: 1.0,
            num_iterations: 1,
            num_mini_batches: 1,
            mask_truncated_completions: false,
            seed: 42,
        }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct GrpoMetrics {
    /// The loss, averaged over the optimiser's steps.
    pub loss: f64,
    /// The mean reward.
    pub reward: f64,
    /// The mean over groups of the deviation within the group; groups at 0 teach nothing.
    pub reward_std: f64,
    /// The mean KL to the reference; 0 without one.
    pub kl: f64,
    /// −mean log π of the answers' tokens: an estimate of the entropy.
    pub entropy: f64,
    /// The share of tokens clipped from below.
    pub clip_low: f64,
    /// The share of tokens clipped from above.
    pub clip_high: f64,
    /// The mean number of tokens of an answer.
    pub length: f64,
    /// The share of answers that came to an end.
    pub finished: f64,
    /// The gradient's norm before clipping, of the last step.
    pub grad_norm: f64,
    /// The learning rate, of the last step.
    pub lr: f64,
}

/// Trains a policy on the rewards of its own answers: [`grpo_loss`].
pub struct GrpoTrainer {
    policy: Arc<dyn CausalLm>,
    reference: Option<Arc<dyn CausalLm>>,
    options: GrpoOptions,
    learner: Learner,
    generator: Generator,
}

/// A batch of answers, as the losses read it: tensors are (B, T − 1).
struct Experience {
    samples: Vec<TokenSequence>,
    width: usize,
    advantages: Tensor,
    old_log_probs: Option<Tensor>,
    reference: Option<Tensor>,
}

impl GrpoTrainer {
    /// A trainer of the policy's parameters that are not frozen. The `reference` is a model of its own, with the weights that the policy has at
    /// first; it is needed if β is not 0.
    ///
    /// # Errors
    /// If all parameters are frozen, β is not 0 and there is no reference, or an option is out of its range.
    pub fn new(policy: Arc<dyn CausalLm>, reference: Option<Arc<dyn CausalLm>>, options: GrpoOptions) -> Result<Self> {
        let learner = Learner::new("grpo", policy.params(), &options.train)?;
        if options.loss.beta != 0.0 && reference.is_none() {
            return Err(Error::argument("grpo", format!("beta = {} needs a reference model", options.loss.beta)));
        }
        if options.num_generations < 2 {
            let message = format!("num_generations = {}: a group needs two answers or more", options.num_generations);
            return Err(Error::argument("grpo", message));
        }
        expect_temperature("grpo", options.temperature)?;
        Ok(Self { policy, reference, learner, generator: Generator::new(options.seed), options })
    }

    /// Optimiser steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.steps()
    }

    /// One round: `num_generations` answers to each prompt, their rewards, and the optimiser's steps.
    ///
    /// `generate` draws an answer to each prompt of the request from the policy; `reward` gives each answer's reward, from prompts and answers
    /// in the same order.
    ///
    /// # Errors
    /// If there are no prompts or one is empty, `generate` or `reward` fail or return another number than asked for, a text is longer than the
    /// model's context, or a reward or a loss is not finite.
    pub fn step(
        &mut self,
        prompts: &[Vec<u32>],
        generate: impl FnMut(&dyn CausalLm, &RolloutRequest<'_>) -> Result<Vec<Completion>>,
        reward: impl FnMut(&[Vec<u32>], &[Completion]) -> Result<Vec<f64>>,
    ) -> Result<GrpoMetrics> {
        let size = self.options.num_generations;
        let repeated: Vec<Vec<u32>> = prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), size)).collect();
        let request = RolloutRequest {
            prompts: &repeated,
            max_new_tokens: self.options.loss.max_completion_length,
            temperature: self.options.temperature,
            seed: next_seed(&self.generator),
        };
        let rollout = Rollout::collect("grpo", &*self.policy, &request, generate, reward)?;
        let experience = self.experience(&rollout)?;
        let deviation = |group: &[f64]| {
            let center = mean(group.iter().copied());
            (group.iter().map(|r| (r - center).powi(2)).sum::<f64>() / (group.len() - 1) as f64).sqrt()
        };
        let metrics = GrpoMetrics {
            reward: mean(rollout.scores.iter().copied()),
            reward_std: mean(rollout.scores.chunks(size).map(deviation)),
            length: rollout.mean_length(),
            finished: rollout.finished(),
            ..self.optimise(&experience)?
        };
        Ok(metrics)
    }

    /// Advantages, and log-probabilities before the first step, where the losses need them.
    fn experience(&self, rollout: &Rollout) -> Result<Experience> {
        let options = &self.options;
        let rewards = Tensor::from_vec(rollout.scores.clone(), rollout.scores.len())?;
        let advantages = group_advantages(&rewards, options.num_generations, options.scale_rewards)?;
        let samples = self.learnable(rollout)?;
        let width = samples.iter().map(|sample| sample.len()).max().unwrap_or(0);
        let log_probs = |model: &dyn CausalLm| {
            let part = |part: &[TokenSequence]| {
                let batch = TokenBatch::new("grpo", model, &part.iter().collect::<Vec<_>>(), Some(width))?;
                options.train.autocast(|| batch.log_probs(model, options.temperature))
            };
            let rows = || parts(&samples, self.parts()).map(part).collect::<Result<Vec<_>>>();
            Tensor::cat(&model.params().evaluating(|| no_grad(rows))?, 0)
        };
        // With one step for each batch of answers, the policy is still the one that wrote them.
        let moves = options.num_iterations > 1 || options.num_mini_batches > 1;
        let old_log_probs = moves.then(|| log_probs(&*self.policy)).transpose()?;
        let reference = self.reference.as_ref().filter(|_| options.loss.beta != 0.0).map(|model| log_probs(&**model)).transpose()?;
        Ok(Experience { samples, width, advantages, old_log_probs, reference })
    }

    /// The texts, without masks where a cut answer is not to count.
    fn learnable(&self, rollout: &Rollout) -> Result<Vec<TokenSequence>> {
        let texts = rollout.samples.iter().zip(&rollout.completions);
        let of = |(text, completion): (&TokenSequence, &Completion)| {
            let left_out = self.options.mask_truncated_completions && !completion.finished;
            if left_out { TokenSequence::masked(text.tokens().to_vec(), vec![false; text.len()]) } else { Ok(text.clone()) }
        };
        texts.map(of).collect()
    }

    /// The parts that a whole batch of answers passes in.
    fn parts(&self) -> usize {
        self.options.num_mini_batches.max(1).saturating_mul(self.options.train.gradient_accumulation_steps.max(1))
    }

    fn optimise(&mut self, experience: &Experience) -> Result<GrpoMetrics> {
        let (mut sum, mut steps) = (GrpoMetrics::default(), 0);
        for _ in 0..self.options.num_iterations {
            let order = shuffled(&self.generator, experience.samples.len())?;
            for rows in parts(&order, self.options.num_mini_batches) {
                if rows.iter().any(|&row| learned(&experience.samples[row]) > 0) {
                    self.mini_batch(experience, rows, &mut sum)?;
                    steps += 1;
                }
            }
        }
        let share = 1.0 / f64::from(steps.max(1));
        for number in [&mut sum.loss, &mut sum.kl, &mut sum.entropy, &mut sum.clip_low, &mut sum.clip_high] {
            *number *= share;
        }
        Ok(sum)
    }

    /// One step of the optimiser; adds to the sums.
    fn mini_batch(&mut self, experience: &Experience, rows: &[usize], sum: &mut GrpoMetrics) -> Result<()> {
        let options = &self.options;
        let tokens: usize = rows.iter().map(|&row| learned(&experience.samples[row])).sum();
        self.learner.begin()?;
        let mut total = 0.0;
        for part in parts(rows, options.train.gradient_accumulation_steps) {
            let samples: Vec<&TokenSequence> = part.iter().map(|&row| &experience.samples[row]).collect();
            let batch = TokenBatch::new("grpo", &*self.policy, &samples, Some(experience.width))?;
            if batch.count == 0 {
                continue;
            }
            let log_probs = options.train.autocast(|| batch.log_probs(&*self.policy, options.temperature))?;
            let index = Tensor::from_vec(part.iter().map(|&row| row as i64).collect(), part.len())?;
            let of = |x: &Option<Tensor>| x.as_ref().map(|x| x.index_select(0, &index.to_device(x.device())?)).transpose();
            let by_tokens = batch.count as f64 / tokens as f64;
            sum.entropy -= log_probs.detach().sum(())?.item_f64()? / tokens as f64;
            let answers = GrpoTokens {
                log_probs,
                old_log_probs: of(&experience.old_log_probs)?,
                reference: of(&experience.reference)?,
                mask: batch.mask.clone(),
            };
            let advantages = experience.advantages.index_select(0, &index)?.to_device(batch.mask.device())?;
            let out = grpo_loss(&answers, &advantages, Some(tokens), &options.loss)?;
            let share = match options.loss.loss {
                GrpoLoss::Grpo | GrpoLoss::DrGrpo => part.len() as f64 / rows.len() as f64,
                GrpoLoss::Bnpo => by_tokens,
                GrpoLoss::Dapo => 1.0,
            };
            let loss = out.loss.mul_scalar(share)?;
            total += loss.item_f64()?;
            sum.kl += by_tokens * out.kl.item_f64()?;
            sum.clip_low += by_tokens * out.clip_low.item_f64()?;
            sum.clip_high += by_tokens * out.clip_high.item_f64()?;
            loss.backward()?;
        }
        let update = self.learner.finish(total)?;
        sum.loss += total;
        (sum.grad_norm, sum.lr) = (update.grad_norm, update.lr);
        Ok(())
    }

    /// Everything that the next step depends on: weights, optimiser, generators; the reference excepted.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut state = StateDict::new();
        put(&mut state, "policy", self.learner.state_dict()?);
        put_counters(&mut state, "trainer", &counters(0, &self.generator))?;
        Ok(state)
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        let [_, seed, offset] = get_counters("grpo", state, "trainer")?;
        self.learner.load_state_dict(&part(state, "policy"))?;
        self.generator.set_state(GeneratorState { seed, offset });
        Ok(())
    }
}

/// An error unless logits can be divided by it.
pub(super) fn expect_temperature(op: &str, temperature: f64) -> Result<()> {
    if temperature.is_finite() && temperature > 0.0 {
        return Ok(());
    }
    Err(Error::argument(op, format!("temperature = {temperature}, expected a finite value > 0")))
}
