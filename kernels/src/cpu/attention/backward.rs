//! The gradients of queries, keys and values. The weights are computed anew from the scores and their saved sums:
//!
//! ```text
//! P = exp(scale · Q·Kᵀ + mask − lse)          dV = (D∘P)ᵀ·dO
//! dS = P ∘ (D∘(dO·Vᵀ) − rows of Σ dO ∘ O)     dQ = scale · dS·K      dK = scale · dSᵀ·Q
//! ```
//!
//! D holds the factors of dropout, which are drawn again.
//!
//! A task has some keys of a key head and all queries that look at them, so dK and dV have one writer, and dQ if these are all keys. If not,
//! what it adds to dQ goes to a slot of its own; the slots are added in order.

use super::block::{Left, PackTransposed, Right, Sums, cut, product};
use super::entries::{Entries, Single, padded, round};
use super::{Attended, Attention, Extents, LogSum};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::math;
use crate::cpu::parallel::{SharedMut, for_each, for_each_chunk};
use crate::cpu::simd::{F32s, Simd};
use crate::view::MatView;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

/// Keys of a block.
const KEYS: usize = 128;

/// Queries of a block: scores and their gradients, 48 KiB each, and all blocks beside them stay in the second-level cache.
const ROWS: usize = 96;

/// Queries of a block where the edge of a causal problem runs through it: less is computed in vain.
const EDGE_ROWS: usize = 32;

/// Tasks that there should be at least; with fewer key heads, a head's keys are shared out to at most as many tasks.
const TASKS: usize = 8;

/// What the forward pass gave, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<'a, T> {
    /// The output, row-major without gaps.
    pub out: &'a [T],
    /// Its gradient, likewise.
    pub grad: &'a [T],
    /// The logarithms of the sums of exponentials.
    pub lse: &'a [LogSum],
}

/// Writes the gradients of all queries, keys and values, head after head without gaps.
///
/// # Errors
/// If the memory for blocks and sums cannot be had.
///
/// # Panics
/// If inputs and outputs do not fit together.
pub fn backward<T: Attended>(
    attention: &Attention<'_, T>,
    given: Gradients<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) -> Result<(), OutOfMemory> {
    if T::multiplies_pairs() {
        backward_of::<T, T::Pairs>(attention, given, dq, dk, dv)
    } else {
        backward_of::<T, Single>(attention, given, dq, dk, dv)
    }
}

/// [`backward`] with products of such entries.
pub(super) fn backward_of<T: Attended, E: Entries<T>>(
    attention: &Attention<'_, T>,
    given: Gradients<'_, T>,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) -> Result<(), OutOfMemory> {
    let x = attention.extents();
    let key_heads = attention.k.count();
    assert!(given.out.len() == x.heads * x.queries * x.value_width && given.grad.len() == given.out.len());
    assert!(given.lse.len() == x.heads * x.queries && dq.len() == x.heads * x.queries * x.width);
    assert!(dk.len() == key_heads * x.keys * x.width && dv.len() == key_heads * x.keys * x.value_width);
    if given.out.is_empty() || dk.is_empty() {
        [dq, dk, dv].into_iter().for_each(|d| d.fill(T::default()));
        return Ok(());
    }
    let mut along = Buffer::new(given.lse.len() * size_of::<f32>())?;
    sums_along(given, x.value_width, along.as_slice_mut());
    let (slots, keys) = slots(x, key_heads);
    let mut sums = Buffer::zeroed(if slots > 1 { slots * dq.len() * size_of::<f32>() } else { 0 })?;
    let shared = SharedMut::new(sums.as_slice_mut::<f32>());
    let (dq_len, whole_dq, dk, dv) = (dq.len(), SharedMut::new(&mut *dq), SharedMut::new(dk), SharedMut::new(dv));
    let macs = x.heads * x.queries * x.keys * (3 * x.width + 2 * x.value_width);
    let failure = OnceLock::new();
    for_each(key_heads * slots, macs / 32, |task| {
        let (key_head, slot) = (task / slots, task % slots);
        let keys = slot * keys..x.keys.min((slot + 1) * keys);
        let heads = key_head * x.group..(key_head + 1) * x.group;
        let (first, per_head) = (key_head * x.keys + keys.start, x.queries * x.width);
        // SAFETY: a task's keys of a key head, and its slot's queries of the heads that share it, belong to it alone; all lie inside
        // of the outputs, whose lengths were checked, and of the slots.
        let (dk, dv, dq) = unsafe {
            (
                std::slice::from_raw_parts_mut(dk.get().add(first * x.width), keys.len() * x.width),
                std::slice::from_raw_parts_mut(dv.get().add(first * x.value_width), keys.len() * x.value_width),
                match slots {
                    1 => Queries::All(std::slice::from_raw_parts_mut(whole_dq.get().add(heads.start * per_head), heads.len() * per_head)),
                    _ => {
                        let first = shared.get().add(slot * dq_len + heads.start * per_head);
                        Queries::Slot(std::slice::from_raw_parts_mut(first, heads.len() * per_head))
                    }
                },
            )
        };
        let task = Task { attention, x, given, along: along.as_slice(), key_head, heads, keys, dq, dk, dv, entries: PhantomData::<E> };
        if let Err(error) = dispatch(task) {
            failure.get_or_init(|| error);
        }
    });
    if slots > 1 {
        add_slots(sums.as_slice_mut(), attention.scale, dq);
    }
    failure.get().map_or(Ok(()), |&error| Err(error))
}

