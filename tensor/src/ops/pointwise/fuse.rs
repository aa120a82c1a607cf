//! [`fuse`]: a chain of pointwise operations, and the sum or mean that ends it, as one pass over memory, and its gradients as one more.
//!
//! A closure over [`Expr`] is traced once. Result and gradients are bit for bit those of the same operations on tensors: each step runs
//! the same kernel, is rounded to the dtype, and the gradients of an operand's uses add up in the engine's order. What the passes cannot do (integers,
//! steps that are smaller than the result by broadcasting, second derivatives) is done by the operations themselves.
//!
//! Here what a function is written in, and its steps' derivatives; [`program`] makes the passes, [`run`] runs them over tensors.

mod gate;
mod program;
mod run;

use crate::ops::loss::bce_of_logits;
use crate::{Error, Result, Tensor};
use kiln_kernels::cpu::pointwise::chain::{Function, Step, Value};
use kiln_kernels::pointwise::{Params, Row, backward, binary, unary};
use program::Program;
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
    ($($vis:vis $name:ident($($param:ident),*) = $row:ident [$($value:expr),*], |$t:ident, $x:ident, $y:ident, $p:pat_param, $g:ident| $gradient:expr;)*) => {
        impl Expr {
            $(
                #[doc = concat!("[`Tensor::", stringify!($name), "`].")]
                $vis fn $name(&self $(, $param: f64)*) -> Expr {
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
    pub neg() = Neg[], |t, _x, _y, _, g| t.one(unary::Neg::ROW, g);
    pub abs() = Abs[], |t, x, _y, _, g| t.two(backward::Abs::ROW, x, g);
    pub exp() = Exp[], |t, _x, y, _, g| t.two(binary::Mul::ROW, g, y);
    pub expm1() = Expm1[], |t, _x, y, _, g| t.two(backward::Expm1::ROW, y, g);
    pub log() = Log[], |t, x, _y, _, g| t.two(binary::Div::ROW, g, x);
    pub log1p() = Log1p[], |t, x, _y, _, g| t.two(backward::Log1p::ROW, x, g);
    pub sqrt() = Sqrt[], |t, _x, y, _, g| t.two(backward::Sqrt::ROW, y, g);
    pub rsqrt() = Rsqrt[], |t, _x, y, _, g| t.two(backward::Rsqrt::ROW, y, g);
    pub recip() = Recip[], |t, _x, y, _, g| t.two(backward::Recip::ROW, y, g);
    pub square() = Square[], |t, x, _y, _, g| t.two(backward::Square::ROW, x, g);
    pub sin() = Sin[], |t, x, _y, _, g| t.two(backward::Sin::ROW, x, g);
    pub cos() = Cos[], |t, x, _y, _, g| t.two(backward::Cos::ROW, x, g);
    pub erf() = Erf[], |t, x, _y, _, g| t.two(backward::Erf::ROW, x, g);
    pub tanh() = Tanh[], |t, _x, y, _, g| t.two(backward::Tanh::ROW, y, g);
    pub sigmoid() = Sigmoid[], |t, _x, y, _, g| t.two(backward::Sigmoid::ROW, y, g);
    pub relu() = Relu[], |t, _x, y, _, g| t.two(backward::Relu::ROW, y, g);
    pub gelu() = Gelu[], |t, x, _y, _, g| t.two(backward::Gelu::ROW, x, g);
    pub gelu_tanh() = GeluTanh[], |t, x, _y, _, g| t.two(backward::GeluTanh::ROW, x, g);
    pub silu() = Silu[], |t, x, _y, _, g| t.two(backward::Silu::ROW, x, g);
    pub softplus() = Softplus[1.0, f64::INFINITY], |t, x, _y, p, g| t.push(Function::Two(backward::Softplus::ROW), p, [x, g]);
    pub mish() = Mish[], |t, x, _y, _, g| t.two(backward::Mish::ROW, x, g);
    pub hardswish() = Hardswish[], |t, x, _y, _, g| t.two(backward::Hardswish::ROW, x, g);
    pub leaky_relu(slope) = LeakyRelu[slope], |t, x, _y, p, g| t.push(Function::Two(backward::LeakyRelu::ROW), p, [x, g]);
    pub elu(alpha) = Elu[alpha], |t, x, _y, p, g| t.push(Function::Two(backward::Elu::ROW), p, [x, g]);
    pub clamp(low, high) = Clamp[low, high], |t, x, _y, p, g| t.push(Function::Two(backward::Clamp::ROW), p, [x, g]);
    pub(crate) huber(delta) = Huber[delta], |t, x, _y, p, g| t.push(Function::Two(backward::Huber::ROW), p, [x, g]);
    pub(crate) bounded_log() = BoundedLog[], |t, x, _y, _, g| t.two(backward::BoundedLog::ROW, x, g);
    pub(crate) log_of_nonzero() = LogOfNonzero[], |t, x, _y, _, g| t.two(backward::LogOfNonzero::ROW, x, g);
}

impl Expr {
    /// The binary cross-entropy of logits, as [`Tensor::bce_with_logits_with`] has it for each element.
    pub(crate) fn bce_with_logits(&self, target: &Expr) -> Expr {
        self.zip_with(binary::BceWithLogits::ROW, target)
    }
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
    } else if is(binary::BceWithLogits::ROW) {
        |t, [x, target], _, _, g| {
            let p = t.one(unary::Sigmoid::ROW, x);
            let excess = t.two(binary::Sub::ROW, p, target);
            let minus = t.one(unary::Neg::ROW, x);
            [Some(t.two(binary::Mul::ROW, g, excess)), Some(t.two(binary::Mul::ROW, g, minus))]
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
        (T(a), T(b)) if is(binary::BceWithLogits::ROW) => bce_of_logits(a, b, None),
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
/// A sum or a mean may end it ([`Fused::sum`], [`Fused::mean`]); then the chain's results are never in memory:
///
/// ```
/// # use kiln_tensor::{Tensor, Result, fuse};
/// # fn main() -> Result<()> {
/// let squares = fuse(|[x, y]| (x - y).square())?;
/// let (x, y) = (Tensor::randn([8, 16], ())?, Tensor::randn([8, 16], ())?);
/// assert_eq!(squares.mean([&x, &y], -1)?.to_vec::<f32>()?, x.sub(&y)?.square()?.mean(-1)?.to_vec::<f32>()?);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If the closure uses values of another call of `fuse`.
pub fn fuse<const N: usize>(f: impl FnOnce([Expr; N]) -> Expr) -> Result<Fused<N>> {
    let (fused, is_pure) = trace("fuse", f);
    if is_pure { Ok(fused) } else { Err(Error::argument("fuse", "the function uses values of another function that is being traced")) }
}

/// [`fuse`], of a function that uses its arguments only.
pub(crate) fn fused<const N: usize>(f: impl FnOnce([Expr; N]) -> Expr) -> Fused<N> {
    fused_as("fuse", f)
}

/// [`fused`], for an operation that has a name.
fn fused_as<const N: usize>(name: &'static str, f: impl FnOnce([Expr; N]) -> Expr) -> Fused<N> {
    trace(name, f).0
}

/// The traced function, and whether it uses its own values only.
fn trace<const N: usize>(name: &'static str, f: impl FnOnce([Expr; N]) -> Expr) -> (Fused<N>, bool) {
    let trace = Rc::new(RefCell::new(Trace::default()));
    let result = f(std::array::from_fn(|i| Expr { value: Value::Operand(i), trace: trace.clone() }));
    let Trace { steps, mixed } = trace.borrow().clone();
    let is_pure = !mixed && Rc::ptr_eq(&result.trace, &trace);
    (Fused { program: Arc::new(Program::new(name, if is_pure { steps } else { Vec::new() }, result.value, N)) }, is_pure)
}
