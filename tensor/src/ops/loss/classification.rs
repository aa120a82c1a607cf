//! Cross-entropy of classes (dimension 1 is the classes) and of independent bits.

use super::{Lazy, PRODUCT, Reduction, expect_alike};
use crate::autocast::{raised, raised_option};
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record, refuse_tracked};
use crate::ops::pointwise::{Expr, fused};
use crate::profile::{Cost, operation};
use crate::{DType, Device, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::cross_entropy as host_classes;
use kiln_kernels::cuda::{Gpu, cross_entropy as gpu_classes};
use std::sync::{Arc, LazyLock};

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

/// The integer classes of `[N, S]` elements of an input `[N, C, S]`.
pub(super) struct Classes {
    n: usize,
    c: usize,
    s: usize,
    targets: Targets,
}

enum Targets {
    /// The place of each element's class in the input; `None` where the target is ignored.
    Host(Vec<Option<usize>>),
    /// The classes (i64, row-major) in the memory of a GPU, and the one that is ignored.
    Gpu(&'static Gpu, Tensor, i64),
}

impl Classes {
    /// Of an input of the shape `shape` on the device of `input`.
    pub(super) fn new(op: &str, input: &Tensor, shape: Shape, target: &Tensor, ignore_index: i64) -> Result<Self> {
        let expected = || {
            let message =
                format!("an input of shape {shape} ([N, C, ...] or [C]) needs targets of the same shape without C, got {}", target.shape());
            Error::shape(op, message)
        };
        let dim = match shape.rank() {
            0 => return Err(expected()),
            1 => 0,
            _ => 1,
        };
        if shape.without(dim) != *target.shape() {
            return Err(expected());
        }
        let target = match target.dtype() {
            DType::I64 => target.detach(),
            DType::I32 | DType::U8 => target.detach().to_dtype(DType::I64)?,
            other => return Err(Error::unsupported_dtype(op, other, "integer classes, or probabilities in the input's shape and dtype")),
        };
        let (n, c, s) = (shape[..dim].iter().product(), shape[dim], shape[dim + 1..].iter().product::<usize>());
        if let Some(gpu) = input.gpu()? {
            if target.device() != input.device() {
                return Err(Error::device_mismatch(op, input.device(), target.device()));
            }
            return Ok(Self { n, c, s, targets: Targets::Gpu(gpu, target.contiguous()?, ignore_index) });
        }
        let place = |(i, class): (usize, i64)| match usize::try_from(class) {
            _ if class == ignore_index => Ok(None),
            Ok(class) if class < c => Ok(Some((i / s * c + class) * s + i % s)),
            _ => Err(no_class(op, class, i, c, ignore_index)),
        };
        let places = target.to_vec::<i64>()?.into_iter().enumerate().map(place).collect::<Result<_>>()?;
        Ok(Self { n, c, s, targets: Targets::Host(places) })
    }

    /// Each element's factor, in the dtype and on the device of `x`: its class's weight, 1 without weights, 0 where it is ignored; and their sum.
    pub(super) fn weights(&self, op: &str, x: &Tensor, weight: Option<&Tensor>) -> Result<(Tensor, Total)> {
        weight.map_or(Ok(()), |weight| {
            expect_class_weights(op, x, weight, self.c).and_then(|()| refuse_tracked("class weights", &[weight]))
        })?;
        let places = match &self.targets {
            Targets::Host(places) => places,
            Targets::Gpu(gpu, targets, ignored) => return self.weights_on_gpu(op, x.dtype(), gpu, targets, *ignored, weight),
        };
        let weight = weight.map(|w| w.detach().to_dtype(DType::F64)?.to_vec::<f64>()).transpose()?;
        let of = |place: &Option<usize>| match (place, &weight) {
            (None, _) => 0.0,
            (Some(place), Some(weight)) => weight[place / self.s % self.c],
            (Some(_), None) => 1.0,
        };
        let weights: Vec<f64> = places.iter().map(of).collect();
        let total = weights.iter().sum();
        Ok((Tensor::from_vec(weights, [self.n, self.s])?.to_device(x.device())?.to_dtype(x.dtype())?, Total::Number(total)))
    }

    /// The weights of targets that the host does not know. That each is a class is checked here, which waits for the GPU; while its work is
    /// only recorded nobody can wait, and a target that is no class makes the loss NaN.
    fn weights_on_gpu(
        &self,
        op: &str,
        dtype: DType,
        gpu: &'static Gpu,
        targets: &Tensor,
        ignored: i64,
        weight: Option<&Tensor>,
    ) -> Result<(Tensor, Total)> {
        let weight = weight.map(|w| w.detach().contiguous()).transpose()?;
        let _running = operation("class_weights", &[targets], || Cost::NONE);
        let room = |shape: &[usize], dtype| Tensor::stale_on_gpu(gpu, Shape::new(shape)?, dtype);
        let (mut weights, mut total, mut bad) = (room(&[self.n, self.s], dtype)?, room(&[], DType::F64)?, room(&[], DType::I64)?);
        let weight = weight.as_ref().map(Tensor::gpu_slice).transpose()?;
        let (w, t, b) = (weights.gpu_slice_mut()?, total.gpu_slice_mut()?, bad.gpu_slice_mut()?);
        gpu_classes::weigh(gpu, &self.on_gpu(targets, ignored)?, weight, w, t, b)?;
        if !gpu.is_capturing() {
            let bad = bad.item::<i64>()?;
            if let Ok(at) = usize::try_from(bad) {
                return Err(no_class(op, targets.to_vec::<i64>()?[at], at, self.c, ignored));
            }
        }
        Ok((weights, Total::OnGpu(total)))
    }

    /// Those of `count` rows from `start` on, of an input [N, C].
    pub(super) fn rows(&self, start: usize, count: usize) -> Result<Self> {
        let targets = match &self.targets {
            Targets::Host(places) => {
                Targets::Host(places[start..start + count].iter().map(|place| place.map(|at| at - start * self.c)).collect())
            }
            Targets::Gpu(gpu, targets, ignored) => Targets::Gpu(gpu, targets.narrow(0, start, count)?.contiguous()?, *ignored),
        };
        Ok(Self { n: count, c: self.c, s: 1, targets })
    }

    fn on_gpu<'a>(&self, targets: &'a Tensor, ignored: i64) -> Result<gpu_classes::Classes<'a>> {
        Ok(gpu_classes::Classes { targets: targets.gpu_slice()?, ignored, n: self.n, c: self.c, s: self.s })
    }

    /// True where a target is ignored, shape `[N, S]`.
    fn ignored(&self) -> Result<Tensor> {
        match &self.targets {
            Targets::Host(places) => {
                Tensor::from_vec(places.iter().map(Option::is_none).collect(), [self.n, self.s])?.to_device(Device::Cpu)
            }
            Targets::Gpu(_, targets, ignored) => targets.reshape([self.n, self.s])?.eq_scalar(*ignored as f64),
        }
    }
}

