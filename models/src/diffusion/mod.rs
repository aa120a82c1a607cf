//! Diffusion models: schedulers, networks, their training, and pipelines that draw.

pub(crate) mod blocks;
pub mod guidance;
pub mod ldm;
pub mod objective;
pub mod pipeline;
pub mod schedulers;
pub mod unet;
