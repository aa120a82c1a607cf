//! The choice of a level, its tiles, and the parts that k is cut into.
//!
//! All depends on the problem and the GPU's capability. Where the number of multiprocessors matters, it is that of an H100, so that sums are the same on any GPU.

use super::super::memory::{DevicePtr, Type};
use crate::cpu::gemm::MatmulPrecision;

/// Multiprocessors of an H100.
const MULTIPROCESSORS: usize = 132;

/// A factor as rows (m or n) by k, in elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factor {
    pub ptr: DevicePtr,
    pub stride: i64,
    pub k_stride: i64,
    /// Distances of neighbours in the outer and the inner dimension of the batch.
    pub outer: i64,
    pub inner: i64,
    /// Of what power of two all offsets of the batch are multiples.
    pub offset_step: u64,
}

impl Default for Factor {
    fn default() -> Self {
        Self { ptr: DevicePtr::NULL, stride: 0, k_stride: 0, outer: 0, inner: 0, offset_step: 1 << 32 }
    }
}

impl Factor {
    pub fn along_k(&self) -> bool {
        self.k_stride == 1
    }

    fn along_rows(&self) -> bool {
        self.stride == 1
    }

    /// Which neighbours a warp should load together.
    pub fn prefers_k(&self) -> bool {
        self.along_k() || (!self.along_rows() && self.k_stride < self.stride)
    }

    /// The distance of contiguous lines, if lines are contiguous.
    fn line_stride(&self) -> Option<i64> {
        if self.along_k() { Some(self.stride) } else { self.along_rows().then_some(self.k_stride) }
    }
}

/// A product that is not empty, as the kernels see it. C is contiguous but for the distance of its rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Problem {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub batch: usize,
    /// Items are (outer, inner) pairs; a divisor of `batch`.
    pub batch_inner: usize,
    pub a: Factor,
    pub b: Factor,
    /// Items lie where a list of offsets says.
    pub by_offsets: bool,
    pub ty: Type,
    pub out_ty: Type,
    pub out: DevicePtr,
    pub row_stride: usize,
    pub precision: MatmulPrecision,
}

impl Problem {
    /// Finds one or two dimensions whose strides give all offsets; otherwise the kernels get the list.
    pub fn arrange_batch(&mut self, a: &[usize], b: &[usize]) {
        let step = |offsets: &[usize], i: usize| offsets[i] as i64 - offsets[0] as i64;
        let regular_to =
            |offsets: &[usize]| (1..offsets.len()).take_while(|&i| step(offsets, i) == i as i64 * step(offsets, 1)).count() + 1;
        let inner = regular_to(a).min(regular_to(b));
        self.batch_inner = if a.len().is_multiple_of(inner) { inner } else { 1 };
        for (factor, offsets) in [(&mut self.a, a), (&mut self.b, b)] {
            let inner = self.batch_inner;
            factor.inner = if inner > 1 { step(offsets, 1) } else { 0 };
            factor.outer = if offsets.len() > inner { step(offsets, inner) } else { 0 };
            factor.offset_step = (1..offsets.len()).fold(1 << 32, |all, i| all | step(offsets, i).unsigned_abs());
            factor.offset_step = 1 << factor.offset_step.trailing_zeros();
            self.by_offsets |=
                (0..offsets.len()).any(|i| step(offsets, i) != (i / inner) as i64 * factor.outer + (i % inner) as i64 * factor.inner);
        }
    }

    /// One tall product instead of a batch whose left factors follow one another and whose right factor is the same.
    pub fn merge_batch(&mut self) {
        let one_dimension = self.batch == self.batch_inner && !self.by_offsets;
        if self.batch > 1 && one_dimension && self.b.inner == 0 && self.a.inner == self.m as i64 * self.a.stride {
            self.m *= self.batch;
            (self.batch, self.batch_inner, self.a.inner) = (1, 1, 0);
        }
    }

