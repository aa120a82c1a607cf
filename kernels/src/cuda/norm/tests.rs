//! Both kinds of norm in both directions against plain loops in f64.

use super::super::testing::{Values, device};
use super::super::{Gpu, Slice, Type};
use super::*;

const FLOATS: [Type; 4] = [Type::F32, Type::F64, Type::F16, Type::BF16];

/// Numbers that f16 and bf16 hold exactly, around `mean`.
fn samples(n: usize, seed: usize, mean: f64) -> Vec<f64> {
    (0..n).map(|i| mean + (((i * 7919 + i / 5 + seed * 31) % 61) as f64 - 30.0) / 32.0).collect()
}

fn tolerance(ty: Type) -> f64 {
    match ty {
        Type::F64 => 1e-11,
        Type::F32 => 1e-5,
        Type::F16 => 4e-3,
        _ => 3e-2,
    }
}

#[track_caller]
fn expect_close(what: &str, ty: Type, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance(ty) * w.abs().max(1.0), "{what} of {ty:?}: element {i} is {g}, not {w}");
    }
}

fn statistics(ty: Type) -> Type {
    super::super::reduce::statistics_type(ty)
}

/// Mean and 1/√(var + ε) of the elements.
fn spread(x: impl Iterator<Item = f64> + Clone, eps: f64, centered: bool) -> (f64, f64) {
    let n = x.clone().count() as f64;
    let mean = if centered { x.clone().sum::<f64>() / n } else { 0.0 };
    (mean, 1.0 / (x.map(|x| (x - mean) * (x - mean)).sum::<f64>() / n + eps).sqrt())
}

/// `offset` shifts the operands off their alignment; with `single` one row of gradients stands for all.
#[allow(clippy::too_many_arguments)] // What cases differ in.
fn check_rows(gpu: &'static Gpu, ty: Type, count: usize, n: usize, centered: bool, affine: bool, single: bool, offset: usize) {
    let rows = Rows { n, eps: 1e-3, centered };
    let (x, g) = (samples(count * n, 1, 0.5), samples(if single { n } else { count * n }, 2, 0.0));
    let (w, b) = (samples(n, 3, 1.0), samples(n, 4, 0.0));
    let on = |values: &[f64]| Values::new(gpu, ty, &[&vec![0.0; offset], values].concat());
    let (xs, gs, ws, bs) = (on(&x), on(&g), on(&w), on(&b));
    fn at(values: &Values, ty: Type, offset: usize, len: usize) -> Slice<'_> {
        Slice::new(values.buffer(), ty, offset, len).unwrap()
    }
    let (weight, bias) = if affine { (Some(at(&ws, ty, offset, n)), Some(at(&bs, ty, offset, n))) } else { (None, None) };
    let (mut y, mut dx) = (Values::unwritten(gpu, ty, count * n), Values::unwritten(gpu, ty, count * n));
    let (mut mean, mut rstd) = (Values::unwritten(gpu, statistics(ty), count), Values::unwritten(gpu, statistics(ty), count));
    layer_norm(gpu, rows, at(&xs, ty, offset, count * n), weight, bias, y.slice_mut(), mean.slice_mut(), rstd.slice_mut()).unwrap();
    let (mut dw, mut db) = (Values::unwritten(gpu, ty, n), Values::unwritten(gpu, ty, n));
    let (want_dw, want_db) = (affine.then(|| dw.slice_mut()), affine.then(|| db.slice_mut()));
    layer_norm_backward(
        gpu,
        rows,
        at(&gs, ty, offset, g.len()),
        at(&xs, ty, offset, count * n),
        weight,
        mean.slice(),
        rstd.slice(),
        dx.slice_mut(),
        want_dw,
        want_db,
    )
    .unwrap();
    let what = format!("{count} rows of {n}, centered {centered}, affine {affine}, single {single}");
    let (mut y_want, mut dx_want, mut dw_want, mut db_want) = (vec![], vec![], vec![0.0; n], vec![0.0; n]);
    for row in 0..count {
        let x = &x[row * n..][..n];
        let g = if single { &g[..] } else { &g[row * n..][..n] };
        let (mean, rstd) = spread(x.iter().copied(), rows.eps, centered);
        let h: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
        let weight = |i: usize| if affine { w[i] } else { 1.0 };
        y_want.extend((0..n).map(|i| h[i] * weight(i) + if affine { b[i] } else { 0.0 }));
        let sum: f64 = if centered { (0..n).map(|i| g[i] * weight(i)).sum::<f64>() / n as f64 } else { 0.0 };
        let dot: f64 = (0..n).map(|i| g[i] * weight(i) * h[i]).sum::<f64>() / n as f64;
        dx_want.extend((0..n).map(|i| rstd * (g[i] * weight(i) - sum - h[i] * dot)));
        for i in 0..n {
            dw_want[i] += g[i] * h[i];
            db_want[i] += g[i];
        }
    }
    expect_close(&format!("y of {what}"), ty, &y.read(), &y_want);
    expect_close(&format!("dx of {what}"), ty, &dx.read(), &dx_want);
    if affine {
        expect_close(&format!("dw of {what}"), ty, &dw.read(), &dw_want);
        expect_close(&format!("db of {what}"), ty, &db.read(), &db_want);
    }
}

