//! Every function against f64, in ULP of the exact result, over a dense sample of all bit patterns.
//! With `KILN_SLOW=1` the functions of one argument are swept over all 2³² inputs: `KILN_SLOW=1 cargo test -p kiln-kernels --release math`.

use super::*;
use crate::cpu::isa::{WithSimd, dispatch};
use rayon::prelude::*;

trait Function: Copy + Send + Sync {
    fn f32<S: Simd>(self, s: S, x: S::F32) -> S::F32;
    fn exact(self, x: f64) -> f64;
    /// Errors below this are right whatever they are in ULP.
    const ABSOLUTE: f64 = 0.0;
    const ULPS: f64 = 2.0;
}

struct Map<'a, F>(F, &'a [f32], &'a mut [f32]);

impl<F: Function> WithSimd for Map<'_, F> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for (x, y) in self.1.chunks(S::LANES).zip(self.2.chunks_mut(S::LANES)) {
            self.0.f32(s, s.load_slice_partial(x)).store_slice(y, y.len());
        }
    }
}

/// The distance in units of the last place of the exact result.
fn ulps(got: f32, exact: f64) -> f64 {
    let nearest = exact as f32;
    if nearest.is_nan() || got.is_nan() {
        return if nearest.is_nan() && got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if got == nearest {
        return if got.to_bits() == nearest.to_bits() { 0.0 } else { f64::INFINITY };
    }
    if got.is_infinite() && exact.abs() < f32::MAX as f64 * (1.0 - 2f64.powi(-23)) || nearest.is_infinite() && got.abs() < f32::MAX {
        return f64::INFINITY;
    }
    let exponent = exact.abs().log2().floor().clamp(-126.0, 127.0);
    (got as f64 - exact).abs() / 2f64.powi(exponent as i32 - 23)
}

/// Checks `f` over bit patterns `0, step, 2·step, …` and over the neighbourhoods of special points.
fn check<F: Function>(name: &str, f: F) {
    const BLOCK: u64 = 1 << 16;
    let step = if std::env::var_os("KILN_SLOW").is_some() { 1 } else { 1021 };
    let count = (1u64 << 32).div_ceil(step);
    let special = [0.0f32, 1.0, 0.5, 2.0, 88.7, 103.9, 5.6, 9.0, 17.3, 20.0, 1e-10, 1e10, f32::MAX, f32::INFINITY, f32::NAN, 65536.0];
    let near: Vec<f32> = special
        .iter()
        .flat_map(|x| (-300i32..300).map(move |d| f32::from_bits(x.to_bits().wrapping_add_signed(d))))
        .flat_map(|x| [x, -x])
        .collect();
    let worst = |x: &[f32]| {
        let mut y = vec![0f32; x.len()];
        dispatch(Map(f, x, &mut y));
        let error = |(&x, &y): (&f32, &f32)| {
            let exact = f.exact(x as f64);
            if (y as f64 - exact).abs() <= F::ABSOLUTE { (0.0, x, y) } else { (ulps(y, exact), x, y) }
        };
        x.iter().zip(&y).map(error).fold((0.0, 0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a })
    };
    let swept = (0..count.div_ceil(BLOCK))
        .into_par_iter()
        .map(|block| {
            let x: Vec<f32> = (block * BLOCK..((block + 1) * BLOCK).min(count)).map(|i| f32::from_bits((i * step) as u32)).collect();
            worst(&x)
        })
        .reduce(|| (0.0, 0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
    let near = worst(&near);
    let (ulps, x, y) = if near.0 > swept.0 { near } else { swept };
    println!("{name}: {ulps:.3} ULP at {x:e}: {y:e}");
    assert!(ulps <= F::ULPS, "{name}({x:e}) = {y:e}, exact {:e}: {ulps} ULP", f.exact(x as f64));
}

macro_rules! functions {
    ($($name:ident $(($($bound:ident = $value:expr),*))?: |$s:ident, $x:ident| $simd:expr, $exact:expr;)*) => { $(
        #[test]
        fn $name() {
            #[derive(Clone, Copy)]
            struct It;
            impl Function for It {
                #[inline(always)]
                fn f32<S: Simd>(self, $s: S, $x: S::F32) -> S::F32 { $simd }
                fn exact(self, $x: f64) -> f64 { $exact }
                $($(const $bound: f64 = $value;)*)?
            }
            check(stringify!($name), It);
        }
    )* };
}

functions! {
    exp_in_ulps: |s, x| exp(s, x), x.exp();
    exp2_in_ulps: |s, x| exp2(s, x), x.exp2();
    expm1_in_ulps: |s, x| expm1(s, x), x.exp_m1();
    log_in_ulps: |s, x| log(s, x), x.ln();
    log1p_in_ulps: |s, x| log1p(s, x), x.ln_1p();
    sin_in_ulps: |s, x| sin(s, x), x.sin();
    cos_in_ulps: |s, x| cos(s, x), x.cos();
    tanh_in_ulps: |s, x| tanh(s, x), x.tanh();
    sigmoid_in_ulps: |s, x| sigmoid(s, x), double::sigmoid(x);
    erf_in_ulps: |s, x| erf(s, x), double::erf(x);
    atan_in_ulps: |s, x| atan2(s, x, s.splat(1.0)), x.atan2(1.0);
    pow_of_any_base_in_ulps: |s, x| pow(s, x, s.splat(1.7)), x.powf(1.7f32 as f64);
    pow_to_any_power_in_ulps: |s, x| pow(s, s.splat(1.37), x), (1.37f32 as f64).powf(x);
    gelu_in_bounds(ULPS = 4.0, ABSOLUTE = 1e-7): |s, x| gelu(s, x), x * double::normal_cdf(x);
    gelu_tanh_in_bounds(ULPS = 4.0, ABSOLUTE = 1e-7): |s, x| gelu_tanh(s, x),
        x * double::sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3)));
    silu_in_bounds(ULPS = 4.0, ABSOLUTE = 1e-7): |s, x| silu(s, x), x * double::sigmoid(x);
    softplus_in_bounds(ULPS = 4.0, ABSOLUTE = 1e-7): |s, x| softplus(s, x), double::softplus(x);
    mish_in_bounds(ULPS = 4.0, ABSOLUTE = 1e-7): |s, x| mish(s, x), x * double::softplus(x).tanh();
}

