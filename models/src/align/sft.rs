//! Supervised fine-tuning: the next-token loss on the tokens that the model is to learn to say, the assistant's, and on no others.
//!
//! Source: Ouyang et al., *Training language models to follow instructions with human feedback*, 2022, step 1.

use super::check::expect_alike;
use super::logprobs::{masked_mean, token_log_probs};
use crate::data::IGNORE_INDEX;
use kiln_tensor::{DType, Error, Result, Tensor};

/// The labels of tokens: the tokens themselves where `mask` is true, [`IGNORE_INDEX`] elsewhere; both (B, T).
///
/// # Errors
/// If the shapes differ or the mask is not bool.
pub fn mask_labels(tokens: &Tensor, mask: &Tensor) -> Result<Tensor> {
    expect_alike("mask_labels", &[("tokens", tokens), ("mask", mask)])?;
    tokens.masked_fill(&mask.logical_not()?, IGNORE_INDEX as f64)
}

/// The targets of the logits at places 0 to T − 2: labels (B, T), which stand at their own places, without the first: (B, T − 1).
///
/// # Errors
/// If there are fewer than two tokens, so that nothing is predicted.
pub fn shift_labels(labels: &Tensor) -> Result<Tensor> {
    let [_, length] = labels.dims_n("shift_labels")?;
    if length < 2 {
        return Err(Error::shape("shift_labels", format!("labels {} predict nothing: sequences need two tokens or more", labels.shape())));
    }
    labels.narrow(1, 1, length - 1)
}

/// −Σ log p(label) / N over all labels but [`IGNORE_INDEX`], each predicted by the logits one place before it: logits (B, T, V), labels
/// (B, T), as [`mask_labels`] gives them, → a scalar.
///
/// N is the number of those labels, or `num_items`, for a part of a batch whose whole has so many. 0 if there are none.
///
/// # Errors
/// If the shapes do not fit, T is less than 2, or a label is not in the vocabulary.
pub fn sft_loss(logits: &Tensor, labels: &Tensor, num_items: Option<usize>) -> Result<Tensor> {
    let (logits, targets) = shifted(logits, labels)?;
    let count = match num_items {
        Some(count) => count,
        None => count_labels(&targets)?,
    };
    token_log_probs(&logits, &targets)?.sum(())?.div_scalar(-(count.max(1) as f64))
}

/// The share of labels that have the largest logit: logits (B, T, V), labels (B, T) → a number; 0 if there are none.
///
/// # Errors
/// As [`sft_loss`].
pub fn token_accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let (logits, targets) = shifted(&logits.detach(), labels)?;
    let hits = logits.argmax(-1)?.eq(&targets)?.to_dtype(DType::F64)?;
    masked_mean(&hits, &targets.ne_scalar(IGNORE_INDEX as f64)?, ())?.item_f64()
}

/// The number of labels that count.
pub(super) fn count_labels(labels: &Tensor) -> Result<usize> {
    Ok(labels.ne_scalar(IGNORE_INDEX as f64)?.sum(())?.item::<i64>()?.unsigned_abs() as usize)
}

/// The logits that predict something, and what they predict.
fn shifted(logits: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
    let targets = shift_labels(labels)?;
    let [batch, length, _] = logits.dims_n("sft_loss")?;
    if [batch, length] != labels.dims() {
        return Err(Error::shape(
            "sft_loss",
            format!("labels have shape {}, expected the first two of the logits {}", labels.shape(), logits.shape()),
        ));
    }
    Ok((logits.narrow(1, 0, length - 1)?, targets))
}
