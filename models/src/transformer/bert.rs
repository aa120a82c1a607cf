//! BERT: an encoder with learned positions and token types, layer norms behind the sums, erf-GELU; with the head that fills masked
//! tokens in, or one that classifies sequences.
//!
//! Source: Devlin et al., *BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding*, 2019; names of Hugging
//! Face's `BertForMaskedLM` and `BertForSequenceClassification`.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, Mlp, Norm, NormalInit, activation};
use super::context::{Context, Visible, expect_mask, expect_tokens};
use super::{Layout, Library, Pretrained};
use crate::nn::{Dropout, Embedding, Init, Linear, Module, Param, Params, StateDict};
use kiln_tensor::{Activation, Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The hyper-parameters, by the names of `config.json`. The default is BERT base.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width inside of the feed-forward part.
    pub intermediate_size: usize,
    /// Activation inside of the feed-forward part.
    pub hidden_act: String,
    /// Dropout of the embeddings and of what each part adds.
    pub hidden_dropout_prob: f64,
    /// Dropout of the attention's weights.
    pub attention_probs_dropout_prob: f64,
    /// Dropout before the classifier; `hidden_dropout_prob` if absent.
    pub classifier_dropout: Option<f64>,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Kinds of segments.
    pub type_vocab_size: usize,
    /// Deviation of the first weights.
    pub initializer_range: f64,
    /// ε of the norms.
    pub layer_norm_eps: f64,
    /// The classes by their numbers in decimal; two if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id2label: Option<BTreeMap<String, String>>,
    /// The numbers of the classes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label2id: Option<BTreeMap<String, usize>>,
    /// What else the file says.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for BertConfig {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            classifier_dropout: None,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            id2label: None,
            label2id: None,
            other: serde_json::Map::new(),
        }
    }
}

impl BertConfig {
    /// Number of classes.
    pub fn num_labels(&self) -> usize {
        self.id2label.as_ref().map_or(2, BTreeMap::len)
    }

    /// Names the classes, in the order of their numbers.
    pub fn set_labels<S: Into<String>>(&mut self, labels: impl IntoIterator<Item = S>) {
        let labels: Vec<String> = labels.into_iter().map(Into::into).collect();
        self.label2id = Some(labels.iter().enumerate().map(|(i, label)| (label.clone(), i)).collect());
        self.id2label = Some(labels.into_iter().enumerate().map(|(i, label)| (i.to_string(), label)).collect());
    }

    /// A masked language model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn masked_lm(&self, params: &Params) -> Result<BertForMaskedLm> {
        let bert = Bert::new(self, params)?;
        let (scope, init) = (params.scope("cls").scope("predictions"), NormalInit(self.initializer_range));
        let transform = scope.scope("transform");
        Ok(BertForMaskedLm {
            bert,
            dense: init.linear(&transform.scope("dense"), self.hidden_size, self.hidden_size, true)?,
            activation: activation(&self.hidden_act)?,
            norm: Norm::layer(&transform.scope("LayerNorm"), self.hidden_size, self.layer_norm_eps)?,
            bias: scope.param("bias", [self.vocab_size], Init::Zeros)?,
        })
    }

    /// A classifier of sequences, as [`masked_lm`](Self::masked_lm).
    ///
    /// ```
    /// # use kiln_models::nn::Params;
    /// # use kiln_models::transformer::BertConfig;
    /// # use kiln_tensor::{Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let mut config = BertConfig { vocab_size: 50, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, ..BertConfig::default() };
    /// config.set_labels(["bad", "good", "neither"]);
    /// let model = config.sequence_classifier(&Params::seeded(0))?;
    /// let tokens = Tensor::from_vec(vec![2i64, 7, 9, 3], [1, 4])?;
    /// assert_eq!(model.forward(&tokens, None, None)?.dims(), [1, 3]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`masked_lm`](Self::masked_lm).
    pub fn sequence_classifier(&self, params: &Params) -> Result<BertForSequenceClassification> {
        let bert = Bert::new(self, params)?;
        let init = NormalInit(self.initializer_range);
        let pooler = params.scope("bert").scope("pooler").scope("dense");
        Ok(BertForSequenceClassification {
            bert,
            pooler: init.linear(&pooler, self.hidden_size, self.hidden_size, true)?,
            dropout: Dropout::new(params, self.classifier_dropout.unwrap_or(self.hidden_dropout_prob))?,
            classifier: init.linear(&params.scope("classifier"), self.hidden_size, self.num_labels(), true)?,
        })
    }

    fn block(&self, params: &Params) -> Result<Block> {
        let (init, width, inner) = (NormalInit(self.initializer_range), self.hidden_size, self.intermediate_size);
        let attention = params.scope("attention");
        let project = |name: &str| init.linear(&attention.scope("self").scope(name), width, width, true);
        let norm = |params: &Params| Norm::layer(&params.scope("LayerNorm"), width, self.layer_norm_eps);
        let parts = AttentionParts {
            projection: Projection::Separate([project("query")?, project("key")?, project("value")?]),
            out: init.linear(&attention.scope("output").scope("dense"), width, width, true)?,
            norms: None,
            num_heads: self.num_attention_heads,
            num_key_value_heads: self.num_attention_heads,
            head_dim: width / self.num_attention_heads,
            scale: None,
            dropout: self.attention_probs_dropout_prob,
            windowed: false,
        };
        let output = params.scope("output");
        Ok(Block {
            attention: Attention::new(params, parts)?,
            mlp: Mlp::Plain {
                up: init.linear(&params.scope("intermediate").scope("dense"), width, inner, true)?,
                down: init.linear(&output.scope("dense"), inner, width, true)?,
                activation: activation(&self.hidden_act)?,
            },
            norms: [norm(&attention.scope("output"))?, norm(&output)?],
            dropout: Dropout::new(params, self.hidden_dropout_prob)?,
            inner_dropout: None,
            post_norm: true,
        })
    }
}

