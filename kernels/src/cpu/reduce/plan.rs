//! How a reduction walks memory and shares the work. Two patterns cover every set of axes of every layout:
//! *rows*, where neighbours in memory belong to the same output, and *columns*, where they belong to different ones.
//! What does not lie in neighbouring lanes (strides, narrow types) is first gathered into a tile.

use super::fold::{Fold, MAX_ROWS, MAX_WIDTH};
use crate::cpu::isa::WithSimd;
use crate::cpu::lanes::{Ahead, Lane, MAX_LANES, Numeric, SUM_TILE, Widen};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::Simd;
use crate::iter::Walk;
use crate::view::StridedView;
use std::ops::Range;

/// Elements of a gathered tile: a few KiB on the stack.
const GATHER: usize = 1024;

/// Columns of a gathered block; with [`MAX_ROWS`] rows it holds 64 KiB of f32, within L2.
const GATHER_WIDTH: usize = 128;

/// The same where memory holds them side by side (256 KiB of f32): of short stretches of rows that lie far apart, each would be waited for.
const WIDENED_WIDTH: usize = 512;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Elements that one task should read, so that handing it over costs little.
const TASK: usize = 1 << 16;

/// As many elements of short rows, and what a row costs beyond its elements: a few microseconds, so that all threads get their share.
const ROWS_TASK: usize = 1 << 14;
const ROW_COST: usize = 16;

/// Columns of the one row that several rows of fewer make, where they follow one another.
const JOINED_WIDTH: usize = 128;

/// Results that are handed on at once.
const EMITTED: usize = 64;

/// Where so many rows of so few elements follow one another, they may be taken as columns ([`Fold::TURNS_SHORT_ROWS`]).
const MANY_ROWS: usize = 16;
const FEW_ELEMENTS: usize = 32;

/// With fewer tasks than this, one for each group of outputs, the reduced elements are cut too.
const ENOUGH_TASKS: usize = 16;

