//! Softmax and log-softmax along the middle of `[outer, n, inner]`, forward and backward. Exponents are taken relative to the
//! maximum, so nothing overflows; a row of −∞ alone gives NaN. The last dimension (`inner` = 1) is worked on row by row, any other
//! in strips of neighbouring columns; so are, forward, short rows, some of them turned at a time.

use super::isa::WithSimd;
use super::lanes::{self, Ahead, FloatElement, FloatLane, Lane, MAX_LANES, Pack, at, sums, sweep};
use super::parallel::{self, SharedMut};
use super::reduce::row_max;
use super::simd::Simd;

/// Elements a task should cover, so that handing it over costs little and all threads get their share.
const TASK: usize = 1 << 14;

/// What a row costs beyond its elements, in elements.
const ROW_COST: usize = 32;

/// Rows of at most so many elements become columns in a forward pass: vectors of them would be partly empty, and summed across their lanes.
const SHORT_ROW: usize = 24;

/// Short rows that are turned at once.
const TURNED_ROWS: usize = 64;

/// What a short row costs beyond its elements, in elements.
const SHORT_ROW_COST: usize = 8;

/// Elements of a strip of columns: 512 KiB of f32, which stay in L2.
const STRIP_ELEMENTS: usize = 1 << 17;

/// Columns of a strip: at least a cache line, and no more than gives work to several threads.
const MIN_STRIP: usize = 16;
const MAX_STRIP: usize = 256;

/// Rows whose exponentials are summed in single lanes before they are added in f64.
const SUM_ROWS: usize = 128;

/// The shape of a tensor seen from the dimension that is normalised; row-major without gaps.
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    /// Product of the dimensions before.
    pub outer: usize,
    /// The dimension itself.
    pub n: usize,
    /// Product of the dimensions after.
    pub inner: usize,
}

impl Axis {
    /// Number of elements.
    pub fn numel(self) -> usize {
        self.outer * self.n * self.inner
    }
}

/// y = softmax(x), or log softmax(x) if `log`.
pub fn softmax<T: FloatElement>(axis: Axis, log: bool, x: &[T], y: &mut [T]) {
    assert!(x.len() == axis.numel() && y.len() == x.len());
    run(axis, [x, x], y, if log { Kind::LogForward } else { Kind::Forward });
}

/// The gradient of the input, from that of the output `g` and the output `y`:
/// y·(g − Σ g·y), and g − exp(y)·Σ g for the logarithm.
pub fn softmax_backward<T: FloatElement>(axis: Axis, log: bool, g: &[T], y: &[T], dx: &mut [T]) {
    assert!(g.len() == axis.numel() && y.len() == g.len() && dx.len() == g.len());
    run(axis, [g, y], dx, if log { Kind::LogBackward } else { Kind::Backward });
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Forward,
    LogForward,
    Backward,
    LogBackward,
}

impl Kind {
    fn is_backward(self) -> bool {
        matches!(self, Kind::Backward | Kind::LogBackward)
    }
}

fn run<T: FloatElement>(axis: Axis, inputs: [&[T]; 2], out: &mut [T], kind: Kind) {
    if out.is_empty() {
        return;
    }
    let (estimated_ns, ahead) = (out.len() / 2, Ahead::of::<T>(out.len()));
    if axis.inner == 1 {
        let turned = axis.n <= SHORT_ROW && !kind.is_backward();
        let row_cost = if turned { SHORT_ROW_COST } else { ROW_COST };
        let estimated_ns = estimated_ns + axis.outer * row_cost / 2;
        let group = TASK.div_ceil(axis.n + row_cost);
        parallel::for_each_chunk(out, group * axis.n, estimated_ns, |i, out| {
            let start = i * group * axis.n;
            let inputs = inputs.map(|x| &x[start..start + out.len()]);
            if turned {
                T::Lane::dispatch(ShortRows { n: axis.n, x: inputs[0], out, kind });
            } else {
                T::Lane::dispatch(Rows { n: axis.n, inputs, out, kind, ahead });
            }
        });
    } else {
        let strip = (STRIP_ELEMENTS / axis.n).clamp(MIN_STRIP, MAX_STRIP);
        let strips = axis.inner.div_ceil(strip);
        let shared = SharedMut::new(out);
        parallel::for_each(axis.outer * strips, estimated_ns, |task| {
            let column = task % strips * strip;
            let width = strip.min(axis.inner - column);
            let base = task / strips * axis.n * axis.inner + column;
            T::Lane::dispatch(Strip { axis, base, width, inputs, out: &shared, kind });
        });
    }
}

