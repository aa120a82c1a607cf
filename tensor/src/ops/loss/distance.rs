//! Losses of distributions and of distances between vectors.

use super::{Lazy, PRODUCT, Reduction, expect_alike};
use crate::autocast::raised;
use crate::ops::pointwise::{Fused, fused};
use crate::{Error, Result, Tensor};
use std::sync::LazyLock;

/// How [`kl_div`](Tensor::kl_div_with) reads its target.
#[derive(Clone, Copy, Debug, Default)]
pub struct KlDivOptions {
    /// Whether the target holds logarithms of probabilities.
    pub log_target: bool,
    /// Divides the sum by the extent of dimension 0, as the definition asks; `reduction` is then ignored.
    pub batch_mean: bool,
    /// What becomes of the elements' losses.
    pub reduction: Reduction,
}

/// The form of [`cosine_embedding_loss`](Tensor::cosine_embedding_loss_with).
#[derive(Clone, Copy, Debug, Default)]
pub struct CosineEmbeddingOptions {
    /// The similarity that different vectors may have.
    pub margin: f64,
    /// What becomes of the pairs' losses.
    pub reduction: Reduction,
}

/// The form of [`triplet_margin_loss`](Tensor::triplet_margin_loss_with).
#[derive(Clone, Copy, Debug)]
pub struct TripletMarginOptions {
    /// By how much the negative must be farther away than the positive.
    pub margin: f64,
    /// The norm that distances are measured in.
    pub p: f64,
    /// What becomes of the triplets' losses.
    pub reduction: Reduction,
}

impl Default for TripletMarginOptions {
    fn default() -> Self {
        Self { margin: 1.0, p: 2.0, reduction: Reduction::Mean }
    }
}

impl Tensor {
    /// The mean of [`kl_div_with`](Tensor::kl_div_with) over all elements.
    pub fn kl_div(&self, target: &Tensor) -> Result<Tensor> {
        self.kl_div_with(target, &KlDivOptions::default())
    }

    /// The Kullback–Leibler divergence t·(log t − x), `self` holding log-probabilities x; 0 where t is 0.
    pub fn kl_div_with(&self, target: &Tensor, options: &KlDivOptions) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("kl_div", &x, &target)?;
        static OF_LOGARITHMS: Lazy<2> = LazyLock::new(|| fused(|[x, t]| t.exp() * (t - x)));
        // The logarithm of a zero is kept out, so that neither it nor its derivative meets the zero factor.
        static OF_PROBABILITIES: Lazy<2> = LazyLock::new(|| fused(|[x, t]| &t * (t.log_of_nonzero() - x)));
        let losses: &Fused<2> = if options.log_target { &OF_LOGARITHMS } else { &OF_PROBABILITIES };
        if options.batch_mean {
            let batch = self.dims().first().copied().unwrap_or(1);
            return losses.sum([&x, &target], ())?.div_scalar(batch as f64);
        }
        options.reduction.of_fused(losses, [&x, &target])
    }

    /// The mean of [`hinge_embedding_loss_with`](Tensor::hinge_embedding_loss_with) with margin 1.
    pub fn hinge_embedding_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.hinge_embedding_loss_with(target, 1.0, Reduction::Mean)
    }

    /// Of distances x: x where the target is 1 (alike), max(0, margin − x) where it is −1.
    pub fn hinge_embedding_loss_with(&self, target: &Tensor, margin: f64, reduction: Reduction) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("hinge_embedding_loss", &x, &target)?;
        let alike = target.detach().eq_scalar(1.0)?;
        reduction.of(&alike.where_cond(&x, &x.rsub_scalar(margin)?.relu()?)?)
    }

    /// x·y / (max(‖x‖, ε)·max(‖y‖, ε)) along `dim`; both broadcast together. `eps` guards against vectors of length 0 (1e-8 in PyTorch).
    pub fn cosine_similarity(&self, other: &Tensor, dim: isize, eps: f64) -> Result<Tensor> {
        let (x, y) = (raised(self)?, raised(other)?);
        x.expect_same("cosine_similarity", &y)?;
        let shape = crate::broadcast_shapes("cosine_similarity", x.shape(), y.shape())?;
        let (x, y) = (x.expand(shape)?, y.expand(shape)?);
        let unit = |v: &Tensor| v.div(&v.norm_keepdim(2.0, dim)?.clamp(eps, None)?);
        PRODUCT.sum([&unit(&x)?, &unit(&y)?], dim)
    }

    /// The mean of [`cosine_embedding_loss_with`](Tensor::cosine_embedding_loss_with) with margin 0.
    pub fn cosine_embedding_loss(&self, other: &Tensor, target: &Tensor) -> Result<Tensor> {
        self.cosine_embedding_loss_with(other, target, &CosineEmbeddingOptions::default())
    }

    /// Of pairs of vectors `[N, D]` (or `[D]`) and targets `[N]` (or a scalar): 1 − cos where the target is 1 (alike),
    /// max(0, cos − margin) where it is −1.
    pub fn cosine_embedding_loss_with(&self, other: &Tensor, target: &Tensor, options: &CosineEmbeddingOptions) -> Result<Tensor> {
        let op = "cosine_embedding_loss";
        let (x, other) = (raised(self)?, raised(other)?);
        expect_alike(op, &x, &other)?;
        if self.rank() == 0 || self.rank() > 2 || self.shape().without(self.rank() - 1) != *target.shape() {
            let message =
                format!("vectors {} need targets of the same shape without the last dimension, got {}", self.shape(), target.shape());
            return Err(Error::shape(op, message));
        }
        // PyTorch's formula here: x·y / √((x·x + ε)(y·y + ε)).
        let dot = |x: &Tensor, y: &Tensor| PRODUCT.sum([x, y], -1);
        let lengths = dot(&x, &x)?.add_scalar(1e-12)?.mul(&dot(&other, &other)?.add_scalar(1e-12)?)?;
        let cosine = dot(&x, &other)?.div(&lengths.sqrt()?)?;
        let alike = target.detach().eq_scalar(1.0)?;
        options.reduction.of(&alike.where_cond(&cosine.rsub_scalar(1.0)?, &cosine.sub_scalar(options.margin)?.relu()?)?)
    }

    /// The mean of [`triplet_margin_loss_with`](Tensor::triplet_margin_loss_with) with its defaults.
    pub fn triplet_margin_loss(&self, positive: &Tensor, negative: &Tensor) -> Result<Tensor> {
        self.triplet_margin_loss_with(positive, negative, &TripletMarginOptions::default())
    }

    /// max(0, ‖a − p‖ − ‖a − n‖ + margin) along the last dimension, `self` being the anchor a. 1e-6 is added to each difference, as in PyTorch.
    pub fn triplet_margin_loss_with(&self, positive: &Tensor, negative: &Tensor, options: &TripletMarginOptions) -> Result<Tensor> {
        let op = "triplet_margin_loss";
        let (x, positive, negative) = (raised(self)?, raised(positive)?, raised(negative)?);
        expect_alike(op, &x, &positive)?;
        expect_alike(op, &x, &negative)?;
        let distance = |other: &Tensor| x.sub(other)?.add_scalar(1e-6)?.norm(options.p, -1);
        options.reduction.of(&distance(&positive)?.sub(&distance(&negative)?)?.add_scalar(options.margin)?.relu()?)
    }
}
