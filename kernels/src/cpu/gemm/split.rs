//! Values as sums of bf16, packed as the chunks that matrix tiles multiply.
//!
//! An f32 is the sum of three bf16: x = h + m + l, where h is x rounded to the nearest, m what that leaves, rounded again, and l all the
//! rest. (With m cut off instead, l would be twice as large, and the products of m and l that are left out would show.) Two parts round the
//! second, one part is x rounded. f16 is the sum of two, bf16 is one.

use super::pack::Strip;
pub(in crate::cpu) use super::packing::{Magnitudes, Side};
use crate::cpu::amx::{ENTRIES, SIDE};
use crate::cpu::simd::Avx512;
use crate::element::Float;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Terms of K in a chunk.
pub(in crate::cpu) const TERMS: usize = 2 * ENTRIES;

/// Words of a part of a chunk.
const WORDS: usize = SIDE * ENTRIES;

/// An element type that can be split.
pub(in crate::cpu) trait Source: Float<Compute = f32> {
    /// Parts that hold any value exactly.
    const EXACT: usize;

    /// The values whose bits in `mask` are set, widened, and zeros.
    ///
    /// # Safety
    /// These must be readable.
    unsafe fn load(token: Avx512, src: *const Self, mask: __mmask16) -> __m512;
}

/// Implements [`Source`] by an expression of the address and the mask.
macro_rules! sources {
    ($($t:ident in $exact:literal by |$src:ident, $mask:ident| $load:expr;)*) => { $(
        impl Source for $t {
            const EXACT: usize = $exact;

            #[inline(always)]
            unsafe fn load(_: Avx512, $src: *const $t, $mask: __mmask16) -> __m512 {
                // SAFETY: the token proves the features; masked values are not read.
                unsafe { $load }
            }
        }
    )* };
}

sources! {
    f32 in 3 by |src, mask| _mm512_maskz_loadu_ps(mask, src);
    f16 in 2 by |src, mask| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, src.cast()));
    bf16 in 1 by |src, mask|
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src.cast()))));
}

