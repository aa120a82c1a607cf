//! Tokenizers from a Hugging Face model's folder: which file is read, and how the older pair of files becomes a tokenizer.

use super::bpe::byte_level;
use super::character::CharTokenizer;
use super::special::{SpecialTokens, content, token_text};
use super::tokenizer::{Tokenizer, guard};
use kiln_tensor::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use tokenizers::models::bpe::{BpeBuilder, Merges, Vocab};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PostProcessorWrapper};

const OP: &str = "tokenizer";

/// The vocabulary of a character tokenizer.
pub(super) const CHARACTERS: &str = "characters.json";

/// What a folder with the files of another tokenizer (SentencePiece, WordPiece) needs.
const CONVERT: &str = "transformers writes a tokenizer.json: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)";

/// Classes of `tokenizer_config.json` whose `vocab.json` and `merges.txt` mean what GPT-2's do.
const GPT2_CLASSES: [&str; 2] = ["GPT2Tokenizer", "GPT2TokenizerFast"];

/// Classes whose two files are CLIP's.
const CLIP_CLASSES: [&str; 2] = ["CLIPTokenizer", "CLIPTokenizerFast"];

/// The tokenizer of `folder` with its special tokens.
pub(super) fn load(folder: &Path) -> Result<Tokenizer> {
    let json = folder.join("tokenizer.json");
    let (vocabulary, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let characters = folder.join(CHARACTERS);
    if !json.is_file() && characters.is_file() {
        return CharTokenizer::from_file(characters).map(Tokenizer::from);
    }
    let inner = match (json.is_file(), vocabulary.is_file(), merges.is_file()) {
        (true, ..) => load_json(&json)?,
        (_, true, true) => load_gpt2(folder, &vocabulary, &merges)?,
        (_, true, false) => return Err(wrong(folder, format!("merges.txt: missing beside vocab.json; {CONVERT}"))),
        (_, false, true) => return Err(wrong(folder, "vocab.json: missing beside merges.txt")),
        _ => return Err(wrong(folder, format!("there is neither tokenizer.json nor vocab.json with merges.txt; {CONVERT}"))),
    };
    let special = SpecialTokens::of_folder(folder, &inner)?;
    Ok(Tokenizer::wrap(inner, special))
}

/// A `tokenizer.json`.
pub(super) fn load_json(path: &Path) -> Result<tokenizers::Tokenizer> {
    let text = read_text(path)?;
    let loaded = guard(OP, || tokenizers::Tokenizer::from_bytes(text.as_bytes()));
    let mut inner = loaded.map_err(|e| Error::format(OP, format!("{}: {e}", path.display())))?;
    // A fixed length that a file asks for would be memory that it claims.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(|e| wrong(path, format!("truncation: {e}")))?;
    Ok(inner)
}

/// Byte-level BPE from a vocabulary and a list of merges, with the tokens that `tokenizer_config.json` and `added_tokens.json` add.
fn load_gpt2(folder: &Path, vocabulary: &Path, merges: &Path) -> Result<tokenizers::Tokenizer> {
    let config = read_object(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
    let class = config.get("tokenizer_class").and_then(Value::as_str);
    if class.is_some_and(|class| CLIP_CLASSES.contains(&class)) {
        let vocab = read_vocabulary(vocabulary)?;
        let merge_list = read_merges(merges, &vocab)?;
        let mut inner = super::clip::clip(vocab, merge_list).map_err(|e| wrong(folder, e.to_string()))?;
        add_tokens(folder, &config, &mut inner)?;
        return Ok(inner);
    }
    if let Some(class) = class.filter(|class| !GPT2_CLASSES.contains(class)) {
        let problem = format!("tokenizer_config.json: tokenizer_class: {class:?} needs a tokenizer.json, which is missing; {CONVERT}");
        return Err(wrong(folder, problem));
    }
    let flag = |key: &str| config.get(key).and_then(Value::as_bool).unwrap_or(false);
    let vocab = read_vocabulary(vocabulary)?;
    let merge_list = read_merges(merges, &vocab)?;
    let model = guard(OP, || BpeBuilder::new().vocab_and_merges(vocab, merge_list).build());
    let mut inner = byte_level(model.map_err(|e| wrong(merges, e.to_string()))?, flag("add_prefix_space"));
    add_tokens(folder, &config, &mut inner)?;
    if flag("add_bos_token") {
        let (bos, _) = token_text(folder, "bos_token")?.ok_or_else(|| wrong(folder, "tokenizer_config.json: bos_token: missing"))?;
        prepend(folder, &mut inner, &bos)?;
    }
    Ok(inner)
}

fn read_vocabulary(path: &Path) -> Result<Vocab> {
    let object = read_object(path)?.ok_or_else(|| wrong(path, "missing"))?;
    if object.is_empty() {
        return Err(wrong(path, "the vocabulary is empty"));
    }
    let entry = |(token, id): (String, Value)| match id.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok((token, id)),
        None => Err(wrong(path, format!("{:?}: expected an id, found {}", shorten(&token), shorten(&id.to_string())))),
    };
    object.into_iter().map(entry).collect()
}

/// A pair a line, separated by a space; a line `#version: …` at the start is none.
fn read_merges(path: &Path, vocab: &Vocab) -> Result<Merges> {
    let text = read_text(path)?;
    let mut merges = Merges::new();
    for (i, line) in text.lines().enumerate() {
        if line.starts_with("#version") || line.is_empty() {
            continue;
        }
        let place = |problem: String| wrong(path, format!("line {}: {problem}", i + 1));
        let pair = line.split_once(' ').filter(|(a, b)| !a.is_empty() && !b.is_empty() && !b.contains(' '));
        let (a, b) = pair.ok_or_else(|| place(format!("found {:?}, expected two tokens with a space between them", shorten(line))))?;
        if let Some(missing) = [a, b, &format!("{a}{b}")].into_iter().find(|token| !vocab.contains_key(*token)) {
            return Err(place(format!("{:?} is not in the vocabulary", shorten(missing))));
        }
        merges.push((a.to_owned(), b.to_owned()));
    }
    Ok(merges)
}

/// Adds the tokens of `added_tokens.json` and of `added_tokens_decoder`, each at the id that is claimed for it, and marks the special ones.
fn add_tokens(folder: &Path, config: &Map<String, Value>, inner: &mut tokenizers::Tokenizer) -> Result<()> {
    let mut added: Vec<(u64, AddedToken)> = Vec::new();
    for (token, id) in read_object(&folder.join("added_tokens.json"))?.unwrap_or_default() {
        let id = id.as_u64().ok_or_else(|| wrong(folder, format!("added_tokens.json: {:?}: expected an id", shorten(&token))))?;
        added.push((id, AddedToken::from(token, false)));
    }
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let problem = || wrong(folder, format!("tokenizer_config.json: added_tokens_decoder: {:?}", shorten(id)));
        let claimed = id.parse().map_err(|_| problem())?;
        let token = serde_json::from_value(token.clone()).map_err(|_| problem())?;
        added.push((claimed, token));
    }
    added.sort_by_key(|(id, _)| *id);
    for (id, token) in added {
        let text = token.content.clone();
        let _ = inner.add_tokens([token]).map_err(|e| wrong(folder, e.to_string()))?;
        let got = inner.token_to_id(&text);
        if got.map(u64::from) != Some(id) {
            return Err(wrong(folder, format!("added token {:?}: its id would be {got:?}, not {id}", shorten(&text))));
        }
    }
    for role in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        if let Some((text, _)) = token_text(folder, role)?.filter(|(text, _)| inner.token_to_id(text).is_some()) {
            let _ = inner.add_special_tokens([AddedToken::from(text, true)]).map_err(|e| wrong(folder, e.to_string()))?;
        }
    }
    for token in config.get("additional_special_tokens").and_then(Value::as_array).into_iter().flatten() {
        if let Some(text) = content(token).filter(|text| inner.token_to_id(text).is_some()) {
            let _ = inner.add_special_tokens([AddedToken::from(text, true)]).map_err(|e| wrong(folder, e.to_string()))?;
        }
    }
    Ok(())
}

