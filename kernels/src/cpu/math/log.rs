//! Logarithms.

use super::exp::{LN2, LN2_LOW};
use super::polynomial;
use crate::cpu::simd::{F32s, I32s, Simd};

/// The bits of √½: mantissas are taken from [√½, √2), so that the logarithm of a number near 1 has no exponent part.
const SQRT_HALF: i32 = 0x3f35_04f3;

/// `x = 2^e·m` with m in [√½, √2), for positive finite x; other inputs give finite nonsense.
#[inline(always)]
pub(super) fn split<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32) {
    let denormal = x.lt(s.splat(f32::MIN_POSITIVE));
    let bits = (x * s.splat(8388608.0)).or_else(denormal, x).to_bits();
    let e = (bits - s.splat_i32(SQRT_HALF)).shr::<23>();
    let m = (bits - e.shl::<23>()).from_bits();
    (s.splat(-23.0).or_else(denormal, s.zero()) + e.to_f32(), m)
}

/// `e·ln 2 + ln(1 + f)` for f in [√½ − 1, √2 − 1]: ln(1 + f) = f + f²·P(f), error 4.2e-9.
#[inline(always)]
fn assemble<S: Simd>(s: S, e: S::F32, f: S::F32) -> S::F32 {
    let q =
        polynomial(s, f, [-0.49999988, 0.33333325, -0.2500161, 0.20002013, -0.16608456, 0.14180613, -0.13247031, 0.12914312, -0.076244086]);
    let tail = (f * f).mul_add(q, e * s.splat(LN2_LOW));
    e.mul_add(s.splat(LN2), f) + tail
}

/// Replaces `y` where ln x has a limit or no value: x = ∞ and NaN give x, 0 gives −∞, negative numbers NaN.
#[inline(always)]
fn with_limits<S: Simd>(s: S, x: S::F32, y: S::F32) -> S::F32 {
    let y = y.or_else(x.lt(s.splat(f32::INFINITY)), x);
    let y = s.splat(f32::NEG_INFINITY).or_else(x.eq(s.zero()), y);
    s.splat(f32::NAN).or_else(x.lt(s.zero()), y)
}

/// Natural logarithm.
#[inline(always)]
pub fn log<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (e, m) = split(s, x);
    with_limits(s, x, assemble(s, e, m - s.splat(1.0)))
}

/// `ln(1 + x)`, accurate near 0.
#[inline(always)]
pub fn log1p<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let one = s.splat(1.0);
    let u = one + x;
    let bits = u.to_bits();
    let e = (bits - s.splat_i32(SQRT_HALF)).shr::<23>();
    // (1 + x)·2^−e − 1 from x itself, so that what the sum lost comes back. Beyond 2³² it lost nothing that counts.
    let scale = (s.splat_i32(127) - e).shl::<23>().from_bits();
    let near = x.mul_add(scale, scale - one);
    let far = (bits - e.shl::<23>()).from_bits() - one;
    let f = far.or_else(e.gt(s.splat_i32(32)), near);
    let y = with_limits(s, u, assemble(s, e.to_f32(), f));
    // Keeps −0, and denormals as they are.
    x.or_else(x.abs().lt(s.splat(1e-10)), y)
}
