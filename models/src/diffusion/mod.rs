//! Diffusion models: schedulers, networks, their training, and pipelines that draw.

pub(crate) mod blocks;
mod dit;
pub mod schedulers;

pub use dit::{Dit, DitConfig};
