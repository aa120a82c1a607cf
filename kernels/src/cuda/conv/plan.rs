//! Which tiles a product is cut into, and into how many parts its sums. Both depend on shape, type and precision alone, so that a sum has one
//! order on every GPU.

use super::{Gather, Gpu, Source, Type, sum_size};
use crate::cpu::gemm::{MatmulPrecision, matmul_precision};

/// How a product is computed: the values of MATH in `tile.cuh`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Math {
    /// Multiply-adds in f32 or f64.
    Fma,
    /// Tensor cores on f16 or bf16.
    Half,
    /// Tensor cores on f32 rounded to TF32.
    Tf32,
    /// Tensor cores on f32 split into two TF32.
    Tf32x3,
    /// Hopper's warpgroups on f16 or bf16.
    Warpgroup,
}

impl Math {
    pub(super) fn of(gpu: &Gpu, ty: Type) -> Self {
        match (ty, matmul_precision()) {
            _ if gpu.capability() < (8, 0) => Self::Fma,
            // Later GPUs have other instructions in the place of Hopper's.
            (Type::F16 | Type::BF16, _) if gpu.capability() == (9, 0) => Self::Warpgroup,
            (Type::F16 | Type::BF16, _) => Self::Half,
            (Type::F32, MatmulPrecision::High) => Self::Tf32x3,
            (Type::F32, MatmulPrecision::Medium) => Self::Tf32,
            _ => Self::Fma,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Fma => "0",
            Self::Half => "1",
            Self::Tf32 => "2",
            Self::Tf32x3 => "3",
            Self::Warpgroup => "4",
        }
    }

    /// The one of a kernel file's names that says what it needs.
    pub(super) fn source(self, [plain, tensor_cores, hopper]: &'static [Source; 3]) -> &'static Source {
        match self {
            Self::Fma => plain,
            Self::Half | Self::Tf32 | Self::Tf32x3 => tensor_cores,
            Self::Warpgroup => hopper,
        }
    }
}

/// Extents of a tile and how threads share it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tile {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub stages: usize,
    pub threads: u32,
    /// Blocks that a multiprocessor holds.
    blocks: usize,
    /// Work done a unit of time, against the best tile's.
    efficiency: f64,
    /// The macros that name the above, and how the threads share the tile.
    macros: [(&'static str, &'static str); 7],
}

/// `[m, n, k]`, what a thread (multiply-adds) or how many warps (tensor cores) along m and n, threads, stages, blocks on a
/// multiprocessor, and efficiency.
macro_rules! tile {
    ([$m:literal, $n:literal, $k:literal], $a:literal = $av:literal, $b:literal = $bv:literal, $threads:literal, $stages:literal, $blocks:literal, $efficiency:literal) => {
        Tile {
            m: $m,
            n: $n,
            k: $k,
            stages: $stages,
            threads: $threads,
            blocks: $blocks,
            efficiency: $efficiency,
            macros: [
                ("BM", stringify!($m)),
                ("BN", stringify!($n)),
                ("BK", stringify!($k)),
                ($a, stringify!($av)),
                ($b, stringify!($bv)),
                ("STAGES", stringify!($stages)),
                ("BLOCKS", stringify!($blocks)),
            ],
        }
    };
}