/// Whether no part of a value or product that counts leaves the normal range, `terms` products to a sum.
pub(in crate::cpu) fn multiplies<const PARTS: usize>(a: Magnitudes, b: Magnitudes, terms: usize) -> bool {
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

/// How a part comes from what the parts before it left.
#[derive(Clone, Copy)]
enum Cut {
    /// To the nearest bf16.
    Round,
    /// The same, where there may be NaN.
    RoundAny,
    /// Nothing is left after it.
    Whole,
}

const fn cut<T: Source, const PARTS: usize>(part: usize) -> Cut {
    match part {
        _ if part + 1 == PARTS && PARTS >= T::EXACT => Cut::Whole,
        0 if PARTS == 1 => Cut::RoundAny,
        _ => Cut::Round,
    }
}

/// Packs a strip as chunks `[step][part]`, for A `[SIDE][ENTRIES]`, for B `[ENTRIES][SIDE]` words of two neighbouring k; what is missing of a
/// chunk is zero. Returns the magnitudes of the values if there are several parts.
///
/// # Safety
/// The strip must be readable and have at most SIDE lanes; `dst` must be writable for all chunks, apart from it.
pub(in crate::cpu) unsafe fn pack<T: Source, const PARTS: usize>(side: Side, strip: Strip<T>, dst: *mut f32) -> Magnitudes {
    let dst = dst.cast::<u32>();
    match Avx512::detect() {
        // SAFETY: the token proves the features; the rest is the caller's contract.
        Some(token) => unsafe { pack_vectors::<T, PARTS>(token, side, strip, dst) },
        // SAFETY: the caller's contract.
        None => unsafe { pack_values::<T, PARTS>(side, strip, dst) },
    }
}

/// [`pack`], value by value.
///
/// # Safety
/// As for [`pack`].
unsafe fn pack_values<T: Source, const PARTS: usize>(side: Side, strip: Strip<T>, dst: *mut u32) -> Magnitudes {
    let mut seen = Magnitudes::NONE;
    let steps = strip.k.div_ceil(TERMS);
    // SAFETY: the chunks of all steps are writable, and each element lies inside the strip.
    unsafe {
        std::slice::from_raw_parts_mut(dst, steps * PARTS * WORDS).fill(0);
        for (lane, k) in (0..strip.lanes).flat_map(|lane| (0..strip.k).map(move |k| (lane, k))) {
            let mut rest = strip.src.add(lane * strip.lane_stride + k * strip.k_stride).read().widen();
            let bits = rest.abs().to_bits();
            seen = seen.union(Magnitudes { least: bits.wrapping_sub(1), most: bits });
            let (entry, shift) = (k % TERMS / 2, 16 * (1 - k % 2));
            let word = if side == Side::A { lane * ENTRIES + entry } else { entry * SIDE + lane };
            for part in 0..PARTS {
                let high = match cut::<T, PARTS>(part) {
                    Cut::Round | Cut::RoundAny => bf16::from_f32(rest).to_bits() as u32 * 0x1_0000,
                    Cut::Whole => rest.to_bits() & 0xFFFF_0000,
                };
                rest -= f32::from_bits(high);
                *dst.add((k / TERMS * PARTS + part) * WORDS + word) |= high >> shift;
            }
        }
    }
    seen
}

/// [`pack`], sixteen values at a time.
///
/// # Safety
/// As for [`pack`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_vectors<T: Source, const PARTS: usize>(token: Avx512, side: Side, strip: Strip<T>, dst: *mut u32) -> Magnitudes {
    let mut seen = Seen { least: _mm512_set1_epi32(-1), most: _mm512_setzero_si512() };
    let mut staged = [T::default(); SIDE * TERMS];
    let mut turned = [[0u32; WORDS]; PARTS];
    for (step, k) in (0..strip.k).step_by(TERMS).enumerate() {
        let mut part = Strip { src: strip.src.wrapping_add(k * strip.k_stride), k: TERMS.min(strip.k - k), ..strip };
        if part.k_stride != 1 && part.lane_stride != 1 {
            // SAFETY: the strip is the caller's, and has at most SIDE lanes and TERMS of K.
            unsafe { stage(&part, &mut staged) };
            part = Strip { src: staged.as_ptr(), lane_stride: TERMS, k_stride: 1, ..part };
        }
        let chunk = dst.wrapping_add(step * PARTS * WORDS);
        let along_k = part.k_stride == 1;
        // Words of one lane follow one another in A's chunks; so do those of one k, or two, in B's.
        let in_place = along_k == (side == Side::A);
        let to = if in_place { chunk } else { turned.as_mut_ptr().cast() };
        // SAFETY: `to` has all words of a chunk's parts.
        unsafe {
            if along_k {
                split_lanes::<T, PARTS>(token, &part, to, &mut seen);
            } else {
                split_terms::<T, PARTS>(token, &part, to, &mut seen);
            }
            if !in_place {
                let (rows, cols) = if along_k { (SIDE, ENTRIES) } else { (ENTRIES, SIDE) };
                for (part, words) in turned.iter().enumerate() {
                    transpose(token, words.as_ptr(), rows, cols, chunk.add(part * WORDS));
                }
            }
        }
    }
    if PARTS == 1 { Magnitudes::NONE } else { seen.magnitudes() }
}

/// Copies a part of a strip as `[SIDE][TERMS]`.
///
/// # Safety
/// It must be readable.
unsafe fn stage<T: Source>(strip: &Strip<T>, to: &mut [T; SIDE * TERMS]) {
    for lane in 0..strip.lanes {
        for k in 0..strip.k {
            // SAFETY: the element lies inside the strip.
            to[lane * TERMS + k] = unsafe { strip.src.add(lane * strip.lane_stride + k * strip.k_stride).read() };
        }
    }
}

/// The mask of the vector's lanes from `first` on that are below `count`.
#[inline(always)]
fn below(count: usize, first: usize) -> __mmask16 {
    let left = count.saturating_sub(first);
    if left >= 16 { !0 } else { (1 << left) - 1 }
}

