//! Traced functions of tensors, and the rule of what they record.

use super::super::kernel::{Arg, common_shape, gpu_operand, gpu_output, operand, result_layout};
use super::Fused;
use super::program::{Pass, Program};
use crate::autocast::{raises, together};
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record};
use crate::ops::reduce::{Axes, Sum};
use crate::profile::{Cost, operation_with};
use crate::{DType, Device, Dims, Error, Layout, Result, Shape, Tensor, WithDType};
use kiln_kernels::cpu::pointwise::chain::{Chain, MAX_OPERANDS, MAX_RESULTS, Results};
use kiln_kernels::cpu::pointwise::{Operand, Output};
use kiln_kernels::cpu::reduce;
use kiln_kernels::cuda::Gpu;
use kiln_kernels::cuda::pointwise as gpu_kernels;
use kiln_kernels::cuda::reduce::{self as gpu_reduce, Input};
use std::sync::Arc;

/// The layout of a pass's result: that of its steps one by one.
fn layout_of(pass: &Pass, tensors: &[Option<&Tensor>], shape: &Shape) -> Layout {
    result_layout(shape, pass.order.iter().filter_map(|&i| tensors[i]))
}

/// The result of a pass, named so in profiles, over operands that broadcast to `shape`, `None` where it reads none.
pub(super) fn run(name: &'static str, pass: &Pass, tensors: &[Option<&Tensor>], shape: &Shape) -> Result<Tensor> {
    Ok(Operands::new(name, layout_of(pass, tensors, shape), tensors, shape)?.run(&pass.chain)?.swap_remove(0))
}

/// The reductions that may end a chain.
#[derive(Clone, Copy, PartialEq)]
enum Total {
    Sum,
    Mean,
}

/// A chain's operands, ready to run.
struct Operands<'a> {
    /// What runs, in profiles.
    name: &'static str,
    tensors: &'a [Option<&'a Tensor>],
    /// Of those that are broadcast.
    layouts: [Option<Layout>; MAX_OPERANDS],
    /// Of the result.
    layout: Layout,
    dtype: DType,
    device: Device,
}

