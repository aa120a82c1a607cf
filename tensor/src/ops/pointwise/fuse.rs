//! [`fuse`]: a chain of pointwise operations as one pass over memory, and its gradients as one more.
//!
//! A closure over [`Expr`] is traced once. Result and gradients are bit for bit those of the same operations on tensors: each step runs
//! the same kernel, is rounded to the dtype, and gradients add up in the engine's order. What the passes cannot do (integers, steps that are smaller
//! than the result by broadcasting, second derivatives) is done by the operations themselves.

mod gate;

use super::kernel::{Arg, common_shape, gpu_operand, gpu_output, operand, result_layout};
use crate::autocast::together;
use crate::graph::{Ctx, Grads, Op, Source, is_grad_enabled, record};
use crate::profile::{Cost, operation_with};
use crate::{Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::pointwise::chain::{Chain, Function, MAX_OPERANDS, MAX_RESULTS, Step, Value};
use kiln_kernels::cpu::pointwise::{Operand, Output};
use kiln_kernels::cuda::pointwise as gpu_kernels;
use kiln_kernels::pointwise::{Params, Row, backward, binary, unary};
use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Sub};
use std::rc::Rc;
use std::sync::Arc;

/// Whether two rows are one: names are unique, and the address of a constant need not be.
fn is<const N: usize>(a: &Row<N>, b: &Row<N>) -> bool {
    a.name == b.name
}

/// The steps of a chain and of its gradients.
#[derive(Clone, Default)]
struct Trace {
    steps: Vec<Step>,
    /// Whether a value of another trace was used.
    mixed: bool,
}

impl Trace {
    fn append(&mut self, step: Step) -> Value {
        self.steps.push(step);
        Value::Step(self.steps.len() - 1)
    }

    /// A step of a gradient: the one that there is, if it computes the same.
    fn push(&mut self, function: Function, params: Params, args: [Value; 2]) -> Value {
        let same = |a: &Function, b: &Function| match (a, b) {
            (Function::One(a), Function::One(b)) => is(a, b),
            (Function::Two(a), Function::Two(b)) => is(a, b),
            _ => false,
        };
        let step = Step { function, params, args };
        let found = self.steps.iter().position(|s| same(&s.function, &function) && s.params == params && s.used_args() == step.used_args());
        found.map_or_else(|| self.append(step), Value::Step)
    }

    fn one(&mut self, row: &'static Row<1>, x: Value) -> Value {
        self.push(Function::One(row), [0.0; 2], [x; 2])
    }

    fn two(&mut self, row: &'static Row<2>, a: Value, b: Value) -> Value {
        self.push(Function::Two(row), [0.0; 2], [a, b])
    }
}

/// A value inside of a function that is being traced by [`fuse`]: one of its arguments, or computed from them.
///
/// It has the operators of numbers, also with `f64`, and the functions below, each of the same name as the operation on tensors.
#[derive(Clone)]
pub struct Expr {
    value: Value,
    trace: Rc<RefCell<Trace>>,
}

impl Expr {
    fn step(&self, function: Function, params: Params, args: [Value; 2]) -> Expr {
        let value = self.trace.borrow_mut().append(Step { function, params, args });
        Expr { value, trace: self.trace.clone() }
    }

    fn map(&self, row: &'static Row<1>, params: Params) -> Expr {
        self.step(Function::One(row), params, [self.value; 2])
    }

    fn zip(&self, row: &'static Row<2>, args: [Value; 2]) -> Expr {
        self.step(Function::Two(row), [0.0; 2], args)
    }

    fn zip_with(&self, row: &'static Row<2>, other: &Expr) -> Expr {
        if !Rc::ptr_eq(&self.trace, &other.trace) {
            self.trace.borrow_mut().mixed = true;
        }
        self.zip(row, [self.value, other.value])
    }
}

