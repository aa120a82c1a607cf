//! Reading and writing at positions that are data: index_select, index_add, gather, scatter, nonzero; and triangles of matrices.
//!
//! A position that is out of range is an [`OutOfRange`] error that names the first; what the output holds then is not said. Where several sources meet
//! in one element, they are taken in the order of the index, whatever the number of threads.

use super::isa::{WithSimd, dispatch};
use super::parallel::{self, SharedMut};
use super::simd::Simd;
use crate::element::{Element, Float};
use crate::iter::Walk;
use crate::view::StridedView;
use half::{bf16, f16};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements a task moves: random access costs about a nanosecond each, so a task is well above a hand-over.
const TASK: usize = 32 * 1024;

/// A position outside of its dimension.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfRange {
    /// The position.
    pub index: i64,
    /// The dimension's extent.
    pub size: usize,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "index {} is out of range for a dimension of {} elements", self.index, self.size)
    }
}

impl std::error::Error for OutOfRange {}

/// The search for positions outside of `0..size`, by pieces of an index and by any thread.
struct Bounds {
    size: usize,
    /// Where the first piece begins that holds one.
    bad: AtomicUsize,
}

impl Bounds {
    fn new(size: usize) -> Self {
        Self { size, bad: AtomicUsize::new(usize::MAX) }
    }

    fn is_bad(&self, i: i64) -> bool {
        // Negative positions are huge as unsigned numbers.
        i as u64 >= self.size as u64
    }

    /// Whether all positions of the piece that begins at number `at` are inside.
    #[inline]
    fn hold(&self, piece: &[i64], at: usize) -> bool {
        // All of them, which the compiler does by vectors; to stop at the first would be a branch each.
        let any = piece.iter().fold(false, |any, &i| any | self.is_bad(i));
        if any {
            self.bad.fetch_min(at, Ordering::Relaxed);
        }
        !any
    }

    /// An error that names the first position outside, after all pieces of `index` were looked at.
    fn result(self, index: &[i64]) -> Result<(), OutOfRange> {
        match index.get(self.bad.load(Ordering::Relaxed)..).and_then(|rest| rest.iter().find(|&&i| self.is_bad(i))) {
            Some(&index) => Err(OutOfRange { index, size: self.size }),
            None => Ok(()),
        }
    }
}

/// An error that names the first position outside of `0..size`.
pub fn check_indices(index: &[i64], size: usize) -> Result<(), OutOfRange> {
    let bounds = Bounds::new(size);
    parallel::for_each(index.len().div_ceil(TASK), index.len() / 8, |c| {
        bounds.hold(&index[c * TASK..index.len().min((c + 1) * TASK)], c * TASK);
    });
    bounds.result(index)
}

/// `out[o, j, ..] = src[o, index[j], ..]` for `src` of shape `[outer, n, inner]`.
///
/// # Panics
/// If a length does not fit the shape.
pub fn index_select<T: Element>(src: &[T], shape: [usize; 3], index: &[i64], out: &mut [T]) -> Result<(), OutOfRange> {
    let [outer, n, inner] = shape;
    assert_eq!(src.len(), outer * n * inner);
    assert_eq!(out.len(), outer * index.len() * inner);
    check_indices(index, n)?;
    if out.is_empty() {
        return Ok(());
    }
    let rows = (TASK / inner).max(1);
    let ns = out.len() / 2 + outer * index.len() * 4;
    parallel::for_each_chunk(out, rows * inner, ns, |task, out| {
        let (mut o, mut j) = (task * rows / index.len(), task * rows % index.len());
        let mut left = out;
        while let Some(out) = left.split_off_mut(..left.len().min((index.len() - j) * inner)).filter(|out| !out.is_empty()) {
            select_rows(&src[o * n * inner..][..n * inner], inner, &index[j..], out);
            (o, j) = (o + 1, 0);
        }
    });
    Ok(())
}

/// The rows of `inner` elements that the first positions name, as many as `out` has.
fn select_rows<T: Element>(src: &[T], inner: usize, index: &[i64], out: &mut [T]) {
    if inner == 1 {
        out.iter_mut().zip(index).for_each(|(out, &j)| *out = src[j as usize]);
    } else {
        out.chunks_exact_mut(inner).zip(index).for_each(|(out, &j)| out.copy_from_slice(&src[j as usize * inner..][..inner]));
    }
}

