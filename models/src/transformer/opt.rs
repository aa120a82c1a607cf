//! OPT: learned positions from row 2 on, layer norms before the parts (behind them in the 350m), ReLU, tied embeddings.
//!
//! Source: Zhang et al., *OPT: Open Pre-trained Transformer Language Models*, 2022; names of Hugging Face's `OPTForCausalLM`.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, Mlp, Norm, NormalInit, activation};
use super::decoder::{DecoderParts, LearnedPositions};
use super::{Decoder, LmShape};
use crate::nn::{Dropout, LayerNorm, Params};
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};

/// Rows of the table of positions before that of the first place.
const OFFSET: usize = 2;
/// ε of the norms, which the configuration does not give.
const EPS: f64 = 1e-5;

/// The hyper-parameters, by the names of `config.json`. Defaults are those of the model of 125 million parameters.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct OptConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the blocks.
    pub hidden_size: usize,
    /// Width of the embeddings; `hidden_size` if absent.
    pub word_embed_proj_dim: Option<usize>,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Width inside of the feed-forward part.
    pub ffn_dim: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Whether norms stand before the parts.
    pub do_layer_norm_before: bool,
    /// Whether there is no norm behind the last block, although norms stand before the parts.
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    /// Activation inside of the feed-forward part.
    pub activation_function: String,
    /// Dropout of what each part adds.
    pub dropout: f64,
    /// Dropout of the attention's weights.
    pub attention_dropout: f64,
    /// Deviation of the first weights.
    pub init_std: f64,
    /// Whether the projections have biases.
    pub enable_bias: bool,
    /// Whether the norms have weights.
    pub layer_norm_elementwise_affine: bool,
    /// Whether the output's matrix is that of the embedding.
    pub tie_word_embeddings: bool,
    /// What else the file says, such as the ids of special tokens.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for OptConfig {
    fn default() -> Self {
        Self {
            vocab_size: 50272,
            hidden_size: 768,
            word_embed_proj_dim: None,
            num_hidden_layers: 12,
            ffn_dim: 3072,
            num_attention_heads: 12,
            max_position_embeddings: 2048,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            activation_function: "relu".into(),
            dropout: 0.1,
            attention_dropout: 0.0,
            init_std: 0.02,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            tie_word_embeddings: true,
            other: serde_json::Map::new(),
        }
    }
}

impl OptConfig {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<Decoder> {
        if self.num_attention_heads == 0 || !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            let message =
                format!("hidden_size {} must be a multiple of num_attention_heads {}", self.hidden_size, self.num_attention_heads);
            return Err(Error::format("config.json", message));
        }
        let (root, init) = (params.scope("model").scope("decoder"), NormalInit(self.init_std));
        let (width, embedding) = (self.hidden_size, self.word_embed_proj_dim.unwrap_or(self.hidden_size));
        let tokens = init.embedding(&root.scope("embed_tokens"), self.vocab_size, embedding)?;
        let table = init.embedding(&root.scope("embed_positions"), self.max_position_embeddings.saturating_add(OFFSET), width)?;
        let projections = if embedding == width {
            None
        } else {
            let enter = init.linear(&root.scope("project_in"), embedding, width, false)?;
            Some([enter, init.linear(&root.scope("project_out"), width, embedding, false)?])
        };
        let layers = root.scope("layers");
        let blocks = (0..self.num_hidden_layers).map(|i| self.block(&layers.index(i))).collect::<Result<_>>()?;
        let has_norm = self.do_layer_norm_before && !self.remove_final_layer_norm;
        let head =
            (!self.tie_word_embeddings).then(|| init.linear(&params.scope("lm_head"), embedding, self.vocab_size, false)).transpose()?;
        let parts = DecoderParts {
            shape: self.shape(),
            tokens,
            positions: Some(LearnedPositions { table, offset: OFFSET }),
            rope: None,
            projections,
            dropout: Dropout::new(params, 0.0)?,
            blocks,
            norm: has_norm.then(|| self.norm(&root.scope("final_layer_norm"))).transpose()?,
            head,
        };
        Ok(Decoder::new(params, parts))
    }

    fn shape(&self) -> LmShape {
        LmShape {
            vocab_size: self.vocab_size,
            context_length: self.max_position_embeddings,
            hidden_size: self.hidden_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_key_value_heads: self.num_attention_heads,
            head_dim: self.hidden_size / self.num_attention_heads.max(1),
            sliding_window: None,
        }
    }

    fn norm(&self, params: &Params) -> Result<Norm> {
        let affine = self.layer_norm_elementwise_affine;
        Ok(Norm::Layer(LayerNorm::with_options(params, self.hidden_size, EPS, affine, affine)?))
    }

    fn block(&self, params: &Params) -> Result<Block> {
        let (init, width, bias) = (NormalInit(self.init_std), self.hidden_size, self.enable_bias);
        let attn = params.scope("self_attn");
        let project = |name: &str| init.linear(&attn.scope(name), width, width, bias);
        let attention = AttentionParts {
            projection: Projection::Separate([project("q_proj")?, project("k_proj")?, project("v_proj")?]),
            out: project("out_proj")?,
            norms: None,
            num_heads: self.num_attention_heads,
            num_key_value_heads: self.num_attention_heads,
            head_dim: width / self.num_attention_heads,
            scale: None,
            dropout: self.attention_dropout,
            windowed: false,
        };
        Ok(Block {
            attention: Attention::new(params, attention)?,
            mlp: Mlp::Plain {
                up: init.linear(&params.scope("fc1"), width, self.ffn_dim, bias)?,
                down: init.linear(&params.scope("fc2"), self.ffn_dim, width, bias)?,
                activation: activation(&self.activation_function)?,
            },
            norms: [self.norm(&params.scope("self_attn_layer_norm"))?, self.norm(&params.scope("final_layer_norm"))?],
            dropout: Dropout::new(params, self.dropout)?,
            inner_dropout: None,
            post_norm: !self.do_layer_norm_before,
        })
    }
}
