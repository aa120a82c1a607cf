//! Units of an activation in registers: gated ones f(x)·u, forward and with both gradients, and f(x + b) + r, an activation between a bias and a
//! residual. A chain of steps is run as one where it is one: the function and its derivative have their dearest part in common, and all operands
//! advance together, as the hardware's prefetching wants it. The bits are the chain's.

use super::chain::{Function, Step, Value};
use super::{Operand, Output, Plan, Source};
use crate::cpu::cast::Stored;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::math;
use crate::cpu::simd::{Simd, four};
use crate::pointwise::input::{Input, Vectored};
use crate::pointwise::vectors::Vectors;
use crate::pointwise::{Row, backward, binary, unary};
use half::bf16;
use std::any::TypeId;
use std::marker::PhantomData;

/// A function whose backward row is the product of its derivative and the gradient.
trait Gate: 'static {
    /// The function.
    fn value<S: Simd>(s: S, x: S::F32) -> S::F32;
    /// The function and its derivative.
    fn value_and_slope<S: Simd>(s: S, x: S::F32) -> [S::F32; 2];
}

macro_rules! gates {
    ($($name:ident($value:ident, $value_and_slope:ident),)*) => {
        $(impl Gate for unary::$name {
            #[inline(always)]
            fn value<S: Simd>(s: S, x: S::F32) -> S::F32 {
                math::$value(s, x)
            }
            #[inline(always)]
            fn value_and_slope<S: Simd>(s: S, x: S::F32) -> [S::F32; 2] {
                math::$value_and_slope(s, x)
            }
        })*
        /// Every gate.
        static GATES: &[Kernels] = &[$(Kernels::of::<unary::$name>(unary::$name::ROW, backward::$name::ROW)),*];
    };
}
gates! {
    Silu(silu, silu_and_slope),
    Gelu(gelu, gelu_and_slope),
    GeluTanh(gelu_tanh, gelu_tanh_and_slope),
}

/// What is computed of vectors: x, u and, backward, the gradient g; or x, b and r.
trait Body<T, const N: usize, const M: usize>: 'static {
    fn vectors<S: Simd>(s: S, inputs: [S::F32; N]) -> [S::F32; M];
}

struct Forward<P>(PhantomData<P>);
struct Backward<P>(PhantomData<P>);
struct Residual<P>(PhantomData<P>);

/// f(x)·u.
impl<P: Gate, T: Vectors> Body<T, 2, 1> for Forward<P> {
    #[inline(always)]
    fn vectors<S: Simd>(s: S, [x, u]: [S::F32; 2]) -> [S::F32; 1] {
        [T::rounded(s, P::value(s, x)) * u]
    }
}

/// The gradients of x and u: (g·u)·f′(x) and g·f(x).
impl<P: Gate, T: Vectors> Body<T, 3, 2> for Backward<P> {
    #[inline(always)]
    fn vectors<S: Simd>(s: S, [x, u, g]: [S::F32; 3]) -> [S::F32; 2] {
        let [value, slope] = P::value_and_slope(s, x);
        [T::rounded(s, g * u) * slope, g * T::rounded(s, value)]
    }
}

/// f(x + b) + r.
impl<P: Gate, T: Vectors> Body<T, 3, 1> for Residual<P> {
    #[inline(always)]
    fn vectors<S: Simd>(s: S, [x, b, r]: [S::F32; 3]) -> [S::F32; 1] {
        [T::rounded(s, P::value(s, T::rounded(s, x + b))) + r]
    }
}

/// Contiguous elements of N inputs and M outputs.
///
/// # Safety
/// Inputs and outputs must be valid for `len` elements of the type; an output overlaps nothing else, unless it equals an input.
type Tile<const N: usize, const M: usize> = unsafe fn(inputs: [Input<u8>; N], outs: [*mut u8; M], len: usize);

/// A gate's kernels, and the rows of which it is made.
pub(super) struct Kernels {
    row: &'static Row<1>,
    backward_row: &'static Row<2>,
    f32: Tiles,
    bf16: Tiles,
}

/// The kernels of a type.
#[derive(Clone, Copy)]
struct Tiles {
    forward: Tile<2, 1>,
    backward: Tile<3, 2>,
    residual: Tile<3, 1>,
}

