//! Functions of one element, or one of each operand.

use crate::harness::{Case, DTypes, case};
use crate::reference::Array;
use kiln_kernels::cpu::math::double;
use kiln_tensor::{Activation, DType, Result, Tensor, fuse};

pub fn cases() -> Vec<Case> {
    [unary(), activations(), gates(), binary(), scalars(), comparisons(), selection()].into_iter().flatten().collect()
}

/// A function of one tensor, on contiguous, scalar, empty and special inputs.
fn one(name: &'static str, f: fn(&Tensor) -> Result<Tensor>, reference: fn(f64) -> f64) -> Case {
    case(name, move |x| f(&x[0]), move |x| x[0].map(reference))
        .sample(&[&[2, 3, 5]])
        .sample(&[&[]])
        .sample(&[&[0, 3]])
        .specials()
        .large(&[&[300_001]])
}

fn unary() -> Vec<Case> {
    let positive = &[(0.3, 3.0)];
    // Away from the steps of the rounding functions, for the sake of differences and of f16.
    let off_steps = |name, f: fn(&Tensor) -> Result<Tensor>, r| one(name, f, r).domain(&[(0.1, 0.4)]);
    vec![
        one("neg", Tensor::neg, |x| -x),
        one("abs", Tensor::abs, f64::abs),
        one("sign", Tensor::sign, |x| if x == 0.0 || x.is_nan() { x } else { x.signum() }),
        one("exp", Tensor::exp, f64::exp),
        one("expm1", Tensor::expm1, f64::exp_m1),
        one("log", Tensor::log, f64::ln).domain(positive),
        one("log1p", Tensor::log1p, f64::ln_1p).domain(positive),
        one("sqrt", Tensor::sqrt, f64::sqrt).domain(positive),
        one("rsqrt", Tensor::rsqrt, |x| 1.0 / x.sqrt()).domain(positive),
        one("recip", Tensor::recip, |x| 1.0 / x).domain(positive),
        one("square", Tensor::square, |x| x * x),
        one("sin", Tensor::sin, f64::sin),
        one("cos", Tensor::cos, f64::cos),
        one("erf", Tensor::erf, double::erf),
        off_steps("floor", Tensor::floor, f64::floor),
        off_steps("ceil", Tensor::ceil, f64::ceil),
        off_steps("round", Tensor::round, f64::round_ties_even),
        case("neg", |x| x[0].neg()?.abs()?.square()?.sign(), |x| x[0].map(|x| if x == 0.0 { 0.0 } else { 1.0 }))
            .label("integers")
            .dtypes(DTypes::Numbers)
            .domain(&[(1.0, 9.0)])
            .not_differentiable()
            .sample(&[&[2, 3]]),
    ]
}

pub fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn activations() -> Vec<Case> {
    vec![
        one("tanh", Tensor::tanh, f64::tanh),
        one("sigmoid", Tensor::sigmoid, double::sigmoid),
        one("relu", Tensor::relu, |x| if x <= 0.0 { 0.0 } else { x }),
        one("leaky_relu", |x| x.leaky_relu(0.2), |x| if x > 0.0 { x } else { 0.2 * x }),
        one("elu", |x| x.elu(1.5), |x| if x > 0.0 { x } else { 1.5 * x.exp_m1() }),
        one("gelu", Tensor::gelu, |x| if x == f64::NEG_INFINITY { f64::NAN } else { x * double::normal_cdf(x) }),
        one("gelu_tanh", Tensor::gelu_tanh, gelu_tanh),
        one("silu", Tensor::silu, |x| x * double::sigmoid(x)),
        one("activate", |x| x.activate(Activation::Silu), |x| x * double::sigmoid(x)),
        one("softplus", Tensor::softplus, double::softplus),
        one("mish", Tensor::mish, |x| x * double::softplus(x).tanh()),
        one("hardswish", Tensor::hardswish, |x| x * (x + 3.0).clamp(0.0, 6.0) / 6.0),
    ]
}

/// The halves of `x` along `dim`.
fn halves(x: &Array, dim: usize) -> [Array; 2] {
    let mut shape = x.shape.clone();
    shape[dim] /= 2;
    [0, shape[dim]].map(|first| {
        Array::from_fn(&shape, |i| {
            let mut at = i.to_vec();
            at[dim] += first;
            x.at(&at)
        })
    })
}

