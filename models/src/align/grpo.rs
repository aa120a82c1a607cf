//! Group relative policy optimisation: the answers of one prompt are each other's baseline, in place of a value model.
//!
//! Source: Shao et al., *DeepSeekMath*, 2024; Liu et al., *Understanding R1-Zero-Like Training* (Dr. GRPO), 2025; Yu et al., *DAPO*, 2025; Zheng et
//! al., *Group Sequence Policy Optimization* (GSPO), 2025.

use super::check::{expect_alike, expect_not_negative, expect_shape};
use super::logprobs::{KlEstimator, masked_mean, masked_sum};
use kiln_tensor::{Error, Result, Shape, Tensor};
use std::fmt;
use std::str::FromStr;

/// What the advantages of a group are divided by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RewardScale {
    /// The standard deviation of the group's rewards.
    #[default]
    Group,
    /// That of all rewards of the batch.
    Batch,
    /// Nothing: division favours questions that are too easy or too hard (Dr. GRPO).
    None,
}

/// How the losses of tokens become one number; `mask` counts tokens of answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GrpoLoss {
    /// The mean over answers of the mean over tokens: long answers count less per token (GRPO).
    Grpo,
    /// The mean over the tokens of this batch, or of this part of it (BNPO).
    Bnpo,
    /// The sum over tokens / (answers · the longest answer allowed): no bias by length (Dr. GRPO).
    DrGrpo,
    /// The sum over tokens / the tokens of the whole batch, of which this may be a part (DAPO).
    #[default]
    Dapo,
}

impl fmt::Display for GrpoLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GrpoLoss::Grpo => "grpo",
            GrpoLoss::Bnpo => "bnpo",
            GrpoLoss::DrGrpo => "dr_grpo",
            GrpoLoss::Dapo => "dapo",
        })
    }
}

impl FromStr for GrpoLoss {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "grpo" => Ok(GrpoLoss::Grpo),
            "bnpo" => Ok(GrpoLoss::Bnpo),
            "dr_grpo" => Ok(GrpoLoss::DrGrpo),
            "dapo" => Ok(GrpoLoss::Dapo),
            _ => Err(Error::argument("grpo_loss", format!("{text:?} is no GRPO loss; expected grpo, bnpo, dr_grpo or dapo"))),
        }
    }
}

/// What one importance weight stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ImportanceSampling {
    /// A token: π(o_t) / π_old(o_t).
    #[default]
    Token,
    /// An answer: the geometric mean of its tokens' ratios (GSPO).
    Sequence,
}

/// How [`grpo_loss`] is to be taken.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GrpoLossOptions {
    /// How the losses of tokens become one number.
    pub loss: GrpoLoss,
    /// How far a ratio may fall below 1.
    pub epsilon_low: f64,
    /// How far it may rise above 1; DAPO takes 0.28.
    pub epsilon_high: f64,
    /// An upper bound of the ratio that holds for negative advantages too (INTELLECT-2's two-sided clipping).
    pub delta: Option<f64>,
    /// The weight of the KL to the reference; at 0 no reference is read.
    pub beta: f64,
    /// Whether the KL is weighted with the importance ratio, so that its gradient is unbiased (DeepSeek-V3.2).
    pub use_bias_correction_kl: bool,
    /// Ratios of tokens or of answers.
    pub importance_sampling: ImportanceSampling,
    /// The longest answer allowed, in tokens, which Dr. GRPO divides by.
    pub max_completion_length: usize,
}

impl Default for GrpoLossOptions {
    /// TRL's: dapo, ε 0.2 on both sides, β 0, ratios of tokens, 512 tokens.
    fn default() -> Self {
        Self {
            loss: GrpoLoss::Dapo,
            epsilon_low: 0.2,
            epsilon_high: 0.2,
            delta: None,
            beta: 0.0,
            use_bias_correction_kl: true,
            importance_sampling: ImportanceSampling::Token,
            max_completion_length: 512,
        }
    }
}

