//! Losses. `x.name_loss(&target)` is the mean with PyTorch's defaults, `x.name_loss_with(&target, options)` the rest.
//! Here what compares numbers; classification and distances between vectors beside.

mod classification;
mod distance;

pub use classification::{BceOptions, CrossEntropyOptions};
pub use distance::{CosineEmbeddingOptions, KlDivOptions, TripletMarginOptions};

use crate::autocast::raised;
use crate::{Error, Result, Tensor};

/// What becomes of the losses of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Reduction {
    /// They stay as they are.
    None,
    /// Their mean.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

impl Reduction {
    fn of(self, losses: &Tensor) -> Result<Tensor> {
        match self {
            Reduction::None => Ok(losses.clone()),
            Reduction::Mean => losses.mean(()),
            Reduction::Sum => losses.sum(()),
        }
    }
}

/// An error unless both have the same shape (broadcasting here is nearly always a mistake), dtype and device.
fn expect_alike(op: &str, x: &Tensor, target: &Tensor) -> Result<()> {
    x.expect_same(op, target)?;
    if x.shape() != target.shape() {
        return Err(Error::shape(op, format!("input {} and target {} must have the same shape", x.shape(), target.shape())));
    }
    Ok(())
}

impl Tensor {
    /// The mean of (x − t)².
    pub fn mse_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.mse_loss_with(target, Reduction::Mean)
    }

    /// (x − t)².
    pub fn mse_loss_with(&self, target: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("mse_loss", &x, &target)?;
        reduction.of(&x.sub(&target)?.square()?)
    }

    /// The mean of |x − t|.
    pub fn l1_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.l1_loss_with(target, Reduction::Mean)
    }

    /// |x − t|.
    pub fn l1_loss_with(&self, target: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("l1_loss", &x, &target)?;
        reduction.of(&x.sub(&target)?.abs()?)
    }

    /// The mean of [`smooth_l1_loss_with`](Tensor::smooth_l1_loss_with) with β = 1.
    pub fn smooth_l1_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.smooth_l1_loss_with(target, 1.0, Reduction::Mean)
    }

    /// With d = |x − t|: d²/2β below β, d − β/2 from there on. β = 0 is [`l1_loss`](Tensor::l1_loss).
    pub fn smooth_l1_loss_with(&self, target: &Tensor, beta: f64, reduction: Reduction) -> Result<Tensor> {
        if beta == 0.0 {
            return self.l1_loss_with(target, reduction);
        }
        reduction.of(&huber(self, target, "smooth_l1_loss", beta)?.div_scalar(beta)?)
    }

    /// The mean of [`huber_loss_with`](Tensor::huber_loss_with) with δ = 1.
    pub fn huber_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.huber_loss_with(target, 1.0, Reduction::Mean)
    }

    /// With d = |x − t|: d²/2 below δ, δ·(d − δ/2) from there on.
    pub fn huber_loss_with(&self, target: &Tensor, delta: f64, reduction: Reduction) -> Result<Tensor> {
        reduction.of(&huber(self, target, "huber_loss", delta)?)
    }
}

fn huber(x: &Tensor, target: &Tensor, op: &str, delta: f64) -> Result<Tensor> {
    let (x, target) = (&*raised(x)?, &*raised(target)?);
    expect_alike(op, x, target)?;
    if delta.is_nan() || delta <= 0.0 {
        return Err(Error::argument(op, format!("the bound between square and line must be positive, got {delta}")));
    }
    let difference = x.sub(target)?;
    let distance = difference.abs()?;
    let near = distance.detach().lt_scalar(delta)?;
    let line = distance.sub_scalar(0.5 * delta)?.mul_scalar(delta)?;
    near.where_cond(&difference.square()?.mul_scalar(0.5)?, &line)
}
