//! GGUF files, versions 2 and 3: what llama.cpp keeps models in. Metadata, and tensors in floats or in blocks of few bits.
//!
//! `reader` takes the file apart, `value` is its metadata, `names` says what tensors are called elsewhere. The models are built from it in
//! [`transformer`](crate::transformer::load_gguf), the tokenizers in [`text`](crate::text::Tokenizer::from_gguf).
//! Source: the specification in ggml's `docs/gguf.md`.

mod names;
mod reader;
mod value;

pub use names::{Counterpart, RowOrder, counterpart};
pub use value::{Array, Value};

use kiln_tensor::io::{MappedFile, tensor_from_le_bytes};
use kiln_tensor::{DType, Error, Quantization, QuantizedMatrix, Result, Shape, Tensor};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// How a tensor's values are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// As numbers.
    Plain(DType),
    /// In blocks.
    Blocks(Quantization),
    /// In a way that is not read here: the name and number of ggml's type.
    Unknown(&'static str, u32),
}

/// A tensor of the file.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorInfo {
    /// Extents, the last one contiguous: the reverse of the file's order.
    pub shape: Shape,
    /// How the values are stored.
    pub storage: Storage,
    /// Where they are in the file; empty if the type is unknown.
    bytes: Range<usize>,
}

/// An open GGUF file: its header is read and checked, its tensors are read when asked for.
///
/// ```no_run
/// # use kiln_models::gguf::Gguf;
/// # use kiln_tensor::Result;
/// # fn main() -> Result<()> {
/// let file = Gguf::open("model.gguf")?;
/// println!("{}: {} tensors", file.get_str("general.architecture")?, file.tensor_names().len());
/// let table = file.tensor("token_embd.weight")?; // f32, whatever the file has
/// # Ok(()) }
/// ```
pub struct Gguf {
    path: PathBuf,
    map: MappedFile,
    version: u32,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    names: Vec<String>,
}

/// Enough of a name to recognise it by.
pub(crate) fn shorten(name: &str) -> String {
    name.chars().take(80).collect()
}

