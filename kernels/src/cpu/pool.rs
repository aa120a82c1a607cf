//! Pooling over channels-last images `[n][d][h][w][c]`: the windows of an axis as [`AxisMap`]s, and max pooling.
//! Average pooling is [`resample`](super::resample::resample) over the same maps, its gradient over their transposes.

use super::isa::{WithSimd, dispatch};
use super::parallel::{self, SharedMut};
use super::resample::{AxisMap, Real, Tap, rows_per_task};
use super::simd::Simd;

/// How windows slide along one axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolAxis {
    /// Inputs in a window.
    pub kernel: usize,
    /// Distance between windows.
    pub stride: usize,
    /// Positions added at both ends; never a maximum.
    pub padding: usize,
    /// Distance between the inputs of a window.
    pub dilation: usize,
    /// Whether a last window that starts inside the input or its left padding but ends outside counts.
    pub ceil_mode: bool,
}

impl PoolAxis {
    /// Number of windows over `input` positions, or `None` if not even one fits or a parameter is 0.
    pub fn outputs(&self, input: usize) -> Option<usize> {
        let span = self.dilation.checked_mul(self.kernel.checked_sub(1)?)?.checked_add(1)?;
        let room = self.padding.checked_mul(2)?.checked_add(input)?.checked_sub(span)?;
        if self.stride == 0 || self.dilation == 0 {
            return None;
        }
        let mut outputs = room / self.stride + 1;
        if self.ceil_mode && room % self.stride != 0 && outputs * self.stride < input + self.padding {
            outputs += 1;
        }
        Some(outputs)
    }

    /// The windows of `outputs` positions (see [`outputs`](Self::outputs)). The divisor of an average is the number of inputs
    /// in the window, with `count_padding` also the padding (but not what `ceil_mode` adds beyond it).
    pub fn map(&self, input: usize, outputs: usize, count_padding: bool) -> AxisMap {
        AxisMap::new(
            input,
            (0..outputs).map(|o| {
                // Positions are shifted by the padding, so that they are never negative.
                let positions = (0..self.kernel).map(move |k| o * self.stride + k * self.dilation);
                let (low, high) = (self.padding, self.padding + input);
                let inside = positions.clone().filter(move |p| (low..high).contains(p));
                let count = if count_padding { positions.filter(|&p| p < high + self.padding).count() } else { inside.clone().count() };
                (inside.map(move |p| Tap { index: p - low, weight: 1.0 }), count as f64)
            }),
        )
    }
}

/// The windows of adaptive pooling: output `o` covers `⌊o·input/outputs⌋ .. ⌈(o+1)·input/outputs⌉`.
pub fn adaptive_axis(input: usize, outputs: usize) -> AxisMap {
    AxisMap::new(
        input,
        (0..outputs).map(|o| {
            let window = o * input / outputs..((o + 1) * input).div_ceil(outputs);
            let count = window.len() as f64;
            (window.map(|index| Tap { index, weight: 1.0 }), count)
        }),
    )
}

/// The index that marks a window without inputs.
const NO_INPUT: i32 = -1;

/// Images, channels and the windows of each axis.
#[derive(Clone, Copy, Debug)]
pub struct MaxPool<'a> {
    /// Number of images.
    pub n: usize,
    /// Number of channels.
    pub c: usize,
    /// Windows along depth, height and width.
    pub windows: &'a [AxisMap; 3],
}

