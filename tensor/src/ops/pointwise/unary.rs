//! Elementary functions of one tensor. Float dtypes, unless the text says more; f16 and bf16 compute in f32 and round once.

use super::kernel::{Fused, map, record_flat, record_input, record_linear, record_output};
use crate::autocast::raised;
use crate::{Result, Tensor};
use kiln_kernels::pointwise::{backward, unary};
use std::f64::consts::PI;

impl Tensor {
    /// −x. Every numeric dtype; integers wrap.
    pub fn neg(&self) -> Result<Tensor> {
        record_linear("neg", map(self, unary::Neg::ROW)?, self, |g| g.neg())
    }

    /// |x|, with derivative sign(x), so 0 at 0. Every numeric dtype.
    pub fn abs(&self) -> Result<Tensor> {
        record_input("abs", map(self, unary::Abs::ROW)?, self, Fused::new(backward::Abs::ROW), |x, g| g.mul(&x.sign()?))
    }

    /// −1 or 1 with the sign of x; zeros and NaN stay. Its derivative is 0. Every numeric dtype.
    pub fn sign(&self) -> Result<Tensor> {
        record_flat("sign", map(self, unary::Sign::ROW)?, self)
    }

    /// e^x.
    pub fn exp(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_output("exp", map(x, unary::Exp::ROW)?, x, None, |y, g| g.mul(y))
    }

    /// e^x − 1, accurate near 0.
    pub fn expm1(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_output("expm1", map(x, unary::Expm1::ROW)?, x, Fused::new(backward::Expm1::ROW), |y, g| g.mul(&y.add_scalar(1.0)?))
    }

    /// The natural logarithm; −∞ at 0, NaN below.
    pub fn log(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_input("log", map(x, unary::Log::ROW)?, x, None, |x, g| g.div(x))
    }

    /// ln(1 + x), accurate near 0.
    pub fn log1p(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_input("log1p", map(x, unary::Log1p::ROW)?, x, Fused::new(backward::Log1p::ROW), |x, g| g.div(&x.add_scalar(1.0)?))
    }

    /// √x; NaN below 0.
    pub fn sqrt(&self) -> Result<Tensor> {
        record_output("sqrt", map(self, unary::Sqrt::ROW)?, self, Fused::new(backward::Sqrt::ROW), |y, g| g.div(&y.mul_scalar(2.0)?))
    }

    /// 1/√x.
    pub fn rsqrt(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_output("rsqrt", map(x, unary::Rsqrt::ROW)?, x, Fused::new(backward::Rsqrt::ROW), |y, g| {
            g.mul(&y.square()?.mul(y)?)?.mul_scalar(-0.5)
        })
    }

    /// 1/x.
    pub fn recip(&self) -> Result<Tensor> {
        let x = &*raised(self)?;
        record_output("recip", map(x, unary::Recip::ROW)?, x, Fused::new(backward::Recip::ROW), |y, g| g.mul(&y.square()?)?.neg())
    }

    /// x². Every numeric dtype.
    pub fn square(&self) -> Result<Tensor> {
        record_input("square", map(self, unary::Square::ROW)?, self, Fused::new(backward::Square::ROW), |x, g| g.mul(x)?.mul_scalar(2.0))
    }

    /// sin x, x in radians.
    pub fn sin(&self) -> Result<Tensor> {
        record_input("sin", map(self, unary::Sin::ROW)?, self, Fused::new(backward::Sin::ROW), |x, g| g.mul(&x.cos()?))
    }

    /// cos x, x in radians.
    pub fn cos(&self) -> Result<Tensor> {
        record_input("cos", map(self, unary::Cos::ROW)?, self, Fused::new(backward::Cos::ROW), |x, g| g.mul(&x.sin()?)?.neg())
    }

    /// The error function 2/√π ∫₀ˣ e^(−t²) dt.
    pub fn erf(&self) -> Result<Tensor> {
        let rule = |x: &Tensor, g: &Tensor| g.mul(&x.square()?.neg()?.exp()?)?.mul_scalar(2.0 / PI.sqrt());
        record_input("erf", map(self, unary::Erf::ROW)?, self, Fused::new(backward::Erf::ROW), rule)
    }

    /// The largest integer not above x. Its derivative is 0.
    pub fn floor(&self) -> Result<Tensor> {
        record_flat("floor", map(self, unary::Floor::ROW)?, self)
    }

    /// The smallest integer not below x. Its derivative is 0.
    pub fn ceil(&self) -> Result<Tensor> {
        record_flat("ceil", map(self, unary::Ceil::ROW)?, self)
    }

    /// The nearest integer, halves to even. Its derivative is 0.
    pub fn round(&self) -> Result<Tensor> {
        record_flat("round", map(self, unary::Round::ROW)?, self)
    }
}
