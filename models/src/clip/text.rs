//! The text tower: a causal transformer whose state at the text's end stands for the text.

use super::ClipTextConfig;
use super::encoder::{Encoder, EncoderShape};
use crate::nn::{Embedding, LayerNorm, Linear, Module, Params};
use crate::transformer::block::NormalInit;
use crate::transformer::context::{Context, Visible, expect_mask, expect_tokens};
use kiln_tensor::{Error, Result, Tensor};

/// CLIP's text tower, with or without the projection into the space that both towers share. Also the text encoder of Stable Diffusion.
///
/// ```
/// # use kiln_models::clip::{ClipTextConfig, ClipTextModel};
/// # use kiln_models::nn::Params;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// let small = ClipTextConfig { vocab_size: 30, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, ..ClipTextConfig::default() };
/// let model = ClipTextModel::new(&ClipTextConfig { eos_token_id: Some(1), ..small }, Some(8), &Params::seeded(0))?;
/// let output = model.forward(&Tensor::from_vec(vec![0i64, 7, 9, 1], [1, 4])?, None)?;
/// assert_eq!(output.last_hidden_state.dims(), [1, 4, 16]);
/// assert_eq!(output.text_embeds.unwrap().dims(), [1, 8]);
/// # Ok(()) }
/// ```
pub struct ClipTextModel {
    params: Params,
    tokens: Embedding,
    places: Embedding,
    encoder: Encoder,
    final_layer_norm: LayerNorm,
    projection: Option<Linear>,
    eos_token_id: i64,
    max_position_embeddings: usize,
}

/// What the text tower makes of tokens (B, T).
pub struct ClipTextOutput {
    /// The states of all tokens, normed, (B, T, C).
    pub last_hidden_state: Tensor,
    /// The states before the first block and after each, without the last norm, each (B, T, C). With n blocks there are n + 1.
    pub hidden_states: Vec<Tensor>,
    /// The normed state at each text's end, (B, C).
    pub pooler_output: Tensor,
    /// It, projected, (B, P); `None` of a tower without projection.
    pub text_embeds: Option<Tensor>,
}

impl ClipTextOutput {
    /// The states with the last `clip_skip` blocks left out, (B, T, C), not normed: `hidden_states[-1 - clip_skip]`. Stable Diffusion XL
    /// takes them with 1; Stable Diffusion 1 with `clip_skip` applies [`ClipTextModel::final_norm`] to them.
    ///
    /// # Errors
    /// If the tower has fewer blocks.
    pub fn skipped(&self, clip_skip: usize) -> Result<&Tensor> {
        let blocks = self.hidden_states.len().saturating_sub(1);
        let state = blocks.checked_sub(clip_skip).and_then(|at| self.hidden_states.get(at));
        state.ok_or_else(|| Error::argument("clip_skip", format!("{clip_skip} of {blocks} blocks cannot be left out")))
    }
}

impl ClipTextModel {
    /// A tower whose weights are those of `params`: fresh, or from a state dictionary that is being built from. With `projection`, it
    /// has one to that width.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn new(config: &ClipTextConfig, projection: Option<usize>, params: &Params) -> Result<Self> {
        let (scope, width) = (params.scope("text_model"), config.hidden_size);
        let (embeddings, factor) = (scope.scope("embeddings"), config.initializer_factor);
        let init = NormalInit(0.02 * factor);
        let shape = EncoderShape {
            width,
            inner: config.intermediate_size,
            layers: config.num_hidden_layers,
            heads: config.num_attention_heads,
            hidden_act: &config.hidden_act,
            eps: config.layer_norm_eps,
            dropout: config.attention_dropout,
            factor,
        };
        let project = |outputs| project(&params.scope("text_projection"), width, outputs, factor);
        Ok(Self {
            params: params.clone(),
            tokens: init.embedding(&embeddings.scope("token_embedding"), config.vocab_size, width)?,
            places: init.embedding(&embeddings.scope("position_embedding"), config.max_position_embeddings, width)?,
            encoder: Encoder::new(&scope.scope("encoder"), &shape)?,
            final_layer_norm: LayerNorm::with_options(&scope.scope("final_layer_norm"), width, config.layer_norm_eps, true, true)?,
            projection: projection.map(project).transpose()?,
            eos_token_id: config.eos_token_id.unwrap_or(-1),
            max_position_embeddings: config.max_position_embeddings,
        })
    }

    /// What it makes of tokens (B, T) of i64. `mask`, bool (B, T), is false at tokens that none may look at; the texts of CLIP and Stable
    /// Diffusion are padded without one.
    ///
    /// # Errors
    /// If a token is not in the vocabulary, or the texts are longer than the model has places for.
    pub fn forward(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<ClipTextOutput> {
        let [_, len] = expect_tokens(tokens)?;
        if len > self.max_position_embeddings {
            let message = format!("{len} tokens are more than the {} places of the model; shorten the text", self.max_position_embeddings);
            return Err(Error::argument("clip", message));
        }
        let x = self.tokens.forward(tokens)?.add(&self.places.rows(0, len)?)?;
        let full = Visible { causal: true, ..Visible::padded(expect_mask(mask, tokens)?.as_ref())? };
        let hidden_states = self.encoder.forward(x, &Context { full, ..Context::default() })?;
        let last = hidden_states.last().ok_or_else(|| Error::argument("clip", "there are no states"))?;
        let last_hidden_state = self.final_norm(last)?;
        let pooler_output = self.pool(&last_hidden_state, tokens)?;
        let text_embeds = self.projection.as_ref().map(|projection| projection.forward(&pooler_output)).transpose()?;
        Ok(ClipTextOutput { last_hidden_state, hidden_states, pooler_output, text_embeds })
    }

    /// The norm after the last block, of states (B, T, C).
    ///
    /// # Errors
    /// If the width is another.
    pub fn final_norm(&self, states: &Tensor) -> Result<Tensor> {
        self.final_layer_norm.forward(states)
    }

    /// The table of the tokens.
    pub fn token_embedding(&self) -> &Embedding {
        &self.tokens
    }

    /// The longest text.
    pub fn max_length(&self) -> usize {
        self.max_position_embeddings
    }

    /// The scope that holds the weights; its switch between training and evaluation.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// (B, T, C) → (B, C): the state at each text's end.
    fn pool(&self, states: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let [batch, len, width] = states.dims_n("clip")?;
        let ids: Vec<i64> = tokens.to_vec()?;
        let ends = ids.chunks_exact(len).enumerate().map(|(row, text)| (row * len + self.end_of(text)) as i64);
        let ends = Tensor::from_vec(ends.collect::<Vec<i64>>(), [batch])?.to_device(states.device())?;
        states.reshape([batch * len, width])?.index_select(0, &ends)
    }

    fn end_of(&self, text: &[i64]) -> usize {
        let end = match self.eos_token_id {
            // Files from before transformers 4.31 say 2, whatever their vocabulary; its end is the largest token there.
            2 => text.iter().copied().max().unwrap_or(2),
            eos => eos,
        };
        // A text without its end is taken for its first token, as the reference does.
        text.iter().position(|&token| token == end).unwrap_or(0)
    }
}

/// A projection into the space that both towers share.
pub(super) fn project(params: &Params, width: usize, outputs: usize, factor: f64) -> Result<Linear> {
    NormalInit((width as f64).powf(-0.5) * factor).linear(params, width, outputs, false)
}