/// The gradients of a step's operands: from its operands, its result, its parameters and the result's gradient.
type Gradient = fn(&mut Trace, [Value; 2], Value, Params, Value) -> [Option<Value>; 2];

/// Functions of one value: the method, its row and parameters, the operation on tensors, the gradient as it makes it.
macro_rules! functions {
    ($($name:ident($($param:ident),*) = $row:ident [$($value:expr),*], |$t:ident, $x:ident, $y:ident, $p:pat_param, $g:ident| $gradient:expr;)*) => {
        impl Expr {
            $(
                #[doc = concat!("[`Tensor::", stringify!($name), "`].")]
                pub fn $name(&self $(, $param: f64)*) -> Expr {
                    let mut params = [0.0; 2];
                    let values: &[f64] = &[$($value),*];
                    params[..values.len()].copy_from_slice(values);
                    self.map(unary::$row::ROW, params)
                }
            )*
        }

        /// The operation that a row of one operand stands for.
        fn composed_one(row: &'static Row<1>, params: Params, x: &Tensor) -> Result<Tensor> {
            $(
                if is(row, unary::$row::ROW) {
                    let [$($param,)* ..] = params;
                    return x.$name($($param),*);
                }
            )*
            Err(Error::argument("fuse", format!("{} cannot be traced", row.name)))
        }

        fn gradient_of_one(row: &'static Row<1>) -> Option<Gradient> {
            $(
                if is(row, unary::$row::ROW) {
                    return Some(|$t, [$x, _], $y, $p, $g| [Some($gradient), None]);
                }
            )*
            None
        }
    };
}

functions! {
    neg() = Neg[], |t, _x, _y, _, g| t.one(unary::Neg::ROW, g);
    abs() = Abs[], |t, x, _y, _, g| t.two(backward::Abs::ROW, x, g);
    exp() = Exp[], |t, _x, y, _, g| t.two(binary::Mul::ROW, g, y);
    expm1() = Expm1[], |t, _x, y, _, g| t.two(backward::Expm1::ROW, y, g);
    log() = Log[], |t, x, _y, _, g| t.two(binary::Div::ROW, g, x);
    log1p() = Log1p[], |t, x, _y, _, g| t.two(backward::Log1p::ROW, x, g);
    sqrt() = Sqrt[], |t, _x, y, _, g| t.two(backward::Sqrt::ROW, y, g);
    rsqrt() = Rsqrt[], |t, _x, y, _, g| t.two(backward::Rsqrt::ROW, y, g);
    recip() = Recip[], |t, _x, y, _, g| t.two(backward::Recip::ROW, y, g);
    square() = Square[], |t, x, _y, _, g| t.two(backward::Square::ROW, x, g);
    sin() = Sin[], |t, x, _y, _, g| t.two(backward::Sin::ROW, x, g);
    cos() = Cos[], |t, x, _y, _, g| t.two(backward::Cos::ROW, x, g);
    erf() = Erf[], |t, x, _y, _, g| t.two(backward::Erf::ROW, x, g);
    tanh() = Tanh[], |t, _x, y, _, g| t.two(backward::Tanh::ROW, y, g);
    sigmoid() = Sigmoid[], |t, _x, y, _, g| t.two(backward::Sigmoid::ROW, y, g);
    relu() = Relu[], |t, _x, y, _, g| t.two(backward::Relu::ROW, y, g);
    gelu() = Gelu[], |t, x, _y, _, g| t.two(backward::Gelu::ROW, x, g);
    gelu_tanh() = GeluTanh[], |t, x, _y, _, g| t.two(backward::GeluTanh::ROW, x, g);
    silu() = Silu[], |t, x, _y, _, g| t.two(backward::Silu::ROW, x, g);
    mish() = Mish[], |t, x, _y, _, g| t.two(backward::Mish::ROW, x, g);
    hardswish() = Hardswish[], |t, x, _y, _, g| t.two(backward::Hardswish::ROW, x, g);
    leaky_relu(slope) = LeakyRelu[slope], |t, x, _y, p, g| t.push(Function::Two(backward::LeakyRelu::ROW), p, [x, g]);
    elu(alpha) = Elu[alpha], |t, x, _y, p, g| t.push(Function::Two(backward::Elu::ROW), p, [x, g]);
    clamp(low, high) = Clamp[low, high], |t, x, _y, p, g| t.push(Function::Two(backward::Clamp::ROW), p, [x, g]);
}

