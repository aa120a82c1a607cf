//! Cross-entropy of classes (dimension 1 is the classes) and of independent bits.

use super::{Reduction, expect_alike};
use crate::autocast::raised;
use crate::graph::{Ctx, Grads, Op, record};
use crate::{DType, Error, Result, Shape, Tensor};
use std::sync::Arc;

/// How [`cross_entropy`](Tensor::cross_entropy_with) and [`nll_loss`](Tensor::nll_loss_with) weigh their elements.
#[derive(Clone, Debug)]
pub struct CrossEntropyOptions<'a> {
    /// A factor for each class, shape `[C]`. The mean is divided by the sum of the targets' factors.
    pub weight: Option<&'a Tensor>,
    /// Targets of this class count nothing.
    pub ignore_index: i64,
    /// The share of the target that is spread evenly over all classes, 0 to 1.
    pub label_smoothing: f64,
    /// What becomes of the elements' losses.
    pub reduction: Reduction,
}

impl Default for CrossEntropyOptions<'_> {
    fn default() -> Self {
        Self { weight: None, ignore_index: -100, label_smoothing: 0.0, reduction: Reduction::Mean }
    }
}

/// How [`bce`](Tensor::bce_with) and [`bce_with_logits`](Tensor::bce_with_logits_with) weigh their elements.
#[derive(Clone, Debug, Default)]
pub struct BceOptions<'a> {
    /// A factor for each element; broadcasts.
    pub weight: Option<&'a Tensor>,
    /// A factor for the share of the positive class (with logits only); broadcasts.
    pub pos_weight: Option<&'a Tensor>,
    /// What becomes of the elements' losses.
    pub reduction: Reduction,
}

/// Checked class indices of `[N, S]` elements of an input `[N, C, S]`.
struct Classes {
    n: usize,
    c: usize,
    s: usize,
    /// The place of each element's class in the input; `None` where the target is ignored.
    places: Vec<Option<usize>>,
}

impl Classes {
    fn new(op: &str, input: &Shape, target: &Tensor, ignore_index: i64) -> Result<Self> {
        let expected = || {
            let message =
                format!("an input of shape {input} ([N, C, ...] or [C]) needs targets of the same shape without C, got {}", target.shape());
            Error::shape(op, message)
        };
        let dim = match input.rank() {
            0 => return Err(expected()),
            1 => 0,
            _ => 1,
        };
        if input.without(dim) != *target.shape() {
            return Err(expected());
        }
        let targets = match target.dtype() {
            DType::I64 => target.to_vec::<i64>()?,
            DType::I32 | DType::U8 => target.detach().to_dtype(DType::I64)?.to_vec::<i64>()?,
            other => return Err(Error::unsupported_dtype(op, other, "integer classes, or probabilities in the input's shape and dtype")),
        };
        let (n, c, s) = (input[..dim].iter().product(), input[dim], input[dim + 1..].iter().product::<usize>());
        let place = |(i, class): (usize, i64)| match usize::try_from(class) {
            _ if class == ignore_index => Ok(None),
            Ok(class) if class < c => Ok(Some((i / s * c + class) * s + i % s)),
            _ => Err(Error::index(op, format!("target {class} at position {i} is not a class of 0..{c} (nor the ignored {ignore_index})"))),
        };
        Ok(Self { n, c, s, places: targets.into_iter().enumerate().map(place).collect::<Result<_>>()? })
    }

    /// Each element's factor: its class's weight, 1 without weights, 0 where it is ignored.
    fn weights(&self, op: &str, x: &Tensor, weight: Option<&Tensor>) -> Result<Vec<f64>> {
        let weight = weight.map(|w| class_weights(op, x, w, self.c)).transpose()?;
        let of = |place: &Option<usize>| match (place, &weight) {
            (None, _) => 0.0,
            (Some(place), Some(weight)) => weight[place / self.s % self.c],
            (Some(_), None) => 1.0,
        };
        Ok(self.places.iter().map(of).collect())
    }
}

fn class_weights(op: &str, x: &Tensor, weight: &Tensor, c: usize) -> Result<Vec<f64>> {
    x.expect_same(op, weight)?;
    if weight.dims() != [c] {
        return Err(Error::shape(op, format!("weight must have shape [{c}], got {}", weight.shape())));
    }
    weight.detach().to_dtype(DType::F64)?.to_vec::<f64>()
}

/// Picks each element's class out of `[N, C, S]` (0 where ignored), or, the other way round, places `[N, S]` there among zeros:
/// each is the other's derivative.
struct Pick {
    classes: Arc<Classes>,
    place: bool,
}

impl Op for Pick {
    fn name(&self) -> &'static str {
        if self.place { "place_classes" } else { "pick_classes" }
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(if self.place { pick(grad, &self.classes)? } else { place(grad, &self.classes)? })])
    }
}