/// `out[o, j, ..] = src[o, n − 1 − j, ..]` for both of shape `[outer, n, inner]`.
///
/// # Panics
/// If a length does not fit the shape.
pub fn flip<T: Element>(src: &[T], shape: [usize; 3], out: &mut [T]) {
    let [outer, n, inner] = shape;
    assert!(src.len() == outer * n * inner && out.len() == src.len());
    if out.is_empty() {
        return;
    }
    let line = n * inner;
    let lines = (TASK / line).max(1);
    parallel::for_each_chunk(out, lines * line, src.len() / 4, |task, out| {
        for (out, src) in out.chunks_exact_mut(line).zip(src[task * lines * line..].chunks_exact(line)) {
            if inner == 1 {
                out.iter_mut().zip(src.iter().rev()).for_each(|(out, &x)| *out = x);
            } else {
                out.chunks_exact_mut(inner).zip(src.chunks_exact(inner).rev()).for_each(|(out, x)| out.copy_from_slice(x));
            }
        }
    });
}

/// An element that can be summed: f16 and bf16 in f32, integers wrap.
pub trait Accumulate: Element {
    /// What sums are kept in.
    type Sum: Copy + Default + Send + Sync;
    /// Whether that is this type itself.
    const IS_SUM: bool;
    /// To the type of sums.
    fn to_sum(self) -> Self::Sum;
    /// Back, rounded.
    fn from_sum(sum: Self::Sum) -> Self;
    /// a + b.
    fn plus(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    /// Runs `f` on sums that begin as `values` and replace them: on these themselves, or on copies in `room`, each rounded once.
    fn with_sums(values: &mut [Self], room: &mut Vec<Self::Sum>, f: impl FnOnce(&mut [Self::Sum]));
}

macro_rules! accumulate {
    ($($t:ty: $plus:expr;)*) => { $(
        impl Accumulate for $t {
            type Sum = $t;
            const IS_SUM: bool = true;
            #[inline(always)] fn to_sum(self) -> $t { self }
            #[inline(always)] fn from_sum(sum: $t) -> $t { sum }
            #[inline(always)] fn plus(a: $t, b: $t) -> $t { $plus(a, b) }
            #[inline(always)] fn with_sums(values: &mut [$t], _: &mut Vec<$t>, f: impl FnOnce(&mut [$t])) { f(values) }
        }
    )* };
}
accumulate! {
    f32: |a, b| a + b;
    f64: |a, b| a + b;
    i64: i64::wrapping_add;
    i32: i32::wrapping_add;
    u8: u8::wrapping_add;
}

macro_rules! accumulate_in_f32 {
    ($($t:ty)*) => { $(
        impl Accumulate for $t {
            type Sum = f32;
            const IS_SUM: bool = false;
            #[inline(always)] fn to_sum(self) -> f32 { self.widen() }
            #[inline(always)] fn from_sum(sum: f32) -> $t { <$t>::narrow(sum) }
            #[inline(always)] fn plus(a: f32, b: f32) -> f32 { a + b }
            #[inline(always)] fn with_sums(values: &mut [$t], room: &mut Vec<f32>, f: impl FnOnce(&mut [f32])) {
                room.clear();
                room.extend(values.iter().map(|x| x.widen()));
                f(room);
                values.iter_mut().zip(room).for_each(|(x, sum)| *x = <$t>::narrow(*sum));
            }
        }
    )* };
}
accumulate_in_f32! { f16 bf16 }

/// The places of an index ordered by what they name, and then ascending, by counting.
fn counted(index: &[i64], n: usize) -> Vec<usize> {
    let mut next = vec![0; n];
    index.iter().for_each(|&target| next[target as usize] += 1);
    let mut before = 0;
    for next in &mut next {
        before += std::mem::replace(next, before);
    }
    let mut order = vec![0; index.len()];
    for (place, &target) in index.iter().enumerate() {
        let next = &mut next[target as usize];
        order[*next] = place;
        *next += 1;
    }
    order
}