impl Tiles {
    const fn of<P: Gate, T: Vectors>() -> Self {
        Self { forward: tile::<Forward<P>, T, 2, 1>, backward: tile::<Backward<P>, T, 3, 2>, residual: tile::<Residual<P>, T, 3, 1> }
    }
}

impl Kernels {
    /// The kernels for `T`.
    fn tiles<T: Stored>(&self) -> Option<Tiles> {
        let of = [(TypeId::of::<f32>(), self.f32), (TypeId::of::<bf16>(), self.bf16)];
        of.into_iter().find(|(id, _)| *id == TypeId::of::<T>()).map(|(_, tiles)| tiles)
    }

    const fn of<P: Gate>(row: &'static Row<1>, backward_row: &'static Row<2>) -> Self {
        Self { row, backward_row, f32: Tiles::of::<P, f32>(), bf16: Tiles::of::<P, bf16>() }
    }
}

struct Run<B, T, const N: usize, const M: usize> {
    inputs: [Input<T>; N],
    outs: [*mut T; M],
    len: usize,
    body: PhantomData<B>,
}

impl<B: Body<T, N, M>, T: Vectors, const N: usize, const M: usize> WithSimd for Run<B, T, N, M> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        // SAFETY: the caller vouches for `len` elements.
        let whole = unsafe {
            let fours = if S::FOURS { self.whole_vectors(four(s), 0) } else { 0 };
            self.whole_vectors(s, fours)
        };
        let rest = self.len - whole;
        if rest > 0 {
            // SAFETY: `whole + rest == len`.
            unsafe {
                let results = B::vectors(s, Vectored::new(s, self.inputs, whole).last(s, rest));
                for (x, out) in results.into_iter().zip(self.outs) {
                    T::store_partial(s, x, out.add(whole), rest);
                }
            }
        }
    }
}

impl<B: Body<T, N, M>, T: Vectors, const N: usize, const M: usize> Run<B, T, N, M> {
    /// The whole vectors from element `from` on; returns where they end.
    ///
    /// # Safety
    /// See [`Tile`].
    #[inline(always)]
    unsafe fn whole_vectors<S: Simd>(&self, s: S, from: usize) -> usize {
        let mut i = from;
        // SAFETY: `from <= len`.
        let mut inputs = unsafe { Vectored::new(s, self.inputs, from) };
        while self.len - i >= S::LANES {
            // SAFETY: `i + LANES <= len`, and the caller vouches for `len` elements.
            unsafe {
                let results = B::vectors(s, inputs.next(s));
                for (x, out) in results.into_iter().zip(self.outs) {
                    T::store(s, x, out.add(i));
                }
            }
            i += S::LANES;
        }
        i
    }
}

/// # Safety
/// See [`Tile`].
unsafe fn tile<B: Body<T, N, M>, T: Vectors, const N: usize, const M: usize>(inputs: [Input<u8>; N], outs: [*mut u8; M], len: usize) {
    let (inputs, outs) = (inputs.map(|x| x.cast()), outs.map(|x| x.cast()));
    dispatch(Run::<B, T, N, M> { inputs, outs, len, body: PhantomData });
}

/// A chain that is a unit.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    /// Of the operands x and u.
    Forward(&'static Kernels, [usize; 2]),
    /// Of the operands x, u and g. The results are the gradients of x and u, or if `flipped` of u and x.
    Backward { kernels: &'static Kernels, operands: [usize; 3], flipped: bool },
    /// Of the operands x, b and r.
    Residual(&'static Kernels, [usize; 3]),
}

impl std::fmt::Debug for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (name, operands): (_, &[usize]) = match self {
            Unit::Forward(kernels, operands) => (kernels.row.name, operands),
            Unit::Backward { kernels, operands, .. } => (kernels.backward_row.name, operands),
            Unit::Residual(kernels, operands) => (kernels.row.name, operands),
        };
        write!(f, "{name} of {operands:?}")
    }
}

/// The other operand of step `i`, if it is function `row` of `one`.
fn other(steps: &[Step], i: usize, row: &Row<2>, one: Value) -> Option<Value> {
    match (steps[i].function, steps[i].args) {
        (Function::Two(function), [a, b]) if function.name == row.name => match (a == one, b == one) {
            (true, _) => Some(b),
            (_, true) => Some(a),
            _ => None,
        },
        _ => None,
    }
}

