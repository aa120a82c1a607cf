//! Batch, group and instance norm: dimension 1 is the channels. Images with channels last in memory are worked on as they lie.

use super::rows::parameter_gradient;
use super::{Normalised, composed_gradient, expect_parameter};
use crate::autocast::{raised, raised_option};
use crate::graph::{Ctx, Grads, Op, Source, is_anomaly_mode, is_grad_enabled, record};
use crate::profile::{Cost, operation, operation_with};
use crate::{Activation, Device, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::lanes::{FloatLane, Numeric};
use kiln_kernels::cpu::norm::{self, Activated, Channels, Grouping, Statistics};
use kiln_kernels::cpu::reduce::Spread;
use kiln_kernels::cuda::{Gpu, SliceMut, norm as gpu_norm};

/// What batch norm gives in training: the output, and the statistics of the batch for the running averages.
#[derive(Clone, Debug)]
pub struct BatchNorm {
    /// The normalised input.
    pub output: Tensor,
    /// Mean of each channel, shape `[C]`, untracked; f32 for f16 and bf16.
    pub mean: Tensor,
    /// Variance of each channel with Bessel's correction, shape `[C]`, untracked; f32 for f16 and bf16.
    pub var: Tensor,
}

/// An input's data in one of the two memory orders that the kernels know.
struct Images {
    data: Tensor,
    channels: Channels,
    layout: Layout,
}

impl Images {
    fn new(op: &str, x: &Tensor) -> Result<Self> {
        if x.rank() < 2 {
            return Err(Error::shape(op, format!("expected an input of shape [N, C, ...], got {}", x.shape())));
        }
        let order: Vec<usize> = [0].into_iter().chain(2..x.rank()).chain([1]).collect();
        let last = Layout::with_memory_order(*x.shape(), &order);
        let pixels: usize = x.dims()[2..].iter().product();
        let x = x.detach();
        let is_last = (0..x.rank()).all(|d| x.dims()[d] <= 1 || x.layout().strides()[d] == last.strides()[d]);
        let channels_last = !x.is_contiguous() && is_last;
        let data = if channels_last { x } else { x.contiguous()? };
        // With one pixel both orders are the same; the pass over whole pixels is the faster one.
        let channels = Channels { n: data.dims()[0], c: data.dims()[1], s: pixels, channels_last: channels_last || pixels == 1 };
        let layout = if channels_last { last } else { Layout::contiguous(*data.shape()) };
        Ok(Self { data, channels, layout })
    }

    /// A gradient's data in the same memory order.
    fn like(&self, grad: &Tensor) -> Result<Tensor> {
        let order = self.layout.memory_order();
        grad.detach().to_memory_order(&order)
    }
}

/// The rule of all three; see [`composed_gradient`].
struct ChannelNorm {
    name: &'static str,
    x: Tensor,
    weight: Option<Tensor>,
    /// Which inputs there are: weight, bias.
    given: [bool; 2],
    grouping: Grouping,
    /// Whether the statistics are constants (evaluation).
    fixed: bool,
    eps: f64,
    mean: Tensor,
    rstd: Tensor,
    /// What followed in the same pass, and the bias, which its gradient depends on.
    activation: Option<(Activation, Option<Tensor>)>,
}

impl Op for ChannelNorm {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let [dx, dw, db] = match &self.activation {
            _ if !is_grad_enabled() => self.fused(ctx, grad)?,
            Some((activation, bias)) => self.composed(&self.before_activation(*activation, bias.as_ref(), grad)?)?.map(Some),
            None => self.composed(grad)?.map(Some),
        };
        let parameters = [dw, db].into_iter().zip(self.given).filter(|(_, given)| *given).map(|(gradient, _)| gradient);
        Ok([dx].into_iter().chain(parameters).collect())
    }
}

impl ChannelNorm {
    /// The gradient of what the activation was computed from, which is computed again, in differentiable operations.
    fn before_activation(&self, activation: Activation, bias: Option<&Tensor>, grad: &Tensor) -> Result<Tensor> {
        let Self { name: op, grouping, eps, .. } = *self;
        let plan = Plan { op, grouping, weight: self.weight.as_ref(), bias, eps, activation: None };
        let images = plan.images(&self.x)?;
        let z = plan.apply(&self.x, &images, self.mean.clone(), self.rstd.clone(), self.fixed)?;
        let y = z.activate(activation)?;
        let Some(Source::Node(node)) = y.source() else { return Err(Error::graph(op, "the input is not tracked")) };
        let gradients = node.op()?.vjp(&Ctx::new(node.clone(), vec![true]), grad)?;
        let gradient = gradients.into_iter().next().flatten();
        gradient.ok_or_else(|| Error::graph(op, "an activation without a gradient"))
    }

