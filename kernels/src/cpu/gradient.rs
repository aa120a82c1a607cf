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

/// A list of numbers whose squares are summed.
pub struct Squares<'a> {
    len: usize,
    bytes: usize,
    /// Σ x² over a range.
    sum: Box<dyn Fn(usize, usize) -> f64 + Sync + 'a>,
}

impl<'a> Squares<'a> {
    /// The squares of these numbers, in f64 for every dtype: exact to rounding for f32 of any size. Those of f64 beyond 1e154 overflow to ∞.
    pub fn of<T: Float>(x: &'a [T]) -> Self {
        Self { len: x.len(), bytes: size_of_val(x), sum: Box::new(|start, end| dispatch(SumSquares(&x[start..end]))) }
    }
}

/// Σ x² over all lists, in one pass: each list's sum by itself, then theirs in their order.
pub fn sum_squares(lists: &[Squares<'_>]) -> f64 {
    let blocks = |(i, list): (usize, &Squares<'_>)| (0..list.len).step_by(TASK).map(move |start| (i, start));
    let tasks: Vec<(usize, usize)> = lists.iter().enumerate().flat_map(blocks).collect();
    let mut sums = vec![0.0; tasks.len()];
    let bytes = lists.iter().map(|list| list.bytes).sum();
    parallel::for_each_chunk(&mut sums, 1, estimated_ns(bytes), |task, sum| {
        let (i, start) = tasks[task];
        sum[0] = (lists[i].sum)(start, lists[i].len.min(start + TASK));
    });
    let mut rest = sums.as_slice();
    let of_list = |list: &Squares<'_>| {
        let (own, others) = rest.split_at(list.len.div_ceil(TASK));
        rest = others;
        own.iter().sum::<f64>()
    };
    lists.iter().map(of_list).sum()
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
            assert!((sum_squares(&[Squares::of(&x)]) - expected).abs() <= 1e-11 * expected);
            let single: Vec<f32> = x.iter().map(|&x| x as f32).collect();
            assert!((sum_squares(&[Squares::of(&single)]) - expected).abs() <= 1e-6 * expected);
        }
        assert_eq!(sum_squares(&[]), 0.0);
        let large = [3e38f32, 3e38];
        assert_eq!(sum_squares(&[Squares::of(&large)]), 2.0 * (3e38f32 as f64).powi(2));
        assert!(sum_squares(&[Squares::of(&large), Squares::of(&[1.0, f64::NAN])]).is_nan());
        let (x, y) = (values(2 * TASK + 3), values(7));
        let one_by_one = sum_squares(&[Squares::of(&x)]) + sum_squares(&[Squares::of(&y)]);
        assert_eq!(sum_squares(&[Squares::of(&x), Squares::of::<f32>(&[]), Squares::of(&y)]), one_by_one);
    }

    #[test]
    fn any_number_of_threads() {
        let x: Vec<f32> = values(5 * TASK + 7).iter().map(|&x| x as f32).collect();
        let bits = [1, 2, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sum_squares(&[Squares::of(&x), Squares::of(&x[..TASK + 9])])).to_bits()
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