fn no_class(op: &str, class: i64, position: usize, c: usize, ignored: i64) -> Error {
    Error::index(op, format!("target {class} at position {position} is not a class of 0..{c} (nor the ignored {ignored})"))
}

/// The sum of the weights of a loss's elements.
pub(super) enum Total {
    Number(f64),
    OnGpu(Tensor),
}

impl Total {
    /// `sum` over this total; a half-precision sum is divided in f32.
    pub(super) fn mean(&self, sum: &Tensor) -> Result<Tensor> {
        let total = match self {
            Total::Number(total) => return sum.div_scalar(*total),
            Total::OnGpu(total) => total,
        };
        let dtype = sum.dtype().accumulator();
        sum.to_dtype(dtype)?.div(&total.to_dtype(dtype)?)?.to_dtype(sum.dtype())
    }
}

/// An error unless there is a weight of the input's dtype for each class.
fn expect_class_weights(op: &str, x: &Tensor, weight: &Tensor, c: usize) -> Result<()> {
    x.expect_same(op, weight)?;
    if weight.dims() != [c] {
        return Err(Error::shape(op, format!("weight must have shape [{c}], got {}", weight.shape())));
    }
    Ok(())
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
    // One of a row's logits and its target are read.
    let _running = operation("pick_classes", &[x], || Cost::NONE.bytes((classes.n * classes.s * (2 * x.dtype().size() + 8)) as u64));
    let data = x.detach().contiguous()?;
    let shape = Shape::new(&[classes.n, classes.s])?;
    let out = for_float!(x.dtype(), "nll_loss", T => match &classes.targets {
        Targets::Gpu(gpu, targets, ignored) => Tensor::build_on_gpu(gpu, Layout::contiguous(shape), x.dtype(), |out| {
            Ok(gpu_classes::pick(gpu, &classes.on_gpu(targets, *ignored)?, data.gpu_slice()?, out)?)
        }),
        Targets::Host(places) => {
            let data = data.as_slice::<T>()?;
            Tensor::build::<T>(x.device(), &shape, |out| {
                out.iter_mut().zip(places).for_each(|(out, place)| *out = place.map_or(T::default(), |at| data[at]));
                Ok(())
            })
        }
    })?;
    record("pick_classes", out, &[x], |_| Pick { classes: classes.clone(), place: false })
}

