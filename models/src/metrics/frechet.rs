//! The Fréchet distance between two sets of feature vectors, each taken as a normal distribution (Heusel et al. 2017).

use kiln_tensor::{DType, Error, Result, Tensor};
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// Mean and covariance of a set of feature vectors.
#[derive(Clone, PartialEq, Debug)]
pub struct FeatureStatistics {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl FeatureStatistics {
    /// Those of the rows of `features` (N, F); N of at least 2.
    pub fn of(features: &Tensor) -> Result<Self> {
        let [n, f] = features.dims_n("frechet_distance")?;
        if n < 2 {
            return Err(Error::shape(
                "frechet_distance",
                format!("a covariance takes at least two feature vectors, got shape {}", features.shape()),
            ));
        }
        let rows = DMatrix::from_row_slice(n, f, &features.detach().to_dtype(DType::F64)?.to_vec::<f64>()?);
        let mean = rows.row_mean().transpose();
        let centred = DMatrix::from_fn(n, f, |i, j| rows[(i, j)] - mean[j]);
        let covariance = centred.transpose() * &centred / (n - 1) as f64;
        Ok(Self { mean, covariance })
    }
}

/// ‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½).
///
/// # Errors
/// If the feature vectors have different lengths, or hold a value that is not finite.
pub fn frechet_distance(a: &FeatureStatistics, b: &FeatureStatistics) -> Result<f64> {
    if a.mean.len() != b.mean.len() {
        return Err(Error::shape("frechet_distance", format!("features of {} and {} elements", a.mean.len(), b.mean.len())));
    }
    if [a, b].iter().any(|s| s.mean.iter().chain(s.covariance.iter()).any(|v| !v.is_finite())) {
        return Err(Error::argument("frechet_distance", "a feature is not finite"));
    }
    let root = square_root(&a.covariance);
    let cross = &root * &b.covariance * &root;
    // Rounding can leave eigenvalues a little below zero.
    let trace_of_root: f64 = SymmetricEigen::new(symmetric(&cross)).eigenvalues.iter().map(|&v| v.max(0.0).sqrt()).sum();
    let means = (&a.mean - &b.mean).norm_squared();
    Ok(means + a.covariance.trace() + b.covariance.trace() - 2.0 * trace_of_root)
}

fn symmetric(m: &DMatrix<f64>) -> DMatrix<f64> {
    (m + m.transpose()) * 0.5
}

fn square_root(m: &DMatrix<f64>) -> DMatrix<f64> {
    let eigen = SymmetricEigen::new(symmetric(m));
    let roots = DMatrix::from_diagonal(&eigen.eigenvalues.map(|v| v.max(0.0).sqrt()));
    &eigen.eigenvectors * roots * eigen.eigenvectors.transpose()
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
