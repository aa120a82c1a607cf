//! Activation functions. Float dtypes.

use super::kernel::{Arg, Fused, apply, map, record_input, record_output};
use crate::{Result, Tensor};
use kiln_kernels::pointwise::{backward, unary};
use std::f64::consts::{PI, SQRT_2};

/// √(2/π) and the cubic term of GELU's approximation by tanh (Hendrycks and Gimpel 2016).
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
const GELU_CUBIC: f64 = 0.044_715;

impl Tensor {
    /// tanh x.
    pub fn tanh(&self) -> Result<Tensor> {
        // g·(1 − y²)
        record_output("tanh", map(self, unary::Tanh::ROW)?, self, Fused::new(backward::Tanh::ROW), |y, g| g.sub(&g.mul(&y.square()?)?))
    }

    /// The logistic function 1/(1 + e^(−x)).
    pub fn sigmoid(&self) -> Result<Tensor> {
        // g·y·(1 − y)
        record_output("sigmoid", map(self, unary::Sigmoid::ROW)?, self, Fused::new(backward::Sigmoid::ROW), |y, g| {
            g.mul(&y.sub(&y.square()?)?)
        })
    }

    /// max(x, 0), with derivative 0 at 0.
    pub fn relu(&self) -> Result<Tensor> {
        // The output is positive where the input is.
        record_output("relu", map(self, unary::Relu::ROW)?, self, Fused::new(backward::Relu::ROW), |y, g| {
            g.masked_fill(&y.le_scalar(0.0)?, 0.0)
        })
    }

    /// x above 0, `slope`·x elsewhere.
    pub fn leaky_relu(&self, slope: f64) -> Result<Tensor> {
        let params = [slope, 0.0];
        let out = apply(unary::LeakyRelu::ROW, params, [Arg::Tensor(self)])?;
        let fused = Fused::with(backward::LeakyRelu::ROW, params);
        record_input("leaky_relu", out, self, fused, move |x, g| x.gt_scalar(0.0)?.where_cond(g, &g.mul_scalar(slope)?))
    }

    /// x above 0, α(e^x − 1) elsewhere (Clevert et al. 2015).
    pub fn elu(&self, alpha: f64) -> Result<Tensor> {
        let params = [alpha, 0.0];
        let out = apply(unary::Elu::ROW, params, [Arg::Tensor(self)])?;
        let fused = Fused::with(backward::Elu::ROW, params);
        record_input("elu", out, self, fused, move |x, g| {
            // Below 0 only, so that the exponential of a large x does not overflow into the selected branch's derivative.
            let below = g.mul(&x.clamp(None, 0.0)?.exp()?)?.mul_scalar(alpha)?;
            x.gt_scalar(0.0)?.where_cond(g, &below)
        })
    }

    /// x·Φ(x), with the normal distribution's Φ by the error function (Hendrycks and Gimpel 2016).
    pub fn gelu(&self) -> Result<Tensor> {
        record_input("gelu", map(self, unary::Gelu::ROW)?, self, Fused::new(backward::Gelu::ROW), |x, g| {
            // g·(Φ(x) + x·φ(x))
            let cdf = x.mul_scalar(1.0 / SQRT_2)?.erf()?.add_scalar(1.0)?.mul_scalar(0.5)?;
            let pdf = x.square()?.mul_scalar(-0.5)?.exp()?.mul_scalar(1.0 / (2.0 * PI).sqrt())?;
            g.mul(&cdf.add(&x.mul(&pdf)?)?)
        })
    }

    /// GELU's approximation ½x(1 + tanh(√(2/π)(x + 0.044715x³))), as GPT-2 has it.
    pub fn gelu_tanh(&self) -> Result<Tensor> {
        record_input("gelu_tanh", map(self, unary::GeluTanh::ROW)?, self, Fused::new(backward::GeluTanh::ROW), |x, g| {
            let inner = x.mul(&x.square()?.mul_scalar(GELU_CUBIC)?.add_scalar(1.0)?)?.mul_scalar(GELU_SCALE)?;
            let slope = x.square()?.mul_scalar(3.0 * GELU_CUBIC)?.add_scalar(1.0)?.mul_scalar(GELU_SCALE)?;
            let t = inner.tanh()?;
            let left = t.add_scalar(1.0)?;
            let right = x.mul(&slope)?.mul(&t.square()?.rsub_scalar(1.0)?)?;
            g.mul(&left.add(&right)?)?.mul_scalar(0.5)
        })
    }

    /// x·σ(x), also called swish.
    pub fn silu(&self) -> Result<Tensor> {
        record_input("silu", map(self, unary::Silu::ROW)?, self, Fused::new(backward::Silu::ROW), |x, g| {
            // g·σ·(1 + x·(1 − σ))
            let s = x.sigmoid()?;
            g.mul(&s.mul(&x.mul(&s.rsub_scalar(1.0)?)?.add_scalar(1.0)?)?)
        })
    }

    /// ln(1 + e^x), without overflow.
    pub fn softplus(&self) -> Result<Tensor> {
        // Scale 1; the sum is exact beyond any threshold.
        let params = [1.0, f64::INFINITY];
        let out = apply(unary::Softplus::ROW, params, [Arg::Tensor(self)])?;
        record_input("softplus", out, self, Fused::with(backward::Softplus::ROW, params), |x, g| g.mul(&x.sigmoid()?))
    }

    /// x·tanh(ln(1 + e^x)) (Misra 2019).
    pub fn mish(&self) -> Result<Tensor> {
        record_input("mish", map(self, unary::Mish::ROW)?, self, Fused::new(backward::Mish::ROW), |x, g| {
            // g·(t + x·σ·(1 − t²)), t = tanh(softplus(x))
            let t = x.softplus()?.tanh()?;
            g.mul(&t.add(&x.mul(&x.sigmoid()?)?.mul(&t.square()?.rsub_scalar(1.0)?)?)?)
        })
    }

    /// x·min(max(x + 3, 0), 6)/6 (Howard et al. 2019).
    pub fn hardswish(&self) -> Result<Tensor> {
        record_input("hardswish", map(self, unary::Hardswish::ROW)?, self, Fused::new(backward::Hardswish::ROW), |x, g| {
            let between = g.mul(&x.mul_scalar(1.0 / 3.0)?.add_scalar(0.5)?)?;
            x.ge_scalar(3.0)?.where_cond(g, &between)?.masked_fill(&x.le_scalar(-3.0)?, 0.0)
        })
    }
}
