//! The base model beside the adapted one, as a model of its own in the same memory.

use super::Lora;
use crate::nn::Params;
use crate::transformer::{CausalLm, LmShape, Pass};
use kiln_tensor::{Result, Tensor};
use std::sync::Arc;

/// A language model as it is without its adapter: the reference of DPO, PPO and GRPO, which costs no memory.
///
/// Each pass switches the adapter off while it runs (see [`Lora::disable`]), for other threads that use the model at that time too.
///
/// ```
/// # use kiln_models::lora::{Lora, LoraConfig, WithoutAdapter};
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::{CausalLm, Gpt2Config, Pass};
/// # use kiln_tensor::{Generator, Result, Tensor};
/// # use std::sync::Arc;
/// # fn main() -> Result<()> {
/// let config = Gpt2Config { vocab_size: 5, n_positions: 8, n_embd: 8, n_layer: 1, n_head: 1, ..Gpt2Config::default() };
/// let policy: Arc<dyn CausalLm> = Arc::new(config.build(&Params::seeded(0))?);
/// let lora = LoraConfig { r: 2, target_modules: ["c_attn"].into(), ..LoraConfig::default() };
/// let lora = Arc::new(Lora::attach(policy.params(), &lora, &Generator::new(1))?);
/// let reference = WithoutAdapter::new(policy.clone(), lora);
/// assert_eq!(reference.forward(&Tensor::zeros([1, 3], kiln_tensor::DType::I64)?, Pass::default())?.dims(), [1, 3, 5]);
/// # Ok(()) }
/// ```
pub struct WithoutAdapter {
    model: Arc<dyn CausalLm>,
    lora: Arc<Lora>,
}

impl WithoutAdapter {
    /// `model` without `lora`, which was attached to it.
    pub fn new(model: Arc<dyn CausalLm>, lora: Arc<Lora>) -> Self {
        Self { model, lora }
    }
}

impl CausalLm for WithoutAdapter {
    fn shape(&self) -> LmShape {
        self.model.shape()
    }

    fn params(&self) -> &Params {
        self.model.params()
    }

    fn attention_span(&self) -> Option<usize> {
        self.model.attention_span()
    }

    fn hidden_states(&self, tokens: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        let _off = self.lora.disable()?;
        self.model.hidden_states(tokens, pass)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let _off = self.lora.disable()?;
        self.model.logits(hidden)
    }
}
