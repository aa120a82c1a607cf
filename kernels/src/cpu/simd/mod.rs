//! One narrow vector interface over every instruction set. Algorithms are written once against [`Simd`];
//! this folder holds nothing but thin wrappers of single instructions.
//!
//! A value of a [`Simd`] type is a token: it exists only if the machine has the instructions. Vectors are made by
//! a token, so holding one proves the same, and their methods are safe.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
mod twice;

#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::{Avx512, Avx512Bf16};
#[cfg(target_arch = "aarch64")]
pub use neon::Neon;
pub use scalar::Scalar;
pub use twice::{Twice, Two, four};

use super::isa::WithSimd;
use half::{bf16, f16};
use std::mem::MaybeUninit;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Sub};

/// A vector at an address of any alignment.
///
/// Reading one by `ptr::read` is a single instruction even under debug assertions, which the dev profile has on; the `loadu` and
/// `storeu` intrinsics go through `read_unaligned`, whose checks then cost a dozen instructions and a trip through the stack.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Bytes that come from memory together.
pub(crate) const CACHE_LINE: usize = 64;

/// Lanes of the widest vector of any level.
pub(crate) const MAX_LANES: usize = 16;

/// Lanes of four such vectors as one ([`four`]): what code has room for that elementary functions are made of.
pub(crate) const MAX_LANES_OF_FOUR: usize = 4 * MAX_LANES;

/// The bits of a bf16 in those of an f32.
const UPPER_HALF: i32 = !0xffff;

