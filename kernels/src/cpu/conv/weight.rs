//! The weight gradient of a gather, `gw[c][j][tap] = Σ_o source[s(o, tap)][c] · target[o][j]`, by the micro-kernel's outer form:
//! a tile of source channels × target channels stays in registers while the pixels of a chunk run by.
//!
//! Sums over all pixels are cut into parts by the shape alone; each part goes to a buffer of its own, and the parts are
//! added in order. With few source channels, a target's sources under all taps are first copied side by side, so that
//! taps and channels together make the rows of a tile.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::{Init, MAX_MR, MAX_NR, MicroKernels, OuterTile, Output, Values};
use super::super::isa::dispatch;
use super::super::parallel::{self, SharedMut};
use super::class::{self, Class};
use super::patch::Patches;
use super::{Gather, part_start};

/// With fewer source channels the taps of a pixel are copied side by side: the copy costs less than each pixel's addresses, tap by tap.
const PATCH_CHANNELS: usize = 33;

/// Pixels whose addresses are gathered at once: enough that loading and storing a tile does not count (24 against
/// 256 · 24 multiply-adds), few enough that their values stay in L2 for all tiles.
const CHUNK: usize = 256;

/// Target channels of a task: two panels of AVX-512.
pub(super) const TASK_COLS: usize = 64;

/// Tasks that a call is cut into if it has the pixels for it.
const MIN_TASKS: usize = 16;

/// Fewest pixels of a part: below, writing and adding the parts would cost as much as the products.
const MIN_PIXELS: usize = 512;

/// How many parts `pixels` are cut into if there are `tasks` tasks already.
pub(super) fn splits(pixels: usize, tasks: usize) -> usize {
    MIN_TASKS.div_ceil(tasks.max(1)).min(pixels / MIN_PIXELS).max(1)
}

/// `x` is the source image of `forward` and the target image of `transposed`, `gy` the other; see [`super::weight_grad`]. Images hold what
/// `kernels` multiply.
pub(super) fn weight_grad(
    kernels: &'static MicroKernels,
    forward: &Gather,
    transposed: &Gather,
    x: &[f32],
    gy: &[f32],
    gw: &mut [f32],
) -> Result<(), OutOfMemory> {
    let swapped = transposed.cin < PATCH_CHANNELS && transposed.cin < forward.cin;
    let (g, x, gy) = if swapped { (transposed, gy, x) } else { (forward, x, gy) };
    let tail = Tail::of(gy);
    let outer = Outer { kernels, g, x, gy, tail: &tail };
    if g.cin < PATCH_CHANNELS && g.taps() > 1 { outer.by_patch(gw) } else { outer.by_tap(gw) }
}

/// The end of an image once more, with room behind it: a micro-kernel reads whole panels.
struct Tail {
    start: usize,
    limit: usize,
    values: [f32; 2 * MAX_NR],
}

impl Tail {
    fn of(image: &[f32]) -> Self {
        let start = image.len().saturating_sub(MAX_NR);
        let mut values = [0.0; 2 * MAX_NR];
        values[..image.len() - start].copy_from_slice(&image[start..]);
        Self { start, limit: image.len(), values }
    }

    /// Addresses where `image[at + first..]` can be read for `width` values at least, for each `at`.
    fn addresses(&self, image: &[f32], at: &[usize], first: usize, width: usize, out: &mut Vec<*const f32>) {
        out.clear();
        let furthest = at.iter().max().map_or(0, |&at| at + first + width);
        if furthest <= self.limit {
            out.extend(at.iter().map(|&at| image.as_ptr().wrapping_add(at + first)));
        } else {
            let one = |at: usize| if at + width <= self.limit { image[at..].as_ptr() } else { self.values[at - self.start..].as_ptr() };
            out.extend(at.iter().map(|&at| one(at + first)));
        }
    }
}

struct Outer<'a> {
    kernels: &'static MicroKernels,
    g: &'a Gather,
    x: &'a [f32],
    gy: &'a [f32],
    tail: &'a Tail,
}

/// A block of a matrix in memory that tiles are added to.
struct Sum<'a> {
    values: &'a mut [f32],
    rows: usize,
    cols: usize,
}

