//! The one tokenizer type: text to token ids and back, whatever file the vocabulary came from.

use super::character::CharTokenizer;
use super::folder;
use super::gguf;
use super::special::SpecialTokens;
use super::stream::StreamDecoder;
use crate::gguf::Gguf;
use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result};
use std::fmt;
use std::io::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{DecoderWrapper, Model, PostProcessorWrapper};

/// Text to token ids and back.
///
/// ```
/// use kiln_models::text::{CharTokenizer, Tokenizer};
/// let tokenizer = Tokenizer::from(CharTokenizer::new("hello")?);
/// assert_eq!(tokenizer.encode("hole")?, [1, 3, 2, 0]);
/// assert_eq!(tokenizer.decode(&[1, 0, 2, 2, 3], false)?, "hello");
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    special: SpecialTokens,
}

#[derive(Clone)]
enum Kind {
    HuggingFace(Box<tokenizers::Tokenizer>),
    Characters(CharTokenizer),
}

impl Tokenizer {
    /// Loads the tokenizer of a Hugging Face model's folder: `tokenizer.json`, else `characters.json` (of a
    /// [`CharTokenizer`]), else `vocab.json` + `merges.txt` (byte-level BPE as GPT-2's).
    /// Special tokens come from `tokenizer_config.json`, `special_tokens_map.json` and `generation_config.json`, as far as they are there.
    ///
    /// Padding and truncation that the file asks for are left out: batches are made elsewhere.
    ///
    /// # Errors
    /// If neither is there, or a file cannot be read, is not what it should be, or names a special token that the vocabulary lacks.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        folder::load(folder.as_ref())
    }

    /// Loads a `tokenizer.json`, without special tokens.
    ///
    /// # Errors
    /// If the file cannot be read or is not a tokenizer.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        folder::load_json(path.as_ref()).map(|inner| Self::wrap(inner, SpecialTokens::default()))
    }

    /// The tokenizer that a GGUF file holds (`tokenizer.ggml.*`): byte-level BPE (`gpt2`, with the rules of GPT-2, SmolLM, Llama 3 or Qwen2) or
    /// the pieces of SentencePiece (`llama`), with special tokens, and with what is put around a text.
    ///
    /// ```no_run
    /// # use kiln_models::{gguf::Gguf, text::{ChatTemplate, Tokenizer}};
    /// # fn main() -> kiln_tensor::Result<()> {
    /// let file = Gguf::open("model.gguf")?;
    /// let tokenizer = Tokenizer::from_gguf(&file)?;
    /// let template = ChatTemplate::from_gguf(&file, &tokenizer)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the file holds none, or one of another kind or rule, or what it says does not fit together; the message names the key.
    pub fn from_gguf(file: &Gguf) -> Result<Self> {
        gguf::load(file)
    }

    pub(super) fn wrap(inner: tokenizers::Tokenizer, special: SpecialTokens) -> Self {
        Self { kind: Kind::HuggingFace(Box::new(inner)), special }
    }

    /// Writes `tokenizer.json`, which [`from_file`](Tokenizer::from_file) and the Python package `tokenizers` load; a character
    /// tokenizer is written in [its own form](CharTokenizer::save).
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        match &self.kind {
            Kind::HuggingFace(inner) => {
                let text = inner.to_string(true).map_err(|e| Error::format("tokenizer", e.to_string()))?;
                write_atomic(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("tokenizer", path.display(), e)))
            }
            Kind::Characters(inner) => inner.save(path),
        }
    }

    /// Writes what [`from_folder`](Tokenizer::from_folder) loads: `tokenizer.json` and, with the special tokens, `tokenizer_config.json`;
    /// `characters.json` for a character tokenizer.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save_to_folder(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        if let Kind::Characters(inner) = &self.kind {
            return inner.save(folder.join(folder::CHARACTERS));
        }
        self.save(folder.join("tokenizer.json"))?;
        let special = &self.special;
        let mut roles = serde_json::Map::from_iter([("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into())]);
        let eos = special.eos.first().copied();
        let named = [("bos_token", special.bos), ("eos_token", eos), ("pad_token", special.pad), ("unk_token", special.unk)];
        let named = named.into_iter().chain([("cls_token", special.cls), ("sep_token", special.sep), ("mask_token", special.mask)]);
        for (role, id) in named {
            if let Some(token) = id.and_then(|id| self.id_to_token(id)) {
                roles.insert(role.to_owned(), token.into());
            }
        }
        let path = folder.join("tokenizer_config.json");
        let text = serde_json::to_string_pretty(&roles).map_err(|e| Error::format("tokenizer", e.to_string()))?;
        write_atomic(&path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("tokenizer", path.display(), e)))
    }

    /// The same tokenizer with other special tokens.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn with_special_tokens(mut self, special: SpecialTokens) -> Result<Self> {
        for id in special.ids() {
            self.token(id)?;
        }
        self.special = special;
        Ok(self)
    }

    /// The same tokenizer with [`encode_with_specials`](Tokenizer::encode_with_specials) putting its tokens `cls` before a text and `sep`
    /// behind it, and `sep` behind a second one, as BERT reads them: `[CLS] first [SEP] second [SEP]`.
    ///
    /// # Errors
    /// If a token has not been named in [`SpecialTokens`], or the tokenizer is one of characters.
    pub fn with_bert_ends(mut self) -> Result<Self> {
        let name = |id: Option<u32>, role: &str| -> Result<(String, u32)> {
            let unnamed = || Error::argument("with_bert_ends", format!("there is no {role}; name it by with_special_tokens"));
            let id = id.ok_or_else(unnamed)?;
            Ok((self.token(id)?, id))
        };
        let (cls, sep) = (name(self.special.cls, "cls")?, name(self.special.sep, "sep")?);
        let Kind::HuggingFace(inner) = &mut self.kind else {
            return Err(Error::argument("with_bert_ends", "a tokenizer of characters puts nothing around a text"));
        };
        inner.with_post_processor(Some(PostProcessorWrapper::Bert(BertProcessing::new(sep, cls))));
        Ok(self)
    }

    /// The ids of `text`. Special tokens that are spelled out in it (`<|endoftext|>`) become their ids; none is added.
    ///
    /// # Errors
    /// If a character tokenizer does not know a character, or the vocabulary's model cannot express the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, false)
    }

    /// As [`encode`](Tokenizer::encode), with the special tokens that the tokenizer's file puts around a text (`[CLS]` … `[SEP]`, `<s>` …).
    ///
    /// # Errors
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_with_specials(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, true)
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        match &self.kind {
            Kind::HuggingFace(inner) => guard("encode", || inner.encode_fast(text, add_special_tokens)).map(|e| e.get_ids().to_vec()),
            Kind::Characters(inner) => inner.encode(text),
        }
    }

    /// The ids of two texts as one input, with the special tokens around and between them, and the number (0 or 1) of the text
    /// that each token belongs to: what BERT calls token types.
    ///
    /// # Errors
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_pair(&self, first: &str, second: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        match &self.kind {
            Kind::HuggingFace(inner) => {
                guard("encode", || inner.encode_fast((first, second), true)).map(|e| (e.get_ids().to_vec(), e.get_type_ids().to_vec()))
            }
            Kind::Characters(inner) => {
                let (mut ids, more) = (inner.encode(first)?, inner.encode(second)?);
                let types = [vec![0; ids.len()], vec![1; more.len()]].concat();
                ids.extend(more);
                Ok((ids, types))
            }
        }
    }

    /// As [`encode_with_specials`](Tokenizer::encode_with_specials), of at most `max_length` tokens, and whether some are missing: those
    /// before the last one, which stays, as it is the special token that ends the text.
    ///
    /// # Errors
    /// As [`encode`](Tokenizer::encode), or if `max_length` is 0.
    pub fn encode_truncated(&self, text: &str, max_length: usize) -> Result<(Vec<u32>, bool)> {
        let mut ids = self.encode_with_specials(text)?;
        let is_longer = ids.len() > max_length;
        if is_longer {
            let problem = || Error::argument("encode_truncated", "no text fits 0 tokens");
            let kept = max_length.checked_sub(1).ok_or_else(problem)?;
            ids.drain(kept..ids.len() - 1);
        }
        Ok((ids, is_longer))
    }

    /// As [`encode`](Tokenizer::encode), with the characters of `text` (counted, not bytes) that each token covers. Tokens that
    /// share the bytes of one character all cover it.
    ///
    /// # Errors
    /// As [`encode`](Tokenizer::encode).
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        match &self.kind {
            Kind::HuggingFace(inner) => {
                let encoding = guard("encode", || inner.encode_char_offsets(text, false))?;
                Ok(encoding.get_ids().iter().zip(encoding.get_offsets()).map(|(&id, &(start, end))| (id, start..end)).collect())
            }
            Kind::Characters(inner) => Ok(inner.encode(text)?.into_iter().enumerate().map(|(i, id)| (id, i..i + 1)).collect()),
        }
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD. With `skip_special` special tokens are left out.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match &self.kind {
            Kind::HuggingFace(inner) => {
                for &id in ids {
                    self.token(id)?;
                }
                guard("decode", || inner.decode(ids, skip_special))
            }
            Kind::Characters(inner) => inner.decode(ids),
        }
    }

    /// A decoder that takes ids one by one.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder<'_> {
        StreamDecoder::new(self, skip_special)
    }

    /// Entries of the vocabulary, added tokens included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::HuggingFace(inner) => inner.get_vocab_size(true),
            Kind::Characters(inner) => inner.vocab_size(),
        }
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.kind {
            Kind::HuggingFace(inner) => inner.token_to_id(token),
            Kind::Characters(inner) => inner.token_to_id(token),
        }
    }

    /// The token of an id as the vocabulary spells it (byte-level vocabularies write a space as `Ġ`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        match &self.kind {
            Kind::HuggingFace(inner) => inner.id_to_token(id),
            Kind::Characters(inner) => inner.id_to_token(id).map(String::from),
        }
    }

    /// The token of an id, or an error that names it.
    fn token(&self, id: u32) -> Result<String> {
        let unknown = || Error::index("tokenizer", format!("id {id} is not in the vocabulary of {} entries", self.vocab_size()));
        self.id_to_token(id).ok_or_else(unknown)
    }

    /// The special tokens.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The id that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The id that ends a text; [`SpecialTokens::eos`] has all of them.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos.first().copied()
    }

    /// The id that fills up a batch.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad
    }

    /// Whether a text's bytes are its tokens' bytes, one after the other: then [`token_bytes`](Tokenizer::token_bytes) decodes.
    pub(super) fn concatenates_bytes(&self) -> bool {
        match &self.kind {
            Kind::HuggingFace(inner) => matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))),
            Kind::Characters(_) => true,
        }
    }

    /// The bytes that a token contributes, if [`concatenates_bytes`](Tokenizer::concatenates_bytes).
    pub(super) fn token_bytes(&self, id: u32, skip_special: bool) -> Result<Vec<u8>> {
        let inner = match &self.kind {
            Kind::HuggingFace(inner) => inner,
            Kind::Characters(_) => return self.token(id).map(String::into_bytes),
        };
        let added = inner.get_added_vocabulary();
        let token = added.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id)).map_or_else(|| self.token(id), Ok)?;
        if skip_special && added.is_special_token(&token) {
            return Ok(Vec::new());
        }
        // A token with a character outside the alphabet of bytes stands for itself, as in the decoder of `tokenizers`.
        Ok(token.chars().map(byte_of).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.into_bytes()))
    }
}

