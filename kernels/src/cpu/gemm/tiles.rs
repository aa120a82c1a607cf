//! Products on matrix tiles (AMX): factors are packed as bf16, f32 and f16 as sums of several, and the products of their parts added up.
//!
//! An f32 is the sum of three bf16 to its last bit or nearly so: x = h + m + l. Of the nine products of two such sums, six count (see
//! [`amx::three_part_products`]); their sum is nearer to the exact product than a sequence of f32 multiply-adds. Two parts and three products
//! give about 2⁻¹⁶. Tiles know no denormals, and a split knows no infinities: values that would need them send their block to the plain kernels.

use super::micro::{MicroKernels, Output, Tile, store_vector};
use super::pack::Strip;
use super::packing::{Magnitudes, Packing, Plain, Side, Widened};
use crate::cpu::amx::{self, ENTRIES, SIDE, Session, Sums};
use crate::cpu::isa::{Isa, WithSimd, dispatch_widest, isa};
use crate::cpu::simd::Simd;
use crate::element::Float;
use half::{bf16, f16};
use std::marker::PhantomData;

/// Terms of K in a step.
const TERMS: usize = 2 * ENTRIES;

/// Words of a part of a chunk.
const WORDS: usize = SIDE * ENTRIES;

/// f32, f16 or bf16 as the sum of `PARTS` bf16.
#[derive(Clone, Copy)]
pub(super) struct Split<T, const PARTS: usize>(PhantomData<T>);

/// An element type that can be split.
pub(super) trait Source: Float<Compute = f32> {
    /// Who multiplies blocks that tiles cannot.
    type Fallback: Packing<Element = Self>;
}

impl Source for f32 {
    type Fallback = Plain;
}
impl Source for f16 {
    type Fallback = Widened<f16>;
}
impl Source for bf16 {
    type Fallback = Widened<bf16>;
}

impl<T: Source, const PARTS: usize> Packing for Split<T, PARTS> {
    type Element = T;
    type Fallback = T::Fallback;
    const TERMS: usize = 2;
    const WORDS: usize = PARTS;
    const UNIT: usize = ENTRIES;

    fn kernels() -> &'static MicroKernels {
        const {
            match PARTS {
                1 => &ONE_PART,
                2 => &TWO_PARTS,
                3 => &THREE_PARTS,
                _ => panic!("one to three parts"),
            }
        }
    }

    fn panel_rows(_: usize) -> usize {
        SIDE
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(s: S, side: Side, strip: Strip<T>, _: usize, dst: *mut f32) -> Magnitudes {
        // SAFETY: the caller's contract.
        unsafe { pack::<S, T, PARTS>(s, side, strip, dst) }
    }

    /// Whether no part of a value or product that counts leaves the normal range.
    fn multiplies(a: Magnitudes, b: Magnitudes, terms: usize) -> bool {
        /// Parts of larger values may round to infinity.
        const MOST: i32 = 125;
        /// The third part of smaller values may be denormal.
        const LEAST: i32 = -100;
        /// A third part's product with another value of this exponent, or more, is lost by less than the last bit of what it is added to.
        const LEAST_PRODUCT: i32 = -100;
        if PARTS == 1 {
            // Rounded to bf16: what that loses, and that denormals count as zero, is what the caller asked for.
            return true;
        }
        let (Some((a_least, a_most)), Some((b_least, b_most))) = (a.exponents(), b.exponents()) else {
            // Only zeros on one side; unless the other is wild, the product is zero.
            return [a, b].iter().all(|x| x.exponents().is_none_or(|(_, most)| most <= MOST));
        };
        let growth = terms.ilog2() as i32 + 1;
        a_least.min(b_least) >= LEAST
            && a_least + b_least >= LEAST_PRODUCT
            && a_most.max(b_most) <= MOST
            && a_most + b_most + 2 + growth <= MOST
    }

    fn dispatch<W: WithSimd>(work: W) -> W::Output {
        dispatch_widest(work)
    }
}

