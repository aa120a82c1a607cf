//! The weight gradient: outer products of transformed patches and transformed targets, summed place by place over all tiles.

use super::super::weight::{MERGED_CHANNELS, TASK_COLS, put};
use super::super::{Gather, part_start};
use super::gather::{place_len, row_len, transform};
use super::grid::{Block, Grid, Phase};
use super::image::Image;
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
    let matrix = Matrix { rows: CHANNELS.min(g.cin), row: row_len(CHANNELS.min(g.cout)) };
    let task_len = F::PLACES * matrix.len();
    let mut buffer = Buffer::new(size_of::<f32>() * splits * count * task_len)?;
    let sums = buffer.as_slice_mut::<f32>();
    let (failed, out_of_memory) = (AtomicBool::new(false), OnceLock::new());
    let (from, to) = (Image::of_sources(grid, F::PATCH, g.cin), Image::of_targets(grid, F::SIDE, g.cout));
    let run = Run { grid, x, gy, from, to, matrix, form: PhantomData::<F> };
    let place = |pair: usize| (channels(pair / blocks[1], g.cin), channels(pair % blocks[1], g.cout));
    parallel::for_each_chunk(sums, task_len, grid.products() * g.cin * g.cout / 50, |i, sums| {
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
    parallel::for_each(pairs * chunks, count * splits * task_len / 4, |i| {
        let (pair, first) = (i / chunks, i % chunks * MERGED_CHANNELS);
        let (from, to) = place(pair);
        if first < from.len() {
            let rows = first..from.len().min(first + MERGED_CHANNELS);
            let mut merged = vec![0f32; rows.len() * taps * CHANNELS];
            for (row, weights) in rows.clone().zip(merged.chunks_exact_mut(taps * CHANNELS)) {
                for phase in grid.target_phases() {
                    let task = |split: usize| split * count + phase.index * pairs + pair;
                    let parts = (0..splits).map(|split| &sums[task(split) * task_len + row * matrix.row..]).collect();
                    dispatch(Merge { grid, phase, matrix, cols: to.len(), parts, weights, form: PhantomData::<F> });
                }
            }
            // SAFETY: each pair of channels belongs to one task.
            unsafe { put(g, 0, from.start + rows.start..from.start + rows.end, to, &merged, out) };
        }
    });
    Ok(true)
}

/// How the sums of a place lie: rows of source channels, from each of which to the next are `row` values.
#[derive(Clone, Copy)]
struct Matrix {
    rows: usize,
    row: usize,
}

impl Matrix {
    fn len(self) -> usize {
        self.rows * self.row
    }
}

fn channels(block: usize, all: usize) -> Range<usize> {
    block * CHANNELS..((block + 1) * CHANNELS).min(all)
}

struct Run<'a, F> {
    grid: &'a Grid,
    x: &'a [f32],
    gy: &'a [f32],
    /// How `x` and `gy` are cut.
    from: Image<MAX_PATCH>,
    to: Image<MAX_SIDE>,
    matrix: Matrix,
    form: PhantomData<F>,
}