impl fmt::Debug for Tokenizer {
    /// Its size and special tokens: a vocabulary is long.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("special", &self.special).finish_non_exhaustive()
    }
}

impl From<CharTokenizer> for Tokenizer {
    /// Without special tokens.
    fn from(characters: CharTokenizer) -> Self {
        Self { kind: Kind::Characters(characters), special: SpecialTokens::default() }
    }
}

/// The byte that a character of a byte-level vocabulary stands for. GPT-2 writes the printable bytes of Latin-1 as themselves and
/// the 68 others, in their order, as the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let printable = |c: u32| matches!(c, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u32::from(c) {
        code @ ..=0xff => printable(code).then_some(code as u8),
        code => (0..=255u8).filter(|&byte| !printable(byte.into())).nth((code - 0x100) as usize),
    }
}

/// Runs code of the `tokenizers` crate, whose panics on odd vocabularies become errors.
pub(super) fn guard<T>(op: &str, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(problem)) => Err(Error::format(op, problem.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
            Err(Error::format(op, format!("the vocabulary is inconsistent: {}", text.unwrap_or_default())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_alphabet_of_bytes_is_a_bijection_onto_that_of_the_crate() {
        let alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
        let mut bytes: Vec<u8> = alphabet.iter().map(|&c| byte_of(c).unwrap()).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        let unknown: Vec<char> = (0..0x400).filter_map(char::from_u32).filter(|c| !alphabet.contains(c)).collect();
        assert!(unknown.iter().all(|&c| byte_of(c).is_none()));
    }

    #[test]
    fn texts_get_berts_ends_and_keep_them_in_a_folder() -> Result<()> {
        let plain = crate::text::train_bpe(["low lower lowest"], 300, &["[PAD]", "[CLS]", "[SEP]", "[MASK]"])?;
        let [cls, sep, mask] = ["[CLS]", "[SEP]", "[MASK]"].map(|token| plain.token_to_id(token));
        assert!(plain.clone().with_bert_ends().is_err());
        let special = SpecialTokens { pad: Some(0), cls, sep, mask, ..SpecialTokens::default() };
        let tokenizer = plain.clone().with_special_tokens(special.clone())?.with_bert_ends()?;
        let words = |text: &str| plain.encode(text);
        let whole = [vec![1], words("lower")?, vec![2]].concat();
        assert_eq!((tokenizer.encode_with_specials("lower")?, tokenizer.encode("lower")?), (whole.clone(), words("lower")?));
        let (pair, types) = tokenizer.encode_pair("low", "lowest")?;
        assert_eq!(pair, [vec![1], words("low")?, vec![2], words("lowest")?, vec![2]].concat());
        assert_eq!(types.iter().filter(|kind| **kind == 1).count(), words("lowest")?.len() + 1);

        assert_eq!(tokenizer.encode_truncated("lower", whole.len())?, (whole, false));
        let long = tokenizer.encode_with_specials("low low low low")?;
        assert_eq!(tokenizer.encode_truncated("low low low low", 3)?, (vec![1, long[1], 2], true));
        assert_eq!(tokenizer.encode_truncated("low low low low", 1)?, (vec![2], true));
        assert!(tokenizer.encode_truncated("low", 0).is_err());

        let folder = std::env::temp_dir().join(format!("kiln-bert-ends-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        tokenizer.save_to_folder(&folder)?;
        let loaded = Tokenizer::from_folder(&folder)?;
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!((loaded.special_tokens(), loaded.encode_pair("low", "lowest")?), (&special, (pair, types)));
        Ok(())
    }

    #[test]
    fn panics_become_errors() {
        let error = guard::<()>("encode", || panic!("no {}", 3)).unwrap_err().to_string();
        assert_eq!(error, "encode: the vocabulary is inconsistent: no 3");
    }
}
