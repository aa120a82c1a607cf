//! The decoder-only language model that every family is a case of.

use super::block::{Block, Norm};
use super::context::{Context, Extent, expect_tokens, positions};
use super::rope::{Positions, Rope};
use super::{CausalLm, LmShape, Pass};
use crate::nn::{Dropout, Embedding, Linear, Module, Params};
use kiln_autograd::checkpoint;
use kiln_tensor::{Error, Quantization, QuantizedMatrix, Result, Tensor};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

/// Learned positions: row `place + offset` of a table.
pub(super) struct LearnedPositions {
    pub table: Embedding,
    /// Rows that belong to no place.
    pub offset: usize,
}

impl LearnedPositions {
    /// (T, C) or (B, T, C) for `added` tokens.
    fn forward(&self, positions: &Positions, added: usize) -> Result<Tensor> {
        match positions {
            Positions::From(start) => self.table.rows(start + self.offset, added),
            Positions::Given(places) => self.table.forward(&places.add_scalar(self.offset as f64)?),
        }
    }
}

/// What a decoder is made of.
pub(super) struct DecoderParts {
    pub shape: LmShape,
    pub tokens: Embedding,
    /// Learned positions; `None` if they are rotary.
    pub positions: Option<LearnedPositions>,
    pub rope: Option<Rope>,
    /// From the width of the embedding to that of the blocks and back, where they differ.
    pub projections: Option<[Linear; 2]>,
    pub dropout: Dropout,
    pub blocks: Vec<Block>,
    pub norm: Option<Norm>,
    /// The output's matrix; the embedding's if `None` ("tied").
    pub head: Option<Linear>,
}

/// A decoder-only transformer of any family: build one through a configuration ([`Gpt2Config`](super::Gpt2Config),
/// [`LlamaConfig`](super::LlamaConfig), [`OptConfig`](super::OptConfig)), or [`load`](super::load) it.
pub struct Decoder {
    params: Params,
    parts: Parts,
    recomputes: AtomicBool,
    /// What stands for the tied table where logits are computed.
    quantized_head: RwLock<Option<QuantizedMatrix>>,
}

/// The parts, with blocks that a recomputed segment can hold.
struct Parts {
    shape: LmShape,
    tokens: Embedding,
    positions: Option<LearnedPositions>,
    rope: Option<Rope>,
    projections: Option<[Linear; 2]>,
    dropout: Dropout,
    blocks: Vec<Arc<Block>>,
    norm: Option<Norm>,
    head: Option<Linear>,
}

impl Decoder {
    pub(super) fn new(params: &Params, parts: DecoderParts) -> Self {
        let DecoderParts { shape, tokens, positions, rope, projections, dropout, blocks, norm, head } = parts;
        let blocks = blocks.into_iter().map(Arc::new).collect();
        let parts = Parts { shape, tokens, positions, rope, projections, dropout, blocks, norm, head };
        Self { params: params.clone(), parts, recomputes: AtomicBool::new(false), quantized_head: RwLock::default() }
    }

    /// Whether the backward pass computes each block again instead of keeping what is inside: less memory, a third more time.
    pub fn set_activation_checkpointing(&self, on: bool) {
        self.recomputes.store(on, Relaxed);
    }

    /// The table of the tokens, (V, C).
    pub fn token_embedding(&self) -> &Embedding {
        &self.parts.tokens
    }

    /// Computes logits with a copy of the tied table in few bits, which is a constant: what the table learns later does not reach it. As
    /// each token reads one row of the table for itself and all of them for the logits, this is what decoding gains by; tokens are
    /// looked up in the table as before. A head of its own is a [`Linear`] layer, which
    /// [`quantize_linears`](Params::quantize_linears) takes.
    ///
    /// # Errors
    /// If the output's matrix is not the table, or that cannot be quantised so.
    pub fn quantize_tied_head(&self, kind: Quantization) -> Result<()> {
        self.set_quantized_head(Some(QuantizedMatrix::quantize(&self.parts.tokens.weight().get(), kind)?))
    }

