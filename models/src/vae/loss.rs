//! How far a reconstruction is from its original.

use kiln_autograd::{GradOptions, grad_with};
use kiln_tensor::{Error, Result, Tensor};
use std::fmt;
use std::str::FromStr;

/// The distance of pixels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReconstructionLoss {
    /// The mean of |x − y|.
    L1,
    /// The mean of (x − y)².
    #[default]
    Mse,
}

impl ReconstructionLoss {
    /// The loss as a scalar.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn of(self, output: &Tensor, target: &Tensor) -> Result<Tensor> {
        match self {
            ReconstructionLoss::L1 => output.l1_loss(target),
            ReconstructionLoss::Mse => output.mse_loss(target),
        }
    }
}

impl fmt::Display for ReconstructionLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ReconstructionLoss::L1 => "l1",
            ReconstructionLoss::Mse => "mse",
        })
    }
}

impl FromStr for ReconstructionLoss {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "l1" => Ok(ReconstructionLoss::L1),
            "mse" => Ok(ReconstructionLoss::Mse),
            _ => Err(Error::argument("loss", format!("{text:?} is no reconstruction loss; expected l1 or mse"))),
        }
    }
}

/// The feature maps (B, C, …) of pictures, from any network: what a perceptual loss compares. Its parameters should be frozen, or they
/// gather gradients that nobody uses.
pub type Features = Box<dyn Fn(&Tensor) -> Result<Vec<Tensor>> + Send + Sync>;

/// Σ over feature maps of the mean over places of Σ over channels of (f̂(x) − f̂(y))², with f̂ = f / ‖f‖ at each place.
///
/// Source: Zhang et al., *The Unreasonable Effectiveness of Deep Features as a Perceptual Metric*, 2018, with all weights one.
///
/// # Errors
/// If the features cannot be computed, or there are none.
pub fn perceptual_loss(features: &Features, output: &Tensor, target: &Tensor) -> Result<Tensor> {
    let unit = |f: &Tensor| f.div(&f.square()?.sum_keepdim(1)?.add_scalar(1e-10)?.sqrt()?);
    let mut total: Option<Tensor> = None;
    for (a, b) in features(output)?.iter().zip(&features(target)?) {
        let distance = unit(a)?.sub(&unit(b)?)?.square()?.sum(1)?.mean(())?;
        total = Some(match total {
            Some(sum) => sum.add(&distance)?,
            None => distance,
        });
    }
    total.ok_or_else(|| Error::argument("perceptual_loss", "there are no feature maps to compare"))
}

/// ‖∇ `reconstruction`‖ / (‖∇ `adversarial`‖ + 1e-4) with respect to `last_weight`, held to 0 … 10⁴: the factor by which an adversarial
/// loss pulls as hard as the reconstruction. Both graphs stay.
///
/// Source: Esser et al., *Taming Transformers for High-Resolution Image Synthesis*, 2021, equation 7.
///
/// # Errors
/// If a loss does not depend on `last_weight`.
pub fn adaptive_weight(reconstruction: &Tensor, adversarial: &Tensor, last_weight: &Tensor) -> Result<f64> {
    let options = GradOptions { retain_graph: true, ..GradOptions::default() };
    let norm = |loss: &Tensor| grad_with(&[loss], &[None], &[last_weight], options)?.remove(0).norm(2.0, ())?.item_f64();
    Ok((norm(reconstruction)? / (norm(adversarial)? + 1e-4)).clamp(0.0, 1e4))
}
