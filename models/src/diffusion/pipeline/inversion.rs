//! Textual inversion: new words whose vectors are learnt, or loaded, while the model stays as it is.

use crate::nn::{Adapter, Embedding, Init, Param, Params};
use kiln_tensor::io::safetensors;
use kiln_tensor::{Error, Generator, Result, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A word with vectors of its own: n for each text encoder, in place of n tokens of the prompt.
///
/// To train one, [attach](TextualInversion::attach) it to a text encoder's table, give an optimiser its [`params`](TextualInversion::params),
/// and read prompts by [`prompt_ids`](TextualInversion::prompt_ids).
///
/// Source: Gal et al., *An Image is Worth One Word*, 2022. Files: those of `diffusers` and of AUTOMATIC1111's web UI, in safetensors.
#[derive(Clone)]
pub struct TextualInversion {
    token: String,
    vectors: Vec<Param>,
}

/// The names of the vectors of both text encoders of SDXL in a file.
const XL: [&str; 2] = ["clip_l", "clip_g"];

impl TextualInversion {
    /// A word with these vectors, (n, width) for each text encoder.
    ///
    /// # Errors
    /// If the word is empty, there are no vectors, or not as many for each encoder.
    pub fn new(token: &str, vectors: &[Tensor]) -> Result<Self> {
        let wrong = |message: String| Error::argument("textual inversion", message);
        if token.trim().is_empty() || vectors.is_empty() {
            return Err(wrong(format!("`{token}` is no word, or has no vectors")));
        }
        let counts = vectors.iter().map(|v| v.dims_n::<2>("textual inversion").map(|[n, _]| n)).collect::<Result<Vec<_>>>()?;
        if counts.iter().any(|&n| n == 0 || Some(&n) != counts.first()) {
            return Err(wrong(format!("`{token}` has {counts:?} vectors for the text encoders")));
        }
        let param = |(i, v): (usize, &Tensor)| Param::new(format!("{token}.{i}"), v);
        Ok(Self { token: token.to_owned(), vectors: vectors.iter().enumerate().map(param).collect::<Result<_>>()? })
    }

    /// A new word that starts as the vectors of existing tokens, or of random ones like those of the table where `like` is empty.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if a token is not in the table.
    pub fn start(token: &str, table: &Embedding, like: &[u32], count: usize, generator: &Generator) -> Result<Self> {
        let weight = table.weight().get().detach();
        let width = weight.dim(1)?;
        if like.is_empty() {
            let params = Params::with(crate::nn::ParamsOptions { generator: generator.clone(), ..Default::default() });
            let drawn =
                params.param("vectors", [count, width], Init::Normal { mean: 0.0, std: weight.std((), 1.0)?.item::<f32>()?.into() })?;
            return Self::new(token, &[drawn.get().detach()]);
        }
        let ids: Vec<i64> = (0..count).filter_map(|i| like.get(i % like.len())).map(|&id| i64::from(id)).collect();
        Self::new(token, &[Tensor::from_vec(ids, [count])?.embedding(&weight)?])
    }

    /// Loads a file; `token` is the word, which otherwise is the one in the file, or the file's name.
    ///
    /// # Errors
    /// If the file is malformed or holds no vectors of words.
    pub fn load(path: impl AsRef<Path>, token: Option<&str>) -> Result<Self> {
        let path = path.as_ref();
        let state = safetensors::load(path)?;
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let rows = |tensor: &Tensor| if tensor.rank() == 1 { tensor.unsqueeze(0) } else { Ok(tensor.clone()) };
        let of_file = |word: &str, tensors: &[&Tensor]| {
            let vectors = tensors.iter().map(|t| rows(t)).collect::<Result<Vec<_>>>()?;
            Self::new(token.unwrap_or(word), &vectors)
        };
        if let [Some(first), Some(second)] = XL.map(|name| state.get(name)) {
            return of_file(&stem, &[first, second]);
        }
        match state.iter().next() {
            Some((name, tensor)) if state.len() == 1 => of_file(if name == "emb_params" { &stem } else { name }, &[tensor]),
            _ => {
                let message = format!("{}: {} tensors are no word's vectors", path.display(), state.len());
                Err(Error::format("textual inversion", message))
            }
        }
    }

    /// Saves the vectors as `diffusers` loads them (`clip_l` and `clip_g` for two text encoders).
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let contents: Vec<Tensor> = self.vectors.iter().map(|v| v.get().detach()).collect();
        let tensors: Vec<(&str, &Tensor)> = match &contents[..] {
            [only] => vec![(self.token.as_str(), only)],
            several => XL.into_iter().zip(several).collect(),
        };
        safetensors::save(path, tensors, &BTreeMap::new())
    }

    /// The word.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// The vectors, (n, width) for each text encoder: what is trained.
    pub fn params(&self) -> &[Param] {
        &self.vectors
    }

    /// Makes the table of text encoder `encoder` (0 or 1) know the words: their ids follow those of the table. Without words, it knows
    /// none any more.
    ///
    /// # Errors
    /// If the vectors are of another width, or made for fewer encoders.
    pub fn attach(words: &[TextualInversion], table: &Embedding, encoder: usize) -> Result<()> {
        let [entries, width] = table.weight().get().dims_n("textual inversion")?;
        let own = |word: &TextualInversion| {
            let vectors = word.vectors.get(encoder).filter(|vectors| vectors.shape().dims().last() == Some(&width));
            let wrong =
                || Error::argument("textual inversion", format!("`{}` has no vectors of width {width} for this encoder", word.token));
            vectors.cloned().ok_or_else(wrong)
        };
        let vectors = words.iter().map(own).collect::<Result<Vec<_>>>()?;
        let adapter = (!words.is_empty()).then(|| Arc::new(Words { entries, vectors }) as Arc<dyn Adapter<Embedding>>);
        table.set_adapter(adapter);
        Ok(())
    }

    /// The ids of a prompt without start and end: those of `encode` for the text between the words, and those of the words, which follow
    /// the `entries` of the table.
    ///
    /// # Errors
    /// As `encode`.
    pub fn prompt_ids(
        words: &[TextualInversion],
        prompt: &str,
        entries: usize,
        encode: &dyn Fn(&str) -> Result<Vec<u32>>,
    ) -> Result<Vec<i64>> {
        let (mut ids, mut rest) = (Vec::new(), prompt);
        // The first word in the text; of two at one place, the longer.
        let find = |text: &str| {
            let places = words.iter().enumerate().filter_map(|(i, word)| Some((text.find(&word.token)?, i)));
            places.min_by_key(|&(at, i)| (at, std::cmp::Reverse(words[i].token.len())))
        };
        let read = |text: &str, ids: &mut Vec<i64>| -> Result<()> {
            ids.extend(encode(text)?.into_iter().map(i64::from));
            Ok(())
        };
        while let Some((at, i)) = find(rest) {
            let (before, from) = rest.split_at(at);
            read(before, &mut ids)?;
            let count = |word: &TextualInversion| word.vectors.first().map_or(0, |v| v.shape().dims().first().copied().unwrap_or(0));
            let first = entries + words.iter().take(i).map(count).sum::<usize>();
            if let Some(word) = words.get(i) {
                ids.extend((first..first + count(word)).map(|id| id as i64));
                rest = from.get(word.token.len()..).unwrap_or_default();
            }
        }
        read(rest, &mut ids)?;
        Ok(ids)
    }
}

