//! GPT-2: learned positions, layer norms before the parts, tanh-GELU, tied embeddings.
//!
//! Source: Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019; names of Hugging Face's `GPT2LMHeadModel`.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, Mlp, Norm, NormalInit, activation};
use super::decoder::{DecoderParts, LearnedPositions};
use super::{Decoder, LmShape};
use crate::nn::{Dropout, Params};
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};

/// The hyper-parameters, by the names of `config.json`. The default is the model of 124 million parameters.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Gpt2Config {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence.
    pub n_positions: usize,
    /// Width.
    pub n_embd: usize,
    /// Blocks.
    pub n_layer: usize,
    /// Heads.
    pub n_head: usize,
    /// Width inside of the feed-forward part; 4 × `n_embd` if absent.
    pub n_inner: Option<usize>,
    /// Activation inside of the feed-forward part.
    pub activation_function: String,
    /// Dropout of what each part adds.
    pub resid_pdrop: f64,
    /// Dropout of the embeddings.
    pub embd_pdrop: f64,
    /// Dropout of the attention's weights.
    pub attn_pdrop: f64,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// Deviation of the first weights.
    pub initializer_range: f64,
    /// Whether scores are divided by √hs.
    pub scale_attn_weights: bool,
    /// Whether scores are divided by the number of the layer, from 1, as well.
    pub scale_attn_by_inverse_layer_idx: bool,
    /// Whether the output's matrix is that of the embedding.
    pub tie_word_embeddings: bool,
    /// What else the file says, such as the ids of special tokens.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for Gpt2Config {
    fn default() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: "gelu_new".into(),
            resid_pdrop: 0.1,
            embd_pdrop: 0.1,
            attn_pdrop: 0.1,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
            other: serde_json::Map::new(),
        }
    }
}

impl Gpt2Config {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// ```
    /// # use kiln_models::nn::Params;
    /// # use kiln_models::transformer::{CausalLm, Gpt2Config, Pass};
    /// # use kiln_tensor::{Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let config = Gpt2Config { vocab_size: 65, n_positions: 16, n_embd: 32, n_layer: 2, n_head: 4, ..Gpt2Config::default() };
    /// let model = config.build(&Params::seeded(0))?;
    /// let logits = model.forward(&Tensor::from_vec(vec![1i64, 2, 3], [1, 3])?, Pass::default())?;
    /// assert_eq!(logits.dims(), [1, 3, 65]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<Decoder> {
        if self.n_head == 0 || !self.n_embd.is_multiple_of(self.n_head) {
            return Err(Error::format("gpt2", format!("n_embd {} must be a multiple of n_head {}", self.n_embd, self.n_head)));
        }
        let (root, init) = (params.scope("transformer"), NormalInit(self.initializer_range));
        let tokens = init.embedding(&root.scope("wte"), self.vocab_size, self.n_embd)?;
        let table = init.embedding(&root.scope("wpe"), self.n_positions, self.n_embd)?;
        let blocks = (0..self.n_layer).map(|i| self.block(&root.scope("h").index(i), i)).collect::<Result<_>>()?;
        let norm = Norm::layer(&root.scope("ln_f"), self.n_embd, self.layer_norm_epsilon)?;
        let head =
            (!self.tie_word_embeddings).then(|| init.linear(&params.scope("lm_head"), self.n_embd, self.vocab_size, false)).transpose()?;
        let parts = DecoderParts {
            shape: self.shape(),
            tokens,
            positions: Some(LearnedPositions { table, offset: 0 }),
            rope: None,
            projections: None,
            dropout: Dropout::new(params, self.embd_pdrop)?,
            blocks,
            norm: Some(norm),
            head,
        };
        Ok(Decoder::new(params, parts))
    }

    fn shape(&self) -> LmShape {
        LmShape {
            vocab_size: self.vocab_size,
            context_length: self.n_positions,
            hidden_size: self.n_embd,
            num_layers: self.n_layer,
            num_heads: self.n_head,
            num_key_value_heads: self.n_head,
            head_dim: self.n_embd / self.n_head,
            sliding_window: None,
        }
    }

    fn block(&self, params: &Params, layer: usize) -> Result<Block> {
        let (width, inner) = (self.n_embd, self.n_inner.unwrap_or(self.n_embd.saturating_mul(4)));
        let init = NormalInit(self.initializer_range);
        // Each block adds to the stream twice: its variance must not grow with depth.
        let outward = NormalInit(self.initializer_range / (2.0 * self.n_layer as f64).sqrt());
        let (attn, mlp) = (params.scope("attn"), params.scope("mlp"));
        let head_dim = width / self.n_head;
        let scale = if self.scale_attn_weights { 1.0 / (head_dim as f64).sqrt() } else { 1.0 };
        let attention = AttentionParts {
            projection: Projection::Fused(init.linear(&attn.scope("c_attn"), width, width.saturating_mul(3), true)?),
            out: outward.linear(&attn.scope("c_proj"), width, width, true)?,
            norms: None,
            num_heads: self.n_head,
            num_key_value_heads: self.n_head,
            head_dim,
            scale: Some(if self.scale_attn_by_inverse_layer_idx { scale / (layer + 1) as f64 } else { scale }),
            dropout: self.attn_pdrop,
            windowed: false,
        };
        Ok(Block {
            attention: Attention::new(params, attention)?,
            mlp: Mlp::Plain {
                up: init.linear(&mlp.scope("c_fc"), width, inner, true)?,
                down: outward.linear(&mlp.scope("c_proj"), inner, width, true)?,
                activation: activation(&self.activation_function)?,
            },
            norms: [
                Norm::layer(&params.scope("ln_1"), width, self.layer_norm_epsilon)?,
                Norm::layer(&params.scope("ln_2"), width, self.layer_norm_epsilon)?,
            ],
            dropout: Dropout::new(params, self.resid_pdrop)?,
            inner_dropout: None,
            post_norm: false,
        })
    }
}
