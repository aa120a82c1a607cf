//! Transformers: one set of blocks, and the families made of them, each a short file.
//!
//! A decoder-only model of any family is a [`CausalLm`], one with an encoder a [`Seq2SeqLm`]: generation, training and alignment know
//! no more of it.

pub(crate) mod attention;
mod bert;
pub(crate) mod block;
mod cache;
mod checkpoint;
pub(crate) mod context;
mod decoder;
mod gguf;
mod gpt2;
mod llama;
mod m2m100;
mod model;
mod opt;
mod positions;
mod rope;
mod seq2seq;
mod t5;
mod trainer;

use crate::pretrained::cannot_untie;
pub use crate::pretrained::{Layout, Library, Pretrained, load_for_tuning, load_pretrained, load_pretrained_variant, save_pretrained};
pub use bert::{BertConfig, BertForMaskedLm, BertForSequenceClassification, MaskedLm, SequenceClassifier};
pub use cache::{KvCache, Seq2SeqCache};
pub use checkpoint::{CausalConfig, load};
pub use decoder::Decoder;
pub use gguf::{gguf_config, load_gguf};
pub use gpt2::Gpt2Config;
pub use llama::{LlamaConfig, LlamaKind, RopeParameters};
pub use m2m100::M2m100Config;
pub use model::{CausalLm, Encoded, LmShape, Pass, Seq2SeqLm};
pub use opt::OptConfig;
pub use rope::{RopeConfig, RopeScaling};
pub use seq2seq::{EncoderDecoder, Seq2SeqConfig, load_seq2seq};
pub use t5::T5Config;
pub use trainer::{LmBatch, LmStep, LmTrainer, LmTrainerOptions, lm_loss_sum, training_flops_per_token};
