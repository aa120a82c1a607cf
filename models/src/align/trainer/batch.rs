//! Texts of different lengths as one batch, and the model's log-probabilities of the tokens that count.

use crate::align::logprobs::token_log_probs;
use crate::data::TokenSequence;
use crate::transformer::{CausalLm, Pass};
use kiln_autograd::no_grad;
use kiln_tensor::{DType, Error, Result, Tensor};

/// Texts that a pass without gradient takes at a time (TRL's `local_rollout_forward_batch_size`).
pub(super) const ROWS_AT_ONCE: usize = 64;

/// Two answers to the same prompt.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct PreferencePair {
    /// The better one, with its prompt.
    pub chosen: TokenSequence,
    /// The worse one, with its prompt.
    pub rejected: TokenSequence,
    /// By how much the better one is to lead in a reward model, if that is known of all pairs.
    pub margin: Option<f64>,
    /// log π_ref of chosen and rejected answer, if computed before (see [`DpoTrainer::reference_log_probs`](super::DpoTrainer::reference_log_probs)).
    pub reference: Option<[f64; 2]>,
}

/// Texts, padded behind their ends: no token sees what follows it, so padding needs no mask in the model.
pub(super) struct TokenBatch {
    /// i64 (B, T)
    pub tokens: Tensor,
    /// Bool (B, T − 1): where the next token counts.
    pub mask: Tensor,
    /// Tokens of each text.
    pub lengths: Vec<usize>,
    /// Tokens that count, of all.
    pub count: usize,
    /// i64 (N): the places among B·T whose next token counts; the same among B·(T − 1); and these next tokens.
    rows: Tensor,
    places: Tensor,
    targets: Tensor,
}

/// What a model says of the N tokens of a batch that count.
pub(super) struct Predicted {
    /// (N, V), divided by the temperature.
    pub logits: Tensor,
    /// (N)
    pub log_probs: Tensor,
}

impl TokenBatch {
    /// Texts as the model takes them, of the width of the longest, or `width`.
    pub fn new(op: &str, model: &dyn CausalLm, samples: &[&TokenSequence], width: Option<usize>) -> Result<Self> {
        if let Some(i) = samples.iter().position(|sample| sample.is_empty()) {
            return Err(Error::argument(op, format!("text {i} has no tokens")));
        }
        if samples.is_empty() {
            return Err(Error::argument(op, "there are no texts in the batch"));
        }
        let longest = samples.iter().map(|sample| sample.len()).max().unwrap_or(0);
        let width = width.unwrap_or(longest).max(longest).max(2);
        let (mut tokens, mut mask) = (Vec::new(), Vec::new());
        let (mut rows, mut places, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (b, sample) in samples.iter().enumerate() {
            let padded = sample.tokens().iter().map(|&token| i64::from(token)).chain(std::iter::repeat(0));
            tokens.extend(padded.take(width));
            mask.extend((1..width).map(|place| place < sample.len() && sample.learns(place)));
            for (t, &token) in sample.tokens().iter().skip(1).enumerate().filter(|(t, _)| sample.learns(t + 1)) {
                rows.push((b * width + t) as i64);
                places.push((b * (width - 1) + t) as i64);
                targets.push(i64::from(token));
            }
        }
        let device = model.params().options().device;
        let column = |x: Vec<i64>| {
            let n = x.len();
            Tensor::from_vec(x, n)?.to_device(device)
        };
        Ok(Self {
            tokens: Tensor::from_vec(tokens, [samples.len(), width])?.to_device(device)?,
            mask: Tensor::from_vec(mask, [samples.len(), width - 1])?.to_device(device)?,
            lengths: samples.iter().map(|sample| sample.len()).collect(),
            count: samples.iter().map(|sample| learned(sample)).sum(),
            rows: column(rows)?,
            places: column(places)?,
            targets: column(targets)?,
        })
    }

    /// Rows of a tensor (B, T, C) at the places whose next token counts, (N, C).
    fn picked(&self, hidden: &Tensor) -> Result<Tensor> {
        let [batch, length, width] = hidden.dims_n("align")?;
        hidden.reshape([batch * length, width])?.index_select(0, &self.rows)
    }

    /// What the model says of the tokens that count.
    pub fn predict(&self, model: &dyn CausalLm, temperature: f64) -> Result<Predicted> {
        let hidden = self.picked(&model.hidden_states(&self.tokens, Pass::default())?)?; // (N, C)
        let logits = model.logits(&hidden)?; // (N, V)
        // Ratios of probabilities need more digits than a half type has.
        let logits = if is_half(logits.dtype()) { logits.to_dtype(DType::F32)? } else { logits };
        let logits = if temperature == 1.0 { logits } else { logits.div_scalar(temperature)? };
        Ok(Predicted { log_probs: token_log_probs(&logits, &self.targets)?, logits })
    }

    /// The log-probability of each token that counts, at the place before it, (B, T − 1); 0 elsewhere.
    pub fn log_probs(&self, model: &dyn CausalLm, temperature: f64) -> Result<Tensor> {
        if self.count == 0 {
            let dtype = model.params().options().dtype;
            return Tensor::zeros(*self.mask.shape(), (if is_half(dtype) { DType::F32 } else { dtype }, self.mask.device()));
        }
        let log_probs = self.predict(model, temperature)?.log_probs;
        let nothing = Tensor::zeros([self.mask.numel()], (log_probs.dtype(), log_probs.device()))?;
        nothing.index_add(0, &self.places, &log_probs)?.reshape(*self.mask.shape())
    }

    /// How many of the tokens that count have the largest logit.
    pub fn hits(&self, logits: &Tensor) -> Result<usize> {
        let hits = logits.detach().argmax(-1)?.eq(&self.targets)?.sum(())?.item::<i64>()?;
        Ok(hits.unsigned_abs() as usize)
    }
}

pub(super) fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

/// log π(y|x) of each text under a model, summed over the tokens that are learned, without gradient and dropout: what a sequence-level KL, a
/// perplexity or a precomputed reference is made of.
///
/// # Errors
/// If a text is empty or longer than the model's context, or a token is not in its vocabulary.
pub fn sequence_log_probs(model: &dyn CausalLm, texts: &[TokenSequence]) -> Result<Vec<f64>> {
    let part = |part: &[TokenSequence]| -> Result<Vec<f64>> {
        let batch = TokenBatch::new("sequence_log_probs", model, &part.iter().collect::<Vec<_>>(), None)?;
        batch.log_probs(model, 1.0)?.sum(1)?.to_dtype(DType::F64)?.to_vec()
    };
    let sums = || texts.chunks(ROWS_AT_ONCE).map(part).collect::<Result<Vec<_>>>();
    Ok(model.params().evaluating(|| no_grad(sums))?.concat())
}

/// The tokens of a text that are learned: the first is not, whatever its mask.
pub(super) fn learned(text: &TokenSequence) -> usize {
    (1..text.len()).filter(|&place| text.learns(place)).count()
}

/// `items` in at most `count` parts of equal lengths, the last maybe shorter.
pub(super) fn parts<T>(items: &[T], count: usize) -> std::slice::Chunks<'_, T> {
    items.chunks(items.len().div_ceil(count.max(1)).max(1))
}
