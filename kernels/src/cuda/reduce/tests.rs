//! Every reduction of every type over every set of axes, against plain loops in f64.

use super::*;
use crate::cuda::testing::{Values, device};

/// Values that f16 and bf16 hold exactly, with ties, and zeros where `zeros`.
fn samples(ty: Type, n: usize, zeros: bool) -> Vec<f64> {
    let raw = (0..n).map(|i| ((i * 7919 + i / 3) % 61) as f64 - 30.0);
    match ty {
        Type::Bool => raw.map(|x| (x as i64 % 3 == 0 && zeros) as u8 as f64).collect(),
        Type::U8 => raw.map(|x| x.abs()).collect(),
        Type::I32 | Type::I64 => raw.collect(),
        _ => raw.map(|x| x / 16.0).collect(),
    }
}

/// For each output (row-major over the kept dimensions), its elements in row-major order.
fn groups(shape: &[usize], strides: &[usize], axes: &[bool], data: &[f64]) -> Vec<Vec<f64>> {
    let outputs: usize = (0..shape.len()).filter(|&d| !axes[d]).map(|d| shape[d]).product();
    let mut groups = vec![vec![]; outputs];
    for i in 0..shape.iter().product::<usize>() {
        let (mut rest, mut at, mut output, mut scale) = (i, 0, 0, 1);
        for d in (0..shape.len()).rev() {
            let index = rest % shape[d];
            rest /= shape[d];
            at += index * strides[d];
            if !axes[d] {
                output += index * scale;
                scale *= shape[d];
            }
        }
        groups[output].push(data[at]);
    }
    groups
}

fn tolerance(ty: Type) -> f64 {
    match ty {
        Type::F64 => 1e-12,
        Type::F16 => 1e-3,
        Type::BF16 => 8e-3,
        _ => 2e-6,
    }
}

#[track_caller]
fn expect_close(what: &str, ty: Type, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let close = g == w || (g.is_nan() && w.is_nan()) || (g - w).abs() <= tolerance(ty) * w.abs().max(1.0);
        assert!(close, "{what} of {ty:?}: output {i} is {g}, not {w}");
    }
}

struct Case<'a> {
    shape: &'a [usize],
    strides: &'a [usize],
    axes: &'a [bool],
}

const ALL: [Type; 8] = [Type::F32, Type::F64, Type::F16, Type::BF16, Type::I64, Type::I32, Type::U8, Type::Bool];
const FLOATS: [Type; 4] = [Type::F32, Type::F64, Type::F16, Type::BF16];

type Reference = fn(&[f64]) -> f64;

impl Case<'_> {
    fn run(
        &self,
        gpu: &'static Gpu,
        ty: Type,
        what: &str,
        out: Type,
        f: impl Fn(View<'_>, SliceMut<'_>),
        reference: impl Fn(&[f64]) -> f64,
    ) {
        let len = 1 + self.shape.iter().zip(self.strides).map(|(d, s)| d.saturating_sub(1) * s).sum::<usize>();
        let data = samples(ty, len, what != "all");
        let x = Values::new(gpu, ty, &data);
        let want: Vec<f64> = groups(self.shape, self.strides, self.axes, &data).iter().map(|g| reference(g)).collect();
        let mut y = Values::unwritten(gpu, out, want.len());
        f(View::new(x.buffer(), ty, 0, self.shape, self.strides).unwrap(), y.slice_mut());
        expect_close(&format!("{what} {:?} {:?} {:?}", self.shape, self.strides, self.axes), out, &y.read(), &want);
    }

    fn everything(&self, gpu: &'static Gpu) {
        let axes = self.axes;
        let empty = self.shape.contains(&0);
        for ty in ALL {
            let total = total_type(ty);
            self.run(gpu, ty, "sum", total, |x, y| sum(gpu, x, axes, y).unwrap(), |g| g.iter().sum());
            self.run(gpu, ty, "any", Type::Bool, |x, y| any(gpu, x, axes, y).unwrap(), |g| g.iter().any(|&x| x != 0.0) as u8 as f64);
            self.run(gpu, ty, "all", Type::Bool, |x, y| all(gpu, x, axes, y).unwrap(), |g| g.iter().all(|&x| x != 0.0) as u8 as f64);
            if !empty {
                self.run(gpu, ty, "max", ty, |x, y| max(gpu, x, axes, y).unwrap(), |g| g.iter().copied().fold(f64::MIN, f64::max));
                self.run(gpu, ty, "min", ty, |x, y| min(gpu, x, axes, y).unwrap(), |g| g.iter().copied().fold(f64::MAX, f64::min));
            }
        }
        for ty in FLOATS {
            let to = |what: &str, f: &dyn Fn(View<'_>, SliceMut<'_>), reference: &dyn Fn(&[f64]) -> f64| {
                self.run(gpu, ty, what, ty, f, reference)
            };
            let spread = |g: &[f64]| {
                let mean = g.iter().sum::<f64>() / g.len() as f64;
                g.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>()
            };
            to("mean", &|x, y| mean(gpu, x, axes, y).unwrap(), &|g| g.iter().sum::<f64>() / g.len() as f64);
            to("var", &|x, y| var(gpu, x, axes, 1.0, y).unwrap(), &|g| spread(g) / (g.len() as f64 - 1.0).max(0.0));
            to("std", &|x, y| std(gpu, x, axes, 0.0, y).unwrap(), &|g| (spread(g) / g.len() as f64).sqrt());
            to("logsumexp", &|x, y| logsumexp(gpu, x, axes, y).unwrap(), &|g| g.iter().map(|x| x.exp()).sum::<f64>().ln());
            let norms: [(f64, Reference); 5] = [
                (f64::INFINITY, |g| g.iter().fold(0.0, |a, x| a.max(x.abs()))),
                (0.0, |g| g.iter().filter(|x| **x != 0.0).count() as f64),
                (1.0, |g| g.iter().map(|x| x.abs()).sum()),
                (2.0, |g| g.iter().map(|x| x * x).sum::<f64>().sqrt()),
                (3.0, |g| g.iter().map(|x| x.abs().powi(3)).sum::<f64>().cbrt()),
            ];
            for (p, reference) in norms {
                to("norm", &|x, y| norm(gpu, x, axes, p, y).unwrap(), &reference);
            }
        }
    }
}

