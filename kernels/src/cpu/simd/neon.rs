//! NEON: four lanes.
//!
//! NEON is part of every aarch64 target that Rust's standard library supports, so the token can always be made and no intrinsic
//! here needs more than the target itself; the `unsafe` of older compilers for calling them is kept.
#![allow(unused_unsafe)]

use super::{F32s, I32s, Masks, Simd};
use crate::cpu::isa::{self, WithSimd};
use std::arch::aarch64::*;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};

/// Token of the NEON level.
#[derive(Clone, Copy, Debug)]
pub struct Neon(());

/// Four f32.
#[derive(Clone, Copy, Debug)]
pub struct F32x4(float32x4_t);
/// Four i32.
#[derive(Clone, Copy, Debug)]
pub struct I32x4(int32x4_t);
/// Four truth values: all bits of a lane, or none.
#[derive(Clone, Copy, Debug)]
pub struct Mask4(uint32x4_t);

impl Neon {
    /// The token; aarch64 always has NEON.
    #[inline(always)]
    #[allow(clippy::new_without_default)] // A token is asked for by name.
    pub fn new() -> Self {
        Neon(())
    }
}

/// Evaluates an intrinsic of the target's base features.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: NEON belongs to the target, and no memory is touched.
        unsafe { $e }
    };
}

impl Simd for Neon {
    const LANES: usize = 4;
    const FOURS: bool = true;
    type F32 = F32x4;
    type I32 = I32x4;
    type Mask = Mask4;

