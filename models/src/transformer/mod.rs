//! Transformers: one set of blocks, and the families made of them, each a short file.
//!
//! A decoder-only model of any family is a [`CausalLm`]: generation, training and alignment know no more of it.

mod cache;
mod model;

pub use cache::KvCache;
pub use model::{CausalLm, LmShape, Pass};
