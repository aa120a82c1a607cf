//! Every kernel against the definition in f64, element by element.

use super::super::testing::{Values, device};
use super::*;
use crate::cpu::conv::tests::{each_product, shape2d, shapes, values};

/// What a sum of products of numbers below 1 may be off by, for its size and for its number of terms.
fn tolerance(ty: Type, math: Math) -> f64 {
    match (ty, math) {
        (Type::F64, _) => 1e-12,
        (Type::F16, _) => 1e-3,
        (Type::BF16, _) => 8e-3,
        (_, Math::Tf32) => 4e-3,
        _ => 2e-5,
    }
}

fn close(name: &str, s: &ConvShape, ty: Type, math: Math, got: &[f64], expected: &[f64]) {
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= tolerance(ty, math) * (1.0 + e.abs()), "{name} of {ty:?} by {math:?}, {s:?}: element {i} is {g}, not {e}");
    }
}

fn check(gpu: &'static Gpu, s: &ConvShape, ty: Type, math: Math) {
    let on_gpu = |len: usize, seed: u64| Values::new(gpu, ty, &values(len, seed));
    let (x, gy, w) = (on_gpu(s.input_len(), 1), on_gpu(s.output_len(), 2), on_gpu(s.weight_len(), 3));
    let (bias_y, bias_x) = (on_gpu(s.co, 4), on_gpu(s.ci, 5));
    let (fx, fgy, fw) = (x.read(), gy.read(), w.read());
    let fill = |bias: &Values, len: usize| bias.read().into_iter().cycle().take(len).collect::<Vec<f64>>();
    let (mut y, mut gx, mut gw) = (fill(&bias_y, fgy.len()), fill(&bias_x, fx.len()), vec![0.0; fw.len()]);
    each_product(s, |ix, iy, iw| {
        y[iy] += fx[ix] * fw[iw];
        gx[ix] += fgy[iy] * fw[iw];
        gw[iw] += fx[ix] * fgy[iy];
    });
    let (forward, transposed) = (Gather::new(s, false).unwrap(), Gather::new(s, true).unwrap());
    let mut out = Values::unwritten(gpu, ty, y.len());
    gather(gpu, &forward, math, x.slice(), w.slice(), Some(bias_y.slice()), &mut out.slice_mut()).unwrap();
    close("forward", s, ty, math, &out.read(), &y);
    let mut out = Values::unwritten(gpu, ty, gx.len());
    gather(gpu, &transposed, math, gy.slice(), w.slice(), Some(bias_x.slice()), &mut out.slice_mut()).unwrap();
    close("input gradient", s, ty, math, &out.read(), &gx);
    let mut out = Values::unwritten(gpu, ty, gw.len());
    weights(gpu, &forward, &transposed, math, x.slice(), gy.slice(), &mut out.slice_mut()).unwrap();
    close("weight gradient", s, ty, math, &out.read(), &gw);
}

#[test]
fn all_three_products_agree_with_the_definition() {
    let Some(gpu) = device() else { return };
    for s in shapes() {
        check(gpu, &s, Type::F32, Math::Fma);
        check(gpu, &s, Type::F64, Math::Fma);
        check(gpu, &s, Type::BF16, Math::of(gpu, Type::BF16));
    }
}

#[test]
fn every_way_to_multiply_agrees_with_the_definition() {
    let Some(gpu) = device() else { return };
    let some = [
        shape2d(2, [32, 72], [9, 7], [3, 3], [1, 1, 1], 1),
        shape2d(2, [3, 40], [9, 7], [4, 4], [2, 1, 1], 1),
        shape2d(1, [16, 48], [8, 8], [4, 4], [2, 1, 1], 2),
        // More taps than a word has bits; and the gradient of many weights of few outputs by way of the input's pixels, two apart.
        shape2d(1, [8, 8], [2, 40], [1, 33], [1, 16, 1], 1),
        shape2d(2, [64, 5], [8, 8], [4, 4], [2, 1, 1], 1),
    ];
    for s in some {
        check(gpu, &s, Type::F16, Math::Fma);
        check(gpu, &s, Type::BF16, Math::Fma);
        if gpu.capability() >= (8, 0) {
            check(gpu, &s, Type::F16, Math::Half);
            check(gpu, &s, Type::BF16, Math::Half);
            check(gpu, &s, Type::F32, Math::Tf32);
            check(gpu, &s, Type::F32, Math::Tf32x3);
        }
        if gpu.capability() == (9, 0) {
            check(gpu, &s, Type::F16, Math::Warpgroup);
        }
    }
}

#[test]
fn larger_tiles_agree_with_the_definition() {
    let Some(gpu) = device() else { return };
    // Images enough that a multiprocessor gets several tiles, so that larger ones pay.
    for (n, c) in [(60, 64), (120, 32), (60, 128), (60, 256)] {
        let s = shape2d(n, [8, c], [16, 20], [1, 1], [1, 0, 1], 1);
        check(gpu, &s, Type::F32, Math::Fma);
        check(gpu, &s, Type::BF16, Math::of(gpu, Type::BF16));
    }
}

#[test]
fn empty_images_give_bias_and_no_gradient() {
    let Some(gpu) = device() else { return };
    let s = ConvShape { ci: 0, ..shape2d(1, [1, 6], [4, 4], [3, 3], [1, 1, 1], 1) };
    for co in [2, 6] {
        let s = ConvShape { co, ..s };
        check(gpu, &s, Type::F32, Math::Fma);
    }
    let none = ConvShape { n: 0, ..shape2d(1, [8, 6], [4, 4], [3, 3], [1, 1, 1], 1) };
    let empty = Values::new(gpu, Type::F32, &[]);
    let mut gw = Values::unwritten(gpu, Type::F32, none.weight_len());
    weight_grad(gpu, &none, empty.slice(), empty.slice(), &mut gw.slice_mut()).unwrap();
    assert!(gw.read().iter().all(|&x| x == 0.0));
}

#[test]
fn positions_that_do_not_fit_are_an_error() {
    let Some(gpu) = device() else { return };
    let huge = ConvShape {
        padding: [0, 1 << 30, 0],
        stride: [1, (1 << 31) - 1, 1],
        output: [1, 1, 4],
        ..shape2d(1, [1, 1], [4, 4], [1, 1], [1, 0, 1], 1)
    };
    let values = Values::new(gpu, Type::F32, &[1.0; 16]);
    let mut out = Values::unwritten(gpu, Type::F32, 4);
    let one = Slice::new(values.buffer(), Type::F32, 0, 1).unwrap();
    assert!(forward(gpu, &huge, values.slice(), one, None, &mut out.slice_mut()).is_err());
}
