//! What a decoder-only language model is to those who train it and generate with it.

use super::KvCache;
use crate::nn::Params;
use kiln_tensor::{Result, Tensor};

/// The extents of a language model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LmShape {
    /// Entries of the vocabulary: logits per position.
    pub vocab_size: usize,
    /// The longest sequence that the model has positions for.
    pub context_length: usize,
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of keys and values.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Keys that a query sees at most, itself included; `None` for all before it.
    pub sliding_window: Option<usize>,
}

/// What a forward pass is told besides its tokens (B, T). The default is a plain batch of whole sequences.
#[derive(Default)]
pub struct Pass<'a> {
    /// The place of each token in its sequence, i64 (B, T) or (T). `None`: it follows what the cache holds (0, 1, … without one), not
    /// counting those that [`key_mask`](Pass::key_mask) hides.
    pub positions: Option<&'a Tensor>,
    /// Bool (B, S), S being the length of the cache plus T: true for tokens, false for padding. `None` if there is no padding.
    pub key_mask: Option<&'a Tensor>,
    /// Of packed sequences: an i64 number (B, T) for each token; tokens see only those of the same number. Positions are to be given with it.
    pub segments: Option<&'a Tensor>,
    /// Keys and values of the tokens before; those of this pass are appended.
    pub cache: Option<&'a mut KvCache>,
}

impl<'a> Pass<'a> {
    /// A pass that goes on after what `cache` holds.
    pub fn cached(cache: &'a mut KvCache) -> Self {
        Self { cache: Some(cache), ..Self::default() }
    }
}

/// A decoder-only language model: tokens (B, T) to a distribution of the next token at each place.
///
/// Source: Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019.
pub trait CausalLm: Send + Sync {
    /// The extents.
    fn shape(&self) -> LmShape;

    /// The scope that holds the weights, under the names of the reference implementation; its switch between training and evaluation.
    fn params(&self) -> &Params;

    /// The window through which *all* layers look: a cache need not hold more keys than that. `None` if any layer looks at everything.
    fn attention_span(&self) -> Option<usize> {
        None
    }

    /// The last hidden states, after the final norm: tokens (B, T) of i64 → (B, T, C).
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the sequence is longer than the model's context or the cache's capacity.
    fn hidden_states(&self, tokens: &Tensor, pass: Pass<'_>) -> Result<Tensor>;

    /// The logits of hidden states: (…, C) → (…, V).
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// The logits at every place: (B, T) → (B, T, V).
    ///
    /// # Errors
    /// As [`hidden_states`](CausalLm::hidden_states).
    fn forward(&self, tokens: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        self.logits(&self.hidden_states(tokens, pass)?)
    }
}
