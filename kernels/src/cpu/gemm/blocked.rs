//! The f32 product: which path a shape takes, and the path of small and middling ones.
//!
//! The plain algorithm is five loops around a micro-kernel: over K in steps of [`KC`], over panels of B, over row tiles of A.
//! The code differs from it in these points:
//!
//! 1. A panel of B (KC × NR: 96 KiB at AVX-512) is used for all row tiles before the next; both stream from L2.
//! 2. Large products, and those whose factors would be packed by many tasks, pack both once, in parallel (`shared`); tasks then only compute.
//!    Smaller ones are cut into tasks that pack what they need themselves ([`Block`]): a little is packed twice, and no thread waits.
//! 3. A factor is not packed where that costs more than it saves: A where memory holds it in an order that serves, B if it meets few row tiles.
//! 4. K is split at multiples of KC only, and C collects the parts in order.

use super::epilogue::Activated;
use super::micro::{Init, Output, RowTiles, Tile, Values};
use super::pack::Strip;
use super::packing::{Magnitudes, Packing, Plain, Side};
use super::{Gemm, GemmElement, Item, Matrix, Out, dot, shared, tiny};
#[cfg(target_arch = "x86_64")]
use super::{MatmulPrecision, matmul_precision, tiles};
use crate::cpu::alloc::{Buffer, OutOfMemory};
use crate::cpu::isa::{WithSimd, dispatch, l1_ways};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use half::bf16;
use std::cell::RefCell;
use std::ops::Range;
use std::sync::OnceLock;

/// Words of a lane that a tile reads (terms, if the words are values) before its sums go to C: measured best of 256, 384, 512 and 768 on Zen 5.
/// Panels of B then come from L2, which keeps up with tiles; what long blocks of K save is the way of C there and back.
pub(super) const KC: usize = 768;

/// Rough work of a core in a nanosecond, to estimate times: half of 2 × 32 flop a cycle.
pub(super) const FLOP_PER_NS: usize = 64;

/// Elements of small factors that are packed in a nanosecond.
const PACKED_PER_NS: usize = 4;

/// A task of the small path has about this many multiply-adds of plain f32 (20 µs): cut finer, the strips that several tasks pack for themselves tell.
const TASK_MACS: usize = 1 << 20;

/// Fewer are not worth a task of their own.
const TINY_MACS: usize = 1 << 14;

/// Of so many rows, read in place, and so many words of B, tasks pack a panel of B when they need it: packed all together, B would go out of L2
/// and back for the sake of few products.
const FEW_ROWS: usize = 128;
const LARGE_B: usize = 1 << 20;

/// The most tasks that a product is cut into.
const MAX_TASKS: usize = 32;