#[derive(Clone, Copy)]
enum Two {
    Pow,
    Atan2,
    Remainder,
}

struct Map2<'a>(Two, &'a [f32], &'a [f32], &'a mut [f32]);

impl WithSimd for Map2<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        for ((a, b), y) in self.1.chunks(S::LANES).zip(self.2.chunks(S::LANES)).zip(self.3.chunks_mut(S::LANES)) {
            let (a, b) = (s.load_slice_partial(a), s.load_slice_partial(b));
            let result = match self.0 {
                Two::Pow => pow(s, a, b),
                Two::Atan2 => atan2(s, a, b),
                Two::Remainder => remainder(s, a, b),
            };
            result.store_slice(y, y.len());
        }
    }
}

/// Pairs of any bit patterns, pairs of moderate numbers, and all pairs of special values.
fn pairs() -> (Vec<f32>, Vec<f32>) {
    let special =
        [0.0f32, 1.0, 2.0, 3.0, 0.5, 1.5, 16777217.0, 1e-40, f32::MIN_POSITIVE, 1e-30, 1e30, f32::MAX, f32::INFINITY, f32::NAN, 0.99999994];
    let special: Vec<f32> = special.iter().flat_map(|&x| [x, -x]).collect();
    let mut pairs: Vec<(f32, f32)> = special.iter().flat_map(|&a| special.iter().map(move |&b| (a, b))).collect();
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 32) as u32
    };
    for _ in 0..1 << 20 {
        pairs.push((f32::from_bits(random()), f32::from_bits(random())));
        let base = f32::from_bits(0x3f80_0000 - (1 << 26) + (random() >> 5));
        pairs.push((base, (random() as f32 / u32::MAX as f32 - 0.5) * 200.0));
        // Results all over the range of f32.
        pairs.push((base, (random() as f32 / u32::MAX as f32 - 0.5) * 178.0 / base.ln()));
        pairs.push((-base, (random() % 64) as f32 - 32.0));
    }
    pairs.into_iter().unzip()
}

fn check_two(two: Two, exact: fn(f64, f64) -> f64, bound: f64) {
    let (a, b) = pairs();
    let mut y = vec![0f32; a.len()];
    dispatch(Map2(two, &a, &b, &mut y));
    let mut worst = (0.0, 0);
    for i in 0..a.len() {
        let error = ulps(y[i], exact(a[i] as f64, b[i] as f64));
        if error > worst.0 {
            worst = (error, i);
        }
    }
    let (error, i) = worst;
    println!("{error:.3} ULP at {:e}, {:e}: {:e}", a[i], b[i], y[i]);
    assert!(error <= bound, "f({:e}, {:e}) = {:e}, exact {:e}: {error} ULP", a[i], b[i], y[i], exact(a[i] as f64, b[i] as f64));
}

#[test]
fn pow_of_pairs() {
    check_two(Two::Pow, f64::powf, 2.0);
}

#[test]
fn atan2_of_pairs() {
    check_two(Two::Atan2, f64::atan2, 2.0);
}

#[test]
fn remainder_is_exact_and_has_the_divisors_sign() {
    let (a, b) = pairs();
    let mut y = vec![0f32; a.len()];
    dispatch(Map2(Two::Remainder, &a, &b, &mut y));
    for i in 0..a.len() {
        let want = scalar_remainder(a[i], b[i]);
        let agrees = y[i].to_bits() == want.to_bits() || y[i].is_nan() && want.is_nan();
        assert!(agrees, "{:e} mod {:e} = {:e}, not {want:e}", a[i], b[i], y[i]);
    }
}
