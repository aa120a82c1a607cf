//! Packing: strips of a factor are copied into panels that the micro-kernels read in order, transposed on the way if need be.

use crate::cpu::simd::{F32s, Simd};

/// A strip of a factor: `lanes` rows of A (or columns of B), `k` elements of each.
/// Element `k` of lane `i` lies at `src + i · lane_stride + k · k_stride`.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Strip<T = f32> {
    pub src: *const T,
    pub lanes: usize,
    pub lane_stride: usize,
    pub k: usize,
    pub k_stride: usize,
}

/// Copies a strip into a panel `[k][width]`; lanes from `lanes` to `width` are zero.
///
/// # Safety
/// The strip must be readable, `dst` writable for `k · width` values apart from it, and `lanes <= width`.
#[inline(always)]
pub(in crate::cpu) unsafe fn pack<S: Simd>(s: S, strip: Strip, width: usize, dst: *mut f32) {
    debug_assert!(strip.lanes <= width);
    // SAFETY: the caller's contract.
    unsafe {
        if strip.lanes < width {
            std::slice::from_raw_parts_mut(dst, strip.k * width).fill(0.0);
        }
        if strip.lane_stride == 1 {
            copy_rows(s, strip, width, dst);
        } else if strip.k_stride == 1 {
            transpose(s, strip, width, dst);
        } else {
            gather(strip, 0..strip.lanes, 0..strip.k, width, dst);
        }
    }
}

/// Lanes are neighbours in memory: each k is a run.
///
/// # Safety
/// As for [`pack`].
#[inline(always)]
unsafe fn copy_rows<S: Simd>(s: S, strip: Strip, width: usize, dst: *mut f32) {
    for k in 0..strip.k {
        let (src, dst) = (strip.src.wrapping_add(k * strip.k_stride), dst.wrapping_add(k * width));
        let mut i = 0;
        while i < strip.lanes {
            let count = (strip.lanes - i).min(S::LANES);
            // SAFETY: `count` lanes are left of this k.
            unsafe {
                if count == S::LANES {
                    s.load(src.add(i)).store(dst.add(i));
                } else {
                    s.load_partial(src.add(i), count).store_partial(dst.add(i), count);
                }
            }
            i += count;
        }
    }
}

/// Each lane is a run along k: squares of `LANES × LANES` are transposed in registers.
///
/// # Safety
/// As for [`pack`]; the values need not be aligned.
#[inline(always)]
pub(super) unsafe fn transpose<S: Simd>(s: S, strip: Strip, width: usize, dst: *mut f32) {
    let full_k = strip.k / S::LANES * S::LANES;
    for i in (0..strip.lanes).step_by(S::LANES) {
        let lanes = S::LANES.min(strip.lanes - i);
        for k in (0..full_k).step_by(S::LANES) {
            let (src, dst) = (strip.src.wrapping_add(i * strip.lane_stride + k), dst.wrapping_add(k * width + i));
            // SAFETY: `lanes` lanes of a full vector of k lie inside the strip and the panel.
            unsafe {
                if lanes == S::LANES {
                    s.transpose(src, strip.lane_stride, dst, width);
                } else {
                    // The row tiles of A are 12 high, vectors are 16 wide.
                    s.transpose_some(src, strip.lane_stride, lanes, dst, width);
                }
            }
        }
    }
    // SAFETY: the last k, fewer than a vector, of all lanes.
    unsafe { gather(strip, 0..strip.lanes, full_k..strip.k, width, dst) };
}

/// Any strides, one value at a time; sixteen k of a lane at a time, which is a cache line where k is contiguous.
///
/// # Safety
/// As for [`pack`], for the given lanes and k; the values need not be aligned.
#[inline(always)]
unsafe fn gather(strip: Strip, lanes: std::ops::Range<usize>, ks: std::ops::Range<usize>, width: usize, dst: *mut f32) {
    for first in ks.clone().step_by(16) {
        for i in lanes.clone() {
            for k in first..ks.end.min(first + 16) {
                // SAFETY: the element lies inside the strip and the panel.
                unsafe { dst.add(k * width + i).write(strip.src.add(i * strip.lane_stride + k * strip.k_stride).read_unaligned()) };
            }
        }
    }
}