    /// Gives strides that are never taken a value that does not stand in the way.
    pub fn settle_strides(&mut self) {
        for (factor, rows) in [(&mut self.a, self.m), (&mut self.b, self.n)] {
            if self.k <= 1 {
                factor.k_stride = if factor.stride == 1 { 0 } else { 1 };
            }
            if rows == 1 && factor.k_stride != 1 {
                factor.stride = 1;
            } else if rows == 1 {
                factor.stride = 0;
            }
        }
    }

    /// Whether each line of a factor begins at a multiple of `bytes`.
    fn is_aligned(&self, factor: &Factor, bytes: u64) -> bool {
        let size = self.ty.size() as u64;
        let Some(line) = factor.line_stride() else { return false };
        factor.ptr.is_aligned(bytes) && (line as u64 * size).is_multiple_of(bytes) && (factor.offset_step * size).is_multiple_of(bytes)
    }

    /// How many elements of a factor, `most` or 1, can be loaded at once.
    pub fn vector(&self, factor: &Factor, most: usize) -> usize {
        if self.is_aligned(factor, (most * self.ty.size()) as u64) { most } else { 1 }
    }

    /// Whether the copy engine can load a factor: aligned, no negative distances, lines that do not overlap.
    fn by_tma(&self, factor: &Factor, rows: usize) -> bool {
        let (inner, lines) = if factor.along_k() { (self.k, rows) } else { (rows, self.k) };
        let line = factor.line_stride().unwrap_or(0);
        let fits = (lines == 1 || line >= inner as i64) && factor.inner >= 0 && factor.outer >= 0;
        let small = [rows, self.k, self.batch].iter().all(|&extent| extent < 1 << 31) && line < 1 << 38;
        fits && small && !self.by_offsets && self.is_aligned(factor, 16)
    }

    /// Whether it can store C.
    pub fn out_by_tma(&self) -> bool {
        self.out_ty.size() == 2 && self.out.is_aligned(16) && (self.row_stride * 2).is_multiple_of(16) && self.row_stride < 1 << 38
    }
}

/// A block's tile of `gemm_hopper.cu`, and how it runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct HopperTile {
    pub m: usize,
    pub n: usize,
    pub stages: usize,
    /// Blocks of a cluster, which take tiles one above the other.
    pub cluster: usize,
    /// Parts that k is cut into: blocks of a cluster that share a tile.
    pub parts: usize,
    /// Rows of tiles that are visited together.
    pub group: usize,
    /// Warpgroups take tiles in turn, rather than halves of one.
    pub pingpong: bool,
    /// The factors are exchanged and C is stored transposed.
    pub swap: bool,
}

impl HopperTile {
    pub const WIDE: Self = Self { m: 128, n: 256, stages: 4, cluster: 1, parts: 1, group: 8, pingpong: false, swap: false };
    pub const SQUARE: Self = Self { n: 128, stages: 6, ..Self::WIDE };
    pub const NARROW: Self = Self { n: 64, stages: 8, ..Self::WIDE };

    /// For 2 to 64 rows (or columns, if not `swap`): the other extent is that of `wgmma`'s 64 rows, and many stages keep memory busy.
    pub fn few(few: usize, swap: bool) -> Self {
        let n = few.next_power_of_two().max(8);
        Self { n, stages: if n == 64 { 8 } else { 10 }, swap, ..Self::WIDE }
    }

    /// The ring of stages with two barriers for each, and buffers of 4 KiB for each of the 8 warps that store, unless parts of k meet where the stages were.
    pub fn shared_bytes(&self) -> u32 {
        (self.stages * ((self.m + self.n) * 128 + 16) + if self.parts == 1 { 8 * 4096 } else { 0 }) as u32
    }

    /// Cycles that a block of k costs: `wgmma` at its rate, which narrow tiles do not reach.
    fn cycles(&self) -> usize {
        match self.n {
            256 => 1060,
            128 => 600,
            _ => 400,
        }
    }
}