    /// As [`quantize_tied_head`](Self::quantize_tied_head), with a copy that was made elsewhere; `None` for the table itself.
    ///
    /// # Errors
    /// If the output's matrix is not the table, or has another shape.
    pub fn set_quantized_head(&self, matrix: Option<QuantizedMatrix>) -> Result<()> {
        let op = "set_quantized_head";
        if self.parts.head.is_some() {
            return Err(Error::argument(op, "the model's head is a layer of its own; quantise that with `quantize_linears`"));
        }
        let table = *self.parts.tokens.weight().get().shape();
        if let Some(matrix) = matrix.as_ref().filter(|matrix| *matrix.shape() != table) {
            return Err(Error::shape(op, format!("the matrix {} must have the shape {table} of the table of tokens", matrix.shape())));
        }
        *self.quantized_head.write().unwrap_or_else(PoisonError::into_inner) = matrix;
        Ok(())
    }

    fn extent(&self, tokens: &Tensor, pass: &Pass<'_>) -> Result<Extent> {
        let [batch, added] = expect_tokens(tokens)?;
        let (past, start) = pass.cache.as_ref().map_or((0, 0), |cache| (cache.len(), cache.seen()));
        let context = self.parts.shape.context_length;
        if pass.positions.is_none() && pass.segments.is_none() && start + added > context {
            let message = format!("{added} tokens after {start} are more than the context of {context}; shorten the prompt");
            return Err(Error::argument("transformer", message));
        }
        Ok(Extent { batch, added, past, start, device: tokens.device() })
    }

    /// Tokens and positions as vectors, (B, T, C).
    fn embed(&self, tokens: &Tensor, places: &Positions, added: usize) -> Result<Tensor> {
        let parts = &self.parts;
        let mut x = parts.tokens.forward(tokens)?;
        if let Some([enter, _]) = &parts.projections {
            x = enter.forward(&x)?;
        }
        if let Some(positions) = &parts.positions {
            x = x.add(&positions.forward(places, added)?)?;
        }
        parts.dropout.forward(&x)
    }
}

impl CausalLm for Decoder {
    fn shape(&self) -> LmShape {
        self.parts.shape
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn attention_span(&self) -> Option<usize> {
        self.parts.shape.sliding_window.filter(|_| self.parts.blocks.iter().all(|block| block.attention.is_windowed()))
    }

    fn hidden_states(&self, tokens: &Tensor, mut pass: Pass<'_>) -> Result<Tensor> {
        let parts = &self.parts;
        if let Some(cache) = pass.cache.as_deref_mut() {
            cache.make_room(tokens.dims_n::<2>("transformer")?[1])?;
        }
        let extent = self.extent(tokens, &pass)?;
        let places = positions(extent, &pass)?;
        let context = Context::causal(extent, &pass, &places, parts.rope.as_ref(), parts.shape.sliding_window)?;
        let mut x = self.embed(tokens, &places, extent.added)?;
        for (layer, block) in parts.blocks.iter().enumerate() {
            x = match pass.cache.as_deref_mut() {
                Some(cache) => block.forward(&x, &context, Some((cache, layer)))?,
                None if self.recomputes.load(Relaxed) => {
                    let (block, context) = (block.clone(), context.clone());
                    checkpoint(move |x| block.forward(&x[0], &context, None), &[&x])?
                }
                None => block.forward(&x, &context, None)?,
            };
        }
        if let Some(cache) = pass.cache {
            cache.advance(extent.added);
        }
        if let Some(norm) = &parts.norm {
            x = norm.forward(&x)?;
        }
        match &parts.projections {
            Some([_, leave]) => leave.forward(&x),
            None => Ok(x),
        }
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        match &self.parts.head {
            Some(head) => head.forward(hidden),
            None => match &*self.quantized_head.read().unwrap_or_else(PoisonError::into_inner) {
                Some(matrix) => matrix.linear(hidden, None),
                None => hidden.linear(&self.parts.tokens.weight().get(), None),
            },
        }
    }

    fn logits_weight(&self) -> Option<Tensor> {
        match &self.parts.head {
            Some(head) => head.weight().filter(|_| head.adapter().is_none() && head.bias().is_none()).map(|weight| weight.get()),
            None => {
                let quantized = self.quantized_head.read().unwrap_or_else(PoisonError::into_inner);
                quantized.is_none().then(|| self.parts.tokens.weight().get())
            }
        }
    }
}