impl Gguf {
    /// Maps the file at `path` and checks its header: every length, type, offset and name. Memory is taken for what the file holds, never
    /// for what it claims.
    ///
    /// # Errors
    /// If the file cannot be mapped, is cut short, or says something that cannot be: the message names the key or the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let map = MappedFile::open(&path)?;
        let header = reader::read(&map).map_err(|what| Error::format("gguf", format!("{}: {what}", path.display())))?;
        let reader::Header { version, metadata, tensors, names } = header;
        Ok(Self { path, map, version, metadata, tensors, names })
    }

    /// An error that names the file.
    pub(crate) fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::format("gguf", format!("{}: {what}", self.path.display()))
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Everything that the file says, by key.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// What the file says under `key`, as `convert` takes it; `None` if it says nothing.
    fn find<'a, T>(&'a self, key: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let wrong = || self.wrong(format!("the key {key:?} is {}, expected {expected}", value.kind()));
        convert(value).ok_or_else(wrong).map(Some)
    }

    fn require<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.wrong(format!("the key {key:?} is missing")))
    }

    /// The number under `key`, if there is one.
    ///
    /// # Errors
    /// If it is not an integer from 0 on.
    pub fn find_u64(&self, key: &str) -> Result<Option<u64>> {
        self.find(key, "an integer from 0 on", Value::as_u64)
    }

    /// The number under `key`, if there is one.
    ///
    /// # Errors
    /// If it is not a number.
    pub fn find_f64(&self, key: &str) -> Result<Option<f64>> {
        self.find(key, "a number", Value::as_f64)
    }

    /// The text under `key`, if there is one.
    ///
    /// # Errors
    /// If it is not a text.
    pub fn find_str(&self, key: &str) -> Result<Option<&str>> {
        self.find(key, "a text", Value::as_str)
    }

    /// The truth value under `key`, if there is one.
    ///
    /// # Errors
    /// If it is not a truth value.
    pub fn find_bool(&self, key: &str) -> Result<Option<bool>> {
        self.find(key, "true or false", Value::as_bool)
    }

    /// The texts under `key`, if there are: `tokenizer.ggml.tokens` and `tokenizer.ggml.merges` are such.
    ///
    /// # Errors
    /// If it is not an array of texts.
    pub fn find_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.find(key, "an array of texts", Value::as_strings)
    }

    /// The integers under `key`, if there are.
    ///
    /// # Errors
    /// If it is not an array of integers from 0 on.
    pub fn find_u64s(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.find(key, "an array of integers from 0 on", Value::as_u64s)
    }

    /// The numbers under `key`, if there are.
    ///
    /// # Errors
    /// If it is not an array of numbers.
    pub fn find_f64s(&self, key: &str) -> Result<Option<Vec<f64>>> {
        self.find(key, "an array of numbers", Value::as_f64s)
    }

    /// The number under `key`.
    ///
    /// # Errors
    /// If there is none, or it is not an integer from 0 on.
    pub fn get_u64(&self, key: &str) -> Result<u64> {
        self.require(key, self.find_u64(key)?)
    }

    /// The number under `key`.
    ///
    /// # Errors
    /// If there is none.
    pub fn get_f64(&self, key: &str) -> Result<f64> {
        self.require(key, self.find_f64(key)?)
    }

    /// The numbers under `key`.
    ///
    /// # Errors
    /// If there are none.
    pub fn get_f64s(&self, key: &str) -> Result<Vec<f64>> {
        self.require(key, self.find_f64s(key)?)
    }

    /// The text under `key`.
    ///
    /// # Errors
    /// If there is none.
    pub fn get_str(&self, key: &str) -> Result<&str> {
        self.require(key, self.find_str(key)?)
    }

    /// The texts under `key`.
    ///
    /// # Errors
    /// If there are none.
    pub fn get_strings(&self, key: &str) -> Result<&[String]> {
        self.require(key, self.find_strings(key)?)
    }

    /// The tensors' names, in the file's order.
    pub fn tensor_names(&self) -> &[String] {
        &self.names
    }

    /// Whether there is a tensor `name`.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What the tensor `name` is, without reading it.
    ///
    /// # Errors
    /// If there is none.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let missing = || Error::argument("gguf", format!("{} holds no tensor {:?}", self.path.display(), shorten(name)));
        self.tensors.get(name).ok_or_else(missing)
    }

    fn bytes(&self, name: &str, info: &TensorInfo) -> Result<&[u8]> {
        let outside = || self.wrong(format!("the data of {:?} lies outside of the file", shorten(name)));
        self.map.get(info.bytes.clone()).ok_or_else(outside)
    }

    fn unknown(&self, name: &str, kind: &str, number: u32) -> Error {
        let read = "F32, F16, BF16, Q8_0, Q4_0, Q4_K and Q6_K";
        self.wrong(format!("the tensor {:?} is of type {kind} ({number}), which is not read; {read} are", shorten(name)))
    }

    /// The tensor `name`, in the dtype of the file, or in f32 if it is quantised.
    ///
    /// # Errors
    /// If there is none, its type is not read here, or there is no memory for it.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        match info.storage {
            Storage::Plain(dtype) => tensor_from_le_bytes(dtype, info.shape, self.bytes(name, info)?),
            Storage::Blocks(kind) => self.matrix(name, info, kind)?.dequantize(DType::F32)?.reshape(info.shape),
            Storage::Unknown(kind, number) => Err(self.unknown(name, kind, number)),
        }
    }

    /// The tensor `name` as it is stored, if it is quantised: all dimensions but the last as rows. `None` if it is plain.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor).
    pub fn quantized(&self, name: &str) -> Result<Option<QuantizedMatrix>> {
        let info = self.info(name)?;
        match info.storage {
            Storage::Plain(_) => Ok(None),
            Storage::Blocks(kind) => self.matrix(name, info, kind).map(Some),
            Storage::Unknown(kind, number) => Err(self.unknown(name, kind, number)),
        }
    }

    fn matrix(&self, name: &str, info: &TensorInfo, kind: Quantization) -> Result<QuantizedMatrix> {
        let cols = info.shape.dims().last().copied().unwrap_or(1);
        let rows = info.shape.numel().checked_div(cols).unwrap_or(0);
        QuantizedMatrix::from_blocks(kind, rows, cols, self.bytes(name, info)?)
    }
}
