//! The first values of parameters.

use kiln_tensor::{DType, Error, Generator, Result, Shape, Tensor, TensorOptions};
use std::f64::consts::SQRT_2;

/// Which extent of a weight a Kaiming initialiser keeps the variance along.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fan {
    /// The inputs of one output: the variance of activations is kept in the forward pass.
    In,
    /// The outputs of one input: the variance of gradients is kept in the backward pass.
    Out,
}

/// What follows the layer: it decides the gain of a Kaiming initialiser (PyTorch's `calculate_gain`).
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Nonlinearity {
    /// Gain 1.
    Linear,
    /// Gain 1.
    Sigmoid,
    /// Gain 5/3.
    Tanh,
    /// Gain √2.
    Relu,
    /// Gain √(2 / (1 + slope²)).
    LeakyRelu(f64),
    /// Gain 3/4.
    Selu,
}

impl Nonlinearity {
    /// The factor by which the standard deviation is enlarged.
    pub fn gain(self) -> f64 {
        match self {
            Nonlinearity::Linear | Nonlinearity::Sigmoid => 1.0,
            Nonlinearity::Tanh => 5.0 / 3.0,
            Nonlinearity::Relu => SQRT_2,
            Nonlinearity::LeakyRelu(slope) => (2.0 / (1.0 + slope * slope)).sqrt(),
            Nonlinearity::Selu => 0.75,
        }
    }
}

/// How a parameter starts.
///
/// The fans of a weight (out, in, kernel…) are fan_in = in · kernel and fan_out = out · kernel, where kernel is the number of taps.
/// For a transposed convolution, whose weight is (in, out, kernel…), the roles are swapped, as in PyTorch.
///
/// ```
/// # use kiln_models::nn::{Init, Params};
/// # use kiln_tensor::Result;
/// # fn main() -> Result<()> {
/// let w = Params::seeded(0).param("w", [64, 64], Init::Orthogonal { gain: 1.0 })?.get().detach();
/// let product = w.matmul(&w.t()?)?.to_vec::<f32>()?;
/// assert!((product[0] - 1.0).abs() < 1e-5 && product[1].abs() < 1e-5);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// One value everywhere.
    Constant(f64),
    /// Uniform in [low, high).
    Uniform {
        /// Lower end.
        low: f64,
        /// Upper end.
        high: f64,
    },
    /// Normal.
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        std: f64,
    },
    /// Normal, given that the value lies in [low, high].
    TruncatedNormal {
        /// Mean of the normal that is cut.
        mean: f64,
        /// Standard deviation of the normal that is cut.
        std: f64,
        /// Lower end.
        low: f64,
        /// Upper end.
        high: f64,
    },
    /// Uniform in ±gain · √(3 / fan) (He et al. 2015).
    KaimingUniform {
        /// The fan that divides.
        fan: Fan,
        /// Gives the gain.
        nonlinearity: Nonlinearity,
    },
    /// Normal with standard deviation gain / √fan (He et al. 2015).
    KaimingNormal {
        /// The fan that divides.
        fan: Fan,
        /// Gives the gain.
        nonlinearity: Nonlinearity,
    },
    /// Uniform in ±gain · √(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    XavierUniform {
        /// A factor on the bound.
        gain: f64,
    },
    /// Normal with standard deviation gain · √(2 / (fan_in + fan_out)) (Glorot and Bengio 2010).
    XavierNormal {
        /// A factor on the standard deviation.
        gain: f64,
    },
    /// gain times a random matrix (first extent × product of the others) with orthonormal rows or columns, whichever are fewer
    /// (Saxe et al. 2013).
    Orthogonal {
        /// A factor on the matrix.
        gain: f64,
    },
}

impl Init {
    /// Uniform in ±1/√fan_in: what PyTorch gives the weights of linear layers and convolutions
    /// (`kaiming_uniform_(a=√5)`).
    pub fn default_weight() -> Self {
        // √(2 / (1 + 5)) · √(3 / fan_in) = 1 / √fan_in.
        Init::KaimingUniform { fan: Fan::In, nonlinearity: Nonlinearity::LeakyRelu(5f64.sqrt()) }
    }

