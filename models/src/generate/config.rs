//! What a generation is asked for, by the names of Hugging Face's `generation_config.json`.

use kiln_tensor::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// No `generation_config.json` is larger.
const MAX_JSON: u64 = 1 << 20;

/// New tokens if nothing says how many, as in the reference implementation.
const DEFAULT_NEW_TOKENS: usize = 20;

/// Below it logits divided by the temperature leave the range of f32.
const MIN_TEMPERATURE: f32 = 1e-6;

/// More answers to a prompt at once are a mistake.
const MAX_ROWS: usize = 1 << 16;

/// Fields of the reference implementation that change what is generated and are not known here, with the numbers that switch them off; `false`
/// and empty lists do, too.
const UNKNOWN: [(&str, &[f64]); 21] = [
    ("typical_p", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("top_h", &[]),
    ("penalty_alpha", &[0.0]),
    ("guidance_scale", &[1.0]),
    ("num_beam_groups", &[1.0]),
    ("diversity_penalty", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("renormalize_logits", &[]),
    ("remove_invalid_values", &[]),
    ("force_words_ids", &[]),
    ("constraints", &[]),
    ("forced_decoder_ids", &[]),
    ("watermarking_config", &[]),
    ("dola_layers", &[]),
    ("max_time", &[]),
    ("stop_strings", &[]),
    ("token_healing", &[]),
];

/// How tokens are chosen and when a sequence ends. The default is greedy, 20 new tokens.
///
/// Names and meanings are those of transformers' `GenerationConfig`, but `top_k` is off unless given (there it is 50).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// New tokens at most. It precedes `max_length`.
    pub max_new_tokens: Option<usize>,
    /// Tokens of prompt and answer at most. In a batch each prompt counts for itself, without padding.
    pub max_length: Option<usize>,
    /// No end of sequence before so many new tokens.
    pub min_new_tokens: usize,
    /// No end of sequence before so many tokens of prompt and answer; of an encoder-decoder model, of the decoder.
    pub min_length: usize,
    /// Draws from the distribution instead of taking the most likely token.
    pub do_sample: bool,
    /// Logits are divided by it before a draw.
    pub temperature: f32,
    /// Draws among the k most likely; 0 or `None` for all.
    pub top_k: Option<usize>,
    /// Draws among the fewest tokens whose probabilities sum to at least this: Holtzman et al., *The Curious Case of Neural Text
    /// Degeneration*, 2020.
    pub top_p: Option<f32>,
    /// Draws among tokens at least this times as likely as the likeliest: Nguyen et al., *Turning Up the Heat: Min-p Sampling*, 2024.
    pub min_p: Option<f32>,
    /// Divides positive and multiplies negative logits of tokens that are there already: Keskar et al., *CTRL*, 2019. 1 is off.
    pub repetition_penalty: f32,
    /// No n tokens in a row occur twice; 0 is off.
    pub no_repeat_ngram_size: usize,
    /// Sequences that a beam search follows; 1 for none.
    pub num_beams: usize,
    /// A beam's score is its log-probability divided by its length to this power.
    pub length_penalty: f32,
    /// When a beam search ends.
    pub early_stopping: EarlyStopping,
    /// Answers to each prompt: draws, or the best beams.
    pub num_return_sequences: usize,
    /// Tokens that end a sequence.
    #[serde(deserialize_with = "one_or_several", serialize_with = "as_one_or_several")]
    pub eos_token_id: Vec<u32>,
    /// What rows that have ended are filled with; the first end token if absent.
    pub pad_token_id: Option<u32>,
    /// Start of a sequence, for who builds prompts.
    pub bos_token_id: Option<u32>,
    /// What an encoder-decoder model's decoder starts from.
    pub decoder_start_token_id: Option<u32>,
    /// The token that must follow a prompt of one token, as multilingual models choose their language.
    pub forced_bos_token_id: Option<u32>,
    /// The token in the last place that the limit of length leaves.
    #[serde(deserialize_with = "one_or_several", serialize_with = "as_one_or_several")]
    pub forced_eos_token_id: Vec<u32>,
    /// Added to the logits of tokens.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Added to the logit of a sequence's last token where the text ends with those before it.
    pub sequence_bias: Vec<(Vec<u32>, f32)>,
    /// Sequences that are never completed.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// Tokens that never occur.
    pub suppress_tokens: Vec<u32>,
    /// Tokens that do not occur first.
    pub begin_suppress_tokens: Vec<u32>,
    /// Sequences of tokens that end an answer once it ends with one; they stay in it.
    pub stop_sequences: Vec<Vec<u32>>,
    /// Of the draws. The same seed gives the same tokens, for any number of threads.
    pub seed: u64,
    /// The number of the first answer's random stream. A draw depends on the seed, this plus the answer's place, and the step, and on no
    /// other row: whoever splits prompts over several calls gets the draws of one call by counting on here.
    pub first_row: u64,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            max_length: None,
            min_new_tokens: 0,
            min_length: 0,
            do_sample: false,
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::default(),
            num_return_sequences: 1,
            eos_token_id: Vec::new(),
            pad_token_id: None,
            bos_token_id: None,
            decoder_start_token_id: None,
            forced_bos_token_id: None,
            forced_eos_token_id: Vec::new(),
            logit_bias: BTreeMap::new(),
            sequence_bias: Vec::new(),
            bad_words_ids: Vec::new(),
            suppress_tokens: Vec::new(),
            begin_suppress_tokens: Vec::new(),
            stop_sequences: Vec::new(),
            seed: 0,
            first_row: 0,
        }
    }
}

