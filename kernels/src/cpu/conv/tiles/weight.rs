//! Weight gradient: for each tap and each block of 32 source by 32 target channels, a product over pixels.
//!
//! Both factors are packed with neighbouring pixels in an entry. Sources lie channel by channel, each channel's cells in a row: a tap moves
//! the row's start. Targets are chunks of B on the same flat run of cells; where there is no target there are zeros.
//! Sums over all units are cut into parts by the shape alone; each part goes to memory of its own, and the parts are added in order.

use super::super::super::gemm::pack::Strip;
use super::super::super::gemm::split::{self, Magnitudes, Side, TERMS};
use super::super::class::{classes, phases};
use super::super::{Gather, part_start};
use super::are_finite;
use super::gather::merged;
use super::grid::Grid;
use super::image::{self, CopyRows, Unit, each_row};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::amx::gathered::{Rows, products};
use crate::cpu::amx::{Block, CHUNK, ENTRIES, SIDE, Session};
use crate::cpu::isa::dispatch_widest;
use crate::cpu::parallel::{self, SharedMut};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a unit's packed sources and targets: a part of an L2 of 2 MiB.
const UNIT_BYTES: usize = 1 << 20;

/// Tasks that a call is cut into if it has the images or the channels for it.
const TASKS: usize = 8;

/// Sums that all parts together may take: 64 MiB.
const SUMS: usize = 16 << 20;

/// Sums of a block of channels.
const BLOCK: usize = SIDE * SIDE;

/// See [`super::super::weight_grad`], of the gather of a forward pass. `false`, and `gw` as it was, if the values are not for tiles.
pub(in super::super) fn weight_grad<const PARTS: usize>(g: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    let g = &merged(g);
    let axes = phases(g);
    let classes = classes(g, &axes);
    let [class] = classes.as_slice() else { return Ok(false) };
    let mut grid = Grid::new(g, &axes, true);
    let (from_blocks, to_blocks) = (g.cin.div_ceil(SIDE), g.cout.div_ceil(SIDE));
    let cell = 2 * PARTS * SIDE * (from_blocks + to_blocks);
    let units = image::units(g, &mut grid, true, cell, UNIT_BYTES, TASKS);
    let padded = g.groups * g.taps() * from_blocks * to_blocks * BLOCK;
    let splits = units.len().min(TASKS).min(SUMS / padded).max(1);
    let ranges = TASKS.div_ceil(splits * g.groups).min(to_blocks);
    let (tasks, taps) = (splits * g.groups * ranges, g.taps());
    let task_len = taps * from_blocks * to_blocks.div_ceil(ranges) * BLOCK;
    let mut sums = Buffer::new(size_of::<f32>() * tasks * task_len)?;
    let run = Run { g, grid: &grid, x, gy, taps: &grid.offsets(class), from_blocks };
    let (failed, out_of_memory) = (AtomicBool::new(false), OnceLock::new());
    let ns = g.target_pixels() * g.groups * g.cout * g.cin * g.taps() * PARTS / 400;
    parallel::for_each_chunk(sums.as_slice_mut::<f32>(), task_len, ns, |i, sums| {
        let (i, range) = (i / ranges, i % ranges);
        let (group, split) = (i % g.groups, i / g.groups);
        let units = &units[part_start(units.len(), splits, split)..part_start(units.len(), splits, split + 1)];
        let cols = part_start(to_blocks, ranges, range)..part_start(to_blocks, ranges, range + 1);
        for (i, unit) in units.iter().enumerate() {
            if failed.load(Ordering::Relaxed) {
                return;
            }
            match run.unit::<PARTS>(unit, group, cols.clone(), i > 0, sums) {
                Ok(true) => {}
                Ok(false) => failed.store(true, Ordering::Relaxed),
                Err(error) => _ = out_of_memory.set(error),
            }
        }
    });
    if let Some(error) = out_of_memory.into_inner() {
        return Err(error);
    }
    if failed.into_inner() {
        return Ok(false);
    }
    let order: Vec<usize> = class.taps(g.kernel).collect();
    let merge = Merge { g, sums: sums.as_slice(), task_len, splits, ranges, from_blocks, to_blocks, order: &order };
    let out = SharedMut::new(gw);
    let blocks = g.groups * to_blocks * from_blocks;
    parallel::for_each(blocks, padded * (splits + 4) / 4, |i| {
        let (i, from) = (i / from_blocks, i % from_blocks);
        merge.block(i / to_blocks, i % to_blocks, from, out);
    });
    Ok(true)
}

struct Run<'a> {
    g: &'a Gather,
    grid: &'a Grid,
    x: &'a [f32],
    gy: &'a [f32],
    /// For each tap, cells from a target to its source.
    taps: &'a [usize],
    from_blocks: usize,
}

