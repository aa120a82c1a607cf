//! Convolution in simple loops, for f64: each source value times its row of weights is added to the target's channels.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel;
use super::super::resample::Real;
use super::super::simd::Simd;
use super::Gather;

/// See [`super::forward`]; `x` and `y` are the source and target images.
pub(super) fn gather<T: Real>(g: &Gather, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    let taps = g.taps();
    let mut buffer = Buffer::new(size_of_val(w))?;
    let packed = buffer.as_slice_mut::<T>();
    let mut rows = packed.chunks_exact_mut(g.cout);
    for group in 0..g.groups {
        for tap in 0..taps {
            for (c, row) in rows.by_ref().take(g.cin).enumerate() {
                for (j, out) in row.iter_mut().enumerate() {
                    *out = w[g.group_start(group) + c * g.in_stride + j * g.out_stride + tap];
                }
            }
        }
    }
    let packed = &*packed;
    let row_len = g.target[2] * g.groups * g.cout;
    let ns = y.len() * g.cin * g.taps_per_target() / 4;
    parallel::for_each_chunk(y, row_len, ns, |row, y| dispatch(Row { g, x, w: packed, bias, y, row }));
    Ok(())
}

/// One row of targets.
struct Row<'a, T> {
    g: &'a Gather,
    x: &'a [T],
    /// `[group][tap][source channel][target channel]`.
    w: &'a [T],
    bias: Option<&'a [T]>,
    y: &'a mut [T],
    /// Counted over images, depths and heights.
    row: usize,
}

impl<T: Real> WithSimd for Row<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (g, taps, channels) = (self.g, self.g.taps(), self.g.groups * self.g.cin);
        let (image, d, h) = (self.row / (g.target[1] * g.target[0]), self.row / g.target[1] % g.target[0], self.row % g.target[1]);
        for (w, y) in self.y.chunks_exact_mut(g.groups * g.cout).enumerate() {
            match self.bias {
                Some(bias) => y.copy_from_slice(bias),
                None => y.fill(T::zero()),
            }
            for tap in 0..taps {
                let Some(pixel) = source_pixel(g, image, [d, h, w], tap) else { continue };
                let x = &self.x[pixel * channels..][..channels];
                for (group, y) in y.chunks_exact_mut(g.cout).enumerate() {
                    for c in 0..g.cin {
                        let w = &self.w[((group * taps + tap) * g.cin + c) * g.cout..][..g.cout];
                        add_scaled(y, x[group * g.cin + c], w);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add_scaled<T: Real>(sum: &mut [T], factor: T, values: &[T]) {
    for (sum, &value) in sum.iter_mut().zip(values) {
        *sum = *sum + factor * value;
    }
}

/// The source pixel of a target under a tap, if it lies inside of the image.
#[inline(always)]
fn source_pixel(g: &Gather, image: usize, target: [usize; 3], tap: usize) -> Option<usize> {
    let tap = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
    let mut pixel = image;
    for axis in 0..3 {
        let source = usize::try_from(g.axes[axis].source(target[axis], tap[axis])?).ok().filter(|&s| s < g.source[axis])?;
        pixel = pixel * g.source[axis] + source;
    }
    Some(pixel)
}

/// See [`super::weight_grad`].
pub(super) fn weight_grad<T: Real>(g: &Gather, x: &[T], gy: &[T], gw: &mut [T]) -> Result<(), OutOfMemory> {
    let taps = g.taps();
    let matrix = g.cin * g.cout;
    let mut buffer = Buffer::new(size_of_val(gw))?;
    let sums = buffer.as_slice_mut::<T>();
    let ns = g.target_pixels() * g.groups * matrix * g.taps_per_target() / 4;
    parallel::for_each_chunk(sums, matrix, ns, |i, sum| dispatch(Products { g, x, gy, sum, group: i / taps, tap: i % taps }));
    for (i, sum) in sums.chunks(matrix).enumerate() {
        let start = g.group_start(i / taps) + i % taps;
        for (at, &value) in sum.iter().enumerate() {
            gw[start + at / g.cout * g.in_stride + at % g.cout * g.out_stride] = value;
        }
    }
    Ok(())
}

/// The weight gradient of one tap of one group, `[source channel][target channel]`.
struct Products<'a, T> {
    g: &'a Gather,
    x: &'a [T],
    gy: &'a [T],
    sum: &'a mut [T],
    group: usize,
    tap: usize,
}

impl<T: Real> WithSimd for Products<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let g = self.g;
        self.sum.fill(T::zero());
        let [depth, height, width] = g.target;
        for target in 0..g.target_pixels() {
            let at = [target / (width * height) % depth, target / width % height, target % width];
            let Some(source) = source_pixel(g, target / (width * height * depth), at, self.tap) else { continue };
            let x = &self.x[(source * g.groups + self.group) * g.cin..][..g.cin];
            let gy = &self.gy[(target * g.groups + self.group) * g.cout..][..g.cout];
            for (sum, &x) in self.sum.chunks_exact_mut(g.cout).zip(x) {
                add_scaled(sum, x, gy);
            }
        }
    }
}
