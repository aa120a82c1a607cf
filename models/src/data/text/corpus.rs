//! Plain text to train on: Tiny Shakespeare wherever it is found, a file of one's own, or dialogue that is made up.

use super::grammar;
use crate::data::download::{self, Remote};
use crate::data::error;
use crate::data::mnist::cache_folder;
use kiln_tensor::Result;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where to look for a text.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum CorpusSource {
    /// Tiny Shakespeare in the folder that the environment variable `KILN_DATA` names, in Kiln's cache folder, by a download into it; generated
    /// dialogue if none of these works.
    #[default]
    Auto,
    /// As `Auto`, without the download.
    Offline,
    /// This file and nothing else.
    File(PathBuf),
    /// Generated dialogue.
    Generated {
        /// The seed of all choices in it.
        seed: u64,
        /// At least so many bytes.
        bytes: usize,
    },
}

/// Where a text was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CorpusOrigin {
    /// In the file that was asked for.
    File(PathBuf),
    /// In this file, through `KILN_DATA`.
    Environment(PathBuf),
    /// In Kiln's cache folder.
    Cache(PathBuf),
    /// It was downloaded to this file just now.
    Download(PathBuf),
    /// It is made up: dialogue of this seed.
    Generated(u64),
}

/// A text to train a language model on. Its `Display` says where it comes from.
///
/// ```
/// use kiln_models::data::{Corpus, CorpusSource};
/// let corpus = Corpus::open(CorpusSource::Generated { seed: 0, bytes: 10_000 })?;
/// let (train, validation) = corpus.split();
/// assert_eq!(train.len() + validation.len(), corpus.text.len());
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Corpus {
    /// The text.
    pub text: String,
    /// Where it comes from.
    pub origin: CorpusOrigin,
}

impl Corpus {
    /// Opens Tiny Shakespeare (Karpathy, *char-rnn*, 2015: 1.1 MB of Shakespeare's plays) or another text; [`CorpusSource`] says where it is looked for.
    ///
    /// # Errors
    /// If the file that was asked for is missing, or a file that was found cannot be read, is empty or is not UTF-8.
    pub fn open(source: CorpusSource) -> Result<Self> {
        open(source, std::env::var_os("KILN_DATA").map(PathBuf::from), cache_folder())
    }

    /// The text to train on, and the last tenth, kept for validation (cut at the next character).
    pub fn split(&self) -> (&str, &str) {
        let at = self.text.len() - self.text.len() / 10;
        let boundary = (at..self.text.len()).find(|&at| self.text.is_char_boundary(at));
        self.text.split_at(boundary.unwrap_or(self.text.len()))
    }
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}: {} bytes", self.origin, self.text.len())
    }
}

impl fmt::Display for CorpusOrigin {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Environment(path) => write!(f, "{} (from KILN_DATA)", path.display()),
            Self::Cache(path) => write!(f, "{} (cached)", path.display()),
            Self::Download(path) => write!(f, "downloaded to {}", path.display()),
            Self::Generated(seed) => write!(f, "generated dialogue, seed {seed} (no real text was found or wanted)"),
        }
    }
}

/// Tiny Shakespeare as TensorFlow's tutorials serve it, byte for byte that of char-rnn.
static TINY_SHAKESPEARE: Remote =
    Remote { name: "shakespeare.txt", sha256: "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", bytes: 1_115_394 };
static MIRRORS: [&str; 1] = ["http://storage.googleapis.com/download.tensorflow.org/data/"];

/// The folder of the data set, and the names that people give the file.
const FOLDER: &str = "tinyshakespeare";
const NAMES: [&str; 3] = ["tinyshakespeare.txt", "shakespeare.txt", "input.txt"];

/// The generated text that stands in for a missing one.
const STAND_IN: (u64, usize) = (0, 500_000);

/// The places in their order, until one has the text.
fn open(source: CorpusSource, environment: Option<PathBuf>, cache: Option<PathBuf>) -> Result<Corpus> {
    let download = match source {
        CorpusSource::Auto => true,
        CorpusSource::Offline => false,
        CorpusSource::File(path) => return read(path, CorpusOrigin::File),
        CorpusSource::Generated { seed, bytes } => return Ok(generate(seed, bytes)),
    };
    let given = environment.iter().flat_map(|root| [root.join(FOLDER), root.clone()]);
    if let Some(path) = given.flat_map(|folder| NAMES.map(|name| folder.join(name))).find(|path| path.is_file()) {
        return read(path, CorpusOrigin::Environment);
    }
    let cache = cache.map(|cache| cache.join(FOLDER));
    if let Some(path) = cache.iter().flat_map(|folder| NAMES.map(|name| folder.join(name))).find(|path| path.is_file()) {
        return read(path, CorpusOrigin::Cache);
    }
    if let (true, Some(folder)) = (download, cache)
        && download::fetch(&TINY_SHAKESPEARE, &MIRRORS, &folder).is_ok()
    {
        return read(folder.join(TINY_SHAKESPEARE.name), CorpusOrigin::Download);
    }
    let (seed, bytes) = STAND_IN;
    Ok(generate(seed, bytes))
}

fn generate(seed: u64, bytes: usize) -> Corpus {
    Corpus { text: grammar::dialogue(seed, bytes), origin: CorpusOrigin::Generated(seed) }
}

fn read(path: PathBuf, origin: impl Fn(PathBuf) -> CorpusOrigin) -> Result<Corpus> {
    let text = read_text(&path)?;
    Ok(Corpus { text, origin: origin(path) })
}

fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| error::io("read", path, e))?;
    let wrong =
        |e: std::string::FromUtf8Error| error::format(path, "text", format!("not UTF-8 from byte {} on", e.utf8_error().valid_up_to()));
    match String::from_utf8(bytes).map_err(wrong)? {
        text if text.is_empty() => Err(error::format(path, "text", "there is none")),
        text => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn looks_in_each_place_in_order() {
        let root = std::env::temp_dir().join(format!("kiln-corpus-{}", std::process::id()));
        let (environment, cache) = (root.join("env"), root.join("cache"));
        let open_here = || open(CorpusSource::Offline, Some(environment.clone()), Some(cache.clone()));
        assert_eq!(open_here().unwrap().origin, CorpusOrigin::Generated(0));
        fs::create_dir_all(cache.join(FOLDER)).unwrap();
        fs::create_dir_all(&environment).unwrap();
        fs::write(cache.join(FOLDER).join("shakespeare.txt"), "cached").unwrap();
        assert_eq!(open_here().unwrap().origin, CorpusOrigin::Cache(cache.join(FOLDER).join("shakespeare.txt")));
        let given = environment.join("tinyshakespeare.txt");
        fs::write(&given, "ten byteés").unwrap();
        let found = open_here().unwrap();
        assert_eq!((found.origin.clone(), found.split()), (CorpusOrigin::Environment(given.clone()), ("ten byteé", "s")));
        assert!(found.to_string().ends_with("(from KILN_DATA): 11 bytes"), "{found}");
        for (content, problem) in [(&b"a\xff"[..], "not UTF-8 from byte 1"), (b"", "there is none")] {
            fs::write(&given, content).unwrap();
            let error = open_here().unwrap_err().to_string();
            assert!(error.contains("tinyshakespeare.txt") && error.contains(problem), "{error}");
        }
        assert!(open(CorpusSource::File(root.join("none")), None, None).unwrap_err().to_string().contains("none"));
        fs::remove_dir_all(&root).unwrap();
    }
}
