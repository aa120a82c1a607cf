//! The output, and the logarithm of each query's sum of exponentials.
//!
//! A task has some queries of a head and all keys that they look at. Where that gives few tasks (decoding: few queries, many keys), the keys are cut
//! into parts with tasks of their own, whose sums are merged in order.

use super::block::{Left, PackTransposed, Right, Sums, cut, product};
use super::entries::{Entries, Single, padded};
use super::few::{self, Few};
use super::online::{Online, Scores, Weigh};
use super::{Attended, Attention, Extents, LogSum, NO_KEYS};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;

/// Keys of a block.
pub(super) const KEYS: usize = 256;

/// Queries of a task at most; a block of keys is packed once for them.
const QUERIES: usize = 256;

/// Queries whose scores are in work at a time, at most: with [`KEYS`], 24 KiB of first-level cache.
const ROWS: usize = 24;

/// Tasks that there should be at least, to keep threads evenly busy.
const TASKS: usize = 16;

/// `out = dropout(softmax(scale · Q·Kᵀ + mask)) · V`, head after head without gaps, L×V each, and `lse`, L a head: of the sum of the exponentials
/// of a query's scores the [logarithm](LogSum). A query that looks at no key gives zeros, and ∞ in `lse`.
///
/// # Errors
/// If the memory for a task's blocks cannot be had.
///
/// # Panics
/// If inputs and outputs do not fit together.
pub fn forward<T: Attended>(attention: &Attention<'_, T>, out: &mut [T], lse: &mut [LogSum]) -> Result<(), OutOfMemory> {
    if T::multiplies_pairs() { forward_of::<T, T::Pairs>(attention, out, lse) } else { forward_of::<T, Single>(attention, out, lse) }
}

/// How the work is cut, by shape alone.
struct Plan {
    /// Heads of a task: one, or all that share a key head.
    heads: usize,
    /// Queries of a task, and how many tasks have a head's queries.
    queries: usize,
    chunks: usize,
    /// Keys of a part, and the number of parts.
    keys: usize,
    parts: usize,
}

impl Plan {
    fn new(x: &Extents, causal: bool) -> Self {
        let heads = if few::serves(x) { x.group } else { 1 };
        let most = (x.heads * x.queries).div_ceil(TASKS).next_multiple_of(ROWS).clamp(ROWS, QUERIES);
        let queries = x.queries.div_ceil(x.queries.div_ceil(most));
        let chunks = x.queries.div_ceil(queries);
        let blocks = if causal { x.keys.min(x.queries) } else { x.keys }.div_ceil(KEYS);
        let wanted = TASKS.div_ceil(x.heads / heads * chunks).min(blocks);
        let keys = blocks.div_ceil(wanted) * KEYS;
        Self { heads, queries, chunks, keys, parts: (blocks * KEYS).div_ceil(keys) }
    }
}

