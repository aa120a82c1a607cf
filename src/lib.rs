//! Kiln: tensors, autograd and generative models from scratch, with hand-written kernels.
//!
//! This crate only gathers what its members offer; start with the [`prelude`]. Models of any family are read from and written to folders
//! with [`pretrained`].
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
//!
//! # An operation of your own
//!
//! An operation computes its output from untracked inputs and hands [`graph::record`] its derivative rule. A rule that is written in
//! Tensor operations can be differentiated again; [`gradcheck`](autograd::gradcheck()) and
//! [`gradgradcheck`](autograd::gradgradcheck) compare it with central differences.
//!
//! ```
//! use kiln::autograd::{gradcheck, gradgradcheck};
//! use kiln::graph::{Ctx, Grads, Op, record};
//! use kiln::prelude::*;
//!
//! /// x / (1 + |x|)
//! fn softsign(x: &Tensor) -> kiln::Result<Tensor> {
//!     let data = x.detach();
//!     let out = (&data / &data.abs()?.add_scalar(1.0)?)?;
//!     record("softsign", out, &[x], |_| Softsign { x: x.clone() })
//! }
//!
//! struct Softsign {
//!     x: Tensor,
//! }
//!
//! impl Op for Softsign {
//!     fn name(&self) -> &'static str {
//!         "softsign"
//!     }
//!
//!     // 1 / (1 + |x|)²
//!     fn vjp(&self, _: &Ctx, grad: &Tensor) -> kiln::Result<Grads> {
//!         Ok(vec![Some((grad / &self.x.abs()?.add_scalar(1.0)?.square()?)?)])
//!     }
//! }
//!
//! # fn main() -> kiln::Result<()> {
//! let x = Tensor::from_vec(vec![-2.0f64, -0.5, 0.25, 3.0], 4)?;
//! gradcheck(|x| softsign(&x[0]), &[x.clone()])?;
//! gradgradcheck(|x| softsign(&x[0]), &[x])?;
//! # Ok(()) }
//! ```

pub use kiln_autograd as autograd;
pub use kiln_models::{
    align, classifier, clip, data, diffusion, gan, generate, gguf, lora, metrics, nn, optim, pretrained, report, text, transformer, vae,
};
pub use kiln_tensor::*;

/// What a program usually needs: `use kiln::prelude::*;`.
pub mod prelude {
    pub use kiln_autograd::{TensorExt, grad, no_grad};
    pub use kiln_models::nn::{Module, Params};
    pub use kiln_models::optim::Optimizer;
    pub use kiln_tensor::{DType, Device, Generator, Tensor, manual_seed};
}
