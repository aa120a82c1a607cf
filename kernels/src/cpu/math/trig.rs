//! Sine, cosine and the arc tangent of a quotient.

use super::{MAX_LANES_OF_FOUR, polynomial, with_sign};
use crate::cpu::simd::{F32s, I32s, Masks, Simd};
use std::f32::consts::{FRAC_PI_2, PI};

/// Up to here `x − n·π/2` is taken with π/2 in three f32 parts: n has 16 bits, so the error stays below 2⁻⁵⁸.
const FAST: f32 = 65536.0;
/// π/2 = FRAC_PI_2 + PI_2_MIDDLE + PI_2_LOW, good to 2⁻⁷⁷.
const PI_2_MIDDLE: f32 = -4.371_139e-8;
const PI_2_LOW: f32 = -1.715_124_5e-15;

/// Sine.
#[inline(always)]
pub fn sin<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (n, r, r_low) = reduce(s, x.abs());
    let y = quadrant(s, n.to_i32(), r, r_low);
    // Odd: the sign of x flips the result's.
    (y.to_bits() ^ (x.to_bits() & s.splat_i32(i32::MIN))).from_bits()
}

/// Cosine.
#[inline(always)]
pub fn cos<S: Simd>(s: S, x: S::F32) -> S::F32 {
    let (n, r, r_low) = reduce(s, x.abs());
    quadrant(s, n.to_i32() + s.splat_i32(1), r, r_low)
}

/// `sin(r + n·π/2)` for |r| ≤ π/4; `r_low` is what r lacks.
#[inline(always)]
fn quadrant<S: Simd>(s: S, n: S::I32, r: S::F32, r_low: S::F32) -> S::F32 {
    let r2 = r * r;
    // Errors 1.6e-10 and 1.2e-10.
    let sin_tail = polynomial(s, r2, [-0.16666667, 0.008333379, -0.00019853075, 2.8327656e-6]);
    let sin = r + (r2 * r).mul_add(sin_tail, r_low);
    let cos_tail = polynomial(s, r2, [0.041666646, -0.0013887311, 2.4432564e-5]);
    let half = r2 * s.splat(0.5);
    let one = s.splat(1.0);
    let head = one - half;
    // (1 − head) − half is what the difference lost.
    let cos = head + (r2 * r2).mul_add(cos_tail, (-r).mul_add(r_low, (one - head) - half));
    let y = cos.or_else((n & s.splat_i32(1)).eq(s.splat_i32(1)), sin);
    (y.to_bits() ^ (n & s.splat_i32(2)).shl::<30>()).from_bits()
}

/// `x = n·π/2 + r + r_low` with |r| ≤ π/4, for x ≥ 0; n is right modulo 4.
#[inline(always)]
fn reduce<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32, S::F32) {
    let n = (x * s.splat(std::f32::consts::FRAC_2_PI)).round();
    let first = n.mul_add(s.splat(-FRAC_PI_2), x);
    // `first` is exact. It and the middle product may cancel in either direction, so both the product's and the difference's
    // rounding errors are kept (Knuth's two-sum).
    let middle = s.splat(PI_2_MIDDLE);
    let product = n * middle;
    let product_low = n.mul_add(middle, -product);
    let r = first - product;
    let back = r - first;
    let lost = (first - (r - back)) - (product + back);
    let r_low = n.mul_add(s.splat(-PI_2_LOW), lost - product_low);
    let far = x.gt(s.splat(FAST));
    if !far.any() {
        return (n, r, r_low);
    }
    // An element's value does not depend on those beside it.
    let (far_n, far_r, far_low) = reduce_lanes(s, x);
    (far_n.or_else(far, n), far_r.or_else(far, r), far_low.or_else(far, r_low))
}

#[inline(always)]
fn reduce_lanes<S: Simd>(s: S, x: S::F32) -> (S::F32, S::F32, S::F32) {
    let mut lanes = [0f32; MAX_LANES_OF_FOUR];
    x.store_slice(&mut lanes, S::LANES);
    let (mut n, mut high, mut low) = ([0f32; MAX_LANES_OF_FOUR], [0f32; MAX_LANES_OF_FOUR], [0f32; MAX_LANES_OF_FOUR]);
    for i in 0..S::LANES {
        let (quadrant, r) = reduce_any(lanes[i]);
        n[i] = quadrant as f32;
        high[i] = r as f32;
        low[i] = (r - high[i] as f64) as f32;
    }
    (s.load_slice(&n), s.load_slice(&high), s.load_slice(&low))
}

