//! Chains of pointwise functions in one pass over memory: tile by tile, each step's results stay in the first-level cache. A chain may have
//! several results, as the gradients of a function of several operands are.
//!
//! A result is bit for bit that of the same functions one after the other: every step runs the same kernel, and is rounded to the dtype. A gated
//! unit has a kernel of its own (`gate`), with the same bits.
//! A reduction that ends a chain takes its tiles as they are made ([`Results`]), cut as it would cut the chain's result in memory.

use super::gate::Unit;
use super::{Operand, Output, Plan, Reader, Room, Source, TILE, Tile, cost_factor, repeated};
use crate::cpu::cast::Stored;
use crate::cpu::lanes::Numeric;
use crate::cpu::reduce::{self, Elements};
use crate::pointwise::input::{Input, REPEATS};
use crate::pointwise::{Compute, Params, Row};

/// The most operands of a chain.
pub const MAX_OPERANDS: usize = 6;

/// The most results of a chain.
pub const MAX_RESULTS: usize = 3;

/// The most intermediate results that are alive at once.
const MAX_SLOTS: usize = 6;

/// A function of the table.
#[derive(Clone, Copy, Debug)]
pub enum Function {
    /// Of one value.
    One(&'static Row<1>),
    /// Of two.
    Two(&'static Row<2>),
}

/// What a step reads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Value {
    /// An operand of the chain.
    Operand(usize),
    /// The result of an earlier step.
    Step(usize),
    /// The same number for all elements.
    Scalar(f64),
}

/// A function of one or two values; a function of one takes the first.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// What is computed.
    pub function: Function,
    /// Its numbers.
    pub params: Params,
    /// Its operands.
    pub args: [Value; 2],
}

impl Step {
    /// The operands that the function has.
    pub fn used_args(&self) -> &[Value] {
        match self.function {
            Function::One(_) => &self.args[..1],
            Function::Two(_) => &self.args,
        }
    }
}

/// Steps that are ready to run.
#[derive(Clone, Debug)]
pub struct Chain {
    steps: Vec<Placed>,
    results: usize,
    /// The gated unit that all steps are, if they are one.
    unit: Option<Unit>,
    /// Nanoseconds an element.
    ns: f32,
}

/// A step whose operands and result have places.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) function: Function,
    pub(crate) params: Params,
    pub(crate) args: [Place; 2],
    pub(crate) to: usize,
    /// Which of the chain's results it is.
    pub(crate) result: Option<usize>,
    /// Whether a later step reads it.
    is_read: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Operand(usize),
    Slot(usize),
    Scalar(f64),
}

impl Chain {
    /// The steps that lead to `results`, the others left out. `None` if one of them is no step, if too many intermediate results would be alive
    /// at once, or if there are more than [`MAX_OPERANDS`] operands or more than [`MAX_RESULTS`] results, none, or one
    /// twice.
    ///
    /// # Panics
    /// If a step reads one that is not before it.
    pub fn new(steps: &[Step], results: &[usize]) -> Option<Self> {
        let twice = results.iter().enumerate().any(|(i, result)| results[..i].contains(result));
        if results.is_empty() || results.len() > MAX_RESULTS || twice {
            return None;
        }
        let needed = needed(steps, results)?;
        let mut last_use: Vec<Option<usize>> = vec![None; steps.len()];
        for (i, step) in steps.iter().enumerate().filter(|(i, _)| needed[*i]) {
            for arg in step.used_args() {
                match *arg {
                    Value::Step(from) => {
                        assert!(from < i, "a step reads what comes later");
                        last_use[from] = Some(i);
                    }
                    Value::Operand(operand) if operand >= MAX_OPERANDS => return None,
                    Value::Operand(_) | Value::Scalar(_) => {}
                }
            }
        }
        let mut free: Vec<usize> = (0..MAX_SLOTS).rev().collect();
        let mut slots = vec![0; steps.len()];
        let mut placed = Vec::new();
        let mut ns = 0.0;
        for (i, step) in steps.iter().enumerate().filter(|(i, _)| needed[*i]) {
            // A function of one value has it twice.
            let args = step.args.map(|arg| match arg {
                Value::Operand(operand) => Place::Operand(operand),
                Value::Step(from) => Place::Slot(slots[from]),
                Value::Scalar(x) => Place::Scalar(x),
            });
            // A kernel may write over its operand.
            let mut ending: Vec<usize> =
                step.used_args().iter().filter_map(|arg| if let Value::Step(from) = *arg { Some(from) } else { None }).collect();
            ending.dedup();
            free.extend(ending.into_iter().filter(|&from| last_use[from] == Some(i)).map(|from| slots[from]));
            slots[i] = free.pop()?;
            let is_read = last_use[i].is_some();
            if !is_read {
                free.push(slots[i]);
            }
            ns += match step.function {
                Function::One(row) => row.ns,
                Function::Two(row) => row.ns,
            };
            let result = results.iter().position(|&result| result == i);
            placed.push(Placed { function: step.function, params: step.params, args, to: slots[i], result, is_read });
        }
        let needed: Vec<usize> = (0..steps.len()).filter(|&i| needed[i]).collect();
        Some(Self { steps: placed, results: results.len(), unit: Unit::of(steps, &needed, results), ns })
    }