// A step of k is 64 bytes of a row for multiply-adds, 128 for tensor cores.
const FMA: [Tile; 3] = [
    tile!([128, 64, 16], "TM" = 8, "TN" = 8, 128, 3, 3, 1.0),
    tile!([64, 64, 16], "TM" = 8, "TN" = 4, 128, 3, 4, 0.85),
    tile!([64, 32, 16], "TM" = 4, "TN" = 4, 128, 3, 4, 0.6),
];
const FMA_HALF: [Tile; 1] = [tile!([64, 64, 16], "TM" = 8, "TN" = 4, 128, 3, 3, 1.0)];
const FMA_F64: [Tile; 1] = [tile!([64, 64, 8], "TM" = 4, "TN" = 4, 256, 3, 2, 1.0)];
// The largest in two stages: three are more than the 99 KiB of shared memory that a block has on sm_86, sm_89 and sm_120.
const HALF: [Tile; 4] = [
    tile!([128, 128, 64], "WARPS_M" = 2, "WARPS_N" = 4, 256, 2, 1, 1.0),
    tile!([128, 64, 64], "WARPS_M" = 2, "WARPS_N" = 2, 128, 3, 2, 0.9),
    tile!([64, 64, 64], "WARPS_M" = 2, "WARPS_N" = 2, 128, 3, 3, 0.75),
    tile!([64, 32, 64], "WARPS_M" = 4, "WARPS_N" = 1, 128, 3, 3, 0.5),
];
const TF32: [Tile; 2] = [
    tile!([128, 64, 32], "WARPS_M" = 2, "WARPS_N" = 2, 128, 3, 2, 1.0),
    tile!([64, 64, 32], "WARPS_M" = 2, "WARPS_N" = 2, 128, 3, 3, 0.85),
];
const TF32X3: [Tile; 2] = [
    tile!([128, 64, 32], "WARPS_M" = 4, "WARPS_N" = 2, 256, 3, 1, 1.0),
    tile!([64, 64, 32], "WARPS_M" = 2, "WARPS_N" = 2, 128, 3, 2, 0.85),
];
const WARPGROUP: [Tile; 4] = [
    tile!([128, 256, 64], "WARPS_M" = 8, "WARPS_N" = 1, 256, 3, 1, 1.0),
    tile!([128, 128, 64], "WARPS_M" = 8, "WARPS_N" = 1, 256, 4, 1, 0.85),
    tile!([128, 64, 64], "WARPS_M" = 8, "WARPS_N" = 1, 256, 3, 2, 0.75),
    tile!([64, 64, 64], "WARPS_M" = 4, "WARPS_N" = 1, 128, 3, 4, 0.65),
];

/// Multiprocessors that plans are made for: an H100's. A constant, so that plans do not depend on the GPU.
const PROCESSORS: usize = 132;

/// Bytes that sums of parts may take.
const PARTIAL_LIMIT: usize = 128 << 20;

impl Tile {
    /// Columns that a thread stores at once.
    pub(super) fn group(&self) -> usize {
        if self.macros[3].0 == "TM" { 4 } else { 2 }
    }

    /// Bytes of a stage, as STAGE_SIZE in `tile.cuh`.
    pub(super) fn stage_bytes(&self, math: Math, ty: Type, a_rows: bool) -> usize {
        let size = ty.size();
        if math == Math::Warpgroup {
            return (self.m + self.n) * self.k * size;
        }
        let pad = if size == 8 { 4 } else { 16 / size };
        let wide = if matches!(math, Math::Tf32 | Math::Tf32x3) { 8 } else { pad };
        let a = if a_rows { self.m * (self.k + pad) } else { self.k * (self.m + wide) };
        (a + self.k * (self.n + wide)) * size
    }

    /// All macros of a kernel.
    pub(super) fn defines(&self, math: Math, own: &[(&'static str, &'static str); 4]) -> [(&'static str, &'static str); 12] {
        let mut all = [("MATH", math.name()); 12];
        all[1..5].copy_from_slice(own);
        all[5..].copy_from_slice(&self.macros);
        all
    }
}

fn tiles(math: Math, ty: Type) -> &'static [Tile] {
    match (math, ty) {
        (Math::Fma, Type::F32) => &FMA,
        (Math::Fma, Type::F64) => &FMA_F64,
        (Math::Fma, _) => &FMA_HALF,
        (Math::Half, _) => &HALF,
        (Math::Warpgroup, _) => &WARPGROUP,
        (Math::Tf32, _) => &TF32,
        (Math::Tf32x3, _) => &TF32X3,
    }
}

