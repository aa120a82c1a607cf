//! What clipping does to gradients: sums of squares in f64, and scaling and clamping in place.
//!
//! Plain loops over fixed lanes, vectorised by the compiler at each level; nothing is contracted, so every level gives the same bits.

use super::isa::{WithSimd, dispatch};
use super::parallel;
use super::simd::Simd;
use crate::element::Float;

/// Elements of a task: 64 KB of f32, as the optimiser's updates.
const TASK: usize = 16 * 1024;

/// Independent sums within a task: two AVX-512 vectors of f64, enough to hide the latency of an addition behind the loads.
const LANES: usize = 16;

/// Nanoseconds to pass over `bytes` in memory, at some 25 GB/s.
fn estimated_ns(bytes: usize) -> usize {
    bytes / 25
}

/// Σ x², in f64 for every dtype: exact to rounding for f32 gradients of any size. f64 values beyond 1e154 overflow to ∞.
pub fn sum_squares<T: Float>(x: &[T]) -> f64 {
    let mut sums = vec![0.0; x.len().div_ceil(TASK)];
    parallel::for_each_chunk(&mut sums, 1, estimated_ns(size_of_val(x)), |i, sum| {
        let start = i * TASK;
        sum[0] = dispatch(SumSquares(&x[start..x.len().min(start + TASK)]));
    });
    sums.iter().sum()
}

struct SumSquares<'a, T>(&'a [T]);

impl<T: Float> WithSimd for SumSquares<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let mut lanes = [0.0; LANES];
        let (blocks, rest) = self.0.as_chunks::<LANES>();
        for block in blocks {
            for (lane, x) in lanes.iter_mut().zip(block) {
                let x = x.to_f64();
                *lane += x * x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane += x.to_f64() * x.to_f64();
        }
        lanes.iter().sum()
    }
}

/// `x ← x · factor`, rounded once from the compute type (the factor is rounded to that type first).
pub fn scale<T: Float>(x: &mut [T], factor: f64) {
    let bytes = 2 * size_of_val(x);
    parallel::for_each_chunk(x, TASK, estimated_ns(bytes), |_, x| dispatch(Scale { x, factor }));
}

struct Scale<'a, T> {
    x: &'a mut [T],
    factor: f64,
}

impl<T: Float> WithSimd for Scale<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let factor = <T::Compute as crate::element::Element>::from_f64(self.factor);
        for x in self.x {
            *x = T::narrow(x.widen() * factor);
        }
    }
}

/// `x ← min(max(x, low), high)`; NaN stays NaN.
pub fn clamp<T: Float>(x: &mut [T], low: f64, high: f64) {
    let bytes = 2 * size_of_val(x);
    parallel::for_each_chunk(x, TASK, estimated_ns(bytes), |_, x| dispatch(Clamp { x, low, high }));
}

struct Clamp<'a, T> {
    x: &'a mut [T],
    low: f64,
    high: f64,
}

impl<T: Float> WithSimd for Clamp<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (low, high) = (T::from_f64(self.low), T::from_f64(self.high));
        for x in self.x {
            *x = if *x < low {
                low
            } else if *x > high {
                high
            } else {
                *x
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn values(n: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7919) % 4001) as f64 / 1000.0 - 2.0).collect()
    }

    #[test]
    fn squares_of_every_length() {
        for n in [0, 1, 15, 16, 17, TASK - 1, TASK, 3 * TASK + 5] {
            let x = values(n);
            let expected: f64 = x.iter().map(|x| x * x).sum();
            assert!((sum_squares(&x) - expected).abs() <= 1e-11 * expected);
            let single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            assert!((sum_squares(&single) - expected).abs() <= 1e-6 * expected);
        }
        assert_eq!(sum_squares(&[3e38f32, 3e38]), 2.0 * (3e38f32 as f64).powi(2));
        assert!(sum_squares(&[1.0, f64::NAN]).is_nan());
    }

    #[test]
    fn any_number_of_threads() {
        let x: Vec<f32> = values(5 * TASK + 7).iter().map(|&x| x as f32).collect();
        let bits = [1, 2, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_squares(&x)).to_bits()
        });
        assert!(bits[0] == bits[1] && bits[0] == bits[2]);
    }

    #[test]
    fn scaled_and_clamped() {
        let mut x = [1.0f32, -2.0, f32::INFINITY, f32::NAN];
        scale(&mut x, 0.5);
        assert_eq!(x[..3], [0.5, -1.0, f32::INFINITY]);
        clamp(&mut x, -0.75, 0.75);
        assert_eq!(x[..3], [0.5, -0.75, 0.75]);
        assert!(x[3].is_nan());
        let mut half = [bf16::from_f32(3.0), bf16::from_f32(-0.0)];
        scale(&mut half, 1.0 / 3.0);
        assert_eq!(half, [bf16::from_f32(1.0), bf16::from_f32(-0.0)]);
    }
}
