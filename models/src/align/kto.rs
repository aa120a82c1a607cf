//! Kahneman–Tversky optimisation: single answers, each marked as desirable or not, instead of pairs.
//!
//! Source: Ethayarajh et al., *KTO: Model Alignment as Prospect Theoretic Optimization*, 2024, equation 7.

use super::check::{expect_alike, expect_not_negative, expect_positive, expect_shape};
use kiln_tensor::{Result, Shape, Tensor};

/// How [`kto_loss`] is to be taken.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct KtoLossOptions {
    /// β: how dear it is to leave the reference.
    pub beta: f64,
    /// The weight λ_D of desirable answers.
    pub desirable_weight: f64,
    /// The weight λ_U of undesirable answers.
    pub undesirable_weight: f64,
}

impl Default for KtoLossOptions {
    /// TRL's: β 0.1, both weights 1.
    fn default() -> Self {
        Self { beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

/// The point of reference z = max(0, mean(log π − log π_ref)), a scalar without gradient, over answers that belong to other prompts: (B) each.
///
/// # Errors
/// If the shapes differ.
pub fn kto_kl(log_probs: &Tensor, reference: &Tensor) -> Result<Tensor> {
    expect_alike("kto_kl", &[("log_probs", log_probs), ("reference", reference)])?;
    log_probs.detach().sub(&reference.detach())?.mean(())?.clamp(0.0, None)
}

/// mean w·(1 − σ(±β(r − z))) over answers, with r = log π(y|x) − log π_ref(y|x), + and w = λ_D for the desirable ones, − and λ_U for the others.
///
/// `log_probs` and `reference` are (B), `desirable` is bool (B), `kl` the scalar z of [`kto_kl`].
///
/// # Errors
/// If the shapes differ, or an option is out of its range.
pub fn kto_loss(log_probs: &Tensor, reference: &Tensor, desirable: &Tensor, kl: &Tensor, options: &KtoLossOptions) -> Result<Tensor> {
    let KtoLossOptions { beta, desirable_weight, undesirable_weight } = *options;
    expect_alike("kto_loss", &[("log_probs", log_probs), ("reference", reference), ("desirable", desirable)])?;
    expect_shape("kto_loss", "kl", kl, &Shape::new(&[])?)?;
    expect_positive("kto_loss", "beta", beta)?;
    expect_not_negative("kto_loss", "desirable_weight", desirable_weight)?;
    expect_not_negative("kto_loss", "undesirable_weight", undesirable_weight)?;
    let gain = log_probs.sub(&reference.detach())?.sub(&kl.detach())?.mul_scalar(beta)?;
    // 1 − σ(x) = σ(−x), without the cancellation.
    let good = gain.neg()?.sigmoid()?.mul_scalar(desirable_weight)?;
    let bad = gain.sigmoid()?.mul_scalar(undesirable_weight)?;
    desirable.where_cond(&good, &bad)?.mean(())
}