#[test]
fn every_fold_of_every_pattern() {
    let Some(gpu) = device() else { return };
    let cases: &[(&[usize], &[usize], &[bool])] = &[
        (&[5, 17], &[17, 1], &[false, true]),
        (&[3, 2000], &[2000, 1], &[false, true]),
        (&[70, 36], &[36, 1], &[true, false]),
        (&[4, 3, 10], &[30, 10, 1], &[true, false, true]),
        (&[0, 3], &[3, 1], &[true, false]),
    ];
    for &(shape, strides, axes) in cases {
        Case { shape, strides, axes }.everything(gpu);
    }
}

#[test]
fn every_shape() {
    let Some(gpu) = device() else { return };
    let cases: &[(&[usize], &[usize], &[bool])] = &[
        (&[], &[], &[]),
        (&[1], &[1], &[true]),
        (&[7], &[1], &[false]),
        (&[1, 9], &[9, 1], &[true, false]),
        (&[9, 1], &[1, 1], &[false, true]),
        // Long rows, of whole packs and not, few of them (several parts) and transposed.
        (&[1, 70_001], &[70_001, 1], &[true, true]),
        (&[2, 40_000], &[40_000, 1], &[false, true]),
        (&[9, 5000], &[5001, 1], &[false, true]),
        (&[33, 700], &[1, 33], &[false, true]),
        (&[300, 1030], &[1030, 1], &[true, false]),
        (&[20_000, 3], &[3, 1], &[true, false]),
        (&[6, 50, 7], &[350, 7, 1], &[false, true, false]),
        (&[6, 50, 8], &[400, 8, 1], &[true, false, true]),
        (&[2, 3, 4, 5], &[60, 20, 5, 1], &[false, true, false, true]),
        // Every second element, repeated rows, and a permuted output.
        (&[40, 30], &[60, 2], &[false, true]),
        (&[40, 30], &[60, 2], &[true, false]),
        (&[11, 13], &[0, 1], &[true, false]),
        (&[11, 13], &[1, 0], &[false, true]),
        (&[4, 5, 6], &[1, 24, 4], &[false, false, true]),
        (&[4, 5, 6], &[1, 24, 4], &[false, true, false]),
        (&[4, 0], &[1, 1], &[true, false]),
    ];
    for &(shape, strides, axes) in cases {
        let case = Case { shape, strides, axes };
        for ty in [Type::F32, Type::BF16, Type::U8] {
            case.run(gpu, ty, "sum", total_type(ty), |x, y| sum(gpu, x, axes, y).unwrap(), |g| g.iter().sum());
        }
        case.run(
            gpu,
            Type::F32,
            "var",
            Type::F32,
            |x, y| var(gpu, x, axes, 0.0, y).unwrap(),
            |g| {
                let mean = g.iter().sum::<f64>() / g.len() as f64;
                g.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / g.len() as f64
            },
        );
    }
}