impl GemmElement for f32 {
    fn gemm(gemm: &Gemm<f32>, out: &mut [f32], row_stride: usize) -> Result<(), OutOfMemory> {
        if tiny::try_gemm(gemm, out, row_stride) || dot::try_gemm(gemm, out, row_stride) {
            return Ok(());
        }
        let sums = Sums { c: SharedMut::new(out), item_stride: gemm.a.rows() * row_stride, row_stride };
        let c: &dyn Target = if gemm.activation.is_some() { &Activated { sums, gemm } } else { &sums };
        #[cfg(target_arch = "x86_64")]
        {
            let pay = |parts| tiles::pay(parts, gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
            match matmul_precision() {
                MatmulPrecision::Highest if pay(3) => return multiply::<tiles::Split<f32, 3>>(gemm, c),
                MatmulPrecision::High if pay(2) => return multiply::<tiles::Split<f32, 2>>(gemm, c),
                MatmulPrecision::Medium if pay(1) => return multiply::<tiles::Split<f32, 1>>(gemm, c),
                _ => {}
            }
        }
        multiply::<Plain>(gemm, c)
    }
}

/// The product by packed panels.
pub(super) fn multiply<P: Packing>(gemm: &Gemm<P::Element, f32>, target: &dyn Target) -> Result<(), OutOfMemory> {
    if packs_once::<P>(gemm) { (0..gemm.batch()).try_for_each(|i| shared::gemm::<P>(gemm, i, target)) } else { small::<P>(gemm, target) }
}

/// Whether both factors are to be packed once for all tasks: always if they are used often enough, and of a single product earlier the more of
/// their packing tasks would repeat. Measured on Zen 5.
fn packs_once<P: Packing>(gemm: &Gemm<P::Element, f32>) -> bool {
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let work = m * n * k;
    let in_place = readable_in_place::<P>(&gemm.item(0)).is_some();
    if in_place && m <= FEW_ROWS && n * P::words(k) >= LARGE_B {
        return false;
    }
    if m >= 192 && n >= 192 && work >= 1 << 24 {
        return true;
    }
    let copies_b = P::TERMS == 1 && gemm.b.col_stride() == 1;
    gemm.batch() == 1
        && m >= 48
        && match (in_place, copies_b) {
            (true, true) => n >= 96 && k > P::KC / 2 && work >= 1 << 23,
            (true, false) => n >= 32 && work >= 1 << 20,
            (false, _) => n >= 64 && work >= 1 << 20,
        }
}

/// The entries of A, if tiles are to read them without their being packed, which costs more than it saves where memory holds them in an order
/// that serves. A tile's rows must not drive one another out of L1.
pub(super) fn readable_in_place<P: Packing>(item: &Item<P::Element>) -> Option<Matrix<f32>> {
    let a = P::in_place(item.a, item.k)?;
    let (contiguous, stride) = if a.col_stride == 1 { (true, a.row_stride) } else { (a.row_stride == 1, a.col_stride) };
    // What lies a page apart falls on one set of the 64 that L1 usually has.
    let sets = PAGE / PAGE.min(1 << stride.trailing_zeros().min(PAGE.ilog2()));
    (contiguous && P::kernels().mr.div_ceil(sets) <= l1_ways()).then_some(a)
}

/// Words of 4 KiB.
const PAGE: usize = 1024;

/// Some rows and columns of an item.
pub(super) struct Part {
    pub item: usize,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
}

/// Where sums go, part by part.
pub(super) trait Target: Sync {
    /// Whether a part is computed once; otherwise it may be several times, over some of K each, the later ones adding to what is there.
    fn takes_whole_sums(&self) -> bool;

    /// Calls `compute` with the place where the part's item begins: only the part is written.
    fn take(&self, part: &Part, compute: &dyn Fn(Place) -> Result<(), OutOfMemory>) -> Result<(), OutOfMemory>;
}

/// Where an item's results begin.
#[derive(Clone, Copy)]
pub(super) enum Place {
    /// As sums.
    F32(Out<f32>),
    /// Rounded by the micro-kernels, whose tiles must hold whole sums.
    Bf16(Out<bf16>),
}

impl Place {
    pub fn values(self) -> Values {
        match self {
            Self::F32(_) => Values::F32,
            Self::Bf16(_) => Values::Bf16,
        }
    }

    /// Addresses of rows of C.
    pub fn rows(self, rows: Range<usize>) -> impl Iterator<Item = *mut f32> {
        rows.map(move |row| match self {
            Self::F32(out) => out.at(row, 0),
            Self::Bf16(out) => out.at(row, 0).cast(),
        })
    }

    /// Bytes from the address of a row to that of its column `col`.
    pub fn offset(self, col: usize) -> usize {
        match self {
            Self::F32(_) => size_of::<f32>() * col,
            Self::Bf16(_) => size_of::<bf16>() * col,
        }
    }
}

/// C as it is.
pub(super) struct Sums {
    pub c: SharedMut<f32>,
    pub item_stride: usize,
    pub row_stride: usize,
}

impl Target for Sums {
    fn takes_whole_sums(&self) -> bool {
        false
    }