    #[inline(always)]
    fn call<W: WithSimd>(self, work: W) -> W::Output {
        isa::with_baseline(self, work)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F32x4 {
        F32x4(op!(vdupq_n_f32(x)))
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> I32x4 {
        I32x4(op!(vdupq_n_s32(x)))
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> F32x4 {
        // SAFETY: the caller guarantees four readable values.
        F32x4(unsafe { vld1q_f32(src) })
    }
    #[inline(always)]
    unsafe fn load_partial(self, src: *const f32, count: usize) -> F32x4 {
        let mut lanes = [0f32; 4];
        // SAFETY: the caller guarantees `count` readable values, at most four; the array is readable as a whole.
        F32x4(unsafe {
            std::ptr::copy_nonoverlapping(src, lanes.as_mut_ptr(), count.min(4));
            vld1q_f32(lanes.as_ptr())
        })
    }
    #[inline(always)]
    unsafe fn load_i8(self, src: *const i8) -> I32x4 {
        // SAFETY: the caller guarantees four readable bytes; an unaligned read takes any address.
        I32x4(unsafe {
            let bytes = vcreate_s8(u64::from(src.cast::<u32>().read_unaligned()));
            vmovl_s16(vget_low_s16(vmovl_s8(bytes)))
        })
    }
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        // Pairs of rows interleaved by element, then by half.
        // SAFETY: the caller guarantees the memory of four rows and four columns.
        unsafe {
            let row = |i: usize| vld1q_f32(src.add(i * src_stride));
            let (ac_low, ac_high) = (vzip1q_f32(row(0), row(2)), vzip2q_f32(row(0), row(2)));
            let (bd_low, bd_high) = (vzip1q_f32(row(1), row(3)), vzip2q_f32(row(1), row(3)));
            vst1q_f32(dst, vzip1q_f32(ac_low, bd_low));
            vst1q_f32(dst.add(dst_stride), vzip2q_f32(ac_low, bd_low));
            vst1q_f32(dst.add(2 * dst_stride), vzip1q_f32(ac_high, bd_high));
            vst1q_f32(dst.add(3 * dst_stride), vzip2q_f32(ac_high, bd_high));
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
operators!(F32x4: Add add vaddq_f32, Sub sub vsubq_f32, Mul mul vmulq_f32, Div div vdivq_f32);
operators!(I32x4: Add add vaddq_s32, Sub sub vsubq_s32, BitAnd bitand vandq_s32, BitOr bitor vorrq_s32, BitXor bitxor veorq_s32);
operators!(Mask4: BitAnd bitand vandq_u32, BitOr bitor vorrq_u32);

impl Neg for F32x4 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        F32x4(op!(vnegq_f32(self.0)))
    }
}
impl Not for Mask4 {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Mask4(op!(vmvnq_u32(self.0)))
    }
}

impl F32s for F32x4 {
    type I32 = I32x4;
    type Mask = Mask4;

    #[inline(always)]
    fn splat_like(self, x: f32) -> Self {
        F32x4(op!(vdupq_n_f32(x)))
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller guarantees four writable values.
        unsafe { vst1q_f32(dst, self.0) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, count: usize) {
        let mut lanes = [0f32; 4];
        // SAFETY: the array is writable as a whole; the caller guarantees `count` writable values, at most four.
        unsafe {
            vst1q_f32(lanes.as_mut_ptr(), self.0);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), dst, count.min(4));
        }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        F32x4(op!(vfmaq_f32(c.0, self.0, b.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // Not `vminq`, which returns NaN where either is NaN.
        self.or_else(self.lt(other), other)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.or_else(other.lt(self), other)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        F32x4(op!(vabsq_f32(self.0)))
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x4(op!(vsqrtq_f32(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self {
        F32x4(op!(vrndnq_f32(self.0)))
    }
    #[inline(always)]
    fn floor(self) -> Self {
        F32x4(op!(vrndmq_f32(self.0)))
    }
    #[inline(always)]
    fn ceil(self) -> Self {
        F32x4(op!(vrndpq_f32(self.0)))
    }
    #[inline(always)]
    fn lt(self, other: Self) -> Mask4 {
        Mask4(op!(vcltq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask4 {
        Mask4(op!(vcleq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask4 {
        Mask4(op!(vceqq_f32(self.0, other.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask4, other: Self) -> Self {
        F32x4(op!(vbslq_f32(mask.0, self.0, other.0)))
    }
    #[inline(always)]
    fn to_bits(self) -> I32x4 {
        I32x4(op!(vreinterpretq_s32_f32(self.0)))
    }
    #[inline(always)]
    fn to_i32(self) -> I32x4 {
        I32x4(op!(vcvtnq_s32_f32(self.0)))
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        op!(vaddvq_f32(self.0))
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        op!(vmaxnmvq_f32(self.0))
    }
    #[inline(always)]
    fn reduce_min(self) -> f32 {
        op!(vminnmvq_f32(self.0))
    }
}

impl I32s for I32x4 {
    type F32 = F32x4;
    type Mask = Mask4;

    #[inline(always)]
    fn splat_like(self, x: i32) -> Self {
        I32x4(op!(vdupq_n_s32(x)))
    }
    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        I32x4(op!(vshlq_s32(self.0, vdupq_n_s32(N as i32))))
    }
    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        // A shift to the left by a negative count is one to the right.
        I32x4(op!(vshlq_s32(self.0, vdupq_n_s32(-(N as i32)))))
    }
    #[inline(always)]
    fn shr_logical<const N: u32>(self) -> Self {
        I32x4(op!(vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(self.0), vdupq_n_s32(-(N as i32))))))
    }
    #[inline(always)]
    fn widening_mul(self, by: u32) -> (Self, Self) {
        op!({
            let (x, by) = (vreinterpretq_u32_s32(self.0), vdupq_n_u32(by));
            let first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(by)));
            let second = vreinterpretq_u32_u64(vmull_high_u32(x, by));
            (I32x4(vreinterpretq_s32_u32(vuzp2q_u32(first, second))), I32x4(vreinterpretq_s32_u32(vuzp1q_u32(first, second))))
        })
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask4 {
        Mask4(op!(vceqq_s32(self.0, other.0)))
    }
    #[inline(always)]
    fn gt(self, other: Self) -> Mask4 {
        Mask4(op!(vcgtq_s32(self.0, other.0)))
    }
    #[inline(always)]
    fn from_bits(self) -> F32x4 {
        F32x4(op!(vreinterpretq_f32_s32(self.0)))
    }
    #[inline(always)]
    fn to_f32(self) -> F32x4 {
        F32x4(op!(vcvtq_f32_s32(self.0)))
    }
    #[inline(always)]
    fn or_else(self, mask: Mask4, other: Self) -> Self {
        I32x4(op!(vbslq_s32(mask.0, self.0, other.0)))
    }
}

impl Masks for Mask4 {
    const LANES: usize = 4;

    #[inline(always)]
    fn any(self) -> bool {
        op!(vmaxvq_u32(self.0)) != 0
    }
    #[inline(always)]
    fn to_bits(self) -> u64 {
        // One bit a lane, then their sum.
        const LANE_BITS: [u32; 4] = [1, 2, 4, 8];
        // SAFETY: NEON belongs to the target, and the array holds four values.
        unsafe { u64::from(vaddvq_u32(vandq_u32(self.0, vld1q_u32(LANE_BITS.as_ptr())))) }
    }
}
