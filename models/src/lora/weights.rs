//! Files of low-rank updates as they are exchanged for Stable Diffusion: kohya's, those of `diffusers` old and new, and `peft`'s.

use super::config::LoraConfig;
use crate::nn::StateDict;
use kiln_tensor::io::safetensors::{self, SafetensorsFile};
use kiln_tensor::{DType, Error, Result, Tensor};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// The part of a pipeline that an update belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum LoraPart {
    /// The U-Net.
    Unet,
    /// The text encoder, or the first of two.
    TextEncoder,
    /// The second text encoder.
    TextEncoder2,
}

impl LoraPart {
    const ALL: [LoraPart; 3] = [LoraPart::Unet, LoraPart::TextEncoder, LoraPart::TextEncoder2];

    /// Its scope in a file, e.g. `text_encoder_2`.
    pub fn name(self) -> &'static str {
        match self {
            LoraPart::Unet => "unet",
            LoraPart::TextEncoder => "text_encoder",
            LoraPart::TextEncoder2 => "text_encoder_2",
        }
    }
}

impl fmt::Display for LoraPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a file names a module.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum ModuleName {
    Dotted(String),
    /// kohya's: dots are underscores, so it can only be compared.
    Flat(String),
}

impl ModuleName {
    pub fn text(&self) -> &str {
        match self {
            ModuleName::Dotted(name) | ModuleName::Flat(name) => name,
        }
    }
}

/// ΔW = scale · up · down of one module.
#[derive(Clone)]
pub(super) struct Update {
    pub part: LoraPart,
    pub module: ModuleName,
    /// (r, inputs) or (r, inputs, kh, kw).
    pub down: Tensor,
    /// (outputs, r) or (outputs, r, 1, 1).
    pub up: Tensor,
    pub scale: f64,
}

/// The low-rank updates of a file, for one or several parts of a pipeline.
#[derive(Clone)]
pub struct LoraWeights {
    pub(super) updates: Vec<Update>,
}

/// What a tensor is to its update.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Down,
    Up,
    Alpha,
}

const ENDS: [(&str, Role); 13] = [
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    (".lora_A.default.weight", Role::Down),
    (".lora_B.default.weight", Role::Up),
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".alpha", Role::Alpha),
];

const KOHYA: [(&str, LoraPart); 4] = [
    ("lora_unet_", LoraPart::Unet),
    ("lora_te_", LoraPart::TextEncoder),
    ("lora_te1_", LoraPart::TextEncoder),
    ("lora_te2_", LoraPart::TextEncoder2),
];

/// What is being gathered of an update.
#[derive(Default)]
struct Pieces {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<f64>,
}

impl LoraWeights {
    /// Reads a safetensors file; or a folder: `peft`'s (`adapter_config.json`), whose adapter is taken for the U-Net's, or one with
    /// `pytorch_lora_weights.safetensors`.
    ///
    /// # Errors
    /// If a file is missing or malformed, or holds something else than low-rank updates (such as LoHa, LoKr, or DoRA's magnitudes).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            return Self::load_file(path);
        }
        let config = path.join("adapter_config.json");
        if !config.exists() {
            return Self::load_file(&path.join(FILE));
        }
        let text = std::fs::read_to_string(&config).map_err(|e| Error::io("lora", config.display(), e))?;
        let config = LoraConfig::from_json(&text)?;
        let state = safetensors::load(path.join("adapter_model.safetensors"))?;
        Self::gather(state, |_, module| config.scale(module).map(Some))
    }

    fn load_file(path: &Path) -> Result<Self> {
        let metadata = SafetensorsFile::open(path)?.metadata();
        let wrong = |e: Error| Error::format("lora", format!("{}: {e}", path.display())).with_source(e);
        Self::from_state_dict(safetensors::load(path)?, &metadata).map_err(wrong)
    }

    /// The updates in the tensors and metadata of a file.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_state_dict(state: StateDict, metadata: &BTreeMap<String, String>) -> Result<Self> {
        let configs = described(metadata)?;
        Self::gather(state, |part, module| configs.get(&part).map(|config| config.scale(module)).transpose())
    }

    /// `scale` is asked where a file has no α beside the matrices; nothing means 1.
    fn gather(state: StateDict, scale: impl Fn(LoraPart, &str) -> Result<Option<f64>>) -> Result<Self> {
        let mut gathered: BTreeMap<(LoraPart, ModuleName), Pieces> = BTreeMap::new();
        for (key, tensor) in state {
            let (part, module, role) = read_key(&key)?;
            let pieces = gathered.entry((part, module)).or_default();
            let was_there = match role {
                Role::Down => pieces.down.replace(tensor).is_some(),
                Role::Up => pieces.up.replace(tensor).is_some(),
                Role::Alpha => pieces.alpha.replace(number(&key, &tensor)?).is_some(),
            };
            if was_there {
                return Err(Error::format("lora", format!("`{key}` repeats a tensor of the same module under another name")));
            }
        }
        let mut updates = Vec::new();
        for ((part, module), pieces) in gathered {
            let Pieces { down: Some(down), up: Some(up), alpha } = pieces else {
                return Err(Error::format("lora", format!("one of the two matrices of `{}` in {part} is missing", module.text())));
            };
            let rank = expect_pair(&module, &down, &up)? as f64;
            let scale = match alpha {
                Some(alpha) => alpha / rank,
                None => scale(part, module.text())?.unwrap_or(1.0),
            };
            updates.push(Update { part, module, down, up, scale });
        }
        if updates.is_empty() {
            return Err(Error::format("lora", "there is no low-rank update"));
        }
        Ok(Self { updates })
    }

    /// The parts of a pipeline that the file has updates of.
    pub fn parts(&self) -> Vec<LoraPart> {
        LoraPart::ALL.into_iter().filter(|part| self.updates.iter().any(|update| update.part == *part)).collect()
    }

    /// Number of modules with an update.
    pub fn len(&self) -> usize {
        self.updates.len()
    }

    /// Whether there is no update; never of a file.
    pub fn is_empty(&self) -> bool {
        self.updates.is_empty()
    }
}