struct Rows<'a, T> {
    n: usize,
    inputs: [&'a [T]; 2],
    out: &'a mut [T],
    kind: Kind,
    ahead: Ahead,
}

impl<T: FloatElement> WithSimd for Rows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let mut exponentials = lanes::buffer::<T>(self.n);
        let rows = self.out.len() / self.n;
        for from in (0..rows).step_by(MAX_LANES) {
            let number = MAX_LANES.min(rows - from);
            let mut shifts = [(T::Lane::default(), T::Lane::default()); MAX_LANES];
            if self.kind == Kind::LogForward {
                shifts = self.log_shifts(s, from, number);
            }
            for (i, &shift) in shifts.iter().enumerate().take(number) {
                let at = (from + i) * self.n..(from + i + 1) * self.n;
                let (a, b, out) = (&self.inputs[0][at.clone()], &self.inputs[1][at.clone()], &mut self.out[at]);
                match self.kind {
                    Kind::Forward => {
                        self.ahead.ask(s, a);
                        lanes::write(out, &mut exponentials, |y| softmax_row(s, a, y));
                    }
                    Kind::LogForward => log_softmax_row(s, a, shift, out),
                    Kind::Backward => softmax_backward_row(s, a, b, out),
                    Kind::LogBackward => log_softmax_backward_row(s, a, b, out),
                }
            }
        }
    }
}

impl<T: FloatElement> Rows<'_, T> {
    /// What is taken off the elements of each of `number` rows from row `from` on: the maximum, and the logarithm of the sum of the exponentials
    /// relative to it. The logarithms are taken together: one by one, they would cost more than all else of a short row.
    #[inline(always)]
    fn log_shifts<S: Simd>(&self, s: S, from: usize, number: usize) -> [(T::Lane, T::Lane); MAX_LANES] {
        let mut maxima = [T::Lane::default(); MAX_LANES];
        let mut logs = [T::Lane::default(); MAX_LANES];
        for i in 0..number {
            let x = &self.inputs[0][(from + i) * self.n..(from + i + 1) * self.n];
            self.ahead.ask(s, x);
            maxima[i] = row_max(s, x);
            let max = T::Lane::splat(s, maxima[i]);
            let [sum] = sums!(s, 1, T::Lane, S, x.len(), |j, count| [T::Lane::exp_pack(s, at(s, x, j, count).sub(max))]);
            // The maximum's own exponential is 1, and a small rest keeps its digits.
            logs[i] = T::Lane::round_from(sum - 1.0);
        }
        sweep!(T::Lane, S, MAX_LANES, |j, count| T::Lane::log1p_pack(s, at(s, &logs, j, count)).store(&mut logs[j..], count));
        std::array::from_fn(|i| (maxima[i], logs[i]))
    }
}

#[inline(always)]
fn softmax_row<L: FloatLane, T: FloatElement<Lane = L>, S: Simd>(s: S, x: &[T], y: &mut [L]) {
    let max = L::splat(s, row_max(s, x));
    let [sum] = sums!(s, 1, L, S, x.len(), |j, count| {
        let e = L::exp_pack(s, at(s, x, j, count).sub(max));
        e.store(&mut y[j..], count);
        [e]
    });
    let scale = L::splat(s, L::round_from(1.0 / sum));
    sweep!(L, S, x.len(), |j, count| at(s, y, j, count).mul(scale).store(&mut y[j..], count));
}

/// `shifts` are the maximum and the logarithm of the sum.
#[inline(always)]
fn log_softmax_row<L: FloatLane, T: FloatElement<Lane = L>, S: Simd>(s: S, x: &[T], shifts: (L, L), y: &mut [T]) {
    let (max, log) = (L::splat(s, shifts.0), L::splat(s, shifts.1));
    sweep!(L, S, x.len(), |j, count| T::store_pack(at(s, x, j, count).sub(max).sub(log), &mut y[j..], count));
}

#[inline(always)]
fn softmax_backward_row<T: FloatElement, S: Simd>(s: S, g: &[T], y: &[T], dx: &mut [T]) {
    let [dot] = sums!(s, 1, T::Lane, S, g.len(), |j, count| [at(s, g, j, count).mul(at(s, y, j, count))]);
    let dot = T::Lane::splat(s, T::Lane::round_from(dot));
    sweep!(T::Lane, S, g.len(), |j, count| {
        T::store_pack(at(s, g, j, count).sub(dot).mul(at(s, y, j, count)), &mut dx[j..], count);
    });
}

