//! Functions of one operand.

use super::rows;
use crate::cpu::math::{self, double};
use crate::cpu::simd::{F32s, Simd};

rows! { UNARY, 1;
    /// −x.
    Neg("neg", 0.2) |s, [x], p| "-x" => -x; f64: -x; int: x.neg(); words: |w| w ^ 0x8000,
    /// |x|.
    Abs("abs", 0.2) |s, [x], p| "math::abs(x)" => x.abs(); f64: x.abs(); int: if x < I::ZERO { x.neg() } else { x }; words: |w| w & 0x7fff,
    /// −1 or 1 with the sign of x; zeros and NaN stay.
    Sign("sign", 0.2) |s, [x], p| "x > 0 ? A(1) : x < 0 ? A(-1) : x" => math::sign(s, x);
        f64: sign(x); int: if x > I::ZERO { I::ONE } else if x < I::ZERO { I::ONE.neg() } else { I::ZERO },
    /// e^x.
    Exp("exp", 0.4) |s, [x], p| "math::exp(x)" => math::exp(s, x); f64: x.exp(),
    /// e^x − 1.
    Expm1("expm1", 0.6) |s, [x], p| "math::expm1(x)" => math::expm1(s, x); f64: x.exp_m1(),
    /// ln x.
    Log("log", 0.6) |s, [x], p| "math::log(x)" => math::log(s, x); f64: x.ln(),
    /// ln(1 + x).
    Log1p("log1p", 0.7) |s, [x], p| "math::log1p(x)" => math::log1p(s, x); f64: x.ln_1p(),
    /// √x.
    Sqrt("sqrt", 0.4) |s, [x], p| "math::sqrt(x)" => x.sqrt(); f64: x.sqrt(),
    /// 1/√x.
    Rsqrt("rsqrt", 0.7) |s, [x], p| "A(1) / math::sqrt(x)" => s.splat(1.0) / x.sqrt(); f64: 1.0 / x.sqrt(),
    /// 1/x.
    Recip("recip", 0.4) |s, [x], p| "A(1) / x" => s.splat(1.0) / x; f64: 1.0 / x,
    /// x².
    Square("square", 0.2) |s, [x], p| "x * x" => x * x; f64: x * x; int: x.mul(x),
    /// x³.
    Cube("cube", 0.2) |s, [x], p| "x * x * x" => x * x * x; f64: x * x * x,
    /// sin x.
    Sin("sin", 1.0) |s, [x], p| "math::sin(x)" => math::sin(s, x); f64: x.sin(),
    /// cos x.
    Cos("cos", 1.0) |s, [x], p| "math::cos(x)" => math::cos(s, x); f64: x.cos(),
    /// tanh x.
    Tanh("tanh", 0.8) |s, [x], p| "math::tanh(x)" => math::tanh(s, x); f64: x.tanh(),
    /// 1/(1 + e^−x).
    Sigmoid("sigmoid", 0.7) |s, [x], p| "math::sigmoid(x)" => math::sigmoid(s, x); f64: double::sigmoid(x),
    /// The error function.
    Erf("erf", 0.8) |s, [x], p| "math::erf(x)" => math::erf(s, x); f64: double::erf(x),
    /// max(x, 0); NaN stays.
    Relu("relu", 0.2) |s, [x], p| "x <= 0 ? A(0) : x" => s.zero().or_else(x.le(s.zero()), x);
        f64: if x <= 0.0 { 0.0 } else { x }; int: x.max(I::ZERO),
    /// x if positive, else p₀·x.
    LeakyRelu("leaky_relu", 0.2) |s, [x], p| "x > 0 ? x : p[0] * x" => x.or_else(x.gt(s.zero()), p[0] * x);
        f64: if x > 0.0 { x } else { p[0] * x },
    /// x if positive, else p₀·(e^x − 1).
    Elu("elu", 0.7) |s, [x], p| "x > 0 ? x : p[0] * math::expm1(x)" => math::elu(s, x, p[0]);
        f64: if x > 0.0 { x } else { p[0] * x.exp_m1() },
    /// x·Φ(x).
    Gelu("gelu", 0.6) |s, [x], p| "x * math::normcdf(x)" => math::gelu(s, x); f64: x * double::normal_cdf(x),
    /// x/2·(1 + tanh(√(2/π)·(x + 0.044715·x³))).
    GeluTanh("gelu_tanh", 0.8) |s, [x], p| "x * math::sigmoid(math::gelu_tanh_argument(x))" => math::gelu_tanh(s, x);
        f64: x * double::sigmoid(1.595_769_121_605_730_7 * (x + 0.044715 * x * x * x)),
    /// x·σ(x).
    Silu("silu", 0.7) |s, [x], p| "x * math::sigmoid(x)" => math::silu(s, x); f64: x * double::sigmoid(x),
    /// ln(1 + e^(p₀x))/p₀, and x itself where p₀x is above p₁.
    Softplus("softplus", 1.2) |s, [x], p| "p[0] * x > p[1] ? x : math::softplus(p[0] * x) / p[0]" => {
        let scaled = p[0] * x;
        x.or_else(scaled.gt(p[1]), math::softplus(s, scaled) / p[0])
    }; f64: if p[0] * x > p[1] { x } else { double::softplus(p[0] * x) / p[0] },
    /// x·tanh(ln(1 + e^x)).
    Mish("mish", 0.8) |s, [x], p| "x * math::tanh(math::softplus(x))" => math::mish(s, x); f64: x * double::softplus(x).tanh(),
    /// x·min(max(x + 3, 0), 6)/6.
    Hardswish("hardswish", 0.3) |s, [x], p| "x * (math::clamp(x + A(3), A(0), A(6)) / A(6))" =>
        x * (math::clamp(s, x + s.splat(3.0), 0.0, 6.0) / s.splat(6.0));
        f64: x * ((x + 3.0).clamp(0.0, 6.0) / 6.0),
    /// x²/2 where |x| is below p₀, p₀·(|x| − p₀/2) elsewhere.
    Huber("huber", 0.3) |s, [x], p| "math::abs(x) < p[0] ? x * x * A(0.5) : (math::abs(x) - A(0.5) * p[0]) * p[0]" => {
        let (half, distance) = (s.splat(0.5), x.abs());
        (x * x * half).or_else(distance.lt(p[0]), (distance - half * p[0]) * p[0])
    }; f64: if x.abs() < p[0] { x * x * 0.5 } else { (x.abs() - 0.5 * p[0]) * p[0] },
    /// ln x, and 0 where x is 0.
    LogOfNonzero("log_of_nonzero", 0.6) |s, [x], p| "x == 0 ? A(0) : math::log(x)" => s.zero().or_else(x.eq(s.zero()), math::log(s, x));
        f64: if x == 0.0 { 0.0 } else { x.ln() },
    /// ln x, and −100 where that is less.
    BoundedLog("bounded_log", 0.6) |s, [x], p| "math::log(x) < A(-100) ? A(-100) : math::log(x)" => {
        let (log, least) = (math::log(s, x), s.splat(-100.0));
        least.or_else(log.lt(least), log)
    }; f64: { let log = x.ln(); if log < -100.0 { -100.0 } else { log } },
    /// The largest integer not above x.
    Floor("floor", 0.2) |s, [x], p| "math::floor(x)" => x.floor(); f64: x.floor(); int: x,
    /// The smallest integer not below x.
    Ceil("ceil", 0.2) |s, [x], p| "math::ceil(x)" => x.ceil(); f64: x.ceil(); int: x,
    /// The nearest integer; ties to even.
    Round("round", 0.2) |s, [x], p| "math::round(x)" => x.round(); f64: x.round_ties_even(); int: x,
    /// min(max(x, p₀), p₁); NaN stays.
    Clamp("clamp", 0.2) |s, [x], p| "math::clamp(x, p[0], p[1])" => p[1].min(p[0].max(x));
        f64: clamp(x, p[0], p[1]); int: x.max(p[0]).min(p[1]),
}

/// `f64::signum` has no zero.
pub(super) fn sign(x: f64) -> f64 {
    if x == 0.0 { x } else { x.signum() }
}

/// `f64::clamp` panics on bounds in the wrong order; here the upper one wins.
fn clamp(x: f64, low: f64, high: f64) -> f64 {
    let x = if x < low { low } else { x };
    if x > high { high } else { x }
}
