//! 3×3 convolutions of stride 1 with 16 multiplications for four targets instead of 36: Winograd's F(2×2, 3×3).
//!
//! The image of targets is cut into tiles of 2×2, each of which sees a patch d of 4×4 sources. With the taps g of a pair of channels,
//! Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A, so that a convolution becomes sixteen products of matrices, one for each place in a patch. The gradient by the
//! weights is the same read backwards: Gᵀ [Σ over tiles of (Bᵀ d B) ⊙ (A gY Aᵀ)] G. The matrices hold 0, ±1 and ±½ only.
//!
//! Errors are of the size of those of plain sums, but relative to the largest value of a patch. A value that is not finite would reach
//! all of its patch: such values, and those near the end of the range, send their images to the kernels for windows.
//!
//! Source: Lavin and Gray, *Fast Algorithms for Convolutional Neural Networks*, 2015.

#![allow(clippy::needless_range_loop, reason = "rows and columns of small matrices, as in the formulas")]

mod gather;
#[cfg(test)]
mod tests;
mod transform;
mod weight;

use super::Gather;
pub(super) use gather::gather;
pub(super) use weight::weight_grad;

/// Targets of a tile along an axis.
const SIDE: usize = 2;
/// Sources of a patch along an axis.
const PATCH: usize = 4;
/// Places in a patch: as many products of matrices.
const PLACES: usize = PATCH * PATCH;

/// Fewer channels than this are transformed for longer than they are multiplied.
const MIN_CHANNELS: usize = 32;

/// Tiles that the transformed weights of a call must serve at least.
const MIN_TILES: usize = 48;

/// How the targets of a gather are cut into tiles.
#[derive(Clone, Copy, Debug)]
struct Grid {
    /// Images, or slices of volumes.
    planes: usize,
    source: [usize; 2],
    target: [usize; 2],
    /// Tiles of a plane: rows and columns.
    tiles: [usize; 2],
    /// The source that the first place of the first patch lies at.
    offset: [isize; 2],
    /// The taps run against the sources, as in an input gradient.
    flipped: bool,
}

impl Grid {
    /// `None` if the taps are not 3×3 neighbours, at every target.
    fn of(g: &Gather) -> Option<Self> {
        let is_slice = g.kernel[0] == 1 && g.source[0] == g.target[0] && (0..2).all(|i| g.axes[0].source(i, 0) == Some(i as isize));
        if g.groups != 1 || g.kernel != [1, 3, 3] || !is_slice {
            return None;
        }
        let axis = |i: usize| {
            let at = |target, tap| g.axes[i].source(target, tap);
            let (first, step) = (at(0, 0)?, at(0, 1)? - at(0, 0)?);
            let is_plain = step.abs() == 1 && at(0, 2)? - first == 2 * step && at(1, 0)? - first == 1;
            is_plain.then_some((first + 2 * step.min(0), step < 0))
        };
        let ((top, flipped), (left, also)) = (axis(1)?, axis(2)?);
        let [source, target] = [g.source, g.target].map(|extent| [extent[1], extent[2]]);
        let tiles = target.map(|extent| extent.div_ceil(SIDE));
        (flipped == also).then_some(Self { planes: g.n * g.source[0], source, target, tiles, offset: [top, left], flipped })
    }

    fn plane_tiles(&self) -> usize {
        self.tiles[0] * self.tiles[1]
    }

    fn len(&self) -> usize {
        self.planes * self.plane_tiles()
    }

    /// The plane of a tile, and where its first target lies in it.
    fn place(&self, tile: usize) -> (usize, [usize; 2]) {
        let (plane, at) = (tile / self.plane_tiles(), tile % self.plane_tiles());
        (plane, [at / self.tiles[1] * SIDE, at % self.tiles[1] * SIDE])
    }

    /// Whether the middles of all patches hold every source.
    fn middles_cover(&self) -> bool {
        self.offset == [-1; 2] && self.source == self.target
    }

    /// The index of the tap at row `i`, column `j` of the patch.
    fn tap(&self, i: usize, j: usize) -> usize {
        let tap = i * 3 + j;
        if self.flipped { 8 - tap } else { tap }
    }
}

/// Whether this takes less time than windows.
pub(super) fn pays(g: &Gather) -> bool {
    let Some(grid) = Grid::of(g) else { return false };
    let touched = |i: usize| (0..3).map(|tap| g.axes[i].pairs(tap, g.target[i], g.source[i]).len()).sum::<usize>();
    let on_windows = grid.planes * touched(1) * touched(2);
    g.cin >= MIN_CHANNELS && g.cout >= MIN_CHANNELS && grid.len() >= MIN_TILES && 4 * PLACES * grid.len() <= 3 * on_windows
}
