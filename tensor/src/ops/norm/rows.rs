//! Layer norm and RMS norm, over the last dimensions.

use super::{Normalised, composed_gradient, expect_parameter};
use crate::autocast::{raised, raised_option};
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record};
use crate::profile::{Cost, operation, operation_with};
use crate::{Device, Error, IntoShape, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::norm::{self, Rows};
use kiln_kernels::cuda::{Gpu, norm as gpu_norm};

/// The rule of both; see [`composed_gradient`].
struct LayerNorm {
    rows: Rows,
    x: Tensor,
    weight: Option<Tensor>,
    /// Which inputs there are: weight, bias.
    given: [bool; 2],
    /// The trailing dimensions that are normalised.
    normalized: Shape,
    mean: Tensor,
    rstd: Tensor,
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        if self.rows.centered { "layer_norm" } else { "rms_norm" }
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let [dx, dw, db] = if is_grad_enabled() { self.composed(grad)?.map(Some) } else { self.fused(ctx, grad)? };
        let parameters = [dw, db].into_iter().zip(self.given).filter(|(_, given)| *given).map(|(gradient, _)| gradient);
        Ok([dx].into_iter().chain(parameters).collect())
    }
}

impl LayerNorm {
    fn composed(&self, grad: &Tensor) -> Result<[Tensor; 3]> {
        let rank = self.x.rank();
        let dims: Vec<usize> = (rank - self.normalized.rank()..rank).collect();
        let Rows { eps, centered, .. } = self.rows;
        composed_gradient(&Normalised { x: &self.x, weight: self.weight.clone(), dims: &dims, eps, centered }, grad)
    }

    fn fused(&self, ctx: &Ctx, grad: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let _running = operation("layer_norm_backward", &[grad, &self.x], || Cost::flops(11 * self.x.numel() as u64));
        let x = self.x.detach().contiguous()?;
        let g = match one_row(grad, self.normalized.rank())? {
            Some(row) => row,
            None => grad.detach().contiguous()?,
        };
        let weight = self.weight.as_ref().map(|w| w.detach().contiguous()).transpose()?;
        let wants = |i: usize| self.given[i] && ctx.needs(1 + (i.min(1) * self.given[0] as usize));
        let (wants_weight, wants_bias) = (wants(0), wants(1));
        if let Some(gpu) = x.gpu()? {
            return self.fused_on_gpu(gpu, &g, &x, weight.as_ref(), [wants_weight, wants_bias]);
        }
        for_float!(x.dtype(), self.name(), T => {
            let (mut dw, mut db) = (parameter_gradient(&self.normalized, &x, wants_weight)?, parameter_gradient(&self.normalized, &x, wants_bias)?);
            let dx = Tensor::build::<T>(x.device(), x.shape(), |dx| {
                let weight = weight.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                let dw = dw.as_mut().map(Tensor::as_slice_mut::<T>).transpose()?;
                let db = db.as_mut().map(Tensor::as_slice_mut::<T>).transpose()?;
                norm::layer_norm_backward::<T>(self.rows, g.as_slice()?, x.as_slice()?, weight, self.mean.as_slice()?, self.rstd.as_slice()?, dx, dw, db);
                Ok(())
            })?;
            Ok([Some(dx), dw, db])
        })
    }

    fn fused_on_gpu(
        &self,
        gpu: &'static Gpu,
        g: &Tensor,
        x: &Tensor,
        weight: Option<&Tensor>,
        wants: [bool; 2],
    ) -> Result<[Option<Tensor>; 3]> {
        let room = |wanted: bool| wanted.then(|| Tensor::stale_on_gpu(gpu, self.normalized, x.dtype())).transpose();
        let (mut dw, mut db) = (room(wants[0])?, room(wants[1])?);
        let dx = Tensor::build_on_gpu(gpu, Layout::contiguous(*x.shape()), x.dtype(), |dx| {
            let weight = weight.map(Tensor::gpu_slice).transpose()?;
            let dw = dw.as_mut().map(Tensor::gpu_slice_mut).transpose()?;
            let db = db.as_mut().map(Tensor::gpu_slice_mut).transpose()?;
            let (mean, rstd) = (self.mean.gpu_slice()?, self.rstd.gpu_slice()?);
            Ok(gpu_norm::layer_norm_backward(gpu, self.rows, g.gpu_slice()?, x.gpu_slice()?, weight, mean, rstd, dx, dw, db)?)
        })?;
        Ok([Some(dx), dw, db])
    }
}

