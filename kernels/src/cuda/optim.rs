//! Optimiser updates on a GPU: a whole list of tensors in one launch (some eighty tensors each).
//!
//! Any [`Rule`] runs here: it is applied once to symbols, which note every operation, and the note becomes the kernel's formula. The constants are
//! the launch's arguments, so a new learning rate or step count compiles nothing. The f32 and f64 results are the processor's, bit for bit.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Launch, impl_arg};
use super::memory::{DevicePtr, Slice, SliceMut, Type};
use crate::cpu::optim::{Rule, Value};
use std::cell::RefCell;
use std::fmt::Write as _;
use std::ops::{Add, Div, Mul, Neg, Sub};

const SOURCE: Source = Source { name: "optim", text: include_str!("optim.cu") };

/// Elements of a block: `CHUNK` of the kernel file.
const CHUNK: usize = 4096;

/// What a launch's parameters have room for: `Table` and `Constants` of the kernel file.
const TABLE: usize = 480;
const CONSTANTS: usize = 24;

#[repr(C)]
struct Table([u64; TABLE]);
#[repr(C)]
struct Constants<A>([A; CONSTANTS]);
impl_arg!(Table, Constants<f32>, Constants<f64>);

/// One tensor's elements, all of one length.
#[derive(Debug)]
pub struct Slot<'a, const N: usize> {
    /// The parameter, updated in place.
    pub param: SliceMut<'a>,
    /// Its gradient, of the parameter's type.
    pub grad: Slice<'a>,
    /// The rule's states in its order, updated in place: f32 for f16 and bf16 parameters, else of the parameter's type.
    pub states: [SliceMut<'a>; N],
}

/// What every gradient is multiplied by, rounded to the type of the arithmetic first. NaN leaves everything as it is.
#[derive(Clone, Copy, Debug)]
pub enum Factor<'a> {
    /// This number.
    Number(f64),
    /// One f64 in the GPU's memory, which the host need not know.
    Device(Slice<'a>),
}

/// Updates every tensor of the list. f16 and bf16 parameters are updated in f32 and rounded once.
///
/// # Errors
/// If the rule has more than 24 constants, or a launch fails.
///
/// # Panics
/// If the slices of a slot differ in length, or have other types than said.
pub fn step<const N: usize>(gpu: &'static Gpu, rule: &impl Rule<N>, factor: Factor<'_>, slots: &[Slot<'_, N>]) -> Result<(), CudaError> {
    for slot in slots {
        let (n, ty) = (slot.param.len(), slot.param.ty());
        let state = state_type(ty);
        assert!(
            ty.is_float() && slot.grad.ty() == ty && slot.states.iter().all(|s| s.ty() == state),
            "types of parameter, gradient and states"
        );
        assert!(slot.grad.len() == n && slot.states.iter().all(|s| s.len() == n), "parameter, gradient and states differ in length");
    }
    assert!(!matches!(&factor, Factor::Device(x) if x.ty() != Type::F64 || x.len() != 1), "a factor is one f64");
    if slots.is_empty() {
        return Ok(());
    }
    let formula = Formula::of(rule)?;
    for ty in [Type::F32, Type::F64, Type::F16, Type::BF16] {
        let mut of_type = slots.iter().filter(|slot| slot.param.ty() == ty && !slot.param.is_empty()).peekable();
        while of_type.peek().is_some() {
            launch(gpu, &formula, factor, ty, &mut of_type)?;
        }
    }
    Ok(())
}

fn state_type(param: Type) -> Type {
    if matches!(param, Type::F16 | Type::BF16) { Type::F32 } else { param }
}

/// Updates as many tensors as one launch can take.
fn launch<'a, 's: 'a, const N: usize>(
    gpu: &'static Gpu,
    formula: &Formula,
    factor: Factor<'_>,
    ty: Type,
    slots: &mut impl Iterator<Item = &'a Slot<'s, N>>,
) -> Result<(), CudaError> {
    let mut table = Table([0; TABLE]);
    let (mut count, mut blocks) = (0, 0);
    for (words, slot) in table.0.chunks_exact_mut(4 + N).zip(slots) {
        words[..4].copy_from_slice(&[slot.param.len() as u64, blocks as u64, slot.param.ptr().address(), slot.grad.ptr().address()]);
        words[4..].iter_mut().zip(&slot.states).for_each(|(word, state)| *word = state.ptr().address());
        blocks += slot.param.len().div_ceil(CHUNK);
        count += 1;
    }
    const STATES: [&str; 9] = ["0", "1", "2", "3", "4", "5", "6", "7", "8"];
    let states = STATES.get(N).ok_or_else(|| CudaError::Unavailable(format!("a rule of {N} states: eight are the most")))?;
    let kernel = gpu.module(&SOURCE, &[("T", ty.name()), ("STATES", states), ("RULE", &formula.text)])?.kernel("optim_step")?;
    let grid = Launch::blocks(blocks, 256);
    let (at, number) = match factor {
        Factor::Number(number) => (DevicePtr::NULL, number),
        Factor::Device(x) => (x.ptr(), 1.0),
    };
    // SAFETY: the table holds `count` tensors whose blocks add up to the grid; every slice covers its length, which the kernel does not leave,
    // and those that are written are borrowed mutably. The constants have the type that the kernel computes in; a factor in memory is one f64.
    unsafe {
        match ty {
            Type::F64 => kernel.launch(grid, &[&table, &count, &Constants(formula.constants), &at, &number]),
            _ => kernel.launch(grid, &[&table, &count, &Constants(formula.constants.map(|c| c as f32)), &at, &number]),
        }
    }
}

