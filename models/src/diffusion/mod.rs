//! Diffusion models: schedulers, networks, their training, and pipelines that draw.

pub(crate) mod blocks;
mod dit;
pub mod schedulers;
pub mod unet;

pub use dit::{Dit, DitConfig};
