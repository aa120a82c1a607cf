//! Sequences of different lengths as a batch, filled up with padding.

use crate::data::dataset::{Dataset, check_indices};
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result, Tensor};

/// The target of a place that nothing is predicted at: what `cross_entropy` ignores by default, as PyTorch's.
pub const IGNORE_INDEX: i64 = -100;

/// Tokens, and for each whether it is to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenSequence {
    tokens: Vec<u32>,
    mask: Option<Vec<bool>>,
}

impl TokenSequence {
    /// A sequence of which every token is to be predicted from those before it.
    pub fn new(tokens: Vec<u32>) -> Self {
        Self { tokens, mask: None }
    }

    /// A sequence of which the tokens with `mask` are to be predicted: an assistant's answers, or a completion.
    ///
    /// # Errors
    /// If there are not as many of both.
    pub fn masked(tokens: Vec<u32>, mask: Vec<bool>) -> Result<Self> {
        if tokens.len() != mask.len() {
            return Err(Error::argument("token_sequence", format!("{} tokens have a mask of {}", tokens.len(), mask.len())));
        }
        Ok(Self { tokens, mask: Some(mask) })
    }

    /// A prompt and its completion, of which only the completion is to be predicted.
    pub fn completion(prompt: &[u32], completion: &[u32]) -> Self {
        let mask = [vec![false; prompt.len()], vec![true; completion.len()]].concat();
        Self { tokens: [prompt, completion].concat(), mask: Some(mask) }
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Whether the token at `place` is to be predicted.
    pub fn learns(&self, place: usize) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask.get(place).copied().unwrap_or(false))
    }

    /// The first `length` tokens, or all if there are fewer.
    pub fn truncated(&self, length: usize) -> Self {
        self.part(0, length)
    }

    /// The tokens `from..to` (as far as there are such) with their mask.
    pub(super) fn part(&self, from: usize, to: usize) -> Self {
        let to = to.min(self.len());
        let from = from.min(to);
        Self { tokens: self.tokens[from..to].to_vec(), mask: self.mask.as_ref().map(|mask| mask[from..to].to_vec()) }
    }

    /// The token after each, or [`IGNORE_INDEX`] if that one is not to be predicted or there is none.
    pub(super) fn targets(&self) -> impl Iterator<Item = i64> {
        let next = |place: usize| self.tokens.get(place).filter(|_| self.learns(place)).map_or(IGNORE_INDEX, |&token| i64::from(token));
        (1..=self.len()).map(next)
    }
}

/// On which side of a sequence the padding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PaddingSide {
    /// Before it, so that all sequences end at the same place: for generation.
    Left,
    /// After it: for training.
    #[default]
    Right,
}

/// Sequences of different lengths, T being the longest one's.
#[derive(Clone, Debug)]
pub struct PaddedBatch {
    /// Tokens and padding, i64 (B, T).
    pub inputs: Tensor,
    /// The token after each, i64 (B, T), or [`IGNORE_INDEX`].
    pub targets: Tensor,
    /// True for tokens, false for padding: bool (B, T), the `key_mask` of a model's pass.
    pub key_mask: Tensor,
    /// Each sequence's tokens.
    pub lengths: Vec<usize>,
}

/// A batch of `sequences`, filled up with the token `pad`.
///
/// ```
/// use kiln_models::data::{IGNORE_INDEX, PaddingSide, TokenSequence, pad_sequences};
/// let sequences = [TokenSequence::completion(&[5, 6], &[7]), TokenSequence::new(vec![8, 9])];
/// let batch = pad_sequences(&sequences, 0, PaddingSide::Left)?;
/// assert_eq!(batch.inputs.to_vec::<i64>()?, [5, 6, 7, 0, 8, 9]);
/// assert_eq!(batch.targets.to_vec::<i64>()?, [IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX, 9, IGNORE_INDEX]);
/// assert_eq!(batch.key_mask.to_vec::<bool>()?, [true, true, true, false, true, true]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
///
/// # Errors
/// If there is no sequence, or one of them is empty.
pub fn pad_sequences(sequences: &[TokenSequence], pad: u32, side: PaddingSide) -> Result<PaddedBatch> {
    pad_all(&sequences.iter().collect::<Vec<_>>(), pad, side)
}

fn pad_all(sequences: &[&TokenSequence], pad: u32, side: PaddingSide) -> Result<PaddedBatch> {
    if let Some(place) = sequences.iter().position(|sequence| sequence.is_empty()) {
        return Err(Error::argument("pad_sequences", format!("sequence {place} is empty")));
    }
    let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.len()).collect();
    let longest = lengths.iter().copied().max().ok_or_else(|| Error::argument("pad_sequences", "there is no sequence"))?;
    let (mut inputs, mut targets, mut mask) = (Vec::new(), Vec::new(), Vec::new());
    for sequence in sequences {
        let missing = longest - sequence.len();
        let (before, after) = if side == PaddingSide::Left { (missing, 0) } else { (0, missing) };
        let around = |value, middle: &mut dyn Iterator<Item = i64>, out: &mut Vec<i64>| {
            out.extend(std::iter::repeat_n(value, before));
            out.extend(middle);
            out.extend(std::iter::repeat_n(value, after));
        };
        around(i64::from(pad), &mut sequence.tokens.iter().map(|&token| i64::from(token)), &mut inputs);
        around(IGNORE_INDEX, &mut sequence.targets(), &mut targets);
        mask.extend((0..longest).map(|place| (before..longest - after).contains(&place)));
    }
    let extents = [sequences.len(), longest];
    let (inputs, targets) = (Tensor::from_vec(inputs, extents)?, Tensor::from_vec(targets, extents)?);
    Ok(PaddedBatch { inputs, targets, key_mask: Tensor::from_vec(mask, extents)?, lengths })
}

/// A data set of sequences whose batches are [padded](pad_sequences).
#[derive(Clone, Debug)]
pub struct PaddedSequences {
    sequences: Vec<TokenSequence>,
    pad: u32,
    side: PaddingSide,
}

impl PaddedSequences {
    /// A data set of `sequences`.
    ///
    /// # Errors
    /// If one is empty.
    pub fn new(sequences: Vec<TokenSequence>, pad: u32, side: PaddingSide) -> Result<Self> {
        match sequences.iter().position(TokenSequence::is_empty) {
            Some(place) => Err(Error::argument("padded_sequences", format!("sequence {place} is empty"))),
            None => Ok(Self { sequences, pad, side }),
        }
    }

    /// The sequences.
    pub fn sequences(&self) -> &[TokenSequence] {
        &self.sequences
    }
}

impl Dataset for PaddedSequences {
    type Batch = PaddedBatch;

    fn len(&self) -> usize {
        self.sequences.len()
    }

    fn batch(&self, indices: &[usize], _: &mut Rng) -> Result<PaddedBatch> {
        check_indices(indices, self.len())?;
        let chosen: Vec<&TokenSequence> = indices.iter().map(|&index| &self.sequences[index]).collect();
        pad_all(&chosen, self.pad, self.side)
    }
}
