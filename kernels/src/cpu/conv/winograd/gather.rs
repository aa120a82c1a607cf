//! Forward pass and input gradient: a task transforms the patches of some tiles, multiplies them place by place with a panel of target
//! channels, and transforms the sums back while they are in cache.

use super::super::pack::{Cut, InMemory, Panel, Panels, Weights};
use super::super::{Gather, part_start};
use super::grid::{Block, Grid, Phase};
use super::image::Image;
use super::transform::{Check, Form, MAX_PATCH, MAX_SIDE, load_places, of_sources, of_taps, store_needed, store_places, to_targets};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::micro::{Init, MAX_MR, MAX_NR, MicroKernels, Output, Tile, Values};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::{F32s, MAX_LANES, Simd};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a task's transformed patches and sums: with a place of a panel's weights they fit an L2 of 1 MiB.
const PATCH_BYTES: usize = 512 << 10;

/// Tiles of a task: each weight that is read serves so many.
const MOST_TILES: usize = 8 * MAX_MR;
const FEWEST_TILES: usize = 2 * MAX_MR;

/// Source channels whose weights are transformed at once: with four phases of four taps they fit L1.
const WEIGHT_CHANNELS: usize = 16;

/// Tasks that a call is cut into if it has the tiles or the channels for it.
const MIN_TASKS: usize = 16;

/// How many tiles further the targets are asked for that are to be written.
const AHEAD: usize = 2;

/// See [`super::gather`].
pub(super) fn gather<F: Form>(
    g: &Gather,
    grid: &Grid,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    windows: impl Fn(&Gather, &[f32], &mut [f32]) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    let Some(panels) = transformed::<F>(g, grid, w)? else { return windows(g, x, y) };
    let sources = grid.source_phases().count() * g.cin;
    let place = size_of::<f32>() * (row_len(sources) + MAX_NR);
    let block = (PATCH_BYTES / place * grid.plane_tiles() / grid.plane_places()).clamp(FEWEST_TILES, MOST_TILES) / MAX_MR * MAX_MR;
    let blocks = grid.len().div_ceil(block);
    let count = grid.target_phases().count() * panels.count();
    let splits = MIN_TASKS.div_ceil(blocks).min(count);
    let failed: Vec<AtomicBool> = (0..g.n).map(|_| AtomicBool::new(false)).collect();
    let (from, to) = (Image::of_sources(grid, F::PATCH, g.cin), Image::of_targets(grid, F::SIDE, g.cout));
    let y_start = SharedMut::new(&mut *y);
    let run = Run { g, grid, x, bias, y: y_start, from, to, sources, panels: &panels, failed: &failed, form: PhantomData::<F> };
    let out_of_memory = OnceLock::new();
    parallel::for_each(blocks * splits, grid.products() * g.cin * g.cout / 50, |i| {
        let (i, split) = (i / splits, i % splits);
        let tiles = part_start(grid.len(), blocks, i)..part_start(grid.len(), blocks, i + 1);
        let panels = part_start(count, splits, split)..part_start(count, splits, split + 1);
        if let Err(error) = run.task(tiles, panels) {
            _ = out_of_memory.set(error);
        }
    });
    if let Some(error) = out_of_memory.into_inner() {
        return Err(error);
    }
    let (source, target) = (x.len() / g.n, y.len() / g.n);
    for (image, _) in failed.iter().enumerate().filter(|(_, failed)| failed.load(Ordering::Relaxed)) {
        let one = Gather { n: 1, ..g.clone() };
        windows(&one, &x[image * source..][..source], &mut y[image * target..][..target])?;
    }
    Ok(())
}

/// Values from one row of transformed channels to the next: whole vectors, and not a multiple of a large power of two, by which
/// the rows of a product would meet in one set of the cache.
pub(super) fn row_len(channels: usize) -> usize {
    let len = channels.next_multiple_of(MAX_LANES);
    if len.is_multiple_of(256) { len + MAX_LANES } else { len }
}

/// Values from one place to the next, of `rows` rows: not a multiple of a page, as a patch or tile touches all places at once.
pub(super) fn place_len(rows: usize, row: usize) -> usize {
    rows * row + MAX_LANES
}

