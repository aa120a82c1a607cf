//! Large products with f32 sums: super-blocks of both factors are packed once by all threads, then multiplied by all threads.
//!
//! Packed A is `[block of K][row tile][panel]`, packed B `[block of K][panel]`, each panel as its [`Packing`] makes it, and all panels of a
//! factor equally far apart. Where rows of A are neighbours in memory, a panel may hold those of several tiles; where A can be read in place, it is not packed.

use super::Gemm;
use super::blocked::{FLOP_PER_NS, KC, Part, Place, Target, init_of, readable_in_place};
use super::micro::{Output, RowTiles, Started, Tile};
use super::pack::Strip;
use super::packing::{Magnitudes, Packing, Side};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;

/// Most words of a lane of a super-block: with them, a super-block has at least 1024 rows or columns.
const SUPER_K: usize = 4 * KC;

/// Most panels of a task.
const PANELS: usize = 8;

/// Row tiles and panels that a task packs: some 10 µs.
const PACKED_TILES: usize = 4;
const PACKED_PANELS: usize = 2;

/// Smaller products are cut into this many tasks or more, so that threads end at about the same time.
const MIN_TASKS: usize = 16;

/// Nearly equal parts of `0..total`, none larger than `most`, cut at multiples of `unit`.
fn parts(total: usize, most: usize, unit: usize) -> impl Iterator<Item = Range<usize>> {
    let count = total.div_ceil(most.max(unit)).max(1);
    let size = total.div_ceil(count).next_multiple_of(unit);
    (0..total).step_by(size).map(move |start| start..total.min(start + size))
}

/// Computes one item of a batch.
pub(super) fn gemm<P: Packing>(gemm: &Gemm<P::Element, f32>, item: usize, target: &dyn Target) -> Result<(), OutOfMemory> {
    let kernels = P::kernels();
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let most_k = if target.takes_whole_sums() { k } else { SUPER_K / P::WORDS * P::TERMS };
    for ks in parts(k, most_k, P::KC * P::TERMS) {
        let most = P::SUPER_BLOCK / P::words(ks.len());
        let a_in_place = readable_in_place::<P>(&gemm.item(item)).is_some();
        for cols in parts(n, most, kernels.nr) {
            let mut b = Panels::<P>::of_b(cols.len(), ks.len())?;
            for rows in parts(m, most, kernels.mr) {
                let mut a = Panels::<P>::of_a(if a_in_place { 0 } else { rows.len() }, ks.len())?;
                let new_b = rows.start == 0;
                SuperBlock { gemm, item, rows, cols: cols.clone(), ks: ks.clone(), a_in_place }.compute(&mut a, &mut b, new_b, target)?;
            }
        }
    }
    Ok(())
}

/// The packed panels of a factor's part in a super-block.
struct Panels<P> {
    buffer: Buffer,
    /// Lanes of all panels: words of a block of K for each of its words of a lane.
    lanes: usize,
    /// Magnitudes of the values: [`Magnitudes::least`] and [`Magnitudes::most`].
    seen: (AtomicU32, AtomicU32),
    packing: PhantomData<P>,
}

impl<P: Packing> Panels<P> {
    fn new(lanes: usize, terms: usize) -> Result<Self, OutOfMemory> {
        let buffer = Buffer::new(lanes * P::words(terms) * size_of::<f32>())?;
        let Magnitudes { least, most } = Magnitudes::NONE;
        Ok(Self { buffer, lanes, seen: (least.into(), most.into()), packing: PhantomData })
    }

    /// For row tiles.
    fn of_a(rows: usize, terms: usize) -> Result<Self, OutOfMemory> {
        let tiles = P::kernels().row_tiles(rows);
        Self::new(tiles.count * P::panel_rows(tiles.height(0)), terms)
    }

    /// For columns; the last panel may be narrower, and room for a full one is never too little.
    fn of_b(cols: usize, terms: usize) -> Result<Self, OutOfMemory> {
        Self::new(cols.next_multiple_of(P::kernels().nr), terms)
    }

    fn see(&self, values: Magnitudes) {
        self.seen.0.fetch_min(values.least, Relaxed);
        self.seen.1.fetch_max(values.most, Relaxed);
    }

