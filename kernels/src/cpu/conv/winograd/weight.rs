//! The weight gradient: outer products of transformed patches and transformed targets, summed place by place over all tiles.

use super::super::weight::{MERGED_CHANNELS, TASK_COLS, put};
use super::super::{Gather, part_start};
use super::gather::{place_len, row_len, transform};
use super::transform::{Check, load_places, of_targets, store_places, to_taps};
use super::{Grid, PATCH, PLACES, SIDE};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::micro::{Init, MAX_MR, MicroKernels, Output, Tile, Values};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::{F32s, Simd};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Source and target channels of a task: its sums, and the patches and targets of a chunk, fit an L2 of 1 MiB.
const CHANNELS: usize = TASK_COLS;

/// Tiles that are transformed at once.
const CHUNK: usize = 64;

/// Tasks that a call is cut into if it has the tiles for it.
const MIN_TASKS: usize = 16;

/// Fewest tiles of a part: below, writing and adding the parts would cost as much as the products.
const MIN_TILES: usize = 256;

/// See [`super::super::weight_grad`]; `x` is the source image, `gy` the target image. `false`, with nothing written, if values cannot be
/// transformed.
pub(in super::super) fn weight_grad(g: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    let Some(grid) = Grid::of(g) else { return Ok(false) };
    let blocks = [g.cin, g.cout].map(|channels| channels.div_ceil(CHANNELS));
    let count = blocks[0] * blocks[1];
    let splits = MIN_TASKS.div_ceil(count).min(grid.len() / MIN_TILES).max(1);
    let mut buffer = Buffer::new(size_of::<f32>() * splits * count * TASK)?;
    let sums = buffer.as_slice_mut::<f32>();
    let (failed, out_of_memory) = (AtomicBool::new(false), OnceLock::new());
    let run = Run { g, grid: &grid, x, gy };
    parallel::for_each_chunk(sums, TASK, grid.len() * PLACES * g.cin * g.cout / 50, |i, sums| {
        let (split, block) = (i / count, i % count);
        let tiles = part_start(grid.len(), splits, split)..part_start(grid.len(), splits, split + 1);
        match run.task(tiles, channels(block / blocks[1], g.cin), channels(block % blocks[1], g.cout), sums) {
            Ok(true) => {}
            Ok(false) => failed.store(true, Ordering::Relaxed),
            Err(error) => _ = out_of_memory.set(error),
        }
    });
    if let Some(error) = out_of_memory.into_inner() {
        return Err(error);
    }
    if failed.into_inner() {
        return Ok(false);
    }
    let (out, chunks) = (SharedMut::new(gw), CHANNELS / MERGED_CHANNELS);
    parallel::for_each(count * chunks, count * splits * TASK / 4, |i| {
        let (block, first) = (i / chunks, i % chunks * MERGED_CHANNELS);
        let (from, to) = (channels(block / blocks[1], g.cin), channels(block % blocks[1], g.cout));
        if first < from.len() {
            let rows = first..from.len().min(first + MERGED_CHANNELS);
            let mut merged = vec![0f32; rows.len() * 9 * CHANNELS];
            for (row, weights) in rows.clone().zip(merged.chunks_exact_mut(9 * CHANNELS)) {
                let parts = (0..splits).map(|split| &sums[(split * count + block) * TASK + row * CHANNELS..]);
                dispatch(Merge { grid: &grid, parts: parts.collect(), weights });
            }
            // SAFETY: each pair of channels belongs to one task.
            unsafe { put(g, 0, from.start + rows.start..from.start + rows.end, to, &merged, out) };
        }
    });
    Ok(true)
}

/// Values of a task's sums, `[place][source channel][target channel]`.
const TASK: usize = PLACES * CHANNELS * CHANNELS;

fn channels(block: usize, all: usize) -> Range<usize> {
    block * CHANNELS..((block + 1) * CHANNELS).min(all)
}

struct Run<'a> {
    g: &'a Gather,
    grid: &'a Grid,
    x: &'a [f32],
    gy: &'a [f32],
}

impl Run<'_> {
    /// The sums over some tiles for a block of source channels and one of target channels. Whether all values could be transformed.
    fn task(&self, tiles: Range<usize>, from: Range<usize>, to: Range<usize>, sums: &mut [f32]) -> Result<bool, OutOfMemory> {
        let chunk = CHUNK.min(tiles.len());
        let mut patches = Buffer::new(size_of::<f32>() * PLACES * place_len(chunk, row_len(from.len())))?;
        let mut targets = Buffer::new(size_of::<f32>() * PLACES * place_len(chunk, CHANNELS))?;
        let mut passed = true;
        for start in tiles.clone().step_by(CHUNK) {
            let part = start..tiles.end.min(start + CHUNK);
            let patches = &mut patches.as_slice_mut::<f32>()[..PLACES * place_len(part.len(), row_len(from.len()))];
            let targets = &mut targets.as_slice_mut::<f32>()[..PLACES * place_len(part.len(), CHANNELS)];
            passed &= transform(self.grid, self.x, self.g.cin, from.clone(), part.clone(), patches).is_empty();
            passed &= dispatch(Targets {
                grid: self.grid,
                y: self.gy,
                all: self.g.cout,
                channels: to.clone(),
                tiles: part.clone(),
                out: targets,
            });
            let init = if start == tiles.start { Init::Zero } else { Init::C };
            multiply(patches, from.len(), targets, to.len(), part.len(), sums, init);
        }
        Ok(passed)
    }
}

