//! Transformed convolutions against the definition in f64, and against windows.

use super::super::tests::{each_product, narrow, shape2d, values};
use super::super::{ConvShape, direct, weight as windows_weight};
use super::transform::LIMIT;
use super::*;
use crate::cpu::gemm::micro::MicroKernels;
use std::sync::atomic::{AtomicUsize, Ordering};

fn shapes() -> Vec<ConvShape> {
    vec![
        shape2d(2, [32, 32], [8, 8], [3, 3], [1, 1, 1], 1),
        shape2d(3, [40, 70], [7, 9], [3, 3], [1, 1, 1], 1),
        shape2d(1, [33, 130], [14, 5], [3, 3], [1, 0, 1], 1),
        shape2d(2, [65, 37], [5, 6], [3, 3], [1, 2, 1], 1),
        shape2d(40, [64, 64], [7, 7], [3, 3], [1, 1, 1], 1),
        shape2d(30, [16, 20], [14, 9], [3, 3], [1, 1, 1], 1),
        shape2d(30, [17, 16], [14, 9], [4, 4], [2, 1, 1], 1),
        shape2d(20, [32, 40], [3, 12], [3, 3], [1, 0, 1], 1),
        shape2d(20, [40, 32], [10, 4], [3, 3], [1, 0, 1], 1),
        shape2d(40, [32, 64], [14, 14], [4, 4], [2, 1, 1], 1),
        shape2d(3, [37, 70], [16, 11], [4, 4], [2, 1, 1], 1),
        shape2d(2, [64, 33], [13, 20], [4, 4], [2, 0, 1], 1),
        shape2d(2, [34, 40], [10, 7], [4, 4], [2, 3, 1], 1),
        shape2d(7, [32, 32], [2, 5], [4, 4], [2, 1, 1], 1),
    ]
}

fn filled(len: usize, seed: u64) -> Vec<f32> {
    narrow(&values(len, seed).iter().map(|v| v * 1.2345678 + 1e-3).collect::<Vec<_>>())
}

fn in_windows(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    direct::gather_singles(g, x, w, bias, y).unwrap();
}

fn transformed(grid: &Grid, g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    gather(grid, g, x, w, bias, y, |_, _, _| panic!("these values can be transformed")).unwrap();
}

/// The forms of a convolution's two gathers.
fn grids(s: &ConvShape) -> impl Iterator<Item = [Grid; 2]> {
    let (forward, back) = (s.forward_gather(), s.transposed_gather());
    let forms = [Algorithm::F2x3, Algorithm::F3x3, Algorithm::F3x2];
    forms.into_iter().filter_map(move |form| Some([Grid::of(&forward, form)?, Grid::of(&back, form)?]))
}