#[test]
fn rows_in_both_directions() {
    let Some(gpu) = device() else { return };
    for (count, n) in [(1, 1), (3, 8), (37, 64), (300, 24), (5, 257), (40, 96), (9, 768), (2, 1500)] {
        for ty in FLOATS {
            check_rows(gpu, ty, count, n, true, true, false, 0);
        }
        check_rows(gpu, Type::F32, count, n, false, true, false, 0);
        check_rows(gpu, Type::F32, count, n, true, false, false, 0);
    }
    check_rows(gpu, Type::F32, 20, 64, true, true, true, 0);
    check_rows(gpu, Type::F32, 20, 64, true, true, false, 1);
    check_rows(gpu, Type::BF16, 20, 64, true, true, false, 1);
}

#[test]
fn long_rows() {
    let Some(gpu) = device() else { return };
    check_rows(gpu, Type::F32, 2, 40_000, true, true, false, 0);
    check_rows(gpu, Type::F64, 20, 17_001, false, true, false, 0);
    check_rows(gpu, Type::BF16, 2, 12_000, true, true, true, 0);
}

#[test]
fn empty_rows() {
    let Some(gpu) = device() else { return };
    let none = Values::unwritten(gpu, Type::F32, 0);
    let (mut y, mut mean, mut rstd) =
        (Values::unwritten(gpu, Type::F32, 0), Values::new(gpu, Type::F32, &[1.0; 3]), Values::new(gpu, Type::F32, &[1.0; 3]));
    let rows = Rows { n: 0, eps: 0.0, centered: true };
    layer_norm(gpu, rows, none.slice(), None, None, y.slice_mut(), mean.slice_mut(), rstd.slice_mut()).unwrap();
    assert!(mean.read().iter().chain(&rstd.read()).all(|x| x.is_nan()));
    let rows = Rows { n: 2, ..rows };
    let (none, mut dw) = (Values::unwritten(gpu, Type::F32, 0), Values::new(gpu, Type::F32, &[1.0; 2]));
    layer_norm_backward(gpu, rows, none.slice(), none.slice(), None, none.slice(), none.slice(), y.slice_mut(), Some(dw.slice_mut()), None)
        .unwrap();
    assert_eq!(dw.read(), [0.0; 2]);
}

