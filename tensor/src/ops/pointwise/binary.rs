//! Functions of two tensors that broadcast together. Both must have the same dtype.

use super::kernel::{Arg, apply, zip};
use crate::autocast::{raised, together};
use crate::graph::{Ctx, Grads, Op, record};
use crate::{Error, ErrorKind, Result, Tensor};
use kiln_kernels::pointwise::binary;

/// One side's gradient, from the saved operands and the incoming gradient.
type Side = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

/// A rule that reads both operands.
struct FromOperands {
    name: &'static str,
    a: Tensor,
    b: Tensor,
    rules: [Side; 2],
}

impl Op for FromOperands {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let side = |i: usize| ctx.needs(i).then(|| self.rules[i](&self.a, &self.b, grad)).transpose();
        Ok(vec![side(0)?, side(1)?])
    }
}

fn record_operands(name: &'static str, out: Tensor, a: &Tensor, b: &Tensor, rules: [Side; 2]) -> Result<Tensor> {
    record(name, out, &[a, b], |_| FromOperands { name, a: a.clone(), b: b.clone(), rules })
}

/// a + b or a − b: nothing is saved.
struct Sum {
    name: &'static str,
    negate: bool,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let second = match (ctx.needs(1), self.negate) {
            (false, _) => None,
            (true, false) => Some(grad.clone()),
            (true, true) => Some(grad.neg()?),
        };
        Ok(vec![Some(grad.clone()), second])
    }
}

/// Saves each factor only if the other one is tracked.
struct Mul {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

impl Op for Mul {
    fn name(&self) -> &'static str {
        "mul"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let product = |needed: bool, other: &Option<Tensor>| other.as_ref().filter(|_| needed).map(|other| grad.mul(other)).transpose();
        Ok(vec![product(ctx.needs(0), &self.b)?, product(ctx.needs(1), &self.a)?])
    }
}

/// Saves the ends only for the weight's gradient.
struct Lerp {
    start: Option<Tensor>,
    end: Option<Tensor>,
    weight: Tensor,
}

impl Op for Lerp {
    fn name(&self) -> &'static str {
        "lerp"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let start = ctx.needs(0).then(|| grad.mul(&self.weight.rsub_scalar(1.0)?)).transpose()?;
        let end = ctx.needs(1).then(|| grad.mul(&self.weight)).transpose()?;
        let weight = match (&self.start, &self.end) {
            (Some(start), Some(end)) if ctx.needs(2) => Some(grad.mul(&end.sub(start)?)?),
            _ => None,
        };
        Ok(vec![start, end, weight])
    }
}

/// The gradient of a maximum or minimum: to the operand that was chosen, halved where they tie; to both where one is NaN.
fn chosen(own: &Tensor, other: &Tensor, grad: &Tensor, loses: fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let (own, other) = (own.detach(), other.detach());
    let shared = own.eq(&other)?.where_cond(&grad.mul_scalar(0.5)?, grad)?;
    shared.masked_fill(&loses(&own, &other)?, 0.0)
}

/// An error if an integer divisor holds a zero.
fn refuse_zero_divisor(op: &'static str, b: &Tensor) -> Result<()> {
    if b.dtype().is_int() && b.eq_scalar(0.0)?.to_vec::<bool>()?.contains(&true) {
        return Err(Error::new(ErrorKind::Argument, op, format!("an integer divisor of shape {} holds a zero", b.shape())));
    }
    Ok(())
}

impl Tensor {
    /// a + b. Every numeric dtype; integers wrap.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Add::ROW)?;
        record("add", out, &[a, b], |_| Sum { name: "add", negate: false })
    }

    /// a − b. Every numeric dtype; integers wrap.
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Sub::ROW)?;
        record("sub", out, &[a, b], |_| Sum { name: "sub", negate: true })
    }

    /// a · b, element by element. Every numeric dtype; integers wrap.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Mul::ROW)?;
        record("mul", out, &[a, b], |needs| Mul { a: needs.save_for(1, a), b: needs.save_for(0, b) })
    }

    /// a / b. Integers round towards zero; a zero divisor is an error for them.
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        refuse_zero_divisor("div", b)?;
        let out = zip(a, b, binary::Div::ROW)?;
        record_operands("div", out, a, b, [|_, b, g| g.div(b), |a, b, g| g.div(b)?.mul(&a.div(b)?)?.neg()])
    }

    /// a − b·⌊a/b⌋: the remainder with the sign of the divisor. A zero divisor is an error for integers.
    pub fn rem(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        refuse_zero_divisor("rem", b)?;
        let out = zip(a, b, binary::Rem::ROW)?;
        record_operands("rem", out, a, b, [|_, _, g| Ok(g.clone()), |a, b, g| g.mul(&a.div(b)?.floor()?)?.neg()])
    }

    /// a^b.
    ///
    /// The derivative with respect to a is 0 where b is 0; that with respect to b is 0 where a is 0 and b is not negative.
    pub fn pow(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &[raised(self)?, raised(other)?];
        let out = zip(a, b, binary::Pow::ROW)?;
        let base: Side = |a, b, g| g.mul(b)?.mul(&a.pow(&b.add_scalar(-1.0)?)?)?.masked_fill(&b.eq_scalar(0.0)?, 0.0);
        let exponent: Side = |a, b, g| {
            let zero = a.eq_scalar(0.0)?.logical_and(&b.ge_scalar(0.0)?)?;
            g.mul(&a.pow(b)?)?.mul(&a.log()?)?.masked_fill(&zero, 0.0)
        };
        record_operands("pow", out, a, b, [base, exponent])
    }

    /// The larger element; NaN if either is. Every numeric dtype. Equal operands share the gradient.
    pub fn maximum(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Maximum::ROW)?;
        record_operands("maximum", out, a, b, [|a, b, g| chosen(a, b, g, Tensor::lt), |a, b, g| chosen(b, a, g, Tensor::lt)])
    }

    /// The smaller element; NaN if either is. Every numeric dtype. Equal operands share the gradient.
    pub fn minimum(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Minimum::ROW)?;
        record_operands("minimum", out, a, b, [|a, b, g| chosen(a, b, g, Tensor::gt), |a, b, g| chosen(b, a, g, Tensor::gt)])
    }

    /// The angle of the point (x, y) = (other, self), in (−π, π].
    pub fn atan2(&self, other: &Tensor) -> Result<Tensor> {
        let [a, b] = &together([self, other])?;
        let out = zip(a, b, binary::Atan2::ROW)?;
        let y: Side = |y, x, g| g.mul(x)?.div(&x.square()?.add(&y.square()?)?);
        let x: Side = |y, x, g| g.mul(y)?.div(&x.square()?.add(&y.square()?)?)?.neg();
        record_operands("atan2", out, a, b, [y, x])
    }

    /// a + weight·(b − a): a at weight 0, b at weight 1.
    pub fn lerp(&self, end: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let out = apply(binary::Lerp::ROW, [0.0; 2], [Arg::Tensor(self), Arg::Tensor(end), Arg::Tensor(weight)])?;
        record("lerp", out, &[self, end, weight], |needs| Lerp {
            start: needs.save_for(2, self),
            end: needs.save_for(2, end),
            weight: weight.clone(),
        })
    }
}