impl Run<'_> {
    /// Adds the products of a unit to `[block of target channels][block of source channels][tap]`, or writes them there; `false` if its
    /// values are not for tiles.
    fn unit<const PARTS: usize>(
        &self,
        unit: &Unit,
        group: usize,
        cols: Range<usize>,
        add: bool,
        sums: &mut [f32],
    ) -> Result<bool, OutOfMemory> {
        let (g, grid) = (self.g, self.grid);
        let finite = |images: &[f32]| {
            let len = images.len() / g.n;
            are_finite(&images[unit.images.start * len..unit.images.end * len])
        };
        // One part is made of any value, and what is between targets is multiplied with zeros.
        if PARTS == 1 && unit.start == [0; 3] && !(finite(self.x) && finite(self.gy)) {
            return Ok(false);
        }
        let targets = std::array::from_fn(|i| grid.band[i].min(g.target[i] - unit.start[i]));
        let steps = grid.run(targets).div_ceil(TERMS);
        // The last step reads beyond the last target. Rows an odd number of lines apart fall on all sets of the cache.
        let pitch = (2 * (grid.len() + 2 * TERMS)).div_ceil(64) | 1;
        let source = Sources { pitch: pitch * 64, blocks: self.from_blocks };
        let image = source.image_bytes::<PARTS>();
        let mut a = Buffer::zeroed(unit.images.len() * image)?;
        let mut b = Buffer::zeroed(cols.len() * unit.images.len() * steps * PARTS * CHUNK)?;
        let x_seen = source.pack::<PARTS>(g, grid, unit, group, self.x, a.as_bytes_mut());
        let y_seen = self.pack_targets::<PARTS>(unit, targets, group, cols.clone(), steps, b.as_slice_mut());
        if !split::multiplies::<PARTS>(x_seen, y_seen, g.target_pixels()) {
            return Ok(false);
        }
        let session = Session::begin();
        let offsets: Vec<usize> = (0..unit.images.len()).flat_map(|i| (0..steps).map(move |step| i * image + 2 * TERMS * step)).collect();
        let mut blocks = sums.as_chunks_mut::<BLOCK>().0.iter_mut();
        for col in 0..cols.len() {
            let b = b.as_bytes()[col * offsets.len() * PARTS * CHUNK..].as_ptr();
            for from in 0..self.from_blocks {
                for tap in self.taps {
                    let Some(block) = blocks.next() else { return Ok(true) };
                    let base = a.as_bytes()[from * source.block_bytes::<PARTS>() + 2 * tap..].as_ptr();
                    let rows =
                        Rows { base, row: source.pitch, half: SIDE / 2 * source.pitch, part: SIDE * source.pitch, offsets: &offsets };
                    let block = Block { first: block.as_mut_ptr(), row_stride: SIDE, add };
                    // SAFETY: a channel's row holds all cells and TERMS beyond, from the cell of any target under any tap; B has a
                    // chunk for each step; sums that are added to were written by the first unit.
                    unsafe { products::<PARTS>(&session, &rows, b, block) };
                }
            }
        }
        Ok(true)
    }

    /// Packs targets as `[block of channels][image][step]` chunks, where there are zeros.
    fn pack_targets<const PARTS: usize>(
        &self,
        unit: &Unit,
        targets: [usize; 3],
        group: usize,
        cols: Range<usize>,
        steps: usize,
        out: &mut [f32],
    ) -> Magnitudes {
        let (g, grid) = (self.g, self.grid);
        let mut seen = Magnitudes::NONE;
        let mut chunk = [[[0f32; SIDE]; ENTRIES]; 3];
        for (i, out) in out.chunks_exact_mut(steps * PARTS * CHUNK / size_of::<f32>()).enumerate() {
            let (col, image) = ((cols.start + i / unit.images.len()) * SIDE, unit.images.start + i % unit.images.len());
            let (out, _) = out.as_chunks_mut::<SIDE>();
            for (d, h) in (0..targets[0]).flat_map(|d| (0..targets[1]).map(move |h| (d, h))) {
                let line = (image * g.target[0] + unit.start[0] + d) * g.target[1] + unit.start[1] + h;
                for w in (0..targets[2]).step_by(TERMS) {
                    let pixel = line * g.target[2] + unit.start[2] + w;
                    let strip = Strip {
                        src: self.gy[(pixel * g.groups + group) * g.cout + col..].as_ptr(),
                        lanes: SIDE.min(g.cout - col),
                        lane_stride: 1,
                        k: TERMS.min(targets[2] - w),
                        k_stride: g.groups * g.cout,
                    };
                    // Rows have an even number of cells, so a target in an even place is the first of an entry.
                    let first = ((d * grid.cells[1] + h) * grid.cells[2] + w) / 2;
                    // SAFETY: the strip's targets lie in a line; the chunk holds three parts.
                    seen = seen.union(unsafe { split::pack::<f32, PARTS>(Side::B, strip, chunk.as_mut_ptr().cast()) });
                    for (part, chunk) in chunk[..PARTS].iter().enumerate() {
                        for (i, entry) in chunk[..strip.k.div_ceil(2)].iter().enumerate() {
                            let at = first + i;
                            out[(at / ENTRIES * PARTS + part) * ENTRIES + at % ENTRIES] = *entry;
                        }
                    }
                }
            }
        }
        seen
    }
}

