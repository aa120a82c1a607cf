//! Texts with hidden tokens that a model is to find again: BERT's pre-training.

use super::padded::{IGNORE_INDEX, PaddingSide, TokenSequence, pad_sequences};
use crate::data::dataset::{Dataset, check_indices};
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result, Tensor};

/// How [`MaskedSequences`] hides tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct MaskOptions {
    /// The token that stands for a hidden one, `[MASK]`.
    pub mask: u32,
    /// The token that fills up a batch.
    pub pad: u32,
    /// Tokens that are never hidden: `[CLS]`, `[SEP]`, ….
    pub special: Vec<u32>,
    /// Tokens that a random one is drawn from: those below this number.
    pub vocab_size: usize,
    /// The share of tokens that are to be found.
    pub probability: f32,
    /// The share of these that is replaced by `mask`.
    pub mask_share: f32,
    /// The share of these that is replaced by a random token. What remains stays as it is.
    pub random_share: f32,
}

impl MaskOptions {
    /// BERT's shares: 15 % are to be found; of these 80 % are hidden, 10 % are random and 10 % are as they were.
    pub fn bert(mask: u32, pad: u32, special: Vec<u32>, vocab_size: usize) -> Self {
        Self { mask, pad, special, vocab_size, probability: 0.15, mask_share: 0.8, random_share: 0.1 }
    }

    fn check(&self) -> Result<()> {
        let Self { probability, mask_share, random_share, vocab_size, .. } = *self;
        let is_share = |x: f32| (0.0..=1.0).contains(&x);
        if !is_share(probability) || !is_share(mask_share) || !is_share(random_share) || mask_share + random_share > 1.0 + 1e-6 {
            let shares = format!("probability {probability}, mask_share {mask_share} and random_share {random_share}");
            return Err(Error::argument("masked_sequences", format!("{shares} must be from 0 to 1, and the last two 1 together at most")));
        }
        if vocab_size == 0 {
            return Err(Error::argument("masked_sequences", "vocab_size is 0: there is no random token to draw"));
        }
        Ok(())
    }
}

/// Sequences with hidden tokens, T being the longest one's length.
#[derive(Clone, Debug)]
pub struct MaskedBatch {
    /// Tokens, some of them hidden, and padding: i64 (B, T).
    pub inputs: Tensor,
    /// The tokens to be found, i64 (B, T); [`IGNORE_INDEX`] elsewhere.
    pub targets: Tensor,
    /// True for tokens, false for padding: bool (B, T).
    pub key_mask: Tensor,
}

/// A data set of sequences some of whose tokens are hidden, others in each epoch (Devlin et al., *BERT*, 2019, section 3.1; which
/// ones is drawn from the batch's random numbers). At least one of each sequence is to be found.
///
/// ```
/// use kiln_models::data::{Dataset, MaskOptions, MaskedSequences, Rng};
/// let options = MaskOptions::bert(1, 0, vec![2, 3], 10);
/// let texts = MaskedSequences::new(vec![vec![2, 7, 3], vec![2, 8, 9, 7, 3]], options)?;
/// let batch = texts.batch(&[0, 1], &mut Rng::new(0))?;
/// assert_eq!(batch.inputs.dims(), [2, 5]);
/// assert_eq!(batch.targets.to_vec::<i64>()?[..5], [-100, 7, -100, -100, -100]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MaskedSequences {
    sequences: Vec<Vec<u32>>,
    options: MaskOptions,
}

impl MaskedSequences {
    /// A data set of those `sequences` that have a token to hide; the others are left out.
    ///
    /// # Errors
    /// If a share is out of its domain, or no sequence has a token to hide.
    pub fn new(mut sequences: Vec<Vec<u32>>, options: MaskOptions) -> Result<Self> {
        options.check()?;
        sequences.retain(|tokens| tokens.iter().any(|token| !options.special.contains(token)));
        if sequences.is_empty() {
            return Err(Error::argument("masked_sequences", "no text has a token that could be hidden"));
        }
        Ok(Self { sequences, options })
    }

