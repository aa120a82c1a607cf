//! Where the pixels of tiles lie in an image. Along rows and columns of tiles their offsets are found once a call: a tile of few channels takes no longer
//! to transform than a list of its addresses would take to make.

use super::grid::{At, Grid, MAX_PHASES, Phase, Piece};
use super::transform::{MAX_PATCH, MAX_SIDE};
use crate::cpu::simd::Simd;
use std::ops::Range;

/// The pixels of a tile along an axis, as offsets of values; of those that the image does not have, the offset of its first.
#[derive(Clone, Copy, Debug)]
struct Line<const N: usize> {
    offsets: [usize; N],
    exists: [bool; N],
    /// The image has all that the form wants.
    is_whole: bool,
}

/// An image that tiles of up to `N` × `N` pixels are cut from.
#[derive(Clone, Debug)]
pub(super) struct Image<const N: usize> {
    planes: usize,
    channels: usize,
    /// Values of a plane.
    plane: usize,
    /// Those of each phase, tile by tile.
    rows: Vec<[Line<N>; MAX_PHASES]>,
    cols: Vec<[Line<N>; MAX_PHASES]>,
}

impl Image<MAX_PATCH> {
    /// The sources of patches of `patch` × `patch`, in an image of so many channels.
    pub fn of_sources(grid: &Grid, patch: usize, channels: usize) -> Self {
        Self::new(grid, grid.source, channels, patch, |piece| &piece.sources)
    }
}

impl Image<MAX_SIDE> {
    /// The targets of tiles of `side` × `side`, in an image of so many channels.
    pub fn of_targets(grid: &Grid, side: usize, channels: usize) -> Self {
        Self::new(grid, grid.target, channels, side, |piece| &piece.targets)
    }
}

impl<const N: usize> Image<N> {
    fn new(
        grid: &Grid,
        [height, width]: [usize; 2],
        channels: usize,
        side: usize,
        along: fn(&Piece) -> &[[Option<usize>; N]; MAX_PHASES],
    ) -> Self {
        let line = |pixels: &[Option<usize>; N], step: usize| Line {
            offsets: pixels.map(|at| at.unwrap_or(0) * step),
            exists: pixels.map(|at| at.is_some()),
            is_whole: pixels[..side].iter().all(Option::is_some),
        };
        let lines = |axis: usize, step: usize| {
            grid.axes[axis].pieces.iter().map(|piece| along(piece).each_ref().map(|pixels| line(pixels, step))).collect()
        };
        Self { planes: grid.planes, channels, plane: height * width * channels, rows: lines(0, width * channels), cols: lines(1, channels) }
    }

    /// The image from the first of some channels on: these follow at every offset.
    pub fn channels<'a>(&self, image: &'a [f32], channels: &Range<usize>) -> &'a [f32] {
        assert!(image.len() == self.planes * self.plane && channels.end <= self.channels);
        &image[channels.start..]
    }

    /// The pixels of a tile for a phase.
    #[inline(always)]
    pub fn pixels(&self, tile: &At, phase: Phase) -> Pixels<'_, N> {
        Pixels { start: tile.plane * self.plane, rows: &self.rows[tile.row][phase.row], cols: &self.cols[tile.col][phase.col] }
    }
}

/// The pixels of a tile for a phase.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pixels<'a, const N: usize> {
    start: usize,
    rows: &'a Line<N>,
    cols: &'a Line<N>,
}

impl<const N: usize> Pixels<'_, N> {
    /// Where the pixel at a row and a column of the tile begins in the image; if it does not exist, one that does.
    #[inline(always)]
    pub fn offset(&self, i: usize, j: usize) -> usize {
        self.start + self.rows.offsets[i] + self.cols.offsets[j]
    }

    #[inline(always)]
    pub fn exists(&self, i: usize, j: usize) -> bool {
        self.rows.exists[i] && self.cols.exists[j]
    }

    /// Whether all pixels exist.
    #[inline(always)]
    pub fn is_whole(&self) -> bool {
        self.rows.is_whole && self.cols.is_whole
    }

    /// `count` channels of the first `side` × `side` pixels, zero where there are none; `image` is the image from the first of these channels on.
    ///
    /// # Safety
    /// So many channels must be readable at every offset; they are a vector's lanes at most.
    #[inline(always)]
    pub unsafe fn load<S: Simd>(&self, s: S, image: *const f32, side: usize, count: usize) -> [[S::F32; N]; N] {
        let mut values = [[s.zero(); N]; N];
        if self.is_whole() && count == S::LANES {
            for i in 0..side {
                for j in 0..side {
                    // SAFETY: the pixel exists; the rest is the caller's contract.
                    values[i][j] = unsafe { s.load(image.add(self.offset(i, j))) };
                }
            }
        } else {
            for i in 0..side {
                for j in 0..side {
                    if self.exists(i, j) {
                        // SAFETY: as above.
                        values[i][j] = unsafe { s.load_partial(image.add(self.offset(i, j)), count) };
                    }
                }
            }
        }
        values
    }

    /// Asks for a line of the memory of each of the first `side` × `side` pixels: the hardware does not foresee them.
    #[inline(always)]
    pub fn prefetch<S: Simd>(&self, s: S, image: *const f32, side: usize) {
        for i in 0..side {
            for j in 0..side {
                s.prefetch(image.wrapping_add(self.offset(i, j)));
            }
        }
    }
}
