//! What panels are made of: the values of f32 factors, those of f16 and bf16 widened, or pairs of bf16 for machines that multiply these.

use super::blocked::Place;
use super::micro::MicroKernels;
use super::pack::{self, Strip};
use super::{Matrix, Out};
use crate::cpu::simd::Simd;
use crate::element::{Element, Float};
use half::bf16;
use std::marker::PhantomData;

/// Which factor a strip belongs to: one of rows of A, or of columns of B.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::cpu) enum Side {
    A,
    B,
}

/// The smallest and largest magnitudes among packed values, where a packing looks at them.
#[derive(Clone, Copy)]
pub(in crate::cpu) struct Magnitudes {
    /// One less than the bits of the smallest that is not zero; `u32::MAX` if there is none.
    pub least: u32,
    /// The bits of the largest, NaN being above infinity.
    pub most: u32,
}

impl Magnitudes {
    /// Of no values.
    pub const NONE: Self = Self { least: u32::MAX, most: 0 };
    /// Of ones.
    pub const ONE: Self = Self { least: 1f32.to_bits() - 1, most: 1f32.to_bits() };

    pub fn union(self, other: Self) -> Self {
        Self { least: self.least.min(other.least), most: self.most.max(other.most) }
    }

    /// The binary exponents of both, 128 for infinities and NaN; `None` if all values are zero.
    #[cfg(target_arch = "x86_64")]
    pub fn exponents(self) -> Option<(i32, i32)> {
        let exponent = |bits: u32| (bits >> 23) as i32 - 127;
        (self.least != u32::MAX).then(|| (exponent(self.least + 1), exponent(self.most)))
    }
}

/// How the values of factors go into panels, and which micro-kernels multiply these.
pub(super) trait Packing: Copy + Send + Sync + 'static {
    /// What factors hold.
    type Element: Element;
    /// The packing for blocks that this one's micro-kernels cannot multiply.
    type Fallback: Packing<Element = Self::Element>;

    /// Values (of neighbouring k) in an entry.
    const TERMS: usize;
    /// 32-bit words that an entry takes.
    const WORDS: usize = 1;
    /// Entries of a panel are a multiple of this.
    const UNIT: usize = 1;
    /// Entries of a block of K.
    const KC: usize = super::blocked::KC / Self::WORDS;
    /// Words of a packed super-block of each factor: 8 MiB, so that both fit the L3 of most machines.
    const SUPER_BLOCK: usize = 2 << 20;
    /// Most row tiles of a task. At AVX-512 its block of A (192 × KC) is 576 KiB of L2, each panel of B comes from L3 once for 16 tiles,
    /// and it lasts about 0.8 ms at K = 1024: short enough to keep threads evenly busy, long enough to hide the hand-over.
    const TILES: usize = 16;
    /// Rows that a task of the small path covers at most: A's packed block (240 × KC, 720 KiB) fits a 1 MiB L2.
    const BLOCK_ROWS: usize = 240;
    /// Whether a panel of A may hold the rows of several tiles side by side: one of neighbours in memory is then packed by whole vectors.
    const WIDE: bool = true;
    /// How many times as fast as those of [`Plain`] the products are, about.
    const SPEED: usize = 1;

    /// The micro-kernels for such panels.
    fn kernels() -> &'static MicroKernels;

    /// Copies a strip into a panel, `[entries of k][width]` if the packing does not say otherwise; lanes from `lanes` to `width` are zero, and
    /// so is what the last entries lack. Returns the values' magnitudes if [`multiplies`](Self::multiplies) asks for them.
    ///
    /// # Safety
    /// The strip must be readable, `dst` writable for a panel's words apart from it, and `lanes <= width`.
    unsafe fn pack<S: Simd>(s: S, side: Side, strip: Strip<Self::Element>, width: usize, dst: *mut f32) -> Magnitudes;

    /// Lanes of `k` values each, as entries that micro-kernels may read in place of panels, if memory holds them so.
    fn in_place(_lanes: Matrix<Self::Element>, _k: usize) -> Option<Matrix<f32>> {
        None
    }

    /// The place as one of C that the micro-kernels' tiles may be stored in, rounded.
    fn rounding(_: Out<Self::Element>) -> Option<Place> {
        None
    }

    /// Whether the micro-kernels multiply values of such magnitudes as exactly as they should, `terms` to a sum.
    fn multiplies(_a: Magnitudes, _b: Magnitudes, _terms: usize) -> bool {
        true
    }

    /// Rows of a panel of A that is to hold `height`.
    fn panel_rows(height: usize) -> usize {
        height
    }

    /// Entries of a panel of so many terms.
    fn entries(terms: usize) -> usize {
        terms.div_ceil(Self::TERMS).next_multiple_of(Self::UNIT)
    }

    /// Words of a lane of a panel of so many terms.
    fn words(terms: usize) -> usize {
        Self::entries(terms) * Self::WORDS
    }
}

