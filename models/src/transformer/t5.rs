//! T5, T5 1.1 and Flan-T5: an encoder and a decoder with a bias for each distance, RMS norms before the parts, no biases, no scaling
//! of the scores; gated GELU since 1.1.
//!
//! Sources: Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2020; names of Hugging
//! Face's `T5ForConditionalGeneration`.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, CrossBlock, Mlp, Norm, NormalInit, activation};
use super::positions::{Buckets, RelativeBias};
use super::seq2seq::{EncoderDecoder, Places, Seq2SeqParts};
use super::{Layout, LmShape, Pretrained, cannot_untie};
use crate::nn::{Dropout, Params};
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};

/// The hyper-parameters, by the names of `config.json`. The default is T5 small.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct T5Config {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub d_model: usize,
    /// Width of a head.
    pub d_kv: usize,
    /// Width inside of the feed-forward part.
    pub d_ff: usize,
    /// Blocks of the encoder.
    pub num_layers: usize,
    /// Blocks of the decoder; as many as the encoder's if absent.
    pub num_decoder_layers: Option<usize>,
    /// Heads.
    pub num_heads: usize,
    /// Biases of each head for distances.
    pub relative_attention_num_buckets: usize,
    /// Distances from here on share the last bucket.
    pub relative_attention_max_distance: usize,
    /// Dropout everywhere.
    pub dropout_rate: f64,
    /// ε of the norms.
    pub layer_norm_epsilon: f64,
    /// Factor of the deviations of the first weights.
    pub initializer_factor: f64,
    /// An activation, or `gated-` and one. `gated-gelu` is the tanh form.
    pub feed_forward_proj: String,
    /// Whether the output's matrix is that of the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the last hidden states are multiplied by `d_model`^(−1/2); if the matrix is tied, where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale_decoder_outputs: Option<bool>,
    /// The token that the decoder starts with; the padding's if absent.
    pub decoder_start_token_id: Option<i64>,
    /// The token of padding.
    pub pad_token_id: Option<i64>,
    /// What else the file says, such as the ids of other special tokens.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for T5Config {
    fn default() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 512,
            d_kv: 64,
            d_ff: 2048,
            num_layers: 6,
            num_decoder_layers: None,
            num_heads: 8,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            dropout_rate: 0.1,
            layer_norm_epsilon: 1e-6,
            initializer_factor: 1.0,
            feed_forward_proj: "relu".into(),
            tie_word_embeddings: true,
            scale_decoder_outputs: None,
            decoder_start_token_id: None,
            pad_token_id: Some(0),
            other: serde_json::Map::new(),
        }
    }
}