/// Splits a strip of at most TERMS whose k are neighbours: words `[part][SIDE][ENTRIES]`.
///
/// # Safety
/// The strip must be readable, `to` writable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn split_lanes<T: Source, const PARTS: usize>(token: Avx512, strip: &Strip<T>, to: *mut u32, seen: &mut Seen) {
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    let (first, second) = (below(strip.k, 0), below(strip.k, 16));
    for lane in 0..strip.lanes {
        let src = strip.src.wrapping_add(lane * strip.lane_stride);
        // SAFETY: the lane has the terms of the masks; `to` has WORDS words for each part.
        unsafe {
            let (x, y) = (T::load(token, src, first), T::load(token, src.wrapping_add(16), second));
            let words = seen.split::<T, PARTS>(_mm512_permutex2var_ps(x, even, y), _mm512_permutex2var_ps(x, odd, y));
            for (part, words) in words.into_iter().enumerate() {
                _mm512_storeu_si512(to.add(part * WORDS + lane * ENTRIES).cast(), words);
            }
        }
    }
    for lane in strip.lanes..SIDE {
        for part in 0..PARTS {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(to.add(part * WORDS + lane * ENTRIES).cast(), _mm512_setzero_si512()) };
        }
    }
}

/// Splits a strip of at most TERMS whose lanes are neighbours: words `[part][ENTRIES][SIDE]`.
///
/// # Safety
/// The strip must be readable, `to` writable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn split_terms<T: Source, const PARTS: usize>(token: Avx512, strip: &Strip<T>, to: *mut u32, seen: &mut Seen) {
    for entry in 0..ENTRIES {
        for lane in [0, 16] {
            let mask = below(strip.lanes, lane);
            let row = |k: usize| strip.src.wrapping_add(k * strip.k_stride + lane);
            let (k, none) = (2 * entry, 0);
            // SAFETY: each row has the lanes of its mask; `to` has WORDS words for each part.
            unsafe {
                let x = T::load(token, row(k), if k < strip.k { mask } else { none });
                let y = T::load(token, row(k + 1), if k + 1 < strip.k { mask } else { none });
                let words = seen.split::<T, PARTS>(x, y);
                for (part, words) in words.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add(part * WORDS + entry * SIDE + lane).cast(), words);
                }
            }
        }
    }
}

/// Extremes of the magnitudes of values, lane by lane.
struct Seen {
    /// One less than the bits of the smallest that is not zero.
    least: __m512i,
    most: __m512i,
}

impl Seen {
    /// Words of each part of `even` (in their lower halves) and `odd`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn split<T: Source, const PARTS: usize>(&mut self, mut even: __m512, mut odd: __m512) -> [__m512i; PARTS] {
        if PARTS > 1 {
            self.see(even);
            self.see(odd);
        }
        let mut words = [_mm512_setzero_si512(); PARTS];
        for (part, words) in words.iter_mut().enumerate() {
            let (low, high) = (upper_half::<T, PARTS>(part, even), upper_half::<T, PARTS>(part, odd));
            if part + 1 < PARTS {
                even = _mm512_sub_ps(even, _mm512_castsi512_ps(low));
                odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(high));
            }
            *words = _mm512_mask_blend_epi16(0xAAAA_AAAA, _mm512_srli_epi32::<16>(low), high);
        }
        words
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn see(&mut self, x: __m512) {
        let bits = _mm512_castps_si512(_mm512_abs_ps(x));
        // Zero wraps around to the largest.
        self.least = _mm512_min_epu32(self.least, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));
        self.most = _mm512_max_epu32(self.most, bits);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn magnitudes(&self) -> Magnitudes {
        Magnitudes { least: _mm512_reduce_min_epu32(self.least), most: _mm512_reduce_max_epu32(self.most) }
    }
}

/// A part of what is left, in the upper halves of words; the lower halves of the last part may hold anything.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn upper_half<T: Source, const PARTS: usize>(part: usize, x: __m512) -> __m512i {
    let (bits, upper) = (_mm512_castps_si512(x), _mm512_set1_epi32(!0xFFFF));
    match cut::<T, PARTS>(part) {
        Cut::Whole => bits,
        Cut::Round => _mm512_and_si512(rounded(bits), upper),
        Cut::RoundAny => {
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(1 << 22));
            _mm512_mask_mov_epi32(rounded(bits), _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), quiet)
        }
    }
}

/// The bits of f32 such that their upper halves are the nearest bf16, ties to even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn rounded(bits: __m512i) -> __m512i {
    let is_odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7FFF)))
}

