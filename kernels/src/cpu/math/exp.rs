//! The exponential function and what is made of it: sigmoid, tanh, softplus and the activations built from them.

use super::{clamp, log1p, polynomial, with_sign};
use crate::cpu::simd::{F32s, I32s, Simd};

/// ln 2 in two parts: `LN2 + LN2_LOW` is good to 2⁻⁵⁴.
pub(super) const LN2: f32 = std::f32::consts::LN_2;
pub(super) const LN2_LOW: f32 = -1.904_654_2e-9;

/// `(e^r − 1 − r) / r²` for |r| ≤ ln 2 / 2; the error of e^r is 3.1e-9.
#[inline(always)]
pub(super) fn exp_tail<S: Simd>(s: S, r: S::F32) -> S::F32 {
    polynomial(s, r, [0.49999994, 0.16666521, 0.041668274, 0.008368686, 0.0013820137])
}

/// e^x.
#[inline(always)]
pub fn exp<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Beyond the bounds the result is 0 or ∞, and at them already.
    let x = clamp(s, x, -104.0, 89.0);
    let n = (x * s.splat(std::f32::consts::LOG2_E)).round();
    let r = n.mul_add(s.splat(-LN2_LOW), n.mul_add(s.splat(-LN2), x));
    let p = (r * r).mul_add(exp_tail(s, r), r) + s.splat(1.0);
    p.scale(n)
}

/// 2^x.
#[inline(always)]
pub fn exp2<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // As for `exp`.
    let x = clamp(s, x, -151.0, 129.0);
    let n = x.round();
    // Exact. 2^r = 1 + r·P(r) for |r| ≤ ½, error 2.0e-9.
    let r = x - n;
    let p = polynomial(s, r, [std::f32::consts::LN_2, 0.240_226_48, 0.055_503_324, 0.009_618_437, 0.001_339_887_5, 0.000_153_533_62]);
    p.mul_add(r, s.splat(1.0)).scale(n)
}

/// e^x − 1, accurate near 0.
#[inline(always)]
pub fn expm1<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // Below −18 the result is −1.
    let clamped = clamp(s, x, -18.0, 89.0);
    let n = (clamped * s.splat(std::f32::consts::LOG2_E)).round();
    let high = n.mul_add(s.splat(-LN2), clamped);
    let r = n.mul_add(s.splat(-LN2_LOW), high);
    let r_low = n.mul_add(s.splat(-LN2_LOW), high - r);
    let tail = (r * r).mul_add(exp_tail(s, r), r_low);
    // 2^n·(1 + r + tail) − 1, at half scale because 2^128 is out of range. Adding the parts by size loses half an ULP only.
    let half_scale = (n.to_i32() + s.splat_i32(126)).shl::<23>().from_bits();
    let head = half_scale.mul_add(r, half_scale - s.splat(0.5));
    let half = half_scale.mul_add(tail, head);
    // Where x²/2 is below the last bit, halving could lose a denormal's.
    x.or_else(x.abs().lt(s.splat(1e-10)), half + half)
}

/// σ(x), and e^−|x|.
#[inline(always)]
fn sigmoid_and_exp<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
    // With e^−|x| nothing overflows, and the tail keeps its denormals.
    let one = s.splat(1.0);
    let z = exp(s, -x.abs());
    let d = one + z;
    // What the sum lost, as a correction of the quotient to first order.
    let lost = (one - d) + z;
    let q = z.or_else(x.lt(s.zero()), one) / d;
    [(-q).mul_add(lost, q), z]
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub fn sigmoid<S: Simd>(s: S, x: S::F32) -> S::F32 {
    sigmoid_and_exp(s, x)[0]
}

