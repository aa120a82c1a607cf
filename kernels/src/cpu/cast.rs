//! Conversions between element types: the numbers themselves, and f16 and bf16 to and from the f32 that they compute in.
//! Floats to integers truncate and saturate (NaN gives 0), integers to narrower ones wrap, everything but 0 is true.

use super::isa::{WithSimd, dispatch};
use super::simd::Simd;
use crate::element::{Bool, Element};
use crate::pointwise::Compute;
use half::{bf16, f16};

/// An element type as it is stored, and how its elements become those that arithmetic is done in.
pub trait Stored: Element {
    /// What arithmetic is done in.
    type Compute: Compute;
    /// Whether the two differ.
    const CONVERTS: bool;
    /// Widens `len` elements.
    ///
    /// # Safety
    /// The pointers must be valid for `len` elements and not overlap.
    unsafe fn widen(from: *const Self, to: *mut Self::Compute, len: usize);
    /// Rounds `len` elements to nearest even.
    ///
    /// # Safety
    /// The pointers must be valid for `len` elements and not overlap.
    unsafe fn narrow(from: *const Self::Compute, to: *mut Self, len: usize);
    /// Rounds `len` elements in place to values that this type has: what narrowing and widening them gives.
    ///
    /// # Safety
    /// The pointer must be valid for `len` elements.
    unsafe fn round(values: *mut Self::Compute, len: usize);
}

macro_rules! stored_as_computed {
    ($($t:ty),*) => { $(
        impl Stored for $t {
            type Compute = $t;
            const CONVERTS: bool = false;
            #[inline(always)]
            unsafe fn widen(from: *const $t, to: *mut $t, len: usize) {
                // SAFETY: the caller's.
                unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
            }
            #[inline(always)]
            unsafe fn narrow(from: *const $t, to: *mut $t, len: usize) {
                // SAFETY: the caller's.
                unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
            }
            #[inline(always)]
            unsafe fn round(_: *mut $t, _: usize) {}
        }
    )* };
}
stored_as_computed!(f32, f64, i64, i32, u8, Bool);

/// A plain loop that the compiler turns into vectors of the level's width.
struct Each<A, B, F>(*const A, *mut B, usize, F);

impl<A: Copy, B, F: Fn(A) -> B> WithSimd for Each<A, B, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for i in 0..self.2 {
            // SAFETY: `i < len`; whoever made the struct vouches for both pointers.
            unsafe { *self.1.add(i) = (self.3)(*self.0.add(i)) }
        }
    }
}

/// [`Each`] in place: with two pointers to one array the compiler would have to take it for overlapping ones.
struct EachInPlace<A, F>(*mut A, usize, F);

impl<A: Copy, F: Fn(A) -> A> WithSimd for EachInPlace<A, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for i in 0..self.1 {
            // SAFETY: `i < len`; whoever made the struct vouches for the pointer.
            unsafe { *self.0.add(i) = (self.2)(*self.0.add(i)) }
        }
    }
}

macro_rules! stored_as_half {
    ($t:ty, $widen:ident, $narrow:ident) => {
        impl Stored for $t {
            type Compute = f32;
            const CONVERTS: bool = true;
            unsafe fn widen(from: *const $t, to: *mut f32, len: usize) {
                dispatch(Each(
                    from.cast::<u16>(),
                    to,
                    len,
                    #[inline(always)]
                    |x| $widen(x),
                ))
            }
            unsafe fn narrow(from: *const f32, to: *mut $t, len: usize) {
                dispatch(Each(
                    from,
                    to.cast::<u16>(),
                    len,
                    #[inline(always)]
                    |x| $narrow(x),
                ))
            }
            unsafe fn round(values: *mut f32, len: usize) {
                dispatch(EachInPlace(
                    values,
                    len,
                    #[inline(always)]
                    |x| $widen($narrow(x)),
                ))
            }
        }
    };
}
stored_as_half!(f16, f16_to_f32, f32_to_f16);
stored_as_half!(bf16, bf16_to_f32, f32_to_bf16);