/// [`forward`] with products of such entries.
pub(super) fn forward_of<T: Attended, E: Entries<T>>(
    attention: &Attention<'_, T>,
    out: &mut [T],
    lse: &mut [LogSum],
) -> Result<(), OutOfMemory> {
    let x = attention.extents();
    assert!(out.len() == x.heads * x.queries * x.value_width && lse.len() == x.heads * x.queries);
    if x.keys == 0 || x.value_width == 0 || x.width == 0 || out.is_empty() {
        assert!(x.keys == 0 || out.is_empty(), "queries without values");
        out.fill(T::default());
        lse.fill(NO_KEYS);
        return Ok(());
    }
    let plan = Plan::new(&x, attention.causal);
    let tasks = x.heads / plan.heads * plan.chunks;
    let macs = x.heads * x.queries * x.keys * (x.width + x.value_width);
    // The sums of a part lie task by task.
    let part = if plan.parts > 1 { Online::size(lse.len(), x.value_width) } else { 0 };
    let mut sums = Buffer::new(plan.parts * part * size_of::<f32>())?;
    let sums = sums.as_slice_mut::<f32>();
    let shared = SharedMut::new(sums);
    let results = (SharedMut::new(out), SharedMut::new(lse));
    let failure = OnceLock::new();
    for_each(plan.parts * tasks, macs / 32, |i| {
        let (at, task) = (i / tasks, i % tasks);
        let (heads, chunk) = (task / plan.chunks * plan.heads, task % plan.chunks);
        let queries = chunk * plan.queries..x.queries.min((chunk + 1) * plan.queries);
        let (first, rows) = (heads * x.queries + queries.start, plan.heads * queries.len());
        let keys = at * plan.keys..x.keys.min((at + 1) * plan.keys);
        let target = if plan.parts > 1 {
            let (begin, len) = (at * part + Online::size(first, x.value_width), Online::size(rows, x.value_width));
            // SAFETY: a part has room for all rows, each of which belongs to one task.
            Target::Part(unsafe { std::slice::from_raw_parts_mut(shared.get().add(begin), len) })
        } else {
            // SAFETY: these rows of the outputs lie inside of them (their lengths were checked), and belong to this task alone.
            unsafe {
                Target::Results(
                    std::slice::from_raw_parts_mut(results.0.get().add(first * x.value_width), rows * x.value_width),
                    std::slice::from_raw_parts_mut(results.1.get().add(first), rows),
                )
            }
        };
        let work = Work { attention, x, heads: heads..heads + plan.heads, queries, keys, entries: PhantomData::<E> };
        if let Err(error) = dispatch(Task { work, target }) {
            failure.get_or_init(|| error);
        }
    });
    if let Some(&error) = failure.get() {
        return Err(error);
    }
    if plan.parts > 1 {
        let mut first = 0;
        for task in 0..tasks {
            let rows = plan.heads * (x.queries - task % plan.chunks * plan.queries).min(plan.queries);
            let (begin, end) = (Online::size(first, x.value_width), Online::size(first + rows, x.value_width));
            let parts = sums.chunks_mut(part).map(|part| &mut part[begin..end]);
            let out = &mut out[first * x.value_width..][..rows * x.value_width];
            dispatch(Merge { parts, rows, out, lse: &mut lse[first..][..rows] });
            first += rows;
        }
    }
    Ok(())
}

/// The rows of a task, summed in parts.
struct Merge<'a, P, T> {
    parts: P,
    rows: usize,
    out: &'a mut [T],
    lse: &'a mut [LogSum],
}

impl<'a, P: Iterator<Item = &'a mut [f32]>, T: Attended> WithSimd for Merge<'_, P, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, s: S) {
        let Some(first) = self.parts.next() else { return };
        let mut online = Online::of(first, self.rows);
        self.parts.for_each(|part| online.merge(&Online::of(part, self.rows)));
        online.finish(s, self.out, self.lse);
    }
}

/// Where a task's sums go.
enum Target<'a, T> {
    /// To memory of [`Online::size`], to be merged with those of other keys.
    Part(&'a mut [f32]),
    /// Nowhere: these are the task's rows of the results.
    Results(&'a mut [T], &'a mut [LogSum]),
}

/// Work, and where its sums go.
struct Task<'a, T, E> {
    work: Work<'a, T, E>,
    target: Target<'a, T>,
}

impl<T: Attended, E: Entries<T>> WithSimd for Task<'_, T, E> {
    type Output = Result<(), OutOfMemory>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let Self { work, target } = self;
        let rows = work.heads.len() * work.queries.len();
        let mut own;
        let (memory, results) = match target {
            Target::Part(memory) => (memory, None),
            Target::Results(out, lse) => {
                own = Buffer::new(Online::size(rows, work.x.value_width) * size_of::<f32>())?;
                (own.as_slice_mut(), Some((out, lse)))
            }
        };
        let mut online = Online::new(memory, rows);
        work.sum(s, &mut online)?;
        if let Some((out, lse)) = results {
            online.finish(s, out, lse);
        }
        Ok(())
    }
}

/// Some queries of a head, or of all heads that share a key head, and some keys.
struct Work<'a, T, E> {
    attention: &'a Attention<'a, T>,
    x: Extents,
    heads: Range<usize>,
    queries: Range<usize>,
    keys: Range<usize>,
    entries: PhantomData<E>,
}

/// Blocks in work.
struct Scratch<'a> {
    /// Queries, `[queries][entries of width]`.
    q: &'a mut [f32],
    /// Keys, `[KEYS][entries of width]`.
    keys: &'a mut [f32],
    /// Their transpose in panels.
    panels: &'a mut [f32],
    /// Values, `[entries of KEYS][padded value width]`.
    values: &'a mut [f32],
    /// Scores and then weights, `[ROWS][KEYS]`.
    scores: &'a mut [f32],
    /// The weights as entries.
    weights: &'a mut [f32],
}