/// What a reduction reads: elements in memory, or results that are made as they are read.
pub trait Elements<T: Numeric> {
    /// Extents.
    fn shape(&self) -> &[usize];
    /// Distances between neighbours of each dimension.
    fn strides(&self) -> &[usize];
    /// Where the first element lies.
    fn offset(&self) -> usize;
    /// Calls `f` with the elements as lanes.
    fn with_source<R>(&self, f: impl FnOnce(Source<'_, T::Lane>) -> R) -> R;
}

/// Elements of any type, read as lanes.
#[derive(Clone, Copy)]
pub struct Source<'a, L: Lane> {
    place: Place<'a, L>,
    /// Nanoseconds that it takes to make an element.
    ns: f32,
    /// Reads a strided run of elements as lanes.
    gather: &'a (dyn Fn(usize, usize, &mut [L]) + Sync),
}

/// Where lanes are found. What is made as it is read is cut into the same tiles as what lies in memory, for the sake of the same bits.
#[derive(Clone, Copy)]
enum Place<'a, L: Lane> {
    /// Elements that are lanes lie in memory.
    Memory(&'a [L]),
    /// So do halves, which are widened as they are loaded.
    Halves(&'a [L::Half]),
    /// Elements that would be read so from memory are made on demand.
    Made,
    /// Elements are widened by tiles.
    Narrow,
}

impl<'a, L: Lane> Source<'a, L> {
    /// Elements of type `T` that `gather` makes from an offset and a stride, in `ns` nanoseconds each.
    pub fn made<T: Numeric<Lane = L>>(ns: f32, gather: &'a (dyn Fn(usize, usize, &mut [L]) + Sync)) -> Self {
        let place = if T::as_lanes(&[]).is_some() || T::as_halves(&[]).is_some() { Place::Made } else { Place::Narrow };
        Self { place, ns, gather }
    }

    fn is_narrow(&self) -> bool {
        matches!(self.place, Place::Narrow)
    }
}

impl<T: Numeric> Elements<T> for StridedView<'_, T> {
    fn shape(&self) -> &[usize] {
        StridedView::shape(self)
    }
    fn strides(&self) -> &[usize] {
        StridedView::strides(self)
    }
    fn offset(&self) -> usize {
        StridedView::offset(self)
    }
    fn with_source<R>(&self, f: impl FnOnce(Source<'_, T::Lane>) -> R) -> R {
        let data = self.data();
        let gather = |at: usize, stride: usize, dst: &mut [T::Lane]| {
            if stride == 1 {
                T::Lane::dispatch(Widen(&data[at..at + dst.len()], dst));
            } else {
                dst.iter_mut().enumerate().for_each(|(i, d)| *d = data[at + i * stride].to_lane());
            }
        };
        let place = T::as_lanes(data).map(Place::Memory).or(T::as_halves(data).map(Place::Halves)).unwrap_or(Place::Narrow);
        f(Source { place, ns: 0.0, gather: &gather })
    }
}

/// Takes results: the first's output, the distance between outputs, the results.
type Emit<'a, A> = &'a (dyn Fn(usize, usize, &[A]) + Sync);

/// The loops over kept and reduced dimensions.
pub struct Plan {
    /// Offsets of the input and of the output, which is row-major over the kept dimensions.
    kept: Walk<2>,
    /// Offset of the input within an output's elements.
    reduced: Walk<1>,
    rows: bool,
    outputs: usize,
}

impl Plan {
    /// The plan to reduce the dimensions that `axes` marks.
    ///
    /// # Panics
    /// If `axes` has another length than the shape.
    pub fn new<T: Numeric>(x: &impl Elements<T>, axes: &[bool]) -> Self {
        let (shape, strides) = (x.shape(), x.strides());
        assert_eq!(axes.len(), shape.len());
        let part = |of: &[usize], reduced: bool| -> Vec<usize> { (0..of.len()).filter(|&d| axes[d] == reduced).map(|d| of[d]).collect() };
        let (kept_shape, kept_strides) = (part(shape, false), part(strides, false));
        let mut out_strides = vec![1; kept_shape.len()];
        for d in (1..kept_shape.len()).rev() {
            out_strides[d - 1] = out_strides[d] * kept_shape[d];
        }
        let reduced = Walk::in_memory_order(&part(shape, true), [&part(strides, true)], [0]);
        let kept = Walk::in_memory_order(&kept_shape, [&kept_strides, &out_strides], [x.offset(), 0]);
        // Stride 0 repeats an element: there is nothing to be gained from walking it first.
        let rank = |stride: usize| if stride == 0 { usize::MAX } else { stride };
        let rows = reduced.numel() > 1 && (kept.run_len() < 2 || rank(reduced.inner_strides()[0]) <= rank(kept.inner_strides()[0]));
        let outputs = kept_shape.iter().product();
        Self { kept, reduced, rows, outputs }
    }

    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of elements of each output.
    pub fn reduced(&self) -> usize {
        self.reduced.numel()
    }

    /// Folds every output's elements and hands the results to `emit(first output, distance between outputs, results)`,
    /// which is called once for each output, from any thread.
    pub fn run<L: Lane, F: Fold<L>>(&self, source: Source<'_, L>, fold: F, emit: Emit<'_, F::Acc>) {
        if self.outputs == 0 {
            return;
        }
        if self.reduced.numel() == 0 {
            (0..self.outputs).for_each(|o| emit(o, 1, &[fold.empty()]));
        } else if self.rows {
            self.run_rows(source, fold, emit);
        } else if let (false, Some(rows)) = (F::IS_ORDERED, self.joined_rows()) {
            self.run_joined(rows, source, fold, emit);
        } else {
            self.run_columns(source, fold, emit);
        }
    }

    /// How many rows make one of about [`JOINED_WIDTH`] columns, if all follow one another and several do.
    fn joined_rows(&self) -> Option<usize> {
        let (width, rows) = (self.kept.run_len(), JOINED_WIDTH / self.kept.run_len());
        let is_dense = self.kept.runs() == 1
            && self.reduced.runs() == 1
            && self.kept.inner_strides()[0] == 1
            && self.reduced.inner_strides() == [width];
        (is_dense && rows > 1 && self.reduced.numel() >= 2 * rows).then_some(rows)
    }

    /// [`run`](Self::run) of dense rows: `joined` of them at a time as one, and at last those that are left. Each output has as many
    /// columns then, which are merged.
    fn run_joined<L: Lane, F: Fold<L>>(&self, joined: usize, source: Source<'_, L>, fold: F, emit: Emit<'_, F::Acc>) {
        let (width, rows) = (self.kept.run_len(), self.reduced.numel());
        let [input, output] = self.kept.offsets_of_run(0);
        let left = rows % joined;
        let mut accs = vec![fold.empty(); width * (joined + left.min(1))];
        let (whole, rest) = accs.split_at_mut(width * joined);
        Self::dense(input, rows / joined, width * joined).run_columns_into(source, fold, whole);
        if left > 0 {
            Self::dense(input + (rows - left) * width, left, width).run_columns_into(source, fold, rest);
        }
        let (first, others) = accs.split_at_mut(width);
        for other in others.chunks(width) {
            first.iter_mut().zip(other).for_each(|(a, &b)| *a = fold.merge(*a, b));
        }
        emit(output, self.kept.inner_strides()[1], first);
    }

    /// The plan to reduce the columns of a dense matrix that begins at `input`.
    fn dense(input: usize, rows: usize, width: usize) -> Self {
        let kept = Walk::new(&[width], [&[1], &[1]], [input, 0]);
        Self { kept, reduced: Walk::new(&[rows], [&[width]], [0]), rows: false, outputs: width }
    }

    /// [`run_columns`](Self::run_columns) with a place for each output.
    fn run_columns_into<L: Lane, F: Fold<L>>(&self, source: Source<'_, L>, fold: F, accs: &mut [F::Acc]) {
        assert_eq!(accs.len(), self.outputs);
        let accs = SharedMut::new(accs);
        self.run_columns(source, fold, &|first, stride, part| {
            for (i, &acc) in part.iter().enumerate() {
                // SAFETY: the plan emits each of its outputs once, and there is a place for each.
                unsafe { accs.get().add(first + i * stride).write(acc) }
            }
        });
    }

    fn estimated_ns<L: Lane, F: Fold<L>>(&self, source: &Source<'_, L>) -> usize {
        // About 64 bytes a nanosecond from the caches, for one thread with AVX-512.
        let each = self.reduced.numel() * F::COST / 16 + 4 + (self.reduced.numel() as f32 * source.ns) as usize;
        self.outputs.saturating_mul(each)
    }

    fn run_rows<L: Lane, F: Fold<L>>(&self, source: Source<'_, L>, fold: F, emit: Emit<'_, F::Acc>) {
        let (outputs, reduced) = (self.outputs, self.reduced.numel());
        if outputs < ENOUGH_TASKS && reduced >= 2 * TASK {
            // At most 64 parts of each output, of whole tiles.
            let part = reduced.div_ceil(64).max(TASK).next_multiple_of(SUM_TILE);
            let parts = reduced.div_ceil(part);
            let mut accs = vec![fold.empty(); outputs * parts];
            parallel::for_each_chunk(&mut accs, 1, self.estimated_ns::<L, F>(&source), |i, acc| {
                let (output, start) = (i / parts, i % parts * part);
                let acc = SharedMut::new(acc);
                // SAFETY: a range of one output is emitted once, and `acc` has one element.
                let emit = |_: usize, _: usize, part: &[F::Acc]| unsafe { acc.get().write(part[0]) };
                let elements = start..reduced.min(start + part);
                L::dispatch(Rows { plan: self, source, fold, outputs: output..output + 1, elements, emit: &emit });
            });
            for (output, accs) in accs.chunks(parts).enumerate() {
                let acc = accs[1..].iter().fold(accs[0], |a, &b| fold.merge(a, b));
                emit(self.kept.offsets_of(output)[1], 1, &[acc]);
            }
        } else {
            let group = ROWS_TASK.div_ceil(reduced + ROW_COST);
            parallel::for_each(outputs.div_ceil(group), self.estimated_ns::<L, F>(&source), |task| {
                let outputs = task * group..outputs.min((task + 1) * group);
                L::dispatch(Rows { plan: self, source, fold, outputs, elements: 0..reduced, emit });
            });
        }
    }

    fn run_columns<L: Lane, F: Fold<L>>(&self, source: Source<'_, L>, fold: F, emit: Emit<'_, F::Acc>) {
        let reduced = self.reduced.numel();
        let column_stride = self.kept.inner_strides()[0];
        let is_wide = !source.is_narrow() && column_stride == 1;
        let width = self.kept.run_len().min(if is_wide { MAX_WIDTH } else { gathered_width(column_stride) });
        let strips = self.kept.run_len().div_ceil(width);
        let columns = self.kept.runs() * strips;
        let group = TASK.div_ceil(reduced * width);
        let tasks = columns.div_ceil(group);
        let part = if tasks < ENOUGH_TASKS { reduced.div_ceil(ENOUGH_TASKS / tasks).max(TASK / width) } else { reduced };
        let part = part.next_multiple_of(MAX_ROWS);
        let strip = |i: usize, start: usize| {
            let column = i % strips * width;
            let [input, output] = self.kept.offsets_of_run(i / strips);
            let strides = self.kept.inner_strides();
            let count = width.min(self.kept.run_len() - column);
            Strip {
                plan: self,
                source,
                fold,
                input: input + column * strides[0],
                output: output + column * strides[1],
                count,
                start,
                end: reduced.min(start + part),
            }
        };
        let stride = self.kept.inner_strides()[1];
        if part >= reduced {
            parallel::for_each(tasks, self.estimated_ns::<L, F>(&source), |task| {
                let mut accs = vec![fold.empty(); width];
                for i in task * group..columns.min((task + 1) * group) {
                    let strip = strip(i, 0);
                    let (output, accs) = (strip.output, &mut accs[..strip.count]);
                    accs.fill(fold.empty());
                    L::dispatch(strip.into(accs));
                    emit(output, stride, accs);
                }
            });
            return;
        }
        let parts = reduced.div_ceil(part);
        let mut accs = vec![fold.empty(); columns * parts * width];
        parallel::for_each_chunk(&mut accs, width, self.estimated_ns::<L, F>(&source), |i, accs| {
            let strip = strip(i / parts, i % parts * part);
            let count = strip.count;
            L::dispatch(strip.into(&mut accs[..count]));
        });
        for (i, accs) in accs.chunks_mut(parts * width).enumerate() {
            let strip = strip(i, 0);
            let (first, others) = accs.split_at_mut(width);
            for other in others.chunks(width) {
                first.iter_mut().zip(other).for_each(|(a, &b)| *a = fold.merge(*a, b));
            }
            emit(strip.output, stride, &first[..strip.count]);
        }
    }
}

/// The most columns of a gathered block.
fn gathered_width(column_stride: usize) -> usize {
    if column_stride == 1 { WIDENED_WIDTH } else { GATHER_WIDTH }
}

/// A range of the reduced elements of the output whose elements begin at `input`.
struct Row<'a, L: Lane, F> {
    plan: &'a Plan,
    source: Source<'a, L>,
    fold: F,
    input: usize,
    elements: Range<usize>,
}

impl<L: Lane, F: Fold<L>> Row<'_, L, F> {
    /// `room` takes the tiles of a source that makes its elements.
    #[inline(always)]
    fn folded<S: Simd>(&self, s: S, room: &mut [L]) -> F::Acc {
        let fold = self.fold;
        let reduced = &self.plan.reduced;
        let stride = reduced.inner_strides()[0];
        let Range { start, end } = self.elements.clone();
        let mut acc = fold.empty();
        let mut at = start;
        // Runs that are long enough to be tiles of their own.
        let is_long = stride == 1 && (reduced.run_len() >= GATHER / 4 || reduced.runs() == 1);
        match self.source.place {
            Place::Memory(lanes) if is_long => acc = self.in_memory(s, lanes),
            Place::Halves(halves) if is_long => acc = self.in_memory(s, halves),
            Place::Made if is_long => {
                for ([offset], len) in reduced.stretches_of(start..end) {
                    for from in (0..len).step_by(SUM_TILE) {
                        let tile = &mut room[..SUM_TILE.min(len - from)];
                        (self.source.gather)(self.input + offset + from, 1, tile);
                        acc = fold.merge(acc, s.call(FoldRow { fold, tile, start: at }));
                        at += tile.len();
                    }
                }
            }
            _ => {
                let mut tile = [L::default(); GATHER];
                while at < end {
                    let count = GATHER.min(end - at);
                    let mut filled = 0;
                    for ([offset], len) in reduced.stretches_of(at..at + count) {
                        (self.source.gather)(self.input + offset, stride, &mut tile[filled..filled + len]);
                        filled += len;
                    }
                    acc = fold.merge(acc, s.call(FoldRow { fold, tile: &tile[..count], start: at }));
                    at += count;
                }
            }
        }
        acc
    }

