//! Activation functions. Float dtypes.

use super::kernel::{map, record_input, record_output};
use crate::{Result, Tensor};
use kiln_kernels::cpu::math::double;
use std::f64::consts::{PI, SQRT_2};

/// √(2/π) and the cubic term of GELU's approximation by tanh (Hendrycks and Gimpel 2016).
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
const GELU_CUBIC: f64 = 0.044_715;

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + (GELU_SCALE * (x + GELU_CUBIC * x * x * x)).tanh())
}

impl Tensor {
    /// tanh x.
    pub fn tanh(&self) -> Result<Tensor> {
        // g·(1 − y²)
        record_output("tanh", map(self, "tanh", f64::tanh)?, self, |y, g| g.sub(&g.mul(&y.square()?)?))
    }

    /// The logistic function 1/(1 + e^(−x)).
    pub fn sigmoid(&self) -> Result<Tensor> {
        // g·y·(1 − y)
        record_output("sigmoid", map(self, "sigmoid", double::sigmoid)?, self, |y, g| g.mul(&y.sub(&y.square()?)?))
    }

    /// max(x, 0), with derivative 0 at 0.
    pub fn relu(&self) -> Result<Tensor> {
        let f = |x: f64| if x > 0.0 || x.is_nan() { x } else { 0.0 };
        record_output("relu", map(self, "relu", f)?, self, |y, g| g.masked_fill(&y.le_scalar(0.0)?, 0.0))
    }

    /// x above 0, `slope`·x elsewhere.
    pub fn leaky_relu(&self, slope: f64) -> Result<Tensor> {
        let out = map(self, "leaky_relu", |x| if x > 0.0 { x } else { slope * x })?;
        record_input("leaky_relu", out, self, move |x, g| x.gt_scalar(0.0)?.where_cond(g, &g.mul_scalar(slope)?))
    }

    /// x above 0, α(e^x − 1) elsewhere (Clevert et al. 2015).
    pub fn elu(&self, alpha: f64) -> Result<Tensor> {
        let out = map(self, "elu", |x| if x > 0.0 { x } else { alpha * x.exp_m1() })?;
        record_input("elu", out, self, move |x, g| {
            // Below 0 only, so that the exponential of a large x does not overflow into the selected branch's derivative.
            let below = g.mul(&x.clamp(None, 0.0)?.exp()?)?.mul_scalar(alpha)?;
            x.gt_scalar(0.0)?.where_cond(g, &below)
        })
    }

    /// x·Φ(x), with the normal distribution's Φ by the error function (Hendrycks and Gimpel 2016).
    pub fn gelu(&self) -> Result<Tensor> {
        record_input("gelu", map(self, "gelu", |x| x * double::normal_cdf(x))?, self, |x, g| {
            // g·(Φ(x) + x·φ(x))
            let cdf = x.mul_scalar(1.0 / SQRT_2)?.erf()?.add_scalar(1.0)?.mul_scalar(0.5)?;
            let pdf = x.square()?.mul_scalar(-0.5)?.exp()?.mul_scalar(1.0 / (2.0 * PI).sqrt())?;
            g.mul(&cdf.add(&x.mul(&pdf)?)?)
        })
    }

    /// GELU's approximation ½x(1 + tanh(√(2/π)(x + 0.044715x³))), as GPT-2 has it.
    pub fn gelu_tanh(&self) -> Result<Tensor> {
        record_input("gelu_tanh", map(self, "gelu_tanh", gelu_tanh)?, self, |x, g| {
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
        record_input("silu", map(self, "silu", |x| x * double::sigmoid(x))?, self, |x, g| {
            // g·σ·(1 + x·(1 − σ))
            let s = x.sigmoid()?;
            g.mul(&s.mul(&x.mul(&s.rsub_scalar(1.0)?)?.add_scalar(1.0)?)?)
        })
    }

    /// ln(1 + e^x), without overflow.
    pub fn softplus(&self) -> Result<Tensor> {
        record_input("softplus", map(self, "softplus", double::softplus)?, self, |x, g| g.mul(&x.sigmoid()?))
    }

    /// x·tanh(ln(1 + e^x)) (Misra 2019).
    pub fn mish(&self) -> Result<Tensor> {
        record_input("mish", map(self, "mish", |x| x * double::softplus(x).tanh())?, self, |x, g| {
            // g·(t + x·σ·(1 − t²)), t = tanh(softplus(x))
            let t = x.softplus()?.tanh()?;
            g.mul(&t.add(&x.mul(&x.sigmoid()?)?.mul(&t.square()?.rsub_scalar(1.0)?)?)?)
        })
    }

    /// x·min(max(x + 3, 0), 6)/6 (Howard et al. 2019).
    pub fn hardswish(&self) -> Result<Tensor> {
        let out = map(self, "hardswish", |x| x * (x + 3.0).clamp(0.0, 6.0) / 6.0)?;
        record_input("hardswish", out, self, |x, g| {
            let between = g.mul(&x.mul_scalar(1.0 / 3.0)?.add_scalar(0.5)?)?;
            x.ge_scalar(3.0)?.where_cond(g, &between)?.masked_fill(&x.le_scalar(-3.0)?, 0.0)
        })
    }
}