    fn magnitudes(&self) -> Magnitudes {
        Magnitudes { least: self.seen.0.load(Relaxed), most: self.seen.1.load(Relaxed) }
    }
}

/// A super-block of an item.
struct SuperBlock<'a, P: Packing> {
    gemm: &'a Gemm<'a, P::Element, f32>,
    item: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    ks: Range<usize>,
    /// Whether A is not packed but read where it is.
    a_in_place: bool,
}

impl<P: Packing> SuperBlock<'_, P> {
    /// Terms of a block of K.
    const TERMS: usize = P::KC * P::TERMS;

    /// Packs A if it is to be, and B if it is new, and multiplies them.
    fn compute(self, a: &mut Panels<P>, b: &mut Panels<P>, new_b: bool, target: &dyn Target) -> Result<(), OutOfMemory> {
        let at = Addresses {
            a: SharedMut::new(a.buffer.as_slice_mut()),
            a_lanes: a.lanes,
            b: SharedMut::new(b.buffer.as_slice_mut()),
            b_lanes: b.lanes,
        };
        let is_wide = P::WIDE && self.gemm.a.row_stride() == 1;
        let wide = if is_wide { PACKED_TILES } else { 1 };
        let packed = Packed { block: &self, tiles: P::kernels().row_tiles(self.rows.len()), wide, at };
        packed.pack(a, b, new_b);
        if P::multiplies(a.magnitudes(), b.magnitudes(), self.ks.len()) {
            return packed.multiply(target);
        }
        self.fall_back(target)
    }

    /// The same with the micro-kernels for any values.
    #[cold]
    fn fall_back(self, target: &dyn Target) -> Result<(), OutOfMemory> {
        let Self { gemm, item, rows, cols, ks, .. } = self;
        let (mut a, mut b) = (Panels::of_a(rows.len(), ks.len())?, Panels::of_b(cols.len(), ks.len())?);
        SuperBlock::<P::Fallback> { gemm, item, rows, cols, ks, a_in_place: false }.compute(&mut a, &mut b, true, target)
    }
}

/// Where the panels of a super-block lie.
#[derive(Clone, Copy)]
struct Addresses {
    a: SharedMut<f32>,
    a_lanes: usize,
    b: SharedMut<f32>,
    b_lanes: usize,
}

/// A super-block and its panels.
struct Packed<'a, P: Packing> {
    block: &'a SuperBlock<'a, P>,
    tiles: RowTiles,
    /// Tiles of a panel of A.
    wide: usize,
    at: Addresses,
}

/// Number `i` of `count` nearly equal parts of `0..total`.
fn cut(total: usize, count: usize, i: usize) -> Range<usize> {
    i * total / count..(i + 1) * total / count
}

