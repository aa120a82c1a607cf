//! Positions that are neither learned nor turned: a bias for each distance between two tokens, and sines of each place.

use super::block::NormalInit;
use super::context::{Extent, Visible};
use crate::nn::{Embedding, Module, Params};
use kiln_tensor::{Error, Result, Tensor};
use std::sync::{Mutex, PoisonError};

/// What is added to each head's scores for the distance between query and key, of which far ones share buckets.
///
/// Source: Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2020, section 2.1.
pub(super) struct RelativeBias {
    /// (buckets, nh)
    table: Embedding,
    buckets: usize,
    max_distance: usize,
    /// Whether keys after the query have buckets of their own.
    bidirectional: bool,
}

/// The extents of a [`RelativeBias`].
#[derive(Clone, Copy)]
pub(super) struct Buckets {
    pub buckets: usize,
    pub max_distance: usize,
    pub heads: usize,
    pub bidirectional: bool,
}

impl RelativeBias {
    pub fn new(params: &Params, extents: Buckets, init: NormalInit) -> Result<Self> {
        let Buckets { buckets, max_distance, heads, bidirectional } = extents;
        let exact = buckets / if bidirectional { 4 } else { 2 };
        if exact == 0 || max_distance <= exact {
            let message = format!("{buckets} buckets and a greatest distance of {max_distance}: at least 4, and more than {exact}");
            return Err(Error::argument("relative_position_bias", message));
        }
        Ok(Self { table: init.embedding(params, buckets, heads)?, buckets, max_distance, bidirectional })
    }

    /// The bucket of a key `distance` places after the query.
    fn bucket(&self, distance: i64) -> i64 {
        let (buckets, after, distance) = if self.bidirectional {
            let buckets = self.buckets as i64 / 2;
            (buckets, if distance > 0 { buckets } else { 0 }, distance.abs())
        } else {
            (self.buckets as i64, 0, (-distance).max(0))
        };
        let exact = buckets / 2;
        if distance < exact {
            return after + distance;
        }
        // In f32 like the reference, so that distances on a border fall into the same bucket.
        let share = (distance as f32 / exact as f32).ln() / ((self.max_distance as f64 / exact as f64).ln() as f32);
        after + (exact + (share * (buckets - exact) as f32) as i64).min(buckets - 1)
    }

    /// `visible` with the bias, (B or 1, nh, T, S).
    pub fn add_to(&self, visible: &Visible, extent: Extent) -> Result<Visible> {
        let (keys, past) = (extent.past + extent.added, extent.past);
        let places = (past..keys).flat_map(|query| (0..keys).map(move |key| (query, key)));
        let buckets: Vec<i64> = places.map(|(query, key)| self.bucket(key as i64 - query as i64)).collect();
        let buckets = Tensor::from_vec(buckets, [extent.added, keys])?.to_device(extent.device)?;
        let bias = self.table.forward(&buckets)?.permute(&[2, 0, 1])?.unsqueeze(0)?;
        let mask = match &visible.mask {
            Some(mask) => bias.masked_fill(&mask.logical_not()?, f64::NEG_INFINITY)?,
            None => bias,
        };
        Ok(Visible { mask: Some(mask), causal: visible.causal })
    }
}

/// Sines and cosines of each place, computed: the first half of a row sin(p ω), the second cos(p ω), ω = 10000^(−i/(C/2 − 1)).
///
/// Sources: Vaswani et al., *Attention Is All You Need*, 2017, in the form of tensor2tensor and fairseq.
pub(super) struct Sinusoids {
    width: usize,
    /// The token of padding, which has no place: its row is 0, and places count from the next.
    padding: i64,
    table: Mutex<Option<Tensor>>,
}

impl Sinusoids {
    pub fn new(width: usize, padding: i64) -> Self {
        Self { width, padding, table: Mutex::new(None) }
    }

    /// (B, T, C) for tokens (B, T) after `past` others, of `like`'s dtype and device.
    pub fn forward(&self, tokens: &Tensor, past: usize, like: &Tensor) -> Result<Tensor> {
        let ids: Vec<i64> = tokens.to_vec()?;
        let mut rows = Vec::with_capacity(ids.len());
        for sequence in ids.chunks_exact(tokens.dim(1)?.max(1)) {
            let mut place = self.padding + past as i64;
            for &token in sequence {
                let is_real = token != self.padding;
                place += is_real as i64;
                rows.push(if is_real { place } else { self.padding });
            }
        }
        let furthest = rows.iter().copied().max().unwrap_or(0) as usize;
        let rows = Tensor::from_vec(rows, tokens.shape().dims())?.to_device(like.device())?;
        rows.embedding(&self.upto(furthest + 1, like)?)
    }

    /// The table of the places below `len` at least.
    fn upto(&self, len: usize, like: &Tensor) -> Result<Tensor> {
        let mut kept = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(table) if table.dim(0)? >= len && table.dtype() == like.dtype() && table.device() == like.device() => Ok(table.clone()),
            _ => {
                let table = self.make(len.next_power_of_two().max(64))?.to_dtype(like.dtype())?.to_device(like.device())?;
                Ok(kept.insert(table).clone())
            }
        }
    }

    fn make(&self, len: usize) -> Result<Tensor> {
        let half = self.width / 2;
        // Angles in f32 like the reference, whose rounding the weights were trained with.
        let step = -(10_000f64.ln() / (half as f64 - 1.0)) as f32;
        let frequencies: Vec<f32> = (0..half).map(|i| (i as f32 * step).exp()).collect();
        let mut table = Vec::with_capacity(len * self.width);
        for place in 0..len {
            if place as i64 == self.padding {
                table.resize(table.len() + self.width, 0f32);
                continue;
            }
            let angles = || frequencies.iter().map(|f| place as f32 * f);
            table.extend(angles().map(f32::sin));
            table.extend(angles().map(f32::cos));
            table.resize(table.len() + self.width % 2, 0.0);
        }
        Tensor::from_vec(table, [len, self.width])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_the_reference() -> Result<()> {
        // `T5Attention._relative_position_bucket` of transformers, at these distances.
        let make = |bidirectional, buckets, max_distance| {
            RelativeBias::new(&Params::new(), Buckets { buckets, max_distance, heads: 1, bidirectional }, NormalInit(1.0))
        };
        let at = |bias: &RelativeBias| [-130, -128, -64, -20, -8, -7, -1, 0, 1, 7, 8, 20, 64, 130].map(|distance| bias.bucket(distance));
        assert_eq!(at(&make(true, 32, 128)?), TWO_SIDED);
        assert_eq!(at(&make(false, 32, 128)?), ONE_SIDED);
        assert!(make(true, 2, 128).is_err() && make(false, 32, 16).is_err());
        Ok(())
    }

    const TWO_SIDED: [i64; 14] = [15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 30, 31];
    const ONE_SIDED: [i64; 14] = [31, 31, 26, 17, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0];
}
