//! The transforms of patches, taps and tiles of targets, a vector of channels at a time.

use super::{PATCH, SIDE};
use crate::cpu::simd::{F32s, Masks, Simd};

/// Larger magnitudes are not transformed. A product of transformed values is at most 16 times as large as 2⁹⁶, so that any sum of
/// fewer than 2²⁷ stays finite.
const LIMIT: f32 = (1u64 << 48) as f32;

/// Whether all values seen were small enough.
#[derive(Clone, Copy)]
pub(super) struct Check<S: Simd> {
    limit: S::F32,
    seen: <S::F32 as F32s>::Mask,
}

impl<S: Simd> Check<S> {
    #[inline(always)]
    pub fn new(s: S) -> Self {
        Self { limit: s.splat(LIMIT), seen: s.zero().le(s.zero()) }
    }

    #[inline(always)]
    pub fn see(&mut self, x: S::F32) {
        self.seen = self.seen & x.abs().le(self.limit);
    }

    #[inline(always)]
    pub fn passed(self) -> bool {
        !(!self.seen).any()
    }
}

/// A row of Bᵀ d.
#[inline(always)]
fn sources<V: F32s>([a, b, c, d]: [V; PATCH]) -> [V; PATCH] {
    [a - c, b + c, c - b, b - d]
}

/// A row of Aᵀ m.
#[inline(always)]
fn targets<V: F32s>([a, b, c, d]: [V; PATCH]) -> [V; SIDE] {
    [a + b + c, b - c - d]
}

/// A row of A y.
#[inline(always)]
fn spread<V: F32s>([a, b]: [V; SIDE]) -> [V; PATCH] {
    [a, a + b, a - b, -b]
}

/// The transforms of taps, with ½ in every lane.
#[derive(Clone, Copy)]
struct Taps<V>(V);

impl<V: F32s> Taps<V> {
    /// A row of G g.
    #[inline(always)]
    fn row(self, [a, b, c]: [V; 3]) -> [V; PATCH] {
        let (ends, middle) = ((a + c) * self.0, b * self.0);
        [a, ends + middle, ends - middle, c]
    }

    /// A row of Gᵀ u.
    #[inline(always)]
    fn back(self, [a, b, c, d]: [V; PATCH]) -> [V; 3] {
        let (sum, difference) = ((b + c) * self.0, (b - c) * self.0);
        [a + sum, difference, sum + d]
    }
}

/// A function of rows, along the columns and then along the rows. Not a function of a function: a closure's instructions are not sure to be
/// inlined where they are enabled.
macro_rules! both_ways {
    ($x:expr, $rows:literal -> $to:literal, $($f:tt)+) => {{
        let x = $x;
        let mut columns = [[x[0][0]; $to]; $rows];
        for j in 0..$rows {
            let mut column = [x[0][0]; $rows];
            for i in 0..$rows {
                column[i] = x[i][j];
            }
            columns[j] = $($f)+(column);
        }
        let mut out = [[x[0][0]; $to]; $to];
        for i in 0..$to {
            let mut row = [x[0][0]; $rows];
            for j in 0..$rows {
                row[j] = columns[j][i];
            }
            out[i] = $($f)+(row);
        }
        out
    }};
}

/// Bᵀ d B
#[inline(always)]
pub(super) fn of_sources<V: F32s>(d: [[V; PATCH]; PATCH]) -> [[V; PATCH]; PATCH] {
    both_ways!(d, 4 -> 4, sources)
}

/// G g Gᵀ
#[inline(always)]
pub(super) fn of_taps<V: F32s>(g: [[V; 3]; 3], half: V) -> [[V; PATCH]; PATCH] {
    both_ways!(g, 3 -> 4, Taps(half).row)
}

/// Aᵀ m A
#[inline(always)]
pub(super) fn to_targets<V: F32s>(m: [[V; PATCH]; PATCH]) -> [[V; SIDE]; SIDE] {
    both_ways!(m, 4 -> 2, targets)
}

/// A y Aᵀ
#[inline(always)]
pub(super) fn of_targets<V: F32s>(y: [[V; SIDE]; SIDE]) -> [[V; PATCH]; PATCH] {
    both_ways!(y, 2 -> 4, spread)
}

/// Gᵀ u G
#[inline(always)]
pub(super) fn to_taps<V: F32s>(u: [[V; PATCH]; PATCH], half: V) -> [[V; 3]; 3] {
    both_ways!(u, 4 -> 3, Taps(half).back)
}

/// Writes a vector to each place: place `p` lies `p · stride` values on.
///
/// # Safety
/// A vector must be writable at each place.
#[inline(always)]
pub(super) unsafe fn store_places<V: F32s>(places: [[V; PATCH]; PATCH], to: *mut f32, stride: usize) {
    for i in 0..PATCH {
        for j in 0..PATCH {
            // SAFETY: the caller's contract.
            unsafe { places[i][j].store(to.add((i * PATCH + j) * stride)) };
        }
    }
}

/// Reads a vector from each place.
///
/// # Safety
/// A vector must be readable at each place: place `p` lies `p · stride` values on.
#[inline(always)]
pub(super) unsafe fn load_places<S: Simd>(s: S, from: *const f32, stride: usize) -> [[S::F32; PATCH]; PATCH] {
    let mut places = [[s.zero(); PATCH]; PATCH];
    for i in 0..PATCH {
        for j in 0..PATCH {
            // SAFETY: the caller's contract.
            places[i][j] = unsafe { s.load(from.add((i * PATCH + j) * stride)) };
        }
    }
    places
}
