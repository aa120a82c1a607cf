//! The reference of a policy that is trained through an adapter: the policy itself without it.

use crate::lora::Lora;
use crate::nn::Params;
use crate::transformer::{CausalLm, LmShape, Pass};
use kiln_tensor::{Result, Tensor};
use std::sync::Arc;

/// A model with its adapter switched off during each pass: a reference that takes no memory of its own (as TRL has it with PEFT).
pub struct WithoutAdapter {
    model: Arc<dyn CausalLm>,
    lora: Arc<Lora>,
}

impl WithoutAdapter {
    /// What `model` is without `lora`, which is in it.
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
