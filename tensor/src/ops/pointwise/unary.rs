//! Elementary functions of one tensor. Float dtypes, unless the text says more; f16 and bf16 compute in f32 and round once.

use super::kernel::{map, map_number, record_flat, record_input, record_linear, record_output};
use crate::{Result, Tensor};
use kiln_kernels::cpu::math::double;
use std::f64::consts::PI;

impl Tensor {
    /// −x. Every numeric dtype; integers wrap.
    pub fn neg(&self) -> Result<Tensor> {
        record_linear("neg", map_number(self, "neg", |x| -x)?, self, |g| g.neg())
    }

    /// |x|, with derivative sign(x), so 0 at 0. Every numeric dtype.
    pub fn abs(&self) -> Result<Tensor> {
        record_input("abs", map_number(self, "abs", f64::abs)?, self, |x, g| g.mul(&x.sign()?))
    }

    /// −1, 0 or 1; NaN for NaN. Its derivative is 0. Every numeric dtype.
    pub fn sign(&self) -> Result<Tensor> {
        record_flat("sign", map_number(self, "sign", |x| if x == 0.0 || x.is_nan() { x } else { x.signum() })?, self)
    }

    /// e^x.
    pub fn exp(&self) -> Result<Tensor> {
        record_output("exp", map(self, "exp", f64::exp)?, self, |y, g| g.mul(y))
    }

    /// e^x − 1, accurate near 0.
    pub fn expm1(&self) -> Result<Tensor> {
        record_output("expm1", map(self, "expm1", f64::exp_m1)?, self, |y, g| g.mul(&y.add_scalar(1.0)?))
    }

    /// The natural logarithm; −∞ at 0, NaN below.
    pub fn log(&self) -> Result<Tensor> {
        record_input("log", map(self, "log", f64::ln)?, self, |x, g| g.div(x))
    }

    /// ln(1 + x), accurate near 0.
    pub fn log1p(&self) -> Result<Tensor> {
        record_input("log1p", map(self, "log1p", f64::ln_1p)?, self, |x, g| g.div(&x.add_scalar(1.0)?))
    }

    /// √x; NaN below 0.
    pub fn sqrt(&self) -> Result<Tensor> {
        record_output("sqrt", map(self, "sqrt", f64::sqrt)?, self, |y, g| g.div(&y.mul_scalar(2.0)?))
    }

    /// 1/√x.
    pub fn rsqrt(&self) -> Result<Tensor> {
        record_output("rsqrt", map(self, "rsqrt", |x| 1.0 / x.sqrt())?, self, |y, g| g.mul(&y.square()?.mul(y)?)?.mul_scalar(-0.5))
    }

    /// 1/x.
    pub fn recip(&self) -> Result<Tensor> {
        record_output("recip", map(self, "recip", |x| 1.0 / x)?, self, |y, g| g.mul(&y.square()?)?.neg())
    }

    /// x². Every numeric dtype.
    pub fn square(&self) -> Result<Tensor> {
        record_input("square", map_number(self, "square", |x| x * x)?, self, |x, g| g.mul(x)?.mul_scalar(2.0))
    }

    /// sin x, x in radians.
    pub fn sin(&self) -> Result<Tensor> {
        record_input("sin", map(self, "sin", f64::sin)?, self, |x, g| g.mul(&x.cos()?))
    }

    /// cos x, x in radians.
    pub fn cos(&self) -> Result<Tensor> {
        record_input("cos", map(self, "cos", f64::cos)?, self, |x, g| g.mul(&x.sin()?)?.neg())
    }

    /// The error function 2/√π ∫₀ˣ e^(−t²) dt.
    pub fn erf(&self) -> Result<Tensor> {
        let rule = |x: &Tensor, g: &Tensor| g.mul(&x.square()?.neg()?.exp()?)?.mul_scalar(2.0 / PI.sqrt());
        record_input("erf", map(self, "erf", double::erf)?, self, rule)
    }

    /// The largest integer not above x. Its derivative is 0.
    pub fn floor(&self) -> Result<Tensor> {
        record_flat("floor", map(self, "floor", f64::floor)?, self)
    }

    /// The smallest integer not below x. Its derivative is 0.
    pub fn ceil(&self) -> Result<Tensor> {
        record_flat("ceil", map(self, "ceil", f64::ceil)?, self)
    }

    /// The nearest integer, halves to even. Its derivative is 0.
    pub fn round(&self) -> Result<Tensor> {
        record_flat("round", map(self, "round", f64::round_ties_even)?, self)
    }
}