    /// What stands in place of the tokens, and what is to be found.
    fn hide(&self, tokens: &[u32], rng: &mut Rng) -> (Vec<u32>, Vec<i64>) {
        let MaskOptions { mask, vocab_size, probability, mask_share, random_share, .. } = self.options;
        let places: Vec<usize> = (0..tokens.len()).filter(|&i| !self.options.special.contains(&tokens[i])).collect();
        let mut chosen: Vec<usize> = places.iter().copied().filter(|_| rng.uniform() < probability).collect();
        if chosen.is_empty() {
            chosen.extend(places.get(rng.below(places.len())));
        }
        let (mut inputs, mut targets) = (tokens.to_vec(), vec![IGNORE_INDEX; tokens.len()]);
        for place in chosen {
            targets[place] = i64::from(tokens[place]);
            let (draw, random) = (rng.uniform(), rng.below(vocab_size) as u32);
            if draw < mask_share {
                inputs[place] = mask;
            } else if draw < mask_share + random_share {
                inputs[place] = random;
            }
        }
        (inputs, targets)
    }
}

impl Dataset for MaskedSequences {
    type Batch = MaskedBatch;

    fn len(&self) -> usize {
        self.sequences.len()
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<MaskedBatch> {
        check_indices(indices, self.len())?;
        let (inputs, hidden): (Vec<_>, Vec<_>) = indices.iter().map(|&index| self.hide(&self.sequences[index], rng)).unzip();
        let inputs: Vec<TokenSequence> = inputs.into_iter().map(TokenSequence::new).collect();
        let padded = pad_sequences(&inputs, self.options.pad, PaddingSide::Right)?;
        let width = padded.inputs.dim(1)?;
        let targets = hidden.into_iter().flat_map(|row| row.into_iter().chain(std::iter::repeat(IGNORE_INDEX)).take(width)).collect();
        let targets = Tensor::from_vec::<i64>(targets, [indices.len(), width])?;
        Ok(MaskedBatch { inputs: padded.inputs, targets, key_mask: padded.key_mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: usize = 1000;

    fn batch(options: MaskOptions) -> (Vec<i64>, Vec<i64>, Vec<i64>) {
        // [CLS] 200 words [SEP], with other words in each text.
        let text = |i: u32| [2].into_iter().chain((0..200).map(|j| 10 + (i * 37 + j * 11) % 900)).chain([3]).collect::<Vec<u32>>();
        let texts: Vec<Vec<u32>> = (0..100).map(text).collect();
        let all: Vec<usize> = (0..100).collect();
        let masked = MaskedSequences::new(texts.clone(), options).unwrap().batch(&all, &mut Rng::new(5)).unwrap();
        let before = texts.into_iter().flatten().map(i64::from).collect();
        (before, masked.inputs.to_vec().unwrap(), masked.targets.to_vec().unwrap())
    }

    #[test]
    fn the_shares_are_berts() {
        let (before, inputs, targets) = batch(MaskOptions::bert(1, 0, vec![2, 3], VOCABULARY));
        let (mut found, mut hidden, mut kept) = (0.0, 0.0, 0.0);
        for ((&before, &input), &target) in before.iter().zip(&inputs).zip(&targets) {
            if target == IGNORE_INDEX {
                assert_eq!(before, input);
                continue;
            }
            assert!(target == before && before > 3);
            found += 1.0;
            hidden += f64::from(u8::from(input == 1));
            kept += f64::from(u8::from(input == before));
        }
        // Four standard deviations of 20,000 and of 3,000 draws.
        assert!((found / 20_000.0 - 0.15f64).abs() < 0.0101, "{found}");
        assert!((hidden / found - 0.8f64).abs() < 0.03 && (kept / found - 0.1f64).abs() < 0.022, "{hidden} {kept} {found}");
    }

    #[test]
    fn one_token_of_each_text_is_hidden_at_least() {
        let options = MaskOptions { probability: 0.0, ..MaskOptions::bert(1, 0, vec![2, 3], VOCABULARY) };
        let (_, _, targets) = batch(options);
        assert!(targets.chunks(202).all(|row| row.iter().filter(|&&target| target != IGNORE_INDEX).count() == 1));
    }

    #[test]
    fn texts_without_words_are_left_out() {
        let options = MaskOptions::bert(1, 0, vec![2, 3], VOCABULARY);
        let texts = MaskedSequences::new(vec![vec![2, 3], vec![], vec![2, 9, 3]], options.clone()).unwrap();
        assert_eq!(texts.len(), 1);
        assert!(texts.batch(&[1], &mut Rng::new(0)).is_err());
        assert!(MaskedSequences::new(vec![vec![2, 3]], options.clone()).is_err());
        assert!(MaskedSequences::new(vec![vec![9]], MaskOptions { random_share: 0.3, ..options.clone() }).is_err());
        assert!(MaskedSequences::new(vec![vec![9]], MaskOptions { vocab_size: 0, ..options }).is_err());
    }
}
