//! What reductions, softmax and the norms compute in: three lane types (f32 by SIMD, f64 and i64 by plain arrays that the
//! compiler vectorises), to which every element type widens, and sweeps over slices of them in packs with a shorter last one.

use super::cast::f64_to_odd_f32;
use super::isa::{WithSimd, dispatch, dispatch_to_scalar, dispatch_without_avx512, foresees_rows};
use super::math;
use super::simd::{F32s, Masks, Simd};
use crate::element::{Bool, Element, Float};
use half::{bf16, f16};

pub(crate) use super::simd::MAX_LANES;

/// Elements whose sum is kept in single lanes before it is added to the wide total: one L1-sized tile.
pub(crate) const SUM_TILE: usize = 4096;

/// A type that kernels compute in.
pub trait Lane: Numeric<Lane = Self> + PartialOrd + std::ops::Add<Output = Self> + std::ops::Sub<Output = Self> {
    /// A narrower type that kernels widen as they load it: bf16 of f32. It is this type itself where there is none.
    type Half: Numeric<Lane = Self>;
    /// Accumulates many of them.
    type Wide: Wide;
    /// Some of them at once.
    type Pack<S: Simd>: Pack<Self>;
    /// The least value.
    const LEAST: Self;
    /// The greatest value.
    const GREATEST: Self;
    /// One.
    const ONE: Self;
    /// Runs a kernel of this lane, compiled for the levels that it gains from.
    fn dispatch<W: WithSimd>(work: W) -> W::Output;
    /// How many a pack holds.
    fn lanes<S: Simd>() -> usize;
    /// `x` in every lane.
    fn splat<S: Simd>(s: S, x: Self) -> Self::Pack<S>;
    /// The first lanes of `src`, which must be long enough.
    fn load<S: Simd>(s: S, src: &[Self]) -> Self::Pack<S>;
    /// The first `count` lanes of `src`; the others are zero.
    fn load_part<S: Simd>(s: S, src: &[Self], count: usize) -> Self::Pack<S>;
    /// The first `count` lanes of `x`; the others are those of `rest`.
    fn keep<S: Simd>(s: S, x: Self::Pack<S>, count: usize, rest: Self::Pack<S>) -> Self::Pack<S>;
    /// Widens to the accumulator, exactly.
    fn wide(self) -> Self::Wide;
    /// Whether it is not a number.
    fn is_nan(self) -> bool;
    /// `|self|^p`.
    fn abs_pow(self, p: f64) -> Self;
}

/// What lanes are summed in: f64 or (wrapping) i64.
pub trait Wide: Element + PartialOrd {
    /// Sum.
    fn plus(self, other: Self) -> Self;
    /// Product.
    fn times(self, other: Self) -> Self;
}

/// A lane of a floating-point type.
pub trait FloatLane: Lane<Wide = f64> + num_traits::Float + num_traits::NumAssign {
    /// The nearest value to an f64.
    fn round_from(x: f64) -> Self;
    /// e to the power of each lane.
    fn exp_pack<S: Simd>(s: S, x: Self::Pack<S>) -> Self::Pack<S>;
    /// The natural logarithm of 1 + each lane.
    fn log1p_pack<S: Simd>(s: S, x: Self::Pack<S>) -> Self::Pack<S>;
}

