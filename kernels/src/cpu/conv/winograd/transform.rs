//! The transforms of patches, taps and tiles of targets, a vector of channels at a time.

use crate::cpu::simd::{F32s, Masks, Simd};

/// Larger magnitudes are not transformed. Forward, products of transformed values are below 2⁹⁴, and any sum of fewer than 2²⁷ stays finite,
/// transformed back; those of a weight gradient are below 2⁹⁹, and fewer than 2²⁵ of them do so.
pub(super) const LIMIT: f32 = (1u64 << 44) as f32;

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

/// The most sources of a patch along an axis, and products of a tile.
pub(super) const MAX_PATCH: usize = 5;

/// The most places in a patch.
pub(super) const MAX_PLACES: usize = MAX_PATCH * MAX_PATCH;

/// The most targets of a tile along an axis, and taps of a target.
pub(super) const MAX_SIDE: usize = 3;

/// A row of a patch, as far as the form has sources.
type Long<S> = [<S as Simd>::F32; MAX_PATCH];

/// A row of a tile or of taps, as far as the form has any.
type Short<S> = [<S as Simd>::F32; MAX_SIDE];

/// A minimal algorithm along an axis. What lies beyond the form's extents in an array is ignored, and returned as whatever it may be.
pub(super) trait Form: Copy + Sync {
    /// Targets of a tile.
    const SIDE: usize;
    /// Taps of a target.
    const TAPS: usize;
    /// Sources of a patch, and products of a tile.
    const PATCH: usize = Self::SIDE + Self::TAPS - 1;
    /// Places of a patch: as many products of matrices.
    const PLACES: usize = Self::PATCH * Self::PATCH;
    /// A row of Bᵀ d.
    fn sources<S: Simd>(s: S, d: Long<S>) -> Long<S>;
    /// A row of Aᵀ m.
    fn targets<S: Simd>(s: S, m: Long<S>) -> Short<S>;
    /// A row of A y.
    fn spread<S: Simd>(s: S, y: Short<S>) -> Long<S>;
    /// A row of G g.
    fn taps<S: Simd>(s: S, g: Short<S>) -> Long<S>;
    /// A row of Gᵀ u.
    fn to_taps<S: Simd>(s: S, u: Long<S>) -> Short<S>;
}

/// Two targets of three taps, by the points 0, 1, −1, ∞.
#[derive(Clone, Copy)]
pub(super) struct F2x3;

impl Form for F2x3 {
    const SIDE: usize = 2;
    const TAPS: usize = 3;

    #[inline(always)]
    fn sources<S: Simd>(_: S, [a, b, c, d, _]: Long<S>) -> Long<S> {
        [a - c, b + c, c - b, b - d, a]
    }

    #[inline(always)]
    fn targets<S: Simd>(_: S, [a, b, c, d, _]: Long<S>) -> Short<S> {
        [a + b + c, b - c - d, a]
    }

    #[inline(always)]
    fn spread<S: Simd>(_: S, [a, b, _]: Short<S>) -> Long<S> {
        [a, a + b, a - b, -b, a]
    }

    #[inline(always)]
    fn taps<S: Simd>(s: S, [a, b, c]: Short<S>) -> Long<S> {
        let half = s.splat(0.5);
        let (ends, middle) = ((a + c) * half, b * half);
        [a, ends + middle, ends - middle, c, a]
    }

    #[inline(always)]
    fn to_taps<S: Simd>(s: S, [a, b, c, d, _]: Long<S>) -> Short<S> {
        let half = s.splat(0.5);
        let (sum, difference) = ((b + c) * half, (b - c) * half);
        [a + sum, difference, sum + d]
    }
}

/// Three targets of two taps, by the points 0, 1, −1, ∞.
#[derive(Clone, Copy)]
pub(super) struct F3x2;

impl Form for F3x2 {
    const SIDE: usize = 3;
    const TAPS: usize = 2;

    #[inline(always)]
    fn sources<S: Simd>(s: S, d: Long<S>) -> Long<S> {
        F2x3::sources(s, d)
    }

