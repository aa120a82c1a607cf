//! Forward pass and input gradient: for each block of 32 targets and 32 of their channels, all taps and source channels are summed in
//! tiles and stored once.

use super::super::super::gemm::pack::{Strip, pack};
use super::super::super::gemm::split::{self, Magnitudes, Side, TERMS};
use super::super::class::{Class, classes, phases};
use super::super::{Gather, part_start};
use super::are_finite;
use super::grid::Grid;
use super::image::{self, CELL, Unit};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::amx::gathered::{Rows, products};
use crate::cpu::amx::{CHUNK, SIDE, Session, Sums};
use crate::cpu::isa::{WithSimd, dispatch_widest};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::{F32s, Simd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a unit's packed sources: with the weights of some columns they fit an L2 of 2 MiB.
const UNIT_BYTES: usize = 768 << 10;

/// Tasks that a call is cut into if it has the images for it.
const TASKS: usize = 16;

/// See [`super::super::forward`]; `vectors` computes the images that tiles cannot: it gets a gather of some images, their sources and their targets.
pub(in super::super) fn gather<const PARTS: usize>(
    g: &Gather,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    vectors: impl Fn(&Gather, &[f32], &mut [f32]) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    // One part is made of any value, and padding is multiplied with all weights.
    if PARTS == 1 && !are_finite(w) {
        return vectors(g, x, y);
    }
    let g = &merged(g);
    let axes = phases(g);
    let classes = classes(g, &axes);
    let mut grid = Grid::new(g, &axes, false);
    let units = image::units(g, &mut grid, false, g.cin.div_ceil(TERMS) * PARTS * CELL, UNIT_BYTES, TASKS);
    let weights = Weights::new::<PARTS>(g, &classes, w)?;
    let plans = classes.iter().map(|class| Plan::new::<PARTS>(g, &grid, class)).collect::<Vec<_>>();
    let failed: Vec<AtomicBool> = (0..g.n).map(|_| AtomicBool::new(false)).collect();
    let col_blocks = g.cout.div_ceil(SIDE);
    let splits = TASKS.div_ceil(units.len() * g.groups).min(col_blocks);
    let (source, target) = (x.len() / g.n, y.len() / g.n);
    let run = Run { g, x, bias, y: SharedMut::new(y), target_len: target, grid: &grid, weights: &weights, plans: &plans };
    let ns = g.target_pixels() * g.groups * g.cout * g.cin * g.taps_per_target() * PARTS / 400;
    let out_of_memory = OnceLock::new();
    parallel::for_each(units.len() * g.groups * splits, ns, |i| {
        let (i, split) = (i / splits, i % splits);
        let (unit, group) = (&units[i / g.groups], i % g.groups);
        match run.unit::<PARTS>(unit, group, part_start(col_blocks, splits, split)..part_start(col_blocks, splits, split + 1)) {
            Ok(true) => {}
            Ok(false) => unit.images.clone().for_each(|image| failed[image].store(true, Ordering::Relaxed)),
            Err(error) => _ = out_of_memory.set(error),
        }
    });
    if let Some(error) = out_of_memory.into_inner() {
        return Err(error);
    }
    for images in failed.iter().map(|f| f.load(Ordering::Relaxed)).enumerate().collect::<Vec<_>>().chunk_by(|a, b| a.1 == b.1) {
        let (first, count) = (images[0].0, images.len());
        if images[0].1 {
            let some = Gather { n: count, ..g.clone() };
            vectors(&some, &x[first * source..][..count * source], &mut y[first * target..][..count * target])?;
        }
    }
    Ok(())
}

/// Without windows, images are rows of pixels: so many of them are taken as one that hardly a tile is cut short.
pub(super) fn merged(g: &Gather) -> Gather {
    let pixels = g.target.iter().product::<usize>();
    let full = |count: usize| (count * pixels).is_multiple_of(SIDE) || count * pixels > 20 * SIDE;
    match (1..=g.n).find(|&count| g.n.is_multiple_of(count) && full(count)) {
        Some(count) if g.has_no_windows() => {
            let row = [1, 1, count * pixels];
            Gather { n: g.n / count, source: row, target: row, ..g.clone() }
        }
        _ => g.clone(),
    }
}

/// The weights as chunks of B, `[group][block of target channels][class][block of source channels][tap]`.
struct Weights {
    buffer: Buffer,
    /// For each class, its first chunk in a block of target channels.
    starts: Vec<usize>,
    /// Bytes of a block of target channels.
    block: usize,
    col_blocks: usize,
    seen: Magnitudes,
}

impl Weights {
    fn new<const PARTS: usize>(g: &Gather, classes: &[Class], w: &[f32]) -> Result<Self, OutOfMemory> {
        let (blocks, col_blocks, chunk) = (g.cin.div_ceil(TERMS), g.cout.div_ceil(SIDE), PARTS * CHUNK);
        let mut starts = vec![0];
        for class in classes {
            starts.push(starts.last().map_or(0, |start| start + blocks * class.tap_count()));
        }
        let block = starts.pop().unwrap_or(0) * chunk;
        let mut buffer = Buffer::new(g.groups * col_blocks * block)?;
        let tasks = g.groups * col_blocks * blocks;
        let mut seen = vec![Magnitudes::NONE; tasks];
        let (out, shared) = (SharedMut::new(buffer.as_bytes_mut()), SharedMut::new(&mut seen));
        parallel::for_each(tasks, w.len() * PARTS / 2, |task| {
            let (cols, from) = (task / blocks, task % blocks);
            let (group, col) = (cols / col_blocks, cols % col_blocks * SIDE);
            let src = &w[g.group_start(group) + from * TERMS * g.in_stride + col * g.out_stride..];
            let (lanes, k) = (SIDE.min(g.cout - col), TERMS.min(g.cin - from * TERMS));
            let mut local = vec![0f32; if g.taps() > 1 { SIDE * TERMS * g.taps() } else { 0 }];
            let first = gathered(g, src, lanes, k, &mut local);
            let mut all = Magnitudes::NONE;
            for (class, start) in classes.iter().zip(&starts) {
                let taps = class.tap_count();
                for (i, tap) in class.taps(g.kernel).enumerate() {
                    let strip = Strip {
                        src: first.src.wrapping_add(tap * first.tap_stride),
                        lanes,
                        lane_stride: first.lane_stride,
                        k,
                        k_stride: first.k_stride,
                    };
                    // SAFETY: the strip's weights are those of the tap between existing channels; each chunk is written by one task only.
                    all = all.union(unsafe {
                        split::pack::<f32, PARTS>(Side::B, strip, out.add(cols * block + (start + from * taps + i) * chunk).get().cast())
                    });
                }
            }
            // SAFETY: each task has a value of its own.
            unsafe { shared.add(task).get().write(all) };
        });
        let seen = seen.into_iter().fold(Magnitudes::NONE, Magnitudes::union);
        Ok(Self { buffer, starts, block, col_blocks, seen })
    }

    fn at(&self, group: usize, col_block: usize, class: usize, chunk: usize) -> *const u8 {
        self.buffer.as_bytes()[(group * self.col_blocks + col_block) * self.block + self.starts[class] * chunk..].as_ptr()
    }
}

/// Where weight `(k, lane, tap)` lies.
struct Taps {
    src: *const f32,
    lane_stride: usize,
    k_stride: usize,
    tap_stride: usize,
}

/// The weights between `k` source and `lanes` target channels, the first of which is `src`'s first: copied to `local` if there are several
/// taps, as neighbouring channels then lie far apart.
fn gathered(g: &Gather, src: &[f32], lanes: usize, k: usize, local: &mut [f32]) -> Taps {
    let taps = g.taps();
    if taps == 1 {
        return Taps { src: src.as_ptr(), lane_stride: g.out_stride, k_stride: g.in_stride, tap_stride: 1 };
    }
    if g.in_stride == taps {
        let strip = Strip { src: src.as_ptr(), lanes, lane_stride: g.out_stride, k: k * taps, k_stride: 1 };
        dispatch_widest(Transpose { strip, to: local });
        return Taps { src: local.as_ptr(), lane_stride: 1, k_stride: taps * SIDE, tap_stride: SIDE };
    }
    for (i, row) in local.chunks_exact_mut(SIDE * taps).take(k).enumerate() {
        row[..lanes * taps].copy_from_slice(&src[i * g.in_stride..][..lanes * taps]);
    }
    Taps { src: local.as_ptr(), lane_stride: taps, k_stride: SIDE * taps, tap_stride: 1 }
}

/// Transposes a readable strip of weights to rows of SIDE.
struct Transpose<'a> {
    strip: Strip,
    to: &'a mut [f32],
}

