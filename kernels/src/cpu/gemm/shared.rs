//! Large products with f32 sums: super-blocks of both factors are packed once by all threads, then multiplied by all threads.
//!
//! Packed A is `[block of K][row tile][kc][height]`, packed B `[block of K][panel][kc][width]`, both without gaps.

use super::blocked::{KC, c_rows, init_of};
use super::micro::{MAX_MR, MicroKernels, Output, RowTiles, Tile};
use super::pack::Strip;
use super::packing::Packing;
use super::{Gemm, Matrix, Out};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;

/// Values of a packed super-block of each factor: 8 MiB, so that both fit the L3 of most machines.
const SUPER_BLOCK: usize = 2 << 20;

/// Most terms of a super-block: with it, a super-block has at least 1024 rows or columns.
const SUPER_K: usize = 8 * KC;

/// Row tiles and panels of a task. At AVX-512 its block of A (192 × KC) is 288 KiB of L2, each panel of B comes from L3 once for 16 tiles,
/// and it lasts about 0.8 ms at K = 1024: short enough to keep threads evenly busy, long enough to hide the hand-over.
const TILES: usize = 16;
const PANELS: usize = 8;

/// Nearly equal parts of `0..total`, none larger than `most`, cut at multiples of `unit`.
fn parts(total: usize, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let count = total.div_ceil(most.max(unit)).max(1);
    let size = total.div_ceil(count).next_multiple_of(unit);
    (0..total).step_by(size).map(move |start| start..total.min(start + size))
}

/// Computes one item of a batch.
pub(super) fn gemm<P: Packing>(gemm: &Gemm<P::Element, f32>, item: usize, c: SharedMut<f32>, row_stride: usize) -> Result<(), OutOfMemory> {
    let kernels = P::kernels();
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    for ks in parts(k, SUPER_K * P::TERMS, KC * P::TERMS) {
        let entries = ks.len().div_ceil(P::TERMS);
        let most = SUPER_BLOCK / entries;
        for cols in parts(n, most, kernels.nr) {
            // The last panel may be narrower; room for a full one is never too little.
            let mut b = Buffer::new(cols.len().next_multiple_of(kernels.nr) * entries * size_of::<f32>())?;
            let b = SharedMut::new(b.as_slice_mut());
            for rows in parts(m, most, kernels.mr) {
                let mut a = Buffer::new(rows.len() * entries * size_of::<f32>())?;
                let a = SharedMut::new(a.as_slice_mut());
                let tiles = kernels.row_tiles(rows.len());
                let new_b = rows.start == 0;
                let block = SuperBlock::<P> { gemm, item, kernels, tiles, rows, cols: cols.clone(), ks: ks.clone(), a, b };
                block.pack(new_b);
                block.multiply(c, row_stride);
            }
        }
    }
    Ok(())
}

/// A super-block of an item, and its packed factors.
struct SuperBlock<'a, P: Packing> {
    gemm: &'a Gemm<'a, P::Element, f32>,
    item: usize,
    kernels: &'static MicroKernels,
    tiles: RowTiles,
    rows: Range<usize>,
    cols: Range<usize>,
    ks: Range<usize>,
    a: SharedMut<f32>,
    b: SharedMut<f32>,
}