/// Whether this process has tiles and a product is large enough for them: with fewer rows or columns most of a tile would be padding, and
/// with fewer terms most of the time would go to packing.
pub(super) fn pay(m: usize, n: usize, k: usize) -> bool {
    isa() == Isa::Amx && m.min(n) >= 16 && k >= TERMS
}

/// Packs a strip as chunks `[step][part]`, for A `[SIDE][ENTRIES]`, for B `[ENTRIES][SIDE]`; what is missing of a chunk is zero.
///
/// # Safety
/// As for [`Packing::pack`].
#[inline(always)]
unsafe fn pack<S: Simd, T: Source, const PARTS: usize>(s: S, side: Side, strip: Strip<T>, dst: *mut f32) -> Magnitudes {
    let mut seen = Seen::new();
    let mut staged = [T::default(); SIDE * TERMS];
    let mut words = [[0u32; WORDS]; PARTS];
    let mut rows = [[[0u32; SIDE]; PARTS]; 2];
    for (step, k) in (0..strip.k).step_by(TERMS).enumerate() {
        let part = Strip { src: strip.src.wrapping_add(k * strip.k_stride), k: TERMS.min(strip.k - k), ..strip };
        let whole = part.lanes == SIDE && part.k == TERMS;
        let (src, stride, along_k) = if whole && strip.k_stride == 1 {
            (part.src, strip.lane_stride, true)
        } else if whole && strip.lane_stride == 1 {
            (part.src, strip.k_stride, false)
        } else {
            // SAFETY: the strip is the caller's.
            unsafe { stage(part, &mut staged) };
            (staged.as_ptr(), TERMS, true)
        };
        if along_k {
            for lane in 0..SIDE {
                // SAFETY: each lane has TERMS values side by side.
                unsafe { split_row(src.add(lane * stride), &mut rows[0], &mut seen) };
                for (words, row) in words.iter_mut().zip(&rows[0]) {
                    for e in 0..ENTRIES {
                        words[lane * ENTRIES + e] = row[2 * e] >> 16 | row[2 * e + 1];
                    }
                }
            }
        } else {
            for e in 0..ENTRIES {
                // SAFETY: each k has SIDE values side by side.
                unsafe {
                    split_row(src.add(2 * e * stride), &mut rows[0], &mut seen);
                    split_row(src.add((2 * e + 1) * stride), &mut rows[1], &mut seen);
                }
                for (p, words) in words.iter_mut().enumerate() {
                    for lane in 0..SIDE {
                        words[e * SIDE + lane] = rows[0][p][lane] >> 16 | rows[1][p][lane];
                    }
                }
            }
        }
        for (p, words) in words.iter().enumerate() {
            let (words, chunk) = (words.as_ptr().cast::<f32>(), dst.wrapping_add((step * PARTS + p) * WORDS));
            // SAFETY: words and chunk have WORDS values each.
            unsafe {
                match (side, along_k) {
                    (Side::A, true) | (Side::B, false) => std::ptr::copy_nonoverlapping(words, chunk, WORDS),
                    (Side::B, true) => transpose(s, words, SIDE, ENTRIES, chunk),
                    (Side::A, false) => transpose(s, words, ENTRIES, SIDE, chunk),
                }
            }
        }
    }
    seen.magnitudes()
}

/// Copies a part of a strip as `[SIDE][TERMS]`, and zeros where it has none.
///
/// # Safety
/// The strip must be readable.
#[inline(always)]
unsafe fn stage<T: Source>(strip: Strip<T>, to: &mut [T; SIDE * TERMS]) {
    to.fill(T::default());
    for lane in 0..strip.lanes {
        for k in 0..strip.k {
            // SAFETY: the element lies inside the strip.
            to[lane * TERMS + k] = unsafe { strip.src.add(lane * strip.lane_stride + k * strip.k_stride).read() };
        }
    }
}

