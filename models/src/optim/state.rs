//! What training keeps beside the weights as named tensors, so that one file format serves all of it. Scalars are tensors without
//! dimensions: f64 for numbers, i64 for counts.

use crate::nn::StateDict;
use kiln_tensor::{DType, Error, ErrorKind, Result, Shape, Tensor};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Adds a number.
pub(super) fn put_number(dict: &mut StateDict, name: impl Into<String>, value: f64) -> Result<()> {
    dict.insert(name.into(), Tensor::from_slice(&[value], ())?);
    Ok(())
}

/// Adds a count.
pub(super) fn put_count(dict: &mut StateDict, name: impl Into<String>, value: u64) -> Result<()> {
    let name = name.into();
    let value = i64::try_from(value).map_err(|_| Error::argument("state_dict", format!("{name} = {value} does not fit into i64")))?;
    dict.insert(name, Tensor::from_slice(&[value], ())?);
    Ok(())
}

/// Reads a [`StateDict`] and keeps account of what was read, so that names nobody asked for are an error.
pub(super) struct Reader<'a> {
    dict: &'a StateDict,
    read: RefCell<BTreeSet<&'a str>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(dict: &'a StateDict) -> Self {
        Self { dict, read: RefCell::default() }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.dict.contains_key(name)
    }

    /// A tensor of known shape and dtype.
    pub(super) fn tensor(&self, name: &str, shape: &Shape, dtype: DType) -> Result<Tensor> {
        let Some((name, tensor)) = self.dict.get_key_value(name) else {
            return Err(Error::format("load_state_dict", format!("{name} is missing")));
        };
        if tensor.shape() != shape {
            return Err(Error::shape("load_state_dict", format!("{name} has shape {}, expected {shape}", tensor.shape())));
        }
        if tensor.dtype() != dtype {
            return Err(Error::new(ErrorKind::DType, "load_state_dict", format!("{name} is {}, expected {dtype}", tensor.dtype())));
        }
        self.read.borrow_mut().insert(name);
        Ok(tensor.detach())
    }

    pub(super) fn number(&self, name: &str) -> Result<f64> {
        self.tensor(name, &Shape::new(&[])?, DType::F64)?.item()
    }

    pub(super) fn count(&self, name: &str) -> Result<u64> {
        let value: i64 = self.tensor(name, &Shape::new(&[])?, DType::I64)?.item()?;
        u64::try_from(value).map_err(|_| Error::format("load_state_dict", format!("{name} is {value}, expected a count")))
    }

    /// An error if the dictionary holds names that were not read.
    pub(super) fn finish(self) -> Result<()> {
        let read = self.read.into_inner();
        let unread: Vec<_> = self.dict.keys().filter(|name| !read.contains(name.as_str())).take(4).map(String::as_str).collect();
        if unread.is_empty() {
            return Ok(());
        }
        Err(Error::format("load_state_dict", format!("unexpected names, among them {}", unread.join(", "))))
    }
}