    #[inline(always)]
    fn targets<S: Simd>(_: S, [a, b, c, d, _]: Long<S>) -> Short<S> {
        let sum = b + c;
        [a + sum, b - c, sum - d]
    }

    #[inline(always)]
    fn spread<S: Simd>(_: S, [a, b, c]: Short<S>) -> Long<S> {
        let ends = a + c;
        [a, ends + b, ends - b, -c, a]
    }

    #[inline(always)]
    fn taps<S: Simd>(s: S, [a, b, _]: Short<S>) -> Long<S> {
        let half = s.splat(0.5);
        let (x, y) = (a * half, b * half);
        [a, x + y, x - y, b, a]
    }

    #[inline(always)]
    fn to_taps<S: Simd>(s: S, [a, b, c, d, _]: Long<S>) -> Short<S> {
        let half = s.splat(0.5);
        let (sum, difference) = ((b + c) * half, (b - c) * half);
        [a + sum, difference + d, a]
    }
}

/// Three targets of three taps, by the points 0, −1, ½, 2, ∞: by 0, ±1, 2, ∞ errors would be half as large again.
#[derive(Clone, Copy)]
pub(super) struct F3x3;

impl Form for F3x3 {
    const SIDE: usize = 3;
    const TAPS: usize = 3;

    #[inline(always)]
    fn sources<S: Simd>(s: S, [a, b, c, d, e]: Long<S>) -> Long<S> {
        let three_halves = s.splat(-1.5);
        [
            (b + c).mul_add(three_halves, a + d),
            c.mul_add(s.splat(-2.5), b + d),
            b.mul_add(s.splat(-2.0), d - c),
            (c - b).mul_add(s.splat(0.5), d),
            (c + d).mul_add(three_halves, b + e),
        ]
    }

    #[inline(always)]
    fn targets<S: Simd>(s: S, [a, b, c, d, e]: Long<S>) -> Short<S> {
        [(a + b) + (c + d), c.mul_add(s.splat(0.5), d.mul_add(s.splat(2.0), -b)), c.mul_add(s.splat(0.25), d.mul_add(s.splat(4.0), b + e))]
    }

    #[inline(always)]
    fn spread<S: Simd>(s: S, [a, b, c]: Short<S>) -> Long<S> {
        [a, (a - b) + c, c.mul_add(s.splat(0.25), b.mul_add(s.splat(0.5), a)), c.mul_add(s.splat(4.0), b.mul_add(s.splat(2.0), a)), c]
    }

    #[inline(always)]
    fn taps<S: Simd>(s: S, [a, b, c]: Short<S>) -> Long<S> {
        let (two, four) = (s.splat(2.0), s.splat(4.0));
        [
            a,
            (b - (a + c)) * s.splat(2.0 / 9.0),
            a.mul_add(four, b.mul_add(two, c)) * s.splat(-2.0 / 9.0),
            c.mul_add(four, b.mul_add(two, a)) * s.splat(1.0 / 9.0),
            c,
        ]
    }

    #[inline(always)]
    fn to_taps<S: Simd>(s: S, [a, b, c, d, e]: Long<S>) -> Short<S> {
        let [two, four] = [s.splat(2.0), s.splat(4.0)];
        let (b, c, d) = (b * s.splat(2.0 / 9.0), c * s.splat(2.0 / 9.0), d * s.splat(1.0 / 9.0));
        [a + (d - b - c * four), d.mul_add(two, b - c * two), d.mul_add(four, e - b - c)]
    }
}

/// A function of rows, along the columns and then along the rows. Not a function of a function: a closure's instructions are not sure to be
/// inlined where they are enabled.
macro_rules! both_ways {
    ($s:ident, $x:expr, $rows:expr, [$to:expr; $most:ident], $f:path) => {{
        let x = $x;
        let mut columns = [[x[0][0]; $most]; MAX_PATCH];
        for j in 0..$rows {
            let mut column = [x[0][0]; _];
            for i in 0..$rows {
                column[i] = x[i][j];
            }
            columns[j] = $f($s, column);
        }
        let mut out = [[x[0][0]; $most]; $most];
        for i in 0..$to {
            let mut row = [x[0][0]; _];
            for j in 0..$rows {
                row[j] = columns[j][i];
            }
            out[i] = $f($s, row);
        }
        out
    }};
}