/// Several lanes.
pub trait Pack<L>: Copy {
    /// Sum (integers wrap).
    fn add(self, other: Self) -> Self;
    /// Difference.
    fn sub(self, other: Self) -> Self;
    /// Product.
    fn mul(self, other: Self) -> Self;
    /// `self * b + c`.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// The larger; NaN if either is.
    fn max(self, other: Self) -> Self;
    /// The smaller; NaN if either is.
    fn min(self, other: Self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// 1 where a lane is not zero (NaN is not), else 0.
    fn nonzero(self) -> Self;
    /// The largest lane; NaN if any is.
    fn largest(self) -> L;
    /// The smallest lane; NaN if any is.
    fn smallest(self) -> L;
    /// Writes the first `count` lanes.
    fn store(self, dst: &mut [L], count: usize);
}

/// The f32 pack of an instruction set.
#[derive(Clone, Copy)]
pub struct F32Pack<S: Simd>(pub S::F32);

impl<S: Simd> Pack<f32> for F32Pack<S> {
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0 * other.0)
    }
    #[inline(always)]
    fn mul_add(self, b: Self, c: Self) -> Self {
        Self(self.0.mul_add(b.0, c.0))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // The hardware's rule hands on a NaN of the second operand; one of the first is put back.
        Self(self.0.or_else(self.0.is_nan(), self.0.max(other.0)))
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(self.0.or_else(self.0.is_nan(), self.0.min(other.0)))
    }
    #[inline(always)]
    fn abs(self) -> Self {
        Self(self.0.abs())
    }
    #[inline(always)]
    fn nonzero(self) -> Self {
        let zero = self.0.splat_like(0.0);
        Self(zero.or_else(self.0.eq(zero), self.0.splat_like(1.0)))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        if self.0.is_nan().any() { f32::NAN } else { self.0.reduce_max() }
    }
    #[inline(always)]
    fn smallest(self) -> f32 {
        if self.0.is_nan().any() { f32::NAN } else { self.0.reduce_min() }
    }
    #[inline(always)]
    fn store(self, dst: &mut [f32], count: usize) {
        if count == S::LANES {
            assert!(dst.len() >= S::LANES);
            // SAFETY: the length was checked.
            unsafe { self.0.store(dst.as_mut_ptr()) }
        } else {
            assert!(count < S::LANES && dst.len() >= count);
            // SAFETY: the length was checked.
            unsafe { self.0.store_partial(dst.as_mut_ptr(), count) }
        }
    }
}

/// Lanes of a pack of f64 or i64: one AVX-512 register.
const WIDE_LANES: usize = 8;

/// Eight lanes as an array.
#[derive(Clone, Copy)]
pub struct Lanes<L>([L; WIDE_LANES]);

/// `pairwise!(accs, n, |a, b| merged)` merges the first `n` of an array, a power of two, pair by pair. A macro for the reason that [`sweep`] is one.
macro_rules! pairwise {
    ($accs:expr, $n:expr, |$a:ident, $b:ident| $merged:expr) => {{
        let mut accs = $accs;
        let mut half = $n / 2;
        while half > 0 {
            for i in 0..half {
                let ($a, $b) = (accs[i], accs[i + half]);
                accs[i] = $merged;
            }
            half /= 2;
        }
        accs[0]
    }};
}
pub(crate) use pairwise;

/// The lanes that the expression gives for each `i`. A loop, for the reason that [`sweep`] is a macro.
macro_rules! each {
    ($i:ident => $lane:expr) => {{
        let mut lanes = [Default::default(); WIDE_LANES];
        for $i in 0..WIDE_LANES {
            lanes[$i] = $lane;
        }
        Lanes(lanes)
    }};
}

macro_rules! array_pack {
    ($t:ty, $add:expr, $sub:expr, $mul:expr, $fma:expr, $nan:expr, $abs:expr) => {
        impl Pack<$t> for Lanes<$t> {
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                let f: fn($t, $t) -> $t = $add;
                each!(i => f(self.0[i], other.0[i]))
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                let f: fn($t, $t) -> $t = $sub;
                each!(i => f(self.0[i], other.0[i]))
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                let f: fn($t, $t) -> $t = $mul;
                each!(i => f(self.0[i], other.0[i]))
            }
            #[inline(always)]
            fn mul_add(self, b: Self, c: Self) -> Self {
                let f: fn($t, $t, $t) -> $t = $fma;
                each!(i => f(self.0[i], b.0[i], c.0[i]))
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                let nan: fn($t) -> bool = $nan;
                each!(i => if nan(self.0[i]) || self.0[i] > other.0[i] { self.0[i] } else { other.0[i] })
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                let nan: fn($t) -> bool = $nan;
                each!(i => if nan(self.0[i]) || self.0[i] < other.0[i] { self.0[i] } else { other.0[i] })
            }
            #[inline(always)]
            fn abs(self) -> Self {
                let f: fn($t) -> $t = $abs;
                each!(i => f(self.0[i]))
            }
            #[inline(always)]
            fn nonzero(self) -> Self {
                each!(i => (self.0[i] != 0 as $t) as u8 as $t)
            }
            #[inline(always)]
            fn largest(self) -> $t {
                let nan: fn($t) -> bool = $nan;
                pairwise!(self.0, WIDE_LANES, |a, b| if nan(a) | (a > b) { a } else { b })
            }
            #[inline(always)]
            fn smallest(self) -> $t {
                let nan: fn($t) -> bool = $nan;
                pairwise!(self.0, WIDE_LANES, |a, b| if nan(a) | (a < b) { a } else { b })
            }
            #[inline(always)]
            fn store(self, dst: &mut [$t], count: usize) {
                dst[..count].copy_from_slice(&self.0[..count]);
            }
        }
    };
}
// A fused f64 product would be a library call at the scalar level, so f64 rounds twice everywhere.
array_pack!(f64, |a, b| a + b, |a, b| a - b, |a, b| a * b, |a, b, c| a * b + c, |a| a.is_nan(), f64::abs);
array_pack!(
    i64,
    i64::wrapping_add,
    i64::wrapping_sub,
    i64::wrapping_mul,
    |a, b, c| a.wrapping_mul(b).wrapping_add(c),
    |_| false,
    i64::wrapping_abs
);