/// How many tasks share a head's keys, and how many each has: by shape alone.
fn slots(x: Extents, key_heads: usize) -> (usize, usize) {
    let blocks = x.keys.div_ceil(KEYS);
    let per_task = blocks.div_ceil(TASKS.div_ceil(key_heads).min(blocks));
    (blocks.div_ceil(per_task), per_task * KEYS)
}

/// Σ dO ∘ O of each row.
fn sums_along<T: Attended>(given: Gradients<'_, T>, width: usize, along: &mut [f32]) {
    const ROWS: usize = 256;
    for_each_chunk(along, ROWS, given.out.len() / 4, |i, along| {
        let values = i * ROWS * width..(i * ROWS + along.len()) * width;
        dispatch(Along { out: &given.out[values.clone()], grad: &given.grad[values], width, along });
    });
}

struct Along<'a, T> {
    out: &'a [T],
    grad: &'a [T],
    width: usize,
    along: &'a mut [f32],
}

impl<T: Attended> WithSimd for Along<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let rows = self.out.chunks_exact(self.width).zip(self.grad.chunks_exact(self.width));
        for (along, (out, grad)) in self.along.iter_mut().zip(rows) {
            let mut sum = s.zero();
            for (out, grad) in out.chunks(S::LANES).zip(grad.chunks(S::LANES)) {
                // SAFETY: the chunks have that many values.
                let (out, grad) = unsafe { (T::load(s, out.as_ptr(), out.len()), T::load(s, grad.as_ptr(), grad.len())) };
                sum = out.mul_add(grad, sum);
            }
            *along = sum.reduce_sum();
        }
    }
}

/// dQ from its slots, which serve as scratch memory.
fn add_slots<T: Attended>(slots: &mut [f32], scale: f32, dq: &mut [T]) {
    const CHUNK: usize = 1 << 14;
    let (len, all) = (dq.len(), slots.len());
    let shared = SharedMut::new(slots);
    for_each_chunk(dq, CHUNK, all / 8, |i, dq| {
        let count = dq.len();
        let parts = (i * CHUNK..all).step_by(len).map(|at| {
            // SAFETY: these places of a slot belong to this chunk alone.
            unsafe { std::slice::from_raw_parts_mut(shared.get().add(at), count) }
        });
        dispatch(Slots { parts, scale, dq });
    });
}

struct Slots<'a, P, T> {
    parts: P,
    scale: f32,
    dq: &'a mut [T],
}