impl<'a> Operands<'a> {
    /// Operands that broadcast to `shape`, `None` where none is read, of a pass whose results have this layout.
    fn new(name: &'static str, layout: Layout, tensors: &'a [Option<&'a Tensor>], shape: &Shape) -> Result<Self> {
        let present = || tensors.iter().copied().flatten();
        let first = present().next().ok_or_else(|| Error::argument("fuse", "needs a tensor"))?;
        let mut layouts: [Option<Layout>; MAX_OPERANDS] = [None; MAX_OPERANDS];
        for (own, arg) in layouts.iter_mut().zip(tensors) {
            let other_shape = arg.filter(|t| t.shape() != shape);
            *own = other_shape.map(|t| t.layout().broadcast_to("fuse", shape)).transpose()?;
        }
        Ok(Self { name, tensors, layouts, layout, dtype: first.dtype(), device: first.device() })
    }

    fn on_host<T: WithDType>(&self) -> Result<[Operand<'_, T>; MAX_OPERANDS]> {
        let mut views = [Operand::Unused; MAX_OPERANDS];
        for (view, (arg, layout)) in views.iter_mut().zip(self.tensors.iter().zip(&self.layouts)) {
            if let Some(x) = arg {
                *view = operand::<T>("fuse", &Arg::Tensor(x), layout)?;
            }
        }
        Ok(views)
    }

    fn on_gpu(&self) -> Result<[gpu_kernels::Operand<'_>; MAX_OPERANDS]> {
        let mut views = [gpu_kernels::Operand::Scalar(0.0); MAX_OPERANDS];
        for (view, (arg, layout)) in views.iter_mut().zip(self.tensors.iter().zip(&self.layouts)) {
            if let Some(x) = arg {
                *view = gpu_operand(&Arg::Tensor(x), layout)?;
            }
        }
        Ok(views)
    }

    /// The chain's results.
    fn run(&self, chain: &Chain) -> Result<Vec<Tensor>> {
        match chain.results() {
            1 => self.run_results::<1>(chain),
            2 => self.run_results::<2>(chain),
            _ => self.run_results::<MAX_RESULTS>(chain),
        }
    }

    fn run_results<const M: usize>(&self, chain: &Chain) -> Result<Vec<Tensor>> {
        let _running = operation_with(self.name, || self.present(), || Cost::flops((chain.count() * self.layout.numel()) as u64));
        let (layout, used) = (self.layout, self.tensors.len());
        let misfit = || Error::argument("fuse", format!("{M} results"));
        if let Some(gpu) = self.device.gpu()? {
            let views = self.on_gpu()?;
            let stale = |_| Tensor::build_on_gpu(gpu, layout, self.dtype, |_| Ok(()));
            let mut results = (0..M).map(stale).collect::<Result<Vec<_>>>()?;
            let outs = results.iter_mut().map(|x| Ok(gpu_output(&layout, x.donate_on_gpu()?.ok_or_else(misfit)?)));
            let outs: [_; M] = outs.collect::<Result<Vec<_>>>()?.try_into().map_err(|_| misfit())?;
            gpu_kernels::apply_chain(gpu, chain, &views[..used], outs)?;
            return Ok(results);
        }
        for_float!(self.dtype, "fuse", T => {
            let views = self.on_host::<T>()?;
            let stale = |_| Tensor::build_with_layout::<T>(self.device, layout, |_| Ok(()));
            let mut results = (0..M).map(stale).collect::<Result<Vec<_>>>()?;
            let out = |data| Output { data, shape: layout.shape().dims(), strides: layout.strides() };
            let outs = results.iter_mut().map(|x| x.donate::<T>().map(out).ok_or_else(misfit));
            let outs: [_; M] = outs.collect::<Result<Vec<_>>>()?.try_into().map_err(|_| misfit())?;
            chain.apply(&views[..used], outs);
            Ok(results)
        })
    }

    /// The tensors that are read.
    fn present(&self) -> Vec<&'a Tensor> {
        self.tensors.iter().copied().flatten().collect()
    }

    /// The sum or mean of the chain's result, in the shape `kept`.
    fn reduce(&self, chain: &Chain, total: Total, axes: &Axes, kept: Shape) -> Result<Tensor> {
        let flops = (chain.count() as u64 + 1) * self.layout.numel() as u64;
        let _running = operation_with(self.name, || self.present(), || Cost::flops(flops));
        if let Some(gpu) = self.device.gpu()? {
            return self.reduce_on_gpu(gpu, chain, total, axes, kept);
        }
        let (shape, strides) = (self.layout.shape().dims(), self.layout.strides());
        for_float!(self.dtype, "fuse", T => {
            let views = self.on_host::<T>()?;
            Tensor::build::<T>(self.device, &kept, |out| {
                let results = Results::new(chain, &views[..self.tensors.len()], shape, strides);
                match total {
                    Total::Sum => reduce::sum_of::<T>(results, &axes.reduced, out),
                    Total::Mean => reduce::mean_of::<T>(results, &axes.reduced, out),
                }
                Ok(())
            })
        })
    }

    fn reduce_on_gpu(&self, gpu: &'static Gpu, chain: &Chain, total: Total, axes: &Axes, kept: Shape) -> Result<Tensor> {
        let (shape, strides) = (self.layout.shape().dims(), self.layout.strides());
        let views = self.on_gpu()?;
        let results = gpu_kernels::ChainResults::new(chain, &views[..self.tensors.len()], self.dtype.gpu_type(), shape, strides);
        Tensor::build_on_gpu(gpu, Layout::contiguous(kept), self.dtype, |out| {
            Ok(match total {
                Total::Sum => gpu_reduce::sum_of(gpu, Input::Chain(&results), &axes.reduced, out),
                Total::Mean => gpu_reduce::mean_of(gpu, Input::Chain(&results), &axes.reduced, out),
            }?)
        })
    }
}