impl Lane for f32 {
    type Half = bf16;
    type Wide = f64;
    type Pack<S: Simd> = F32Pack<S>;
    const LEAST: Self = f32::NEG_INFINITY;
    const GREATEST: Self = f32::INFINITY;
    const ONE: Self = 1.0;

    #[inline(always)]
    fn dispatch<W: WithSimd>(work: W) -> W::Output {
        dispatch(work)
    }
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        S::LANES
    }
    #[inline(always)]
    fn splat<S: Simd>(s: S, x: Self) -> F32Pack<S> {
        F32Pack(s.splat(x))
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> F32Pack<S> {
        F32Pack(s.load_slice(src))
    }
    #[inline(always)]
    fn load_part<S: Simd>(s: S, src: &[Self], count: usize) -> F32Pack<S> {
        F32Pack(s.load_slice_partial(&src[..count]))
    }
    #[inline(always)]
    fn keep<S: Simd>(s: S, x: F32Pack<S>, count: usize, rest: F32Pack<S>) -> F32Pack<S> {
        let kept = s.load_slice_partial(&[1.0; MAX_LANES][..count]);
        F32Pack(x.0.or_else(kept.eq(s.splat(1.0)), rest.0))
    }
    #[inline(always)]
    fn wide(self) -> f64 {
        self as f64
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
    #[inline(always)]
    fn abs_pow(self, p: f64) -> Self {
        (self.abs() as f64).powf(p) as f32
    }
}

impl FloatLane for f32 {
    #[inline(always)]
    fn round_from(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn exp_pack<S: Simd>(s: S, x: F32Pack<S>) -> F32Pack<S> {
        F32Pack(math::exp(s, x.0))
    }
    #[inline(always)]
    fn log1p_pack<S: Simd>(s: S, x: F32Pack<S>) -> F32Pack<S> {
        F32Pack(math::log1p(s, x.0))
    }
}

macro_rules! array_lane {
    ($t:ty, $dispatch:expr, $least:expr, $greatest:expr, $nan:expr, $pow:expr) => {
        impl Lane for $t {
            type Half = $t;
            type Wide = $t;
            type Pack<S: Simd> = Lanes<$t>;
            const LEAST: Self = $least;
            const GREATEST: Self = $greatest;
            const ONE: Self = 1 as $t;

            #[inline(always)]
            fn dispatch<W: WithSimd>(work: W) -> W::Output {
                $dispatch(work)
            }
            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                WIDE_LANES
            }
            #[inline(always)]
            fn splat<S: Simd>(_: S, x: Self) -> Lanes<$t> {
                Lanes([x; WIDE_LANES])
            }
            #[inline(always)]
            fn load<S: Simd>(_: S, src: &[Self]) -> Lanes<$t> {
                let src = &src[..WIDE_LANES];
                each!(i => src[i])
            }
            #[inline(always)]
            fn load_part<S: Simd>(_: S, src: &[Self], count: usize) -> Lanes<$t> {
                let mut lanes = [0 as $t; WIDE_LANES];
                lanes[..count].copy_from_slice(&src[..count]);
                Lanes(lanes)
            }
            #[inline(always)]
            fn keep<S: Simd>(_: S, x: Lanes<$t>, count: usize, rest: Lanes<$t>) -> Lanes<$t> {
                each!(i => if i < count { x.0[i] } else { rest.0[i] })
            }
            #[inline(always)]
            fn wide(self) -> $t {
                self
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                let f: fn($t) -> bool = $nan;
                f(self)
            }
            #[inline(always)]
            fn abs_pow(self, p: f64) -> Self {
                let f: fn($t, f64) -> $t = $pow;
                f(self, p)
            }
        }
    };
}
array_lane!(f64, dispatch_without_avx512, f64::NEG_INFINITY, f64::INFINITY, f64::is_nan, |x, p| x.abs().powf(p));
// Most of the time of integers goes into widening them.
array_lane!(i64, dispatch_to_scalar, i64::MIN, i64::MAX, |_| false, |x, p| (x as f64).abs().powf(p) as i64);

impl FloatLane for f64 {
    #[inline(always)]
    fn round_from(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn exp_pack<S: Simd>(_: S, x: Lanes<f64>) -> Lanes<f64> {
        each!(i => x.0[i].exp())
    }
    #[inline(always)]
    fn log1p_pack<S: Simd>(_: S, x: Lanes<f64>) -> Lanes<f64> {
        each!(i => x.0[i].ln_1p())
    }
}

impl Wide for f64 {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self + other
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self * other
    }
}

impl Wide for i64 {
    #[inline(always)]
    fn plus(self, other: Self) -> Self {
        self.wrapping_add(other)
    }
    #[inline(always)]
    fn times(self, other: Self) -> Self {
        self.wrapping_mul(other)
    }
}

/// An element that widens to a lane.
pub trait Numeric: Element {
    /// What it is computed in.
    type Lane: Lane;
    /// The type of its sums and products: itself for floats, i64 for the others.
    type Total: Element;
    /// Widens, exactly.
    fn to_lane(self) -> Self::Lane;
    /// Narrows a value of this type's range; floats round to nearest even.
    fn from_lane(x: Self::Lane) -> Self;
    /// Rounds a total.
    fn total(x: <Self::Lane as Lane>::Wide) -> Self::Total;
    /// The same slice, if elements are lanes.
    fn as_lanes(src: &[Self]) -> Option<&[Self::Lane]>;
    /// The same slice, if elements are lanes.
    fn as_lanes_mut(dst: &mut [Self]) -> Option<&mut [Self::Lane]>;
    /// The same slice, if elements are the narrower type of their lanes.
    fn as_halves(_src: &[Self]) -> Option<&[<Self::Lane as Lane>::Half]> {
        None
    }
    /// The first `count` elements of `src` as lanes; a short pack is filled with zeros.
    #[inline(always)]
    fn load_pack<S: Simd>(s: S, src: &[Self], count: usize) -> PackOf<Self, S> {
        let mut lanes = [Self::Lane::default(); MAX_LANES];
        let n = Self::Lane::lanes::<S>();
        // A number that the compiler knows is a loop of vectors; here and below.
        if count == n {
            widen(&src[..n], &mut lanes[..n]);
        } else {
            widen(&src[..count], &mut lanes[..count]);
        }
        Self::Lane::load(s, &lanes)
    }
    /// Writes the first `count` lanes, narrowed.
    #[inline(always)]
    fn store_pack<S: Simd>(x: PackOf<Self, S>, dst: &mut [Self], count: usize) {
        let mut lanes = [Self::Lane::default(); MAX_LANES];
        let n = Self::Lane::lanes::<S>();
        x.store(&mut lanes, n);
        let mut narrow = [Self::default(); MAX_LANES];
        for i in 0..n {
            narrow[i] = Self::from_lane(lanes[i]);
        }
        if count == n {
            dst[..n].copy_from_slice(&narrow[..n]);
        } else {
            dst[..count].copy_from_slice(&narrow[..count]);
        }
    }
}

/// The pack of an element's lanes.
pub(crate) type PackOf<T, S> = <<T as Numeric>::Lane as Lane>::Pack<S>;

macro_rules! native {
    ($($t:ty),*) => { $(
        impl Numeric for $t {
            type Lane = $t;
            type Total = $t;
            #[inline(always)] fn to_lane(self) -> $t { self }
            #[inline(always)] fn from_lane(x: $t) -> Self { x }
            #[inline(always)] fn total(x: <$t as Lane>::Wide) -> $t { x as $t }
            #[inline(always)] fn as_lanes(src: &[Self]) -> Option<&[$t]> { Some(src) }
            #[inline(always)] fn as_lanes_mut(dst: &mut [Self]) -> Option<&mut [$t]> { Some(dst) }
            #[inline(always)]
            fn load_pack<S: Simd>(s: S, src: &[Self], count: usize) -> PackOf<Self, S> {
                if count == <$t>::lanes::<S>() { Lane::load(s, src) } else { Lane::load_part(s, src, count) }
            }
            #[inline(always)]
            fn store_pack<S: Simd>(x: PackOf<Self, S>, dst: &mut [Self], count: usize) {
                x.store(dst, count);
            }
        }
    )* };
}
native!(f32, f64, i64);

macro_rules! widened {
    ($($t:ty: $lane:ty, $total:ty, $to:expr, $from:expr, $sum:expr $(, { $($packs:item)* })?);*) => { $(
        impl Numeric for $t {
            type Lane = $lane;
            type Total = $total;
            #[inline(always)] fn to_lane(self) -> $lane { let f: fn($t) -> $lane = $to; f(self) }
            #[inline(always)] fn from_lane(x: $lane) -> Self { let f: fn($lane) -> $t = $from; f(x) }
            #[inline(always)] fn total(x: <$lane as Lane>::Wide) -> $total { let f: fn(<$lane as Lane>::Wide) -> $total = $sum; f(x) }
            #[inline(always)] fn as_lanes(_: &[Self]) -> Option<&[$lane]> { None }
            #[inline(always)] fn as_lanes_mut(_: &mut [Self]) -> Option<&mut [$lane]> { None }
            $($($packs)*)?
        }
    )* };
}
widened!(
    f16: f32, f16, Float::widen, Float::narrow, |x| Float::narrow(f64_to_odd_f32(x)), {
        #[inline(always)]
        fn load_pack<S: Simd>(s: S, src: &[Self], count: usize) -> F32Pack<S> {
            const { assert!(S::LANES <= MAX_LANES) }
            let mut part = [f16::ZERO; MAX_LANES];
            let src = if count == S::LANES {
                &src[..count]
            } else {
                part.iter_mut().zip(&src[..count]).for_each(|(to, &x)| *to = x);
                &part
            };
            // SAFETY: there are as many as a vector has lanes.
            F32Pack(unsafe { s.load_f16(src.as_ptr()) })
        }
    };
    bf16: f32, bf16, Float::widen, Float::narrow, |x| Float::narrow(f64_to_odd_f32(x)), {
        #[inline(always)]
        fn as_halves(src: &[Self]) -> Option<&[bf16]> {
            Some(src)
        }
        #[inline(always)]
        fn load_pack<S: Simd>(s: S, src: &[Self], count: usize) -> F32Pack<S> {
            assert!(count <= S::LANES && src.len() >= count);
            // SAFETY: the length was checked.
            F32Pack(unsafe { if count == S::LANES { s.load_bf16(src.as_ptr()) } else { s.load_bf16_partial(src.as_ptr(), count) } })
        }
        #[inline(always)]
        fn store_pack<S: Simd>(x: F32Pack<S>, dst: &mut [Self], count: usize) {
            assert!(count <= S::LANES && dst.len() >= count);
            // SAFETY: the length was checked.
            unsafe { x.0.store_bf16(dst.as_mut_ptr(), count) }
        }
    };
    i32: i64, i64, |x| x as i64, |x| x as i32, |x| x;
    u8: i64, i64, |x| x as i64, |x| x as u8, |x| x;
    Bool: i64, i64, |x| x.get() as i64, |x| Bool((x != 0) as u8), |x| x
);

/// A floating-point element.
pub trait FloatElement: Numeric<Lane: FloatLane, Total = Self> {}
impl FloatElement for f32 {}
impl FloatElement for f64 {}
impl FloatElement for f16 {}
impl FloatElement for bf16 {}

/// Widens `src` into `dst`, of the same length.
#[inline(always)]
pub(crate) fn widen<T: Numeric>(src: &[T], dst: &mut [T::Lane]) {
    for (d, &x) in dst.iter_mut().zip(src) {
        *d = x.to_lane();
    }
}

/// [`widen`], by a kernel of its own.
pub(crate) struct Widen<'a, T: Numeric>(pub &'a [T], pub &'a mut [T::Lane]);

impl<T: Numeric> WithSimd for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        widen(self.0, self.1);
    }
}