impl<'a, P: Iterator<Item = &'a mut [f32]>, T: Attended> WithSimd for Slots<'_, P, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        let Some(sum) = self.parts.next() else { return };
        for part in self.parts {
            sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += *x);
        }
        sum.iter_mut().for_each(|x| *x *= self.scale);
        round(sum, self.dq);
    }
}

/// Where a task's part of dQ goes.
enum Queries<'a, T> {
    /// To its slot, unscaled.
    Slot(&'a mut [f32]),
    /// To dQ, of which there is no other part.
    All(&'a mut [T]),
}

/// Some keys of a key head, and all queries.
struct Task<'a, T, E> {
    attention: &'a Attention<'a, T>,
    x: Extents,
    given: Gradients<'a, T>,
    along: &'a [f32],
    key_head: usize,
    heads: Range<usize>,
    keys: Range<usize>,
    dq: Queries<'a, T>,
    dk: &'a mut [T],
    dv: &'a mut [T],
    entries: PhantomData<E>,
}

/// A task's blocks. Widths are counted in entries where a block is summed over its columns; `stride` is a width padded for the micro-kernels.
struct Scratch<'a> {
    /// Keys: `[KEYS][width]` (where entries by rows are not those by columns), their transpose in panels, and `[entries of KEYS][stride]`.
    key_rows: &'a mut [f32],
    key_panels: &'a mut [f32],
    key_columns: &'a mut [f32],
    /// Values: `[KEYS][width]`, and their transpose in panels.
    value_rows: &'a mut [f32],
    value_panels: &'a mut [f32],
    /// Queries: `[ROWS][width]` (if these are not the same) and `[entries of ROWS][stride]`.
    q_rows: &'a mut [f32],
    q_columns: &'a mut [f32],
    /// Gradients of the output, likewise.
    grad_rows: &'a mut [f32],
    grad_columns: &'a mut [f32],
    /// Scores and then weights, `[ROWS][KEYS]`.
    weights: &'a mut [f32],
    /// Gradients of the weights and then of the scores, `[ROWS][KEYS]`.
    d_scores: &'a mut [f32],
    /// Either as entries.
    packed: &'a mut [f32],
    /// Sums of the gradients of keys, unscaled, and values, `[KEYS][width]`.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl<T: Attended, E: Entries<T>> WithSimd for Task<'_, T, E> {
    type Output = Result<(), OutOfMemory>;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) -> Self::Output {
        let mut own;
        let (sums, dq) = match std::mem::replace(&mut self.dq, Queries::Slot(&mut [])) {
            Queries::Slot(sums) => (sums, None),
            Queries::All(dq) => {
                own = Buffer::zeroed(dq.len() * size_of::<f32>())?;
                (own.as_slice_mut::<f32>(), Some(dq))
            }
        };
        let scale = self.attention.scale;
        self.run(s, sums)?;
        if let Some(dq) = dq {
            sums.iter_mut().for_each(|x| *x *= scale);
            round(sums, dq);
        }
        Ok(())
    }
}

