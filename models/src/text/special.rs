//! The tokens that have a role: which they are, and where a model's folder says so.

use super::folder::read_object;
use kiln_tensor::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// The ids of the tokens that have a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// End a text: the tokenizer's own first, then others at which generation is to stop.
    pub eos: Vec<u32>,
    /// Fills up a batch.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary cannot express.
    pub unk: Option<u32>,
    /// Begins what a BERT reads; its state stands for the whole.
    pub cls: Option<u32>,
    /// Ends each text that a BERT reads.
    pub sep: Option<u32>,
    /// Stands for a hidden token.
    pub mask: Option<u32>,
}

impl SpecialTokens {
    /// All ids.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> {
        self.bos
            .into_iter()
            .chain(self.eos.iter().copied())
            .chain(self.pad)
            .chain(self.unk)
            .chain(self.cls)
            .chain(self.sep)
            .chain(self.mask)
    }

    /// What the files of `folder` say about the vocabulary of `inner`: `tokenizer_config.json` before `special_tokens_map.json`
    /// (tokens as text), and before `generation_config.json` (ids).
    pub(super) fn of_folder(folder: &Path, inner: &tokenizers::Tokenizer) -> Result<Self> {
        let role = |name: &str| named_id(folder, name, inner);
        // Decoders' files name these as well, and not always as the vocabulary has them.
        let optional = |name: &str| -> Result<_> { Ok(token_text(folder, name)?.and_then(|(text, _)| inner.token_to_id(&text))) };
        let ids = |key: &str| generation_ids(folder, key, inner);
        let mut eos: Vec<u32> = role("eos_token")?.into_iter().collect();
        for id in ids("eos_token_id")? {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let first = |token: Option<u32>, key: &str| -> Result<_> { Ok(token.or(ids(key)?.first().copied())) };
        Ok(Self {
            bos: first(role("bos_token")?, "bos_token_id")?,
            eos,
            pad: first(role("pad_token")?, "pad_token_id")?,
            unk: role("unk_token")?,
            cls: optional("cls_token")?,
            sep: optional("sep_token")?,
            mask: optional("mask_token")?,
        })
    }
}

/// The files that name special tokens, the one that decides first.
const NAMING: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// The text of the special token `role` (`eos_token`, …) and the file that says so.
pub(super) fn token_text(folder: &Path, role: &str) -> Result<Option<(String, &'static str)>> {
    for name in NAMING {
        let path = folder.join(name);
        let Some(object) = read_object(&path)? else { continue };
        let text = match object.get(role) {
            None | Some(Value::Null) => continue,
            Some(value) => content(value),
        };
        let wrong = || Error::format("tokenizer", format!("{}: {role}: expected a string or an object with `content`", path.display()));
        return text.map(|text| Some((text.to_owned(), name))).ok_or_else(wrong);
    }
    Ok(None)
}

/// The text of a token that is written as a string or as an object.
pub(super) fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content").and_then(Value::as_str))
}

fn named_id(folder: &Path, role: &str, inner: &tokenizers::Tokenizer) -> Result<Option<u32>> {
    let Some((text, file)) = token_text(folder, role)? else { return Ok(None) };
    let unknown = || {
        let shown: String = text.chars().take(40).collect();
        Error::format("tokenizer", format!("{}: {role}: {shown:?} is not in the vocabulary", folder.join(file).display()))
    };
    inner.token_to_id(&text).map(Some).ok_or_else(unknown)
}

/// The ids under `key` of `generation_config.json`, a number or a list of them, as far as the vocabulary has them: the model's
/// embedding may have more rows than that.
fn generation_ids(folder: &Path, key: &str, inner: &tokenizers::Tokenizer) -> Result<Vec<u32>> {
    let path = folder.join("generation_config.json");
    let object: Map<String, Value> = read_object(&path)?.unwrap_or_default();
    let values = match object.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let mut ids = Vec::new();
    for value in values {
        let id = value.as_u64().ok_or_else(|| Error::format("tokenizer", format!("{}: {key}: expected ids", path.display())))?;
        ids.extend(u32::try_from(id).ok().filter(|&id| inner.id_to_token(id).is_some()));
    }
    Ok(ids)
}
