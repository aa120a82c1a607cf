//! From tensors to the kernels of the pointwise table.

use crate::graph::{Ctx, Grads, Op, record};
use crate::{Bool, Result, Shape, Tensor, broadcast_shapes};
use kiln_kernels::element::Element;

pub(super) fn map(x: &Tensor, op: &'static str, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    for_float!(x.dtype(), op, T => {
        let shape = *x.shape();
        let x = x.detach().contiguous()?;
        let x = x.as_slice::<T>()?;
        Tensor::build::<T>(&shape, |out| {
            for (o, &x) in out.iter_mut().zip(x) {
                *o = <T as Element>::from_f64(f(x.to_f64()));
            }
            Ok(())
        })
    })
}

pub(super) fn map_number(x: &Tensor, op: &'static str, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    for_number!(x.dtype(), op, T => {
        let shape = *x.shape();
        let x = x.detach().contiguous()?;
        let x = x.as_slice::<T>()?;
        Tensor::build::<T>(&shape, |out| {
            for (o, &x) in out.iter_mut().zip(x) {
                *o = <T as Element>::from_f64(f(x.to_f64()));
            }
            Ok(())
        })
    })
}

pub(super) fn zip(a: &Tensor, b: &Tensor, op: &'static str, f: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
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

pub(super) fn compare(a: &Tensor, b: &Tensor, op: &'static str, f: impl Fn(f64, f64) -> bool) -> Result<Tensor> {
    a.expect_same(op, b)?;
    let shape = broadcast_shapes(op, a.shape(), b.shape())?;
    for_any!(a.dtype(), T => {
        let (a, b) = (a.detach().expand(shape)?.contiguous()?, b.detach().expand(shape)?.contiguous()?);
        let (a, b) = (a.as_slice::<T>()?, b.as_slice::<T>()?);
        Tensor::build::<Bool>(&shape, |out| {
            for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                *o = f(a.to_f64(), b.to_f64()).into();
            }
            Ok(())
        })
    })
}

pub(super) fn compare_scalar(a: &Tensor, f: impl Fn(f64) -> bool) -> Result<Tensor> {
    for_any!(a.dtype(), T => {
        let shape = *a.shape();
        let a = a.detach().contiguous()?;
        let a = a.as_slice::<T>()?;
        Tensor::build::<Bool>(&shape, |out| {
            for (o, a) in out.iter_mut().zip(a) {
                *o = f(a.to_f64()).into();
            }
            Ok(())
        })
    })
}

/// `a` where `mask`, else `b`; the three have one shape.
pub(super) fn select(mask: &Tensor, a: &Tensor, b: &Tensor, shape: &Shape) -> Result<Tensor> {
    let mask = mask.detach().expand(shape)?.contiguous()?;
    let mask = mask.as_slice::<Bool>()?;
    for_any!(a.dtype(), T => {
        let (a, b) = (a.detach().expand(shape)?.contiguous()?, b.detach().expand(shape)?.contiguous()?);
        let (a, b) = (a.as_slice::<T>()?, b.as_slice::<T>()?);
        Tensor::build::<T>(shape, |out| {
            for (i, o) in out.iter_mut().enumerate() {
                *o = if mask[i].get() { a[i] } else { b[i] };
            }
            Ok(())
        })
    })
}

/// A rule that is one function of the saved input and the gradient.
struct FromInput<R> {
    name: &'static str,
    x: Tensor,
    rule: R,
}

impl<R: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static> Op for FromInput<R> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some((self.rule)(&self.x, grad)?)])
    }
}

/// A rule that is one function of the saved output and the gradient.
struct FromOutput<R> {
    name: &'static str,
    y: Tensor,
    rule: R,
}

impl<R: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static> Op for FromOutput<R> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some((self.rule)(&ctx.output(&self.y), grad)?)])
    }
}

/// A rule that is one function of the gradient alone; `None` is a derivative of zero.
struct FromGrad<R> {
    name: &'static str,
    rule: Option<R>,
}

impl<R: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static> Op for FromGrad<R> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![self.rule.as_ref().map(|rule| rule(grad)).transpose()?])
    }
}

/// Records `out = f(x)` with the gradient `rule(x, grad)`.
pub(super) fn record_input(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    record(name, out, &[x], |_| FromInput { name, x: x.clone(), rule })
}

/// Records `out = f(x)` with the gradient `rule(out, grad)`.
pub(super) fn record_output(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let y = out.clone();
    record(name, out, &[x], |_| FromOutput { name, y, rule })
}

/// Records `out = f(x)` with the gradient `rule(grad)`.
pub(super) fn record_linear(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    rule: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    record(name, out, &[x], |_| FromGrad { name, rule: Some(rule) })
}

/// Records `out = f(x)` whose derivative is zero wherever it exists.
pub(super) fn record_flat(name: &'static str, out: Tensor, x: &Tensor) -> Result<Tensor> {
    record(name, out, &[x], |_| FromGrad { name, rule: None::<fn(&Tensor) -> Result<Tensor>> })
}