pub(super) fn place(x: &Tensor, classes: &Arc<Classes>) -> Result<Tensor> {
    let _running = operation("place_classes", &[x], || Cost::NONE);
    let data = x.detach().contiguous()?;
    let shape = Shape::new(&[classes.n, classes.c, classes.s])?;
    let out = for_float!(x.dtype(), "nll_loss", T => match &classes.targets {
        Targets::Gpu(gpu, targets, ignored) => Tensor::build_on_gpu(gpu, Layout::contiguous(shape), x.dtype(), |out| {
            Ok(gpu_classes::place(gpu, &classes.on_gpu(targets, *ignored)?, data.gpu_slice()?, out)?)
        }),
        Targets::Host(places) => {
            let data = data.as_slice::<T>()?;
            Tensor::build::<T>(x.device(), &shape, |out| {
                out.fill(T::default());
                for (&x, at) in data.iter().zip(places) {
                    if let Some(at) = *at {
                        out[at] = x;
                    }
                }
                Ok(())
            })
        }
    })?;
    record("place_classes", out, &[x], |_| Pick { classes: classes.clone(), place: true })
}

/// −log softmax(x) at the targets, in one pass over logits `[N, C]`; its gradient is (softmax(x) − 1 at the target)·g.
pub(super) struct RowLoss {
    x: Tensor,
    /// The largest logit of each row, and the logarithm of the sum of the exponentials relative to it.
    kept: Tensor,
    classes: Arc<Classes>,
}

impl Op for RowLoss {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        if !is_grad_enabled() {
            return Ok(vec![Some(self.fused(grad)?)]);
        }
        let placed = place(grad, &self.classes)?.reshape(self.x.shape())?;
        let p = self.x.softmax(1)?;
        Ok(vec![Some(p.mul(&placed.sum_keepdim(1)?)?.sub(&placed)?)])
    }
}

impl RowLoss {
    /// The losses `[N, 1]` of logits `[N, C]` that are not tracked, and their rule.
    pub(super) fn of(logits: &Tensor, classes: &Arc<Classes>) -> Result<(Tensor, Self)> {
        let _running = operation("cross_entropy", &[logits], || Cost::flops(4 * logits.numel() as u64));
        let data = logits.detach().contiguous()?;
        let wide = logits.dtype().accumulator();
        let (room, shape) = (Shape::new(&[2, classes.n])?, Shape::new(&[classes.n, 1])?);
        let (out, kept) = match &classes.targets {
            Targets::Gpu(gpu, targets, ignored) => {
                let mut kept = Tensor::stale_on_gpu(gpu, room, wide)?;
                let out = Tensor::build_on_gpu(gpu, Layout::contiguous(shape), logits.dtype(), |loss| {
                    let classes = classes.on_gpu(targets, *ignored)?;
                    Ok(gpu_classes::cross_entropy(gpu, &classes, data.gpu_slice()?, loss, kept.gpu_slice_mut()?)?)
                })?;
                (out, kept)
            }
            Targets::Host(targets) => {
                let mut kept = Tensor::zeros(room, (wide, logits.device()))?;
                let out = for_float!(logits.dtype(), "cross_entropy", T => Tensor::build::<T>(logits.device(), &shape, |loss| {
                    let (max, log) = kept.as_slice_mut()?.split_at_mut(classes.n);
                    let rows = host_classes::Rows { classes: classes.c, x: data.as_slice()?, targets };
                    host_classes::cross_entropy::<T>(rows, loss, max, log);
                    Ok(())
                }))?;
                (out, kept)
            }
        };
        Ok((out, Self { x: logits.clone(), kept, classes: classes.clone() }))
    }

    pub(super) fn fused(&self, grad: &Tensor) -> Result<Tensor> {
        let _running = operation("cross_entropy_backward", &[&self.x, grad], || Cost::per_element(3));
        let (x, grad) = (self.x.detach().contiguous()?, grad.detach().contiguous()?);
        match &self.classes.targets {
            Targets::Gpu(gpu, targets, ignored) => Tensor::build_on_gpu(gpu, Layout::contiguous(*x.shape()), x.dtype(), |dx| {
                let classes = self.classes.on_gpu(targets, *ignored)?;
                Ok(gpu_classes::cross_entropy_backward(gpu, &classes, x.gpu_slice()?, self.kept.gpu_slice()?, grad.gpu_slice()?, dx)?)
            }),
            Targets::Host(targets) => for_float!(x.dtype(), "cross_entropy", T => Tensor::build::<T>(x.device(), x.shape(), |dx| {
                let (max, log) = self.kept.as_slice()?.split_at(self.classes.n);
                let rows = host_classes::Rows { classes: self.classes.c, x: x.as_slice()?, targets };
                host_classes::cross_entropy_backward::<T>(rows, max, log, grad.as_slice()?, dx);
                Ok(())
            })),
        }
    }
}

