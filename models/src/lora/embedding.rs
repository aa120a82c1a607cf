//! The adapter of one Embedding layer.

use super::config::{LoraConfig, LoraInit};
use super::layer::Shared;
use super::select::Target;
use crate::nn::{Adapter, Embedding, Init, Param, Params};
use kiln_tensor::{Result, Tensor, with_autocast};
use std::sync::atomic::Ordering::Relaxed;

/// ΔW = s·(B·A)ᵀ for the table W (entries, width), with A (r, entries) and B (width, r). Without dropout, as in `peft`.
pub(super) struct LoraEmbedding {
    a: Param,
    b: Param,
    /// DoRA's, (width).
    magnitude: Option<Param>,
    scale: f64,
    shared: Shared,
}

impl LoraEmbedding {
    /// New matrices in `scope`, which is called as the layer is.
    pub fn new(scope: &Params, layer: &Embedding, target: &Target, config: &LoraConfig, shared: &Shared) -> Result<Self> {
        let (normal, [entries, width]) = (Init::Normal { mean: 0.0, std: 1.0 }, layer.weight().get().dims_n("lora")?);
        // A row of A is all that an entry trains: B is not zero, so that it learns at once.
        let first = if config.init_lora_weights == LoraInit::Random { normal } else { Init::Zeros };
        let a = scope.param("lora_embedding_A", [target.rank, entries], first)?;
        let b = scope.param("lora_embedding_B", [width, target.rank], normal)?;
        let mut adapter = Self { a, b, magnitude: None, scale: target.scale, shared: shared.clone() };
        if config.use_dora {
            adapter.magnitude = Some(scope.param_from("lora_magnitude_vector", &adapter.norms(layer)?)?);
        }
        Ok(adapter)
    }

    /// W + s·(B·A)ᵀ in the adapter's dtype, untracked.
    fn sum(&self, layer: &Embedding) -> Result<Tensor> {
        let [a, b] = [&self.a, &self.b].map(|param| param.get().detach());
        with_autocast(None, || {
            let weight = layer.weight().get().detach().to_dtype(a.dtype())?;
            weight.add(&a.t()?.matmul(&b.mul_scalar(self.scale)?.t()?)?)
        })
    }

    /// The norm of each column of W + s·(B·A)ᵀ, (width).
    fn norms(&self, layer: &Embedding) -> Result<Tensor> {
        self.sum(layer)?.norm(2.0, 0)?.clamp(f64::from(f32::MIN_POSITIVE), None)
    }

    /// The table that gives the layer the same outputs without the adapter, in the adapter's dtype.
    pub fn merged(&self, layer: &Embedding) -> Result<Tensor> {
        let sum = self.sum(layer)?;
        match &self.magnitude {
            Some(magnitude) => sum.mul(&magnitude.get().detach().div(&self.norms(layer)?)?),
            None => Ok(sum),
        }
    }
}

impl Adapter<Embedding> for LoraEmbedding {
    fn is_active(&self) -> bool {
        self.shared.on.load(Relaxed)
    }

    fn forward(&self, layer: &Embedding, indices: &Tensor) -> Result<Tensor> {
        let base = layer.base(indices)?;
        let update = indices.embedding(&self.a.get().t()?)?.mul_scalar(self.scale)?.linear(&self.b.get(), None)?;
        let dtype = self.a.dtype();
        let mut y = base.to_dtype(dtype)?.add(&update.to_dtype(dtype)?)?;
        if let Some(magnitude) = &self.magnitude {
            y = y.mul(&magnitude.get().div(&self.norms(layer)?)?)?;
        }
        y.to_dtype(base.dtype())
    }

    fn params(&self) -> Vec<Param> {
        [Some(&self.a), Some(&self.b), self.magnitude.as_ref()].into_iter().flatten().cloned().collect()
    }
}
