//! Terms of losses that no other operation is made of.

use super::kernel::{Arg, Fused, apply, map, record_input};
use crate::{Result, Tensor};
use kiln_kernels::pointwise::{backward, unary};

impl Tensor {
    /// x²/2 where |x| is below δ, δ·(|x| − δ/2) elsewhere.
    pub(crate) fn huber(&self, delta: f64) -> Result<Tensor> {
        let params = [delta, 0.0];
        let out = apply(unary::Huber::ROW, params, [Arg::Tensor(self)])?;
        record_input("huber", out, self, Fused::with(backward::Huber::ROW, params), move |x, g| g.mul(&x.clamp(-delta, delta)?))
    }

    /// max(ln x, −100) with the derivative 1/max(x, 10⁻¹²), which is finite where the logarithm is at its bound.
    pub(crate) fn bounded_log(&self) -> Result<Tensor> {
        let fused = Fused::new(backward::BoundedLog::ROW);
        record_input("bounded_log", map(self, unary::BoundedLog::ROW)?, self, fused, |x, g| g.div(&x.clamp(1e-12, None)?))
    }

    /// ln x, and 0 with derivative 0 where x is 0.
    pub(crate) fn log_of_nonzero(&self) -> Result<Tensor> {
        let fused = Fused::new(backward::LogOfNonzero::ROW);
        record_input("log_of_nonzero", map(self, unary::LogOfNonzero::ROW)?, self, fused, |x, g| {
            g.div(&x.masked_fill(&x.detach().eq_scalar(0.0)?, f64::INFINITY)?)
        })
    }
}