impl Outer<'_> {
    /// Target channels of a group that one task takes, and how many such blocks there are.
    fn col_blocks(&self) -> usize {
        self.g.cout.div_ceil(TASK_COLS)
    }

    fn cols(&self, block: usize) -> std::ops::Range<usize> {
        let first = block * TASK_COLS;
        first..(first + TASK_COLS).min(self.g.cout)
    }

    /// A task for each group, tap, block of target channels, and part of the pixels.
    fn by_tap(&self, gw: &mut [f32]) -> Result<(), OutOfMemory> {
        let (g, taps, blocks) = (self.g, self.g.taps(), self.col_blocks());
        let splits = splits(g.target_pixels() / (g.taps() / g.taps_per_target()).max(1), g.groups * taps * blocks);
        let part = Parts { taps, groups: g.groups, blocks, splits };
        let task_len = g.cin * TASK_COLS;
        let mut buffer = Buffer::new(size_of::<f32>() * part.tasks() * task_len)?;
        let sums = buffer.as_slice_mut::<f32>();
        let ns = g.target_pixels() * g.groups * g.cin * g.cout * g.taps_per_target() / 50;
        parallel::for_each_chunk(sums, task_len, ns, |i, values| {
            let (split, group, tap, block) = part.locate(i);
            let cols = self.cols(block);
            self.tap(group, tap, cols.clone(), (split, splits), &mut Sum { values, rows: g.cin, cols: cols.len() });
        });
        self.merge(&part, sums, g.cin, |tap, c| Some((tap, c)), gw);
        Ok(())
    }

    /// The products of one tap over one part of its pixels.
    fn tap(&self, group: usize, tap: usize, cols: std::ops::Range<usize>, (split, splits): (usize, usize), sum: &mut Sum) {
        let g = self.g;
        let tap = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
        let [d, h, w]: [Vec<(usize, usize)>; 3] = std::array::from_fn(|i| g.axes[i].pairs(tap[i], g.target[i], g.source[i]));
        let pixels = g.n * d.len() * h.len() * w.len();
        let (mut a, mut b) = (Vec::with_capacity(CHUNK), Vec::with_capacity(CHUNK));
        let mut tiles = Tiles::new(sum);
        let (start, end) = (part_start(pixels, splits, split), part_start(pixels, splits, split + 1));
        let mut pixel = start;
        while pixel < end {
            // A row of pixels, or what the part holds of it.
            let (line, pw) = (pixel / w.len(), pixel % w.len());
            let (plane, ph) = (line / h.len(), line % h.len());
            let (image, pd) = (plane / d.len(), plane % d.len());
            let target = ((image * g.target[0] + d[pd].0) * g.target[1] + h[ph].0) * g.target[2];
            let source = ((image * g.source[0] + d[pd].1) * g.source[1] + h[ph].1) * g.source[2];
            for &(tw, sw) in &w[pw..w.len().min(pw + end - pixel)] {
                a.push(self.x[((source + sw) * g.groups + group) * g.cin..][..g.cin].as_ptr());
                b.push(((target + tw) * g.groups + group) * g.cout + cols.start);
                pixel += 1;
                if a.len() == CHUNK {
                    // SAFETY: each address of A has `cin` readable values, each offset of B lies in `gy` with `cols` values.
                    unsafe { tiles.add(self, &a, &b) };
                    a.clear();
                    b.clear();
                }
            }
        }
        // SAFETY: as above.
        unsafe { tiles.add(self, &a, &b) };
        tiles.finish();
    }

    /// A task for each group, block of target channels, and part of the pixels: all taps at once.
    fn by_patch(&self, gw: &mut [f32]) -> Result<(), OutOfMemory> {
        let (g, blocks) = (self.g, self.col_blocks());
        let axes = class::phases(g);
        let classes = class::classes(g, &axes);
        let order: Vec<usize> = classes.iter().flat_map(|c| c.taps(g.kernel)).collect();
        let splits = splits(g.target_pixels(), g.groups * blocks);
        let part = Parts { taps: 1, groups: g.groups, blocks, splits };
        let task_len = order.len() * g.cin * TASK_COLS;
        if task_len == 0 {
            gw.fill(0.0);
            return Ok(());
        }
        let mut buffer = Buffer::new(size_of::<f32>() * part.tasks() * task_len)?;
        let sums = buffer.as_slice_mut::<f32>();
        let ns = g.target_pixels() * g.groups * g.cin * (g.cout + 16) * g.taps_per_target() / 50;
        parallel::for_each_chunk(sums, task_len, ns, |i, mut values| {
            let (split, group, _, block) = part.locate(i);
            let cols = self.cols(block);
            for class in &classes {
                let rows = class.tap_count() * g.cin;
                let (own, rest) = values.split_at_mut(rows * cols.len());
                values = rest;
                self.patches(class, group, cols.clone(), (split, splits), &mut Sum { values: own, rows, cols: cols.len() });
            }
        });
        let slots: Vec<Option<usize>> = (0..g.taps()).map(|tap| order.iter().position(|&t| t == tap)).collect();
        self.merge(&part, sums, order.len() * g.cin, |tap, c| slots[tap].map(|slot| (0, slot * g.cin + c)), gw);
        Ok(())
    }

    /// The products of all taps of a class over one part of its pixels.
    fn patches(&self, class: &Class, group: usize, cols: std::ops::Range<usize>, (split, splits): (usize, usize), sum: &mut Sum) {
        let g = self.g;
        let len = sum.rows;
        if len == 0 {
            return;
        }
        let mut patches = vec![0f32; CHUNK * len];
        let a: Vec<*const f32> = patches.chunks_exact(len).map(<[f32]>::as_ptr).collect();
        let mut b = Vec::with_capacity(CHUNK);
        let mut tiles = Tiles::new(sum);
        let pixels = part_start(class.pixels, splits, split)..part_start(class.pixels, splits, split + 1);
        let channels = g.groups * g.cout;
        for start in pixels.clone().step_by(CHUNK) {
            let chunk = start..pixels.end.min(start + CHUNK);
            b.clear();
            for line in class.lines(chunk.clone()) {
                let first = class.first_target(g, &line) * channels + group * g.cout + cols.start;
                b.extend((0..line.count).map(|i| first + i * class.target_step() * channels));
            }
            let count = chunk.len();
            dispatch(Patches { g, x: self.x, class, group, pixels: chunk, out: &mut patches });
            // SAFETY: each address of A has a patch of `rows` values, each offset of B lies in `gy` with `cols` values.
            unsafe { tiles.add(self, &a[..count], &b) };
        }
        tiles.finish();
    }

    /// Adds the parts of each task in order and puts the sums where they belong; `place(tap, c)` gives the task and its row where the sums of a
    /// tap and source channel are, if there are any.
    fn merge(
        &self,
        part: &Parts,
        sums: &[f32],
        rows: usize,
        place: impl Fn(usize, usize) -> Option<(usize, usize)> + Sync,
        gw: &mut [f32],
    ) {
        let (g, taps, chunks) = (self.g, self.g.taps(), self.g.cin.div_ceil(MERGED_CHANNELS));
        let (task_len, elements) = (rows * TASK_COLS, gw.len());
        let out = SharedMut::new(gw);
        parallel::for_each(part.groups * part.blocks * chunks, elements * (part.splits + 1) / 2, |i| {
            let (i, chunk) = (i / chunks, i % chunks);
            let (group, block) = (i / part.blocks, i % part.blocks);
            let channels = chunk * MERGED_CHANNELS..((chunk + 1) * MERGED_CHANNELS).min(g.cin);
            let cols = self.cols(block);
            let mut merged = vec![0f32; channels.len() * taps * TASK_COLS];
            for (i, sum) in merged.chunks_exact_mut(TASK_COLS).enumerate() {
                let Some((tap, row)) = place(i % taps, channels.start + i / taps) else { continue };
                for split in 0..part.splits {
                    let at = part.index(split, group, tap, block) * task_len + row * cols.len();
                    for (sum, value) in sum.iter_mut().zip(&sums[at..at + cols.len()]) {
                        *sum += value;
                    }
                }
            }
            // SAFETY: each pair of channels belongs to one task.
            unsafe { put(g, group, channels, cols, &merged, out) };
        });
    }
}

