//! The reward model's loss: of two answers, the chosen one is to score higher.
//!
//! Source: Bradley and Terry, *Rank analysis of incomplete block designs*, 1952; Ouyang et al. 2022, step 2; the margin is that of Touvron et al.,
//! *Llama 2*, 2023, and the centring that of Eisenstein et al., *Helping or Herding?*, 2023.

use super::check::expect_alike;
use kiln_tensor::{DType, Result, Tensor};

/// How [`reward_loss`] is to be taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct RewardLossOptions<'a> {
    /// By how much each chosen answer is to lead, (B).
    pub margin: Option<&'a Tensor>,
    /// The weight c of the term that keeps the scores around zero. TRL's default is none.
    pub center_rewards_coefficient: Option<f64>,
}

/// What a loss of preferences says of a batch.
#[derive(Clone, Debug)]
pub struct PreferenceLoss {
    /// The loss, a scalar.
    pub loss: Tensor,
    /// The reward of each chosen answer, (B), without gradient.
    pub chosen_rewards: Tensor,
    /// The reward of each rejected answer, (B), without gradient.
    pub rejected_rewards: Tensor,
}

impl PreferenceLoss {
    /// The share of pairs in which the chosen answer has the higher reward.
    pub fn accuracy(&self) -> Result<f64> {
        self.chosen_rewards.gt(&self.rejected_rewards)?.to_dtype(DType::F64)?.mean(())?.item_f64()
    }

    /// The mean lead of the chosen answers.
    pub fn margin(&self) -> Result<f64> {
        self.chosen_rewards.sub(&self.rejected_rewards)?.mean(())?.item_f64()
    }
}

/// mean −log σ(r_c − r_r − margin) + c · mean (r_c + r_r)², of the scores r of chosen and rejected answers, (B) each.
///
/// # Errors
/// If the shapes differ.
pub fn reward_loss(chosen: &Tensor, rejected: &Tensor, options: &RewardLossOptions<'_>) -> Result<PreferenceLoss> {
    expect_alike("reward_loss", &[("chosen", chosen), ("rejected", rejected)])?;
    let mut lead = chosen.sub(rejected)?;
    if let Some(margin) = options.margin {
        expect_alike("reward_loss", &[("chosen", chosen), ("margin", margin)])?;
        lead = lead.sub(margin)?;
    }
    let mut loss = neg_log_sigmoid(&lead)?.mean(())?;
    if let Some(c) = options.center_rewards_coefficient {
        loss = loss.add(&chosen.add(rejected)?.square()?.mean(())?.mul_scalar(c)?)?;
    }
    Ok(PreferenceLoss { loss, chosen_rewards: chosen.detach(), rejected_rewards: rejected.detach() })
}

/// −log σ(x) = softplus(−x), which neither overflows nor loses the tail.
pub(super) fn neg_log_sigmoid(x: &Tensor) -> Result<Tensor> {
    x.neg()?.softplus()
}
