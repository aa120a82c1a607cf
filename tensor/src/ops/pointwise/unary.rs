//! Functions of one tensor.

use crate::graph::{Ctx, Grads, Op, record};
use crate::{Result, Tensor};
use kiln_kernels::element::Element;

/// e^x; the derivative is the output.
struct Exp {
    output: Tensor,
}

impl Op for Exp {
    fn name(&self) -> &'static str {
        "exp"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.mul(&ctx.output(&self.output))?)])
    }
}

fn map(x: &Tensor, op: &'static str, f: fn(f64) -> f64) -> Result<Tensor> {
    for_float!(x.dtype(), op, T => {
        let x = x.detach().contiguous()?;
        let x = x.as_slice::<T>()?;
        Tensor::build::<T>(&crate::Shape::new(&[x.len()])?, |out| {
            for (o, &x) in out.iter_mut().zip(x) {
                *o = <T as Element>::from_f64(f(x.to_f64()));
            }
            Ok(())
        })
    })?
    .reshape(x.shape())
}

impl Tensor {
    /// e^x, element by element.
    pub fn exp(&self) -> Result<Tensor> {
        let out = map(self, "exp", f64::exp)?;
        let saved = out.clone();
        record("exp", out, &[self], |_| Exp { output: saved })
    }
}

impl Tensor {
    /// Temporary.
    pub fn to_dtype(&self, dtype: crate::DType) -> Result<Tensor> {
        for_any!(self.dtype(), T => {
            let x = self.detach().contiguous()?;
            let x = x.as_slice::<T>()?;
            for_any!(dtype, U => Tensor::build::<U>(self.shape(), |out| {
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = <U as Element>::from_f64(x.to_f64());
                }
                Ok(())
            }))
        })
    }
    /// Temporary.
    pub fn stack(xs: &[&Tensor], _dim: isize) -> Result<Tensor> {
        let mut v = vec![];
        for x in xs {
            v.extend(x.to_vec::<f64>()?);
        }
        Tensor::from_vec(v, [&[xs.len()], xs[0].dims()].concat())
    }
}
