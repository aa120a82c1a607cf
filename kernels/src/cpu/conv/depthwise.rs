//! One channel a group: each channel is convolved with its own taps. Plain loops over blocks of channels, which the
//! compiler vectorises with the features of the level.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel;
use super::super::resample::Real;
use super::super::simd::Simd;
use super::{Gather, part_start, weight};

/// Channels summed in registers at once: four vectors of AVX-512.
const CHANNELS: usize = 64;

/// A gather of a depthwise convolution. See [`super::forward`]; `x` and `y` are the source and target images.
pub(super) fn gather<T: Real>(g: &Gather, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    let (c, taps) = (g.groups, g.taps());
    let mut buffer = Buffer::new(size_of_val(w))?;
    let by_tap = buffer.as_slice_mut::<T>();
    for (channel, w) in w.chunks(taps).enumerate() {
        for (tap, &w) in w.iter().enumerate() {
            by_tap[tap * c + channel] = w;
        }
    }
    let by_tap = &*by_tap;
    let row_len = g.target[2] * c;
    // About 16 Ki elements a task, so that it outlasts its hand-over.
    let rows = (16384 / row_len).max(1);
    let ns = y.len() * g.taps_per_target() / 8;
    parallel::for_each_chunk(y, rows * row_len, ns, |i, y| dispatch(Rows { g, x, w: by_tap, bias, y, first: i * rows }));
    Ok(())
}

struct Rows<'a, T> {
    g: &'a Gather,
    x: &'a [T],
    /// `[tap][channel]`.
    w: &'a [T],
    bias: Option<&'a [T]>,
    y: &'a mut [T],
    /// The first target row, counted over images, depths and heights.
    first: usize,
}

impl<T: Real> WithSimd for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (g, c) = (self.g, self.g.groups);
        let mut taps: Vec<(usize, usize)> = Vec::new();
        for (row, y) in self.y.chunks_mut(g.target[2] * c).enumerate() {
            let row = self.first + row;
            let (image, d, h) = (row / (g.target[1] * g.target[0]), row / g.target[1] % g.target[0], row % g.target[1]);
            for (w, y) in y.chunks_mut(c).enumerate() {
                taps.clear();
                visit_taps(g, image, [d, h, w], |pixel, tap| taps.push((pixel * c, tap * c)));
                let mut at = 0;
                while at + CHANNELS <= c {
                    channels::<T, CHANNELS>(self.x, self.w, self.bias, &taps, at, y);
                    at += CHANNELS;
                }
                while at + 8 <= c {
                    channels::<T, 8>(self.x, self.w, self.bias, &taps, at, y);
                    at += 8;
                }
                while at < c {
                    channels::<T, 1>(self.x, self.w, self.bias, &taps, at, y);
                    at += 1;
                }
            }
        }
    }
}

/// Calls `f(source pixel, tap)` for the taps of a target that lie inside of the image, in order.
#[inline(always)]
fn visit_taps(g: &Gather, image: usize, target: [usize; 3], mut f: impl FnMut(usize, usize)) {
    let source = |axis: usize, tap: usize| {
        g.axes[axis].source(target[axis], tap).and_then(|s| usize::try_from(s).ok()).filter(|&s| s < g.source[axis])
    };
    for kd in 0..g.kernel[0] {
        let Some(d) = source(0, kd) else { continue };
        for kh in 0..g.kernel[1] {
            let Some(h) = source(1, kh) else { continue };
            let line = ((image * g.source[0] + d) * g.source[1] + h) * g.source[2];
            for kw in 0..g.kernel[2] {
                if let Some(w) = source(2, kw) {
                    f(line + w, (kd * g.kernel[1] + kh) * g.kernel[2] + kw);
                }
            }
        }
    }
}

#[inline(always)]
fn channels<T: Real, const W: usize>(x: &[T], w: &[T], bias: Option<&[T]>, taps: &[(usize, usize)], at: usize, y: &mut [T]) {
    let mut sum = [T::zero(); W];
    if let Some(bias) = bias {
        sum.copy_from_slice(&bias[at..at + W]);
    }
    for &(pixel, tap) in taps {
        let (x, w) = (&x[pixel + at..pixel + at + W], &w[tap + at..tap + at + W]);
        for i in 0..W {
            sum[i] = sum[i] + x[i] * w[i];
        }
    }
    y[at..at + W].copy_from_slice(&sum);
}

/// The weight gradient of a depthwise convolution, from partial sums over constant parts of the targets.
pub(super) fn weight_grad<T: Real>(g: &Gather, x: &[T], gy: &[T], gw: &mut [T]) -> Result<(), OutOfMemory> {
    let (c, taps) = (g.groups, g.taps());
    let splits = weight::splits(g.target_pixels(), 1);
    // Of each part its sum, and that of the pixels at hand.
    let mut buffer = Buffer::new(size_of::<T>() * splits * 2 * taps * c)?;
    let partial = buffer.as_slice_mut::<T>();
    let ns = gy.len() * g.taps_per_target() / 8;
    parallel::for_each_chunk(partial, 2 * taps * c, ns, |split, sums| {
        let (whole, sum) = sums.split_at_mut(taps * c);
        let pixels = part_start(g.target_pixels(), splits, split)..part_start(g.target_pixels(), splits, split + 1);
        dispatch(Products { g, x, gy, whole, sum, pixels });
    });
    for (channel, gw) in gw.chunks_mut(taps).enumerate() {
        for (tap, gw) in gw.iter_mut().enumerate() {
            *gw = (0..splits).fold(T::zero(), |sum, split| sum + partial[(split * 2 * taps + tap) * c + channel]);
        }
    }
    Ok(())
}

struct Products<'a, T> {
    g: &'a Gather,
    x: &'a [T],
    gy: &'a [T],
    /// `[tap][channel]`.
    whole: &'a mut [T],
    /// The same of some pixels.
    sum: &'a mut [T],
    pixels: std::ops::Range<usize>,
}

/// Pixels whose products are summed before the sum joins that of the others: one sum of all would round the more the larger it grows.
const PIXELS: usize = 1024;

impl<T: Real> WithSimd for Products<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (g, c, [_, height, width]) = (self.g, self.g.groups, self.g.target);
        self.whole.fill(T::zero());
        for first in self.pixels.clone().step_by(PIXELS) {
            self.sum.fill(T::zero());
            for pixel in first..self.pixels.end.min(first + PIXELS) {
                let (line, w) = (pixel / width, pixel % width);
                let (image, d, h) = (line / (height * g.target[0]), line / height % g.target[0], line % height);
                let gy = &self.gy[pixel * c..][..c];
                visit_taps(g, image, [d, h, w], |source, tap| {
                    let (x, sum) = (&self.x[source * c..][..c], &mut self.sum[tap * c..][..c]);
                    for i in 0..c {
                        sum[i] = sum[i] + x[i] * gy[i];
                    }
                });
            }
            for (whole, &sum) in self.whole.iter_mut().zip(&*self.sum) {
                *whole = *whole + sum;
            }
        }
    }
}