    /// The same where long runs of elements lie side by side.
    #[inline(always)]
    fn in_memory<S: Simd, E: Numeric<Lane = L>>(&self, s: S, elements: &[E]) -> F::Acc {
        let (mut acc, mut at) = (self.fold.empty(), self.elements.start);
        for ([offset], len) in self.plan.reduced.stretches_of(self.elements.clone()) {
            for tile in elements[self.input + offset..][..len].chunks(SUM_TILE) {
                acc = self.fold.merge(acc, s.call(FoldRow { fold: self.fold, tile, start: at }));
                at += tile.len();
            }
        }
        acc
    }
}

/// A tile of one output's elements.
struct FoldRow<'a, F, E> {
    fold: F,
    tile: &'a [E],
    start: usize,
}

impl<E: Numeric, F: Fold<E::Lane>> WithSimd for FoldRow<'_, F, E> {
    type Output = F::Acc;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> F::Acc {
        self.fold.row(s, self.tile, self.start)
    }
}

/// The same range of the reduced elements of each of a range of outputs.
struct Rows<'a, L, F: Fold<L>>
where
    L: Lane,
{
    plan: &'a Plan,
    source: Source<'a, L>,
    fold: F,
    outputs: Range<usize>,
    elements: Range<usize>,
    emit: Emit<'a, F::Acc>,
}

