//! Functions of two tensors that broadcast together.

use crate::graph::{Ctx, Grads, Op, record};
use crate::{Result, Tensor, broadcast_shapes};
use kiln_kernels::element::Element;

struct Add;

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.clone()), Some(grad.clone())])
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

fn zip(a: &Tensor, b: &Tensor, op: &'static str, f: fn(f64, f64) -> f64) -> Result<Tensor> {
    a.expect_same(op, b)?;
    let shape = broadcast_shapes(op, a.shape(), b.shape())?;
    for_number!(a.dtype(), op, T => {
        let (a, b) = (a.detach().expand(shape)?.contiguous()?, b.detach().expand(shape)?.contiguous()?);
        let (a, b) = (a.as_slice::<T>()?, b.as_slice::<T>()?);
        Tensor::build::<T>(&shape, |out| {
            for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                *o = <T as Element>::from_f64(f(a.to_f64(), b.to_f64()));
            }
            Ok(())
        })
    })
}

impl Tensor {
    /// a + b.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        let out = zip(self, other, "add", |a, b| a + b)?;
        record("add", out, &[self, other], |_| Add)
    }

    /// a · b, element by element.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        let out = zip(self, other, "mul", |a, b| a * b)?;
        record("mul", out, &[self, other], |needs| Mul { a: needs.save_for(1, self), b: needs.save_for(0, other) })
    }
}
