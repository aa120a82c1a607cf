//! Every reduction against a plain loop in f64, over layouts, types, edge values and numbers of threads.

use super::*;
use crate::cpu::lanes::Lane;
use crate::cpu::testing::{at_thread_counts, values};
use half::{bf16, f16};

/// Offsets of each output's elements, outputs and elements in row-major order.
fn groups(shape: &[usize], strides: &[usize], offset: usize, axes: &[bool]) -> Vec<Vec<usize>> {
    let outputs: usize = shape.iter().zip(axes).filter(|(_, r)| !**r).map(|(n, _)| n).product();
    let mut groups = vec![vec![]; outputs];
    for i in 0..shape.iter().product() {
        let (mut rest, mut at, mut output, mut scale) = (i, offset, 0, 1);
        for d in (0..shape.len()).rev() {
            let index = rest % shape[d];
            rest /= shape[d];
            at += index * strides[d];
            if !axes[d] {
                output += index * scale;
                scale *= shape[d];
            }
        }
        groups[output].push(at);
    }
    groups
}

/// Shape, strides, offset, axes.
type Layout = (Vec<usize>, Vec<usize>, usize, Vec<bool>);

/// Layouts of every pattern: rows, columns, both kinds of channel patterns, gaps, broadcast, permuted, nothing.
fn layouts() -> Vec<Layout> {
    let (t, f) = (true, false);
    let mut all = vec![
        (vec![37, 65], vec![65, 1], 0, vec![f, t]),
        (vec![37, 65], vec![65, 1], 0, vec![t, f]),
        (vec![300, 1100], vec![1100, 1], 3, vec![t, f]),
        (vec![5, 9000], vec![9001, 1], 1, vec![f, t]),
        (vec![4, 7, 6, 5], vec![210, 30, 5, 1], 0, vec![t, f, t, t]),
        (vec![4, 19, 6, 5], vec![570, 1, 95, 19], 0, vec![t, f, t, t]),
        (vec![4, 19, 6, 5], vec![570, 1, 95, 19], 0, vec![t, f, f, f]),
        (vec![4, 19, 6, 5], vec![570, 1, 95, 19], 0, vec![f, t, f, f]),
        (vec![6, 33, 3], vec![198, 3, 1], 0, vec![f, t, f]),
        (vec![40, 50], vec![1, 40], 0, vec![f, t]),
        (vec![40, 50], vec![1, 40], 0, vec![t, f]),
        (vec![20, 30], vec![120, 2], 5, vec![f, t]),
        (vec![20, 30], vec![120, 2], 5, vec![t, f]),
        (vec![8, 30], vec![0, 1], 0, vec![t, f]),
        (vec![8, 30], vec![1, 0], 0, vec![f, t]),
        (vec![2, 3], vec![3, 1], 0, vec![f, f]),
        (vec![2, 3], vec![3, 1], 0, vec![t, t]),
        (vec![], vec![], 0, vec![]),
        (vec![1, 1], vec![9, 9], 2, vec![t, f]),
        (vec![0, 3], vec![3, 1], 0, vec![t, f]),
        (vec![0, 3], vec![3, 1], 0, vec![f, t]),
        (vec![150_001], vec![1], 0, vec![t]),
        (vec![2, 140_000], vec![140_001, 1], 0, vec![f, t]),
        (vec![20_000, 3, 3], vec![9, 3, 1], 0, vec![t, f, t]),
        (vec![30_000, 17], vec![17, 1], 0, vec![t, f]),
        (vec![700, 64], vec![64, 1], 1, vec![t, f]),
        (vec![1000, 5], vec![5, 1], 7, vec![f, t]),
        (vec![1000, 5], vec![7, 1], 0, vec![f, t]),
        (vec![70, 32], vec![32, 1], 0, vec![f, t]),
        (vec![1000, 2], vec![2, 1], 1, vec![f, t]),
        (vec![5000, 3], vec![3, 1], 0, vec![f, t]),
        (vec![1001, 4], vec![4, 1], 0, vec![f, t]),
    ];
    for n in [1, 2, 15, 16, 17, 127, 128, 129, 1025] {
        all.push((vec![3, n], vec![n, 1], 0, vec![f, t]));
        all.push((vec![n, 3], vec![3, 1], 0, vec![t, f]));
    }
    all
}

fn close(got: f64, want: f64, tolerance: f64, what: &str) {
    let same = got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= tolerance * want.abs().max(1.0);
    assert!(same, "{what}: {got} instead of {want}");
}

