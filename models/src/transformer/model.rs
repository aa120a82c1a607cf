//! What a language model, decoder-only or of two halves, is to those who train it and generate with it.

use super::{KvCache, Seq2SeqCache};
use crate::nn::Params;
use kiln_tensor::{CrossEntropyOptions, Result, Tensor};

/// The extents of a language model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LmShape {
    /// Entries of the vocabulary: logits per position.
    pub vocab_size: usize,
    /// The longest sequence that the model has positions for; `usize::MAX` if any length has.
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
    /// Of packed sequences: an i64 number (B, T) for each token; tokens see only those of the same number.
    /// Places count from 0 in each run of one number, if no [`positions`](Pass::positions) are given.
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

    /// The matrix (V, C) whose product with hidden states the logits are, if they are nothing more than that.
    fn logits_weight(&self) -> Option<Tensor> {
        None
    }

    /// The logits at every place: (B, T) → (B, T, V).
    ///
    /// # Errors
    /// As [`hidden_states`](CausalLm::hidden_states).
    fn forward(&self, tokens: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
        self.logits(&self.hidden_states(tokens, pass)?)
    }

    /// −log p(target) over the places of `tokens` (B, T), with `targets` (B, T) of the next tokens. Where the vocabulary is large, not all
    /// logits exist at once.
    ///
    /// # Errors
    /// As [`hidden_states`](CausalLm::hidden_states), and if a target is neither a token nor ignored.
    fn loss(&self, tokens: &Tensor, targets: &Tensor, pass: Pass<'_>, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
        let (hidden, targets) = (self.hidden_states(tokens, pass)?.flatten(0, 1)?, targets.flatten(0, 1)?);
        match self.logits_weight() {
            Some(weight) => hidden.linear_cross_entropy(&weight, None, &targets, options, None),
            None => self.logits(&hidden)?.cross_entropy_with(&targets, options),
        }
    }
}

/// What an encoder made of its sequences.
#[derive(Clone)]
pub struct Encoded {
    /// The last hidden states, (B, S, C).
    pub hidden: Tensor,
    /// Bool (B, S): true for tokens, false for padding. `None` if there is no padding.
    pub mask: Option<Tensor>,
}

impl Encoded {
    /// Row i of the result is row `rows[i]` of this: a source for each beam, say.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn select(&self, rows: &[usize]) -> Result<Encoded> {
        let index = Tensor::from_vec(rows.iter().map(|&row| row as i64).collect(), [rows.len()])?.to_device(self.hidden.device())?;
        let mask = self.mask.as_ref().map(|mask| mask.index_select(0, &index)).transpose()?;
        Ok(Encoded { hidden: self.hidden.index_select(0, &index)?, mask })
    }
}

/// A model of two halves: an encoder reads the source, a decoder writes a sequence and looks at it.
///
/// Source: Vaswani et al., *Attention Is All You Need*, 2017.
pub trait Seq2SeqLm: Send + Sync {
    /// The extents of the decoder.
    fn shape(&self) -> LmShape;

    /// The scope that holds the weights, under the names of the reference implementation; its switch between training and evaluation.
    fn params(&self) -> &Params;

    /// The token that the decoder starts with.
    fn start_token(&self) -> i64;

    /// Reads the source: tokens (B, S) of i64, and a bool mask (B, S), true for tokens, false for padding (`None`: all are tokens).
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the sequence is longer than the model has positions for.
    fn encode(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Encoded>;

    /// The last hidden states of the decoder: tokens (B, T) of i64 → (B, T, C). With a cache, the tokens follow those that it holds; the keys
    /// and values of the source are computed in its first pass and kept.
    ///
    /// # Errors
    /// As [`encode`](Seq2SeqLm::encode), if the batch is not that of `encoded`, or the cache is full.
    fn decode(&self, tokens: &Tensor, encoded: &Encoded, cache: Option<&mut Seq2SeqCache>) -> Result<Tensor>;

    /// The logits of the decoder's hidden states: (…, C) → (…, V).
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;

    /// The logits at every place of the decoder's tokens: sources (B, S) and tokens (B, T) → (B, T, V).
    ///
    /// # Errors
    /// As [`encode`](Seq2SeqLm::encode) and [`decode`](Seq2SeqLm::decode).
    fn forward(&self, source: &Tensor, mask: Option<&Tensor>, tokens: &Tensor) -> Result<Tensor> {
        self.logits(&self.decode(tokens, &self.encode(source, mask)?, None)?)
    }
}
