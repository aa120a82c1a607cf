//! Functions of two and of three operands.

use super::rows;
use crate::cpu::math::{self, double};
use crate::cpu::simd::{F32s, Simd};

rows! { BINARY, 2;
    /// a + b.
    Add("add", 0.25) |s, [a, b], p| "a + b" => a + b; f64: a + b; int: a.add(b),
    /// a − b.
    Sub("sub", 0.25) |s, [a, b], p| "a - b" => a - b; f64: a - b; int: a.sub(b),
    /// a·b.
    Mul("mul", 0.25) |s, [a, b], p| "a * b" => a * b; f64: a * b; int: a.mul(b),
    /// a/b; of integers rounded towards zero.
    Div("div", 0.4) |s, [a, b], p| "math::divide(a, b)" => a / b; f64: a / b; int: a.div(b),
    /// a − b·⌊a/b⌋.
    Rem("remainder", 0.6) |s, [a, b], p| "math::remainder(a, b)" => math::remainder(s, a, b); f64: remainder(a, b); int: a.rem(b),
    /// a^b.
    Pow("pow", 2.5) |s, [a, b], p| "math::power(a, b)" => math::pow(s, a, b); f64: a.powf(b); int: a.pow(b),
    /// The larger; NaN if either is.
    Maximum("maximum", 0.25) |s, [a, b], p| "a != a ? a : (a > b ? a : b)" => math::maximum(s, a, b);
        f64: if a > b || a.is_nan() { a } else { b }; int: a.max(b),
    /// The smaller; NaN if either is.
    Minimum("minimum", 0.25) |s, [a, b], p| "a != a ? a : (a < b ? a : b)" => math::minimum(s, a, b);
        f64: if a < b || a.is_nan() { a } else { b }; int: a.min(b),
    /// max(x, 0) − x·t + ln(1 + e^−|x|).
    BceWithLogits("bce_with_logits", 1.4) |s, [x, t], p| "(x <= 0 ? A(0) : x) - x * t + math::softplus(-math::abs(x))" =>
        s.zero().or_else(x.le(s.zero()), x) - x * t + math::softplus(s, -x.abs());
        f64: (if x <= 0.0 { 0.0 } else { x }) - x * t + double::softplus(-x.abs()),
    /// The angle of the point (b, a).
    Atan2("atan2", 1.5) |s, [a, b], p| "math::atan2(a, b)" => math::atan2(s, a, b); f64: a.atan2(b),
}

rows! { TERNARY, 3;
    /// a + w·(b − a), from the nearer end.
    Lerp("lerp", 0.4) |s, [a, b, w], p| "math::abs(w) < A(0.5) ? a + w * (b - a) : b - (b - a) * (A(1) - w)" => {
        let step = b - a;
        w.mul_add(step, a).or_else(w.abs().lt(s.splat(0.5)), (w - s.splat(1.0)).mul_add(step, b))
    }; f64: if w.abs() < 0.5 { a + w * (b - a) } else { b - (b - a) * (1.0 - w) },
}

fn remainder(a: f64, b: f64) -> f64 {
    let r = a % b;
    if r != 0.0 && (r < 0.0) != (b < 0.0) { r + b } else { r }
}