    /// How many functions it computes for each element.
    pub fn count(&self) -> usize {
        self.steps.len()
    }

    /// The steps in their order, with the places that each reads and writes.
    pub(crate) fn steps(&self) -> &[Placed] {
        &self.steps
    }

    /// How many results there are.
    pub fn results(&self) -> usize {
        self.results
    }

    /// Writes each result to its output, element by element.
    ///
    /// # Panics
    /// If a function is not defined for `T`, an operand is missing, there are not as many outputs as results, of one shape and order of memory, or
    /// as [`super::apply`] does.
    pub fn apply<T: Stored, const M: usize>(&self, operands: &[Operand<'_, T>], mut outs: [Output<'_, T>; M]) {
        assert!(M == self.results && outs.iter().all(|out| out.shape == outs[0].shape && out.strides == outs[0].strides), "outputs");
        if self.unit.is_some_and(|unit| unit.run(self.ns::<T>(), operands, &mut outs)) {
            return;
        }
        let plan = Plan::new(&outs[0], self.ns::<T>(), sources(operands, &outs[0])).tiled();
        plan.run(outs.map(|out| out.data), &|inputs, outs: [*mut T; M], len| {
            let mut slots = [const { Tile::<T::Compute>::new() }; MAX_SLOTS];
            let slots = slots.as_mut_ptr().cast::<T::Compute>();
            // SAFETY: a tiled plan gives at most TILE elements at a time, and vouches for inputs and outputs.
            unsafe { self.tile::<T>(&inputs, slots, Target::Stored(&outs), len) }
        });
    }

    /// Nanoseconds an element.
    fn ns<T: Stored>(&self) -> f32 {
        self.ns.max(0.2) * cost_factor::<T>()
    }

    /// # Safety
    /// `inputs` and the results' `outs` must be valid for `len <= TILE` elements, `slots` for MAX_SLOTS tiles, side by side.
    unsafe fn tile<T: Stored>(&self, inputs: &[Input<T::Compute>; MAX_OPERANDS], slots: *mut T::Compute, outs: Target<'_, T>, len: usize) {
        let mut numbers = [const { Tile::<T::Compute, REPEATS>::new() }; 2];
        let numbers = numbers.each_mut().map(Tile::as_mut_ptr);
        for step in &self.steps {
            let place = |which: usize| match step.args[which] {
                Place::Operand(operand) => inputs[operand],
                Place::Slot(slot) => Input::of(slots.wrapping_add(slot * TILE)),
                // SAFETY: each has room for a number.
                Place::Scalar(x) => unsafe { repeated(numbers[which], scalar::<T>(x)) },
            };
            let (out, computed) = match (step.result, outs) {
                (Some(result), Target::Stored(outs)) => (Some(outs[result]), None),
                (Some(_), Target::Computed(to)) => (None, Some(to)),
                (None, _) => (None, None),
            };
            let to = match out {
                Some(out) if !T::CONVERTS && !step.is_read => out.cast(),
                _ => computed.unwrap_or(slots.wrapping_add(step.to * TILE)),
            };
            // SAFETY: all pointers are valid for `len` elements by the caller's contract; slots are tiles of their own, and a kernel
            // may write over an operand.
            unsafe {
                match step.function {
                    Function::One(row) => defined::<T::Compute, 1>(row)([place(0)], to, [1, len], step.params),
                    Function::Two(row) => defined::<T::Compute, 2>(row)([place(0), place(1)], to, [1, len], step.params),
                }
                if T::CONVERTS {
                    if let Some(out) = out {
                        T::narrow(to, out, len);
                    }
                    if step.is_read || computed.is_some() {
                        T::round(to, len);
                    }
                } else if let (Some(out), true) = (out, step.is_read) {
                    std::ptr::copy_nonoverlapping(to, out.cast(), len);
                }
            }
        }
    }
}

