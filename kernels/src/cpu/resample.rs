//! Linear maps of images that factor over the spatial axes: average pooling, nearest and linear upsampling, and the
//! transposes (gradients) of them all are one kernel over three [`AxisMap`]s. Images are channels-last: `[n][d][h][w][c]`.

use super::isa::{WithSimd, dispatch};
use super::parallel;
use super::simd::Simd;
use crate::element::{Element, Float};
use num_traits::{Float as Num, One};

/// f32 and f64: the floats that spatial kernels compute in.
pub trait Real: Float<Compute = Self> + Num {}
impl Real for f32 {}
impl Real for f64 {}

/// One input of an output, with its factor.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tap {
    /// Position on the input's axis.
    pub index: usize,
    /// Factor.
    pub weight: f64,
}

/// A sparse matrix along one axis: `out[o] = (Σ weight · x[index]) / divisor(o)` over the taps of row `o`.
#[derive(Clone, PartialEq, Debug)]
pub struct AxisMap {
    inputs: usize,
    starts: Vec<usize>,
    taps: Vec<Tap>,
    divisors: Vec<f64>,
}

impl AxisMap {
    /// A map from `inputs` positions, one `(taps, divisor)` an output.
    ///
    /// # Panics
    /// If a tap's index is not below `inputs`: kernels trust it.
    pub fn new<R: IntoIterator<Item = Tap>>(inputs: usize, rows: impl IntoIterator<Item = (R, f64)>) -> Self {
        let mut map = Self { inputs, starts: vec![0], taps: Vec::new(), divisors: Vec::new() };
        for (taps, divisor) in rows {
            map.taps.extend(taps);
            map.starts.push(map.taps.len());
            map.divisors.push(divisor);
        }
        assert!(map.taps.iter().all(|t| t.index < inputs), "a tap outside of the axis");
        map
    }

    /// The identity of an axis of one position, for the axes that 1-D and 2-D images lack.
    pub fn unit() -> Self {
        Self::new(1, [([Tap { index: 0, weight: 1.0 }], 1.0)])
    }

    /// Extent of the input's axis.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Extent of the output's axis.
    pub fn outputs(&self) -> usize {
        self.divisors.len()
    }

    /// The taps of output `o`, by rising index if they were given so.
    #[inline(always)]
    pub fn row(&self, o: usize) -> &[Tap] {
        &self.taps[self.starts[o]..self.starts[o + 1]]
    }

    /// What the sum of output `o` is divided by.
    #[inline(always)]
    pub fn divisor(&self, o: usize) -> f64 {
        self.divisors[o]
    }

    /// The one input of each output, if they are copied.
    fn selection(&self) -> Option<Vec<usize>> {
        let copied = |o: usize| match self.row(o) {
            [tap] if tap.weight == 1.0 && self.divisors[o] == 1.0 => Some(tap.index),
            _ => None,
        };
        (0..self.outputs()).map(copied).collect()
    }

