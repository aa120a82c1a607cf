//! Direct preference optimisation: preference pairs without a reward model, whose place the policy's own log-ratios take.
//!
//! Source: Rafailov et al., *Direct Preference Optimization*, 2023.

use super::check::{expect_alike, expect_positive};
use super::reward::{PreferenceLoss, neg_log_sigmoid};
use kiln_tensor::{Error, Result, Tensor};
use std::fmt;
use std::str::FromStr;

/// What is made of h, the difference of the log-ratios of chosen and rejected answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DpoLoss {
    /// −log σ(βh) (Rafailov et al. 2023), with label smoothing ε −(1 − ε) log σ(βh) − ε log σ(−βh) (Mitchell, *A note on DPO with noisy
    /// preferences*, 2023).
    #[default]
    Sigmoid,
    /// (h − 1/(2β))² with log-ratios per token (Azar et al., *A General Theoretical Paradigm to Understand Learning from Human
    /// Preferences*, 2023; the division by the length is that of TRL and the authors' experiments).
    Ipo,
    /// max(0, 1 − βh) (Zhao et al., *SLiC-HF*, 2023).
    Hinge,
}

impl fmt::Display for DpoLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DpoLoss::Sigmoid => "sigmoid",
            DpoLoss::Ipo => "ipo",
            DpoLoss::Hinge => "hinge",
        })
    }
}

impl FromStr for DpoLoss {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "sigmoid" => Ok(DpoLoss::Sigmoid),
            "ipo" => Ok(DpoLoss::Ipo),
            "hinge" => Ok(DpoLoss::Hinge),
            _ => Err(Error::argument("dpo_loss", format!("{text:?} is no DPO loss; expected sigmoid, ipo or hinge"))),
        }
    }
}

/// How [`dpo_loss`] is to be taken.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DpoLossOptions {
    /// The form of the loss.
    pub loss: DpoLoss,
    /// β: how dear it is to leave the reference.
    pub beta: f64,
    /// The share ε of pairs whose order is taken to be wrong, 0 to 0.5; of the sigmoid loss only.
    pub label_smoothing: f64,
}

impl Default for DpoLossOptions {
    /// TRL's: sigmoid, β 0.1, no smoothing.
    fn default() -> Self {
        Self { loss: DpoLoss::Sigmoid, beta: 0.1, label_smoothing: 0.0 }
    }
}

/// Answers as the policy and the reference see them.
#[derive(Clone, Debug)]
pub struct Completions {
    /// log π(y|x): the sum over the answer's tokens, (B).
    pub log_probs: Tensor,
    /// log π_ref(y|x), (B).
    pub reference: Tensor,
    /// The number of the answer's tokens, (B), in the dtype of the log-probabilities.
    pub lengths: Tensor,
}

impl Completions {
    fn expect_alike(&self, name: &str) -> Result<()> {
        let tensors = [("log_probs", &self.log_probs), ("reference", &self.reference), ("lengths", &self.lengths)];
        expect_alike("dpo_loss", &tensors).map_err(|e| e.at(format!("dpo_loss, {name}")))
    }

    /// log π(y|x) − log π_ref(y|x)
    fn log_ratio(&self) -> Result<Tensor> {
        self.log_probs.sub(&self.reference.detach())
    }

    /// The log-ratio per token.
    fn mean_log_ratio(&self) -> Result<Tensor> {
        self.log_ratio()?.div(&self.lengths.clamp(1.0, None)?)
    }
}

/// The mean loss of pairs, h = (log π_c − log π_ref,c) − (log π_r − log π_ref,r); see [`DpoLoss`]. The rewards are β times the
/// log-ratios. No gradient flows into the reference.
///
/// # Errors
/// If shapes differ, or an option is out of its range.
pub fn dpo_loss(chosen: &Completions, rejected: &Completions, options: &DpoLossOptions) -> Result<PreferenceLoss> {
    let DpoLossOptions { loss, beta, label_smoothing: epsilon } = *options;
    chosen.expect_alike("chosen")?;
    rejected.expect_alike("rejected")?;
    expect_alike("dpo_loss", &[("chosen", &chosen.log_probs), ("rejected", &rejected.log_probs)])?;
    expect_positive("dpo_loss", "beta", beta)?;
    if !(0.0..=0.5).contains(&epsilon) {
        return Err(Error::argument("dpo_loss", format!("label_smoothing = {epsilon}, expected 0 to 0.5")));
    }
    let (chosen_ratio, rejected_ratio) = (chosen.log_ratio()?, rejected.log_ratio()?);
    let losses = match loss {
        DpoLoss::Sigmoid => {
            let logits = chosen_ratio.sub(&rejected_ratio)?.mul_scalar(beta)?;
            let right = neg_log_sigmoid(&logits)?;
            if epsilon == 0.0 {
                right
            } else {
                right.mul_scalar(1.0 - epsilon)?.add(&neg_log_sigmoid(&logits.neg()?)?.mul_scalar(epsilon)?)?
            }
        }
        DpoLoss::Ipo => chosen.mean_log_ratio()?.sub(&rejected.mean_log_ratio()?)?.sub_scalar(1.0 / (2.0 * beta))?.square()?,
        DpoLoss::Hinge => chosen_ratio.sub(&rejected_ratio)?.mul_scalar(beta)?.rsub_scalar(1.0)?.relu()?,
    };
    Ok(PreferenceLoss {
        loss: losses.mean(())?,
        chosen_rewards: chosen_ratio.detach().mul_scalar(beta)?,
        rejected_rewards: rejected_ratio.detach().mul_scalar(beta)?,
    })
}