/// Where results go, rounded to the dtype either way.
#[derive(Clone, Copy)]
enum Target<'a, T: Stored> {
    /// As they are stored.
    Stored(&'a [*mut T]),
    /// The only one, in the type of the arithmetic.
    Computed(*mut T::Compute),
}

fn sources<'a, T: Stored>(operands: &[Operand<'a, T>], out: &Output<'_, T>) -> [Source<'a, T>; MAX_OPERANDS] {
    let mut all = [Operand::Unused; MAX_OPERANDS];
    all[..operands.len()].copy_from_slice(operands);
    all.map(|o| Source::new(o, out))
}

/// The results of a chain that are never in memory as a whole: a reduction makes them a tile at a time. It takes them for elements of a dense tensor
/// of this shape and these strides.
pub struct Results<'a, T: Stored> {
    chain: &'a Chain,
    sources: [Source<'a, T>; MAX_OPERANDS],
    shape: &'a [usize],
    strides: &'a [usize],
    numel: usize,
    /// Elements that are made at a time.
    tile: usize,
}

impl<'a, T: Stored> Results<'a, T> {
    /// The results of `chain` over these operands; `strides` are a permutation of a row-major layout without gaps.
    ///
    /// # Panics
    /// If the chain has several results, a view has another shape, or an operand is the output, of which there is none.
    pub fn new(chain: &'a Chain, operands: &[Operand<'a, T>], shape: &'a [usize], strides: &'a [usize]) -> Self {
        assert_eq!(chain.results(), 1, "one result is reduced");
        assert!(!operands.iter().any(|o| matches!(o, Operand::Output)), "results that are not in memory cannot be read");
        let sources = sources(operands, &Output { data: &mut [], shape, strides });
        let tile = sources.iter().find_map(Source::period).map_or(TILE, |period| TILE / period * period);
        Self { chain, sources, shape, strides, numel: shape.iter().product(), tile }
    }

    /// Writes the results from number `from` on, in the order of the memory that they are never in.
    fn write(&self, from: usize, to: &mut [T::Compute]) {
        assert!(from + to.len() <= self.numel, "results {from} to {} of {}", from + to.len(), self.numel);
        let mut slots = [const { Tile::<T::Compute>::new() }; MAX_SLOTS];
        let slots = slots.as_mut_ptr().cast::<T::Compute>();
        let mut rooms = Room::array::<MAX_OPERANDS>();
        let mut k = 0;
        let mut readers = rooms.each_mut().map(|room| {
            k += 1;
            Reader::new(&self.sources[k - 1], from, self.tile, room)
        });
        for (i, to) in to.chunks_mut(self.tile).enumerate() {
            // SAFETY: tiles are read in order from `from` on, of at most TILE elements, of which there are enough (asserted above); no source
            // is the output.
            let inputs = readers.each_mut().map(|r| unsafe { r.computed(from + i * self.tile, to.len(), std::ptr::null()) });
            // SAFETY: inputs and `to` have as many elements, and `slots` has room for MAX_SLOTS tiles.
            unsafe { self.chain.tile::<T>(&inputs, slots, Target::Computed(to.as_mut_ptr()), to.len()) }
        }
    }
}