    /// The parameters' gradients are summed to `[C]` here: in the input's shape they would broadcast to its last dimension.
    fn composed(&self, grad: &Tensor) -> Result<[Tensor; 3]> {
        let shape = *self.x.shape();
        let mut along = vec![1; shape.rank()];
        along[1] = shape[1];
        let weight = self.weight.as_ref().map(|w| w.reshape(along.as_slice())).transpose()?;
        let [dx, dw, db] = if self.fixed {
            let dtype = self.x.dtype();
            let (mean, rstd) =
                (self.mean.reshape(along.as_slice())?.to_dtype(dtype)?, self.rstd.reshape(along.as_slice())?.to_dtype(dtype)?);
            let gw = match &weight {
                Some(weight) => grad.mul(weight)?,
                None => grad.clone(),
            };
            [gw.mul(&rstd)?, grad.mul(&self.x.sub(&mean)?.mul(&rstd)?)?, grad.clone()]
        } else {
            self.composed_groups(shape, weight, grad)?
        };
        let others: Vec<usize> = (0..shape.rank()).filter(|&d| d != 1).collect();
        Ok([dx, dw.sum(others.as_slice())?, db.sum(others.as_slice())?])
    }

    /// Group norm sees `[N, groups, C/groups · pixels]`, with the weight repeated for each pixel.
    fn composed_groups(&self, shape: Shape, weight: Option<Tensor>, grad: &Tensor) -> Result<[Tensor; 3]> {
        let Grouping::Groups(groups) = self.grouping else {
            let dims: Vec<usize> = (0..shape.rank()).filter(|&d| d != 1).collect();
            return composed_gradient(&Normalised { x: &self.x, weight, dims: &dims, eps: self.eps, centered: true }, grad);
        };
        let grouped = [shape[0], groups, shape[1..].iter().product::<usize>() / groups.max(1)];
        let x = self.x.reshape(grouped)?;
        let weight = weight.map(|w| w.expand([&[1], &shape[1..]].concat())?.reshape([1, grouped[1], grouped[2]])).transpose()?;
        let all = composed_gradient(&Normalised { x: &x, weight, dims: &[2], eps: self.eps, centered: true }, &grad.reshape(grouped)?)?;
        let [dx, dw, db] = all.map(|gradient| gradient.reshape(shape));
        Ok([dx?, dw?, db?])
    }

    fn fused(&self, ctx: &Ctx, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let _running = operation("normalize_backward", &[grad, &self.x], || Cost::flops(11 * self.x.numel() as u64));
        let images = Images::new(self.name, &self.x)?;
        let g = images.like(grad)?;
        let weight = self.weight.as_ref().map(|w| w.detach().contiguous()).transpose()?;
        let bias = self.activation.as_ref().and_then(|(_, bias)| bias.as_ref());
        let bias = bias.map(|b| b.detach().contiguous()).transpose()?;
        let wants = |i: usize| self.given[i] && ctx.needs(1 + (i.min(1) * self.given[0] as usize));
        let c = Shape::new(&[images.channels.c])?;
        if let Some(gpu) = g.gpu()? {
            return self.fused_on_gpu(gpu, &images, &g, weight.as_ref(), [ctx.needs(0), wants(0), wants(1)]);
        }
        let (mut dw, mut db) = (parameter_gradient(&c, &self.x, wants(0))?, parameter_gradient(&c, &self.x, wants(1))?);
        for_float!(self.x.dtype(), self.name, T => {
            let mut run = |dx: Option<&mut [T]>| -> Result<()> {
                let statistics = Statistics { grouping: self.grouping, mean: self.mean.as_slice()?, rstd: self.rstd.as_slice()? };
                let weight = weight.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                let dw = dw.as_mut().map(Tensor::as_slice_mut::<T>).transpose()?;
                let db = db.as_mut().map(Tensor::as_slice_mut::<T>).transpose()?;
                let (g, x) = (g.as_dense_slice()?, images.data.as_dense_slice()?);
                let activated = match &self.activation {
                    Some((activation, _)) => {
                        let bias = bias.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                        Some(Activated { activation: kernel_activation(*activation), bias })
                    }
                    None => None,
                };
                norm::normalize_backward::<T>(images.channels, statistics, self.fixed, weight, activated, g, x, dx, dw, db);
                Ok(())
            };
            // An activation's gradient needs the room.
            let dx = if ctx.needs(0) || self.activation.is_some() {
                Some(Tensor::build_with_layout::<T>(g.device(), images.layout, |dx| run(Some(dx)))?)
            } else {
                run(None)?;
                None
            };
            Ok([dx, dw, db])
        })
    }

