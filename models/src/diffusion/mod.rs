//! Diffusion models: schedulers, networks, their training, and pipelines that draw.

pub(crate) mod blocks;
pub mod schedulers;
pub mod unet;
