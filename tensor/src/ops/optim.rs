//! What training does to parameters, gradients and states in place, a whole list of tensors in one pass: optimiser updates, moving
//! averages, norms, scaling and clamping. None of it is recorded.
//!
//! A tensor whose memory is shared (with a live graph, say) moves to a copy first: no other holder sees a change.

use crate::profile::{Cost, operation, operation_with, writing};
use crate::{DType, Device, Error, ErrorKind, Result, Shape, Tensor, WithDType};
use kiln_kernels::cpu::gradient::{self, Squares};
use kiln_kernels::cpu::optim::{self, OptimFloat, Slot, Value};
use kiln_kernels::cuda::{self, CudaError, DeviceBuffer, Gpu, SliceMut};
use kiln_kernels::element::Float;

pub use kiln_kernels::cpu::optim::{Adam, Lion, RmsProp, Rule, Sgd};

/// One parameter of a pass over many.
pub struct Update<'a, const N: usize> {
    /// What is updated.
    pub param: &'a mut Tensor,
    /// Its gradient, of the parameter's shape and dtype.
    pub grad: Tensor,
    /// The rule's states in its order, of the parameter's shape and of [`state_dtype`].
    pub states: [&'a mut Tensor; N],
}

impl<const N: usize> Update<'_, N> {
    /// What a step reads and writes: parameter, states, and the gradient once.
    fn bytes(&self) -> u64 {
        let of = |t: &Tensor| (t.numel() * t.dtype().size()) as u64;
        of(&self.grad) + 2 * (of(self.param) + self.states.iter().map(|s| of(s)).sum::<u64>())
    }
}

/// A moving average as a rule: the "parameter" is the average, the "gradient" the new value; `average += weight · (value − average)`.
#[derive(Clone, Copy, Debug)]
pub struct Average {
    /// Weight of the new value.
    pub weight: f64,
}

impl Rule<0> for Average {
    #[inline(always)]
    fn update<V: Value>(&self, average: V, value: V, _: [V; 0]) -> (V, [V; 0]) {
        (average + average.constant(self.weight) * (value - average), [])
    }
}

/// The dtype of an optimiser's states: f32 for f16 and bf16 parameters (a second moment would underflow in them), else the parameter's.
pub fn state_dtype(dtype: DType) -> DType {
    if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype }
}

/// What a pass multiplies every gradient by, rounded to the dtype of the arithmetic first; the gradients in memory stay as they are.
/// NaN leaves out the pass.
#[derive(Clone, Debug)]
pub enum Factor {
    /// This number.
    Number(f64),
    /// One f64, which the host need not know: on a GPU nothing waits for it.
    Tensor(Tensor),
}

impl Default for Factor {
    fn default() -> Self {
        Factor::Number(1.0)
    }
}

impl Factor {
    /// The number, for which the host may have to wait.
    pub fn number(&self) -> Result<f64> {
        match self {
            Factor::Number(x) => Ok(*x),
            Factor::Tensor(x) => x.item(),
        }
    }
}

