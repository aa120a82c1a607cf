//! What changes a layer from outside.

use super::Param;
use kiln_tensor::{Result, Tensor};

/// What changes the function of a layer `L` ([`Linear`](super::Linear), [`Embedding`](super::Embedding), [`Conv`](super::Conv)) while its own
/// weight stays as it is, such as a low-rank adapter.
pub trait Adapter<L>: Send + Sync {
    /// Whether the layer asks it at all. If not, the layer computes what it does without one, as fast.
    fn is_active(&self) -> bool;

    /// The layer's output for `x`. What the layer gives on its own is its `base`.
    fn forward(&self, layer: &L, x: &Tensor) -> Result<Tensor>;

    /// The adapter's own parameters.
    fn params(&self) -> Vec<Param> {
        Vec::new()
    }
}