#[inline(always)]
fn log_softmax_backward_row<T: FloatElement, S: Simd>(s: S, g: &[T], y: &[T], dx: &mut [T]) {
    let [sum] = sums!(s, 1, T::Lane, S, g.len(), |j, count| [at(s, g, j, count)]);
    let minus = T::Lane::splat(s, T::Lane::round_from(-sum));
    sweep!(T::Lane, S, g.len(), |j, count| {
        T::store_pack(T::Lane::exp_pack(s, at(s, y, j, count)).mul_add(minus, at(s, g, j, count)), &mut dx[j..], count);
    });
}

/// Neighbouring columns of one outer index: `width` of them from element `base` on, `inner` elements from row to row.
struct Strip<'a, T> {
    axis: Axis,
    base: usize,
    width: usize,
    inputs: [&'a [T]; 2],
    out: &'a SharedMut<T>,
    kind: Kind,
}

impl<T: FloatElement> Ends<T::Lane> for Strip<'_, T> {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, input: usize, i: usize, row: &mut [T::Lane]) {
        let from = &self.inputs[input][self.base + i * self.axis.inner..][..self.width];
        sweep!(T::Lane, S, from.len(), |j, count| at(s, from, j, count).store(&mut row[j..], count));
    }

    #[inline(always)]
    fn store<S: Simd>(&self, s: S, i: usize, row: &[T::Lane]) {
        assert!(i < self.axis.n && self.base + (self.axis.n - 1) * self.axis.inner + self.width <= self.axis.numel());
        // SAFETY: the row lies inside of the output (checked above for the last one), which has `numel` elements and stays
        // borrowed until all strips are done; strips share no columns, and the slice ends before the next row's is made.
        let out = unsafe { std::slice::from_raw_parts_mut(self.out.get().add(self.base + i * self.axis.inner), self.width) };
        sweep!(T::Lane, S, row.len(), |j, count| T::store_pack(at(s, row, j, count), &mut out[j..], count));
    }
}

impl<T: FloatElement> WithSimd for Strip<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let len = self.axis.n * self.width;
        let mut x = vec![T::Lane::default(); len];
        let mut y = vec![T::Lane::default(); if self.kind.is_backward() { len } else { 0 }];
        columns(s, self.kind, &self, &mut x, &mut y, self.width);
    }
}

/// Rows of at most [`SHORT_ROW`] elements, forward.
struct ShortRows<'a, T> {
    n: usize,
    x: &'a [T],
    out: &'a mut [T],
    kind: Kind,
}

impl<T: FloatElement> WithSimd for ShortRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let mut tile = [T::Lane::default(); SHORT_ROW * TURNED_ROWS];
        let len = TURNED_ROWS * self.n;
        for (x, out) in self.x.chunks(len).zip(self.out.chunks_mut(len)) {
            let (width, tile) = (x.len() / self.n, &mut tile[..x.len()]);
            for (i, row) in x.chunks_exact(self.n).enumerate() {
                row.iter().zip(tile[i..].iter_mut().step_by(width)).for_each(|(&x, to)| *to = x.to_lane());
            }
            columns(s, self.kind, &InTile, tile, &mut [], width);
            for (i, row) in out.chunks_exact_mut(self.n).enumerate() {
                row.iter_mut().zip(tile[i..].iter().step_by(width)).for_each(|(to, &x)| *to = T::from_lane(x));
            }
        }
    }
}

/// Where a tile's rows come from in the first pass over them, and go to in the last: row by row, so that they are in L1 for both.
trait Ends<L> {
    /// Row `i` of an input.
    fn load<S: Simd>(&self, s: S, input: usize, i: usize, row: &mut [L]);
    /// Row `i` of the output.
    fn store<S: Simd>(&self, s: S, i: usize, row: &[L]);
}

/// Nowhere: the tile holds the input and is to hold the output.
struct InTile;

impl<L> Ends<L> for InTile {
    #[inline(always)]
    fn load<S: Simd>(&self, _: S, _: usize, _: usize, _: &mut [L]) {}
    #[inline(always)]
    fn store<S: Simd>(&self, _: S, _: usize, _: &[L]) {}
}

/// Works on the columns of a tile in place; a backward pass has another for the results of the forward pass.
#[inline(always)]
fn columns<L: FloatLane, S: Simd>(s: S, kind: Kind, ends: &impl Ends<L>, x: &mut [L], y: &mut [L], width: usize) {
    match kind {
        Kind::Forward => softmax_columns(s, ends, x, width),
        Kind::LogForward => log_softmax_columns(s, ends, x, width),
        Kind::Backward => softmax_backward_columns(s, ends, x, y, width),
        Kind::LogBackward => log_softmax_backward_columns(s, ends, x, y, width),
    }
}

