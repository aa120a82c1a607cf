//! Odds ratio preference optimisation: fine-tuning and preference in one loss, without a reference model.
//!
//! Source: Hong et al., *ORPO: Monolithic Preference Optimization without Reference Model*, 2024.

use super::check::{expect_alike, expect_not_negative};
use super::reward::{PreferenceLoss, neg_log_sigmoid};
use kiln_tensor::{Result, Tensor};

/// What ORPO reads of the policy.
#[derive(Clone, Debug)]
pub struct OrpoLogProbs {
    /// The mean log-probability of the tokens of each chosen answer, (B).
    pub chosen: Tensor,
    /// The same of each rejected answer, (B).
    pub rejected: Tensor,
    /// The next-token loss of the chosen texts, a scalar, as [`sft_loss`](super::sft_loss) gives it: TRL takes prompt and answer.
    pub chosen_nll: Tensor,
}

/// nll − β · mean log σ(log odds(chosen) − log odds(rejected)), with odds(y) = p / (1 − p) and p = exp of the mean log-probability. The
/// rewards are β times that.
///
/// # Errors
/// If the shapes differ, or `beta` is negative.
pub fn orpo_loss(policy: &OrpoLogProbs, beta: f64) -> Result<PreferenceLoss> {
    let OrpoLogProbs { chosen, rejected, chosen_nll } = policy;
    expect_alike("orpo_loss", &[("chosen", chosen), ("rejected", rejected)])?;
    expect_not_negative("orpo_loss", "beta", beta)?;
    let log_odds_ratio = chosen.sub(rejected)?.sub(&log1mexp(chosen)?.sub(&log1mexp(rejected)?)?)?;
    let penalty = neg_log_sigmoid(&log_odds_ratio)?.mean(())?;
    Ok(PreferenceLoss {
        loss: chosen_nll.add(&penalty.mul_scalar(beta)?)?,
        chosen_rewards: chosen.detach().mul_scalar(beta)?,
        rejected_rewards: rejected.detach().mul_scalar(beta)?,
    })
}

/// log(1 − eˣ) for x < 0. An answer that is certain, x = 0, would have infinite odds, and a gradient of NaN: x is held below 0.
fn log1mexp(x: &Tensor) -> Result<Tensor> {
    x.clamp(None, -1e-7)?.expm1()?.neg()?.log()
}
