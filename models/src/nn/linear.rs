//! [`Linear`]: a product with a matrix, which may be kept in few bits and have an adapter.

use super::{Adapter, Init, Module, Param, Params};
use kiln_tensor::{Activation, DType, QuantizedMatrix, Result, Tensor};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// y = x Wᵀ + b, along the last dimension: (…, inputs) → (…, outputs).
///
/// Parameters: `weight` (outputs, inputs) and `bias` (outputs), both uniform in ±1/√inputs at first.
///
/// Clones are one layer, and [`Params::linears`] lists those of a model, so that a model can be adapted after it was built:
/// [`set_adapter`](Linear::set_adapter) changes every holder's layer, and [`Params::quantize_linears`] its weights' form.
///
/// ```
/// # use kiln_models::nn::{Linear, Module, Params};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let layer = Linear::new(&Params::seeded(0), 3, 4, true)?;
/// assert_eq!(layer.forward(&Tensor::ones([2, 5, 3], ())?)?.dims(), [2, 5, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Linear(Arc<Layer>);

struct Layer {
    name: String,
    inputs: usize,
    outputs: usize,
    bias: Option<Param>,
    state: RwLock<State>,
}

/// What can change while others hold the layer.
struct State {
    weight: Weight,
    adapter: Option<Arc<dyn Adapter<Linear>>>,
}

/// How the matrix is kept.
pub(super) enum Weight {
    Dense(Param),
    Quantized(QuantizedMatrix),
}

/// The matrix as a pass multiplies by it.
enum Matrix {
    Dense(Tensor),
    Quantized(QuantizedMatrix),
}

impl Linear {
    /// A layer from `inputs` to `outputs` features, with or without bias.
    pub fn new(params: &Params, inputs: usize, outputs: usize, bias: bool) -> Result<Self> {
        Self::with_init(params, inputs, outputs, Init::default_weight(), bias.then(|| Init::default_bias(&[outputs, inputs])))
    }

    /// A layer whose weight and bias (`None` for no bias) start in another way. While a state dictionary with a quantised weight for it is
    /// built from, it is made quantised.
    pub fn with_init(params: &Params, inputs: usize, outputs: usize, weight: Init, bias: Option<Init>) -> Result<Self> {
        let weight = match params.loaded_quantized("weight", [outputs, inputs])? {
            Some(matrix) => Weight::Quantized(matrix),
            None => Weight::Dense(params.param("weight", [outputs, inputs], weight)?),
        };
        let bias = bias.map(|init| params.param("bias", [outputs], init)).transpose()?;
        let state = RwLock::new(State { weight, adapter: None });
        let layer = Self(Arc::new(Layer { name: params.name().to_owned(), inputs, outputs, bias, state }));
        params.register_linear(&layer);
        Ok(layer)
    }

    /// The full name of the layer's scope, e.g. `blocks.0.attn.c_proj`.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Width of what it takes.
    pub fn inputs(&self) -> usize {
        self.0.inputs
    }

    /// Width of what it gives.
    pub fn outputs(&self) -> usize {
        self.0.outputs
    }

    /// The weight, (outputs, inputs), if it is a parameter: not if it is [`quantized`](Linear::quantized).
    pub fn weight(&self) -> Option<Param> {
        match &self.state().weight {
            Weight::Dense(param) => Some(param.clone()),
            Weight::Quantized(_) => None,
        }
    }

    /// The weight, (outputs, inputs), if it is kept in few bits.
    pub fn quantized(&self) -> Option<QuantizedMatrix> {
        match &self.state().weight {
            Weight::Dense(_) => None,
            Weight::Quantized(matrix) => Some(matrix.clone()),
        }
    }

    /// The values of the weight, (outputs, inputs): the parameter's content, tracked unless it is frozen, or what the quantised weight
    /// stands for, in f32.
    pub fn weight_values(&self) -> Result<Tensor> {
        match self.read().0 {
            Matrix::Dense(weight) => Ok(weight),
            Matrix::Quantized(matrix) => matrix.dequantize(DType::F32),
        }
    }

    pub(super) fn set_weight(&self, weight: Weight) {
        self.0.state.write().unwrap_or_else(PoisonError::into_inner).weight = weight;
    }

    /// The bias, (outputs).
    pub fn bias(&self) -> Option<&Param> {
        self.0.bias.as_ref()
    }

    /// Puts an adapter into the layer, for all who hold it, or takes it away; returns the one that was there.
    pub fn set_adapter(&self, adapter: Option<Arc<dyn Adapter<Linear>>>) -> Option<Arc<dyn Adapter<Linear>>> {
        let mut state = self.0.state.write().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut state.adapter, adapter)
    }

    /// The adapter that is in the layer.
    pub fn adapter(&self) -> Option<Arc<dyn Adapter<Linear>>> {
        self.state().adapter.clone()
    }

    /// x Wᵀ + b as without an adapter.
    pub fn base(&self, x: &Tensor) -> Result<Tensor> {
        self.read().0.linear(x, self.bias_values().as_ref(), None)
    }

    /// x Wᵀ, without adapter and bias.
    pub fn base_product(&self, x: &Tensor) -> Result<Tensor> {
        self.read().0.linear(x, None, None)
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The matrix and the adapter to ask, looked up under one lock, which is not held while anything is computed.
    fn read(&self) -> (Matrix, Option<Arc<dyn Adapter<Linear>>>) {
        let state = self.state();
        let matrix = match &state.weight {
            Weight::Dense(param) => Matrix::Dense(param.get()),
            Weight::Quantized(matrix) => Matrix::Quantized(matrix.clone()),
        };
        (matrix, state.adapter.as_ref().filter(|adapter| adapter.is_active()).cloned())
    }

    fn bias_values(&self) -> Option<Tensor> {
        self.0.bias.as_ref().map(Param::get)
    }

    fn run(&self, x: &Tensor, activation: Option<Activation>) -> Result<Tensor> {
        match self.read() {
            (matrix, None) => matrix.linear(x, self.bias_values().as_ref(), activation),
            (_, Some(adapter)) => {
                let y = adapter.forward(self, x)?;
                match activation {
                    Some(activation) => y.activate(activation),
                    None => Ok(y),
                }
            }
        }
    }
}

impl Matrix {
    fn linear(&self, x: &Tensor, bias: Option<&Tensor>, activation: Option<Activation>) -> Result<Tensor> {
        match (self, activation) {
            (Matrix::Dense(weight), None) => x.linear(weight, bias),
            (Matrix::Dense(weight), Some(activation)) => x.linear_activation(weight, bias, activation),
            (Matrix::Quantized(matrix), None) => matrix.linear(x, bias),
            (Matrix::Quantized(matrix), Some(activation)) => matrix.linear(x, bias)?.activate(activation),
        }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.run(x, Some(activation))
    }
}

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Layer { name, inputs, outputs, bias, .. } = &*self.0;
        write!(f, "Linear({name}: {inputs} -> {outputs}, bias {}, adapter {})", bias.is_some(), self.state().adapter.is_some())
    }
}