impl MaxPool<'_> {
    fn inputs(&self) -> [usize; 3] {
        self.windows.each_ref().map(AxisMap::inputs)
    }

    fn outputs(&self) -> [usize; 3] {
        self.windows.each_ref().map(AxisMap::outputs)
    }

    /// Elements of the input.
    pub fn input_len(&self) -> usize {
        self.n * self.c * self.inputs().iter().product::<usize>()
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.n * self.c * self.outputs().iter().product::<usize>()
    }

    /// The maximum of each window and where its first occurrence lies, as an index into the image's `d·h·w` positions.
    /// NaN is above everything. A window without inputs gives −∞ and index −1.
    pub fn forward<T: Real>(&self, x: &[T], values: &mut [T], indices: &mut [i32]) {
        assert!(x.len() == self.input_len() && values.len() == self.output_len() && indices.len() == values.len());
        assert!(self.inputs().iter().product::<usize>() <= i32::MAX as usize);
        if values.is_empty() {
            return;
        }
        let row_len = self.outputs()[2] * self.c;
        let rows = rows_per_task(row_len);
        let shared = SharedMut::new(indices);
        let ns = values.len() * self.window_len() / 4;
        parallel::for_each_chunk(values, rows * row_len, ns, |i, values| {
            // SAFETY: `indices` is as long as `values`, and each task takes the part that matches its own chunk.
            let indices = unsafe { std::slice::from_raw_parts_mut(shared.get().add(i * rows * row_len), values.len()) };
            dispatch(Forward { pool: self, x, values, indices, first: i * rows });
        });
    }

    /// Sends each window's gradient to the input that `indices` names, sums where windows overlap, and zeroes the rest.
    pub fn backward<T: Real>(&self, gy: &[T], indices: &[i32], gx: &mut [T]) {
        assert!(gx.len() == self.input_len() && gy.len() == self.output_len() && indices.len() == gy.len());
        if gx.is_empty() {
            return;
        }
        let cover = self.windows.each_ref().map(AxisMap::transpose);
        let row_len = self.inputs()[2] * self.c;
        let rows = rows_per_task(row_len);
        let ns = gy.len() * self.window_len() / 4 + gx.len() / 8;
        parallel::for_each_chunk(gx, rows * row_len, ns, |i, gx| {
            dispatch(Backward { pool: self, cover: &cover, gy, indices, gx, first: i * rows })
        });
    }

    /// Reads what `indices` names: `out[o][c] = x[indices[o][c]][c]`, 0 where there is none. The transpose of [`backward`](Self::backward).
    pub fn gather<T: Real>(&self, x: &[T], indices: &[i32], out: &mut [T]) {
        assert!(x.len() == self.input_len() && out.len() == self.output_len() && indices.len() == out.len());
        if out.is_empty() {
            return;
        }
        let positions = self.inputs().iter().product::<usize>();
        let image_len = out.len() / self.n;
        let ns = out.len() * 2;
        parallel::for_each_chunk(out, image_len, ns, |image, out| {
            let x = &x[image * positions * self.c..][..positions * self.c];
            for (o, (out, &index)) in out.iter_mut().zip(&indices[image * image_len..]).enumerate() {
                *out = if index == NO_INPUT { T::zero() } else { x[index as usize * self.c + o % self.c] };
            }
        });
    }

    /// Inputs of the largest window, or at least 1.
    fn window_len(&self) -> usize {
        self.windows.iter().map(|m| (0..m.outputs()).map(|o| m.row(o).len()).max().unwrap_or(0)).product::<usize>().max(1)
    }
}

/// Splits a row number, counted over images, depths and heights.
#[inline(always)]
fn split_row(row: usize, [depth, height, _]: [usize; 3]) -> (usize, usize, usize) {
    (row / (depth * height), row / height % depth, row % height)
}

struct Forward<'a, T> {
    pool: &'a MaxPool<'a>,
    x: &'a [T],
    values: &'a mut [T],
    indices: &'a mut [i32],
    first: usize,
}