/// The positions of an index, grouped by what they name: `order[starts[g]..starts[g + 1]]` are the places of one target, ascending.
struct Groups {
    order: Vec<usize>,
    starts: Vec<usize>,
}

impl Groups {
    /// Of positions in `0..n`.
    fn new(index: &[i64], n: usize) -> Self {
        // Counting takes a pass over all that can be named: too much where few of many are.
        let order = if n <= 16 * index.len() {
            counted(index, n)
        } else {
            let mut order: Vec<usize> = (0..index.len()).collect();
            order.sort_by_key(|&j| index[j]);
            order
        };
        let mut starts: Vec<usize> = (0..order.len()).filter(|&g| g == 0 || index[order[g]] != index[order[g - 1]]).collect();
        starts.push(order.len());
        Self { order, starts }
    }

    fn len(&self) -> usize {
        self.starts.len() - 1
    }

    fn places(&self, group: usize) -> &[usize] {
        &self.order[self.starts[group]..self.starts[group + 1]]
    }
}

/// `out[o, index[j], ..] += src[o, j, ..]` for `out` of shape `[outer, n, inner]`, j ascending. Sums of f16 and bf16 are rounded once.
///
/// # Panics
/// If a length does not fit the shape.
pub fn index_add<T: Accumulate>(out: &mut [T], shape: [usize; 3], index: &[i64], src: &[T]) -> Result<(), OutOfRange> {
    let [outer, n, inner] = shape;
    assert_eq!(out.len(), outer * n * inner);
    assert_eq!(src.len(), outer * index.len() * inner);
    check_indices(index, n)?;
    if src.is_empty() {
        return Ok(());
    }
    let groups = Groups::new(index, n);
    // Each target row is summed by one task, so no two tasks write to the same place and the order is fixed.
    let rows = outer * groups.len();
    let rows_per_task = (TASK / inner).max(1);
    let target = SharedMut::new(out);
    parallel::for_each(rows.div_ceil(rows_per_task), src.len(), |task| {
        let mut room = Vec::new();
        for row in task * rows_per_task..rows.min((task + 1) * rows_per_task) {
            let (o, places) = (row / groups.len(), groups.places(row % groups.len()));
            let at = (o * n + index[places[0]] as usize) * inner;
            // SAFETY: the index was checked, so the row lies inside `out`; rows of different (o, group) are disjoint.
            let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), inner) };
            dispatch(AddRows { out, src: &src[o * index.len() * inner..][..index.len() * inner], places, room: &mut room });
        }
    });
    Ok(())
}

/// Adds the rows `places` of `src` to `out`.
struct AddRows<'a, T: Accumulate> {
    out: &'a mut [T],
    src: &'a [T],
    places: &'a [usize],
    room: &'a mut Vec<T::Sum>,
}

impl<T: Accumulate> WithSimd for AddRows<'_, T> {
    type Output = ();

    /// Tile by tile, so that sums stay in registers or in L1.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const TILE: usize = 256;
        let inner = self.out.len();
        for (t, out) in self.out.chunks_mut(TILE).enumerate() {
            T::with_sums(out, self.room, |sums| {
                for &place in self.places {
                    let row = &self.src[place * inner + t * TILE..][..sums.len()];
                    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum = T::plus(*sum, x.to_sum()));
                }
            });
        }
    }
}

/// `strides` with that of dimension `dim` set to zero: the index supplies it.
fn without_dim(strides: &[usize], dim: usize) -> Vec<usize> {
    strides.iter().enumerate().map(|(d, &s)| if d == dim { 0 } else { s }).collect()
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d].max(1);
    }
    strides
}