impl<T: Stored<Compute = <T as Numeric>::Lane> + Numeric> Elements<T> for Results<'_, T> {
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn strides(&self) -> &[usize] {
        self.strides
    }
    fn offset(&self) -> usize {
        0
    }
    fn with_source<R>(&self, f: impl FnOnce(reduce::Source<'_, T::Lane>) -> R) -> R {
        let gather = |at: usize, stride: usize, to: &mut [T::Lane]| match stride {
            1 => self.write(at, to),
            _ => to.chunks_mut(1).enumerate().for_each(|(i, to)| self.write(at + i * stride, to)),
        };
        f(reduce::Source::made::<T>(self.chain.ns::<T>(), &gather))
    }
}

/// Which steps lead to `results`; `None` if one is no step.
fn needed(steps: &[Step], results: &[usize]) -> Option<Vec<bool>> {
    let mut needed = vec![false; steps.len()];
    for &result in results {
        *needed.get_mut(result)? = true;
    }
    for (i, step) in steps.iter().enumerate().rev() {
        if needed[i] {
            for arg in step.used_args() {
                if let Value::Step(from) = *arg {
                    needed[from] = true;
                }
            }
        }
    }
    Some(needed)
}

/// A number as an operand of a single function has it.
fn scalar<T: Stored>(x: f64) -> T::Compute {
    // A NaN without a payload, as rounding to a half takes them to be.
    crate::element::Element::from_f64(if x.is_nan() { f64::NAN } else { x })
}

fn defined<C: Compute, const N: usize>(row: &Row<N>) -> crate::pointwise::Tile<C, N> {
    match row.tile::<C>() {
        Some(tile) => tile,
        None => panic!("{} is not defined for this type", row.name),
    }
}

#[cfg(test)]
mod tests {
    use super::super::apply;
    use super::*;
    use crate::pointwise::{backward, binary, unary};
    use crate::view::StridedView;
    use half::bf16;

    fn step(function: Function, args: [Value; 2]) -> Step {
        Step { function, params: [0.0; 2], args }
    }

    /// (x + b)·gelu(x + b) − 0.3
    fn steps() -> [Step; 5] {
        let (x, b) = (Value::Operand(0), Value::Operand(1));
        [
            step(Function::Two(binary::Add::ROW), [x, b]),
            step(Function::One(unary::Exp::ROW), [x, x]),
            step(Function::One(unary::Gelu::ROW), [Value::Step(0), x]),
            step(Function::Two(binary::Mul::ROW), [Value::Step(0), Value::Step(2)]),
            step(Function::Two(binary::Sub::ROW), [Value::Step(3), Value::Scalar(0.3)]),
        ]
    }