impl<P: Packing> SuperBlock<'_, P> {
    /// Terms of a block of K.
    const TERMS: usize = KC * P::TERMS;

    /// Packs A, and B if it is new, a few strips of one block of K a task.
    fn pack(&self, new_b: bool) {
        let panels = self.cols.len().div_ceil(self.kernels.nr);
        let (a_groups, b_groups) = (self.tiles.count.div_ceil(TILES), if new_b { panels.div_ceil(PANELS) } else { 0 });
        let groups = a_groups + b_groups;
        let values = self.ks.len() * (self.rows.len() + self.cols.len());
        for_each(groups * self.ks.len().div_ceil(Self::TERMS), values, |task| {
            let (k, group) = (task / groups * Self::TERMS, task % groups);
            let terms = Self::TERMS.min(self.ks.len() - k);
            if group < a_groups {
                let strips = group * TILES..self.tiles.count.min((group + 1) * TILES);
                dispatch(PackStrips { strips, strip: |i| self.a_strip(k, terms, i), packing: PhantomData::<P> });
            } else {
                let first = (group - a_groups) * PANELS;
                dispatch(PackStrips {
                    strips: first..panels.min(first + PANELS),
                    strip: |i| self.b_strip(k, terms, i),
                    packing: PhantomData::<P>,
                });
            }
        });
    }

    /// Row tile `i` of A in the block of K that begins at `k`: the strip, its panel's width and place.
    fn a_strip(&self, k: usize, terms: usize, i: usize) -> (Strip<P::Element>, usize, *mut f32) {
        let (row, height) = (self.tiles.start(i), self.tiles.height(i));
        let Matrix { row_stride, col_stride, .. } = self.gemm.item(self.item).a;
        let src = self.gemm.item(self.item).a.at(self.rows.start + row, self.ks.start + k);
        (Strip { src, lanes: height, lane_stride: row_stride, k: terms, k_stride: col_stride }, height, self.packed_a(k, terms, row))
    }

    /// Panel `i` of B, likewise.
    fn b_strip(&self, k: usize, terms: usize, i: usize) -> (Strip<P::Element>, usize, *mut f32) {
        let col = i * self.kernels.nr;
        let cols = self.kernels.nr.min(self.cols.len() - col);
        let Matrix { row_stride, col_stride, .. } = self.gemm.item(self.item).b;
        let src = self.gemm.item(self.item).b.at(self.ks.start + k, self.cols.start + col);
        let strip = Strip { src, lanes: cols, lane_stride: col_stride, k: terms, k_stride: row_stride };
        (strip, self.kernels.panel_width(cols), self.packed_b(k, terms, col))
    }

    /// Where the row tile that begins at `row` lies in packed A, in the block of `terms` of K that begins at `k`.
    fn packed_a(&self, k: usize, terms: usize, row: usize) -> *mut f32 {
        self.a.get().wrapping_add(k / P::TERMS * self.rows.len() + row * terms.div_ceil(P::TERMS))
    }

    /// Where the panel that begins at `col` lies in packed B: blocks of K are a full last panel apart.
    fn packed_b(&self, k: usize, terms: usize, col: usize) -> *mut f32 {
        self.b.get().wrapping_add(k / P::TERMS * self.cols.len().next_multiple_of(self.kernels.nr) + col * terms.div_ceil(P::TERMS))
    }

    /// Multiplies the packed factors into C, a few tiles by a few panels a task.
    fn multiply(&self, c: SharedMut<f32>, row_stride: usize) {
        let panels = self.cols.len().div_ceil(self.kernels.nr);
        let (row_groups, col_groups) = (self.tiles.count.div_ceil(TILES), panels.div_ceil(PANELS));
        let macs = self.rows.len() * self.cols.len() * self.ks.len();
        for_each(row_groups * col_groups, macs, |task| {
            // Neighbouring tasks share their panels of B, the larger part of what they read.
            let (row, col) = (task % row_groups * TILES, task / row_groups * PANELS);
            let (tiles, panels) = (row..self.tiles.count.min(row + TILES), col..panels.min(col + PANELS));
            let out = Out { c: c.get().wrapping_add(self.item * self.gemm.a.rows() * row_stride), row_stride };
            for k in (0..self.ks.len()).step_by(Self::TERMS) {
                for panel in panels.clone() {
                    for tile in tiles.clone() {
                        self.tile(out, k, tile, panel * self.kernels.nr);
                    }
                }
            }
        });
    }

    /// One tile of C over one block of K.
    fn tile(&self, out: Out<f32>, k: usize, tile: usize, col: usize) {
        let terms = Self::TERMS.min(self.ks.len() - k);
        let (row, height) = (self.tiles.start(tile), self.tiles.height(tile));
        let cols = self.kernels.nr.min(self.cols.len() - col);
        let a = self.packed_a(k, terms, row).cast_const();
        let a: [*const f32; MAX_MR] = std::array::from_fn(|r| a.wrapping_add(r));
        let b = self.packed_b(k, terms, col).cast_const();
        let c = c_rows(out, self.rows.start + row, self.cols.start + col);
        let first = self.ks.start + k == 0;
        let out = Output { c: c.as_ptr(), cols, alpha: self.gemm.alpha as f32, init: init_of(self.gemm, first, self.cols.start + col) };
        let b_stride = self.kernels.panel_width(cols);
        let tile = Tile { segments: 1, kc: terms.div_ceil(P::TERMS), a: a.as_ptr(), a_stride: height, b: &b, b_stride, out };
        // SAFETY: both panels were packed before any task began; the first `height` rows of C lie inside it (`Gemm::run` checked
        // its extent), and no two tasks share a tile.
        unsafe { self.kernels.tile(height, &tile) }
    }
}

/// Packs some strips of one factor.
struct PackStrips<P, F> {
    strips: Range<usize>,
    /// A strip, its panel's width and place.
    strip: F,
    packing: PhantomData<P>,
}

impl<P: Packing, F: Fn(usize) -> (Strip<P::Element>, usize, *mut f32)> WithSimd for PackStrips<P, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for i in self.strips {
            let (strip, width, to) = (self.strip)(i);
            // SAFETY: the strip lies inside its factor, whose extent `Gemm::run` checked; each strip has its own panel, and the buffers
            // hold all of them.
            unsafe { P::pack(s, strip, width, to) };
        }
    }
}