impl T5Config {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// ```
    /// # use kiln_models::nn::Params;
    /// # use kiln_models::transformer::{Seq2SeqLm, T5Config};
    /// # use kiln_tensor::{Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let config = T5Config { vocab_size: 50, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 2, num_heads: 2, ..T5Config::default() };
    /// let model = config.build(&Params::seeded(0))?;
    /// let source = Tensor::from_vec(vec![5i64, 6, 7, 1], [1, 4])?;
    /// let start = Tensor::from_vec(vec![model.start_token()], [1, 1])?;
    /// assert_eq!(model.forward(&source, None, &start)?.dims(), [1, 1, 50]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<EncoderDecoder> {
        let (encoder, decoder) = (params.scope("encoder"), params.scope("decoder"));
        let tokens = self.init(1.0).embedding(&params.scope("shared"), self.vocab_size, self.d_model)?;
        let places = Places::Relative([self.bias(&encoder, true)?, self.bias(&decoder, false)?]);
        let parts = Seq2SeqParts {
            shape: self.shape(),
            start_token: self.decoder_start_token_id.or(self.pad_token_id).unwrap_or(0),
            tokens,
            embedding_scale: 1.0,
            places,
            encoder: (0..self.num_layers).map(|i| self.block(&layers_of(&encoder, i), 1)).collect::<Result<_>>()?,
            decoder: (0..self.decoder_layers()).map(|i| self.cross_block(&layers_of(&decoder, i))).collect::<Result<_>>()?,
            norms: [self.norm(&encoder.scope("final_layer_norm"))?, self.norm(&decoder.scope("final_layer_norm"))?],
            dropout: Dropout::new(params, self.dropout_rate)?,
            last_dropout: Some(Dropout::new(params, self.dropout_rate)?),
            layer_drop: [0.0; 2],
            head: (!self.tie_word_embeddings)
                .then(|| self.init(1.0).linear(&params.scope("lm_head"), self.d_model, self.vocab_size, false))
                .transpose()?,
            head_scale: if self.scales_outputs() { 1.0 / (self.d_model as f64).sqrt() } else { 1.0 },
        };
        Ok(EncoderDecoder::new(params, parts))
    }

    fn scales_outputs(&self) -> bool {
        self.scale_decoder_outputs.unwrap_or(self.tie_word_embeddings)
    }

    fn decoder_layers(&self) -> usize {
        self.num_decoder_layers.unwrap_or(self.num_layers)
    }

    fn shape(&self) -> LmShape {
        LmShape {
            vocab_size: self.vocab_size,
            context_length: usize::MAX,
            hidden_size: self.d_model,
            num_layers: self.decoder_layers(),
            num_heads: self.num_heads,
            num_key_value_heads: self.num_heads,
            head_dim: self.d_kv,
            sliding_window: None,
        }
    }

    fn init(&self, std: f64) -> NormalInit {
        NormalInit(self.initializer_factor * std)
    }

    fn norm(&self, params: &Params) -> Result<Norm> {
        Norm::rms(params, self.d_model, self.layer_norm_epsilon)
    }

    /// The bias of one half, which lies in its first layer.
    fn bias(&self, half: &Params, bidirectional: bool) -> Result<RelativeBias> {
        let extents = Buckets {
            buckets: self.relative_attention_num_buckets,
            max_distance: self.relative_attention_max_distance,
            heads: self.num_heads,
            bidirectional,
        };
        let scope = layers_of(half, 0).index(0).scope("SelfAttention").scope("relative_attention_bias");
        RelativeBias::new(&scope, extents, self.init(1.0 / (self.d_model as f64).sqrt()))
    }

    fn attention(&self, params: &Params) -> Result<Attention> {
        let (width, inner) = (self.d_model, self.num_heads.saturating_mul(self.d_kv));
        let root = |n: usize| 1.0 / (n as f64).sqrt();
        let project = |name: &str, std: f64| self.init(std).linear(&params.scope(name), width, inner, false);
        let parts = AttentionParts {
            projection: Projection::Separate([
                project("q", root(width.saturating_mul(self.d_kv)))?,
                project("k", root(width))?,
                project("v", root(width))?,
            ]),
            out: self.init(root(inner)).linear(&params.scope("o"), inner, width, false)?,
            norms: None,
            num_heads: self.num_heads,
            num_key_value_heads: self.num_heads,
            head_dim: self.d_kv,
            scale: Some(1.0),
            dropout: self.dropout_rate,
            windowed: false,
        };
        Attention::new(params, parts)
    }

    fn mlp(&self, params: &Params) -> Result<Mlp> {
        let (enter, leave) = (self.init(1.0 / (self.d_model as f64).sqrt()), self.init(1.0 / (self.d_ff as f64).sqrt()));
        let up = |name: &str| enter.linear(&params.scope(name), self.d_model, self.d_ff, false);
        let down = || leave.linear(&params.scope("wo"), self.d_ff, self.d_model, false);
        match self.feed_forward_proj.split_once('-') {
            None => Ok(Mlp::Plain { up: up("wi")?, down: down()?, activation: activation(&self.feed_forward_proj)? }),
            Some(("gated", name)) => {
                let activation = activation(if name == "gelu" { "gelu_new" } else { name })?;
                Ok(Mlp::Gated { gate: up("wi_0")?, up: up("wi_1")?, down: down()?, activation })
            }
            Some(_) => {
                let message = format!("feed_forward_proj `{}` is neither an activation nor `gated-` and one", self.feed_forward_proj);
                Err(Error::format("config.json", message))
            }
        }
    }

    /// The parts of a block that looks at itself, whose feed-forward part is number `last`.
    fn block(&self, layers: &Params, last: usize) -> Result<Block> {
        let (first, last) = (layers.index(0), layers.index(last));
        Ok(Block {
            attention: self.attention(&first.scope("SelfAttention"))?,
            mlp: self.mlp(&last.scope("DenseReluDense"))?,
            norms: [self.norm(&first.scope("layer_norm"))?, self.norm(&last.scope("layer_norm"))?],
            dropout: Dropout::new(layers, self.dropout_rate)?,
            inner_dropout: Some(Dropout::new(layers, self.dropout_rate)?),
            post_norm: false,
        })
    }

    fn cross_block(&self, layers: &Params) -> Result<CrossBlock> {
        let middle = layers.index(1);
        Ok(CrossBlock {
            block: self.block(layers, 2)?,
            cross: self.attention(&middle.scope("EncDecAttention"))?,
            norm: self.norm(&middle.scope("layer_norm"))?,
        })
    }
}

/// The parts of block `i`.
fn layers_of(half: &Params, i: usize) -> Params {
    half.scope("block").index(i).scope("layer")
}

impl Pretrained for T5Config {
    type Model = EncoderDecoder;

    fn layout(&self) -> Layout {
        const EMBEDDINGS: [(&str, &str); 3] = [
            ("encoder.embed_tokens.weight", "shared.weight"),
            ("decoder.embed_tokens.weight", "shared.weight"),
            ("lm_head.weight", "shared.weight"),
        ];
        Layout {
            architecture: "T5ForConditionalGeneration",
            ignored: &["EncDecAttention.relative_attention_bias.weight"],
            tied: if self.tie_word_embeddings { &EMBEDDINGS } else { &EMBEDDINGS[..2] },
            ..Layout::default()
        }
    }

    fn model_type(&self) -> &'static str {
        "t5"
    }

    fn build_model(&self, params: &Params) -> Result<EncoderDecoder> {
        self.build(params)
    }

    fn untie(&mut self, name: &str) -> Result<()> {
        if name != "lm_head.weight" {
            return cannot_untie(name);
        }
        // The scale says of the model what the tie says where it is silent.
        self.scale_decoder_outputs = Some(self.scales_outputs());
        self.tie_word_embeddings = false;
        Ok(())
    }
}