/// The weights as panels with rows `(phase of targets, place, phase of sources, channel)`; `None` if they cannot be transformed.
fn transformed<F: Form>(g: &Gather, grid: &Grid, w: &[f32]) -> Result<Option<Panels>, OutOfMemory> {
    let kernels = MicroKernels::get();
    let (order, sources, targets) = (grid.order(), grid.source_phases().count(), grid.target_phases().count());
    let mut panels = Panels::new(1, Cut::new(kernels, targets * F::PLACES * sources * g.cin, g.cout))?;
    let fits = AtomicBool::new(true);
    panels.fill_parts(g.cin.div_ceil(WEIGHT_CHANNELS), |i, first, cols, width, panel| {
        let start = i * WEIGHT_CHANNELS;
        let part = Gather { cin: WEIGHT_CHANNELS.min(g.cin - start), ..g.clone() };
        let (len, stride) = (part.cin * width, sources * g.cin * width);
        let mut taps = vec![0f32; order.len() * len];
        InMemory { g: &part, w: &w[start * g.in_stride..] }.pack(&order, 0, first, cols, width, &mut taps);
        for (phase, from) in taps.chunks_exact(F::TAPS * F::TAPS * len).enumerate() {
            let (target, source) = (phase / sources, phase % sources);
            // SAFETY: the rows of these channels at every place lie in the panel, and are no other part's.
            let to = unsafe { panel.add((target * F::PLACES * sources + source) * g.cin * width + start * width).get() };
            if !dispatch(Taps { from, to, stride, form: PhantomData::<F> }) {
                fits.store(false, Ordering::Relaxed);
            }
        }
    });
    Ok(fits.into_inner().then_some(panels))
}

/// Transforms the taps of a phase to all places. Whether all weights were small enough.
struct Taps<'a, F> {
    from: &'a [f32],
    /// Where the first place's rows can be written, as many values as a tap has, and those of the next `stride` values on.
    to: *mut f32,
    stride: usize,
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Taps<'_, F> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        let len = self.from.len() / (F::TAPS * F::TAPS);
        assert!(len.is_multiple_of(S::LANES));
        let mut check = Check::new(s);
        for at in (0..len).step_by(S::LANES) {
            let mut taps = [[s.zero(); MAX_SIDE]; MAX_SIDE];
            for i in 0..F::TAPS {
                for j in 0..F::TAPS {
                    // SAFETY: `len` is whole vectors, so that `at` and what follows lies within a tap's rows.
                    taps[i][j] = unsafe { s.load(self.from.as_ptr().add((i * F::TAPS + j) * len + at)) };
                    check.see(taps[i][j]);
                }
            }
            // SAFETY: as above, for a place's rows.
            unsafe { store_places::<F, _>(of_taps::<F, S>(s, taps), self.to.add(at), self.stride) };
        }
        check.passed()
    }
}

struct Run<'a, F> {
    g: &'a Gather,
    grid: &'a Grid,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
    /// How `x` and `y` are cut.
    from: Image<MAX_PATCH>,
    to: Image<MAX_SIDE>,
    /// Channels of all phases of a source.
    sources: usize,
    panels: &'a Panels,
    failed: &'a [AtomicBool],
    form: PhantomData<F>,
}

