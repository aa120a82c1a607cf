//! The distribution that an encoder gives.

use kiln_tensor::{Error, Generator, Result, Tensor};

/// A normal distribution of independent elements, N(mean, std²), for each sample: (B, C, …).
///
/// Source: Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014; names and bounds of `diffusers`.
#[derive(Clone, Debug)]
pub struct DiagonalGaussian {
    /// The means, (B, C, …).
    pub mean: Tensor,
    /// log std², held to −30 … 20.
    pub logvar: Tensor,
    /// The standard deviations.
    pub std: Tensor,
}

impl DiagonalGaussian {
    /// Of `moments` (B, 2C, …), whose first half are the means and whose second half is log std².
    ///
    /// # Errors
    /// If the number of channels is odd.
    pub fn new(moments: &Tensor) -> Result<Self> {
        let channels = moments.dim(1)?;
        if channels % 2 == 1 {
            return Err(Error::shape("DiagonalGaussian", format!("means and log-variances of {} are not as many", moments.shape())));
        }
        let logvar = moments.narrow(1, channels / 2, channels / 2)?.clamp(-30.0, 20.0)?;
        let std = logvar.mul_scalar(0.5)?.exp()?;
        Ok(Self { mean: moments.narrow(1, 0, channels / 2)?, logvar, std })
    }

    /// mean + std · ε with ε ~ N(0, 1): a sample that has gradients with respect to both.
    pub fn sample(&self, generator: &Generator) -> Result<Tensor> {
        self.sample_from(&generator.randn(*self.mean.shape(), &self.mean)?)
    }

    /// [`sample`](Self::sample) from given noise.
    pub fn sample_from(&self, noise: &Tensor) -> Result<Tensor> {
        self.mean.add(&self.std.mul(noise)?)
    }

    /// The most likely value: the mean.
    pub fn mode(&self) -> Tensor {
        self.mean.clone()
    }

    /// The divergence from the standard normal distribution, ½ Σ (mean² + std² − 1 − log std²), of each sample: (B).
    pub fn kl(&self) -> Result<Tensor> {
        let terms = self.mean.square()?.add(&self.logvar.exp()?)?.add_scalar(-1.0)?.sub(&self.logvar)?;
        terms.flatten(1, -1)?.sum(1)?.mul_scalar(0.5)
    }

    /// −log p(`value`) = ½ Σ (log 2π + log std² + (value − mean)² / std²) of each sample: (B).
    pub fn nll(&self, value: &Tensor) -> Result<Tensor> {
        let distance = value.sub(&self.mean)?.square()?.div(&self.logvar.exp()?)?;
        let terms = distance.add(&self.logvar)?.add_scalar((2.0 * std::f64::consts::PI).ln())?;
        terms.flatten(1, -1)?.sum(1)?.mul_scalar(0.5)
    }
}
