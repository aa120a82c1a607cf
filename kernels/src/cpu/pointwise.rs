//! Runs the rows of the pointwise table over strided memory.
//!
//! The output is dense, and everything goes in the order of its memory. An operand that lies like the output is read where it is; any other
//! (broadcast, strided, of f16) is brought into a tile on the stack that the first-level cache holds, so that a row needs
//! kernels over contiguous elements and no others: one for each type of arithmetic, and one that loads and stores bf16. A bias along the fastest dimension fills its tile once per task, not per tile.

pub mod chain;
mod gate;
mod stretch;

pub(crate) use stretch::apply_stretch;

use super::cast::{Convert, Stored};
use super::isa::{WithSimd, dispatch};
use super::parallel::{self, SharedMut};
use super::simd::Simd;
use crate::element::{Bool, Element};
use crate::iter::{Stretches, Walk};
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
    if TypeId::of::<T>() == TypeId::of::<bf16>() && !has_number {
        // A number is not rounded to bf16: it would be, read as an operand is stored.
        return plan.stored().run_stored([out.data], 0, &|inputs, [out]: [*mut T; 1], len| {
            // SAFETY: `T` is bf16; the plan vouches for the pointers.
            unsafe { (row.bf16)(inputs.map(|x| x.cast()), out.cast(), len, params) }
        });
    }
    plan.run([out.data], &|inputs, [out]: [*mut T; 1], len| {
        if T::CONVERTS {
            let mut results = Tile::<T::Compute>::new();
            let results = results.as_mut_ptr();
            // SAFETY: a converting plan gives at most TILE elements at a time, which `results` has room for; the plan vouches
            // for the inputs and the output.
            unsafe {
                tile(inputs, results, len, params);
                T::narrow(results, out, len);
            }
        } else {
            // SAFETY: the plan vouches for the pointers; `T` and `T::Compute` are one type.
            unsafe { tile(inputs, out.cast::<T::Compute>(), len, params) }
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
            return unsafe { B::narrow(x.cast(), out, len) };
        }
        let mut converted = Tile::<B::Compute>::new();
        let converted = converted.as_mut_ptr();
        // SAFETY: a tiled plan gives at most TILE elements at a time, which `converted` has room for; the plan vouches for the
        // input and the output.
        unsafe {
            for i in 0..len {
                converted.add(i).write((*x.add(i)).convert());
            }
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
    plan.tasks(&|from, to| {
        let mut condition_room = Room::new();
        let mut conditions = Reader::new(&condition, from, plan.tile, &mut condition_room);
        let mut rooms = Room::array();
        let mut sources = plan.readers(from, &mut rooms);
        plan.tiles(from, to, |at, len| {
            // SAFETY: `at + len` is at most the number of elements, tasks do not overlap, and readers give `len` elements.
            unsafe {
                let out = shared.get().add(at);
                let c = conditions.raw(at, len, std::ptr::null());
                let [a, b] = sources.each_mut().map(|s| s.raw(at, len, out));
                for i in 0..len {
                    *out.add(i) = if (*c.add(i)).get() { *a.add(i) } else { *b.add(i) };
                }
            }
        });
    });
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

    /// The number of elements after which it repeats, if several periods fit a tile.
    fn period(&self) -> Option<usize> {
        match self {
            Source::Strided(_, walk) if walk.repeats(1) && walk.run_len() <= TILE / 2 => Some(walk.run_len()),
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

    /// Whether all tiles of `tile` elements, one after the other, are the same.
    fn fills_once(&self, tile: usize) -> bool {
        matches!(self, Source::Constant(_) | Source::Scalar(_)) || self.period().is_some_and(|period| tile.is_multiple_of(period))
    }

    /// Whether any stretch can be read in place, without a tile, as it is stored.
    fn lies_in_order(&self) -> bool {
        matches!(self, Source::Unused | Source::Direct(_) | Source::Output)
    }

    /// Whether any stretch can be read in place in the type of the arithmetic.
    fn is_in_place(&self) -> bool {
        matches!(self, Source::Unused) || (!T::CONVERTS && self.lies_in_order())
    }
}

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

    fn task(&self) -> usize {
        let share = (TASK_NS / self.ns) as usize;
        let tile = self.tile.min(TILE);
        share.div_ceil(tile) * tile
    }

    /// Calls `f(from, to)` for each task's elements.
    fn tasks(&self, f: &(dyn Fn(usize, usize) + Sync)) {
        let estimated_ns = (self.numel as f32 * self.ns) as usize;
        if estimated_ns < parallel::MIN_PARALLEL_NS {
            return f(0, self.numel);
        }
        let task = self.task();
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
    fn run<U: Element, const M: usize>(&self, outs: [&mut [U]; M], f: &(dyn Fn([*const T::Compute; N], [*mut U; M], usize) + Sync)) {
        assert!(M > 0 && outs.iter().all(|out| out.len() == self.numel), "every output has room for the shape, exactly");
        let shared = outs.map(SharedMut::new);
        if self.tile == usize::MAX {
            return self.run_in_place(shared, f);
        }
        self.tasks(&|from, to| {
            let mut rooms = Room::array();
            let mut readers = self.readers(from, &mut rooms);
            self.tiles(from, to, |at, len| {
                // SAFETY: `at + len` is at most the number of elements, which is that of each output.
                let outs = shared.map(|out| unsafe { out.get().add(at) });
                // SAFETY: tiles are read in order from `from` on, at most TILE elements unless all sources are in place.
                let inputs = readers.each_mut().map(|r| unsafe { r.computed(at, len, outs[0].cast()) });
                f(inputs, outs, len);
            });
        });
    }

    /// [`run`](Self::run) with inputs as they are stored. Output number `own` is the one that an operand may be.
    fn run_stored<const M: usize>(&self, outs: [&mut [T]; M], own: usize, f: &(dyn Fn([*const T; N], [*mut T; M], usize) + Sync)) {
        assert!(outs.iter().all(|out| out.len() == self.numel), "every output has room for the shape, exactly");
        let shared = outs.map(SharedMut::new);
        self.tasks(&|from, to| {
            let mut rooms = Room::array();
            let mut readers = self.readers(from, &mut rooms);
            self.tiles(from, to, |at, len| {
                // SAFETY: `at + len` is at most the number of elements, which all outputs have; tasks do not overlap.
                let outs = shared.map(|out| unsafe { out.get().add(at) });
                // SAFETY: tiles are read in order from `from` on, at most TILE elements unless all sources lie in order.
                let inputs = readers.each_mut().map(|r| unsafe { r.raw(at, len, outs[own]) });
                f(inputs, outs, len);
            });
        });
    }

    /// [`run`](Self::run) where all sources are read in place: a task is one tile, and needs neither rooms nor readers.
    #[inline(always)]
    fn run_in_place<U: Element, const M: usize>(
        &self,
        shared: [SharedMut<U>; M],
        f: &(dyn Fn([*const T::Compute; N], [*mut U; M], usize) + Sync),
    ) {
        self.tasks(&|from, to| {
            // SAFETY: `to` is at most the number of elements, which is the outputs' length.
            let outs = shared.map(|out| unsafe { out.get().add(from) });
            let inputs = self.sources.each_ref().map(|source| match source {
                // SAFETY: the slice has all elements; what is read in place is in the type of the arithmetic.
                Source::Direct(data) => unsafe { data.as_ptr().add(from).cast() },
                Source::Output => outs[0].cast_const().cast(),
                _ => std::ptr::null(),
            });
            f(inputs, outs, to - from);
        });
    }
}

/// A tile's room, of whole cache lines: a vector that crosses them costs twice.
#[repr(C, align(64))]
struct Tile<T>(MaybeUninit<[T; TILE]>);

impl<T> Tile<T> {
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
    /// How many elements that tile has, once there is one. Tiles that end with a run may be shorter at first than later.
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
    unsafe fn computed(&mut self, at: usize, len: usize, out: *const T) -> *const T::Compute {
        if matches!(self.source, Source::Unused) {
            return std::ptr::null();
        }
        let to = self.room.converted.as_mut_ptr();
        if T::CONVERTS && self.filled >= len {
            return to;
        }
        if let (true, Source::Scalar(x)) = (T::CONVERTS, self.source) {
            // Rounded once, to the type of the arithmetic.
            self.filled = len;
            // SAFETY: `converted` has room for `len <= TILE` elements.
            return unsafe { fill(to, T::Compute::from_f64(*x), len) };
        }
        // SAFETY: the caller's.
        let raw = unsafe { self.raw(at, len, out) };
        if !T::CONVERTS {
            return raw.cast();
        }
        // SAFETY: `raw` has `len` elements, and `converted` room for a tile.
        unsafe { T::widen(raw, to, len) }
        to
    }

    /// The `len` elements from `at` on, as they are stored.
    ///
    /// # Safety
    /// As [`computed`](Self::computed).
    #[inline(always)]
    unsafe fn raw(&mut self, at: usize, len: usize, out: *const T) -> *const T {
        match self.source {
            Source::Unused => std::ptr::null(),
            Source::Output => out,
            // SAFETY: the slice has all elements of the walk.
            Source::Direct(data) => unsafe { data.as_ptr().add(at) },
            _ => self.brought(len),
        }
    }

    /// The next `len` elements of a source that is not read in place: usually brought into the tile.
    #[inline(always)]
    fn brought(&mut self, len: usize) -> *const T {
        // A plan whose tiles are too long for a source would write beyond this one: better a panic.
        assert!(len <= TILE, "a tile of {len} elements");
        let tile = self.room.tile.as_mut_ptr();
        if self.filled >= len {
            return tile;
        }
        if self.fills_once {
            self.filled = len;
        }
        match self.source {
            // SAFETY: the tile has room for `len <= TILE` elements.
            Source::Constant(x) => unsafe { fill(tile, *x, len) },
            // SAFETY: as above.
            Source::Scalar(x) => unsafe { fill(tile, T::from_f64(*x), len) },
            Source::Strided(data, walk) => {
                let Some(stretches) = &mut self.stretches else { return tile };
                let mut done = 0;
                while done < len {
                    let ([_, from], n) = stretches.next(len - done);
                    // SAFETY: the view that the walk was made of proved that its offsets lie inside of `data`; `done + n <= len <= TILE`.
                    unsafe {
                        let from = data.as_ptr().add(from);
                        if n == len && walk.inner_strides()[1] == 1 && !self.fills_once {
                            return from;
                        }
                        gather(from, walk.inner_strides()[1], tile.add(done), n);
                    }
                    done += n;
                }
                tile
            }
            Source::Unused | Source::Output | Source::Direct(_) => tile,
        }
    }
}

/// Writes `x` `len` times from `to` on, which it returns.
///
/// # Safety
/// `to` must be writable for `len` elements.
#[inline(always)]
unsafe fn fill<T: Copy>(to: *mut T, x: T, len: usize) -> *const T {
    dispatch(Fill(to, x, len));
    to
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
            0 => {
                fill(to, *from, len);
            }
            _ => (0..len).for_each(|i| to.add(i).write(*from.add(i * stride))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pointwise::{backward, binary, relation, unary};

    fn contiguous(shape: &[usize]) -> Vec<usize> {
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        strides
    }

    fn at(strides: &[usize], index: &[usize]) -> usize {
        strides.iter().zip(index).map(|(s, i)| s * i).sum()
    }

    fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
        let of = contiguous(shape);
        (0..shape.iter().product()).map(|i| (0..shape.len()).map(|d| i / of[d].max(1) % shape[d]).collect()).collect()
    }

    /// a − b over layouts of a, b and the output.
    fn check<T: Stored>(shape: &[usize], a: &[usize], b: &[usize], out: &[usize]) {
        let extent = |s: &[usize]| shape.iter().zip(s).map(|(d, s)| d.saturating_sub(1) * s).sum::<usize>() + 3;
        let x: Vec<T> = (0..extent(a)).map(|i| T::from_f64((i % 37) as f64)).collect();
        let y: Vec<T> = (0..extent(b)).map(|i| T::from_f64((i % 29) as f64 * 0.5)).collect();
        let (x, y) = (StridedView::new(&x, 2, shape, a).unwrap(), StridedView::new(&y, 1, shape, b).unwrap());
        let mut result = vec![T::default(); shape.iter().product()];
        let output = Output { data: &mut result, shape, strides: out };
        apply(binary::Sub::ROW, [0.0; 2], [Operand::View(x), Operand::View(y)], output);
        for i in indices(shape) {
            let want = x.data()[2 + at(a, &i)].to_f64() - y.data()[1 + at(b, &i)].to_f64();
            assert_eq!(result[at(out, &i)], T::from_f64(want), "{shape:?} {a:?} {b:?} {out:?} at {i:?}");
        }
    }

    #[test]
    fn operands_of_any_layout_meet() {
        let shapes: [&[usize]; 7] = [&[2, 3, 4, 5], &[7, 33, 9], &[1], &[], &[5000], &[3, 0, 2], &[67, 130]];
        for shape in shapes {
            let rows = contiguous(shape);
            let mut columns = rows.clone();
            if shape.len() > 1 {
                let reversed: Vec<usize> = shape.iter().rev().copied().collect();
                columns = contiguous(&reversed).into_iter().rev().collect();
            }
            let zero = vec![0; shape.len()];
            let mut last = zero.clone();
            let mut middle = zero.clone();
            if let Some(l) = last.last_mut() {
                *l = 1;
            }
            if shape.len() > 2 {
                middle[1] = 1;
            }
            let gaps: Vec<usize> = rows.iter().map(|s| s * 3).collect();
            for out in [&rows, &columns] {
                for a in [&rows, &columns, &gaps] {
                    for b in [&rows, &columns, &zero, &last, &middle, &gaps] {
                        check::<f32>(shape, a, b, out);
                        check::<f64>(shape, a, b, out);
                        check::<bf16>(shape, b, a, out);
                        check::<i32>(shape, a, b, out);
                    }
                }
            }
        }
    }

    /// condition ? a : b over layouts of the condition; a and b lie like the output.
    fn check_select<T: Stored>(shape: &[usize], condition: &[usize], out: &[usize]) {
        let extent = shape.iter().zip(condition).map(|(d, s)| d.saturating_sub(1) * s).sum::<usize>() + 1;
        let conditions: Vec<Bool> = (0..extent).map(|i| Bool((i % 3 == 0) as u8)).collect();
        let numel = shape.iter().product::<usize>();
        let [a, b] = [0, 100].map(|start| (0..numel).map(|i| T::from_f64((start + i % 37) as f64)).collect::<Vec<T>>());
        let view = |x| Operand::View(StridedView::new(x, 0, shape, out).unwrap());
        let mut result = vec![T::default(); numel];
        let choice = StridedView::new(&conditions, 0, shape, condition).unwrap();
        select(choice, view(&a), view(&b), Output { data: &mut result, shape, strides: out });
        for i in indices(shape) {
            let at_out = at(out, &i);
            let want = if conditions[at(condition, &i)].get() { a[at_out] } else { b[at_out] };
            assert_eq!(result[at_out], want, "{shape:?} {condition:?} {out:?} at {i:?}");
        }
    }

    #[test]
    fn conditions_of_any_layout_select() {
        for shape in [[67, 130], [1, 5000], [5000, 1], [300, 700], [2, 3]] {
            let rows = [shape[1], 1];
            let columns = [1, shape[0]];
            for condition in [rows, columns, [0, 0], [0, 1], [1, 0], [2 * shape[1], 2]] {
                for out in [rows, columns] {
                    check_select::<f32>(&shape, &condition, &out);
                    check_select::<bf16>(&shape, &condition, &out);
                    check_select::<i64>(&shape, &condition, &out);
                }
            }
        }
    }

    /// A row's kernel for bf16 against the one for f32 and one rounding; lengths end within vectors, beyond tiles, and nowhere.
    fn check_half_row<const N: usize>(row: &Row<N>) {
        let extremes = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1e-40, 3e38, -1.0];
        let params = [0.75, 1.25];
        for n in [0, 1, 7, 16, 31, 32, 47, 64, 1100, 40_000] {
            let value = |i: usize, k: usize| match i % 61 {
                r if r < extremes.len() => extremes[(r + 3 * k) % extremes.len()],
                _ => (i * (7 + 6 * k) % 1000) as f32 / 200.0 - 2.0,
            };
            let inputs: [Vec<bf16>; N] = std::array::from_fn(|k| (0..n).map(|i| bf16::from_f32(value(i, k))).collect());
            let wide = inputs.each_ref().map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
            let (mut want, mut got) = (vec![0f32; n], vec![bf16::ZERO; n]);
            apply(row, params, wide.each_ref().map(|x| Operand::Dense(x)), Output { data: &mut want, shape: &[n], strides: &[1] });
            apply(row, params, inputs.each_ref().map(|x| Operand::Dense(x)), Output { data: &mut got, shape: &[n], strides: &[1] });
            for (want, got) in want.iter().map(|&x| bf16::from_f32(x)).zip(got) {
                assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(), "{} of {n}: {want:?} {got:?}", row.name);
            }
        }
    }

    #[test]
    fn rows_of_bf16_are_those_of_f32_rounded_once() {
        unary::UNARY.iter().for_each(|row| check_half_row(row));
        binary::BINARY.iter().for_each(|row| check_half_row(row));
        binary::TERNARY.iter().for_each(|row| check_half_row(row));
        backward::BACKWARD.iter().for_each(|row| check_half_row(row));
    }

    #[test]
    fn numbers_beside_bf16_are_not_rounded() {
        let n = 5000;
        let x: Vec<bf16> = (0..n).map(|i| bf16::from_f32(i as f32)).collect();
        let mut sums = x.clone();
        let out = Output { data: &mut sums, shape: &[n], strides: &[1] };
        apply(binary::Add::ROW, [0.0; 2], [Operand::Output, Operand::Scalar(0.3)], out);
        assert!(x.iter().zip(sums).all(|(x, y)| y == bf16::from_f32(x.to_f32() + 0.3)));
    }

    #[test]
    fn runs_that_end_tiles_meet_numbers() {
        // Tasks begin within a row, so that their first tile is a short one.
        let (rows, cols) = (300, 1001);
        let (shape, strides) = ([rows, cols], [cols, 1]);
        let column: Vec<f32> = (0..rows).map(|i| i as f32).collect();
        let dense: Vec<f32> = (0..rows * cols).map(|i| (i % 7) as f32).collect();
        let column = Operand::View(StridedView::new(&column, 0, &shape, &[1, 0]).unwrap());
        let mut result = vec![0f32; rows * cols];
        let out = Output { data: &mut result, shape: &shape, strides: &strides };
        apply(binary::Lerp::ROW, [0.0; 2], [column, Operand::Scalar(8.0), Operand::Dense(&dense)], out);
        for (i, &x) in result.iter().enumerate() {
            let (start, weight) = ((i / cols) as f32, (i % 7) as f32);
            assert!((x - (start + weight * (8.0 - start))).abs() <= 1e-3, "{i}: {x}");
        }
    }

    #[test]
    fn scalars_and_in_place() {
        for n in [0, 1, 5, 1024, 3001, 300_000] {
            let mut data: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let (shape, strides) = ([n], [1]);
            let out = Output { data: &mut data, shape: &shape, strides: &strides };
            apply(binary::Sub::ROW, [0.0; 2], [Operand::Scalar(1.5), Operand::Output], out);
            let out = Output { data: &mut data, shape: &shape, strides: &strides };
            apply(unary::Neg::ROW, [0.0; 2], [Operand::Output], out);
            assert!(data.iter().enumerate().all(|(i, &x)| x == i as f32 - 1.5));
        }
    }

    #[test]
    fn relations_casts_and_selections() {
        let n = 2500;
        let x: Vec<bf16> = (0..n).map(|i| bf16::from_f64((i % 200) as f64 - 100.0)).collect();
        let (shape, strides) = ([n], [1]);
        let view = StridedView::new(&x, 0, &shape, &strides).unwrap();
        let mut negative = vec![Bool(7); n];
        let out = Output { data: &mut negative, shape: &shape, strides: &strides };
        relate(relation::Lt::ROW, [Operand::View(view), Operand::Scalar(0.0)], out);
        let mut integers = vec![0i64; n];
        cast(view, Output { data: &mut integers, shape: &shape, strides: &strides });
        let mut clipped = vec![bf16::ONE; n];
        let condition = StridedView::new(&negative, 0, &shape, &strides).unwrap();
        let out = Output { data: &mut clipped, shape: &shape, strides: &strides };
        select(condition, Operand::Scalar(0.0), Operand::View(view), out);
        for i in 0..n {
            let x = (i % 200) as i64 - 100;
            assert_eq!((negative[i].0, integers[i], clipped[i].to_f64()), ((x < 0) as u8, x, x.max(0) as f64));
        }
        let mut truth = vec![Bool(9); n];
        cast(StridedView::new(&integers, 0, &shape, &strides).unwrap(), Output { data: &mut truth, shape: &shape, strides: &strides });
        assert!(truth.iter().zip(&integers).all(|(t, &i)| t.0 == (i != 0) as u8));
    }

    #[test]
    fn integers_do_not_panic() {
        let (a, b) = ([i32::MIN, 7, -7, 7, i32::MIN, 2], [-1, -2, 2, 0, 0, -3]);
        let (shape, strides) = ([6], [1]);
        let run = |row| {
            let mut data = a;
            let b = StridedView::new(&b, 0, &shape, &strides).unwrap();
            let out = Output { data: &mut data, shape: &shape, strides: &strides };
            apply(row, [0.0; 2], [Operand::Output, Operand::View(b)], out);
            data
        };
        assert_eq!(run(binary::Div::ROW), [i32::MIN, -3, -3, 0, 0, 0]);
        assert_eq!(run(binary::Rem::ROW), [0, -1, 1, 0, 0, -1]);
        assert_eq!(run(binary::Pow::ROW), [0, 0, 49, 1, 1, 0]);
        for row in binary::BINARY.iter().filter(|row| row.tile::<i32>().is_some()) {
            run(row);
        }
    }

    /// Every f32 row against its own f64 expression at moderate inputs.
    #[test]
    fn both_expressions_of_a_row_agree() {
        fn check<const N: usize>(row: &Row<N>) {
            let n = 1000;
            let params = [0.75, 1.25];
            let inputs: [Vec<f64>; N] =
                std::array::from_fn(|k| (0..n).map(|i| ((i * (7 + 6 * k) % n) as f32 / n as f32 * 5.0 - 2.0 + 1e-3) as f64).collect());
            let (shape, strides) = ([n], [1]);
            let mut precise = vec![0f64; n];
            let views = inputs.each_ref().map(|x| Operand::View(StridedView::new(x, 0, &shape, &strides).unwrap()));
            apply(row, params, views, Output { data: &mut precise, shape: &shape, strides: &strides });
            let single = inputs.each_ref().map(|x| x.iter().map(|&x| x as f32).collect::<Vec<_>>());
            let views = single.each_ref().map(|x| Operand::View(StridedView::new(x, 0, &shape, &strides).unwrap()));
            let mut result = vec![0f32; n];
            apply(row, params, views, Output { data: &mut result, shape: &shape, strides: &strides });
            for i in 0..n {
                let (a, b) = (result[i] as f64, precise[i]);
                assert!((a - b).abs() <= 3e-6 * b.abs().max(1.0) || a.is_nan() && b.is_nan(), "{}: {a} {b}", row.name);
            }
        }
        unary::UNARY.iter().for_each(|row| check(row));
        binary::BINARY.iter().filter(|row| row.name != "remainder").for_each(|row| check(row));
        binary::TERNARY.iter().for_each(|row| check(row));
        backward::BACKWARD.iter().for_each(|row| check(row));
    }
}