/// Bᵀ d B
#[inline(always)]
pub(super) fn of_sources<F: Form, S: Simd>(s: S, d: [Long<S>; MAX_PATCH]) -> [Long<S>; MAX_PATCH] {
    both_ways!(s, d, F::PATCH, [F::PATCH; MAX_PATCH], F::sources)
}

/// G g Gᵀ
#[inline(always)]
pub(super) fn of_taps<F: Form, S: Simd>(s: S, g: [Short<S>; MAX_SIDE]) -> [Long<S>; MAX_PATCH] {
    both_ways!(s, g, F::TAPS, [F::PATCH; MAX_PATCH], F::taps)
}

/// Aᵀ m A
#[inline(always)]
pub(super) fn to_targets<F: Form, S: Simd>(s: S, m: [Long<S>; MAX_PATCH]) -> [Short<S>; MAX_SIDE] {
    both_ways!(s, m, F::PATCH, [F::SIDE; MAX_SIDE], F::targets)
}

/// A y Aᵀ
#[inline(always)]
pub(super) fn of_targets<F: Form, S: Simd>(s: S, y: [Short<S>; MAX_SIDE]) -> [Long<S>; MAX_PATCH] {
    both_ways!(s, y, F::SIDE, [F::PATCH; MAX_PATCH], F::spread)
}

/// Gᵀ u G
#[inline(always)]
pub(super) fn to_taps<F: Form, S: Simd>(s: S, u: [Long<S>; MAX_PATCH]) -> [Short<S>; MAX_SIDE] {
    both_ways!(s, u, F::PATCH, [F::TAPS; MAX_SIDE], F::to_taps)
}

/// Writes a vector to each place: place `p` lies `p · stride` values on.
///
/// # Safety
/// A vector must be writable at each place.
#[inline(always)]
pub(super) unsafe fn store_places<F: Form, V: F32s>(places: [[V; MAX_PATCH]; MAX_PATCH], to: *mut f32, stride: usize) {
    for i in 0..F::PATCH {
        for j in 0..F::PATCH {
            // SAFETY: the caller's contract.
            unsafe { places[i][j].store(to.add((i * F::PATCH + j) * stride)) };
        }
    }
}

/// [`store_places`] of those that are needed, or of all.
///
/// # Safety
/// As there, for those.
#[inline(always)]
pub(super) unsafe fn store_needed<F: Form, V: F32s>(
    places: [[V; MAX_PATCH]; MAX_PATCH],
    needed: Option<&[bool; MAX_PLACES]>,
    to: *mut f32,
    stride: usize,
) {
    let Some(needed) = needed else {
        // SAFETY: the caller's contract.
        return unsafe { store_places::<F, V>(places, to, stride) };
    };
    for i in 0..F::PATCH {
        for j in 0..F::PATCH {
            if needed[i * F::PATCH + j] {
                // SAFETY: the caller's contract.
                unsafe { places[i][j].store(to.add((i * F::PATCH + j) * stride)) };
            }
        }
    }
}

/// Reads a vector from each place.
///
/// # Safety
/// A vector must be readable at each place: place `p` lies `p · stride` values on.
#[inline(always)]
pub(super) unsafe fn load_places<F: Form, S: Simd>(s: S, from: *const f32, stride: usize) -> [Long<S>; MAX_PATCH] {
    let mut places = [[s.zero(); MAX_PATCH]; MAX_PATCH];
    for i in 0..F::PATCH {
        for j in 0..F::PATCH {
            // SAFETY: the caller's contract.
            places[i][j] = unsafe { s.load(from.add((i * F::PATCH + j) * stride)) };
        }
    }
    places
}
