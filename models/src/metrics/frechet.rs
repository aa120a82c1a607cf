//! The Fréchet distance between two sets of feature vectors, each taken as a normal distribution (Heusel et al. 2017).

use super::eigen::Eigen;
use kiln_tensor::{DType, Error, Result, Tensor};

/// Mean and covariance of a set of feature vectors.
#[derive(Clone, Debug)]
pub struct FeatureStatistics {
    /// (F), f64.
    mean: Tensor,
    /// (F, F), f64.
    covariance: Tensor,
}

impl FeatureStatistics {
    /// Those of the rows of `features` (N, F); N of at least 2.
    pub fn of(features: &Tensor) -> Result<Self> {
        let [n, _] = features.dims_n("frechet_distance")?;
        if n < 2 {
            return Err(Error::shape(
                "frechet_distance",
                format!("a covariance takes at least two feature vectors, got shape {}", features.shape()),
            ));
        }
        let rows = features.detach().to_dtype(DType::F64)?;
        let mean = rows.mean(0)?;
        let centred = rows.sub(&mean)?;
        let covariance = centred.t()?.matmul(&centred)?.div_scalar((n - 1) as f64)?;
        Ok(Self { mean, covariance })
    }
}

/// ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½).
///
/// # Errors
/// If the feature vectors have different lengths, or hold a value that is not finite.
pub fn frechet_distance(a: &FeatureStatistics, b: &FeatureStatistics) -> Result<f64> {
    if a.mean.dims() != b.mean.dims() {
        return Err(Error::shape("frechet_distance", format!("features of {} and {} elements", a.mean.numel(), b.mean.numel())));
    }
    for part in [&a.mean, &b.mean, &a.covariance, &b.covariance] {
        if !part.to_vec::<f64>()?.iter().all(|v| v.is_finite()) {
            return Err(Error::argument("frechet_distance", "a feature is not finite"));
        }
    }
    let root = square_root(&a.covariance)?;
    let cross = root.matmul(&b.covariance)?.matmul(&root)?;
    // Rounding can leave eigenvalues a little below zero.
    let trace_of_root: f64 = eigen(&cross)?.values.iter().map(|&v| v.max(0.0).sqrt()).sum();
    let means = a.mean.sub(&b.mean)?.square()?.sum(())?.item::<f64>()?;
    Ok(means + trace(&a.covariance)? + trace(&b.covariance)? - 2.0 * trace_of_root)
}

fn eigen(m: &Tensor) -> Result<Eigen> {
    Ok(Eigen::of(m.to_vec::<f64>()?, m.dims()[0]))
}

fn trace(m: &Tensor) -> Result<f64> {
    m.diagonal(0, 0, 1)?.sum(())?.item::<f64>()
}

/// The symmetric square root of a positive semidefinite matrix.
fn square_root(m: &Tensor) -> Result<Tensor> {
    let Eigen { values, vectors } = eigen(m)?;
    let roots = Tensor::from_vec(values.iter().map(|&v| v.max(0.0).sqrt()).collect(), [values.len(), 1])?;
    let vectors = Tensor::from_vec(vectors, m.dims())?;
    vectors.t()?.matmul(&vectors.mul(&roots)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_of_known_distributions() -> Result<()> {
        let points = Tensor::from_vec(vec![0f64, 0., 2., 0., 0., 2., 2., 2.], [4, 2])?;
        let a = FeatureStatistics::of(&points)?;
        assert!(frechet_distance(&a, &a)?.abs() < 1e-12);
        // Moved by (3, 4): 25. Scaled by 2: the trace of (2 - 1)² Σ, and the mean moves by (1, 1).
        let moved = Tensor::from_vec(vec![3f64, 4., 5., 4., 3., 6., 5., 6.], [4, 2])?;
        assert!((frechet_distance(&a, &FeatureStatistics::of(&moved)?)? - 25.0).abs() < 1e-9);
        let scaled = Tensor::from_vec(vec![0f64, 0., 4., 0., 0., 4., 4., 4.], [4, 2])?;
        assert!((frechet_distance(&a, &FeatureStatistics::of(&scaled)?)? - (2.0 + 2.0 * 4.0 / 3.0)).abs() < 1e-9);
        assert!(FeatureStatistics::of(&Tensor::ones([1, 3], DType::F64)?).is_err());
        Ok(())
    }
}
