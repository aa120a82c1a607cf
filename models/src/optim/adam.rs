//! Adam and AdamW.

use super::group::{Field, GroupOptimizer, Method, Work, fused, unless_decay, unless_positive};
use kiln_tensor::ops::optim;
use kiln_tensor::{Result, Shape};

/// Adam (Kingma and Ba, "Adam: a method for stochastic optimization", 2015), at step t:
///
/// ```text
/// g ← g + weight_decay · p
/// m ← m + (1 − β₁)(g − m)
/// v ← β₂ v + (1 − β₂) g²
/// p ← p − lr / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
/// ```
///
/// With `amsgrad` (Reddi et al., "On the convergence of Adam and beyond", 2018) the running maximum of v stands under the root.
/// States: `exp_avg` m, `exp_avg_sq` v, and `max_exp_avg_sq` with `amsgrad`.
pub type Adam = GroupOptimizer<AdamOptions>;

/// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019): [`Adam`] with `p ← p · (1 − lr · weight_decay)` before
/// the step in place of the penalty on the gradient. States as [`Adam`].
pub type AdamW = GroupOptimizer<AdamWOptions>;

/// Hyper-parameters of [`Adam`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Keeps the maximum of the second moment.
    pub amsgrad: bool,
}

/// Hyper-parameters of [`AdamW`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamWOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first and of the second moment.
    pub betas: (f64, f64),
    /// Added to the root.
    pub eps: f64,
    /// Decay of the parameters, decoupled from the gradient: the share of `lr` that they lose in a step.
    pub weight_decay: f64,
    /// Keeps the maximum of the second moment.
    pub amsgrad: bool,
}

impl Default for AdamOptions {
    /// PyTorch's: 1e-3, (0.9, 0.999), 1e-8.
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.0, amsgrad: false }
    }
}

impl Default for AdamWOptions {
    /// PyTorch's: 1e-3, (0.9, 0.999), 1e-8, 0.01.
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01, amsgrad: false }
    }
}

impl AdamOptions {
    fn update(&self, work: Vec<Work<'_>>, decoupled: bool) -> Result<()> {
        let Self { lr, betas: (beta1, beta2), eps, weight_decay, amsgrad } = *self;
        let rule = |step| optim::Adam { lr, beta1, beta2, eps, weight_decay, decoupled, step };
        if amsgrad { fused::<3, _>(work, rule) } else { fused::<2, _>(work, rule) }
    }
}

impl AdamWOptions {
    /// The same numbers as Adam's, which share checks, states and kernel.
    fn as_adam(&self) -> AdamOptions {
        let Self { lr, betas, eps, weight_decay, amsgrad } = *self;
        AdamOptions { lr, betas, eps, weight_decay, amsgrad }
    }

    /// A step in which the caller chose what takes part.
    pub(super) fn step(&self, work: Vec<Work<'_>>) -> Result<()> {
        self.as_adam().update(work, true)
    }
}

impl Method for AdamOptions {
    const NAME: &'static str = "Adam";
    const TAKES_FACTOR: bool = true;

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("beta1", Field::Number(&mut self.betas.0)),
            ("beta2", Field::Number(&mut self.betas.1)),
            ("eps", Field::Number(&mut self.eps)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("amsgrad", Field::Flag(&mut self.amsgrad)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        unless_positive("lr", self.lr)
            .or_else(|| unless_decay("beta1", self.betas.0))
            .or_else(|| unless_decay("beta2", self.betas.1))
            .or_else(|| unless_positive("eps", self.eps))
            .or_else(|| unless_positive("weight_decay", self.weight_decay))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        let names = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];
        names.into_iter().take(if self.amsgrad { 3 } else { 2 }).map(|name| (name, *shape)).collect()
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        self.update(work, false)
    }
}

impl Method for AdamWOptions {
    const NAME: &'static str = "AdamW";
    const TAKES_FACTOR: bool = true;

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("beta1", Field::Number(&mut self.betas.0)),
            ("beta2", Field::Number(&mut self.betas.1)),
            ("eps", Field::Number(&mut self.eps)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("amsgrad", Field::Flag(&mut self.amsgrad)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        self.as_adam().invalid()
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        self.as_adam().states(shape)
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        self.step(work)
    }
}
