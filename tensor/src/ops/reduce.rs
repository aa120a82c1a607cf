//! Reductions along any dimensions.

use crate::graph::{Ctx, Grads, Op, record};
use crate::{Dims, Result, Shape, Tensor};
use kiln_kernels::element::Element;

/// The gradient of a sum is repeated along the summed dimensions.
struct Sum {
    from: Shape,
    keepdim: Shape,
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.reshape(self.keepdim)?.expand(self.from)?)])
    }
}

impl Tensor {
    /// The sum along `dims`, which stay with extent 1.
    pub fn sum_keepdim(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        let dims = dims.into().resolve("sum", self.shape())?;
        let mut shape = *self.shape();
        for &d in &dims {
            shape = shape.with_dim(d, 1)?;
        }
        let x = self.detach().contiguous()?;
        let out = for_number!(self.dtype(), "sum", T => {
            let x = x.as_slice::<T>()?;
            Tensor::build::<T>(&shape, |out| {
                let mut sums = vec![0f64; out.len()];
                let strides = shape.contiguous_strides();
                for (i, v) in x.iter().enumerate() {
                    let mut rest = i;
                    let mut at = 0;
                    for d in (0..shape.rank()).rev() {
                        let n = self.shape()[d];
                        if shape[d] == n {
                            at += rest % n * strides[d];
                        }
                        rest /= n;
                    }
                    sums[at] += v.to_f64();
                }
                for (o, s) in out.iter_mut().zip(sums) {
                    *o = <T as Element>::from_f64(s);
                }
                Ok(())
            })
        })?;
        record("sum", out, &[self], |_| Sum { from: *self.shape(), keepdim: shape })
    }

    /// The sum along `dims` (`()` for all).
    pub fn sum(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        let dims = dims.into();
        let axes = dims.resolve("sum", self.shape())?;
        let kept: Vec<usize> = (0..self.rank()).filter(|d| !axes.contains(d)).map(|d| self.dims()[d]).collect();
        self.sum_keepdim(dims)?.reshape(kept)
    }
}