    fn check<T: Stored>() {
        let (rows, cols) = (37, 129);
        let value = |i: usize| <T as crate::element::Element>::from_f64((i * 7919 % 1000) as f64 / 250.0 - 2.0);
        let x: Vec<T> = (0..rows * cols).map(value).collect();
        let b: Vec<T> = (0..cols).map(|i| value(i + 5)).collect();
        let (shape, strides) = ([rows, cols], [cols, 1]);
        fn view<'a, T>(data: &'a [T], shape: &'a [usize], strides: &'a [usize]) -> Operand<'a, T> {
            Operand::View(StridedView::new(data, 0, shape, strides).unwrap())
        }
        let run = |f: &dyn Fn(Output<'_, T>)| {
            let mut data = vec![T::default(); rows * cols];
            f(Output { data: &mut data, shape: &shape, strides: &strides });
            data
        };
        let (x, b) = (view(&x, &shape, &strides), view(&b, &shape, &[0, 1]));
        let sum = run(&|out| apply(binary::Add::ROW, [0.0; 2], [x, b], out));
        let sum = view(&sum, &shape, &strides);
        let gelu = run(&|out| apply(unary::Gelu::ROW, [0.0; 2], [sum], out));
        let product = run(&|out| apply(binary::Mul::ROW, [0.0; 2], [sum, view(&gelu, &shape, &strides)], out));
        let want = run(&|out| apply(binary::Sub::ROW, [0.0; 2], [view(&product, &shape, &strides), Operand::Scalar(0.3)], out));
        let got = run(&|out| Chain::new(&steps(), &[4]).unwrap().apply(&[x, b], [out]));
        assert!(want == got);
        let (mut first, mut second) = (vec![T::default(); rows * cols], vec![T::default(); rows * cols]);
        let outs = [&mut first, &mut second].map(|data| Output { data, shape: &shape, strides: &strides });
        Chain::new(&steps(), &[4, 2]).unwrap().apply(&[x, b], outs);
        assert!(want == first && gelu == second);
    }

    #[test]
    fn a_chain_equals_its_functions_one_by_one() {
        check::<f32>();
        check::<f64>();
        check::<bf16>();
    }

    /// Gates and their backward rows.
    const GATES: [(&Row<1>, &Row<2>); 3] =
        [(unary::Silu::ROW, backward::Silu::ROW), (unary::Gelu::ROW, backward::Gelu::ROW), (unary::GeluTanh::ROW, backward::GeluTanh::ROW)];

    /// A gated unit f(x)·u and its gradients against the functions one by one, x lying as its strides say.
    fn check_unit<T: Stored>(row: &'static Row<1>, backward: &'static Row<2>, x_strides: [usize; 2]) {
        let shape = [30, 101];
        let n = shape[0] * shape[1];
        let value = |i: usize| <T as crate::element::Element>::from_f64((i * 7919 % 1000) as f64 / 50.0 - 10.0);
        let [mut x, u, g]: [Vec<T>; 3] = [0, 5, 11].map(|from| (from..from + 2 * n).map(value).collect());
        let extremes = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 0.0, -0.0, 1e-40, 1e38, -1e38, 129.0, -87.5];
        x.iter_mut().zip(extremes).for_each(|(x, extreme)| *x = crate::element::Element::from_f64(extreme));
        let (x, u, g) =
            (Operand::View(StridedView::new(&x, 0, &shape, &x_strides).unwrap()), Operand::Dense(&u[..n]), Operand::Dense(&g[..n]));
        let run = |f: &dyn Fn(Output<'_, T>)| {
            let mut data = vec![T::default(); n];
            f(Output { data: &mut data, shape: &shape, strides: &[101, 1] });
            data
        };
        let two = |row, a, b| run(&|out| apply(row, [0.0; 2], [a, b], out));
        let f = run(&|out| apply(row, [0.0; 2], [x], out));
        let unit = two(binary::Mul::ROW, Operand::Dense(&f), u);
        let of_u = two(binary::Mul::ROW, g, Operand::Dense(&f));
        let product = two(binary::Mul::ROW, g, u);
        let of_x = two(backward, x, Operand::Dense(&product));
        let [x_at, u_at, g_at] = [0, 1, 2].map(Value::Operand);
        let steps = [
            step(Function::One(row), [x_at, x_at]),
            step(Function::Two(binary::Mul::ROW), [Value::Step(0), u_at]),
            step(Function::Two(binary::Mul::ROW), [g_at, Value::Step(0)]),
            step(Function::Two(binary::Mul::ROW), [u_at, g_at]),
            step(Function::Two(backward), [x_at, Value::Step(3)]),
        ];
        // Which of two NaN a product takes is open.
        let bits = |x: &[T]| x.iter().map(|x| x.to_f64()).map(|x| if x.is_nan() { f64::NAN } else { x }.to_bits()).collect::<Vec<_>>();
        let forward = Chain::new(&steps, &[1]).unwrap();
        assert!(matches!(forward.unit, Some(Unit::Forward(..))));
        assert!(bits(&run(&|out| forward.apply(&[x, u], [out]))) == bits(&unit), "{}", row.name);
        let number = Operand::Scalar(0.3);
        let scaled = two(binary::Mul::ROW, Operand::Dense(&f), number);
        assert!(bits(&run(&|out| forward.apply(&[x, number], [out]))) == bits(&scaled), "{} of a number", row.name);
        for results in [[2, 4], [4, 2]] {
            let chain = Chain::new(&steps, &results).unwrap();
            assert!(matches!(chain.unit, Some(Unit::Backward { .. })));
            let mut got = [vec![T::default(); n], vec![T::default(); n]];
            let outs = got.each_mut().map(|data| Output { data, shape: &shape, strides: &[101, 1] });
            chain.apply(&[x, u, g], outs);
            let want = if results[0] == 2 { [&of_u, &of_x] } else { [&of_x, &of_u] };
            assert!(bits(&got[0]) == bits(want[0]) && bits(&got[1]) == bits(want[1]), "{} {results:?}", row.name);
        }
        // f(x + u) + g
        let sum = two(binary::Add::ROW, x, u);
        let of_sum = run(&|out| apply(row, [0.0; 2], [Operand::Dense(&sum)], out));
        let residual = two(binary::Add::ROW, Operand::Dense(&of_sum), g);
        for (inner, outer) in [([x_at, u_at], [g_at, Value::Step(1)]), ([u_at, x_at], [Value::Step(1), g_at])] {
            let add = |args| step(Function::Two(binary::Add::ROW), args);
            let chain = Chain::new(&[add(inner), step(Function::One(row), [Value::Step(0), x_at]), add(outer)], &[2]).unwrap();
            assert!(matches!(chain.unit, Some(Unit::Residual(..))));
            assert!(bits(&run(&|out| chain.apply(&[x, u, g], [out]))) == bits(&residual), "{} and a residual", row.name);
        }
    }

    #[test]
    fn gated_units_have_the_bits_of_their_functions() {
        for (row, backward) in GATES {
            for x_strides in [[101, 1], [202, 2], [202, 1], [1, 30], [0, 1]] {
                check_unit::<f32>(row, backward, x_strides);
                check_unit::<f64>(row, backward, x_strides);
                check_unit::<bf16>(row, backward, x_strides);
                check_unit::<half::f16>(row, backward, x_strides);
            }
        }
    }

    #[test]
    fn what_looks_like_a_gated_unit_is_none() {
        let [x, u, g] = [0, 1, 2].map(Value::Operand);
        let gate = step(Function::One(unary::Silu::ROW), [x, x]);
        let mul = |a, b| step(Function::Two(binary::Mul::ROW), [a, b]);
        let last = |value| step(Function::Two(backward::Silu::ROW), [x, value]);
        let is_unit = |steps: &[Step], results: &[usize]| Chain::new(steps, results).unwrap().unit.is_some();
        let f = Value::Step(0);
        assert!(is_unit(&[gate, mul(g, f), mul(g, u), last(Value::Step(2))], &[1, 3]));
        assert!(!is_unit(&[gate, mul(g, f), mul(g, u), step(Function::Two(backward::Gelu::ROW), [x, Value::Step(2)])], &[1, 3]));
        assert!(!is_unit(&[gate, mul(g, f), mul(x, u), last(Value::Step(2))], &[1, 3]));
        assert!(!is_unit(&[gate, mul(g, f), mul(g, u), last(Value::Step(1))], &[2, 3]));
        assert!(!is_unit(&[gate, mul(g, f), mul(g, u), step(Function::Two(backward::Silu::ROW), [u, Value::Step(2)])], &[1, 3]));
        assert!(!is_unit(&[gate, mul(f, f)], &[1]));
        assert!(!is_unit(&[gate, step(Function::Two(binary::Add::ROW), [f, u])], &[1]));
        assert!(!is_unit(&[gate, mul(u, g), mul(Value::Step(1), f)], &[2]));
        let (add, of_sum) = (|a, b| step(Function::Two(binary::Add::ROW), [a, b]), step(Function::One(unary::Silu::ROW), [f, x]));
        assert!(is_unit(&[add(x, u), of_sum, add(Value::Step(1), g)], &[2]));
        assert!(!is_unit(&[add(x, u), of_sum, mul(Value::Step(1), g)], &[2]));
        assert!(!is_unit(&[mul(x, u), of_sum, add(Value::Step(1), g)], &[2]));
        assert!(!is_unit(&[add(x, u), of_sum, add(Value::Step(1), f)], &[2]));
        assert!(!is_unit(&[add(x, Value::Scalar(1.0)), of_sum, add(Value::Step(1), g)], &[2]));
        assert!(!is_unit(&[step(Function::One(unary::Relu::ROW), [x, x]), mul(f, u)], &[1]));
    }

    /// Sums over results that are never in memory against those over the results in memory.
    fn check_sums<T>(rows: usize, cols: usize)
    where
        T: Stored<Compute = <T as Numeric>::Lane> + Numeric,
    {
        let value = |i: usize| <T as crate::element::Element>::from_f64((i * 7919 % 1000) as f64 / 250.0 - 2.0);
        let x: Vec<T> = (0..rows * cols).map(value).collect();
        let b: Vec<T> = (0..rows.max(cols)).map(|i| value(i + 5)).collect();
        let (shape, row_major) = ([rows, cols], [cols, 1]);
        let chain = Chain::new(&steps(), &[4]).unwrap();
        for strides in [row_major, [1, rows]] {
            for bias in [[0, 1], [1, 0]] {
                let x = Operand::View(StridedView::new(&x, 0, &shape, &row_major).unwrap());
                let b = Operand::View(StridedView::new(&b, 0, &shape, &bias).unwrap());
                let mut whole = vec![T::default(); rows * cols];
                chain.apply(&[x, b], [Output { data: &mut whole, shape: &shape, strides: &strides }]);
                for axes in [[true, true], [true, false], [false, true], [false, false]] {
                    let outputs: usize = (0..2).filter(|&d| !axes[d]).map(|d| shape[d]).product();
                    let (mut want, mut got) = (vec![T::Total::default(); outputs], vec![T::Total::default(); outputs]);
                    reduce::sum(StridedView::new(&whole, 0, &shape, &strides).unwrap(), &axes, &mut want);
                    reduce::sum_of::<T>(Results::new(&chain, &[x, b], &shape, &strides), &axes, &mut got);
                    assert!(want == got, "{shape:?} {strides:?} {bias:?} {axes:?}");
                }
            }
        }
    }

    #[test]
    fn sums_of_results_equal_those_of_the_results_in_memory() {
        for (rows, cols) in [(37, 129), (1, 1), (3, 0), (2, 140_003), (140_003, 2), (300, 1100), (5000, 31), (5000, 7)] {
            check_sums::<f32>(rows, cols);
            check_sums::<f64>(rows, cols);
            check_sums::<bf16>(rows, cols);
        }
    }

    #[test]
    fn steps_that_lead_nowhere_are_left_out() {
        assert_eq!(Chain::new(&steps(), &[4]).unwrap().steps.len(), 4);
        assert_eq!(Chain::new(&steps(), &[1]).unwrap().steps.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_no_chain() {
        assert!(Chain::new(&[], &[0]).is_none());
        assert!(Chain::new(&steps(), &[]).is_none());
        assert!(Chain::new(&steps(), &[0, 1, 2, 3]).is_none());
        assert!(Chain::new(&steps(), &[4, 4]).is_none());
        assert!(Chain::new(&[step(Function::One(unary::Exp::ROW), [Value::Operand(MAX_OPERANDS); 2])], &[0]).is_none());
        // Ten results, all alive until the sums begin.
        let mut many: Vec<Step> = (0..10).map(|_| step(Function::One(unary::Exp::ROW), [Value::Operand(0); 2])).collect();
        for i in 0..9 {
            let before = if i == 0 { 0 } else { 9 + i };
            many.push(step(Function::Two(binary::Add::ROW), [Value::Step(before), Value::Step(i + 1)]));
        }
        assert!(Chain::new(&many, &[18]).is_none());
    }
}
