//! The configuration of a decoder-only model of any family, by what its folder says.

use super::{Decoder, Gpt2Config, LlamaConfig, LlamaKind, OptConfig};
use crate::nn::Params;
use crate::pretrained::{Layout, Pretrained, load_pretrained};
use kiln_tensor::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// The configuration of a decoder-only model of any family.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(untagged)]
pub enum CausalConfig {
    /// GPT-2.
    Gpt2(Gpt2Config),
    /// Llama, Mistral, Qwen2, Qwen3.
    Llama(Box<LlamaConfig>),
    /// OPT.
    Opt(OptConfig),
}

impl<'de> Deserialize<'de> for CausalConfig {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        use serde::de::Error as _;
        let value = Value::deserialize(deserializer)?;
        let kind = value.get("model_type").and_then(Value::as_str).unwrap_or_default().to_owned();
        let wrong = |e: serde_json::Error| D::Error::custom(e);
        match kind.as_str() {
            "gpt2" => serde_json::from_value(value).map(CausalConfig::Gpt2).map_err(wrong),
            "llama" | "mistral" | "qwen2" | "qwen3" => serde_json::from_value(value).map(Box::new).map(CausalConfig::Llama).map_err(wrong),
            "opt" => serde_json::from_value(value).map(CausalConfig::Opt).map_err(wrong),
            "" => Err(D::Error::custom("`model_type` is missing")),
            other => Err(D::Error::custom(format!(
                "model_type `{other}` is no decoder-only model that is known here; there are gpt2, llama, mistral, qwen2, qwen3, opt"
            ))),
        }
    }
}

impl From<Gpt2Config> for CausalConfig {
    fn from(config: Gpt2Config) -> Self {
        CausalConfig::Gpt2(config)
    }
}

impl From<LlamaConfig> for CausalConfig {
    fn from(config: LlamaConfig) -> Self {
        CausalConfig::Llama(Box::new(config))
    }
}

impl From<OptConfig> for CausalConfig {
    fn from(config: OptConfig) -> Self {
        CausalConfig::Opt(config)
    }
}

impl Pretrained for CausalConfig {
    type Model = Decoder;

    fn layout(&self) -> Layout {
        let of_model = Layout { prefix: "model.", heads: &["lm_head."], ignored: &["rotary_emb.inv_freq"], ..Layout::default() };
        let (architecture, is_tied) = match self {
            CausalConfig::Gpt2(config) => ("GPT2LMHeadModel", config.tie_word_embeddings),
            CausalConfig::Opt(config) => ("OPTForCausalLM", config.tie_word_embeddings),
            CausalConfig::Llama(config) => {
                let architecture = match config.model_type {
                    LlamaKind::Llama => "LlamaForCausalLM",
                    LlamaKind::Mistral => "MistralForCausalLM",
                    LlamaKind::Qwen2 => "Qwen2ForCausalLM",
                    LlamaKind::Qwen3 => "Qwen3ForCausalLM",
                };
                (architecture, config.tie_word_embeddings)
            }
        };
        let layout = Layout { architecture, ..of_model };
        match self {
            CausalConfig::Gpt2(_) => Layout {
                tied: if is_tied { &[("lm_head.weight", "transformer.wte.weight")] } else { &[] },
                prefix: "transformer.",
                transposed: &["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
                ignored: &["attn.bias", "attn.masked_bias"],
                ..layout
            },
            CausalConfig::Opt(_) => {
                Layout { tied: if is_tied { &[("lm_head.weight", "model.decoder.embed_tokens.weight")] } else { &[] }, ..layout }
            }
            CausalConfig::Llama(_) => {
                Layout { tied: if is_tied { &[("lm_head.weight", "model.embed_tokens.weight")] } else { &[] }, ..layout }
            }
        }
    }

    fn model_type(&self) -> &'static str {
        match self {
            CausalConfig::Gpt2(_) => "gpt2",
            CausalConfig::Opt(_) => "opt",
            CausalConfig::Llama(config) => match config.model_type {
                LlamaKind::Llama => "llama",
                LlamaKind::Mistral => "mistral",
                LlamaKind::Qwen2 => "qwen2",
                LlamaKind::Qwen3 => "qwen3",
            },
        }
    }

    fn build_model(&self, params: &Params) -> Result<Decoder> {
        match self {
            CausalConfig::Gpt2(config) => config.build(params),
            CausalConfig::Llama(config) => config.build(params),
            CausalConfig::Opt(config) => config.build(params),
        }
    }

    fn untie(&mut self, _: &str) -> Result<()> {
        match self {
            CausalConfig::Gpt2(config) => config.tie_word_embeddings = false,
            CausalConfig::Llama(config) => config.tie_word_embeddings = false,
            CausalConfig::Opt(config) => config.tie_word_embeddings = false,
        }
        Ok(())
    }
}

/// Loads the decoder-only model in `folder` (`config.json` with `model.safetensors` or its shards) into `params`, converted to its dtype.
///
/// # Errors
/// If a file is missing or malformed, the architecture is not known, or tensors are missing, unexpected or of another shape: all are listed.
pub fn load(folder: impl AsRef<Path>, params: &Params) -> Result<(CausalConfig, Decoder)> {
    load_pretrained(folder, params)
}