/// The gradients of `a + b` and so on, as the operations on tensors make them, numbers included.
fn gradient_of_two(row: &'static Row<2>) -> Option<Gradient> {
    let is = |other| is(row, other);
    Some(if is(binary::Add::ROW) {
        |_, _, _, _, g| [Some(g); 2]
    } else if is(binary::Sub::ROW) {
        |t, _, _, _, g| [Some(g), Some(t.one(unary::Neg::ROW, g))]
    } else if is(binary::Mul::ROW) {
        |t, [a, b], _, _, g| [Some(t.two(binary::Mul::ROW, g, b)), Some(t.two(binary::Mul::ROW, g, a))]
    } else if is(binary::Div::ROW) {
        |t, [a, b], _, _, g| {
            let first = t.two(binary::Div::ROW, g, b);
            let second = if let Value::Scalar(number) = a {
                let slope = t.one(unary::Recip::ROW, b);
                let slope = t.one(unary::Square::ROW, slope);
                let product = t.two(binary::Mul::ROW, g, slope);
                t.two(binary::Mul::ROW, product, Value::Scalar(-number))
            } else {
                let quotient = t.two(binary::Div::ROW, a, b);
                let product = t.two(binary::Mul::ROW, first, quotient);
                t.one(unary::Neg::ROW, product)
            };
            [Some(first), Some(second)]
        }
    } else {
        return None;
    })
}

/// An operand of a step, once there are tensors.
enum Argument<'a> {
    Tensor(&'a Tensor),
    Number(f64),
}

/// The operation that a row of two operands stands for.
fn composed_two(row: &'static Row<2>, a: Argument, b: Argument) -> Result<Tensor> {
    use Argument::{Number, Tensor as T};
    let is = |other| is(row, other);
    match (a, b) {
        (T(a), T(b)) if is(binary::Add::ROW) => a.add(b),
        (T(a), T(b)) if is(binary::Sub::ROW) => a.sub(b),
        (T(a), T(b)) if is(binary::Mul::ROW) => a.mul(b),
        (T(a), T(b)) if is(binary::Div::ROW) => a.div(b),
        (T(a), Number(b)) if is(binary::Add::ROW) => a.add_scalar(b),
        (T(a), Number(b)) if is(binary::Mul::ROW) => a.mul_scalar(b),
        (T(a), Number(b)) if is(binary::Div::ROW) => a.div_scalar(b),
        (Number(a), T(b)) if is(binary::Sub::ROW) => b.rsub_scalar(a),
        (Number(a), T(b)) if is(binary::Div::ROW) => b.rdiv_scalar(a),
        _ => Err(Error::argument("fuse", format!("{} cannot be traced", row.name))),
    }
}

