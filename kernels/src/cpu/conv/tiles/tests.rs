//! Tiles, or their emulator, against the definition in f64.

use super::super::tests::{each_product, narrow, shape2d, shapes, values};
use super::super::{ConvShape, on_vectors};
use super::*;
use crate::cpu::gemm::micro::MicroKernels;

/// Fails if a value is further from the exact one than `most` of the sum of its terms' magnitudes.
fn near(name: &str, s: &ConvShape, got: &[f32], exact: &[f64], sizes: &[f64], most: f64) {
    for (i, ((&g, &e), size)) in got.iter().zip(exact).zip(sizes).enumerate() {
        assert!((g as f64 - e).abs() <= most * (size + 1e-30), "{name} of {s:?}: element {i} is {g}, not {e}");
    }
}

/// Runs `f` for one to three parts, with the error that they may have.
fn each_parts(mut f: impl FnMut(usize, f64)) {
    for (parts, most) in [(1, 1e-2), (2, 3e-5), (3, 1e-6)] {
        f(parts, most);
    }
}

fn gather_in(parts: usize, g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let vectors = |_: &Gather, _: &[f32], _: &mut [f32]| panic!("these values are for tiles");
    match parts {
        1 => gather::<1>(g, x, w, bias, y, vectors),
        2 => gather::<2>(g, x, w, bias, y, vectors),
        _ => gather::<3>(g, x, w, bias, y, vectors),
    }
    .unwrap();
}

fn weight_grad_in(parts: usize, g: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> bool {
    match parts {
        1 => weight_grad::<1>(g, x, gy, gw),
        2 => weight_grad::<2>(g, x, gy, gw),
        _ => weight_grad::<3>(g, x, gy, gw),
    }
    .unwrap()
}

#[test]
fn products_agree_with_the_definition() {
    let pixelwise = shape2d(6, [34, 20], [3, 5], [1, 1], [1, 0, 1], 1);
    for s in shapes().into_iter().filter(|s| s.groups < 4 && s.output_len() * s.weight_len() / s.co < 1 << 20).chain([pixelwise]) {
        let fill = |len, seed| narrow(&values(len, seed).iter().map(|v| v * 1.2345678 + 1e-3).collect::<Vec<_>>());
        let (x, gy, w) = (fill(s.input_len(), 1), fill(s.output_len(), 2), fill(s.weight_len(), 3));
        let (bias_y, bias_x) = (fill(s.co, 4), fill(s.ci, 5));
        let start = |bias: &[f32], len: usize| (0..len).map(|i| bias[i % bias.len()] as f64).collect::<Vec<_>>();
        let (mut y, mut gx) = (start(&bias_y, gy.len()), start(&bias_x, x.len()));
        let (mut y_size, mut gx_size) = (vec![1.0; y.len()], vec![1.0; gx.len()]);
        let (mut gw, mut gw_size) = (vec![0.0; w.len()], vec![0.0; w.len()]);
        each_product(&s, |ix, iy, iw| {
            let (forward, back) = (x[ix] as f64 * w[iw] as f64, gy[iy] as f64 * w[iw] as f64);
            y[iy] += forward;
            y_size[iy] += forward.abs();
            gx[ix] += back;
            gx_size[ix] += back.abs();
            gw[iw] += x[ix] as f64 * gy[iy] as f64;
            gw_size[iw] += (x[ix] as f64 * gy[iy] as f64).abs();
        });
        each_parts(|parts, most| {
            let (mut got_y, mut got_gx) = (vec![9f32; y.len()], vec![9f32; gx.len()]);
            gather_in(parts, &s.forward_gather(), &x, &w, Some(&bias_y), &mut got_y);
            near("forward", &s, &got_y, &y, &y_size, most);
            gather_in(parts, &s.transposed_gather(), &gy, &w, Some(&bias_x), &mut got_gx);
            near("input_grad", &s, &got_gx, &gx, &gx_size, most);
            let mut got_gw = vec![9f32; gw.len()];
            assert!(weight_grad_in(parts, &s.forward_gather(), &x, &gy, &mut got_gw));
            near("weight_grad", &s, &got_gw, &gw, &gw_size, most);
        });
    }
}

#[test]
fn tiles_are_as_exact_as_vectors() {
    let s = shape2d(1, [32, 32], [8, 8], [3, 3], [1, 1, 1], 1);
    let [x, gy, w] = [(s.input_len(), 1), (s.output_len(), 2), (s.weight_len(), 3)]
        .map(|(len, seed)| narrow(&values(len, seed).iter().map(|v| v * 1.2345678 + 1e-3).collect::<Vec<_>>()));
    let (mut y, mut gw) = (vec![0f64; gy.len()], vec![0f64; w.len()]);
    each_product(&s, |ix, iy, iw| {
        y[iy] += x[ix] as f64 * w[iw] as f64;
        gw[iw] += x[ix] as f64 * gy[iy] as f64;
    });
    let error = |got: &[f32], exact: &[f64]| got.iter().zip(exact).map(|(&g, e)| (g as f64 - e).powi(2)).sum::<f64>().sqrt();
    let g = s.forward_gather();
    let (mut on_tiles, mut plain) = (vec![0f32; y.len()], vec![0f32; y.len()]);
    gather_in(3, &g, &x, &w, None, &mut on_tiles);
    on_vectors(&g, &x, &w, None, &mut plain).unwrap();
    assert!(error(&on_tiles, &y) <= error(&plain, &y));
    let (mut on_tiles, mut plain) = (vec![0f32; gw.len()], vec![0f32; gw.len()]);
    assert!(weight_grad_in(3, &g, &x, &gy, &mut on_tiles));
    super::super::weight::weight_grad(MicroKernels::get(), &g, &s.transposed_gather(), &x, &gy, &mut plain).unwrap();
    assert!(error(&on_tiles, &gw) <= error(&plain, &gw));
}

#[test]
fn tiles_are_taken_where_they_are_full() {
    let pays = |s: ConvShape, parts| [s.forward_gather(), s.transposed_gather()].map(|g| is_faster(&g, parts));
    assert_eq!(pays(shape2d(32, [64, 64], [28, 28], [3, 3], [1, 1, 1], 1), 3), [true; 2]);
    assert_eq!(pays(shape2d(32, [128, 128], [14, 14], [3, 3], [1, 1, 1], 1), 3), [true; 2]);
    assert_eq!(pays(shape2d(16, [256, 256], [16, 16], [1, 1], [1, 0, 1], 1), 3), [true; 2]);
    assert_eq!(pays(shape2d(128, [64, 128], [14, 14], [4, 4], [2, 1, 1], 1), 1), [true; 2]);
    // Few channels; an image that is mostly padding; half of each tile empty.
    assert_eq!(pays(shape2d(16, [3, 64], [64, 64], [3, 3], [1, 1, 1], 1), 3), [false; 2]);
    assert_eq!(pays(shape2d(16, [64, 64], [2, 2], [3, 3], [9, 9, 9], 1), 3), [false; 2]);
    let wide = 1 << 30;
    let huge = ConvShape { padding: [wide; 3], stride: [wide; 3], output: [3; 3], ..shape2d(1, [64, 64], [3, 3], [1, 1], [1, 0, 1], 1) };
    assert_eq!(pays(huge, 3), [false; 2]);
    assert_eq!(pays(shape2d(16, [33, 33], [28, 28], [3, 3], [1, 1, 1], 1), 3), [false; 2]);
}

#[test]
fn extreme_values_go_to_vectors_image_by_image() {
    let s = shape2d(3, [16, 16], [6, 6], [3, 3], [1, 1, 1], 1);
    let w = narrow(&values(s.weight_len(), 1));
    for extreme in [f32::NAN, f32::INFINITY, 3e38, 1e-38] {
        let mut x = narrow(&values(s.input_len(), 2));
        let at = s.input_len() / 2;
        x[at] = extreme;
        let g = s.forward_gather();
        let (mut y, mut expected) = (vec![9f32; s.output_len()], vec![9f32; s.output_len()]);
        let seen = std::sync::atomic::AtomicUsize::new(0);
        gather::<3>(&g, &x, &w, None, &mut y, |g, x, y| {
            seen.fetch_add(g.n, std::sync::atomic::Ordering::Relaxed);
            on_vectors(g, x, &w, None, y)
        })
        .unwrap();
        assert_eq!(seen.into_inner(), 1, "{extreme}");
        on_vectors(&g, &x, &w, None, &mut expected).unwrap();
        let image = y.len() / 3;
        let bits = |y: &[f32]| y[image..2 * image].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&y), bits(&expected));
    }
}

