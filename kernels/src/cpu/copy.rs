//! Copies between layouts: any strided view into row-major memory or into a strided region of an output.
//! Transposition, conversion between NCHW and NHWC, broadcasting, concatenation and padding all end here.
//!
//! Elements are moved as words of 1, 2, 4 or 8 bytes; no value is interpreted. Dimensions that lie one behind the other in both
//! layouts are merged first; then one of two loops runs: along runs of the destination, or, where the source's fastest dimension is
//! another than the destination's, over square tiles of the plane that the two span (otherwise one side would touch a cache line per element).

use super::isa::{WithSimd, dispatch};
use super::parallel::{self, SharedMut};
use super::simd::{F32s, Simd};
use crate::element::Element;
use crate::iter::Walk;
use crate::view::StridedView;

/// Elements a task moves: some 128 KB of f32, large beside the cost of a hand-over (a few µs), small beside L2.
const TASK: usize = 32 * 1024;

/// Side of the square tiles of a transposition: 16 f32 are a cache line, so that an aligned tile reads and writes whole lines.
const TILE: usize = 16;

/// Extent of a transposition's block along the destination's rows and along the source's rows: [`TASK`] elements together. The long side
/// lies along the destination's, which are written a kilobyte at a time: loads wait side by side, stores one after the other.
const BLOCK_DST: usize = 256;
const BLOCK_SRC: usize = TASK / BLOCK_DST;

/// Writes `src` to `out` in row-major order.
///
/// # Panics
/// If `out` has another length than `src` has elements.
pub fn copy_strided<T: Element>(src: StridedView<T>, out: &mut [T]) {
    assert_eq!(src.numel(), out.len());
    let mut strides = vec![0; src.shape().len()];
    row_major_strides(src.shape(), &mut strides);
    // SAFETY: row-major strides over `out.len()` elements reach each element of `out` once.
    unsafe { copy(src, out, 0, &strides) }
}

/// Writes `src` into the region of `out` that starts at `offset` and has `strides` (one a dimension of `src`);
/// the rest of `out` is left alone.
///
/// # Panics
/// If the region leaves `out`, or if its dimensions are interleaved so that it could reach an element twice.
pub fn copy_into_strided<T: Element>(src: StridedView<T>, out: &mut [T], offset: usize, strides: &[usize]) {
    assert!(StridedView::new(out, offset, src.shape(), strides).is_some(), "the region leaves the output");
    assert!(is_nested(src.shape(), strides), "the region overlaps itself");
    // SAFETY: both facts were checked.
    unsafe { copy(src, out, offset, strides) }
}

/// Runs shorter than this are not worth leaving out of a fill.
const MIN_RUN: usize = 16;

/// Writes `value` to what [`copy_into_strided`] of this shape leaves alone; what it writes may be written, too.
///
/// # Panics
/// As that does.
pub fn fill_around<T: Element>(out: &mut [T], value: T, shape: &[usize], offset: usize, strides: &[usize]) {
    assert!(StridedView::new(out, offset, shape, strides).is_some(), "the region leaves the output");
    assert!(is_nested(shape, strides), "the region overlaps itself");
    let mut dims: Vec<(usize, usize)> = shape.iter().copied().zip(strides.iter().copied()).filter(|&(n, _)| n != 1).collect();
    dims.sort_unstable_by_key(|&(_, stride)| std::cmp::Reverse(stride));
    let mut run = 1;
    while let Some((n, _)) = dims.pop_if(|&mut (_, stride)| stride == run) {
        run *= n;
    }
    if run < MIN_RUN {
        return out.fill(value);
    }
    let mut done = 0;
    each_offset(&dims, offset, &mut |at| {
        out[done..at].fill(value);
        done = at + run;
    });
    out[done..].fill(value);
}

/// Calls `f` with the offset of each index of these dimensions (extent and stride), outermost first.
fn each_offset(dims: &[(usize, usize)], at: usize, f: &mut impl FnMut(usize)) {
    match dims {
        [] => f(at),
        [(n, stride), inner @ ..] => (0..*n).for_each(|i| each_offset(inner, at + i * stride, f)),
    }
}

/// Fills `strides` with those of row-major memory of this shape.
fn row_major_strides(shape: &[usize], strides: &mut [usize]) {
    let mut step = 1;
    for (stride, &n) in strides.iter_mut().zip(shape).rev() {
        *stride = step;
        step *= n;
    }
}

