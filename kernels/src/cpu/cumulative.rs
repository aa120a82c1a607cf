//! Cumulative sums along the middle of `[outer, n, inner]`, accumulated in f64 or i64, from either end.

use super::lanes::{Lane, Numeric, Wide};
use super::parallel::{self, SharedMut};
use super::softmax::Axis;

/// Elements a task should cover, so that handing it over costs little.
const TASK: usize = 1 << 15;

/// Neighbouring columns that a task takes: 2 KiB of running totals.
const STRIP: usize = 256;

/// Σ of the elements up to and including each; of those from it on if `reverse`.
pub fn cumsum<T: Numeric>(axis: Axis, reverse: bool, x: &[T], y: &mut [T::Total]) {
    let Axis { outer, n, inner } = axis;
    assert!(x.len() == axis.numel() && y.len() == x.len());
    if x.is_empty() {
        return;
    }
    let strips = inner.div_ceil(STRIP);
    let group = TASK.div_ceil(n * inner.min(STRIP));
    let out = SharedMut::new(y);
    parallel::for_each((outer * strips).div_ceil(group), x.len(), |task| {
        let mut totals = [T::Lane::default().wide(); STRIP];
        for line in task * group..(outer * strips).min((task + 1) * group) {
            let column = line % strips * STRIP;
            let width = STRIP.min(inner - column);
            let totals = &mut totals[..width];
            totals.fill(T::Lane::default().wide());
            for i in 0..n {
                let row = if reverse { n - 1 - i } else { i };
                let at = (line / strips * n + row) * inner + column;
                for (j, (total, &x)) in totals.iter_mut().zip(&x[at..at + width]).enumerate() {
                    *total = total.plus(x.to_lane().wide());
                    // SAFETY: `at + j` is an element's index (`x` was just read there), strips share no columns, and `y`, which
                    // is as long as `x`, stays borrowed until all are done.
                    unsafe { out.get().add(at + j).write(T::total(*total)) }
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{at_thread_counts, values};

    #[test]
    fn scans_match_a_plain_loop() {
        for (outer, n, inner) in [(1, 1, 1), (3, 17, 1), (2, 9, 5), (1, 1000, 300), (500, 130, 1), (0, 3, 1), (2, 0, 3)] {
            let axis = Axis { outer, n, inner };
            let x: Vec<f32> = values(axis.numel(), 1.0).into_iter().map(|x| x as f32).collect();
            for reverse in [false, true] {
                let y = at_thread_counts(|| {
                    let mut y = vec![0f32; x.len()];
                    cumsum(axis, reverse, &x, &mut y);
                    y
                });
                for line in 0..outer * inner {
                    let mut total = 0f64;
                    for i in 0..n {
                        let row = if reverse { n - 1 - i } else { i };
                        let at = (line / inner * n + row) * inner + line % inner;
                        total += x[at] as f64;
                        assert_eq!(y[at], total as f32);
                    }
                }
            }
        }
        let mut y = [0i64; 4];
        cumsum(Axis { outer: 1, n: 4, inner: 1 }, true, &[1u8, 2, 3, 255], &mut y);
        assert_eq!(y, [261, 260, 258, 255]);
    }
}