/// Has `bos` put before each text.
fn prepend(folder: &Path, inner: &mut tokenizers::Tokenizer, bos: &str) -> Result<()> {
    let id = inner.token_to_id(bos);
    let id = id.ok_or_else(|| wrong(folder, format!("tokenizer_config.json: bos_token: {:?} is not in the vocabulary", shorten(bos))))?;
    let mut template = TemplateProcessing::builder();
    let template = template.try_single(format!("{bos}:0 $A:0")).and_then(|t| t.try_pair(format!("{bos}:0 $A:0 {bos}:1 $B:1")));
    let template = template.map_err(|e| wrong(folder, format!("tokenizer_config.json: bos_token: {e}")))?;
    let template = template.special_tokens(vec![(bos.to_owned(), id)]).build();
    let template = template.map_err(|e| wrong(folder, format!("tokenizer_config.json: bos_token: {e}")))?;
    inner.with_post_processor(Some(PostProcessorWrapper::Template(template)));
    Ok(())
}

/// The text of a file.
pub(super) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(OP, path.display(), e))?;
    String::from_utf8(bytes).map_err(|e| wrong(path, format!("not UTF-8 from byte {} on", e.utf8_error().valid_up_to())))
}

/// The object in a JSON file; `None` if there is no such file.
pub(super) fn read_object(path: &Path) -> Result<Option<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    serde_json::from_str(&read_text(path)?).map(Some).map_err(|e| wrong(path, e.to_string()))
}

fn wrong(path: &Path, problem: impl AsRef<str>) -> Error {
    Error::format(OP, format!("{}: {}", path.display(), problem.as_ref()))
}

/// Enough of a text to recognise it by.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_other_tokenizers_are_told_how_to_get_a_tokenizer_json() {
        let folder = std::env::temp_dir().join(format!("kiln-other-tokenizers-{}", std::process::id()));
        for files in [&["tokenizer.model"][..], &["vocab.json", "sentencepiece.bpe.model"], &["vocab.txt"]] {
            std::fs::create_dir_all(&folder).unwrap();
            files.iter().for_each(|file| std::fs::write(folder.join(file), "{}").unwrap());
            let error = load(&folder).err().unwrap().to_string();
            std::fs::remove_dir_all(&folder).unwrap();
            assert!(error.contains("AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"), "{files:?}: {error}");
        }
    }
}