/// σ(x) and σ(−x): one division for both.
#[inline(always)]
fn sigmoids<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
    let [y, z] = sigmoid_and_exp(s, x);
    // Neither cancels: the difference is taken where σ(x) is at most a half.
    [y, (s.splat(1.0) - y).or_else(x.lt(s.zero()), z * y)]
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let a = x.abs();
    // tanh a = a + a³·P(a²) for a ≤ 0.625, error 4.5e-9.
    let a2 = a * a;
    let small = (a2 * a).mul_add(polynomial(s, a2, [-0.3333328, 0.13331407, -0.053736784, 0.020629477, -0.005694192]), a);
    let e = exp(s, a + a);
    let one = s.splat(1.0);
    let large = one - s.splat(2.0) / (e + one);
    with_sign(s, small.or_else(a.lt(s.splat(0.625)), large), x)
}

/// `ln(1 + e^x)`.
#[inline(always)]
pub fn softplus<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let tail = log1p(s, exp(s, -x.abs()));
    // `max` returns its argument where either is NaN.
    s.zero().max(x) + tail
}

/// `x·σ(x)`.
#[inline(always)]
pub fn silu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    x * sigmoid(s, x)
}

/// silu and its derivative σ·(1 + x·(1 − σ)).
#[inline(always)]
pub fn silu_and_slope<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
    let [y, rest] = sigmoids(s, x);
    // Infinity times 0 would be NaN.
    let bounded = clamp(s, x, -128.0, 128.0);
    [x * y, y * rest.mul_add(bounded, s.splat(1.0))]
}

/// `x·tanh(softplus(x))`.
#[inline(always)]
pub fn mish<S: Simd>(s: S, x: S::F32) -> S::F32 {
    x * tanh_softplus(s, x)
}

/// `g · d mish(x)/dx = g·(t + x·σ(x)·(1 − t²))` with `t = tanh(softplus(x))`.
#[inline(always)]
pub fn mish_backward<S: Simd>(s: S, x: S::F32, g: S::F32) -> S::F32 {
    let x = clamp(s, x, -128.0, 128.0);
    let t = tanh_softplus(s, x);
    let slope = x * sigmoid(s, x);
    g * slope.mul_add((-t).mul_add(t, s.splat(1.0)), t)
}

/// `tanh(ln(1 + e^x)) = n / (n + 2)` with `n = e^x·(e^x + 2)`.
#[inline(always)]
fn tanh_softplus<S: Simd>(s: S, x: S::F32) -> S::F32 {
    // At 20 the quotient is 1, and its square is far from overflow.
    let e = exp(s, s.splat(20.0).min(x));
    let two = s.splat(2.0);
    let n = e * (e + two);
    n / (n + two)
}

/// GELU in its tanh form, `x/2·(1 + tanh u) = x·σ(2u)` with `u = √(2/π)·(x + 0.044715·x³)`.
#[inline(always)]
pub fn gelu_tanh<S: Simd>(s: S, x: S::F32) -> S::F32 {
    x * sigmoid(s, gelu_tanh_argument(s, x))
}

/// gelu_tanh and its derivative σ(v)·(1 + x·v′·(1 − σ(v))) with `v = 2u`.
#[inline(always)]
pub fn gelu_tanh_and_slope<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
    let bounded = clamp(s, x, -128.0, 128.0);
    let [y, rest] = sigmoids(s, gelu_tanh_argument(s, bounded));
    let slope = (bounded * bounded).mul_add(s.splat(3.0 * CUBIC), s.splat(LINEAR));
    [x * y, y * (bounded * slope).mul_add(rest, s.splat(1.0))]
}

/// 2·√(2/π).
const LINEAR: f32 = 1.595_769_2;
/// 2·√(2/π)·0.044715.
const CUBIC: f32 = 0.071_354_81;

#[inline(always)]
fn gelu_tanh_argument<S: Simd>(s: S, x: S::F32) -> S::F32 {
    x * (x * x).mul_add(s.splat(CUBIC), s.splat(LINEAR))
}

/// `x` if positive, else `α·(e^x − 1)`.
#[inline(always)]
pub fn elu<S: Simd>(s: S, x: S::F32, alpha: S::F32) -> S::F32 {
    x.or_else(x.gt(s.zero()), alpha * expm1(s, x))
}
