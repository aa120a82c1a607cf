//! Log-probabilities of tokens and the statistics over masked tokens that all methods are made of.
//!
//! A mask is a bool tensor, true where a token counts. What it hides may hold anything, infinities and NaN too.

use super::check::expect_alike;
use kiln_tensor::ops::loss::{CrossEntropyOptions, Reduction};
use kiln_tensor::{Dims, Error, Result, Tensor};

use crate::data::IGNORE_INDEX;

/// log softmax(logits) at the targets: logits (…, V) and i64 targets (…) → (…). A target of [`IGNORE_INDEX`] gives 0.
///
/// The fused cross-entropy: what the backward pass keeps beside the logits is two numbers a row, no probabilities.
///
/// ```
/// # use kiln_models::align::token_log_probs;
/// # use kiln_models::data::IGNORE_INDEX;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let logits = Tensor::zeros([1, 3, 4], ())?;
/// let targets = Tensor::from_vec(vec![2i64, 0, IGNORE_INDEX], [1, 3])?;
/// let log_probs = token_log_probs(&logits, &targets)?.to_vec::<f32>()?;
/// assert!((log_probs[0] + 4f32.ln()).abs() < 1e-6 && log_probs[2] == 0.0);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the extents of the targets are not those of the logits without the last, or a target is not in the vocabulary.
pub fn token_log_probs(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let Some((&vocab, places)) = logits.dims().split_last() else {
        return Err(Error::shape("token_log_probs", "the logits have no dimensions, expected (…, vocabulary)"));
    };
    if targets.dims() != places {
        let message =
            format!("targets have shape {}, expected that of the logits {} without the last extent", targets.shape(), logits.shape());
        return Err(Error::shape("token_log_probs", message));
    }
    let rows = targets.numel();
    let options = CrossEntropyOptions { ignore_index: IGNORE_INDEX, reduction: Reduction::None, ..Default::default() };
    let losses = logits.reshape([rows, vocab])?.cross_entropy_with(&targets.reshape([rows])?, &options)?;
    // Not neg(): an ignored row has the loss 0, and shall have the log-probability 0, not −0.
    losses.rsub_scalar(0.0)?.reshape(*targets.shape())
}

/// The entropy of softmax(logits) in nats, H = log Σ exp z − Σ softmax(z)·z: (…, V) → (…).
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    logits.logsumexp(-1)?.sub(&logits.softmax(-1)?.mul(logits)?.sum(-1)?)
}

/// The sum of `values` where `mask` is true, along `dims` (`()` for all). Values and mask broadcast together.
pub fn masked_sum(values: &Tensor, mask: &Tensor, dims: impl Into<Dims>) -> Result<Tensor> {
    values.masked_fill(&mask.logical_not()?, 0.0)?.sum(dims)
}

/// The mean of `values` where `mask` is true, along `dims` (`()` for all); 0 where it is true nowhere. Values and mask broadcast together.
pub fn masked_mean(values: &Tensor, mask: &Tensor, dims: impl Into<Dims>) -> Result<Tensor> {
    let dims = dims.into();
    let sum = masked_sum(values, mask, dims.clone())?;
    // Of the broadcast shape, as the sum is.
    let ones = values.detach().ones_like()?;
    sum.div(&masked_sum(&ones, mask, dims)?.clamp(1.0, None)?)
}

/// (x − mean) / √(var + 1e-8) over the values that `mask` shows, with the unbiased variance; `shift_mean` false adds the mean again, so
/// that only the scale changes. Hidden values become 0.
///
/// A single value has no variance: it stays as it is, less the mean.
///
/// # Errors
/// If the shapes differ.
pub fn whiten(values: &Tensor, mask: &Tensor, shift_mean: bool) -> Result<Tensor> {
    expect_alike("whiten", &[("values", values), ("mask", mask)])?;
    let count = mask.sum(())?.item::<i64>()?;
    let mean = masked_mean(values, mask, ())?;
    let centered = values.sub(&mean)?;
    let whitened = if count > 1 {
        let variance = masked_sum(&centered.square()?, mask, ())?.div_scalar((count - 1) as f64)?;
        centered.mul(&variance.add_scalar(1e-8)?.rsqrt()?)?
    } else {
        centered
    };
    let whitened = if shift_mean { whitened } else { whitened.add(&mean)? };
    whitened.masked_fill(&mask.logical_not()?, 0.0)
}

/// An estimate of KL(π ‖ π_ref) from the log-probabilities of a token that π drew, with r = log π_ref − log π.
///
/// Source: Schulman, *Approximating KL Divergence*, 2020 (joschu.net/blog/kl-approx.html).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KlEstimator {
    /// −r: unbiased, of either sign.
    #[default]
    K1,
    /// r² / 2: biased, of low variance.
    K2,
    /// eʳ − 1 − r: unbiased, never negative.
    K3,
}

impl KlEstimator {
    /// The estimate for each token, of the shape of the operands.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn estimate(self, log_probs: &Tensor, reference: &Tensor) -> Result<Tensor> {
        expect_alike("kl_estimate", &[("log_probs", log_probs), ("reference", reference)])?;
        let r = reference.sub(log_probs)?;
        match self {
            KlEstimator::K1 => r.neg(),
            KlEstimator::K2 => r.square()?.mul_scalar(0.5),
            // expm1, since r is small where the policies are close.
            KlEstimator::K3 => r.expm1()?.sub(&r),
        }
    }
}