/// Whether each dimension steps over all that the faster ones span, so that no two indices meet.
fn is_nested(shape: &[usize], strides: &[usize]) -> bool {
    let mut dims: Vec<(usize, usize)> = strides.iter().copied().zip(shape.iter().copied()).filter(|&(_, n)| n > 1).collect();
    dims.sort_unstable();
    let mut span = 0;
    dims.iter().all(|&(stride, n)| {
        let nested = stride > span;
        span += (n - 1) * stride;
        nested || shape.contains(&0)
    })
}

/// # Safety
/// The region (`offset`, shape of `src`, `strides`) lies inside `out` and reaches no element twice.
unsafe fn copy<T: Element>(src: StridedView<T>, out: &mut [T], offset: usize, strides: &[usize]) {
    if src.numel() == 0 {
        return;
    }
    let walk = Walk::in_memory_order(src.shape(), [strides, src.strides()], [0, 0]);
    // SAFETY: `StridedView` proved that `src` stays inside its data, the caller that the region stays inside `out`;
    // every `Element` of a size may be moved as the integer of that size, which has no stricter alignment.
    unsafe {
        let from = src.data().as_ptr().add(src.offset());
        let to = SharedMut::new(&mut out[offset..]);
        match size_of::<T>() {
            1 => copy_words(from.cast::<u8>(), to.cast(), &walk),
            2 => copy_words(from.cast::<u16>(), to.cast(), &walk),
            4 => copy_words(from.cast::<u32>(), to.cast(), &walk),
            _ => copy_words(from.cast::<u64>(), to.cast(), &walk),
        }
    }
}

/// A plain integer of an element's size.
trait Word: Copy + Send + Sync + 'static {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

/// An address that tasks only read from.
#[derive(Clone, Copy)]
struct Source<W>(*const W);
// SAFETY: the memory is borrowed shared for as long as tasks run, and words are plain data.
unsafe impl<W: Word> Send for Source<W> {}
// SAFETY: as above.
unsafe impl<W: Word> Sync for Source<W> {}

impl<W> Source<W> {
    fn get(self) -> *const W {
        self.0
    }
}

/// A dimension of both layouts.
#[derive(Clone, Copy)]
struct Dim {
    n: usize,
    dst: usize,
    src: usize,
}

/// # Safety
/// `dst` and `src` must be valid for all of `walk` (whose operands they are, in this order), and no two of its elements may meet in `dst`.
unsafe fn copy_words<W: Word>(src: *const W, dst: SharedMut<W>, walk: &Walk<2>) {
    let dims: Vec<Dim> = walk.dimensions().iter().map(|&(n, [dst, src])| Dim { n, dst, src }).collect();
    let fastest = dims.len() - 1;
    let by_source = (0..dims.len()).filter(|&d| dims[d].src != 0).min_by_key(|&d| dims[d].src);
    match by_source {
        // SAFETY: the caller's contract, in both arms.
        Some(d) if d != fastest && dims[d].src < dims[fastest].src => unsafe { copy_transposed(Source(src), dst, dims, d) },
        // SAFETY: as above.
        _ => unsafe { copy_runs(Source(src), dst, walk) },
    }
}

/// Copies along the destination's fastest dimension. A task takes [`TASK`] elements in order, wherever runs begin.
///
/// # Safety
/// As [`copy_words`].
unsafe fn copy_runs<W: Word>(src: Source<W>, dst: SharedMut<W>, walk: &Walk<2>) {
    let total = walk.numel();
    let strides = walk.inner_strides();
    parallel::for_each(total.div_ceil(TASK), total * size_of::<W>() / 8, |task| {
        for ([to, from], n) in walk.stretches_of(task * TASK..total.min((task + 1) * TASK)) {
            // SAFETY: the walk stays where the caller vouches for; tasks take disjoint ranges of its elements.
            unsafe { copy_run(src.get().add(from), dst.get().add(to), n, strides) };
        }
    });
}