fn gates() -> Vec<Case> {
    let glu = |dim: usize| {
        case(
            "glu",
            move |x| x[0].glu(dim as isize),
            move |x| {
                let [a, b] = halves(&x[0], dim);
                a.zip(&b, |a, b| a * double::sigmoid(b))
            },
        )
    };
    let gate = |name, f, reference| two(name, f, reference).sample(&[&[4, 1, 2], &[3, 2]]);
    vec![
        gate("swiglu", Tensor::swiglu, |gate, up| gate * double::sigmoid(gate) * up),
        gate("geglu", Tensor::geglu, |gate, up| if gate == f64::NEG_INFINITY { f64::NAN } else { gate * double::normal_cdf(gate) * up }),
        gate("geglu_tanh", Tensor::geglu_tanh, |gate, up| gelu_tanh(gate) * up),
        glu(1).sample(&[&[3, 4]]).sample(&[&[2, 6, 3]]).sample(&[&[0, 4]]).sample(&[&[3, 0]]).large(&[&[300, 1000]]),
        glu(0).label("rows").sample(&[&[4]]).sample(&[&[4, 3]]).large(&[&[200, 1001]]),
    ]
}

/// A function of two tensors, same-shaped and broadcasting, a bias along the last dimension and one along the channels included.
fn two(name: &'static str, f: fn(&Tensor, &Tensor) -> Result<Tensor>, reference: fn(f64, f64) -> f64) -> Case {
    case(name, move |x| f(&x[0], &x[1]), move |x| x[0].zip(&x[1], reference))
        .sample(&[&[2, 3], &[2, 3]])
        .sample(&[&[2, 1, 3], &[4, 1]])
        .sample(&[&[2, 3, 2, 2], &[1, 3, 1, 1]])
        .sample(&[&[], &[3]])
        .sample(&[&[0, 3], &[3]])
        .specials()
        .large(&[&[300, 1001], &[1001]])
}

/// Sums of a chain's results over some dimensions.
fn fused_total(label: &str, dims: &'static [isize], axes: &'static [usize]) -> Case {
    case(
        "sum",
        move |x| fuse(|[x, b, y]| y + (x * b).tanh())?.sum([&x[0], &x[1], &x[2]], dims),
        move |x| x[0].zip(&x[1], |x, b| (x * b).tanh()).zip(&x[2], |t, y| y + t).fold(axes, |v| v.iter().sum()),
    )
    .label(&format!("{label} of a chain"))
    .sample(&[&[2, 3], &[3], &[2, 3]])
    .sample(&[&[5, 40], &[5, 1], &[1, 40]])
    .sample(&[&[2, 0], &[1], &[2, 0]])
    // Of 300,300 terms of either sign little would be left to measure errors against.
    .domain(&[(0.1, 1.0); 3])
    .large(&[&[300, 1001], &[1001], &[300, 1001]])
}

