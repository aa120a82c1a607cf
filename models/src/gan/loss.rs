//! What generator and discriminator are trained to do.

use kiln_autograd::{GradOptions, enable_grad, grad_with};
use kiln_tensor::{Error, Result, Tensor};
use std::fmt;
use std::str::FromStr;

/// A pair of objectives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GanLoss {
    /// Binary cross-entropy, the generator's in the form that does not saturate (Goodfellow et al. 2014).
    #[default]
    Bce,
    /// Hinge (Lim and Ye 2017).
    Hinge,
    /// The Wasserstein distance, with a gradient penalty on the critic (Gulrajani et al. 2017).
    WganGp,
}

impl GanLoss {
    /// What the discriminator minimises, given its scores of real and generated pictures; a gradient penalty is not included.
    ///
    /// - bce: −mean log σ(real) − mean log(1 − σ(fake))
    /// - hinge: mean max(0, 1 − real) + mean max(0, 1 + fake)
    /// - wgan-gp: mean fake − mean real
    pub fn discriminator(self, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
        match self {
            GanLoss::Bce => real.bce_with_logits(&real.ones_like()?)?.add(&fake.bce_with_logits(&fake.zeros_like()?)?),
            GanLoss::Hinge => real.neg()?.add_scalar(1.0)?.relu()?.mean(())?.add(&fake.add_scalar(1.0)?.relu()?.mean(())?),
            GanLoss::WganGp => fake.mean(())?.sub(&real.mean(())?),
        }
    }

    /// What the generator minimises, given the discriminator's scores of its pictures.
    ///
    /// - bce: −mean log σ(fake)
    /// - hinge, wgan-gp: −mean fake
    pub fn generator(self, fake: &Tensor) -> Result<Tensor> {
        match self {
            GanLoss::Bce => fake.bce_with_logits(&fake.ones_like()?),
            GanLoss::Hinge | GanLoss::WganGp => fake.mean(())?.neg(),
        }
    }
}

impl fmt::Display for GanLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GanLoss::Bce => "bce",
            GanLoss::Hinge => "hinge",
            GanLoss::WganGp => "wgan-gp",
        })
    }
}

impl FromStr for GanLoss {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "bce" => Ok(GanLoss::Bce),
            "hinge" => Ok(GanLoss::Hinge),
            "wgan-gp" => Ok(GanLoss::WganGp),
            _ => Err(Error::argument("loss", format!("{text:?} is no GAN loss; expected bce, hinge or wgan-gp"))),
        }
    }
}

/// mean (‖∇ₓ D(x)‖₂ − 1)² at `x` = `mix`·real + (1 − `mix`)·fake, a point between each real picture and a generated one.
///
/// `real` and `fake` are (B, …), `mix` is (B, 1, …, 1) with values in [0, 1]. The penalty is differentiable in the
/// critic's weights: it holds its first derivative, so training takes second derivatives.
pub fn gradient_penalty(critic: impl Fn(&Tensor) -> Result<Tensor>, real: &Tensor, fake: &Tensor, mix: &Tensor) -> Result<Tensor> {
    enable_grad(|| {
        let between = fake.detach().add(&real.detach().sub(&fake.detach())?.mul(mix)?)?.requires_grad_()?;
        let score = critic(&between)?.sum(())?;
        let options = GradOptions { create_graph: true, retain_graph: true };
        let gradient = grad_with(&[&score], &[None], &[&between], options)?.remove(0);
        // The square root has no derivative at zero: keep away from it.
        let norm = gradient.flatten(1, -1)?.square()?.sum(1)?.add_scalar(1e-12)?.sqrt()?;
        norm.add_scalar(-1.0)?.square()?.mean(())
    })
}
