//! The error function and GELU.

use super::{clamp, exp, polynomial, with_sign};
use crate::cpu::simd::{F32s, Simd};

/// The error function `2/√π · ∫₀ˣ e^(−t²) dt`.
#[inline(always)]
pub fn erf<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let a = x.abs();
    // erf a = a + a·P(a²) for a ≤ 0.93, error 9.0e-10.
    let near = [0.12837917, -0.3761263, 0.11283626, -0.026855731, 0.005192405, -0.00080497697, 7.99665e-5];
    let small = a.mul_add(polynomial(s, a * a, near), a);
    // erf t = 1 − e^(−t + t·Q(t)) up to 4.1, where it rounds to 1; error 7.4e-10.
    let t = clamp(s, a, 0.0, 4.1);
    let far = [-0.12864849, -0.6351513, -0.106236845, 0.02376202, -0.0036424296, 0.00032279402, -1.1230011e-5];
    let large = s.splat(1.0) - exp(s, t.mul_add(polynomial(s, t, far), -t));
    with_sign(s, small.or_else(a.lt(s.splat(0.92)), large), x)
}

/// Beyond it t·Φ(−t) is below 6e-8, and taken for 0.
const TAIL_END: f32 = 5.6;

/// Φ(−t), the normal distribution's lower tail, for t in [0, [`TAIL_END`]]: 2^(−1 + t·P(t)). The error is 2.5e-8.
#[inline(always)]
fn normal_tail<S: Simd>(s: S, t: S::F32) -> S::F32 {
    let c = [
        -1.1511052,
        -0.4592139,
        -0.05245383,
        0.006947188,
        2.071925e-5,
        -0.0003040987,
        8.987164e-5,
        -1.506908e-5,
        1.5748651e-6,
        -9.560018e-8,
        2.581111e-9,
    ];
    let log2 = t.mul_add(polynomial(s, t, c), s.splat(-1.0));
    let n = log2.round();
    let r = log2 - n;
    // 2^r for |r| ≤ ½, error 3.0e-9.
    let p = polynomial(s, r, [std::f32::consts::LN_2, 0.24022648, 0.0555036, 0.009618506, 0.0013390806, 0.00015326463])
        .mul_add(r, s.splat(1.0));
    // n lies in [−27, −1].
    p.scale_normal(n)
}

/// [`normal_tail`] for all t ≥ 0.
#[inline(always)]
fn whole_tail<S: Simd>(s: S, t: S::F32) -> S::F32 {
    let end = s.splat(TAIL_END);
    // `min` returns its argument where that is NaN.
    s.zero().or_else(t.gt(end), normal_tail(s, end.min(t)))
}

/// GELU: `x·Φ(x) = x/2·(1 + erf(x/√2))`.
#[inline(always)]
pub fn gelu<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let tail = whole_tail(s, x.abs());
    // No cancellation on either side.
    x * tail.or_else(x.lt(s.zero()), s.splat(1.0) - tail)
}

/// gelu and its derivative Φ(x) + x·φ(x), with the normal density φ.
#[inline(always)]
pub fn gelu_and_slope<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
    // 1/√(2π)
    const DENSITY: f32 = 0.398_942_3;
    let tail = whole_tail(s, x.abs());
    let phi = tail.or_else(x.lt(s.zero()), s.splat(1.0) - tail);
    // Infinity times 0 would be NaN.
    let bounded = clamp(s, x, -128.0, 128.0);
    let density = exp(s, bounded * bounded * s.splat(-0.5));
    [x * phi, (bounded * s.splat(DENSITY)).mul_add(density, phi)]
}
