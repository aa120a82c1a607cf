//! Folders of Hugging Face's layout: `config.json` and weights in one safetensors file or in shards, read and written.

use super::{Decoder, Gpt2Config, LlamaConfig, LlamaKind, OptConfig};
use crate::nn::{LoadMode, Params, StateDict};
use kiln_tensor::io::safetensors::{self, SafetensorsFile};
use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, ErrorKind, Result, Tensor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// No `config.json` or index is larger.
const MAX_JSON: u64 = 64 << 20;

/// How the tensors of an architecture lie in a file.
#[derive(Clone, Copy, Default)]
pub struct Layout {
    /// The class that `architectures` names.
    pub architecture: &'static str,
    /// What names start with that a file of the bare model (without head) lacks, with its dot.
    pub prefix: &'static str,
    /// Scopes of the head, which that does not concern, with their dots.
    pub heads: &'static [&'static str],
    /// Ends of the names of matrices that lie there as (inputs, outputs).
    pub transposed: &'static [&'static str],
    /// Ends of names that hold no weights.
    pub ignored: &'static [&'static str],
    /// Names that repeat other tensors, with the names of those.
    pub tied: &'static [(&'static str, &'static str)],
}

/// A configuration that knows its model and how the file names it.
pub trait Pretrained: Serialize + DeserializeOwned {
    /// The model.
    type Model;

    /// The layout of its weights.
    fn layout(&self) -> Layout;

    /// `model_type` of the configuration.
    fn model_type(&self) -> &'static str;

    /// The model, of the weights of `params`.
    ///
    /// # Errors
    /// If the extents do not fit each other, or the weights do not fit them.
    fn build_model(&self, params: &Params) -> Result<Self::Model>;

    /// Told that a file holds a tensor `name` that is not the one it is [tied](Layout::tied) to: the model gets one of its own, as the
    /// reference gives it. It is an error where a model cannot.
    ///
    /// # Errors
    /// If the model has no tensor of its own there.
    fn untie(&mut self, name: &str) -> Result<()> {
        cannot_untie(name)
    }

    /// The first weights of the head, for a file of the model with another or without, whose tensors are `body`: see [`load_for_tuning`].
    ///
    /// # Errors
    /// If the configuration does not fit the file.
    fn fresh_head(&self, body: &StateDict, params: &Params) -> Result<StateDict> {
        let _ = (body, params);
        Ok(StateDict::new())
    }
}

pub(super) fn cannot_untie(name: &str) -> Result<()> {
    Err(Error::format("load", format!("`{name}` differs from the tensor that it should repeat, and the model has no other")))
}

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

/// As [`load`], for any configuration.
///
/// # Errors
/// As [`load`].
pub fn load_pretrained<C: Pretrained>(folder: impl AsRef<Path>, params: &Params) -> Result<(C, C::Model)> {
    let folder = folder.as_ref();
    let mut config = read_config::<C>(folder)?;
    let state = read_state(folder, &mut config)?;
    let (model, _) = params.build_from(state, LoadMode::Strict, |params| config.build_model(params))?;
    Ok((config, model))
}

/// As [`load_pretrained`], of a folder whose model has another head or none: this one's starts fresh. `adapt` changes the configuration
/// first, for instance the number of classes.
///
/// ```no_run
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::{BertConfig, SequenceClassifier, load_for_tuning};
/// # fn main() -> kiln_tensor::Result<()> {
/// let name_classes = |config: &mut SequenceClassifier<BertConfig>| config.0.set_labels(["bad", "good"]);
/// let (config, model) = load_for_tuning("bert-base-uncased", &Params::new(), name_classes)?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// As [`load`]; tensors of the head may be missing, and those of another one are passed over.
pub fn load_for_tuning<C: Pretrained>(folder: impl AsRef<Path>, params: &Params, adapt: impl FnOnce(&mut C)) -> Result<(C, C::Model)> {
    let folder = folder.as_ref();
    let mut config = read_config::<C>(folder)?;
    adapt(&mut config);
    let mut state = read_state(folder, &mut config)?;
    let layout = config.layout();
    state.retain(|name, _| !layout.heads.iter().any(|head| name.starts_with(head)));
    let head = config.fresh_head(&state, params)?;
    state.extend(head);
    let (model, _) = params.build_from(state, LoadMode::Strict, |params| config.build_model(params))?;
    Ok((config, model))
}

