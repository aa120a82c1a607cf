//! The configuration of an adapter, and its form in `adapter_config.json`.

use kiln_tensor::{Error, Result};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use std::fmt;
use std::marker::PhantomData;

/// Which layers, by their names in the model.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Modules {
    /// A regular expression that the whole name must match, or `all-linear`: every [`Linear`](crate::nn::Linear) but the model's output
    /// head (`lm_head`, `embed_out`, `cls.predictions.decoder`, `score`, `classifier`).
    Pattern(String),
    /// Names: the whole one or its last parts (`q_proj` is any `….q_proj`), or with `*` for any text.
    Names(Vec<String>),
}

impl<const N: usize> From<[&str; N]> for Modules {
    fn from(names: [&str; N]) -> Self {
        Modules::Names(names.map(str::to_owned).to_vec())
    }
}

impl From<&str> for Modules {
    fn from(pattern: &str) -> Self {
        Modules::Pattern(pattern.to_owned())
    }
}

/// Which biases of the base model are trained along. While the adapter is off they have their old values.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// Every parameter called `bias`.
    All,
    /// Those of the adapted layers.
    LoraOnly,
}

/// How the two matrices start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum LoraInit {
    /// A uniform in ±1/√inputs, B zero: the adapted model starts as the base model.
    #[default]
    KaimingUniform,
    /// A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// Both uniform, in ±1/√inputs and ±1/√r: for tests, as the model then starts as another one.
    Random,
}

impl TryFrom<Value> for LoraInit {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match &value {
            Value::Bool(true) => Ok(LoraInit::KaimingUniform),
            Value::Bool(false) => Ok(LoraInit::Random),
            Value::String(name) if name.eq_ignore_ascii_case("gaussian") => Ok(LoraInit::Gaussian),
            // The others change the base weights; such an adapter means nothing on the original ones.
            _ => Err(format!("init_lora_weights {value} is not supported: true, false or \"gaussian\"")),
        }
    }
}

impl From<LoraInit> for Value {
    fn from(init: LoraInit) -> Value {
        match init {
            LoraInit::KaimingUniform => Value::Bool(true),
            LoraInit::Gaussian => Value::String("gaussian".to_owned()),
            LoraInit::Random => Value::Bool(false),
        }
    }
}

/// What an adapter is. Field names, meanings and defaults are those of `peft.LoraConfig`.
///
/// ```
/// # use kiln_models::lora::LoraConfig;
/// let config = LoraConfig { r: 16, lora_alpha: 32.0, target_modules: ["q_proj", "v_proj"].into(), ..LoraConfig::default() };
/// assert_eq!(config.scale("model.layers.0.self_attn.q_proj").unwrap(), 2.0);
/// ```
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// Rank of the update: extent between the two matrices.
    pub r: usize,
    /// α: the update is multiplied by α/r, or by α/√r with [`use_rslora`](Self::use_rslora).
    pub lora_alpha: f64,
    /// Probability with which, in training, an input of the update is dropped.
    pub lora_dropout: f64,
    /// Rank-stabilised scale α/√r (Kalajdzievski 2023).
    pub use_rslora: bool,
    /// Learn magnitudes apart from directions (DoRA, Liu et al. 2024).
    pub use_dora: bool,
    /// The layers to adapt.
    pub target_modules: Modules,
    /// Layers not to adapt although they are targets.
    pub exclude_modules: Option<Modules>,
    /// Other ranks for some layers: the first regular expression that matches the end of the name, from a dot on, decides.
    #[serde(with = "ordered")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Other α for some layers, in the same way.
    #[serde(with = "ordered")]
    pub alpha_pattern: Vec<(String, f64)>,
    /// Biases that are trained along.
    pub bias: Bias,
    /// Modules trained in full and saved with the adapter: those whose names end so. A language model's table of tokens is none of them
    /// where it is the output's matrix, too: `peft` would train the table alone.
    pub modules_to_save: Option<Vec<String>>,
    /// Whether the checkpoint's matrices are (inputs, outputs). Kept for other readers of the file: here all are (outputs, inputs).
    pub fan_in_fan_out: bool,
    /// How the matrices start.
    pub init_lora_weights: LoraInit,
    /// The task, as the file names it, e.g. `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Name or path of the model that the adapter belongs to.
    pub base_model_name_or_path: Option<String>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            target_modules: Modules::Names(Vec::new()),
            exclude_modules: None,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            bias: Bias::None,
            modules_to_save: None,
            fan_in_fan_out: false,
            init_lora_weights: LoraInit::default(),
            task_type: None,
            base_model_name_or_path: None,
        }
    }
}

