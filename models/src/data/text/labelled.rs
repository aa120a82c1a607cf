//! Token sequences with a class each: what a classifier of texts is trained on.

use super::padded::{PaddingSide, TokenSequence, pad_sequences};
use crate::data::dataset::{Dataset, check_indices};
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result, Tensor};

/// Sequences and their classes, T being the longest one's length.
#[derive(Clone, Debug)]
pub struct LabelledBatch {
    /// Tokens, and padding behind them: i64 (B, T).
    pub inputs: Tensor,
    /// True for tokens, false for padding: bool (B, T).
    pub key_mask: Tensor,
    /// The classes' numbers, i64 (B).
    pub labels: Tensor,
}

/// A data set of token sequences with a class each.
///
/// ```
/// use kiln_models::data::{Dataset, LabelledSequences, Rng};
/// let texts = LabelledSequences::new(vec![vec![2, 7, 3], vec![2, 8, 9, 3]], vec![1, 0], 0)?;
/// let batch = texts.batch(&[1, 0], &mut Rng::new(0))?;
/// assert_eq!(batch.inputs.to_vec::<i64>()?, [2, 8, 9, 3, 2, 7, 3, 0]);
/// assert_eq!(batch.labels.to_vec::<i64>()?, [0, 1]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LabelledSequences {
    sequences: Vec<TokenSequence>,
    labels: Vec<i64>,
    pad: u32,
}

impl LabelledSequences {
    /// A data set whose batches are filled up with `pad`.
    ///
    /// # Errors
    /// If there are not as many labels as sequences, or a sequence is empty.
    pub fn new(sequences: Vec<Vec<u32>>, labels: Vec<i64>, pad: u32) -> Result<Self> {
        if sequences.len() != labels.len() {
            return Err(Error::argument("labelled_sequences", format!("{} sequences have {} labels", sequences.len(), labels.len())));
        }
        if let Some(place) = sequences.iter().position(Vec::is_empty) {
            return Err(Error::argument("labelled_sequences", format!("sequence {place} is empty")));
        }
        Ok(Self { sequences: sequences.into_iter().map(TokenSequence::new).collect(), labels, pad })
    }

    /// The classes' numbers.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }
}

impl Dataset for LabelledSequences {
    type Batch = LabelledBatch;

    fn len(&self) -> usize {
        self.sequences.len()
    }

    fn batch(&self, indices: &[usize], _: &mut Rng) -> Result<LabelledBatch> {
        check_indices(indices, self.len())?;
        let chosen: Vec<TokenSequence> = indices.iter().map(|&index| self.sequences[index].clone()).collect();
        let labels = indices.iter().map(|&index| self.labels[index]).collect();
        let padded = pad_sequences(&chosen, self.pad, PaddingSide::Right)?;
        Ok(LabelledBatch { inputs: padded.inputs, key_mask: padded.key_mask, labels: Tensor::from_vec::<i64>(labels, indices.len())? })
    }
}
