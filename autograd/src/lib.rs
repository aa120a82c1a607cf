//! Transforms of the graph that `kiln-tensor` records: [`backward`](TensorExt::backward), [`grad`], [`vjp`], [`jvp`], [`hvp`],
//! [`jacobian`], [`hessian`], [`checkpoint`], and [`gradcheck`].
//!
//! Nothing here knows a single operation: derivative rules live beside the operations.

mod checkpoint;
mod engine;
mod gradcheck;
mod transforms;

pub use checkpoint::checkpoint;
pub use engine::{GradOptions, TensorExt, grad, grad_with};
pub use gradcheck::{GradCheck, gradcheck, gradgradcheck};
pub use kiln_tensor::graph::{anomaly_mode, is_grad_enabled};
pub use transforms::{hessian, hvp, jacobian, jvp, vjp};

use kiln_tensor::graph::{GradModeGuard, RecordMode, set_record_mode};

/// Runs `f` without recording: nothing it computes is tracked, and nothing is saved for a backward pass.
///
/// ```
/// # use kiln_tensor::{Tensor, Result};
/// # fn main() -> Result<()> {
/// let w = Tensor::ones([2], ())?.requires_grad_()?;
/// let y = kiln_autograd::no_grad(|| w.exp())?;
/// assert!(!y.is_tracked());
/// # Ok(()) }
/// ```
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    let _guard = set_record_mode(RecordMode::Off);
    f()
}

/// Runs `f` with recording on, inside of [`no_grad`] too.
pub fn enable_grad<R>(f: impl FnOnce() -> R) -> R {
    let _guard = set_record_mode(RecordMode::On);
    f()
}

/// [`no_grad`] until the guard is dropped.
#[must_use = "recording resumes when the guard is dropped"]
pub fn no_grad_guard() -> GradModeGuard {
    set_record_mode(RecordMode::Off)
}