/// The losses `[N, 1]` of logits `[N, C, 1]`.
fn row_losses(x: &Tensor, classes: &Arc<Classes>) -> Result<Tensor> {
    let logits = x.reshape([classes.n, classes.c])?;
    let (losses, rule) = RowLoss::of(&logits, classes)?;
    record("cross_entropy", losses, &[&logits], |_| rule)
}

/// The negative log-likelihood of log-probabilities, or of logits if `logits`.
fn nll(op: &str, x: &Tensor, logits: bool, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
    let smoothing = options.label_smoothing;
    if !(0.0..=1.0).contains(&smoothing) {
        return Err(Error::argument(op, format!("label_smoothing must lie in 0..=1, got {smoothing}")));
    }
    let classes = Arc::new(Classes::new(op, x, *x.shape(), target, options.ignore_index)?);
    let Classes { n, c, s, .. } = *classes;
    let (weights, total) = classes.weights(op, x, options.weight)?;
    let losses = if logits && s == 1 && smoothing == 0.0 && x.dtype().is_float() {
        row_losses(x, &classes)?.mul(&weights)?
    } else {
        let log_p = if logits { x.log_softmax(isize::from(x.rank() > 1))? } else { x.clone() }.reshape([n, c, s])?;
        let losses = pick(&log_p, &classes)?.mul(&weights)?.neg()?;
        if smoothing > 0.0 { smoothed(&losses, log_p, &classes, options)? } else { losses }
    };
    match options.reduction {
        Reduction::None => losses.reshape(target.shape()),
        Reduction::Sum => losses.sum(()),
        // The sum of half types, which may be out of their range, is theirs only once it is divided.
        Reduction::Mean => total.mean(&losses.to_dtype(x.dtype().accumulator())?.sum(())?)?.to_dtype(x.dtype()),
    }
}

/// `losses` with a share of the target spread evenly over all classes.
fn smoothed(losses: &Tensor, log_p: Tensor, classes: &Classes, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
    let smoothing = options.label_smoothing;
    let weighted = match options.weight {
        Some(weight) => log_p.mul(&weight.detach().reshape([1, classes.c, 1])?)?,
        None => log_p,
    };
    let even = weighted.sum(1)?.mul_scalar(-smoothing / classes.c as f64)?.masked_fill(&classes.ignored()?, 0.0)?;
    losses.mul_scalar(1.0 - smoothing)?.add(&even)
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
    let sum = match options.weight {
        None => PRODUCT.sum([log_p, &target], dim)?,
        Some(weight) => {
            static WEIGHTED: Lazy<3> = LazyLock::new(|| fused(|[x, t, w]| x * t * w));
            expect_class_weights(op, log_p, weight, c)?;
            let mut along = vec![1; log_p.rank()];
            along[dim] = c;
            WEIGHTED.sum([log_p, &target, &weight.reshape(along)?], dim)?
        }
    };
    options.reduction.of(&sum.neg()?)
}

/// max(x, 0) − x·t + log(1 + e^−|x|), and with a factor p for the positive share (1 − t)·x + (1 + (p − 1)·t)·log(1 + e^−x):
/// the derivatives are σ(x) − t and (1 − t) − (1 + (p − 1)·t)·σ(−x).
/// That in p is t·log(1 + e^−x).
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
        let for_weight = |grad: &Tensor| grad.mul(target)?.mul(&softplus_of_negative(x)?);
        let gradients = [ctx.needs(0).then(|| for_input(grad)), ctx.needs(1).then(|| for_target(grad))];
        let weight = pos_weight.as_ref().map(|_| ctx.needs(2).then(|| for_weight(grad)));
        gradients.into_iter().chain(weight).map(Option::transpose).collect()
    }
}

