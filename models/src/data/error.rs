//! How errors of the data module are worded: the file first, then the field or line, then what is wrong with it.

use kiln_tensor::Error;
use std::path::Path;

/// A file or folder that the system will not let us `action`.
pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::io(action, path.display(), source)
}

/// A file whose content is not what its format, or its purpose, asks for.
pub(super) fn format(path: &Path, field: &str, problem: impl AsRef<str>) -> Error {
    Error::format("read", format!("{}: {field}: {}", path.display(), problem.as_ref()))
}

/// A line of a text file, counted from 1, that is wrong.
pub(super) fn line(path: &Path, line: u64, problem: impl AsRef<str>) -> Error {
    Error::format("read", format!("{}, line {line}: {}", path.display(), problem.as_ref()))
}
