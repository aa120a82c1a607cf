//! The table of pointwise functions: a row a function, with its SIMD expression, its f64 expression and its CUDA expression side by
//! side. [`unary`], [`binary`] and [`backward`] hold the rows; `cpu::pointwise` runs them over strided memory.

pub mod backward;
pub mod binary;
pub mod input;
pub mod relation;
pub mod unary;
pub(crate) mod vectors;

use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::simd::{Simd, Twice, four};
use crate::element::Element;
use half::bf16;
use input::{Input, REPEATS, Rows, Vectored, blocks};
use vectors::Vectors;

/// Numbers that a function takes beside its operands (a slope, a bound); unused ones are 0.
pub type Params = [f64; 2];

/// A function of one element of each of `N` operands.
pub trait Pointwise<const N: usize>: 'static {
    /// The name, as PyTorch spells it.
    const NAME: &'static str;
    /// The CUDA expression, of values of a type `A` (float, double, and the integers where they have the function) named as in
    /// [`NAMES`](Self::NAMES); `p` holds the parameters, `math::` is `math.cuh`.
    const CUDA: &'static str;
    /// The operands' names in the CUDA expression: `[x, g]`.
    const NAMES: &'static str;
    /// Nanoseconds an element takes in f32 on one core with AVX-512, as far as decisions about threads need it.
    const NS: f32;
    /// What the function of one operand does to the bits of a bf16, if nothing but to the sign.
    const WORDS: Option<fn(u16) -> u16> = None;
    /// The function of vectors.
    fn simd<S: Simd>(s: S, x: [S::F32; N], p: [S::F32; 2]) -> S::F32;
    /// The function of f64.
    fn double(x: [f64; N], p: Params) -> f64;
}

/// A pointwise function that integers have too. Arithmetic wraps; nothing panics.
pub trait PointwiseInt<const N: usize>: Pointwise<N> {
    /// The function of integers.
    fn int<I: Int>(x: [I; N], p: [I; 2]) -> I;
}

/// A function over `rows` rows of `len` contiguous elements: reads those of each input, writes the results side by side. The output may be one of
/// the inputs.
///
/// # Safety
/// Inputs and output must be valid for as many elements; an input may equal the output but not overlap it otherwise.
pub type Tile<T, const N: usize> = unsafe fn(inputs: [Input<T>; N], out: *mut T, size: [usize; 2], params: Params);

/// A row of the table, as data: what runs a function without being compiled for it.
#[derive(Debug)]
pub struct Row<const N: usize> {
    /// See [`Pointwise::NAME`].
    pub name: &'static str,
    /// See [`Pointwise::CUDA`].
    pub cuda: &'static str,
    /// See [`Pointwise::NAMES`].
    pub names: &'static str,
    /// See [`Pointwise::NS`].
    pub ns: f32,
    f32: Tile<f32, N>,
    /// In registers of f32, rounded once.
    pub(crate) bf16: Tile<bf16, N>,
    f64: Tile<f64, N>,
    int: Option<IntTiles<N>>,
}

#[derive(Debug)]
struct IntTiles<const N: usize> {
    i64: Tile<i64, N>,
    i32: Tile<i32, N>,
    u8: Tile<u8, N>,
}

impl<const N: usize> Row<N> {
    /// The row of a function of floats.
    pub const fn of<P: Pointwise<N>>() -> Self {
        Row {
            name: P::NAME,
            cuda: P::CUDA,
            names: P::NAMES,
            ns: P::NS,
            f32: simd_tile::<P, f32, N>,
            bf16: if P::WORDS.is_some() { words_tile::<P, N> } else { simd_tile::<P, bf16, N> },
            f64: double_tile::<P, N>,
            int: None,
        }
    }

    /// The row of a function of floats and integers.
    pub const fn with_int<P: PointwiseInt<N>>() -> Self {
        let int = IntTiles { i64: int_tile::<P, i64, N>, i32: int_tile::<P, i32, N>, u8: int_tile::<P, u8, N> };
        Row { int: Some(int), ..Self::of::<P>() }
    }

