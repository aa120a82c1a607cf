//! Activations and other functions without parameters as modules, for [`Sequential`](super::Sequential).

use super::Module;
use kiln_tensor::{Activation, Result, Tensor};

macro_rules! activations {
    ($($(#[$doc:meta])+ $name:ident => $method:ident $(as $activation:ident)?;)*) => { $(
        $(#[$doc])+
        #[derive(Clone, Copy, Default, Debug)]
        pub struct $name;

        impl Module for $name {
            fn forward(&self, x: &Tensor) -> Result<Tensor> {
                x.$method()
            }
            $(
                fn as_activation(&self) -> Option<Activation> {
                    Some(Activation::$activation)
                }
            )?
        }
    )* };
}

activations! {
    /// max(x, 0).
    Relu => relu as Relu;
    /// x Φ(x) with the exact normal distribution function.
    Gelu => gelu as Gelu;
    /// The tanh approximation of [`Gelu`], as GPT-2 uses it.
    GeluTanh => gelu_tanh as GeluTanh;
    /// x σ(x), also called swish.
    Silu => silu as Silu;
    /// x tanh(softplus(x)).
    Mish => mish;
    /// x · min(max(x + 3, 0), 6) / 6.
    Hardswish => hardswish;
    /// log(1 + eˣ).
    Softplus => softplus;
    /// tanh x.
    Tanh => tanh;
    /// 1 / (1 + e⁻ˣ).
    Sigmoid => sigmoid;
    /// x itself.
    Identity => identity;
}

/// x if positive, else slope · x; 0.01 by default.
#[derive(Clone, Copy, Debug)]
pub struct LeakyRelu(pub f64);

impl Default for LeakyRelu {
    fn default() -> Self {
        Self(0.01)
    }
}

impl Module for LeakyRelu {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.leaky_relu(self.0)
    }
    fn as_activation(&self) -> Option<Activation> {
        Some(Activation::LeakyRelu(self.0))
    }
}

/// x if positive, else alpha · (eˣ − 1); alpha is 1 by default.
#[derive(Clone, Copy, Debug)]
pub struct Elu(pub f64);

impl Default for Elu {
    fn default() -> Self {
        Self(1.0)
    }
}

impl Module for Elu {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.elu(self.0)
    }
}

/// eˣ divided by its sum along a dimension.
#[derive(Clone, Copy, Debug)]
pub struct Softmax(pub isize);

impl Module for Softmax {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.softmax(self.0)
    }
}

/// Merges the dimensions from `start` to `end`, both included: by default all but the first.
#[derive(Clone, Copy, Debug)]
pub struct Flatten {
    /// The first dimension that is merged.
    pub start: isize,
    /// The last dimension that is merged.
    pub end: isize,
}

impl Default for Flatten {
    fn default() -> Self {
        Self { start: 1, end: -1 }
    }
}

impl Module for Flatten {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.flatten(self.start, self.end)
    }
}