/// Source channels that are merged at once: with all taps they are some lines of memory.
pub(super) const MERGED_CHANNELS: usize = 16;

/// Writes `weights`, `[source channel][tap][target channel]` with rows of [`TASK_COLS`], where they lie in a gradient that starts at `out`, in
/// the order of its memory.
///
/// # Safety
/// The gradient must be writable and these weights of it be nobody else's.
pub(super) unsafe fn put(
    g: &Gather,
    group: usize,
    channels: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    weights: &[f32],
    out: SharedMut<f32>,
) {
    let taps = g.taps();
    assert!(weights.len() == channels.len() * taps * TASK_COLS && cols.len() <= TASK_COLS && channels.end <= g.cin && cols.end <= g.cout);
    let pair = |c: usize, j: usize| {
        let start = g.group_start(group) + (channels.start + c) * g.in_stride + (cols.start + j) * g.out_stride;
        for tap in 0..taps {
            // SAFETY: the weight lies between existing channels; the rest is the caller's word.
            unsafe { out.add(start + tap).get().write(weights[(c * taps + tap) * TASK_COLS + j]) };
        }
    };
    if g.in_stride < g.out_stride {
        (0..cols.len()).for_each(|j| (0..channels.len()).for_each(|c| pair(c, j)));
    } else {
        (0..channels.len()).for_each(|c| (0..cols.len()).for_each(|j| pair(c, j)));
    }
}