/// The one row of a gradient whose rows are all the same in memory, as that of a sum's operand is.
fn one_row(grad: &Tensor, rank: usize) -> Result<Option<Tensor>> {
    let rows = grad.rank() - rank;
    if grad.numel() == 0 || !grad.layout().strides()[..rows].iter().zip(grad.dims()).all(|(&stride, &extent)| stride == 0 || extent == 1) {
        return Ok(None);
    }
    let mut row = grad.detach();
    for _ in 0..rows {
        row = row.select(0, 0)?;
    }
    row.contiguous().map(Some)
}

/// Room for the gradient of a parameter, if it is wanted.
pub(super) fn parameter_gradient(shape: &Shape, like: &Tensor, wanted: bool) -> Result<Option<Tensor>> {
    wanted.then(|| Tensor::zeros(shape, like)).transpose()
}

impl Tensor {
    /// (x − mean) / √(var + ε) · weight + bias, with mean and (population) variance over the trailing dimensions `normalized_shape`,
    /// which is also the parameters' shape. Floats only.
    pub fn layer_norm(&self, normalized_shape: impl IntoShape, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.row_norm("layer_norm", normalized_shape.into_shape()?, weight, bias, eps, true)
    }

    /// x / √(mean x² + ε) · weight, with the mean over the trailing dimensions `normalized_shape`, which is also the weight's shape.
    /// Floats only.
    pub fn rms_norm(&self, normalized_shape: impl IntoShape, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
        self.row_norm("rms_norm", normalized_shape.into_shape()?, weight, None, eps, false)
    }

    fn row_norm(
        &self,
        op: &'static str,
        normalized: Shape,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
        centered: bool,
    ) -> Result<Tensor> {
        let (input, weight, bias) = (raised(self)?, raised_option(weight)?, raised_option(bias)?);
        let (input, weight, bias) = (&*input, weight.as_deref(), bias.as_deref());
        if normalized.rank() == 0 || !input.dims().ends_with(&normalized) {
            return Err(Error::shape(op, format!("the input of shape {} must end with the normalized shape {normalized}", input.shape())));
        }
        expect_parameter(op, "weight", input, weight, &normalized)?;
        expect_parameter(op, "bias", input, bias, &normalized)?;
        let _running =
            operation_with(op, || [Some(input), weight, bias].into_iter().flatten().collect(), || Cost::flops(7 * input.numel() as u64));
        let rows = Rows { n: normalized.numel(), eps, centered };
        let count: usize = input.dims()[..input.rank() - normalized.rank()].iter().product();
        let x = input.detach().contiguous()?;
        let dense = |p: Option<&Tensor>| p.map(|p| p.detach().contiguous()).transpose();
        let (w, b) = (dense(weight)?, dense(bias)?);
        let statistic = || match x.gpu()? {
            Some(gpu) => Tensor::stale_on_gpu(gpu, Shape::new(&[count])?, input.dtype().accumulator()),
            None => Tensor::zeros(count, (input.dtype().accumulator(), Device::Cpu)),
        };
        let (mut mean, mut rstd) = (statistic()?, statistic()?);
        let out = for_float!(input.dtype(), op, T => match x.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*input.shape()), input.dtype(), |y| {
                let w = w.as_ref().map(Tensor::gpu_slice).transpose()?;
                let b = b.as_ref().map(Tensor::gpu_slice).transpose()?;
                Ok(gpu_norm::layer_norm(gpu, rows, x.gpu_slice()?, w, b, y, mean.gpu_slice_mut()?, rstd.gpu_slice_mut()?)?)
            }),
            None => Tensor::build::<T>(x.device(), input.shape(), |y| {
                let w = w.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                let b = b.as_ref().map(Tensor::as_slice::<T>).transpose()?;
                norm::layer_norm::<T>(rows, x.as_slice()?, w, b, y, mean.as_slice_mut()?, rstd.as_slice_mut()?);
                Ok(())
            }),
        })?;
        let inputs: Vec<&Tensor> = [Some(input), weight, bias].into_iter().flatten().collect();
        let given = [weight.is_some(), bias.is_some()];
        record(op, out, &inputs, |_| LayerNorm { rows, x: input.clone(), weight: weight.cloned(), given, normalized, mean, rstd })
    }
}
