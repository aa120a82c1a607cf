//! Pooling and interpolation.

use crate::harness::{Case, case};
use crate::reference::{Array, indices};
use kiln_tensor::DType;
use kiln_tensor::ops::pool::PoolOptions;
use kiln_tensor::ops::upsample::Interpolation;

/// Folds, for each output of every axis, the inputs in its window: `windows(axis, extent)` lists `(positions, padding positions)`.
fn pool(x: &Array, windows: impl Fn(usize) -> Vec<Vec<usize>>, f: impl Fn(&[f64]) -> f64) -> Array {
    let axes: Vec<Vec<Vec<usize>>> = x.shape[2..].iter().map(|&e| windows(e)).collect();
    let shape: Vec<usize> = x.shape[..2].iter().copied().chain(axes.iter().map(Vec::len)).collect();
    Array::from_fn(&shape, |at| {
        let window: Vec<&Vec<usize>> = axes.iter().zip(&at[2..]).map(|(axis, &o)| &axis[o]).collect();
        let extents: Vec<usize> = window.iter().map(|w| w.len()).collect();
        let value = |i: Vec<usize>| x.at(&at[..2].iter().copied().chain(i.iter().zip(&window).map(|(&i, w)| w[i])).collect::<Vec<_>>());
        f(&indices(&extents).map(value).collect::<Vec<_>>())
    })
}

/// Windows of `kernel` every `stride`, clipped to the image.
fn sliding(kernel: usize, stride: usize, padding: usize, outputs: usize) -> impl Fn(usize) -> Vec<Vec<usize>> {
    move |extent| {
        let window = |o: usize| (o * stride..o * stride + kernel).filter_map(|p| p.checked_sub(padding)).filter(|&p| p < extent).collect();
        (0..outputs).map(window).collect()
    }
}

fn adaptive(outputs: usize) -> impl Fn(usize) -> Vec<Vec<usize>> {
    move |extent| (0..outputs).map(|o| (o * extent / outputs..((o + 1) * extent).div_ceil(outputs)).collect()).collect()
}