/// A tile of `gemm_mma.cu`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct MmaTile {
    pub m: usize,
    pub n: usize,
    pub warp_m: usize,
    pub warp_n: usize,
    pub stages: usize,
}

impl MmaTile {
    /// For one TF32 or half a factor.
    pub const PLAIN: Self = Self { m: 128, n: 128, warp_m: 64, warp_n: 32, stages: 3 };
    /// Two TF32 a factor take twice the registers: smaller tiles of a warp.
    pub const SPLIT: Self = Self { n: 64, warp_m: 32, ..Self::PLAIN };
}

/// A tile of `gemm.cu`; `thread` is the edge of a thread's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TiledTile {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub thread: usize,
}

impl TiledTile {
    pub const LARGE: Self = Self { m: 128, n: 128, k: 8, thread: 8 };
    pub const SMALL: Self = Self { m: 64, n: 64, k: 16, thread: 4 };
}

/// How `gemm_skinny.cu` runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Skinny {
    /// B, not A, is the small factor.
    pub swap: bool,
    /// Rows of the small factor that are computed.
    pub few: usize,
    pub along_k: bool,
    pub vector: usize,
    pub few_along_k: bool,
}

impl Skinny {
    fn rows(&self, p: &Problem) -> usize {
        if self.swap { p.m } else { p.n }
    }

    /// Rows of the large factor that a block takes.
    fn tile(&self) -> usize {
        match (self.along_k, self.vector) {
            (true, _) => 8 * if self.few >= 4 { 2 } else { 1 },
            (false, 1) => 32,
            (false, vector) => 8 * vector,
        }
    }

    /// Blocks of 256 threads: one for each tile and part of k.
    pub fn blocks(&self, p: &Problem, splits: usize) -> usize {
        self.rows(p).div_ceil(self.tile()) * p.batch * splits
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Level {
    Hopper(HopperTile),
    Mma(MmaTile),
    Skinny(Skinny),
    Tiled(TiledTile),
}

/// A level, and the number of parts that k is cut into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Plan {
    pub level: Level,
    pub splits: usize,
}

impl Plan {
    pub fn of(p: &Problem, capability: (u32, u32)) -> Self {
        // An empty sum has no addresses that could be aligned.
        if p.k == 0 {
            return Self { level: Level::Tiled(TiledTile::SMALL), splits: 1 };
        }
        let half = matches!(p.ty, Type::F16 | Type::BF16);
        let hopper = half && capability.0 == 9 && p.by_tma(&p.a, p.m) && p.by_tma(&p.b, p.n);
        if let Some(plan) = Self::few(p).filter(|_| hopper).or_else(|| Self::skinny(p)) {
            return plan;
        }
        if hopper {
            return Self::hopper(p);
        }
        let tensor_cores = half || (p.ty == Type::F32 && p.precision != MatmulPrecision::Highest);
        if tensor_cores && capability >= (8, 0) && p.is_aligned(&p.a, 16) && p.is_aligned(&p.b, 16) {
            let tile = if !half && p.precision == MatmulPrecision::High { MmaTile::SPLIT } else { MmaTile::PLAIN };
            let tiles = p.m.div_ceil(tile.m) * p.n.div_ceil(tile.n) * p.batch;
            return Self { level: Level::Mma(tile), splits: splits(tiles, MULTIPROCESSORS, p.k, 256) };
        }
        Self::tiled(p)
    }

    /// Few rows or columns, but more than one, on `wgmma`: a multiply-add for each of them and each element of the large factor would take longer than reading it.
    fn few(p: &Problem) -> Option<Self> {
        let swap = p.m < p.n;
        let (large, few, factor) = if swap { (p.n, p.m, &p.a) } else { (p.m, p.n, &p.b) };
        let tile = HopperTile::few(few, swap);
        let fits = (2..=64).contains(&few) && large >= 2 * few && (factor.along_k() || tile.n == 64);
        let parts = splits(large.div_ceil(tile.m) * p.batch, MULTIPROCESSORS, p.k, 256).min(8);
        fits.then(|| Self { level: Level::Hopper(HopperTile { parts: 1 << parts.ilog2(), ..tile }), splits: 1 })
    }

