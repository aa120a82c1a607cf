//! Kiln's models: layers, optimisers, data and the model families.

pub mod classifier;
pub mod data;
pub mod gan;
pub mod generate;
pub mod gguf;
pub mod lora;
pub mod metrics;
pub mod nn;
pub mod optim;
pub mod report;
pub mod transformer;
