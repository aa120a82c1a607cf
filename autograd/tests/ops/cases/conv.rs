//! Convolutions.

use crate::harness::{Case, case};
use crate::reference::{Array, indices};
use kiln_tensor::ops::conv::ConvOptions;

/// `stride`, `padding`, `dilation` and `output_padding` for every axis, and groups.
#[derive(Clone, Copy)]
struct Slide {
    stride: usize,
    padding: usize,
    dilation: usize,
    output_padding: usize,
    groups: usize,
}

const PLAIN: Slide = Slide { stride: 1, padding: 0, dilation: 1, output_padding: 0, groups: 1 };

impl Slide {
    fn options(self) -> ConvOptions {
        let options = ConvOptions::new().stride(self.stride).padding(self.padding).dilation(self.dilation).groups(self.groups);
        options.output_padding(self.output_padding)
    }

    /// Every `(wide, narrow)` position pair under tap `k`, if it lies inside of the wide image.
    fn wide(self, narrow: &[usize], k: &[usize], extents: &[usize]) -> Option<Vec<usize>> {
        (0..k.len())
            .map(|i| (narrow[i] * self.stride + k[i] * self.dilation).checked_sub(self.padding).filter(|&at| at < extents[i]))
            .collect()
    }
}

fn shift(y: Array, bias: Option<&Array>) -> Array {
    match bias {
        Some(bias) => Array::from_fn(&y.shape.clone(), |i| y.at(i) + bias.at(&[i[1]])),
        None => y,
    }
}

/// The definition of a convolution: x, weight, and a bias if there are three.
fn convolve(x: &[Array], s: Slide) -> Array {
    let (image, weight) = (&x[0], &x[1]);
    let (extents, kernel) = (&image.shape[2..], &weight.shape[2..]);
    let (co, ci) = (weight.shape[0], weight.shape[1]);
    let mut shape = vec![image.shape[0], co];
    shape.extend((0..kernel.len()).map(|i| (extents[i] + 2 * s.padding - s.dilation * (kernel[i] - 1) - 1) / s.stride + 1));
    let y = Array::from_fn(&shape, |at| {
        let group = at[1] / (co / s.groups);
        let mut sum = 0.0;
        for k in indices(kernel) {
            if let Some(wide) = s.wide(&at[2..], &k, extents) {
                for c in 0..ci {
                    sum += image.at(&[&[at[0], group * ci + c], &wide[..]].concat()) * weight.at(&[&[at[1], c], &k[..]].concat());
                }
            }
        }
        sum
    });
    shift(y, x.get(2))
}

/// The definition of a transposed convolution: every input adds its kernel to the result.
fn spread(x: &[Array], s: Slide) -> Array {
    let (image, weight) = (&x[0], &x[1]);
    let (extents, kernel) = (&image.shape[2..], &weight.shape[2..]);
    let (ci, co) = (weight.shape[0] / s.groups, weight.shape[1]);
    let mut shape = vec![image.shape[0], co * s.groups];
    shape.extend(
        (0..kernel.len()).map(|i| (extents[i] - 1) * s.stride + s.dilation * (kernel[i] - 1) + s.output_padding + 1 - 2 * s.padding),
    );
    let mut y = Array::from_fn(&shape, |_| 0.0);
    for at in indices(&image.shape) {
        for k in indices(kernel) {
            if let Some(wide) = s.wide(&at[2..], &k, &shape[2..]) {
                for j in 0..co {
                    let to = [&[at[0], at[1] / ci * co + j], &wide[..]].concat();
                    let flat = to.iter().zip(&shape).fold(0, |flat, (&i, &d)| flat * d + i);
                    y.data[flat] += image.at(&at) * weight.at(&[&[at[1], j], &k[..]].concat());
                }
            }
        }
    }
    shift(y, x.get(2))
}

const OPTIONS: &[&str] = &["new", "stride", "padding", "dilation", "groups", "output_padding"];

