//! Chains of pointwise functions in one pass over memory: tile by tile, each step's results stay in the first-level cache. A chain may have
//! several results, as the gradients of a function of several operands are.
//!
//! A result is bit for bit that of the same functions one after the other: every step runs the same kernel, and is rounded to the dtype.

use super::{Operand, Output, Plan, Source, TILE, cost_factor, fill};
use crate::cpu::cast::Stored;
use crate::pointwise::{Compute, Params, Row};
use std::mem::MaybeUninit;

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
        Some(Self { steps: placed, results: results.len(), ns })
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
    pub fn apply<T: Stored, const M: usize>(&self, operands: &[Operand<'_, T>], outs: [Output<'_, T>; M]) {
        assert!(M == self.results && outs.iter().all(|out| out.shape == outs[0].shape && out.strides == outs[0].strides), "outputs");
        let mut all = [Operand::Unused; MAX_OPERANDS];
        all[..operands.len()].copy_from_slice(operands);
        let plan = Plan::new(&outs[0], self.ns.max(0.2) * cost_factor::<T>(), all.map(|o| Source::new(o, &outs[0]))).tiled();
        plan.run(outs.map(|out| out.data), &|inputs, outs: [*mut T; M], len| {
            let mut slots = MaybeUninit::<[[T::Compute; TILE]; MAX_SLOTS]>::uninit();
            let slots = slots.as_mut_ptr().cast::<T::Compute>();
            // SAFETY: a tiled plan gives at most TILE elements at a time, and vouches for inputs and outputs.
            unsafe { self.tile::<T>(&inputs, slots, &outs, len) }
        });
    }

    /// # Safety
    /// `inputs` and the results' `outs` must be valid for `len <= TILE` elements, `slots` for MAX_SLOTS tiles.
    unsafe fn tile<T: Stored>(&self, inputs: &[*const T::Compute; MAX_OPERANDS], slots: *mut T::Compute, outs: &[*mut T], len: usize) {
        let mut scalars = MaybeUninit::<[[T::Compute; TILE]; 2]>::uninit();
        let scalars = scalars.as_mut_ptr().cast::<T::Compute>();
        for step in &self.steps {
            let place = |which: usize| match step.args[which] {
                Place::Operand(operand) => inputs[operand],
                Place::Slot(slot) => slots.wrapping_add(slot * TILE).cast_const(),
                // SAFETY: `scalars` has room for two tiles.
                Place::Scalar(x) => unsafe { fill(scalars.add(which * TILE), scalar::<T>(x), len) },
            };
            let out = step.result.map(|result| outs[result]);
            let to = match out {
                Some(out) if !T::CONVERTS && !step.is_read => out.cast(),
                _ => slots.wrapping_add(step.to * TILE),
            };
            // SAFETY: all pointers are valid for `len` elements by the caller's contract; slots are tiles of their own, and a kernel
            // may write over an operand.
            unsafe {
                match step.function {
                    Function::One(row) => defined::<T::Compute, 1>(row)([place(0)], to, len, step.params),
                    Function::Two(row) => defined::<T::Compute, 2>(row)([place(0), place(1)], to, len, step.params),
                }
                if T::CONVERTS {
                    if let Some(out) = out {
                        T::narrow(to, out, len);
                    }
                    if step.is_read {
                        T::round(to, len);
                    }
                } else if let (Some(out), true) = (out, step.is_read) {
                    std::ptr::copy_nonoverlapping(to, out.cast(), len);
                }
            }
        }
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
    crate::element::Element::from_f64(x)
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
    use crate::pointwise::{binary, unary};
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