/// The encoder, without a head.
struct Bert {
    params: Params,
    tokens: Embedding,
    places: Embedding,
    types: Embedding,
    norm: Norm,
    dropout: Dropout,
    blocks: Vec<Block>,
    max_position_embeddings: usize,
}

impl Bert {
    fn new(config: &BertConfig, params: &Params) -> Result<Self> {
        let (width, heads) = (config.hidden_size, config.num_attention_heads);
        if heads == 0 || !width.is_multiple_of(heads) {
            let message = format!("hidden_size {width} must be a multiple of num_attention_heads {heads}");
            return Err(Error::format("config.json", message));
        }
        let only = [("position_embedding_type", serde_json::Value::from("absolute")), ("is_decoder", false.into())];
        for (name, known) in only {
            if config.other.get(name).is_some_and(|value| !value.is_null() && *value != known) {
                return Err(Error::format("config.json", format!("{name} other than {known} is not supported")));
            }
        }
        let init = NormalInit(config.initializer_range);
        let (embeddings, layers) = (params.scope("bert").scope("embeddings"), params.scope("bert").scope("encoder").scope("layer"));
        let table = |name: &str, entries: usize| init.embedding(&embeddings.scope(name), entries, width);
        Ok(Self {
            params: params.clone(),
            tokens: table("word_embeddings", config.vocab_size)?,
            places: table("position_embeddings", config.max_position_embeddings)?,
            types: table("token_type_embeddings", config.type_vocab_size)?,
            norm: Norm::layer(&embeddings.scope("LayerNorm"), width, config.layer_norm_eps)?,
            dropout: Dropout::new(params, config.hidden_dropout_prob)?,
            blocks: (0..config.num_hidden_layers).map(|i| config.block(&layers.index(i))).collect::<Result<_>>()?,
            max_position_embeddings: config.max_position_embeddings,
        })
    }

    /// The last hidden states, (B, T, C).
    fn forward(&self, tokens: &Tensor, mask: Option<&Tensor>, types: Option<&Tensor>) -> Result<Tensor> {
        let [_, len] = expect_tokens(tokens)?;
        if len > self.max_position_embeddings {
            let message = format!("{len} tokens are more than the {} places of the model; shorten the text", self.max_position_embeddings);
            return Err(Error::argument("bert", message));
        }
        let kinds = match types {
            Some(types) if types.shape() != tokens.shape() => {
                return Err(Error::shape("bert", format!("token types {} for tokens {}", types.shape(), tokens.shape())));
            }
            Some(types) => self.types.forward(types)?,
            None => self.types.rows(0, 1)?,
        };
        let x = self.tokens.forward(tokens)?.add(&kinds)?.add(&self.places.rows(0, len)?)?;
        let mut x = self.dropout.forward(&self.norm.forward(&x)?)?;
        let context = Context { full: Visible::padded(expect_mask(mask, tokens)?.as_ref())?, ..Context::default() };
        for block in &self.blocks {
            x = block.forward(&x, &context, None)?;
        }
        Ok(x)
    }
}

/// BERT with the head that fills masked tokens in.
pub struct BertForMaskedLm {
    bert: Bert,
    dense: Linear,
    activation: Activation,
    norm: Norm,
    /// Of the logits, (V).
    bias: Param,
}

