//! Kiln's models: layers, optimisers, data and the model families.

pub mod align;
pub mod classifier;
pub mod clip;
pub mod data;
pub mod diffusion;
pub mod gan;
pub mod generate;
pub mod gguf;
pub mod lora;
pub mod metrics;
pub mod nn;
pub mod optim;
pub mod pretrained;
pub mod report;
pub mod text;
pub mod transformer;
pub mod vae;
