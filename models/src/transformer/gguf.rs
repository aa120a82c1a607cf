//! Decoder-only models from GGUF files: the configuration that their metadata amounts to, and their weights under the names of Hugging Face.

use super::{CausalConfig, Decoder, Gpt2Config, LlamaConfig, Pretrained, RopeParameters};
use crate::gguf::{Gguf, RowOrder, counterpart};
use crate::nn::{LoadMode, Params, StateDict};
use kiln_tensor::{DType, Error, QuantizedMatrix, Result, Tensor};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Divisors of the rotary frequencies, which are no weights.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Tables that rows are looked up in, which are no layers' weights.
const TABLES: [&str; 2] = ["token_embd.weight", "position_embd.weight"];

/// The output's matrix; a file without it uses the table of tokens.
const HEAD: &str = "output.weight";

/// Factors of the rotary positions that are not read, each with the one value that leaves them as they are.
const SCALING_DEFAULTS: [(&str, f64); 4] = [
    ("rope.scaling.attn_factor", 1.0),
    ("rope.scaling.yarn_attn_factor", 1.0),
    ("rope.scaling.yarn_beta_fast", 32.0),
    ("rope.scaling.yarn_beta_slow", 1.0),
];

/// Loads the Llama or GPT-2 in the GGUF file at `path` into `params`. Quantised weights of [`Linear`](crate::nn::Linear) layers stay as they
/// are stored, as does a table of tokens where it gives the logits; all else is converted to the dtype of `params`.
///
/// # Errors
/// If the file is malformed, its architecture is not known here, a tensor is of a type that is not read, or tensors are missing, unexpected
/// or of another shape: all are listed.
pub fn load_gguf(path: impl AsRef<Path>, params: &Params) -> Result<(CausalConfig, Decoder)> {
    let file = Gguf::open(path)?;
    let config = gguf_config(&file)?;
    let (model, _) = params.build_from(weights(&file, &config)?, LoadMode::Strict, |params| config.build_model(params))?;
    if !file.has_tensor(HEAD)
        && let Some(matrix) = file.quantized(TABLES[0])?
    {
        model.set_quantized_head(Some(matrix))?;
    }
    Ok((config, model))
}

/// The configuration of the model in a GGUF file.
///
/// # Errors
/// If its architecture is not `llama` or `gpt2`, a key is missing or not what it should be, or it asks for what is not supported here.
pub fn gguf_config(file: &Gguf) -> Result<CausalConfig> {
    let architecture = file.get_str("general.architecture")?;
    let keys = Keys { file, architecture };
    match architecture {
        "llama" => keys.llama().map(CausalConfig::from),
        "gpt2" => keys.gpt2().map(CausalConfig::from),
        other => Err(Error::format("gguf", format!("the architecture {other:?} is not known here; there are llama and gpt2"))),
    }
}

