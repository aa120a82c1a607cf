//! [`Embedding`]: a table whose rows are looked up.

use super::{Adapter, Init, Module, Param, Params};
use kiln_tensor::{Result, Tensor};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// Row i of `weight` for each i64 index i: (…) → (…, width).
///
/// Parameters: `weight` (entries, width), standard normal at first. Clones are one layer, as those of [`Linear`](super::Linear) are.
///
/// ```
/// # use kiln_models::nn::{Embedding, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = Embedding::new(&Params::seeded(0), 10, 4)?;
/// assert_eq!(layer.forward(&Tensor::from_vec(vec![3i64, 9, 3], [3])?)?.dims(), [3, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Embedding(Arc<Layer>);

struct Layer {
    name: String,
    weight: Param,
    adapter: RwLock<Option<Arc<dyn Adapter<Embedding>>>>,
}

impl Embedding {
    /// A table of `entries` vectors of `width` elements.
    pub fn new(params: &Params, entries: usize, width: usize) -> Result<Self> {
        Self::with_init(params, entries, width, Init::Normal { mean: 0.0, std: 1.0 })
    }

    /// A table that starts in another way.
    pub fn with_init(params: &Params, entries: usize, width: usize, init: Init) -> Result<Self> {
        let weight = params.param("weight", [entries, width], init)?;
        let layer = Self(Arc::new(Layer { name: params.name().to_owned(), weight, adapter: RwLock::default() }));
        params.register_embedding(&layer);
        Ok(layer)
    }

    /// The full name of the layer's scope, e.g. `transformer.wte`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The table, (entries, width).
    pub fn weight(&self) -> &Param {
        &self.0.weight
    }

    /// Puts an adapter into the layer, for all who hold it, or takes it away; returns the one that was there.
    pub fn set_adapter(&self, adapter: Option<Arc<dyn Adapter<Embedding>>>) -> Option<Arc<dyn Adapter<Embedding>>> {
        std::mem::replace(&mut *self.0.adapter.write().unwrap_or_else(PoisonError::into_inner), adapter)
    }

    /// The adapter that is in the layer.
    pub fn adapter(&self) -> Option<Arc<dyn Adapter<Embedding>>> {
        self.0.adapter.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The rows `start` to `start + len`, (len, width): what [`forward`](Module::forward) gives for these indices, without looking them up.
    ///
    /// # Errors
    /// If the table has fewer.
    pub fn rows(&self, start: usize, len: usize) -> Result<Tensor> {
        let rows = self.0.weight.get().narrow(0, start, len)?;
        match self.active_adapter() {
            Some(adapter) => {
                let indices = Tensor::from_vec((start as i64..(start + len) as i64).collect(), [len])?;
                adapter.forward(self, &indices.to_device(rows.device())?)
            }
            None => Ok(rows),
        }
    }

    fn active_adapter(&self) -> Option<Arc<dyn Adapter<Embedding>>> {
        self.adapter().filter(|adapter| adapter.is_active())
    }

    /// The rows of the table, as without an adapter.
    pub fn base(&self, indices: &Tensor) -> Result<Tensor> {
        indices.embedding(&self.0.weight.get())
    }
}

impl Module for Embedding {
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        match self.active_adapter() {
            Some(adapter) => adapter.forward(self, indices),
            None => self.base(indices),
        }
    }
}

impl fmt::Debug for Embedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Embedding({:?}, adapter {})", self.0.weight, self.adapter().is_some())
    }
}