impl WithSimd for Transpose<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        assert!(self.strip.k * SIDE <= self.to.len());
        // SAFETY: whoever made it vouches for the strip; there is room for its rows.
        unsafe { pack(s, self.strip, SIDE, self.to.as_mut_ptr()) };
    }
}

/// How the targets of a class are computed.
struct Plan<'a> {
    class: &'a Class<'a>,
    /// Bytes from the cell of a target to the sources of each step.
    offsets: Vec<usize>,
}

impl<'a> Plan<'a> {
    fn new<const PARTS: usize>(g: &Gather, grid: &Grid, class: &'a Class<'a>) -> Self {
        let taps = grid.offsets(class);
        let blocks = 0..g.cin.div_ceil(TERMS);
        let offsets =
            blocks.flat_map(|block| taps.iter().map(move |tap| (block, tap))).map(|(block, tap)| (block * grid.len() + tap) * PARTS * CELL);
        Self { class, offsets: offsets.collect() }
    }
}

struct Run<'a> {
    g: &'a Gather,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
    /// Values of an image of targets.
    target_len: usize,
    grid: &'a Grid,
    weights: &'a Weights,
    plans: &'a [Plan<'a>],
}

impl Run<'_> {
    /// Computes blocks of target channels of a unit; `false` if its values are not for tiles.
    fn unit<const PARTS: usize>(&self, unit: &Unit, group: usize, cols: std::ops::Range<usize>) -> Result<bool, OutOfMemory> {
        let (g, cell) = (self.g, PARTS * CELL);
        let image = g.cin.div_ceil(TERMS) * self.grid.len() * cell;
        let len = unit.images.len() * image;
        // The last tiles read beyond the last target.
        let mut packed = Buffer::new(len + SIDE * cell)?;
        packed.as_bytes_mut()[len..].fill(0);
        let seen = image::pack::<PARTS>(g, self.grid, unit, group, self.x, &mut packed.as_bytes_mut()[..len]);
        if !split::multiplies::<PARTS>(seen, self.weights.seen, g.cin * g.taps()) {
            return Ok(false);
        }
        let targets: Vec<Vec<usize>> = self.plans.iter().map(|plan| self.targets(plan.class, unit.start)).collect();
        let session = Session::begin();
        for col_block in cols {
            let (col, count) = (group * g.cout + col_block * SIDE, SIDE.min(g.cout - col_block * SIDE));
            let bias = self.bias.map(|bias| &bias[col..col + count]);
            for (class, (plan, targets)) in self.plans.iter().zip(&targets).enumerate() {
                let b = self.weights.at(group, col_block, class, PARTS * CHUNK);
                for (i, at) in unit.images.clone().enumerate() {
                    let y = self.y.get().wrapping_add(at * self.target_len + col);
                    self.class::<PARTS>(&session, &plan.offsets, targets, &packed.as_bytes()[i * image..], b, Columns { y, count, bias });
                }
            }
        }
        Ok(true)
    }

    /// The targets of a class in one image, which lie where `targets` says relative to `y`.
    fn class<const PARTS: usize>(&self, session: &Session, offsets: &[usize], targets: &[usize], packed: &[u8], b: *const u8, to: Columns) {
        let cell = PARTS * CELL;
        let mut sums = Sums::default();
        for (first, rows) in targets.chunks(SIDE).enumerate().map(|(i, rows)| (i * SIDE, rows)) {
            if rows.iter().all(|&row| row == NONE) {
                continue;
            }
            if !offsets.is_empty() {
                let a = Rows { base: packed[first * cell..].as_ptr(), row: cell, half: SIDE / 2 * cell, part: CELL, offsets };
                // SAFETY: from the cell of the last target, under any tap, SIDE cells are readable: those of the image, of the next, or the
                // room behind the last. B has a chunk for each step.
                unsafe { products::<PARTS>(session, &a, b, sums.block()) };
            }
            dispatch_widest(Store { sums: &sums, rows, to: &to });
        }
    }

    /// Where the targets on a class' run lie: values from where their image starts, [`NONE`] for cells that have no target.
    fn targets(&self, class: &Class, start: [usize; 3]) -> Vec<usize> {
        let (g, grid) = (self.g, self.grid);
        let counts = grid.targets(class, start);
        let mut run = vec![NONE; grid.run(counts)];
        for (d, h) in (0..counts[0]).flat_map(|d| (0..counts[1]).map(move |h| (d, h))) {
            let cells = &mut run[(d * grid.cells[1] + h) * grid.cells[2]..][..counts[2]];
            let line = class.axes[0].target(start[0] + d) * g.target[1] + class.axes[1].target(start[1] + h);
            for (w, cell) in cells.iter_mut().enumerate() {
                *cell = (line * g.target[2] + class.axes[2].target(start[2] + w)) * g.groups * g.cout;
            }
        }
        run
    }
}

/// In place of a target.
const NONE: usize = usize::MAX;

/// Some channels of an image.
struct Columns<'a> {
    /// The first channel of the first pixel.
    y: *mut f32,
    count: usize,
    bias: Option<&'a [f32]>,
}

struct Store<'a> {
    sums: &'a Sums<f32>,
    /// Where the rows of sums go, as far as there are any.
    rows: &'a [usize],
    to: &'a Columns<'a>,
}

impl WithSimd for Store<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Columns { y, count, bias } = *self.to;
        for first in (0..count).step_by(S::LANES) {
            let lanes = S::LANES.min(count - first);
            let bias = bias.map_or(s.zero(), |bias| s.load_slice_partial(&bias[first..first + lanes]));
            for (sums, &row) in self.sums.0.as_chunks::<SIDE>().0.iter().zip(self.rows).filter(|&(_, &row)| row != NONE) {
                // SAFETY: SIDE is a multiple of LANES; a target has `count` channels there, which belong to one unit and block of channels.
                unsafe {
                    let (sum, row) = (s.load(sums.as_ptr().add(first)) + bias, y.add(row + first));
                    if lanes == S::LANES { sum.store(row) } else { sum.store_partial(row, lanes) }
                }
            }
        }
    }
}