/// A rule, written down.
struct Formula {
    /// C++ statements.
    text: String,
    constants: [f64; CONSTANTS],
}

#[derive(Default)]
struct Notes {
    text: String,
    symbols: usize,
    constants: Vec<f64>,
}

thread_local! {
    /// What the rule that is being written down did so far.
    static NOTES: RefCell<Notes> = RefCell::default();
}

/// The name of a value in a formula: `v0`, `v1`, …
#[derive(Clone, Copy)]
struct Symbol(usize);

/// A new symbol for what `write` says.
fn note(write: impl FnOnce(&mut Notes)) -> Symbol {
    NOTES.with_borrow_mut(|notes| {
        let symbol = Symbol(notes.symbols);
        notes.symbols += 1;
        let _ = write!(notes.text, "A v{}=", symbol.0);
        write(notes);
        notes.text.push(';');
        symbol
    })
}

fn call(function: &str, arguments: &[Symbol]) -> Symbol {
    note(|notes| {
        notes.text.push_str(function);
        for (i, argument) in arguments.iter().enumerate() {
            let _ = write!(notes.text, "{}v{}", if i == 0 { '(' } else { ',' }, argument.0);
        }
        notes.text.push(')');
    })
}

impl Formula {
    fn of<const N: usize>(rule: &impl Rule<N>) -> Result<Self, CudaError> {
        NOTES.take();
        let named = |name: &str| note(|notes| notes.text.push_str(name));
        let (param, grad) = (named("p"), named("g"));
        let states = std::array::from_fn(|k| named(&format!("s[{k}]")));
        let (param, states) = rule.update(param, grad, states);
        let mut notes = NOTES.take();
        let _ = write!(notes.text, "p=v{};", param.0);
        for (k, state) in states.iter().enumerate() {
            let _ = write!(notes.text, "s[{k}]=v{};", state.0);
        }
        let mut constants = [0.0; CONSTANTS];
        let room = constants.get_mut(..notes.constants.len());
        let room = room.ok_or_else(|| CudaError::Unavailable(format!("an optimiser's rule may have {CONSTANTS} constants on a GPU")))?;
        room.copy_from_slice(&notes.constants);
        Ok(Self { text: notes.text, constants })
    }
}

macro_rules! operators {
    ($($operator:ident, $method:ident, $function:literal;)*) => { $(
        impl $operator for Symbol {
            type Output = Symbol;
            fn $method(self, other: Symbol) -> Symbol {
                call($function, &[self, other])
            }
        }
    )* };
}
operators! { Add, add, "add"; Sub, sub, "sub"; Mul, mul, "mul"; Div, div, "div"; }

impl Neg for Symbol {
    type Output = Symbol;
    fn neg(self) -> Symbol {
        call("neg", &[self])
    }
}

