//! Runs the rows of the pointwise table over strided memory.
//!
//! The output is dense, and everything goes in the order of its memory. An operand that lies like the output is read where it is, and so are a
//! number that repeats and long rows ([`rows`]); any other (strided, of f16) is brought into a tile on the stack that the first-level cache holds,
//! so that a function needs kernels over contiguous elements and no others: one for each type of arithmetic, and one that loads and stores bf16.
//! A short bias along the fastest dimension fills its tile once per task, not per tile.

pub mod chain;
mod gate;
mod rows;
mod stretch;

pub(crate) use stretch::apply_stretch;

use super::cast::{Convert, Stored};
use super::isa::{WithSimd, dispatch};
use super::parallel::{self, SharedMut};
use super::simd::Simd;
use crate::element::{Bool, Element};
use crate::iter::{Stretches, Walk};
use crate::pointwise::input::{Input, REPEATS, blocks};
use crate::pointwise::relation::RelationRow;
use crate::pointwise::{Compute, Params, Row};
use crate::view::StridedView;
use half::bf16;
use std::any::TypeId;
use std::mem::MaybeUninit;

/// Elements of a tile: four of f32 and two of f16 are 20 KiB, inside any first-level cache.
const TILE: usize = 1024;

/// A task's share of the work in nanoseconds: long against the microsecond that handing it over takes.
const TASK_NS: f32 = 12_000.0;

/// An operand of a pointwise function.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a, T> {
    /// Elements in memory, of the output's shape (broadcast by strides of 0).
    View(StridedView<'a, T>),
    /// As many elements as the output has, in the order of its memory.
    Dense(&'a [T]),
    /// One number for all elements.
    Scalar(f64),
    /// What the output holds at the start: the function works in place.
    Output,
    /// Nothing: the function does not read it.
    Unused,
}

/// Where results go: dense memory, and the strides that the output's dimensions have in it.
#[derive(Debug)]
pub struct Output<'a, T> {
    /// As many elements as the shape has.
    pub data: &'a mut [T],
    /// Extents.
    pub shape: &'a [usize],
    /// A permutation of a row-major layout without gaps.
    pub strides: &'a [usize],
}