impl<L: Lane, F: Fold<L>> WithSimd for Rows<'_, L, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { plan, source, fold, outputs, elements, emit } = self;
        let [step, out_step] = plan.kept.inner_strides();
        let n = elements.len();
        let all = plan.outputs * plan.reduced.numel();
        let room_len = match source.place {
            Place::Memory(_) => 0,
            // Rows of less than a vector are widened at once.
            Place::Halves(_) if n >= MAX_LANES => 0,
            _ => SUM_TILE.min(outputs.len() * n),
        };
        // From a cache line's begin on: a vector that crosses lines costs twice.
        let mut room = vec![L::default(); if room_len > 0 { room_len + LINE } else { 0 }];
        let line = room.as_ptr().align_offset(LINE).min(room.len().min(LINE));
        let room = &mut room[line..];
        // Short rows that lie in one piece, as most do, are taken without a walk for each.
        let tile = if room_len > 0 { GATHER } else { SUM_TILE };
        let is_short = plan.reduced.runs() == 1 && plan.reduced.inner_strides() == [1] && n <= tile;
        let most = if is_short && room_len > 0 { EMITTED.min(room_len / n) } else { EMITTED };
        for ([input, output], len) in plan.kept.stretches_of(outputs) {
            for first in (0..len).step_by(most) {
                let count = most.min(len - first);
                let mut accs = [fold.empty(); EMITTED];
                let accs = &mut accs[..count];
                let input = input + first * step;
                if is_short {
                    let (at, start) = (input + elements.start, elements.start);
                    match source.place {
                        Place::Memory(lanes) => {
                            s.call(ShortRows { fold, rows: &lanes[at..], n, step, start, accs, ahead: Ahead::of::<L>(all) })
                        }
                        Place::Halves(halves) if room_len == 0 => {
                            s.call(ShortRows { fold, rows: &halves[at..], n, step, start, accs, ahead: Ahead::of::<L::Half>(all) })
                        }
                        _ => {
                            let rows = source.short_rows(at, n, step, count, room);
                            s.call(ShortRows { fold, rows, n, step: n, start, accs, ahead: Ahead::of::<L>(rows.len()) })
                        }
                    }
                } else {
                    for (i, acc) in accs.iter_mut().enumerate() {
                        *acc = Row { plan, source, fold, input: input + i * step, elements: elements.clone() }.folded(s, room);
                    }
                }
                emit(output + first * out_step, out_step, accs);
            }
        }
    }
}

