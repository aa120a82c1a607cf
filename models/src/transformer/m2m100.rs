//! M2M-100 (and NLLB's dense models): an encoder and a decoder with sines for places, layer norms before the parts, ReLU, one table
//! for all embeddings.
//!
//! Source: Fan et al., *Beyond English-Centric Multilingual Machine Translation*, 2020; names of Hugging Face's
//! `M2M100ForConditionalGeneration`. The source begins with its language's token; the decoder starts with `</s>` and the target's.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, CrossBlock, Mlp, Norm, NormalInit, activation};
use super::positions::Sinusoids;
use super::seq2seq::{EncoderDecoder, Places, Seq2SeqParts};
use super::{Layout, LmShape, Pretrained, cannot_untie};
use crate::nn::{Dropout, Params};
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};

/// ε of the norms, which the configuration does not give.
const EPS: f64 = 1e-5;

/// The hyper-parameters, by the names of `config.json`. Defaults are Hugging Face's.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct M2m100Config {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub d_model: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Blocks of the encoder.
    pub encoder_layers: usize,
    /// Width inside of the encoder's feed-forward parts.
    pub encoder_ffn_dim: usize,
    /// Heads of the encoder.
    pub encoder_attention_heads: usize,
    /// Blocks of the decoder.
    pub decoder_layers: usize,
    /// Width inside of the decoder's feed-forward parts.
    pub decoder_ffn_dim: usize,
    /// Heads of the decoder.
    pub decoder_attention_heads: usize,
    /// Probability that a layer of the encoder is skipped in training.
    pub encoder_layerdrop: f64,
    /// The same, of the decoder.
    pub decoder_layerdrop: f64,
    /// Activation inside of the feed-forward part.
    pub activation_function: String,
    /// Dropout of the embeddings and of what each part adds.
    pub dropout: f64,
    /// Dropout of the attention's weights.
    pub attention_dropout: f64,
    /// Dropout inside of the feed-forward part.
    pub activation_dropout: f64,
    /// Deviation of the first weights.
    pub init_std: f64,
    /// Whether embeddings are multiplied by √`d_model`.
    pub scale_embedding: bool,
    /// The token that the decoder starts with.
    pub decoder_start_token_id: Option<i64>,
    /// The token of padding, which has no place.
    pub pad_token_id: i64,
    /// Whether the output's matrix is that of the embedding.
    pub tie_word_embeddings: bool,
    /// What else the file says, such as the ids of other special tokens.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for M2m100Config {
    fn default() -> Self {
        Self {
            vocab_size: 128112,
            d_model: 1024,
            max_position_embeddings: 1024,
            encoder_layers: 12,
            encoder_ffn_dim: 4096,
            encoder_attention_heads: 16,
            decoder_layers: 12,
            decoder_ffn_dim: 4096,
            decoder_attention_heads: 16,
            encoder_layerdrop: 0.05,
            decoder_layerdrop: 0.05,
            activation_function: "relu".into(),
            dropout: 0.1,
            attention_dropout: 0.1,
            activation_dropout: 0.0,
            init_std: 0.02,
            scale_embedding: true,
            decoder_start_token_id: Some(2),
            pad_token_id: 1,
            tie_word_embeddings: true,
            other: serde_json::Map::new(),
        }
    }
}

/// The extents of one half.
#[derive(Clone, Copy)]
struct Half {
    heads: usize,
    inner: usize,
}

impl M2m100Config {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<EncoderDecoder> {
        self.check()?;
        let root = params.scope("model");
        let (encoder, decoder) = (root.scope("encoder"), root.scope("decoder"));
        let tokens = self.init().embedding(&root.scope("shared"), self.vocab_size, self.d_model)?;
        let [of_encoder, of_decoder] = self.halves();
        let layer = |half: &Params, i: usize| half.scope("layers").index(i);
        let parts = Seq2SeqParts {
            shape: self.shape(),
            start_token: self.decoder_start_token_id.unwrap_or(2),
            tokens,
            embedding_scale: if self.scale_embedding { (self.d_model as f64).sqrt() } else { 1.0 },
            places: Places::Sinusoids(Sinusoids::new(self.d_model, self.pad_token_id)),
            encoder: (0..self.encoder_layers).map(|i| self.block(&layer(&encoder, i), of_encoder)).collect::<Result<_>>()?,
            decoder: (0..self.decoder_layers).map(|i| self.cross_block(&layer(&decoder, i), of_decoder)).collect::<Result<_>>()?,
            norms: [self.norm(&encoder.scope("layer_norm"))?, self.norm(&decoder.scope("layer_norm"))?],
            dropout: Dropout::new(params, self.dropout)?,
            last_dropout: None,
            layer_drop: [self.encoder_layerdrop, self.decoder_layerdrop],
            head: (!self.tie_word_embeddings)
                .then(|| self.init().linear(&params.scope("lm_head"), self.d_model, self.vocab_size, false))
                .transpose()?,
            head_scale: 1.0,
        };
        Ok(EncoderDecoder::new(params, parts))
    }