/// The configuration in `folder`; an error names the field that is wrong.
fn read_config<C: Pretrained>(folder: &Path) -> Result<C> {
    let path = folder.join(CONFIG);
    let fields: Map<String, Value> = read_json(&path)?;
    let wrong = |e: String| Error::format("load", format!("{}: {e}", path.display()));
    let config: C = serde_json::from_value(fields.clone().into()).map_err(|e| wrong(name_field::<C>(&fields).unwrap_or(e.to_string())))?;
    match fields.get("model_type").and_then(Value::as_str) {
        Some(kind) if kind == config.model_type() => Ok(config),
        kind => Err(wrong(format!("model_type is {kind:?}, not `{}`", config.model_type()))),
    }
}

/// What is wrong with the first field that is.
fn name_field<C: Pretrained>(fields: &Map<String, Value>) -> Option<String> {
    let kind = fields.get_key_value("model_type").map(|(key, kind)| (key.clone(), kind.clone()));
    fields.iter().find_map(|(key, value)| {
        let alone: Map<String, Value> = kind.clone().into_iter().chain([(key.clone(), value.clone())]).collect();
        serde_json::from_value::<C>(alone.into()).err().map(|e| if key == "model_type" { e.to_string() } else { format!("`{key}`: {e}") })
    })
}

/// The tensors of `folder` as the model names and lays them. A tied name with a tensor of its own unties the model.
fn read_state(folder: &Path, config: &mut impl Pretrained) -> Result<StateDict> {
    let layout = config.layout();
    let mut state = from_file(read_weights(folder)?, &layout)?;
    for &(name, repeated) in layout.tied {
        let Some(tensor) = state.remove(name) else { continue };
        match state.get(repeated) {
            Some(other) if is_same(&tensor, other)? => {}
            Some(_) => {
                config.untie(name)?;
                state.insert(name.to_owned(), tensor);
            }
            None => {
                state.insert(repeated.to_owned(), tensor);
            }
        }
    }
    Ok(state)
}

fn is_same(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok(a.shape() == b.shape() && a.dtype() == b.dtype() && a.eq(b)?.all(())?.to_vec::<bool>()? == [true])
}

/// Saves a model in Hugging Face's layout, in shards of at most `max_shard_bytes` each: what `from_pretrained` of transformers reads.
///
/// # Errors
/// If a file cannot be written.
pub fn save_pretrained<C: Pretrained>(folder: impl AsRef<Path>, config: &C, params: &Params, max_shard_bytes: u64) -> Result<()> {
    if let Some(layer) = params.linears().iter().find(|layer| layer.quantized().is_some()) {
        let hint = "which this layout has no place for; `dequantize_linears` first";
        return Err(Error::argument("save", format!("the weight of `{}` is quantised, {hint}", layer.name())));
    }
    let folder = folder.as_ref();
    std::fs::create_dir_all(folder).map_err(|e| Error::io("save", folder.display(), e))?;
    let layout = config.layout();
    let value = serde_json::to_value(config).map_err(|e| Error::format("save", format!("config.json: {e}")))?;
    let mut fields = match value {
        Value::Object(fields) => fields,
        _ => return Err(Error::format("save", "the configuration is no object")),
    };
    fields.insert("architectures".into(), json!([layout.architecture]));
    fields.insert("model_type".into(), config.model_type().into());
    fields.insert("dtype".into(), reference_dtype(params).into());
    write_json(&folder.join(CONFIG), &Value::Object(fields))?;
    write_weights(folder, &to_file(params.state_dict(), &layout)?, max_shard_bytes)
}

fn reference_dtype(params: &Params) -> &'static str {
    match params.options().dtype {
        kiln_tensor::DType::F16 => "float16",
        kiln_tensor::DType::BF16 => "bfloat16",
        kiln_tensor::DType::F64 => "float64",
        _ => "float32",
    }
}

