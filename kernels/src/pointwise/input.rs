//! What a function over rows of contiguous elements reads: elements that lie one after the other, or a number that is the same for all of a row.
//! A number is not written out for as many elements as there are: storing it would take as long as storing the results. Nor are rows brought
//! together: they are read where they lie.

use super::vectors::Vectors;
use crate::cpu::simd::Simd;
use std::mem::MaybeUninit;

/// How many equal elements stand for a number that is the same for all: as many as the widest vectors hold.
pub const REPEATS: usize = 64;

/// Where a function over rows of contiguous elements finds those of an operand.
#[derive(Debug)]
pub struct Input<T> {
    first: *const T,
    /// All ones, or for a number that repeats 0.
    mask: usize,
    /// From a row to the next. A number with a step is another for each row, and lies there once.
    step: usize,
}

impl<T> Clone for Input<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Input<T> {}

impl<T> Input<T> {
    /// Elements that follow each other from `first` on, the same in every row.
    #[inline(always)]
    pub const fn of(first: *const T) -> Self {
        Self::rows(first, 0)
    }

    /// Rows of elements that follow each other, of which each begins `step` elements after the one before.
    #[inline(always)]
    pub const fn rows(first: *const T, step: usize) -> Self {
        Self { first, mask: usize::MAX, step }
    }

    /// The same number for all elements of all rows; [`REPEATS`] equal ones begin at `first`.
    #[inline(always)]
    pub const fn repeated(first: *const T) -> Self {
        Self { first, mask: 0, step: 0 }
    }

    /// The same number for all elements of a row: one for each row, `step > 0` elements after the one before.
    #[inline(always)]
    pub const fn number_of_each_row(first: *const T, step: usize) -> Self {
        Self { first, mask: 0, step }
    }

    /// Whether it is one number.
    #[inline(always)]
    pub const fn repeats(self) -> bool {
        self.mask == 0
    }

    /// The same bits as elements of another type.
    #[inline(always)]
    pub const fn cast<U>(self) -> Input<U> {
        Input { first: self.first.cast(), mask: self.mask, step: self.step }
    }

    /// Where element `i` lies, and after it as many as there are, or of a number as many as [`REPEATS`].
    ///
    /// # Safety
    /// There must be an element `i`, or it must be the one after the last.
    #[inline(always)]
    pub const unsafe fn at(self, i: usize) -> *const T {
        // SAFETY: the caller's; of a number it is the first.
        unsafe { self.first.add(i & self.mask) }
    }
}

/// The rows of each input.
pub(crate) struct Rows<T, const N: usize> {
    inputs: [Input<T>; N],
    rooms: [Room<T>; N],
}

/// Where a row's own number is repeated; of whole cache lines, as a vector that crosses them costs twice.
#[repr(C, align(64))]
struct Room<T>(MaybeUninit<[T; REPEATS]>);

impl<T: Copy, const N: usize> Rows<T, N> {
    #[inline(always)]
    pub const fn new(inputs: [Input<T>; N]) -> Self {
        Self { inputs, rooms: [const { Room(MaybeUninit::uninit()) }; N] }
    }

    /// Row `row` of each, which lasts until the next is asked for.
    ///
    /// # Safety
    /// Each input must have it.
    #[inline(always)]
    pub unsafe fn row(&mut self, row: usize) -> [Input<T>; N] {
        let mut inputs = self.inputs;
        for (input, room) in inputs.iter_mut().zip(&mut self.rooms) {
            let first = input.first.wrapping_add(row * input.step);
            *input = if input.repeats() && input.step > 0 {
                // SAFETY: the row has a number.
                let number = unsafe { *first };
                Input::repeated(room.0.write([number; REPEATS]).as_ptr())
            } else {
                Input { first, ..*input }
            };
        }
        inputs
    }
}

/// Calls `f(from, inputs, count)` for the elements `from..from + count` of each block that the `len` elements are cut into: all `inputs` lie one
/// after the other in it. It is one block, unless a number repeats.
///
/// # Safety
/// The inputs must have `len` elements.
#[inline(always)]
pub(crate) unsafe fn blocks<T, const N: usize>(inputs: [Input<T>; N], len: usize, mut f: impl FnMut(usize, [*const T; N], usize)) {
    let block = if inputs.iter().any(|input| input.repeats()) { REPEATS } else { len };
    let mut from = 0;
    while from < len {
        let count = block.min(len - from);
        // SAFETY: `from < len`.
        f(from, inputs.map(|input| unsafe { input.at(from) }), count);
        from += count;
    }
}

/// Reads vectors of each input, one after the other.
pub(crate) struct Vectored<T, const N: usize> {
    at: [*const T; N],
    steps: [usize; N],
}

impl<T: Vectors, const N: usize> Vectored<T, N> {
    /// Vectors of `S` from element `from` on.
    ///
    /// # Safety
    /// As [`Input::at`].
    #[inline(always)]
    pub unsafe fn new<S: Simd>(_: S, inputs: [Input<T>; N], from: usize) -> Self {
        const { assert!(S::LANES <= REPEATS) }
        // SAFETY: the caller's.
        Self { at: inputs.map(|input| unsafe { input.at(from) }), steps: inputs.map(|input| S::LANES & input.mask) }
    }

    /// The next vector of each.
    ///
    /// # Safety
    /// As many elements must follow.
    #[inline(always)]
    pub unsafe fn next<S: Simd>(&mut self, s: S) -> [S::F32; N] {
        let mut vectors = [s.splat(0.0); N];
        for ((x, at), step) in vectors.iter_mut().zip(&mut self.at).zip(&self.steps) {
            // SAFETY: the caller's; a number has as many equal elements as a vector.
            *x = unsafe { T::load(s, *at) };
            *at = at.wrapping_add(*step);
        }
        vectors
    }

    /// The last `count` elements of each, as the first lanes of vectors.
    ///
    /// # Safety
    /// `count` elements must follow.
    #[inline(always)]
    pub unsafe fn last<S: Simd>(self, s: S, count: usize) -> [S::F32; N] {
        let mut vectors = [s.splat(0.0); N];
        for (x, at) in vectors.iter_mut().zip(&self.at) {
            // SAFETY: the caller's.
            *x = unsafe { T::load_partial(s, *at, count) };
        }
        vectors
    }
}
