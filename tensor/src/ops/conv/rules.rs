//! A convolution `y = x ∗ w` is linear in `x` and in `w`, so three operations are closed under differentiation: the
//! convolution, its gradient by `x` (the transposed convolution), and its gradient by `w`. Each one's rule is the other two.

use super::Geometry;
use crate::graph::{Ctx, Grads, Op, record};
use crate::ops::spatial::{Extents, for_real, in_pixel_order, pixels};
use crate::profile::{Cost, convolution, operation, operation_with};
use crate::{DType, Layout, Result, Shape, Tensor, WithDType, bf16, f16};
use kiln_kernels::cpu::conv::{self, ConvShape, HalfElement, Pass};
use kiln_kernels::cpu::gemm::{MatmulPrecision, matmul_precision};
use kiln_kernels::cuda::conv as gpu_conv;

/// The convolution from which all three operations are derived, and the name under which they are recorded.
#[derive(Clone, Copy)]
pub(super) struct Conv {
    pub name: &'static str,
    pub geometry: Geometry,
    pub dtype: DType,
}

impl Conv {
    fn shape(&self) -> ConvShape {
        let Geometry { groups, kernel, stride, padding, dilation, wide, narrow } = self.geometry;
        let precision = match self.dtype {
            DType::BF16 => MatmulPrecision::Medium,
            DType::F16 => MatmulPrecision::High,
            _ => matmul_precision(),
        };
        let (input, output) = (wide.axes, narrow.axes);
        ConvShape { n: wide.n, ci: wide.c, co: narrow.c, groups, input, output, kernel, stride, padding, dilation, precision }
    }

    fn cost(&self, weight: &Shape) -> Cost {
        convolution(weight, self.geometry.narrow.n, self.geometry.narrow.axes.iter().product())
    }

    /// `x ∗ w + bias`, from the wide image to the narrow one.
    pub(super) fn forward(self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let out = self.pass(Pass::Forward, x, w, bias)?;
        let inputs = [Some(x), Some(w), bias].into_iter().flatten().collect::<Vec<_>>();
        record(self.name, out, &inputs, |needs| Forward {
            conv: self,
            bias: bias.is_some(),
            x: needs.save_for(1, x),
            w: needs.save_for(0, w),
        })
    }

    /// The gradient of [`forward`](Conv::forward) by `x` at `g`, plus `bias`: from the narrow image to the wide one.
    pub(super) fn input_grad(self, g: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let out = self.pass(Pass::InputGrad, g, w, bias)?;
        let inputs = [Some(g), Some(w), bias].into_iter().flatten().collect::<Vec<_>>();
        record(self.name, out, &inputs, |needs| InputGrad {
            conv: self,
            bias: bias.is_some(),
            g: needs.save_for(1, g),
            w: needs.save_for(0, w),
        })
    }

    /// One image from another, without a rule.
    fn pass(&self, pass: Pass, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let _running = operation_with(self.name, || [Some(x), Some(w), bias].into_iter().flatten().collect(), || self.cost(w.shape()));
        let (x, w, bias) = (pixels(x)?, w.detach().contiguous()?, bias.map(|b| b.detach().contiguous()).transpose()?);
        let to = match pass {
            Pass::Forward => &self.geometry.narrow,
            Pass::InputGrad => &self.geometry.wide,
        };
        if let Some(gpu) = x.gpu()? {
            return to.build_on_gpu(gpu, x.dtype(), |mut y| {
                let (shape, x, w, bias) = (self.shape(), x.gpu_slice()?, w.gpu_slice()?, bias.as_ref().map(Tensor::gpu_slice).transpose()?);
                Ok(match pass {
                    Pass::Forward => gpu_conv::forward(gpu, &shape, x, w, bias, &mut y),
                    Pass::InputGrad => gpu_conv::input_grad(gpu, &shape, x, w, bias, &mut y),
                }?)
            });
        }
        match x.dtype() {
            DType::BF16 => self.pass_of_halves::<bf16>(pass, to, &x, &w, bias.as_ref()),
            DType::F16 => self.pass_of_halves::<f16>(pass, to, &x, &w, bias.as_ref()),
            _ => self.pass_of_reals(pass, to, &x, &w, bias.as_ref()),
        }
    }

    fn pass_of_reals(&self, pass: Pass, to: &Extents, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        for_real!(x.dtype(), self.name, T => to.build::<T>(x.device(), |y| {
            let (shape, x, w, bias) = (self.shape(), x.as_slice::<T>()?, w.as_slice::<T>()?, bias.map(Tensor::as_slice::<T>).transpose()?);
            Ok(match pass {
                Pass::Forward => conv::forward(&shape, x, w, bias, y),
                Pass::InputGrad => conv::input_grad(&shape, x, w, bias, y),
            }?)
        }))
    }