/// Sources packed as `[image][block of 32 channels][part][channel][cell]`.
struct Sources {
    /// Bytes of a channel.
    pitch: usize,
    blocks: usize,
}

impl Sources {
    fn block_bytes<const PARTS: usize>(&self) -> usize {
        PARTS * SIDE * self.pitch
    }

    fn image_bytes<const PARTS: usize>(&self) -> usize {
        self.blocks * self.block_bytes::<PARTS>()
    }

    /// Packs a unit's sources where there are zeros.
    fn pack<const PARTS: usize>(&self, g: &Gather, grid: &Grid, unit: &Unit, group: usize, x: &[f32], out: &mut [u8]) -> Magnitudes {
        let mut seen = Magnitudes::NONE;
        let mut chunk = [[[0f32; ENTRIES]; SIDE]; 3];
        for (i, out) in out.chunks_exact_mut(self.block_bytes::<PARTS>()).enumerate() {
            let (image, first) = (unit.images.start + i / self.blocks, i % self.blocks * SIDE);
            let channels = SIDE.min(g.cin - first);
            each_row(g, grid, unit.start, image, |row, sources| {
                let Some((inside, source)) = sources else { return };
                let pixel_stride = grid.axes[2].increment * g.groups * g.cin;
                for cell in inside.clone().step_by(TERMS) {
                    let src = &x[(source * g.groups + group) * g.cin + first + (cell - inside.start) * pixel_stride..];
                    let k = TERMS.min(inside.end - cell);
                    let strip = Strip { src: src.as_ptr(), lanes: channels, lane_stride: 1, k, k_stride: pixel_stride };
                    // SAFETY: the strip's pixels lie in a line; the chunk holds three parts.
                    seen = seen.union(unsafe { split::pack::<f32, PARTS>(Side::A, strip, chunk.as_mut_ptr().cast()) });
                    // What is copied beyond the strip is zero: cells that are written later, or have no source.
                    let to = &mut out[2 * (row + cell)..];
                    let (row_stride, part_stride) = (self.pitch, SIDE * self.pitch);
                    dispatch_widest(CopyRows { from: &chunk[..PARTS], rows: channels, to, row_stride, part_stride });
                }
            });
        }
        seen
    }
}

/// Adds the parts of all sums and puts them where they belong.
struct Merge<'a> {
    g: &'a Gather,
    sums: &'a [f32],
    task_len: usize,
    splits: usize,
    ranges: usize,
    from_blocks: usize,
    to_blocks: usize,
    /// The taps in the order of the sums.
    order: &'a [usize],
}

impl Merge<'_> {
    /// The weights between two blocks of channels of a group.
    fn block(&self, group: usize, to: usize, from: usize, out: SharedMut<f32>) {
        /// From the sums of a tap to those of the next, such that they fall on different sets of the cache.
        const STRIDE: usize = BLOCK + 16;
        let g = self.g;
        let range = (0..self.ranges).rfind(|&range| part_start(self.to_blocks, self.ranges, range) <= to).unwrap_or(0);
        let first = ((to - part_start(self.to_blocks, self.ranges, range)) * self.from_blocks + from) * self.order.len() * BLOCK;
        let mut total = vec![0f32; self.order.len() * STRIDE];
        for split in 0..self.splits {
            let task = (split * g.groups + group) * self.ranges + range;
            let part = &self.sums[task * self.task_len + first..][..self.order.len() * BLOCK];
            for (total, part) in total.chunks_exact_mut(STRIDE).zip(part.as_chunks::<BLOCK>().0) {
                total.iter_mut().zip(part).for_each(|(total, part)| *total += part);
            }
        }
        for j in 0..SIDE.min(g.cout - to * SIDE) {
            for c in 0..SIDE.min(g.cin - from * SIDE) {
                let at = g.group_start(group) + (from * SIDE + c) * g.in_stride + (to * SIDE + j) * g.out_stride;
                for (&tap, total) in self.order.iter().zip(total.chunks_exact(STRIDE)) {
                    // SAFETY: the weights lie in `gw`, and those between two blocks belong to one call.
                    unsafe { out.add(at + tap).get().write(total[c * SIDE + j]) };
                }
            }
        }
    }
}