    /// Whether integers have the function.
    pub fn has_int(&self) -> bool {
        self.int.is_some()
    }

    /// The function over rows of contiguous elements of `C`, if it is defined for them.
    pub fn tile<C: Compute>(&self) -> Option<Tile<C, N>> {
        C::tile(self)
    }
}

/// A type that arithmetic is done in: f32 (for f16 and bf16 too), f64 and the integers; [`Bool`](crate::element::Bool) is only compared.
pub trait Compute: Element + PartialOrd {
    /// The row's function for this type.
    fn tile<const N: usize>(row: &Row<N>) -> Option<Tile<Self, N>>;
    /// The relation's test for this type.
    fn relation(row: &relation::RelationRow) -> relation::RelationTile<Self>;
}

macro_rules! compute {
    ($($t:ty: |$row:ident| $tile:expr, $relation:ident;)*) => { $(
        impl Compute for $t {
            fn tile<const N: usize>($row: &Row<N>) -> Option<Tile<Self, N>> { $tile }
            fn relation(row: &relation::RelationRow) -> relation::RelationTile<Self> { row.$relation }
        }
    )* };
}
compute! {
    f32: |row| Some(row.f32), f32;
    f64: |row| Some(row.f64), f64;
    i64: |row| row.int.as_ref().map(|t| t.i64), i64;
    i32: |row| row.int.as_ref().map(|t| t.i32), i32;
    u8: |row| row.int.as_ref().map(|t| t.u8), u8;
    crate::element::Bool: |_row| None, bool;
}

/// The integer types. `div` rounds towards zero, `rem` has the divisor's sign; by zero both give 0.
#[allow(missing_docs)]
pub trait Int: Compute + Ord {
    const ZERO: Self;
    const ONE: Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    fn rem(self, other: Self) -> Self;
    fn neg(self) -> Self;
    /// `self^other`; for a negative exponent 0, unless the base is 1 or −1.
    fn pow(self, other: Self) -> Self;
}

macro_rules! int {
    ($($t:ty),*) => { $(
        impl Int for $t {
            const ZERO: Self = 0;
            const ONE: Self = 1;
            #[inline(always)] fn add(self, other: Self) -> Self { self.wrapping_add(other) }
            #[inline(always)] fn sub(self, other: Self) -> Self { self.wrapping_sub(other) }
            #[inline(always)] fn mul(self, other: Self) -> Self { self.wrapping_mul(other) }
            #[inline(always)] fn div(self, other: Self) -> Self {
                if other == 0 { 0 } else { self.wrapping_div(other) }
            }
            #[inline(always)] fn rem(self, other: Self) -> Self {
                if other == 0 { return 0; }
                let r = self.wrapping_rem(other);
                if r != 0 && (r < 0) != (other < 0) { r + other } else { r }
            }
            #[inline(always)] fn neg(self) -> Self { self.wrapping_neg() }
            fn pow(self, other: Self) -> Self {
                if other < 0 {
                    // 1/x rounded toward zero, times an odd power's sign.
                    return match self { 1 => 1, x if x == <$t as Int>::neg(1) => if other % 2 == 0 { 1 } else { x }, _ => 0 };
                }
                let (mut base, mut exponent, mut result) = (self, other, 1 as $t);
                while exponent > 0 {
                    if exponent % 2 == 1 { result = result.wrapping_mul(base); }
                    base = base.wrapping_mul(base);
                    exponent /= 2;
                }
                result
            }
        }
    )* };
}
#[allow(unused_comparisons)] // u8 is never negative.
mod ints {
    use super::Int;
    int!(i64, i32, u8);
}

/// Element `i` of each input.
///
/// # Safety
/// It must be readable.
#[inline(always)]
unsafe fn element<T: Element, const N: usize>(inputs: [*const T; N], i: usize) -> [T; N] {
    let mut x = [T::default(); N];
    for k in 0..N {
        // SAFETY: the caller's.
        x[k] = unsafe { *inputs[k].add(i) };
    }
    x
}

