//! Functions of one element, or of one element of each operand.

mod activation;
mod binary;
mod cast;
mod compare;
mod fuse;
mod kernel;
mod operators;
mod scalar;
mod select;
mod terms;
mod unary;

pub use activation::Activation;
pub(crate) use fuse::fused;
pub use fuse::{Expr, Fused, fuse};