impl<T: Attended, E: Entries<T>> Task<'_, T, E> {
    /// Adds to `dq`, and writes the gradients of the keys and their values.
    #[inline(always)]
    fn run<S: Simd>(self, s: S, dq: &mut [f32]) -> Result<(), OutOfMemory> {
        let Self { attention, x, given, along, key_head, heads, keys, dk, dv, .. } = self;
        let kernels = E::kernels();
        let (stride, value_stride, key_stride) = (padded(kernels, x.width), padded(kernels, x.value_width), padded(kernels, KEYS));
        let (width, value_width) = (x.width.div_ceil(E::TERMS), x.value_width.div_ceil(E::TERMS));
        let by_rows = usize::from(E::TERMS > 1);
        let sizes = [
            KEYS * width * by_rows,
            width * key_stride,
            KEYS / E::TERMS * stride,
            KEYS * value_width,
            value_width * key_stride,
            ROWS * width * by_rows,
            ROWS / E::TERMS * stride,
            ROWS * value_width * by_rows,
            ROWS / E::TERMS * value_stride,
            ROWS * KEYS,
            ROWS * KEYS,
            ROWS * KEYS / E::TERMS * by_rows,
            KEYS * x.width,
            KEYS * x.value_width,
        ];
        let mut buffer = Buffer::new(sizes.iter().sum::<usize>() * size_of::<f32>())?;
        let parts = cut(buffer.as_slice_mut(), sizes);
        let [key_rows, key_panels, key_columns, value_rows, value_panels, parts @ ..] = parts;
        let [q_rows, q_columns, grad_rows, grad_columns, weights, d_scores, packed, key_sums, value_sums] = parts;
        let scratch = &mut Scratch {
            key_rows,
            key_panels,
            key_columns,
            value_rows,
            value_panels,
            q_rows,
            q_columns,
            grad_rows,
            grad_columns,
            weights,
            d_scores,
            packed,
            dk: key_sums,
            dv: value_sums,
        };
        let (k, v) = (attention.k.matrix(key_head), attention.v.matrix(key_head));
        for first in keys.clone().step_by(KEYS) {
            let block = first..keys.end.min(first + KEYS);
            let loaded = E::load_both(s, &k, block.clone(), stride, scratch.key_rows, scratch.key_columns);
            s.call(PackTransposed { kernels, from: loaded.rows, rows: block.len(), k: width, to: scratch.key_panels });
            E::load_rows(s, &v, block.clone(), scratch.value_rows);
            let from = (&*scratch.value_rows, value_width);
            s.call(PackTransposed { kernels, from, rows: block.len(), k: value_width, to: scratch.value_panels });
            scratch.dk.fill(0.0);
            scratch.dv.fill(0.0);
            for head in heads.clone() {
                let dq = &mut dq[(head - heads.start) * x.queries * x.width..][..x.queries * x.width];
                // Queries before the first key do not look at the block.
                let mut row = if attention.causal { first } else { 0 };
                while row < x.queries {
                    let left = x.queries - row;
                    let on_edge = attention.causal && row < block.end;
                    let rows = row..row + if on_edge { EDGE_ROWS.min(left) } else { left.div_ceil(left.div_ceil(ROWS)) };
                    let reach = attention.reach(rows.end - 1, &block);
                    let dq = &mut dq[rows.start * x.width..rows.end * x.width];
                    row = rows.end;
                    Rows { attention, x, given, along, head, rows, keys: block.clone(), reach, entries: PhantomData::<E> }
                        .run(s, scratch, dq);
                }
            }
            let at = first - keys.start;
            let (width, value_width) = (block.len() * x.width, block.len() * x.value_width);
            scratch.dk[..width].iter_mut().for_each(|x| *x *= attention.scale);
            round(&scratch.dk[..width], &mut dk[at * x.width..][..width]);
            round(&scratch.dv[..value_width], &mut dv[at * x.value_width..][..value_width]);
        }
        Ok(())
    }
}

/// Some queries of a head against the first `reach` keys of a block.
struct Rows<'a, T, E> {
    attention: &'a Attention<'a, T>,
    x: Extents,
    given: Gradients<'a, T>,
    along: &'a [f32],
    head: usize,
    rows: Range<usize>,
    keys: Range<usize>,
    reach: usize,
    entries: PhantomData<E>,
}