/// `out = row(operands…)`, element by element; f16 and bf16 are computed in f32 and rounded once.
///
/// # Panics
/// If the row is not defined for `T` (see [`Row::tile`]), if a view has another shape than the output or a dense operand another number of
/// elements, or if the output's slice is not as long as its shape says.
pub fn apply<T: Stored, const N: usize>(row: &Row<N>, params: Params, operands: [Operand<'_, T>; N], out: Output<'_, T>) {
    let tile = row.tile::<T::Compute>();
    assert!(tile.is_some(), "{} is not defined for this type", row.name);
    let Some(tile) = tile else { return };
    let has_number = operands.iter().any(|o| matches!(o, Operand::Scalar(_)));
    let plan = Plan::new(&out, row.ns * cost_factor::<T>(), operands.map(|o| Source::new(o, &out)));
    // A number is not rounded to bf16: it would be, read as an operand is stored.
    let is_stored_bf16 = TypeId::of::<T>() == TypeId::of::<bf16>() && !has_number;
    let run = |inputs: [Input<T>; N], out: *mut T, size: [usize; 2]| {
        // SAFETY: the plan vouches for the pointers; `T` is bf16, or the type of the arithmetic.
        unsafe {
            if T::CONVERTS {
                (row.bf16)(inputs.map(Input::cast), out.cast(), size, params)
            } else {
                tile(inputs.map(Input::cast), out.cast(), size, params)
            }
        }
    };
    if let (Some(len), true) = (plan.row_len(), is_stored_bf16 || !T::CONVERTS) {
        return plan.run_rows(len, [SharedMut::new(out.data)], &|inputs, [out], size| run(inputs, out, size));
    }
    if is_stored_bf16 {
        return plan.run_stored([out.data], 0, &|inputs, [out], len| run(inputs, out, [1, len]));
    }
    plan.run([out.data], &|inputs, [out]: [*mut T; 1], len| {
        if T::CONVERTS {
            let mut results = Tile::<T::Compute>::new();
            let results = results.as_mut_ptr();
            // SAFETY: a converting plan gives at most TILE elements at a time, which `results` has room for; the plan vouches
            // for the inputs and the output.
            unsafe {
                tile(inputs, results, [1, len], params);
                T::narrow(results, out, len);
            }
        } else {
            // SAFETY: the plan vouches for the pointers; `T` and `T::Compute` are one type.
            unsafe { tile(inputs, out.cast::<T::Compute>(), [1, len], params) }
        }
    });
}

/// `out = a R b`, element by element.
///
/// # Panics
/// As [`apply`] does, and if an operand is [`Operand::Output`].
pub fn relate<T: Stored>(row: &RelationRow, operands: [Operand<'_, T>; 2], out: Output<'_, Bool>) {
    let tile = T::Compute::relation(row);
    let plan = Plan::new(&out, 0.25 * cost_factor::<T>(), operands.map(|o| Source::new(o, &out)));
    plan.run([out.data], &|inputs, [out]: [*mut Bool; 1], len| {
        // SAFETY: the plan vouches for the pointers, and no operand is the output.
        unsafe { tile(inputs, out, len) }
    });
}

/// `out = x` converted to another type.
///
/// # Panics
/// As [`apply`] does.
pub fn cast<A: Stored, B: Stored>(x: StridedView<'_, A>, out: Output<'_, B>)
where
    A::Compute: Convert<B::Compute>,
{
    let plan = Plan::new(&out, 0.3 * cost_factor::<A>(), [Source::<A>::new(Operand::View(x), &out)]).tiled();
    plan.run([out.data], &|[x], [out]: [*mut B; 1], len| {
        if TypeId::of::<A::Compute>() == TypeId::of::<B::Compute>() {
            // SAFETY: both are one type; the plan vouches for the input and the output.
            return unsafe { blocks([x.cast()], len, |from, [x], count| B::narrow(x, out.add(from), count)) };
        }
        let mut converted = Tile::<B::Compute>::new();
        let converted = converted.as_mut_ptr();
        // SAFETY: a tiled plan gives at most TILE elements at a time, which `converted` has room for; the plan vouches for the
        // input and the output.
        unsafe {
            blocks([x], len, |from, [x], count| {
                let converted = converted.add(from);
                for i in 0..count {
                    converted.add(i).write((*x.add(i)).convert());
                }
            });
            B::narrow(converted, out, len);
        }
    });
}

/// `out = condition ? a : b`, element by element.
///
/// # Panics
/// As [`apply`] does.
pub fn select<T: Stored>(condition: StridedView<'_, Bool>, a: Operand<'_, T>, b: Operand<'_, T>, out: Output<'_, T>) {
    let condition = Source::<Bool>::new(Operand::View(condition), &out);
    let mut plan = Plan::new(&out, 0.3 * cost_factor::<T>(), [Source::new(a, &out), Source::new(b, &out)]).with_tile(condition.period());
    if !condition.is_in_place() {
        plan = plan.tiled();
    }
    let shared = SharedMut::new(out.data);
    plan.tasks(plan.tile, &|from, to| {
        let mut condition_room = Room::new();
        let mut conditions = Reader::new(&condition, from, plan.tile, &mut condition_room);
        let mut rooms = Room::array();
        let mut sources = plan.readers(from, &mut rooms);
        plan.tiles(from, to, |at, len| {
            // SAFETY: `at + len` is at most the number of elements, tasks do not overlap, and readers give `len` elements.
            unsafe {
                let out = shared.get().add(at);
                let condition = conditions.raw(at, len, std::ptr::null());
                let [a, b] = sources.each_mut().map(|s| s.raw(at, len, out));
                dispatch(Choose { condition, a, b, out, len });
            }
        });
    });
}

/// `len` elements of [`select`].
struct Choose<T> {
    condition: Input<Bool>,
    a: Input<T>,
    b: Input<T>,
    out: *mut T,
    len: usize,
}

impl<T: Stored> WithSimd for Choose<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const BLOCK: usize = 32;
        const { assert!(BLOCK <= REPEATS) }
        let Self { condition, a, b, out, len } = self;
        let whole = len / BLOCK * BLOCK;
        // SAFETY: `select` gives as many elements of each. Both are read, before any is written, so that there is nothing to branch on.
        unsafe {
            for i in (0..whole).step_by(BLOCK) {
                let conditions = condition.at(i).cast::<[Bool; BLOCK]>().read();
                let (a, b) = (a.at(i).cast::<[T; BLOCK]>().read(), b.at(i).cast::<[T; BLOCK]>().read());
                let mut chosen = a;
                for k in 0..BLOCK {
                    chosen[k] = if conditions[k].get() { a[k] } else { b[k] };
                }
                out.add(i).cast::<[T; BLOCK]>().write(chosen);
            }
            for i in whole..len {
                let (a, b) = (a.at(i).read(), b.at(i).read());
                out.add(i).write(if (*condition.at(i)).get() { a } else { b });
            }
        }
    }
}