/// `out[i] = src[i with coordinate dim replaced by index[i]]` for every index i of `shape`, the shape of `index` and `out`, which is
/// nowhere larger than `src`'s except in `dim`.
///
/// # Panics
/// If the ranks, lengths or extents do not fit.
pub fn gather<T: Element>(src: StridedView<T>, dim: usize, index: &[i64], shape: &[usize], out: &mut [T]) -> Result<(), OutOfRange> {
    assert!(shape.len() == src.shape().len() && (0..shape.len()).all(|d| d == dim || shape[d] <= src.shape()[d]));
    assert!(index.len() == out.len() && out.len() == shape.iter().product());
    let stride = src.strides()[dim];
    let walk = Walk::new(shape, [&without_dim(src.strides(), dim)], [src.offset()]);
    let [step] = walk.inner_strides();
    let bounds = Bounds::new(src.shape()[dim]);
    parallel::for_each_chunk(out, TASK, index.len(), |task, out| {
        let mut from = task * TASK;
        let mut left = out;
        for ([at], len) in walk.stretches_of(from..from + left.len()) {
            let (begin, index) = (from, &index[from..from + len]);
            from += len;
            // A piece is checked when it is in the cache for its use.
            let Some(out) = left.split_off_mut(..len).filter(|_| bounds.hold(index, begin)) else { continue };
            if (step, stride) == (0, 1) {
                // Along rows, as most are.
                select_rows(&src.data()[at..][..src.shape()[dim]], 1, index, out);
            } else {
                for (i, (out, &j)) in out.iter_mut().zip(index).enumerate() {
                    *out = src.data()[at + i * step + j as usize * stride];
                }
            }
        }
    });
    bounds.result(index)
}

/// `out[i with coordinate dim replaced by index[i]] = src[i]` for every index i of `shape`, the shape of `index` and `src`, in row-major order along `dim`:
/// the last of several wins. `out_shape` is nowhere smaller than `shape` except in `dim`.
///
/// # Panics
/// If the ranks, lengths or extents do not fit.
pub fn scatter<T: Element>(
    out: &mut [T],
    out_shape: &[usize],
    dim: usize,
    index: &[i64],
    shape: &[usize],
    src: &[T],
) -> Result<(), OutOfRange> {
    scatter_with(out, out_shape, dim, index, shape, src, |out, x| *out = x)
}

/// As [`scatter`], but adds. Sums of f16 and bf16 are rounded once.
pub fn scatter_add<T: Accumulate>(
    out: &mut [T],
    out_shape: &[usize],
    dim: usize,
    index: &[i64],
    shape: &[usize],
    src: &[T],
) -> Result<(), OutOfRange> {
    if T::IS_SUM {
        scatter_with(out, out_shape, dim, index, shape, src, |out, x| *out = T::from_sum(T::plus(out.to_sum(), x.to_sum())))
    } else {
        scatter_sums(out, out_shape, dim, index, shape, src)
    }
}

/// How a scatter walks its sources and its target: by columns along `dim`, where alone elements meet. Tasks share them out.
struct Columns<'a> {
    /// Offsets in the sources and in the target, over the other dimensions.
    walk: Walk<2>,
    sources: Line,
    target: Line,
    index: &'a [i64],
    bounds: Bounds,
}

/// The elements along one dimension.
#[derive(Clone, Copy)]
struct Line {
    len: usize,
    stride: usize,
}

/// Some of a scatter's columns, one step of the walk apart: where the first begins in the sources and in the target.
struct Block {
    source: usize,
    target: usize,
    columns: usize,
}

impl<'a> Columns<'a> {
    /// # Panics
    /// If the ranks, lengths or extents do not fit.
    fn new(out: (usize, &[usize]), dim: usize, index: &'a [i64], src: (usize, &[usize])) -> Result<Self, OutOfRange> {
        let ((out_len, out_shape), (src_len, shape)) = (out, src);
        assert!(shape.len() == out_shape.len() && (0..shape.len()).all(|d| d == dim || shape[d] <= out_shape[d]));
        assert!(out_len == out_shape.iter().product() && index.len() == src_len && src_len == shape.iter().product());
        let (from, to) = (row_major(shape), row_major(out_shape));
        let mut others = shape.to_vec();
        others[dim] = 1;
        let columns = Self {
            walk: Walk::new(&others, [&from, &to], [0, 0]),
            sources: Line { len: shape[dim], stride: from[dim] },
            target: Line { len: out_shape[dim], stride: to[dim] },
            index,
            bounds: Bounds::new(out_shape[dim]),
        };
        if !columns.are_rows() {
            check_indices(index, out_shape[dim])?;
        }
        Ok(columns)
    }