    fn take(&self, part: &Part, compute: &dyn Fn(Place) -> Result<(), OutOfMemory>) -> Result<(), OutOfMemory> {
        compute(Place::F32(self.item(part.item)))
    }
}

impl Sums {
    /// Where an item begins.
    pub fn item(&self, item: usize) -> Out<f32> {
        Out { c: self.c.get().wrapping_add(item * self.item_stride), row_stride: self.row_stride }
    }
}

/// How C's tiles begin: the first block of K sees the caller's wish, the others add.
pub(super) fn init_of<T>(gemm: &Gemm<T, f32>, first_k: bool, col: usize) -> Init {
    match gemm.bias {
        _ if !first_k || gemm.accumulate => Init::C,
        // A tile begins at a column below N, the bias' length.
        Some(bias) => Init::Bias(bias[col..].as_ptr()),
        None => Init::Zero,
    }
}

/// Cuts a batch of products into tasks of nearly equal work, by shape alone.
struct Grid {
    row_blocks: usize,
    col_blocks: usize,
    rows: RowTiles,
    panels: usize,
    nr: usize,
    n: usize,
}

impl Grid {
    fn new<P: Packing>(m: usize, n: usize, k: usize, tasks: usize) -> Self {
        let kernels = P::kernels();
        let (rows, panels) = (kernels.row_tiles(m), n.div_ceil(kernels.nr));
        let (mut row_blocks, mut col_blocks) = (m.div_ceil(P::BLOCK_ROWS), 1);
        let wanted = (m * n * k).div_ceil(P::SPEED * TASK_MACS).min(tasks);
        while row_blocks * col_blocks < wanted {
            // Square blocks pack least; a block of rows is worth more than its height, for B is packed once for each.
            let (height, width) = (m / row_blocks, n / col_blocks);
            if width >= height && col_blocks < panels {
                col_blocks = (2 * col_blocks).min(panels);
            } else if row_blocks < rows.count {
                row_blocks = (2 * row_blocks).min(rows.count);
            } else if col_blocks < panels {
                col_blocks = (2 * col_blocks).min(panels);
            } else {
                break;
            }
        }
        Self { row_blocks, col_blocks, rows, panels, nr: kernels.nr, n }
    }

    fn count(&self) -> usize {
        self.row_blocks * self.col_blocks
    }

    /// The rows and the columns of a task.
    fn task(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let (row, col) = (i % self.row_blocks, i / self.row_blocks);
        let cut = |parts: usize, total: usize, i: usize| i * total / parts;
        let tiles = cut(self.row_blocks, self.rows.count, row)..cut(self.row_blocks, self.rows.count, row + 1);
        let start = cut(self.col_blocks, self.panels, col) * self.nr;
        let end = (cut(self.col_blocks, self.panels, col + 1) * self.nr).min(self.n);
        (self.rows.start(tiles.start)..self.rows.start(tiles.end), start..end)
    }
}

/// Products whose tasks pack for themselves.
fn small<P: Packing>(gemm: &Gemm<P::Element, f32>, target: &dyn Target) -> Result<(), OutOfMemory> {
    let (batch, m, n, k) = (gemm.batch(), gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let grid = Grid::new::<P>(m, n, k, MAX_TASKS.div_ceil(batch));
    let total = batch * grid.count();
    // Tiny items go to a thread by the dozen.
    let of_macs = |macs: usize| macs * grid.count() / (m * n * k).max(1);
    let most = total.div_ceil(MAX_TASKS).max(of_macs(TINY_MACS)).max(1);
    let group = of_macs(P::SPEED * TASK_MACS).clamp(1, most);
    let failure = OnceLock::new();
    // A tile computes all columns of its vectors, and what is packed takes longest of small factors.
    let width = match n % grid.nr {
        0 => n,
        rest => n - rest + P::kernels().panel_width(rest),
    };
    let estimated_ns = 2 * batch * m * width * k / (P::SPEED * FLOP_PER_NS) + batch * (m + n) * k / PACKED_PER_NS;
    for_each(total.div_ceil(group), estimated_ns, |task| {
        let scratch = RefCell::new(Scratch::default());
        for i in task * group..total.min((task + 1) * group) {
            let (rows, cols) = grid.task(i % grid.count());
            let part = Part { item: i / grid.count(), rows, cols };
            let compute = |out| {
                let (rows, cols) = (part.rows.clone(), part.cols.clone());
                Block::<P> { gemm, item: gemm.item(part.item), rows, cols, ks: 0..k }.compute(out, &mut scratch.borrow_mut())
            };
            if let Err(error) = target.take(&part, &compute) {
                failure.get_or_init(|| error);
            }
        }
    });
    failure.get().map_or(Ok(()), |&error| Err(error))
}

/// Some rows and columns of one C, over some of K.
struct Block<'a, P: Packing> {
    gemm: &'a Gemm<'a, P::Element, f32>,
    item: Item<P::Element>,
    rows: Range<usize>,
    cols: Range<usize>,
    ks: Range<usize>,
}

impl<P: Packing> Block<'_, P> {
    /// Computes it into `out`, where its item begins.
    fn compute(self, out: Place, scratch: &mut Scratch) -> Result<(), OutOfMemory> {
        dispatch(Compute { block: self, out, scratch })
    }