impl Value for Symbol {
    fn constant(self, x: f64) -> Self {
        note(|notes| {
            let _ = write!(notes.text, "c[{}]", notes.constants.len());
            notes.constants.push(x);
        })
    }
    fn root(self) -> Self {
        call("root", &[self])
    }
    fn larger(self, other: Self) -> Self {
        call("larger", &[self, other])
    }
    fn sign(self) -> Self {
        call("sign", &[self])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::optim::{self, Adam, Lion, RmsProp, Sgd};
    use crate::cuda::testing::{Values, device};
    use crate::element::Float;
    use half::{bf16, f16};

    /// Of the gradients.
    const FACTOR: f64 = 0.7;

    /// Values in (-2, 2), zero among them.
    fn values(n: usize, salt: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7919 + salt * 104_729) % 4001) as f64 / 1000.0 - 2.0).collect()
    }

    /// Two steps of tensors of every type against the processor's.
    fn check<const N: usize, R: Rule<N>>(rule: impl Fn(u64) -> R) {
        let Some(gpu) = device() else { return };
        let sizes = [0, 1, 7, 16, 37, CHUNK, 2 * CHUNK + 5];
        let round = |ty: Type, x: f64| match ty {
            Type::F32 => x as f32 as f64,
            Type::F16 => f16::narrow(x as f32).to_f64(),
            Type::BF16 => bf16::narrow(x as f32).to_f64(),
            _ => x,
        };
        for ty in [Type::F32, Type::F64, Type::F16, Type::BF16] {
            let mut expected: Vec<(Vec<f64>, [Vec<f64>; N])> = sizes
                .iter()
                .map(|&n| (values(n, 1).iter().map(|&x| round(ty, x)).collect(), std::array::from_fn(|_| vec![0.0; n])))
                .collect();
            let mut params: Vec<Values> = expected.iter().map(|(p, _)| Values::new(gpu, ty, p)).collect();
            let mut states: Vec<[Values; N]> =
                sizes.iter().map(|&n| std::array::from_fn(|_| Values::new(gpu, state_type(ty), &vec![0.0; n]))).collect();
            for t in 1..=2 {
                let grads: Vec<Vec<f64>> = sizes.iter().map(|&n| values(n, 9 + t).iter().map(|&x| round(ty, x)).collect()).collect();
                let on_gpu: Vec<Values> = grads.iter().map(|g| Values::new(gpu, ty, g)).collect();
                let each = params.iter_mut().zip(&mut states).zip(&on_gpu);
                let slots =
                    each.map(|((p, s), g)| Slot { param: p.slice_mut(), grad: g.slice(), states: s.each_mut().map(|s| s.slice_mut()) });
                let factor = Values::new(gpu, Type::F64, &[FACTOR]);
                let factor = if t == 1 { Factor::Number(FACTOR) } else { Factor::Device(factor.slice()) };
                step(gpu, &rule(t as u64), factor, &slots.collect::<Vec<_>>()).unwrap();
                for ((p, s), g) in expected.iter_mut().zip(&grads) {
                    step_on_host(&rule(t as u64), ty, p, g, s);
                    p.iter_mut().for_each(|x| *x = round(ty, *x));
                }
            }
            for ((p, s), (param, state)) in expected.iter().zip(params.iter().zip(&states)) {
                assert_eq!(*p, param.read(), "{ty:?}");
                assert!(s.iter().zip(state).all(|(s, state)| *s == state.read()), "{ty:?}");
            }
        }
    }

    /// In f64, or in f32 for the other types.
    fn step_on_host<const N: usize>(rule: &impl Rule<N>, ty: Type, p: &mut [f64], g: &[f64], s: &mut [Vec<f64>; N]) {
        if ty == Type::F64 {
            return optim::step_scaled(rule, FACTOR, vec![optim::Slot { param: p, grad: g, states: s.each_mut().map(|s| &mut s[..]) }]);
        }
        let single = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
        let (mut p32, g32, mut s32) = (single(p), single(g), s.each_ref().map(|s| single(s)));
        optim::step_scaled(rule, FACTOR, vec![optim::Slot { param: &mut p32, grad: &g32, states: s32.each_mut().map(|s| &mut s[..]) }]);
        let widen = |to: &mut [f64], from: &[f32]| to.iter_mut().zip(from).for_each(|(t, &f)| *t = f as f64);
        widen(p, &p32);
        s.iter_mut().zip(&s32).for_each(|(s, s32)| widen(s, s32));
    }

    #[test]
    fn sgd_as_on_the_processor() {
        let rule = Sgd { lr: 0.1, momentum: 0.9, dampening: 0.2, weight_decay: 0.01, nesterov: false, first_step: false };
        check::<0, _>(|_| rule);
        check::<1, _>(|t| Sgd { nesterov: true, first_step: t == 1, ..rule });
    }

    #[test]
    fn adam_as_on_the_processor() {
        let rule = |step| Adam { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-3, weight_decay: 0.1, decoupled: true, step };
        check::<2, _>(rule);
        check::<3, _>(|step| Adam { decoupled: false, ..rule(step) });
    }

    #[test]
    fn rmsprop_and_lion_as_on_the_processor() {
        let rule = RmsProp { lr: 0.01, alpha: 0.9, eps: 0.1, weight_decay: 0.0, momentum: 0.8 };
        check::<1, _>(|_| rule);
        check::<2, _>(|_| rule);
        check::<3, _>(|_| rule);
        check::<1, _>(|_| Lion { lr: 0.01, beta1: 0.9, beta2: 0.98, weight_decay: 0.1 });
    }

    #[test]
    fn more_tensors_than_one_launch_takes() {
        let Some(gpu) = device() else { return };
        let mut params: Vec<Values> = (0..200).map(|n| Values::new(gpu, Type::F32, &vec![1.0; n % 9])).collect();
        let grads: Vec<Values> = (0..200).map(|n| Values::new(gpu, Type::F32, &vec![n as f64; n % 9])).collect();
        let rule = Sgd { lr: 0.5, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false, first_step: false };
        let slots = params.iter_mut().zip(&grads).map(|(p, g)| Slot { param: p.slice_mut(), grad: g.slice(), states: [] });
        step::<0>(gpu, &rule, Factor::Number(1.0), &slots.collect::<Vec<_>>()).unwrap();
        let slots = params.iter_mut().zip(&grads).map(|(p, g)| Slot { param: p.slice_mut(), grad: g.slice(), states: [] });
        step::<0>(gpu, &rule, Factor::Number(f64::NAN), &slots.collect::<Vec<_>>()).unwrap();
        assert!(params.iter().enumerate().all(|(n, p)| p.read().iter().all(|&x| x == 1.0 - n as f64 / 2.0)));
    }
}
