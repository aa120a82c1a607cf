//! Blocks of rows in scratch memory, and products of them.

use super::Attended;
use crate::cpu::gemm::micro::{Init, MAX_MR, MicroKernels, Output, Tile};
use crate::cpu::gemm::pack::{Strip, pack};
use crate::cpu::simd::Simd;
use crate::view::MatView;
use std::ops::Range;

/// How many columns a row-major block of `cols` columns needs for the micro-kernels to read whole panels of it.
pub(super) fn padded(kernels: &MicroKernels, cols: usize) -> usize {
    let rest = cols % kernels.nr;
    cols - rest + if rest > 0 { kernels.panel_width(rest) } else { 0 }
}

/// Cuts scratch memory into parts of these sizes.
#[inline(always)]
pub(super) fn cut<const N: usize>(mut scratch: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| {
        let (part, rest) = std::mem::take(&mut scratch).split_at_mut(size);
        scratch = rest;
        part
    })
}

/// Copies some rows, times `scale`, to rows of `width` values in `to`; what is beyond the matrix's columns becomes zero.
#[inline(always)]
pub(super) fn load_rows<T: Attended>(from: &MatView<T>, rows: Range<usize>, scale: f32, width: usize, to: &mut [f32]) {
    let (cols, stride) = (from.cols(), from.col_stride());
    for (row, to) in rows.zip(to.chunks_exact_mut(width)) {
        let from = &from.data()[row * from.row_stride()..];
        let (values, rest) = to.split_at_mut(cols);
        if stride == 1 {
            values.iter_mut().zip(from).for_each(|(to, x)| *to = scale * x.widen());
        } else {
            values.iter_mut().enumerate().for_each(|(j, to)| *to = scale * from[j * stride].widen());
        }
        rest.fill(0.0);
    }
}

/// Packs the transpose of `rows` rows of `k` values, `stride` apart, into panels for [`Right::Panels`].
#[inline(always)]
pub(super) fn pack_transposed<S: Simd>(s: S, kernels: &MicroKernels, from: &[f32], rows: usize, k: usize, stride: usize, to: &mut [f32]) {
    assert!(rows > 0 && from.len() >= (rows - 1) * stride + k && to.len() >= k * padded(kernels, rows));
    for row in (0..rows).step_by(kernels.nr) {
        let lanes = kernels.nr.min(rows - row);
        let strip = Strip { src: from[row * stride..].as_ptr(), lanes, lane_stride: stride, k, k_stride: 1 };
        // SAFETY: the strip lies in `from` and the panel in `to`, both checked above; lanes are at most a panel's width.
        unsafe { pack(s, strip, kernels.panel_width(lanes), to[row * k..].as_mut_ptr()) };
    }
}

/// The left factor of a product: element (i, k) lies at `data[i · row_stride + k · k_stride]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub k_stride: usize,
}

/// The right factor of a product.
#[derive(Clone, Copy)]
pub(super) enum Right<'a> {
    /// Panels of [`pack_transposed`].
    Panels(&'a [f32]),
    /// Rows of this many values, at least [`padded`] columns.
    Rows(&'a [f32], usize),
}

/// `C = A·B`, or `C += A·B`, of blocks: C is `rows × cols` with rows `stride` apart.
#[inline(always)]
pub(super) fn product(kernels: &MicroKernels, [rows, k, cols]: [usize; 3], a: Left, b: Right, c: &mut [f32], stride: usize, add: bool) {
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
            let out = Output { c: c_rows.as_ptr(), cols, alpha: 1.0, init: if add { Init::C } else { Init::Zero } };
            let t = Tile { segments: 1, kc: k, a: a_rows.as_ptr(), a_stride: a.k_stride, b: &b_data, b_stride, out };
            // SAFETY: the tile's rows of A and C and its panel of B lie inside of the slices, whose lengths were checked above; C is
            // borrowed mutably, so it overlaps neither factor.
            unsafe { kernels.tile(tiles.height(tile), &t) };
        }
    }
}