/// Root of the summed squares of the errors.
fn error(got: &[f32], exact: &[f64]) -> f64 {
    got.iter().zip(exact).map(|(&g, e)| (g as f64 - e).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn all_three_products_are_about_as_exact_as_in_windows() {
    for s in shapes() {
        let (x, gy, w) = (filled(s.input_len(), 1), filled(s.output_len(), 2), filled(s.weight_len(), 3));
        let (bias_y, bias_x) = (filled(s.co, 4), filled(s.ci, 5));
        let start = |bias: &[f32], len: usize| (0..len).map(|i| bias[i % bias.len()] as f64).collect::<Vec<_>>();
        let (mut y, mut gx, mut gw) = (start(&bias_y, gy.len()), start(&bias_x, x.len()), vec![0.0; w.len()]);
        each_product(&s, |ix, iy, iw| {
            y[iy] += x[ix] as f64 * w[iw] as f64;
            gx[ix] += gy[iy] as f64 * w[iw] as f64;
            gw[iw] += x[ix] as f64 * gy[iy] as f64;
        });
        let (forward, back) = (s.forward_gather(), s.transposed_gather());
        let (mut plain_y, mut plain_gx, mut plain_gw) = (vec![9f32; y.len()], vec![9f32; gx.len()], vec![9f32; gw.len()]);
        in_windows(&forward, &x, &w, Some(&bias_y), &mut plain_y);
        in_windows(&back, &gy, &w, Some(&bias_x), &mut plain_gx);
        windows_weight::weight_grad(MicroKernels::get(), &forward, &back, &x, &gy, &mut plain_gw).unwrap();
        assert!(grids(&s).next().is_some());
        for [by, back_by] in grids(&s) {
            let compare = |name: &str, got: &[f32], plain: &[f32], exact: &[f64]| {
                let (got, plain) = (error(got, exact), error(plain, exact));
                // Plain sums are the more exact, the fewer terms they have: of few channels, of patches that are mostly padding, and of weight gradients,
                // which windows cut into more parts.
                let is_short = name.starts_with("weight") || s.output[1].min(s.output[2]) < 3 || s.ci.min(s.co) < MIN_CHANNELS;
                let most = if is_short { 3.0 } else { 1.6 };
                assert!(got <= most * plain, "{name} of {s:?} by {:?}: error {got}, {plain} in windows", by.form);
            };
            let mut got = vec![9f32; y.len()];
            transformed(&by, &forward, &x, &w, Some(&bias_y), &mut got);
            compare("forward", &got, &plain_y, &y);
            let mut got = vec![9f32; gx.len()];
            transformed(&back_by, &back, &gy, &w, Some(&bias_x), &mut got);
            compare("input_grad", &got, &plain_gx, &gx);
            let mut got = vec![9f32; gw.len()];
            assert!(weight_grad_by(&back_by, &back, &gy, &x, &mut got).unwrap());
            compare("weight_grad from the transposed side", &got, &plain_gw, &gw);
            if s.stride == [1; 3] {
                assert!(weight_grad_by(&by, &forward, &x, &gy, &mut got).unwrap());
                compare("weight_grad", &got, &plain_gw, &gw);
            }
        }
    }
}

#[test]
fn only_neighbouring_taps_in_a_plane_are_transformed() {
    let pays = |g: &Gather| plan(g).is_some();
    let plain = shape2d(4, [64, 64], [14, 14], [3, 3], [1, 1, 1], 1);
    assert!(pays(&plain.forward_gather()) && pays(&plain.transposed_gather()));
    for other in [
        shape2d(4, [64, 64], [14, 14], [3, 3], [2, 1, 1], 1),
        shape2d(4, [64, 64], [14, 14], [3, 3], [1, 2, 2], 1),
        shape2d(4, [64, 64], [14, 14], [3, 3], [1, 1, 1], 2),
        shape2d(4, [64, 64], [14, 14], [3, 2], [1, 1, 1], 1),
        shape2d(4, [64, 64], [14, 14], [4, 4], [1, 1, 1], 1),
        shape2d(4, [64, 64], [14, 14], [4, 4], [2, 1, 2], 1),
        shape2d(4, [64, 64], [14, 14], [4, 4], [4, 1, 1], 1),
    ] {
        assert!(grids(&other).next().is_none() && !pays(&other.forward_gather()), "{other:?}");
    }
    // Mostly borders, and too few channels or tiles.
    assert!(!pays(&shape2d(40, [64, 64], [2, 2], [3, 3], [1, 1, 1], 1).forward_gather()));
    assert!(!pays(&shape2d(4, [16, 64], [14, 14], [3, 3], [1, 1, 1], 1).forward_gather()));
    assert!(!pays(&shape2d(1, [64, 64], [4, 4], [3, 3], [1, 1, 1], 1).forward_gather()));
}

/// Convolutions of three images for all forms.
fn three_images() -> Vec<ConvShape> {
    [0, 1].map(|padding| [3, 4].map(|k| shape2d(3, [34, 32], [4 * k, 10], [k; 2], [k - 2, padding, 1], 1))).concat()
}

#[test]
fn extreme_values_send_their_images_to_windows() {
    for s in three_images() {
        let w = filled(s.weight_len(), 1);
        let sides = |[by, back_by]: [Grid; 2]| [(by, s.forward_gather()), (back_by, s.transposed_gather())];
        for (grid, g) in grids(&s).flat_map(sides) {
            let [source, target] = [g.source_pixels() * g.cin, g.target_pixels() * g.cout];
            let (x, gy, image) = (filled(source, 2), filled(target, 3), source / 3);
            // A gather by phases of sources is no way to the weights.
            let is_for_weights = grid.source_phases().count() == 1;
            let refuses = |x: &[f32], gy: &[f32]| {
                let mut gw = vec![9f32; w.len()];
                !is_for_weights || !weight_grad_by(&grid, &g, x, gy, &mut gw).unwrap() && gw.iter().all(|&v| v == 9.0)
            };
            for extreme in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                for at in [image, image + image / 2 + 1, 2 * image - 1] {
                    let mut x = x.clone();
                    x[at] = extreme;
                    let (mut y, mut expected) = (vec![9f32; target], vec![9f32; target]);
                    let seen = AtomicUsize::new(0);
                    gather(&grid, &g, &x, &w, None, &mut y, |g, x, y| {
                        seen.fetch_add(g.n, Ordering::Relaxed);
                        direct::gather_singles(g, x, &w, None, y)
                    })
                    .unwrap();
                    assert_eq!(seen.into_inner(), 1, "{extreme} at {at} of {s:?} by {:?}", grid.form);
                    in_windows(&g, &x, &w, None, &mut expected);
                    let bits = |y: &[f32]| y[y.len() / 3..y.len() * 2 / 3].iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&y), bits(&expected));
                    assert!(refuses(&x, &gy));
                }
                let (mut bad_w, mut bad_gy) = (w.clone(), gy.clone());
                (bad_w[7], bad_gy[target - 1]) = (extreme, extreme);
                let seen = AtomicUsize::new(0);
                let count = |g: &Gather, _: &[f32], _: &mut [f32]| {
                    seen.fetch_add(g.n, Ordering::Relaxed);
                    Ok(())
                };
                gather(&grid, &g, &x, &bad_w, None, &mut vec![0f32; target], count).unwrap();
                assert_eq!(seen.into_inner(), 3);
                assert!(refuses(&x, &bad_gy));
            }
        }
    }
}