impl<const N: usize> Fused<N> {
    /// The function of tensors that broadcast together, of one dtype and device: what the traced operations would give, bit for bit.
    ///
    /// # Errors
    /// Those of the operations, in their order.
    pub fn call(&self, operands: [&Tensor; N]) -> Result<Tensor> {
        let operands = together(operands)?;
        let operands = operands.each_ref().map(|x| &**x);
        let Some((pass, shape)) = self.pass_over(&operands)? else { return self.program.result(&operands) };
        let out = run(self.program.name, pass, &operands.map(Some), &shape)?;
        self.record(out, &operands, shape, None)
    }

    /// The sum of the function's results along `dims` (`()` for all), which are never in memory as a whole: what [`call`](Self::call) and
    /// [`Tensor::sum`] would give, bit for bit.
    ///
    /// # Errors
    /// Those of the operations, in their order.
    pub fn sum(&self, operands: [&Tensor; N], dims: impl Into<Dims>) -> Result<Tensor> {
        self.total(operands, Total::Sum, dims.into())
    }

    /// The mean of the function's results along `dims` (`()` for all), as [`sum`](Self::sum) takes it.
    ///
    /// # Errors
    /// Those of the operations, in their order.
    pub fn mean(&self, operands: [&Tensor; N], dims: impl Into<Dims>) -> Result<Tensor> {
        self.total(operands, Total::Mean, dims.into())
    }

    fn total(&self, operands: [&Tensor; N], total: Total, dims: Dims) -> Result<Tensor> {
        let cast = together(operands)?;
        let cast = cast.each_ref().map(|x| &**x);
        // In a scope of mixed precision a sum takes its operand in f32.
        let pass = if cast.iter().any(|x| raises(x)) { None } else { self.pass_over(&cast)? };
        let Some((pass, shape)) = pass else {
            let results = self.call(operands)?;
            return if total == Total::Sum { results.sum(dims) } else { results.mean(dims) };
        };
        let name = if total == Total::Sum { "sum" } else { "mean" };
        let axes = Axes::new(name, shape, dims)?;
        let tensors = cast.map(Some);
        let out = Operands::new(self.program.name, layout_of(pass, &tensors, &shape), &tensors, &shape)?.reduce(
            &pass.chain,
            total,
            &axes,
            axes.kept(),
        )?;
        let divisor = if total == Total::Sum { 1.0 } else { axes.count as f64 };
        self.record(out, &cast, shape, Some(Sum { name, axes, divisor }))
    }

    /// The pass and the shape of its result, if one pass over these operands computes it.
    fn pass_over(&self, operands: &[&Tensor; N]) -> Result<Option<(&Pass, Shape)>> {
        let program = &self.program;
        let (Some(pass), Some(first)) = (&program.pass, operands.first()) else { return Ok(None) };
        for x in operands {
            first.expect_same(program.name, x)?;
        }
        let shape = common_shape(program.name, operands.iter().copied())?;
        Ok((first.dtype().is_float() && program.steps_are_full(operands, &shape)?).then_some((pass, shape)))
    }

    fn record(&self, out: Tensor, operands: &[&Tensor; N], shape: Shape, total: Option<Sum>) -> Result<Tensor> {
        let program = &self.program;
        let chosen = program.inputs_for(|operand| *operands[operand].shape() == shape);
        let inputs: Vec<&Tensor> = chosen.iter().map(|&input| operands[program.inputs[input].operand]).collect();
        record(program.name, out, &inputs, |needs| Chained::new(program.clone(), operands, shape, total, |k| needs.input(k)))
    }
}

