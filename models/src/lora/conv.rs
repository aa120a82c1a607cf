//! The adapter of one convolution of images.

use super::config::{LoraConfig, LoraInit};
use super::layer::Shared;
use super::select::Target;
use crate::nn::{Adapter, Conv2d, Init, Param, Params};
use kiln_tensor::{DType, Error, Result, Tensor, autocast_dtype, with_autocast};
use std::sync::atomic::Ordering::Relaxed;

/// What a convolution down to the rank and a 1×1 convolution up from it amount to, as one weight (outputs, inputs, kh, kw): `down` is
/// (r, inputs, kh, kw), `up` (outputs, r, 1, 1).
pub(super) fn product(down: &Tensor, up: &Tensor) -> Result<Tensor> {
    let ([rank, inputs, kh, kw], outputs) = (down.dims_n("lora")?, up.dim(0)?);
    up.reshape([outputs, rank])?.matmul(&down.reshape([rank, inputs * kh * kw])?)?.reshape([outputs, inputs, kh, kw])
}

/// up(down(x)): `down` slides as the layer does.
pub(super) fn update(layer: &Conv2d, x: &Tensor, down: &Tensor, up: &Tensor, scale: f64) -> Result<Tensor> {
    layer.convolve(x, down, None)?.mul_scalar(scale)?.conv2d(up, None, ())
}

/// Inputs, outputs and kernel of a convolution that can be adapted.
///
/// # Errors
/// If it has groups: a rank that all of them share has no meaning.
pub(super) fn extents(layer: &Conv2d) -> Result<[usize; 4]> {
    if layer.groups() != 1 {
        let message = format!("`{}` is a convolution of {} groups, which cannot be adapted", layer.name(), layer.groups());
        return Err(Error::argument("lora", message));
    }
    layer.weight().get().dims_n("lora")
}

/// ΔW = s·B∗A for the weight W (outputs, inputs, kh, kw), with A (r, inputs, kh, kw) and B (outputs, r, 1, 1).
pub(super) struct LoraConv {
    a: Param,
    b: Param,
    /// DoRA's, (1, outputs, 1, 1).
    magnitude: Option<Param>,
    scale: f64,
    shared: Shared,
}

impl LoraConv {
    /// New kernels in `scope`, which is called as the layer is.
    pub fn new(scope: &Params, layer: &Conv2d, target: &Target, config: &LoraConfig, shared: &Shared) -> Result<Self> {
        let (rank, [outputs, inputs, kh, kw]) = (target.rank, extents(layer)?);
        let (first_a, first_b) = match config.init_lora_weights {
            LoraInit::KaimingUniform => (Init::default_weight(), Init::Zeros),
            LoraInit::Gaussian => (Init::Normal { mean: 0.0, std: 1.0 / rank as f64 }, Init::Zeros),
            LoraInit::Random => (Init::default_weight(), Init::default_weight()),
        };
        let a = scope.scope("lora_A").param("weight", [rank, inputs, kh, kw], first_a)?;
        let b = scope.scope("lora_B").param("weight", [outputs, rank, 1, 1], first_b)?;
        let mut adapter = Self { a, b, magnitude: None, scale: target.scale, shared: shared.clone() };
        if config.use_dora {
            adapter.magnitude = Some(scope.param_from("lora_magnitude_vector", &adapter.norms(layer)?)?);
        }
        Ok(adapter)
    }

    fn dtype(&self) -> DType {
        self.a.dtype()
    }

    /// W + s·B∗A in the adapter's dtype, untracked.
    fn sum(&self, layer: &Conv2d) -> Result<Tensor> {
        let [a, b] = [&self.a, &self.b].map(|param| param.get().detach());
        with_autocast(None, || layer.weight().get().detach().to_dtype(self.dtype())?.add(&product(&a, &b)?.mul_scalar(self.scale)?))
    }

    /// ‖W + s·B∗A‖ of each output, (1, outputs, 1, 1). What has no direction counts as the smallest number, not as zero.
    fn norms(&self, layer: &Conv2d) -> Result<Tensor> {
        let sum = self.sum(layer)?;
        let outputs = sum.dim(0)?;
        sum.reshape([outputs, sum.numel() / outputs.max(1)])?
            .norm(2.0, -1)?
            .clamp(f64::from(f32::MIN_POSITIVE), None)?
            .reshape([1, outputs, 1, 1])
    }

    /// The weight that gives the layer the same outputs without the adapter, in the adapter's dtype.
    pub fn merged(&self, layer: &Conv2d) -> Result<Tensor> {
        let sum = self.sum(layer)?;
        match &self.magnitude {
            Some(magnitude) => sum.mul(&magnitude.get().detach().div(&self.norms(layer)?)?.transpose(0, 1)?),
            None => Ok(sum),
        }
    }

    fn update(&self, layer: &Conv2d, x: &Tensor) -> Result<Tensor> {
        let x = if autocast_dtype().is_some() { x.clone() } else { x.to_dtype(self.dtype())? };
        update(layer, &x, &self.a.get(), &self.b.get(), self.scale)
    }
}

impl Adapter<Conv2d> for LoraConv {
    fn is_active(&self) -> bool {
        self.shared.on.load(Relaxed)
    }

    fn forward(&self, layer: &Conv2d, x: &Tensor) -> Result<Tensor> {
        let base = layer.base(x)?;
        let dropped = self.shared.dropped(x)?;
        let input = dropped.as_ref().unwrap_or(x);
        let mut change = self.update(layer, input)?;
        if let Some(magnitude) = &self.magnitude {
            // As the paper proposes (section 4.3), the norm is a constant to the backward pass. Dropout concerns what differs from the base
            // layer, whose own product sees all of x.
            let ratio = magnitude.get().div(&self.norms(layer)?)?;
            let product = layer.convolve(input, &layer.weight().get(), None)?.to_dtype(self.dtype())?;
            change = ratio.sub_scalar(1.0)?.mul(&product)?.add(&ratio.mul(&change.to_dtype(self.dtype())?)?)?;
        }
        base.add(&change.to_dtype(base.dtype())?)
    }

    fn params(&self) -> Vec<Param> {
        [Some(&self.a), Some(&self.b), self.magnitude.as_ref()].into_iter().flatten().cloned().collect()
    }
}