    /// Whether columns are rows of memory. Their positions are checked when they are in the cache for their use.
    fn are_rows(&self) -> bool {
        (self.sources.stride, self.target.stride) == (1, 1)
    }

    /// Calls `row(source, target)` for each column, where it begins, if they are rows of memory, and `block` for all columns otherwise.
    fn run(self, row: impl Fn(usize, usize) + Sync, block: impl Fn(&Self, Block) + Sync) -> Result<(), OutOfRange> {
        if self.index.is_empty() {
            return Ok(());
        }
        let (columns, [step, to_step]) = (self.walk.numel(), self.walk.inner_strides());
        let per_task = (TASK / self.sources.len).max(1);
        parallel::for_each(columns.div_ceil(per_task), self.index.len(), |task| {
            for ([source, target], columns) in self.walk.stretches_of(task * per_task..columns.min((task + 1) * per_task)) {
                if !self.are_rows() {
                    block(&self, Block { source, target, columns });
                    continue;
                }
                for (source, target) in (0..columns).map(|i| (source + i * step, target + i * to_step)) {
                    if self.bounds.hold(&self.index[source..source + self.sources.len], source) {
                        row(source, target);
                    }
                }
            }
        });
        self.bounds.result(self.index)
    }

    /// Calls `f(i, j, k)` for all of a block's sources, in the order of memory: source number k goes to position j of column i. What meets does so in
    /// ascending order.
    #[inline(always)]
    fn each(&self, block: &Block, mut f: impl FnMut(usize, usize, usize)) {
        let [step, _] = self.walk.inner_strides();
        for row in 0..self.sources.len {
            for i in 0..block.columns {
                let k = block.source + row * self.sources.stride + i * step;
                f(i, self.index[k] as usize, k);
            }
        }
    }
}

fn scatter_with<T: Element>(
    out: &mut [T],
    out_shape: &[usize],
    dim: usize,
    index: &[i64],
    shape: &[usize],
    src: &[T],
    put: impl Fn(&mut T, T) + Sync + Send,
) -> Result<(), OutOfRange> {
    let columns = Columns::new((out.len(), out_shape), dim, index, (src.len(), shape))?;
    let (n, line, [_, step]) = (columns.sources.len, columns.target, columns.walk.inner_strides());
    let target = SharedMut::new(out);
    let row = |from: usize, to: usize| {
        // SAFETY: the row lies inside `out`, and belongs to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(to), line.len) };
        index[from..from + n].iter().zip(&src[from..from + n]).for_each(|(&j, &x)| put(&mut out[j as usize], x));
    };
    columns.run(row, |columns, block| {
        columns.each(&block, |i, j, k| {
            // SAFETY: the index was checked and the other coordinates lie inside `out_shape`; columns of different tasks are disjoint.
            put(unsafe { &mut *target.get().add(block.target + i * step + j * line.stride) }, src[k]);
        });
    })
}

/// [`scatter_add`] with a sum beside each element of some columns.
fn scatter_sums<T: Accumulate>(
    out: &mut [T],
    out_shape: &[usize],
    dim: usize,
    index: &[i64],
    shape: &[usize],
    src: &[T],
) -> Result<(), OutOfRange> {
    /// Columns at a time where they are not rows: neighbours share cache lines.
    const WIDTH: usize = 32;
    let columns = Columns::new((out.len(), out_shape), dim, index, (src.len(), shape))?;
    let (n, line, [step, to_step]) = (columns.sources.len, columns.target, columns.walk.inner_strides());
    let target = SharedMut::new(out);
    let row = |from: usize, to: usize| {
        // SAFETY: the row lies inside `out`, and belongs to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(to), line.len) };
        dispatch(AddAt { out, index: &index[from..from + n], src: &src[from..from + n] });
    };
    columns.run(row, |columns, all| {
        let mut sums = vec![T::Sum::default(); line.len * WIDTH.min(all.columns)];
        for first in (0..all.columns).step_by(WIDTH) {
            let width = WIDTH.min(all.columns - first);
            let block = Block { source: all.source + first * step, target: all.target + first * to_step, columns: width };
            let sums = &mut sums[..line.len * width];
            // SAFETY: the coordinates lie inside `out_shape`; columns of different tasks are disjoint.
            let element = |j: usize, i: usize| unsafe { target.get().add(block.target + i * to_step + j * line.stride) };
            for (s, sum) in sums.iter_mut().enumerate() {
                // SAFETY: as above.
                *sum = unsafe { element(s / width, s % width).read() }.to_sum();
            }
            columns.each(&block, |i, j, k| sums[j * width + i] = T::plus(sums[j * width + i], src[k].to_sum()));
            for (s, &sum) in sums.iter().enumerate() {
                // SAFETY: as above.
                unsafe { element(s / width, s % width).write(T::from_sum(sum)) }
            }
        }
    })
}

