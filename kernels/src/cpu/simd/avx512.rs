//! AVX-512 (F, BW, DQ, VL): sixteen lanes.
//!
//! Every `unsafe` here calls an intrinsic of one of the features that [`Avx512::detect`] checked; a vector exists only
//! if a token did, so the instruction exists.

use super::{F32s, I32s, Masks, Simd, Unaligned};
use crate::cpu::isa::{self, WithSimd};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};
use std::sync::OnceLock;

/// Token: the machine has AVX-512 F, BW, DQ, VL, and AVX2, FMA, F16C with it.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

/// Sixteen f32.
#[derive(Clone, Copy, Debug)]
pub struct F32x16(__m512);
/// Sixteen i32.
#[derive(Clone, Copy, Debug)]
pub struct I32x16(__m512i);
/// Sixteen truth values.
#[derive(Clone, Copy, Debug)]
pub struct Mask16(__mmask16);

impl Avx512 {
    /// The token, if the machine and the operating system support the level.
    #[inline]
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && super::Avx2::detect().is_some())
        .then_some(Avx512(()))
    }

    /// The token, without a look at the machine.
    ///
    /// # Safety
    /// [`detect`](Self::detect) must have returned one before.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn assume() -> Self {
        Avx512(())
    }
}

/// Token: the machine has AVX512-BF16 besides.
#[derive(Clone, Copy, Debug)]
pub struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The token, if the machine and the operating system support the instructions.
    #[inline]
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512bf16") && Avx512::detect().is_some()).then_some(Self(()))
    }

    /// The token, without a look at the machine.
    ///
    /// # Safety
    /// [`detect`](Self::detect) must have returned one before.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn assume() -> Self {
        Self(())
    }

    /// Whether its products run at twice the rate of f32: on AMD's cores; on Intel's at half of it.
    pub fn is_fast(self) -> bool {
        static FAST: OnceLock<bool> = OnceLock::new();
        *FAST.get_or_init(|| isa::amd_family().is_some())
    }
}

impl Avx512Bf16 {
    /// Rounds pairs of neighbours to bf16, a word of `to` each, the first in the lower half. Denormals become zero.
    pub fn narrow(self, from: &[f32], to: &mut [f32]) {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl")]
        fn narrow(from: &[f32], to: &mut [f32]) {
            for (from, to) in from.chunks(16).zip(to.chunks_mut(8)) {
                let (lanes, words) = (first(from.len()), first(to.len()) as __mmask8);
                // SAFETY: lanes beyond the chunks are neither read nor written; pairs of bf16 are as long as f32.
                unsafe {
                    let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, from.as_ptr()));
                    _mm256_mask_storeu_ps(to.as_mut_ptr(), words, std::mem::transmute::<__m256bh, __m256>(rounded));
                }
            }
        }
        assert_eq!(from.len(), 2 * to.len());
        // SAFETY: the token proves the features.
        unsafe { narrow(from, to) }
    }

    /// Rounds values of two rows to bf16, a word of `to` each pair, `low` in the lower half. Denormals become zero.
    pub fn interleave(self, low: &[f32], high: &[f32], to: &mut [f32]) {
        #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512vl")]
        fn interleave(low: &[f32], high: &[f32], to: &mut [f32]) {
            const PLACES: [u16; 32] = {
                let mut places = [0; 32];
                let mut i = 0;
                while i < 32 {
                    places[i] = (i / 2 + i % 2 * 16) as u16;
                    i += 1;
                }
                places
            };
            // SAFETY: the array is as long as a vector.
            let places = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
            for ((low, high), to) in low.chunks(16).zip(high.chunks(16)).zip(to.chunks_mut(16)) {
                let lanes = first(to.len());
                // SAFETY: lanes beyond the chunks, which have one length, are neither read nor written.
                unsafe {
                    let (low, high) = (_mm512_maskz_loadu_ps(lanes, low.as_ptr()), _mm512_maskz_loadu_ps(lanes, high.as_ptr()));
                    let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                    _mm512_mask_storeu_ps(to.as_mut_ptr(), lanes, _mm512_castsi512_ps(_mm512_permutexvar_epi16(places, rounded)));
                }
            }
        }
        assert!(low.len() == to.len() && high.len() == to.len());
        // SAFETY: the token proves the features.
        unsafe { interleave(low, high, to) }
    }
}