/// One operator; with a number the row's operands stand as the operation on tensors has them.
macro_rules! operator {
    ($trait:ident $op:ident, |$x:ident, $number:ident| $right:expr, $left:expr) => {
        impl $trait<&Expr> for &Expr {
            type Output = Expr;
            fn $op(self, other: &Expr) -> Expr {
                self.zip_with(binary::$trait::ROW, other)
            }
        }
        operator!(@forward $trait $op: &Expr, Expr => |a, b| $trait::$op(a, &b));
        operator!(@forward $trait $op: Expr, &Expr => |a, b| $trait::$op(&a, b));
        operator!(@forward $trait $op: Expr, Expr => |a, b| $trait::$op(&a, &b));
        operator!(@forward $trait $op: &Expr, f64 => |$x, $number| $right);
        operator!(@forward $trait $op: Expr, f64 => |a, b| $trait::$op(&a, b));
        operator!(@forward $trait $op: f64, &Expr => |$number, $x| $left);
        operator!(@forward $trait $op: f64, Expr => |a, b| $trait::$op(a, &b));
    };
    (@forward $trait:ident $op:ident: $left:ty, $right:ty => |$a:ident, $b:ident| $e:expr) => {
        impl $trait<$right> for $left {
            type Output = Expr;
            fn $op(self, other: $right) -> Expr {
                let ($a, $b) = (self, other);
                $e
            }
        }
    };
}

operator!(Add add, |x, number| x.zip(binary::Add::ROW, [x.value, Value::Scalar(number)]), x + number);
operator!(Sub sub, |x, number| x + -number, x.zip(binary::Sub::ROW, [Value::Scalar(number), x.value]));
operator!(Mul mul, |x, number| x.zip(binary::Mul::ROW, [x.value, Value::Scalar(number)]), x * number);
operator!(Div div, |x, number| x.zip(binary::Div::ROW, [x.value, Value::Scalar(number)]), x.zip(binary::Div::ROW, [Value::Scalar(number), x.value]));

impl Neg for &Expr {
    type Output = Expr;
    fn neg(self) -> Expr {
        Expr::neg(self)
    }
}

impl Neg for Expr {
    type Output = Expr;
    fn neg(self) -> Expr {
        Expr::neg(&self)
    }
}

/// Where a chain reads one of its operands: operand and step.
#[derive(Clone, Copy)]
struct Use {
    operand: usize,
    step: usize,
    arg: usize,
}

/// The pass that makes the gradient of some uses; `None` if it is the result's gradient itself.
struct GradientPass {
    chain: Option<Chain>,
    /// Which operands it reads.
    reads: Vec<usize>,
}

struct Program {
    /// The operation's name, as errors and the graph show it.
    name: &'static str,
    /// Of the function alone.
    steps: Vec<Step>,
    result: Value,
    chain: Option<Chain>,
    /// The last step's first: the order in which the engine adds gradients.
    uses: Vec<Use>,
    /// For each use its pass, by index into `passes`.
    pass_of_use: Vec<usize>,
    passes: Vec<GradientPass>,
    /// All passes that have a chain as one, for when all are wanted; `None` if there is only one, or if they do not fit together.
    joint: Option<Chain>,
}

/// A function of `N` tensors that [`fuse`] has traced.
#[derive(Clone)]
pub struct Fused<const N: usize> {
    program: Arc<Program>,
}

/// Traces `f`, a function of `N` values, as one pass over memory. It is called once, here; the result can be called any number of times.
///
/// ```
/// # use kiln_tensor::{Tensor, Result, fuse};
/// # fn main() -> Result<()> {
/// let f = fuse(|[x, bias, y]| y + (x + bias).gelu())?;
/// let (x, bias, y) = (Tensor::randn([8, 16], ())?, Tensor::randn(16, ())?, Tensor::randn([8, 16], ())?);
/// let composed = y.add(&x.add(&bias)?.gelu()?)?;
/// assert_eq!(f.call([&x, &bias, &y])?.to_vec::<f32>()?, composed.to_vec::<f32>()?);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the closure uses values of another call of `fuse`.
pub fn fuse<const N: usize>(f: impl FnOnce([Expr; N]) -> Expr) -> Result<Fused<N>> {
    fuse_as("fuse", f)
}

