//! Forward pass and input gradient: a task transforms the patches of some tiles, multiplies them place by place with a panel of target
//! channels, and transforms the sums back while they are in cache.

use super::super::pack::{Cut, InMemory, Panels};
use super::super::{Gather, part_start};
use super::transform::{Check, load_places, of_sources, of_taps, store_places, to_targets};
use super::{Grid, PATCH, PLACES, SIDE};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::gemm::micro::{Init, MAX_MR, MAX_NR, MicroKernels, Output, Tile, Values};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::simd::{F32s, MAX_LANES, Simd};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a task's transformed patches: with a place of a panel's weights and its sums they fit an L2 of 1 MiB.
const PATCH_BYTES: usize = 512 << 10;

/// Tiles of a task: each weight that is read serves so many.
const MOST_TILES: usize = 8 * MAX_MR;
const FEWEST_TILES: usize = 2 * MAX_MR;

/// Tasks that a call is cut into if it has the tiles or the channels for it.
const MIN_TASKS: usize = 16;

/// See [`super::super::forward`]; `windows` computes the images that cannot be transformed: it gets a gather of some images, their sources and
/// their targets.
pub(in super::super) fn gather(
    g: &Gather,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    windows: impl Fn(&Gather, &[f32], &mut [f32]) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    let Some(grid) = Grid::of(g) else { return windows(g, x, y) };
    let Some(panels) = transformed(g, &grid, w)? else { return windows(g, x, y) };
    let block = (PATCH_BYTES / (PLACES * size_of::<f32>() * row_len(g.cin))).clamp(FEWEST_TILES, MOST_TILES) / MAX_MR * MAX_MR;
    let blocks = grid.len().div_ceil(block);
    let splits = MIN_TASKS.div_ceil(blocks).min(panels.count());
    let failed: Vec<AtomicBool> = (0..g.n).map(|_| AtomicBool::new(false)).collect();
    let run = Run { g, grid: &grid, x, bias, y: SharedMut::new(y), panels: &panels, failed: &failed };
    let out_of_memory = OnceLock::new();
    parallel::for_each(blocks * splits, grid.len() * PLACES * g.cin * g.cout / 50, |i| {
        let (i, split) = (i / splits, i % splits);
        let tiles = part_start(grid.len(), blocks, i)..part_start(grid.len(), blocks, i + 1);
        let panels = part_start(panels.count(), splits, split)..part_start(panels.count(), splits, split + 1);
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

/// The weights of each place as panels, a place after the other; `None` if they cannot be transformed.
fn transformed(g: &Gather, grid: &Grid, w: &[f32]) -> Result<Option<Panels>, OutOfMemory> {
    let kernels = MicroKernels::get();
    let order: Vec<usize> = (0..9).map(|tap| grid.tap(tap / 3, tap % 3)).collect();
    let taps = Panels::by_tap(&InMemory { g, w }, 1, Cut::new(kernels, 9 * g.cin, g.cout), &order)?;
    let mut panels = Panels::new(1, Cut::new(kernels, PLACES * g.cin, g.cout))?;
    let fits = AtomicBool::new(true);
    panels.fill(1, |_, first, _, width, panel| {
        if !dispatch(Taps { from: taps.panel(0, first / kernels.nr).data, channels: g.cin, width, to: panel }) {
            fits.store(false, Ordering::Relaxed);
        }
    });
    Ok(fits.into_inner().then_some(panels))
}

/// Transforms a panel: nine taps of `channels` rows to sixteen places. Whether all weights were small enough.
struct Taps<'a> {
    from: &'a [f32],
    channels: usize,
    width: usize,
    to: &'a mut [f32],
}

impl WithSimd for Taps<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        let (len, half) = (self.channels * self.width, s.splat(0.5));
        assert!(self.from.len() == 9 * len && self.to.len() == PLACES * len && len.is_multiple_of(S::LANES));
        let mut check = Check::new(s);
        for at in (0..len).step_by(S::LANES) {
            let mut taps = [[s.zero(); 3]; 3];
            for i in 0..3 {
                for j in 0..3 {
                    // SAFETY: a panel is some vectors wide, so that `at` and what follows lies within a tap's rows.
                    taps[i][j] = unsafe { s.load(self.from.as_ptr().add((i * 3 + j) * len + at)) };
                    check.see(taps[i][j]);
                }
            }
            // SAFETY: as above, for a place's rows.
            unsafe { store_places(of_taps(taps, half), self.to.as_mut_ptr().add(at), len) };
        }
        check.passed()
    }
}

