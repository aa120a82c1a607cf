//! Convolutions with fewer multiplications: for 3×3 taps of stride 1 Winograd's F(2×2, 3×3) with 16 for four targets instead of 36 and F(3×3, 3×3)
//! with 25 for nine instead of 81, for 4×4 taps of stride 2 F(3×3, 2×2) with 16 for nine instead of 36.
//!
//! The image of targets is cut into tiles, each of which sees a patch d of sources ([`grid`]). With the taps g of a pair of channels,
//! Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that a convolution becomes a product of matrices for each place in a patch. The gradient by the weights is
//! the same read backwards: Gᵀ [Σ over tiles of (Bᵀ d B) ⊙ (A gY Aᵀ)] G. The matrices come from points where polynomials are multiplied
//! ([`transform`]); larger tiles need more points, and lose digits by them.
//!
//! A convolution of stride 2 is four of stride 1, one for each parity of rows and columns, of the taps between which a stride lies: forward they are
//! summed before they are transformed back, transposed each gives a quarter of the targets.
//!
//! Errors are of the size of those of plain sums, but relative to the largest value of a patch: half to one and a half times as large in images, up
//! to three times in weight gradients, by the root mean square. A value that is not finite would reach all of its patch: such values, and those near
//! the end of the range, send their images to the kernels for windows.
//!
//! Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, 2015.

#![allow(clippy::needless_range_loop, reason = "rows and columns of small matrices, as in the formulas")]

mod gather;
mod grid;
mod image;
#[cfg(test)]
mod tests;
mod transform;
mod weight;

use super::super::alloc::OutOfMemory;
use super::Gather;
use grid::{Algorithm, Grid};
use transform::{F2x3, F3x2, F3x3};

/// Fewer channels than this are transformed for longer than they are multiplied.
const MIN_CHANNELS: usize = 32;

/// The same for weight gradients, whose other ways are slower.
const MIN_WEIGHT_CHANNELS: usize = 16;

/// Products in whose time a weight is transformed, written, and read again.
const WEIGHT_PRODUCTS: usize = 60;

/// The time that a form takes for a pair of channels, in products.
fn cost(grid: &Grid) -> usize {
    grid.products() + grid.weights() * WEIGHT_PRODUCTS
}

/// The form that takes the least time for a gather, if that is less than windows take.
pub(super) fn plan(g: &Gather) -> Option<Grid> {
    plan_from(MIN_CHANNELS, g)
}

/// [`plan`] with as many channels at least.
fn plan_from(channels: usize, g: &Gather) -> Option<Grid> {
    if g.cin.min(g.cout) < channels {
        return None;
    }
    let forms = [Algorithm::F2x3, Algorithm::F3x3, Algorithm::F3x2];
    let grid = forms.into_iter().filter_map(|form| Grid::of(g, form)).min_by_key(cost)?;
    let touched = |i: usize| (0..g.kernel[i]).map(|tap| g.axes[i].pairs(tap, g.target[i], g.source[i]).len()).sum::<usize>();
    let on_windows = grid.planes * touched(1) * touched(2);
    (4 * grid.products() <= 3 * on_windows && cost(&grid) <= on_windows).then_some(grid)
}

/// See [`super::forward`]; `windows` computes the images that cannot be transformed: it gets a gather of some images, their sources and
/// their targets.
pub(super) fn gather(
    grid: &Grid,
    g: &Gather,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    y: &mut [f32],
    windows: impl Fn(&Gather, &[f32], &mut [f32]) -> Result<(), OutOfMemory>,
) -> Result<(), OutOfMemory> {
    match grid.form {
        Algorithm::F2x3 => gather::gather::<F2x3>(g, grid, x, w, bias, y, windows),
        Algorithm::F3x3 => gather::gather::<F3x3>(g, grid, x, w, bias, y, windows),
        Algorithm::F3x2 => gather::gather::<F3x2>(g, grid, x, w, bias, y, windows),
    }
}

/// See [`super::weight_grad`]: of the two gathers of the same weights, one is taken whose sources have no phases. `false`, with nothing written, if
/// that does not pay or values cannot be transformed.
pub(super) fn weight_grad(forward: &Gather, transposed: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    for (g, x, gy) in [(forward, x, gy), (transposed, gy, x)] {
        if let Some(grid) = plan_from(MIN_WEIGHT_CHANNELS, g).filter(|grid| grid.source_phases().count() == 1) {
            return weight_grad_by(&grid, g, x, gy, gw);
        }
    }
    Ok(false)
}

/// [`weight_grad`] of a gather whose sources have no phases.
fn weight_grad_by(grid: &Grid, g: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<bool, OutOfMemory> {
    match grid.form {
        Algorithm::F2x3 => weight::weight_grad::<F2x3>(g, grid, x, gy, gw),
        Algorithm::F3x3 => weight::weight_grad::<F3x3>(g, grid, x, gy, gw),
        Algorithm::F3x2 => weight::weight_grad::<F3x2>(g, grid, x, gy, gw),
    }
}
