//! Functions of two operands whose value is a truth value: comparisons and logic. Any number is true unless it is 0.

use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::simd::Simd;
use crate::element::Bool;
use crate::pointwise::input::{Input, blocks};
use std::marker::PhantomData;

/// A relation between two elements.
pub trait Relation: 'static {
    /// The name, as PyTorch spells it.
    const NAME: &'static str;
    /// The CUDA expression of `a` and `b`.
    const CUDA: &'static str;
    /// Whether it holds.
    fn holds<T: PartialOrd + Default>(a: T, b: T) -> bool;
}

/// A relation over `len` contiguous elements.
///
/// # Safety
/// Inputs and output must be valid for `len` elements, the output's apart from the inputs'.
pub type RelationTile<T> = unsafe fn(inputs: [Input<T>; 2], out: *mut Bool, len: usize);

/// A relation as data.
#[derive(Debug)]
pub struct RelationRow {
    /// See [`Relation::NAME`].
    pub name: &'static str,
    /// See [`Relation::CUDA`].
    pub cuda: &'static str,
    pub(super) f32: RelationTile<f32>,
    pub(super) f64: RelationTile<f64>,
    pub(super) i64: RelationTile<i64>,
    pub(super) i32: RelationTile<i32>,
    pub(super) u8: RelationTile<u8>,
    pub(super) bool: RelationTile<Bool>,
}

impl RelationRow {
    const fn of<R: Relation>() -> Self {
        RelationRow {
            name: R::NAME,
            cuda: R::CUDA,
            f32: vector_tile::<R>,
            f64: tile::<R, f64>,
            i64: tile::<R, i64>,
            i32: tile::<R, i32>,
            u8: tile::<R, u8>,
            bool: tile::<R, Bool>,
        }
    }
}

/// # Safety
/// See [`RelationTile`].
#[inline(always)]
unsafe fn tile<R: Relation, T: PartialOrd + Default + Copy>(inputs: [Input<T>; 2], out: *mut Bool, len: usize) {
    // SAFETY: the caller vouches for `len` elements, in which a block lies.
    unsafe {
        blocks(inputs, len, |from, [a, b], count| {
            let out = out.add(from);
            for i in 0..count {
                *out.add(i) = R::holds(*a.add(i), *b.add(i)).into()
            }
        })
    }
}

struct Vectorised<R>([Input<f32>; 2], *mut Bool, usize, PhantomData<R>);

impl<R: Relation> WithSimd for Vectorised<R> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        // The compiler makes vectors of the plain loop once it may use the level's instructions.
        // SAFETY: the caller's.
        unsafe { tile::<R, f32>(self.0, self.1, self.2) }
    }
}

/// # Safety
/// See [`RelationTile`].
unsafe fn vector_tile<R: Relation>(inputs: [Input<f32>; 2], out: *mut Bool, len: usize) {
    dispatch(Vectorised(inputs, out, len, PhantomData::<R>))
}

macro_rules! relations {
    ($($(#[$doc:meta])* $name:ident($op:literal) |$a:ident, $b:ident| $cuda:literal => $holds:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            pub struct $name;
            impl Relation for $name {
                const NAME: &'static str = $op;
                const CUDA: &'static str = $cuda;
                #[inline(always)]
                fn holds<T: PartialOrd + Default>($a: T, $b: T) -> bool { $holds }
            }
            impl $name {
                /// The row of the table.
                pub const ROW: &'static RelationRow = &RelationRow::of::<$name>();
            }
        )*
        /// Every relation.
        pub const RELATIONS: &[&RelationRow] = &[$($name::ROW),*];
    };
}

relations! {
    /// a = b; false for NaN.
    Eq("eq") |a, b| "a == b" => a == b;
    /// a ≠ b; true for NaN.
    Ne("ne") |a, b| "a != b" => a != b;
    /// a < b; false for NaN.
    Lt("lt") |a, b| "a < b" => a < b;
    /// a ≤ b; false for NaN.
    Le("le") |a, b| "a <= b" => a <= b;
    /// a > b; false for NaN.
    Gt("gt") |a, b| "a > b" => a > b;
    /// a ≥ b; false for NaN.
    Ge("ge") |a, b| "a >= b" => a >= b;
    /// Both are true.
    And("logical_and") |a, b| "a != 0 && b != 0" => (a != T::default()) & (b != T::default());
    /// At least one is true.
    Or("logical_or") |a, b| "a != 0 || b != 0" => (a != T::default()) | (b != T::default());
    /// Exactly one is true.
    Xor("logical_xor") |a, b| "(a != 0) != (b != 0)" => (a != T::default()) != (b != T::default());
}