/// An instruction set: makes vectors.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a vector of f32.
    const LANES: usize;
    /// Whether there are registers enough to compute an elementary function of four vectors at once ([`four`]).
    const FOURS: bool = false;

    /// A vector of f32.
    type F32: F32s<I32 = Self::I32, Mask = Self::Mask>;
    /// A vector of i32 with as many lanes.
    type I32: I32s<F32 = Self::F32, Mask = Self::Mask>;
    /// A truth value a lane.
    type Mask: Masks;

    /// Runs work as a function of its own, compiled for this instruction set, instead of inlined into the caller.
    fn call<W: WithSimd>(self, work: W) -> W::Output;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::F32;
    /// `x` in every lane.
    fn splat_i32(self, x: i32) -> Self::I32;
    /// The value at an address of any alignment, in every lane.
    ///
    /// # Safety
    /// `src` must be valid for reading a value.
    #[inline(always)]
    unsafe fn load_splat(self, src: *const f32) -> Self::F32 {
        // SAFETY: the caller's contract.
        self.splat(unsafe { src.cast::<Unaligned<f32>>().read().0 })
    }
    /// Reads `LANES` values from an address of any alignment.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` values.
    unsafe fn load(self, src: *const f32) -> Self::F32;
    /// Reads `count < LANES` values; the other lanes are zero.
    ///
    /// # Safety
    /// `src` must be valid for reading `count` values, and `count <= LANES`.
    unsafe fn load_partial(self, src: *const f32, count: usize) -> Self::F32;

    /// Loads `LANES` values of bf16, widened.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` values.
    #[inline(always)]
    unsafe fn load_bf16(self, src: *const bf16) -> Self::F32 {
        let mut lanes = [0f32; MAX_LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the caller's contract.
            *lane = f32::from_bits((unsafe { src.add(i).read() }.to_bits() as u32) << 16);
        }
        self.load_slice(&lanes)
    }
    /// Loads the first `count` values of bf16, widened; the other lanes are zero.
    ///
    /// # Safety
    /// `src` must be valid for reading `count` values, and `count <= LANES`.
    #[inline(always)]
    unsafe fn load_bf16_partial(self, src: *const bf16, count: usize) -> Self::F32 {
        const { assert!(Self::LANES <= MAX_LANES) }
        let mut part = [bf16::ZERO; MAX_LANES];
        for (i, x) in part.iter_mut().enumerate().take(count) {
            // SAFETY: the caller's contract.
            *x = unsafe { src.add(i).read() };
        }
        // SAFETY: the array is as long as the longest vector of one register.
        unsafe { self.load_bf16(part.as_ptr()) }
    }
    /// Loads `LANES` values of bf16, widened, in the order in which [`store_computed_bf16`](F32s::store_computed_bf16) stores them: what is computed
    /// of each lane alone does not ask where it lies.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` values.
    #[inline(always)]
    unsafe fn load_bf16_in_any_order(self, src: *const bf16) -> Self::F32 {
        // SAFETY: the caller's contract.
        unsafe { self.load_bf16(src) }
    }
    /// Loads pairs of neighbours of bf16, widened: `LANES` first ones, and as many second ones. A shift and a mask, where in order each half
    /// would be moved through the lanes.
    ///
    /// # Safety
    /// `src` must be valid for reading twice `LANES` values.
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, src: *const bf16) -> [Self::F32; 2] {
        // SAFETY: the caller's contract; two of bf16 are as long as one of f32.
        let pairs = unsafe { self.load(src.cast()) }.to_bits();
        [pairs.shl::<16>().from_bits(), (pairs & pairs.splat_like(UPPER_HALF)).from_bits()]
    }
    /// Loads `LANES` values of f16, widened.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` values.
    #[inline(always)]
    unsafe fn load_f16(self, src: *const f16) -> Self::F32 {
        let mut lanes = [0f32; MAX_LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the caller's contract.
            *lane = unsafe { src.add(i).read() }.to_f32();
        }
        self.load_slice(&lanes)
    }
    /// Loads `LANES` signed bytes.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` bytes.
    #[inline(always)]
    unsafe fn load_i8(self, src: *const i8) -> Self::I32 {
        let mut lanes = [0i32; MAX_LANES];
        for (i, lane) in lanes.iter_mut().enumerate().take(Self::LANES) {
            // SAFETY: the caller's contract.
            *lane = i32::from(unsafe { src.add(i).read() });
        }
        // SAFETY: the array holds a vector, of values as long as f32.
        unsafe { self.load(lanes.as_ptr().cast()) }.to_bits()
    }
    /// Loads `LANES` unsigned bytes.
    ///
    /// # Safety
    /// `src` must be valid for reading `LANES` bytes.
    #[inline(always)]
    unsafe fn load_u8(self, src: *const u8) -> Self::I32 {
        // SAFETY: the caller's contract.
        unsafe { self.load_i8(src.cast()) & self.splat_i32(0xFF) }
    }
    /// What [`nibbles`](Self::nibbles) takes for codes n that mean `n * scale + min`, each the same in all lanes.
    #[inline(always)]
    fn nibble_values(self, scale: Self::F32, min: Self::F32) -> [Self::F32; 2] {
        [scale, min]
    }
    /// What the lowest four bits of each lane mean by [`nibble_values`](Self::nibble_values), rounded once; the other bits count for nothing.
    #[inline(always)]
    fn nibbles(self, codes: Self::I32, values: [Self::F32; 2]) -> Self::F32 {
        (codes & self.splat_i32(15)).to_f32().mul_add(values[0], values[1])
    }
    /// Asks for the cache line of an address, which need not be valid, so that a later access finds it in L1.
    #[inline(always)]
    fn prefetch(self, _address: *const f32) {}

    /// Transposes `LANES` rows of `LANES` values; the rows of `src` begin `src_stride` values apart, those of `dst` `dst_stride`.
    ///
    /// # Safety
    /// All rows of `src` must be readable, all rows of `dst` writable, and the two must not overlap.
    #[inline(always)]
    unsafe fn transpose(self, src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: the caller's contract.
                unsafe { *dst.add(j * dst_stride + i) = src.add(i * src_stride + j).read_unaligned() };
            }
        }
    }

    /// Transposes `rows` rows, 1 to `LANES`, of `LANES` values, likewise.
    ///
    /// # Safety
    /// The rows of `src` must be readable, `LANES` rows of `dst` writable for `rows` values each, and the two must not overlap.
    #[inline(always)]
    unsafe fn transpose_some(self, src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
        let mut square = [0f32; MAX_LANES * MAX_LANES];
        let mut columns = MaybeUninit::<[f32; MAX_LANES * MAX_LANES]>::uninit();
        let columns = columns.as_mut_ptr().cast::<f32>();
        // SAFETY: both squares have room for LANES × LANES values; the rest is the caller's contract.
        unsafe {
            for i in 0..rows {
                self.load(src.add(i * src_stride)).store(square.as_mut_ptr().add(i * Self::LANES));
            }
            self.transpose(square.as_ptr(), Self::LANES, columns, Self::LANES);
            for k in 0..Self::LANES {
                self.load(columns.add(k * Self::LANES)).store_partial(dst.add(k * dst_stride), rows);
            }
        }
    }

    /// The first `LANES` values of `src`.
    #[inline(always)]
    fn load_slice(self, src: &[f32]) -> Self::F32 {
        assert!(src.len() >= Self::LANES);
        // SAFETY: the length was checked.
        unsafe { self.load(src.as_ptr()) }
    }

    /// All of `src` (at most `LANES` values); the other lanes are zero.
    #[inline(always)]
    fn load_slice_partial(self, src: &[f32]) -> Self::F32 {
        assert!(src.len() <= Self::LANES);
        // SAFETY: the length was checked.
        unsafe { self.load_partial(src.as_ptr(), src.len()) }
    }

    /// Zero in every lane.
    #[inline(always)]
    fn zero(self) -> Self::F32 {
        self.splat(0.0)
    }
}