/// Bits of 2/π after the binary point.
const TWO_OVER_PI: [u32; 8] = [0xa2f9_836e, 0x4e44_1529, 0xfc27_57d1, 0xf534_ddc0, 0xdb62_9599, 0x3c43_9041, 0xfe51_63ab, 0xdebb_c561];

/// Payne and Hanek's reduction of x ≥ 0: the quadrant and the rest in [−π/4, π/4]. Not finite gives NaN.
fn reduce_any(x: f32) -> (u32, f64) {
    if !x.is_finite() {
        return (0, f64::NAN);
    }
    if x < 1.0 {
        let n = (x as f64 * std::f64::consts::FRAC_2_PI).round();
        return (n as u32, x as f64 - n * std::f64::consts::FRAC_PI_2);
    }
    // x = m·2^e; the bits of 2/π whose product with 2^e is a multiple of 4 cannot matter, so the window starts behind them.
    let m = (x.to_bits() & 0x7f_ffff | 0x80_0000) as u128;
    let e = (x.to_bits() >> 23) as i32 - 150;
    let skip = (e - 2).max(0) as usize;
    let word = |i: usize| TWO_OVER_PI.get(i).copied().unwrap_or(0) as u128;
    let bits = word(skip / 32) << 96 | word(skip / 32 + 1) << 64 | word(skip / 32 + 2) << 32 | word(skip / 32 + 3);
    let window = bits << (skip % 32) >> 32;
    // 96 bits of 2/π times 24 bits of m fit; the point is `point` bits up.
    let product = m * window;
    let point = (96 + skip as i32 - e) as u32;
    let n = (product + (1u128 << (point - 1))) >> point;
    let rest = product.wrapping_sub(n << point) as i128;
    (n as u32 & 3, rest as f64 * 2f64.powi(-(point as i32)) * std::f64::consts::FRAC_PI_2)
}

/// The angle of the point (x, y): `atan(y/x)` in the right quadrant, with C's rules for zeros and infinities.
#[inline(always)]
pub fn atan2<S: Simd>(s: S, y: S::F32, x: S::F32) -> S::F32 {
    let (ax, ay) = (x.abs(), y.abs());
    let steep = ay.gt(ax);
    let (small, large) = (ax.or_else(steep, ay), ay.or_else(steep, ax));
    let q = s.splat(1.0).or_else(small.eq(large), small / large);
    let q = s.zero().or_else(large.eq(s.zero()), q);
    let q2 = q * q;
    // atan q = q + q³·P(q²) for q ≤ 1, error 2.6e-9.
    let tail = polynomial(
        s,
        q2,
        [-0.333333, 0.1999853, -0.14264016, 0.109508805, -0.083993055, 0.057881333, -0.031096842, 0.0108685335, -0.0017827639],
    );
    let a = (q2 * q).mul_add(tail, q);
    let a = (s.splat(FRAC_PI_2) - (a - s.splat(PI_2_MIDDLE))).or_else(steep, a);
    let left = s.splat_i32(0).gt(x.to_bits());
    let a = (s.splat(PI) - (a - s.splat(2.0 * PI_2_MIDDLE))).or_else(left, a);
    let a = s.splat(f32::NAN).or_else(x.is_nan() | y.is_nan(), a);
    with_sign(s, a, y)
}

#[cfg(test)]
mod tests {
    use super::reduce_any;

    #[test]
    fn large_arguments_are_reduced_exactly() {
        for x in [1.0f32, 1.5, 3.25, 65537.0, 1e6, 1.6777216e7, 1e10, 1.234e20, 3.4e38, f32::MAX, 2f32.powi(100)] {
            let (n, r) = reduce_any(x);
            assert!(r.abs() <= std::f64::consts::FRAC_PI_4 + 1e-12, "{x}: {r}");
            let sin = [r.sin(), r.cos(), -r.sin(), -r.cos()][n as usize];
            assert!((sin - (x as f64).sin()).abs() < 1e-15, "{x}: {sin}");
        }
    }
}
