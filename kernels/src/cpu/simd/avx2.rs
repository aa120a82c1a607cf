//! AVX2 with FMA: eight lanes.
//!
//! Every `unsafe` here calls an intrinsic of one of the features that [`Avx2::detect`] checked; a vector exists only
//! if a token did, so the instruction exists.

use super::{F32s, I32s, Masks, Simd, Unaligned};
use crate::cpu::isa::{self, WithSimd};
use half::{bf16, f16};
use std::arch::x86_64::*;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};

/// Token: the machine has AVX2, FMA, F16C, BMI and LZCNT.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

/// Eight f32.
#[derive(Clone, Copy, Debug)]
pub struct F32x8(__m256);
/// Eight i32.
#[derive(Clone, Copy, Debug)]
pub struct I32x8(__m256i);
/// Eight truth values: all bits of a lane, or none.
#[derive(Clone, Copy, Debug)]
pub struct Mask8(__m256);

impl Avx2 {
    /// The token, if the machine and the operating system support the level.
    #[inline]
    pub fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("bmi1")
            && is_x86_feature_detected!("bmi2")
            && is_x86_feature_detected!("lzcnt")
            && is_x86_feature_detected!("popcnt"))
        .then_some(Avx2(()))
    }

    /// The token, without a look at the machine.
    ///
    /// # Safety
    /// [`detect`](Self::detect) must have returned one before.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn assume() -> Self {
        Avx2(())
    }
}

/// Evaluates an intrinsic whose feature the token or vector at hand proves.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: see the module's head: the token proves the feature, and no memory is touched.
        unsafe { $e }
    };
}

