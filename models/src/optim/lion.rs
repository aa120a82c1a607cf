//! Lion.

use super::group::{Field, GroupOptimizer, Method, Work, fused, unless_decay, unless_positive};
use kiln_tensor::ops::optim;
use kiln_tensor::{Result, Shape};

/// Lion (Chen et al., "Symbolic discovery of optimization algorithms", 2023):
///
/// ```text
/// p ← p · (1 − lr · weight_decay)
/// p ← p − lr · sign(β₁ m + (1 − β₁) g)
/// m ← β₂ m + (1 − β₂) g
/// ```
///
/// Every element moves by `lr` in each step, so the rate should be 3 to 10 times smaller than AdamW's, and the decay as much larger.
/// State: `exp_avg` m.
pub type Lion = GroupOptimizer<LionOptions>;

/// Hyper-parameters of [`Lion`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct LionOptions {
    /// Learning rate.
    pub lr: f64,
    /// Weight of the momentum in the update, and its decay.
    pub betas: (f64, f64),
    /// Strength of the decoupled decay.
    pub weight_decay: f64,
}

impl Default for LionOptions {
    /// The paper's: 1e-4, (0.9, 0.99), no decay.
    fn default() -> Self {
        Self { lr: 1e-4, betas: (0.9, 0.99), weight_decay: 0.0 }
    }
}

impl Method for LionOptions {
    const NAME: &'static str = "Lion";
    const TAKES_FACTOR: bool = true;

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("beta1", Field::Number(&mut self.betas.0)),
            ("beta2", Field::Number(&mut self.betas.1)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        unless_positive("lr", self.lr)
            .or_else(|| unless_decay("beta1", self.betas.0))
            .or_else(|| unless_decay("beta2", self.betas.1))
            .or_else(|| unless_positive("weight_decay", self.weight_decay))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        vec![("exp_avg", *shape)]
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        let Self { lr, betas: (beta1, beta2), weight_decay } = *self;
        // The rule does not depend on the step.
        let work = work.into_iter().map(|w| Work { step: 1, ..w }).collect();
        fused::<1, _>(work, |_| optim::Lion { lr, beta1, beta2, weight_decay })
    }
}