impl<T: Real> WithSimd for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (c, [md, mh, mw]) = (self.pool.c, self.pool.windows);
        let inputs = self.pool.inputs();
        let mut window: Vec<usize> = Vec::new();
        let row_len = mw.outputs() * c;
        for (row, (values, indices)) in self.values.chunks_mut(row_len).zip(self.indices.chunks_mut(row_len)).enumerate() {
            let (image, od, oh) = split_row(self.first + row, self.pool.outputs());
            let x = &self.x[image * inputs.iter().product::<usize>() * c..];
            for (ow, (values, indices)) in values.chunks_mut(c).zip(indices.chunks_mut(c)).enumerate() {
                window.clear();
                for d in md.row(od) {
                    for h in mh.row(oh) {
                        let line = (d.index * inputs[1] + h.index) * inputs[2];
                        window.extend(mw.row(ow).iter().map(|w| line + w.index));
                    }
                }
                pixel_max(x, &window, values, indices);
            }
        }
    }
}

#[inline(always)]
fn pixel_max<T: Real>(x: &[T], window: &[usize], values: &mut [T], indices: &mut [i32]) {
    let c = values.len();
    let mut at = 0;
    while at + 32 <= c {
        channels_max::<T, 32>(x, window, c, at, values, indices);
        at += 32;
    }
    while at + 8 <= c {
        channels_max::<T, 8>(x, window, c, at, values, indices);
        at += 8;
    }
    while at < c {
        channels_max::<T, 1>(x, window, c, at, values, indices);
        at += 1;
    }
}

/// `W` channels of one window, compared in registers.
#[inline(always)]
fn channels_max<T: Real, const W: usize>(x: &[T], window: &[usize], c: usize, at: usize, values: &mut [T], indices: &mut [i32]) {
    let mut best = [T::neg_infinity(); W];
    // A window of nothing but −∞ still has a first maximum: its first input.
    let mut index = [window.first().map_or(NO_INPUT, |&p| p as i32); W];
    for &position in window {
        let x = &x[position * c + at..position * c + at + W];
        // New arrays, which stay in registers: of those that are read, only what changes would be stored, and waited for.
        let (mut next, mut next_index) = ([T::zero(); W], [0; W]);
        for i in 0..W {
            // Not "below or equal" is "above, or one of them is NaN"; a NaN that is in already stays.
            #[allow(clippy::neg_cmp_op_on_partial_ord)]
            let take = !(x[i] <= best[i]) & !best[i].is_nan();
            next[i] = if take { x[i] } else { best[i] };
            next_index[i] = if take { position as i32 } else { index[i] };
        }
        (best, index) = (next, next_index);
    }
    values[at..at + W].copy_from_slice(&best);
    indices[at..at + W].copy_from_slice(&index);
}

struct Backward<'a, T> {
    pool: &'a MaxPool<'a>,
    /// For each input position of an axis the outputs whose windows hold it.
    cover: &'a [AxisMap; 3],
    gy: &'a [T],
    indices: &'a [i32],
    gx: &'a mut [T],
    first: usize,
}

impl<T: Real> WithSimd for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (c, [cd, ch, cw]) = (self.pool.c, self.cover);
        let (inputs, outputs) = (self.pool.inputs(), self.pool.outputs());
        for (row, gx) in self.gx.chunks_mut(inputs[2] * c).enumerate() {
            let (image, d, h) = split_row(self.first + row, inputs);
            let line = (d * inputs[1] + h) * inputs[2];
            gx.fill(T::zero());
            for (w, gx) in gx.chunks_mut(c).enumerate() {
                let position = (line + w) as i32;
                for od in cd.row(d) {
                    for oh in ch.row(h) {
                        let row = ((image * outputs[0] + od.index) * outputs[1] + oh.index) * outputs[2];
                        for ow in cw.row(w) {
                            let at = (row + ow.index) * c;
                            add_where(&self.gy[at..at + c], &self.indices[at..at + c], position, gx);
                        }
                    }
                }
            }
        }
    }
}

/// `gx += gy` where the maximum came from `position`.
#[inline(always)]
fn add_where<T: Real>(gy: &[T], indices: &[i32], position: i32, gx: &mut [T]) {
    for ((gx, &gy), &index) in gx.iter_mut().zip(gy).zip(indices) {
        let add = if index == position { gy } else { T::zero() };
        *gx = *gx + add;
    }
}

