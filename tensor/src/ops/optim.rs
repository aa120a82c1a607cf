//! What training does to parameters, gradients and states in place, a whole list of tensors in one pass: optimiser updates, moving
//! averages, norms, scaling and clamping. None of it is recorded.
//!
//! A tensor whose memory is shared (with a live graph, say) moves to a copy first: no other holder sees a change.

use crate::profile::{Cost, operation, operation_with, writing};
use crate::{DType, Device, Error, ErrorKind, Result, Tensor, WithDType};
use kiln_kernels::cpu::gradient;
use kiln_kernels::cpu::optim::{self, OptimFloat, Slot, Value};
use kiln_kernels::cuda::{self, CudaError, Gpu, SliceMut};
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

/// A rule with `N` states that this crate has compiled for all dtypes. Another [`Rule`] goes through [`step_with`].
pub trait FusedRule<const N: usize>: Rule<N> {
    /// [`step`].
    fn step(&self, updates: Vec<Update<'_, N>>) -> Result<()>;
}

macro_rules! fused_rules {
    ($($rule:ty, $states:literal;)*) => { $(
        impl FusedRule<$states> for $rule {
            fn step(&self, updates: Vec<Update<'_, $states>>) -> Result<()> {
                step_with(self, updates)
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
    rule.step(updates)
}

/// [`step`] for any rule. It is compiled in the calling crate, with that crate's optimisation.
///
/// # Errors
/// As for [`step`].
pub fn step_with<const N: usize>(rule: &impl Rule<N>, mut updates: Vec<Update<'_, N>>) -> Result<()> {
    updates.iter().try_for_each(check)?;
    let _running = operation("optimizer_step", &[], || Cost::NONE.bytes(updates.iter().map(Update::bytes).sum()));
    while let Some(gpu) = updates.iter().find_map(|u| u.param.gpu().transpose()).transpose()? {
        let device = Device::Cuda(gpu.ordinal());
        let (on_gpu, rest) = updates.into_iter().partition(|u| u.param.device() == device);
        step_on_gpu(gpu, rule, on_gpu)?;
        updates = rest;
    }
    let (double, single): (Vec<_>, Vec<_>) = updates.iter_mut().partition(|u| u.param.dtype() == DType::F64);
    step_as::<f64, N>(rule, double)?;
    let (single, half): (Vec<_>, Vec<_>) = single.into_iter().partition(|u| u.param.dtype() == DType::F32);
    step_as::<f32, N>(rule, single)?;
    half.into_iter().try_for_each(|u| step_half(rule, u))
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

fn step_on_gpu<const N: usize>(gpu: &'static Gpu, rule: &impl Rule<N>, mut updates: Vec<Update<'_, N>>) -> Result<()> {
    let grads = updates.iter().map(|u| u.grad.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    let mut slots = Vec::with_capacity(updates.len());
    for (update, grad) in updates.iter_mut().zip(&grads) {
        let states = update.states.iter_mut().map(|s| s.gpu_slice_mut()).collect::<Result<Vec<_>>>()?;
        let states = states.try_into().map_err(|_| Error::argument("optimizer step", "a rule's number of states is fixed"))?;
        slots.push(cuda::optim::Slot { param: update.param.gpu_slice_mut()?, grad: grad.gpu_slice()?, states });
    }
    Ok(cuda::optim::step(gpu, rule, &slots)?)
}

fn step_as<T: OptimFloat + WithDType, const N: usize>(rule: &impl Rule<N>, updates: Vec<&mut Update<'_, N>>) -> Result<()> {
    let grads = updates.iter().map(|u| u.grad.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    let mut slots = Vec::with_capacity(updates.len());
    for (update, grad) in updates.into_iter().zip(&grads) {
        let states = update.states.iter_mut().map(|s| s.as_slice_mut::<T>()).collect::<Result<Vec<_>>>()?;
        let states = states.try_into().map_err(|_| Error::argument("optimizer step", "a rule's number of states is fixed"))?;
        slots.push(Slot { param: update.param.as_slice_mut::<T>()?, grad: grad.as_slice::<T>()?, states });
    }
    optim::step(rule, slots);
    Ok(())
}

/// A step of an f16 or bf16 parameter through f32.
fn step_half<const N: usize>(rule: &impl Rule<N>, update: &mut Update<'_, N>) -> Result<()> {
    let mut wide = update.param.detach().to_dtype(DType::F32)?.contiguous()?;
    let grad = update.grad.detach().to_dtype(DType::F32)?;
    let states = update.states.each_mut().map(|s| &mut **s);
    step_as::<f32, N>(rule, vec![&mut Update { param: &mut wide, grad, states }])?;
    for_float!(update.param.dtype(), "optimizer step", T => {
        let narrow = wide.to_dtype(T::DTYPE)?;
        update.param.as_slice_mut::<T>()?.copy_from_slice(narrow.as_slice::<T>()?);
        Ok(())
    })
}

/// √Σ x² over all elements of all tensors (floats of any dtypes), summed in f64, in an order that depends on shapes and memory orders only.
/// 0 for none.
pub fn global_norm(tensors: &[Tensor]) -> Result<f64> {
    let _running = operation_with(
        "global_norm",
        || tensors.iter().collect(),
        || Cost::flops(2 * tensors.iter().map(|t| t.numel() as u64).sum::<u64>()),
    );
    let mut sum = 0.0;
    let dense = |tensor: &Tensor| if tensor.layout().is_dense() { Ok(tensor.detach()) } else { tensor.detach().contiguous() };
    let mut on_gpu: Vec<(&'static Gpu, Vec<Tensor>)> = Vec::new();
    for tensor in tensors {
        let dense = dense(tensor)?;
        if let Some(gpu) = dense.gpu()? {
            expect_float("global_norm", dense.dtype())?;
            match on_gpu.iter_mut().find(|(other, _)| std::ptr::eq(*other, gpu)) {
                Some((_, list)) => list.push(dense),
                None => on_gpu.push((gpu, vec![dense])),
            }
            continue;
        }
        sum += for_float!(dense.dtype(), "global_norm", T => Ok(gradient::sum_squares(dense.as_dense_slice::<T>()?)))?;
    }
    for (gpu, list) in on_gpu {
        let slices = list.iter().map(Tensor::gpu_dense_slice).collect::<Result<Vec<_>>>()?;
        let mut bytes = [0; 8];
        gpu.download(&cuda::gradient::sum_squares(gpu, &slices)?, 0, &mut bytes)?;
        sum += f64::from_le_bytes(bytes);
    }
    Ok(sum.sqrt())
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