fn pick(x: &Tensor, classes: &Arc<Classes>) -> Result<Tensor> {
    let data = x.detach().contiguous()?;
    let out = for_float!(x.dtype(), "nll_loss", T => {
        let data = data.as_slice::<T>()?;
        Tensor::build::<T>(x.device(), &Shape::new(&[classes.n, classes.s])?, |out| {
            out.iter_mut().zip(&classes.places).for_each(|(out, place)| *out = place.map_or(T::default(), |at| data[at]));
            Ok(())
        })
    })?;
    record("pick_classes", out, &[x], |_| Pick { classes: classes.clone(), place: false })
}

fn place(x: &Tensor, classes: &Arc<Classes>) -> Result<Tensor> {
    let data = x.detach().contiguous()?;
    let out = for_float!(x.dtype(), "nll_loss", T => {
        let data = data.as_slice::<T>()?;
        Tensor::build::<T>(x.device(), &Shape::new(&[classes.n, classes.c, classes.s])?, |out| {
            out.fill(T::default());
            for (&x, at) in data.iter().zip(&classes.places) {
                if let Some(at) = *at {
                    out[at] = x;
                }
            }
            Ok(())
        })
    })?;
    record("place_classes", out, &[x], |_| Pick { classes: classes.clone(), place: true })
}

/// The negative log-likelihood of log-probabilities.
fn nll(op: &str, log_p: &Tensor, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
    let smoothing = options.label_smoothing;
    if !(0.0..=1.0).contains(&smoothing) {
        return Err(Error::argument(op, format!("label_smoothing must lie in 0..=1, got {smoothing}")));
    }
    let classes = Arc::new(Classes::new(op, log_p.shape(), target, options.ignore_index)?);
    let Classes { n, c, s, .. } = *classes;
    let weights = classes.weights(op, log_p, options.weight)?;
    let total: f64 = weights.iter().sum();
    let log_p = log_p.reshape([n, c, s])?;
    let weights = Tensor::from_vec(weights, [n, s])?.to_dtype(log_p.dtype())?;
    let mut losses = pick(&log_p, &classes)?.mul(&weights)?.neg()?;
    if smoothing > 0.0 {
        let weighted = match options.weight {
            Some(weight) => log_p.mul(&weight.detach().reshape([1, c, 1])?)?,
            None => log_p,
        };
        let ignored = Tensor::from_vec(classes.places.iter().map(Option::is_none).collect(), [n, s])?;
        let even = weighted.sum(1)?.mul_scalar(-smoothing / c as f64)?.masked_fill(&ignored, 0.0)?;
        losses = losses.mul_scalar(1.0 - smoothing)?.add(&even)?;
    }
    match options.reduction {
        Reduction::None => losses.reshape(target.shape()),
        Reduction::Sum => losses.sum(()),
        Reduction::Mean => losses.sum(())?.div_scalar(total),
    }
}

/// Cross-entropy with a probability for each class: −Σ w·t·log p, the mean being over the elements.
fn cross_entropy_of_probabilities(
    op: &str,
    log_p: &Tensor,
    target: &Tensor,
    dim: usize,
    options: &CrossEntropyOptions<'_>,
) -> Result<Tensor> {
    expect_alike(op, log_p, target)?;
    let c = log_p.dims()[dim];
    let smoothing = options.label_smoothing;
    let target = if smoothing > 0.0 { target.mul_scalar(1.0 - smoothing)?.add_scalar(smoothing / c as f64)? } else { target.clone() };
    let mut terms = log_p.mul(&target)?;
    if let Some(weight) = options.weight {
        class_weights(op, log_p, weight, c)?;
        let mut along = vec![1; log_p.rank()];
        along[dim] = c;
        terms = terms.mul(&weight.detach().reshape(along)?)?;
    }
    options.reduction.of(&terms.sum(dim)?.neg()?)
}

/// max(x, 0) − x·t + log(1 + e^−|x|), and with a factor p for the positive share (1 − t)·x + (1 + (p − 1)·t)·log(1 + e^−x):
/// the derivatives are σ(x) − t and (1 − t) − (1 + (p − 1)·t)·σ(−x).
struct BceWithLogits {
    x: Tensor,
    target: Tensor,
    pos_weight: Option<Tensor>,
}

/// log(1 + e^−x), without cancellation or overflow.
fn softplus_of_negative(x: &Tensor) -> Result<Tensor> {
    x.neg()?.softplus()
}

/// 1 + (p − 1)·t
fn positive_share(target: &Tensor, pos_weight: &Tensor) -> Result<Tensor> {
    pos_weight.sub_scalar(1.0)?.mul(target)?.add_scalar(1.0)
}