/// [`fuse`], for an operation that has a name.
fn fuse_as<const N: usize>(name: &'static str, f: impl FnOnce([Expr; N]) -> Expr) -> Result<Fused<N>> {
    let trace = Rc::new(RefCell::new(Trace::default()));
    let result = f(std::array::from_fn(|i| Expr { value: Value::Operand(i), trace: trace.clone() }));
    let Trace { steps, mixed } = trace.borrow().clone();
    if mixed || !Rc::ptr_eq(&result.trace, &trace) {
        return Err(Error::argument(name, "the function uses values of another function that is being traced"));
    }
    Ok(Fused { program: Arc::new(Program::new(name, steps, result.value, N)) })
}

impl Program {
    fn new(name: &'static str, steps: Vec<Step>, result: Value, operands: usize) -> Self {
        let last = if let Value::Step(last) = result { last } else { usize::MAX };
        let chain = Chain::new(&steps, &[last]);
        let (uses, pass_of_use, passes) = (Vec::new(), Vec::new(), Vec::new());
        let mut program = Self { name, steps, result, chain, uses, pass_of_use, passes, joint: None };
        if program.chain.is_some() && program.add_gradients(last, operands).is_none() {
            program.chain = None;
        }
        program
    }

    /// Derives the gradient of each use of an operand; `None` if one has no pass.
    fn add_gradients(&mut self, last: usize, operands: usize) -> Option<()> {
        let seed = Value::Operand(operands);
        let mut trace = Trace { steps: self.steps.clone(), mixed: false };
        let mut gradients: Vec<Option<Value>> = vec![None; self.steps.len()];
        gradients[last] = Some(seed);
        let mut of_uses = Vec::new();
        for (i, step) in self.steps.iter().enumerate().rev() {
            let Some(gradient) = gradients[i] else { continue };
            let rule = match step.function {
                Function::One(row) => gradient_of_one(row),
                Function::Two(row) => gradient_of_two(row),
            }?;
            let of_args = rule(&mut trace, step.args, Value::Step(i), step.params, gradient);
            for (arg, (&value, new)) in step.used_args().iter().zip(of_args).enumerate() {
                match (value, new) {
                    (Value::Operand(operand), Some(new)) => {
                        self.uses.push(Use { operand, step: i, arg });
                        of_uses.push(new);
                    }
                    (Value::Step(from), Some(new)) => {
                        gradients[from] = Some(match gradients[from] {
                            Some(before) => trace.two(binary::Add::ROW, before, new),
                            None => new,
                        });
                    }
                    _ => {}
                }
            }
        }
        let mut distinct: Vec<Value> = Vec::new();
        for gradient in of_uses {
            let known = distinct.iter().position(|&v| v == gradient);
            self.pass_of_use.push(known.unwrap_or(distinct.len()));
            if known.is_none() {
                distinct.push(gradient);
            }
        }
        let mut results = Vec::new();
        for gradient in distinct {
            let chain = match gradient {
                Value::Step(step) => {
                    results.push(step);
                    Some(Chain::new(&trace.steps, &[step])?)
                }
                Value::Operand(_) | Value::Scalar(_) => None,
            };
            self.passes.push(GradientPass { chain, reads: operands_of(&trace.steps, gradient, operands) });
        }
        self.joint = (results.len() > 1).then(|| Chain::new(&trace.steps, &results)).flatten();
        Some(())
    }