/// The lanes of `src`: the slice itself, or widened into the front of `buffer`.
#[inline(always)]
pub(crate) fn read<'a, T: Numeric>(src: &'a [T], buffer: &'a mut [T::Lane]) -> &'a [T::Lane] {
    match T::as_lanes(src) {
        Some(lanes) => lanes,
        None => {
            let buffer = &mut buffer[..src.len()];
            widen(src, buffer);
            buffer
        }
    }
}

/// Lets `f` write the lanes of `dst`: in place, or into the front of `buffer`, which is narrowed afterwards.
#[inline(always)]
pub(crate) fn write<T: Numeric>(dst: &mut [T], buffer: &mut [T::Lane], f: impl FnOnce(&mut [T::Lane])) {
    let len = dst.len();
    // The one call keeps `f` inlined into the caller's features.
    f(match T::as_lanes_mut(dst) {
        Some(lanes) => lanes,
        None => &mut buffer[..len],
    });
    if T::as_lanes(&[]).is_none() {
        for (d, &x) in dst.iter_mut().zip(buffer.iter()) {
            *d = T::from_lane(x);
        }
    }
}

/// A buffer for [`read`] and [`write`]: `len` lanes, or none if `T`'s elements are lanes.
pub(crate) fn buffer<T: Numeric>(len: usize) -> Vec<T::Lane> {
    if T::as_lanes(&[]).is_some() { Vec::new() } else { vec![T::Lane::default(); len] }
}