fn binary() -> Vec<Case> {
    vec![
        two("add", Tensor::add, |a, b| a + b),
        two("sub", Tensor::sub, |a, b| a - b),
        two("mul", Tensor::mul, |a, b| a * b),
        two("div", Tensor::div, |a, b| a / b).domain(&[(-2.0, 2.0), (0.5, 2.0)]),
        case("rem", |x| x[0].rem(&x[1]), |x| x[0].zip(&x[1], |a, b| a - b * (a / b).floor()))
            .domain(&[(2.1, 2.9), (0.93, 1.02)])
            .sample(&[&[2, 3], &[2, 3]])
            .sample(&[&[2, 1, 3], &[4, 1]]),
        case("pow", |x| x[0].pow(&x[1]), |x| x[0].zip(&x[1], f64::powf))
            .domain(&[(0.3, 2.0), (-2.0, 2.0)])
            .sample(&[&[2, 3], &[2, 3]])
            .sample(&[&[2, 1, 3], &[4, 1]])
            .specials(),
        two("maximum", Tensor::maximum, |a, b| {
            if a.is_nan() || b.is_nan() {
                f64::NAN
            } else if a > b {
                a
            } else {
                b
            }
        })
        .distinct(),
        two("minimum", Tensor::minimum, |a, b| {
            if a.is_nan() || b.is_nan() {
                f64::NAN
            } else if a < b {
                a
            } else {
                b
            }
        })
        .distinct(),
        two("atan2", Tensor::atan2, f64::atan2).domain(&[(0.2, 2.0), (-2.0, -0.2)]),
        case(
            "call",
            |x| fuse(|[x, b, y]| y + (x * b).tanh())?.call([&x[0], &x[1], &x[2]]),
            |x| x[0].zip(&x[1], |x, b| (x * b).tanh()).zip(&x[2], |t, y| y + t),
        )
        .sample(&[&[2, 3], &[3], &[2, 3]])
        .sample(&[&[2, 0], &[1], &[2, 0]])
        .large(&[&[300, 1001], &[1001], &[300, 1001]]),
        fused_total("rows", &[-1], &[1]),
        fused_total("columns", &[0], &[0]),
        fused_total("all", &[0, 1], &[0, 1]),
        case(
            "mean",
            |x| fuse(|[x, y]| (x - y).square())?.mean([&x[0], &x[1]], ()),
            |x| x[0].zip(&x[1], |x, y| (x - y) * (x - y)).fold(&[0, 1], |v| v.iter().sum::<f64>() / v.len() as f64),
        )
        .label("of a chain")
        .sample(&[&[2, 3], &[2, 3]])
        .large(&[&[700, 1001], &[700, 1001]]),
        case("lerp", |x| x[0].lerp(&x[1], &x[2]), |x| x[0].zip(&x[1].zip(&x[0], |b, a| b - a).zip(&x[2], |d, w| d * w), |a, d| a + d))
            .sample(&[&[2, 3], &[2, 3], &[3]]),
        case(
            "add",
            |x| x[0].add(&x[1])?.mul(&x[0])?.sub(&x[1])?.maximum(&x[0])?.minimum(&x[1])?.div(&x[1])?.rem(&x[1]),
            |x| x[0].zip(&x[1], |a, b| ((((a + b) * a - b).max(a).min(b) / b) as i64 as f64).rem_euclid(b)),
        )
        .label("integers")
        .dtypes(DTypes::Integers)
        .domain(&[(5.0, 9.0), (1.0, 4.0)])
        .not_differentiable()
        .sample(&[&[2, 3], &[3]]),
    ]
}

fn scalars() -> Vec<Case> {
    vec![
        one("add_scalar", |x| x.add_scalar(0.75), |x| x + 0.75),
        one("sub_scalar", |x| x.sub_scalar(0.75), |x| x - 0.75),
        one("rsub_scalar", |x| x.rsub_scalar(0.75), |x| 0.75 - x),
        one("mul_scalar", |x| x.mul_scalar(0.75), |x| x * 0.75),
        one("div_scalar", |x| x.div_scalar(0.75), |x| x / 0.75),
        one("rdiv_scalar", |x| x.rdiv_scalar(0.75), |x| 0.75 / x).domain(&[(0.3, 2.0)]),
        one("powf", |x| x.powf(2.5), |x| x.powf(2.5)).domain(&[(0.3, 2.0)]),
        one("powf", |x| x.powf(3.0), |x| x.powf(3.0)).label("cube"),
        one("powf", |x| x.powf(-1.0), |x| x.powf(-1.0)).label("inverse").domain(&[(0.3, 2.0)]),
    ]
}

fn truth(x: bool) -> f64 {
    x as u8 as f64
}

