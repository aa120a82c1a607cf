//! Scaled dot-product attention without the matrix of scores: `softmax(scale · Q·Kᵀ + mask) · V` block by block, forward
//! ([`forward`]) and backward ([`backward`]). Memory beside inputs and outputs grows with the rows of Q and K only.
//!
//! Source: Dao, *FlashAttention-2*, 2023. A block of scores is a product of the micro-kernels that all matrix products use; it stays in the
//! second-level cache until the block of values has been multiplied by it. f16 and bf16 are widened as blocks are loaded (or multiplied in pairs, see
//! [`entries`]), and results are rounded once. Blocks and tasks depend on shapes only, and all sums have a fixed order.

mod backward;
mod block;
mod entries;
mod few;
mod forward;
mod online;
#[cfg(test)]
mod tests;

pub use backward::{Gradients, backward};
pub use forward::forward;

use crate::cpu::cast::Stored;
use crate::cpu::gemm::dot::Lanes;
use crate::cpu::gemm::micro::MicroKernels;
use crate::cpu::random::Dropout;
use crate::cpu::simd::Simd;
use crate::element::{Bool, Element, Float};
use crate::view::MatView;
use entries::{Entries, Pairs, Single};
use half::{bf16, f16};
use std::ops::Range;

/// Scores are computed in units of it, so that weights are powers of two.
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// An element type of attention: f32, f16, bf16.
pub trait Attended: Float<Compute = f32> + Stored<Compute = f32> + Lanes {
    /// What products are made of where [`multiplies_pairs`](Self::multiplies_pairs) is true, and single values otherwise.
    type Pairs: Entries<Self>;

    /// Whether this process multiplies pairs of such values faster.
    fn multiplies_pairs() -> bool {
        false
    }
}

impl Attended for f32 {
    type Pairs = Single;
}

impl Attended for f16 {
    type Pairs = Single;
}

impl Attended for bf16 {
    type Pairs = Pairs;

    fn multiplies_pairs() -> bool {
        MicroKernels::has_bf16_pairs()
    }
}

/// One matrix a head: of queries, keys, values or masks.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a, T> {
    /// Extents and strides of each.
    pub view: MatView<'a, T>,
    /// Where each begins, relative to the view.
    pub offsets: &'a [usize],
}

impl<'a, T: Element> Heads<'a, T> {
    /// Matrix `i`, from its first element on.
    fn matrix(&self, i: usize) -> MatView<'a, T> {
        let Self { view, offsets } = self;
        let data = view.data().get(offsets[i]..).unwrap_or(&[]);
        let matrix = MatView::new(data, view.rows(), view.cols(), view.row_stride(), view.col_stride());
        assert!(matrix.is_some(), "a head leaves its data");
        matrix.unwrap_or(*view)
    }

    fn count(&self) -> usize {
        self.offsets.len()
    }
}

/// The logarithm, to base 2, of a sum of exponentials: the largest exponent, and the logarithm of the sum of the powers relative to it. In one number
/// the second would be lost beside a large first, and with it the weights that the backward pass computes again.
pub type LogSum = [f32; 2];

/// That of no exponentials, as which it makes all weights zero.
const NO_KEYS: LogSum = [f32::INFINITY, 0.0];

/// Which keys a query looks at, an L×S matrix a query head.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a, T> {
    /// True where it may.
    Open(Heads<'a, Bool>),
    /// Added to the scores.
    Bias(Heads<'a, T>),
}

/// The inputs.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a, T> {
    /// Queries, L×E.
    pub q: Heads<'a, T>,
    /// Keys, S×E. If there are fewer than query heads, as many neighbouring query heads share each.
    pub k: Heads<'a, T>,
    /// Values, S×V, as many as keys.
    pub v: Heads<'a, T>,
    /// Besides `causal`; both must allow a key.
    pub mask: Option<Mask<'a, T>>,
    /// Query i looks at the keys 0 to i only.
    pub causal: bool,
    /// Factor of the scores.
    pub scale: f32,
    /// Applied to the weights: they are elements in row-major order, `[heads][L][S]`.
    pub dropout: Option<Dropout>,
}

