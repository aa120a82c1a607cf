//! Losses. `x.name_loss(&target)` is the mean with PyTorch's defaults, `x.name_loss_with(&target, options)` the rest.
//! Here what compares numbers; classification and distances between vectors beside.
//!
//! A loss of elements is a fused chain that the reduction ends: one pass over memory forward, and one for each gradient.

mod classification;
mod distance;
mod linear;

pub use classification::{BceOptions, CrossEntropyOptions};
pub use distance::{CosineEmbeddingOptions, KlDivOptions, TripletMarginOptions};

pub(crate) use classification::bce_of_logits;

use crate::autocast::raised;
use crate::ops::pointwise::{Expr, Fused, fused};
use crate::{Error, Result, Tensor};
use std::sync::LazyLock;

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

    /// The same of the losses that `f` gives.
    fn of_fused<const N: usize>(self, f: &Fused<N>, operands: [&Tensor; N]) -> Result<Tensor> {
        match self {
            Reduction::None => f.call(operands),
            Reduction::Mean => f.mean(operands, ()),
            Reduction::Sum => f.sum(operands, ()),
        }
    }
}

/// A function that is traced when it is first used.
type Lazy<const N: usize> = LazyLock<Fused<N>>;

/// Products, to be summed.
static PRODUCT: Lazy<2> = LazyLock::new(|| fused(|[x, y]| x * y));

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
        static SQUARE: Lazy<2> = LazyLock::new(|| fused(|[x, t]| (x - t).square()));
        reduction.of_fused(&SQUARE, [&x, &target])
    }

    /// The mean of |x − t|.
    pub fn l1_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.l1_loss_with(target, Reduction::Mean)
    }

    /// |x − t|.
    pub fn l1_loss_with(&self, target: &Tensor, reduction: Reduction) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("l1_loss", &x, &target)?;
        static DISTANCE: Lazy<2> = LazyLock::new(|| fused(|[x, t]| (x - t).abs()));
        reduction.of_fused(&DISTANCE, [&x, &target])
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
        // Dividing by 1, the default, would be a step of the chain for nothing.
        huber(self, target, "smooth_l1_loss", beta, reduction, |loss| if beta == 1.0 { loss } else { loss / beta })
    }

    /// The mean of [`huber_loss_with`](Tensor::huber_loss_with) with δ = 1.
    pub fn huber_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.huber_loss_with(target, 1.0, Reduction::Mean)
    }

    /// With d = |x − t|: d²/2 below δ, δ·(d − δ/2) from there on.
    pub fn huber_loss_with(&self, target: &Tensor, delta: f64, reduction: Reduction) -> Result<Tensor> {
        huber(self, target, "huber_loss", delta, reduction, |loss| loss)
    }
}

fn huber(x: &Tensor, target: &Tensor, op: &str, delta: f64, reduction: Reduction, scaled: impl FnOnce(Expr) -> Expr) -> Result<Tensor> {
    let (x, target) = (&*raised(x)?, &*raised(target)?);
    expect_alike(op, x, target)?;
    if delta.is_nan() || delta <= 0.0 {
        return Err(Error::argument(op, format!("the bound between square and line must be positive, got {delta}")));
    }
    reduction.of_fused(&fused(|[x, t]| scaled((x - t).huber(delta))), [x, target])
}
