//! Two vectors as one: every operation is done on both, one after the other, so that what an elementary function computes of them is interleaved.
//! A long chain of dependent instructions fills the processor's queues with what cannot start yet; two such chains, or four, keep it busy.

use super::{F32s, I32s, Masks, Simd};
use crate::cpu::isa::WithSimd;
use half::{bf16, f16};
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};

/// An instruction set of vectors twice as wide as those of `S`.
#[derive(Clone, Copy)]
pub struct Twice<S>(pub S);

/// Four vectors as one.
#[inline(always)]
pub fn four<S: Simd>(s: S) -> Twice<Twice<S>> {
    Twice(Twice(s))
}

/// The lower lanes and the upper ones.
#[derive(Clone, Copy)]
pub struct Two<V>(V, V);

impl<S: Simd> Simd for Twice<S> {
    const LANES: usize = 2 * S::LANES;
    type F32 = Two<S::F32>;
    type I32 = Two<S::I32>;
    type Mask = Two<S::Mask>;

    #[inline(always)]
    fn call<W: WithSimd>(self, work: W) -> W::Output {
        work.with_simd(self)
    }
    #[inline(always)]
    fn splat(self, x: f32) -> Self::F32 {
        let x = self.0.splat(x);
        Two(x, x)
    }
    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I32 {
        let x = self.0.splat_i32(x);
        Two(x, x)
    }
    #[inline(always)]
    unsafe fn load(self, src: *const f32) -> Self::F32 {
        // SAFETY: the caller's contract, for each half.
        unsafe { Two(self.0.load(src), self.0.load(src.add(S::LANES))) }
    }
    #[inline(always)]
    unsafe fn load_partial(self, src: *const f32, count: usize) -> Self::F32 {
        let (lower, upper) = halves(S::LANES, count);
        // SAFETY: the caller's contract; where there is no upper half, no value of it is read.
        unsafe { Two(self.0.load_partial(src, lower), self.0.load_partial(src.wrapping_add(S::LANES), upper)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> Self::F32 {
        // SAFETY: the caller's contract, for each half.
        unsafe { Two(self.0.load_bf16(src), self.0.load_bf16(src.add(S::LANES))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_partial(self, src: *const bf16, count: usize) -> Self::F32 {
        let (lower, upper) = halves(S::LANES, count);
        // SAFETY: the caller's contract; where there is no upper half, no value of it is read.
        unsafe { Two(self.0.load_bf16_partial(src, lower), self.0.load_bf16_partial(src.wrapping_add(S::LANES), upper)) }
    }
    #[inline(always)]
    unsafe fn load_bf16_in_any_order(self, src: *const bf16) -> Self::F32 {
        // SAFETY: the caller's contract.
        let [first, second] = unsafe { self.0.load_bf16_pairs(src) };
        Two(first, second)
    }
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> Self::F32 {
        // SAFETY: the caller's contract, for each half.
        unsafe { Two(self.0.load_f16(src), self.0.load_f16(src.add(S::LANES))) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, src: *const i8) -> Self::I32 {
        // SAFETY: the caller's contract, for each half.
        unsafe { Two(self.0.load_i8(src), self.0.load_i8(src.add(S::LANES))) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, src: *const u8) -> Self::I32 {
        // SAFETY: the caller's contract, for each half.
        unsafe { Two(self.0.load_u8(src), self.0.load_u8(src.add(S::LANES))) }
    }
    #[inline(always)]
    unsafe fn transpose_some(self, src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
        for (i, k) in (0..rows).flat_map(|i| (0..Self::LANES).map(move |k| (i, k))) {
            // SAFETY: the caller's contract.
            unsafe { *dst.add(k * dst_stride + i) = src.add(i * src_stride + k).read_unaligned() };
        }
    }
}

/// How many of `count` lanes are lower and upper ones, of which there are `lanes` each.
#[inline(always)]
fn halves(lanes: usize, count: usize) -> (usize, usize) {
    let lower = count.min(lanes);
    (lower, count - lower)
}

macro_rules! operators {
    ($($trait:ident::$op:ident),*) => { $(
        impl<V: $trait<Output = V>> $trait for Two<V> {
            type Output = Self;
            #[inline(always)]
            fn $op(self, other: Self) -> Self {
                Two(self.0.$op(other.0), self.1.$op(other.1))
            }
        }
    )* };
}
operators!(Add::add, Sub::sub, Mul::mul, Div::div, BitAnd::bitand, BitOr::bitor, BitXor::bitxor);

impl<V: Neg<Output = V>> Neg for Two<V> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Two(-self.0, -self.1)
    }
}

impl<V: Not<Output = V>> Not for Two<V> {
    type Output = Self;
    #[inline(always)]
    fn not(self) -> Self {
        Two(!self.0, !self.1)
    }
}

macro_rules! each {
    ($($name:ident($($arg:ident),*) -> $result:ty;)*) => { $(
        #[inline(always)]
        fn $name(self $(, $arg: Self)*) -> $result {
            Two(self.0.$name($($arg.0),*), self.1.$name($($arg.1),*))
        }
    )* };
}

impl<V: F32s<I32: I32s<F32 = V, Mask = V::Mask>>> F32s for Two<V> {
    type I32 = Two<V::I32>;
    type Mask = Two<V::Mask>;

    each! {
        mul_add(b, c) -> Self;
        min(other) -> Self;
        max(other) -> Self;
        abs() -> Self;
        sqrt() -> Self;
        round() -> Self;
        floor() -> Self;
        ceil() -> Self;
        lt(other) -> Self::Mask;
        le(other) -> Self::Mask;
        eq(other) -> Self::Mask;
        to_bits() -> Self::I32;
        to_i32() -> Self::I32;
        scale(n) -> Self;
        scale_normal(n) -> Self;
    }
    #[inline(always)]
    fn splat_like(self, x: f32) -> Self {
        let x = self.0.splat_like(x);
        Two(x, x)
    }
    #[inline(always)]
    unsafe fn store(self, dst: *mut f32) {
        // SAFETY: the caller's contract, for each half.
        unsafe {
            self.0.store(dst);
            self.1.store(dst.add(V::Mask::LANES));
        }
    }
    #[inline(always)]
    unsafe fn store_partial(self, dst: *mut f32, count: usize) {
        let (lower, upper) = halves(V::Mask::LANES, count);
        // SAFETY: the caller's contract; where there is no upper half, nothing of it is written.
        unsafe {
            self.0.store_partial(dst, lower);
            self.1.store_partial(dst.wrapping_add(V::Mask::LANES), upper);
        }
    }
    #[inline(always)]
    unsafe fn store_computed_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller's contract.
        unsafe { V::store_computed_bf16_pairs([self.0, self.1], dst) }
    }
    #[inline(always)]
    fn or_else(self, mask: Self::Mask, other: Self) -> Self {
        Two(self.0.or_else(mask.0, other.0), self.1.or_else(mask.1, other.1))
    }
    #[inline(always)]
    fn reduce_sum(self) -> f32 {
        (self.0 + self.1).reduce_sum()
    }
    #[inline(always)]
    fn reduce_max(self) -> f32 {
        self.0.max(self.1).reduce_max()
    }
    #[inline(always)]
    fn reduce_min(self) -> f32 {
        self.0.min(self.1).reduce_min()
    }
}

impl<V: I32s<F32: F32s<I32 = V, Mask = V::Mask>>> I32s for Two<V> {
    type F32 = Two<V::F32>;
    type Mask = Two<V::Mask>;

    each! {
        eq(other) -> Self::Mask;
        gt(other) -> Self::Mask;
        to_f32() -> Self::F32;
        from_bits() -> Self::F32;
    }
    #[inline(always)]
    unsafe fn store_words(self, dst: *mut u16, count: usize) {
        let (lower, upper) = halves(V::Mask::LANES, count);
        // SAFETY: the caller's contract; where there is no upper half, nothing of it is written.
        unsafe {
            self.0.store_words(dst, lower);
            self.1.store_words(dst.wrapping_add(V::Mask::LANES), upper);
        }
    }
    #[inline(always)]
    fn splat_like(self, x: i32) -> Self {
        let x = self.0.splat_like(x);
        Two(x, x)
    }
    #[inline(always)]
    fn shl<const N: u32>(self) -> Self {
        Two(self.0.shl::<N>(), self.1.shl::<N>())
    }
    #[inline(always)]
    fn shr<const N: u32>(self) -> Self {
        Two(self.0.shr::<N>(), self.1.shr::<N>())
    }
    #[inline(always)]
    fn shr_logical<const N: u32>(self) -> Self {
        Two(self.0.shr_logical::<N>(), self.1.shr_logical::<N>())
    }
    #[inline(always)]
    fn widening_mul(self, by: u32) -> (Self, Self) {
        let (lower, upper) = (self.0.widening_mul(by), self.1.widening_mul(by));
        (Two(lower.0, upper.0), Two(lower.1, upper.1))
    }
    #[inline(always)]
    fn or_else(self, mask: Self::Mask, other: Self) -> Self {
        Two(self.0.or_else(mask.0, other.0), self.1.or_else(mask.1, other.1))
    }
}

impl<M: Masks> Masks for Two<M> {
    const LANES: usize = 2 * M::LANES;

    #[inline(always)]
    fn any(self) -> bool {
        (self.0 | self.1).any()
    }
    #[inline(always)]
    fn to_bits(self) -> u64 {
        self.0.to_bits() | self.1.to_bits() << M::LANES
    }
}
