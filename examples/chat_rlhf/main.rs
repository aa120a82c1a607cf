//! The whole road to an aligned chat model, small enough for minutes: pre-training, supervised fine-tuning, a reward model from preferences, and PPO,
//! GRPO or DPO. `cargo run --example chat_rlhf -- --method grpo`
//!
//! The task is to say something happy or sad about a thing. A program judges that, so success before and after is measured. Demonstrations are of
//! the right mood in two of three cases only: what lies above is what alignment has to find. Each stage writes its model as a folder in Hugging
//! Face's layout, its numbers as CSV and its curves as PNG to `out/chat_rlhf/`; at the end stands a table on prompts that no stage has seen.

mod evaluation;
mod road;

use clap::{Parser, ValueEnum};
use kiln::{Device, Result, set_default_device};
use road::Road;
use std::path::PathBuf;

/// Pre-trains, fine-tunes and aligns a small chat model, and measures what that was good for.
///
/// Without data of your own it learns to say happy and sad sentences. Files of your own are JSONL.
#[derive(Parser)]
struct Args {
    /// How the policy is aligned.
    #[arg(long, value_enum, default_value = "ppo")]
    method: Method,
    /// What judges answers in PPO and GRPO: the reward model, or the program. PPO's default is the model, GRPO's the program.
    #[arg(long, value_enum)]
    reward: Option<Judge>,
    /// Text to pre-train on, instead of generated stories: a text file, or JSONL with `text`.
    #[arg(long)]
    data_pretrain: Option<PathBuf>,
    /// Demonstrations, instead of generated ones: `prompt` and `completion`, or `messages`.
    #[arg(long)]
    data_sft: Option<PathBuf>,
    /// Preferences, instead of generated ones: `chosen` and `rejected`, and a `prompt` if it is apart.
    #[arg(long)]
    data_preferences: Option<PathBuf>,
    /// Prompts to align and to measure on, instead of generated ones: `prompt`. A tenth is held out. No program judges their answers.
    #[arg(long)]
    data_prompts: Option<PathBuf>,
    /// Steps of the pre-training.
    #[arg(long, default_value_t = 1500)]
    steps_pretrain: u64,
    /// Steps of the supervised fine-tuning.
    #[arg(long, default_value_t = 600)]
    steps_sft: u64,
    /// Steps of the reward model.
    #[arg(long, default_value_t = 600)]
    steps_reward: u64,
    /// Rounds of PPO (80 by default) or GRPO (120), or steps of DPO (300).
    #[arg(long)]
    steps: Option<u64>,
    /// Texts or pairs of a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Answers of a round of PPO or GRPO.
    #[arg(long, default_value_t = 64)]
    answers: usize,
    /// Answers to each prompt in GRPO.
    #[arg(long, default_value_t = 8)]
    group_size: usize,
    /// The learning rate of the alignment, instead of the method's.
    #[arg(long)]
    lr: Option<f64>,
    /// The price of leaving the fine-tuned model (β), instead of the method's.
    #[arg(long)]
    kl_coef: Option<f64>,
    /// Train an adapter of this rank (LoRA) in the alignment, instead of all weights; it is merged at the end.
    #[arg(long)]
    lora: Option<usize>,
    /// Layers of the model.
    #[arg(long, default_value_t = 3)]
    layers: usize,
    /// Width of the model.
    #[arg(long, default_value_t = 96)]
    width: usize,
    /// Attention heads of the model; the width is a multiple of them.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// The longest text, in tokens; longer ones are cut.
    #[arg(long, default_value_t = 64)]
    context: usize,
    /// Entries of the vocabulary, learned from the text.
    #[arg(long, default_value_t = 768)]
    vocab_size: usize,
    /// Tokens of an answer at most.
    #[arg(long, default_value_t = 32)]
    max_new_tokens: usize,
    /// Rounds between measurements on prompts that are held out.
    #[arg(long, default_value_t = 5)]
    eval_every: u64,
    /// Answers in the table's measurements; those between have a quarter.
    #[arg(long, default_value_t = 480)]
    eval_samples: usize,
    /// Take stages whose folders are there as they are.
    #[arg(long)]
    reuse: bool,
    /// Seed of weights, data and draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/chat_rlhf")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Method {
    Ppo,
    Grpo,
    Dpo,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Judge {
    Model,
    Program,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    let road = Road::new(args)?;
    road.supervised()?;
    road.reward_model()?;
    road.align()
}