/// The sums of each column of a tile, row by row.
struct ColumnSums<L> {
    /// Of the rows since the last flush.
    part: Vec<L>,
    rows: usize,
    totals: Vec<f64>,
}

impl<L: FloatLane> ColumnSums<L> {
    fn new(width: usize) -> Self {
        Self { part: vec![L::default(); width], rows: 0, totals: vec![0.0; width] }
    }

    #[inline(always)]
    fn add<S: Simd>(&mut self, s: S, row: &[L]) {
        let part = &mut self.part;
        sweep!(L, S, row.len(), |j, count| at(s, part, j, count).add(at(s, row, j, count)).store(&mut part[j..], count));
        self.rows += 1;
        if self.rows == SUM_ROWS {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.totals.iter_mut().zip(&mut self.part).for_each(|(total, x)| *total += std::mem::take(x).wide());
        self.rows = 0;
    }

    fn totals(mut self) -> impl Iterator<Item = f64> {
        self.flush();
        self.totals.into_iter()
    }
}

#[inline(always)]
fn max_columns<L: FloatLane, S: Simd>(s: S, ends: &impl Ends<L>, tile: &mut [L], width: usize) -> Vec<L> {
    let mut max = vec![L::LEAST; width];
    for (i, row) in tile.chunks_exact_mut(width).enumerate() {
        ends.load(s, 0, i, row);
        sweep!(L, S, width, |j, count| at(s, &max, j, count).max(at(s, row, j, count)).store(&mut max[j..], count));
    }
    max
}

#[inline(always)]
fn softmax_columns<L: FloatLane, S: Simd>(s: S, ends: &impl Ends<L>, x: &mut [L], width: usize) {
    let max = max_columns(s, ends, x, width);
    let mut sums = ColumnSums::new(width);
    for row in x.chunks_exact_mut(width) {
        sweep!(L, S, width, |j, count| L::exp_pack(s, at(s, row, j, count).sub(at(s, &max, j, count))).store(&mut row[j..], count));
        sums.add(s, row);
    }
    let scale: Vec<L> = sums.totals().map(|sum| L::round_from(1.0 / sum)).collect();
    for (i, row) in x.chunks_exact_mut(width).enumerate() {
        sweep!(L, S, width, |j, count| at(s, row, j, count).mul(at(s, &scale, j, count)).store(&mut row[j..], count));
        ends.store(s, i, row);
    }
}

#[inline(always)]
fn log_softmax_columns<L: FloatLane, S: Simd>(s: S, ends: &impl Ends<L>, x: &mut [L], width: usize) {
    let max = max_columns(s, ends, x, width);
    let mut sums = ColumnSums::new(width);
    let mut exponentials = vec![L::default(); width];
    for row in x.chunks_exact_mut(width) {
        sweep!(L, S, width, |j, count| {
            let shifted = at(s, row, j, count).sub(at(s, &max, j, count));
            shifted.store(&mut row[j..], count);
            L::exp_pack(s, shifted).store(&mut exponentials[j..], count);
        });
        sums.add(s, &exponentials);
    }
    // The maximum's own exponential is 1, and a small rest keeps its digits.
    let mut log: Vec<L> = sums.totals().map(|sum| L::round_from(sum - 1.0)).collect();
    sweep!(L, S, width, |j, count| L::log1p_pack(s, at(s, &log, j, count)).store(&mut log[j..], count));
    for (i, row) in x.chunks_exact_mut(width).enumerate() {
        sweep!(L, S, width, |j, count| at(s, row, j, count).sub(at(s, &log, j, count)).store(&mut row[j..], count));
        ends.store(s, i, row);
    }
}

#[inline(always)]
fn softmax_backward_columns<L: FloatLane, S: Simd>(s: S, ends: &impl Ends<L>, g: &mut [L], y: &mut [L], width: usize) {
    let mut sums = ColumnSums::new(width);
    let mut products = vec![L::default(); width];
    for (i, (g, y)) in g.chunks_exact_mut(width).zip(y.chunks_exact_mut(width)).enumerate() {
        ends.load(s, 0, i, g);
        ends.load(s, 1, i, y);
        sweep!(L, S, width, |j, count| at(s, g, j, count).mul(at(s, y, j, count)).store(&mut products[j..], count));
        sums.add(s, &products);
    }
    let dot: Vec<L> = sums.totals().map(L::round_from).collect();
    for (i, (g, y)) in g.chunks_exact_mut(width).zip(y.chunks_exact(width)).enumerate() {
        sweep!(L, S, width, |j, count| {
            at(s, g, j, count).sub(at(s, &dot, j, count)).mul(at(s, y, j, count)).store(&mut g[j..], count);
        });
        ends.store(s, i, g);
    }
}

#[inline(always)]
fn log_softmax_backward_columns<L: FloatLane, S: Simd>(s: S, ends: &impl Ends<L>, g: &mut [L], y: &mut [L], width: usize) {
    let mut sums = ColumnSums::new(width);
    for (i, row) in g.chunks_exact_mut(width).enumerate() {
        ends.load(s, 0, i, row);
        sums.add(s, row);
    }
    let minus: Vec<L> = sums.totals().map(|sum| L::round_from(-sum)).collect();
    for (i, (g, y)) in g.chunks_exact_mut(width).zip(y.chunks_exact_mut(width)).enumerate() {
        ends.load(s, 1, i, y);
        sweep!(L, S, width, |j, count| {
            L::exp_pack(s, at(s, y, j, count)).mul_add(at(s, &minus, j, count), at(s, g, j, count)).store(&mut g[j..], count);
        });
        ends.store(s, i, g);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{at_thread_counts, values};
    use half::{bf16, f16};

    fn check<T: FloatElement>(axis: Axis, log: bool, tolerance: f64) {
        let make = |scale| values(axis.numel(), scale).into_iter().map(T::from_f64).collect::<Vec<T>>();
        let (x, g) = (make(6.0), make(1.0));
        let (y, dx) = at_thread_counts(|| {
            let (mut y, mut dx) = (g.clone(), g.clone());
            softmax(axis, log, &x, &mut y);
            softmax_backward(axis, log, &g, &y, &mut dx);
            (y, dx)
        });
        let close =
            |got: T, want: f64| assert!((got.to_f64() - want).abs() <= tolerance * want.abs().max(1.0), "{got:?} not {want} {axis:?}");
        for line in 0..axis.outer * axis.inner {
            let index = |i: usize| (line / axis.inner * axis.n + i) * axis.inner + line % axis.inner;
            let xs: Vec<f64> = (0..axis.n).map(|i| x[index(i)].to_f64()).collect();
            let max = xs.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = xs.iter().map(|x| (x - max).exp()).sum();
            let p = |i: usize| (xs[i] - max).exp() / sum;
            let gs: Vec<f64> = (0..axis.n).map(|i| g[index(i)].to_f64()).collect();
            let total: f64 = if log { gs.iter().sum() } else { (0..axis.n).map(|i| gs[i] * p(i)).sum() };
            for i in 0..axis.n {
                close(y[index(i)], if log { p(i).ln() } else { p(i) });
                close(dx[index(i)], if log { gs[i] - p(i) * total } else { p(i) * (gs[i] - total) });
            }
        }
    }

    #[test]
    fn both_directions_match_f64() {
        for (outer, n, inner) in [
            (3, 1, 1),
            (5, 17, 1),
            (2, 1000, 1),
            (64, 1024, 1),
            (3, 9000, 1),
            (2, 5, 3),
            (3, 200, 130),
            (1, 7, 256),
            (4, 300, 1),
            (2000, 1, 1),
            (1001, 3, 1),
            (2100, 24, 1),
            (200, 25, 1),
            (0, 4, 1),
            (2, 0, 3),
        ] {
            let axis = Axis { outer, n, inner };
            for log in [false, true] {
                check::<f32>(axis, log, 2e-5);
                check::<f64>(axis, log, 1e-12);
                if axis.n < 2000 {
                    check::<f16>(axis, log, 3e-2);
                    check::<bf16>(axis, log, 3e-1);
                }
            }
        }
    }

    #[test]
    fn extreme_rows() {
        for axis in [Axis { outer: 1, n: 3, inner: 1 }, Axis { outer: 1, n: 3, inner: 2 }] {
            let run = |x: [f32; 3], log| {
                let x: Vec<f32> = x.into_iter().flat_map(|x| vec![x; axis.inner]).collect();
                let mut y = vec![0f32; x.len()];
                softmax(axis, log, &x, &mut y);
                [y[0], y[axis.inner], y[2 * axis.inner]]
            };
            let inf = f32::INFINITY;
            assert!(run([-inf; 3], false).iter().all(|y| y.is_nan()));
            assert_eq!(run([1e38, -1e38, 0.0], false), [1.0, 0.0, 0.0]);
            assert_eq!(run([-inf, 5.0, -inf], false), [0.0, 1.0, 0.0]);
            assert_eq!(run([-inf, 5.0, -inf], true), [-inf, 0.0, -inf]);
            assert!(run([f32::NAN, 5.0, 1.0], true).iter().all(|y| y.is_nan()));
        }
    }
}