    fn check(&self) -> Result<()> {
        for (name, heads) in
            [("encoder_attention_heads", self.encoder_attention_heads), ("decoder_attention_heads", self.decoder_attention_heads)]
        {
            if heads == 0 || !self.d_model.is_multiple_of(heads) {
                return Err(Error::format("config.json", format!("d_model {} must be a multiple of {name} {heads}", self.d_model)));
            }
        }
        for (name, p) in [("encoder_layerdrop", self.encoder_layerdrop), ("decoder_layerdrop", self.decoder_layerdrop)] {
            if !(0.0..=1.0).contains(&p) {
                return Err(Error::format("config.json", format!("{name} {p} is no probability")));
            }
        }
        if self.d_model < 4 {
            return Err(Error::format("config.json", format!("d_model {} must be 4 at least, for two frequencies", self.d_model)));
        }
        if self.pad_token_id < 0 || self.pad_token_id as u64 >= self.vocab_size as u64 {
            let message = format!("pad_token_id {} is not in the vocabulary of {}", self.pad_token_id, self.vocab_size);
            return Err(Error::format("config.json", message));
        }
        Ok(())
    }

    fn halves(&self) -> [Half; 2] {
        [
            Half { heads: self.encoder_attention_heads, inner: self.encoder_ffn_dim },
            Half { heads: self.decoder_attention_heads, inner: self.decoder_ffn_dim },
        ]
    }

    fn shape(&self) -> LmShape {
        LmShape {
            vocab_size: self.vocab_size,
            context_length: self.max_position_embeddings,
            hidden_size: self.d_model,
            num_layers: self.decoder_layers,
            num_heads: self.decoder_attention_heads,
            num_key_value_heads: self.decoder_attention_heads,
            head_dim: self.d_model / self.decoder_attention_heads,
            sliding_window: None,
        }
    }

    fn init(&self) -> NormalInit {
        NormalInit(self.init_std)
    }

    fn norm(&self, params: &Params) -> Result<Norm> {
        Norm::layer(params, self.d_model, EPS)
    }

    fn attention(&self, params: &Params, half: Half) -> Result<Attention> {
        let project = |name: &str| self.init().linear(&params.scope(name), self.d_model, self.d_model, true);
        let parts = AttentionParts {
            projection: Projection::Separate([project("q_proj")?, project("k_proj")?, project("v_proj")?]),
            out: project("out_proj")?,
            norms: None,
            num_heads: half.heads,
            num_key_value_heads: half.heads,
            head_dim: self.d_model / half.heads,
            scale: None,
            dropout: self.attention_dropout,
            windowed: false,
        };
        Attention::new(params, parts)
    }

    fn block(&self, params: &Params, half: Half) -> Result<Block> {
        let (init, width) = (self.init(), self.d_model);
        Ok(Block {
            attention: self.attention(&params.scope("self_attn"), half)?,
            mlp: Mlp::Plain {
                up: init.linear(&params.scope("fc1"), width, half.inner, true)?,
                down: init.linear(&params.scope("fc2"), half.inner, width, true)?,
                activation: activation(&self.activation_function)?,
            },
            norms: [self.norm(&params.scope("self_attn_layer_norm"))?, self.norm(&params.scope("final_layer_norm"))?],
            dropout: Dropout::new(params, self.dropout)?,
            inner_dropout: Some(Dropout::new(params, self.activation_dropout)?),
            post_norm: false,
        })
    }

    fn cross_block(&self, params: &Params, half: Half) -> Result<CrossBlock> {
        Ok(CrossBlock {
            block: self.block(params, half)?,
            cross: self.attention(&params.scope("encoder_attn"), half)?,
            norm: self.norm(&params.scope("encoder_attn_layer_norm"))?,
        })
    }
}

impl Pretrained for M2m100Config {
    type Model = EncoderDecoder;

    fn layout(&self) -> Layout {
        const EMBEDDINGS: [(&str, &str); 3] = [
            ("model.encoder.embed_tokens.weight", "model.shared.weight"),
            ("model.decoder.embed_tokens.weight", "model.shared.weight"),
            ("lm_head.weight", "model.shared.weight"),
        ];
        Layout {
            architecture: "M2M100ForConditionalGeneration",
            prefix: "model.",
            heads: &["lm_head."],
            ignored: &["embed_positions.weights", "embed_positions._float_tensor", "encoder.version", "decoder.version"],
            tied: if self.tie_word_embeddings { &EMBEDDINGS } else { &EMBEDDINGS[..2] },
            ..Layout::default()
        }
    }

    fn model_type(&self) -> &'static str {
        "m2m_100"
    }

    fn build_model(&self, params: &Params) -> Result<EncoderDecoder> {
        self.build(params)
    }

    fn untie(&mut self, name: &str) -> Result<()> {
        if name != "lm_head.weight" {
            return cannot_untie(name);
        }
        self.tie_word_embeddings = false;
        Ok(())
    }
}
