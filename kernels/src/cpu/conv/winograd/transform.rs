//! The transforms of patches, taps and tiles of targets, a vector of channels at a time.

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

/// Sources of a patch along an axis, and products of a tile.
pub(super) const PATCH: usize = 4;

/// Places in a patch: as many products of matrices.
pub(super) const PLACES: usize = PATCH * PATCH;

/// A minimal algorithm along an axis: so many targets of so many taps in [`PATCH`] products. Targets and taps stand in arrays of three, of which
/// those beyond their number are ignored, and returned as whatever it may be.
pub(super) trait Form: Copy + Sync {
    /// Targets of a tile.
    const SIDE: usize;
    /// Taps of a target.
    const TAPS: usize;
    /// A row of Aᵀ m.
    fn targets<V: F32s>(m: [V; PATCH]) -> [V; 3];
    /// A row of A y.
    fn spread<V: F32s>(y: [V; 3]) -> [V; PATCH];
    /// A row of G g, with ½ in every lane of `half`.
    fn taps<V: F32s>(g: [V; 3], half: V) -> [V; PATCH];
    /// A row of Gᵀ u.
    fn to_taps<V: F32s>(u: [V; PATCH], half: V) -> [V; 3];
}

/// Two targets of three taps.
#[derive(Clone, Copy)]
pub(super) struct F2x3;

impl Form for F2x3 {
    const SIDE: usize = 2;
    const TAPS: usize = 3;

    #[inline(always)]
    fn targets<V: F32s>([a, b, c, d]: [V; PATCH]) -> [V; 3] {
        [a + b + c, b - c - d, a]
    }

    #[inline(always)]
    fn spread<V: F32s>([a, b, _]: [V; 3]) -> [V; PATCH] {
        [a, a + b, a - b, -b]
    }

    #[inline(always)]
    fn taps<V: F32s>([a, b, c]: [V; 3], half: V) -> [V; PATCH] {
        let (ends, middle) = ((a + c) * half, b * half);
        [a, ends + middle, ends - middle, c]
    }

    #[inline(always)]
    fn to_taps<V: F32s>([a, b, c, d]: [V; PATCH], half: V) -> [V; 3] {
        let (sum, difference) = ((b + c) * half, (b - c) * half);
        [a + sum, difference, sum + d]
    }
}

/// Three targets of two taps.
#[derive(Clone, Copy)]
pub(super) struct F3x2;

impl Form for F3x2 {
    const SIDE: usize = 3;
    const TAPS: usize = 2;

    #[inline(always)]
    fn targets<V: F32s>([a, b, c, d]: [V; PATCH]) -> [V; 3] {
        let sum = b + c;
        [a + sum, b - c, sum - d]
    }

    #[inline(always)]
    fn spread<V: F32s>([a, b, c]: [V; 3]) -> [V; PATCH] {
        let ends = a + c;
        [a, ends + b, ends - b, -c]
    }

    #[inline(always)]
    fn taps<V: F32s>([a, b, _]: [V; 3], half: V) -> [V; PATCH] {
        let (x, y) = (a * half, b * half);
        [a, x + y, x - y, b]
    }

    #[inline(always)]
    fn to_taps<V: F32s>([a, b, c, d]: [V; PATCH], half: V) -> [V; 3] {
        let (sum, difference) = ((b + c) * half, (b - c) * half);
        [a + sum, difference + d, a]
    }
}

/// A row of Bᵀ d, which is that of both forms.
#[inline(always)]
fn sources<V: F32s>([a, b, c, d]: [V; PATCH]) -> [V; PATCH] {
    [a - c, b + c, c - b, b - d]
}

/// A function of rows, along the columns and then along the rows. Not a function of a function: a closure's instructions are not sure to be
/// inlined where they are enabled.
macro_rules! both_ways {
    ($x:expr, $rows:literal -> $to:literal, $f:path $(, $with:expr)?) => {{
        let x = $x;
        let mut columns = [[x[0][0]; $to]; $rows];
        for j in 0..$rows {
            let mut column = [x[0][0]; $rows];
            for i in 0..$rows {
                column[i] = x[i][j];
            }
            columns[j] = $f(column $(, $with)?);
        }
        let mut out = [[x[0][0]; $to]; $to];
        for i in 0..$to {
            let mut row = [x[0][0]; $rows];
            for j in 0..$rows {
                row[j] = columns[j][i];
            }
            out[i] = $f(row $(, $with)?);
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
pub(super) fn of_taps<F: Form, V: F32s>(g: [[V; 3]; 3], half: V) -> [[V; PATCH]; PATCH] {
    both_ways!(g, 3 -> 4, F::taps, half)
}

/// Aᵀ m A
#[inline(always)]
pub(super) fn to_targets<F: Form, V: F32s>(m: [[V; PATCH]; PATCH]) -> [[V; 3]; 3] {
    both_ways!(m, 4 -> 3, F::targets)
}

/// A y Aᵀ
#[inline(always)]
pub(super) fn of_targets<F: Form, V: F32s>(y: [[V; 3]; 3]) -> [[V; PATCH]; PATCH] {
    both_ways!(y, 3 -> 4, F::spread)
}

/// Gᵀ u G
#[inline(always)]
pub(super) fn to_taps<F: Form, V: F32s>(u: [[V; PATCH]; PATCH], half: V) -> [[V; 3]; 3] {
    both_ways!(u, 4 -> 3, F::to_taps, half)
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

/// [`store_places`] of those that are needed, or of all.
///
/// # Safety
/// As there, for those.
#[inline(always)]
pub(super) unsafe fn store_needed<V: F32s>(places: [[V; PATCH]; PATCH], needed: Option<&[bool; PLACES]>, to: *mut f32, stride: usize) {
    let Some(needed) = needed else {
        // SAFETY: the caller's contract.
        return unsafe { store_places(places, to, stride) };
    };
    for i in 0..PATCH {
        for j in 0..PATCH {
            if needed[i * PATCH + j] {
                // SAFETY: the caller's contract.
                unsafe { places[i][j].store(to.add((i * PATCH + j) * stride)) };
            }
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
