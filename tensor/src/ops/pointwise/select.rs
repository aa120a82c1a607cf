//! Choosing between values, and holding them in a range.

use super::kernel::{Arg, Fused, apply, record_input, select};
use crate::autocast::together;
use crate::graph::{Ctx, Grads, Op, record};
use crate::{DType, Error, Result, Tensor};
use kiln_kernels::pointwise::{backward, unary};

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

/// Where the value is filled in, no gradient flows.
struct MaskedFill {
    mask: Tensor,
}

impl Op for MaskedFill {
    fn name(&self) -> &'static str {
        "masked_fill"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.masked_fill(&self.mask, 0.0)?)])
    }
}

fn expect_bool(op: &'static str, mask: &Tensor) -> Result<()> {
    if mask.dtype() == DType::Bool { Ok(()) } else { Err(Error::unsupported_dtype(op, mask.dtype(), "a bool mask")) }
}

impl Tensor {
    /// `a` where this bool tensor is true, else `b`. The three broadcast together; any dtype.
    pub fn where_cond(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        expect_bool("where_cond", self)?;
        let [a, b] = &together([a, b])?;
        let out = select("where_cond", self, Arg::Tensor(a), Arg::Tensor(b))?;
        record("where_cond", out, &[a, b], |_| Where { condition: self.clone() })
    }

    /// `value` where `mask` is true, the tensor elsewhere. They broadcast together; any dtype.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        expect_bool("masked_fill", mask)?;
        let out = select("masked_fill", mask, Arg::Scalar(value), Arg::Tensor(self))?;
        record("masked_fill", out, &[self], |_| MaskedFill { mask: mask.clone() })
    }

    /// x held between `low` and `high` (`None`: no bound). NaN stays NaN. Every numeric dtype. The derivative is 1 at the bounds
    /// and between them, 0 outside. If the bounds are
    /// in the wrong order, every number becomes `high`.
    pub fn clamp(&self, low: impl Into<Option<f64>>, high: impl Into<Option<f64>>) -> Result<Tensor> {
        self.clamp_between(low.into().unwrap_or(f64::NEG_INFINITY), high.into().unwrap_or(f64::INFINITY))
    }

    fn clamp_between(&self, low: f64, high: f64) -> Result<Tensor> {
        // The whole numbers between the bounds are those between their nearest whole numbers inwards.
        let params = if self.dtype().is_float() { [low, high] } else { [low.ceil(), high.floor()] };
        let out = apply(unary::Clamp::ROW, params, [Arg::Tensor(self)])?;
        record_input("clamp", out, self, Fused::with(backward::Clamp::ROW, params), move |x, g| {
            g.masked_fill(&x.lt_scalar(low)?.logical_or(&x.gt_scalar(high)?)?, 0.0)
        })
    }
}