/// The `count` elements of `src` from `at` on, as lanes; a short pack is filled with zeros.
#[inline(always)]
pub(crate) fn at<T: Numeric, S: Simd>(s: S, src: &[T], at: usize, count: usize) -> PackOf<T, S> {
    T::load_pack(s, &src[at..], count)
}

/// Whether rows are asked for before they are read. Not all hardware foresees a row beyond its end, or what short rows need, of which most is
/// masked or waits for a comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead(bool);

impl Ahead {
    /// What a core's second cache may hold.
    const NEAR: usize = 2 << 20;

    /// For rows of so many elements together.
    pub fn of<T>(elements: usize) -> Self {
        Self(elements.saturating_mul(size_of::<T>()) > Self::NEAR && !foresees_rows())
    }

    /// Before `row` is read: asks for what lies a page beyond it, or of longer rows for how the next begins.
    #[inline(always)]
    pub fn ask<T, S: Simd>(self, s: S, row: &[T]) {
        const PAGE: usize = 4096;
        const LINE: usize = 64;
        if self.0 {
            let bytes = size_of_val(row);
            let from = row.as_ptr().wrapping_byte_add(bytes.max(PAGE));
            (0..bytes.min(PAGE)).step_by(LINE).for_each(|at| s.prefetch(from.wrapping_byte_add(at).cast()));
        }
    }
}