/// Copies `n` elements with the strides of (destination, source).
///
/// # Safety
/// Both sides must be valid for `n` elements and must not overlap.
#[inline(always)]
unsafe fn copy_run<W: Word>(src: *const W, dst: *mut W, n: usize, strides: [usize; 2]) {
    // SAFETY: the caller's contract.
    unsafe {
        match strides {
            // A call costs as much as moving some 16 elements.
            [1, 1] if n > 16 => copy_stretch(src.cast(), dst.cast(), n * size_of::<W>()),
            [1, 1] => (0..n).for_each(|i| *dst.add(i) = *src.add(i)),
            [1, 0] => std::slice::from_raw_parts_mut(dst, n).fill(*src),
            [to, from] => (0..n).for_each(|i| *dst.add(i * to) = *src.add(i * from)),
        }
    }
}

/// Bytes of stretches that are copied by vectors: from 2 to 4 KiB on memcpy leaves them to an instruction that is slow to start, and slower
/// where source and destination lie differently within cache lines.
const BY_VECTORS: std::ops::Range<usize> = 1 << 11..1 << 15;

/// Copies bytes that lie side by side.
///
/// # Safety
/// Both sides must be valid for `len` bytes and must not overlap.
#[inline(always)]
unsafe fn copy_stretch(src: *const u8, dst: *mut u8, len: usize) {
    if BY_VECTORS.contains(&len) {
        return dispatch(Stretch { src, dst, len });
    }
    // SAFETY: the caller's contract.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, len) }
}

/// See [`copy_stretch`], whose caller vouches for both sides.
struct Stretch {
    src: *const u8,
    dst: *mut u8,
    len: usize,
}

impl WithSimd for Stretch {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        const GROUP: usize = 4;
        let Self { src, dst, len } = self;
        let vector = S::LANES * size_of::<f32>();
        if S::LANES == 1 {
            // SAFETY: the maker of the struct vouches for both sides.
            return unsafe { std::ptr::copy_nonoverlapping(src, dst, len) };
        }
        // SAFETY: each vector lies within the `len` bytes, which are more than two groups.
        unsafe {
            // What begins or ends within a cache line is written twice.
            s.load(src.cast()).store(dst.cast());
            let mut at = vector - dst.addr() % vector;
            while at + GROUP * vector <= len {
                let mut vectors = [s.zero(); GROUP];
                for (i, x) in vectors.iter_mut().enumerate() {
                    *x = s.load(src.add(at + i * vector).cast());
                }
                for (i, x) in vectors.iter().enumerate() {
                    x.store(dst.add(at + i * vector).cast());
                }
                at += GROUP * vector;
            }
            while at < len {
                let last = at.min(len - vector);
                s.load(src.add(last).cast()).store(dst.add(last).cast());
                at += vector;
            }
        }
    }
}

/// Copies tile by tile over the plane of the destination's fastest dimension and dimension `by_source`, the source's fastest.
/// A task takes a block of a plane, or several whole planes if they are small.
///
/// # Safety
/// As [`copy_words`].
unsafe fn copy_transposed<W: Word>(src: Source<W>, dst: SharedMut<W>, mut dims: Vec<Dim>, by_source: usize) {
    let along = dims.remove(by_source);
    let Some(across) = dims.pop() else { return };
    let column = |f: fn(&Dim) -> usize| dims.iter().map(f).collect::<Vec<_>>();
    let planes = Walk::new(&column(|d| d.n), [&column(|d| d.dst), &column(|d| d.src)], [0, 0]);
    // A side shorter than its block leaves room for the other to be longer.
    let block_along = along.n.min(BLOCK_SRC.max(TASK / across.n.min(BLOCK_DST)));
    let block_across = across.n.min(TASK / block_along).max(TILE);
    let blocks_across = across.n.div_ceil(block_across);
    let blocks = along.n.div_ceil(block_along) * blocks_across;
    let planes_per_task = (TASK / (across.n.min(TASK) * along.n.min(TASK))).max(1);
    let ns = planes.numel() * across.n * along.n * size_of::<W>() / 4;
    parallel::for_each(planes.numel().div_ceil(planes_per_task) * blocks, ns, |task| {
        let (group, block) = (task / blocks, task % blocks);
        let (j, i) = (block / blocks_across * block_along, block % blocks_across * block_across);
        for plane in group * planes_per_task..planes.numel().min((group + 1) * planes_per_task) {
            let [to, from] = planes.offsets_of(plane);
            // SAFETY: `i` and `j` and the extents stay inside the plane; blocks of all tasks are disjoint.
            dispatch(unsafe {
                Plane {
                    src: src.get().add(from + i * across.src + j * along.src),
                    dst: dst.get().add(to + i * across.dst + j * along.dst),
                    across: Dim { n: block_across.min(across.n - i), ..across },
                    along: Dim { n: block_along.min(along.n - j), ..along },
                }
            });
        }
    });
}