fn check_channels(gpu: &'static Gpu, ty: Type, layout: Channels, grouping: Grouping, affine: bool, fixed: bool) {
    let Channels { n, c, s, channels_last } = layout;
    let (eps, numel, count) = (1e-3, layout.numel(), layout.statistics(grouping));
    let (x, g) = (samples(numel, 1, 0.5), samples(numel, 2, 0.0));
    let (w, b) = (samples(c, 3, 1.0), samples(c, 4, 0.0));
    let on = |values: &[f64]| Values::new(gpu, ty, values);
    let (xs, gs, ws, bs) = (on(&x), on(&g), on(&w), on(&b));
    let lane = statistics(ty);
    let room = || Values::unwritten(gpu, lane, count);
    let (mut mean, mut rstd, mut var) = (room(), room(), room());
    group_moments(gpu, layout, grouping, eps, xs.slice(), [mean.slice_mut(), rstd.slice_mut(), var.slice_mut()]).unwrap();
    let (weight, bias) = if affine { (Some(ws.slice()), Some(bs.slice())) } else { (None, None) };
    let (mut y, mut dx) = (Values::unwritten(gpu, ty, numel), Values::unwritten(gpu, ty, numel));
    let stats = Statistics { grouping, mean: mean.slice(), rstd: rstd.slice() };
    normalize(gpu, layout, stats, weight, bias, xs.slice(), y.slice_mut()).unwrap();
    let (mut dw, mut db) = (Values::unwritten(gpu, ty, c), Values::unwritten(gpu, ty, c));
    let (want_dw, want_db) = (affine.then(|| dw.slice_mut()), affine.then(|| db.slice_mut()));
    normalize_backward(gpu, layout, stats, fixed, weight, gs.slice(), xs.slice(), Some(dx.slice_mut()), want_dw, want_db).unwrap();

    let place = |sample: usize, channel: usize, pixel: usize| {
        if channels_last { (sample * s + pixel) * c + channel } else { (sample * c + channel) * s + pixel }
    };
    let mut members = vec![vec![]; count];
    let mut channel_of = vec![0; numel];
    for sample in 0..n {
        for channel in 0..c {
            let group = match grouping {
                Grouping::Batch => channel,
                Grouping::Groups(groups) => sample * groups + channel / (c / groups),
            };
            for pixel in 0..s {
                members[group].push(place(sample, channel, pixel));
                channel_of[place(sample, channel, pixel)] = channel;
            }
        }
    }
    let (mut y_want, mut dx_want, mut dw_want, mut db_want) = (vec![0.0; numel], vec![0.0; numel], vec![0.0; c], vec![0.0; c]);
    let (mut mean_want, mut var_want) = (vec![], vec![]);
    for places in &members {
        let len = places.len() as f64;
        let (mean, rstd) = spread(places.iter().map(|&at| x[at]), eps, true);
        mean_want.push(mean);
        var_want.push(places.iter().map(|&at| (x[at] - mean).powi(2)).sum::<f64>() / (len - 1.0));
        let weight = |at: usize| if affine { w[channel_of[at]] } else { 1.0 };
        let h = |at: usize| (x[at] - mean) * rstd;
        let sum = places.iter().map(|&at| g[at] * weight(at)).sum::<f64>() / len;
        let dot = places.iter().map(|&at| g[at] * weight(at) * h(at)).sum::<f64>() / len;
        for &at in places {
            y_want[at] = h(at) * weight(at) + if affine { b[channel_of[at]] } else { 0.0 };
            dx_want[at] = rstd * if fixed { g[at] * weight(at) } else { g[at] * weight(at) - sum - h(at) * dot };
            dw_want[channel_of[at]] += g[at] * h(at);
            db_want[channel_of[at]] += g[at];
        }
    }
    let what = format!("{layout:?} {grouping:?} affine {affine} fixed {fixed}");
    expect_close(&format!("mean of {what}"), lane, &mean.read(), &mean_want);
    expect_close(&format!("var of {what}"), lane, &var.read(), &var_want);
    expect_close(&format!("y of {what}"), ty, &y.read(), &y_want);
    expect_close(&format!("dx of {what}"), ty, &dx.read(), &dx_want);
    if affine {
        expect_close(&format!("dw of {what}"), ty, &dw.read(), &dw_want);
        expect_close(&format!("db of {what}"), ty, &db.read(), &db_want);
    }
}

#[test]
fn channels_in_both_directions() {
    let Some(gpu) = device() else { return };
    for (n, c, s) in [(2, 8, 16), (3, 6, 49), (4, 40, 9), (20, 16, 1), (1, 4, 3000)] {
        for channels_last in [false, true] {
            let layout = Channels { n, c, s, channels_last };
            for grouping in [Grouping::Batch, Grouping::Groups(2), Grouping::Groups(c)] {
                if layout.numel() / layout.statistics(grouping) < 2 {
                    continue;
                }
                check_channels(gpu, Type::F32, layout, grouping, true, false);
                check_channels(gpu, Type::F32, layout, grouping, false, false);
                if grouping == Grouping::Batch {
                    check_channels(gpu, Type::F32, layout, grouping, true, true);
                }
            }
        }
    }
    for channels_last in [false, true] {
        for ty in FLOATS {
            check_channels(gpu, ty, Channels { n: 3, c: 8, s: 24, channels_last }, Grouping::Batch, true, false);
            check_channels(gpu, ty, Channels { n: 3, c: 8, s: 24, channels_last }, Grouping::Groups(4), true, false);
        }
    }
}