/// `sweep!(L, S, len, |j, count| body)` runs the body for each pack of a slice of `len` lanes: its first lane, and how many it has.
///
/// A macro because a closure would be a function of its own: used by several element types it is not inlined, and so compiled
/// without the instruction set's features, where each intrinsic is a call.
macro_rules! sweep {
    ($lane:ty, $simd:ty, $len:expr, |$j:ident, $count:ident| $body:expr) => {{
        let (lanes, len): (usize, usize) = (<$lane as $crate::cpu::lanes::Lane>::lanes::<$simd>(), $len);
        let mut start = 0;
        while start < len {
            let ($j, $count) = (start, lanes.min(len - start));
            $body;
            start += lanes;
        }
    }};
}
pub(crate) use sweep;

/// The wide sum of all lanes.
#[inline(always)]
fn sum_lanes<L: Lane, S: Simd>(x: L::Pack<S>) -> L::Wide {
    let n = L::lanes::<S>();
    let mut lanes = [L::default(); MAX_LANES];
    x.store(&mut lanes, n);
    let mut wide = [L::Wide::default(); MAX_LANES];
    for i in 0..n {
        wide[i] = lanes[i].wide();
    }
    pairwise!(wide, n, |a, b| a.plus(b))
}

/// `sums!(s, M, L, S, len, |j, count| body)` gives `M` sums at once over a slice of `len` lanes; the body gives a pack of terms for
/// each. Sums of [`SUM_TILE`] terms are kept in lanes (four packs of each, to hide the latency), those of the tiles in the wide
/// type. A macro for the reason that [`sweep`] is one.
macro_rules! sums {
    ($s:expr, $m:literal, $lane:ty, $simd:ty, $len:expr, |$j:ident, $count:ident| $body:expr) => {{
        let (lanes, len): (usize, usize) = (<$lane as $crate::cpu::lanes::Lane>::lanes::<$simd>(), $len);
        let mut sums = $crate::cpu::lanes::Sums::<$m, $lane, $simd>::new($s);
        let mut start = 0;
        while start < len {
            let end = len.min(start + $crate::cpu::lanes::SUM_TILE);
            while start < end {
                for chain in 0..$crate::cpu::lanes::CHAINS {
                    if start < end {
                        let ($j, $count) = (start, lanes.min(end - start));
                        let terms = $body;
                        sums.add($s, chain, terms, $count);
                        start += lanes;
                    }
                }
            }
            start = end;
            sums.flush($s);
        }
        sums.totals
    }};
}
pub(crate) use sums;

