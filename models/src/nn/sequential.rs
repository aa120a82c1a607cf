//! One module after the other.

use super::{Module, Params};
use kiln_tensor::{Result, Tensor};

/// Modules applied in order. Each gets the child scope of its place, so parameters are called `0.weight`, `2.weight`, … as in PyTorch;
/// functions without parameters take a place too. Where an activation of this library follows a layer, the two are computed in one pass if the
/// layer can.
///
/// ```
/// # use kiln_models::nn::{Linear, Module, Params, Relu, Sequential};
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let params = Params::seeded(0);
/// let net = Sequential::new(&params)
///     .push(|p| Linear::new(p, 2, 16, true))?
///     .then(Relu)
///     .push(|p| Linear::new(p, 16, 1, true))?;
/// assert_eq!(net.forward(&Tensor::ones([5, 2], ())?)?.dims(), [5, 1]);
/// assert!(params.named("2.bias").is_some());
/// # Ok(()) }
/// ```
pub struct Sequential {
    params: Params,
    modules: Vec<Box<dyn Module>>,
}

impl Sequential {
    /// An empty sequence: the identity.
    pub fn new(params: &Params) -> Self {
        Self { params: params.clone(), modules: Vec::new() }
    }

    /// The sequence with the module that `build` makes from the scope of its place.
    pub fn push<M: Module + 'static>(self, build: impl FnOnce(&Params) -> Result<M>) -> Result<Self> {
        let module = build(&self.params.index(self.modules.len()))?;
        Ok(self.then(module))
    }

    /// The sequence with a module, or a function, that has no parameters of this scope.
    pub fn then(mut self, module: impl Module + 'static) -> Self {
        self.modules.push(Box::new(module));
        self
    }

    /// Number of modules.
    pub fn len(&self) -> usize {
        self.modules.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.modules.is_empty()
    }
}

impl Module for Sequential {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut h = x.clone();
        let mut modules = self.modules.iter().peekable();
        while let Some(module) = modules.next() {
            h = match modules.peek().and_then(|next| next.as_activation()) {
                Some(activation) => {
                    modules.next();
                    module.forward_activated(&h, activation)?
                }
                None => module.forward(&h)?,
            };
        }
        Ok(h)
    }
}