/// The tokens of answers, each tensor (B, T).
#[derive(Clone, Debug)]
pub struct GrpoTokens {
    /// log π of the policy that learns.
    pub log_probs: Tensor,
    /// log π of the policy that wrote the answers; `None` if it is the same, so that the ratios are 1 (their gradients are not 0).
    pub old_log_probs: Option<Tensor>,
    /// log π of the reference; needed if β is not 0.
    pub reference: Option<Tensor>,
    /// True on the answers' tokens.
    pub mask: Tensor,
}

/// What [`grpo_loss`] says of a batch.
#[derive(Clone, Debug)]
pub struct GrpoOutput {
    /// The loss, a scalar.
    pub loss: Tensor,
    /// The mean k3 estimate of the KL to the reference, a scalar without gradient; 0 without reference.
    pub kl: Tensor,
    /// The share of tokens (or answers) whose ratio is below the range while the advantage is negative, a scalar.
    pub clip_low: Tensor,
    /// The share whose ratio is above the range while the advantage is positive, a scalar.
    pub clip_high: Tensor,
}

/// The advantages of answers, of which each `group_size` in turn belong to one prompt: r − mean(group), divided by the standard deviation
/// (unbiased) + 1e-4 of what `scale` says. Rewards (B) → (B), without gradient.
///
/// # Errors
/// If the groups do not come out even, or have fewer than two answers.
pub fn group_advantages(rewards: &Tensor, group_size: usize, scale: RewardScale) -> Result<Tensor> {
    let [batch] = rewards.dims_n("group_advantages")?;
    if group_size < 2 || !batch.is_multiple_of(group_size) {
        let message = format!("{batch} rewards in groups of {group_size}: expected whole groups of two or more");
        return Err(Error::argument("group_advantages", message));
    }
    let grouped = rewards.detach().reshape([batch / group_size, group_size])?;
    let centered = grouped.sub(&grouped.mean_keepdim(1)?)?;
    let scaled = match scale {
        RewardScale::Group => centered.div(&grouped.std_keepdim(1, 1.0)?.add_scalar(1e-4)?)?,
        RewardScale::Batch => centered.div(&grouped.std((), 1.0)?.add_scalar(1e-4)?)?,
        RewardScale::None => centered,
    };
    scaled.reshape([batch])
}

/// The loss of answers with `advantages` (B): of each token −min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high)A) + β · k3, with ρ = π / π_old of the token or
/// the answer, put together as [`GrpoLoss`] says.
///
/// `num_items` is the number of tokens of the whole batch, if this is a part of one: dapo divides by it.
///
/// # Errors
/// If shapes differ, β is not 0 and there is no reference, or an option is out of its range.
pub fn grpo_loss(tokens: &GrpoTokens, advantages: &Tensor, num_items: Option<usize>, options: &GrpoLossOptions) -> Result<GrpoOutput> {
    let (mask, log_probs) = (&tokens.mask, &tokens.log_probs);
    let [batch, _] = log_probs.dims_n("grpo_loss")?;
    expect_alike("grpo_loss", &[("log_probs", log_probs), ("mask", mask)])?;
    expect_shape("grpo_loss", "advantages", advantages, &Shape::new(&[batch])?)?;
    options.check()?;
    let advantages = advantages.detach().to_dtype(log_probs.dtype())?.unsqueeze(1)?; // (B, 1)
    let ratio = importance_ratio(tokens, options.importance_sampling)?; // (B, T) or (B, 1)
    let held = ratio.clamp(1.0 - options.epsilon_low, 1.0 + options.epsilon_high)?;
    let free = options.delta.map_or_else(|| Ok(ratio.clone()), |delta| ratio.clamp(None, delta))?;
    let mut losses = free.mul(&advantages)?.minimum(&held.mul(&advantages)?)?.neg()?;
    let mut kl = Tensor::zeros((), (log_probs.dtype(), log_probs.device()))?;
    if options.beta != 0.0 {
        let mut per_token = kl_to_reference(tokens)?;
        if options.use_bias_correction_kl {
            per_token = per_token.mul(&ratio)?;
        }
        losses = losses.add(&per_token.mul_scalar(options.beta)?)?;
        kl = masked_mean(&per_token.detach(), mask, ())?;
    }
    let loss = aggregate(&losses, mask, num_items, options)?;
    let ratio = free.detach();
    let share = |outside: Tensor, sign: Tensor| -> Result<Tensor> {
        let clipped = outside.logical_and(&sign)?.to_dtype(log_probs.dtype())?;
        if clipped.dims() == mask.dims() { masked_mean(&clipped, mask, ()) } else { clipped.mean(()) }
    };
    let clip_low = share(ratio.lt_scalar(1.0 - options.epsilon_low)?, advantages.lt_scalar(0.0)?)?;
    let clip_high = share(ratio.gt_scalar(1.0 + options.epsilon_high)?, advantages.gt_scalar(0.0)?)?;
    Ok(GrpoOutput { loss, kl, clip_low, clip_high })
}