pub fn cases() -> Vec<Case> {
    let conv2d = |s: Slide| case("conv2d", move |x| x[0].conv2d(&x[1], x.get(2), s.options()), move |x| convolve(x, s)).also(OPTIONS);
    let transpose2d =
        |s: Slide| case("conv_transpose2d", move |x| x[0].conv_transpose2d(&x[1], x.get(2), s.options()), move |x| spread(x, s));
    let down = Slide { stride: 2, padding: 1, ..PLAIN };
    vec![
        conv2d(PLAIN)
            .sample(&[&[2, 3, 4, 3], &[2, 3, 2, 3]])
            .sample(&[&[0, 3, 4, 3], &[2, 3, 2, 3], &[2]])
            .sample(&[&[1, 9, 2, 2], &[9, 9, 1, 1], &[9]])
            .sample(&[&[1, 16, 2, 2], &[16, 16, 1, 1], &[16]])
            .large(&[&[8, 16, 20, 20], &[40, 16, 3, 3], &[40]]),
        // Large ones of these and the next two are transformed (Winograd), both ways and for the weights.
        conv2d(Slide { padding: 1, ..PLAIN }).label("padding").sample(&[&[1, 2, 3, 4], &[3, 2, 3, 3]]).large(&[
            &[16, 32, 14, 11],
            &[40, 32, 3, 3],
            &[40],
        ]),
        conv2d(down).label("stride 2, transformed").sample(&[&[1, 2, 6, 4], &[2, 2, 4, 4]]).large(&[
            &[24, 32, 14, 14],
            &[40, 32, 4, 4],
            &[40],
        ]),
        transpose2d(down).label("stride 2, transformed").sample(&[&[1, 2, 3, 2], &[2, 2, 4, 4]]).large(&[
            &[24, 32, 7, 7],
            &[32, 40, 4, 4],
            &[40],
        ]),
        // As the discriminator and the generator of a DCGAN use them.
        conv2d(down).label("stride 2").sample(&[&[2, 1, 4, 4], &[3, 1, 4, 4], &[3]]).sample(&[&[1, 8, 4, 4], &[2, 8, 4, 4]]),
        transpose2d(down).label("stride 2").sample(&[&[2, 3, 2, 2], &[3, 2, 4, 4], &[2]]).sample(&[&[1, 8, 2, 2], &[8, 1, 4, 4]]).large(&[
            &[8, 32, 14, 14],
            &[32, 8, 4, 4],
            &[8],
        ]),
        conv2d(Slide { groups: 2, padding: 1, ..PLAIN }).label("groups").sample(&[&[1, 4, 3, 2], &[6, 2, 3, 3], &[6]]),
        conv2d(Slide { groups: 3, padding: 1, ..PLAIN }).label("depthwise").sample(&[&[2, 3, 3, 3], &[3, 1, 3, 3], &[3]]).large(&[
            &[8, 3, 64, 64],
            &[3, 1, 3, 3],
            &[3],
        ]),
        conv2d(Slide { dilation: 2, padding: 2, stride: 3, ..PLAIN }).label("dilation").sample(&[&[1, 2, 5, 6], &[2, 2, 2, 3]]),
        transpose2d(Slide { groups: 2, stride: 3, output_padding: 2, padding: 1, ..PLAIN })
            .label("groups, output padding")
            .sample(&[&[1, 4, 2, 3], &[4, 2, 3, 2], &[4]])
            .sample(&[&[0, 4, 2, 3], &[4, 2, 3, 2]]),
        transpose2d(Slide { dilation: 2, ..PLAIN }).label("dilation").sample(&[&[1, 2, 3, 2], &[2, 3, 2, 2]]),
        case("conv1d", move |x| x[0].conv1d(&x[1], x.get(2), down.options()), move |x| convolve(x, down)).sample(&[
            &[2, 2, 7],
            &[3, 2, 3],
            &[3],
        ]),
        case("conv3d", move |x| x[0].conv3d(&x[1], None, down.options()), move |x| convolve(x, down))
            .sample(&[&[1, 2, 3, 2, 4], &[2, 2, 2, 2, 3]]),
        case("conv_transpose1d", move |x| x[0].conv_transpose1d(&x[1], x.get(2), down.options()), move |x| spread(x, down)).sample(&[
            &[2, 2, 3],
            &[2, 3, 3],
            &[3],
        ]),
        case("conv_transpose3d", move |x| x[0].conv_transpose3d(&x[1], None, down.options()), move |x| spread(x, down))
            .sample(&[&[1, 2, 2, 1, 2], &[2, 2, 3, 4, 3]]),
        case("conv2d", |x| x[0].conv2d(&x[1], None, ())?.unsqueeze(0), |x| convolve(&[x[0].reshape(&[1, 2, 3, 3]), x[1].clone()], PLAIN))
            .label("without batch")
            .sample(&[&[2, 3, 3], &[2, 2, 2, 2]]),
    ]
}