    /// The tensors of all steps, by the operations that they stand for.
    fn composed(&self, operands: &[&Tensor]) -> Result<Vec<Tensor>> {
        let mut values: Vec<Tensor> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let argument = |value: Value| match value {
                Value::Operand(i) => Argument::Tensor(operands[i]),
                Value::Step(i) => Argument::Tensor(&values[i]),
                Value::Scalar(x) => Argument::Number(x),
            };
            let value = match step.function {
                Function::One(row) => match argument(step.args[0]) {
                    Argument::Tensor(x) => composed_one(row, step.params, x),
                    Argument::Number(_) => Err(Error::argument("fuse", format!("{} of a number", row.name))),
                },
                Function::Two(row) => composed_two(row, argument(step.args[0]), argument(step.args[1])),
            }?;
            values.push(value);
        }
        Ok(values)
    }

    /// The result by the operations that the steps stand for.
    fn result(&self, operands: &[&Tensor]) -> Result<Tensor> {
        match self.result {
            Value::Operand(i) => Ok(operands[i].clone()),
            Value::Step(i) => Ok(self.composed(operands)?.swap_remove(i)),
            Value::Scalar(_) => Err(Error::argument("fuse", "the function returns a number")),
        }
    }

    /// Whether every step has the result's shape, so that a pass over that shape does no step's work twice.
    fn steps_are_full(&self, operands: &[&Tensor], shape: &Shape) -> Result<bool> {
        if operands.iter().all(|x| x.shape() == shape) {
            return Ok(true);
        }
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let mut own: Option<Shape> = None;
            for arg in step.used_args() {
                let other = match *arg {
                    Value::Operand(i) => *operands[i].shape(),
                    Value::Step(i) => shapes[i],
                    Value::Scalar(_) => continue,
                };
                own = Some(match own {
                    Some(own) => crate::broadcast_shapes("fuse", &own, &other)?,
                    None => other,
                });
            }
            shapes.push(own.unwrap_or(*shape));
        }
        Ok(shapes.iter().all(|s| s == shape))
    }
}

/// Which of the function's operands `value` is computed from.
fn operands_of(steps: &[Step], value: Value, operands: usize) -> Vec<usize> {
    let mut reads = vec![false; operands];
    let mut open = vec![value];
    let mut seen = vec![false; steps.len()];
    while let Some(value) = open.pop() {
        match value {
            Value::Operand(i) if i < operands => reads[i] = true,
            Value::Step(i) if !std::mem::replace(&mut seen[i], true) => open.extend(steps[i].used_args()),
            _ => {}
        }
    }
    (0..operands).filter(|&i| reads[i]).collect()
}

/// Runs a chain over operands that broadcast to `shape`, `None` where it reads none: a tensor for each result.
fn run(name: &'static str, chain: &Chain, operands: &[Option<&Tensor>], shape: &Shape) -> Result<Vec<Tensor>> {
    match chain.results() {
        1 => run_results::<1>(name, chain, operands, shape),
        2 => run_results::<2>(name, chain, operands, shape),
        _ => run_results::<MAX_RESULTS>(name, chain, operands, shape),
    }
}

fn run_results<const M: usize>(name: &'static str, chain: &Chain, operands: &[Option<&Tensor>], shape: &Shape) -> Result<Vec<Tensor>> {
    let tensors = || operands.iter().copied().flatten();
    let _running = operation_with(name, || tensors().collect(), || Cost::flops((chain.count() * shape.numel()) as u64));
    let layout = result_layout(shape, tensors());
    let first = tensors().next().ok_or_else(|| Error::argument("fuse", "needs a tensor"))?;
    let mut layouts: [Option<Layout>; MAX_OPERANDS] = [None; MAX_OPERANDS];
    for (layout, arg) in layouts.iter_mut().zip(operands) {
        let other_shape = arg.filter(|t| t.shape() != shape);
        *layout = other_shape.map(|t| t.layout().broadcast_to("fuse", shape)).transpose()?;
    }
    let misfit = || Error::argument("fuse", format!("{M} results"));
    if let Some(gpu) = first.gpu()? {
        let mut views = [gpu_kernels::Operand::Scalar(0.0); MAX_OPERANDS];
        for (view, (arg, layout)) in views.iter_mut().zip(operands.iter().zip(&layouts)) {
            if let Some(x) = arg {
                *view = gpu_operand(&Arg::Tensor(x), layout)?;
            }
        }
        let stale = |_| Tensor::build_on_gpu(gpu, layout, first.dtype(), |_| Ok(()));
        let mut results = (0..M).map(stale).collect::<Result<Vec<_>>>()?;
        let outs = results.iter_mut().map(|x| Ok(gpu_output(&layout, x.donate_on_gpu()?.ok_or_else(misfit)?)));
        let outs: [_; M] = outs.collect::<Result<Vec<_>>>()?.try_into().map_err(|_| misfit())?;
        gpu_kernels::apply_chain(gpu, chain, &views[..operands.len()], outs)?;
        return Ok(results);
    }
    for_float!(first.dtype(), "fuse", T => {
        let mut views = [Operand::Unused; MAX_OPERANDS];
        for (view, (arg, layout)) in views.iter_mut().zip(operands.iter().zip(&layouts)) {
            if let Some(x) = arg {
                *view = operand::<T>("fuse", &Arg::Tensor(x), layout)?;
            }
        }
        let stale = |_| Tensor::build_with_layout::<T>(first.device(), layout, |_| Ok(()));
        let mut results = (0..M).map(stale).collect::<Result<Vec<_>>>()?;
        let out = |data| Output { data, shape: layout.shape().dims(), strides: layout.strides() };
        let outs = results.iter_mut().map(|x| x.donate::<T>().map(out).ok_or_else(misfit));
        let outs: [_; M] = outs.collect::<Result<Vec<_>>>()?.try_into().map_err(|_| misfit())?;
        chain.apply(&views[..operands.len()], outs);
        Ok(results)
    })
}

