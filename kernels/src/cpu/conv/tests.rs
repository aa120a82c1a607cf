//! Every algorithm against the definition in f64, element by element.

use super::*;
use ::half::bf16;

/// Deterministic values in -1..1.
pub(crate) fn values(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Multiples of 2^-10 are exact in f32.
            ((state >> 53) as f64 - 1024.0) / 1024.0
        })
        .collect()
}

/// Calls `f(x, y, w)` with the offsets of every product of the convolution.
pub(crate) fn each_product(s: &ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let (ci, co) = (s.ci / s.groups, s.co / s.groups);
    let all = |e: [usize; 3]| (0..e[0]).flat_map(move |d| (0..e[1]).flat_map(move |h| (0..e[2]).map(move |w| [d, h, w])));
    let flat = |e: [usize; 3], p: [usize; 3]| (p[0] * e[1] + p[1]) * e[2] + p[2];
    for n in 0..s.n {
        for o in all(s.output) {
            for k in all(s.kernel) {
                let at: [isize; 3] = std::array::from_fn(|i| (o[i] * s.stride[i] + k[i] * s.dilation[i]) as isize - s.padding[i] as isize);
                if (0..3).any(|i| !(0..s.input[i] as isize).contains(&at[i])) {
                    continue;
                }
                let x = (n * s.input.iter().product::<usize>() + flat(s.input, at.map(|v| v as usize))) * s.ci;
                let y = (n * s.output.iter().product::<usize>() + flat(s.output, o)) * s.co;
                for g in 0..s.groups {
                    for j in 0..co {
                        for c in 0..ci {
                            let w = ((g * co + j) * ci + c) * s.taps() + flat(s.kernel, k);
                            f(x + g * ci + c, y + g * co + j, w);
                        }
                    }
                }
            }
        }
    }
}

/// `hw` and `k` are height and width; `[stride, padding, dilation]` hold for both.
pub(crate) fn shape2d(
    n: usize,
    [ci, co]: [usize; 2],
    hw: [usize; 2],
    k: [usize; 2],
    [stride, padding, dilation]: [usize; 3],
    groups: usize,
) -> ConvShape {
    let out = |i: usize| output_extent(hw[i], k[i], stride, padding, dilation).unwrap();
    ConvShape {
        n,
        ci,
        co,
        groups,
        input: [1, hw[0], hw[1]],
        output: [1, out(0), out(1)],
        kernel: [1, k[0], k[1]],
        stride: [1, stride, stride],
        padding: [0, padding, padding],
        dilation: [1, dilation, dilation],
        precision: MatmulPrecision::Highest,
    }
}

