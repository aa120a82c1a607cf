//! Choosing between values, and holding them in a range.

use super::kernel::{map_number, record_input, select};
use crate::graph::{Ctx, Grads, Op, record};
use crate::{DType, Error, Result, Tensor, broadcast_shapes};

struct Where {
    condition: Tensor,
}

impl Op for Where {
    fn name(&self) -> &'static str {
        "where_cond"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let first = ctx.needs(0).then(|| grad.masked_fill(&self.condition.logical_not()?, 0.0)).transpose()?;
        let second = ctx.needs(1).then(|| grad.masked_fill(&self.condition, 0.0)).transpose()?;
        Ok(vec![first, second])
    }
}

fn expect_bool(op: &'static str, mask: &Tensor) -> Result<()> {
    if mask.dtype() == DType::Bool { Ok(()) } else { Err(Error::unsupported_dtype(op, mask.dtype(), "a bool mask")) }
}

impl Tensor {
    /// `a` where this bool tensor is true, else `b`. The three broadcast together; any dtype.
    pub fn where_cond(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        expect_bool("where_cond", self)?;
        a.expect_same("where_cond", b)?;
        let shape = broadcast_shapes("where_cond", self.shape(), &broadcast_shapes("where_cond", a.shape(), b.shape())?)?;
        let out = select(self, a, b, &shape)?;
        record("where_cond", out, &[a, b], |_| Where { condition: self.clone() })
    }

    /// `value` where `mask` is true, the tensor elsewhere. They broadcast together; any dtype.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        expect_bool("masked_fill", mask)?;
        mask.where_cond(&Tensor::scalar(value, self)?, self)
    }

    /// x held between `low` and `high` (`None`: no bound). NaN stays NaN. Every numeric dtype. The derivative is 1 at the bounds
    /// and between them, 0 outside.
    pub fn clamp(&self, low: impl Into<Option<f64>>, high: impl Into<Option<f64>>) -> Result<Tensor> {
        let (low, high) = (low.into().unwrap_or(f64::NEG_INFINITY), high.into().unwrap_or(f64::INFINITY));
        let held = move |x: f64| {
            if x < low && low <= high {
                low
            } else if x > high {
                high
            } else {
                x
            }
        };
        record_input("clamp", map_number(self, "clamp", held)?, self, move |x, g| {
            g.masked_fill(&x.lt_scalar(low)?.logical_or(&x.gt_scalar(high)?)?, 0.0)
        })
    }
}