    /// Few rows or columns, and a large factor that can be read in lines.
    fn skinny(p: &Problem) -> Option<Self> {
        let swap = p.n < p.m;
        let (large, small, few) = if swap { (&p.a, &p.b, p.n) } else { (&p.b, &p.a, p.m) };
        large.line_stride().filter(|_| few <= 8)?;
        let most = 8.min(16 / p.ty.size());
        let (vector, along_k) = (p.vector(large, most), large.along_k());
        let few_along_k = small.along_k() && p.vector(small, vector) == vector;
        let skinny = Skinny { swap, few: few.next_power_of_two(), along_k, vector, few_along_k };
        // A step of a block: every lane of a warp has a vector along k, or every thread one k.
        let shortest = if along_k { 4 * 32 * vector } else { 256 };
        Some(Self { level: Level::Skinny(skinny), splits: splits(skinny.blocks(p, 1), 2 * MULTIPROCESSORS, p.k, shortest) })
    }

    /// The tile and the parts of k that should take the least time: whole rounds of blocks over the multiprocessors, each with its start and its stores.
    fn hopper(p: &Problem) -> Self {
        const START: usize = 1500;
        // Parts of k that meet: waiting for one another, and reading the others' sums.
        const MEETING: usize = 1500;
        let blocks_of_k = p.k.div_ceil(64);
        let parts = |parts| HopperTile { parts, ..HopperTile::SQUARE };
        let narrow_parts = |parts| HopperTile { parts, ..HopperTile::NARROW };
        let candidates = [
            HopperTile::WIDE,
            HopperTile::SQUARE,
            HopperTile::NARROW,
            parts(2),
            parts(4),
            parts(8),
            narrow_parts(2),
            narrow_parts(4),
            narrow_parts(8),
        ];
        let cycles = |tile: &HopperTile| {
            let blocks = p.m.div_ceil(tile.m * tile.cluster) * tile.cluster * p.n.div_ceil(tile.n) * p.batch * tile.parts;
            if tile.parts > 1 && (blocks_of_k < 4 * tile.parts || blocks > MULTIPROCESSORS) {
                return usize::MAX;
            }
            let round = blocks_of_k.div_ceil(tile.parts) * tile.cycles() + START + 8 * tile.n + if tile.parts > 1 { MEETING } else { 0 };
            blocks.div_ceil(MULTIPROCESSORS) * round
        };
        let best = candidates.iter().min_by_key(|tile| cycles(tile)).unwrap_or(&HopperTile::WIDE);
        Self { level: Level::Hopper(*best), splits: 1 }
    }

    fn tiled(p: &Problem) -> Self {
        // Sums of eight bytes take too many registers for large tiles.
        let large = p.ty.is_float() && p.ty != Type::F64 && p.m.div_ceil(128) * p.n.div_ceil(128) * p.batch >= MULTIPROCESSORS;
        let tile = if large { TiledTile::LARGE } else { TiledTile::SMALL };
        let tiles = p.m.div_ceil(tile.m) * p.n.div_ceil(tile.n) * p.batch;
        Self { level: Level::Tiled(tile), splits: splits(tiles, 2 * MULTIPROCESSORS, p.k, 128) }
    }
}

/// Into how many parts of at least `shortest` k is cut, so that `tiles` become about `wanted` blocks. Of one level, the result depends on the extents alone.
fn splits(tiles: usize, wanted: usize, k: usize, shortest: usize) -> usize {
    (wanted / tiles.max(1)).min(k / shortest).clamp(1, 16)
}
