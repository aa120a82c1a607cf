//! Transformers: one set of blocks, and the families made of them, each a short file.
//!
//! A decoder-only model of any family is a [`CausalLm`], one with an encoder a [`Seq2SeqLm`]: generation, training and alignment know
//! no more of it.

mod attention;
mod block;
mod cache;
mod checkpoint;
mod context;
mod decoder;
mod gguf;
mod gpt2;
mod llama;
mod model;
mod opt;
mod rope;
mod trainer;

pub use cache::{KvCache, Seq2SeqCache};
pub use checkpoint::{CausalConfig, Layout, Pretrained, load, load_pretrained, save_pretrained};
pub use decoder::Decoder;
pub use gguf::{gguf_config, load_gguf};
pub use gpt2::Gpt2Config;
pub use llama::{LlamaConfig, LlamaKind, RopeParameters};
pub use model::{CausalLm, Encoded, LmShape, Pass, Seq2SeqLm};
pub use opt::OptConfig;
pub use rope::{RopeConfig, RopeScaling};
pub use trainer::{IGNORE_INDEX, LmBatch, LmStep, LmTrainer, LmTrainerOptions, lm_loss_sum, training_flops_per_token};
