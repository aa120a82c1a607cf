//! RMSprop.

use super::group::{Field, GroupOptimizer, Method, Work, fused, unless_positive};
use kiln_tensor::ops::optim;
use kiln_tensor::{Result, Shape};

/// RMSprop (Hinton, lecture 6e of "Neural networks for machine learning", 2012; centred: Graves, "Generating sequences with recurrent
/// neural networks", 2013):
///
/// ```text
/// g ← g + weight_decay · p
/// v ← α v + (1 − α) g²
/// a ← a + (1 − α)(g − a)                      (centred; then v − a² stands under the root)
/// b ← momentum · b + g / (√v + ε)             (with momentum; then b is the direction)
/// p ← p − lr · g / (√v + ε)
/// ```
///
/// States: `square_avg` v, `momentum_buffer` b if momentum ≠ 0 or centred, `grad_avg` a if centred.
pub type RmsProp = GroupOptimizer<RmsPropOptions>;

/// Hyper-parameters of [`RmsProp`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RmsPropOptions {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the averages.
    pub alpha: f64,
    /// Added to the root.
    pub eps: f64,
    /// L2 penalty, added to the gradient.
    pub weight_decay: f64,
    /// Decay of the momentum buffer.
    pub momentum: f64,
    /// Divides by the standard deviation of the gradient instead of its root mean square.
    pub centered: bool,
}

impl Default for RmsPropOptions {
    /// PyTorch's: 1e-2, 0.99, 1e-8.
    fn default() -> Self {
        Self { lr: 1e-2, alpha: 0.99, eps: 1e-8, weight_decay: 0.0, momentum: 0.0, centered: false }
    }
}

impl Method for RmsPropOptions {
    const NAME: &'static str = "RmsProp";
    const TAKES_FACTOR: bool = true;

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("alpha", Field::Number(&mut self.alpha)),
            ("eps", Field::Number(&mut self.eps)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("momentum", Field::Number(&mut self.momentum)),
            ("centered", Field::Flag(&mut self.centered)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        let positive =
            [("lr", self.lr), ("alpha", self.alpha), ("eps", self.eps), ("weight_decay", self.weight_decay), ("momentum", self.momentum)];
        positive.into_iter().find_map(|(name, value)| unless_positive(name, value))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        let names = ["square_avg", "momentum_buffer", "grad_avg"];
        let count = match (self.centered, self.momentum == 0.0) {
            (true, _) => 3,
            (false, false) => 2,
            (false, true) => 1,
        };
        names.into_iter().take(count).map(|name| (name, *shape)).collect()
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        let Self { lr, alpha, eps, weight_decay, momentum, centered } = *self;
        let rule = optim::RmsProp { lr, alpha, eps, weight_decay, momentum };
        // No rule depends on the step.
        let work = work.into_iter().map(|w| Work { step: 1, ..w }).collect();
        match (centered, momentum == 0.0) {
            (true, _) => fused::<3, _>(work, |_| rule),
            (false, false) => fused::<2, _>(work, |_| rule),
            (false, true) => fused::<1, _>(work, |_| rule),
        }
    }
}