/// f32 as it is.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Packing for Plain {
    type Element = f32;
    type Fallback = Self;
    const TERMS: usize = 1;

    fn kernels() -> &'static MicroKernels {
        MicroKernels::get()
    }
    #[inline(always)]
    unsafe fn pack<S: Simd>(s: S, _: Side, strip: Strip, width: usize, dst: *mut f32) -> Magnitudes {
        // SAFETY: the caller's contract.
        unsafe { pack::pack(s, strip, width, dst) };
        Magnitudes::NONE
    }
    #[inline(always)]
    fn in_place(lanes: Matrix<f32>, _: usize) -> Option<Matrix<f32>> {
        Some(lanes)
    }
}

/// f16 or bf16, widened.
#[derive(Clone, Copy)]
pub(super) struct Widened<T>(PhantomData<T>);

/// Neighbouring k of bf16 in one entry.
#[derive(Clone, Copy)]
pub(super) struct Pairs;

/// A packing that makes entries of other values.
trait Convert: Packing {
    /// The entry of the values at `first` and, `stride` further, of those that follow it, `terms` in all.
    ///
    /// # Safety
    /// The values must be readable.
    unsafe fn entry(first: *const Self::Element, stride: usize, terms: usize) -> f32;

    /// Whether values that are neighbours in memory are entries as they are.
    const IN_MEMORY: bool = false;
}

impl<T: Float<Compute = f32>> Convert for Widened<T> {
    #[inline(always)]
    unsafe fn entry(first: *const T, _: usize, _: usize) -> f32 {
        // SAFETY: the caller's contract.
        unsafe { first.read() }.widen()
    }
}

impl Convert for Pairs {
    const IN_MEMORY: bool = cfg!(target_endian = "little");

    #[inline(always)]
    unsafe fn entry(first: *const bf16, stride: usize, terms: usize) -> f32 {
        // SAFETY: the caller's contract.
        let bits = |i: usize| unsafe { first.add(i * stride).read() }.to_bits() as u32;
        f32::from_bits(if terms > 1 { bits(0) | bits(1) << 16 } else { bits(0) })
    }
}

impl<T: Float<Compute = f32>> Packing for Widened<T> {
    type Element = T;
    type Fallback = Self;
    const TERMS: usize = 1;

    fn kernels() -> &'static MicroKernels {
        MicroKernels::get()
    }
    #[inline(always)]
    unsafe fn pack<S: Simd>(s: S, _: Side, strip: Strip<T>, width: usize, dst: *mut f32) -> Magnitudes {
        // SAFETY: the caller's contract.
        unsafe { convert::<S, Self>(s, strip, width, dst) };
        Magnitudes::NONE
    }
}

impl Packing for Pairs {
    type Element = bf16;
    type Fallback = Self;
    const TERMS: usize = 2;

    fn kernels() -> &'static MicroKernels {
        MicroKernels::bf16_pairs()
    }
    #[inline(always)]
    unsafe fn pack<S: Simd>(s: S, _: Side, strip: Strip<bf16>, width: usize, dst: *mut f32) -> Magnitudes {
        // SAFETY: the caller's contract.
        unsafe { convert::<S, Self>(s, strip, width, dst) };
        Magnitudes::NONE
    }
    #[inline(always)]
    fn in_place(lanes: Matrix<bf16>, k: usize) -> Option<Matrix<f32>> {
        let data = lanes.data.cast::<f32>();
        let pairs = Self::IN_MEMORY && lanes.col_stride == 1 && k.is_multiple_of(2) && lanes.row_stride.is_multiple_of(2);
        (pairs && data.is_aligned()).then_some(Matrix { data, row_stride: lanes.row_stride / 2, col_stride: 1 })
    }
    fn rounding(out: Out<bf16>) -> Option<Place> {
        Some(Place::Bf16(out))
    }
}