impl<L: Lane> Source<'_, L> {
    /// `count` rows of `n` elements, a `step` apart from `at` on, one behind the other in `room`.
    #[inline(always)]
    fn short_rows<'r>(&self, at: usize, n: usize, step: usize, count: usize, room: &'r mut [L]) -> &'r [L] {
        let room = &mut room[..count * n];
        if step == n {
            (self.gather)(at, 1, room);
        } else {
            room.chunks_exact_mut(n).enumerate().for_each(|(i, row)| (self.gather)(at + i * step, 1, row));
        }
        room
    }
}

/// Rows of `n` elements, `step` apart, each of which begins with element number `start`, and a place for each one's result.
struct ShortRows<'a, E: Numeric, F: Fold<E::Lane>> {
    fold: F,
    rows: &'a [E],
    n: usize,
    step: usize,
    start: usize,
    accs: &'a mut [F::Acc],
    ahead: Ahead,
}

impl<E: Numeric, F: Fold<E::Lane>> WithSimd for ShortRows<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { fold, rows, n, step, start, accs, ahead } = self;
        if step == n && fold.few(s, &rows[..accs.len() * n], n, accs) {
            return;
        }
        if !F::TURNS_SHORT_ROWS || n > FEW_ELEMENTS || step != n || accs.len() < MANY_ROWS {
            for (i, acc) in accs.iter_mut().enumerate() {
                let row = &rows[i * step..][..n];
                ahead.ask(s, row);
                *acc = fold.row(s, row, start);
            }
            return;
        }
        let count = accs.len();
        let mut turned = [[E::Lane::default(); EMITTED]; FEW_ELEMENTS];
        let mut columns: [&[E::Lane]; FEW_ELEMENTS] = [&[]; FEW_ELEMENTS];
        for ((i, column), slot) in turned[..n].iter_mut().enumerate().zip(&mut columns) {
            for (x, row) in column[..count].iter_mut().zip(rows.chunks_exact(n)) {
                *x = row[i].to_lane();
            }
            *slot = &column[..count];
        }
        s.call(FoldColumns { fold, rows: &columns[..n], start, accs });
    }
}

