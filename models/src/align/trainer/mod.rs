//! What trains a model by each method: a step on a batch of texts or prompts, and all the state that continues a run bit for bit.
//!
//! Texts are token ids with a mask, of any lengths; a trainer pads them, and the model computes logits only where a token is to be learned.

mod batch;
mod dpo;
mod grpo;
pub(crate) mod learner;
mod ppo;
mod reward;
mod rollout;
mod sft;

pub use batch::{PreferencePair, sequence_log_probs};
pub use dpo::{DpoMetrics, DpoOptions, DpoTrainer};
pub use grpo::{GrpoMetrics, GrpoOptions, GrpoTrainer};
pub use learner::{TrainOptions, linear_decay};
pub use ppo::{KlControl, PpoMetrics, PpoOptions, PpoTrainer};
pub use reward::{RewardConfig, RewardMetrics, RewardModel, RewardOptions, RewardTrainer, ValueModel};
pub use rollout::{Completion, RolloutRequest, sampler};
pub use sft::{SftMetrics, SftOptions, SftTrainer};