impl<const N: usize> Fused<N> {
    /// The function of tensors that broadcast together, of one dtype and device: what the traced operations would give, bit for bit.
    ///
    /// # Errors
    /// Those of the operations, in their order.
    pub fn call(&self, operands: [&Tensor; N]) -> Result<Tensor> {
        let operands = together(operands)?;
        self.call_of_one_dtype(operands.each_ref().map(|x| &**x))
    }

    fn call_of_one_dtype(&self, operands: [&Tensor; N]) -> Result<Tensor> {
        let program = &self.program;
        let (Some(chain), Some(first)) = (&program.chain, operands.first()) else { return program.result(&operands) };
        for x in &operands {
            first.expect_same(program.name, x)?;
        }
        let shape = common_shape(program.name, operands.iter().copied())?;
        if !first.dtype().is_float() || !program.steps_are_full(&operands, &shape)? {
            return program.result(&operands);
        }
        let out = run(program.name, chain, &operands.map(Some), &shape)?.swap_remove(0);
        let inputs: Vec<&Tensor> = program.uses.iter().map(|u| operands[u.operand]).collect();
        record(program.name, out, &inputs, |needs| Chained::new(program.clone(), &operands, shape, |u| needs.input(u)))
    }
}

/// The rule of a chain: every use of an operand is an input of its own.
struct Chained {
    program: Arc<Program>,
    /// The shapes of all operands, and those that a gradient reads.
    operands: Vec<(Shape, Option<Tensor>)>,
    shape: Shape,
}

impl Op for Chained {
    fn name(&self) -> &'static str {
        self.program.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let needs: Vec<bool> = (0..self.program.uses.len()).map(|u| ctx.needs(u)).collect();
        self.gradients(&needs, grad)
    }
}

impl Chained {
    /// The gradients of the uses that need one.
    fn gradients(&self, needs: &[bool], grad: &Tensor) -> Result<Grads> {
        if is_grad_enabled() { self.composed_gradients(needs, grad) } else { self.fused_gradients(needs, grad) }
    }

    /// Keeps what the gradients read of those uses whose operands `wants` names.
    fn new(program: Arc<Program>, operands: &[&Tensor], shape: Shape, wants: impl Fn(usize) -> bool) -> Self {
        let read = |i: usize| {
            let mut wanted = (0..program.uses.len()).filter(|&u| wants(u));
            wanted.any(|u| program.passes[program.pass_of_use[u]].reads.contains(&i))
        };
        let operands = operands.iter().enumerate().map(|(i, x)| (*x.shape(), read(i).then(|| (*x).clone()))).collect();
        Self { program, operands, shape }
    }