/// How tasks are numbered.
struct Parts {
    taps: usize,
    groups: usize,
    blocks: usize,
    splits: usize,
}

impl Parts {
    fn tasks(&self) -> usize {
        self.taps * self.groups * self.blocks * self.splits
    }

    fn index(&self, split: usize, group: usize, tap: usize, block: usize) -> usize {
        ((split * self.groups + group) * self.taps + tap) * self.blocks + block
    }

    /// `(split, group, tap, block)` of a task.
    fn locate(&self, i: usize) -> (usize, usize, usize, usize) {
        let (i, block) = (i / self.blocks, i % self.blocks);
        let (i, tap) = (i / self.taps, i % self.taps);
        (i / self.groups, i % self.groups, tap, block)
    }
}

/// Adds chunk after chunk to a sum.
struct Tiles<'s, 'v> {
    sum: &'s mut Sum<'v>,
    init: Init,
    a: Vec<*const f32>,
    b: Vec<*const f32>,
}

impl<'s, 'v> Tiles<'s, 'v> {
    fn new(sum: &'s mut Sum<'v>) -> Self {
        Self { sum, init: Init::Zero, a: Vec::with_capacity(CHUNK), b: Vec::with_capacity(CHUNK) }
    }

    /// Adds the products of a chunk of pixels: addresses of A, offsets of B into the target image.
    ///
    /// # Safety
    /// Each address of `a` must be readable for the sum's rows.
    unsafe fn add(&mut self, outer: &Outer, a: &[*const f32], b: &[usize]) {
        if a.is_empty() {
            return;
        }
        let kernels = outer.kernels;
        let (rows, cols) = (self.sum.rows, self.sum.cols);
        let tiles = kernels.row_tiles(rows);
        for first in (0..cols).step_by(kernels.nr) {
            let width = (cols - first).min(kernels.nr);
            let readable = kernels.panel_width(width);
            outer.tail.addresses(outer.gy, b, first, readable, &mut self.b);
            for tile in 0..tiles.count {
                let (row, height) = (tiles.start(tile), tiles.height(tile));
                self.a.clear();
                self.a.extend(a.iter().map(|a| a.wrapping_add(row)));
                let mut c = [std::ptr::null_mut(); MAX_MR];
                for (r, c) in c[..height].iter_mut().enumerate() {
                    *c = self.sum.values[(row + r) * cols + first..][..width].as_mut_ptr();
                }
                let out = Output { c: c.as_ptr(), offset: 0, values: Values::F32, cols: width, alpha: 1.0, init: self.init };
                let tile = OuterTile { len: a.len(), a: self.a.as_ptr(), b: self.b.as_ptr(), out };
                // SAFETY: the caller vouches for A; `Tail::address` gives panels that are readable to their full width; the sum's
                // rows are disjoint and were written by the first chunk, which uses `Init::Zero`.
                unsafe { kernels.outer(height, &tile) }
            }
        }
        self.init = Init::C;
    }

    /// A part without pixels is zero.
    fn finish(self) {
        if matches!(self.init, Init::Zero) {
            self.sum.values[..self.sum.rows * self.sum.cols].fill(0.0);
        }
    }
}