impl<T: Attended, E: Entries<T>> Rows<'_, T, E> {
    #[inline(always)]
    fn run<S: Simd>(&self, s: S, scratch: &mut Scratch, dq: &mut [f32]) {
        let Extents { queries, width, value_width, .. } = self.x;
        let kernels = E::kernels();
        let (count, keys, stride, value_stride) = (self.rows.len(), self.reach, padded(kernels, width), padded(kernels, value_width));
        let (entries, value_entries) = (width.div_ceil(E::TERMS), value_width.div_ceil(E::TERMS));
        let Scratch { key_panels, key_columns, value_panels, q_rows, q_columns, grad_rows, grad_columns, .. } = scratch;
        let Scratch { weights, d_scores, packed, dk, dv, .. } = scratch;
        let q = self.attention.q.matrix(self.head);
        let q = E::load_both(s, &q, self.rows.clone(), stride, q_rows, q_columns);
        let grads = &self.given.grad[self.head * queries * value_width..][..queries * value_width];
        let grads = MatView::row_major(grads, queries, value_width);
        assert!(grads.is_some(), "a gradient for each value of the output");
        let Some(grads) = grads else { return };
        let grads = E::load_both(s, &grads, self.rows.clone(), value_stride, grad_rows, grad_columns);
        // Whole panels, so that they are read as they were packed.
        let computed = keys.next_multiple_of(kernels.nr).min(self.keys.len());
        let [alpha, unit] = self.attention.units();
        let to = Sums { data: weights, stride: KEYS, alpha, add: false };
        product(kernels, [count, entries, computed], Left::rows(q.rows.0, q.rows.1), Right::Panels(key_panels), to);
        let to = Sums { data: d_scores, stride: KEYS, alpha: 1.0, add: false };
        product(kernels, [count, value_entries, computed], Left::rows(grads.rows.0, grads.rows.1), Right::Panels(value_panels), to);
        for (i, row) in self.rows.clone().enumerate() {
            self.differentiate(s, row, unit, &mut weights[i * KEYS..(i + 1) * KEYS], &mut d_scores[i * KEYS..(i + 1) * KEYS]);
        }
        let terms = count.div_ceil(E::TERMS);
        let left = Left::columns(E::columns_of(weights, [count, keys], KEYS, packed), KEYS);
        let to = Sums { data: dv, stride: value_width, alpha: 1.0, add: true };
        product(kernels, [keys, terms, value_width], left, Right::Rows(grads.columns, value_stride), to);
        let left = Left::columns(E::columns_of(d_scores, [count, keys], KEYS, packed), KEYS);
        let to = Sums { data: dk, stride: width, alpha: 1.0, add: true };
        product(kernels, [keys, terms, width], left, Right::Rows(q.columns, stride), to);
        let (left, row_stride) = E::rows_of(d_scores, [count, keys], KEYS, packed);
        let to = Sums { data: dq, stride: width, alpha: 1.0, add: true };
        product(kernels, [count, keys.div_ceil(E::TERMS), width], Left::rows(left, row_stride), Right::Rows(key_columns, stride), to);
    }

    /// Turns a query's scores into weights, and the gradients of the weights into those of the scores.
    #[inline(always)]
    fn differentiate<S: Simd>(&self, s: S, row: usize, unit: f32, weights: &mut [f32], gradients: &mut [f32]) {
        let own = self.attention.reach(row, &self.keys);
        let end = self.reach.next_multiple_of(S::LANES).min(weights.len());
        self.attention.mask_scores(self.head, row, self.keys.start, &mut weights[..own]);
        weights[own..end].fill(f32::NEG_INFINITY);
        gradients[own..end].fill(0.0);
        let at = self.head * self.x.queries + row;
        let [largest, log] = self.given.lse[at].map(|x| -x);
        let (largest, log, along, unit) = (s.splat(largest), s.splat(log), s.splat(self.along[at]), s.splat(unit));
        self.attention.drop(s, &self.x, self.head, row, self.keys.start, &mut gradients[..own]);
        for (w, g) in weights[..end].chunks_exact_mut(S::LANES).zip(gradients[..end].chunks_exact_mut(S::LANES)) {
            let weight = math::exp2(s, s.load_slice(w).mul_add(unit, largest) + log);
            weight.store_slice(w, S::LANES);
            ((s.load_slice(g) - along) * weight).store_slice(g, S::LANES);
        }
        self.attention.drop(s, &self.x, self.head, row, self.keys.start, &mut weights[..own]);
    }
}
