//! Blocks of rows in scratch memory, and products of them.

use super::entries::padded;
use crate::cpu::gemm::micro::{Init, MAX_MR, MicroKernels, Output, Tile, Values};
use crate::cpu::gemm::pack::{Strip, pack};
use crate::cpu::isa::WithSimd;
use crate::cpu::simd::Simd;

/// Cuts scratch memory into parts of these sizes.
#[inline(always)]
pub(super) fn cut<const N: usize>(mut scratch: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| {
        let (part, rest) = std::mem::take(&mut scratch).split_at_mut(size);
        scratch = rest;
        part
    })
}

/// Packs the transpose of `rows` rows of `k` entries, which are `from.1` apart, into panels for [`Right::Panels`].
pub(super) struct PackTransposed<'a> {
    pub kernels: &'a MicroKernels,
    pub from: (&'a [f32], usize),
    pub rows: usize,
    pub k: usize,
    pub to: &'a mut [f32],
}

impl WithSimd for PackTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { kernels, from: (from, stride), rows, k, to } = self;
        assert!(rows > 0 && stride >= k && from.len() >= (rows - 1) * stride + k && to.len() >= k * padded(kernels, rows));
        for row in (0..rows).step_by(kernels.nr) {
            let lanes = kernels.nr.min(rows - row);
            let strip = Strip { src: from[row * stride..].as_ptr(), lanes, lane_stride: stride, k, k_stride: 1 };
            // SAFETY: the strip lies in `from` and the panel in `to`, both checked above; lanes are at most a panel's width.
            unsafe { pack(s, strip, kernels.panel_width(lanes), to[row * k..].as_mut_ptr()) };
        }
    }
}

/// The left factor of a product: entry (i, k) lies at `data[i · row_stride + k · k_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub k_stride: usize,
}

impl<'a> Left<'a> {
    /// Rows of entries, `stride` apart.
    pub fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, k_stride: 1 }
    }

    /// The transpose of such rows.
    pub fn columns(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: 1, k_stride: stride }
    }
}

/// The right factor of a product.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Panels of [`pack_transposed`].
    Panels(&'a [f32]),
    /// Rows of this many entries, at least [`padded`] columns.
    Rows(&'a [f32], usize),
}

/// Where a product goes: times `alpha`, and added to what is there if `add` says so.
pub(super) struct Sums<'a> {
    pub data: &'a mut [f32],
    /// Distance of rows.
    pub stride: usize,
    pub alpha: f32,
    pub add: bool,
}

/// `C = alpha · A·B`, or `C += alpha · A·B`, of blocks: C is `rows × cols`, and `k` entries are summed over.
pub(super) fn product(kernels: &MicroKernels, [rows, k, cols]: [usize; 3], a: Left, b: Right, c: Sums) {
    if rows == 0 || cols == 0 {
        return;
    }
    let b_len = match b {
        Right::Panels(b) => b.len() / padded(kernels, cols),
        Right::Rows(b, width) => {
            if padded(kernels, cols) <= width {
                b.len() / width
            } else {
                0
            }
        }
    };
    let Sums { data: c, stride, alpha, add } = c;
    assert!(k > 0 && b_len >= k, "right factor");
    assert!(a.data.len() > (rows - 1) * a.row_stride + (k - 1) * a.k_stride, "left factor");
    assert!(stride >= cols && c.len() >= (rows - 1) * stride + cols, "product");
    let tiles = kernels.row_tiles(rows);
    let (a_data, c) = (a.data.as_ptr(), c.as_mut_ptr());
    for col in (0..cols).step_by(kernels.nr) {
        let cols = kernels.nr.min(cols - col);
        let (b_data, b_stride) = match b {
            Right::Panels(b) => (b[col * k..].as_ptr(), kernels.panel_width(cols)),
            Right::Rows(b, width) => (b[col..].as_ptr(), width),
        };
        for tile in 0..tiles.count {
            let row = tiles.start(tile);
            let a_rows: [*const f32; MAX_MR] = std::array::from_fn(|r| a_data.wrapping_add((row + r) * a.row_stride));
            let c_rows: [*mut f32; MAX_MR] = std::array::from_fn(|r| c.wrapping_add((row + r) * stride + col));
            let out =
                Output { c: c_rows.as_ptr(), offset: 0, values: Values::F32, cols, alpha, init: if add { Init::C } else { Init::Zero } };
            let t = Tile { segments: 1, kc: k, a: a_rows.as_ptr(), a_step: 0, a_stride: a.k_stride, b: &b_data, b_stride, out };
            // SAFETY: the tile's rows of A and C and its panel of B lie inside of the slices, whose lengths were checked above; C is
            // borrowed mutably, so it overlaps neither factor.
            unsafe { kernels.tile(tiles.height(tile), &t) };
        }
    }
}
