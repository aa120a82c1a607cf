//! Kiln: tensors, autograd and generative models from scratch, with hand-written kernels.
//!
//! This crate only gathers what its members offer; start with the [`prelude`].
//!
//! ```
//! use kiln::prelude::*;
//! # fn main() -> kiln::Result<()> {
//! let x = Tensor::from_vec(vec![1f32, 2.0, 3.0], 3)?.requires_grad_()?;
//! let y = (&x * &x)?.sum(())?;
//! y.backward()?;
//! assert_eq!(x.grad().map(|g| g.to_vec::<f32>()).transpose()?, Some(vec![2.0, 4.0, 6.0]));
//! # Ok(()) }
//! ```

pub use kiln_autograd as autograd;
pub use kiln_models::{classifier, data, gan, metrics, nn, optim, report};
pub use kiln_tensor::*;

/// What a program usually needs: `use kiln::prelude::*;`.
pub mod prelude {
    pub use kiln_autograd::{TensorExt, grad, no_grad};
    pub use kiln_models::nn::{Module, Params};
    pub use kiln_models::optim::Optimizer;
    pub use kiln_tensor::{DType, Device, Generator, Tensor, manual_seed};
}
