//! Supervised fine-tuning of a language model on texts of which some tokens count.

use super::batch::{Predicted, TokenBatch, learned, parts};
use super::learner::{Learner, TrainOptions};
use crate::data::TokenSequence;
use crate::nn::StateDict;
use crate::transformer::CausalLm;
use kiln_autograd::{TensorExt, no_grad};
use kiln_tensor::{Error, Result};
use std::sync::Arc;

/// How an [`SftTrainer`] trains.
#[derive(Clone, Debug)]
pub struct SftOptions {
    /// How weights are trained.
    pub train: TrainOptions,
    /// Whether only the tokens of the mask are learned, rather than all.
    pub completion_only_loss: bool,
}

impl Default for SftOptions {
    /// TRL's: a rate of 2e-5, the masked tokens.
    fn default() -> Self {
        Self { train: TrainOptions::new(2e-5), completion_only_loss: true }
    }
}

/// What a step did.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SftMetrics {
    /// The mean loss of the tokens that count, in nats.
    pub loss: f64,
    /// The share of these tokens that had the largest logit.
    pub accuracy: f64,
    /// Tokens that count.
    pub tokens: usize,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// Fine-tunes a model on texts; the loss is [`sft_loss`](crate::align::sft_loss) of the batch.
pub struct SftTrainer {
    model: Arc<dyn CausalLm>,
    options: SftOptions,
    learner: Learner,
}

impl SftTrainer {
    /// A trainer of the model's parameters that are not frozen.
    ///
    /// # Errors
    /// If all are frozen, or an option is out of its range.
    pub fn new(model: Arc<dyn CausalLm>, options: SftOptions) -> Result<Self> {
        let learner = Learner::new("sft", model.params(), &options.train)?;
        Ok(Self { model, options, learner })
    }

    /// Steps so far.
    pub fn steps(&self) -> u64 {
        self.learner.steps()
    }

    /// One step on a batch.
    ///
    /// # Errors
    /// If no token of the batch counts, a text is empty or longer than the model's context, or the loss is not finite.
    pub fn step(&mut self, samples: &[TokenSequence]) -> Result<SftMetrics> {
        let samples = self.with_masks(samples);
        let tokens = count(&samples)?;
        self.learner.begin()?;
        let (mut loss, mut hits) = (0.0, 0);
        for part in parts(&samples, self.options.train.gradient_accumulation_steps) {
            let Some((batch, predicted)) = self.predict(part)? else { continue };
            let part_loss = predicted.log_probs.sum(())?.div_scalar(-(tokens as f64))?;
            hits += batch.hits(&predicted.logits)?;
            loss += part_loss.item_f64()?;
            part_loss.backward()?;
        }
        let update = self.learner.finish(loss)?;
        Ok(SftMetrics { loss, accuracy: hits as f64 / tokens as f64, tokens, grad_norm: update.grad_norm, lr: update.lr })
    }

    /// The mean loss of the tokens that count, without dropout and gradient.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn evaluate(&self, samples: &[TokenSequence]) -> Result<f64> {
        let samples = self.with_masks(samples);
        let tokens = count(&samples)?;
        let mut sum = 0.0;
        for part in parts(&samples, self.options.train.gradient_accumulation_steps) {
            if let Some((_, predicted)) = self.model.params().evaluating(|| no_grad(|| self.predict(part)))? {
                sum -= predicted.log_probs.sum(())?.item_f64()?;
            }
        }
        Ok(sum / tokens as f64)
    }

    fn with_masks(&self, samples: &[TokenSequence]) -> Vec<TokenSequence> {
        let all = |sample: &TokenSequence| TokenSequence::new(sample.tokens().to_vec());
        if self.options.completion_only_loss { samples.to_vec() } else { samples.iter().map(all).collect() }
    }

    /// `None` if no token counts.
    fn predict(&self, samples: &[TokenSequence]) -> Result<Option<(TokenBatch, Predicted)>> {
        let batch = TokenBatch::new("sft", &*self.model, &samples.iter().collect::<Vec<_>>(), None)?;
        if batch.count == 0 {
            return Ok(None);
        }
        let predicted = self.options.train.autocast(|| batch.predict(&*self.model, 1.0))?;
        Ok(Some((batch, predicted)))
    }

    /// Everything that the next step depends on: weights, optimiser, generator.
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

fn count(samples: &[TokenSequence]) -> Result<usize> {
    match samples.iter().map(learned).sum() {
        0 => Err(Error::argument("sft", "no token of the batch counts; check the masks, and that answers are not cut off")),
        count => Ok(count),
    }
}