/// What a file must say.
const NEEDED: [&str; 4] = ["peft_type", "r", "lora_alpha", "target_modules"];

/// Fields that change what an adapter computes in ways that are not implemented: they must be unset.
const UNSUPPORTED: [&str; 15] = [
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

impl LoraConfig {
    /// The configuration in `adapter_config.json`. Unknown fields are passed over.
    ///
    /// # Errors
    /// If it is no JSON object, a needed field is missing or wrong, or it asks for a variant that is not implemented.
    pub fn from_json(text: &str) -> Result<Self> {
        let wrong = |message: String| Error::format("lora", format!("adapter_config.json: {message}"));
        let value: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
        let Some(fields) = value.as_object() else { return Err(wrong("a JSON object is expected".to_owned())) };
        if let Some(field) = NEEDED.iter().find(|field| fields.get(**field).is_none_or(Value::is_null)) {
            return Err(wrong(format!("the field `{field}` is missing")));
        }
        if fields.get("peft_type").and_then(Value::as_str) != Some("LORA") {
            return Err(wrong(format!("peft_type {} is not supported, only \"LORA\"", fields["peft_type"])));
        }
        if let Some(field) = UNSUPPORTED.iter().find(|field| fields.get(**field).is_some_and(is_set)) {
            return Err(wrong(format!("`{field}` {} is not supported", fields[*field])));
        }
        let config = Self::deserialize(&value).map_err(|e| wrong(e.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// The text of `adapter_config.json`, which `peft` reads.
    pub fn to_json(&self) -> Result<String> {
        let wrong = |e: serde_json::Error| Error::format("lora", format!("adapter_config.json: {e}"));
        let mut value = serde_json::to_value(self).map_err(wrong)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("peft_type".to_owned(), "LORA".into());
            fields.insert("inference_mode".to_owned(), true.into());
        }
        serde_json::to_string_pretty(&value).map_err(wrong)
    }

    /// An error unless every number is one that makes sense.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("lora", message));
        let ranks = self.rank_pattern.iter().map(|(key, r)| (key.as_str(), *r));
        if let Some((key, _)) = ranks.chain([("r", self.r)]).find(|(_, r)| *r == 0) {
            return wrong(format!("`{key}`: a rank is at least 1"));
        }
        let alphas = self.alpha_pattern.iter().map(|(key, alpha)| (key.as_str(), *alpha));
        if let Some((key, alpha)) = alphas.chain([("lora_alpha", self.lora_alpha)]).find(|(_, alpha)| !alpha.is_finite()) {
            return wrong(format!("`{key}`: {alpha} is no scale"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong(format!("lora_dropout {} does not lie in [0, 1)", self.lora_dropout));
        }
        Ok(())
    }
}

/// Whether a field of the file holds something else than nothing.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    }
}

/// JSON objects whose order counts.
mod ordered {
    use super::*;

    pub fn serialize<T: Serialize, S: Serializer>(pairs: &[(String, T)], serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(pairs.len()))?;
        for (key, value) in pairs {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<(String, T)>, D::Error> {
        struct Pairs<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from patterns to numbers")
            }

            fn visit_unit<E>(self) -> std::result::Result<Self::Value, E> {
                Ok(Vec::new())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }

        deserializer.deserialize_any(Pairs(PhantomData))
    }
}