struct Run<'a> {
    g: &'a Gather,
    grid: &'a Grid,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
    panels: &'a Panels,
    failed: &'a [AtomicBool],
}

impl Run<'_> {
    /// Some tiles of some panels.
    fn task(&self, tiles: Range<usize>, panels: Range<usize>) -> Result<(), OutOfMemory> {
        let (g, count) = (self.g, tiles.len());
        let row = row_len(g.cin);
        let mut patches = Buffer::new(size_of::<f32>() * PLACES * place_len(count, row))?;
        let patches = patches.as_slice_mut::<f32>();
        for tile in transform(self.grid, self.x, g.cin, 0..g.cin, tiles.clone(), patches) {
            self.failed[self.grid.place(tile).0 / g.source[0]].store(true, Ordering::Relaxed);
        }
        let mut sums = Buffer::new(size_of::<f32>() * PLACES * place_len(count, MAX_NR))?;
        let sums = sums.as_slice_mut::<f32>();
        for panel in panels {
            self.multiply(patches, panel, count, sums);
            let panel = self.panels.panel(0, panel);
            let bias = self.bias.map(|bias| &bias[panel.first..][..panel.cols]);
            let back = Back {
                grid: self.grid,
                channels: g.cout,
                tiles: tiles.clone(),
                sums,
                first: panel.first,
                cols: panel.cols,
                bias,
                y: self.y,
            };
            dispatch(back);
        }
        Ok(())
    }

    /// `sums[place][tile][j] = Σ_c patches[place][tile][c] · weights[place][c][j]`
    fn multiply(&self, patches: &[f32], panel: usize, count: usize, sums: &mut [f32]) {
        let (kernels, cin, row) = (MicroKernels::get(), self.g.cin, row_len(self.g.cin));
        let panel = self.panels.panel(0, panel);
        let tiles = kernels.row_tiles(count);
        for place in 0..PLACES {
            let weights = [panel.data[place * cin * panel.stride..].as_ptr()];
            for tile in 0..tiles.count {
                let (start, height) = (tiles.start(tile), tiles.height(tile));
                let (mut a, mut c) = ([std::ptr::null(); MAX_MR], [std::ptr::null_mut(); MAX_MR]);
                for r in 0..height {
                    a[r] = patches[place * place_len(count, row) + (start + r) * row..][..cin].as_ptr();
                    c[r] = sums[place * place_len(count, MAX_NR) + (start + r) * MAX_NR..][..panel.stride].as_mut_ptr();
                }
                let out = Output { c: c.as_ptr(), offset: 0, values: Values::F32, cols: panel.stride, alpha: 1.0, init: Init::Zero };
                let tile =
                    Tile { segments: 1, kc: cin, a: a.as_ptr(), a_step: 0, a_stride: 1, b: weights.as_ptr(), b_stride: panel.stride, out };
                // SAFETY: each row of A has `cin` values, each row of C as many as the panel is wide, and the panel has `cin` rows for each place.
                unsafe { kernels.tile(height, &tile) }
            }
        }
    }
}

