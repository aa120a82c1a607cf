//! JSON files of bounded size.

use kiln_tensor::io::write_atomic;
use kiln_tensor::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use std::io::Write;
use std::path::Path;

/// No `config.json` or index is larger.
const MAX_JSON: u64 = 64 << 20;

/// Reads a JSON file of bounded size.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let size = std::fs::metadata(path).map_err(|e| Error::io("load", path.display(), e))?.len();
    if size > MAX_JSON {
        return Err(Error::format("load", format!("{} has {size} bytes, too many for a description", path.display())));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io("load", path.display(), e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format("load", format!("{}: {e}", path.display())).with_source(e))
}

/// Writes a JSON file.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Error::format("save", format!("{}: {e}", path.display())))?;
    text.push('\n');
    write_atomic(path, |out| out.write_all(text.as_bytes()).map_err(|e| Error::io("save", path.display(), e)))
}

/// Reads a JSON file that holds an object.
pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>> {
    read_json(path)
}