#[test]
fn the_largest_values_that_are_transformed_do_not_overflow() {
    let alike = |got: &[f32], expected: &[f32]| got.iter().zip(expected).all(|(got, expected)| (got / expected - 1.0).abs() < 3e-5);
    for s in [shape2d(1, [512, 32], [14, 14], [3, 3], [1, 1, 1], 1), shape2d(1, [256, 32], [14, 14], [4, 4], [2, 1, 1], 1)] {
        let (forward, back) = (s.forward_gather(), s.transposed_gather());
        let (x, gy, w) = (vec![LIMIT; s.input_len()], vec![LIMIT; s.output_len()], vec![LIMIT; s.weight_len()]);
        let (mut y, mut gx, mut gw) = (gy.clone(), x.clone(), w.clone());
        in_windows(&forward, &x, &w, None, &mut y);
        in_windows(&back, &gy, &w, None, &mut gx);
        windows_weight::weight_grad(MicroKernels::get(), &forward, &back, &x, &gy, &mut gw).unwrap();
        for [by, back_by] in grids(&s) {
            let (mut got_y, mut got_gx, mut got_gw) = (gy.clone(), x.clone(), w.clone());
            transformed(&by, &forward, &x, &w, None, &mut got_y);
            transformed(&back_by, &back, &gy, &w, None, &mut got_gx);
            assert!(weight_grad_by(&back_by, &back, &gy, &x, &mut got_gw).unwrap());
            assert!(alike(&got_y, &y) && alike(&got_gx, &gx) && alike(&got_gw, &gw), "{s:?} by {:?}", by.form);
        }
    }
}

#[test]
fn the_form_and_the_side_are_those_of_least_time() {
    let form = |g: &Gather| plan(g).map(|grid| grid.form);
    for (s, expected) in [
        (shape2d(40, [32, 48], [14, 14], [3, 3], [1, 1, 1], 1), Algorithm::F3x3),
        (shape2d(400, [32, 48], [4, 4], [3, 3], [1, 1, 1], 1), Algorithm::F2x3),
        (shape2d(40, [32, 48], [14, 14], [4, 4], [2, 1, 1], 1), Algorithm::F3x2),
    ] {
        let (forward, back) = (s.forward_gather(), s.transposed_gather());
        assert!(form(&forward) == Some(expected) && form(&back) == Some(expected), "{s:?}");
        let (x, gy) = (filled(s.input_len(), 1), filled(s.output_len(), 2));
        let (mut got, mut want) = (vec![9f32; s.weight_len()], vec![9f32; s.weight_len()]);
        assert!(weight_grad(&forward, &back, &x, &gy, &mut got).unwrap());
        // Only the transposed side of a stride has sources without phases.
        let (g, x, gy) = if s.stride == [1; 3] { (forward, x, gy) } else { (back, gy, x) };
        assert!(weight_grad_by(&plan(&g).unwrap(), &g, &x, &gy, &mut want).unwrap());
        assert!(got == want);
    }
    // Fewer channels are transformed for the weights only.
    let few = shape2d(40, [16, 20], [14, 14], [3, 3], [1, 1, 1], 1);
    assert!(plan(&few.forward_gather()).is_none() && plan_from(MIN_WEIGHT_CHANNELS, &few.forward_gather()).is_some());
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for s in [
        shape2d(9, [64, 70], [14, 14], [3, 3], [1, 1, 1], 1),
        shape2d(1, [130, 200], [9, 12], [3, 3], [1, 1, 1], 1),
        shape2d(9, [64, 70], [14, 14], [4, 4], [2, 1, 1], 1),
    ] {
        let (x, gy, w) = (filled(s.input_len(), 1), filled(s.output_len(), 2), filled(s.weight_len(), 3));
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut gx, mut gw) = (gy.clone(), x.clone(), w.clone());
                let mut bits = Vec::new();
                for [by, back_by] in grids(&s) {
                    transformed(&by, &s.forward_gather(), &x, &w, None, &mut y);
                    transformed(&back_by, &s.transposed_gather(), &gy, &w, None, &mut gx);
                    assert!(weight_grad_by(&back_by, &s.transposed_gather(), &gy, &x, &mut gw).unwrap());
                    bits.extend(y.iter().chain(&gx).chain(&gw).map(|v| v.to_bits()));
                }
                bits
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
}
