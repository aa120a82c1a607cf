//! Windows of one long token vector: what a language model is pre-trained on.

use crate::data::dataset::{Dataset, check_indices};
use crate::data::rng::Rng;
use kiln_tensor::{Error, Result, Tensor};
use std::sync::Arc;

/// Inputs and what follows each of them.
#[derive(Clone, Debug)]
pub struct TokenBatch {
    /// Tokens, i64 (B, T).
    pub inputs: Tensor,
    /// The token after each, i64 (B, T).
    pub targets: Tensor,
}

/// Windows of T + 1 tokens of a long vector: T inputs, and the same shifted by one as targets.
///
/// ```
/// use kiln_models::data::{Dataset, Rng, TokenBlocks};
/// let blocks = TokenBlocks::consecutive((0..10).collect::<Vec<u32>>(), 4)?;
/// let batch = blocks.batch(&[1], &mut Rng::new(0))?;
/// assert_eq!((blocks.len(), batch.inputs.to_vec::<i64>()?), (2, vec![4, 5, 6, 7]));
/// assert_eq!(batch.targets.to_vec::<i64>()?, [5, 6, 7, 8]);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenBlocks {
    tokens: Arc<[u32]>,
    block: usize,
    /// How many random windows are an epoch; `None` for consecutive ones.
    random: Option<usize>,
}

impl TokenBlocks {
    /// Windows that lie one after the other: each token is a target once in an epoch, but the first and those of an incomplete last window.
    ///
    /// # Errors
    /// If `block` is 0 or there are not `block` + 1 tokens.
    pub fn consecutive(tokens: impl Into<Arc<[u32]>>, block: usize) -> Result<Self> {
        Self::new(tokens.into(), block, None)
    }

    /// Windows that start anywhere; an epoch are `windows` of them. Where they start is drawn from the batch's random numbers, so that a
    /// resumed loader goes on with the same ones.
    ///
    /// # Errors
    /// As [`consecutive`](TokenBlocks::consecutive).
    pub fn random(tokens: impl Into<Arc<[u32]>>, block: usize, windows: usize) -> Result<Self> {
        Self::new(tokens.into(), block, Some(windows))
    }

    fn new(tokens: Arc<[u32]>, block: usize, random: Option<usize>) -> Result<Self> {
        if block == 0 || tokens.len() <= block {
            let problem =
                format!("{} tokens have no window of {block} and the one after it; take a shorter window or a longer text", tokens.len());
            return Err(Error::argument("token_blocks", problem));
        }
        Ok(Self { tokens, block, random })
    }

    /// The tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// T: the inputs of a window.
    pub fn block(&self) -> usize {
        self.block
    }
}

impl Dataset for TokenBlocks {
    type Batch = TokenBatch;

    fn len(&self) -> usize {
        // `new` has seen to it that there is a window and that it is not empty.
        self.random.unwrap_or((self.tokens.len() - 1) / self.block)
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<TokenBatch> {
        check_indices(indices, self.len())?;
        let (mut inputs, mut targets) = (Vec::new(), Vec::new());
        for index in indices {
            let start = match self.random {
                Some(_) => rng.below(self.tokens.len() - self.block),
                None => index * self.block,
            };
            let window = self.tokens[start..=start + self.block].iter().map(|&token| i64::from(token));
            inputs.extend(window.clone().take(self.block));
            targets.extend(window.skip(1));
        }
        let extents = [indices.len(), self.block];
        Ok(TokenBatch { inputs: Tensor::from_vec(inputs, extents)?, targets: Tensor::from_vec(targets, extents)? })
    }
}
