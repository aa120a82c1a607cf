//! Llama and its kin (Mistral, Qwen2, Qwen3): rotary positions, RMS norms before the parts, grouped queries, SwiGLU.
//!
//! Sources: Touvron et al., *LLaMA*, 2023; Jiang et al., *Mistral 7B*, 2023; Qwen Team, *Qwen2*, 2024, *Qwen3*, 2025; names of Hugging Face.

use super::attention::{Attention, AttentionParts, Projection};
use super::block::{Block, Mlp, Norm, NormalInit, activation};
use super::decoder::DecoderParts;
use super::rope::{Rope, RopeConfig, RopeScaling};
use super::{Decoder, LmShape};
use crate::nn::{Dropout, Params, RmsNorm};
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// Which of the family a model is: they differ in a norm and two biases.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LlamaKind {
    /// No biases, unless the configuration says so.
    #[default]
    Llama,
    /// As Llama; a sliding window in every layer.
    Mistral,
    /// Biases of query, key and value.
    Qwen2,
    /// RMS norms of each head's query and key.
    Qwen3,
}

impl LlamaKind {
    /// What a file means by leaving a field out where it is not what Llama's file would mean.
    fn absent(self) -> &'static [(&'static str, u64)] {
        match self {
            LlamaKind::Llama => &[],
            LlamaKind::Mistral => {
                &[("intermediate_size", 14336), ("num_key_value_heads", 8), ("max_position_embeddings", 131_072), ("sliding_window", 4096)]
            }
            LlamaKind::Qwen2 => &[
                ("vocab_size", 151_936),
                ("intermediate_size", 22016),
                ("num_key_value_heads", 32),
                ("max_position_embeddings", 32768),
                ("sliding_window", 4096),
            ],
            LlamaKind::Qwen3 => &[
                ("vocab_size", 151_936),
                ("intermediate_size", 22016),
                ("num_key_value_heads", 32),
                ("head_dim", 128),
                ("max_position_embeddings", 32768),
                ("sliding_window", 4096),
            ],
        }
    }
}

/// The hyper-parameters, by the names of `config.json`. Defaults are Hugging Face's of Llama; a file of another kind that leaves a field out
/// means that kind's.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default, remote = "Self")]
pub struct LlamaConfig {
    /// The member of the family.
    pub model_type: LlamaKind,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width.
    pub hidden_size: usize,
    /// Width inside of the feed-forward part.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of keys and values; those of the queries if it is none.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; `hidden_size / num_attention_heads` if it is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Activation of the gate.
    pub hidden_act: String,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Deviation of the first weights.
    pub initializer_range: f64,
    /// ε of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary positions, where `rope_parameters` do not give one.
    pub rope_theta: f64,
    /// Scaling of the rotary positions, as files before `rope_parameters` give it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeParameters>,
    /// Base and scaling of the rotary positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the attention's projections have biases.
    pub attention_bias: bool,
    /// Dropout of the attention's weights.
    pub attention_dropout: f64,
    /// Whether the feed-forward part has biases.
    pub mlp_bias: bool,
    /// Keys that a query of a windowed layer sees.
    pub sliding_window: Option<usize>,
    /// Whether `sliding_window` holds (Qwen).
    pub use_sliding_window: bool,
    /// Layers before this one see everything (Qwen).
    pub max_window_layers: usize,
    /// `full_attention` or `sliding_attention` for each layer.
    pub layer_types: Option<Vec<String>>,
    /// Whether the output's matrix is that of the embedding.
    pub tie_word_embeddings: bool,
    /// What else the file says, such as the ids of special tokens.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// The rotary positions in a `config.json`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct RopeParameters {
    /// The base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    /// The variant, where older files keep it.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub old_type: Option<String>,
    /// The variant and its numbers.
    #[serde(flatten)]
    pub fields: serde_json::Map<String, serde_json::Value>,
}

impl RopeParameters {
    /// The variant.
    ///
    /// # Errors
    /// If it is not known, or a number is missing.
    pub fn scaling(&self) -> Result<RopeScaling> {
        let mut fields = self.fields.clone();
        let kind = self.old_type.clone().unwrap_or_else(|| "default".into());
        let kind = fields.entry("rope_type").or_insert_with(|| kind.into()).clone();
        if kind == "su" {
            fields.insert("rope_type".into(), "longrope".into());
        }
        serde_json::from_value(fields.into()).map_err(|e| Error::format("config.json", format!("rope parameters of type {kind}: {e}")))
    }
}

