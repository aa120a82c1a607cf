//! Building a model from a folder, and saving it as one.

use super::json::{read_json, write_json};
use super::layout::{Layout, Library, Pretrained, from_file, to_file};
use super::weights::{read_weights, write_weights};
use crate::nn::{LoadMode, Params, StateDict};
use kiln_tensor::{Error, Result, Tensor};
use serde_json::{Map, Value, json};
use std::path::Path;

const CONFIG: &str = "config.json";

/// Loads the model in `folder` (`config.json` with its weights, in one safetensors file or in shards) into `params`, converted to its dtype.
/// Where the plain weights are missing, those of a variant (`model.fp16.safetensors`) are read.
///
/// # Errors
/// If a file is missing or malformed, the architecture is another one, or tensors are missing, unexpected or of another shape: all are
/// listed.
pub fn load_pretrained<C: Pretrained>(folder: impl AsRef<Path>, params: &Params) -> Result<(C, C::Model)> {
    load_pretrained_variant(folder, None, params)
}

/// As [`load_pretrained`], with the weights of one variant, such as `fp16`.
///
/// # Errors
/// As [`load_pretrained`].
pub fn load_pretrained_variant<C: Pretrained>(folder: impl AsRef<Path>, variant: Option<&str>, params: &Params) -> Result<(C, C::Model)> {
    let folder = folder.as_ref();
    let config = read_config::<C>(folder)?;
    let weights = read_weights(folder, config.layout().library, variant)?;
    build_pretrained(config, weights, params)
}

/// The model of `config` from the tensors of its file.
///
/// # Errors
/// As [`load_pretrained`].
pub(crate) fn build_pretrained<C: Pretrained>(mut config: C, weights: StateDict, params: &Params) -> Result<(C, C::Model)> {
    let state = arrange(weights, &mut config)?;
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
/// As [`load_pretrained`]; tensors of the head may be missing, and those of another one are passed over.
pub fn load_for_tuning<C: Pretrained>(folder: impl AsRef<Path>, params: &Params, adapt: impl FnOnce(&mut C)) -> Result<(C, C::Model)> {
    let folder = folder.as_ref();
    let mut config = read_config::<C>(folder)?;
    adapt(&mut config);
    let weights = read_weights(folder, config.layout().library, None)?;
    let mut state = arrange(weights, &mut config)?;
    let layout = config.layout();
    state.retain(|name, _| !layout.heads.iter().any(|head| name.starts_with(head)));
    let head = config.fresh_head(&state, params)?;
    state.extend(head);
    let (model, _) = params.build_from(state, LoadMode::Strict, |params| config.build_model(params))?;
    Ok((config, model))
}

/// The configuration in `folder`; an error names the field that is wrong.
pub(crate) fn read_config<C: Pretrained>(folder: &Path) -> Result<C> {
    let path = folder.join(CONFIG);
    let fields: Map<String, Value> = read_json(&path)?;
    let wrong = |e: String| Error::format("load", format!("{}: {e}", path.display()));
    let config: C = serde_json::from_value(fields.clone().into()).map_err(|e| wrong(name_field::<C>(&fields).unwrap_or(e.to_string())))?;
    let (key, expected) = class_of(&config);
    match fields.get(key).and_then(Value::as_str) {
        Some(kind) if kind == expected => Ok(config),
        kind => Err(wrong(format!("{key} is {kind:?}, not `{expected}`"))),
    }
}

/// The field that says what model a folder holds, and what it must say.
fn class_of(config: &impl Pretrained) -> (&'static str, &'static str) {
    match config.layout() {
        Layout { library: Library::Transformers, .. } => ("model_type", config.model_type()),
        Layout { library: Library::Diffusers, architecture, .. } => ("_class_name", architecture),
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

/// The tensors of a file as the model names and lays them. A tied name with a tensor of its own unties the model.
fn arrange(weights: StateDict, config: &mut impl Pretrained) -> Result<StateDict> {
    let layout = config.layout();
    let mut state = from_file(weights, &layout)?;
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

/// Saves a model in Hugging Face's layout, in shards of at most `max_shard_bytes` each: what `from_pretrained` of transformers or diffusers
/// reads.
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
    let (key, class) = class_of(config);
    fields.insert(key.into(), class.into());
    if layout.library == Library::Transformers {
        fields.insert("architectures".into(), json!([layout.architecture]));
        fields.insert("dtype".into(), reference_dtype(params).into());
    }
    write_json(&folder.join(CONFIG), &Value::Object(fields))?;
    write_weights(folder, &to_file(params.state_dict(), &layout)?, layout.library, max_shard_bytes)
}

fn reference_dtype(params: &Params) -> &'static str {
    match params.options().dtype {
        kiln_tensor::DType::F16 => "float16",
        kiln_tensor::DType::BF16 => "bfloat16",
        kiln_tensor::DType::F64 => "float64",
        _ => "float32",
    }
}
