//! The power function: `e^(y·ln x)` with the logarithm and the product as unevaluated sums of two f32, because an error of 2⁻²⁴ in ln x
//! would be multiplied by up to 128.

use super::exp::{LN2, LN2_LOW, exp_tail};
use super::log::split;
use super::polynomial;
use crate::cpu::simd::{F32s, I32s, Simd};

/// ln x as a sum of two, relative error about 2⁻⁴⁰, for positive finite x.
#[inline(always)]
fn log_two<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32) {
    let (e, m) = split(s, x);
    let one = s.splat(1.0);
    // t = (m − 1)/(m + 1) in two parts; ln m = 2·atanh t = 2t + t³·(2/3 + t²·P(t²)).
    let (num, den) = (m - one, m + one);
    let den_low = m - (den - one);
    let inverse = one / den;
    let t = num * inverse;
    let t_low = ((-t).mul_add(den, num) - t * den_low) * inverse;
    let t2 = t * t;
    let t2_low = t.mul_add(t, -t2) + (t + t) * t_low;
    let t3 = t2 * t;
    let t3_low = t2.mul_add(t, -t3) + t2.mul_add(t_low, t2_low * t);
    // Error 8.5e-12 of ln m.
    let rest = t2 * polynomial(s, t2, [0.40000153, 0.28547096, 0.23419389]);
    let (third, third_low) = (s.splat(2.0 / 3.0), s.splat(-1.986_821_6e-8));
    let c = third + rest;
    let c_low = (third - c) + rest + third_low;
    let z = t3 * c;
    let z_low = t3.mul_add(c, -z) + t3.mul_add(c_low, t3_low * c);
    // Sum by size: e·ln 2, 2t, z.
    let a = e * s.splat(LN2);
    let a_low = e.mul_add(s.splat(LN2), -a) + e * s.splat(LN2_LOW);
    let b = t + t;
    let ab = a + b;
    let ab_low = (a - ab) + b;
    let high = ab + z;
    let low = ((ab - high) + z) + (ab_low + (a_low + ((t_low + t_low) + z_low)));
    (high, low)
}

/// `x^y` with C's rules: `x^0 = 1^y = 1` even for NaN, a negative x needs an integral y.
#[inline(always)]
pub fn pow<S: Simd>(s: S, x: S::F32, y: S::F32) -> S::F32 {
    let (zero, one, infinity) = (s.zero(), s.splat(1.0), s.splat(f32::INFINITY));
    let a = x.abs();
    let (l, l_low) = log_two(s, a);
    let p = y * l;
    let p_low = y.mul_add(l, -p) + y * l_low;
    // Beyond ±150 the result is 0 or ∞ whatever the low part, which may not be finite there.
    let outside = p.abs().gt(s.splat(150.0));
    let p_low = zero.or_else(outside, p_low);
    let p = super::clamp(s, p, -150.0, 150.0);
    let n = (p * s.splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(s.splat(-LN2_LOW), n.mul_add(s.splat(-LN2), p)) + p_low;
    let magnitude = ((r * r).mul_add(exp_tail(s, r), r) + one).scale(n);

    // Limits: 0, ∞ and |x| against 1 for infinite y.
    let grows = (a.gt(one) & y.gt(zero)) | (a.lt(one) & y.lt(zero));
    let limit = infinity.or_else(grows, zero);
    let extreme = a.eq(zero) | a.eq(infinity) | y.abs().eq(infinity);
    let magnitude = limit.or_else(extreme, magnitude);

    // Signs: y integral, and odd. From 2²⁴ on every float is even.
    let integral = y.floor().eq(y);
    let halved = y * s.splat(0.5);
    let odd = integral & !halved.floor().eq(halved) & y.abs().lt(s.splat(16777216.0));
    let negative = s.splat_i32(0).gt(x.to_bits());
    let signed = (-magnitude).or_else(negative & odd, magnitude);
    let undefined = x.lt(zero) & a.lt(infinity) & !integral;
    let result = s.splat(f32::NAN).or_else(undefined | x.is_nan() | y.is_nan(), signed);
    one.or_else(x.eq(one) | y.eq(zero) | (a.eq(one) & y.abs().eq(infinity)), result)
}