    fn fused_on_gpu(
        &self,
        gpu: &'static Gpu,
        images: &Images,
        g: &Tensor,
        weight: Option<&Tensor>,
        wants: [bool; 3],
    ) -> Result<[Option<Tensor>; 3]> {
        let (dtype, c) = (g.dtype(), Shape::new(&[images.channels.c])?);
        let room = |wanted: bool| wanted.then(|| Tensor::stale_on_gpu(gpu, c, dtype)).transpose();
        let (mut dw, mut db) = (room(wants[1])?, room(wants[2])?);
        let mut run = |dx: Option<SliceMut<'_>>| -> Result<()> {
            let statistics = gpu_norm::Statistics { grouping: self.grouping, mean: self.mean.gpu_slice()?, rstd: self.rstd.gpu_slice()? };
            let weight = weight.map(Tensor::gpu_slice).transpose()?;
            let dw = dw.as_mut().map(Tensor::gpu_slice_mut).transpose()?;
            let db = db.as_mut().map(Tensor::gpu_slice_mut).transpose()?;
            let (g, x) = (g.gpu_dense_slice()?, images.data.gpu_dense_slice()?);
            Ok(gpu_norm::normalize_backward(gpu, images.channels, statistics, self.fixed, weight, g, x, dx, dw, db)?)
        };
        let dx = if wants[0] {
            Some(Tensor::build_on_gpu(gpu, images.layout, dtype, |dx| run(Some(dx)))?)
        } else {
            run(None)?;
            None
        };
        Ok([dx, dw, db])
    }
}

/// An activation as the CPU's kernels take it.
fn kernel_activation(activation: Activation) -> norm::Activation {
    let (row, params) = activation.row();
    norm::Activation { row, backward: activation.backward_row(), params }
}

/// Statistics as tensors: mean, 1/√(var + ε), and the variance with Bessel's correction.
fn statistics<T>(images: &Images, grouping: Grouping, eps: f64) -> Result<[Tensor; 3]>
where
    T: crate::WithDType + kiln_kernels::cpu::lanes::FloatElement,
    T::Lane: crate::Scalar,
{
    let count = images.channels.statistics(grouping);
    if let Some(gpu) = images.data.gpu()? {
        let room = || Tensor::stale_on_gpu(gpu, Shape::new(&[count])?, T::DTYPE.accumulator());
        let (mut mean, mut rstd, mut var) = (room()?, room()?, room()?);
        let out = [mean.gpu_slice_mut()?, rstd.gpu_slice_mut()?, var.gpu_slice_mut()?];
        gpu_norm::group_moments(gpu, images.channels, grouping, eps, images.data.gpu_dense_slice()?, out)?;
        return Ok([mean, rstd, var]);
    }
    let mut spreads = vec![Spread::default(); count];
    norm::group_moments::<T>(images.channels, grouping, images.data.as_dense_slice()?, &mut spreads);
    let tensor = |f: &dyn Fn(&Spread) -> f64| {
        Tensor::from_vec(spreads.iter().map(|s| <T as Numeric>::Lane::round_from(f(s))).collect(), count)?.to_device(Device::Cpu)
    };
    Ok([tensor(&|s| s.mean)?, tensor(&|s| 1.0 / (s.variance(0.0) + eps).sqrt())?, tensor(&|s| s.variance(1.0))?])
}

/// Mean, variance, scaling and shifting: the input is read, in principle, once.
fn norm_cost(x: &Tensor) -> Cost {
    Cost::flops(7 * x.numel() as u64)
}

/// How a channel norm is done.
struct Plan<'a> {
    op: &'static str,
    grouping: Grouping,
    weight: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    eps: f64,
    activation: Option<Activation>,
}