/// A vector of f32.
pub trait F32s:
    Copy + Send + Sync + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// The integer vector of the same width.
    type I32: I32s<F32 = Self, Mask = Self::Mask>;
    /// The mask of the same width.
    type Mask: Masks;

    /// `x` in every lane (the token is implied by `self`).
    fn splat_like(self, x: f32) -> Self;
    /// Writes all lanes.
    ///
    /// # Safety
    /// `dst` must be valid for writing `LANES` values.
    unsafe fn store(self, dst: *mut f32);
    /// Writes the first `count <= LANES` lanes.
    ///
    /// # Safety
    /// `dst` must be valid for writing `count` values, and `count <= LANES`.
    unsafe fn store_partial(self, dst: *mut f32, count: usize);
    /// Writes the first `count <= LANES` lanes, rounded to the nearest bf16, ties to even; NaN stays one.
    ///
    /// # Safety
    /// `dst` must be valid for writing `count` values, and `count <= LANES`.
    #[inline(always)]
    unsafe fn store_bf16(self, dst: *mut bf16, count: usize) {
        // SAFETY: the caller's contract; a bf16 is its bits.
        unsafe { self.bf16_words().store_words(dst.cast(), count) }
    }
    /// Writes lanes that were bf16, or are computed from such, rounded to the nearest bf16, ties to even, in the order of
    /// [`load_bf16_in_any_order`](Simd::load_bf16_in_any_order).
    ///
    /// # Safety
    /// `dst` must be valid for writing `LANES` values.
    #[inline(always)]
    unsafe fn store_computed_bf16(self, dst: *mut bf16) {
        // SAFETY: the caller's contract; a bf16 is its bits.
        unsafe { self.computed_bf16_words().store_words(dst.cast(), Self::Mask::LANES) }
    }
    /// Writes pairs as [`load_bf16_pairs`](Simd::load_bf16_pairs) loads them, rounded as [`store_computed_bf16`](Self::store_computed_bf16) does.
    ///
    /// # Safety
    /// `dst` must be valid for writing twice `LANES` values.
    #[inline(always)]
    unsafe fn store_computed_bf16_pairs([first, second]: [Self; 2], dst: *mut bf16) {
        let second = second.rounded_to_bf16() & first.to_bits().splat_like(UPPER_HALF);
        // SAFETY: the caller's contract; two of bf16 are as long as one of f32.
        unsafe { (first.computed_bf16_words() | second).from_bits().store(dst.cast()) }
    }
    /// The bits of the nearest bf16, ties to even, in the lower half of each lane; NaN stays one.
    #[inline(always)]
    fn bf16_words(self) -> Self::I32 {
        let bits = self.to_bits();
        let high = bits.shr_logical::<16>();
        let rounded = (bits + ((high & high.splat_like(1)) + high.splat_like(0x7fff))).shr_logical::<16>();
        // Rounding could carry a NaN into the sign: it is kept, quiet.
        rounded.or_else(self.eq(self), high | high.splat_like(0x40))
    }
    /// [`bf16_words`](Self::bf16_words) of lanes that were bf16, or are computed from such: a NaN's lower half is zero there, be it an operand's or
    /// arithmetic's own, so nothing is carried into the sign.
    #[inline(always)]
    fn computed_bf16_words(self) -> Self::I32 {
        self.rounded_to_bf16().shr_logical::<16>()
    }
    /// The same in the upper half of each lane; anything in the lower.
    #[inline(always)]
    fn rounded_to_bf16(self) -> Self::I32 {
        let bits = self.to_bits();
        let odd = bits.shr_logical::<16>() & bits.splat_like(1);
        bits + (odd + bits.splat_like(0x7fff))
    }
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The smaller lane; `other` where either is NaN (the hardware's rule).
    fn min(self, other: Self) -> Self;
    /// The larger lane; `other` where either is NaN (the hardware's rule).
    fn max(self, other: Self) -> Self;
    /// Clears the sign.
    fn abs(self) -> Self;
    /// Square root, correctly rounded.
    fn sqrt(self) -> Self;
    /// Rounds to the nearest integer, ties to even.
    fn round(self) -> Self;
    /// Rounds down.
    fn floor(self) -> Self;
    /// Rounds up.
    fn ceil(self) -> Self;
    /// `self < other`; false for NaN.
    fn lt(self, other: Self) -> Self::Mask;
    /// `self <= other`; false for NaN.
    fn le(self, other: Self) -> Self::Mask;
    /// `self == other`; false for NaN.
    fn eq(self, other: Self) -> Self::Mask;
    /// `self > other`; false for NaN.
    #[inline(always)]
    fn gt(self, other: Self) -> Self::Mask {
        other.lt(self)
    }
    /// `self >= other`; false for NaN.
    #[inline(always)]
    fn ge(self, other: Self) -> Self::Mask {
        other.le(self)
    }
    /// True where a lane is NaN.
    #[inline(always)]
    fn is_nan(self) -> Self::Mask {
        !self.eq(self)
    }
    /// `self` where `mask`, else `other`.
    fn or_else(self, mask: Self::Mask, other: Self) -> Self;
    /// The bit patterns.
    fn to_bits(self) -> Self::I32;
    /// Converts to integers, rounding to nearest even; out of range gives `i32::MIN` or saturates.
    fn to_i32(self) -> Self::I32;
    /// `self · 2ⁿ` rounded once, for integral n in [−252, 254]; denormal results are kept.
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        // Two factors, because 2ⁿ itself may be out of range. The first product is exact, unless it overflows.
        let n = n.to_i32();
        let half = n.shr::<1>();
        let bias = n.splat_like(127);
        self * (half + bias).shl::<23>().from_bits() * (n - half + bias).shl::<23>().from_bits()
    }
    /// `self · 2ⁿ` for integral n in [−126, 127].
    #[inline(always)]
    fn scale_normal(self, n: Self) -> Self {
        let n = n.to_i32();
        self * (n + n.splat_like(127)).shl::<23>().from_bits()
    }
    /// The sum of all lanes, in an order fixed by the instruction set.
    fn reduce_sum(self) -> f32;
    /// The largest lane; NaN lanes may be lost.
    fn reduce_max(self) -> f32;
    /// The smallest lane; NaN lanes may be lost.
    fn reduce_min(self) -> f32;

    /// Writes all lanes to the front of `dst`.
    #[inline(always)]
    fn store_slice(self, dst: &mut [f32], lanes: usize) {
        assert!(dst.len() >= lanes);
        // SAFETY: the length was checked; `lanes` is at most LANES by the caller's contract, and store_partial clamps.
        unsafe { self.store_partial(dst.as_mut_ptr(), lanes) }
    }
}

