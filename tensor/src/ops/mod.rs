//! Every operation, a room a family.
//!
//! An operation is: checks and the shape rule, the forward pass (a call of a kernel), and an [`Op`](crate::graph::Op) whose
//! `vjp` is written in differentiable Tensor operations. What it saves is only what the rule reads, and only where a parent
//! is tracked ([`Needs::save_for`](crate::graph::Needs::save_for)). A rule returns gradients in the broadcast shape; the
//! engine sums them down to each input's.
//!
//! A public function that is generic for its caller's comfort (`impl Into<Dims>`) converts its arguments and calls one that is not: a generic
//! body would be compiled in the caller's crate, kernels included, and with that crate's optimisation.

pub mod attention;
pub mod conv;
pub mod einsum;
pub mod index;
pub mod loss;
pub mod movement;
pub mod norm;
pub mod optim;
pub mod pointwise;
pub mod pool;
pub mod product;
pub mod quantized;
pub mod random;
pub mod reduce;
pub mod rotary;
pub mod softmax;
pub mod sort;
mod spatial;
pub mod upsample;

pub use spatial::PerAxis;