fn max(v: &[f64]) -> f64 {
    v.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn mean(v: &[f64]) -> f64 {
    v.iter().sum::<f64>() / v.len() as f64
}

/// Linear interpolation of each axis by the textbook formula.
fn linear(x: &Array, size: usize, align_corners: bool) -> Array {
    let mut shape = x.shape.clone();
    shape[2..].fill(size);
    Array::from_fn(&shape, |at| {
        let mut sum = 0.0;
        for corner in indices(&vec![2; shape.len() - 2]) {
            let (mut weight, mut from) = (1.0, at[..2].to_vec());
            for (axis, &high) in corner.iter().enumerate() {
                let (extent, o) = (x.shape[axis + 2], at[axis + 2] as f64);
                let position = if align_corners {
                    o * (extent as f64 - 1.0) / (size as f64 - 1.0).max(1.0)
                } else {
                    ((o + 0.5) * extent as f64 / size as f64 - 0.5).max(0.0)
                };
                let fraction = position - position.floor();
                weight *= if high == 1 { fraction } else { 1.0 - fraction };
                from.push((position as usize + high).min(extent - 1));
            }
            sum += weight * x.at(&from);
        }
        sum
    })
}

pub fn cases() -> Vec<Case> {
    let options = || PoolOptions::new(3).stride(2).padding(1);
    let interpolated = Interpolation::Linear { align_corners: false };
    vec![
        case("max_pool2d", |x| x[0].max_pool2d(2), |x| pool(&x[0], sliding(2, 2, 0, 2), max))
            .distinct()
            .sample(&[&[2, 3, 4, 5]])
            .sample(&[&[0, 3, 4, 5]])
            .large(&[&[16, 32, 24, 24]]),
        case("max_pool2d", move |x| x[0].max_pool2d(options()), |x| pool(&x[0], sliding(3, 2, 1, 3), max))
            .label("overlapping")
            .also(&["new", "stride", "padding", "dilation", "ceil_mode", "count_include_pad"])
            .distinct()
            .sample(&[&[2, 2, 5, 5]]),
        case("max_pool1d", |x| x[0].max_pool1d(PoolOptions::new(2).dilation(1).ceil_mode(true)), |x| pool(&x[0], sliding(2, 2, 0, 3), max))
            .distinct()
            .sample(&[&[2, 2, 5]]),
        case("max_pool3d", |x| x[0].max_pool3d([2, 2, 2]), |x| pool(&x[0], sliding(2, 2, 0, 1), max))
            .distinct()
            .sample(&[&[2, 2, 2, 3, 2]]),
        case(
            "max_pool2d_with_indices",
            |x| x[0].max_pool2d_with_indices(2)?.1.to_dtype(DType::F64),
            |x| {
                let values = pool(&x[0], sliding(2, 2, 0, 2), max);
                let plane = x[0].shape[2] * x[0].shape[3];
                Array::from_fn(&values.shape.clone(), |at| {
                    let channel = at[0] * x[0].shape[1] + at[1];
                    x[0].data[channel * plane..][..plane].iter().position(|&v| v == values.at(at)).map_or(-1.0, |p| p as f64)
                })
            },
        )
        .distinct()
        .not_differentiable()
        .sample(&[&[2, 3, 4, 5]]),
        case("avg_pool2d", move |x| x[0].avg_pool2d(options().count_include_pad(false)), |x| pool(&x[0], sliding(3, 2, 1, 3), mean))
            .sample(&[&[2, 3, 5, 5]])
            .sample(&[&[0, 3, 5, 5]])
            .large(&[&[16, 32, 24, 24]]),
        case("avg_pool2d", move |x| x[0].avg_pool2d(options()), |x| pool(&x[0], sliding(3, 2, 1, 3), |v| v.iter().sum::<f64>() / 9.0))
            .label("padding counts")
            .sample(&[&[2, 3, 5, 5]]),
        case("avg_pool1d", |x| x[0].avg_pool1d(2), |x| pool(&x[0], sliding(2, 2, 0, 2), mean)).sample(&[&[2, 2, 5]]),
        case("avg_pool3d", |x| x[0].avg_pool3d(2), |x| pool(&x[0], sliding(2, 2, 0, 1), mean)).sample(&[&[2, 2, 2, 3, 2]]),
        case("adaptive_avg_pool1d", |x| x[0].adaptive_avg_pool1d(3), |x| pool(&x[0], adaptive(3), mean)).sample(&[&[2, 2, 7]]),
        case("adaptive_avg_pool2d", |x| x[0].adaptive_avg_pool2d([3, 3]), |x| pool(&x[0], adaptive(3), mean))
            .sample(&[&[2, 2, 7, 2]])
            .sample(&[&[1, 2, 3, 4]]),
        case("adaptive_avg_pool2d", |x| x[0].adaptive_avg_pool2d(1), |x| pool(&x[0], adaptive(1), mean))
            .label("whole images")
            .sample(&[&[2, 2, 7, 2]])
            .large(&[&[16, 32, 24, 24]]),
        case("adaptive_avg_pool3d", |x| x[0].adaptive_avg_pool3d(2), |x| pool(&x[0], adaptive(2), mean)).sample(&[&[1, 2, 3, 2, 4]]),
        case("adaptive_max_pool1d", |x| x[0].adaptive_max_pool1d(3), |x| pool(&x[0], adaptive(3), max)).distinct().sample(&[&[2, 2, 7]]),
        case("adaptive_max_pool2d", |x| x[0].adaptive_max_pool2d(3), |x| pool(&x[0], adaptive(3), max)).distinct().sample(&[&[2, 2, 7, 2]]),
        case("adaptive_max_pool3d", |x| x[0].adaptive_max_pool3d(2), |x| pool(&x[0], adaptive(2), max))
            .distinct()
            .sample(&[&[1, 2, 3, 2, 4]]),
        case("interpolate", move |x| x[0].interpolate(4, interpolated), |x| linear(&x[0], 4, false))
            .sample(&[&[2, 2, 3, 5]])
            .sample(&[&[1, 2, 7]])
            .sample(&[&[1, 1, 2, 3, 5]])
            .large(&[&[16, 32, 24, 24]]),
        case("upsample_bilinear", |x| x[0].upsample_bilinear(2, true), |x| linear(&x[0], 6, true)).sample(&[&[2, 2, 3, 3]]),
        case(
            "upsample_nearest",
            |x| x[0].upsample_nearest(2),
            |x| {
                let shape: Vec<usize> = x[0].shape.iter().enumerate().map(|(d, &e)| if d < 2 { e } else { 2 * e }).collect();
                Array::from_fn(&shape, |at| {
                    x[0].at(&at.iter().enumerate().map(|(d, &i)| if d < 2 { i } else { i / 2 }).collect::<Vec<_>>())
                })
            },
        )
        .sample(&[&[2, 3, 2, 3]])
        .sample(&[&[0, 3, 2, 3]]),
    ]
}