#[cfg(test)]
mod tests {
    use super::super::resample::resample;
    use super::*;

    const AXIS: PoolAxis = PoolAxis { kernel: 3, stride: 2, padding: 1, dilation: 1, ceil_mode: false };

    fn axes(axis: PoolAxis, extents: [usize; 3], count_padding: bool) -> [AxisMap; 3] {
        extents.map(|e| axis.map(e, axis.outputs(e).unwrap(), count_padding))
    }

    /// The definition: every window of every channel on its own, `(value, index)`.
    fn naive(pool: &MaxPool, x: &[f64]) -> Vec<(f64, i32)> {
        let ([md, mh, mw], [id, ih, iw]) = (pool.windows, pool.inputs());
        let mut out = Vec::new();
        for image in 0..pool.n {
            for (d, h, w) in (0..md.outputs()).flat_map(|d| (0..mh.outputs()).flat_map(move |h| (0..mw.outputs()).map(move |w| (d, h, w))))
            {
                for c in 0..pool.c {
                    let mut best = (f64::NEG_INFINITY, NO_INPUT);
                    for (d, h, w) in
                        md.row(d).iter().flat_map(|d| mh.row(h).iter().flat_map(move |h| mw.row(w).iter().map(move |w| (d, h, w))))
                    {
                        let position = (d.index * ih + h.index) * iw + w.index;
                        let v = x[(image * id * ih * iw + position) * pool.c + c];
                        if best.1 == NO_INPUT || (!best.0.is_nan() && (v > best.0 || v.is_nan())) {
                            best = (v, position as i32);
                        }
                    }
                    out.push(best);
                }
            }
        }
        out
    }

    fn samples(len: usize) -> Vec<f64> {
        let special = [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, -0.0, 0.0];
        // Few distinct values, so that windows have ties.
        (0..len).map(|i| if i % 17 == 5 { special[i / 17 % 5] } else { (i * 7919 % 13) as f64 - 6.0 }).collect()
    }