/// Packs of each sum that [`sums`] keeps, to hide the latency of the additions.
pub(crate) const CHAINS: usize = 4;

/// The running sums of [`sums`].
pub(crate) struct Sums<const M: usize, L: Lane, S: Simd> {
    chains: [[L::Pack<S>; M]; CHAINS],
    pub(crate) totals: [L::Wide; M],
}

impl<const M: usize, L: Lane, S: Simd> Sums<M, L, S> {
    /// Nothing yet.
    #[inline(always)]
    pub(crate) fn new(s: S) -> Self {
        Self { chains: [[L::splat(s, L::default()); M]; CHAINS], totals: [L::Wide::default(); M] }
    }

    /// Adds the first `count` lanes of each pack to a chain.
    #[inline(always)]
    pub(crate) fn add(&mut self, s: S, chain: usize, terms: [L::Pack<S>; M], count: usize) {
        for (sum, term) in self.chains[chain].iter_mut().zip(terms) {
            let term = if count == L::lanes::<S>() { term } else { L::keep(s, term, count, L::splat(s, L::default())) };
            *sum = sum.add(term);
        }
    }

    /// Moves the chains to the totals.
    #[inline(always)]
    pub(crate) fn flush(&mut self, s: S) {
        for m in 0..M {
            let [a, b, c, d] = &self.chains;
            self.totals[m] = self.totals[m].plus(sum_lanes::<L, S>(a[m].add(b[m]).add(c[m].add(d[m]))));
        }
        self.chains = [[L::splat(s, L::default()); M]; CHAINS];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packs of every length hold what is there and zeros, and write what they hold and nothing beyond.
    struct PacksAreWhole<T>(std::marker::PhantomData<T>);

    impl<T: Numeric> WithSimd for PacksAreWhole<T> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, s: S) {
            let n = T::Lane::lanes::<S>();
            for count in 0..=n {
                let src: Vec<T> = (0..count).map(|i| T::from_f64((i % 2 + 1) as f64)).collect();
                let pack = T::load_pack(s, &src, count);
                let mut lanes = vec![T::Lane::default(); n];
                pack.store(&mut lanes, n);
                for (i, lane) in lanes.iter().enumerate() {
                    assert!(*lane == src.get(i).map_or(T::Lane::default(), |x| x.to_lane()), "{count} of {n}: {lane:?} in lane {i}");
                }
                let mut out = vec![T::from_f64(0.0); n + 1];
                T::store_pack(T::Lane::splat(s, T::Lane::ONE), &mut out, count);
                for (i, &x) in out.iter().enumerate() {
                    assert!(x == T::from_f64(if i < count { 1.0 } else { 0.0 }), "{count} of {n}: {x:?} at {i}");
                }
            }
            // A length that the compiler knows.
            let mut out = [T::from_f64(2.0); 2];
            T::store_pack(T::load_pack(s, &[T::from_f64(std::hint::black_box(1.0))], 1), &mut out, 1);
            assert!(out == [T::from_f64(1.0), T::from_f64(2.0)], "{out:?}");
        }
    }

    #[test]
    fn packs_of_every_length_load_and_store_as_much() {
        fn check<T: Numeric>() {
            T::Lane::dispatch(PacksAreWhole::<T>(std::marker::PhantomData));
        }
        check::<f32>();
        check::<f64>();
        check::<f16>();
        check::<bf16>();
        check::<i64>();
        check::<i32>();
        check::<u8>();
    }
}
