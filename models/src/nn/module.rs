//! What a layer is: something that maps a tensor to a tensor.

use kiln_tensor::{Activation, Result, Tensor};

/// A layer or model of one input and one output. Plain functions and closures are modules too: `Box::new(Tensor::relu)`.
pub trait Module: Send + Sync {
    /// The output for `x`; recorded if `x` or a weight is tracked.
    fn forward(&self, x: &Tensor) -> Result<Tensor>;

    /// [`forward`](Module::forward) with an activation after it. The values are the same bits; layers that can compute both in one pass do.
    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.forward(x)?.activate(activation)
    }

    /// The activation that this module is, if a layer before it may compute it in its own pass.
    fn as_activation(&self) -> Option<Activation> {
        None
    }
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

    fn forward_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.as_ref().forward_activated(x, activation)
    }

    fn as_activation(&self) -> Option<Activation> {
        self.as_ref().as_activation()
    }
}
