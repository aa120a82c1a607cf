//! Tiles, or their emulator, against the definition in f64.

use super::super::tests::{each_product, narrow, shape2d, shapes, values};
use super::super::{ConvShape, on_vectors};
use super::*;

/// Fails if a value is further from the exact one than `most` of the sum of its terms' magnitudes.
fn near(name: &str, s: &ConvShape, got: &[f32], exact: &[f64], sizes: &[f64], most: f64) {
    for (i, ((&g, &e), size)) in got.iter().zip(exact).zip(sizes).enumerate() {
        assert!((g as f64 - e).abs() <= most * (size + 1e-30), "{name} of {s:?}: element {i} is {g}, not {e}");
    }
}

/// Runs `f` for one to three parts, with the error that they may have.
fn each_parts(mut f: impl FnMut(usize, f64)) {
    for (parts, most) in [(1, 1e-2), (2, 3e-5), (3, 4e-7)] {
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

#[test]
fn products_agree_with_the_definition() {
    let pixelwise = shape2d(6, [34, 20], [3, 5], [1, 1], [1, 0, 1], 1);
    for s in shapes().into_iter().filter(|s| s.groups < 4 && s.output_len() * s.weight_len() / s.co < 1 << 21).chain([pixelwise]) {
        let fill = |len, seed| narrow(&values(len, seed).iter().map(|v| v * 1.2345678 + 1e-3).collect::<Vec<_>>());
        let (x, gy, w) = (fill(s.input_len(), 1), fill(s.output_len(), 2), fill(s.weight_len(), 3));
        let (bias_y, bias_x) = (fill(s.co, 4), fill(s.ci, 5));
        let start = |bias: &[f32], len: usize| (0..len).map(|i| bias[i % bias.len()] as f64).collect::<Vec<_>>();
        let (mut y, mut gx) = (start(&bias_y, gy.len()), start(&bias_x, x.len()));
        let (mut y_size, mut gx_size) = (vec![1.0; y.len()], vec![1.0; gx.len()]);
        each_product(&s, |ix, iy, iw| {
            let (forward, back) = (x[ix] as f64 * w[iw] as f64, gy[iy] as f64 * w[iw] as f64);
            y[iy] += forward;
            y_size[iy] += forward.abs();
            gx[ix] += back;
            gx_size[ix] += back.abs();
        });
        each_parts(|parts, most| {
            let (mut got_y, mut got_gx) = (vec![9f32; y.len()], vec![9f32; gx.len()]);
            gather_in(parts, &s.forward_gather(), &x, &w, Some(&bias_y), &mut got_y);
            near("forward", &s, &got_y, &y, &y_size, most);
            gather_in(parts, &s.transposed_gather(), &gy, &w, Some(&bias_x), &mut got_gx);
            near("input_grad", &s, &got_gx, &gx, &gx_size, most);
        });
    }
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
fn any_number_of_threads_gives_the_same_bits() {
    for s in [shape2d(3, [32, 40], [9, 7], [4, 4], [2, 1, 1], 1), shape2d(1, [17, 70], [12, 12], [3, 3], [1, 1, 1], 1)] {
        let [x, gy, w] = [values(s.input_len(), 1), values(s.output_len(), 2), values(s.weight_len(), 3)].map(|v| narrow(&v));
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut gx) = (gy.clone(), x.clone());
                gather_in(3, &s.forward_gather(), &x, &w, None, &mut y);
                gather_in(3, &s.transposed_gather(), &gy, &w, None, &mut gx);
                [y, gx].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
}