    /// Uniform in ±1/√fan_in of the layer's `weight`: what PyTorch gives the biases of linear layers and convolutions.
    pub fn default_bias(weight: &[usize]) -> Self {
        let fan_in: usize = weight.iter().skip(1).product();
        if fan_in == 0 {
            return Init::Zeros;
        }
        let bound = 1.0 / (fan_in as f64).sqrt();
        Init::Uniform { low: -bound, high: bound }
    }

    /// A new tensor of `shape`; random values are drawn from `generator`, in f32 for half-precision dtypes.
    pub fn make(&self, shape: &Shape, options: TensorOptions, generator: &Generator) -> Result<Tensor> {
        let source = Source { shape, options, generator };
        match *self {
            Init::Zeros => Tensor::zeros(shape, options),
            Init::Ones => Tensor::ones(shape, options),
            Init::Constant(value) => Tensor::full(shape, value, options),
            Init::Uniform { low, high } => source.uniform(low, high),
            Init::Normal { mean, std } => source.normal(mean, std),
            Init::TruncatedNormal { mean, std, low, high } => source.truncated_normal(mean, std, low, high),
            Init::KaimingUniform { fan, nonlinearity } => {
                let bound = nonlinearity.gain() * (3.0 / source.fan(fan)?).sqrt();
                source.uniform(-bound, bound)
            }
            Init::KaimingNormal { fan, nonlinearity } => source.normal(0.0, nonlinearity.gain() / source.fan(fan)?.sqrt()),
            Init::XavierUniform { gain } => {
                let bound = gain * (6.0 / (source.fan(Fan::In)? + source.fan(Fan::Out)?)).sqrt();
                source.uniform(-bound, bound)
            }
            Init::XavierNormal { gain } => source.normal(0.0, gain * (2.0 / (source.fan(Fan::In)? + source.fan(Fan::Out)?)).sqrt()),
            Init::Orthogonal { gain } => source.orthogonal(gain),
        }
    }
}

/// What a random initialiser draws for and from.
struct Source<'a> {
    shape: &'a Shape,
    options: TensorOptions,
    generator: &'a Generator,
}

impl Source<'_> {
    fn fan(&self, fan: Fan) -> Result<f64> {
        let &[outputs, inputs, ref kernel @ ..] = self.shape.dims() else {
            return Err(Error::shape("init", format!("shape {} has no fans: this initialiser needs two dimensions", self.shape)));
        };
        let taps: usize = kernel.iter().product();
        // At least one, so that an empty weight divides by something.
        Ok((taps * if fan == Fan::In { inputs } else { outputs }).max(1) as f64)
    }

    /// The dtype to draw in: halves have too few steps to be scaled after rounding.
    fn wide(&self) -> TensorOptions {
        let dtype = if self.options.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        TensorOptions { dtype, ..self.options }
    }

    fn uniform(&self, low: f64, high: f64) -> Result<Tensor> {
        let unit = self.generator.rand(self.shape, self.wide())?;
        unit.mul_scalar(high - low)?.add_scalar(low)?.to_dtype(self.options.dtype)
    }

    fn normal(&self, mean: f64, std: f64) -> Result<Tensor> {
        let unit = self.generator.randn(self.shape, self.wide())?;
        unit.mul_scalar(std)?.add_scalar(mean)?.to_dtype(self.options.dtype)
    }

    /// By the inverse of the cumulative distribution function, of uniforms between its values at both ends.
    fn truncated_normal(&self, mean: f64, std: f64, low: f64, high: f64) -> Result<Tensor> {
        // Negated, so that NaN is refused too.
        if !(low <= high && std > 0.0) {
            return Err(Error::argument("init", format!("cannot cut a normal of deviation {std} to [{low}, {high}]")));
        }
        let (from, to) = (normal_cdf((low - mean) / std)?, normal_cdf((high - mean) / std)?);
        let unit: Vec<f64> = self.generator.rand(self.shape, DType::F64)?.to_vec()?;
        let value = |u: f64| (mean + std * normal_quantile(from + u * (to - from))).clamp(low, high);
        Tensor::from_vec(unit.into_iter().map(value).collect(), self.shape)?.to_dtype(self.options.dtype)
    }

    fn orthogonal(&self, gain: f64) -> Result<Tensor> {
        if self.shape.rank() < 2 {
            return Err(Error::shape("init", format!("shape {} is no matrix: orthogonal needs two dimensions", self.shape)));
        }
        let rows = self.shape[0];
        let columns: usize = self.shape[1..].iter().product();
        let (count, length) = (rows.min(columns), rows.max(columns));
        let mut vectors: Vec<f64> = self.generator.randn([count, length], DType::F64)?.to_vec()?;
        orthonormalise(&mut vectors, length.max(1));
        let matrix = Tensor::from_vec(vectors, [count, length])?.mul_scalar(gain)?;
        let matrix = if rows <= columns { matrix } else { matrix.t()? };
        matrix.contiguous()?.reshape(self.shape)?.to_dtype(self.options.dtype)
    }
}

