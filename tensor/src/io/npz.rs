//! NumPy's npz format: a zip archive of npy files, stored or deflated.

use super::{npy, write_atomic};
use crate::{Error, Result, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Deflate turns at most 1032 bytes into one (two bits for a match of 258 bytes): an entry that claims more lies.
const MAX_DEFLATE_RATIO: u64 = 1032;
/// From this size on an entry needs zip's 64-bit fields.
const LARGE: u64 = u32::MAX as u64;

/// Reads every array of the npz file at `path`, by name (without `.npy`).
///
/// # Errors
/// If the file cannot be read, is no zip archive, or an entry is no npy file as [`npy::load`] takes it.
pub fn load(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    let path = path.as_ref();
    let wrong = |e: zip::result::ZipError| Error::format("load", format!("{}: {e}", path.display())).with_source(e);
    let file = File::open(path).map_err(|e| Error::io("load", path.display(), e))?;
    let length = file.metadata().map_err(|e| Error::io("load", path.display(), e))?.len();
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(wrong)?;
    let mut tensors = BTreeMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(wrong)?;
        let name = entry.name().map_err(wrong)?.into_owned();
        let most = entry.compressed_size().min(length).saturating_mul(MAX_DEFLATE_RATIO);
        let size = entry.size();
        let tensor = npy::read(&mut entry, size, most, &format!("{}: {name}", path.display()))?;
        // Reading on to the end makes the archive check the entry's checksum.
        std::io::copy(&mut entry, &mut std::io::sink()).map_err(|e| Error::io("load", path.display(), e))?;
        tensors.insert(name.strip_suffix(".npy").unwrap_or(&name).to_owned(), tensor);
    }
    Ok(tensors)
}

/// Saves named arrays at `path`, uncompressed, all or nothing (see [`write_atomic`]).
///
/// # Errors
/// If a name is given twice or the file cannot be written.
pub fn save<'a, N: AsRef<str>>(path: impl AsRef<Path>, tensors: impl IntoIterator<Item = (N, &'a Tensor)>) -> Result<()> {
    let path = path.as_ref();
    let wrong = |e: zip::result::ZipError| Error::format("save", format!("{}: {e}", path.display())).with_source(e);
    write_atomic(path, |file| {
        let mut archive = ZipWriter::new(file);
        for (name, tensor) in tensors {
            let large = (tensor.numel() * tensor.dtype().size()) as u64 + (1 << 16) > LARGE;
            let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).large_file(large);
            archive.start_file(format!("{}.npy", name.as_ref()), options).map_err(wrong)?;
            npy::write(&mut archive, tensor, name.as_ref())?;
        }
        archive.finish().map_err(wrong)?;
        Ok(())
    })
}