impl Plan<'_> {
    /// The checks that all share.
    fn images(&self, x: &Tensor) -> Result<Images> {
        let images = Images::new(self.op, x)?;
        expect_parameter(self.op, "weight", x, self.weight, &[images.channels.c])?;
        expect_parameter(self.op, "bias", x, self.bias, &[images.channels.c])?;
        Ok(images)
    }

    /// Normalises with the statistics and records the rule.
    fn apply(&self, x: &Tensor, images: &Images, mean: Tensor, rstd: Tensor, fixed: bool) -> Result<Tensor> {
        if let Some(activation) = self.activation.filter(|_| x.device() != Device::Cpu || is_anomaly_mode()) {
            // The GPU's kernels have no place for it; and where each operation's values are looked at, there must be those of both.
            return Plan { activation: None, ..*self }.apply(x, images, mean, rstd, fixed)?.activate(activation);
        }
        let dense = |p: Option<&Tensor>| p.map(|p| p.detach().contiguous()).transpose();
        let (w, b) = (dense(self.weight)?, dense(self.bias)?);
        let out = for_float!(x.dtype(), self.op, T => match x.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, images.layout, x.dtype(), |y| {
                let w = w.as_ref().map(Tensor::gpu_slice).transpose()?;
                let b = b.as_ref().map(Tensor::gpu_slice).transpose()?;
                let statistics = gpu_norm::Statistics { grouping: self.grouping, mean: mean.gpu_slice()?, rstd: rstd.gpu_slice()? };
                Ok(gpu_norm::normalize(gpu, images.channels, statistics, w, b, images.data.gpu_dense_slice()?, y)?)
            }),
            None => Tensor::build_with_layout::<T>(x.device(), images.layout, |y| {
                let w = w.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                let b = b.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                let statistics = Statistics { grouping: self.grouping, mean: mean.as_slice()?, rstd: rstd.as_slice()? };
                let activation = self.activation.map(kernel_activation);
                norm::normalize::<T>(images.channels, statistics, w, b, activation, images.data.as_dense_slice()?, y);
                Ok(())
            }),
        })?;
        let inputs: Vec<&Tensor> = [Some(x), self.weight, self.bias].into_iter().flatten().collect();
        record(self.op, out, &inputs, |_| ChannelNorm {
            name: self.op,
            x: x.clone(),
            weight: self.weight.cloned(),
            given: [self.weight.is_some(), self.bias.is_some()],
            grouping: self.grouping,
            fixed,
            eps: self.eps,
            mean,
            rstd,
            activation: self.activation.map(|activation| (activation, self.bias.cloned())),
        })
    }

    /// Normalises with the input's own statistics; also gives mean and unbiased variance.
    fn with_own_statistics(&self, x: &Tensor) -> Result<BatchNorm> {
        let _running = operation_with(self.op, || [Some(x), self.weight, self.bias].into_iter().flatten().collect(), || norm_cost(x));
        let images = self.images(x)?;
        let [mean, rstd, var] = for_float!(x.dtype(), self.op, T => statistics::<T>(&images, self.grouping, self.eps))?;
        let output = self.apply(x, &images, mean.clone(), rstd, false)?;
        Ok(BatchNorm { output, mean, var })
    }
}

impl Tensor {
    /// Batch norm in training: (x − mean) / √(var + ε) · weight + bias, with each channel's mean and (population) variance over
    /// all other dimensions of this `[N, C, ...]`. Parameters have shape `[C]`. An error if a channel has fewer than two values. Floats only.
    pub fn batch_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<BatchNorm> {
        self.batch_normed(weight, bias, eps, None)
    }

    /// [`batch_norm`](Tensor::batch_norm) and an activation of the output, bit for bit what the two give one after the other. On a CPU they are one
    /// pass, and nothing is kept for the backward pass but the input: that computes the norm again on its way.
    ///
    /// # Errors
    /// Those of `batch_norm`.
    pub fn batch_norm_activation(
        &self,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        activation: Activation,
    ) -> Result<BatchNorm> {
        self.batch_normed(weight, bias, eps, Some(activation))
    }