impl Op for BceWithLogits {
    fn name(&self) -> &'static str {
        "bce_with_logits"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let Self { x, target, pos_weight } = self;
        let for_input = |grad: &Tensor| match pos_weight {
            None => grad.mul(&x.sigmoid()?.sub(target)?),
            Some(p) => grad.mul(&target.rsub_scalar(1.0)?.sub(&positive_share(target, p)?.mul(&x.neg()?.sigmoid()?)?)?),
        };
        let for_target = |grad: &Tensor| match pos_weight {
            None => grad.mul(&x.neg()?),
            Some(p) => grad.mul(&p.sub_scalar(1.0)?.mul(&softplus_of_negative(x)?)?.sub(x)?),
        };
        Ok(vec![ctx.needs(0).then(|| for_input(grad)).transpose()?, ctx.needs(1).then(|| for_target(grad)).transpose()?])
    }
}

/// The losses of logits, without the element weights.
fn bce_of_logits(x: &Tensor, target: &Tensor, pos_weight: Option<&Tensor>) -> Result<Tensor> {
    let pos_weight = pos_weight.map(Tensor::detach);
    let (logits, t) = (x.detach(), target.detach());
    let out = match &pos_weight {
        None => logits.relu()?.sub(&logits.mul(&t)?)?.add(&softplus_of_negative(&logits.abs()?)?)?,
        Some(p) => {
            x.expect_same("bce_with_logits", p)?;
            // log(1 + e^−x) in the form that keeps its digits beside x.
            let log = softplus_of_negative(&logits.abs()?)?.add(&logits.neg()?.relu()?)?;
            t.rsub_scalar(1.0)?.mul(&logits)?.add(&positive_share(&t, p)?.mul(&log)?)?
        }
    };
    if out.shape() != x.shape() {
        return Err(Error::shape("bce_with_logits", format!("pos_weight does not broadcast to the input's shape {}", x.shape())));
    }
    record("bce_with_logits", out, &[x, target], |_| BceWithLogits { x: x.clone(), target: target.clone(), pos_weight })
}

impl Tensor {
    /// The mean of −log softmax(x) at the target classes: [`cross_entropy_with`](Tensor::cross_entropy_with) its defaults.
    pub fn cross_entropy(&self, target: &Tensor) -> Result<Tensor> {
        self.cross_entropy_with(target, &CrossEntropyOptions::default())
    }

    /// −log softmax(x) at the target classes. `self` holds logits, `[N, C]`, `[N, C, ...]` or `[C]`; `target` integer classes in the
    /// same shape without C, or probabilities in the same shape and dtype. A class outside of 0..C is an error, except `ignore_index`.
    pub fn cross_entropy_with(&self, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
        let dim = usize::from(self.rank() > 1);
        let log_p = self.log_softmax(dim as isize)?;
        if target.dtype().is_float() {
            return cross_entropy_of_probabilities("cross_entropy", &log_p, target, dim, options);
        }
        nll("cross_entropy", &log_p, target, options)
    }

    /// The mean of −x at the target classes: [`nll_loss_with`](Tensor::nll_loss_with) its defaults.
    pub fn nll_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.nll_loss_with(target, &CrossEntropyOptions::default())
    }

    /// −x at the target classes, `self` holding log-probabilities; see [`cross_entropy_with`](Tensor::cross_entropy_with).
    pub fn nll_loss_with(&self, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
        nll("nll_loss", self, target, options)
    }

    /// The mean of [`bce_with_logits_with`](Tensor::bce_with_logits_with).
    pub fn bce_with_logits(&self, target: &Tensor) -> Result<Tensor> {
        self.bce_with_logits_with(target, &BceOptions::default())
    }

    /// −t·log σ(x) − (1 − t)·log(1 − σ(x)), computed from the logits x without overflow or cancellation.
    pub fn bce_with_logits_with(&self, target: &Tensor, options: &BceOptions<'_>) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        expect_alike("bce_with_logits", &x, &target)?;
        let losses = bce_of_logits(&x, &target, options.pos_weight)?;
        options.reduction.of(&match options.weight {
            Some(weight) => losses.mul(weight)?,
            None => losses,
        })
    }

    /// The mean of [`bce_with`](Tensor::bce_with).
    pub fn bce(&self, target: &Tensor) -> Result<Tensor> {
        self.bce_with(target, &BceOptions::default())
    }

    /// −t·log x − (1 − t)·log(1 − x), `self` holding probabilities; logarithms are held above −100.
    pub fn bce_with(&self, target: &Tensor, options: &BceOptions<'_>) -> Result<Tensor> {
        expect_alike("bce", self, target)?;
        if options.pos_weight.is_some() {
            return Err(Error::argument("bce", "pos_weight is for bce_with_logits"));
        }
        let log = |x: &Tensor| x.log()?.clamp(-100.0, None);
        let losses = target.mul(&log(self)?)?.add(&target.rsub_scalar(1.0)?.mul(&log(&self.rsub_scalar(1.0)?)?)?)?.neg()?;
        options.reduction.of(&match options.weight {
            Some(weight) => losses.mul(weight)?,
            None => losses,
        })
    }
}