    /// The transposed matrix, divisors folded into its weights: the map of the gradient.
    pub fn transpose(&self) -> Self {
        let mut starts = vec![0; self.inputs + 1];
        for tap in &self.taps {
            starts[tap.index + 1] += 1;
        }
        for i in 0..self.inputs {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut taps = vec![Tap { index: 0, weight: 0.0 }; self.taps.len()];
        for o in 0..self.outputs() {
            for tap in self.row(o) {
                taps[next[tap.index]] = Tap { index: o, weight: tap.weight / self.divisors[o] };
                next[tap.index] += 1;
            }
        }
        Self { inputs: self.outputs(), starts, taps, divisors: vec![1.0; self.inputs] }
    }
}

/// Elements of one image of `c` channels over three axes.
fn image_len(extents: [usize; 3], c: usize) -> usize {
    extents[0] * extents[1] * extents[2] * c
}

/// Output rows (all of the last axis) that make a task of about 16 Ki elements, so that a task outlasts its hand-over.
pub(super) fn rows_per_task(row_len: usize) -> usize {
    (16384 / row_len.max(1)).max(1)
}

/// Applies one map an axis to `n` images of `c` channels: `x` is `[n][d][h][w][c]`, so is `out`, which is fully written. Halves are
/// computed in f32 and rounded once.
pub fn resample<T: Float<Compute: Real>>(maps: &[AxisMap; 3], n: usize, c: usize, x: &[T], out: &mut [T]) {
    let inputs = maps.each_ref().map(AxisMap::inputs);
    let outputs = maps.each_ref().map(AxisMap::outputs);
    assert_eq!(x.len(), n * image_len(inputs, c));
    assert_eq!(out.len(), n * image_len(outputs, c));
    if out.is_empty() {
        return;
    }
    let row_len = outputs[2] * c;
    let rows = rows_per_task(row_len);
    let taps_per_output: usize = maps.iter().map(|m| m.taps.len().div_ceil(m.outputs())).product();
    // An L1-resident multiply-add of 8 elements takes about a nanosecond.
    let ns = out.len() * taps_per_output.max(1) / 8;
    if let [Some(depths), Some(heights), Some(columns)] = maps.each_ref().map(AxisMap::selection) {
        let line = inputs[2] * c;
        parallel::for_each_chunk(out, rows * row_len, ns, |i, out| {
            let from = |row: usize| {
                let (image, od, oh) = (row / (heights.len() * depths.len()), row / heights.len() % depths.len(), row % heights.len());
                &x[((image * inputs[0] + depths[od]) * inputs[1] + heights[oh]) * line..][..line]
            };
            select_pixels(out, row_len, i * rows, from, &columns, c);
        });
        return;
    }
    parallel::for_each_chunk(out, rows * row_len, ns, |i, out| dispatch(Rows { maps, c, x, out, first: i * rows }));
}

/// Rows of copied pixels of `c` channels: output row `first + r` has those at `columns` of line `from(first + r)`.
fn select_pixels<'a, T: Float>(out: &mut [T], row_len: usize, first: usize, from: impl Fn(usize) -> &'a [T], columns: &[usize], c: usize) {
    for r in 0..out.len() / row_len {
        let (done, out) = out.split_at_mut(r * row_len);
        let (out, line) = (&mut out[..row_len], from(first + r));
        if r > 0 && std::ptr::eq(line, from(first + r - 1)) {
            // The row before, once more.
            out.copy_from_slice(&done[(r - 1) * row_len..]);
        } else {
            out.chunks_exact_mut(c).zip(columns).for_each(|(out, &w)| out.copy_from_slice(&line[w * c..][..c]));
        }
    }
}

struct Rows<'a, T> {
    maps: &'a [AxisMap; 3],
    c: usize,
    x: &'a [T],
    out: &'a mut [T],
    /// Index of the first output row, counted over images, depths and heights.
    first: usize,
}

impl<T: Float<Compute: Real>> WithSimd for Rows<'_, T> {
    type Output = ();

    /// Plain loops over fixed-size channel blocks: the compiler vectorises them with the features of the level.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let [md, mh, mw] = self.maps;
        let tap = |index: usize, weight: f64| Part { offset: index * self.c, weight: Element::from_f64(weight) };
        let columns: Vec<Part<T::Compute>> = mw.taps.iter().map(|w| tap(w.index, w.weight)).collect();
        let mut lines = Vec::new();
        let (mut last, mut divisor) = (1.0, Divisor::new(1.0));
        for (row, out) in self.out.chunks_mut(mw.outputs() * self.c).enumerate() {
            let row = self.first + row;
            let (image, od, oh) = (row / (mh.outputs() * md.outputs()), row / mh.outputs() % md.outputs(), row % mh.outputs());
            lines.clear();
            for d in md.row(od) {
                let plane = (image * md.inputs + d.index) * mh.inputs;
                lines.extend(mh.row(oh).iter().map(|h| tap((plane + h.index) * mw.inputs, d.weight * h.weight)));
            }
            let of_row = md.divisors[od] * mh.divisors[oh];
            for (ow, out) in out.chunks_mut(self.c).enumerate() {
                let of_pixel = of_row * mw.divisors[ow];
                if of_pixel != last {
                    (last, divisor) = (of_pixel, Divisor::new(of_pixel));
                }
                pixel(self.x, &lines, &columns[mw.starts[ow]..mw.starts[ow + 1]], divisor, out);
            }
        }
    }
}

/// A tap of a line or of a column: where it begins among the elements, and its factor.
#[derive(Clone, Copy)]
struct Part<R> {
    offset: usize,
    weight: R,
}

/// How a sum is divided: by multiplication where that gives the same bits, as most are, by powers of two.
#[derive(Clone, Copy, PartialEq)]
enum Divisor<R> {
    Times(R),
    Over(R),
}

impl<R: Real> Divisor<R> {
    #[inline(always)]
    fn new(divisor: f64) -> Self {
        const FRACTION: u64 = (1 << 52) - 1;
        let is_power_of_two = divisor.to_bits() & FRACTION == 0 && (1.0..1e30).contains(&divisor);
        if is_power_of_two { Self::Times(R::from_f64(1.0 / divisor)) } else { Self::Over(R::from_f64(divisor)) }
    }
}