/// A block of a plane to transpose: index `(i, j)` of (`across`, `along`).
///
/// Whoever makes one guarantees that both addresses are valid for all its indices, and that no other task touches those of `dst`.
struct Plane<W> {
    src: *const W,
    dst: *mut W,
    across: Dim,
    along: Dim,
}

impl<W: Word> WithSimd for Plane<W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let whole = size_of::<W>() == 4 && self.along.src == 1 && self.across.dst == 1 && TILE.is_multiple_of(S::LANES) && S::LANES > 1;
        for j in (0..self.along.n).step_by(TILE) {
            let cols = TILE.min(self.along.n - j);
            for i in (0..self.across.n).step_by(TILE) {
                let rows = TILE.min(self.across.n - i);
                // SAFETY: see the type: the tile stays inside the block.
                unsafe {
                    let src = self.src.add(i * self.across.src + j * self.along.src);
                    let dst = self.dst.add(i * self.across.dst + j * self.along.dst);
                    if whole && rows == TILE && cols == TILE {
                        // The lines after the next: the source's rows lie too far apart for the hardware to load ahead.
                        for row in 0..TILE {
                            simd.prefetch(src.cast::<f32>().wrapping_add(row * self.across.src + 2 * TILE));
                        }
                        tile_f32(simd, src.cast(), self.across.src, dst.cast(), self.along.dst);
                    } else {
                        self.tile(src, dst, rows, cols);
                    }
                }
            }
        }
    }
}

impl<W: Word> Plane<W> {
    /// Moves `rows` × `cols` elements one by one, writing along the destination's rows.
    ///
    /// # Safety
    /// The tile lies inside the block.
    #[inline(always)]
    unsafe fn tile(&self, src: *const W, dst: *mut W, rows: usize, cols: usize) {
        for j in 0..cols {
            for i in 0..rows {
                // SAFETY: the caller's contract.
                unsafe { *dst.add(j * self.along.dst + i * self.across.dst) = *src.add(j * self.along.src + i * self.across.src) };
            }
        }
    }
}