/// How much longer an element of `T` takes than one of f32 by SIMD.
fn cost_factor<T: Stored>() -> f32 {
    match (T::CONVERTS, size_of::<T>()) {
        (true, _) => 1.5,
        (_, 8) => 4.0,
        _ => 1.0,
    }
}

/// How an operand's elements are found in walk order.
enum Source<'a, T> {
    /// Nobody reads them.
    Unused,
    /// They are the output's.
    Output,
    /// They lie in this order.
    Direct(&'a [T]),
    /// One for all.
    Constant(T),
    /// One for all, not rounded yet.
    Scalar(f64),
    /// Anywhere.
    Strided(&'a [T], Box<Walk<2>>),
}

impl<'a, T: Stored> Source<'a, T> {
    fn new<U>(operand: Operand<'a, T>, out: &Output<'_, U>) -> Self {
        match operand {
            Operand::Scalar(x) => Source::Scalar(x),
            Operand::Output => Source::Output,
            Operand::Unused => Source::Unused,
            Operand::View(view) => Self::of_view(view, out),
            Operand::Dense(data) => {
                assert_eq!(data.len(), out.data.len(), "a dense operand must have as many elements as the output");
                Source::Direct(data)
            }
        }
    }

    fn of_view<U>(view: StridedView<'a, T>, out: &Output<'_, U>) -> Self {
        assert_eq!(view.shape(), out.shape, "a view must have the output's shape");
        if view.strides() == out.strides && !out.data.is_empty() {
            // The output is dense, so this is one stretch: small operations should not pay for a walk.
            return Source::Direct(&view.data()[view.offset()..][..out.data.len()]);
        }
        let walk = Walk::in_memory_order(out.shape, [out.strides, view.strides()], [0, view.offset()]);
        let data = view.data();
        let (runs, len, [_, stride]) = (walk.runs(), walk.run_len(), walk.inner_strides());
        if walk.numel() == 0 {
            return Source::Direct(&[]);
        }
        match stride {
            0 if walk.repeats(1) => Source::Constant(data[view.offset()]),
            1 if runs == 1 => Source::Direct(&data[view.offset()..][..len]),
            _ => Source::Strided(data, Box::new(walk)),
        }
    }

    /// The number of elements after which it repeats, if a tile holds as many.
    fn period(&self) -> Option<usize> {
        match self {
            Source::Strided(_, walk) if walk.repeats(1) && walk.run_len() <= TILE => Some(walk.run_len()),
            _ => None,
        }
    }

    /// The length of its runs, if they are about as long as a tile.
    fn long_run(&self) -> Option<usize> {
        match self {
            Source::Strided(_, walk) if walk.inner_strides()[1] <= 1 && (TILE / 2..=4 * TILE).contains(&walk.run_len()) => {
                Some(walk.run_len())
            }
            _ => None,
        }
    }

    /// Whether all tiles of `tile` elements, one after the other, are the same elements.
    fn fills_once(&self, tile: usize) -> bool {
        self.period().is_some_and(|period| tile.is_multiple_of(period))
    }

    /// Whether it is the same for all elements.
    fn is_number(&self) -> bool {
        matches!(self, Source::Constant(_) | Source::Scalar(_))
    }

    /// What is the same for all elements, as it is stored.
    fn number(&self) -> Option<T> {
        match self {
            Source::Constant(x) => Some(*x),
            Source::Scalar(x) => Some(T::from_f64(*x)),
            _ => None,
        }
    }

    /// Whether any stretch can be read in place, without a tile, as it is stored.
    fn lies_in_order(&self) -> bool {
        !matches!(self, Source::Strided(..))
    }

    /// Whether any stretch can be read in place in the type of the arithmetic.
    fn is_in_place(&self) -> bool {
        matches!(self, Source::Unused) || (!T::CONVERTS && self.lies_in_order())
    }
}

/// What is done with as many elements of each input and output.
type RunTile<'f, I, O, const N: usize, const M: usize> = &'f (dyn Fn([Input<I>; N], [*mut O; M], usize) + Sync);

/// The work cut into tasks and those into tiles: by shape and type only.
struct Plan<'a, T, const N: usize> {
    sources: [Source<'a, T>; N],
    numel: usize,
    ns: f32,
    /// Elements of a tile; `usize::MAX` if a task may be one.
    tile: usize,
    /// No tile crosses a multiple of this: an operand whose runs are about as long as a tile, a row for each line of a matrix, is read in
    /// place then.
    run: usize,
}

impl<'a, T: Stored, const N: usize> Plan<'a, T, N> {
    fn new<U>(out: &Output<'_, U>, ns: f32, sources: [Source<'a, T>; N]) -> Self {
        let numel = out.shape.iter().product();
        assert_eq!(out.data.len(), numel, "the output must have room for its shape, exactly");
        let mut plan = Plan { tile: usize::MAX, run: usize::MAX, numel, ns, sources };
        if !plan.sources.iter().all(Source::is_in_place) {
            plan.tile = TILE;
            match plan.sources.iter().find_map(Source::period) {
                Some(period) => plan.tile = TILE / period * period,
                None => plan.run = plan.sources.iter().find_map(Source::long_run).unwrap_or(usize::MAX),
            }
        }
        plan
    }

    /// For operands that are read as they are stored: without tiles, if they all lie in order.
    fn stored(mut self) -> Self {
        if self.sources.iter().all(Source::lies_in_order) {
            (self.tile, self.run) = (usize::MAX, usize::MAX);
        }
        self
    }

    /// At most [`TILE`] elements at a time.
    fn tiled(mut self) -> Self {
        self.tile = self.tile.min(TILE);
        self
    }

    /// The same with a tile that whole periods fill, so that every tile begins where a period does.
    fn with_tile(mut self, period: Option<usize>) -> Self {
        if let Some(period) = period {
            (self.tile, self.run) = (TILE / period * period, usize::MAX);
        }
        self
    }

    /// Calls `f(from, to)` for each task's elements: whole units of so many, unless those are longer than a tile.
    fn tasks(&self, unit: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        let estimated_ns = (self.numel as f32 * self.ns) as usize;
        if estimated_ns < parallel::MIN_PARALLEL_NS {
            return f(0, self.numel);
        }
        let unit = unit.min(TILE);
        let task = ((TASK_NS / self.ns) as usize).div_ceil(unit) * unit;
        parallel::for_each(self.numel.div_ceil(task), estimated_ns, |i| f(i * task, ((i + 1) * task).min(self.numel)));
    }

    /// Calls `f(at, len)` for each tile of the elements `from..to`.
    #[inline(always)]
    fn tiles(&self, from: usize, to: usize, mut f: impl FnMut(usize, usize)) {
        let (mut at, mut left) = (from, self.run - from % self.run);
        while at < to {
            let len = self.tile.min(to - at).min(left);
            f(at, len);
            at += len;
            left = if left == len { self.run } else { left - len };
        }
    }

    fn readers<'p>(&'p self, from: usize, rooms: &'p mut [Room<T>; N]) -> [Reader<'p, 'a, T>; N] {
        let mut k = 0;
        rooms.each_mut().map(|room| {
            k += 1;
            Reader::new(&self.sources[k - 1], from, self.tile, room)
        })
    }

    /// Calls `f(inputs, outs, len)` for every tile: `inputs` have `len` elements each, in the type of the arithmetic. The first of `outs` is the
    /// one that an operand may be.
    fn run<U: Element, const M: usize>(&self, outs: [&mut [U]; M], f: RunTile<T::Compute, U, N, M>) {
        assert!(M > 0 && outs.iter().all(|out| out.len() == self.numel), "every output has room for the shape, exactly");
        let shared = outs.map(SharedMut::new);
        if self.tile == usize::MAX {
            // What is read in place is of the type of the arithmetic, and one row.
            return self.run_rows(self.numel, shared, &|inputs, outs, [_, len]| f(inputs.map(Input::cast), outs, len));
        }
        self.tasks(self.tile, &|from, to| {
            let mut rooms = Room::array();
            let mut readers = self.readers(from, &mut rooms);
            self.tiles(from, to, |at, len| {
                // SAFETY: `at + len` is at most the number of elements, which is that of each output.
                let outs = shared.map(|out| unsafe { out.get().add(at) });
                let mut inputs = [Input::of(std::ptr::null()); N];
                for (input, reader) in inputs.iter_mut().zip(&mut readers) {
                    // SAFETY: tiles are read in order from `from` on, at most TILE elements unless all sources are in place.
                    *input = unsafe { reader.computed(at, len, outs[0].cast()) };
                }
                f(inputs, outs, len);
            });
        });
    }

    /// [`run`](Self::run) with inputs as they are stored. Output number `own` is the one that an operand may be.
    fn run_stored<const M: usize>(&self, outs: [&mut [T]; M], own: usize, f: RunTile<T, T, N, M>) {
        assert!(outs.iter().all(|out| out.len() == self.numel), "every output has room for the shape, exactly");
        let shared = outs.map(SharedMut::new);
        self.tasks(self.tile, &|from, to| {
            let mut rooms = Room::array();
            let mut readers = self.readers(from, &mut rooms);
            self.tiles(from, to, |at, len| {
                // SAFETY: `at + len` is at most the number of elements, which all outputs have; tasks do not overlap.
                let outs = shared.map(|out| unsafe { out.get().add(at) });
                let mut inputs = [Input::of(std::ptr::null()); N];
                for (input, reader) in inputs.iter_mut().zip(&mut readers) {
                    // SAFETY: tiles are read in order from `from` on, at most TILE elements unless all sources lie in order.
                    *input = unsafe { reader.raw(at, len, outs[own]) };
                }
                f(inputs, outs, len);
            });
        });
    }
}

