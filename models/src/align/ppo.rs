//! Proximal policy optimisation on tokens: rewards with a price on leaving the reference, advantages, and the two clipped losses.
//!
//! Source: Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, and *High-Dimensional Continuous Control Using Generalized Advantage
//! Estimation*, 2016; Ziegler et al., *Fine-Tuning Language Models from Human Preferences*, 2019.

use super::check::{expect_alike, expect_not_negative, expect_shape};
use super::logprobs::masked_mean;
use kiln_tensor::{DType, Result, Shape, Tensor};

/// A clipped loss of masked tokens.
#[derive(Clone, Debug)]
pub struct Clipped {
    /// The mean over the tokens, a scalar.
    pub loss: Tensor,
    /// The share of tokens in which the clipped form is the larger one, a scalar without gradient.
    pub clip_fraction: Tensor,
}

/// The reward of each token: −`kl_coef` · kl, and the answer's score besides at its last token; 0 elsewhere.
///
/// `kl` is (B, T), as a [`KlEstimator`](super::KlEstimator) gives it, `scores` (B), `mask` (B, T) true on the answer's tokens. An answer without
/// tokens keeps no score. (TRL gives the score one step behind the last token where there is room for that.)
///
/// # Errors
/// If the shapes do not fit.
pub fn token_rewards(kl: &Tensor, scores: &Tensor, mask: &Tensor, kl_coef: f64) -> Result<Tensor> {
    let [batch, length] = kl.dims_n("token_rewards")?;
    expect_alike("token_rewards", &[("kl", kl), ("mask", mask)])?;
    expect_shape("token_rewards", "scores", scores, &Shape::new(&[batch])?)?;
    let price = kl.mul_scalar(-kl_coef)?.masked_fill(&mask.logical_not()?, 0.0)?;
    if length == 0 {
        return Ok(price);
    }
    // The last token is the one by which all have come.
    let count = mask.to_dtype(DType::I64)?.cumsum(1)?;
    let last = mask.logical_and(&count.eq(&count.narrow(1, length - 1, 1)?)?)?;
    price.add(&scores.unsqueeze(1)?.to_dtype(kl.dtype())?.masked_fill(&last.logical_not()?, 0.0)?)
}

/// Generalised advantage estimation: A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s with δ_t = r_t + γ V_{t+1} − V_t, and the returns A_t + V_t.
///
/// `rewards`, `values` and `mask` are (B, T). Time runs over the tokens that the mask shows; behind the last, the value is 0, and hidden
/// places become 0. Neither result has a gradient.
///
/// # Errors
/// If the shapes differ.
pub fn gae(rewards: &Tensor, values: &Tensor, mask: &Tensor, gamma: f64, lambda: f64) -> Result<(Tensor, Tensor)> {
    let [_, length] = rewards.dims_n("gae")?;
    expect_alike("gae", &[("rewards", rewards), ("values", values), ("mask", mask)])?;
    let numbers = |x: &Tensor| x.detach().to_dtype(DType::F64)?.to_vec::<f64>();
    let (reward, value, shown) = (numbers(rewards)?, numbers(values)?, mask.to_vec::<bool>()?);
    let (mut advantages, mut returns) = (vec![0.0; shown.len()], vec![0.0; shown.len()]);
    for start in (0..shown.len()).step_by(length.max(1)) {
        let (mut next_value, mut next_advantage) = (0.0, 0.0);
        for t in (start..start + length).rev().filter(|&t| shown[t]) {
            let delta = reward[t] + gamma * next_value - value[t];
            next_advantage = delta + gamma * lambda * next_advantage;
            next_value = value[t];
            (advantages[t], returns[t]) = (next_advantage, next_advantage + value[t]);
        }
    }
    let like = |x: Vec<f64>| Tensor::from_vec(x, *rewards.shape())?.to_dtype(rewards.dtype())?.to_device(rewards.device());
    Ok((like(advantages)?, like(returns)?))
}

/// mean max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)) over the tokens of `mask`, with ρ = exp(log π − log π_old); all (B, T).
///
/// # Errors
/// If shapes differ or ε is negative.
pub fn policy_loss(log_probs: &Tensor, old_log_probs: &Tensor, advantages: &Tensor, mask: &Tensor, cliprange: f64) -> Result<Clipped> {
    let operands = [("log_probs", log_probs), ("old_log_probs", old_log_probs), ("advantages", advantages), ("mask", mask)];
    expect_alike("policy_loss", &operands)?;
    expect_not_negative("policy_loss", "cliprange", cliprange)?;
    // Hidden places may hold anything, whose exponential could overflow: there the ratio is 1.
    let log_ratio = log_probs.sub(&old_log_probs.detach())?.masked_fill(&mask.logical_not()?, 0.0)?;
    let (ratio, gain) = (log_ratio.exp()?, advantages.detach().neg()?);
    let free = ratio.mul(&gain)?;
    let clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)?.mul(&gain)?;
    larger(&free, &clipped, mask)
}

/// ½ mean max((V − R)², (V_old + clip(V − V_old, ±ε) − R)²) over the tokens of `mask`, R being the returns; all (B, T).
///
/// # Errors
/// If shapes differ or ε is negative.
pub fn value_loss(values: &Tensor, old_values: &Tensor, returns: &Tensor, mask: &Tensor, cliprange_value: f64) -> Result<Clipped> {
    let operands = [("values", values), ("old_values", old_values), ("returns", returns), ("mask", mask)];
    expect_alike("value_loss", &operands)?;
    expect_not_negative("value_loss", "cliprange_value", cliprange_value)?;
    let (old, returns) = (old_values.detach(), returns.detach());
    let moved = values.sub(&old)?.clamp(-cliprange_value, cliprange_value)?.add(&old)?;
    let Clipped { loss, clip_fraction } = larger(&values.sub(&returns)?.square()?, &moved.sub(&returns)?.square()?, mask)?;
    Ok(Clipped { loss: loss.mul_scalar(0.5)?, clip_fraction })
}

/// The mean of the larger of two losses.
fn larger(free: &Tensor, clipped: &Tensor, mask: &Tensor) -> Result<Clipped> {
    let is_clipped = clipped.detach().gt(&free.detach())?.to_dtype(free.dtype())?;
    Ok(Clipped { loss: masked_mean(&free.maximum(clipped)?, mask, ())?, clip_fraction: masked_mean(&is_clipped, mask, ())? })
}
