//! Rotary position embedding (Su et al. 2021): each pair of a row's elements is turned by the angle that a table has for its place. Forward and
//! backward are one kernel: the gradient turns back.

use super::isa::WithSimd;
use super::lanes::{self, FloatElement, Lane};
use super::parallel;
use super::simd::Simd;
use crate::iter::Walk;
use crate::view::StridedView;

/// Elements of a task: some 10 µs.
const TASK: usize = 1 << 15;

/// Which elements of a row are pairs, and which way they turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rotary {
    /// Elements 2i and 2i + 1 are a pair, as in GPT-J; otherwise i and i + half of the turned elements, as in GPT-NeoX and Llama.
    pub interleaved: bool,
    /// By −θ instead of θ.
    pub inverse: bool,
}

/// The cosines and sines of the angles, `[.., pairs]`, each of the input's shape but for the last dimension (broadcast by strides of 0).
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a, L> {
    /// cos θ.
    pub cos: StridedView<'a, L>,
    /// sin θ.
    pub sin: StridedView<'a, L>,
}

/// Writes each row of `x` to `out`, in row-major order, with its pairs (a, b) turned to (a·cos θ − b·sin θ, b·cos θ + a·sin θ); elements beyond
/// the pairs stay. Every product is rounded before it is added, as by separate operations.
///
/// # Panics
/// If `x` has no dimensions, there are more pairs than a row has, a table does not fit the input, elements of a row of either are not
/// neighbours in memory, or `out` has not as many elements as `x`.
pub fn rotate<T: FloatElement>(rotary: Rotary, tables: Tables<'_, T::Lane>, x: StridedView<'_, T>, out: &mut [T]) {
    let Some((&width, rows)) = x.shape().split_last() else { panic!("rotary needs rows") };
    let pairs = tables.cos.shape().last().copied().unwrap_or(0);
    assert!(2 * pairs <= width && out.len() == x.numel(), "rows of {width} have no {pairs} pairs");
    if out.is_empty() {
        return;
    }
    for table in [tables.cos, tables.sin] {
        assert!(table.shape().split_last() == Some((&pairs, rows)), "a table fits the input");
        assert!(pairs < 2 || table.strides().last() == Some(&1), "angles of a row are neighbours");
    }
    assert!(width < 2 || x.strides().last() == Some(&1), "elements of a row are neighbours");
    let outer = |strides: &'_ [usize]| strides[..rows.len()].to_vec();
    let strides = [outer(x.strides()), outer(tables.cos.strides()), outer(tables.sin.strides())];
    let offsets = [x.offset(), tables.cos.offset(), tables.sin.offset()];
    let walk = Walk::new(rows, strides.each_ref().map(Vec::as_slice), offsets);
    let rows_of_task = TASK.div_ceil(width);
    parallel::for_each_chunk(out, rows_of_task * width, x.numel() / 2, |i, out| {
        let (cos, sin) = (tables.cos.data(), tables.sin.data());
        T::Lane::dispatch(RowsOfTask { rotary, walk: &walk, first: i * rows_of_task, width, pairs, x: x.data(), cos, sin, out });
    });
}

struct RowsOfTask<'a, T: FloatElement> {
    rotary: Rotary,
    walk: &'a Walk<3>,
    first: usize,
    width: usize,
    pairs: usize,
    x: &'a [T],
    cos: &'a [T::Lane],
    sin: &'a [T::Lane],
    out: &'a mut [T],
}

impl<T: FloatElement> WithSimd for RowsOfTask<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rotary, walk, first, width, pairs, x, cos, sin, out } = self;
        let (mut x_buffer, mut out_buffer) = (lanes::buffer::<T>(width), lanes::buffer::<T>(width));
        let steps = walk.inner_strides();
        let count = out.len() / width;
        let mut rows = out.chunks_exact_mut(width);
        for (at, n) in walk.stretches_of(first..first + count) {
            for (k, out) in rows.by_ref().take(n).enumerate() {
                let [x_at, cos_at, sin_at] = [0, 1, 2].map(|of| at[of] + k * steps[of]);
                let x = lanes::read(&x[x_at..][..width], &mut x_buffer);
                let (cos, sin) = (&cos[cos_at..][..pairs], &sin[sin_at..][..pairs]);
                lanes::write(out, &mut out_buffer, |out| turn(rotary, x, cos, sin, out));
            }
        }
    }
}