impl GrpoLossOptions {
    fn check(&self) -> Result<()> {
        expect_not_negative("grpo_loss", "epsilon_low", self.epsilon_low)?;
        expect_not_negative("grpo_loss", "epsilon_high", self.epsilon_high)?;
        expect_not_negative("grpo_loss", "beta", self.beta)?;
        match self.delta {
            Some(delta) if delta.is_nan() || delta <= 1.0 + self.epsilon_high => {
                let message = format!("delta = {delta}, expected more than 1 + epsilon_high = {}", 1.0 + self.epsilon_high);
                Err(Error::argument("grpo_loss", message))
            }
            _ => Ok(()),
        }
    }
}

/// π / π_old of each token, (B, T), or answer, (B, 1).
fn importance_ratio(tokens: &GrpoTokens, level: ImportanceSampling) -> Result<Tensor> {
    let old = tokens.old_log_probs.as_ref().unwrap_or(&tokens.log_probs).detach();
    expect_alike("grpo_loss", &[("log_probs", &tokens.log_probs), ("old_log_probs", &old)])?;
    let log_ratio = tokens.log_probs.sub(&old)?.masked_fill(&tokens.mask.logical_not()?, 0.0)?;
    match level {
        ImportanceSampling::Token => log_ratio.exp(),
        ImportanceSampling::Sequence => masked_mean(&log_ratio, &tokens.mask, 1)?.unsqueeze(1)?.exp(),
    }
}

/// The k3 estimate for each token.
fn kl_to_reference(tokens: &GrpoTokens) -> Result<Tensor> {
    let Some(reference) = &tokens.reference else {
        return Err(Error::argument("grpo_loss", "beta is not 0, but there are no log-probabilities of a reference"));
    };
    let hidden = tokens.mask.logical_not()?;
    let shown = |x: &Tensor| x.masked_fill(&hidden, 0.0);
    KlEstimator::K3.estimate(&shown(&tokens.log_probs)?, &shown(&reference.detach())?)
}

/// The losses of tokens, (B, T) or (B, 1), as one number.
fn aggregate(losses: &Tensor, mask: &Tensor, num_items: Option<usize>, options: &GrpoLossOptions) -> Result<Tensor> {
    let losses = losses.expand(*mask.shape())?;
    match options.loss {
        GrpoLoss::Grpo => masked_mean(&losses, mask, 1)?.mean(()),
        GrpoLoss::Bnpo => masked_mean(&losses, mask, ()),
        GrpoLoss::DrGrpo => {
            let room = mask.dim(0)?.saturating_mul(options.max_completion_length);
            masked_sum(&losses, mask, ())?.div_scalar(room.max(1) as f64)
        }
        GrpoLoss::Dapo => match num_items {
            Some(count) => masked_sum(&losses, mask, ())?.div_scalar(count.max(1) as f64),
            None => masked_mean(&losses, mask, ()),
        },
    }
}
