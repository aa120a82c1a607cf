//! The model of two halves that T5 and M2M-100 are cases of.

use super::block::{Block, CrossBlock, Norm, Source};
use super::context::{Context, Extent, Visible, expect_mask, expect_tokens, visible};
use super::positions::{RelativeBias, Sinusoids};
use super::{Encoded, Layout, LmShape, M2m100Config, Pass, Pretrained, Seq2SeqCache, Seq2SeqLm, T5Config, load_pretrained};
use crate::nn::{Dropout, Embedding, Linear, Module, Params};
use kiln_tensor::{Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// How places are told.
pub(super) enum Places {
    /// By a bias of the scores, of the encoder and of the decoder, shared by their layers.
    Relative([RelativeBias; 2]),
    /// By vectors that are added to the tokens'.
    Sinusoids(Sinusoids),
}

/// What a model is made of; of a pair, the encoder's comes first.
pub(super) struct Seq2SeqParts {
    /// The decoder's.
    pub shape: LmShape,
    pub start_token: i64,
    /// Of both halves.
    pub tokens: Embedding,
    /// Factor of the tokens' vectors.
    pub embedding_scale: f64,
    pub places: Places,
    pub encoder: Vec<Block>,
    pub decoder: Vec<CrossBlock>,
    pub norms: [Norm; 2],
    /// Of the embeddings.
    pub dropout: Dropout,
    /// Of the last hidden states.
    pub last_dropout: Option<Dropout>,
    /// Probability that a layer is skipped in training: Fan et al., *Reducing Transformer Depth on Demand*, 2019.
    pub layer_drop: [f64; 2],
    /// The output's matrix; the embedding's if `None` ("tied").
    pub head: Option<Linear>,
    /// Factor of the last hidden states before the output's matrix.
    pub head_scale: f64,
}

/// An encoder and a decoder that looks at what it made, of any family: build one through a configuration
/// ([`T5Config`], [`M2m100Config`]), or [`load_seq2seq`] it.
pub struct EncoderDecoder {
    params: Params,
    parts: Seq2SeqParts,
}

impl EncoderDecoder {
    pub(super) fn new(params: &Params, parts: Seq2SeqParts) -> Self {
        Self { params: params.clone(), parts }
    }

    fn extent(&self, tokens: &Tensor, past: usize) -> Result<Extent> {
        let [batch, added] = expect_tokens(tokens)?;
        let context = self.parts.shape.context_length;
        if past.saturating_add(added) > context {
            let message = format!("{added} tokens after {past} are more than the context of {context}; shorten the text");
            return Err(Error::argument("transformer", message));
        }
        Ok(Extent { batch, added, past, start: past, device: tokens.device() })
    }

    /// Tokens and places as vectors, (B, T, C).
    fn embed(&self, tokens: &Tensor, past: usize) -> Result<Tensor> {
        let parts = &self.parts;
        let mut x = parts.tokens.forward(tokens)?;
        if parts.embedding_scale != 1.0 {
            x = x.mul_scalar(parts.embedding_scale)?;
        }
        if let Places::Sinusoids(places) = &parts.places {
            x = x.add(&places.forward(tokens, past, &x)?)?;
        }
        parts.dropout.forward(&x)
    }

    /// What `half` (0 or 1) sees of itself: `visible`, with its bias.
    fn context(&self, half: usize, visible: Visible, extent: Extent) -> Result<Context> {
        let full = match &self.parts.places {
            Places::Relative(biases) => biases[half].add_to(&visible, extent)?,
            Places::Sinusoids(_) => visible,
        };
        Ok(Context { full, ..Context::default() })
    }

    fn finish(&self, half: usize, x: &Tensor) -> Result<Tensor> {
        let x = self.parts.norms[half].forward(x)?;
        match &self.parts.last_dropout {
            Some(dropout) => dropout.forward(&x),
            None => Ok(x),
        }
    }

    fn skips_layer(&self, half: usize) -> Result<bool> {
        let p = self.parts.layer_drop[half];
        Ok(p > 0.0 && self.params.mode().is_training() && self.params.generator().rand([1], ())?.item_f64()? < p)
    }
}

impl Seq2SeqLm for EncoderDecoder {
    fn shape(&self) -> LmShape {
        self.parts.shape
    }

    fn params(&self) -> &Params {
        &self.params
    }

    fn start_token(&self) -> i64 {
        self.parts.start_token
    }

    fn encode(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Encoded> {
        let extent = self.extent(tokens, 0)?;
        let mask = expect_mask(mask, tokens)?;
        let context = self.context(0, Visible::padded(mask.as_ref())?, extent)?;
        let mut x = self.embed(tokens, 0)?;
        for block in &self.parts.encoder {
            if !self.skips_layer(0)? {
                x = block.forward(&x, &context, None)?;
            }
        }
        Ok(Encoded { hidden: self.finish(0, &x)?, mask })
    }

    fn decode(&self, tokens: &Tensor, encoded: &Encoded, mut cache: Option<&mut Seq2SeqCache>) -> Result<Tensor> {
        let extent = self.extent(tokens, cache.as_ref().map_or(0, |cache| cache.len()))?;
        if encoded.hidden.dim(0)? != extent.batch {
            let message = format!("{} sequences of tokens look at {} sources", extent.batch, encoded.hidden.dim(0)?);
            return Err(Error::shape("transformer", message));
        }
        let context = self.context(1, visible(extent, &Pass::default(), None)?, extent)?;
        let source = Source { hidden: &encoded.hidden, visible: Visible::padded(encoded.mask.as_ref())? };
        let mut x = self.embed(tokens, extent.past)?;
        for (layer, block) in self.parts.decoder.iter().enumerate() {
            // A layer that were missing in one pass would leave a gap in the cache.
            if cache.is_some() || !self.skips_layer(1)? {
                x = block.forward(&x, &context, &source, cache.as_deref_mut().map(|cache| (cache, layer)))?;
            }
        }
        if let Some(cache) = cache {
            cache.own().advance(extent.added);
        }
        self.finish(1, &x)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let parts = &self.parts;
        let scaled = if parts.head_scale == 1.0 { hidden.clone() } else { hidden.mul_scalar(parts.head_scale)? };
        match &parts.head {
            Some(head) => head.forward(&scaled),
            None => scaled.linear(&parts.tokens.weight().get(), None),
        }
    }
}

/// The configuration of a model of two halves of any family.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum Seq2SeqConfig {
    /// T5 and its later forms.
    T5(T5Config),
    /// M2M-100 and NLLB.
    M2m100(M2m100Config),
}

impl<'de> Deserialize<'de> for Seq2SeqConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        use serde::de::Error as _;
        let value = Value::deserialize(deserializer)?;
        let kind = value.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        match kind.as_str() {
            "t5" => serde_json::from_value(value).map(Seq2SeqConfig::T5).map_err(D::Error::custom),
            "m2m_100" => serde_json::from_value(value).map(Seq2SeqConfig::M2m100).map_err(D::Error::custom),
            "" => Err(D::Error::custom("`model_type` is missing")),
            other => {
                let message = format!("model_type `{other}` is no model of two halves that is known here; there are t5, m2m_100");
                Err(D::Error::custom(message))
            }
        }
    }
}