impl F32x16 {
    /// Adds two products to each lane: `a` and `b` hold a pair of bf16 in each. Denormals count as zero.
    #[inline(always)]
    pub fn add_bf16_products(self, _: Avx512Bf16, a: Self, b: Self) -> Self {
        // SAFETY: the token proves the feature; all bit patterns are valid in both types, which have one size.
        F32x16(unsafe {
            _mm512_dpbf16_ps(self.0, std::mem::transmute::<__m512, __m512bh>(a.0), std::mem::transmute::<__m512, __m512bh>(b.0))
        })
    }

    /// [`store_bf16`](F32s::store_bf16) of all lanes, but that denormals become zero.
    ///
    /// # Safety
    /// `dst` must be valid for writing 16 values.
    #[inline(always)]
    pub unsafe fn store_normal_bf16(self, _: Avx512Bf16, dst: *mut bf16) {
        // SAFETY: the token proves the feature, the caller the memory; all bit patterns are valid in both types, which have one size.
        unsafe { dst.cast::<Unaligned<__m256bh>>().write(Unaligned(_mm512_cvtneps_pbh(self.0))) }
    }
}

/// Evaluates an intrinsic whose feature the token or vector at hand proves.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: see the module's head: the token proves the feature, and no memory is touched.
        unsafe { $e }
    };
}

