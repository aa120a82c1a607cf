//! What can go wrong with data: each error names the file, and where there is one the line or field.

use std::path::{Path, PathBuf};

/// A result whose error is a [`DataError`].
pub type Result<T> = std::result::Result<T, DataError>;

/// An error of the data module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", ….
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file's content is not what its format, or its purpose, asks for.
    #[error("{}: {field}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The field or part of the file that is wrong.
        field: &'static str,
        /// What was found and what was expected.
        problem: String,
    },
    /// A line of a text file is wrong.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: u64,
        /// What was found and what was expected.
        problem: String,
    },
    /// A file could not be downloaded from any mirror.
    #[error("cannot download {url}: {problem}")]
    Download {
        /// The address that was tried last.
        url: String,
        /// Why it failed.
        problem: String,
    },
    /// An argument makes no sense.
    #[error("{0}")]
    Argument(String),
    /// A data set panicked while it made a batch.
    #[error("the data set panicked while it made batch {batch} of epoch {epoch}: {message}")]
    Panic {
        /// The epoch, counted from 0.
        epoch: u64,
        /// The batch within the epoch, counted from 0.
        batch: u64,
        /// The panic's message.
        message: String,
    },
}

impl DataError {
    /// Wraps an I/O error with what was tried on which file.
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    /// A wrong field of a file.
    pub(crate) fn format(path: &Path, field: &'static str, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), field, problem: problem.into() }
    }
}