impl<F: Form> Run<'_, F> {
    /// Some tiles of some panels, which are counted phase by phase of targets.
    fn task(&self, tiles: Range<usize>, panels: Range<usize>) -> Result<(), OutOfMemory> {
        let (g, block) = (self.g, self.grid.block(tiles));
        let count = block.len();
        let mut patches = Buffer::new(size_of::<f32>() * F::PLACES * place_len(count, row_len(self.sources)))?;
        let patches = patches.as_slice_mut::<f32>();
        for plane in transform::<F>(self.grid, &self.from, self.x, 0..g.cin, &block, patches) {
            self.failed[plane / g.source[0]].store(true, Ordering::Relaxed);
        }
        let mut sums = Buffer::new(size_of::<f32>() * F::PLACES * place_len(count, MAX_NR))?;
        let sums = sums.as_slice_mut::<f32>();
        // Products that a tile does not need count as zero.
        for (i, tile) in block.tiles.iter().enumerate() {
            let Some(needed) = self.grid.needed_places(tile, true) else { continue };
            for (place, _) in needed[..F::PLACES].iter().enumerate().filter(|(_, needed)| !**needed) {
                sums[place * place_len(count, MAX_NR) + i * MAX_NR..][..MAX_NR].fill(0.0);
            }
        }
        for phase in self.grid.target_phases() {
            let first = phase.index * self.panels.count();
            for i in panels.start.max(first)..panels.end.min(first + self.panels.count()) {
                let panel = self.panels.panel(0, i - first);
                self.multiply(patches, panel, phase, &block, sums);
                let bias = self.bias.map(|bias| &bias[panel.first..][..panel.cols]);
                let (y, cols) = (self.y.get().wrapping_add(panel.first), panel.cols);
                dispatch(Back { grid: self.grid, block: &block, sums, y, to: &self.to, phase, cols, bias, form: self.form });
            }
        }
        Ok(())
    }

    /// `sums[place][tile][j] = Σ_c patches[place][tile][c] · weights[place][c][j]`
    fn multiply(&self, patches: &[f32], panel: Panel, phase: Phase, block: &Block, sums: &mut [f32]) {
        let (kernels, kc, row, count) = (MicroKernels::get(), self.sources, row_len(self.sources), block.len());
        for place in 0..F::PLACES {
            let weights = [panel.data[(phase.index * F::PLACES + place) * kc * panel.stride..].as_ptr()];
            let needing = self.grid.needing(block, place, phase);
            let tiles = kernels.row_tiles(needing.len());
            for tile in 0..tiles.count {
                let (start, height) = (needing.start + tiles.start(tile), tiles.height(tile));
                let (mut a, mut c) = ([std::ptr::null(); MAX_MR], [std::ptr::null_mut(); MAX_MR]);
                for r in 0..height {
                    a[r] = patches[place * place_len(count, row) + (start + r) * row..][..kc].as_ptr();
                    c[r] = sums[place * place_len(count, MAX_NR) + (start + r) * MAX_NR..][..panel.stride].as_mut_ptr();
                }
                let out = Output { c: c.as_ptr(), offset: 0, values: Values::F32, cols: panel.stride, alpha: 1.0, init: Init::Zero };
                let tile =
                    Tile { segments: 1, kc, a: a.as_ptr(), a_step: 0, a_stride: 1, b: weights.as_ptr(), b_stride: panel.stride, out };
                // SAFETY: each row of A has `kc` values, each row of C as many as the panel is wide, and the panel has `kc` rows for each place.
                unsafe { kernels.tile(height, &tile) }
            }
        }
    }
}

/// Transforms the `channels` of the patches of a block to `out`, `[place][tile][row_len]` with rows `(phase, channel)` of sources and places
/// [`place_len`] apart; the planes that have values too large for it.
pub(super) fn transform<F: Form>(
    grid: &Grid,
    from: &Image<MAX_PATCH>,
    x: &[f32],
    channels: Range<usize>,
    block: &Block,
    out: &mut [f32],
) -> Vec<usize> {
    let x = from.channels(x, &channels);
    dispatch(Patches { grid, block, from, x, channels: channels.len(), out, form: PhantomData::<F> })
}