#[inline(always)]
pub(crate) fn bf16_to_f32(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding could carry a NaN into the sign: keep it, quiet.
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

#[inline(always)]
pub(crate) fn f16_to_f32(x: u16) -> f32 {
    let magnitude = (x & 0x7fff) as u32;
    // The exponents' biases differ by 112; the product also normalises denormals.
    let scaled = (f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = if magnitude >= 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(scaled | special | ((x & 0x8000) as u32) << 16)
}

#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    let bits = x.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
    // Adding ½ puts the last bit of an f16 denormal at the last bit of the sum, which rounds it.
    let denormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < 0x3880_0000 { denormal } else { normal };
    // 65520 is the first that rounds to ∞.
    let limited = if magnitude >= 0x477f_f000 { 0x7c00 } else { finite };
    let result = if magnitude > 0x7f80_0000 { 0x7e00 } else { limited };
    (result | bits >> 16 & 0x8000) as u16
}

/// The f32 below or above `x`, if it is not one itself, whose last bit is 1: rounded to half of its bits, it gives what `x` rounded once
/// would, as a tie is no longer taken for one. (Boldo and Melquiond, "When double rounding is odd")
#[inline(always)]
pub(in crate::cpu) fn f64_to_odd_f32(x: f64) -> f32 {
    let nearest = x as f32;
    let back = nearest as f64;
    let towards_zero = nearest.to_bits().wrapping_sub((back.abs() > x.abs()) as u32);
    f32::from_bits(towards_zero | (back != x) as u32)
}

/// A conversion between two types that arithmetic is done in.
pub trait Convert<B> {
    /// The converted value.
    fn convert(self) -> B;
}

macro_rules! conversions {
    ($($a:ty),*; $b:tt) => { $( conversions!(@ $a, $b); )* };
    (@ $a:ty, [$($b:ty),*]) => {
        $( impl Convert<$b> for $a { #[inline(always)] fn convert(self) -> $b { self as $b } } )*
        impl Convert<Bool> for $a { #[inline(always)] fn convert(self) -> Bool { (self != 0 as $a).into() } }
        impl Convert<$a> for Bool { #[inline(always)] fn convert(self) -> $a { self.get() as u8 as $a } }
    };
}
conversions!(f32, f64, i64, i32, u8; [f32, f64, i64, i32, u8]);

impl Convert<Bool> for Bool {
    #[inline(always)]
    fn convert(self) -> Bool {
        self.get().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn widened<T: Stored<Compute = f32>>(x: &[T]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        // SAFETY: both slices have that length.
        unsafe { T::widen(x.as_ptr(), out.as_mut_ptr(), x.len()) };
        out
    }

    fn narrowed<T: Stored<Compute = f32>>(x: &[f32]) -> Vec<T> {
        let mut out = vec![T::default(); x.len()];
        // SAFETY: both slices have that length.
        unsafe { T::narrow(x.as_ptr(), out.as_mut_ptr(), x.len()) };
        out
    }

    /// The bits of the value nearest to `x`, of two such the even one, among those of `bits` and their neighbours.
    fn nearest(x: f64, bits: u16, value: impl Fn(u16) -> f64) -> u16 {
        let near = [bits.wrapping_sub(1), bits, bits.wrapping_add(1)].into_iter().filter(|&bits| value(bits).is_finite());
        near.min_by(|&a, &b| (value(a) - x).abs().total_cmp(&(value(b) - x).abs()).then((a & 1).cmp(&(b & 1)))).unwrap()
    }

    #[test]
    fn doubles_are_rounded_to_halves_once() {
        let as_f16 = |x: f64| f32_to_f16(f64_to_odd_f32(x));
        let as_bf16 = |x: f64| f32_to_bf16(f64_to_odd_f32(x));
        let from_f16 = |bits: u16| f16::from_bits(bits).to_f64();
        let from_bf16 = |bits: u16| bf16::from_bits(bits).to_f64();
        for bits in (1..0x7bffu16).step_by(7).flat_map(|bits| [bits, bits | 0x8000]) {
            let middle = (from_f16(bits) + from_f16(bits + 1)) / 2.0;
            for x in [from_f16(bits), middle, middle * (1.0 + 1e-14), middle * (1.0 - 1e-14)] {
                if x.abs() < 65504.0 {
                    assert_eq!(as_f16(x), nearest(x, f32_to_f16(x as f32), from_f16), "{x:e}");
                }
                for x in [x, x * 2f64.powi(100), x * 2f64.powi(-110)] {
                    assert_eq!(as_bf16(x), nearest(x, f32_to_bf16(x as f32), from_bf16), "{x:e}");
                }
            }
        }
        // Halfway from the largest value to the next power of two.
        assert_eq!([as_f16(65519.999999999), as_f16(65520.0), as_f16(-1e300)], [0x7bff, 0x7c00, 0xfc00]);
        let limit = (from_bf16(0x7f7f) + 2f64.powi(128)) / 2.0;
        assert_eq!([as_bf16(limit * (1.0 - 1e-15)), as_bf16(limit), as_bf16(f64::MIN)], [0x7f7f, 0x7f80, 0xff80]);
        assert_eq!([as_f16(f64::INFINITY), as_bf16(f64::INFINITY), as_f16(5e-324), as_bf16(-0.0)], [0x7c00, 0x7f80, 0, 0x8000]);
        assert!(f16::from_bits(as_f16(f64::NAN)).is_nan() && bf16::from_bits(as_bf16(f64::NAN)).is_nan());
    }

    #[test]
    fn halves_convert_as_the_half_crate_does() {
        let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for (x, y) in all.iter().zip(widened(&all)) {
            assert!(y.to_bits() == x.to_f32().to_bits() || y.is_nan() && x.is_nan(), "{x:?}");
        }
        let all: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        for (x, y) in all.iter().zip(widened(&all)) {
            assert!(y.to_bits() == x.to_f32().to_bits() || y.is_nan() && x.is_nan(), "{x:?}");
        }
        let floats: Vec<f32> =
            (0..=u32::MAX / 1021).map(|i| f32::from_bits(i * 1021)).chain([65519.99, 65520.0, 5.96e-8, 2.98e-8, 2.99e-8]).collect();
        for ((x, h), b) in floats.iter().zip(narrowed::<f16>(&floats)).zip(narrowed::<bf16>(&floats)) {
            assert!(h.to_bits() == f16::from_f32(*x).to_bits() || h.is_nan() && x.is_nan(), "{x:e}: {h:?}");
            assert!(b.to_bits() == bf16::from_f32(*x).to_bits() || b.is_nan() && x.is_nan(), "{x:e}: {b:?}");
        }
    }
}
