//! Every norm against the formulas in f64, in both memory orders, with and without parameters, at several thread counts.

use super::*;
use crate::cpu::cast::Stored;
use crate::cpu::lanes::FloatLane;
use crate::cpu::reduce::Spread;
use crate::cpu::testing::{at_thread_counts, values};
use half::{bf16, f16};

const EPS: f64 = 1e-5;

/// Outputs and gradients of one normalisation, in f64.
#[derive(Default)]
struct Reference {
    y: Vec<f64>,
    dx: Vec<f64>,
    dw: Vec<f64>,
    db: Vec<f64>,
}

#[allow(clippy::too_many_arguments)] // The operands of one formula.
/// Normalises the elements of each of `groups` of indices; element `i` has parameter `channel(i)`.
fn reference(
    groups: &[Vec<usize>],
    channel: impl Fn(usize) -> usize,
    c: usize,
    x: &[f64],
    g: &[f64],
    w: &[f64],
    b: &[f64],
    centered: bool,
) -> Reference {
    let mut r = Reference { y: vec![0.0; x.len()], dx: vec![0.0; x.len()], dw: vec![0.0; c], db: vec![0.0; c] };
    for group in groups {
        let n = group.len() as f64;
        let mean = if centered { group.iter().map(|&i| x[i]).sum::<f64>() / n } else { 0.0 };
        let rstd = 1.0 / (group.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / n + EPS).sqrt();
        let h = |i: usize| (x[i] - mean) * rstd;
        let gw = |i: usize| g[i] * w[channel(i)];
        let m1 = if centered { group.iter().map(|&i| gw(i)).sum::<f64>() / n } else { 0.0 };
        let m2 = group.iter().map(|&i| gw(i) * h(i)).sum::<f64>() / n;
        for &i in group {
            r.y[i] = h(i) * w[channel(i)] + b[channel(i)];
            r.dx[i] = rstd * (gw(i) - m1 - h(i) * m2);
            r.dw[channel(i)] += g[i] * h(i);
            r.db[channel(i)] += g[i];
        }
    }
    r
}

fn close<T: FloatElement>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got.to_f64() - want).abs() <= tolerance * want.abs().max(1.0), "{what}[{i}]: {got:?} instead of {want}");
    }
}

struct Case<T> {
    x: Vec<T>,
    g: Vec<T>,
    w: Vec<T>,
    b: Vec<T>,
}

impl<T: FloatElement> Case<T> {
    fn new(len: usize, c: usize) -> Self {
        let make = |n: usize, scale, shift: f64| values(n, scale).into_iter().map(|x| T::from_f64(x + shift)).collect::<Vec<T>>();
        Self { x: make(len, 2.0, 3.0), g: make(len, 1.0, 0.25), w: make(c, 0.5, 1.0), b: make(c, 1.0, 0.0) }
    }

    fn reference(&self, groups: &[Vec<usize>], channel: impl Fn(usize) -> usize, affine: bool, centered: bool) -> Reference {
        let wide = |x: &[T]| x.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        let c = self.w.len();
        let (w, b) = if affine { (wide(&self.w), wide(&self.b)) } else { (vec![1.0; c], vec![0.0; c]) };
        reference(groups, channel, c, &wide(&self.x), &wide(&self.g), &w, &b, centered)
    }
}

fn rows<T: FloatElement>(m: usize, n: usize, tolerance: f64) {
    let case = Case::<T>::new(m * n, n);
    let groups: Vec<Vec<usize>> = (0..m).map(|r| (r * n..(r + 1) * n).collect()).collect();
    for (affine, centered) in [(true, true), (false, true), (true, false), (false, false)] {
        let rows = Rows { n, eps: EPS, centered };
        let want = case.reference(&groups, |i| i % n, affine, centered);
        let (w, b) = (affine.then_some(case.w.as_slice()), affine.then_some(case.b.as_slice()));
        let (y, dx, dw, db) = at_thread_counts(|| {
            let (mut y, mut dx, mut dw, mut db) = (case.x.clone(), case.x.clone(), case.w.clone(), case.b.clone());
            let (mut mean, mut rstd) = (vec![T::Lane::default(); m], vec![T::Lane::default(); m]);
            layer_norm(rows, &case.x, w, b, &mut y, &mut mean, &mut rstd);
            layer_norm_backward(rows, &case.g, &case.x, w, &mean, &rstd, &mut dx, Some(&mut dw), Some(&mut db));
            (y, dx, dw, db)
        });
        close("y", &y, &want.y, tolerance);
        close("dx", &dx, &want.dx, tolerance * 4.0);
        let sum_tolerance = tolerance * (m as f64).sqrt().max(1.0) * 4.0;
        close("dw", &dw, &want.dw, sum_tolerance);
        close("db", &db, &want.db, sum_tolerance);
    }
}