impl<P: Packing> Packed<'_, P> {
    const TERMS: usize = SuperBlock::<P>::TERMS;

    fn panels(&self) -> usize {
        self.block.cols.len().div_ceil(P::kernels().nr)
    }

    /// Packs A if it is to be, and B if it is new, a few strips of one block of K a task.
    fn pack(&self, a: &Panels<P>, b: &Panels<P>, new_b: bool) {
        let panels = self.panels();
        let SuperBlock { rows, cols, ks, .. } = self.block;
        let packed = |count: usize, is_packed: bool| if is_packed { count } else { 0 };
        let new_a = !self.block.a_in_place;
        let (a_groups, b_groups) = (packed(self.tiles.count.div_ceil(PACKED_TILES), new_a), packed(panels.div_ceil(PACKED_PANELS), new_b));
        let groups = a_groups + b_groups;
        let values = ks.len() * (packed(rows.len(), new_a) + packed(cols.len(), new_b));
        for_each(groups * ks.len().div_ceil(Self::TERMS), values, |task| {
            let (k, group) = (task / groups * Self::TERMS, task % groups);
            let terms = Self::TERMS.min(ks.len() - k);
            if group < a_groups {
                let tiles = group * PACKED_TILES..self.tiles.count.min((group + 1) * PACKED_TILES);
                let strips = tiles.start / self.wide..tiles.end.div_ceil(self.wide);
                a.see(dispatch(PackStrips { side: Side::A, strips, strip: |i| self.a_strip(k, terms, i), packing: PhantomData::<P> }));
            } else {
                let strips = cut(panels, b_groups, group - a_groups);
                b.see(dispatch(PackStrips { side: Side::B, strips, strip: |i| self.b_strip(k, terms, i), packing: PhantomData::<P> }));
            }
        });
    }

    /// The rows of panel `i` of A.
    fn a_rows(&self, i: usize) -> Range<usize> {
        self.tiles.start(i * self.wide)..self.tiles.start(self.tiles.count.min((i + 1) * self.wide))
    }

    /// Panel `i` of A in the block of K that begins at `k`: the strip, its panel's width and place.
    fn a_strip(&self, k: usize, terms: usize, i: usize) -> (Strip<P::Element>, usize, *mut f32) {
        let rows = self.a_rows(i);
        let a = self.block.gemm.item(self.block.item).a;
        let src = a.at(self.block.rows.start + rows.start, self.block.ks.start + k);
        let strip = Strip { src, lanes: rows.len(), lane_stride: a.row_stride, k: terms, k_stride: a.col_stride };
        (strip, rows.len(), self.packed_a(k, terms, i * self.wide))
    }

    /// Panel `i` of B, likewise.
    fn b_strip(&self, k: usize, terms: usize, i: usize) -> (Strip<P::Element>, usize, *mut f32) {
        let kernels = P::kernels();
        let col = i * kernels.nr;
        let cols = kernels.nr.min(self.block.cols.len() - col);
        let b = self.block.gemm.item(self.block.item).b;
        let src = b.at(self.block.ks.start + k, self.block.cols.start + col);
        let strip = Strip { src, lanes: cols, lane_stride: b.col_stride, k: terms, k_stride: b.row_stride };
        (strip, kernels.panel_width(cols), self.packed_b(k, terms, i))
    }

    /// Where the panel whose first row tile is `i` lies in packed A, in the block of `terms` of K that begins at `k`.
    fn packed_a(&self, k: usize, terms: usize, i: usize) -> *mut f32 {
        let panel_rows = P::panel_rows(self.tiles.height(0));
        self.at.a.get().wrapping_add(k / P::TERMS * P::WORDS * self.at.a_lanes + i * panel_rows * P::words(terms))
    }

    /// Where panel `i` lies in packed B.
    fn packed_b(&self, k: usize, terms: usize, i: usize) -> *mut f32 {
        self.at.b.get().wrapping_add(k / P::TERMS * P::WORDS * self.at.b_lanes + i * P::kernels().nr * P::words(terms))
    }

    /// Multiplies the packed factors, a few tiles by a few panels a task.
    fn multiply(&self, target: &dyn Target) -> Result<(), OutOfMemory> {
        let SuperBlock { rows, cols, ks, item, .. } = self.block;
        let (tiles, panels) = (self.tiles.count, self.panels());
        let (mut row_groups, mut col_groups) = (tiles.div_ceil(P::TILES), panels.div_ceil(PANELS));
        while row_groups * col_groups < MIN_TASKS && (row_groups < tiles || col_groups < panels) {
            // Square parts share most.
            let higher = rows.len() * col_groups >= cols.len() * row_groups;
            if col_groups == panels || (higher && row_groups < tiles) {
                row_groups = (2 * row_groups).min(tiles);
            } else {
                col_groups = (2 * col_groups).min(panels);
            }
        }
        let failure = OnceLock::new();
        for_each(row_groups * col_groups, rows.len() * cols.len() * ks.len() / (P::SPEED * FLOP_PER_NS) * 2, |task| {
            // Neighbouring tasks share their panels of B, the larger part of what they read.
            let (tiles, panels) = (cut(tiles, row_groups, task % row_groups), cut(panels, col_groups, task / row_groups));
            let nr = P::kernels().nr;
            let part = Part {
                item: *item,
                rows: rows.start + self.tiles.start(tiles.start)..rows.start + self.tiles.start(tiles.end),
                cols: cols.start + panels.start * nr..cols.end.min(cols.start + panels.end * nr),
            };
            let compute = |out| {
                self.part(&tiles, &panels, out);
                Ok(())
            };
            if let Err(error) = target.take(&part, &compute) {
                failure.get_or_init(|| error);
            }
        });
        failure.get().map_or(Ok(()), |&error| Err(error))
    }

    /// Some tiles by some panels.
    fn part(&self, tiles: &Range<usize>, panels: &Range<usize>, out: Place) {
        let started = P::kernels().start();
        let SuperBlock { gemm, item, rows, ks, a_in_place, .. } = self.block;
        let a = readable_in_place::<P>(&gemm.item(*item)).filter(|_| *a_in_place);
        let first = self.tiles.start(tiles.start);
        let rows_of = |tile: usize| self.tiles.start(tile) - first..self.tiles.start(tile + 1) - first;
        let c_rows: Vec<_> = out.rows(rows.start + first..rows.start + self.tiles.start(tiles.end)).collect();
        let mut a_rows = vec![std::ptr::null(); c_rows.len()];
        for k in (0..ks.len()).step_by(Self::TERMS) {
            for tile in tiles.clone() {
                for (r, address) in (self.tiles.start(tile)..).zip(&mut a_rows[rows_of(tile)]) {
                    *address = match a {
                        Some(a) => a.at(rows.start + r, (ks.start + k) / P::TERMS),
                        None => self.packed_row(k, Self::TERMS.min(ks.len() - k), tile, r),
                    };
                }
            }
            for panel in panels.clone() {
                for tile in tiles.clone() {
                    let a_stride = a.map_or(self.a_rows(tile / self.wide).len(), |a| a.col_stride);
                    self.tile(&started, &a_rows[rows_of(tile)], a_stride, &c_rows[rows_of(tile)], out, k, panel);
                }
            }
        }
    }

    /// Where row `r` of A, one of row tile `tile`, lies in its panel.
    fn packed_row(&self, k: usize, terms: usize, tile: usize, r: usize) -> *const f32 {
        let panel = tile / self.wide;
        self.packed_a(k, terms, panel * self.wide).wrapping_add(r - self.a_rows(panel).start).cast_const()
    }

    /// One tile of C over one block of K, from the addresses of its rows.
    #[allow(clippy::too_many_arguments)] // Both factors and C.
    fn tile(&self, started: &Started, a: &[*const f32], a_stride: usize, c: &[*mut f32], place: Place, k: usize, panel: usize) {
        let SuperBlock { gemm, cols, ks, .. } = self.block;
        let kernels = P::kernels();
        let terms = Self::TERMS.min(ks.len() - k);
        let col = cols.start + panel * kernels.nr;
        let width = kernels.nr.min(cols.end - col);
        let b = self.packed_b(k, terms, panel).cast_const();
        let (values, alpha, init) = (place.values(), gemm.alpha as f32, init_of(gemm, ks.start + k == 0, col));
        let out = Output { c: c.as_ptr(), offset: place.offset(col), values, cols: width, alpha, init };
        let b_stride = kernels.panel_width(width);
        let tile = Tile { segments: 1, kc: P::entries(terms), a: a.as_ptr(), a_step: 0, a_stride, b: &b, b_stride, out };
        // SAFETY: panels were packed before any task began, and rows of A lie inside it; the target gave room for these rows of C, and no two
        // tasks share a tile.
        unsafe { kernels.panel_tile(started, c.len(), &tile) }
    }
}

/// Packs some strips of one factor; returns the values' magnitudes.
struct PackStrips<P, F> {
    side: Side,
    strips: Range<usize>,
    /// A strip, its panel's width and place.
    strip: F,
    packing: PhantomData<P>,
}

impl<P: Packing, F: Fn(usize) -> (Strip<P::Element>, usize, *mut f32)> WithSimd for PackStrips<P, F> {
    type Output = Magnitudes;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Magnitudes {
        let mut seen = Magnitudes::NONE;
        for i in self.strips {
            let (strip, width, to) = (self.strip)(i);
            // SAFETY: the strip lies inside its factor, whose extent `Gemm::run` checked; each strip has its own panel, and the buffers
            // hold all of them.
            seen = seen.union(unsafe { P::pack(s, self.side, strip, width, to) });
        }
        seen
    }
}