/// The file that `diffusers` looks for in a folder.
const FILE: &str = "pytorch_lora_weights.safetensors";

/// The α of a module.
fn number(key: &str, tensor: &Tensor) -> Result<f64> {
    match tensor.to_dtype(DType::F64)?.to_vec::<f64>()?[..] {
        [alpha] if alpha.is_finite() => Ok(alpha),
        _ => Err(Error::format("lora", format!("`{key}` {} is no number", tensor.shape()))),
    }
}

/// The rank that both matrices share.
fn expect_pair(module: &ModuleName, down: &Tensor, up: &Tensor) -> Result<usize> {
    let is_kernel = |t: &Tensor| matches!(t.rank(), 2 | 4) && t.dtype().is_float();
    match (down.dims(), up.dims()) {
        ([rank, ..], [_, other, ..]) if is_kernel(down) && is_kernel(up) && rank == other && *rank > 0 => Ok(*rank),
        (a, b) => Err(Error::shape("lora", format!("`{}`: {a:?} and {b:?} are no two matrices of one rank", module.text()))),
    }
}

/// What a name in a file says.
fn read_key(key: &str) -> Result<(LoraPart, ModuleName, Role)> {
    let unknown = || {
        let hint = "only low-rank updates are read (not LoHa, LoKr, or the magnitudes of DoRA)";
        Error::format("lora", format!("`{key}` is the name of no matrix of an update; {hint}"))
    };
    let (stem, end, role) = ENDS.iter().find_map(|(end, role)| Some((key.strip_suffix(end)?, *end, *role))).ok_or_else(unknown)?;
    if let Some((part, name)) = KOHYA.iter().find_map(|(start, part)| Some((*part, stem.strip_prefix(start)?))) {
        return Ok((part, ModuleName::Flat(name.to_owned()), role));
    }
    let stem = stem.strip_prefix("base_model.model.").unwrap_or(stem);
    let scoped = LoraPart::ALL.into_iter().find_map(|part| Some((part, stem.strip_prefix(part.name())?.strip_prefix('.')?)));
    let (part, name) = scoped.unwrap_or((if stem.starts_with("text_model.") { LoraPart::TextEncoder } else { LoraPart::Unet }, stem));
    let mut name = name.replace(".processor.", ".");
    if end.starts_with('_') {
        name = name_attention(&name, part);
    }
    Ok((part, ModuleName::Dotted(name), role))
}

/// Old files call the layers of attention after the processor's: `to_out`, also those of text encoders.
fn name_attention(name: &str, part: LoraPart) -> String {
    let Some((module, layer)) = name.rsplit_once('.') else { return name.to_owned() };
    let is_unet = part == LoraPart::Unet;
    let layer = match layer {
        "to_out" if is_unet => "to_out.0",
        "to_q" if !is_unet => "q_proj",
        "to_k" if !is_unet => "k_proj",
        "to_v" if !is_unet => "v_proj",
        "to_out" => "out_proj",
        other => other,
    };
    format!("{module}.{layer}")
}

/// The adapters' configurations that newer files of `diffusers` carry, with names such as `unet.lora_alpha`.
fn described(metadata: &BTreeMap<String, String>) -> Result<BTreeMap<LoraPart, LoraConfig>> {
    let Some(text) = metadata.get("lora_adapter_metadata") else { return Ok(BTreeMap::new()) };
    let wrong = |e: serde_json::Error| Error::format("lora", format!("lora_adapter_metadata: {e}"));
    let fields: Map<String, Value> = serde_json::from_str(text).map_err(wrong)?;
    let mut configs = BTreeMap::new();
    for part in LoraPart::ALL {
        let own = |key: &str| key.strip_prefix(part.name())?.strip_prefix('.').map(str::to_owned);
        let own: Map<String, Value> = fields.iter().filter_map(|(key, value)| Some((own(key)?, value.clone()))).collect();
        if own.contains_key("r") && own.contains_key("lora_alpha") {
            let kept = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"];
            let own: Map<String, Value> = own.into_iter().filter(|(key, _)| kept.contains(&key.as_str())).collect();
            let config: LoraConfig = serde_json::from_value(own.into()).map_err(wrong)?;
            config.check()?;
            configs.insert(part, config);
        }
    }
    Ok(configs)
}