/// Reads a JSON file of bounded size.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let size = std::fs::metadata(path).map_err(|e| Error::io("load", path.display(), e))?.len();
    if size > MAX_JSON {
        return Err(Error::format("load", format!("{} has {size} bytes, too many for a description", path.display())));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io("load", path.display(), e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format("load", format!("{}: {e}", path.display())).with_source(e))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::format("save", format!("{}: {e}", path.display())))?;
    text.push('\n');
    write_atomic(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("save", path.display(), e)))
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Every tensor of the folder, by the names of its files.
fn read_weights(folder: &Path) -> Result<StateDict> {
    let single = folder.join(WEIGHTS);
    if single.exists() {
        return safetensors::load(single);
    }
    let index = folder.join(INDEX);
    if !index.exists() {
        let message = format!("{} holds neither {WEIGHTS} nor {INDEX}; other formats must be converted to safetensors", folder.display());
        return Err(Error::new(ErrorKind::Io, "load", message));
    }
    let Index { weight_map } = read_json(&index)?;
    let mut state = StateDict::new();
    for shard in weight_map.values().collect::<BTreeSet<_>>() {
        if shard.is_empty() || shard.contains(['/', '\\', ':']) || shard.starts_with('.') {
            return Err(Error::format("load", format!("{}: `{shard}` is no name of a file beside it", index.display())));
        }
        let file = SafetensorsFile::open(folder.join(shard))?;
        for name in file.names().into_iter().filter(|name| weight_map.get(name) == Some(shard)) {
            state.insert(name.clone(), file.tensor(&name)?);
        }
    }
    if let Some((name, shard)) = weight_map.iter().find(|(name, _)| !state.contains_key(*name)) {
        return Err(Error::format("load", format!("{}: `{name}` is not in {shard}", index.display())));
    }
    Ok(state)
}

fn write_weights(folder: &Path, state: &StateDict, max_shard_bytes: u64) -> Result<()> {
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let shards = into_shards(state, max_shard_bytes);
    if let [all] = &shards[..] {
        let tensors = all.iter().map(|&name| (name, &state[name]));
        return safetensors::save(folder.join(WEIGHTS), tensors, &metadata);
    }
    let mut weight_map = Map::new();
    for (i, names) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        safetensors::save(folder.join(&file), names.iter().map(|&name| (name, &state[name])), &metadata)?;
        weight_map.extend(names.iter().map(|&name| (name.to_owned(), Value::from(file.as_str()))));
    }
    let total: usize = state.values().map(|tensor| tensor.numel() * tensor.dtype().size()).sum();
    write_json(&folder.join(INDEX), &json!({"metadata": {"total_size": total}, "weight_map": weight_map}))?;
    // A single file of an earlier save would be read instead.
    match std::fs::remove_file(folder.join(WEIGHTS)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("save", folder.join(WEIGHTS).display(), e)),
        _ => Ok(()),
    }
}

/// The names in order, cut where a shard is full.
fn into_shards(state: &StateDict, max_bytes: u64) -> Vec<Vec<&str>> {
    let (mut shards, mut filled) = (vec![Vec::new()], 0);
    for (name, tensor) in state {
        let bytes = (tensor.numel() * tensor.dtype().size()) as u64;
        if filled > 0 && filled + bytes > max_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(name.as_str());
        }
    }
    shards
}

/// Whether one of `ends` ends `name`, in whole components: `attn.bias` ends `h.0.attn.bias`, but not `h.0.attn.c_attn.bias`.
fn ends_with(name: &str, ends: &[&str]) -> bool {
    ends.iter().any(|end| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

/// A file's tensors as the model names and lays them.
fn from_file(state: StateDict, layout: &Layout) -> Result<StateDict> {
    let is_bare = !state.keys().any(|name| name.starts_with(layout.prefix));
    let mut out = StateDict::new();
    for (name, tensor) in state {
        let belongs_to_head = layout.heads.iter().any(|head| name.starts_with(head));
        let mut name = if is_bare && !belongs_to_head { format!("{}{name}", layout.prefix) } else { name };
        for (old, new) in [(".gamma", ".weight"), (".beta", ".bias")] {
            // Norms of the first TensorFlow conversions.
            if let Some(stem) = name.strip_suffix(old) {
                name = format!("{stem}{new}");
            }
        }
        if ends_with(&name, layout.ignored) {
            continue;
        }
        let is_transposed = tensor.rank() == 2 && ends_with(&name, layout.transposed);
        out.insert(name, if is_transposed { tensor.t()? } else { tensor });
    }
    Ok(out)
}

/// The inverse of [`from_file`].
fn to_file(state: StateDict, layout: &Layout) -> Result<StateDict> {
    let lay = |(name, tensor): (String, Tensor)| {
        let is_transposed = tensor.rank() == 2 && ends_with(&name, layout.transposed);
        let tensor = if is_transposed { tensor.t()?.contiguous()? } else { tensor };
        Ok((name, tensor))
    };
    state.into_iter().map(lay).collect()
}