/// [`Packing::pack`]: row by row where lanes are neighbours, by squares that are converted first and then transposed otherwise.
///
/// # Safety
/// As for [`Packing::pack`].
#[inline(always)]
unsafe fn convert<S: Simd, P: Convert>(s: S, strip: Strip<P::Element>, width: usize, dst: *mut f32) {
    /// Lanes and entries of a square: 4 KiB.
    const LANES: usize = 16;
    const ENTRIES: usize = 64;
    /// So few entries are written sooner than a square is cleared.
    const FEW: usize = 256;
    let Strip { src, lanes, lane_stride, k, k_stride } = strip;
    let (entries, whole) = (k.div_ceil(P::TERMS), k / P::TERMS);
    debug_assert!(lanes <= width);
    // SAFETY: entry `e` of lane `i` holds the values from element e · TERMS of the lane on, of which the last has what is left; the panel has
    // room for all entries, and a square for LANES × ENTRIES.
    unsafe {
        if lanes < width {
            std::slice::from_raw_parts_mut(dst, entries * width).fill(0.0);
        }
        if lane_stride == 1 {
            for e in 0..whole {
                let (src, dst) = (src.add(e * P::TERMS * k_stride), dst.add(e * width));
                (0..lanes).for_each(|i| dst.add(i).write(P::entry(src.add(i), k_stride, P::TERMS)));
            }
            for e in whole..entries {
                let (src, dst) = (src.add(e * P::TERMS * k_stride), dst.add(e * width));
                (0..lanes).for_each(|i| dst.add(i).write(P::entry(src.add(i), k_stride, 1)));
            }
            return;
        }
        if P::IN_MEMORY && k_stride == 1 && lane_stride.is_multiple_of(P::TERMS) {
            let entries_of = Strip { src: src.cast(), lanes, lane_stride: lane_stride / P::TERMS, k: whole, k_stride: 1 };
            pack::transpose(s, entries_of, width, dst);
            for e in whole..entries {
                (0..lanes).for_each(|i| dst.add(e * width + i).write(P::entry(src.add(i * lane_stride + e * P::TERMS), 1, 1)));
            }
            return;
        }
        if lanes * entries <= FEW {
            for i in 0..lanes {
                for e in 0..entries {
                    let terms = P::TERMS.min(k - e * P::TERMS);
                    dst.add(e * width + i).write(P::entry(src.add(i * lane_stride + e * P::TERMS * k_stride), k_stride, terms));
                }
            }
            return;
        }
        let mut square = [0f32; LANES * ENTRIES];
        for lane in (0..lanes).step_by(LANES) {
            let lanes = LANES.min(lanes - lane);
            for first in (0..entries).step_by(ENTRIES) {
                let count = ENTRIES.min(entries - first);
                let whole = whole.clamp(first, first + count) - first;
                for i in 0..lanes {
                    let src = src.add((lane + i) * lane_stride + first * P::TERMS * k_stride);
                    let row = &mut square[i * ENTRIES..(i + 1) * ENTRIES];
                    // A stride that the compiler knows lets it use whole vectors.
                    if k_stride == 1 {
                        row[..whole].iter_mut().enumerate().for_each(|(e, to)| *to = P::entry(src.add(e * P::TERMS), 1, P::TERMS));
                    } else {
                        row[..whole]
                            .iter_mut()
                            .enumerate()
                            .for_each(|(e, to)| *to = P::entry(src.add(e * P::TERMS * k_stride), k_stride, P::TERMS));
                    }
                    for (e, to) in row.iter_mut().enumerate().take(count).skip(whole) {
                        *to = P::entry(src.add(e * P::TERMS * k_stride), k_stride, 1);
                    }
                }
                let strip = Strip { src: square.as_ptr(), lanes, lane_stride: ENTRIES, k: count, k_stride: 1 };
                pack::transpose(s, strip, width, dst.add(first * width + lane));
            }
        }
    }
}