#[inline(always)]
fn first(count: usize) -> __mmask16 {
    debug_assert!(count <= 16);
    ((1u32 << count) - 1) as __mmask16
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const FOURS: bool = true;
    type F32 = F32x16;
    type I32 = I32x16;
    type Mask = Mask16;

    #[inline(always)]
    fn call<W: WithSimd>(self, work: W) -> W::Output {
        // SAFETY: the token exists, so the machine has these features.
        unsafe { isa::with_avx512(self, work) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F32x16 {
        F32x16(op!(_mm512_set1_ps(x)))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> I32x16 {
        I32x16(op!(_mm512_set1_epi32(x)))
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> F32x16 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x16(unsafe { src.cast::<Unaligned<_>>().read().0 })
    }
    #[inline(always)]
    unsafe fn load_partial(self, src: *const f32, count: usize) -> F32x16 {
        // SAFETY: the token proves the feature; masked lanes are not read.
        F32x16(unsafe { _mm512_maskz_loadu_ps(first(count), src) })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> F32x16 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x16(unsafe {
            let bits = src.cast::<Unaligned<__m256i>>().read().0;
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        })
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(self, src: *const bf16, count: usize) -> F32x16 {
        // SAFETY: the token proves the features; masked lanes are not read.
        F32x16(unsafe {
            let bits = _mm256_maskz_loadu_epi16(first(count), src.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> F32x16 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x16(unsafe { _mm512_cvtph_ps(src.cast::<Unaligned<__m256i>>().read().0) })
    }
    #[inline(always)]
    unsafe fn load_i8(self, src: *const i8) -> I32x16 {
        // SAFETY: the token proves the feature, the caller the memory.
        I32x16(unsafe { _mm512_cvtepi8_epi32(src.cast::<Unaligned<__m128i>>().read().0) })
    }
    #[inline(always)]
    unsafe fn load_u8(self, src: *const u8) -> I32x16 {
        // SAFETY: the token proves the feature, the caller the memory.
        I32x16(unsafe { _mm512_cvtepu8_epi32(src.cast::<Unaligned<__m128i>>().read().0) })
    }
    #[inline(always)]
    fn nibble_values(self, scale: F32x16, min: F32x16) -> [F32x16; 2] {
        // All sixteen values fit a vector, of which a permutation takes one for each lane.
        let all = op!(_mm512_setr_ps(0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.));
        [F32x16(all).mul_add(scale, min); 2]
    }
    #[inline(always)]
    fn nibbles(self, codes: I32x16, values: [F32x16; 2]) -> F32x16 {
        F32x16(op!(_mm512_permutexvar_ps(codes.0, values[0].0)))
    }
    #[inline(always)]
    fn prefetch(self, address: *const f32) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's contract.
        unsafe { self.transpose_some(src, src_stride, 16, dst, dst_stride) }
    }
    #[inline(always)]
    unsafe fn transpose_some(self, src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
        // 4×4 transpositions inside the 128-bit lanes (rows 4q..4q+4 give quad q), then a 4×4 transposition of lanes.
        // SAFETY: the token proves the features, the caller the memory: rows that are not there are others, and are not written.
        unsafe {
            let row = |i: usize| src.add(i.min(rows - 1) * src_stride).cast::<Unaligned<__m512>>().read().0;
            let put = |at: usize, x: __m512| match rows {
                16 => dst.add(at).cast::<Unaligned<_>>().write(Unaligned(x)),
                _ => _mm512_mask_storeu_ps(dst.add(at), first(rows), x),
            };
            // Lane k of column j of quad q is column 4k + j of rows 4q..4q+4. A loop: a closure might be compiled without the features.
            let mut quads = [[_mm512_setzero_ps(); 4]; 4];
            for (q, quad) in quads.iter_mut().enumerate() {
                let (a, b, c, d) = (row(4 * q), row(4 * q + 1), row(4 * q + 2), row(4 * q + 3));
                let (ab_low, ab_high) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                *quad = [
                    _mm512_shuffle_ps::<0x44>(ab_low, cd_low),
                    _mm512_shuffle_ps::<0xEE>(ab_low, cd_low),
                    _mm512_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm512_shuffle_ps::<0xEE>(ab_high, cd_high),
                ];
            }
            let [q0, q1, q2, q3] = quads;
            for (j, (((a, b), c), d)) in q0.into_iter().zip(q1).zip(q2).zip(q3).enumerate() {
                let (even_ab, even_cd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d));
                let (odd_ab, odd_cd) = (_mm512_shuffle_f32x4::<0xDD>(a, b), _mm512_shuffle_f32x4::<0xDD>(c, d));
                put(j * dst_stride, _mm512_shuffle_f32x4::<0x88>(even_ab, even_cd));
                put((4 + j) * dst_stride, _mm512_shuffle_f32x4::<0x88>(odd_ab, odd_cd));
                put((8 + j) * dst_stride, _mm512_shuffle_f32x4::<0xDD>(even_ab, even_cd));
                put((12 + j) * dst_stride, _mm512_shuffle_f32x4::<0xDD>(odd_ab, odd_cd));
            }
        }
    }
}

macro_rules! operators {
    ($t:ident: $($trait:ident $f:ident $i:ident),*) => { $(
        impl $trait for $t {
            type Output = $t;
            #[inline(always)] fn $f(self, other: $t) -> $t { $t(op!($i(self.0, other.0))) }
        }
    )* };
}
operators!(F32x16: Add add _mm512_add_ps, Sub sub _mm512_sub_ps, Mul mul _mm512_mul_ps, Div div _mm512_div_ps);
operators!(I32x16: Add add _mm512_add_epi32, Sub sub _mm512_sub_epi32, BitAnd bitand _mm512_and_si512, BitOr bitor _mm512_or_si512, BitXor bitxor _mm512_xor_si512);

impl Neg for F32x16 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        F32x16(op!(_mm512_xor_ps(self.0, _mm512_set1_ps(-0.0))))
    }
}
impl BitAnd for Mask16 {
    type Output = Self;
    #[inline(always)]
    fn bitand(self, other: Self) -> Self {
        Mask16(self.0 & other.0)
    }
}
impl BitOr for Mask16 {
    type Output = Self;
    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Mask16(self.0 | other.0)
    }
}
impl Not for Mask16 {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Mask16(!self.0)
    }
}

impl F32s for F32x16 {
    type I32 = I32x16;
    type Mask = Mask16;

    #[inline(always)]
    fn splat_like(self, x: f32) -> Self {
        F32x16(op!(_mm512_set1_ps(x)))
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the vector proves the feature, the caller the memory.
        unsafe { dst.cast::<Unaligned<_>>().write(Unaligned(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, count: usize) {
        // SAFETY: the vector proves the feature; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(dst, first(count), self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        F32x16(op!(_mm512_fmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        F32x16(op!(_mm512_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        F32x16(op!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        F32x16(op!(_mm512_abs_ps(self.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x16(op!(_mm512_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        F32x16(op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        F32x16(op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(self.0)))
    }
    #[inline(always)]
    fn ceil(self) -> Self {
        F32x16(op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(self.0)))
    }
    #[inline(always)]
    fn lt(self, other: Self) -> Mask16 {
        Mask16(op!(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask16 {
        Mask16(op!(_mm512_cmp_ps_mask::<_CMP_LE_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask16 {
        Mask16(op!(_mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask16, other: Self) -> Self {
        F32x16(op!(_mm512_mask_blend_ps(mask.0, other.0, self.0)))
    }
    #[inline(always)]
    fn to_bits(self) -> I32x16 {
        I32x16(op!(_mm512_castps_si512(self.0)))
    }
    #[inline(always)]
    fn to_i32(self) -> I32x16 {
        I32x16(op!(_mm512_cvtps_epi32(self.0)))
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        F32x16(op!(_mm512_scalef_ps(self.0, n.0)))
    }
    #[inline(always)]
    fn scale_normal(self, n: Self) -> Self {
        self.scale(n)
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        op!(_mm512_reduce_add_ps(self.0))
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        op!(_mm512_reduce_max_ps(self.0))
    }
    #[inline(always)]
    fn reduce_min(self) -> f32 {
        op!(_mm512_reduce_min_ps(self.0))
    }
}

impl I32s for I32x16 {
    type F32 = F32x16;
    type Mask = Mask16;

    #[inline(always)]
    unsafe fn store_words(self, dst: *mut u16, count: usize) {
        // SAFETY: the token proves the features; `count` values may be written.
        unsafe {
            if count == 16 {
                dst.cast::<Unaligned<_>>().write(Unaligned(_mm512_cvtepi32_epi16(self.0)));
            } else {
                // Narrowed by the store: of a narrowed vector and a mask of one lane that it knows, LLVM 22 stores the one lane unnarrowed.
                _mm512_mask_cvtepi32_storeu_epi16(dst.cast(), first(count), self.0);
            }
        }
    }
    #[inline(always)]
    fn splat_like(self, x: i32) -> Self {
        I32x16(op!(_mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        I32x16(op!(_mm512_slli_epi32::<N>(self.0)))
    }
    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        I32x16(op!(_mm512_srai_epi32::<N>(self.0)))
    }
    #[inline(always)]
    fn shr_logical<const N: u32>(self) -> Self {
        I32x16(op!(_mm512_srli_epi32::<N>(self.0)))
    }
    #[inline(always)]
    fn widening_mul(self, by: u32) -> (Self, Self) {
        op!({
            let by = _mm512_set1_epi32(by as i32);
            let even = _mm512_mul_epu32(self.0, by);
            let odd = _mm512_mul_epu32(_mm512_srli_epi64::<32>(self.0), by);
            let high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64::<32>(even), odd);
            let low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64::<32>(odd));
            (I32x16(high), I32x16(low))
        })
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask16 {
        Mask16(op!(_mm512_cmpeq_epi32_mask(self.0, other.0)))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> Mask16 {
        Mask16(op!(_mm512_cmpgt_epi32_mask(self.0, other.0)))
    }
    #[inline(always)]
    fn from_bits(self) -> F32x16 {
        F32x16(op!(_mm512_castsi512_ps(self.0)))
    }
    #[inline(always)]
    fn to_f32(self) -> F32x16 {
        F32x16(op!(_mm512_cvtepi32_ps(self.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask16, other: Self) -> Self {
        I32x16(op!(_mm512_mask_blend_epi32(mask.0, other.0, self.0)))
    }
}

impl Masks for Mask16 {
    const LANES: usize = 16;

    #[inline(always)]
    fn any(self) -> bool {
        self.0 != 0
    }
    #[inline(always)]
    fn to_bits(self) -> u64 {
        self.0 as u64
    }
}
