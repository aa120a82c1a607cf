//! Layers of one matrix: [`Linear`] multiplies by it, [`Embedding`] looks rows up in it.

use super::{Init, Module, Param, Params};
use kiln_tensor::{Activation, Result, Tensor};

/// y = x Wᵀ + b, along the last dimension: (…, inputs) → (…, outputs).
///
/// Parameters: `weight` (outputs, inputs) and `bias` (outputs), both uniform in ±1/√inputs at first.
///
/// ```
/// # use kiln_models::nn::{Linear, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = Linear::new(&Params::seeded(0), 3, 4, true)?;
/// assert_eq!(layer.forward(&Tensor::ones([2, 5, 3], ())?)?.dims(), [2, 5, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
}

impl Linear {
    /// A layer from `inputs` to `outputs` features, with or without bias.
    pub fn new(params: &Params, inputs: usize, outputs: usize, bias: bool) -> Result<Self> {
        Self::with_init(params, inputs, outputs, Init::default_weight(), bias.then(|| Init::default_bias(&[outputs, inputs])))
    }

    /// A layer whose weight and bias (`None` for no bias) start in another way.
    pub fn with_init(params: &Params, inputs: usize, outputs: usize, weight: Init, bias: Option<Init>) -> Result<Self> {
        let weight = params.param("weight", [outputs, inputs], weight)?;
        Ok(Self { weight, bias: bias.map(|init| params.param("bias", [outputs], init)).transpose()? })
    }

    /// The weight, (outputs, inputs).
    pub fn weight(&self) -> &Param {
        &self.weight
    }

    /// The bias, (outputs).
    pub fn bias(&self) -> Option<&Param> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.linear(&self.weight.get(), self.bias.as_ref().map(Param::get).as_ref())
    }

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        x.linear_activation(&self.weight.get(), self.bias.as_ref().map(Param::get).as_ref(), activation)
    }
}

/// Row i of `weight` for each i64 index i: (…) → (…, width).
///
/// Parameters: `weight` (entries, width), standard normal at first.
///
/// ```
/// # use kiln_models::nn::{Embedding, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = Embedding::new(&Params::seeded(0), 10, 4)?;
/// assert_eq!(layer.forward(&Tensor::from_vec(vec![3i64, 9, 3], [3])?)?.dims(), [3, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Param,
}

impl Embedding {
    /// A table of `entries` vectors of `width` elements.
    pub fn new(params: &Params, entries: usize, width: usize) -> Result<Self> {
        Self::with_init(params, entries, width, Init::Normal { mean: 0.0, std: 1.0 })
    }

    /// A table that starts in another way.
    pub fn with_init(params: &Params, entries: usize, width: usize, init: Init) -> Result<Self> {
        Ok(Self { weight: params.param("weight", [entries, width], init)? })
    }

    /// The table, (entries, width).
    pub fn weight(&self) -> &Param {
        &self.weight
    }
}

impl Module for Embedding {
    fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        indices.embedding(&self.weight.get())
    }
}
