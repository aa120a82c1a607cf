//! A tokenizer whose tokens are characters, for small models and examples.

use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

/// One token for each character (Unicode scalar value) of a text, numbered in the order of their code points.
///
/// Saved as JSON: `{"type": "characters", "vocabulary": "\n !…"}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CharTokenizer {
    /// Strictly increasing: a character's id is its place.
    characters: Vec<char>,
}

#[derive(Serialize, Deserialize)]
struct File {
    r#type: String,
    vocabulary: String,
}

/// The value of the key `type` in the file.
const TYPE: &str = "characters";

impl CharTokenizer {
    /// The vocabulary of `text`.
    ///
    /// # Errors
    /// If the text is empty.
    pub fn new(text: &str) -> Result<Self> {
        let characters: BTreeSet<char> = text.chars().collect();
        if characters.is_empty() {
            return Err(Error::argument("char_tokenizer", "an empty text has no vocabulary"));
        }
        Ok(Self { characters: characters.into_iter().collect() })
    }

    /// Loads what [`save`](CharTokenizer::save) wrote.
    ///
    /// # Errors
    /// If the file cannot be read, is not such a file, or its vocabulary is empty or not strictly in order.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let wrong = |problem: String| Error::format("char_tokenizer", format!("{}: {problem}", path.display()));
        let bytes = std::fs::read(path).map_err(|e| Error::io("char_tokenizer", path.display(), e))?;
        let file: File = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        if file.r#type != TYPE {
            return Err(wrong(format!("type: found {:?}, expected {TYPE:?}", file.r#type.chars().take(40).collect::<String>())));
        }
        let characters: Vec<char> = file.vocabulary.chars().collect();
        if characters.is_empty() || !characters.is_sorted_by(|a, b| a < b) {
            return Err(wrong("vocabulary: its characters must be there, in the order of their code points, each once".to_owned()));
        }
        Ok(Self { characters })
    }

    /// Writes the vocabulary as JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = File { r#type: TYPE.to_owned(), vocabulary: self.characters.iter().collect() };
        let text = serde_json::to_string(&file).map_err(|e| Error::format("char_tokenizer", e.to_string()))?;
        write_atomic(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("char_tokenizer", path.display(), e)))
    }

    /// The ids of the characters of `text`.
    ///
    /// # Errors
    /// If a character is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let id = |(place, c): (usize, char)| {
            let problem = || format!("character {c:?} at place {place} is not among the {} of the vocabulary", self.characters.len());
            self.id(c).ok_or_else(|| Error::argument("char_tokenizer", problem()))
        };
        text.chars().enumerate().map(id).collect()
    }

    /// The text of `ids`.
    ///
    /// # Errors
    /// If an id is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        let unknown = |id| Error::index("char_tokenizer", format!("id {id} is not in the vocabulary of {}", self.characters.len()));
        ids.iter().map(|&id| self.id_to_token(id).ok_or_else(|| unknown(id))).collect()
    }

    /// Characters in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.characters.len()
    }

    /// The id of a text that is one known character.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let mut characters = token.chars();
        let first = characters.next()?;
        if characters.next().is_some() { None } else { self.id(first) }
    }

    /// The character of an id.
    pub fn id_to_token(&self, id: u32) -> Option<char> {
        self.characters.get(id as usize).copied()
    }

    fn id(&self, c: char) -> Option<u32> {
        self.characters.binary_search(&c).ok().map(|place| place as u32)
    }
}