/// `[rows][cols]` to `[cols][rows]`, both multiples of 16.
///
/// # Safety
/// Both must have their words.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn transpose(token: Avx512, src: *const u32, rows: usize, cols: usize, dst: *mut u32) {
    use crate::cpu::simd::Simd;
    for i in (0..rows).step_by(16) {
        for j in (0..cols).step_by(16) {
            // SAFETY: a whole square is left in both.
            unsafe { token.transpose(src.add(i * cols + j).cast(), cols, dst.add(j * rows + i).cast(), rows) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ways of packing, and that parts add up to their values.
    fn check<T: Source, const PARTS: usize>(values: impl Fn(usize) -> f32, exact: bool) {
        let data: Vec<T> = (0..4 * SIDE * 80).map(|i| T::narrow(values(i))).collect();
        for (lanes, k) in [(32, 64), (32, 33), (7, 50), (17, 1), (1, 32)] {
            for (lane_stride, k_stride) in [(80, 1), (1, 40), (2 * 80, 2)] {
                let strip = Strip { src: data.as_ptr(), lanes, lane_stride, k, k_stride };
                for side in [Side::A, Side::B] {
                    let words = k.div_ceil(TERMS) * PARTS * WORDS;
                    let (mut plain, mut wide) = (vec![1f32; words], vec![2f32; words]);
                    // SAFETY: the strip lies in the data, the panels have all words.
                    let seen = unsafe { pack_values::<T, PARTS>(side, strip, plain.as_mut_ptr().cast()) };
                    // SAFETY: as above.
                    let seen_wide = unsafe { pack::<T, PARTS>(side, strip, wide.as_mut_ptr()) };
                    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&plain), bits(&wide), "{lanes} lanes of {k}, strides {lane_stride} and {k_stride}");
                    if PARTS > 1 {
                        assert_eq!((seen.least, seen.most), (seen_wide.least, seen_wide.most));
                    }
                    for (lane, k) in (0..lanes).flat_map(|lane| (0..k).map(move |k| (lane, k))) {
                        let (entry, shift) = (k % TERMS / 2, 16 * (1 - k % 2));
                        let word = if side == Side::A { lane * ENTRIES + entry } else { entry * SIDE + lane };
                        let part = |part: usize| plain[(k / TERMS * PARTS + part) * WORDS + word].to_bits() << shift & 0xFFFF_0000;
                        let sum: f64 = (0..PARTS).map(|p| f32::from_bits(part(p)) as f64).sum();
                        let x = data[lane * lane_stride + k * k_stride].widen() as f64;
                        let most = if exact { 0.0 } else { x.abs() * 2f64.powi(-8 * PARTS as i32) };
                        assert!((sum - x).abs() <= most, "{sum} for {x}");
                    }
                }
            }
        }
    }

    fn value(i: usize) -> f32 {
        let mantissa = f32::from_bits(0x3F80_0000 | (i as u32).wrapping_mul(2_654_435_761) >> 9);
        mantissa * 2f32.powi(i as i32 % 9 - 4) * if i.is_multiple_of(3) { -1.0 } else { 1.0 }
    }

    #[test]
    fn parts_add_up() {
        check::<f32, 3>(value, true);
        check::<f32, 2>(value, false);
        check::<f32, 1>(value, false);
        check::<f16, 2>(value, true);
        check::<bf16, 1>(value, true);
    }

    #[test]
    fn one_part_keeps_special_values() {
        let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::MAX, f32::from_bits(0x7F80_0001)];
        let strip = Strip { src: values.as_ptr(), lanes: 1, lane_stride: 1, k: values.len(), k_stride: 1 };
        let mut words = [0f32; WORDS];
        // SAFETY: one lane of six values, and a chunk.
        unsafe { pack::<f32, 1>(Side::A, strip, words.as_mut_ptr()) };
        for (k, x) in values.iter().enumerate() {
            let packed = bf16::from_bits((words[k / 2].to_bits() >> (16 * (k % 2))) as u16);
            assert_eq!(packed.to_f32().is_nan(), x.is_nan());
            assert!(x.is_nan() || packed == bf16::from_f32(*x), "{packed} for {x}");
        }
    }
}
