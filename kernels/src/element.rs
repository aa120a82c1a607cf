//! The element types that a kernel can read and write.

use crate::cpu::cast;
use half::{bf16, f16};

/// A boolean as it is stored: one byte, 0 or 1.
///
/// Rust's `bool` has invalid bit patterns, and recycled memory holds any bytes; a transparent `u8` is sound for both.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
#[repr(transparent)]
pub struct Bool(pub u8);

impl Bool {
    /// The truth value: any non-zero byte is true.
    #[inline(always)]
    pub fn get(self) -> bool {
        self.0 != 0
    }
}

impl From<bool> for Bool {
    #[inline(always)]
    fn from(value: bool) -> Self {
        Bool(value as u8)
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A plain-old-data element: every bit pattern is a valid value, so any initialised memory can be viewed as a slice of it.
pub trait Element: sealed::Sealed + Copy + Default + PartialEq + Send + Sync + std::fmt::Debug + 'static {
    /// The value as f64 (integers beyond 2^53 round).
    fn to_f64(self) -> f64;
    /// The nearest value to an f64: floats round to nearest even, integers truncate toward zero and saturate, [`Bool`] is `x != 0`.
    fn from_f64(x: f64) -> Self;
}

/// A floating-point element.
pub trait Float: Element + PartialOrd {
    /// The type that arithmetic is done in: f32 for f16 and bf16, the type itself otherwise.
    type Compute: Float + num_traits::Float;
    /// Widens to the compute type, exactly.
    fn widen(self) -> Self::Compute;
    /// Rounds from the compute type to nearest even.
    fn narrow(x: Self::Compute) -> Self;
}

macro_rules! element {
    ($($t:ty),*) => { $(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            #[inline(always)] fn to_f64(self) -> f64 { self as f64 }
            #[inline(always)] fn from_f64(x: f64) -> Self { x as $t }
        }
    )* };
}
element!(f32, f64, i64, i32, u8);

impl sealed::Sealed for Bool {}
impl Element for Bool {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.get() as u8 as f64
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        (x != 0.0).into()
    }
}

macro_rules! half_element {
    ($($t:ty: $widen:ident, $narrow:ident;)*) => { $(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            #[inline(always)] fn to_f64(self) -> f64 { <$t>::to_f64(self) }
            #[inline(always)] fn from_f64(x: f64) -> Self { <$t>::from_f64(x) }
        }
        impl Float for $t {
            type Compute = f32;
            #[inline(always)] fn widen(self) -> f32 { cast::$widen(self.to_bits()) }
            #[inline(always)] fn narrow(x: f32) -> Self { <$t>::from_bits(cast::$narrow(x)) }
        }
    )* };
}
half_element! { f16: f16_to_f32, f32_to_f16; bf16: bf16_to_f32, f32_to_bf16; }

macro_rules! full_float {
    ($($t:ty),*) => { $(
        impl Float for $t {
            type Compute = $t;
            #[inline(always)] fn widen(self) -> $t { self }
            #[inline(always)] fn narrow(x: $t) -> Self { x }
        }
    )* };
}
full_float!(f32, f64);
