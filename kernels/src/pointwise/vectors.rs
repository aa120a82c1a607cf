//! Types of which vectors are loaded and stored as they lie in memory: arithmetic is in f32 registers, and no tile of converted elements stands
//! between.

use crate::cpu::cast::Stored;
use crate::cpu::simd::{F32s, I32s, Simd};
use half::bf16;

/// Elements that vectors of f32 are loaded from, and to which what is computed of such is rounded.
pub(crate) trait Vectors: Stored<Compute = f32> {
    /// The lanes are in any order that [`store`](Self::store) puts right.
    ///
    /// # Safety
    /// `from` must be valid for reading a vector.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F32;
    /// # Safety
    /// `from` must be valid for reading `count` elements, at most those of a vector.
    unsafe fn load_partial<S: Simd>(s: S, from: *const Self, count: usize) -> S::F32;
    /// # Safety
    /// `to` must be valid for writing a vector.
    unsafe fn store<S: Simd>(s: S, x: S::F32, to: *mut Self);
    /// # Safety
    /// `to` must be valid for writing `count` elements, at most those of a vector.
    unsafe fn store_partial<S: Simd>(s: S, x: S::F32, to: *mut Self, count: usize);
    /// What storing and loading would give, for lanes that are loaded or computed from such.
    fn rounded<S: Simd>(s: S, x: S::F32) -> S::F32;
}

impl Vectors for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const f32) -> S::F32 {
        // SAFETY: the caller's.
        unsafe { s.load(from) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(s: S, from: *const f32, count: usize) -> S::F32 {
        // SAFETY: the caller's.
        unsafe { s.load_partial(from, count) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(_: S, x: S::F32, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { x.store(to) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Simd>(_: S, x: S::F32, to: *mut f32, count: usize) {
        // SAFETY: the caller's.
        unsafe { x.store_partial(to, count) }
    }
    #[inline(always)]
    fn rounded<S: Simd>(_: S, x: S::F32) -> S::F32 {
        x
    }
}

impl Vectors for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const bf16) -> S::F32 {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_in_any_order(from) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Simd>(s: S, from: *const bf16, count: usize) -> S::F32 {
        // SAFETY: the caller's.
        unsafe { s.load_bf16_partial(from, count) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(_: S, x: S::F32, to: *mut bf16) {
        // SAFETY: the caller's.
        unsafe { x.store_computed_bf16(to) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Simd>(_: S, x: S::F32, to: *mut bf16, count: usize) {
        // SAFETY: the caller's.
        unsafe { x.computed_bf16_words().store_words(to.cast(), count) }
    }
    #[inline(always)]
    fn rounded<S: Simd>(_: S, x: S::F32) -> S::F32 {
        x.computed_bf16_words().shl::<16>().from_bits()
    }
}