/// Adds each source to the element of `out` that its position names.
struct AddAt<'a, T> {
    out: &'a mut [T],
    index: &'a [i64],
    src: &'a [T],
}

impl<T: Accumulate> WithSimd for AddAt<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        T::with_sums(self.out, &mut Vec::new(), |sums| {
            for (&j, x) in self.index.iter().zip(self.src) {
                sums[j as usize] = T::plus(sums[j as usize], x.to_sum());
            }
        });
    }
}

/// `out[r, c] = 1` where c is `index[r]`, else 0, for `classes` columns.
///
/// # Panics
/// If a length does not fit.
pub fn one_hot(index: &[i64], classes: usize, out: &mut [i64]) -> Result<(), OutOfRange> {
    assert_eq!(out.len(), index.len() * classes);
    check_indices(index, classes)?;
    if out.is_empty() {
        return Ok(());
    }
    let rows = (TASK / classes).max(1);
    parallel::for_each_chunk(out, rows * classes, out.len() / 4, |task, out| {
        out.fill(0);
        out.chunks_exact_mut(classes).zip(&index[task * rows..]).for_each(|(row, &class)| row[class as usize] = 1);
    });
    Ok(())
}

/// The positions of the elements that are not zero (NaN is not), ascending.
pub fn nonzero<T: Element>(x: &[T]) -> Vec<i64> {
    let zero = T::default();
    let mut counts = vec![0usize; x.len().div_ceil(TASK)];
    let chunk = |c: usize| &x[c * TASK..x.len().min((c + 1) * TASK)];
    parallel::for_each_chunk(&mut counts, 1, x.len() / 2, |c, count| {
        count[0] = chunk(c).iter().filter(|&&v| v != zero).count();
    });
    let mut out = vec![0i64; counts.iter().sum()];
    let mut rest = out.as_mut_slice();
    let mut parts: Vec<&mut [i64]> = counts.iter().map(|&count| rest.split_off_mut(..count).unwrap_or_default()).collect();
    parallel::for_each_chunk(&mut parts, 1, x.len(), |c, part| {
        // Each position is written, and stays if the element is not zero: there is nothing to branch on.
        let (mut found, mut count) = (vec![0i64; chunk(c).len()], 0);
        for (i, v) in chunk(c).iter().enumerate() {
            found[count] = (c * TASK + i) as i64;
            count += (*v != zero) as usize;
        }
        part[0].copy_from_slice(&found[..count]);
    });
    out
}

/// The part of a matrix that [`triangle`] keeps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Triangle {
    /// Columns up to `row + k`.
    Lower(isize),
    /// Columns from `row + k` on.
    Upper(isize),
}

impl Triangle {
    /// The kept columns of a row.
    fn columns(self, row: usize, cols: usize) -> Range<usize> {
        let bound = |k: isize| (row as isize).saturating_add(k).clamp(0, cols as isize) as usize;
        match self {
            Triangle::Lower(k) => 0..bound(k.saturating_add(1)),
            Triangle::Upper(k) => bound(k)..cols,
        }
    }
}