    /// As they are, where there is a kernel for it, otherwise widened; rounded once, after the bias.
    fn pass_of_halves<T: WithDType + HalfElement>(
        &self,
        pass: Pass,
        to: &Extents,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        if conv::takes_half::<T>(&self.shape(), pass) {
            let bias = bias.map(Tensor::as_slice::<T>).transpose()?;
            return to.build::<T>(x.device(), |y| Ok(conv::half(&self.shape(), pass, x.as_slice()?, w.as_slice()?, bias, y)?));
        }
        let bias = bias.map(|b| b.to_dtype(DType::F32)).transpose()?;
        self.pass_of_reals(pass, to, &x.to_dtype(DType::F32)?, &w.to_dtype(DType::F32)?, bias.as_ref())?.to_dtype(T::DTYPE)
    }

    /// The gradient of [`forward`](Conv::forward) by `w`, given `x` and the gradient `g` by the result.
    fn weight_grad(self, x: &Tensor, g: &Tensor) -> Result<Tensor> {
        let Geometry { groups, kernel, wide, narrow, .. } = self.geometry;
        let shape = Shape::new(&[&[narrow.c, wide.c / groups], &kernel[3 - wide.rank..]].concat())?;
        let _running = operation(self.name, &[x, g], || self.cost(&shape));
        let (source, target) = (pixels(x)?, pixels(g)?);
        let out = match x.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(shape), x.dtype(), |mut gw| {
                Ok(gpu_conv::weight_grad(gpu, &self.shape(), source.gpu_slice()?, target.gpu_slice()?, &mut gw)?)
            }),
            None if x.dtype() == DType::BF16 && conv::takes_bf16_weight_grad(&self.shape()) => {
                let fill = |gw: &mut [f32]| Ok(conv::weight_grad_bf16(&self.shape(), source.as_slice()?, target.as_slice()?, gw)?);
                Tensor::build::<f32>(source.device(), &shape, fill)?.to_dtype(DType::BF16)
            }
            None => {
                let (source, target) = (widened(&source)?, widened(&target)?);
                for_real!(source.dtype(), self.name, T => {
                    Tensor::build::<T>(source.device(), &shape, |gw| Ok(conv::weight_grad(&self.shape(), source.as_slice()?, target.as_slice()?, gw)?))
                })?
                .to_dtype(x.dtype())
            }
        }?;
        record(self.name, out, &[x, g], |needs| WeightGrad { conv: self, x: needs.save_for(1, x), g: needs.save_for(0, g) })
    }
}

/// Halves in f32.
fn widened(x: &Tensor) -> Result<Tensor> {
    if matches!(x.dtype(), DType::BF16 | DType::F16) { x.to_dtype(DType::F32) } else { Ok(x.clone()) }
}

/// The gradient by a bias, if there is one: the sum over images and positions.
fn bias_grad(ctx: &Ctx, bias: bool, extents: &Extents, grad: &Tensor) -> Result<Grads> {
    let dims: Vec<usize> = [0].into_iter().chain(2..extents.rank + 2).collect();
    let sum = ctx.needs(2).then(|| grad.sum(dims)).transpose()?;
    Ok(if bias { vec![sum] } else { Vec::new() })
}

/// `f` of a saved tensor, if input `i` wants its gradient.
fn when(ctx: &Ctx, i: usize, saved: &Option<Tensor>, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Option<Tensor>> {
    saved.as_ref().filter(|_| ctx.needs(i)).map(f).transpose()
}

struct Forward {
    conv: Conv,
    bias: bool,
    x: Option<Tensor>,
    w: Option<Tensor>,
}

impl Op for Forward {
    fn name(&self) -> &'static str {
        self.conv.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let grad = &in_pixel_order(grad)?;
        let gx = when(ctx, 0, &self.w, |w| self.conv.input_grad(grad, w, None))?;
        let gw = when(ctx, 1, &self.x, |x| self.conv.weight_grad(x, grad))?;
        Ok([vec![gx, gw], bias_grad(ctx, self.bias, &self.conv.geometry.narrow, grad)?].concat())
    }
}

struct InputGrad {
    conv: Conv,
    bias: bool,
    g: Option<Tensor>,
    w: Option<Tensor>,
}

impl Op for InputGrad {
    fn name(&self) -> &'static str {
        self.conv.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let grad = &in_pixel_order(grad)?;
        let gg = when(ctx, 0, &self.w, |w| self.conv.forward(grad, w, None))?;
        let gw = when(ctx, 1, &self.g, |g| self.conv.weight_grad(grad, g))?;
        Ok([vec![gg, gw], bias_grad(ctx, self.bias, &self.conv.geometry.wide, grad)?].concat())
    }
}

struct WeightGrad {
    conv: Conv,
    x: Option<Tensor>,
    g: Option<Tensor>,
}

impl Op for WeightGrad {
    fn name(&self) -> &'static str {
        self.conv.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let gx = when(ctx, 0, &self.g, |g| self.conv.input_grad(g, grad, None))?;
        let gg = when(ctx, 1, &self.x, |x| self.conv.forward(x, grad, None))?;
        Ok(vec![gx, gg])
    }
}
