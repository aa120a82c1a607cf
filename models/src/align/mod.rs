//! How a language model is aligned: supervised fine-tuning, reward models, PPO, DPO and its kin, GRPO.
//!
//! The losses are functions of tensors, each file a paper: they know no model, and are differentiable like any operation. The numbers are those of
//! TRL, Hugging Face's reference implementation. The trainers step a [`CausalLm`](crate::transformer::CausalLm) by them.

mod check;
mod dpo;
mod grpo;
mod kto;
mod logprobs;
mod orpo;
mod ppo;
mod records;
mod reward;
mod sft;
mod trainer;

pub use dpo::{Completions, DpoLoss, DpoLossOptions, dpo_loss};
pub use grpo::{GrpoLoss, GrpoLossOptions, GrpoOutput, GrpoTokens, ImportanceSampling, RewardScale, group_advantages, grpo_loss};
pub use kto::{KtoLossOptions, kto_kl, kto_loss};
pub use logprobs::{KlEstimator, entropy, masked_mean, masked_sum, token_log_probs, whiten};
pub use orpo::{OrpoLogProbs, orpo_loss};
pub use ppo::{Clipped, gae, policy_loss, token_rewards, value_loss};
pub use records::RecordEncoder;
pub use reward::{PreferenceLoss, RewardLossOptions, reward_loss};
pub use sft::{mask_labels, sft_loss, shift_labels, token_accuracy};
pub(crate) use trainer::learner;
pub use trainer::{
    Completion, DpoMetrics, DpoOptions, DpoTrainer, GrpoMetrics, GrpoOptions, GrpoTrainer, KlControl, PpoMetrics, PpoOptions, PpoTrainer,
    PreferencePair, RewardConfig, RewardMetrics, RewardModel, RewardOptions, RewardTrainer, RolloutRequest, SftMetrics, SftOptions,
    SftTrainer, TrainOptions, ValueModel, linear_decay, sampler, sequence_log_probs,
};