/// See [`transform`].
struct Patches<'a, F> {
    grid: &'a Grid,
    block: &'a Block,
    from: &'a Image<MAX_PATCH>,
    /// By [`Image::channels`].
    x: &'a [f32],
    channels: usize,
    /// Whole vectors are written: what follows a patch's channels is the next, or room.
    out: &'a mut [f32],
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Patches<'_, F> {
    type Output = Vec<usize>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Vec<usize> {
        let Self { grid, block, channels, .. } = self;
        let phases = grid.source_phases().count();
        let row = row_len(phases * channels);
        let stride = place_len(block.len(), row);
        assert!(self.out.len() == F::PLACES * stride);
        // Whether all values are checked, and not those in the middle only.
        let all = !grid.middles_cover();
        let mut failed = Vec::new();
        for (i, tile) in block.tiles.iter().enumerate() {
            let (needed, mut check) = (grid.needed_places(tile, false), Check::new(s));
            let next = block.tiles.get(i + 1).unwrap_or(tile);
            for phase in grid.source_phases() {
                let (sources, next) = (self.from.pixels(tile, phase), self.from.pixels(next, phase));
                for at in (0..channels).step_by(S::LANES) {
                    let x = self.x.as_ptr().wrapping_add(at);
                    // SAFETY: of the image's pixels so many channels follow at `x`.
                    let d = unsafe { sources.load(s, x, F::PATCH, S::LANES.min(channels - at)) };
                    next.prefetch(s, x, F::PATCH);
                    for i in 0..F::PATCH {
                        for j in 0..F::PATCH {
                            if all || (1..=F::SIDE).contains(&i) && (1..=F::SIDE).contains(&j) {
                                check.see(d[i][j]);
                            }
                        }
                    }
                    let to = self.out.as_mut_ptr().wrapping_add(i * row + phase.index * channels + at);
                    // SAFETY: a row has room for whole vectors at every place.
                    unsafe { store_needed::<F, _>(of_sources::<F, S>(s, d), needed, to, stride) };
                }
            }
            if !check.passed() {
                failed.push(tile.plane);
            }
        }
        failed
    }
}

/// Transforms the sums of a panel back, adds the bias, and stores the targets of a phase.
struct Back<'a, F> {
    grid: &'a Grid,
    block: &'a Block,
    sums: &'a [f32],
    /// The image of targets, from the panel's first channel on.
    y: *mut f32,
    to: &'a Image<MAX_SIDE>,
    phase: Phase,
    cols: usize,
    bias: Option<&'a [f32]>,
    form: PhantomData<F>,
}

impl<F: Form> WithSimd for Back<'_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (grid, stride) = (self.grid, place_len(self.block.len(), MAX_NR));
        assert!(self.sums.len() == F::PLACES * stride && self.cols <= MAX_NR && self.bias.is_none_or(|bias| bias.len() == self.cols));
        for (i, tile) in self.block.tiles.iter().enumerate() {
            let next = self.block.tiles.get(i + AHEAD).unwrap_or(tile);
            let [pixels, next] = [tile, next].map(|tile| self.to.pixels(tile, self.phase));
            let joined = [grid.axes[0].pieces[tile.row].is_joined, grid.axes[1].pieces[tile.col].is_joined];
            for at in (0..self.cols).step_by(S::LANES) {
                let count = S::LANES.min(self.cols - at);
                // SAFETY: a row of sums has MAX_NR values, which are whole vectors.
                let mut targets = to_targets::<F, S>(s, unsafe { load_places::<F, S>(s, self.sums.as_ptr().add(i * MAX_NR + at), stride) });
                for k in 0..F::SIDE {
                    if joined[0] {
                        targets[0][k] = targets[0][k] + targets[F::SIDE - 1][k];
                    }
                }
                for k in 0..F::SIDE {
                    if joined[1] {
                        targets[k][0] = targets[k][0] + targets[k][F::SIDE - 1];
                    }
                }
                let bias = match self.bias {
                    // SAFETY: `count` values follow.
                    Some(bias) => unsafe { s.load_partial(bias.as_ptr().add(at), count) },
                    None => s.zero(),
                };
                let y = self.y.wrapping_add(at);
                next.prefetch(s, y, F::SIDE);
                for i in 0..F::SIDE {
                    for j in 0..F::SIDE {
                        if pixels.exists(i, j) {
                            let (target, to) = (targets[i][j] + bias, y.wrapping_add(pixels.offset(i, j)));
                            // SAFETY: the pixel and the channels lie in the image of targets; no other task writes them.
                            unsafe { if count == S::LANES { target.store(to) } else { target.store_partial(to, count) } }
                        }
                    }
                }
            }
        }
    }
}