pub(crate) fn shapes() -> Vec<ConvShape> {
    let mut shapes = vec![
        // DCGAN's layers, fewer images and channels.
        shape2d(3, [1, 40], [28, 28], [4, 4], [2, 1, 1], 1),
        shape2d(3, [40, 72], [14, 14], [4, 4], [2, 1, 1], 1),
        shape2d(2, [3, 33], [9, 11], [3, 3], [1, 1, 1], 1),
        shape2d(2, [16, 16], [8, 8], [3, 3], [1, 1, 1], 1),
        shape2d(1, [37, 13], [5, 7], [1, 1], [1, 0, 1], 1),
        shape2d(2, [24, 3], [13, 10], [3, 3], [1, 1, 1], 1),
        shape2d(2, [24, 1], [13, 10], [5, 4], [1, 2, 1], 1),
        shape2d(1, [9, 10], [17, 16], [3, 3], [2, 1, 2], 1),
        shape2d(1, [5, 6], [17, 16], [3, 2], [3, 2, 4], 1),
        shape2d(2, [12, 18], [7, 6], [3, 3], [1, 1, 1], 3),
        shape2d(2, [4, 8], [7, 6], [3, 3], [2, 1, 1], 2),
        shape2d(2, [70, 70], [7, 6], [3, 3], [2, 1, 1], 70),
        shape2d(1, [5, 10], [6, 6], [3, 3], [1, 1, 1], 5),
        shape2d(1, [3, 3], [2, 2], [4, 4], [2, 1, 1], 1),
        // The stride steps over inputs that no output reads.
        shape2d(1, [8, 9], [11, 12], [2, 2], [4, 0, 1], 1),
        // Padding as wide as the kernel: whole outputs of nothing but padding.
        shape2d(1, [8, 8], [3, 3], [2, 2], [1, 2, 1], 1),
        shape2d(4, [130, 100], [4, 4], [3, 3], [1, 1, 1], 1),
        shape2d(1, [2, 1], [1, 300], [1, 31], [2, 15, 1], 1),
        // One channel and lines that fill vectors, whole or not; the third is one of its own input gradient.
        shape2d(2, [1, 8], [9, 32], [3, 3], [1, 1, 1], 1),
        shape2d(2, [1, 16], [11, 47], [3, 5], [1, 2, 1], 1),
        shape2d(1, [6, 1], [7, 30], [3, 3], [1, 2, 2], 1),
        shape2d(1, [1, 5], [6, 98], [2, 3], [1, 0, 4], 1),
        shape2d(1, [1, 3], [3, 12], [3, 9], [1, 4, 1], 1),
        // Three taps along a line, of any padding, in lines shorter than a tile and longer, in groups.
        shape2d(1, [5, 12], [6, 20], [3, 3], [1, 0, 1], 1),
        shape2d(1, [9, 17], [5, 19], [3, 3], [1, 2, 1], 1),
        shape2d(3, [10, 40], [2, 1], [2, 3], [1, 1, 1], 1),
        shape2d(2, [18, 20], [7, 11], [3, 3], [1, 1, 1], 2),
        shape2d(1, [9, 12], [2, 201], [1, 3], [1, 1, 1], 1),
        // Few targets, many weights.
        shape2d(2, [130, 120], [5, 6], [3, 3], [1, 1, 1], 1),
        shape2d(1, [120, 130], [9, 7], [3, 3], [2, 1, 1], 1),
    ];
    let volume = ConvShape {
        n: 2,
        ci: 9,
        co: 12,
        groups: 1,
        input: [5, 6, 7],
        output: [3, 6, 4],
        kernel: [2, 3, 3],
        stride: [2, 1, 2],
        padding: [1, 1, 1],
        dilation: [2, 1, 1],
        precision: MatmulPrecision::Highest,
    };
    for i in 0..3 {
        let extent = output_extent(volume.input[i], volume.kernel[i], volume.stride[i], volume.padding[i], volume.dilation[i]);
        assert_eq!(extent, Some(volume.output[i]));
    }
    shapes.push(volume);
    shapes.push(ConvShape { ci: 2, ..volume });
    shapes.push(ConvShape { ci: 1, input: [5, 6, 31], output: [3, 6, 31], stride: [2, 1, 1], ..volume });
    shapes.push(ConvShape { co: 2, ci: 20, ..volume });
    shapes.push(ConvShape { output: [3, 6, 7], stride: [2, 1, 1], ..volume });
    shapes
}

fn close(name: &str, s: &ConvShape, got: &[f32], expected: &[f64]) {
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        assert!((g as f64 - e).abs() <= 2e-5 * (1.0 + e.abs()), "{name} of {s:?}: element {i} is {g}, not {e}");
    }
}

fn exact(name: &str, s: &ConvShape, got: &[f64], expected: &[f64]) {
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= 1e-12 * (1.0 + e.abs()), "{name} of {s:?}: element {i} is {g}, not {e}");
    }
}

pub(crate) fn narrow(v: &[f64]) -> Vec<f32> {
    v.iter().map(|&v| v as f32).collect()
}

#[test]
fn all_three_products_agree_with_the_definition() {
    for s in shapes() {
        let (x, gy, w) = (values(s.input_len(), 1), values(s.output_len(), 2), values(s.weight_len(), 3));
        let (bias_y, bias_x) = (values(s.co, 4), values(s.ci, 5));
        let mut y: Vec<f64> = (0..gy.len()).map(|i| bias_y[i % s.co]).collect();
        let mut gx: Vec<f64> = (0..x.len()).map(|i| bias_x[i % s.ci]).collect();
        let mut gw = vec![0.0; w.len()];
        each_product(&s, |ix, iy, iw| {
            y[iy] += x[ix] * w[iw];
            gx[ix] += gy[iy] * w[iw];
            gw[iw] += x[ix] * gy[iy];
        });
        let (mut y64, mut gx64, mut gw64) = (vec![9.0; y.len()], vec![9.0; x.len()], vec![9.0; w.len()]);
        forward(&s, &x, &w, Some(&bias_y), &mut y64).unwrap();
        input_grad(&s, &gy, &w, Some(&bias_x), &mut gx64).unwrap();
        weight_grad(&s, &x, &gy, &mut gw64).unwrap();
        exact("forward", &s, &y64, &y);
        exact("input_grad", &s, &gx64, &gx);
        exact("weight_grad", &s, &gw64, &gw);
        let (x, gy, w, bias_y, bias_x) = (narrow(&x), narrow(&gy), narrow(&w), narrow(&bias_y), narrow(&bias_x));
        let (mut y32, mut gx32, mut gw32) = (vec![9f32; y.len()], vec![9f32; x.len()], vec![9f32; w.len()]);
        forward(&s, &x, &w, Some(&bias_y), &mut y32).unwrap();
        input_grad(&s, &gy, &w, Some(&bias_x), &mut gx32).unwrap();
        weight_grad(&s, &x, &gy, &mut gw32).unwrap();
        close("forward", &s, &y32, &y);
        close("input_grad", &s, &gx32, &gx);
        close("weight_grad", &s, &gw32, &gw);
    }
}

