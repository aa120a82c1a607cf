//! The weight gradient: outer products of transformed patches and transformed targets, summed place by place over all tiles.

use super::super::weight::{MERGED_CHANNELS, TASK_COLS, put};
use super::super::{Gather, part_start};
use super::gather::{place_len, row_len, transform};
use super::grid::{Block, Grid, Phase, Targets};
use super::transform::{Check, Form, MAX_PATCH, MAX_PLACES, MAX_SIDE, load_places, of_targets, store_needed, to_taps};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::micro::{Init, MAX_MR, MicroKernels, Output, Tile, Values};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::{F32s, MAX_LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Source and target channels of a task: its sums, and the patches and targets of a chunk, fit an L2 of 1 MiB.
const CHANNELS: usize = TASK_COLS;

/// Places of tiles of [`CHANNELS`] channels that are transformed at once.
const CHUNK: usize = 1024;

/// Tasks that a call is cut into if it has the tiles for it.
const MIN_TASKS: usize = 16;

/// Fewest tiles of a part: below, writing and adding the parts would cost as much as the products.
const MIN_TILES: usize = 256;

/// See [`super::weight_grad`]; `x` is the source image, `gy` the target image of `g`, whose sources have no phases.
pub(super) fn weight_grad<F: Form>(g: &Gather, grid: &Grid, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    let blocks = [g.cin, g.cout].map(|channels| channels.div_ceil(CHANNELS));
    let (pairs, phases) = (blocks[0] * blocks[1], grid.target_phases().count());
    let count = phases * pairs;
    let splits = MIN_TASKS.div_ceil(count).min(grid.len() / MIN_TILES).max(1);
    let mut buffer = Buffer::new(size_of::<f32>() * splits * count * task_len::<F>())?;
    let sums = buffer.as_slice_mut::<f32>();
    let (failed, out_of_memory) = (AtomicBool::new(false), OnceLock::new());
    let run = Run { g, grid, x, gy, form: PhantomData::<F> };
    let place = |pair: usize| (channels(pair / blocks[1], g.cin), channels(pair % blocks[1], g.cout));
    parallel::for_each_chunk(sums, task_len::<F>(), grid.products() * g.cin * g.cout / 50, |i, sums| {
        let (split, phase, pair) = (i / count, i % count / pairs, i % pairs);
        let tiles = part_start(grid.len(), splits, split)..part_start(grid.len(), splits, split + 1);
        let Some(phase) = grid.target_phases().nth(phase) else { return };
        let (from, to) = place(pair);
        match run.task(tiles, phase, from, to, sums) {
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
    let (out, chunks, taps) = (SharedMut::new(gw), CHANNELS / MERGED_CHANNELS, g.taps());
    parallel::for_each(pairs * chunks, count * splits * task_len::<F>() / 4, |i| {
        let (pair, first) = (i / chunks, i % chunks * MERGED_CHANNELS);
        let (from, to) = place(pair);
        if first < from.len() {
            let rows = first..from.len().min(first + MERGED_CHANNELS);
            let mut merged = vec![0f32; rows.len() * taps * CHANNELS];
            for (row, weights) in rows.clone().zip(merged.chunks_exact_mut(taps * CHANNELS)) {
                for phase in grid.target_phases() {
                    let task = |split: usize| split * count + phase.index * pairs + pair;
                    let parts = (0..splits).map(|split| &sums[task(split) * task_len::<F>() + row * CHANNELS..]).collect();
                    dispatch(Merge { grid, phase, cols: to.len(), parts, weights, form: PhantomData::<F> });
                }
            }
            // SAFETY: each pair of channels belongs to one task.
            unsafe { put(g, 0, from.start + rows.start..from.start + rows.end, to, &merged, out) };
        }
    });
    Ok(true)
}

/// Values of a task's sums, `[place][source channel][target channel]`.
const fn task_len<F: Form>() -> usize {
    F::PLACES * CHANNELS * CHANNELS
}

fn channels(block: usize, all: usize) -> Range<usize> {
    block * CHANNELS..((block + 1) * CHANNELS).min(all)
}

struct Run<'a, F> {
    g: &'a Gather,
    grid: &'a Grid,
    x: &'a [f32],
    gy: &'a [f32],
    form: PhantomData<F>,
}

impl<F: Form> Run<'_, F> {
    /// The sums over some tiles for a phase of targets, a block of source channels, and one of target channels. Whether all values could be
    /// transformed.
    fn task(&self, tiles: Range<usize>, phase: Phase, from: Range<usize>, to: Range<usize>, sums: &mut [f32]) -> Result<bool, OutOfMemory> {
        let places = CHUNK * CHANNELS / from.len().max(to.len()).next_multiple_of(MAX_LANES);
        let chunk = (places * self.grid.plane_tiles() / self.grid.plane_places()).min(tiles.len());
        let mut patches = Buffer::new(size_of::<f32>() * F::PLACES * place_len(chunk, row_len(from.len())))?;
        let mut targets = Buffer::new(size_of::<f32>() * F::PLACES * place_len(chunk, CHANNELS))?;
        let (mut passed, mut added) = (true, [false; MAX_PLACES]);
        for start in tiles.clone().step_by(chunk.max(1)) {
            let block = self.grid.block(start..tiles.end.min(start + chunk));
            let patches = &mut patches.as_slice_mut::<f32>()[..F::PLACES * place_len(block.len(), row_len(from.len()))];
            let targets = &mut targets.as_slice_mut::<f32>()[..F::PLACES * place_len(block.len(), CHANNELS)];
            passed &= transform::<F>(self.grid, self.x, self.g.cin, from.clone(), &block, patches).is_empty();
            let of = |pixel: usize| self.gy[pixel * self.g.cout..][to.clone()].as_ptr();
            let pixels = &self.grid.targets(&block, phase, std::ptr::null(), of)[..];
            let (channels, out) = (to.len(), &mut *targets);
            passed &= dispatch(Spread { grid: self.grid, block: &block, pixels, channels, out, form: self.form });
            for (place, added) in added[..F::PLACES].iter_mut().enumerate() {
                let needing = self.grid.needing(&block, place, phase);
                if needing.is_empty() {
                    continue;
                }
                let row = row_len(from.len());
                let a = Side { values: &patches[place * place_len(block.len(), row) + needing.start * row..], width: from.len(), row };
                let b = &targets[place * place_len(block.len(), CHANNELS) + needing.start * CHANNELS..];
                let b = Side { values: b, width: to.len(), row: CHANNELS };
                let sums = &mut sums[place * CHANNELS * CHANNELS..][..CHANNELS * CHANNELS];
                multiply(&a, &b, needing.len(), sums, if *added { Init::C } else { Init::Zero });
                *added = true;
            }
        }
        for (sums, _) in sums.chunks_exact_mut(CHANNELS * CHANNELS).zip(added).filter(|(_, added)| !added) {
            sums.fill(0.0);
        }
        Ok(passed)
    }
}

/// Transformed values of one place: rows of tiles, of which each has `width` values that count.
struct Side<'a> {
    values: &'a [f32],
    width: usize,
    row: usize,
}

/// `sums[c][j] += Σ_tile a[tile][c] · b[tile][j]` over `count` tiles.
fn multiply(a: &Side, b: &Side, count: usize, sums: &mut [f32], init: Init) {
    assert!(a.width <= a.row.min(CHANNELS) && b.width <= b.row && b.row == CHANNELS && sums.len() == CHANNELS * CHANNELS);
    assert!(a.values.len() >= count * a.row && b.values.len() >= count * CHANNELS);
    let kernels = MicroKernels::get();
    let tiles = kernels.row_tiles(a.width);
    for tile in 0..tiles.count {
        let (start, height) = (tiles.start(tile), tiles.height(tile));
        let (mut rows, mut c) = ([std::ptr::null(); MAX_MR], [std::ptr::null_mut(); MAX_MR]);
        for r in 0..height {
            rows[r] = a.values.as_ptr().wrapping_add(start + r);
            c[r] = sums.as_mut_ptr().wrapping_add((start + r) * CHANNELS);
        }
        for first in (0..b.width).step_by(kernels.nr) {
            let cols = (b.width - first).min(kernels.nr);
            let columns = [b.values[first..].as_ptr()];
            let out = Output { c: c.as_ptr(), offset: first * size_of::<f32>(), values: Values::F32, cols, alpha: 1.0, init };
            let tile =
                Tile { segments: 1, kc: count, a: rows.as_ptr(), a_step: 0, a_stride: a.row, b: columns.as_ptr(), b_stride: CHANNELS, out };
            // SAFETY: there are `count` rows of patches, read down the columns, and as many rows of targets with CHANNELS, which is whole
            // panels; the sums' rows are disjoint, and were written by the first chunk, which uses `Init::Zero`.
            unsafe { kernels.tile(height, &tile) }
        }
    }
}

/// Transforms the channels of a block's targets of a phase to `[place][tile][CHANNELS]`, with zeros for targets beyond the image. Whether all values
/// were small enough.
struct Spread<'a, F> {
    grid: &'a Grid,
    block: &'a Block,
    /// For each tile, where the channels of its targets lie; null for those beyond the image.
    pixels: &'a [Targets<*const f32>],
    channels: usize,
    out: &'a mut [f32],
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Spread<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        let (stride, width) = (place_len(self.block.len(), CHANNELS), self.channels);
        assert!(self.out.len() == F::PLACES * stride && width <= CHANNELS && self.pixels.len() == self.block.len());
        let mut check = Check::new(s);
        for (i, (tile, pixels)) in self.block.tiles.iter().zip(self.pixels).enumerate() {
            // The hardware does not foresee them.
            let next = self.pixels.get(i + 1).unwrap_or(pixels);
            let needed = self.grid.needed_places(tile, false);
            for at in (0..width).step_by(S::LANES) {
                let count = S::LANES.min(width - at);
                let mut y = [[s.zero(); MAX_SIDE]; MAX_SIDE];
                for di in 0..F::SIDE {
                    for dj in 0..F::SIDE {
                        let from = pixels[di][dj].wrapping_add(at);
                        if !pixels[di][dj].is_null() {
                            // SAFETY: the pixel is one of the image's, of which `count` of the channels follow.
                            y[di][dj] = unsafe { if count == S::LANES { s.load(from) } else { s.load_partial(from, count) } };
                            check.see(y[di][dj]);
                        }
                        s.prefetch(next[di][dj].wrapping_add(at));
                    }
                }
                // SAFETY: a row has room for CHANNELS values, which are whole vectors.
                unsafe { store_needed::<F, _>(of_targets::<F, S>(s, y), needed, self.out.as_mut_ptr().add(i * CHANNELS + at), stride) };
            }
        }
        check.passed()
    }
}