/// The other factor of step `i`, if it is a product with `factor`.
fn cofactor(steps: &[Step], i: usize, factor: Value) -> Option<Value> {
    other(steps, i, binary::Mul::ROW, factor)
}

impl Unit {
    /// What the `needed` steps are, that lead to `results`, if they are a unit of operands.
    pub(super) fn of(steps: &[Step], needed: &[usize], results: &[usize]) -> Option<Self> {
        let one = |&&i: &&usize| matches!(steps[i].function, Function::One(_));
        let &gate = needed.iter().find(one)?;
        let Function::One(row) = steps[gate].function else { return None };
        let kernels = GATES.iter().find(|kernels| kernels.row.name == row.name)?;
        if let (3, &[result], Value::Step(sum)) = (needed.len(), results, steps[gate].args[0]) {
            let x = steps[sum].args[0];
            let (b, r) = (other(steps, sum, binary::Add::ROW, x)?, other(steps, result, binary::Add::ROW, Value::Step(gate))?);
            let (Value::Operand(x), Value::Operand(b), Value::Operand(r)) = (x, b, r) else { return None };
            return Some(Unit::Residual(kernels, [x, b, r]));
        }
        let Value::Operand(x) = steps[gate].args[0] else { return None };
        match (needed.len(), results) {
            (2, &[result]) => {
                let Value::Operand(u) = cofactor(steps, result, Value::Step(gate))? else { return None };
                Some(Unit::Forward(kernels, [x, u]))
            }
            (4, &[first, second]) => {
                let is_backward = |i: usize| matches!(steps[i].function, Function::Two(row) if row.name == kernels.backward_row.name);
                let flipped = is_backward(second);
                let (of_x, of_u) = if flipped { (second, first) } else { (first, second) };
                let [Value::Operand(same), Value::Step(scaled)] = steps[of_x].args else { return None };
                let g = cofactor(steps, of_u, Value::Step(gate))?;
                let (Value::Operand(u), Value::Operand(g)) = (cofactor(steps, scaled, g)?, g) else { return None };
                (is_backward(of_x) && same == x).then_some(Unit::Backward { kernels, operands: [x, u, g], flipped })
            }
            _ => None,
        }
    }

    /// Runs it in `ns` nanoseconds an element; `false` if it has no kernels for `T`. The operands are the chain's, and so are the outputs.
    pub(super) fn run<T: Stored>(&self, ns: f32, operands: &[Operand<'_, T>], outs: &mut [Output<'_, T>]) -> bool {
        // A number is not rounded to a half type: it would be, read as an operand is stored.
        if T::CONVERTS && operands.iter().any(|o| matches!(o, Operand::Scalar(_))) {
            return false;
        }
        match (self, outs) {
            (Unit::Forward(kernels, at), [out]) => {
                kernels.tiles::<T>().map(|tiles| run_tiles(tiles.forward, ns, at.map(|i| operands[i]), [out], 0)).is_some()
            }
            (Unit::Backward { kernels, operands: at, flipped }, [first, second]) => {
                let outs = if *flipped { [second, first] } else { [first, second] };
                kernels.tiles::<T>().map(|tiles| run_tiles(tiles.backward, ns, at.map(|i| operands[i]), outs, *flipped as usize)).is_some()
            }
            (Unit::Residual(kernels, at), [out]) => {
                kernels.tiles::<T>().map(|tiles| run_tiles(tiles.residual, ns, at.map(|i| operands[i]), [out], 0)).is_some()
            }
            _ => false,
        }
    }
}

/// Runs a tile's kernel over all elements. An operand that is the output is output number `own`.
fn run_tiles<T: Stored, const N: usize, const M: usize>(
    tile: Tile<N, M>,
    ns: f32,
    operands: [Operand<'_, T>; N],
    outs: [&mut Output<'_, T>; M],
    own: usize,
) {
    let plan = Plan::new(outs[0], ns, operands.map(|o| Source::new(o, outs[0]))).stored();
    plan.run_stored(outs.map(|out| &mut *out.data), own, &|inputs, outs, len| {
        // SAFETY: the plan vouches for the pointers, and the tile is one for `T`.
        unsafe { tile(inputs.map(|x| x.cast()), outs.map(|x| x.cast()), len) }
    });
}
