//! A tokenizer whose tokens are words, for captions of a small language.

use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

/// One token for each word of a vocabulary, after three special ones: padding, the end and the start of a text. Case and punctuation do
/// not count.
///
/// Saved as JSON: `{"type": "words", "vocabulary": ["a", …]}`.
///
/// ```
/// let tokenizer = kiln_models::text::WordTokenizer::new("a red seven on the left".split(' '))?;
/// let ids = tokenizer.encode_padded("A seven, on the left.", 8)?;
/// assert_eq!(ids, [2, 3, 7, 5, 8, 4, 1, 0]);
/// assert_eq!(tokenizer.decode(&ids)?, "a seven on the left");
/// assert!(tokenizer.encode("a green seven").is_err());
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordTokenizer {
    /// Strictly increasing.
    words: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct File {
    r#type: String,
    vocabulary: Vec<String>,
}

/// The value of the key `type` in the file.
const TYPE: &str = "words";
/// Tokens before the first word.
const SPECIAL: usize = 3;

impl WordTokenizer {
    /// The token of padding.
    pub const PAD: u32 = 0;
    /// The token that ends a text.
    pub const EOS: u32 = 1;
    /// The token that starts a text.
    pub const BOS: u32 = 2;

    /// A vocabulary of these words, in alphabetical order.
    ///
    /// # Errors
    /// If there are none.
    pub fn new<S: AsRef<str>>(words: impl IntoIterator<Item = S>) -> Result<Self> {
        let words: BTreeSet<String> = words.into_iter().flat_map(|text| split(text.as_ref()).collect::<Vec<_>>()).collect();
        if words.is_empty() {
            return Err(Error::argument("word_tokenizer", "no words make no vocabulary"));
        }
        Ok(Self { words: words.into_iter().collect() })
    }

    /// Loads what [`save`](WordTokenizer::save) wrote.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a file, or its vocabulary is empty or not strictly in order.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |problem: String| Error::format("word_tokenizer", format!("{}: {problem}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| Error::io("word_tokenizer", path.display(), e))?;
        let file: File = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        if file.r#type != TYPE {
            return Err(wrong(format!("type: found {:?}, expected {TYPE:?}", file.r#type.chars().take(40).collect::<String>())));
        }
        let is_word = |word: &String| split(word).eq([word.clone()]);
        if file.vocabulary.is_empty() || !file.vocabulary.is_sorted_by(|a, b| a < b) || !file.vocabulary.iter().all(is_word) {
            return Err(wrong("vocabulary: there must be words in lower case, in alphabetical order, each once".to_owned()));
        }
        Ok(Self { words: file.vocabulary })
    }

    /// Writes the vocabulary as JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = File { r#type: TYPE.to_owned(), vocabulary: self.words.clone() };
        let text = serde_json::to_string(&file).map_err(|e| Error::format("word_tokenizer", e.to_string()))?;
        write_atomic(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("word_tokenizer", path.display(), e)))
    }

    /// Tokens in the vocabulary, the special ones with them.
    pub fn vocab_size(&self) -> usize {
        self.words.len() + SPECIAL
    }

    /// The ids of the words of `text`, without start and end.
    ///
    /// # Errors
    /// If a word is not in the vocabulary; the words that are there are listed.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let id = |word: String| match self.words.binary_search(&word) {
            Ok(place) => Ok((place + SPECIAL) as u32),
            Err(_) => Err(Error::argument("word_tokenizer", format!("{word:?} is none of the known words: {}", self.words.join(" ")))),
        };
        split(text).map(id).collect()
    }

    /// The ids of `text` between start and end, padded to `length`.
    ///
    /// # Errors
    /// If a word is not in the vocabulary, or the text is longer.
    pub fn encode_padded(&self, text: &str, length: usize) -> Result<Vec<u32>> {
        let mut ids = vec![Self::BOS];
        ids.extend(self.encode(text)?);
        ids.push(Self::EOS);
        if ids.len() > length {
            let message = format!("{text:?} has {} tokens with its start and end, more than {length}", ids.len());
            return Err(Error::argument("word_tokenizer", message));
        }
        ids.resize(length, Self::PAD);
        Ok(ids)
    }

    /// The words of `ids`; special tokens have none.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let word = |id: u32| {
            let unknown = || Error::index("word_tokenizer", format!("id {id} is not in the vocabulary of {}", self.vocab_size()));
            self.words.get(id as usize - SPECIAL).map(String::as_str).ok_or_else(unknown)
        };
        let words = ids.iter().filter(|&&id| id as usize >= SPECIAL).map(|&id| word(id));
        Ok(words.collect::<Result<Vec<_>>>()?.join(" "))
    }
}

/// The words of a text in lower case.
fn split(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_comes_back_and_a_broken_one_does_not() -> Result<()> {
        let path = std::env::temp_dir().join(format!("kiln-words-{}.json", std::process::id()));
        let tokenizer = WordTokenizer::new(["a red seven", "Red"])?;
        tokenizer.save(&path)?;
        assert_eq!(WordTokenizer::from_file(&path)?, tokenizer);
        assert_eq!(tokenizer.vocab_size(), 6);
        assert!(tokenizer.encode_padded("a red seven", 4).is_err() && tokenizer.decode(&[6]).is_err());
        for text in [
            "",
            "{}",
            r#"{"type":"words","vocabulary":[]}"#,
            r#"{"type":"words","vocabulary":["b","a"]}"#,
            r#"{"type":"words","vocabulary":["a b"]}"#,
            r#"{"type":"characters","vocabulary":["a"]}"#,
        ] {
            std::fs::write(&path, text).unwrap();
            assert!(WordTokenizer::from_file(&path).is_err(), "{text}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(WordTokenizer::new(["", " - "]).is_err() && WordTokenizer::from_file(&path).is_err());
        Ok(())
    }
}