/// From this time an element on a function is a chain of instructions so long that four vectors at once pay. So they do for bf16, of which
/// pairs of vectors are loaded and stored by fewer instructions.
const LONG_NS: f32 = 0.35;

struct SimdTile<P, T, const N: usize> {
    inputs: [Input<T>; N],
    out: *mut T,
    size: [usize; 2],
    params: Params,
    function: std::marker::PhantomData<P>,
}

impl<P: Pointwise<N>, T: Vectors, const N: usize> WithSimd for SimdTile<P, T, N> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let mut all = Rows::new(self.inputs);
        let [rows, len] = self.size;
        for row in 0..rows {
            let mut done = 0;
            // SAFETY: the caller vouches for `len` elements of each row, and `done + rest == len`.
            unsafe {
                let (inputs, out) = (all.row(row), self.out.add(row * len));
                if S::FOURS && (P::NS >= LONG_NS || T::CONVERTS) {
                    done = self.whole_vectors(four(s), inputs, out, 0);
                } else if S::LANES > 1 && T::CONVERTS {
                    done = self.whole_vectors(Twice(s), inputs, out, 0);
                }
                done = self.whole_vectors(s, inputs, out, done);
                let rest = len - done;
                if rest > 0 {
                    let results = P::simd(s, Vectored::new(s, inputs, done).last(s, rest), self.params(s));
                    T::store_partial(s, results, out.add(done), rest);
                }
            }
        }
    }
}

impl<P: Pointwise<N>, T: Vectors, const N: usize> SimdTile<P, T, N> {
    #[inline(always)]
    fn params<S: Simd>(&self, s: S) -> [S::F32; 2] {
        // A NaN without a payload, as rounding to a half takes them to be.
        let number = |x: f64| if x.is_nan() { f32::NAN } else { x as f32 };
        [s.splat(number(self.params[0])), s.splat(number(self.params[1]))]
    }

    /// The whole vectors of a row from element `from` on; returns where they end.
    ///
    /// # Safety
    /// See [`Tile`].
    #[inline(always)]
    unsafe fn whole_vectors<S: Simd>(&self, s: S, inputs: [Input<T>; N], out: *mut T, from: usize) -> usize {
        let p = self.params(s);
        let mut i = from;
        // SAFETY: `from <= len`.
        let mut inputs = unsafe { Vectored::new(s, inputs, from) };
        while self.size[1] - i >= S::LANES {
            // SAFETY: `i + LANES <= len`, and the caller vouches for `len` elements.
            unsafe { T::store(s, P::simd(s, inputs.next(s), p), out.add(i)) }
            i += S::LANES;
        }
        i
    }
}

/// # Safety
/// See [`Tile`].
unsafe fn simd_tile<P: Pointwise<N>, T: Vectors, const N: usize>(inputs: [Input<T>; N], out: *mut T, size: [usize; 2], params: Params) {
    dispatch(SimdTile::<P, T, N> { inputs, out, size, params, function: std::marker::PhantomData });
}

struct WordsTile<const N: usize, P> {
    from: Input<u16>,
    to: *mut u16,
    size: [usize; 2],
    function: std::marker::PhantomData<P>,
}

impl<const N: usize, P: Pointwise<N>> WithSimd for WordsTile<N, P> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const BLOCK: usize = REPEATS;
        const { assert!(N == 1 || P::WORDS.is_none()) }
        let Some(function) = P::WORDS else { return };
        let mut all = Rows::new([self.from]);
        let [rows, len] = self.size;
        let whole = len / BLOCK * BLOCK;
        for row in 0..rows {
            // SAFETY: the caller vouches for `len` elements of each row. A block is read before it is written, since both may be one.
            unsafe {
                let ([from], to) = (all.row(row), self.to.add(row * len));
                for i in (0..whole).step_by(BLOCK) {
                    let mut words = from.at(i).cast::<[u16; BLOCK]>().read();
                    for word in &mut words {
                        *word = function(*word);
                    }
                    to.add(i).cast::<[u16; BLOCK]>().write(words);
                }
                for i in whole..len {
                    to.add(i).write(function(from.at(i).read()));
                }
            }
        }
    }
}