#[test]
fn pairs_agree_with_the_definition() {
    for s in shapes().into_iter().filter(|s| s.ci.is_multiple_of(2 * s.groups) && s.co.is_multiple_of(2 * s.groups)) {
        let bf16 = |len, seed| narrow(&values(len, seed)).iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
        let (x, gy, w) = (bf16(s.input_len(), 1), bf16(s.output_len(), 2), bf16(s.weight_len(), 3));
        let (bias_y, bias_x) = (narrow(&values(s.co, 4)), narrow(&values(s.ci, 5)));
        let mut y: Vec<f64> = (0..gy.len()).map(|i| bias_y[i % s.co] as f64).collect();
        let mut gx: Vec<f64> = (0..x.len()).map(|i| bias_x[i % s.ci] as f64).collect();
        let mut gw = vec![0.0; w.len()];
        each_product(&s, |ix, iy, iw| {
            y[iy] += x[ix].to_f64() * w[iw].to_f64();
            gx[ix] += gy[iy].to_f64() * w[iw].to_f64();
            gw[iw] += x[ix].to_f64() * gy[iy].to_f64();
        });
        let mut got = vec![9f32; gw.len()];
        pairs::weight_grad(&s.forward_gather(), &s.transposed_gather(), &x, &gy, &mut got).unwrap();
        close("weight_grad", &s, &got, &gw);
        for (name, g, x, bias, y) in
            [("forward", s.forward_gather(), &x, &bias_y, &y), ("input_grad", s.transposed_gather(), &gy, &bias_x, &gx)]
        {
            let mut got = vec![9f32; y.len()];
            pairs::gather(&g, x, &w, Some(bias), &mut got).unwrap();
            close(name, &s, &got, y);
            let mut rounded = vec![bf16::NAN; y.len()];
            pairs::gather(&g, x, &w, Some(bias), &mut rounded).unwrap();
            assert!(rounded.iter().zip(&got).all(|(r, &x)| *r == bf16::from_f32(x)), "{name} of {s:?}: rounded once");
            // An image that begins between two words.
            let shifted: Vec<bf16> = [bf16::ONE].into_iter().chain(x.iter().copied()).collect();
            let mut again = vec![bf16::NAN; y.len()];
            pairs::gather(&g, &shifted[1..], &w, Some(bias), &mut again).unwrap();
            assert!(again == rounded, "{name} of {s:?}: any address");
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for s in [
        shape2d(8, [32, 40], [14, 14], [4, 4], [2, 1, 1], 1),
        shape2d(9, [3, 33], [16, 16], [3, 3], [1, 1, 1], 1),
        shape2d(9, [24, 1], [13, 10], [5, 4], [1, 2, 1], 1),
        shape2d(9, [1, 12], [60, 60], [3, 3], [1, 1, 1], 1),
        shape2d(9, [16, 20], [30, 40], [3, 3], [1, 1, 1], 1),
        shape2d(1, [16, 20], [1, 4000], [1, 3], [1, 0, 1], 1),
    ] {
        let [x, gy, w] = [values(s.input_len(), 1), values(s.output_len(), 2), values(s.weight_len(), 3)].map(|v| narrow(&v));
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut gx, mut gw) = (gy.clone(), x.clone(), w.clone());
                forward(&s, &x, &w, None, &mut y).unwrap();
                input_grad(&s, &gy, &w, None, &mut gx).unwrap();
                weight_grad(&s, &x, &gy, &mut gw).unwrap();
                [y, gx, gw].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
}

/// The second shape has few pixels and many panels: each task packs its own.
#[test]
fn pairs_give_the_same_bits_on_any_number_of_threads() {
    for s in [shape2d(9, [32, 40], [14, 14], [4, 4], [2, 1, 1], 1), shape2d(2, [64, 520], [8, 8], [3, 3], [1, 1, 1], 1)] {
        let [x, gy, w] = [values(s.input_len(), 1), values(s.output_len(), 2), values(s.weight_len(), 3)]
            .map(|v| v.into_iter().map(bf16::from_f64).collect::<Vec<_>>());
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut y, mut gx, mut gw) = (vec![0f32; gy.len()], vec![0f32; x.len()], vec![0f32; w.len()]);
                pairs::gather(&s.forward_gather(), &x, &w, None, &mut y).unwrap();
                pairs::gather(&s.transposed_gather(), &gy, &w, None, &mut gx).unwrap();
                pairs::weight_grad(&s.forward_gather(), &s.transposed_gather(), &x, &gy, &mut gw).unwrap();
                [y, gx, gw].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }
    // Against the definition, by the way of few blocks.
    let s = shape2d(2, [6, 520], [5, 4], [3, 3], [1, 1, 1], 1);
    let [x, w] = [values(s.input_len(), 1), values(s.weight_len(), 3)].map(|v| v.into_iter().map(bf16::from_f64).collect::<Vec<_>>());
    let mut y = vec![0.0; s.output_len()];
    each_product(&s, |ix, iy, iw| y[iy] += x[ix].to_f64() * w[iw].to_f64());
    let mut got = vec![9f32; y.len()];
    pairs::gather(&s.forward_gather(), &x, &w, None, &mut got).unwrap();
    close("few blocks of pixels", &s, &got, &y);
}

#[test]
fn nan_and_infinity_reach_what_they_should_and_nothing_else() {
    let s = shape2d(1, [8, 8], [6, 6], [3, 3], [1, 1, 1], 1);
    let mut x = vec![1f32; s.input_len()];
    x[0] = f32::NAN;
    let w = vec![1f32; s.weight_len()];
    let mut y = vec![0f32; s.output_len()];
    forward(&s, &x, &w, None, &mut y).unwrap();
    for (i, v) in y.iter().enumerate() {
        let (h, w) = (i / 8 / 6, i / 8 % 6);
        assert_eq!(v.is_nan(), h < 2 && w < 2, "{h} {w}");
    }
}

#[test]
fn empty_images_and_channels_are_fine() {
    let s = shape2d(2, [4, 6], [5, 5], [3, 3], [1, 1, 1], 1);
    let none = ConvShape { n: 0, ..s };
    forward::<f32>(&none, &[], &[1.0; 216], None, &mut []).unwrap();
    input_grad::<f32>(&none, &[], &[1.0; 216], None, &mut []).unwrap();
    let mut gw = [9f32; 216];
    weight_grad::<f32>(&none, &[], &[], &mut gw).unwrap();
    assert_eq!(gw, [0.0; 216]);
    let blind = ConvShape { ci: 0, ..s };
    let mut y = vec![9f32; 300];
    forward(&blind, &[], &[], Some(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), &mut y).unwrap();
    assert!(y.chunks(6).all(|p| p == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
    let mut y = vec![9f32; 2 * 25 * 12];
    forward(&ConvShape { co: 12, ..blind }, &[], &[], None, &mut y).unwrap();
    assert!(y.iter().all(|&v| v == 0.0));
    // No sources, but targets in the padding; some are all the same.
    let padded = ConvShape { groups: 2, co: 24, input: [1, 5, 0], output: [1, 7, 2], padding: [0, 2, 2], ..s };
    let mut y = vec![9f32; padded.output_len()];
    forward(&padded, &[], &vec![1.0; padded.weight_len()], None, &mut y).unwrap();
    assert!(y.iter().all(|&v| v == 0.0));
    let mut y = vec![9f64; 300];
    forward(&blind, &[], &[], None, &mut y).unwrap();
    assert!(y.iter().all(|&v| v == 0.0));
}

#[test]
fn extents_follow_the_formulas() {
    assert_eq!(output_extent(28, 4, 2, 1, 1), Some(14));
    assert_eq!(output_extent(2, 3, 1, 0, 1), None);
    assert_eq!(output_extent(9, 3, 0, 0, 1), None);
    assert_eq!(output_extent(9, usize::MAX, 1, 0, 2), None);
    assert_eq!(transposed_extent(7, 4, 2, 1, 1, 0), Some(14));
    assert_eq!(transposed_extent(7, 3, 2, 1, 1, 1), Some(14));
    assert_eq!(transposed_extent(7, 3, 2, 1, 1, 2), None);
    assert_eq!(transposed_extent(1, 1, 1, 3, 1, 0), None);
}
