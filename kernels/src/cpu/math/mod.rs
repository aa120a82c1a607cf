//! Elementary functions of vectors of f32, written once over [`Simd`]: within 2 ULP of the exact result for every input,
//! with the limits at ±0, ±∞ and NaN, and with denormals kept. The polynomials are minimax fits of relative error (Lawson's iteration, the
//! coefficients rounded to f32 one after the other, the rest refitted); each comment gives the error that remains, beside 2⁻²⁴ = 6.0e-8.
//! Functions of f64 that the standard library lacks are in [`double`].

pub mod double;
mod erf;
mod exp;
mod log;
mod pow;
mod trig;

#[cfg(test)]
mod tests;

pub use erf::{erf, gelu, gelu_and_slope};
pub use exp::{elu, exp, exp2, expm1, gelu_tanh, gelu_tanh_and_slope, mish, mish_backward, sigmoid, silu, silu_and_slope, softplus, tanh};
pub use log::{log, log1p};
pub use pow::pow;
pub use trig::{atan2, cos, sin};

use super::simd::{F32s, I32s, MAX_LANES_OF_FOUR, Masks, Simd};

/// `c[0] + c[1]·x + c[2]·x² + …` by Horner's rule.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(s: S, x: S::F32, c: [f32; N]) -> S::F32 {
    let mut sum = s.splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        sum = sum.mul_add(x, s.splat(c[i]));
    }
    sum
}

/// `magnitude`, which must not be negative, with the sign of `sign`.
#[inline(always)]
fn with_sign<S: Simd>(s: S, magnitude: S::F32, sign: S::F32) -> S::F32 {
    (magnitude.to_bits() | (sign.to_bits() & s.splat_i32(i32::MIN))).from_bits()
}

/// `x` between the bounds; NaN stays NaN.
#[inline(always)]
pub fn clamp<S: Simd>(s: S, x: S::F32, low: f32, high: f32) -> S::F32 {
    // `min` and `max` return their argument where either is NaN.
    s.splat(low).max(s.splat(high).min(x))
}

/// The larger; NaN if either is NaN.
#[inline(always)]
pub fn maximum<S: Simd>(_: S, a: S::F32, b: S::F32) -> S::F32 {
    a.or_else(a.is_nan(), a.max(b))
}

/// The smaller; NaN if either is NaN.
#[inline(always)]
pub fn minimum<S: Simd>(_: S, a: S::F32, b: S::F32) -> S::F32 {
    a.or_else(a.is_nan(), a.min(b))
}

/// −1 or 1 with the sign of x; zeros and NaN stay.
#[inline(always)]
pub fn sign<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (zero, one) = (s.zero(), s.splat(1.0));
    one.or_else(x.gt(zero), (-one).or_else(x.lt(zero), x))
}

/// The remainder of the floored division: `a − b·⌊a/b⌋`, exact, with the sign of `b`; a zero has that of `a`.
#[inline(always)]
pub fn remainder<S: Simd>(s: S, a: S::F32, b: S::F32) -> S::F32 {
    let q = (a / b).floor();
    let r = (-q).mul_add(b, a);
    // Rounding can lift the quotient to the next integer, never past one; then the remainder has the wrong sign.
    let zero = s.zero();
    let wrong = (r.lt(zero) & b.gt(zero)) | (r.gt(zero) & b.lt(zero));
    let r = (r + b).or_else(wrong, with_sign(s, zero, a).or_else(r.eq(zero), r));
    // Below 2²² a quotient is exact and the fused product too.
    let hard = !(q.abs().lt(s.splat(4194304.0)) & b.abs().lt(s.splat(f32::INFINITY)));
    if hard.any() { lanewise(s, [a, b], |[a, b]| scalar_remainder(a, b)) } else { r }
}

/// [`remainder`] of numbers: `%` is exact, but has the sign of `a`.
fn scalar_remainder(a: f32, b: f32) -> f32 {
    let r = a % b;
    if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
}

/// `f` lane by lane, for the rare inputs that a vector algorithm does not cover.
#[inline(always)]
fn lanewise<S: Simd, const N: usize>(s: S, x: [S::F32; N], f: fn([f32; N]) -> f32) -> S::F32 {
    let mut lanes = [[0f32; MAX_LANES_OF_FOUR]; N];
    for (lanes, x) in lanes.iter_mut().zip(x) {
        x.store_slice(lanes, S::LANES);
    }
    let mut out = [0f32; MAX_LANES_OF_FOUR];
    for i in 0..S::LANES {
        out[i] = f(std::array::from_fn(|k| lanes[k][i]));
    }
    s.load_slice(&out)
}