impl<F: Form> Run<'_, F> {
    /// The sums over some tiles for a phase of targets, a block of source channels, and one of target channels. Whether all values could be
    /// transformed.
    fn task(&self, tiles: Range<usize>, phase: Phase, from: Range<usize>, to: Range<usize>, sums: &mut [f32]) -> Result<bool, OutOfMemory> {
        let (from_row, to_row) = (row_len(from.len()), row_len(to.len()));
        let places = CHUNK * CHANNELS / from.len().max(to.len()).next_multiple_of(MAX_LANES);
        let chunk = (places * self.grid.plane_tiles() / self.grid.plane_places()).min(tiles.len());
        let mut patches = Buffer::new(size_of::<f32>() * F::PLACES * place_len(chunk, from_row))?;
        let mut targets = Buffer::new(size_of::<f32>() * F::PLACES * place_len(chunk, to_row))?;
        let (mut passed, mut added) = (true, [false; MAX_PLACES]);
        for start in tiles.clone().step_by(chunk.max(1)) {
            let block = self.grid.block(start..tiles.end.min(start + chunk));
            let [from_len, to_len] = [from_row, to_row].map(|row| place_len(block.len(), row));
            let patches = &mut patches.as_slice_mut::<f32>()[..F::PLACES * from_len];
            let targets = &mut targets.as_slice_mut::<f32>()[..F::PLACES * to_len];
            passed &= transform::<F>(self.grid, &self.from, self.x, from.clone(), &block, patches).is_empty();
            let (gy, channels, out) = (self.to.channels(self.gy, &to), to.len(), &mut *targets);
            passed &= dispatch(Spread { grid: self.grid, block: &block, to: &self.to, phase, gy, channels, out, form: self.form });
            for (place, added) in added[..F::PLACES].iter_mut().enumerate() {
                let needing = self.grid.needing(&block, place, phase);
                if needing.is_empty() {
                    continue;
                }
                let a = Side { values: &patches[place * from_len + needing.start * from_row..], width: from.len(), row: from_row };
                let b = Side { values: &targets[place * to_len + needing.start * to_row..], width: to.len(), row: to_row };
                let sums = &mut sums[place * self.matrix.len()..][..self.matrix.len()];
                multiply(&a, &b, needing.len(), self.matrix, sums, if *added { Init::C } else { Init::Zero });
                *added = true;
            }
        }
        for (sums, _) in sums.chunks_exact_mut(self.matrix.len()).zip(added).filter(|(_, added)| !added) {
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
fn multiply(a: &Side, b: &Side, count: usize, matrix: Matrix, sums: &mut [f32], init: Init) {
    let kernels = MicroKernels::get();
    let last = (b.width - 1) / kernels.nr * kernels.nr;
    assert!(a.width <= a.row.min(matrix.rows) && last + kernels.panel_width(b.width - last) <= b.row && b.width <= matrix.row);
    assert!(a.values.len() >= count * a.row && b.values.len() >= count * b.row && sums.len() == matrix.len());
    let tiles = kernels.row_tiles(a.width);
    for tile in 0..tiles.count {
        let (start, height) = (tiles.start(tile), tiles.height(tile));
        let (mut rows, mut c) = ([std::ptr::null(); MAX_MR], [std::ptr::null_mut(); MAX_MR]);
        for r in 0..height {
            rows[r] = a.values.as_ptr().wrapping_add(start + r);
            c[r] = sums.as_mut_ptr().wrapping_add((start + r) * matrix.row);
        }
        for first in (0..b.width).step_by(kernels.nr) {
            let cols = (b.width - first).min(kernels.nr);
            let columns = [b.values[first..].as_ptr()];
            let out = Output { c: c.as_ptr(), offset: first * size_of::<f32>(), values: Values::F32, cols, alpha: 1.0, init };
            let tile =
                Tile { segments: 1, kc: count, a: rows.as_ptr(), a_step: 0, a_stride: a.row, b: columns.as_ptr(), b_stride: b.row, out };
            // SAFETY: there are `count` rows of patches, read down the columns, and as many of targets, each with room for the last
            // panel; the sums' rows are disjoint, and were written by the first chunk, which uses `Init::Zero`.
            unsafe { kernels.tile(height, &tile) }
        }
    }
}

/// Transforms the channels of a block's targets of a phase to `[place][tile][row_len]`, with zeros for targets beyond the image. Whether all values
/// were small enough.
struct Spread<'a, F> {
    grid: &'a Grid,
    block: &'a Block,
    to: &'a Image<MAX_SIDE>,
    phase: Phase,
    /// By [`Image::channels`].
    gy: &'a [f32],
    channels: usize,
    out: &'a mut [f32],
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Spread<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        let Self { grid, block, channels, .. } = self;
        let row = row_len(channels);
        let stride = place_len(block.len(), row);
        assert!(self.out.len() == F::PLACES * stride);
        let mut check = Check::new(s);
        for (i, tile) in block.tiles.iter().enumerate() {
            let next = block.tiles.get(i + 1).unwrap_or(tile);
            let [pixels, next] = [tile, next].map(|tile| self.to.pixels(tile, self.phase));
            let needed = grid.needed_places(tile, false);
            for at in (0..channels).step_by(S::LANES) {
                let gy = self.gy.as_ptr().wrapping_add(at);
                // SAFETY: of the image's pixels so many channels follow at `gy`.
                let y = unsafe { pixels.load(s, gy, F::SIDE, S::LANES.min(channels - at)) };
                next.prefetch(s, gy, F::SIDE);
                for i in 0..F::SIDE {
                    for j in 0..F::SIDE {
                        check.see(y[i][j]);
                    }
                }
                // SAFETY: a row has room for whole vectors.
                unsafe { store_needed::<F, _>(of_targets::<F, S>(s, y), needed, self.out.as_mut_ptr().add(i * row + at), stride) };
            }
        }
        check.passed()
    }
}

/// Adds the parts of a source channel's sums of a phase in order and transforms them to its weights, `[tap][target channel]`.
struct Merge<'a, F> {
    grid: &'a Grid,
    phase: Phase,
    matrix: Matrix,
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
        let Matrix { row, .. } = self.matrix;
        let stride = self.matrix.len();
        assert!(self.cols.next_multiple_of(S::LANES) <= row && self.parts.iter().all(|part| part.len() >= (F::PLACES - 1) * stride + row));
        for at in (0..self.cols).step_by(S::LANES) {
            let mut sum = [[s.zero(); MAX_PATCH]; MAX_PATCH];
            for part in &self.parts {
                // SAFETY: a row has room for these vectors at every place.
                let part = unsafe { load_places::<F, S>(s, part.as_ptr().add(at), stride) };
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
