//! First derivatives as single passes: functions of what the forward pass saved (its input `x` or its output `y`) and of the gradient `g`.

use super::{rows, unary};
use crate::cpu::math::{self, double};
use crate::cpu::simd::{F32s, Simd};
use std::f64::consts::FRAC_2_SQRT_PI;

rows! { BACKWARD, 2;
    /// g·sign(x).
    Abs("abs_backward", 0.25) |s, [x, g], p| "g * (x > 0 ? A(1) : x < 0 ? A(-1) : x)" => g * math::sign(s, x); f64: g * unary::sign(x),
    /// g·(y + 1).
    Expm1("expm1_backward", 0.25) |s, [y, g], p| "g * (y + A(1))" => g * (y + s.splat(1.0)); f64: g * (y + 1.0),
    /// g/(1 + x).
    Log1p("log1p_backward", 0.4) |s, [x, g], p| "g / (A(1) + x)" => g / (s.splat(1.0) + x); f64: g / (1.0 + x),
    /// g/(2y).
    Sqrt("sqrt_backward", 0.4) |s, [y, g], p| "g / (y + y)" => g / (y + y); f64: g / (y + y),
    /// −g·y³/2.
    Rsqrt("rsqrt_backward", 0.25) |s, [y, g], p| "A(-0.5) * g * (y * y * y)" => s.splat(-0.5) * g * (y * y * y); f64: -0.5 * g * (y * y * y),
    /// −g·y².
    Recip("recip_backward", 0.25) |s, [y, g], p| "-g * (y * y)" => -g * (y * y); f64: -g * (y * y),
    /// 2·g·x.
    Square("square_backward", 0.25) |s, [x, g], p| "(g + g) * x" => (g + g) * x; f64: (g + g) * x,
    /// g·cos x.
    Sin("sin_backward", 1.0) |s, [x, g], p| "g * math::cos(x)" => g * math::cos(s, x); f64: g * x.cos(),
    /// −g·sin x.
    Cos("cos_backward", 1.0) |s, [x, g], p| "-g * math::sin(x)" => -g * math::sin(s, x); f64: -g * x.sin(),
    /// g·(1 − y²).
    Tanh("tanh_backward", 0.25) |s, [y, g], p| "g * (A(1) - y * y)" => g * (-y).mul_add(y, s.splat(1.0)); f64: g * (1.0 - y * y),
    /// g·y·(1 − y).
    Sigmoid("sigmoid_backward", 0.25) |s, [y, g], p| "g * (y * (A(1) - y))" => g * (y * (s.splat(1.0) - y)); f64: g * (y * (1.0 - y)),
    /// g·2/√π·e^(−x²).
    Erf("erf_backward", 0.5) |s, [x, g], p| "g * (A(1.12837916709551257390) * math::exp(-x * x))" => g * (s.splat(FRAC_2_SQRT_PI as f32) * math::exp(s, -(x * x)));
        f64: g * FRAC_2_SQRT_PI * (-x * x).exp(),
    /// g where x is positive.
    Relu("relu_backward", 0.25) |s, [x, g], p| "x > 0 ? g : A(0)" => g.or_else(x.gt(s.zero()), s.zero()); f64: if x > 0.0 { g } else { 0.0 },
    /// g where x is positive, else p₀·g.
    LeakyRelu("leaky_relu_backward", 0.25) |s, [x, g], p| "x > 0 ? g : p[0] * g" => g.or_else(x.gt(s.zero()), p[0] * g);
        f64: if x > 0.0 { g } else { p[0] * g },
    /// g where x is positive, else p₀·e^x·g.
    Elu("elu_backward", 0.5) |s, [x, g], p| "x > 0 ? g : p[0] * math::exp(x) * g" => g.or_else(x.gt(s.zero()), p[0] * math::exp(s, x) * g);
        f64: if x > 0.0 { g } else { p[0] * x.exp() * g },
    /// g·(Φ(x) + x·φ(x)).
    Gelu("gelu_backward", 0.9) |s, [x, g], p| "math::gelu_backward(x, g)" => g * math::gelu_and_slope(s, x)[1];
        f64: { let x = bounded(x); g * (double::normal_cdf(x) + x * double::normal_pdf(x)) },
    /// The derivative of the tanh form.
    GeluTanh("gelu_tanh_backward", 1.2) |s, [x, g], p| "math::gelu_tanh_backward(x, g)" => g * math::gelu_tanh_and_slope(s, x)[1]; f64: {
        const LINEAR: f64 = 1.595_769_121_605_730_7;
        let x = bounded(x);
        let y = double::sigmoid(LINEAR * (x + 0.044715 * x * x * x));
        g * (y * (1.0 + x * LINEAR * (1.0 + 3.0 * 0.044715 * x * x) * (1.0 - y)))
    },
    /// g·σ(x)·(1 + x·(1 − σ(x))).
    Silu("silu_backward", 1.0) |s, [x, g], p| "math::silu_backward(x, g)" => g * math::silu_and_slope(s, x)[1];
        f64: { let x = bounded(x); g * (double::sigmoid(x) * (1.0 + x * double::sigmoid(-x))) },
    /// g·σ(p₀x), and g itself where p₀x is above p₁.
    Softplus("softplus_backward", 0.8) |s, [x, g], p| "p[0] * x > p[1] ? g : g * math::sigmoid(p[0] * x)" => {
        let scaled = p[0] * x;
        g.or_else(scaled.gt(p[1]), g * math::sigmoid(s, scaled))
    }; f64: if p[0] * x > p[1] { g } else { g * double::sigmoid(p[0] * x) },
    /// The derivative of mish.
    Mish("mish_backward", 1.4) |s, [x, g], p| "math::mish_backward(x, g)" => math::mish_backward(s, x, g); f64: {
        let x = bounded(x);
        let t = double::softplus(x).tanh();
        g * (t + x * double::sigmoid(x) * (1.0 - t * t))
    },
    /// 0 below −3, g above 3, g·(x/3 + ½) between.
    Hardswish("hardswish_backward", 0.3) |s, [x, g], p| "x <= A(-3) ? A(0) : x < A(3) ? g * (x / A(3) + A(0.5)) : g" => {
        let middle = g * (x / s.splat(3.0) + s.splat(0.5));
        s.zero().or_else(x.le(s.splat(-3.0)), g.or_else(x.ge(s.splat(3.0)), middle))
    }; f64: if x <= -3.0 { 0.0 } else if x >= 3.0 { g } else { g * (x / 3.0 + 0.5) },
    /// g·min(max(x, −p₀), p₀).
    Huber("huber_backward", 0.3) |s, [x, g], p| "g * math::clamp(x, -p[0], p[0])" => g * p[0].min((-p[0]).max(x));
        f64: g * if x < -p[0] { -p[0] } else if x > p[0] { p[0] } else { x },
    /// g/x, and 0 where x is 0.
    LogOfNonzero("log_of_nonzero_backward", 0.4) |s, [x, g], p| "x == 0 ? A(0) : g / x" => s.zero().or_else(x.eq(s.zero()), g / x);
        f64: if x == 0.0 { 0.0 } else { g / x },
    /// g/x, and g·10¹² where x is less than 10⁻¹².
    BoundedLog("bounded_log_backward", 0.4) |s, [x, g], p| "g / (x < A(1e-12) ? A(1e-12) : x)" => {
        let least = s.splat(1e-12);
        g / least.or_else(x.lt(least), x)
    }; f64: g / if x < 1e-12 { 1e-12 } else { x },
    /// g where x lies within the bounds, both included.
    Clamp("clamp_backward", 0.25) |s, [x, g], p| "x >= p[0] && x <= p[1] ? g : A(0)" => g.or_else(x.ge(p[0]) & x.le(p[1]), s.zero());
        f64: if x >= p[0] && x <= p[1] { g } else { 0.0 },
}

/// Beyond ±128 every gate is open or shut, and infinity times 0 would be NaN.
fn bounded(x: f64) -> f64 {
    x.clamp(-128.0, 128.0)
}