#[inline(always)]
fn pixel<T: Float<Compute: Real>>(
    x: &[T],
    lines: &[Part<T::Compute>],
    columns: &[Part<T::Compute>],
    divisor: Divisor<T::Compute>,
    out: &mut [T],
) {
    // A copy, also of −0, as of images that are copied whole.
    if let ([line], [column]) = (lines, columns)
        && line.weight * column.weight == One::one()
        && divisor == Divisor::Times(One::one())
    {
        return out.copy_from_slice(&x[line.offset + column.offset..][..out.len()]);
    }
    let mut at = 0;
    while at + 64 <= out.len() {
        channels::<T, 64>(x, lines, columns, divisor, at, out);
        at += 64;
    }
    while at + 16 <= out.len() {
        channels::<T, 16>(x, lines, columns, divisor, at, out);
        at += 16;
    }
    while at < out.len() {
        channels::<T, 1>(x, lines, columns, divisor, at, out);
        at += 1;
    }
}

/// `W` channels of one output pixel, summed in registers.
#[inline(always)]
fn channels<T: Float<Compute: Real>, const W: usize>(
    x: &[T],
    lines: &[Part<T::Compute>],
    columns: &[Part<T::Compute>],
    divisor: Divisor<T::Compute>,
    at: usize,
    out: &mut [T],
) {
    let mut sum = [<T::Compute as Element>::from_f64(0.0); W];
    for line in lines {
        for column in columns {
            let weight = line.weight * column.weight;
            let x = &x[line.offset + column.offset + at..][..W];
            for i in 0..W {
                sum[i] = sum[i] + weight * x[i].widen();
            }
        }
    }
    let out = &mut out[at..at + W];
    match divisor {
        Divisor::Times(factor) => out.iter_mut().zip(sum).for_each(|(out, sum)| *out = T::narrow(sum * factor)),
        Divisor::Over(divisor) => out.iter_mut().zip(sum).for_each(|(out, sum)| *out = T::narrow(sum / divisor)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_divide_by_multiplication() {
        for (divisor, expected) in [
            (1.0, Divisor::Times(1.0f32)),
            (4.0, Divisor::Times(0.25)),
            (1024.0, Divisor::Times(1.0 / 1024.0)),
            (9.0, Divisor::Over(9.0)),
            (0.5, Divisor::Over(0.5)),
        ] {
            assert!(Divisor::new(divisor) == expected, "{divisor}");
        }
    }

    #[test]
    fn single_taps_copy_negative_zeros() {
        let tap = |index: usize, weight: f64| Tap { index, weight };
        let mixed = AxisMap::new(2, [(vec![tap(0, 1.0)], 1.0), (vec![tap(0, 0.5), tap(1, 0.5)], 1.0), (vec![tap(1, 1.0)], 1.0)]);
        for map in [mixed, AxisMap::new(2, [0, 0, 1].map(|i| ([tap(i, 1.0)], 1.0)))] {
            let mut out = [9.0f64; 3];
            resample(&[AxisMap::unit(), AxisMap::unit(), map], 1, 1, &[-0.0, -0.0], &mut out);
            assert_eq!([out[0].to_bits(), out[2].to_bits()], [(-0.0f64).to_bits(); 2]);
        }
    }

    #[test]
    fn the_transpose_is_the_adjoint() {
        let row = |taps: &[(usize, f64)], divisor| (taps.iter().map(|&(index, weight)| Tap { index, weight }).collect::<Vec<_>>(), divisor);
        let m = AxisMap::new(3, [row(&[(0, 1.0), (2, 0.5)], 2.0), row(&[], 1.0), row(&[(1, 3.0)], 1.0), row(&[(1, 1.0), (2, -1.0)], 4.0)]);
        let maps = [AxisMap::unit(), m.clone(), m];
        let adjoint = maps.each_ref().map(AxisMap::transpose);
        for c in [1, 3, 17, 83] {
            let x: Vec<f64> = (0..2 * 9 * c).map(|i| (i * 7 % 11) as f64 - 5.0).collect();
            let y: Vec<f64> = (0..2 * 16 * c).map(|i| (i * 5 % 13) as f64 - 6.0).collect();
            let (mut forward, mut back) = (vec![9.0; y.len()], vec![9.0; x.len()]);
            resample(&maps, 2, c, &x, &mut forward);
            resample(&adjoint, 2, c, &y, &mut back);
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            assert!((dot(&forward, &y) - dot(&x, &back)).abs() < 1e-9);
        }
    }
}