/// # Safety
/// See [`Tile`].
unsafe fn words_tile<P: Pointwise<N>, const N: usize>(inputs: [Input<bf16>; N], out: *mut bf16, size: [usize; 2], _: Params) {
    // A bf16 is its bits.
    dispatch(WordsTile::<N, P> { from: inputs[0].cast(), to: out.cast(), size, function: std::marker::PhantomData });
}

/// # Safety
/// See [`Tile`].
unsafe fn double_tile<P: Pointwise<N>, const N: usize>(inputs: [Input<f64>; N], out: *mut f64, size: [usize; 2], params: Params) {
    // SAFETY: the caller's.
    unsafe { elements(inputs, out, size, |x| P::double(x, params)) }
}

/// # Safety
/// See [`Tile`].
unsafe fn int_tile<P: PointwiseInt<N>, I: Int, const N: usize>(inputs: [Input<I>; N], out: *mut I, size: [usize; 2], params: Params) {
    let params = [I::from_f64(params[0]), I::from_f64(params[1])];
    // SAFETY: the caller's.
    unsafe { elements(inputs, out, size, |x| P::int(x, params)) }
}

/// `f` of each element.
///
/// # Safety
/// See [`Tile`].
#[inline(always)]
unsafe fn elements<T: Element, const N: usize>(inputs: [Input<T>; N], out: *mut T, [rows, len]: [usize; 2], f: impl Fn([T; N]) -> T) {
    let mut all = Rows::new(inputs);
    for row in 0..rows {
        // SAFETY: the caller vouches for `len` elements of each row, in which a block lies.
        unsafe {
            let out = out.add(row * len);
            blocks(all.row(row), len, |from, inputs, count| {
                let out = out.add(from);
                for i in 0..count {
                    *out.add(i) = f(element(inputs, i))
                }
            })
        }
    }
}

/// Instantiates rows: each becomes a type that implements [`Pointwise`] and has its [`Row`] as `ROW`; `$all` lists them.
macro_rules! rows {
    ($all:ident, $n:literal; $(
        $(#[$doc:meta])* $name:ident ($op:literal, $ns:literal) |$s:ident, $x:pat_param, $p:ident| $cuda:literal => $simd:expr; f64: $double:expr $(; int: $int:expr)? $(; words: $words:expr)?,
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug)]
            pub struct $name;
            impl $crate::pointwise::Pointwise<$n> for $name {
                const NAME: &'static str = $op;
                const CUDA: &'static str = $cuda;
                const NAMES: &'static str = stringify!($x);
                const NS: f32 = $ns;
                $(const WORDS: Option<fn(u16) -> u16> = Some($words);)?
                #[inline(always)]
                fn simd<S: Simd>($s: S, $x: [S::F32; $n], $p: [S::F32; 2]) -> S::F32 { let (_, _) = ($s, $p); $simd }
                #[inline(always)]
                fn double($x: [f64; $n], $p: $crate::pointwise::Params) -> f64 { let _ = $p; $double }
            }
            $(impl $crate::pointwise::PointwiseInt<$n> for $name {
                #[inline(always)]
                fn int<I: $crate::pointwise::Int>($x: [I; $n], $p: [I; 2]) -> I { let _ = $p; $int }
            })?
            impl $name {
                /// The row of the table.
                pub const ROW: &'static $crate::pointwise::Row<$n> = &rows!(@row $n $name $($int)?);
            }
        )*
        /// Every row of this file.
        pub const $all: &[&$crate::pointwise::Row<$n>] = &[$($name::ROW),*];
    };
    (@row $n:literal $name:ident) => { $crate::pointwise::Row::<$n>::of::<$name>() };
    (@row $n:literal $name:ident $int:expr) => { $crate::pointwise::Row::<$n>::with_int::<$name>() };
}
use rows;