/// A block of rows, and a place for each column's result.
struct FoldColumns<'a, E: Numeric, F: Fold<E::Lane>> {
    fold: F,
    rows: &'a [&'a [E]],
    start: usize,
    accs: &'a mut [F::Acc],
}

impl<E: Numeric, F: Fold<E::Lane>> WithSimd for FoldColumns<'_, E, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        self.fold.columns(s, self.rows, self.start, self.accs);
    }
}

/// Reduced elements `start..end` of `count` neighbouring columns.
struct Strip<'a, L: Lane, F> {
    plan: &'a Plan,
    source: Source<'a, L>,
    fold: F,
    input: usize,
    output: usize,
    count: usize,
    start: usize,
    end: usize,
}

impl<'a, L: Lane, F: Fold<L>> Strip<'a, L, F> {
    fn into(self, accs: &'a mut [F::Acc]) -> StripInto<'a, L, F> {
        StripInto { strip: self, accs }
    }
}

/// A strip and where its results are merged into.
struct StripInto<'a, L: Lane, F: Fold<L>> {
    strip: Strip<'a, L, F>,
    accs: &'a mut [F::Acc],
}

impl<L: Lane, F: Fold<L>> WithSimd for StripInto<'_, L, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        match (self.strip.source.place, self.strip.plan.kept.inner_strides()[0]) {
            (Place::Memory(lanes), 1) => self.in_memory(s, lanes),
            (Place::Halves(halves), 1) => self.in_memory(s, halves),
            _ => self.gathered(s),
        }
    }
}

impl<L: Lane, F: Fold<L>> StripInto<'_, L, F> {
    /// Rows that are read where they lie.
    #[inline(always)]
    fn in_memory<S: Simd, E: Numeric<Lane = L>>(self, s: S, elements: &[E]) {
        let Strip { plan, fold, input, count, start, end, .. } = self.strip;
        let row_stride = plan.reduced.inner_strides()[0];
        for at in (start..end).step_by(MAX_ROWS) {
            let number = MAX_ROWS.min(end - at);
            let mut rows: [&[E]; MAX_ROWS] = [&[]; MAX_ROWS];
            let mut n = 0;
            for ([offset], len) in plan.reduced.stretches_of(at..at + number) {
                for i in 0..len {
                    rows[n] = &elements[input + offset + i * row_stride..][..count];
                    n += 1;
                }
            }
            s.call(FoldColumns { fold, rows: &rows[..number], start: at, accs: self.accs });
        }
    }

    /// Rows that are gathered, by narrower strips, so that their tiles stay in L2.
    #[inline(always)]
    fn gathered<S: Simd>(self, s: S) {
        let Strip { plan, source, fold, input, count, start, end, .. } = self.strip;
        let row_stride = plan.reduced.inner_strides()[0];
        let column_stride = plan.kept.inner_strides()[0];
        let width = count.min(gathered_width(column_stride));
        let most = if source.is_narrow() { F::WIDENED_ROWS } else { MAX_ROWS };
        let mut gathered = vec![L::default(); most.min(end - start) * width];
        for (strip, accs) in self.accs.chunks_mut(width).enumerate() {
            let (input, count) = (input + strip * width * column_stride, accs.len());
            for at in (start..end).step_by(most) {
                let number = most.min(end - at);
                let mut rows: [&[L]; MAX_ROWS] = [&[]; MAX_ROWS];
                let mut n = 0;
                for ([offset], len) in plan.reduced.stretches_of(at..at + number) {
                    for i in 0..len {
                        let row = &mut gathered[n * count..(n + 1) * count];
                        (source.gather)(input + offset + i * row_stride, column_stride, row);
                        n += 1;
                    }
                }
                for (row, lanes) in rows.iter_mut().zip(gathered.chunks(count)) {
                    *row = lanes;
                }
                s.call(FoldColumns { fold, rows: &rows[..number], start: at, accs });
            }
        }
    }
}