/// Transposes a tile of 32-bit words, whose rows lie `src_stride` and `dst_stride` apart.
///
/// # Safety
/// Both sides are valid for [`TILE`] rows of [`TILE`] words.
#[inline(always)]
unsafe fn tile_f32<S: Simd>(simd: S, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    for i in (0..TILE).step_by(S::LANES) {
        for j in (0..TILE).step_by(S::LANES) {
            // SAFETY: the caller's contract.
            unsafe { simd.transpose(src.add(i * src_stride + j), src_stride, dst.add(j * dst_stride + i), dst_stride) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::Bool;
    use half::bf16;

    fn reference<T: Element>(view: StridedView<T>, out: &mut [T], offset: usize, strides: &[usize]) {
        let mut index = vec![0; view.shape().len()];
        for _ in 0..view.numel() {
            let at = |s: &[usize]| index.iter().zip(s).map(|(i, s)| i * s).sum::<usize>();
            out[offset + at(strides)] = view.data()[view.offset() + at(view.strides())];
            for (i, &n) in index.iter_mut().zip(view.shape()).rev() {
                *i += 1;
                if *i < n {
                    break;
                }
                *i = 0;
            }
        }
    }

    #[test]
    fn stretches_of_any_length_and_place_are_copied() {
        let data: Vec<u8> = (0..40_000).map(|i| (i * 7 + i / 251) as u8 | 1).collect();
        let lens = (2040..2440).step_by(7).chain([0, 1, 63, 2047, 2048, 2049, 4096, 32_767, 32_768, 32_769]);
        for (i, len) in lens.enumerate() {
            let (from, to) = (i * 5 % 67, i * 11 % 71);
            let mut out = vec![0; to + len + 3];
            let (src, dst) = (&data[from..from + len], &mut out[to..to + len]);
            // SAFETY: both slices have that length.
            unsafe { copy_stretch(src.as_ptr(), dst.as_mut_ptr(), len) };
            assert!(out[to..to + len] == data[from..from + len], "{len} bytes from {from} to {to}");
            assert!(out[..to].iter().chain(&out[to + len..]).all(|&x| x == 0), "{len} bytes from {from} to {to}: beyond them");
        }
    }

    fn check<T: Element>(shape: &[usize], strides: &[usize], offset: usize) {
        let last = shape.iter().zip(strides).map(|(n, s)| n.saturating_sub(1) * s).sum::<usize>() + offset;
        let data: Vec<T> = (0..=last).map(|i| T::from_f64(((i * 37 + i / 251) % 127) as f64)).collect();
        let view = StridedView::new(&data, offset, shape, strides).unwrap();
        let mut dense = vec![0; shape.len()];
        row_major_strides(shape, &mut dense);
        let mut expected = vec![T::default(); view.numel()];
        reference(view, &mut expected, 0, &dense);
        let mut out = vec![T::from_f64(1.0); view.numel()];
        copy_strided(view, &mut out);
        assert!(out == expected, "{shape:?} {strides:?}");
        // Into every other element of every other row of a larger block.
        let strides: Vec<usize> = dense.iter().map(|s| s * 2).collect();
        let mut expected = vec![T::default(); 3 + 2 * view.numel()];
        let mut out = expected.clone();
        reference(view, &mut expected, 3, &strides);
        copy_into_strided(view, &mut out, 3, &strides);
        assert!(out == expected, "{shape:?} {strides:?} into a region");
        fill_and_copy(view, &dense);
    }

    /// A border of 2 before and 1 behind each dimension, or none around the innermost.
    fn fill_and_copy<T: Element>(view: StridedView<T>, dense: &[usize]) {
        let inner = view.shape().len().saturating_sub(1);
        for kept in [usize::MAX, inner] {
            let extents: Vec<usize> = view.shape().iter().enumerate().map(|(d, n)| if d == kept { *n } else { n + 3 }).collect();
            let mut strides = dense.to_vec();
            row_major_strides(&extents, &mut strides);
            let offset = strides.iter().enumerate().map(|(d, stride)| if d == kept { 0 } else { 2 * stride }).sum();
            let mut expected = vec![T::from_f64(3.0); extents.iter().product()];
            let mut out = vec![T::default(); expected.len()];
            reference(view, &mut expected, offset, &strides);
            fill_around(&mut out, T::from_f64(3.0), view.shape(), offset, &strides);
            copy_into_strided(view, &mut out, offset, &strides);
            assert!(out == expected, "{extents:?} around {:?}", view.shape());
        }
    }

    fn check_all(shape: &[usize], strides: &[usize], offset: usize) {
        check::<f32>(shape, strides, offset);
        check::<f64>(shape, strides, offset);
        check::<bf16>(shape, strides, offset);
        check::<Bool>(shape, strides, offset);
    }

    #[test]
    fn any_layout_is_copied_like_element_by_element() {
        check_all(&[], &[], 2);
        check_all(&[5], &[1], 0);
        check_all(&[0, 3], &[3, 1], 0);
        check_all(&[7, 5], &[5, 1], 1);
        check_all(&[7, 5], &[1, 7], 0);
        check_all(&[16, 16], &[1, 16], 0);
        check_all(&[33, 47], &[1, 35], 3);
        check_all(&[33, 47], &[2, 70], 3);
        check_all(&[4, 6, 3], &[0, 1, 0], 0);
        check_all(&[4, 1, 40], &[0, 9, 0], 0);
        check_all(&[2, 3, 20, 20], &[1200, 1, 60, 3], 0);
        check_all(&[2, 20, 20, 3], &[1200, 20, 1, 400], 0);
        check_all(&[3, 5, 17, 4, 18], &[1, 3, 15, 4590, 255], 2);
        check_all(&[70, 300, 20], &[300, 1, 21000], 0);
        check_all(&[300, 70, 2], &[1, 300, 0], 0);
        check_all(&[1000, 130], &[1, 1000], 0);
        check_all(&[3, 70_000], &[1, 3], 0);
        check_all(&[70_000, 3], &[1, 70_000], 0);
    }

    #[test]
    fn a_region_that_meets_itself_is_refused() {
        assert!(is_nested(&[3, 4], &[4, 1]) && is_nested(&[3, 4], &[1, 3]) && is_nested(&[1, 4], &[0, 1]));
        assert!(!is_nested(&[3, 4], &[0, 1]) && !is_nested(&[3, 4], &[3, 1]));
    }
}