/// A tile's room, of whole cache lines: a vector that crosses them costs twice.
#[repr(C, align(64))]
struct Tile<T, const LEN: usize = TILE>(MaybeUninit<[T; LEN]>);

impl<T, const LEN: usize> Tile<T, LEN> {
    #[inline(always)]
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    #[inline(always)]
    fn as_mut_ptr(&mut self) -> *mut T {
        self.0.as_mut_ptr().cast()
    }
}

/// Where a source that is not read in place brings its tiles. Apart from the [`Reader`], which moves: this is never copied.
struct Room<T: Stored> {
    tile: Tile<T>,
    converted: Tile<T::Compute>,
}

impl<T: Stored> Room<T> {
    #[inline(always)]
    const fn new() -> Self {
        Self { tile: Tile::new(), converted: Tile::new() }
    }

    #[inline(always)]
    const fn array<const N: usize>() -> [Self; N] {
        [const { Self::new() }; N]
    }
}

/// A source while a task reads it, front to back.
struct Reader<'s, 'a, T: Stored> {
    source: &'s Source<'a, T>,
    stretches: Option<Stretches<'s, 2>>,
    /// Whether one tile serves for all that are no longer.
    fills_once: bool,
    /// How many elements that tile has, or the room of a number, once there is one. Tiles that end with a run may be shorter at first than later.
    filled: usize,
    room: &'s mut Room<T>,
}