/// A rule with `N` states that this crate has compiled for all dtypes. Another [`Rule`] goes through [`step_with`].
pub trait FusedRule<const N: usize>: Rule<N> {
    /// [`step_scaled`].
    fn step(&self, updates: Vec<Update<'_, N>>, factor: &Factor) -> Result<()>;
}

macro_rules! fused_rules {
    ($($rule:ty, $states:literal;)*) => { $(
        impl FusedRule<$states> for $rule {
            fn step(&self, updates: Vec<Update<'_, $states>>, factor: &Factor) -> Result<()> {
                step_with(self, updates, factor)
            }
        }
    )* };
}
fused_rules! {
    Sgd, 0; Sgd, 1;
    Adam, 2; Adam, 3;
    RmsProp, 1; RmsProp, 2; RmsProp, 3;
    Lion, 1;
    Average, 0;
}

/// Applies `rule` to every parameter of the list, in place. f16 and bf16 parameters are updated in f32 and rounded once.
///
/// # Errors
/// Before anything changes: a parameter that is not float, or a gradient or state of another shape, dtype or device.
pub fn step<const N: usize>(rule: &impl FusedRule<N>, updates: Vec<Update<'_, N>>) -> Result<()> {
    rule.step(updates, &Factor::default())
}

/// [`step`] with every gradient times `factor`.
///
/// # Errors
/// As for [`step`], and if the factor is a tensor of another shape or dtype than one f64.
pub fn step_scaled<const N: usize>(rule: &impl FusedRule<N>, updates: Vec<Update<'_, N>>, factor: &Factor) -> Result<()> {
    rule.step(updates, factor)
}

/// [`step_scaled`] for any rule. It is compiled in the calling crate, with that crate's optimisation.
///
/// # Errors
/// As for [`step_scaled`].
pub fn step_with<const N: usize>(rule: &impl Rule<N>, mut updates: Vec<Update<'_, N>>, factor: &Factor) -> Result<()> {
    updates.iter().try_for_each(check)?;
    if let Factor::Tensor(x) = factor
        && (x.dtype() != DType::F64 || x.rank() > 0)
    {
        return Err(Error::argument("optimizer step", format!("the factor must be one f64, not {} {}", x.dtype(), x.shape())));
    }
    let _running = operation("optimizer_step", &[], || Cost::NONE.bytes(updates.iter().map(Update::bytes).sum()));
    while let Some(gpu) = updates.iter().find_map(|u| u.param.gpu().transpose()).transpose()? {
        let device = Device::Cuda(gpu.ordinal());
        let (on_gpu, rest) = updates.into_iter().partition(|u| u.param.device() == device);
        step_on_gpu(gpu, rule, on_gpu, factor)?;
        updates = rest;
    }
    if updates.is_empty() {
        return Ok(());
    }
    let factor = factor.number()?;
    if factor.is_nan() {
        return Ok(());
    }
    let (double, single): (Vec<_>, Vec<_>) = updates.iter_mut().partition(|u| u.param.dtype() == DType::F64);
    step_as::<f64, N>(rule, double, factor)?;
    let (single, half): (Vec<_>, Vec<_>) = single.into_iter().partition(|u| u.param.dtype() == DType::F32);
    step_as::<f32, N>(rule, single, factor)?;
    half.into_iter().try_for_each(|u| step_half(rule, u, factor))
}

fn check<const N: usize>(update: &Update<'_, N>) -> Result<()> {
    let Update { param, grad, states } = update;
    if !param.dtype().is_float() {
        return Err(Error::unsupported_dtype("optimizer step", param.dtype(), "a float dtype"));
    }
    let dtype = state_dtype(param.dtype());
    let others = states.iter().map(|s| ("state", &**s, dtype)).chain([("gradient", grad, param.dtype())]);
    for (what, tensor, dtype) in others {
        if tensor.shape() != param.shape() {
            let message = format!("the parameter has shape {}, its {what} {}", param.shape(), tensor.shape());
            return Err(Error::shape("optimizer step", message));
        }
        if tensor.dtype() != dtype || tensor.device() != param.device() {
            let message = format!(
                "the parameter is {} on {}, so its {what} must be {dtype} there, not {} on {}",
                param.dtype(),
                param.device(),
                tensor.dtype(),
                tensor.device()
            );
            return Err(Error::new(ErrorKind::DType, "optimizer step", message));
        }
    }
    Ok(())
}

fn step_on_gpu<const N: usize>(gpu: &'static Gpu, rule: &impl Rule<N>, mut updates: Vec<Update<'_, N>>, factor: &Factor) -> Result<()> {
    let here = match factor {
        Factor::Tensor(x) => Some(x.detach().to_device(Device::Cuda(gpu.ordinal()))?.contiguous()?),
        Factor::Number(_) => None,
    };
    let factor = match (&here, factor) {
        (Some(x), _) => cuda::optim::Factor::Device(x.gpu_slice()?),
        (None, factor) => cuda::optim::Factor::Number(factor.number()?),
    };
    let grads = updates.iter().map(|u| u.grad.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    let mut slots = Vec::with_capacity(updates.len());
    for (update, grad) in updates.iter_mut().zip(&grads) {
        let states = update.states.iter_mut().map(|s| s.gpu_slice_mut()).collect::<Result<Vec<_>>>()?;
        let states = states.try_into().map_err(|_| Error::argument("optimizer step", "a rule's number of states is fixed"))?;
        slots.push(cuda::optim::Slot { param: update.param.gpu_slice_mut()?, grad: grad.gpu_slice()?, states });
    }
    Ok(cuda::optim::step(gpu, rule, factor, &slots)?)
}

fn step_as<T: OptimFloat + WithDType, const N: usize>(rule: &impl Rule<N>, updates: Vec<&mut Update<'_, N>>, factor: f64) -> Result<()> {
    let grads = updates.iter().map(|u| u.grad.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    let mut slots = Vec::with_capacity(updates.len());
    for (update, grad) in updates.into_iter().zip(&grads) {
        let states = update.states.iter_mut().map(|s| s.as_slice_mut::<T>()).collect::<Result<Vec<_>>>()?;
        let states = states.try_into().map_err(|_| Error::argument("optimizer step", "a rule's number of states is fixed"))?;
        slots.push(Slot { param: update.param.as_slice_mut::<T>()?, grad: grad.as_slice::<T>()?, states });
    }
    optim::step_scaled(rule, factor, slots);
    Ok(())
}

/// A step of an f16 or bf16 parameter through f32.
fn step_half<const N: usize>(rule: &impl Rule<N>, update: &mut Update<'_, N>, factor: f64) -> Result<()> {
    let mut wide = update.param.detach().to_dtype(DType::F32)?.contiguous()?;
    let grad = update.grad.detach().to_dtype(DType::F32)?;
    let states = update.states.each_mut().map(|s| &mut **s);
    step_as::<f32, N>(rule, vec![&mut Update { param: &mut wide, grad, states }], factor)?;
    for_float!(update.param.dtype(), "optimizer step", T => {
        let narrow = wide.to_dtype(T::DTYPE)?;
        update.param.as_slice_mut::<T>()?.copy_from_slice(narrow.as_slice::<T>()?);
        Ok(())
    })
}

/// √Σ x² over all elements of all tensors (floats of any dtypes), in one pass, summed in f64, in an order that depends on shapes and memory orders
/// only. 0 for none.
pub fn global_norm(tensors: &[Tensor]) -> Result<f64> {
    let _running = operation_with(
        "global_norm",
        || tensors.iter().collect(),
        || Cost::flops(2 * tensors.iter().map(|t| t.numel() as u64).sum::<u64>()),
    );
    let dense = tensors.iter().map(dense).collect::<Result<Vec<_>>>()?;
    let mut sum = 0.0;
    let mut on_gpu: Vec<(&'static Gpu, Vec<&Tensor>)> = Vec::new();
    let mut on_host = Vec::new();
    for tensor in &dense {
        match tensor.gpu()? {
            Some(gpu) => match on_gpu.iter_mut().find(|(other, _)| std::ptr::eq(*other, gpu)) {
                Some((_, list)) => list.push(tensor),
                None => on_gpu.push((gpu, vec![tensor])),
            },
            None => on_host.push(for_float!(tensor.dtype(), "global_norm", T => Ok(Squares::of(tensor.as_dense_slice::<T>()?)))?),
        }
    }
    sum += gradient::sum_squares(&on_host);
    for (gpu, list) in on_gpu {
        let mut bytes = [0; 8];
        gpu.download(&sum_squares_on(gpu, &list)?, 0, &mut bytes)?;
        sum += f64::from_le_bytes(bytes);
    }
    Ok(sum.sqrt())
}

/// The elements in any order without gaps.
fn dense(tensor: &Tensor) -> Result<Tensor> {
    expect_float("global_norm", tensor.dtype())?;
    if tensor.layout().is_dense() { Ok(tensor.detach()) } else { tensor.detach().contiguous() }
}

/// Σ x² of tensors without gaps, as one f64 on the GPU.
fn sum_squares_on(gpu: &'static Gpu, tensors: &[&Tensor]) -> Result<DeviceBuffer> {
    let slices = tensors.iter().map(|x| x.gpu_dense_slice()).collect::<Result<Vec<_>>>()?;
    Ok(cuda::gradient::sum_squares(gpu, &slices)?)
}

/// The [`global_norm`] as a scalar in f64, and the factor that brings it to `max_norm`: `max_norm / (norm + 1e-6)` if that is less than 1, 1 otherwise,
/// and NaN where the norm is not finite. If all tensors are on one GPU, so are norm and factor, and nothing waits for them.
pub fn clip_factor(tensors: &[Tensor], max_norm: f64) -> Result<(Tensor, Factor)> {
    if let Some(gpu) = tensors.first().map(Tensor::gpu).transpose()?.flatten()
        && tensors.iter().all(|x| x.device() == Device::Cuda(gpu.ordinal()))
    {
        let dense = tensors.iter().map(dense).collect::<Result<Vec<_>>>()?;
        let sum = sum_squares_on(gpu, &dense.iter().collect::<Vec<_>>())?;
        let scalar = || Tensor::stale_on_gpu(gpu, Shape::new(&[])?, DType::F64);
        let (mut norm, mut factor) = (scalar()?, scalar()?);
        cuda::gradient::clip_factor(gpu, &sum, max_norm, norm.gpu_slice_mut()?, factor.gpu_slice_mut()?)?;
        return Ok((norm, Factor::Tensor(factor)));
    }
    let norm = global_norm(tensors)?;
    let factor = if norm.is_finite() { (max_norm / (norm + 1e-6)).min(1.0) } else { f64::NAN };
    Ok((Tensor::from_slice(&[norm], ())?, Factor::Number(factor)))
}

fn expect_float(op: &str, dtype: DType) -> Result<()> {
    if dtype.is_float() { Ok(()) } else { Err(Error::unsupported_dtype(op, dtype, "a float dtype")) }
}

/// `x ← x · factor`.
pub fn scale_(tensor: &mut Tensor, factor: f64) -> Result<()> {
    in_place(tensor, "scale_", Scale(factor))
}

/// `x ← min(max(x, low), high)`; NaN stays NaN.
pub fn clamp_(tensor: &mut Tensor, low: f64, high: f64) -> Result<()> {
    in_place(tensor, "clamp_", Clamp(low, high))
}

trait InPlace {
    fn apply<T: Float>(&self, x: &mut [T]);
    fn apply_on_gpu(&self, gpu: &'static Gpu, x: &mut SliceMut<'_>) -> std::result::Result<(), CudaError>;
}

struct Scale(f64);

impl InPlace for Scale {
    fn apply<T: Float>(&self, x: &mut [T]) {
        gradient::scale(x, self.0);
    }
    fn apply_on_gpu(&self, gpu: &'static Gpu, x: &mut SliceMut<'_>) -> std::result::Result<(), CudaError> {
        cuda::gradient::scale(gpu, x, self.0)
    }
}

struct Clamp(f64, f64);

impl InPlace for Clamp {
    fn apply<T: Float>(&self, x: &mut [T]) {
        gradient::clamp(x, self.0, self.1);
    }
    fn apply_on_gpu(&self, gpu: &'static Gpu, x: &mut SliceMut<'_>) -> std::result::Result<(), CudaError> {
        cuda::gradient::clamp(gpu, x, self.0, self.1)
    }
}

fn in_place(tensor: &mut Tensor, op: &'static str, f: impl InPlace) -> Result<()> {
    let _running = operation(op, &[tensor], || Cost::per_element(1));
    writing(tensor.layout(), tensor.dtype());
    if let Some(gpu) = tensor.gpu()? {
        expect_float(op, tensor.dtype())?;
        if let Some(mut x) = tensor.donate_on_gpu()? {
            return Ok(f.apply_on_gpu(gpu, &mut x)?);
        }
        return Ok(f.apply_on_gpu(gpu, &mut tensor.gpu_slice_mut()?)?);
    }
    for_float!(tensor.dtype(), op, T => {
        match tensor.donate::<T>() {
            // Any dense memory order will do where the memory is ours.
            Some(x) => f.apply(x),
            None => f.apply(tensor.as_slice_mut::<T>()?),
        }
        Ok(())
    })
}