/// Gram and Schmidt's process over the rows of `length` elements. Each row is projected twice: once leaves errors that grow with the
/// condition number, a second time brings them to rounding (Giraud et al. 2005).
fn orthonormalise(rows: &mut [f64], length: usize) {
    for at in 0..rows.len() / length {
        let (before, rest) = rows.split_at_mut(at * length);
        let row = &mut rest[..length];
        for _ in 0..2 {
            for other in before.chunks_exact(length) {
                let overlap: f64 = other.iter().zip(&*row).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= overlap * o);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

/// The probability that a standard normal number is below `x`.
fn normal_cdf(x: f64) -> Result<f64> {
    Ok(0.5 + 0.5 * Tensor::scalar(x / SQRT_2, DType::F64)?.erf()?.item::<f64>()?)
}

/// The inverse of the standard normal's cumulative distribution function, within 1.2e-9 relative (Acklam's rational approximation).
fn normal_quantile(p: f64) -> f64 {
    const A: [f64; 6] =
        [-3.969683028665376e1, 2.209460984245205e2, -2.759285104469687e2, 1.38357751867269e2, -3.066479806614716e1, 2.506628277459239];
    const B: [f64; 6] = [-5.447609879822406e1, 1.615858368580409e2, -1.556989798598866e2, 6.680131188771972e1, -1.328068155288572e1, 1.0];
    const C: [f64; 6] =
        [-7.784894002430293e-3, -3.223964580411365e-1, -2.400758277161838, -2.549732539343734, 4.374664141464968, 2.938163982698783];
    const D: [f64; 5] = [7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0];
    /// Where the central approximation ends.
    const TAIL: f64 = 0.02425;
    let polynomial = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |p: f64| {
        let q = (-2.0 * p.ln()).sqrt();
        polynomial(&C, q) / polynomial(&D, q)
    };
    if p <= 0.0 {
        f64::NEG_INFINITY
    } else if p >= 1.0 {
        f64::INFINITY
    } else if p < TAIL {
        tail(p)
    } else if p > 1.0 - TAIL {
        -tail(1.0 - p)
    } else {
        let (q, r) = (p - 0.5, (p - 0.5) * (p - 0.5));
        q * polynomial(&A, r) / polynomial(&B, r)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(init: Init, shape: &[usize], dtype: DType) -> Vec<f64> {
        let made = init.make(&Shape::new(shape).unwrap(), dtype.into(), &Generator::new(3)).unwrap();
        assert_eq!((made.dims(), made.dtype()), (shape, dtype));
        made.to_dtype(DType::F64).unwrap().to_vec().unwrap()
    }

    /// Mean, standard deviation and the largest absolute value.
    fn spread(values: &[f64]) -> (f64, f64, f64) {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        (mean, variance.sqrt(), values.iter().fold(0.0, |m, v| m.max(v.abs())))
    }

    #[test]
    fn random_initialisers_have_the_published_spread() {
        // A convolution 32 → 64 with 3 × 3 taps: fan_in 288, fan_out 576.
        let relu = Nonlinearity::Relu;
        let deviations = [
            (Init::KaimingNormal { fan: Fan::In, nonlinearity: relu }, (2.0 / 288.0f64).sqrt()),
            (Init::KaimingNormal { fan: Fan::Out, nonlinearity: relu }, (2.0 / 576.0f64).sqrt()),
            (Init::KaimingUniform { fan: Fan::In, nonlinearity: relu }, (2.0 / 288.0f64).sqrt()),
            (Init::XavierNormal { gain: 2.0 }, 2.0 * (2.0 / 864.0f64).sqrt()),
            (Init::XavierUniform { gain: 1.0 }, (2.0 / 864.0f64).sqrt()),
            (Init::default_weight(), 1.0 / (3.0 * 288.0f64).sqrt()),
            (Init::default_bias(&[64, 32, 3, 3]), 1.0 / (3.0 * 288.0f64).sqrt()),
            (Init::Normal { mean: 0.0, std: 0.02 }, 0.02),
        ];
        for (init, expected) in deviations {
            for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
                let (mean, std, max) = spread(&draw(init, &[64, 32, 3, 3], dtype));
                // 18,432 draws: the deviation's own standard error is 0.5 %, the mean's 0.7 % of the deviation.
                assert!((std / expected - 1.0).abs() < 0.03 && mean.abs() < 0.04 * expected, "{init:?} {dtype}: {mean} {std} {expected}");
                if matches!(init, Init::KaimingUniform { .. } | Init::XavierUniform { .. } | Init::Uniform { .. }) {
                    let bound = expected * 3f64.sqrt();
                    assert!(max <= bound * 1.005 && max > 0.99 * bound, "{init:?} {dtype}: {max} {bound}");
                }
            }
        }
        assert!(Init::default_weight().make(&Shape::new(&[3]).unwrap(), ().into(), &Generator::new(0)).is_err());
        assert!(draw(Init::default_weight(), &[0, 3], DType::F32).is_empty());
    }

    #[test]
    fn a_cut_normal_stays_inside_and_has_its_deviation() {
        let init = Init::TruncatedNormal { mean: 0.0, std: 1.0, low: -2.0, high: 2.0 };
        let (mean, std, max) = spread(&draw(init, &[200, 100], DType::F32));
        // The deviation of a standard normal cut at ±2 is 0.87963.
        assert!(mean.abs() < 0.03 && (std - 0.87963).abs() < 0.02 && max <= 2.0, "{mean} {std} {max}");
        let far = draw(Init::TruncatedNormal { mean: 0.0, std: 1.0, low: 30.0, high: 31.0 }, &[4], DType::F64);
        assert!(far.iter().all(|v| (30.0..=31.0).contains(v)));
        let empty = Init::TruncatedNormal { mean: 0.0, std: f64::NAN, low: 0.0, high: 1.0 };
        assert!(empty.make(&Shape::new(&[1]).unwrap(), ().into(), &Generator::new(0)).is_err());
    }

    #[test]
    fn the_quantile_inverts_the_distribution() {
        for x in [-4.0, -2.5, -1.9, -0.3, 0.0, 0.7, 2.2, 3.5] {
            assert!((normal_quantile(normal_cdf(x).unwrap()) - x).abs() < 1e-7, "{x}");
        }
    }

    #[test]
    fn orthogonal_rows_or_columns_are_orthonormal() {
        for shape in [[5usize, 12], [12, 5], [8, 8]] {
            let gain = 3.0;
            let w = Init::Orthogonal { gain }.make(&Shape::new(&shape).unwrap(), DType::F64.into(), &Generator::new(1)).unwrap();
            let w = if shape[0] <= shape[1] { w } else { w.t().unwrap() };
            let product: Vec<f64> = w.matmul(&w.t().unwrap()).unwrap().to_vec().unwrap();
            let n = shape[0].min(shape[1]);
            for (i, p) in product.iter().enumerate() {
                let expected = if i % n == i / n { gain * gain } else { 0.0 };
                assert!((p - expected).abs() < 1e-12, "{shape:?} {i}: {p}");
            }
        }
    }

    #[test]
    fn one_seed_gives_the_same_weights() {
        let init = Init::default_weight();
        assert_eq!(draw(init, &[7, 5], DType::F32), draw(init, &[7, 5], DType::F32));
    }
}