    fn same(a: f64, b: f64) -> bool {
        a == b || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn the_number_of_windows_is_pytorchs() {
        assert_eq!(AXIS.outputs(7), Some(4));
        assert_eq!(PoolAxis { kernel: 2, padding: 0, ..AXIS }.outputs(5), Some(2));
        assert_eq!(PoolAxis { kernel: 2, padding: 0, ceil_mode: true, ..AXIS }.outputs(5), Some(3));
        // The third window would start in the right padding, so it does not count.
        assert_eq!(PoolAxis { kernel: 2, padding: 1, ceil_mode: true, stride: 3, ..AXIS }.outputs(4), Some(2));
        assert_eq!(PoolAxis { padding: 0, ..AXIS }.outputs(2), None);
        assert_eq!(PoolAxis { stride: 0, ..AXIS }.outputs(9), None);
        assert_eq!(PoolAxis { kernel: usize::MAX, dilation: 3, ..AXIS }.outputs(9), None);
    }

    #[test]
    fn max_is_the_first_maximum_of_each_window_and_its_gradient_goes_there() {
        let cases = [
            (AXIS, [1, 7, 9]),
            (PoolAxis { kernel: 2, padding: 0, ..AXIS }, [1, 1, 8]),
            (PoolAxis { ceil_mode: true, ..AXIS }, [4, 6, 5]),
            (PoolAxis { kernel: 2, dilation: 3, stride: 1, padding: 1, ceil_mode: false }, [2, 4, 5]),
        ];
        for (axis, extents) in cases {
            for c in [1, 5, 45] {
                let windows = extents.map(|e| if e == 1 { AxisMap::unit() } else { axis.map(e, axis.outputs(e).unwrap(), false) });
                let pool = MaxPool { n: 2, c, windows: &windows };
                let x = samples(pool.input_len());
                let expected = naive(&pool, &x);
                let (mut values, mut indices) = (vec![9.0; pool.output_len()], vec![9; pool.output_len()]);
                pool.forward(&x, &mut values, &mut indices);
                let x32: Vec<f32> = x.iter().map(|&v| v as f32).collect();
                let (mut values32, mut indices32) = (vec![9f32; pool.output_len()], vec![9; pool.output_len()]);
                pool.forward(&x32, &mut values32, &mut indices32);
                for (i, &(value, index)) in expected.iter().enumerate() {
                    assert!(same(values[i], value) && indices[i] == index, "{axis:?} {i}: {} {} {value} {index}", values[i], indices[i]);
                    assert!(same(values32[i] as f64, value) && indices32[i] == index);
                }
                let gy: Vec<f64> = (0..values.len()).map(|i| (i * 31 % 19) as f64 - 9.0).collect();
                let mut expected = vec![0.0; x.len()];
                let positions: usize = extents.iter().product();
                for (i, &index) in indices.iter().enumerate().filter(|(_, i)| **i >= 0) {
                    expected[(i / (values.len() / 2) * positions + index as usize) * c + i % c] += gy[i];
                }
                let (mut gx, mut gathered) = (vec![9.0; x.len()], vec![9.0; gy.len()]);
                pool.backward(&gy, &indices, &mut gx);
                assert_eq!(gx, expected);
                pool.gather(&x, &indices, &mut gathered);
                for (i, &v) in gathered.iter().enumerate() {
                    assert!(same(v, if indices[i] < 0 { 0.0 } else { values[i] }));
                }
            }
        }
    }

    #[test]
    fn averages_count_what_they_are_told_to() {
        let x: Vec<f32> = (1..=5).map(|v| v as f32).collect();
        let line = |map: AxisMap| {
            let mut out = vec![9.0; map.outputs()];
            resample(&[AxisMap::unit(), AxisMap::unit(), map], 1, 1, &x, &mut out);
            out
        };
        let axis = PoolAxis { ceil_mode: true, kernel: 2, ..AXIS };
        let outputs = axis.outputs(5).unwrap();
        assert_eq!(line(axis.map(5, outputs, true)), [0.5, 2.5, 4.5]);
        assert_eq!(line(axis.map(5, outputs, false)), [1.0, 2.5, 4.5]);
        assert_eq!(line(adaptive_axis(5, 2)), [2.0, 4.0]);
        assert_eq!(line(adaptive_axis(5, 7)).len(), 7);
        let past_the_padding = PoolAxis { kernel: 3, stride: 3, padding: 0, dilation: 1, ceil_mode: true };
        assert_eq!(line(past_the_padding.map(5, 2, true)), [2.0, 4.5]);
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bits() {
        let windows = axes(AXIS, [1, 40, 40], true);
        let pool = MaxPool { n: 5, c: 19, windows: &windows };
        let x: Vec<f32> = samples(pool.input_len()).iter().map(|&v| v as f32).collect();
        let run = |threads| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let (mut values, mut indices) = (vec![0f32; pool.output_len()], vec![0; pool.output_len()]);
                let (mut mean, mut gx) = (values.clone(), vec![0f32; x.len()]);
                pool.forward(&x, &mut values, &mut indices);
                pool.backward(&values, &indices, &mut gx);
                resample(&windows, pool.n, pool.c, &x, &mut mean);
                [values, mean, gx].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
            })
        };
        let one = run(1);
        assert!(one == run(2) && one == run(7));
    }

    #[test]
    fn nothing_in_gives_nothing_out() {
        let windows = axes(AXIS, [1, 4, 4], true);
        let pool = MaxPool { n: 0, c: 3, windows: &windows };
        pool.forward::<f32>(&[], &mut [], &mut []);
        pool.backward::<f32>(&[], &[], &mut []);
        pool.gather::<f32>(&[], &[], &mut []);
        resample::<f32>(&windows, 2, 0, &[], &mut []);
    }
}