impl<'s, 'a, T: Stored> Reader<'s, 'a, T> {
    #[inline(always)]
    fn new(source: &'s Source<'a, T>, from: usize, tile: usize, room: &'s mut Room<T>) -> Self {
        let stretches = match source {
            Source::Strided(_, walk) => Some(walk.stretches(from)),
            _ => None,
        };
        let fills_once = source.fills_once(tile);
        Self { source, stretches, fills_once, filled: 0, room }
    }

    /// The `len` elements from `at` on, in the type of the arithmetic.
    ///
    /// # Safety
    /// Calls follow each other without gaps; `at + len` is at most the number of elements; `len` is at most TILE unless the source is read in
    /// place; `out` is the output's element `at`, of type `T`, if the source is the output.
    #[inline(always)]
    unsafe fn computed(&mut self, at: usize, len: usize, out: *const T) -> Input<T::Compute> {
        if !T::CONVERTS || matches!(self.source, Source::Unused) {
            // SAFETY: the caller's.
            return unsafe { self.raw(at, len, out) }.cast();
        }
        let to = self.room.converted.as_mut_ptr();
        if self.filled >= len {
            return self.once(to);
        }
        if let Source::Scalar(x) = self.source {
            self.filled = usize::MAX;
            // SAFETY: `converted` has room for a number. It is rounded once, to the type of the arithmetic.
            return unsafe { repeated(to, T::Compute::from_f64(*x)) };
        }
        // SAFETY: the caller's.
        let raw = unsafe { self.raw(at, len, out) };
        // SAFETY: `raw` has `len` elements, or as many equal ones as stand for a number, and `converted` room for a tile.
        unsafe {
            if raw.repeats() {
                T::widen(raw.at(0), to, REPEATS);
                return Input::repeated(to);
            }
            T::widen(raw.at(0), to, len);
        }
        Input::of(to)
    }