/// Adds the parts of a source channel's sums of a phase in order and transforms them to its weights, `[tap][target channel]`.
struct Merge<'a, F> {
    grid: &'a Grid,
    phase: Phase,
    /// Target channels.
    cols: usize,
    parts: Vec<&'a [f32]>,
    weights: &'a mut [f32],
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Merge<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        const STRIDE: usize = CHANNELS * CHANNELS;
        assert!(self.cols <= CHANNELS && self.parts.iter().all(|part| part.len() >= (F::PLACES - 1) * STRIDE + CHANNELS));
        for at in (0..self.cols).step_by(S::LANES) {
            let mut sum = [[s.zero(); MAX_PATCH]; MAX_PATCH];
            for part in &self.parts {
                // SAFETY: a row has CHANNELS values, which are whole vectors, at every place.
                let part = unsafe { load_places::<F, S>(s, part.as_ptr().add(at), STRIDE) };
                for i in 0..F::PATCH {
                    for j in 0..F::PATCH {
                        sum[i][j] = sum[i][j] + part[i][j];
                    }
                }
            }
            let taps = to_taps::<F, S>(s, sum);
            for i in 0..F::TAPS {
                for j in 0..F::TAPS {
                    taps[i][j].store_slice(&mut self.weights[self.grid.tap(self.phase, i, j) * CHANNELS + at..], S::LANES);
                }
            }
        }
    }
}
