//! Element types at run time, and the macros that turn one into a type parameter.

use crate::{Error, Result};
use half::{bf16, f16};
use kiln_kernels::cuda::Type;
use kiln_kernels::element::{Bool, Element};
use std::fmt;
use std::str::FromStr;

/// The type of a tensor's elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    F64,
    F16,
    BF16,
    I64,
    I32,
    U8,
    Bool,
}

impl DType {
    /// Every dtype.
    pub const ALL: [DType; 8] = [DType::F32, DType::F64, DType::F16, DType::BF16, DType::I64, DType::I32, DType::U8, DType::Bool];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 | DType::Bool => 1,
        }
    }

    /// Whether this is a floating-point type: only those carry gradients.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::F16 | DType::BF16)
    }

    /// Whether this is an integer type (bool is not).
    pub fn is_int(self) -> bool {
        matches!(self, DType::I64 | DType::I32 | DType::U8)
    }

    /// The dtype that statistics, tables and sums of elements of this float dtype are kept in: f64 for f64, f32 for the others.
    pub(crate) fn accumulator(self) -> DType {
        if self == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// The type as the GPU's kernels know it.
    pub fn gpu_type(self) -> Type {
        match self {
            DType::F32 => Type::F32,
            DType::F64 => Type::F64,
            DType::F16 => Type::F16,
            DType::BF16 => Type::BF16,
            DType::I64 => Type::I64,
            DType::I32 => Type::I32,
            DType::U8 => Type::U8,
            DType::Bool => Type::Bool,
        }
    }

    /// The name: `f32`, `bf16`, `bool`, …
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U8 => "u8",
            DType::Bool => "bool",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// From a name such as `bf16`.
    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| {
            let names = Self::ALL.map(DType::name);
            Error::argument("dtype", format!("{text:?} is not a dtype; expected one of {}", names.join(", ")))
        })
    }
}

/// A stored element type and its [`DType`].
pub trait WithDType: Element {
    /// The dtype of tensors with such elements.
    const DTYPE: DType;
}

macro_rules! with_dtype {
    ($($t:ty => $d:ident),*) => { $( impl WithDType for $t { const DTYPE: DType = DType::$d; } )* };
}
with_dtype!(f32 => F32, f64 => F64, f16 => F16, bf16 => BF16, i64 => I64, i32 => I32, u8 => U8, Bool => Bool);

/// A Rust value that users put into and take out of tensors: the stored types, with `bool` in place of [`Bool`].
pub trait Scalar: Copy + Default + Send + Sync + fmt::Debug + 'static {
    /// How it is stored.
    type Stored: WithDType;
    /// To the stored form.
    fn to_stored(self) -> Self::Stored;
    /// From the stored form.
    fn from_stored(stored: Self::Stored) -> Self;
}

macro_rules! scalar {
    ($($t:ty),*) => { $(
        impl Scalar for $t {
            type Stored = $t;
            #[inline(always)] fn to_stored(self) -> $t { self }
            #[inline(always)] fn from_stored(stored: $t) -> $t { stored }
        }
    )* };
}
scalar!(f32, f64, f16, bf16, i64, i32, u8);

impl Scalar for bool {
    type Stored = Bool;
    #[inline(always)]
    fn to_stored(self) -> Bool {
        self.into()
    }
    #[inline(always)]
    fn from_stored(stored: Bool) -> bool {
        stored.get()
    }
}

/// Evaluates `$body` (a `Result`) with `$T` bound to the element type of `$dtype`: any of the eight.
#[macro_export]
macro_rules! for_any {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::F16 => {
                type $T = $crate::f16;
                $body
            }
            $crate::DType::BF16 => {
                type $T = $crate::bf16;
                $body
            }
            $crate::DType::I64 => {
                type $T = i64;
                $body
            }
            $crate::DType::I32 => {
                type $T = i32;
                $body
            }
            $crate::DType::U8 => {
                type $T = u8;
                $body
            }
            $crate::DType::Bool => {
                type $T = $crate::Bool;
                $body
            }
        }
    };
}

/// Evaluates `$body` (a `Result`) with `$T` bound to one of the four float types; any other dtype is an error of operation `$op`.
#[macro_export]
macro_rules! for_float {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::F16 => {
                type $T = $crate::f16;
                $body
            }
            $crate::DType::BF16 => {
                type $T = $crate::bf16;
                $body
            }
            other => Err($crate::Error::unsupported_dtype($op, other, "a float dtype")),
        }
    };
}

/// Evaluates `$body` (a `Result`) with `$T` bound to one of the seven numeric types; bool is an error of operation `$op`.
#[macro_export]
macro_rules! for_number {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::F16 => {
                type $T = $crate::f16;
                $body
            }
            $crate::DType::BF16 => {
                type $T = $crate::bf16;
                $body
            }
            $crate::DType::I64 => {
                type $T = i64;
                $body
            }
            $crate::DType::I32 => {
                type $T = i32;
                $body
            }
            $crate::DType::U8 => {
                type $T = u8;
                $body
            }
            other => Err($crate::Error::unsupported_dtype($op, other, "a numeric dtype")),
        }
    };
}