/// When a beam search ends: `false`, `true` or `"never"` in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EarlyStopping {
    /// When the best running beam, scored at its present length, is no better than the worst finished one.
    #[default]
    No,
    /// As soon as as many beams have finished as are followed.
    Yes,
    /// When no running beam can become better than the worst finished one at any length.
    Never,
}

impl Serialize for EarlyStopping {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            EarlyStopping::No => serializer.serialize_bool(false),
            EarlyStopping::Yes => serializer.serialize_bool(true),
            EarlyStopping::Never => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bool(false) => Ok(EarlyStopping::No),
            Value::Bool(true) => Ok(EarlyStopping::Yes),
            Value::String(word) if word == "never" => Ok(EarlyStopping::Never),
            other => Err(serde::de::Error::custom(format!("early_stopping is {other}; it must be true, false or \"never\""))),
        }
    }
}

/// A token or a list of them.
fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Tokens {
        One(u32),
        Several(Vec<u32>),
    }
    Ok(match Tokens::deserialize(deserializer)? {
        Tokens::One(token) => vec![token],
        Tokens::Several(tokens) => tokens,
    })
}

fn as_one_or_several<S: Serializer>(tokens: &[u32], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    match tokens {
        [token] => serializer.serialize_u32(*token),
        tokens => tokens.serialize(serializer),
    }
}

fn wrong(message: impl Into<String>) -> Error {
    Error::argument("generate", message)
}

impl GenerationConfig {
    /// Reads the text of a `generation_config.json`. What is `null` there keeps its default; what is not known and changes nothing is
    /// passed over.
    ///
    /// # Errors
    /// If it is malformed, or switches on what is not known here.
    pub fn from_json(text: &str) -> Result<Self> {
        let malformed = |e: serde_json::Error| Error::format("generation_config", e.to_string()).with_source(e);
        let Value::Object(mut fields) = serde_json::from_str(text).map_err(malformed)? else {
            return Err(Error::format("generation_config", "it must be an object of fields"));
        };
        fields.retain(|_, value| !value.is_null());
        for (name, neutral) in UNKNOWN {
            let Some(value) = fields.get(name) else { continue };
            let is_off = match value {
                Value::Bool(on) => !on,
                Value::Array(list) => list.is_empty(),
                value => value.as_f64().is_some_and(|value| neutral.contains(&value)),
            };
            if !is_off {
                return Err(Error::format("generation_config", format!("`{name}` is {value}, which is not known here; remove it")));
            }
        }
        serde_json::from_value(Value::Object(fields)).map_err(malformed)
    }

