//! Normalisation, forward and backward: over rows (layer norm, RMS norm) and over channels (batch, group, instance norm).
//! Statistics are kept in f32 for f16, bf16 and f32, in f64 for f64.

mod channels;
mod rows;

pub use channels::{Channels, Grouping, Statistics, group_moments, normalize, normalize_backward};
pub use rows::{Rows, layer_norm, layer_norm_backward};

use super::lanes::{FloatElement, Lane};

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// Rows whose terms are summed in single lanes before they are added in f64.
const SUM_ROWS: usize = 128;

/// A parameter vector as lanes, or `n` times its default if there is none.
fn parameter<T: FloatElement>(values: Option<&[T]>, n: usize, default: T::Lane) -> Vec<T::Lane> {
    match values {
        Some(values) => {
            assert_eq!(values.len(), n);
            values.iter().map(|x| x.to_lane()).collect()
        }
        None => vec![default; n],
    }
}

/// Adds lanes to f64 totals and empties them.
#[inline(always)]
fn flush<L: Lane<Wide = f64>>(part: &mut [L], totals: &mut [f64]) {
    for (total, x) in totals.iter_mut().zip(part) {
        *total += std::mem::take(x).wide();
    }
}

#[cfg(test)]
mod tests;