/// The largest (or smallest) value in PyTorch's order, where a NaN comes first, and its first position.
fn extreme(x: &[f64], max: bool) -> (usize, f64) {
    let mut best = 0;
    for i in 1..x.len() {
        let wins = if max { x[i] > x[best] } else { x[i] < x[best] };
        if (wins || x[i].is_nan()) && !x[best].is_nan() {
            best = i;
        }
    }
    (best, x[best])
}

/// Runs `f` over a view of the layout at several thread counts, and compares with `reference` of each output's elements.
fn check<T: Numeric, O: crate::element::Element>(
    what: &str,
    data: &[T],
    tolerance: f64,
    f: impl Fn(StridedView<'_, T>, &[bool], &mut [O]) + Sync,
    reference: impl Fn(&[f64]) -> f64,
) {
    for (shape, strides, offset, axes) in layouts() {
        let groups = groups(&shape, &strides, offset, &axes);
        let view = StridedView::new(data, offset, &shape, &strides).unwrap();
        let out = at_thread_counts(|| {
            let mut out = vec![O::default(); groups.len()];
            f(view, &axes, &mut out);
            out
        });
        for (group, &got) in groups.iter().zip(&out) {
            let x: Vec<f64> = group.iter().map(|&at| data[at].to_f64()).collect();
            // Terms of either sign cancel: what remains is about √n of them.
            let tolerance = tolerance * (x.len() as f64).sqrt().max(1.0);
            let want = reference(&x);
            // What overflows the type is infinite.
            let want = if O::from_f64(want).to_f64().is_infinite() { O::from_f64(want).to_f64() } else { want };
            close(got.to_f64(), want, tolerance, &format!("{what} {shape:?} {strides:?} {axes:?}"));
        }
    }
}

const LEN: usize = 520_000;

fn floats<T: FloatElement>(tolerance: f64) {
    let data: Vec<T> = values(LEN, 2.0).into_iter().map(T::from_f64).collect();
    check("sum", &data, tolerance, sum::<T>, |x| x.iter().sum());
    check("mean", &data, tolerance, mean::<T>, |x| x.iter().sum::<f64>() / x.len() as f64);
    check("norm 1", &data, tolerance, |x, a, o: &mut [T]| norm(x, a, 1.0, o), |x| x.iter().map(|x| x.abs()).sum());
    check("norm 2", &data, tolerance, |x, a, o: &mut [T]| norm(x, a, 2.0, o), |x| x.iter().map(|x| x * x).sum::<f64>().sqrt());
    check("norm 3", &data, tolerance, |x, a, o: &mut [T]| norm(x, a, 3.0, o), |x| x.iter().map(|x| x.abs().powi(3)).sum::<f64>().cbrt());
    check("norm ∞", &data, 0.0, |x, a, o: &mut [T]| norm(x, a, f64::INFINITY, o), |x| x.iter().fold(0.0, |a, b| a.max(b.abs())));
    check("norm 0", &data, tolerance, |x, a, o: &mut [T]| norm(x, a, 0.0, o), |x| x.iter().filter(|x| **x != 0.0).count() as f64);
    check("logsumexp", &data, tolerance, logsumexp::<T>, |x| x.iter().map(|x| x.exp()).sum::<f64>().ln());
    check("any", &data, 0.0, any::<T>, |x| x.iter().any(|&x| x != 0.0) as u8 as f64);
    check("all", &data, 0.0, all::<T>, |x| x.iter().all(|&x| x != 0.0) as u8 as f64);
    check(
        "var",
        &data,
        tolerance,
        |x, a, o: &mut [T]| var(x, a, 0.0, o),
        |x| {
            let mean = x.iter().sum::<f64>() / x.len() as f64;
            x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64
        },
    );
}

#[test]
fn floating_point_reductions_match_f64() {
    floats::<f32>(2e-6);
    floats::<f64>(1e-13);
    floats::<f16>(2e-3);
    floats::<bf16>(1e-2);
}

fn integers<T: Numeric<Total = i64>>() {
    let data: Vec<T> = values(LEN, 3.0).into_iter().map(|x| T::from_f64(x.abs() * 30.0)).collect();
    check("sum", &data, 0.0, sum::<T>, |x| x.iter().sum());
    check("any", &data, 0.0, any::<T>, |x| x.iter().any(|&x| x != 0.0) as u8 as f64);
    check("all", &data, 0.0, all::<T>, |x| x.iter().all(|&x| x != 0.0) as u8 as f64);
}

#[test]
fn integer_reductions_are_exact() {
    integers::<i64>();
    integers::<i32>();
    integers::<u8>();
    integers::<Bool>();
    let mut out = [0];
    sum(StridedView::new(&[i32::MAX; 3], 0, &[3], &[1]).unwrap(), &[true], &mut out);
    assert_eq!(out, [3 * i32::MAX as i64]);
    prod(StridedView::new(&[-3i32, 5, 7], 0, &[3], &[1]).unwrap(), &[true], &mut out);
    assert_eq!(out, [-105]);
}

fn extremes<T: Numeric>(data: Vec<T>) {
    let non_empty = |x: &[f64], max| if x.is_empty() { None } else { Some(extreme(x, max)) };
    let empty_as = |max| if max { T::from_lane(T::Lane::LEAST) } else { T::from_lane(T::Lane::GREATEST) };
    for max in [true, false] {
        let run = |x: StridedView<'_, T>, axes: &[bool], out: &mut [T]| if max { super::max(x, axes, out) } else { min(x, axes, out) };
        check("extreme", &data, 0.0, run, |x| non_empty(x, max).map_or(empty_as(max).to_f64(), |found| found.1));
        let index = |x: StridedView<'_, T>, axes: &[bool], out: &mut [i64]| {
            let axis = axes.iter().position(|&r| r).filter(|&d| axes.iter().filter(|r| **r).count() == 1 && x.shape()[d] > 0);
            let mut value = vec![T::default(); out.len()];
            match axis {
                Some(axis) if max => max_with_index(x, axis, &mut value, out),
                Some(axis) => min_with_index(x, axis, &mut value, out),
                None => out.fill(i64::MIN),
            }
        };
        for (shape, strides, offset, axes) in layouts() {
            let groups = groups(&shape, &strides, offset, &axes);
            let out = at_thread_counts(|| {
                let mut out = vec![0i64; groups.len()];
                index(StridedView::new(&data, offset, &shape, &strides).unwrap(), &axes, &mut out);
                out
            });
            for (group, got) in groups.iter().zip(out) {
                let x: Vec<f64> = group.iter().map(|&at| data[at].to_f64()).collect();
                if got != i64::MIN {
                    assert_eq!(got as usize, extreme(&x, max).0, "{shape:?} {strides:?} {axes:?}");
                }
            }
        }
    }
}