/// A vector of i32; arithmetic wraps.
pub trait I32s:
    Copy + Add<Output = Self> + Sub<Output = Self> + BitAnd<Output = Self> + BitOr<Output = Self> + BitXor<Output = Self>
{
    /// The float vector of the same width.
    type F32: F32s;
    /// The mask of the same width.
    type Mask: Masks;

    /// `x` in every lane.
    fn splat_like(self, x: i32) -> Self;
    /// Shifts left by a constant.
    fn shl<const N: u32>(self) -> Self;
    /// Shifts right by a constant, keeping the sign.
    fn shr<const N: u32>(self) -> Self;
    /// Shifts right by a constant, filling with zeros.
    fn shr_logical<const N: u32>(self) -> Self;
    /// The high and low halves of the 64-bit products with `by`; lanes and factor are taken as unsigned.
    fn widening_mul(self, by: u32) -> (Self, Self);
    /// `self == other`.
    fn eq(self, other: Self) -> Self::Mask;
    /// `self > other`, signed.
    fn gt(self, other: Self) -> Self::Mask;
    /// Reinterprets the bits as floats.
    #[allow(clippy::wrong_self_convention)]
    fn from_bits(self) -> Self::F32;
    /// Converts to floats, rounding to nearest even.
    fn to_f32(self) -> Self::F32;
    /// Writes the first `count <= LANES` lanes, which are below 2^16, as words.
    ///
    /// # Safety
    /// `dst` must be valid for writing `count` values, and `count <= LANES`.
    #[inline(always)]
    unsafe fn store_words(self, dst: *mut u16, count: usize) {
        let mut lanes = [0f32; MAX_LANES];
        self.from_bits().store_slice(&mut lanes, Self::Mask::LANES);
        for (i, lane) in lanes.iter().enumerate().take(count) {
            // SAFETY: the caller's contract.
            unsafe { dst.add(i).write(lane.to_bits() as u16) };
        }
    }
    /// `self` where `mask`, else `other`.
    fn or_else(self, mask: Self::Mask, other: Self) -> Self;
}

/// A truth value a lane.
pub trait Masks: Copy + BitAnd<Output = Self> + BitOr<Output = Self> + Not<Output = Self> {
    /// How many there are, at most 64.
    const LANES: usize;

    /// Whether any lane is true.
    fn any(self) -> bool;
    /// Bit `i` is lane `i`.
    fn to_bits(self) -> u64;
}

#[cfg(test)]
mod tests;