/// The rule of a chain.
pub(super) struct Chained {
    program: Arc<Program>,
    /// What the node's inputs are, by index into those of the program.
    pub(super) inputs: Vec<usize>,
    /// The shapes of all operands, and those that a gradient reads.
    operands: Vec<(Shape, Option<Tensor>)>,
    /// Of the chain's result.
    shape: Shape,
    /// The reduction that ends it.
    total: Option<Sum>,
}

impl Op for Chained {
    fn name(&self) -> &'static str {
        self.program.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let needs: Vec<bool> = (0..self.inputs.len()).map(|k| ctx.needs(k)).collect();
        self.gradients(&needs, grad)
    }
}

impl Chained {
    /// Keeps what is read by the gradients of those inputs that `wants` names.
    pub(super) fn new(
        program: Arc<Program>,
        operands: &[&Tensor],
        shape: Shape,
        total: Option<Sum>,
        wants: impl Fn(usize) -> bool,
    ) -> Self {
        let inputs = program.inputs_for(|operand| *operands[operand].shape() == shape);
        let reads = |k: usize, i: usize| wants(k) && program.passes[program.inputs[inputs[k]].pass].reads.contains(&i);
        let saved = |i: usize| (0..inputs.len()).any(|k| reads(k, i)).then(|| operands[i].clone());
        let operands = operands.iter().enumerate().map(|(i, x)| (*x.shape(), saved(i))).collect();
        Self { program, inputs, operands, shape, total }
    }

    /// The gradients of the inputs that need one.
    pub(super) fn gradients(&self, needs: &[bool], grad: &Tensor) -> Result<Grads> {
        let spread = self.total.as_ref().map(|total| total.gradient(grad)).transpose()?;
        let grad = spread.as_ref().unwrap_or(grad);
        if is_grad_enabled() {
            return self.program.composed_gradients(&self.operands, &self.inputs, needs, grad);
        }
        let pass_of = |input: usize| self.program.inputs[input].pass;
        let mut wanted: Vec<usize> =
            self.inputs.iter().zip(needs).filter(|(_, needed)| **needed).map(|(&input, _)| pass_of(input)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let done = self.run_passes(&wanted, grad)?;
        let gradient = |input: usize| wanted.iter().position(|&pass| pass == pass_of(input)).map(|at| done[at].clone());
        Ok(self.inputs.iter().zip(needs).map(|(&input, &needed)| gradient(input).filter(|_| needed)).collect())
    }

    /// The gradients that these passes make, in one pass if there is one for all and their layouts are one.
    fn run_passes(&self, wanted: &[usize], grad: &Tensor) -> Result<Vec<Tensor>> {
        let Program { passes, joint, .. } = &*self.program;
        // What was not saved is not read.
        let saved = self.operands.iter().map(|(_, x)| x.as_ref());
        let args: Vec<Option<&Tensor>> = saved.chain([Some(grad)]).collect();
        let made: Vec<(usize, &Pass)> = wanted.iter().filter_map(|&i| Some((i, passes[i].pass.as_ref()?))).collect();
        let joint = joint.iter().find(|joint| joint.passes.iter().copied().eq(made.iter().map(|(i, _)| *i)));
        let layouts: Vec<Layout> = made.iter().map(|(_, pass)| layout_of(pass, &args, &self.shape)).collect();
        let together = match joint {
            Some(joint) if layouts.windows(2).all(|w| w[0] == w[1]) => {
                Operands::new(self.program.name, layouts[0], &args, &self.shape)?.run(&joint.chain)?
            }
            _ => made.iter().map(|(_, pass)| run(self.program.name, pass, &args, &self.shape)).collect::<Result<_>>()?,
        };
        let mut together = together.into_iter();
        let of_pass = |&i: &usize| if passes[i].pass.is_some() { together.next() } else { Some(grad.clone()) };
        wanted.iter().map(of_pass).map(|x| x.ok_or_else(|| Error::graph(self.program.name, "a pass without a result"))).collect()
    }
}