impl Pretrained for Seq2SeqConfig {
    type Model = EncoderDecoder;

    fn layout(&self) -> Layout {
        match self {
            Seq2SeqConfig::T5(config) => config.layout(),
            Seq2SeqConfig::M2m100(config) => config.layout(),
        }
    }

    fn model_type(&self) -> &'static str {
        match self {
            Seq2SeqConfig::T5(config) => config.model_type(),
            Seq2SeqConfig::M2m100(config) => config.model_type(),
        }
    }

    fn build_model(&self, params: &Params) -> Result<EncoderDecoder> {
        match self {
            Seq2SeqConfig::T5(config) => config.build(params),
            Seq2SeqConfig::M2m100(config) => config.build(params),
        }
    }

    fn untie(&mut self, name: &str) -> Result<()> {
        match self {
            Seq2SeqConfig::T5(config) => config.untie(name),
            Seq2SeqConfig::M2m100(config) => config.untie(name),
        }
    }
}

/// Loads the model of two halves in `folder`, as [`load`](super::load) does a decoder-only one.
///
/// # Errors
/// As [`load`](super::load).
pub fn load_seq2seq(folder: impl AsRef<Path>, params: &Params) -> Result<(Seq2SeqConfig, EncoderDecoder)> {
    load_pretrained(folder, params)
}
