//! Sequences of different lengths packed into rows of one length, so that hardly a place is lost to padding.

use super::padded::{IGNORE_INDEX, TokenSequence};
use crate::data::dataset::{Dataset, check_indices};
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result, Tensor};

/// Which row a sequence goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Packing {
    /// The last one if it has room, else a new one: rows keep the order of the sequences.
    InOrder,
    /// The first one that has room: fewer rows.
    #[default]
    FirstFit,
}

/// What becomes of a sequence that is longer than a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Overlong {
    /// It is an error.
    #[default]
    Refuse,
    /// Its first tokens are kept.
    Truncate,
    /// It is cut into several sequences, none of which sees another; the first token of each is not predicted.
    Split,
}

/// How sequences are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackOptions {
    /// T: the tokens of a row.
    pub length: usize,
    /// Which row a sequence goes to.
    pub packing: Packing,
    /// What becomes of longer sequences.
    pub overlong: Overlong,
    /// The token that fills up a row.
    pub pad: u32,
}

/// Rows of packed sequences. Of the places that are padding `segments` is −1 and `targets` [`IGNORE_INDEX`].
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// Tokens, i64 (B, T).
    pub inputs: Tensor,
    /// The next token of the same sequence, i64 (B, T); [`IGNORE_INDEX`] if it is not to be predicted, and at a sequence's last token: no
    /// sequence is predicted from another.
    pub targets: Tensor,
    /// The place of each token in its sequence, i64 (B, T).
    pub positions: Tensor,
    /// The number of the sequence in its row, i64 (B, T): tokens are to see only those of the same number.
    pub segments: Tensor,
}

/// A data set of rows, each of which holds one or more sequences.
///
/// ```
/// use kiln_models::data::{Dataset, Overlong, PackOptions, PackedSequences, Packing, Rng, TokenSequence};
/// let sequences = vec![TokenSequence::new(vec![1, 2, 3]), TokenSequence::new(vec![4, 5])];
/// let options = PackOptions { length: 6, packing: Packing::FirstFit, overlong: Overlong::Refuse, pad: 0 };
/// let batch = PackedSequences::new(sequences, options)?.batch(&[0], &mut Rng::new(0))?;
/// assert_eq!(batch.inputs.to_vec::<i64>()?, [1, 2, 3, 4, 5, 0]);
/// assert_eq!(batch.targets.to_vec::<i64>()?, [2, 3, -100, 5, -100, -100]);
/// assert_eq!(batch.positions.to_vec::<i64>()?, [0, 1, 2, 0, 1, 0]);
/// assert_eq!(batch.segments.to_vec::<i64>()?, [0, 0, 0, 1, 1, -1]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PackedSequences {
    sequences: Vec<TokenSequence>,
    /// The numbers of the sequences of each row.
    rows: Vec<Vec<usize>>,
    options: PackOptions,
}

/// Rows are filled up to their length, so it must be one that memory can hold; no model's context is as long.
const MAX_LENGTH: usize = 1 << 24;

impl PackedSequences {
    /// Packs `sequences`; empty ones are left out.
    ///
    /// # Errors
    /// If the length is 0 or above 16 Mi, or a sequence is longer and [`Overlong::Refuse`] stands.
    pub fn new(sequences: Vec<TokenSequence>, options: PackOptions) -> Result<Self> {
        if !(1..=MAX_LENGTH).contains(&options.length) {
            return Err(Error::argument("pack", format!("rows may have 1 to {MAX_LENGTH} tokens, not {}", options.length)));
        }
        let sequences = fit(sequences, options)?;
        let rows = match options.packing {
            Packing::InOrder => in_order(&sequences, options.length),
            Packing::FirstFit => first_fit(&sequences, options.length),
        };
        Ok(Self { sequences, rows, options })
    }

    /// The part of all places that hold tokens, 0 to 1.
    pub fn density(&self) -> f64 {
        let tokens: usize = self.sequences.iter().map(TokenSequence::len).sum();
        tokens as f64 / (self.rows.len().max(1) as f64 * self.options.length as f64)
    }
}

/// Sequences none of which is empty or longer than a row.
fn fit(sequences: Vec<TokenSequence>, options: PackOptions) -> Result<Vec<TokenSequence>> {
    let (length, mut fitting) = (options.length, Vec::with_capacity(sequences.len()));
    for (place, sequence) in sequences.into_iter().enumerate() {
        match options.overlong {
            _ if sequence.is_empty() => {}
            _ if sequence.len() <= length => fitting.push(sequence),
            Overlong::Refuse => {
                let problem = format!("sequence {place} has {} tokens, a row {length}; truncate or split it (Overlong)", sequence.len());
                return Err(Error::argument("pack", problem));
            }
            Overlong::Truncate => fitting.push(sequence.part(0, length)),
            Overlong::Split => {
                fitting.extend((0..sequence.len()).step_by(length).map(|from| sequence.part(from, from.saturating_add(length))))
            }
        }
    }
    Ok(fitting)
}

fn in_order(sequences: &[TokenSequence], length: usize) -> Vec<Vec<usize>> {
    let (mut rows, mut room): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
    for (number, sequence) in sequences.iter().enumerate() {
        match rows.last_mut().filter(|_| sequence.len() <= room) {
            Some(row) => row.push(number),
            None => {
                rows.push(vec![number]);
                room = length;
            }
        }
        room -= sequence.len();
    }
    rows
}

/// First fit by a tree of the most room in each range of rows: O(n log n).
fn first_fit(sequences: &[TokenSequence], length: usize) -> Vec<Vec<usize>> {
    let leaves = sequences.len().next_power_of_two();
    // Node i has the children 2i and 2i + 1; rows are the leaves, and those not in use are empty rows.
    let mut room = vec![length; 2 * leaves];
    let mut rows: Vec<Vec<usize>> = Vec::new();
    for (number, sequence) in sequences.iter().enumerate() {
        let mut node = 1;
        while node < leaves {
            node = if room[2 * node] >= sequence.len() { 2 * node } else { 2 * node + 1 };
        }
        let row = node - leaves;
        if row == rows.len() {
            rows.push(Vec::new());
        }
        rows[row].push(number);
        room[node] -= sequence.len();
        while node > 1 {
            node /= 2;
            room[node] = room[2 * node].max(room[2 * node + 1]);
        }
    }
    rows
}

impl Dataset for PackedSequences {
    type Batch = PackedBatch;

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn batch(&self, indices: &[usize], _: &mut Rng) -> Result<PackedBatch> {
        check_indices(indices, self.len())?;
        let [mut inputs, mut targets, mut positions, mut segments] = [const { Vec::new() }; 4];
        for (row, &index) in indices.iter().enumerate() {
            for (segment, &number) in (0..).zip(&self.rows[index]) {
                let sequence = &self.sequences[number];
                inputs.extend(sequence.tokens().iter().map(|&token| i64::from(token)));
                targets.extend(sequence.targets());
                positions.extend(0..sequence.len() as i64);
                segments.extend(std::iter::repeat_n(segment, sequence.len()));
            }
            let end = (row + 1) * self.options.length;
            positions.extend(0..(end - positions.len()) as i64);
            inputs.resize(end, i64::from(self.options.pad));
            targets.resize(end, IGNORE_INDEX);
            segments.resize(end, -1i64);
        }
        let tensor = |values: Vec<i64>| Tensor::from_vec(values, [indices.len(), self.options.length]);
        Ok(PackedBatch { inputs: tensor(inputs)?, targets: tensor(targets)?, positions: tensor(positions)?, segments: tensor(segments)? })
    }
}