    /// A part of the block by the micro-kernels for any values.
    #[cold]
    fn fall_back(&self, cols: Range<usize>, ks: Range<usize>, out: Place) -> Result<(), OutOfMemory> {
        let Self { gemm, item, .. } = *self;
        Block::<P::Fallback> { gemm, item, rows: self.rows.clone(), cols, ks }.compute(out, &mut Scratch::default())
    }
}

/// Memory that a task's blocks use one after the other.
#[derive(Default)]
struct Scratch {
    a: Room,
    panel: Room,
    a_rows: Vec<*const f32>,
    c_rows: Vec<*mut f32>,
}

#[derive(Default)]
struct Room(Option<Buffer>);

impl Room {
    /// Room for so many words.
    fn of(&mut self, words: usize) -> Result<&mut [f32], OutOfMemory> {
        let bytes = words * size_of::<f32>();
        let buffer = match self.0.take() {
            Some(buffer) if buffer.len() >= bytes => buffer,
            _ => Buffer::new(bytes)?,
        };
        Ok(self.0.insert(buffer).as_slice_mut())
    }
}

/// Some of one C, and where its item begins.
struct Compute<'a, 's, P: Packing> {
    block: Block<'a, P>,
    out: Place,
    scratch: &'s mut Scratch,
}

impl<P: Packing> WithSimd for Compute<'_, '_, P> {
    type Output = Result<(), OutOfMemory>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> Self::Output {
        let Self { block, out: c, scratch: Scratch { a: a_room, panel: panel_room, a_rows, c_rows } } = self;
        let kernels = P::kernels();
        let started = kernels.start();
        let most = P::KC * P::TERMS;
        let Item { a, b, k, .. } = block.item;
        let tiles = kernels.row_tiles(block.rows.len());
        let panel_rows = P::panel_rows(tiles.height(0));
        let a_in_place = readable_in_place::<P>(&block.item);
        let is_wide = P::WIDE && a_in_place.is_none() && a.row_stride == 1;
        let a_words = if a_in_place.is_some() { 0 } else { tiles.count * panel_rows * P::words(most.min(block.ks.len())) };
        let a_packed = a_room.of(a_words)?.as_mut_ptr();
        let panel = panel_room.of(kernels.nr * P::words(most.min(block.ks.len())))?.as_mut_ptr();
        c_rows.clear();
        c_rows.extend(c.rows(block.rows.clone()));
        a_rows.resize(block.rows.len(), std::ptr::null());
        let b_in_place = P::in_place(b.t(), k).filter(|b| b.row_stride == 1 && tiles.count <= 2);
        for k0 in block.ks.clone().step_by(most) {
            let terms = most.min(block.ks.end - k0);
            let a_panel = |tile: usize| a_packed.wrapping_add(tile * panel_rows * P::words(terms));
            let mut a_seen = Magnitudes::NONE;
            if is_wide {
                let strip =
                    Strip { src: a.at(block.rows.start, k0), lanes: block.rows.len(), lane_stride: 1, k: terms, k_stride: a.col_stride };
                // SAFETY: the strip lies inside A, whose extent was checked; the buffer holds all tiles of this block of K.
                a_seen = unsafe { P::pack(s, Side::A, strip, block.rows.len(), a_packed) };
            } else if a_in_place.is_none() {
                for tile in 0..tiles.count {
                    let (row, lanes) = (block.rows.start + tiles.start(tile), tiles.height(tile));
                    let strip = Strip { src: a.at(row, k0), lanes, lane_stride: a.row_stride, k: terms, k_stride: a.col_stride };
                    // SAFETY: the strip lies inside A, whose extent was checked; the buffer holds all tiles of this block of K.
                    a_seen = a_seen.union(unsafe { P::pack(s, Side::A, strip, lanes, a_panel(tile)) });
                }
            }
            if !P::multiplies(a_seen, Magnitudes::ONE, terms) {
                block.fall_back(block.cols.clone(), k0..k0 + terms, c)?;
                continue;
            }
            for tile in 0..tiles.count {
                let first = if is_wide { a_packed.wrapping_add(tiles.start(tile)) } else { a_panel(tile) };
                for (r, address) in (tiles.start(tile)..).zip(&mut a_rows[tiles.start(tile)..tiles.start(tile + 1)]) {
                    *address = match a_in_place {
                        Some(a) => a.at(block.rows.start + r, k0 / P::TERMS),
                        None => first.wrapping_add(r - tiles.start(tile)).cast_const(),
                    };
                }
            }
            for col in block.cols.clone().step_by(kernels.nr) {
                let cols = kernels.nr.min(block.cols.end - col);
                let width = kernels.panel_width(cols);
                // A tile reads whole vectors, so only full panels can be read in place.
                let (b_data, b_stride) = match b_in_place {
                    Some(b) if cols == width => (b.at(col, k0 / P::TERMS), b.col_stride),
                    _ => {
                        let strip = Strip { src: b.at(k0, col), lanes: cols, lane_stride: b.col_stride, k: terms, k_stride: b.row_stride };
                        // SAFETY: the strip lies inside B; the panel holds a block of K of NR lanes.
                        let b_seen = unsafe { P::pack(s, Side::B, strip, width, panel) };
                        if !P::multiplies(a_seen, b_seen, terms) {
                            block.fall_back(col..col + cols, k0..k0 + terms, c)?;
                            continue;
                        }
                        (panel.cast_const(), width)
                    }
                };
                let init = init_of(block.gemm, k0 == 0, col);
                for tile in 0..tiles.count {
                    let (start, height) = (tiles.start(tile), tiles.height(tile));
                    let a_stride = match a_in_place {
                        Some(a) => a.col_stride,
                        None if is_wide => block.rows.len(),
                        None => height,
                    };
                    let (values, alpha) = (c.values(), block.gemm.alpha as f32);
                    let out = Output { c: c_rows[start..].as_ptr(), offset: c.offset(col), values, cols, alpha, init };
                    let (a, kc) = (a_rows[start..].as_ptr(), P::entries(terms));
                    let tile = Tile { segments: 1, kc, a, a_step: 0, a_stride, b: &b_data, b_stride, out };
                    // SAFETY: the first `height` row pointers address rows of A and C inside their matrices, B is a full panel,
                    // and the tiles of all tasks are disjoint.
                    unsafe { kernels.panel_tile(&started, height, &tile) };
                }
            }
        }
        Ok(())
    }
}
