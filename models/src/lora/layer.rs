//! The adapter of one Linear layer: its matrices, its forward pass, and the weight that it amounts to.

use super::config::{LoraConfig, LoraInit};
use super::select::Target;
use crate::nn::{Adapter, Init, Linear, Mode, Param, Params};
use kiln_tensor::{DType, Generator, Result, Tensor, autocast_dtype, with_autocast};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// What all layers of one adapter share.
#[derive(Clone)]
pub(super) struct Shared {
    /// Whether the layers ask the adapter.
    pub on: Arc<AtomicBool>,
    /// The model's switch between training and evaluation.
    pub mode: Mode,
    pub generator: Generator,
    pub dropout: f64,
}

impl Shared {
    /// The input of an update with dropout, in training.
    pub fn dropped(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let drops = self.dropout > 0.0 && self.mode.is_training();
        drops.then(|| self.generator.dropout(x, self.dropout)).transpose()
    }
}

/// ΔW = s·B·A for the weight W (outputs, inputs), with A (r, inputs) and B (outputs, r).
pub(super) struct LoraLinear {
    a: Param,
    b: Param,
    /// DoRA's, (outputs).
    magnitude: Option<Param>,
    scale: f64,
    shared: Shared,
}

impl LoraLinear {
    /// New matrices in `scope`, which is called as the layer is.
    pub fn new(scope: &Params, layer: &Linear, target: &Target, config: &LoraConfig, shared: &Shared) -> Result<Self> {
        let Target { rank, scale, .. } = target;
        let (first_a, first_b) = match config.init_lora_weights {
            LoraInit::KaimingUniform => (Init::default_weight(), Init::Zeros),
            LoraInit::Gaussian => (Init::Normal { mean: 0.0, std: 1.0 / *rank as f64 }, Init::Zeros),
            LoraInit::Random => (Init::default_weight(), Init::default_weight()),
        };
        let a = scope.scope("lora_A").param("weight", [*rank, layer.inputs()], first_a)?;
        let b = scope.scope("lora_B").param("weight", [layer.outputs(), *rank], first_b)?;
        let mut adapter = Self { a, b, magnitude: None, scale: *scale, shared: shared.clone() };
        if config.use_dora {
            adapter.magnitude = Some(scope.param_from("lora_magnitude_vector", &adapter.norms(layer)?)?);
        }
        Ok(adapter)
    }

    fn dtype(&self) -> DType {
        self.a.dtype()
    }

    /// W + s·B·A in the adapter's dtype, untracked.
    fn sum(&self, layer: &Linear) -> Result<Tensor> {
        let [a, b] = [&self.a, &self.b].map(|param| param.get().detach());
        with_autocast(None, || {
            let weight = layer.weight_values()?.detach().to_dtype(self.dtype())?;
            weight.add(&b.mul_scalar(self.scale)?.matmul(&a)?)
        })
    }

    /// ‖W + s·B·A‖ of each output, (outputs). What has no direction counts as the smallest number, not as zero.
    fn norms(&self, layer: &Linear) -> Result<Tensor> {
        self.sum(layer)?.norm(2.0, -1)?.clamp(f64::from(f32::MIN_POSITIVE), None)
    }

    /// The weight that gives the layer the same outputs without the adapter, in the adapter's dtype.
    pub fn merged(&self, layer: &Linear) -> Result<Tensor> {
        let sum = self.sum(layer)?;
        match &self.magnitude {
            Some(magnitude) => sum.mul(&magnitude.get().detach().div(&self.norms(layer)?)?.unsqueeze(-1)?),
            None => Ok(sum),
        }
    }

    /// s·B·(A·x), (…, outputs).
    fn update(&self, x: &Tensor) -> Result<Tensor> {
        let x = if autocast_dtype().is_some() { x.clone() } else { x.to_dtype(self.dtype())? };
        x.linear(&self.a.get(), None)?.mul_scalar(self.scale)?.linear(&self.b.get(), None)
    }

    /// m/‖W + s·B·A‖ · (W + s·B·A)·x + b. As the paper proposes (section 4.3), the norm is a constant to the backward pass.
    fn dora(&self, layer: &Linear, x: &Tensor, magnitude: &Param) -> Result<Tensor> {
        let ratio = magnitude.get().div(&self.norms(layer)?)?;
        let dtype = ratio.dtype();
        if let Some(dropped) = self.shared.dropped(x)? {
            // Dropout concerns what differs from the base layer, whose own product sees all of x.
            let base = layer.base(x)?;
            let product = layer.base_product(&dropped)?.to_dtype(dtype)?;
            let update = self.update(&dropped)?.to_dtype(dtype)?;
            let change = ratio.sub_scalar(1.0)?.mul(&product)?.add(&ratio.mul(&update)?)?;
            return base.add(&change.to_dtype(base.dtype())?);
        }
        let product = layer.base_product(x)?;
        let y = product.to_dtype(dtype)?.add(&self.update(x)?.to_dtype(dtype)?)?.mul(&ratio)?.to_dtype(product.dtype())?;
        match layer.bias() {
            Some(bias) => y.add(&bias.get().to_dtype(y.dtype())?),
            None => Ok(y),
        }
    }
}

impl Adapter<Linear> for LoraLinear {
    fn is_active(&self) -> bool {
        self.shared.on.load(Relaxed)
    }

    fn forward(&self, layer: &Linear, x: &Tensor) -> Result<Tensor> {
        if let Some(magnitude) = &self.magnitude {
            return self.dora(layer, x, magnitude);
        }
        let y = layer.base(x)?;
        let update = self.update(self.shared.dropped(x)?.as_ref().unwrap_or(x))?;
        y.add(&update.to_dtype(y.dtype())?)
    }

    fn params(&self) -> Vec<Param> {
        [Some(&self.a), Some(&self.b), self.magnitude.as_ref()].into_iter().flatten().cloned().collect()
    }
}