/// The losses of logits, without the element weights.
pub(crate) fn bce_of_logits(x: &Tensor, target: &Tensor, pos_weight: Option<&Tensor>) -> Result<Tensor> {
    let (logits, t) = (x.detach(), target.detach());
    let out = match &pos_weight.map(Tensor::detach) {
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
    let inputs: Vec<&Tensor> = [x, target].into_iter().chain(pos_weight).collect();
    record("bce_with_logits", out, &inputs, |_| BceWithLogits { x: x.clone(), target: target.clone(), pos_weight: pos_weight.cloned() })
}

impl Tensor {
    /// The mean of −log softmax(x) at the target classes: [`cross_entropy_with`](Tensor::cross_entropy_with) its defaults.
    pub fn cross_entropy(&self, target: &Tensor) -> Result<Tensor> {
        self.cross_entropy_with(target, &CrossEntropyOptions::default())
    }

    /// −log softmax(x) at the target classes. `self` holds logits, `[N, C]`, `[N, C, ...]` or `[C]`; `target` integer classes in the
    /// same shape without C, or probabilities in the same shape and dtype. A class outside of 0..C is an error, except `ignore_index`.
    pub fn cross_entropy_with(&self, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
        let weight = raised_option(options.weight)?;
        let options = &CrossEntropyOptions { weight: weight.as_deref(), ..*options };
        if target.dtype().is_float() {
            let dim = usize::from(self.rank() > 1);
            return cross_entropy_of_probabilities("cross_entropy", &self.log_softmax(dim as isize)?, &*raised(target)?, dim, options);
        }
        nll("cross_entropy", &*raised(self)?, true, target, options)
    }

    /// The mean of −x at the target classes: [`nll_loss_with`](Tensor::nll_loss_with) its defaults.
    pub fn nll_loss(&self, target: &Tensor) -> Result<Tensor> {
        self.nll_loss_with(target, &CrossEntropyOptions::default())
    }

    /// −x at the target classes, `self` holding log-probabilities; see [`cross_entropy_with`](Tensor::cross_entropy_with).
    pub fn nll_loss_with(&self, target: &Tensor, options: &CrossEntropyOptions<'_>) -> Result<Tensor> {
        nll("nll_loss", self, false, target, options)
    }

    /// The mean of [`bce_with_logits_with`](Tensor::bce_with_logits_with).
    pub fn bce_with_logits(&self, target: &Tensor) -> Result<Tensor> {
        self.bce_with_logits_with(target, &BceOptions::default())
    }

    /// −t·log σ(x) − (1 − t)·log(1 − σ(x)), computed from the logits x without overflow or cancellation.
    pub fn bce_with_logits_with(&self, target: &Tensor, options: &BceOptions<'_>) -> Result<Tensor> {
        let (x, target) = (raised(self)?, raised(target)?);
        let (weight, pos_weight) = (raised_option(options.weight)?, raised_option(options.pos_weight)?);
        expect_alike("bce_with_logits", &x, &target)?;
        static PLAIN: Lazy<2> = LazyLock::new(|| fused(|[x, t]| x.bce_with_logits(&t)));
        static WEIGHTED: Lazy<3> = LazyLock::new(|| fused(|[x, t, w]| x.bce_with_logits(&t) * w));
        match (pos_weight.as_deref(), weight.as_deref()) {
            (None, None) => options.reduction.of_fused(&PLAIN, [&x, &target]),
            (None, Some(weight)) => options.reduction.of_fused(&WEIGHTED, [&x, &target, weight]),
            (pos_weight, None) => options.reduction.of(&bce_of_logits(&x, &target, pos_weight)?),
            (pos_weight, Some(weight)) => options.reduction.of_fused(&PRODUCT, [&bce_of_logits(&x, &target, pos_weight)?, weight]),
        }
    }

    /// The mean of [`bce_with`](Tensor::bce_with).
    pub fn bce(&self, target: &Tensor) -> Result<Tensor> {
        self.bce_with(target, &BceOptions::default())
    }

    /// −t·log x − (1 − t)·log(1 − x), `self` holding probabilities; logarithms are held above −100, and the denominators of their derivatives
    /// above 10⁻¹².
    pub fn bce_with(&self, target: &Tensor, options: &BceOptions<'_>) -> Result<Tensor> {
        let (x, target, weight) = (raised(self)?, raised(target)?, raised_option(options.weight)?);
        expect_alike("bce", &x, &target)?;
        if options.pos_weight.is_some() {
            return Err(Error::argument("bce", "pos_weight is for bce_with_logits"));
        }
        fn loss(x: &Expr, t: &Expr) -> Expr {
            -(t * x.bounded_log() + (1.0 - t) * (1.0 - x).bounded_log())
        }
        static PLAIN: Lazy<2> = LazyLock::new(|| fused(|[x, t]| loss(&x, &t)));
        static WEIGHTED: Lazy<3> = LazyLock::new(|| fused(|[x, t, w]| loss(&x, &t) * w));
        match weight.as_deref() {
            None => options.reduction.of_fused(&PLAIN, [&x, &target]),
            Some(weight) => options.reduction.of_fused(&WEIGHTED, [&x, &target, weight]),
        }
    }
}