impl<'de> Deserialize<'de> for LlamaConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        use serde::de::Error as _;
        let mut fields: Map<String, Value> = Map::deserialize(deserializer)?;
        let kind = fields.get("model_type").map(LlamaKind::deserialize).transpose().map_err(D::Error::custom)?;
        for &(name, value) in kind.unwrap_or_default().absent() {
            fields.entry(name).or_insert(value.into());
        }
        LlamaConfig::deserialize(Value::Object(fields)).map_err(D::Error::custom)
    }
}

impl Serialize for LlamaConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if self.model_type == LlamaKind::Qwen3 && self.head_dim.is_none() {
            // Left out, it would be 128.
            let head_dim = self.hidden_size.checked_div(self.num_attention_heads);
            return LlamaConfig::serialize(&LlamaConfig { head_dim, ..self.clone() }, serializer);
        }
        LlamaConfig::serialize(self, serializer)
    }
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            model_type: LlamaKind::Llama,
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: "silu".into(),
            max_position_embeddings: 2048,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_scaling: None,
            rope_parameters: None,
            attention_bias: false,
            attention_dropout: 0.0,
            mlp_bias: false,
            sliding_window: None,
            use_sliding_window: false,
            max_window_layers: 28,
            layer_types: None,
            tie_word_embeddings: false,
            other: serde_json::Map::new(),
        }
    }
}