/// A mask of the first `count` lanes, read from a sliding window.
#[inline(always)]
fn first(count: usize) -> __m256i {
    static WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    debug_assert!(count <= 8);
    // SAFETY: `8 - count` is in 0..=8, so the eight values read lie inside the window.
    unsafe { WINDOW.as_ptr().add(8 - count.min(8)).cast::<Unaligned<_>>().read().0 }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type F32 = F32x8;
    type I32 = I32x8;
    type Mask = Mask8;

    #[inline(always)]
    fn call<W: WithSimd>(self, work: W) -> W::Output {
        // SAFETY: the token exists, so the machine has these features.
        unsafe { isa::with_avx2(self, work) }
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F32x8 {
        F32x8(op!(_mm256_set1_ps(x)))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> I32x8 {
        I32x8(op!(_mm256_set1_epi32(x)))
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> F32x8 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x8(unsafe { src.cast::<Unaligned<_>>().read().0 })
    }
    #[inline(always)]
    unsafe fn load_partial(self, src: *const f32, count: usize) -> F32x8 {
        // SAFETY: the token proves the feature; masked lanes are not read.
        F32x8(unsafe { _mm256_maskload_ps(src, first(count)) })
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> F32x8 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x8(unsafe {
            let bits = src.cast::<Unaligned<__m128i>>().read().0;
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
        })
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> F32x8 {
        // SAFETY: the token proves the feature, the caller the memory.
        F32x8(unsafe { _mm256_cvtph_ps(src.cast::<Unaligned<__m128i>>().read().0) })
    }
    #[inline(always)]
    unsafe fn load_i8(self, src: *const i8) -> I32x8 {
        // SAFETY: the token proves the feature, the caller the memory.
        I32x8(unsafe { _mm256_cvtepi8_epi32(_mm_loadl_epi64(src.cast())) })
    }
    #[inline(always)]
    unsafe fn load_u8(self, src: *const u8) -> I32x8 {
        // SAFETY: the token proves the feature, the caller the memory.
        I32x8(unsafe { _mm256_cvtepu8_epi32(_mm_loadl_epi64(src.cast())) })
    }
    #[inline(always)]
    fn prefetch(self, address: *const f32) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // Row `i` beside row `i + 4`, half a row each: two rounds of interleaving then stay inside 128-bit lanes.
        // SAFETY: the token proves the features, the caller the memory.
        unsafe {
            for half in 0..2 {
                let mut rows = [_mm256_setzero_ps(); 4];
                for (i, row) in rows.iter_mut().enumerate() {
                    let quad = src.add(i * src_stride + 4 * half).cast::<Unaligned<__m128>>();
                    let below = src.add((i + 4) * src_stride + 4 * half).cast::<Unaligned<__m128>>();
                    *row = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(quad.read().0), below.read().0);
                }
                let [a, b, c, d] = rows;
                let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                let columns = [
                    _mm256_shuffle_ps::<0x44>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0xEE>(ab_low, cd_low),
                    _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                    _mm256_shuffle_ps::<0xEE>(ab_high, cd_high),
                ];
                for (j, column) in columns.into_iter().enumerate() {
                    dst.add((4 * half + j) * dst_stride).cast::<Unaligned<_>>().write(Unaligned(column));
                }
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
operators!(F32x8: Add add _mm256_add_ps, Sub sub _mm256_sub_ps, Mul mul _mm256_mul_ps, Div div _mm256_div_ps);
operators!(I32x8: Add add _mm256_add_epi32, Sub sub _mm256_sub_epi32, BitAnd bitand _mm256_and_si256, BitOr bitor _mm256_or_si256, BitXor bitxor _mm256_xor_si256);
operators!(Mask8: BitAnd bitand _mm256_and_ps, BitOr bitor _mm256_or_ps);

impl Neg for F32x8 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        F32x8(op!(_mm256_xor_ps(self.0, _mm256_set1_ps(-0.0))))
    }
}
impl Not for Mask8 {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Mask8(op!(_mm256_xor_ps(self.0, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))))
    }
}

/// Folds the eight lanes with a 128-bit instruction: halves, then pairs, then neighbours.
macro_rules! fold {
    ($x:expr, $i:ident) => {
        op!({
            let x = $i(_mm256_castps256_ps128($x), _mm256_extractf128_ps::<1>($x));
            let x = $i(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32($i(x, _mm_movehdup_ps(x)))
        })
    };
}

impl F32s for F32x8 {
    type I32 = I32x8;
    type Mask = Mask8;

    #[inline(always)]
    fn splat_like(self, x: f32) -> Self {
        F32x8(op!(_mm256_set1_ps(x)))
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the vector proves the feature, the caller the memory.
        unsafe { dst.cast::<Unaligned<_>>().write(Unaligned(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, count: usize) {
        // SAFETY: the vector proves the feature; masked lanes are not written.
        unsafe { _mm256_maskstore_ps(dst, first(count), self.0) }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        F32x8(op!(_mm256_fmadd_ps(self.0, b.0, c.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        F32x8(op!(_mm256_min_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        F32x8(op!(_mm256_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        F32x8(op!(_mm256_andnot_ps(_mm256_set1_ps(-0.0), self.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x8(op!(_mm256_sqrt_ps(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        F32x8(op!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        F32x8(op!(_mm256_floor_ps(self.0)))
    }
    #[inline(always)]
    fn ceil(self) -> Self {
        F32x8(op!(_mm256_ceil_ps(self.0)))
    }
    #[inline(always)]
    fn lt(self, other: Self) -> Mask8 {
        Mask8(op!(_mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask8 {
        Mask8(op!(_mm256_cmp_ps::<_CMP_LE_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask8 {
        Mask8(op!(_mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask8, other: Self) -> Self {
        F32x8(op!(_mm256_blendv_ps(other.0, self.0, mask.0)))
    }
    #[inline(always)]
    fn to_bits(self) -> I32x8 {
        I32x8(op!(_mm256_castps_si256(self.0)))
    }
    #[inline(always)]
    fn to_i32(self) -> I32x8 {
        I32x8(op!(_mm256_cvtps_epi32(self.0)))
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        fold!(self.0, _mm_add_ps)
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        fold!(self.0, _mm_max_ps)
    }
    #[inline(always)]
    fn reduce_min(self) -> f32 {
        fold!(self.0, _mm_min_ps)
    }
}

impl I32s for I32x8 {
    type F32 = F32x8;
    type Mask = Mask8;

    #[inline(always)]
    unsafe fn store_words(self, dst: *mut u16, count: usize) {
        // SAFETY: the vector proves the feature; `count` values may be written.
        unsafe {
            // Packing works in halves of 128 bits.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(self.0, self.0));
            let packed = _mm256_castsi256_si128(packed);
            if count == 8 {
                dst.cast::<Unaligned<_>>().write(Unaligned(packed));
            } else {
                let mut lanes = [0u16; 8];
                lanes.as_mut_ptr().cast::<Unaligned<_>>().write(Unaligned(packed));
                std::ptr::copy_nonoverlapping(lanes.as_ptr(), dst, count);
            }
        }
    }
    #[inline(always)]
    fn splat_like(self, x: i32) -> Self {
        I32x8(op!(_mm256_set1_epi32(x)))
    }
    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        I32x8(op!(_mm256_sll_epi32(self.0, _mm_cvtsi32_si128(N as i32))))
    }
    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        I32x8(op!(_mm256_sra_epi32(self.0, _mm_cvtsi32_si128(N as i32))))
    }
    #[inline(always)]
    fn shr_logical<const N: u32>(self) -> Self {
        I32x8(op!(_mm256_srl_epi32(self.0, _mm_cvtsi32_si128(N as i32))))
    }
    #[inline(always)]
    fn widening_mul(self, by: u32) -> (Self, Self) {
        op!({
            let by = _mm256_set1_epi32(by as i32);
            let even = _mm256_mul_epu32(self.0, by);
            let odd = _mm256_mul_epu32(_mm256_srli_epi64::<32>(self.0), by);
            let high = _mm256_blend_epi32::<0xAA>(_mm256_srli_epi64::<32>(even), odd);
            let low = _mm256_blend_epi32::<0xAA>(even, _mm256_slli_epi64::<32>(odd));
            (I32x8(high), I32x8(low))
        })
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask8 {
        Mask8(op!(_mm256_castsi256_ps(_mm256_cmpeq_epi32(self.0, other.0))))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> Mask8 {
        Mask8(op!(_mm256_castsi256_ps(_mm256_cmpgt_epi32(self.0, other.0))))
    }
    #[inline(always)]
    fn from_bits(self) -> F32x8 {
        F32x8(op!(_mm256_castsi256_ps(self.0)))
    }
    #[inline(always)]
    fn to_f32(self) -> F32x8 {
        F32x8(op!(_mm256_cvtepi32_ps(self.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask8, other: Self) -> Self {
        I32x8(op!(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(other.0), _mm256_castsi256_ps(self.0), mask.0))))
    }
}

impl Masks for Mask8 {
    const LANES: usize = 8;

    #[inline(always)]
    fn any(self) -> bool {
        self.to_bits() != 0
    }
    #[inline(always)]
    fn to_bits(self) -> u64 {
        op!(_mm256_movemask_ps(self.0)) as u64
    }
}