fn cheapest(tiles: &'static [Tile], cost: impl Fn(&Tile) -> f64) -> Tile {
    let costs = tiles.iter().map(cost);
    let best = costs.enumerate().min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(i, _)| i);
    tiles[best]
}

/// How many parts make `units` independent sums, each of `steps` steps, fill the multiprocessors with `blocks` blocks each. A part has several steps,
/// or it would cost more to hand over than to compute.
pub(super) fn parts(units: usize, steps: usize, blocks: usize) -> usize {
    (blocks * PROCESSORS / units.max(1)).clamp(1, (steps / 8).max(1))
}

/// The tile of a forward pass or input gradient, and the parts of its sums.
pub(super) fn gather(g: &Gather, math: Math, ty: Type) -> (Tile, usize) {
    let (phases, pixels) = g.phases();
    let count = |t: &Tile| pixels.div_ceil(t.m) * g.cout().div_ceil(t.n) * g.groups() * phases;
    let tile = cheapest(tiles(math, ty), |t| count(t).div_ceil(PROCESSORS) as f64 * (t.m * t.n) as f64 / t.efficiency);
    // Multiply-adds take long enough for two blocks on each multiprocessor to pay for adding up sums; tensor cores do not.
    let enough = if math == Math::Fma { 2 * PROCESSORS } else { PROCESSORS / 2 };
    let steps = (g.taps() / phases.max(1)).max(1) * g.cin().div_ceil(tile.k);
    let most = PARTIAL_LIMIT / (g.target_pixels() * g.groups() * g.cout() * sum_size(ty)).max(1);
    let parts = if count(&tile) >= enough { 1 } else { parts(count(&tile), steps, 3).min(most.max(1)) };
    (tile, parts)
}

fn weight_count(g: &Gather, t: &Tile) -> usize {
    g.cout().div_ceil(t.m) * (g.taps() * g.cin()).div_ceil(t.n) * g.groups()
}

fn weight_tile_cost(g: &Gather, t: &Tile) -> f64 {
    weight_count(g, t) as f64 * (t.m * t.n) as f64 / t.efficiency
}

/// Work of the weight gradient by way of `g`.
pub(super) fn weight_cost(g: &Gather, math: Math, ty: Type) -> f64 {
    let best = tiles(math, ty).iter().map(|t| weight_tile_cost(g, t)).fold(f64::INFINITY, f64::min);
    best * g.target_pixels() as f64
}

/// The tile of a weight gradient, and the parts of its sums.
pub(super) fn weight(g: &Gather, math: Math, ty: Type) -> (Tile, usize) {
    let tile = cheapest(tiles(math, ty), |t| weight_tile_cost(g, t));
    let most = PARTIAL_LIMIT / (g.groups() * g.cout() * g.taps() * g.cin() * sum_size(ty)).max(1);
    (tile, parts(weight_count(g, &tile), g.target_pixels().div_ceil(tile.k), tile.blocks).min(most.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plans are the same on all GPUs: what runs below Hopper must fit the smallest that have its instructions (99 KiB from 8.0 on).
    #[test]
    fn tiles_fit_the_shared_memory_of_every_gpu() {
        let plain = [Type::F16, Type::BF16, Type::F32, Type::F64].map(|ty| (Math::Fma, ty));
        let cores = [(Math::Half, Type::F16), (Math::Half, Type::BF16), (Math::Tf32, Type::F32), (Math::Tf32x3, Type::F32)];
        for (math, ty) in plain.into_iter().chain(cores) {
            for tile in tiles(math, ty) {
                let stage = tile.stage_bytes(math, ty, true).max(tile.stage_bytes(math, ty, false));
                let bytes = stage * tile.stages + tile.m.max(tile.n) * size_of::<[i64; 4]>();
                assert!(bytes <= 99 << 10, "{math:?} {ty:?} {}x{}x{}: {bytes}", tile.m, tile.n, tile.k);
            }
        }
    }
}