/// The extents.
#[derive(Clone, Copy, Debug)]
struct Extents {
    /// Query heads.
    heads: usize,
    /// Query heads that share a key head.
    group: usize,
    /// Queries of a head.
    queries: usize,
    /// Keys of a head.
    keys: usize,
    /// Values of a query or key.
    width: usize,
    /// Values of a value.
    value_width: usize,
}

impl<T: Attended> Attention<'_, T> {
    /// # Panics
    /// If the inputs do not fit together.
    fn extents(&self) -> Extents {
        let Self { q, k, v, mask, .. } = self;
        let heads = q.count();
        assert!(k.count() == v.count() && heads.checked_rem(k.count()).unwrap_or(heads) == 0, "heads");
        assert!(q.view.cols() == k.view.cols() && k.view.rows() == v.view.rows(), "extents of queries, keys and values");
        let (queries, keys) = (q.view.rows(), k.view.rows());
        let fits = |rows: usize, cols: usize, count: usize| (rows, cols, count) == (queries, keys, heads);
        assert!(
            match mask {
                Some(Mask::Open(m)) => fits(m.view.rows(), m.view.cols(), m.count()),
                Some(Mask::Bias(m)) => fits(m.view.rows(), m.view.cols(), m.count()),
                None => true,
            },
            "mask"
        );
        Extents { heads, group: heads / k.count().max(1), queries, keys, width: q.view.cols(), value_width: v.view.cols() }
    }

    /// How many of `keys` the queries up to `query` look at.
    fn reach(&self, query: usize, keys: &Range<usize>) -> usize {
        if self.causal { (query + 1).clamp(keys.start, keys.end) - keys.start } else { keys.len() }
    }

    /// What scores are multiplied by to be in units of log₂ e: as they are summed, and when the largest is subtracted, which costs nothing. Nothing may be
    /// left for then if a mask is added in between, or if the largest would not stay the largest.
    fn units(&self) -> [f32; 2] {
        let unit = self.scale * LOG2_E;
        if self.mask.is_none() && unit > 0.0 && unit.is_finite() { [1.0, unit] } else { [unit, 1.0] }
    }

    /// Multiplies values that belong to the weights of a query, for the keys from `first` on, by what dropout multiplies these by.
    #[inline(always)]
    fn drop<S: Simd>(&self, s: S, x: &Extents, head: usize, query: usize, first: usize, values: &mut [f32]) {
        const CHUNK: usize = 256;
        let Some(dropout) = self.dropout else { return };
        let row = (head * x.queries + query) * x.keys + first;
        for (i, values) in values.chunks_mut(CHUNK).enumerate() {
            let mut factors = [0.0; CHUNK];
            let factors = &mut factors[..values.len()];
            dropout.factors(s, row + i * CHUNK, factors);
            values.iter_mut().zip(factors).for_each(|(x, &mut factor)| *x *= factor);
        }
    }

    /// Puts the mask of `query` on its scores, in units of log₂ e, for the keys from `first` on.
    fn mask_scores(&self, head: usize, query: usize, first: usize, scores: &mut [f32]) {
        match self.mask {
            None => {}
            Some(Mask::Open(mask)) => {
                let mask = mask.matrix(head);
                let row = &mask.data()[query * mask.row_stride() + first * mask.col_stride()..];
                for (j, score) in scores.iter_mut().enumerate() {
                    if !row[j * mask.col_stride()].get() {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
            Some(Mask::Bias(mask)) => {
                let mask = mask.matrix(head);
                let row = &mask.data()[query * mask.row_stride() + first * mask.col_stride()..];
                for (j, score) in scores.iter_mut().enumerate() {
                    let bias = row[j * mask.col_stride()].widen();
                    // An infinity or NaN under a shut key must not get through. The least number is no infinity in other units either: a query whose
                    // keys all have it looks at all of them.
                    *score = match bias.is_infinite() {
                        true if bias < 0.0 => bias,
                        true => *score + bias,
                        false => *score + (bias * LOG2_E).clamp(f32::MIN / 2.0, f32::MAX / 2.0),
                    };
                }
            }
        }
    }
}
