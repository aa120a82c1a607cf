//! Source images packed as rows of A.

use super::super::super::gemm::pack::Strip;
use super::super::super::gemm::split::{self, Magnitudes, Side, TERMS};
use super::super::Gather;
use super::grid::Grid;
use crate::cpu::amx::{ENTRIES, SIDE};
use crate::cpu::isa::{WithSimd, dispatch_widest};
use crate::cpu::simd::{F32s, Simd};
use std::ops::Range;

/// Bytes of a part of a cell: 32 channels.
pub(super) const CELL: usize = 2 * TERMS;

/// Some images, or a band of one.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    pub images: Range<usize>,
    /// First target along each axis.
    pub start: [usize; 3],
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
            units.push(Unit { images: first..(first + per_unit).min(g.n), start: grid.start(band) });
        }
    }
    units
}

/// Calls `f` for each row of cells of an image with its first cell and, if it has any, the cells that hold sources and the first of these in `g`'s source images.
pub(super) fn each_row(g: &Gather, grid: &Grid, start: [usize; 3], image: usize, mut f: impl FnMut(usize, Option<(Range<usize>, usize)>)) {
    let [_, heights, widths] = grid.phases();
    for phase in (0..grid.phases().iter().product::<usize>()).map(|i| [i / (heights * widths), i / widths % heights, i % widths]) {
        let [(depth, first_d), (height, first_h), (width, first_w)] =
            std::array::from_fn(|i| grid.axes[i].inside(start[i], phase[i], grid.cells[i]));
        for d in 0..grid.cells[0] {
            for h in 0..grid.cells[1] {
                let sources = (depth.contains(&d) && height.contains(&h) && !width.is_empty()).then(|| {
                    let (sd, sh) =
                        (first_d + (d - depth.start) * grid.axes[0].increment, first_h + (h - height.start) * grid.axes[1].increment);
                    (width.clone(), ((image * g.source[0] + sd) * g.source[1] + sh) * g.source[2] + first_w)
                });
                f(grid.row(phase, d, h), sources);
            }
        }
    }
}

/// Packs a unit's sources of a group as `[image][block of 32 channels][cell][part]`, and returns their magnitudes.
pub(super) fn pack<const PARTS: usize>(g: &Gather, grid: &Grid, unit: &Unit, group: usize, x: &[f32], out: &mut [u8]) -> Magnitudes {
    let mut seen = Magnitudes::NONE;
    let blocks = g.cin.div_ceil(TERMS);
    let cell = PARTS * CELL;
    for (i, out) in out.chunks_exact_mut(grid.len() * cell).enumerate() {
        let (image, first) = (unit.images.start + i / blocks, i % blocks * TERMS);
        each_row(g, grid, unit.start, image, |at, sources| {
            let row = &mut out[at * cell..][..grid.cells[2] * cell];
            let Some((inside, source)) = sources else { return row.fill(0) };
            let strip = Strip {
                src: x[(source * g.groups + group) * g.cin + first..].as_ptr(),
                lanes: inside.len(),
                lane_stride: grid.axes[2].increment * g.groups * g.cin,
                k: TERMS.min(g.cin - first),
                k_stride: 1,
            };
            row[..inside.start * cell].fill(0);
            row[inside.end * cell..].fill(0);
            // SAFETY: the strip's pixels are sources inside of the line, of which the last ends within the image.
            seen = seen.union(unsafe { pack_row::<PARTS>(strip, &mut row[inside.start * cell..inside.end * cell]) });
        });
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
        dispatch_widest(CopyRows { from: &chunk[..PARTS], rows: part.lanes, to: cells, row_stride: PARTS * CELL, part_stride: CELL });
    }
    seen
}

/// Copies the first rows of each part, 64 bytes each, to where they belong: strides are in bytes.
pub(super) struct CopyRows<'a> {
    pub from: &'a [[[f32; ENTRIES]; SIDE]],
    pub rows: usize,
    pub to: &'a mut [u8],
    pub row_stride: usize,
    pub part_stride: usize,
}

impl WithSimd for CopyRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        assert!(self.rows > 0 && (self.from.len() - 1) * self.part_stride + (self.rows - 1) * self.row_stride + CELL <= self.to.len());
        for (part, rows) in self.from.iter().enumerate() {
            for (i, row) in rows.iter().enumerate().take(self.rows) {
                let to = self.to.as_mut_ptr().wrapping_add(part * self.part_stride + i * self.row_stride).cast::<f32>();
                for at in (0..ENTRIES).step_by(S::LANES) {
                    // SAFETY: both rows have ENTRIES values, a multiple of LANES, by the assertion; vectors need no alignment.
                    unsafe { s.load(row.as_ptr().add(at)).store(to.wrapping_add(at)) };
                }
            }
        }
    }
}
