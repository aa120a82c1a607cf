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
#[cfg(test)]
mod tests;
mod weight;

use super::super::amx::SIDE;
use super::super::gemm::MatmulPrecision;
use super::super::gemm::split::TERMS;
use super::super::isa::{Isa, isa};
use super::Gather;
use super::class::{classes, phases};
pub(super) use gather::gather;
use grid::Grid;
pub(super) use weight::weight_grad;

/// In how many parts of f32 a convolution is to be computed on tiles, if that is faster than on vectors.
pub(super) fn pay(g: &Gather) -> Option<usize> {
    let parts = match g.precision {
        MatmulPrecision::Highest => 3,
        MatmulPrecision::High => 2,
        MatmulPrecision::Medium => 1,
    };
    (isa() == Isa::Amx && is_faster(g, parts)).then_some(parts)
}

/// Whether zeros times these values are zero.
fn are_finite(values: &[f32]) -> bool {
    values.iter().fold(0, |most, x| most.max(x.abs().to_bits())) < f32::INFINITY.to_bits()
}

/// Whether tiles, in `parts`, take less time than vectors.
fn is_faster(g: &Gather, parts: usize) -> bool {
    // Tiles would be mostly padding.
    if g.cin < 16 || g.cout < 16 || g.n == 0 {
        return false;
    }
    let axes = phases(g);
    let grid = Grid::new(g, &axes, false);
    // Wide padding, strides or dilation: the packed image would be mostly empty, if it could be had at all.
    let positions = (0..3).fold(1, |all: usize, i| all.saturating_mul(grid.cells[i].saturating_mul(grid.axes[i].increment)));
    if positions > 256 + 4 * (g.source_pixels() + g.target_pixels()) / g.n {
        return false;
    }
    let channels = g.cin.next_multiple_of(TERMS);
    let products = classes(g, &axes).into_iter().map(|class| {
        let rows = grid.run(grid.targets(&class, [0; 3])).next_multiple_of(SIDE);
        rows * class.tap_count() * channels * g.cout.next_multiple_of(SIDE)
    });
    let costs = Costs::of(parts);
    let (products, packed) = (products.sum::<usize>(), grid.len() * channels);
    let on_vectors = g.target_pixels() / g.n * g.taps_per_target() * g.cin * g.cout * Costs::FMA;
    let weights = g.cin * g.cout * g.taps() / g.n;
    products * costs.product + (packed + weights) * costs.pack < on_vectors
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
