//! Source images packed as rows of A.

use super::super::super::gemm::pack::Strip;
use super::super::super::gemm::split::{self, Magnitudes, Side, TERMS};
use super::super::Gather;
use super::grid::Grid;
use crate::cpu::amx::{ENTRIES, SIDE};
use std::ops::Range;

/// Bytes of a part of a cell: 32 channels.
pub(super) const CELL: usize = 2 * TERMS;

/// Some images, or a band of one, of a group of channels.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub images: Range<usize>,
    /// First target along each axis.
    pub start: [usize; 3],
    pub group: usize,
}

/// Cuts `g`'s images into units whose packed images have about `limit` bytes at `cell` bytes a cell, at least `wanted` if they are that many. The grid becomes that of a unit.
pub(super) fn units(g: &Gather, grid: &mut Grid, even: bool, cell: usize, limit: usize, wanted: usize) -> Vec<Unit> {
    let fits = limit / (grid.len() * cell).max(1);
    let mut per_unit = 1;
    if fits > 0 && g.n >= wanted {
        per_unit = fits.min(g.n / wanted).max(1);
    } else {
        let (axis, whole) = (grid.cut_axis(), grid.clone());
        let targets = whole.axes[axis].targets;
        let rows = wanted.div_ceil(g.n).min(targets);
        let mut bands = rows.max(grid.len() * cell / limit.max(1));
        // The sources that neighbouring bands share are packed twice: bands are not cut so fine that these would be more than the others.
        loop {
            *grid = whole.clone();
            grid.cut(targets.div_ceil(bands.max(1)), even);
            if bands <= 1 || grid.len() * grid.bands() <= 2 * whole.len() {
                break;
            }
            bands -= bands.div_ceil(4);
        }
    }
    let mut units = Vec::new();
    for first in (0..g.n).step_by(per_unit) {
        for band in 0..grid.bands() {
            for group in 0..g.groups {
                units.push(Unit { images: first..(first + per_unit).min(g.n), start: grid.start(band), group });
            }
        }
    }
    units
}

/// Packs a unit's sources as `[image][block of 32 channels][cell][part]`, and returns their magnitudes.
pub(super) fn pack<const PARTS: usize>(g: &Gather, grid: &Grid, unit: &Unit, x: &[f32], out: &mut [u8]) -> Magnitudes {
    let mut seen = Magnitudes::NONE;
    let blocks = g.cin.div_ceil(TERMS);
    let (phases, cell) = (grid.phases(), PARTS * CELL);
    let plane = grid.len() * cell;
    let mut out = out.chunks_exact_mut(plane);
    for image in unit.images.clone() {
        for block in 0..blocks {
            let Some(out) = out.next() else { return seen };
            for phase in
                (0..phases.iter().product::<usize>()).map(|i| [i / (phases[1] * phases[2]), i / phases[2] % phases[1], i % phases[2]])
            {
                let lines: [(Range<usize>, usize); 3] =
                    std::array::from_fn(|i| grid.axes[i].inside(unit.start[i], phase[i], grid.cells[i]));
                for d in 0..grid.cells[0] {
                    for h in 0..grid.cells[1] {
                        let row = &mut out[grid.row(phase, d, h) * cell..][..grid.cells[2] * cell];
                        if !lines[0].0.contains(&d) || !lines[1].0.contains(&h) || lines[2].0.is_empty() {
                            row.fill(0);
                            continue;
                        }
                        let at = |i: usize, cell: usize| lines[i].1 + (cell - lines[i].0.start) * grid.axes[i].increment;
                        let source = ((image * g.source[0] + at(0, d)) * g.source[1] + at(1, h)) * g.source[2] + lines[2].1;
                        let (start, channels) = (source * g.groups + unit.group, TERMS.min(g.cin - block * TERMS));
                        let strip = Strip {
                            src: x[start * g.cin + block * TERMS..].as_ptr(),
                            lanes: lines[2].0.len(),
                            lane_stride: grid.axes[2].increment * g.groups * g.cin,
                            k: channels,
                            k_stride: 1,
                        };
                        row[..lines[2].0.start * cell].fill(0);
                        row[lines[2].0.end * cell..].fill(0);
                        // SAFETY: the strip's pixels are sources inside of the line, of which the last ends within the image.
                        seen = seen.union(unsafe { pack_row::<PARTS>(strip, &mut row[lines[2].0.start * cell..lines[2].0.end * cell]) });
                    }
                }
            }
        }
    }
    seen
}

/// Packs the channels of a row of pixels as cells.
///
/// # Safety
/// The strip must be readable.
unsafe fn pack_row<const PARTS: usize>(strip: Strip, row: &mut [u8]) -> Magnitudes {
    let mut seen = Magnitudes::NONE;
    let mut chunk = [[[0f32; ENTRIES]; SIDE]; 3];
    for (i, cells) in row.chunks_mut(SIDE * PARTS * CELL).enumerate() {
        let first = i * SIDE;
        let part = Strip { src: strip.src.wrapping_add(first * strip.lane_stride), lanes: SIDE.min(strip.lanes - first), ..strip };
        // SAFETY: the lanes are some of the strip's; the chunk holds three parts.
        seen = seen.union(unsafe { split::pack::<f32, PARTS>(Side::A, part, chunk.as_mut_ptr().cast()) });
        for (lane, cell) in cells.chunks_exact_mut(PARTS * CELL).enumerate() {
            for (part, to) in cell.chunks_exact_mut(CELL).enumerate() {
                // SAFETY: both are 64 bytes.
                unsafe { std::ptr::copy_nonoverlapping(chunk[part][lane].as_ptr().cast(), to.as_mut_ptr(), CELL) };
            }
        }
    }
    seen
}