#[test]
fn row_norms_match_f64() {
    for (m, n) in [(1, 2), (3, 17), (5, 64), (300, 130), (2, 9001), (64, 1024), (0, 5)] {
        rows::<f32>(m, n, 4e-6);
        rows::<f64>(m, n, 1e-11);
        rows::<f16>(m, n, 4e-3);
        rows::<bf16>(m, n, 3e-2);
    }
}

fn channels<T: FloatElement + Stored>(layout: Channels, grouping: Grouping, tolerance: f64) {
    let Channels { n, c, s, channels_last } = layout;
    let case = Case::<T>::new(layout.numel(), c);
    let place = |i: usize| if channels_last { (i / c / s, i % c) } else { (i / s / c, i / s % c) };
    let count = match grouping {
        Grouping::Batch => c,
        Grouping::Groups(groups) => n * groups,
    };
    let mut groups = vec![vec![]; count];
    for i in 0..layout.numel() {
        let (sample, channel) = place(i);
        match grouping {
            Grouping::Batch => groups[channel].push(i),
            Grouping::Groups(g) => groups[sample * g + channel / (c / g)].push(i),
        }
    }
    for affine in [true, false] {
        let want = case.reference(&groups, |i| place(i).1, affine, true);
        let (w, b) = (affine.then_some(case.w.as_slice()), affine.then_some(case.b.as_slice()));
        let (y, dx, dw, db) = at_thread_counts(|| {
            let mut spreads = vec![Spread::default(); count];
            group_moments(layout, grouping, &case.x, &mut spreads);
            let mean: Vec<T::Lane> = spreads.iter().map(|s| T::Lane::round_from(s.mean)).collect();
            let rstd: Vec<T::Lane> = spreads.iter().map(|s| T::Lane::round_from(1.0 / (s.squares / s.count + EPS).sqrt())).collect();
            let statistics = Statistics { grouping, mean: &mean, rstd: &rstd };
            let (mut y, mut dx, mut dw, mut db) = (case.x.clone(), case.x.clone(), case.w.clone(), case.b.clone());
            normalize(layout, statistics, w, b, None, &case.x, &mut y);
            normalize_backward(layout, statistics, false, w, None, &case.g, &case.x, Some(&mut dx), Some(&mut dw), Some(&mut db));
            let (mut dw_alone, mut db_alone) = (case.w.clone(), case.b.clone());
            normalize_backward(layout, statistics, false, w, None, &case.g, &case.x, None, Some(&mut dw_alone), Some(&mut db_alone));
            let same = |a: &[T], b: &[T]| a.iter().zip(b).all(|(a, b)| a.to_f64().to_bits() == b.to_f64().to_bits());
            assert!(same(&dw, &dw_alone) && same(&db, &db_alone), "{layout:?} {grouping:?}: without the input's gradient");
            (y, dx, dw, db)
        });
        close("y", &y, &want.y, tolerance);
        close("dx", &dx, &want.dx, tolerance * 4.0);
        let sum_tolerance = tolerance * ((n * s) as f64).sqrt().max(1.0) * 4.0;
        close("dw", &dw, &want.dw, sum_tolerance);
        close("db", &db, &want.db, sum_tolerance);
    }
}

#[test]
fn channel_norms_match_f64_in_both_memory_orders() {
    for (n, c, s) in [(1, 1, 2), (4, 6, 35), (3, 64, 49), (2, 20, 1000), (33, 32, 49), (17, 40, 131), (8, 12, 1), (1, 4, 20_000), (0, 4, 9)]
    {
        for channels_last in [false, true] {
            let layout = Channels { n, c, s, channels_last };
            for grouping in
                [Grouping::Batch, Grouping::Groups(1), Grouping::Groups(c), Grouping::Groups(if c % 2 == 0 { c / 2 } else { 1 })]
            {
                if s == 1 && grouping != Grouping::Batch {
                    continue;
                }
                channels::<f32>(layout, grouping, 4e-6);
                channels::<f64>(layout, grouping, 1e-11);
                channels::<f16>(layout, grouping, 4e-3);
                channels::<bf16>(layout, grouping, 3e-2);
            }
        }
    }
}