impl LlamaConfig {
    /// A model whose weights are those of `params`: fresh, or from a state dictionary that is being built from.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    pub fn build(&self, params: &Params) -> Result<Decoder> {
        let shape = self.shape()?;
        let (root, init) = (params.scope("model"), NormalInit(self.initializer_range));
        let tokens = init.embedding(&root.scope("embed_tokens"), self.vocab_size, self.hidden_size)?;
        let layers = root.scope("layers");
        let blocks = (0..self.num_hidden_layers).map(|i| self.block(&layers.index(i), shape, i)).collect::<Result<_>>()?;
        let norm = Norm::rms(&root.scope("norm"), self.hidden_size, self.rms_norm_eps)?;
        let head = (!self.tie_word_embeddings)
            .then(|| init.linear(&params.scope("lm_head"), self.hidden_size, self.vocab_size, false))
            .transpose()?;
        let parts = DecoderParts {
            shape,
            tokens,
            positions: None,
            rope: Some(Rope::new(self.rope(shape.head_dim)?)?),
            projections: None,
            dropout: Dropout::new(params, 0.0)?,
            blocks,
            norm: Some(norm),
            head,
        };
        Ok(Decoder::new(params, parts))
    }

    fn shape(&self) -> Result<LmShape> {
        let heads = self.num_attention_heads;
        if heads == 0 || (self.head_dim.is_none() && !self.hidden_size.is_multiple_of(heads)) {
            let message = format!("hidden_size {} must be a multiple of num_attention_heads {heads}", self.hidden_size);
            return Err(Error::format("config.json", message));
        }
        if self.sliding_window == Some(0) {
            return Err(Error::format("config.json", "sliding_window 0 hides every key"));
        }
        if let Some(wrong) = self.layer_types.iter().flatten().find(|kind| !matches!(kind.as_str(), "full_attention" | "sliding_attention"))
        {
            return Err(Error::format(
                "config.json",
                format!("layer_types: `{wrong}` is not known; there are full_attention, sliding_attention"),
            ));
        }
        // Where no list says otherwise, the windowed layers come last.
        let first = if self.layer_types.is_some() { 0 } else { self.num_hidden_layers.saturating_sub(1) };
        let last = self.layer_types.as_ref().map_or(self.num_hidden_layers, |types| types.len().min(self.num_hidden_layers));
        let windowed = (first..last).any(|layer| self.is_windowed(layer));
        let head_dim = self.head_dim.unwrap_or(self.hidden_size / heads);
        Ok(LmShape {
            vocab_size: self.vocab_size,
            context_length: self.rope(head_dim)?.reach(),
            hidden_size: self.hidden_size,
            num_layers: self.num_hidden_layers,
            num_heads: heads,
            num_key_value_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim,
            sliding_window: self.sliding_window.filter(|_| windowed),
        })
    }

    fn is_windowed(&self, layer: usize) -> bool {
        if self.sliding_window.is_none() {
            return false;
        }
        match (&self.layer_types, self.model_type) {
            (Some(types), _) => types.get(layer).is_some_and(|kind| kind == "sliding_attention"),
            (None, LlamaKind::Mistral) => true,
            (None, LlamaKind::Llama) => false,
            (None, LlamaKind::Qwen2 | LlamaKind::Qwen3) => self.use_sliding_window && layer >= self.max_window_layers,
        }
    }

    fn rope(&self, width: usize) -> Result<RopeConfig> {
        let given = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        let partial = given.and_then(|given| given.fields.get("partial_rotary_factor")).or(self.other.get("partial_rotary_factor"));
        if partial.is_some_and(|share| !share.is_null() && share.as_f64() != Some(1.0)) {
            return Err(Error::format("config.json", "partial_rotary_factor: heads of which only a part turns are not supported"));
        }
        let theta = given.and_then(|given| given.rope_theta).unwrap_or(self.rope_theta);
        let scaling = given.map(RopeParameters::scaling).transpose()?.unwrap_or_default();
        Ok(RopeConfig { theta, width, max_position_embeddings: self.max_position_embeddings, scaling })
    }

    fn block(&self, params: &Params, shape: LmShape, layer: usize) -> Result<Block> {
        let init = NormalInit(self.initializer_range);
        let (width, inner) = (self.hidden_size, self.intermediate_size);
        let (attn, mlp) = (params.scope("self_attn"), params.scope("mlp"));
        let bias = self.attention_bias || self.model_type == LlamaKind::Qwen2;
        let project = |name: &str, heads: usize| init.linear(&attn.scope(name), width, heads.saturating_mul(shape.head_dim), bias);
        let norm = |name: &str| RmsNorm::new(&attn.scope(name), shape.head_dim, self.rms_norm_eps);
        let projection = Projection::Separate([
            project("q_proj", shape.num_heads)?,
            project("k_proj", shape.num_key_value_heads)?,
            project("v_proj", shape.num_key_value_heads)?,
        ]);
        let attention = AttentionParts {
            projection,
            out: init.linear(&attn.scope("o_proj"), shape.num_heads.saturating_mul(shape.head_dim), width, self.attention_bias)?,
            norms: if self.model_type == LlamaKind::Qwen3 { Some([norm("q_norm")?, norm("k_norm")?]) } else { None },
            num_heads: shape.num_heads,
            num_key_value_heads: shape.num_key_value_heads,
            head_dim: shape.head_dim,
            scale: None,
            dropout: self.attention_dropout,
            windowed: self.is_windowed(layer),
        };
        Ok(Block {
            attention: Attention::new(params, attention)?,
            mlp: Mlp::Gated {
                gate: init.linear(&mlp.scope("gate_proj"), width, inner, self.mlp_bias)?,
                up: init.linear(&mlp.scope("up_proj"), width, inner, self.mlp_bias)?,
                down: init.linear(&mlp.scope("down_proj"), inner, width, self.mlp_bias)?,
                activation: activation(&self.hidden_act)?,
            },
            norms: [
                Norm::rms(&params.scope("input_layernorm"), width, self.rms_norm_eps)?,
                Norm::rms(&params.scope("post_attention_layernorm"), width, self.rms_norm_eps)?,
            ],
            dropout: Dropout::new(params, 0.0)?,
            inner_dropout: None,
            post_norm: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> LlamaConfig {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_a_file_leaves_out_depends_on_its_kind() {
        assert_eq!(read(json!({})), LlamaConfig::default());
        let mistral = read(json!({"model_type": "mistral"}));
        assert_eq!((mistral.sliding_window, mistral.num_key_value_heads), (Some(4096), Some(8)));
        assert_eq!(mistral.shape().unwrap().sliding_window, Some(4096));
        // What is null is none, and is written so.
        let full = read(json!({"model_type": "mistral", "sliding_window": null, "num_key_value_heads": null}));
        assert_eq!((full.sliding_window, full.num_key_value_heads, full.shape().unwrap().sliding_window), (None, None, None));
        assert_eq!(read(serde_json::to_value(&full).unwrap()), full);
        let [qwen2, qwen3] = ["qwen2", "qwen3"].map(|kind| read(json!({"model_type": kind, "hidden_size": 1024})));
        assert_eq!((qwen2.head_dim, qwen3.head_dim, qwen3.shape().unwrap().sliding_window), (None, Some(128), None));
        let narrow = LlamaConfig { model_type: LlamaKind::Qwen3, hidden_size: 64, num_attention_heads: 4, ..LlamaConfig::default() };
        assert_eq!(read(serde_json::to_value(&narrow).unwrap()), LlamaConfig { head_dim: Some(16), ..narrow });
        assert!(serde_json::from_value::<LlamaConfig>(json!({"model_type": "mixtral"})).is_err());
    }
}