    /// Reads `generation_config.json` in the folder of a model, or the file that `path` names.
    ///
    /// # Errors
    /// If it cannot be read, and as [`from_json`](GenerationConfig::from_json).
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let path = if path.is_dir() { path.join("generation_config.json") } else { path.to_owned() };
        let failed = |e| Error::io("generation_config", path.display(), e);
        let size = std::fs::metadata(&path).map_err(failed)?.len();
        if size > MAX_JSON {
            return Err(Error::format("generation_config", format!("{} has {size} bytes, too many for a configuration", path.display())));
        }
        Self::from_json(&std::fs::read_to_string(&path).map_err(failed)?).map_err(|e| e.at(path.display().to_string()))
    }

    /// Whether everything can be done with a vocabulary of this size.
    ///
    /// # Errors
    /// Naming the field that is out of its range.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        self.validate_counts()?;
        self.validate_sampling()?;
        self.validate_tokens(vocab_size)
    }

    fn validate_counts(&self) -> Result<()> {
        for (name, count) in [("num_beams", self.num_beams), ("num_return_sequences", self.num_return_sequences)] {
            if !(1..=MAX_ROWS).contains(&count) {
                return Err(wrong(format!("{name} is {count}; it must be 1 to {MAX_ROWS}")));
            }
        }
        if self.max_new_tokens == Some(0) {
            return Err(wrong("max_new_tokens is 0; it must be 1 or more"));
        }
        if let Some(most) = self.max_new_tokens.filter(|&most| self.min_new_tokens > most) {
            return Err(wrong(format!("min_new_tokens is {}, more than max_new_tokens, which is {most}", self.min_new_tokens)));
        }
        if !self.length_penalty.is_finite() {
            return Err(wrong(format!("length_penalty is {}; it must be finite", self.length_penalty)));
        }
        if self.num_beams > 1 && self.do_sample {
            return Err(wrong("num_beams is more than 1 and do_sample is on; a beam search does not draw, so choose one"));
        }
        if self.num_return_sequences > 1 && !self.do_sample && self.num_return_sequences > self.num_beams {
            let message = format!(
                "num_return_sequences is {}, but only {} differ without do_sample; raise num_beams or draw",
                self.num_return_sequences, self.num_beams
            );
            return Err(wrong(message));
        }
        Ok(())
    }

    fn validate_sampling(&self) -> Result<()> {
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return Err(wrong(format!("repetition_penalty is {}; it must be positive", self.repetition_penalty)));
        }
        if !self.do_sample {
            return Ok(());
        }
        if !(self.temperature >= MIN_TEMPERATURE && self.temperature.is_finite()) {
            let temperature = self.temperature;
            let message =
                format!("temperature is {temperature}; to draw it must be {MIN_TEMPERATURE} or more, and greedy is do_sample = false");
            return Err(wrong(message));
        }
        if let Some(top_p) = self.top_p.filter(|top_p| !(*top_p > 0.0 && *top_p <= 1.0)) {
            return Err(wrong(format!("top_p is {top_p}; it must be above 0 and at most 1")));
        }
        if let Some(min_p) = self.min_p.filter(|min_p| !(0.0..=1.0).contains(min_p)) {
            return Err(wrong(format!("min_p is {min_p}; it must be in 0 to 1")));
        }
        Ok(())
    }

    fn validate_tokens(&self, vocab_size: usize) -> Result<()> {
        let biased: Vec<u32> = self.logit_bias.keys().copied().collect();
        let lists: [(&str, &[u32]); 9] = [
            ("eos_token_id", &self.eos_token_id),
            ("pad_token_id", self.pad_token_id.as_slice()),
            ("bos_token_id", self.bos_token_id.as_slice()),
            ("decoder_start_token_id", self.decoder_start_token_id.as_slice()),
            ("forced_bos_token_id", self.forced_bos_token_id.as_slice()),
            ("forced_eos_token_id", &self.forced_eos_token_id),
            ("suppress_tokens", &self.suppress_tokens),
            ("begin_suppress_tokens", &self.begin_suppress_tokens),
            ("logit_bias", &biased),
        ];
        let sequences = self.sequence_bias.iter().map(|(tokens, _)| ("sequence_bias", tokens));
        let sequences = sequences.chain(self.bad_words_ids.iter().map(|tokens| ("bad_words_ids", tokens)));
        let sequences: Vec<_> = sequences.chain(self.stop_sequences.iter().map(|tokens| ("stop_sequences", tokens))).collect();
        if let Some((name, _)) = sequences.iter().find(|(_, tokens)| tokens.is_empty()) {
            return Err(wrong(format!("{name} holds an empty sequence")));
        }
        let sequences = sequences.into_iter().map(|(name, tokens)| (name, &tokens[..]));
        for (name, tokens) in lists.into_iter().chain(sequences) {
            if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
                return Err(wrong(format!("{name} names token {token}, which is not in the vocabulary of {vocab_size}")));
            }
        }
        let biases = self.logit_bias.values().map(|bias| ("logit_bias", bias));
        let mut biases = biases.chain(self.sequence_bias.iter().map(|(_, bias)| ("sequence_bias", bias)));
        if let Some((name, bias)) = biases.find(|(_, bias)| bias.is_nan() || **bias == f32::INFINITY) {
            return Err(wrong(format!("{name} holds {bias}; a bias must be finite, or -∞ to exclude")));
        }
        Ok(())
    }

    /// Tokens of prompt and answer at most, for a prompt of `prompt_len` tokens in a context of `context_length`.
    ///
    /// # Errors
    /// If there is no room for a new token; `name` is what the error calls the prompt.
    pub(super) fn limit(&self, name: &str, prompt_len: usize, context_length: usize) -> Result<usize> {
        if prompt_len >= context_length {
            let message = format!("{name} has {prompt_len} tokens, and a context of {context_length} leaves no room for more; shorten it");
            return Err(wrong(message));
        }
        let limit = match (self.max_new_tokens, self.max_length) {
            (Some(new), _) => prompt_len.saturating_add(new),
            (None, Some(length)) => length,
            (None, None) => prompt_len.saturating_add(DEFAULT_NEW_TOKENS),
        };
        if limit <= prompt_len {
            return Err(wrong(format!("{name} has {prompt_len} tokens, and max_length is {limit}; raise it, or set max_new_tokens")));
        }
        Ok(limit.min(context_length))
    }

    /// What rows that have ended are filled with.
    pub(super) fn pad(&self) -> u32 {
        self.pad_token_id.or(self.eos_token_id.first().copied()).unwrap_or(0)
    }
}
