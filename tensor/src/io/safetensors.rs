//! Safetensors: named tensors and a map of texts, behind a JSON header. What PyTorch and Hugging Face exchange.

use super::{tensor_from_bytes, with_bytes, write_atomic};
use crate::storage::map_file;
use crate::{DType, Error, Result, Shape, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The header's key of the map of texts.
const METADATA: &str = "__metadata__";
/// The bytes before the header: its length.
const PREFIX: usize = 8;
/// Data starts at a multiple of this, so that a mapped file can be read in place.
const ALIGN: usize = 8;

/// An open safetensors file: its header is read and checked, its tensors are read when asked for.
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    data: usize,
}

impl SafetensorsFile {
    /// Maps the file at `path` and checks its header: sizes, dtypes and offsets must agree with each other and cover the file.
    ///
    /// # Errors
    /// If the file cannot be mapped or any of this does not hold.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let map = map_file(path)?;
        let wrong = |e: SafeTensorError| Error::format("load", format!("{} is no safetensors file: {e}", path.display())).with_source(e);
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(wrong)?;
        let file = Self { path: path.to_owned(), map, metadata, data: PREFIX + header };
        for name in file.names() {
            file.info(&name)?;
        }
        Ok(file)
    }

    /// The tensors' names, in the order of their data.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The texts that were saved along.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        self.metadata.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// Shape and dtype of the tensor `name`, without reading it.
    ///
    /// # Errors
    /// If there is none, or it is of a kind that Kiln does not have.
    pub fn info(&self, name: &str) -> Result<(Shape, DType)> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| Error::argument("load", format!("{} holds no tensor {:?}", self.path.display(), shorten(name))))?;
        let describe = |what: String| Error::format("load", format!("{}: tensor {:?}: {what}", self.path.display(), shorten(name)));
        let dtype = to_kiln(info.dtype).ok_or_else(|| describe(format!("dtype {:?} is not supported", info.dtype)))?;
        let shape = Shape::new(&info.shape).map_err(|e| describe(e.to_string()))?;
        Ok((shape, dtype))
    }

    /// Reads the tensor `name`.
    ///
    /// # Errors
    /// As [`info`](Self::info), or if there is no memory for it.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let (shape, dtype) = self.info(name)?;
        let (start, end) = self.metadata.info(name).map_or((0, 0), |info| info.data_offsets);
        let cut = || Error::format("load", format!("{}: the data of {:?} lies outside the file", self.path.display(), shorten(name)));
        let bytes = self.map.get(self.data + start..self.data + end).ok_or_else(cut)?;
        tensor_from_bytes(dtype, shape, |out| {
            if out.len() != bytes.len() {
                return Err(cut());
            }
            out.copy_from_slice(bytes);
            Ok(())
        })
    }
}

/// Every tensor of the safetensors file at `path`, by name. [`SafetensorsFile`] reads single ones, and the texts.
///
/// # Errors
/// As [`SafetensorsFile::open`] and [`SafetensorsFile::tensor`].
pub fn load(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let file = SafetensorsFile::open(path)?;
    file.names().into_iter().map(|name| file.tensor(&name).map(|tensor| (name, tensor))).collect()
}

/// Saves named tensors and texts at `path`, all or nothing (see [`write_atomic`]). The same content gives the same bytes.
///
/// ```
/// # use kiln_tensor::{Tensor, Result, io::safetensors};
/// # fn main() -> Result<()> {
/// # let path = std::env::temp_dir().join(format!("kiln-doc-{}.safetensors", std::process::id()));
/// let weight = Tensor::from_vec(vec![1f32, 2., 3., 4.], [2, 2])?;
/// safetensors::save(&path, [("weight", &weight)], &[("epoch".to_owned(), "3".to_owned())].into())?;
/// assert_eq!(safetensors::load(&path)?["weight"].to_vec::<f32>()?, [1., 2., 3., 4.]);
/// # let _ = std::fs::remove_file(path);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If a name is given twice or reserved, or the file cannot be written.
pub fn save<'a, N: AsRef<str>>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (N, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut tensors: Vec<(String, &Tensor)> = tensors.into_iter().map(|(name, tensor)| (name.as_ref().to_owned(), tensor)).collect();
    // Wide elements first, so that every tensor is aligned to its own.
    tensors.sort_by(|(a, x), (b, y)| y.dtype().size().cmp(&x.dtype().size()).then_with(|| a.cmp(b)));
    let header = header(&tensors, metadata)?;
    write_atomic(path, |file| {
        let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| Error::io("save", path.display(), e));
        put(&(header.len() as u64).to_le_bytes())?;
        put(&header)?;
        tensors.iter().try_for_each(|(_, tensor)| with_bytes(tensor, &mut put))
    })
}

/// The JSON header, padded with spaces.
fn header(tensors: &[(String, &Tensor)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.to_owned(), serde_json::json!(metadata));
    }
    let mut start = 0;
    for (name, tensor) in tensors {
        let end = start + tensor.numel() * tensor.dtype().size();
        let entry = serde_json::json!({ "dtype": safetensors_name(tensor.dtype()), "shape": tensor.dims(), "data_offsets": [start, end] });
        if name == METADATA || header.insert(name.clone(), entry).is_some() {
            return Err(Error::argument("save", format!("the name {name:?} is given twice or reserved")));
        }
        start = end;
    }
    let mut bytes = serde_json::to_vec(&header).map_err(|e| Error::format("save", e.to_string()))?;
    bytes.resize(bytes.len().next_multiple_of(ALIGN), b' ');
    Ok(bytes)
}

/// Enough of a name to recognise it by.
fn shorten(name: &str) -> String {
    name.chars().take(80).collect()
}

fn to_kiln(dtype: Dtype) -> Option<DType> {
    DType::ALL.into_iter().find(|&kiln| to_safetensors(kiln) == dtype)
}

fn to_safetensors(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F64 => Dtype::F64,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
    }
}

/// The format's name of a dtype: ours in capitals.
fn safetensors_name(dtype: DType) -> String {
    dtype.name().to_ascii_uppercase()
}
