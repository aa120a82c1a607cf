//! Low-rank adaptation: a few small matrices learn what a frozen model lacks, and are exchanged in the format of the `peft` library.
//!
//! [`LoraConfig`] says which layers and how, [`Lora`] puts the matrices into a built model, trains, merges, saves and loads them.

mod adapter;
mod config;
mod conv;
mod embedding;
mod files;
mod host;
mod layer;
pub(crate) mod nearest;
mod reference;
mod save;
mod select;
mod stack;
mod weights;

pub use adapter::{Disabled, Lora};
pub use config::{Bias, LoraConfig, LoraInit, Modules};
pub use reference::WithoutAdapter;
pub use save::save_lora_weights;
pub use stack::LoraStack;
pub use weights::{LoraPart, LoraWeights};