#[test]
fn extreme_values_keep_weight_gradients_from_tiles() {
    let s = shape2d(3, [16, 16], [6, 6], [3, 3], [1, 1, 1], 1);
    let [x, gy] = [values(s.input_len(), 1), values(s.output_len(), 2)].map(|v| narrow(&v));
    let g = s.forward_gather();
    let mut gw = vec![9f32; s.weight_len()];
    for (parts, extreme) in [(3, f32::NAN), (3, 1e-38), (2, f32::INFINITY), (1, f32::NEG_INFINITY), (1, f32::NAN)] {
        for at in [0, x.len() / 2, x.len() - 1] {
            let (mut bad_x, mut bad_gy) = (x.clone(), gy.clone());
            (bad_x[at], bad_gy[at]) = (extreme, extreme);
            assert!(!weight_grad_in(parts, &g, &bad_x, &gy, &mut gw) && !weight_grad_in(parts, &g, &x, &bad_gy, &mut gw));
        }
    }
    assert!(gw.iter().all(|&v| v == 9.0));
}

#[test]
fn infinite_weights_go_to_vectors() {
    let s = shape2d(2, [16, 16], [12, 12], [3, 3], [1, 1, 1], 1);
    let x = vec![1f32; s.input_len()];
    let mut w = vec![1f32; s.weight_len()];
    w[0] = f32::INFINITY;
    let g = s.forward_gather();
    let (mut y, mut expected) = (vec![9f32; s.output_len()], vec![9f32; s.output_len()]);
    on_vectors(&g, &x, &w, None, &mut expected).unwrap();
    gather::<1>(&g, &x, &w, None, &mut y, |g, x, y| on_vectors(g, x, &w, None, y)).unwrap();
    let bits = |y: &[f32]| y.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&y), bits(&expected));
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for s in [shape2d(3, [32, 40], [9, 7], [4, 4], [2, 1, 1], 1), shape2d(1, [17, 70], [12, 12], [3, 3], [1, 1, 1], 1)] {
        let [x, gy, w] = [values(s.input_len(), 1), values(s.output_len(), 2), values(s.weight_len(), 3)].map(|v| narrow(&v));
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut gx) = (gy.clone(), x.clone());
                gather_in(3, &s.forward_gather(), &x, &w, None, &mut y);
                gather_in(3, &s.transposed_gather(), &gy, &w, None, &mut gx);
                let mut gw = w.clone();
                assert!(weight_grad_in(3, &s.forward_gather(), &x, &gy, &mut gw));
                [y, gx, gw].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
}
