//! The one error type. Its text says the operation, what was given, and where it helps what to do.

use crate::{DType, Device, Shape};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;

/// The result of every fallible function of Kiln.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Shapes that do not fit the operation or each other.
    Shape,
    /// A dtype that the operation does not take, or two that differ.
    DType,
    /// An index or a dimension out of range.
    Index,
    /// An argument out of its domain.
    Argument,
    /// The system refused memory.
    OutOfMemory,
    /// A device that is not there, or two that differ.
    Device,
    /// The recorded graph: no derivative, already freed, not tracked.
    Graph,
    /// Reading or writing failed.
    Io,
    /// A file or text that is not what it claims to be.
    Format,
}

/// An error: the operation, and a message. Under `RUST_BACKTRACE=1` it carries the place it was made at.
///
/// Behind a pointer, so that a `Result` of a tensor is two words: it is moved more often than it is an error.
#[derive(thiserror::Error)]
#[error(transparent)]
pub struct Error(Box<Details>);

#[derive(thiserror::Error, Debug)]
#[error("{op}: {message}")]
struct Details {
    kind: ErrorKind,
    op: String,
    message: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    trace: Box<Backtrace>,
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        if self.0.trace.status() == BacktraceStatus::Captured {
            write!(f, "\n{}", self.0.trace)?;
        }
        Ok(())
    }
}

impl Error {
    /// An error of `kind` in the operation `op`.
    #[cold]
    pub fn new(kind: ErrorKind, op: impl Into<String>, message: impl Into<String>) -> Self {
        Self(Box::new(Details { kind, op: op.into(), message: message.into(), source: None, trace: Box::new(Backtrace::capture()) }))
    }

    /// Shapes that do not fit.
    pub fn shape(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Shape, op, message)
    }

    /// An argument out of its domain.
    pub fn argument(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Argument, op, message)
    }

    /// An index or dimension out of range.
    pub fn index(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Index, op, message)
    }

    /// A misuse of the recorded graph.
    pub fn graph(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Graph, op, message)
    }

    /// A malformed file or text.
    pub fn format(op: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Format, op, message)
    }

    /// A dtype that `op` does not take.
    pub fn unsupported_dtype(op: impl Into<String>, dtype: DType, expected: &str) -> Self {
        Self::new(ErrorKind::DType, op, format!("not defined for {dtype}; expected {expected}, convert with .to_dtype(..)"))
    }

    /// Two operands whose dtypes differ.
    pub fn dtype_mismatch(op: impl Into<String>, a: DType, b: DType) -> Self {
        Self::new(ErrorKind::DType, op, format!("operands must have one dtype, got {a} and {b}; convert one with .to_dtype(..)"))
    }

    /// Two operands whose devices differ.
    pub fn device_mismatch(op: impl Into<String>, a: Device, b: Device) -> Self {
        Self::new(ErrorKind::Device, op, format!("operands must be on one device, got {a} and {b}; move one with .to_device(..)"))
    }

    /// A failed read or write of `what` (a path, usually).
    pub fn io(op: impl Into<String>, what: impl fmt::Display, source: std::io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, op, format!("{what}: {source}"));
        error.0.source = Some(Box::new(source));
        error
    }

    /// Attaches the error that caused this one.
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.0.source = Some(Box::new(source));
        self
    }

    /// The same error, of the operation `op`.
    pub fn at(mut self, op: impl Into<String>) -> Self {
        self.0.op = op.into();
        self
    }

    /// The kind, for programs that react to it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The operation that failed.
    pub fn op(&self) -> &str {
        &self.0.op
    }

    /// Two shapes that cannot be broadcast together.
    pub fn broadcast(op: impl Into<String>, a: &Shape, b: &Shape) -> Self {
        Self::shape(op, format!("shapes {a} and {b} do not broadcast: counted from the end, extents must be equal or 1"))
    }
}

impl From<kiln_kernels::cpu::alloc::OutOfMemory> for Error {
    fn from(e: kiln_kernels::cpu::alloc::OutOfMemory) -> Self {
        Self::new(ErrorKind::OutOfMemory, "allocate", format!("{} bytes were asked for while {} are in use", e.requested, e.in_use))
    }
}
