//! Convolution on matrix tiles (AMX).
//!
//! Source images are packed as bf16 parts (see `gemm::split`), zero-padded, a unit of some images or of a band of one at a time, so that what a
//! unit needs stays in L2. A tile row is a cell of the packed image, 32 channels of a pixel, and on the [`grid`] of cells sixteen neighbouring targets are sixteen
//! neighbouring cells under every tap: no patch is ever copied. Weights are packed once, as the chunks that tiles take.
//!
//! Values whose parts would leave the normal range send their images to the kernels for vectors; what is computed depends on shapes and
//! values only.

mod gather;
mod grid;
mod image;

use super::super::amx::SIDE;
use super::super::gemm::split::TERMS;
use super::super::gemm::{MatmulPrecision, matmul_precision};
use super::super::isa::{Isa, isa};
use super::Gather;
use super::class::{classes, phases};
pub(super) use gather::gather;
use grid::Grid;

/// Parts of an f32 at the precision that the process asks for.
pub(super) fn parts() -> usize {
    match matmul_precision() {
        MatmulPrecision::Highest => 3,
        MatmulPrecision::High => 2,
        MatmulPrecision::Medium => 1,
    }
}

/// In how many parts a gather of f32 is to be computed on tiles, if that is faster than on vectors.
pub(super) fn pay(g: &Gather) -> Option<usize> {
    let parts = parts();
    (isa() == Isa::Amx && is_faster(g, parts)).then_some(parts)
}

/// Whether tiles, in `parts`, take less time than vectors.
fn is_faster(g: &Gather, parts: usize) -> bool {
    // Tiles would be mostly padding.
    if g.cin < 16 || g.cout < 16 {
        return false;
    }
    let axes = phases(g);
    let grid = Grid::new(g, &axes, false);
    let channels = g.cin.next_multiple_of(TERMS);
    let products = classes(g, &axes).into_iter().map(|class| {
        let rows = grid.run(grid.targets(class, [0; 3])).next_multiple_of(SIDE);
        rows * class.tap_count() * channels * g.cout.next_multiple_of(SIDE)
    });
    let costs = Costs::of(parts);
    let (products, packed) = (products.sum::<usize>(), grid.len() * channels);
    let on_vectors = g.target_pixels() / g.n * g.taps_per_target() * g.cin * g.cout * Costs::FMA;
    products * costs.product + packed * costs.pack < on_vectors
}

/// What a multiply-add and packing a value cost, in picoseconds of a core of 2.6 GHz.
struct Costs {
    product: usize,
    pack: usize,
}

impl Costs {
    /// A multiply-add of two vectors a cycle.
    const FMA: usize = 12;

    /// A product of tiles every 16 cycles, and what loads from L2 cost beyond; values are split at the speed of L2.
    fn of(parts: usize) -> Self {
        match parts {
            1 => Self { product: 2, pack: 100 },
            2 => Self { product: 3, pack: 200 },
            _ => Self { product: 6, pack: 300 },
        }
    }
}

#[cfg(test)]
mod tests;