/// The keys of one architecture.
struct Keys<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn find_extent(&self, key: &str) -> Result<Option<usize>> {
        let Some(extent) = self.file.find_u64(&self.name(key))? else { return Ok(None) };
        let too_large = |_| Error::format("gguf", format!("the key {:?} claims {extent}", self.name(key)));
        usize::try_from(extent).map(Some).map_err(too_large)
    }

    fn extent(&self, key: &str) -> Result<usize> {
        self.find_extent(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> Error {
        Error::format("gguf", format!("the key {:?} is missing", self.name(key)))
    }

    fn number(&self, key: &str) -> Result<f64> {
        self.file.get_f64(&self.name(key))
    }

    /// Rows of the table of tokens.
    fn vocab_size(&self) -> Result<usize> {
        let name = TABLES[0];
        let shape = self.file.info(name)?.shape;
        match *shape.dims() {
            [entries, _] => Ok(entries),
            _ => Err(Error::format("gguf", format!("the tensor {name:?} is {shape}, expected two dimensions"))),
        }
    }

    fn gpt2(&self) -> Result<Gpt2Config> {
        Ok(Gpt2Config {
            vocab_size: self.vocab_size()?,
            n_positions: self.extent("context_length")?,
            n_embd: self.extent("embedding_length")?,
            n_layer: self.extent("block_count")?,
            n_head: self.extent("attention.head_count")?,
            n_inner: self.find_extent("feed_forward_length")?,
            layer_norm_epsilon: self.number("attention.layer_norm_epsilon")?,
            tie_word_embeddings: !self.file.has_tensor(HEAD),
            ..Gpt2Config::default()
        })
    }

    fn llama(&self) -> Result<LlamaConfig> {
        let (width, heads) = (self.extent("embedding_length")?, self.extent("attention.head_count")?);
        let head_dim = self.find_extent("attention.key_length")?;
        let turned = self.find_extent("rope.dimension_count")?;
        let full = head_dim.or(width.checked_div(heads));
        if turned.is_some() && turned != full {
            let message =
                format!("the key {:?} turns {turned:?} elements of heads of {full:?}; only all are", self.name("rope.dimension_count"));
            return Err(Error::format("gguf", message));
        }
        Ok(LlamaConfig {
            vocab_size: self.vocab_size()?,
            hidden_size: width,
            intermediate_size: self.extent("feed_forward_length")?,
            num_hidden_layers: self.extent("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: self.find_extent("attention.head_count_kv")?,
            head_dim,
            max_position_embeddings: self.extent("context_length")?,
            rms_norm_eps: self.number("attention.layer_norm_rms_epsilon")?,
            rope_theta: self.file.find_f64(&self.name("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_parameters: self.rope_parameters()?,
            attention_bias: self.file.has_tensor("blk.0.attn_q.bias"),
            mlp_bias: self.file.has_tensor("blk.0.ffn_up.bias"),
            tie_word_embeddings: !self.file.has_tensor(HEAD),
            ..LlamaConfig::default()
        })
    }

    /// By how much the rotary positions are stretched, if they are: llama.cpp takes 0 for no factor, too, and knows an older key.
    fn rope_factor(&self) -> Result<Option<f64>> {
        let factor = match self.file.find_f64(&self.name("rope.scaling.factor"))? {
            None => self.file.find_f64(&self.name("rope.scale_linear"))?,
            factor => factor,
        };
        Ok(factor.filter(|factor| *factor != 0.0))
    }

    /// The scaling of the rotary positions, if there is one: of a factor without a type, the linear one, as llama.cpp has it.
    fn rope_parameters(&self) -> Result<Option<RopeParameters>> {
        for (key, default) in SCALING_DEFAULTS {
            if let Some(number) = self.file.find_f64(&self.name(key))?.filter(|number| *number != default) {
                return Err(Error::format("gguf", format!("the key {:?} is {number}; only {default} is supported", self.name(key))));
            }
        }
        let key = self.name("rope.scaling.type");
        let stretch = self.rope_factor()?;
        let kind = self.file.find_str(&key)?.unwrap_or(if stretch.is_some() { "linear" } else { "none" });
        let factor = || stretch.ok_or_else(|| self.missing("rope.scaling.factor"));
        let fields = if self.file.has_tensor(ROPE_FACTORS) {
            // llama.cpp keeps what Llama 3.1's formula gives, a divisor for each frequency.
            let factors = self.file.tensor(ROPE_FACTORS)?.to_dtype(DType::F64)?.to_vec::<f64>()?;
            json!({"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0})
        } else {
            match kind {
                "none" => return Ok(None),
                "linear" => json!({"rope_type": "linear", "factor": factor()?}),
                "yarn" => {
                    let mut fields = json!({"rope_type": "yarn", "factor": factor()?});
                    if let Some(original) = self.find_extent("rope.scaling.original_context_length")? {
                        fields["original_max_position_embeddings"] = original.into();
                    }
                    fields
                }
                other => return Err(Error::format("gguf", format!("the key {key:?} is {other:?}; none, linear and yarn are supported"))),
            }
        };
        let fields: Map<String, Value> = match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        Ok(Some(RopeParameters { rope_theta: None, old_type: None, fields }))
    }
}

/// Every weight of the file, as the model names and lays them.
fn weights(file: &Gguf, config: &CausalConfig) -> Result<StateDict> {
    let (architecture, heads, key_heads) = match config {
        CausalConfig::Llama(config) => {
            ("llama", config.num_attention_heads, config.num_key_value_heads.unwrap_or(config.num_attention_heads))
        }
        _ => ("gpt2", 1, 1),
    };
    let mut state = StateDict::new();
    for name in file.tensor_names().iter().filter(|name| *name != ROPE_FACTORS) {
        let unknown = || Error::format("gguf", format!("the tensor {name:?} belongs to no {architecture} model that is known here"));
        let counterpart = counterpart(architecture, name).ok_or_else(unknown)?;
        let heads = match counterpart.rows {
            RowOrder::Same => None,
            RowOrder::QueryPairs => Some(heads),
            RowOrder::KeyPairs => Some(key_heads),
        };
        let of_layer = !TABLES.contains(&name.as_str()) && file.info(name)?.shape.rank() == 2;
        let tensor = match file.quantized(name)?.filter(|_| of_layer) {
            Some(matrix) => restored_matrix(name, matrix, heads)?.to_tensor()?,
            None => restored(name, file.tensor(name)?, heads)?,
        };
        state.insert(counterpart.name, tensor);
    }
    Ok(state)
}

/// Which row of the file is row i of Hugging Face's matrix.
fn order(name: &str, rows: usize, heads: usize) -> Result<Vec<usize>> {
    let misfit = || Error::format("gguf", format!("the {rows} rows of the tensor {name:?} are no {heads} heads of pairs"));
    RowOrder::undo(rows, heads).ok_or_else(misfit)
}

/// The rows in the order of Hugging Face, if they are in that of `heads` heads.
fn restored(name: &str, tensor: Tensor, heads: Option<usize>) -> Result<Tensor> {
    let (Some(heads), Some(&rows)) = (heads, tensor.dims().first()) else { return Ok(tensor) };
    let order = order(name, rows, heads)?.into_iter().map(|row| row as i64).collect();
    tensor.index_select(0, &Tensor::from_vec(order, [rows])?.to_device(tensor.device())?)
}

/// As [`restored`], of a quantised matrix.
fn restored_matrix(name: &str, matrix: QuantizedMatrix, heads: Option<usize>) -> Result<QuantizedMatrix> {
    match heads {
        Some(heads) => matrix.select_rows(&order(name, matrix.shape()[0], heads)?),
        None => Ok(matrix),
    }
}
