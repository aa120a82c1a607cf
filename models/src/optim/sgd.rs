//! Stochastic gradient descent.

use super::group::{Field, GroupOptimizer, Method, Work, fused, unless, unless_positive};
use kiln_tensor::ops::optim;
use kiln_tensor::{Result, Shape};

/// Stochastic gradient descent with momentum (Polyak, 1964; Sutskever et al., "On the importance of initialization and momentum", 2013):
///
/// ```text
/// g ← g + weight_decay · p
/// b ← momentum · b + (1 − dampening) · g        (b ← g at the first step)
/// g ← g + momentum · b  if nesterov, else b     (only if momentum ≠ 0)
/// p ← p − lr · g
/// ```
///
/// State: `momentum_buffer` b, if momentum ≠ 0.
pub type Sgd = GroupOptimizer<SgdOptions>;

/// Hyper-parameters of [`Sgd`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct SgdOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum buffer.
    pub momentum: f64,
    /// Share of the gradient kept out of the buffer.
    pub dampening: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Looks ahead along the buffer; needs momentum, and no dampening.
    pub nesterov: bool,
}

impl Default for SgdOptions {
    /// PyTorch's: 1e-3, no momentum.
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

impl Method for SgdOptions {
    const NAME: &'static str = "Sgd";
    const TAKES_FACTOR: bool = true;

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("momentum", Field::Number(&mut self.momentum)),
            ("dampening", Field::Number(&mut self.dampening)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("nesterov", Field::Flag(&mut self.nesterov)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        unless_positive("lr", self.lr)
            .or_else(|| unless_positive("momentum", self.momentum))
            .or_else(|| unless(self.dampening.is_finite(), "dampening", self.dampening, "a finite value"))
            .or_else(|| unless_positive("weight_decay", self.weight_decay))
            .or_else(|| unless(!self.nesterov || self.momentum > 0.0, "momentum", self.momentum, "more than 0 with nesterov"))
            .or_else(|| unless(!self.nesterov || self.dampening == 0.0, "dampening", self.dampening, "0 with nesterov"))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        if self.momentum == 0.0 { Vec::new() } else { vec![("momentum_buffer", *shape)] }
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        let Self { lr, momentum, dampening, weight_decay, nesterov } = *self;
        let rule = |step| optim::Sgd { lr, momentum, dampening, weight_decay, nesterov, first_step: step == 1 };
        // Later steps are all alike: one pass for them.
        let work = work.into_iter().map(|w| Work { step: w.step.min(2), ..w }).collect();
        if momentum == 0.0 { fused::<0, _>(work, rule) } else { fused::<1, _>(work, rule) }
    }
}
