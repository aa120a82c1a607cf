//! What a layer is: something that maps a tensor to a tensor.

use kiln_tensor::{Result, Tensor};

/// A layer or model of one input and one output. Plain functions and closures are modules too: `Box::new(Tensor::relu)`.
pub trait Module: Send + Sync {
    /// The output for `x`; recorded if `x` or a weight is tracked.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;
}

impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync> Module for F {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self(x)
    }
}

impl Module for Box<dyn Module> {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.as_ref().forward(x)
    }
}