/// Rows of a table, and behind them those of new words.
struct Words {
    entries: usize,
    vectors: Vec<Param>,
}

impl Adapter<Embedding> for Words {
    fn is_active(&self) -> bool {
        true
    }

    fn forward(&self, layer: &Embedding, indices: &Tensor) -> Result<Tensor> {
        let ids = indices.to_vec::<i64>()?;
        let entries = self.entries as i64;
        let made = |values: Vec<i64>| Tensor::from_vec(values, *indices.shape())?.to_device(indices.device());
        let old = layer.base(&made(ids.iter().map(|&id| if id < entries { id } else { 0 }).collect())?)?;
        if ids.iter().all(|&id| id < entries) {
            return Ok(old);
        }
        let contents: Vec<Tensor> =
            self.vectors.iter().map(|v| v.get().to_dtype(old.dtype())?.to_device(old.device())).collect::<Result<_>>()?;
        let table = Tensor::cat(&contents.iter().collect::<Vec<_>>(), 0)?;
        let new = made(ids.iter().map(|&id| (id - entries).max(0)).collect())?.embedding(&table)?;
        let is_new = made(ids.iter().map(|&id| i64::from(id >= entries)).collect())?.to_dtype(old.dtype())?.unsqueeze(-1)?;
        old.add(&new.sub(&old)?.mul(&is_new)?)
    }

    fn params(&self) -> Vec<Param> {
        self.vectors.clone()
    }
}