#[test]
fn fixed_statistics_are_constants_of_the_backward_pass() {
    let layout = Channels { n: 1, c: 2, s: 2, channels_last: false };
    let statistics = Statistics { grouping: Grouping::Batch, mean: &[1.0f32, 2.0], rstd: &[2.0, 4.0] };
    let (mut dx, mut dw, mut db) = ([0f32; 4], [0f32; 2], [0f32; 2]);
    let (g, x) = ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]);
    normalize_backward(layout, statistics, true, Some(&[3.0, 0.5]), None, &g, &x, Some(&mut dx), Some(&mut dw), Some(&mut db));
    assert_eq!(dx, [6.0, 12.0, 6.0, 8.0]);
    assert_eq!(dw, [4.0, 44.0]);
    assert_eq!(db, [3.0, 7.0]);
}

/// With an activation, against the same norm and passes of their own, to the bit.
fn check_activated<T: FloatElement + Stored>(layout: Channels, grouping: Grouping) {
    use crate::cpu::pointwise::{Operand, Output, apply};
    use crate::pointwise::{backward, unary};
    use crate::view::StridedView;
    let of = |n: usize, scale: f64| -> Vec<T> { values(n, scale).into_iter().map(T::from_f64).collect() };
    let (x, g, w, b) = (of(layout.numel(), 2.0), of(layout.numel(), 1.0), of(layout.c, 1.5), of(layout.c, 0.5));
    let count = layout.statistics(grouping);
    let lanes =
        |scale: f64, from: f64| -> Vec<T::Lane> { values(count, scale).into_iter().map(|v| T::Lane::round_from(v + from)).collect() };
    let (mean, rstd) = (lanes(0.3, 0.0), lanes(0.4, 1.0));
    let statistics = Statistics { grouping, mean: &mean, rstd: &rstd };
    let (shape, strides) = ([layout.numel()], [1]);
    let activation = Activation { row: unary::Silu::ROW, backward: backward::Silu::ROW, params: [0.0; 2] };
    let bits = |v: &[T]| v.iter().map(|x| x.to_f64().to_bits()).collect::<Vec<_>>();
    let mut z = x.clone();
    normalize(layout, statistics, Some(&w), Some(&b), None, &x, &mut z);
    let mut y = z.clone();
    apply(activation.row, [0.0; 2], [Operand::Output], Output { data: &mut y, shape: &shape, strides: &strides });
    let mut fused = x.clone();
    normalize(layout, statistics, Some(&w), Some(&b), Some(activation), &x, &mut fused);
    assert!(bits(&y) == bits(&fused), "{layout:?} {grouping:?}");
    let mut before = g.clone();
    let saved = Operand::View(StridedView::new(&z, 0, &shape, &strides).unwrap());
    apply(activation.backward, [0.0; 2], [saved, Operand::Output], Output { data: &mut before, shape: &shape, strides: &strides });
    for fixed in [false, true] {
        let gradients = |activated: Option<Activated<'_, T>>, g: &[T]| {
            let (mut dx, mut dw, mut db) = (x.clone(), w.clone(), b.clone());
            normalize_backward(layout, statistics, fixed, Some(&w), activated, g, &x, Some(&mut dx), Some(&mut dw), Some(&mut db));
            [bits(&dx), bits(&dw), bits(&db)]
        };
        let activated = Some(Activated { activation, bias: Some(&b) });
        let got = at_thread_counts(|| gradients(activated, &g));
        assert!(got == gradients(None, &before), "{layout:?} {grouping:?} {fixed}");
    }
}

#[test]
fn activations_in_the_same_pass_are_those_of_passes_of_their_own() {
    for channels_last in [false, true] {
        for (n, c, s) in [(3, 4, 7), (20, 6, 35), (17, 40, 301), (2, 64, 400)] {
            let layout = Channels { n, c, s, channels_last };
            for grouping in [Grouping::Batch, Grouping::Groups(2)] {
                check_activated::<f32>(layout, grouping);
                check_activated::<f64>(layout, grouping);
                check_activated::<bf16>(layout, grouping);
                check_activated::<f16>(layout, grouping);
            }
        }
    }
}
