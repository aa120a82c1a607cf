//! What operations take: the arithmetic of each family, counted from shapes.

use crate::Shape;

/// Floating-point operations of an operation and the bytes that it has to move, for [`operation`](super::operation).
///
/// A multiply-add is two operations, any function of one element one, as is the custom. Bytes are those of the inputs, each read once, and of
/// the results, each written once, unless [`bytes`](Cost::bytes) says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cost {
    flop: Flop,
    bytes: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flop {
    Total(u64),
    PerElement(u64),
}

impl Cost {
    /// No arithmetic: elements are moved.
    pub const NONE: Cost = Cost::flops(0);

    /// `count` operations in all.
    pub const fn flops(count: u64) -> Cost {
        Cost { flop: Flop::Total(count), bytes: None }
    }

    /// `count` operations for each element of the results.
    pub const fn per_element(count: u64) -> Cost {
        Cost { flop: Flop::PerElement(count), bytes: None }
    }

    /// Moves this many bytes, reading and writing.
    pub const fn bytes(self, count: u64) -> Cost {
        Cost { bytes: Some(count), ..self }
    }

    pub(super) fn flop(&self, elements_written: u64) -> u64 {
        match self.flop {
            Flop::Total(count) => count,
            Flop::PerElement(count) => count * elements_written,
        }
    }

    pub(super) fn bytes_moved(&self) -> Option<u64> {
        self.bytes
    }
}

/// `batch` products of an m × k with a k × n matrix: 2·m·k·n each.
pub fn product(batch: usize, [m, k, n]: [usize; 3]) -> Cost {
    Cost::flops(2 * batch as u64 * m as u64 * k as u64 * n as u64)
}

/// A convolution, or either of its gradients: each of the weight's values meets each of the `narrow` image's positions (those of the image that
/// a convolution writes and a transposed one reads) once a sample.
pub fn convolution(weight: &Shape, samples: usize, positions: usize) -> Cost {
    Cost::flops(2 * weight.numel() as u64 * samples as u64 * positions as u64)
}

/// Attention of `batch` heads over the `pairs` of query and key that see each other: products of matrices (two forward, five backward) whose widths
/// of heads add up to `width`.
pub fn attention(batch: usize, pairs: usize, width: usize) -> Cost {
    Cost::flops(2 * batch as u64 * pairs as u64 * width as u64)
}
