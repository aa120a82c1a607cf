//! The portable level: vectors of one lane.

use super::{F32s, I32s, Masks, Simd, Unaligned};
use crate::cpu::isa::{self, WithSimd};
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};

/// Token of the portable level; always there.
#[derive(Clone, Copy, Debug)]
pub struct Scalar;

/// One f32.
#[derive(Clone, Copy, Debug)]
pub struct F32x1(f32);
/// One i32.
#[derive(Clone, Copy, Debug)]
pub struct I32x1(i32);
/// One truth value.
#[derive(Clone, Copy, Debug)]
pub struct Mask1(bool);

impl Simd for Scalar {
    const LANES: usize = 1;
    type F32 = F32x1;
    type I32 = I32x1;
    type Mask = Mask1;

    #[inline(always)]
    fn call<W: WithSimd>(self, work: W) -> W::Output {
        isa::with_baseline(self, work)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> F32x1 {
        F32x1(x)
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> I32x1 {
        I32x1(x)
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> F32x1 {
        // SAFETY: the caller guarantees that `src` is readable.
        F32x1(unsafe { src.cast::<Unaligned<_>>().read().0 })
    }
    #[inline(always)]
    unsafe fn load_partial(self, src: *const f32, count: usize) -> F32x1 {
        // SAFETY: read only if the caller vouches for one value.
        F32x1(if count == 0 { 0.0 } else { unsafe { src.cast::<Unaligned<_>>().read().0 } })
    }
}

macro_rules! operators {
    ($t:ident: $($trait:ident $f:ident $e:expr),*) => { $(
        impl $trait for $t {
            type Output = $t;
            #[inline(always)] fn $f(self, other: $t) -> $t { let f: fn(_, _) -> _ = $e; $t(f(self.0, other.0)) }
        }
    )* };
}
operators!(F32x1: Add add |a, b| a + b, Sub sub |a, b| a - b, Mul mul |a, b| a * b, Div div |a, b| a / b);
operators!(I32x1: Add add i32::wrapping_add, Sub sub i32::wrapping_sub, BitAnd bitand |a, b| a & b, BitOr bitor |a, b| a | b, BitXor bitxor |a, b| a ^ b);
operators!(Mask1: BitAnd bitand |a, b| a & b, BitOr bitor |a, b| a | b);

impl Neg for F32x1 {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        F32x1(-self.0)
    }
}

impl Not for Mask1 {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Mask1(!self.0)
    }
}

impl F32s for F32x1 {
    type I32 = I32x1;
    type Mask = Mask1;

    #[inline(always)]
    fn splat_like(self, x: f32) -> Self {
        F32x1(x)
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller guarantees that `dst` is writable.
        unsafe { dst.cast::<Unaligned<_>>().write(Unaligned(self.0)) }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, count: usize) {
        if count > 0 {
            // SAFETY: the caller guarantees that one value is writable.
            unsafe { dst.cast::<Unaligned<_>>().write(Unaligned(self.0)) }
        }
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        // The product of two f32 is exact in f64, so only the sum rounds (twice): without an FMA instruction
        // `f32::mul_add` would be a slow library call.
        F32x1((self.0 as f64 * b.0 as f64 + c.0 as f64) as f32)
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if self.0 < other.0 { self } else { other }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self.0 > other.0 { self } else { other }
    }
    #[inline(always)]
    fn abs(self) -> Self {
        F32x1(self.0.abs())
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        F32x1(self.0.sqrt())
    }
    #[inline(always)]
    fn round(self) -> Self {
        F32x1(self.0.round_ties_even())
    }
    #[inline(always)]
    fn floor(self) -> Self {
        F32x1(self.0.floor())
    }
    #[inline(always)]
    fn ceil(self) -> Self {
        F32x1(self.0.ceil())
    }
    #[inline(always)]
    fn lt(self, other: Self) -> Mask1 {
        Mask1(self.0 < other.0)
    }
    #[inline(always)]
    fn le(self, other: Self) -> Mask1 {
        Mask1(self.0 <= other.0)
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask1 {
        Mask1(self.0 == other.0)
    }
    #[inline(always)]
    fn or_else(self, mask: Mask1, other: Self) -> Self {
        if mask.0 { self } else { other }
    }
    #[inline(always)]
    fn to_bits(self) -> I32x1 {
        I32x1(self.0.to_bits() as i32)
    }
    #[inline(always)]
    fn to_i32(self) -> I32x1 {
        I32x1(self.0.round_ties_even() as i32)
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        self.0
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        self.0
    }
    #[inline(always)]
    fn reduce_min(self) -> f32 {
        self.0
    }
}

impl I32s for I32x1 {
    type F32 = F32x1;
    type Mask = Mask1;

    #[inline(always)]
    fn splat_like(self, x: i32) -> Self {
        I32x1(x)
    }
    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        I32x1(self.0 << N)
    }
    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        I32x1(self.0 >> N)
    }
    #[inline(always)]
    fn shr_logical<const N: u32>(self) -> Self {
        I32x1((self.0 as u32 >> N) as i32)
    }
    #[inline(always)]
    fn widening_mul(self, by: u32) -> (Self, Self) {
        let product = self.0 as u32 as u64 * by as u64;
        (I32x1((product >> 32) as i32), I32x1(product as i32))
    }
    #[inline(always)]
    fn eq(self, other: Self) -> Mask1 {
        Mask1(self.0 == other.0)
    }
    #[inline(always)]
    fn gt(self, other: Self) -> Mask1 {
        Mask1(self.0 > other.0)
    }
    #[inline(always)]
    fn from_bits(self) -> F32x1 {
        F32x1(f32::from_bits(self.0 as u32))
    }
    #[inline(always)]
    fn to_f32(self) -> F32x1 {
        F32x1(self.0 as f32)
    }
    #[inline(always)]
    fn or_else(self, mask: Mask1, other: Self) -> Self {
        if mask.0 { self } else { other }
    }
}

impl Masks for Mask1 {
    const LANES: usize = 1;

    #[inline(always)]
    fn any(self) -> bool {
        self.0
    }
    #[inline(always)]
    fn to_bits(self) -> u64 {
        self.0 as u64
    }
}