/// The parts of a row of 32 values, each in the upper half of a word.
///
/// # Safety
/// The values must be readable.
#[inline(always)]
unsafe fn split_row<T: Source, const PARTS: usize>(src: *const T, parts: &mut [[u32; SIDE]; PARTS], seen: &mut Seen) {
    let mut rest = [0f32; SIDE];
    for (i, rest) in rest.iter_mut().enumerate() {
        // SAFETY: the caller's contract.
        *rest = unsafe { src.add(i).read() }.widen();
    }
    if PARTS > 1 {
        seen.add(&rest);
    }
    for part in parts {
        for (rest, part) in rest.iter_mut().zip(part) {
            *part = round_to_bf16(*rest);
            *rest -= f32::from_bits(*part);
        }
    }
}

/// The nearest bf16, as the f32 of the same value.
#[inline(always)]
fn round_to_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    (if x.is_nan() { bits | 1 << 22 } else { nearest }) & 0xFFFF_0000
}

/// `[rows][cols]` to `[cols][rows]`, both multiples of 16.
///
/// # Safety
/// Both must have their values.
#[inline(always)]
unsafe fn transpose<S: Simd>(s: S, src: *const f32, rows: usize, cols: usize, dst: *mut f32) {
    for i in (0..rows).step_by(S::LANES) {
        for j in (0..cols).step_by(S::LANES) {
            // SAFETY: a whole square of LANES is left in both.
            unsafe { s.transpose(src.add(i * cols + j), cols, dst.add(j * rows + i), rows) };
        }
    }
}

/// Extremes of the magnitudes of values, column by column of a row.
struct Seen {
    /// One less than the bits of the smallest that is not zero.
    least: [u32; SIDE],
    most: [u32; SIDE],
}

impl Seen {
    fn new() -> Self {
        Self { least: [u32::MAX; SIDE], most: [0; SIDE] }
    }

    #[inline(always)]
    fn add(&mut self, values: &[f32; SIDE]) {
        for ((least, most), x) in self.least.iter_mut().zip(&mut self.most).zip(values) {
            let bits = x.abs().to_bits();
            // Zero wraps around to the largest.
            *least = (*least).min(bits.wrapping_sub(1));
            *most = (*most).max(bits);
        }
    }

    fn magnitudes(&self) -> Magnitudes {
        let least = self.least.iter().min().map_or(u32::MAX, |&x| x);
        Magnitudes { least, most: self.most.iter().max().map_or(0, |&x| x) }
    }
}

static ONE_PART: MicroKernels = MicroKernels::of_tiles(tile::<1>);
static TWO_PARTS: MicroKernels = MicroKernels::of_tiles(tile::<2>);
static THREE_PARTS: MicroKernels = MicroKernels::of_tiles(tile::<3>);

/// A block of up to SIDE rows from two panels, the only addresses of A and B that it reads.
///
/// # Safety
/// As for [`MicroKernels::tile`], for panels of `kc` entries; the session is this thread's.
unsafe fn tile<const PARTS: usize>(rows: usize, t: &Tile, session: &Session) {
    let mut sums = Sums::default();
    // SAFETY: there is one segment, and both panels hold `kc` entries, a multiple of a chunk's.
    unsafe {
        let (a, b) = (t.a.read().cast::<u8>(), t.b.read().cast::<u8>());
        let products = match PARTS {
            1 => amx::bf16_products,
            2 => amx::two_part_products,
            _ => amx::three_part_products,
        };
        products(session, a, b, t.kc / ENTRIES, &mut sums);
    }
    dispatch_widest(Finish { sums: &sums, rows, out: &t.out });
}

struct Finish<'a> {
    sums: &'a Sums<f32>,
    rows: usize,
    out: &'a Output,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let alpha = s.splat(self.out.alpha);
        for (r, sums) in self.sums.0.as_chunks::<SIDE>().0.iter().take(self.rows).enumerate() {
            for first in (0..self.out.cols).step_by(S::LANES) {
                // SAFETY: `tile`'s caller vouches for the rows of C; SIDE is a multiple of LANES.
                unsafe { store_vector(s, s.load(sums.as_ptr().add(first)), alpha, r, first, self.out) };
            }
        }
    }
}