impl BertForMaskedLm {
    /// The logits of each token: tokens (B, T) of i64 → (B, T, V). `mask`, bool (B, T), is false at padding; `types`, i64 (B, T),
    /// numbers the segments (0 if absent).
    ///
    /// # Errors
    /// If a token or a type is not in its table, or the sequence is longer than the model has places for.
    pub fn forward(&self, tokens: &Tensor, mask: Option<&Tensor>, types: Option<&Tensor>) -> Result<Tensor> {
        let x = self.dense.forward_activated(&self.bert.forward(tokens, mask, types)?, self.activation)?;
        self.norm.forward(&x)?.linear(&self.bert.tokens.weight().get(), Some(&self.bias.get()))
    }

    /// The scope that holds the weights; its switch between training and evaluation.
    pub fn params(&self) -> &Params {
        &self.bert.params
    }
}

/// BERT with a classifier of the first token's state, which stands for the sequence.
pub struct BertForSequenceClassification {
    bert: Bert,
    pooler: Linear,
    dropout: Dropout,
    classifier: Linear,
}

impl BertForSequenceClassification {
    /// The logits of the classes: tokens (B, T) of i64 → (B, classes). For `mask` and `types` see [`BertForMaskedLm::forward`].
    ///
    /// # Errors
    /// As [`BertForMaskedLm::forward`].
    pub fn forward(&self, tokens: &Tensor, mask: Option<&Tensor>, types: Option<&Tensor>) -> Result<Tensor> {
        let first = self.bert.forward(tokens, mask, types)?.select(1, 0)?; // (B, C)
        let pooled = self.pooler.forward(&first)?.tanh()?;
        self.classifier.forward(&self.dropout.forward(&pooled)?)
    }

    /// The scope that holds the weights; its switch between training and evaluation.
    pub fn params(&self) -> &Params {
        &self.bert.params
    }
}

/// The configuration of a masked language model: what [`load_pretrained`](super::load_pretrained) is told to make of a folder.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MaskedLm<C>(pub C);

/// The configuration of a classifier of sequences, as [`MaskedLm`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SequenceClassifier<C>(pub C);

const LAYOUT: Layout = Layout {
    prefix: "bert.",
    heads: &["cls.", "classifier."],
    ignored: &["embeddings.position_ids"],
    ..Layout::new(Library::Transformers, "")
};

impl Pretrained for MaskedLm<BertConfig> {
    type Model = BertForMaskedLm;

    fn layout(&self) -> Layout {
        Layout {
            architecture: "BertForMaskedLM",
            // Files of the pre-training hold the head of its other task as well.
            ignored: &[
                "embeddings.position_ids",
                "pooler.dense.weight",
                "pooler.dense.bias",
                "cls.seq_relationship.weight",
                "cls.seq_relationship.bias",
            ],
            tied: &[
                ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
                ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ],
            ..LAYOUT
        }
    }

    fn model_type(&self) -> &'static str {
        "bert"
    }

    fn build_model(&self, params: &Params) -> Result<BertForMaskedLm> {
        self.0.masked_lm(params)
    }
}

impl Pretrained for SequenceClassifier<BertConfig> {
    type Model = BertForSequenceClassification;

    fn layout(&self) -> Layout {
        Layout { architecture: "BertForSequenceClassification", ..LAYOUT }
    }

    fn model_type(&self) -> &'static str {
        "bert"
    }

    fn build_model(&self, params: &Params) -> Result<BertForSequenceClassification> {
        self.0.sequence_classifier(params)
    }

    fn fresh_head(&self, body: &StateDict, params: &Params) -> Result<StateDict> {
        let (config, options) = (&self.0, params.options());
        let width = body.get("bert.embeddings.word_embeddings.weight").and_then(|table| table.dim(1).ok());
        if width != Some(config.hidden_size) {
            // Extents that no tensor confirms are not allocated.
            return Err(Error::format("config.json", format!("hidden_size {} is not the width of the embeddings", config.hidden_size)));
        }
        let matrix = |rows: usize| params.generator().randn([rows, config.hidden_size], options)?.mul_scalar(config.initializer_range);
        let mut head = StateDict::from([
            ("classifier.weight".to_owned(), matrix(config.num_labels())?),
            ("classifier.bias".to_owned(), Tensor::zeros([config.num_labels()], options)?),
        ]);
        if !body.contains_key("bert.pooler.dense.weight") {
            head.insert("bert.pooler.dense.weight".to_owned(), matrix(config.hidden_size)?);
            head.insert("bert.pooler.dense.bias".to_owned(), Tensor::zeros([config.hidden_size], options)?);
        }
        Ok(head)
    }
}