#[test]
fn extremes_are_found_first_and_nan_counts_as_one() {
    let coarse = |scale: f64| values(LEN, scale).into_iter().map(|x| (x * 8.0).round() / 8.0);
    extremes::<f32>(coarse(1.0).map(|x| x as f32).collect());
    extremes::<f32>(coarse(1.0).enumerate().map(|(i, x)| if i % 61 == 40 { f32::NAN } else { x as f32 }).collect());
    extremes::<f64>(coarse(1.0).enumerate().map(|(i, x)| if i % 1009 == 40 { f64::NAN } else { x }).collect());
    extremes::<bf16>(coarse(1.0).map(bf16::from_f64).collect());
    extremes::<i64>(coarse(9.0).map(|x| x as i64).collect());
    extremes::<u8>(coarse(9.0).map(|x| x.abs() as u8).collect());
}

fn one<T: FloatElement>(x: &[T], f: impl Fn(StridedView<'_, T>, &[bool], &mut [T])) -> f64 {
    let mut out = [T::default()];
    f(StridedView::new(x, 0, &[x.len()], &[1]).unwrap(), &[true], &mut out);
    out[0].to_f64()
}

#[test]
fn special_values() {
    let inf = f32::INFINITY;
    assert_eq!(one(&[1e4f32; 100], logsumexp), (1e4 + 100f64.ln()) as f32 as f64);
    assert_eq!(one(&[-inf; 40], logsumexp), f64::NEG_INFINITY);
    assert_eq!(one(&[], logsumexp::<f32>), f64::NEG_INFINITY);
    assert_eq!(one(&[1.0, inf, -inf], logsumexp::<f32>), f64::INFINITY);
    assert!(one(&[1.0, f32::NAN, 3.0], logsumexp::<f32>).is_nan());
    let mut long = vec![-inf; 10_000];
    long[9_999] = -1000.0;
    assert_eq!(one(&long, logsumexp), -1000.0);
    assert!(one(&[], mean::<f32>).is_nan());
    assert_eq!(one(&[], sum::<f32>), 0.0);
    assert_eq!(one(&[], prod::<f32>), 1.0);
    assert_eq!(one(&[2.0, 3.0, -4.0], prod::<f32>), -24.0);
    assert!(one(&[1.0, inf, -inf], sum::<f32>).is_nan());
    assert_eq!(one(&[60000.0; 4].map(f16::from_f32), mean::<f16>), 59_968.0_f64.max(f16::from_f32(60000.0).to_f64()));
    // Far from zero a sum of squares would lose every digit of the variance.
    let far: Vec<f32> = (0..4000).map(|i| 1e6 + (i % 2) as f32).collect();
    assert_eq!(one(&far, |x, a, o: &mut [f32]| var(x, a, 0.0, o)), 0.25);
    assert_eq!(one(&far, |x, a, o: &mut [f32]| std(x, a, 0.0, o)), 0.5);
    assert!(one(&[3.0], |x, a, o: &mut [f32]| var(x, a, 1.0, o)).is_nan());
    assert_eq!(one(&[f32::from_bits(1); 3], sum::<f32>), 3.0 * f32::from_bits(1) as f64);
}

#[test]
fn sums_of_many_terms_keep_their_digits() {
    let x = vec![0.1f32; 1 << 20];
    let want = 0.1f32 as f64 * (1 << 20) as f64;
    // Equal terms round the same way every time: the error grows with the length of a lane's chain, which is longest with one lane.
    let bound = 2e-5;
    let error = (one(&x, sum) / want - 1.0).abs();
    assert!(error < bound, "{error:e}");
    let mut columns = [0f32; 4];
    sum(StridedView::new(&x, 0, &[1 << 18, 4], &[4, 1]).unwrap(), &[true, false], &mut columns);
    assert!(columns.iter().all(|&c| (c as f64 / (want / 4.0) - 1.0).abs() < bound));
}

/// Rows of a few elements have the same bits one behind the other as with a gap between them.
#[test]
fn few_elements_are_folded_as_rows_are() {
    for n in 2..=5 {
        let spaced: Vec<f32> = values(500 * (n + 1), 3.0).iter().map(|&x| x as f32).collect();
        let dense: Vec<f32> = spaced.chunks_exact(n + 1).flat_map(|row| &row[..n]).copied().collect();
        let reduced = |data: &[f32], stride: usize, f: fn(StridedView<'_, f32>, &[bool], &mut [f32])| {
            let mut out = vec![0f32; 500];
            f(StridedView::new(data, 0, &[500, n], &[stride, 1]).unwrap(), &[false, true], &mut out);
            out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let norm: fn(StridedView<'_, f32>, &[bool], &mut [f32]) = |x, axes, out| norm(x, axes, 2.0, out);
        for (name, f) in
            [("sum", sum::<f32> as fn(StridedView<'_, f32>, &[bool], &mut [f32])), ("prod", prod), ("max", max), ("norm", norm)]
        {
            assert!(reduced(&dense, n, f) == reduced(&spaced, n + 1, f), "{name} of {n}");
        }
    }
}

#[test]
fn spreads_of_columns_whose_later_elements_lie_far_from_the_first() {
    // Three tiles of rows and a part of one: every other column is about 0, then about `far`, then about 0 again.
    let (rows, cols) = (3 * 128 + 50, 70);
    let mut near = vec![];
    for far in [0.0, 1e3, 1e7, 1e21, -1e24, f64::INFINITY, f64::NAN] {
        let is_far = |i: usize, j: usize| j.is_multiple_of(2) && (128..256).contains(&i);
        let value = |i: usize, j: usize| ((i * 31 + j * 7) % 101) as f64 / 50.0 - 1.0 + if is_far(i, j) { far } else { 0.0 };
        let x: Vec<f32> = (0..rows * cols).map(|k| value(k / cols, k % cols) as f32).collect();
        let (shape, strides) = ([rows, cols], [cols, 1]);
        let mut spreads = vec![Spread::default(); cols];
        moments(StridedView::new(&x, 0, &shape, &strides).unwrap(), &[true, false], &mut spreads);
        for (j, spread) in spreads.iter().enumerate() {
            let column = || (0..rows).map(|i| x[i * cols + j] as f64);
            let mean = column().sum::<f64>() / rows as f64;
            let squares = column().map(|x| (x - mean) * (x - mean)).sum::<f64>();
            assert_eq!(spread.count, rows as f64);
            if squares.is_nan() {
                assert!(spread.squares.is_nan());
                continue;
            }
            close(spread.mean, mean, 1e-6 * (squares / rows as f64).sqrt(), "mean");
            close(spread.squares / squares, 1.0, 1e-6, "squares");
        }
        // A column's bits do not depend on those beside it.
        let bits = spreads.iter().skip(1).step_by(2).map(|x| [x.mean, x.squares].map(f64::to_bits)).collect::<Vec<_>>();
        if near.is_empty() {
            near = bits;
        } else {
            assert!(near == bits, "beside {far}");
        }
    }
}