#[test]
fn the_first_extreme_is_found() {
    let Some(gpu) = device() else { return };
    let cases: &[(&[usize], &[usize], usize)] =
        &[(&[4, 37], &[37, 1], 1), (&[37, 40], &[40, 1], 0), (&[2, 20_000], &[20_000, 1], 1), (&[3000, 5], &[5, 1], 0), (&[1], &[1], 0)];
    for &(shape, strides, axis) in cases {
        for ty in ALL {
            let mut data = samples(ty, shape.iter().product(), true);
            if ty.is_float() && data.len() > 100 {
                data[71] = f64::NAN;
                data[72] = f64::NAN;
            }
            let x = Values::new(gpu, ty, &data);
            let axes: Vec<bool> = (0..shape.len()).map(|d| d == axis).collect();
            let lines = groups(shape, strides, &axes, &data);
            for largest in [true, false] {
                let best = |g: &Vec<f64>| {
                    let beats = |x: f64, best: f64| (x.is_nan() && !best.is_nan()) || if largest { x > best } else { x < best };
                    (1..g.len()).fold(0, |best, i| if beats(g[i], g[best]) { i } else { best })
                };
                let (mut y, mut index) = (Values::unwritten(gpu, ty, lines.len()), Values::unwritten(gpu, Type::I64, lines.len()));
                let view = View::new(x.buffer(), ty, 0, shape, strides).unwrap();
                if largest {
                    max_with_index(gpu, view, axis, y.slice_mut(), index.slice_mut()).unwrap();
                } else {
                    min_with_index(gpu, view, axis, y.slice_mut(), index.slice_mut()).unwrap();
                }
                let want: Vec<usize> = lines.iter().map(best).collect();
                expect_close("index", Type::I64, &index.read(), &want.iter().map(|&i| i as f64).collect::<Vec<_>>());
                expect_close("extreme", ty, &y.read(), &lines.iter().zip(&want).map(|(g, &i)| g[i]).collect::<Vec<_>>());
            }
        }
    }
}

/// Reduces one row of `data` to one number.
fn one(gpu: &'static Gpu, ty: Type, data: &[f64], f: impl Fn(View<'_>, SliceMut<'_>) -> Result<(), CudaError>) -> f64 {
    let (x, mut y) = (Values::new(gpu, ty, data), Values::unwritten(gpu, ty, 1));
    let shape = [data.len()];
    f(View::new(x.buffer(), ty, 0, &shape, &[1]).unwrap(), y.slice_mut()).unwrap();
    y.read()[0]
}

#[test]
fn infinities_and_nan() {
    let Some(gpu) = device() else { return };
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    for n in [3, 3000] {
        let padded =
            |values: &[f64], rest: f64| -> Vec<f64> { values.iter().copied().chain(std::iter::repeat_n(rest, n - values.len())).collect() };
        let lse = |data: &[f64]| one(gpu, Type::F32, data, |x, y| logsumexp(gpu, x, &[true], y));
        assert_eq!(lse(&padded(&[], -inf)), -inf);
        assert_eq!(lse(&padded(&[1.0, inf], -inf)), inf);
        assert_eq!(lse(&padded(&[1000.0], -inf)), 1000.0);
        assert!(lse(&padded(&[1.0, nan, inf], 0.0)).is_nan());
        let greatest = |data: &[f64]| one(gpu, Type::F32, data, |x, y| max(gpu, x, &[true], y));
        assert!(greatest(&padded(&[1.0, nan, inf], 0.0)).is_nan());
        assert_eq!(greatest(&padded(&[-inf], -inf)), -inf);
        let average = |data: &[f64]| one(gpu, Type::F32, data, |x, y| mean(gpu, x, &[true], y));
        assert_eq!(average(&padded(&[inf], 0.0)), inf);
        assert!(one(gpu, Type::F32, &padded(&[inf], 0.0), |x, y| var(gpu, x, &[true], 0.0, y)).is_nan());
        // A mean far from zero costs no digits of the variance.
        let far: Vec<f64> = (0..n).map(|i| 1e6 + (i % 2) as f64).collect();
        let about = far.iter().sum::<f64>() / n as f64;
        let want = far.iter().map(|x| (x - about) * (x - about)).sum::<f64>() / n as f64;
        assert!((one(gpu, Type::F32, &far, |x, y| var(gpu, x, &[true], 0.0, y)) - want).abs() < 1e-5);
    }
    assert!(one(gpu, Type::F32, &[], |x, y| mean(gpu, x, &[true], y)).is_nan());
    assert_eq!(one(gpu, Type::F32, &[], |x, y| logsumexp(gpu, x, &[true], y)), -inf);
    assert_eq!(one(gpu, Type::F64, &[], |x, y| prod(gpu, x, &[true], y)), 1.0);
    assert_eq!(one(gpu, Type::I64, &[3.0, -2.0, 7.0], |x, y| prod(gpu, x, &[true], y)), -42.0);
}

/// The order of additions must not depend on where the elements begin.
#[test]
fn alignment_changes_no_bit() {
    let Some(gpu) = device() else { return };
    let data: Vec<f64> = (0..4001).map(|i| (i as f64 * 0.37).sin()).collect();
    for (shape, strides, axes) in [([2usize, 2000], [2000usize, 1], [false, true]), ([100, 40], [40, 1], [true, false])] {
        let at = |offset: usize| {
            let mut shifted = vec![0.0; offset];
            shifted.extend_from_slice(&data);
            let x = Values::new(gpu, Type::F32, &shifted);
            let mut y = Values::unwritten(gpu, Type::F32, if axes[0] { 40 } else { 2 });
            sum(gpu, View::new(x.buffer(), Type::F32, offset, &shape, &strides).unwrap(), &axes, y.slice_mut()).unwrap();
            y.read()
        };
        assert_eq!(at(0), at(1));
    }
}
