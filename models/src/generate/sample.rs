//! Rows of logits on the host, and the choice of a token from one.

use super::processors::{LogitsProcessor, Place, Processors};
use crate::data::Rng;
use kiln_tensor::{DType, Error, Result, Tensor};

/// The logits of each sequence's next token, and what turns them into log-probabilities.
pub(super) struct Rows {
    values: Vec<f32>,
    /// log Σ exp of each row.
    totals: Vec<f32>,
    /// log Σ exp of each row divided by the temperature, and the temperature.
    scaled: Option<(Vec<f32>, f32)>,
    vocab: usize,
}

/// What was chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    pub token: u32,
    pub logprob: f32,
    pub scaled_logprob: f32,
}

impl Rows {
    /// Of logits (B, V); `temperature` is what draws divide them by.
    pub fn new(logits: &Tensor, temperature: f32) -> Result<Self> {
        let [_, vocab] = logits.dims_n("generate")?;
        let logits = logits.to_dtype(DType::F32)?;
        let totals = logits.logsumexp(-1)?.to_vec()?;
        let scaled = if temperature == 1.0 {
            None
        } else {
            Some((logits.mul_scalar(1.0 / f64::from(temperature))?.logsumexp(-1)?.to_vec()?, temperature))
        };
        Ok(Self { values: logits.to_vec()?, totals, scaled, vocab })
    }

    /// The logits of row `row`.
    ///
    /// # Errors
    /// If they are no distribution: NaN, infinite, or all excluded.
    pub fn row(&mut self, row: usize, place: Place<'_>) -> Result<&mut [f32]> {
        match self.totals.get(row) {
            Some(total) if total.is_finite() => Ok(&mut self.values[row * self.vocab..(row + 1) * self.vocab]),
            total => {
                let at = place.tokens.len() - place.prompt_len;
                let message = format!(
                    "the logits of new token {at} of sequence {row} are NaN or infinite (log Σ exp is {}); check the weights and their dtype",
                    total.copied().unwrap_or(f32::NAN)
                );
                Err(Error::argument("generate", message))
            }
        }
    }

    /// The row's processed logits and then its next token: a draw of `draw`, or the largest. The row is used up.
    pub fn choose(&mut self, row: usize, place: Place<'_>, processors: &Processors, draw: Option<f64>) -> Result<Choice> {
        let logits = self.row(row, place)?;
        let raw = logits.to_vec();
        processors.process(place, logits)?;
        let token = match draw {
            Some(draw) => draw_token(logits, draw)?,
            None => largest(logits)?,
        };
        Ok(self.choice(row, token, &raw))
    }

    /// The choice of `token` in row `row`, whose logits were `raw`.
    pub fn choice(&self, row: usize, token: u32, raw: &[f32]) -> Choice {
        let logit = raw.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let logprob = logit - self.totals[row];
        let scaled_logprob = self.scaled.as_ref().map_or(logprob, |(totals, temperature)| logit / temperature - totals[row]);
        Choice { token, logprob, scaled_logprob }
    }
}

/// A uniform number in [0, 1) that depends on nothing but the seed, the sequence's number and the number of its token.
pub(super) fn uniform(seed: u64, row: u64, step: usize) -> f64 {
    (Rng::keyed(seed, row, step as u64).next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

fn nothing_left() -> Error {
    Error::argument("generate", "every token is excluded; loosen bad_words_ids, suppress_tokens, logit_bias or the processors")
}

/// The first of the largest.
pub(super) fn largest(logits: &[f32]) -> Result<u32> {
    let (mut best, mut value) = (None, f32::NEG_INFINITY);
    for (token, &logit) in logits.iter().enumerate() {
        if logit > value {
            (best, value) = (Some(token as u32), logit);
        }
    }
    best.ok_or_else(nothing_left)
}

/// exp(l − max) of each logit, in place; their sum.
pub(super) fn weigh(logits: &mut [f32]) -> Result<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for logit in logits.iter_mut().filter(|logit| **logit > f32::NEG_INFINITY || logit.is_nan()) {
        *logit = (*logit - largest).exp();
        sum += f64::from(*logit);
    }
    logits.iter_mut().filter(|weight| **weight == f32::NEG_INFINITY).for_each(|weight| *weight = 0.0);
    if largest == f32::NEG_INFINITY {
        return Err(nothing_left());
    }
    if !sum.is_finite() {
        return Err(Error::argument("generate", "the processors made logits NaN or infinite; check penalties and biases"));
    }
    Ok(sum)
}

/// The token in whose share of the sum of weights the place `draw` · sum lies.
pub(super) fn pick(weights: &[f32], sum: f64, draw: f64) -> Result<u32> {
    let target = draw * sum;
    let (mut reached, mut last) = (0.0, None);
    for (token, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        reached += f64::from(weight);
        last = Some(token as u32);
        if target < reached {
            break;
        }
    }
    last.ok_or_else(nothing_left)
}

/// Draws from softmax(logits), whose place is used for the weights.
pub(super) fn draw_token(logits: &mut [f32], draw: f64) -> Result<u32> {
    let sum = weigh(logits)?;
    pick(logits, sum, draw)
}