/// Turns one row: plain loops, which the compiler vectorises at the level that it is inlined into.
#[inline(always)]
fn turn<L: num_traits::Float>(rotary: Rotary, x: &[L], cos: &[L], sin: &[L], out: &mut [L]) {
    let pairs = cos.len();
    let sign = if rotary.inverse { -L::one() } else { L::one() };
    let (turned, rest) = x.split_at(2 * pairs);
    let (out_turned, out_rest) = out.split_at_mut(2 * pairs);
    out_rest.copy_from_slice(rest);
    if rotary.interleaved {
        let angles = cos.iter().zip(sin);
        for ((out, x), (&c, &s)) in out_turned.chunks_exact_mut(2).zip(turned.chunks_exact(2)).zip(angles) {
            let s = s * sign;
            out[0] = x[0] * c - x[1] * s;
            out[1] = x[1] * c + x[0] * s;
        }
    } else {
        let ((a, b), (out_a, out_b)) = (turned.split_at(pairs), out_turned.split_at_mut(pairs));
        for i in 0..pairs {
            let (c, s) = (cos[i], sin[i] * sign);
            out_a[i] = a[i] * c - b[i] * s;
            out_b[i] = b[i] * c + a[i] * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{at_thread_counts, values};
    use super::*;
    use half::bf16;

    #[test]
    fn pairs_turn_and_the_rest_stays() {
        let (c, s) = ([0.6f32], [0.8f32]);
        let x = [1f32, 2., 3., 4.];
        for (interleaved, inverse, expected) in
            [(true, false, [-1.0, 2.0, 3., 4.]), (true, true, [2.2, 0.4, 3., 4.]), (false, false, [-1.0, 2.0, 3., 4.])]
        {
            let tables = Tables { cos: StridedView::new(&c, 0, &[1], &[1]).unwrap(), sin: StridedView::new(&s, 0, &[1], &[1]).unwrap() };
            let mut out = [9f32; 4];
            rotate(Rotary { interleaved, inverse }, tables, StridedView::new(&x, 0, &[4], &[1]).unwrap(), &mut out);
            for (got, want) in out.iter().zip(expected) {
                assert!((got - want).abs() < 1e-6, "{interleaved} {inverse}: {out:?}");
            }
        }
    }

    #[test]
    fn rows_of_any_layout_turn_alike() {
        // [batch, heads, positions, width] that lies as [batch, positions, heads, width], and tables of [positions, pairs].
        let (batch, heads, positions, width, pairs) = (2, 3, 50, 150, 70);
        let angles = values(positions * pairs, 3.0);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        let shape = [batch, heads, positions, width];
        let table_shape = [batch, heads, positions, pairs];
        let table = |data| StridedView::new(data, 0, &table_shape, &[0, 0, 70, 1]).unwrap();
        let tables = Tables { cos: table(&cos), sin: table(&sin) };
        let x: Vec<f32> = values(shape.iter().product(), 2.0).into_iter().map(|x| x as f32).collect();
        let strides = [positions * heads * width, width, heads * width, 1];
        for interleaved in [false, true] {
            let run = |inverse: bool, x: StridedView<'_, f32>| {
                let mut out = vec![9f32; x.numel()];
                rotate(Rotary { interleaved, inverse }, tables, x, &mut out);
                out
            };
            let out = at_thread_counts(|| run(false, StridedView::new(&x, 0, &shape, &strides).unwrap()));
            let dense = [strides[0], positions * width, width, 1];
            let back = run(true, StridedView::new(&out, 0, &shape, &dense).unwrap());
            let bf: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut rounded = vec![bf16::NAN; x.len()];
            rotate(Rotary { interleaved, inverse: false }, tables, StridedView::new(&bf, 0, &shape, &strides).unwrap(), &mut rounded);
            for i in 0..out.len() {
                let (b, h, p, e) = (i / dense[0], i / dense[1] % heads, i / width % positions, i % width);
                let at = |e: usize| x[b * strides[0] + h * strides[1] + p * strides[2] + e];
                let (pair, first) = match (e / 2 < pairs, interleaved) {
                    (true, true) => (e / 2, e % 2 == 0),
                    (true, false) => (e % pairs, e < pairs),
                    _ => (0, true),
                };
                let (u, v) = if interleaved { (at(2 * pair), at(2 * pair + 1)) } else { (at(pair), at(pair + pairs)) };
                let (c, s) = (cos[p * pairs + pair], sin[p * pairs + pair]);
                let want = match (e < 2 * pairs, first) {
                    (false, _) => at(e),
                    (true, true) => u * c - v * s,
                    (true, false) => v * c + u * s,
                };
                assert_eq!(out[i], want, "{interleaved} {i}");
                assert!((back[i] - at(e)).abs() < 1e-5);
                assert!((rounded[i].to_f32() - want).abs() < 0.03, "{i}");
            }
        }
    }
}
