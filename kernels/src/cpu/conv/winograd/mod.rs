//! 3×3 convolutions of stride 1 and 4×4 ones of stride 2 with 16 multiplications for four or nine targets instead of 36: Winograd's F(2×2, 3×3)
//! and F(3×3, 2×2).
//!
//! The image of targets is cut into tiles, each of which sees a patch d of 4×4 sources ([`grid`]). With the taps g of a pair of channels,
//! Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that a convolution becomes sixteen products of matrices, one for each place in a patch. The gradient by the
//! weights is the same read backwards: Gᵀ [Σ over tiles of (Bᵀ d B) ⊙ (A gY Aᵀ)] G. The matrices hold 0, ±1 and ±½ only.
//!
//! A convolution of stride 2 is four of stride 1, one for each parity of rows and columns, of the taps between which a stride lies: forward they are
//! summed before they are transformed back, transposed each gives a quarter of the targets.
//!
//! Errors are of the size of those of plain sums, but relative to the largest value of a patch. A value that is not finite would reach
//! all of its patch: such values, and those near the end of the range, send their images to the kernels for windows.
//!
//! Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, 2015.

#![allow(clippy::needless_range_loop, reason = "rows and columns of small matrices, as in the formulas")]

mod gather;
mod grid;
#[cfg(test)]
mod tests;
mod transform;
mod weight;

use super::super::alloc::OutOfMemory;
use super::Gather;
use grid::Grid;
use transform::{F2x3, F3x2, Form, PLACES};

/// Fewer channels than this are transformed for longer than they are multiplied.
const MIN_CHANNELS: usize = 32;

/// Products in whose time a weight is transformed, written, and read again.
const WEIGHT_PRODUCTS: usize = 60;

/// Whether this takes less time than windows.
pub(super) fn pays(g: &Gather) -> bool {
    let Some(grid) = Grid::of(g) else { return false };
    let touched = |i: usize| (0..g.kernel[i]).map(|tap| g.axes[i].pairs(tap, g.target[i], g.source[i]).len()).sum::<usize>();
    let on_windows = grid.planes * touched(1) * touched(2);
    let weights = PLACES * grid.source_phases().count() * grid.target_phases().count();
    g.cin.min(g.cout) >= MIN_CHANNELS && 4 * grid.products() <= 3 * on_windows && grid.products() + weights * WEIGHT_PRODUCTS <= on_windows
}

/// See [`super::forward`]; `windows` computes the images that cannot be transformed: it gets a gather of some images, their sources and
/// their targets.
pub(super) fn gather(
    g: &Gather,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    windows: impl Fn(&Gather, &[f32], &mut [f32]) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    match Grid::of(g) {
        Some(grid) if grid.taps() == F2x3::TAPS => gather::gather::<F2x3>(g, &grid, x, w, bias, y, windows),
        Some(grid) => gather::gather::<F3x2>(g, &grid, x, w, bias, y, windows),
        None => windows(g, x, y),
    }
}

/// See [`super::weight_grad`]: of the two gathers of the same weights, one is taken whose sources have no phases. `false`, with nothing written, if
/// that does not pay or values cannot be transformed.
pub(super) fn weight_grad(forward: &Gather, transposed: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    for (g, x, gy) in [(forward, x, gy), (transposed, gy, x)] {
        if let Some(grid) = Grid::of(g).filter(|grid| grid.source_phases().count() == 1) {
            return Ok(pays(g) && weight_grad_of(g, &grid, x, gy, gw)?);
        }
    }
    Ok(false)
}

/// [`weight_grad`] of a gather whose sources have no phases.
fn weight_grad_of(g: &Gather, grid: &Grid, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    if grid.taps() == F2x3::TAPS {
        weight::weight_grad::<F2x3>(g, grid, x, gy, gw)
    } else {
        weight::weight_grad::<F3x2>(g, grid, x, gy, gw)
    }
}