    fn batch_normed(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64, activation: Option<Activation>) -> Result<BatchNorm> {
        let (x, weight, bias) = (raised(self)?, raised_option(weight)?, raised_option(bias)?);
        let plan = Plan { op: "batch_norm", grouping: Grouping::Batch, weight: weight.as_deref(), bias: bias.as_deref(), eps, activation };
        if self.rank() >= 2 && self.dims()[1] > 0 && self.numel() / self.dims()[1] < 2 {
            return Err(Error::shape(plan.op, format!("each channel of shape {} needs more than one value in training", self.shape())));
        }
        plan.with_own_statistics(&x)
    }

    /// Batch norm in evaluation: (x − mean) / √(var + ε) · weight + bias with the given statistics, of shape `[C]` as the parameters.
    /// They are constants: no gradient flows to them. Floats only.
    pub fn batch_norm_eval(&self, mean: &Tensor, var: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.batch_normed_with([mean, var], weight, bias, eps, None)
    }

    /// [`batch_norm_eval`](Tensor::batch_norm_eval) and an activation of its output: see [`batch_norm_activation`](Tensor::batch_norm_activation).
    ///
    /// # Errors
    /// Those of `batch_norm_eval`.
    pub fn batch_norm_eval_activation(
        &self,
        [mean, var]: [&Tensor; 2],
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        activation: Activation,
    ) -> Result<Tensor> {
        self.batch_normed_with([mean, var], weight, bias, eps, Some(activation))
    }

    fn batch_normed_with(
        &self,
        [mean, var]: [&Tensor; 2],
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        let (x, weight, bias) = (raised(self)?, raised_option(weight)?, raised_option(bias)?);
        let (weight, bias) = (weight.as_deref(), bias.as_deref());
        let plan = Plan { op: "batch_norm_eval", grouping: Grouping::Batch, weight, bias, eps, activation };
        let _running = operation_with(plan.op, || [Some(&*x), plan.weight, plan.bias].into_iter().flatten().collect(), || norm_cost(&x));
        let images = plan.images(&x)?;
        for (what, statistic) in [("mean", mean), ("var", var)] {
            if statistic.dims() != [images.channels.c] {
                let message = format!("{what} must have shape [{}], got {}", images.channels.c, statistic.shape());
                return Err(Error::shape(plan.op, message));
            }
        }
        let dtype = x.dtype().accumulator();
        let mean = mean.detach().to_dtype(dtype)?.contiguous()?;
        let rstd = var.detach().to_dtype(dtype)?.add_scalar(eps)?.rsqrt()?.contiguous()?;
        plan.apply(&x, &images, mean, rstd, true)
    }

    /// Group norm: as batch norm, with statistics over each of `groups` groups of neighbouring channels of each sample of this
    /// `[N, C, ...]`. Parameters have shape `[C]`. Floats only.
    pub fn group_norm(&self, groups: usize, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.group_normed(groups, weight, bias, eps, None)
    }

    /// [`group_norm`](Tensor::group_norm) and an activation of its output: see [`batch_norm_activation`](Tensor::batch_norm_activation).
    ///
    /// # Errors
    /// Those of `group_norm`.
    pub fn group_norm_activation(
        &self,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        activation: Activation,
    ) -> Result<Tensor> {
        self.group_normed(groups, weight, bias, eps, Some(activation))
    }

    fn group_normed(
        &self,
        groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        if self.rank() >= 2 && (groups == 0 || !self.dims()[1].is_multiple_of(groups)) {
            return Err(Error::shape("group_norm", format!("{} channels do not make {groups} groups", self.dims()[1])));
        }
        let (x, weight, bias) = (raised(self)?, raised_option(weight)?, raised_option(bias)?);
        let (weight, bias) = (weight.as_deref(), bias.as_deref());
        let plan = Plan { op: "group_norm", grouping: Grouping::Groups(groups), weight, bias, eps, activation };
        Ok(plan.with_own_statistics(&x)?.output)
    }

    /// Instance norm: as batch norm, with statistics over each channel of each sample of this `[N, C, ...]`. Parameters have
    /// shape `[C]`. Floats only.
    pub fn instance_norm(&self, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        let groups = self.dims().get(1).copied().unwrap_or(1).max(1);
        let (x, weight, bias) = (raised(self)?, raised_option(weight)?, raised_option(bias)?);
        let (weight, bias) = (weight.as_deref(), bias.as_deref());
        let plan = Plan { op: "instance_norm", grouping: Grouping::Groups(groups), weight, bias, eps, activation: None };
        Ok(plan.with_own_statistics(&x)?.output)
    }
}
