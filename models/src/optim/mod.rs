//! Optimisers, learning-rate schedules, gradient clipping, loss scaling and moving averages of weights.
//!
//! A method is a plain struct of hyper-parameters ([`AdamOptions`]); its optimiser ([`Adam`]) is a [`GroupOptimizer`] over it, which
//! keeps the parameter groups, the states and their saving in one place. Formulas and their order of operations are PyTorch's.
//!
//! ```
//! # use kiln_models::nn::Param;
//! # use kiln_models::optim::{Adam, AdamOptions, Optimizer};
//! # use kiln_autograd::TensorExt;
//! # use kiln_tensor::{Result, Tensor};
//! # fn main() -> Result<()> {
//! let w = Param::new("w", &Tensor::ones([3], ())?)?;
//! let mut optimizer = Adam::new([w.clone()], AdamOptions { lr: 0.1, betas: (0.5, 0.999), ..Default::default() })?;
//! for _ in 0..10 {
//!     optimizer.zero_grad();
//!     w.get().mul(&w.get())?.sum(())?.backward()?;
//!     optimizer.step_clipped(1.0)?;
//! }
//! assert!(w.get().to_vec::<f32>()?.iter().all(|x| x.abs() < 0.6));
//! # Ok(()) }
//! ```

mod adafactor;
mod adam;
mod clip;
mod ema;
mod group;
mod lion;
mod muon;
mod rmsprop;
mod scaler;
mod schedule;
mod sgd;
mod state;

pub use adafactor::{Adafactor, AdafactorOptions};
pub use adam::{Adam, AdamOptions, AdamW, AdamWOptions};
pub use clip::{clip_finite_grad_norm, clip_grad_norm, clip_grad_value, grad_norm};
pub use ema::Ema;
pub use group::{Field, GroupOptimizer, Method, Work};
pub use lion::{Lion, LionOptions};
pub use muon::{Muon, MuonOptions, newton_schulz};
pub use rmsprop::{RmsProp, RmsPropOptions};
pub use scaler::{GradScaler, GradScalerOptions};
pub use schedule::{Schedule, Scheduler};
pub use sgd::{Sgd, SgdOptions};

pub use kiln_tensor::ops::optim::Factor;

use crate::nn::StateDict;
use kiln_tensor::{Result, Tensor};

/// Changes parameters along their gradients.
pub trait Optimizer {
    /// One step for every parameter that has a gradient; those without one and frozen ones stay as they are.
    ///
    /// The data is replaced in place if nobody else holds it, else by a copy: a live graph keeps the values it was recorded with.
    fn step(&mut self) -> Result<()> {
        self.step_scaled(&Factor::default())
    }

    /// [`step`](Self::step) with every gradient times `factor`, in the same pass over memory: the gradients themselves stay as they are. A factor of
    /// NaN changes neither parameters nor their states, but counts as a step.
    fn step_scaled(&mut self, factor: &Factor) -> Result<()>;

    /// [`step`](Self::step) with the gradients clipped as by [`clip_grad_norm`], over all parameters that take part: one pass for the norm, and the
    /// update with the factor in it, without a pass that scales. Returns the norm as a scalar in f64; on a GPU nothing waits for it.
    ///
    /// If the norm is infinite or NaN, neither parameters nor their states change (see [`step_scaled`](Self::step_scaled)).
    ///
    /// Parameters of f32 and f64 end with the bits of [`clip_grad_norm`] and [`step`](Self::step); clipped gradients of f16 and bf16 are not rounded
    /// between the two.
    ///
    /// # Errors
    /// If `max_norm` is negative or NaN.
    fn step_clipped(&mut self, max_norm: f64) -> Result<Tensor>;

    /// Forgets the gradients of all parameters.
    fn zero_grad(&self);

    /// The learning rate of every parameter group.
    fn lrs(&self) -> Vec<f64>;

    /// Sets the learning rate of every parameter group; an error unless there is one value, finite and ≥ 0, for each.
    fn set_lrs(&mut self, lrs: &[f64]) -> Result<()>;

    /// The learning rate of the first group.
    fn lr(&self) -> f64 {
        self.lrs().first().copied().unwrap_or(0.0)
    }

    /// Sets the learning rate of all groups.
    fn set_lr(&mut self, lr: f64) -> Result<()> {
        let groups = self.lrs().len();
        self.set_lrs(&vec![lr; groups])
    }

    /// Everything that the next steps depend on besides the parameters: `group.<index>.<hyper-parameter>` (f64),
    /// `state.<parameter name>.step` (i64) and `state.<parameter name>.<state>`, PyTorch's names. Restoring it continues bit for bit.
    fn state_dict(&self) -> Result<StateDict>;

    /// Restores what [`state_dict`](Self::state_dict) gave for an optimiser of the same method, groups and parameter names.
    ///
    /// # Errors
    /// A missing or unexpected name, another shape or dtype, or a hyper-parameter out of its domain. Then nothing has changed.
    fn load_state_dict(&mut self, dict: &StateDict) -> Result<()>;
}
