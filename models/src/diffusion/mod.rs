//! Diffusion models: schedulers, networks, their training, and pipelines that draw.

pub(crate) mod blocks;
mod denoiser;
mod dit;
pub mod guidance;
pub mod ldm;
pub mod objective;
pub mod pipeline;
pub mod schedulers;
mod trainer;
pub mod unet;

pub use denoiser::{Denoiser, Samples, Sampling, sample};
pub use dit::{Dit, DitConfig};
pub use trainer::{DiffusionStep, DiffusionTrainer, DiffusionTrainerOptions};
