//! Normalisation, forward and backward: over rows (layer norm, RMS norm) and over channels (batch, group, instance norm).
//! Statistics are kept in f32 for f16, bf16 and f32, in f64 for f64. See [`cpu::norm`](crate::cpu::norm) for the formulas.

mod channels;
mod rows;

pub use crate::cpu::norm::{Channels, Grouping, Rows};
pub use channels::{Statistics, group_moments, normalize, normalize_backward};
pub use rows::{layer_norm, layer_norm_backward};

use super::memory::{DevicePtr, Slice, SliceMut, Type};
use super::softmax::divisor;

/// The address of a parameter of `n` elements of type `ty`, or none.
fn parameter(values: Option<&Slice<'_>>, ty: Type, n: usize) -> DevicePtr {
    values.map_or(DevicePtr::NULL, |values| {
        assert!(values.ty() == ty && values.len() == n, "a parameter of the input's type, with one value for each place");
        values.ptr()
    })
}

/// The address of a parameter's gradient, or none.
fn gradient(values: Option<&SliceMut<'_>>, ty: Type, n: usize) -> DevicePtr {
    values.map_or(DevicePtr::NULL, |values| {
        assert!(values.ty() == ty && values.len() == n, "a gradient of the input's type, with one value for each place");
        values.ptr()
    })
}

#[cfg(test)]
mod tests;
