//! State dictionaries, and the account of how one fitted a model.

use kiln_tensor::{DType, Error, ErrorKind, Result, Shape, Tensor};
use std::collections::BTreeMap;
use std::fmt;

/// The contents of a model's parameters and buffers by name.
pub type StateDict = BTreeMap<String, Tensor>;

/// What to do with a state dictionary that does not fit the model exactly.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadMode {
    /// It is an error, which lists every name that is missing, unexpected or of another shape. Nothing is loaded.
    Strict,
    /// What fits is loaded; the rest keeps its values and is listed in the report.
    Partial,
}

/// A tensor that was found under the right name but does not fit.
#[derive(Clone, PartialEq, Debug)]
pub struct Mismatch {
    /// The name.
    pub name: String,
    /// Dtype and shape in the model.
    pub expected: (DType, Shape),
    /// Dtype and shape in the state dictionary.
    pub found: (DType, Shape),
}

/// How a state dictionary fitted.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct LoadReport {
    /// How many tensors were loaded.
    pub loaded: usize,
    /// Names that the model has and the state dictionary lacks.
    pub missing: Vec<String>,
    /// Names that the state dictionary has and the model lacks.
    pub unexpected: Vec<String>,
    /// Names whose tensors have another shape, or an integer dtype where the model has floats (or the other way round).
    pub mismatched: Vec<Mismatch>,
}

impl LoadReport {
    /// Whether everything fitted.
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.mismatched.is_empty()
    }

    /// The report if `mode` accepts it, an error that lists all that does not fit otherwise.
    pub(super) fn accept(self, mode: LoadMode) -> Result<LoadReport> {
        if mode == LoadMode::Partial || self.is_complete() {
            return Ok(self);
        }
        Err(self.refusal())
    }

    /// The error that lists all that does not fit.
    pub(super) fn refusal(self) -> Error {
        Error::new(ErrorKind::Argument, "load_state_dict", format!("the state dictionary does not fit the model: {self}"))
    }

    /// Takes `found` as the content of `name` if it fits `expected`: converted to its dtype if both are floats.
    pub(super) fn fit(&mut self, name: &str, expected: (DType, Shape), found: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(found) = found else {
            self.missing.push(name.to_owned());
            return Ok(None);
        };
        let (dtype, shape) = expected;
        let convertible = found.dtype() == dtype || (found.dtype().is_float() && dtype.is_float());
        if *found.shape() != shape || !convertible {
            self.mismatched.push(Mismatch { name: name.to_owned(), expected, found: (found.dtype(), *found.shape()) });
            return Ok(None);
        }
        self.loaded += 1;
        let found = found.detach();
        Ok(Some(if found.dtype() == dtype { found } else { found.to_dtype(dtype)? }))
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} loaded", self.loaded)?;
        for (what, names) in [("missing", &self.missing), ("unexpected", &self.unexpected)] {
            if !names.is_empty() {
                write!(f, "; {} {what}: {}", names.len(), names.join(", "))?;
            }
        }
        if !self.mismatched.is_empty() {
            write!(f, "; {} of another shape or dtype:", self.mismatched.len())?;
            for m in &self.mismatched {
                let ((dtype, shape), (found, found_shape)) = (m.expected, m.found);
                write!(f, " {} (expected {dtype} {shape}, found {found} {found_shape})", m.name)?;
            }
        }
        Ok(())
    }
}
