//! The first values of parameters.

use kiln_tensor::{Generator, Result, Shape, Tensor, TensorOptions};

/// How a parameter starts.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// One value everywhere.
    Constant(f64),
}

impl Init {
    /// A new tensor; random ones draw from `generator`.
    pub fn make(&self, shape: &Shape, options: TensorOptions, _generator: &Generator) -> Result<Tensor> {
        match *self {
            Init::Zeros => Tensor::zeros(shape, options),
            Init::Ones => Tensor::ones(shape, options),
            Init::Constant(value) => Tensor::full(shape, value, options),
        }
    }
}
