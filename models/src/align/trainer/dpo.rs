//! Direct preference optimisation of a language model on pairs of answers.

use super::batch::{PreferencePair, TokenBatch, learned, parts, sequence_log_probs};
use super::learner::{Learner, TrainOptions};
use crate::align::dpo::{Completions, DpoLossOptions, dpo_loss};
use crate::align::reward::PreferenceLoss;
use crate::data::TokenSequence;
use crate::nn::StateDict;
use crate::transformer::CausalLm;
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{Error, Result, Tensor};
use std::sync::Arc;

/// How a [`DpoTrainer`] trains.
#[derive(Clone, Debug)]
pub struct DpoOptions {
    /// How weights are trained.
    pub train: TrainOptions,
    /// The loss.
    pub loss: DpoLossOptions,
}

impl Default for DpoOptions {
    /// TRL's: a rate of 1e-6, no dropout, the sigmoid loss with β 0.1.
    fn default() -> Self {
        Self { train: TrainOptions { disable_dropout: true, ..TrainOptions::new(1e-6) }, loss: DpoLossOptions::default() }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DpoMetrics {
    /// The loss.
    pub loss: f64,
    /// The mean reward β·(log π − log π_ref) of chosen answers.
    pub chosen_reward: f64,
    /// That of rejected answers.
    pub rejected_reward: f64,
    /// The share of pairs whose chosen answer has the higher reward.
    pub accuracy: f64,
    /// The mean lead of chosen answers.
    pub margin: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// Trains a policy on preferences: [`dpo_loss`].
pub struct DpoTrainer {
    policy: Arc<dyn CausalLm>,
    reference: Option<Arc<dyn CausalLm>>,
    options: DpoOptions,
    learner: Learner,
}

impl DpoTrainer {
    /// A trainer of the policy's parameters that are not frozen. The `reference` is a model of its own, with the weights that the policy has at
    /// first; without one, pairs bring their [`reference`](PreferencePair::reference).
    ///
    /// # Errors
    /// If all parameters are frozen, or an option is out of its range.
    pub fn new(policy: Arc<dyn CausalLm>, reference: Option<Arc<dyn CausalLm>>, options: DpoOptions) -> Result<Self> {
        let learner = Learner::new("dpo", policy.params(), &options.train)?;
        Ok(Self { policy, reference, options, learner })
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.steps()
    }

    /// log π of chosen and rejected answers under `reference`: what [`PreferencePair::reference`] keeps, so that the model need not stay in memory.
    ///
    /// # Errors
    /// If a text is empty or longer than the model's context.
    pub fn reference_log_probs(reference: &dyn CausalLm, pairs: &[PreferencePair]) -> Result<Vec<[f64; 2]>> {
        let texts: Vec<TokenSequence> =
            pairs.iter().map(|pair| &pair.chosen).chain(pairs.iter().map(|pair| &pair.rejected)).cloned().collect();
        let sums = sequence_log_probs(reference, &texts)?;
        let (chosen, rejected) = sums.split_at(pairs.len());
        Ok(chosen.iter().zip(rejected).map(|(&c, &r)| [c, r]).collect())
    }

    /// One step on a batch.
    ///
    /// # Errors
    /// If there are no pairs, an answer has no token that counts, there is neither a reference model nor a reference in each pair, a text is
    /// empty or longer than the model's context, or the loss is not finite.
    pub fn step(&mut self, pairs: &[PreferencePair]) -> Result<DpoMetrics> {
        expect_answers(pairs)?;
        self.learner.begin()?;
        let mut sum =
            DpoMetrics { loss: 0.0, chosen_reward: 0.0, rejected_reward: 0.0, accuracy: 0.0, margin: 0.0, grad_norm: 0.0, lr: 0.0 };
        for part in parts(pairs, self.options.train.gradient_accumulation_steps) {
            let share = part.len() as f64 / pairs.len() as f64;
            let out = self.loss(part)?;
            let loss = out.loss.mul_scalar(share)?;
            sum.loss += loss.item_f64()?;
            sum.chosen_reward += share * out.chosen_rewards.mean(())?.item_f64()?;
            sum.rejected_reward += share * out.rejected_rewards.mean(())?.item_f64()?;
            sum.accuracy += share * out.accuracy()?;
            sum.margin += share * out.margin()?;
            loss.backward()?;
        }
        let update = self.learner.finish(sum.loss)?;
        Ok(DpoMetrics { grad_norm: update.grad_norm, lr: update.lr, ..sum })
    }

    /// The share of pairs whose chosen answer has the higher reward, without dropout and gradient.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&self, pairs: &[PreferencePair]) -> Result<f64> {
        expect_answers(pairs)?;
        let mut accuracy = 0.0;
        for part in parts(pairs, self.options.train.gradient_accumulation_steps) {
            let out = self.policy.params().evaluating(|| no_grad(|| self.loss(part)))?;
            accuracy += out.accuracy()? * part.len() as f64 / pairs.len() as f64;
        }
        Ok(accuracy)
    }

    fn loss(&self, pairs: &[PreferencePair]) -> Result<PreferenceLoss> {
        let policy = self.options.train.autocast(|| sides(&*self.policy, pairs))?;
        let reference = self.reference(pairs, &policy.log_probs)?;
        let half = |x: &Tensor, start| x.narrow(0, start, pairs.len());
        let side = |start| -> Result<Completions> {
            let log_probs = half(&policy.log_probs, start)?;
            Ok(Completions { log_probs, reference: half(&reference, start)?, lengths: half(&policy.lengths, start)? })
        };
        dpo_loss(&side(0)?, &side(pairs.len())?, &self.options.loss)
    }

    /// log π_ref of chosen, then rejected answers, (2B).
    fn reference(&self, pairs: &[PreferencePair], like: &Tensor) -> Result<Tensor> {
        let known: Vec<[f64; 2]> = pairs.iter().filter_map(|pair| pair.reference).collect();
        if known.len() == pairs.len() {
            let both = known.iter().map(|pair| pair[0]).chain(known.iter().map(|pair| pair[1])).collect();
            return Tensor::from_vec(both, 2 * pairs.len())?.to_dtype(like.dtype())?.to_device(like.device());
        }
        let Some(reference) = &self.reference else {
            let message = format!(
                "{} of {} pairs have no reference log-probabilities, and there is no reference model",
                pairs.len() - known.len(),
                pairs.len()
            );
            return Err(Error::argument("dpo", message));
        };
        let sides = || self.options.train.autocast(|| sides(&**reference, pairs));
        Ok(reference.params().evaluating(|| no_grad(sides))?.log_probs)
    }

    /// Everything that the next step depends on: weights, optimiser, generator; the reference excepted.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn state_dict(&self) -> Result<StateDict> {
        self.learner.state_dict()
    }

    /// Continues from a saved state.
    ///
    /// # Errors
    /// If a tensor is missing or unexpected, or has another shape.
    pub fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.learner.load_state_dict(state)
    }
}

/// Sums over the tokens of the chosen, then the rejected answers, (2B) each.
struct Sides {
    log_probs: Tensor,
    lengths: Tensor,
}

fn sides(model: &dyn CausalLm, pairs: &[PreferencePair]) -> Result<Sides> {
    let samples: Vec<&TokenSequence> = pairs.iter().map(|pair| &pair.chosen).chain(pairs.iter().map(|pair| &pair.rejected)).collect();
    let batch = TokenBatch::new("dpo", model, &samples, None)?;
    let log_probs = batch.log_probs(model, 1.0)?.sum(1)?;
    let lengths = batch.mask.to_dtype(log_probs.dtype())?.sum(1)?;
    Ok(Sides { log_probs, lengths })
}

fn expect_answers(pairs: &[PreferencePair]) -> Result<()> {
    if pairs.is_empty() {
        return Err(Error::argument("dpo", "there are no pairs in the batch"));
    }
    match pairs.iter().position(|pair| learned(&pair.chosen) == 0 || learned(&pair.rejected) == 0) {
        Some(i) => Err(Error::argument("dpo", format!("an answer of pair {i} has no token that counts; check the masks"))),
        None => Ok(()),
    }
}