fn comparisons() -> Vec<Case> {
    let pair = |name, f: fn(&Tensor, &Tensor) -> Result<Tensor>, r: fn(f64, f64) -> bool| {
        case(
            name,
            move |x| f(&x[0].round_half()?, &x[1].round_half()?),
            move |x| x[0].map(half).zip(&x[1].map(half), |a, b| truth(r(a, b))),
        )
        .dtypes(DTypes::All)
        .not_differentiable()
        .sample(&[&[4, 5], &[4, 5]])
        .sample(&[&[4, 1, 3], &[5, 1]])
        .sample(&[&[0], &[1]])
        .specials()
        .large(&[&[300, 1001], &[1001]])
    };
    let single = |name, f: fn(&Tensor) -> Result<Tensor>, r: fn(f64) -> bool| {
        case(name, move |x| f(&x[0].round_half()?), move |x| x[0].map(|x| truth(r(half(x)))))
            .dtypes(DTypes::All)
            .not_differentiable()
            .sample(&[&[4, 5]])
            .sample(&[&[0, 5]])
            .specials()
    };
    vec![
        pair("eq", Tensor::eq, |a, b| a == b),
        pair("ne", Tensor::ne, |a, b| a != b),
        pair("lt", Tensor::lt, |a, b| a < b),
        pair("le", Tensor::le, |a, b| a <= b),
        pair("gt", Tensor::gt, |a, b| a > b),
        pair("ge", Tensor::ge, |a, b| a >= b),
        pair("logical_and", Tensor::logical_and, |a, b| a != 0.0 && b != 0.0),
        pair("logical_or", Tensor::logical_or, |a, b| a != 0.0 || b != 0.0),
        pair("logical_xor", Tensor::logical_xor, |a, b| (a != 0.0) != (b != 0.0)),
        single("logical_not", Tensor::logical_not, |x| x == 0.0),
        single("eq_scalar", |x| x.eq_scalar(1.0), |x| x == 1.0),
        single("ne_scalar", |x| x.ne_scalar(1.0), |x| x != 1.0),
        single("lt_scalar", |x| x.lt_scalar(1.0), |x| x < 1.0),
        single("le_scalar", |x| x.le_scalar(1.0), |x| x <= 1.0),
        single("gt_scalar", |x| x.gt_scalar(1.0), |x| x > 1.0),
        single("ge_scalar", |x| x.ge_scalar(1.0), |x| x >= 1.0),
    ]
}

/// Float samples rounded to whole numbers, so that equal ones occur.
fn half(x: f64) -> f64 {
    x.round_ties_even()
}

trait RoundHalf {
    fn round_half(&self) -> Result<Tensor>;
}

impl RoundHalf for Tensor {
    fn round_half(&self) -> Result<Tensor> {
        if self.dtype().is_float() { self.round() } else { Ok(self.clone()) }
    }
}

fn selection() -> Vec<Case> {
    let mask = |shape: &[usize]| Array::from_fn(shape, |i| truth(i.iter().sum::<usize>() % 3 != 0));
    let mask_tensor = move |shape: &[usize]| Tensor::from_vec(mask(shape).data, shape)?.to_dtype(DType::Bool);
    vec![
        case(
            "where_cond",
            move |x| mask_tensor(&[2, 3])?.where_cond(&x[0], &x[1]),
            move |x| {
                let both = x[0].zip(&x[1], |a, _| a).zip(&mask(&[2, 3]), |a, _| a);
                Array::from_fn(
                    &both.shape,
                    |i| if mask(&[2, 3]).at_broadcast(i) != 0.0 { x[0].at_broadcast(i) } else { x[1].at_broadcast(i) },
                )
            },
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3], &[2, 3]])
        .sample(&[&[3], &[4, 1, 1]]),
        case(
            "where_cond",
            move |x| mask_tensor(&[x[0].dims()[1], x[0].dims()[0]])?.t()?.where_cond(&x[0], &x[1]),
            move |x| Array::from_fn(&x[0].shape, |i| if (i[0] + i[1]) % 3 != 0 { x[0].at(i) } else { x[1].at(i) }),
        )
        .label("transposed condition")
        .sample(&[&[2, 3], &[2, 3]])
        .large(&[&[300, 707], &[300, 707]]),
        case(
            "masked_fill",
            move |x| x[0].masked_fill(&mask_tensor(&[2, 1])?, 1.0),
            move |x| x[0].zip(&mask(&[2, 1]), |a, m| if m != 0.0 { 1.0 } else { a }),
        )
        .dtypes(DTypes::All)
        .sample(&[&[2, 3]]),
        one("clamp", |x| x.clamp(-0.5, 1.0), |x| if x.is_nan() { x } else { x.clamp(-0.5, 1.0) }),
        one("clamp", |x| x.clamp(None, 1.0), |x| if x > 1.0 { 1.0 } else { x }).label("above only"),
    ]
}