impl<T: Attended, E: Entries<T>> Work<'_, T, E> {
    #[inline(always)]
    fn sum<S: Simd>(&self, s: S, online: &mut Online<'_>) -> Result<(), OutOfMemory> {
        let reach = self.attention.reach(self.queries.end - 1, &self.keys);
        let keys = self.keys.start..self.keys.start + reach;
        if few::serves(&self.x) {
            s.call(Few { attention: self.attention, x: &self.x, heads: self.heads.clone(), keys, online })
        } else {
            self.blocks(s, keys, online)
        }
    }

    /// Packs a block of keys at a time, for queries of one head.
    #[inline(always)]
    fn blocks<S: Simd>(&self, s: S, keys: Range<usize>, online: &mut Online<'_>) -> Result<(), OutOfMemory> {
        let Self { attention, x, heads, queries, .. } = self;
        let kernels = E::kernels();
        let (count, width, value_stride) = (queries.len(), x.width.div_ceil(E::TERMS), padded(kernels, x.value_width));
        let sizes = [
            count * width,
            KEYS * width,
            width * padded(kernels, KEYS),
            KEYS / E::TERMS * value_stride,
            ROWS * KEYS,
            if E::TERMS > 1 { ROWS * KEYS / E::TERMS } else { 0 },
        ];
        let mut buffer = Buffer::new(sizes.iter().sum::<usize>() * size_of::<f32>())?;
        let [q, key_rows, panels, values, scores, weights] = cut(buffer.as_slice_mut(), sizes);
        E::load_rows(s, &attention.q.matrix(heads.start), queries.clone(), q);
        let scratch = &mut Scratch { q, keys: key_rows, panels, values, scores, weights };
        let (k, v) = (attention.k.matrix(heads.start / x.group), attention.v.matrix(heads.start / x.group));
        for first in keys.clone().step_by(KEYS) {
            let block = first..keys.end.min(first + KEYS);
            E::load_rows(s, &k, block.clone(), scratch.keys);
            E::load_columns(s, &v, block.clone(), value_stride, scratch.values);
            s.call(PackTransposed { kernels, from: (scratch.keys, width), rows: block.len(), k: width, to: scratch.panels });
            let parts = count.div_ceil(ROWS);
            for part in 0..parts {
                let rows = part * count / parts..(part + 1) * count / parts;
                let reach = attention.reach(queries.start + rows.end - 1, &block);
                if reach > 0 {
                    self.rows(s, rows, &block, reach, scratch, online);
                }
            }
        }
        Ok(())
    }

    /// Some of the queries against the first `reach` keys of a block.
    #[inline(always)]
    fn rows<S: Simd>(&self, s: S, rows: Range<usize>, block: &Range<usize>, reach: usize, scratch: &mut Scratch, online: &mut Online<'_>) {
        let Self { attention, x, heads, .. } = self;
        let kernels = E::kernels();
        let (count, width, first) = (rows.len(), x.width.div_ceil(E::TERMS), rows.start);
        let Scratch { q, panels, values, scores, weights, .. } = scratch;
        // Whole panels, so that they are read as they were packed.
        let computed = reach.next_multiple_of(kernels.nr).min(block.len());
        let q = Left::rows(&q[first * width..], width);
        let [alpha, unit] = attention.units();
        let to = Sums { data: scores, stride: KEYS, alpha, add: false };
        product(kernels, [count, width, computed], q, Right::Panels(panels), to);
        for (i, row) in rows.enumerate() {
            let of = Scores { head: heads.start, query: self.queries.start + row, first_key: block.start, keys: reach, unit };
            s.call(Weigh { of, attention, x, scores: &mut scores[i * KEYS..(i + 1) * KEYS], row, online });
        }
        let (weights, row_stride) = E::rows_of(scores, [count, reach], KEYS, weights);
        let weights = Left::rows(weights, row_stride);
        let values = Right::Rows(values, padded(kernels, x.value_width));
        let to = Sums { data: &mut online.values[first * x.value_width..], stride: x.value_width, alpha: 1.0, add: true };
        product(kernels, [count, reach.div_ceil(E::TERMS), x.value_width], weights, values, to);
    }
}
