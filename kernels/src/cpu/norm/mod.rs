//! Normalisation, forward and backward: over rows (layer norm, RMS norm) and over channels (batch, group, instance norm).
//! Statistics are kept in f32 for f16, bf16 and f32, in f64 for f64.

mod channels;
mod rows;
mod samples;

pub use channels::{Activated, Channels, Grouping, Statistics, group_moments, normalize, normalize_backward};
pub use rows::{Rows, layer_norm, layer_norm_backward};

use super::cast::Stored;
use super::lanes::{FloatElement, Lane};
use super::pointwise::apply_stretch;
use crate::pointwise::{Params, Row};

/// A function that follows a normalisation in the same pass, rounded as a pass of its own would round it.
#[derive(Clone, Copy, Debug)]
pub struct Activation {
    /// The function.
    pub row: &'static Row<1>,
    /// Its derivative: of what the function reads, and of the gradient.
    pub backward: &'static Row<2>,
    /// The parameters of both.
    pub params: Params,
}

impl Activation {
    /// The function of all elements, in place.
    fn apply<T: Stored>(&self, y: &mut [T]) {
        // SAFETY: both pointers are those of the slice.
        unsafe { apply_stretch(self.row, self.params, [y.as_ptr()], y.as_mut_ptr(), y.len()) }
    }

    /// The gradient of what the function read, `z`, in its place.
    fn gradient<T: Stored>(&self, z: &mut [T], g: &[T]) {
        assert_eq!(z.len(), g.len());
        // SAFETY: both slices have this many elements.
        unsafe { apply_stretch(self.backward, self.params, [z.as_ptr(), g.as_ptr()], z.as_mut_ptr(), z.len()) }
    }
}

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// As much for rows, with what each costs beyond its elements: a few microseconds, so that all threads get their share.
const ROWS_TASK: usize = 1 << 14;
const ROW_COST: usize = 32;

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
