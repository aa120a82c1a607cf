//! What a loader reads from: a numbered collection that can make a batch of any of its items.

use super::rng::Rng;
use kiln_tensor::{Error, Result};

/// A numbered collection of samples.
///
/// The loader calls [`batch`](Dataset::batch) on its worker thread, so that decoding and augmentation run beside the training step.
pub trait Dataset: Send + Sync {
    /// What a batch is: usually a struct of tensors.
    type Batch: Send;

    /// The number of samples.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The batch of the samples `indices`, in that order.
    ///
    /// `rng` is keyed by seed, epoch and batch: augmentation that draws from it (and from nothing else)
    /// repeats exactly when training is resumed.
    ///
    /// # Errors
    /// If an index is out of range or a sample cannot be read; the loader hands the error to its consumer.
    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<Self::Batch>;
}

/// Some samples of another data set, in an order of their own.
#[derive(Clone, Debug)]
pub struct Subset<D> {
    base: D,
    indices: Vec<usize>,
}

impl<D: Dataset> Subset<D> {
    /// The samples `indices` of `base`.
    ///
    /// # Errors
    /// If an index is not below `base.len()`.
    pub fn new(base: D, indices: Vec<usize>) -> Result<Self> {
        check_indices(&indices, base.len())?;
        Ok(Self { base, indices })
    }
}

impl<D: Dataset> Dataset for Subset<D> {
    type Batch = D::Batch;

    fn len(&self) -> usize {
        self.indices.len()
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<D::Batch> {
        check_indices(indices, self.len())?;
        let of_base: Vec<usize> = indices.iter().map(|&i| self.indices[i]).collect();
        self.base.batch(&of_base, rng)
    }
}

/// An error that names the first of `indices` that is not below `len`.
pub(super) fn check_indices(indices: &[usize], len: usize) -> Result<()> {
    match indices.iter().find(|&&i| i >= len) {
        Some(i) => Err(Error::argument("batch", format!("sample {i} was asked of a data set of {len}"))),
        None => Ok(()),
    }
}