/// Transforms the `channels` of the patches of some tiles to `out`, `[place][tile][row_len]` with places [`place_len`] apart; the tiles that have values too large for it.
pub(super) fn transform(grid: &Grid, x: &[f32], all: usize, channels: Range<usize>, tiles: Range<usize>, out: &mut [f32]) -> Vec<usize> {
    let (count, row) = (tiles.len(), row_len(channels.len()));
    assert!(
        out.len() == PLACES * place_len(count, row)
            && x.len() == grid.planes * grid.source[0] * grid.source[1] * all
            && channels.end <= all
    );
    let zeros = vec![0f32; channels.len()];
    let mut failed = Vec::new();
    for (i, tile) in tiles.enumerate() {
        let (plane, [top, left]) = grid.place(tile);
        let mut at = [zeros.as_ptr(); PLACES];
        for (place, at) in at.iter_mut().enumerate() {
            let source = |axis: usize, first: usize, step: usize| {
                let source = grid.offset[axis] + (first + step) as isize;
                usize::try_from(source).ok().filter(|&source| source < grid.source[axis])
            };
            if let (Some(h), Some(w)) = (source(0, top, place / PATCH), source(1, left, place % PATCH)) {
                *at = x[((plane * grid.source[0] + h) * grid.source[1] + w) * all + channels.start..][..channels.len()].as_ptr();
            }
        }
        let patch =
            Patch { at, channels: channels.len(), whole: !grid.middles_cover(), to: &mut out[i * row..], stride: place_len(count, row) };
        if !dispatch(patch) {
            failed.push(tile);
        }
    }
    failed
}

/// Transforms a patch. Whether its values, or those in its middle, are small enough.
struct Patch<'a> {
    /// Each has `channels` values.
    at: [*const f32; PLACES],
    channels: usize,
    /// All values are checked, and not those in the middle only.
    whole: bool,
    /// Of the first place; a row of whole vectors.
    to: &'a mut [f32],
    /// From one place to the next.
    stride: usize,
}

impl WithSimd for Patch<'_> {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> bool {
        assert!(self.to.len() >= (PLACES - 1) * self.stride + self.channels.next_multiple_of(S::LANES));
        let mut check = Check::new(s);
        for at in (0..self.channels).step_by(S::LANES) {
            let count = S::LANES.min(self.channels - at);
            let mut d = [[s.zero(); PATCH]; PATCH];
            for i in 0..PATCH {
                for j in 0..PATCH {
                    let from = self.at[i * PATCH + j].wrapping_add(at);
                    // SAFETY: each address has `channels` values, of which `count` follow.
                    d[i][j] = unsafe { if count == S::LANES { s.load(from) } else { s.load_partial(from, count) } };
                }
            }
            for i in 0..PATCH {
                for j in 0..PATCH {
                    if self.whole || (1..=2).contains(&i) && (1..=2).contains(&j) {
                        check.see(d[i][j]);
                    }
                }
            }
            // SAFETY: the row has room for whole vectors at every place.
            unsafe { store_places(of_sources(d), self.to.as_mut_ptr().add(at), self.stride) };
        }
        check.passed()
    }
}

/// Transforms the sums of a panel back, adds the bias, and stores the targets.
struct Back<'a> {
    grid: &'a Grid,
    /// Of a target.
    channels: usize,
    tiles: Range<usize>,
    sums: &'a [f32],
    /// The panel's first channel.
    first: usize,
    cols: usize,
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
}

impl WithSimd for Back<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (grid, stride) = (self.grid, place_len(self.tiles.len(), MAX_NR));
        assert!(self.sums.len() == PLACES * stride && self.cols <= MAX_NR && self.bias.is_none_or(|bias| bias.len() == self.cols));
        for (i, tile) in self.tiles.enumerate() {
            let (plane, [top, left]) = grid.place(tile);
            for at in (0..self.cols).step_by(S::LANES) {
                let count = S::LANES.min(self.cols - at);
                // SAFETY: a row of sums has MAX_NR values, which are whole vectors.
                let targets = to_targets(unsafe { load_places(s, self.sums.as_ptr().add(i * MAX_NR + at), stride) });
                let bias = match self.bias {
                    // SAFETY: `count` values follow.
                    Some(bias) => unsafe { s.load_partial(bias.as_ptr().add(at), count) },
                    None => s.zero(),
                };
                for di in 0..SIDE.min(grid.target[0] - top) {
                    for dj in 0..SIDE.min(grid.target[1] - left) {
                        let pixel = (plane * grid.target[0] + top + di) * grid.target[1] + left + dj;
                        let target = targets[di][dj] + bias;
                        // SAFETY: the pixel and the channels lie in the image of targets; no other task writes them.
                        unsafe {
                            let to = self.y.add(pixel * self.channels + self.first + at).get();
                            if count == S::LANES { target.store(to) } else { target.store_partial(to, count) }
                        }
                    }
                }
            }
        }
    }
}