/// `sums[place][c][j] += Σ_tile patches[place][tile][c] · targets[place][tile][j]`
fn multiply(patches: &[f32], rows: usize, targets: &[f32], cols: usize, count: usize, sums: &mut [f32], init: Init) {
    let kernels = MicroKernels::get();
    let (row, tiles) = (row_len(rows), kernels.row_tiles(rows));
    for place in 0..PLACES {
        for first in (0..cols).step_by(kernels.nr) {
            let width = (cols - first).min(kernels.nr);
            let b = [targets[place * place_len(count, CHANNELS) + first..].as_ptr()];
            for tile in 0..tiles.count {
                let (start, height) = (tiles.start(tile), tiles.height(tile));
                let (mut a, mut c) = ([std::ptr::null(); MAX_MR], [std::ptr::null_mut(); MAX_MR]);
                for r in 0..height {
                    a[r] = patches[place * place_len(count, row) + start + r..].as_ptr();
                    c[r] = sums[((place * CHANNELS) + start + r) * CHANNELS + first..][..width].as_mut_ptr();
                }
                let out = Output { c: c.as_ptr(), offset: 0, values: Values::F32, cols: width, alpha: 1.0, init };
                let tile = Tile { segments: 1, kc: count, a: a.as_ptr(), a_step: 0, a_stride: row, b: b.as_ptr(), b_stride: CHANNELS, out };
                // SAFETY: there are `count` rows of patches with `rows` values, read down the columns, and as many rows of targets with
                // CHANNELS, which is whole panels; the sums' rows are disjoint, and were written by the first chunk, which uses `Init::Zero`.
                unsafe { kernels.tile(height, &tile) }
            }
        }
    }
}

/// Transforms the channels of some tiles of targets to `[place][tile][CHANNELS]`, with zeros beyond the image and the channels. Whether all
/// values were small enough.
struct Targets<'a> {
    grid: &'a Grid,
    y: &'a [f32],
    /// Channels of a target.
    all: usize,
    channels: Range<usize>,
    tiles: Range<usize>,
    out: &'a mut [f32],
}

impl WithSimd for Targets<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        let (grid, stride, width) = (self.grid, place_len(self.tiles.len(), CHANNELS), self.channels.len());
        assert!(self.out.len() == PLACES * stride && width <= CHANNELS && self.channels.end <= self.all);
        let mut check = Check::new(s);
        for (i, tile) in self.tiles.enumerate() {
            let (plane, [top, left]) = grid.place(tile);
            let pixels: [[Option<&[f32]>; SIDE]; SIDE] = std::array::from_fn(|di| {
                std::array::from_fn(|dj| {
                    let (h, w) = (top + di, left + dj);
                    let pixel = (plane * grid.target[0] + h) * grid.target[1] + w;
                    (h < grid.target[0] && w < grid.target[1]).then(|| &self.y[pixel * self.all + self.channels.start..][..width])
                })
            });
            for at in (0..CHANNELS).step_by(S::LANES) {
                let mut y = [[s.zero(); SIDE]; SIDE];
                for di in 0..SIDE {
                    for dj in 0..SIDE {
                        y[di][dj] = match pixels[di][dj] {
                            Some(pixel) if at + S::LANES <= width => s.load_slice(&pixel[at..]),
                            Some(pixel) if at < width => s.load_slice_partial(&pixel[at..]),
                            _ => s.zero(),
                        };
                        check.see(y[di][dj]);
                    }
                }
                // SAFETY: a row has room for CHANNELS values, which are whole vectors.
                unsafe { store_places(of_targets(y), self.out.as_mut_ptr().add(i * CHANNELS + at), stride) };
            }
        }
        check.passed()
    }
}

/// Adds the parts of a source channel's sums in order and transforms them to its weights, `[tap][target channel]`.
struct Merge<'a> {
    grid: &'a Grid,
    parts: Vec<&'a [f32]>,
    weights: &'a mut [f32],
}

impl WithSimd for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        const STRIDE: usize = CHANNELS * CHANNELS;
        assert!(self.weights.len() == 9 * CHANNELS && self.parts.iter().all(|part| part.len() >= (PLACES - 1) * STRIDE + CHANNELS));
        for at in (0..CHANNELS).step_by(S::LANES) {
            let mut sum = [[s.zero(); PATCH]; PATCH];
            for part in &self.parts {
                // SAFETY: a row has CHANNELS values, which are whole vectors, at every place.
                let part = unsafe { load_places(s, part.as_ptr().add(at), STRIDE) };
                for i in 0..PATCH {
                    for j in 0..PATCH {
                        sum[i][j] = sum[i][j] + part[i][j];
                    }
                }
            }
            let taps = to_taps(sum, s.splat(0.5));
            for i in 0..3 {
                for j in 0..3 {
                    taps[i][j].store_slice(&mut self.weights[self.grid.tap(i, j) * CHANNELS + at..], S::LANES);
                }
            }
        }
    }
}