    /// The gradients of the uses that need one, in one pass if all do.
    fn fused_gradients(&self, needs: &[bool], grad: &Tensor) -> Result<Grads> {
        let Program { passes, pass_of_use, joint, .. } = &*self.program;
        let wanted = |pass: usize| pass_of_use.iter().zip(needs).any(|(&of, &needed)| of == pass && needed);
        // What was not saved is not read.
        let saved = self.operands.iter().map(|(_, x)| x.as_ref());
        let args: Vec<Option<&Tensor>> = saved.chain([Some(grad)]).collect();
        let together = joint.as_ref().filter(|_| passes.iter().enumerate().all(|(i, pass)| pass.chain.is_none() || wanted(i)));
        let mut of_joint =
            together.map(|joint| run(self.program.name, joint, &args, &self.shape)).transpose()?.unwrap_or_default().into_iter();
        let mut done = Vec::with_capacity(passes.len());
        for (i, pass) in passes.iter().enumerate() {
            done.push(match &pass.chain {
                _ if !wanted(i) => None,
                None => Some(grad.clone()),
                // The joint chain has the results in this order.
                Some(chain) => match of_joint.next() {
                    Some(gradient) => Some(gradient),
                    None => Some(run(self.program.name, chain, &args, &self.shape)?.swap_remove(0)),
                },
            });
        }
        Ok(pass_of_use.iter().zip(needs).map(|(&pass, &needed)| done[pass].clone().filter(|_| needed)).collect())
    }

    /// The gradients in differentiable operations: the chain is computed again, recorded, and walked backwards.
    fn composed_gradients(&self, needs: &[bool], grad: &Tensor) -> Result<Grads> {
        let program = &self.program;
        let stand_in = |(shape, x): &(Shape, Option<Tensor>)| match x {
            Some(x) => Ok(x.clone()),
            // No gradient depends on it; but it must be there to compute the chain, and tracked to be found in it.
            None => Tensor::scalar(0.0, grad)?.expand(shape)?.requires_grad_(),
        };
        let operands = self.operands.iter().map(stand_in).collect::<Result<Vec<_>>>()?;
        // The gradients of all uses come by; those that nobody needs are left out at the end.
        let values = program.composed(&operands.iter().collect::<Vec<_>>())?;
        let mut gradients: Vec<Option<Tensor>> = vec![None; values.len()];
        if let Value::Step(last) = program.result {
            gradients[last] = Some(grad.clone());
        }
        let mut of_uses: Vec<Option<Tensor>> = vec![None; program.uses.len()];
        for (i, step) in program.steps.iter().enumerate().rev() {
            let (Some(gradient), Some(Source::Node(node))) = (gradients[i].take(), values[i].source()) else { continue };
            let tensors = step.used_args().iter().enumerate().filter(|(_, arg)| !matches!(arg, Value::Scalar(_)));
            let tensors: Vec<(usize, Value)> = tensors.map(|(at, &arg)| (at, arg)).collect();
            let tracked = node.inputs().iter().map(Option::is_some).collect();
            let found = node.op()?.vjp(&Ctx::new(node.clone(), tracked), &gradient)?;
            for (&(at, arg), new) in tensors.iter().zip(found) {
                let Some(new) = new else { continue };
                match arg {
                    Value::Operand(_) => {
                        if let Some(u) = program.uses.iter().position(|u| u.step == i && u.arg == at) {
                            of_uses[u] = Some(new);
                        }
                    }
                    Value::Step(from) => {
                        gradients[from] = Some(match gradients[from].take() {
                            Some(before) => before.add(&new)?,
                            None => new,
                        });
                    }
                    Value::Scalar(_) => {}
                }
            }
        }
        Ok(of_uses.into_iter().zip(needs).map(|(g, &needed)| g.filter(|_| needed)).collect())
    }
}