    /// What is brought once for all tiles.
    #[inline(always)]
    fn once<U>(&self, room: *const U) -> Input<U> {
        if self.source.is_number() { Input::repeated(room) } else { Input::of(room) }
    }

    /// The `len` elements from `at` on, as they are stored.
    ///
    /// # Safety
    /// As [`computed`](Self::computed).
    #[inline(always)]
    unsafe fn raw(&mut self, at: usize, len: usize, out: *const T) -> Input<T> {
        match self.source {
            Source::Unused => Input::of(std::ptr::null()),
            Source::Output => Input::of(out),
            // SAFETY: the slice has all elements of the walk.
            Source::Direct(data) => Input::of(unsafe { data.as_ptr().add(at) }),
            _ => self.brought(len),
        }
    }

    /// The next `len` elements of a source that does not lie in order: usually brought into the tile.
    #[inline(always)]
    fn brought(&mut self, len: usize) -> Input<T> {
        let tile = self.room.tile.as_mut_ptr();
        if self.filled >= len {
            return self.once(tile);
        }
        if let Some(x) = self.source.number() {
            self.filled = usize::MAX;
            // SAFETY: the tile has room for a number.
            return unsafe { repeated(tile, x) };
        }
        let (Source::Strided(data, walk), Some(stretches)) = (self.source, &mut self.stretches) else { return Input::of(tile) };
        // A plan whose tiles are too long for a source would write beyond this one: better a panic.
        assert!(len <= TILE, "a tile of {len} elements");
        if self.fills_once {
            self.filled = len;
        }
        let [_, stride] = walk.inner_strides();
        let mut done = 0;
        while done < len {
            let ([_, from], n) = stretches.next(len - done);
            // SAFETY: the view that the walk was made of proved that its offsets lie inside of `data`; `done + n <= len <= TILE`, and a
            // tile has room for a number.
            unsafe {
                let from = data.as_ptr().add(from);
                match stride {
                    1 if n == len && !self.fills_once => return Input::of(from),
                    0 if n == len => return repeated(tile, *from),
                    _ => gather(from, stride, tile.add(done), n),
                }
            }
            done += n;
        }
        Input::of(tile)
    }
}

/// A number that repeats.
///
/// # Safety
/// `room` must be writable for [`REPEATS`] elements.
#[inline(always)]
unsafe fn repeated<T: Copy>(room: *mut T, x: T) -> Input<T> {
    // SAFETY: the caller's.
    unsafe { fill(room, x, REPEATS) };
    Input::repeated(room)
}

/// Writes `x` `len` times from `to` on.
///
/// # Safety
/// `to` must be writable for `len` elements.
#[inline(always)]
unsafe fn fill<T: Copy>(to: *mut T, x: T, len: usize) {
    dispatch(Fill(to, x, len));
}

/// A plain loop that the compiler turns into vectors of the level's width.
struct Fill<T>(*mut T, T, usize);

impl<T: Copy> WithSimd for Fill<T> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for i in 0..self.2 {
            // SAFETY: `i < len`; whoever made the struct vouches for the pointer.
            unsafe { self.0.add(i).write(self.1) }
        }
    }
}

/// Copies `len` elements that lie `stride` apart.
///
/// # Safety
/// All of them must be readable, and `to` writable for `len` elements apart from them.
#[inline(always)]
unsafe fn gather<T: Copy>(from: *const T, stride: usize, to: *mut T, len: usize) {
    // SAFETY: the caller's.
    unsafe {
        match stride {
            1 => std::ptr::copy_nonoverlapping(from, to, len),
            0 => fill(to, *from, len),
            _ => (0..len).for_each(|i| to.add(i).write(*from.add(i * stride))),
        }
    }
}

#[cfg(test)]
mod tests;
