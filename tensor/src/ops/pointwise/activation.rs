//! Activation functions. Float dtypes.

use super::kernel::{Arg, Fused, apply, map, record_input, record_output};
use crate::{Result, Tensor};
use kiln_kernels::pointwise::{Params, Row, backward, unary};
use std::f64::consts::{PI, SQRT_2};

/// √(2/π) and the cubic term of GELU's approximation by tanh (Hendrycks and Gimpel 2016).
const GELU_SCALE: f64 = 0.797_884_560_802_865_4;
const GELU_CUBIC: f64 = 0.044_715;

/// An activation that other operations can compute in their own pass: [`Tensor::linear_activation`], [`Tensor::batch_norm_activation`],
/// [`Tensor::batch_norm_eval_activation`], [`Tensor::group_norm_activation`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Activation {
    /// [`Tensor::relu`].
    Relu,
    /// [`Tensor::leaky_relu`] with this slope.
    LeakyRelu(f64),
    /// [`Tensor::gelu`].
    Gelu,
    /// [`Tensor::gelu_tanh`].
    GeluTanh,
    /// [`Tensor::silu`].
    Silu,
}

impl Activation {
    /// Its row of the pointwise table, and that one's parameters.
    pub(crate) fn row(self) -> (&'static Row<1>, Params) {
        match self {
            Activation::Relu => (unary::Relu::ROW, [0.0; 2]),
            Activation::LeakyRelu(slope) => (unary::LeakyRelu::ROW, [slope, 0.0]),
            Activation::Gelu => (unary::Gelu::ROW, [0.0; 2]),
            Activation::GeluTanh => (unary::GeluTanh::ROW, [0.0; 2]),
            Activation::Silu => (unary::Silu::ROW, [0.0; 2]),
        }
    }

    /// The row of its derivative: of what the function reads, and of the gradient.
    pub(crate) fn backward_row(self) -> &'static Row<2> {
        match self {
            Activation::Relu => backward::Relu::ROW,
            Activation::LeakyRelu(_) => backward::LeakyRelu::ROW,
            Activation::Gelu => backward::Gelu::ROW,
            Activation::GeluTanh => backward::GeluTanh::ROW,
            Activation::Silu => backward::Silu::ROW,
        }
    }

    /// Whether the derivative needs what the function was computed from, and not only its values.
    pub(crate) fn reads_input(self) -> bool {
        self != Activation::Relu
    }

    /// The values, not recorded.
    pub(crate) fn of(self, x: &Tensor) -> Result<Tensor> {
        let (row, params) = self.row();
        apply(row, params, [Arg::Tensor(x)])
    }

    /// Records `out`, the values for `x`. Of an `x` that is not [read](Self::reads_input), only the place in the graph counts.
    pub(crate) fn record(self, out: Tensor, x: &Tensor) -> Result<Tensor> {
        let fused = Fused::with(self.backward_row(), self.row().1);
        match self {
            // The output is positive where the input is.
            Activation::Relu => record_output("relu", out, x, fused, |y, g| g.masked_fill(&y.le_scalar(0.0)?, 0.0)),
            Activation::LeakyRelu(slope) => {
                record_input("leaky_relu", out, x, fused, move |x, g| x.gt_scalar(0.0)?.where_cond(g, &g.mul_scalar(slope)?))
            }
            Activation::Gelu => record_input("gelu", out, x, fused, |x, g| {
                // g·(Φ(x) + x·φ(x))
                let cdf = x.mul_scalar(1.0 / SQRT_2)?.erf()?.add_scalar(1.0)?.mul_scalar(0.5)?;
                let pdf = x.square()?.mul_scalar(-0.5)?.exp()?.mul_scalar(1.0 / (2.0 * PI).sqrt())?;
                g.mul(&cdf.add(&x.mul(&pdf)?)?)
            }),
            Activation::GeluTanh => record_input("gelu_tanh", out, x, fused, |x, g| {
                let inner = x.mul(&x.square()?.mul_scalar(GELU_CUBIC)?.add_scalar(1.0)?)?.mul_scalar(GELU_SCALE)?;
                let slope = x.square()?.mul_scalar(3.0 * GELU_CUBIC)?.add_scalar(1.0)?.mul_scalar(GELU_SCALE)?;
                let t = inner.tanh()?;
                let left = t.add_scalar(1.0)?;
                let right = x.mul(&slope)?.mul(&t.square()?.rsub_scalar(1.0)?)?;
                g.mul(&left.add(&right)?)?.mul_scalar(0.5)
            }),
            Activation::Silu => record_input("silu", out, x, fused, |x, g| {
                // g·σ·(1 + x·(1 − σ))
                let s = x.sigmoid()?;
                g.mul(&s.mul(&x.mul(&s.rsub_scalar(1.0)?)?.add_scalar(1.0)?)?)
            }),
        }
    }
}

impl Tensor {
    /// The function that `activation` names.
    pub fn activate(&self, activation: Activation) -> Result<Tensor> {
        activation.record(activation.of(self)?, self)
    }

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
        self.activate(Activation::Relu)
    }

    /// x above 0, `slope`·x elsewhere.
    pub fn leaky_relu(&self, slope: f64) -> Result<Tensor> {
        self.activate(Activation::LeakyRelu(slope))
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
        self.activate(Activation::Gelu)
    }

    /// GELU's approximation ½x(1 + tanh(√(2/π)(x + 0.044715x³))), as GPT-2 has it.
    pub fn gelu_tanh(&self) -> Result<Tensor> {
        self.activate(Activation::GeluTanh)
    }

    /// x·σ(x), also called swish.
    pub fn silu(&self) -> Result<Tensor> {
        self.activate(Activation::Silu)
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