/// Copies the kept part of each matrix of `rows` × `cols` and zeroes the rest.
///
/// # Panics
/// If the lengths differ.
pub fn triangle<T: Element>(x: &[T], rows: usize, cols: usize, kept: Triangle, out: &mut [T]) {
    assert_eq!(x.len(), out.len());
    if out.is_empty() {
        return;
    }
    let rows_per_task = (TASK / cols).max(1);
    parallel::for_each_chunk(out, rows_per_task * cols, x.len() / 2, |task, out| {
        for (row, out) in (task * rows_per_task..).zip(out.chunks_mut(cols)) {
            let kept = kept.columns(row % rows, cols);
            out.fill(T::default());
            out[kept.clone()].copy_from_slice(&x[row * cols..][kept]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37) % 101) as f32 - 50.0).collect()
    }

    fn positions(n: usize, size: usize) -> Vec<i64> {
        (0..n).map(|i| ((i * 7919 + i / 3) % size) as i64).collect()
    }

    #[test]
    fn no_position_changes_nothing() {
        for (shape, dim) in [([3, 0], 1), ([0, 3], 0), ([0, 3], 1), ([3, 0], 0)] {
            let (mut out, mut halves) = ([7f32; 15], [bf16::ONE; 15]);
            let out_shape = if dim == 1 { [3, 5] } else { [5, 3] };
            scatter(&mut out, &out_shape, dim, &[], &shape, &[]).unwrap();
            scatter_add(&mut out, &out_shape, dim, &[], &shape, &[]).unwrap();
            scatter_add(&mut halves, &out_shape, dim, &[], &shape, &[]).unwrap();
            gather(StridedView::new(&out, 0, &out_shape, &[out_shape[1], 1]).unwrap(), dim, &[], &shape, &mut []).unwrap();
            assert!(out == [7.0; 15] && halves == [bf16::ONE; 15]);
        }
    }

    #[test]
    fn the_first_position_out_of_range_is_an_error() {
        let src = numbers(6);
        let halves: Vec<bf16> = src.iter().map(|&x| bf16::from_f32(x)).collect();
        for bad in [-1, 3, i64::MIN, i64::MAX] {
            let mut out = vec![7.0; 6];
            let expected = Err(OutOfRange { index: bad, size: 3 });
            assert_eq!(index_select(&src, [1, 3, 2], &[0, bad, 1], &mut out), expected);
            assert_eq!(index_add(&mut out, [1, 3, 2], &[0, bad, 1], &src), expected);
            assert_eq!(one_hot(&[0, bad], 3, &mut [0; 6]), expected);
            for (shape, dim) in [([3, 2], 0), ([2, 3], 1)] {
                let index = [0, 1, 2, bad, 0, 3];
                let strides = [shape[1], 1];
                let view = StridedView::new(&src, 0, &shape, &strides).unwrap();
                assert_eq!(gather(view, dim, &index, &shape, &mut out), expected);
                assert_eq!(scatter(&mut out, &shape, dim, &index, &shape, &src), expected);
                assert_eq!(scatter_add(&mut out, &shape, dim, &index, &shape, &src), expected);
                assert_eq!(scatter_add(&mut halves.clone(), &shape, dim, &index, &shape, &halves), expected);
            }
        }
    }

    #[test]
    fn counting_and_sorting_group_alike() {
        let index: Vec<i64> = (0..100).map(|i| i * i % 37).collect();
        let (counted, sorted) = (Groups::new(&index, 37), Groups::new(&index, 100_000));
        assert_eq!((counted.order, counted.starts), (sorted.order, sorted.starts));
    }

    #[test]
    fn rows_are_selected_and_added() {
        for [outer, n, inner, k] in [[1, 5, 3, 7], [2, 4, 1, 9], [3, 700, 300, 900], [1, 2, 600, 5], [2, 3, 4, 0], [0, 3, 4, 2]] {
            let (src, index) = (numbers(outer * n * inner), positions(k, n));
            let mut out = vec![0.0; outer * k * inner];
            index_select(&src, [outer, n, inner], &index, &mut out).unwrap();
            for (at, &x) in out.iter().enumerate() {
                let (o, j, i) = (at / inner / k, at / inner % k, at % inner);
                assert_eq!(x, src[(o * n + index[j] as usize) * inner + i]);
            }
            let mut sums = numbers(outer * n * inner);
            let mut expected = sums.clone();
            index_add(&mut sums, [outer, n, inner], &index, &out).unwrap();
            for (at, &x) in out.iter().enumerate() {
                let (o, j, i) = (at / inner / k, at / inner % k, at % inner);
                expected[(o * n + index[j] as usize) * inner + i] += x;
            }
            assert_eq!(sums, expected);
        }
    }

    #[test]
    fn half_sums_are_rounded_once() {
        // 2048 + 1 + 1 in f16 would stay 2048 if each step rounded.
        let mut out = [f16::from_f32(2048.0)];
        index_add(&mut out, [1, 1, 1], &[0, 0], &[f16::ONE, f16::ONE]).unwrap();
        assert_eq!(out[0].to_f32(), 2050.0);
        for (shape, dim) in [([1, 40], 0), ([40, 1], 1), ([1, 3], 0)] {
            let sources: [usize; 2] = if dim == 0 { [2, shape[1]] } else { [shape[0], 2] };
            let mut out = vec![f16::from_f32(2048.0); shape[0] * shape[1]];
            let ones = vec![f16::ONE; sources[0] * sources[1]];
            scatter_add(&mut out, &shape, dim, &vec![0; ones.len()], &sources, &ones).unwrap();
            assert!(out.iter().all(|x| x.to_f32() == 2050.0), "{shape:?} {dim}");
        }
    }

    #[test]
    fn gather_and_scatter_follow_their_definition() {
        for (src_shape, shape, dim) in
            [([3, 5, 4], [3, 2, 4], 1), ([3, 5, 4], [2, 9, 3], 1), ([60, 70, 80], [60, 70, 85], 2), ([6, 2, 3], [8, 2, 2], 0)]
        {
            let (n, strides) = (src_shape.iter().product::<usize>(), row_major(&src_shape));
            let (src, index) = (numbers(n), positions(shape.iter().product(), src_shape[dim]));
            let of = row_major(&shape);
            let place =
                |k: usize| -> usize { (0..3).map(|d| if d == dim { index[k] as usize } else { k / of[d] % shape[d] } * strides[d]).sum() };
            let mut out = vec![0.0; index.len()];
            gather(StridedView::new(&src, 0, &src_shape, &strides).unwrap(), dim, &index, &shape, &mut out).unwrap();
            assert!((0..out.len()).all(|k| out[k] == src[place(k)]));
            let values = numbers(index.len());
            let (mut set, mut expected_set) = (src.clone(), src.clone());
            let (mut sum, mut expected_sum) = (src.clone(), src.clone());
            let to_halves = |x: &[f32]| -> Vec<f16> { x.iter().map(|&x| f16::from_f32(x)).collect() };
            let mut half_sum = to_halves(&src);
            scatter(&mut set, &src_shape, dim, &index, &shape, &values).unwrap();
            scatter_add(&mut sum, &src_shape, dim, &index, &shape, &values).unwrap();
            scatter_add(&mut half_sum, &src_shape, dim, &index, &shape, &to_halves(&values)).unwrap();
            for k in 0..index.len() {
                expected_set[place(k)] = values[k];
                expected_sum[place(k)] += values[k];
            }
            assert!(set == expected_set && sum == expected_sum && half_sum == to_halves(&expected_sum));
        }
    }

    #[test]
    fn nonzero_positions_ascend() {
        let x: Vec<f32> = (0..100_000)
            .map(|i| {
                if i % 3 == 1 {
                    f32::NAN
                } else if i % 7 == 0 {
                    -0.0
                } else {
                    (i % 2) as f32
                }
            })
            .collect();
        let expected: Vec<i64> = (0..x.len()).filter(|&i| x[i] != 0.0).map(|i| i as i64).collect();
        assert_eq!(nonzero(&x), expected);
        assert!(nonzero::<i32>(&[]).is_empty());
    }

    #[test]
    fn triangles_keep_their_side() {
        let x = vec![1i32; 2 * 3 * 4];
        for k in -5isize..6 {
            for (kept, keeps) in [(Triangle::Lower(k), (|c, r| c <= r) as fn(isize, isize) -> bool), (Triangle::Upper(k), |c, r| c >= r)] {
                let mut out = vec![9; x.len()];
                triangle(&x, 3, 4, kept, &mut out);
                assert!(out.iter().enumerate().all(|(i, &v)| v == keeps((i % 4) as isize, (i / 4 % 3) as isize + k) as i32));
            }
        }
    }
}
