//! From tensors to the kernels of the pointwise table: shapes, dtypes, output layouts, and the rules that most functions share.
//!
//! A result lies in memory as its densest operand does, so channels-last stays channels-last.

use crate::device::expect_host_allowed;
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record};
use crate::profile::{Cost, Operation, operation, operation_with, writing};
use crate::{Bool, DType, Device, Error, Layout, Result, Shape, Tensor, WithDType, broadcast_shapes};
use kiln_kernels::cpu::cast::Stored;
use kiln_kernels::cpu::pointwise::{self as kernels, Operand, Output};
use kiln_kernels::cuda::SliceMut;
use kiln_kernels::cuda::pointwise as gpu_kernels;
use kiln_kernels::element::Element;
use kiln_kernels::pointwise::relation::RelationRow;
use kiln_kernels::pointwise::{Params, Row};
use kiln_kernels::view::StridedView;

/// A row of two operands, in which the first is what the forward pass saved and the second the gradient.
pub(super) type Backward = &'static Row<2>;

/// An operand: a tensor, or a number that takes the dtype of the others.
#[derive(Clone, Copy)]
pub(super) enum Arg<'a> {
    Tensor(&'a Tensor),
    Scalar(f64),
}

impl Arg<'_> {
    fn tensor(&self) -> Option<&Tensor> {
        match self {
            Arg::Tensor(t) => Some(t),
            Arg::Scalar(_) => None,
        }
    }
}

/// The first tensor among the operands: an error if there is none, or unless all have its dtype and device.
fn leading<'a>(op: &str, args: &[Arg<'a>]) -> Result<&'a Tensor> {
    let mut first = None;
    for arg in args {
        if let Arg::Tensor(t) = arg {
            first.get_or_insert(*t).expect_same(op, t)?;
        }
    }
    first.ok_or_else(|| Error::argument(op, "needs a tensor"))
}

/// The shape that all tensors broadcast to.
pub(super) fn common_shape<'a>(op: &str, tensors: impl Iterator<Item = &'a Tensor>) -> Result<Shape> {
    let mut shape: Option<Shape> = None;
    for t in tensors {
        shape = Some(match shape {
            Some(shape) => broadcast_shapes(op, &shape, t.shape())?,
            None => *t.shape(),
        });
    }
    shape.ok_or_else(|| Error::argument(op, "needs a tensor"))
}

/// The layout of a result of `shape`: that of the first operand that is dense in this shape.
pub(super) fn result_layout<'a>(shape: &Shape, mut tensors: impl Iterator<Item = &'a Tensor>) -> Layout {
    let dense = tensors.find_map(|t| if t.shape() == shape { t.layout().as_dense() } else { None });
    dense.unwrap_or_else(|| Layout::contiguous(*shape))
}

/// The elements of `x` seen through `layout`, one of its own broadcast.
fn view<'a, T: WithDType>(op: &str, x: &'a Tensor, layout: &'a Layout) -> Result<StridedView<'a, T>> {
    expect_host_allowed(op, x.device())?;
    StridedView::new(x.storage().host()?.as_slice::<T>(), layout.offset(), layout.shape().dims(), layout.strides())
        .ok_or_else(|| Error::shape(op, format!("layout {layout:?} leaves the storage")))
}

/// The elements of a dense `x` in the order of memory.
fn dense<'a, T: WithDType>(op: &str, x: &'a Tensor) -> Result<&'a [T]> {
    expect_host_allowed(op, x.device())?;
    let (numel, offset) = (x.numel(), x.layout().offset());
    // A view without elements may begin anywhere.
    let range = if numel == 0 { 0..0 } else { offset..offset + numel };
    let data = x.storage().host()?.as_slice::<T>().get(range);
    data.ok_or_else(|| Error::shape(op, format!("layout {:?} leaves the storage", x.layout())))
}

/// The operand as the GPU's kernels take it.
pub(super) fn gpu_operand<'a>(arg: &Arg<'a>, layout: &'a Option<Layout>) -> Result<gpu_kernels::Operand<'a>> {
    Ok(match (arg, layout) {
        (Arg::Tensor(t), Some(layout)) => gpu_kernels::Operand::View(t.gpu_view_as(layout)?),
        (Arg::Tensor(t), None) => gpu_kernels::Operand::View(t.gpu_view()?),
        (Arg::Scalar(x), _) => gpu_kernels::Operand::Scalar(*x),
    })
}

/// A result of this layout as the GPU's kernels take it.
pub(super) fn gpu_output<'a>(layout: &'a Layout, data: SliceMut<'a>) -> gpu_kernels::Output<'a> {
    gpu_kernels::Output { data, shape: layout.shape().dims(), strides: layout.strides() }
}

pub(super) fn operand<'a, T: WithDType>(op: &str, arg: &Arg<'a>, layout: &'a Option<Layout>) -> Result<Operand<'a, T>> {
    Ok(match (arg, layout) {
        (Arg::Tensor(t), Some(layout)) => Operand::View(view(op, t, layout)?),
        (Arg::Tensor(t), None) => Operand::View(view(op, t, t.layout())?),
        (Arg::Scalar(x), _) => Operand::Scalar(*x),
    })
}

/// The layouts of an elementwise operation that are not those of its operands. Apart from [`Prepared`], which is moved: these are large,
/// and an operation on tensors that lie alike has none.
struct Room<const N: usize> {
    result: Option<Layout>,
    operands: Option<[Option<Layout>; N]>,
}

impl<const N: usize> Room<N> {
    const EMPTY: Self = Self { result: None, operands: None };
}

/// Everything an elementwise kernel needs to know before it is told the type of the elements.
struct Prepared<'a, const N: usize> {
    op: &'static str,
    args: [Arg<'a>; N],
    dtype: DType,
    layout: &'a Layout,
    /// How the operands lie in the result's shape (`None` for a number), unless all of them lie as the result does.
    layouts: Option<&'a [Option<Layout>; N]>,
}

impl<'a, const N: usize> Prepared<'a, N> {
    #[inline]
    fn new(op: &'static str, args: [Arg<'a>; N], room: &'a mut Room<N>) -> Result<Self> {
        let tensors = || args.iter().filter_map(Arg::tensor);
        let first = leading(op, &args)?;
        let (dtype, lies) = (first.dtype(), first.layout());
        if tensors().all(|t| t.layout().lies_like(lies)) {
            if lies.offset() == 0 && lies.is_contiguous() {
                return Ok(Self { op, args, dtype, layout: lies, layouts: None });
            }
            if let Some(dense) = lies.as_dense() {
                return Ok(Self { op, args, dtype, layout: room.result.insert(dense), layouts: None });
            }
        }
        let shape = common_shape(op, tensors())?;
        let result = result_layout(&shape, tensors());
        Self::broadcast(op, args, dtype, result, room)
    }

    /// The operands broadcast to the shape of `result`.
    fn broadcast(op: &'static str, args: [Arg<'a>; N], dtype: DType, result: Layout, room: &'a mut Room<N>) -> Result<Self> {
        let mut layouts = [None; N];
        for (layout, arg) in layouts.iter_mut().zip(&args) {
            *layout = arg.tensor().map(|t| t.layout().broadcast_to(op, result.shape())).transpose()?;
        }
        Ok(Self { op, args, dtype, layout: room.result.insert(result), layouts: Some(room.operands.insert(layouts)) })
    }

    fn device(&self) -> Device {
        self.args.iter().find_map(Arg::tensor).map_or(Device::Cpu, Tensor::device)
    }

    /// How operand `k` lies in the result's shape, if not as the result does.
    fn layout_of(&self, k: usize) -> &Option<Layout> {
        self.layouts.map_or(&None, |layouts| &layouts[k])
    }

    #[inline]
    fn operands<T: WithDType>(&self) -> Result<[Operand<'_, T>; N]> {
        let mut operands = [Operand::Unused; N];
        for (k, slot) in operands.iter_mut().enumerate() {
            *slot = match (&self.args[k], &self.layouts) {
                (Arg::Tensor(t), None) => Operand::Dense(dense(self.op, t)?),
                (arg, _) => operand(self.op, arg, self.layout_of(k))?,
            };
        }
        Ok(operands)
    }

    fn gpu_operands(&self) -> Result<[gpu_kernels::Operand<'_>; N]> {
        let mut operands = [gpu_kernels::Operand::Scalar(0.0); N];
        for (k, slot) in operands.iter_mut().enumerate() {
            *slot = gpu_operand(&self.args[k], self.layout_of(k))?;
        }
        Ok(operands)
    }

    fn output<'o, T>(&'o self, data: &'o mut [T]) -> Output<'o, T> {
        Output { data, shape: self.layout.shape().dims(), strides: self.layout.strides() }
    }
}

/// An error if the row is not defined for elements of `T`.
fn expect_defined<T: Stored + WithDType, const N: usize>(op: &'static str, row: &Row<N>) -> Result<()> {
    row.tile::<T::Compute>().map(|_| ()).ok_or_else(|| Error::unsupported_dtype(op, T::DTYPE, "a float dtype"))
}

/// The operation `name` of these operands begins.
fn running<const N: usize>(name: &'static str, args: &[Arg; N]) -> Operation {
    operation_with(name, || args.iter().filter_map(Arg::tensor).collect(), || Cost::per_element(1))
}

/// The row's function of operands that broadcast together, untracked.
pub(super) fn apply<const N: usize>(row: &Row<N>, params: Params, args: [Arg; N]) -> Result<Tensor> {
    let _running = running(row.name, &args);
    let mut room = Room::EMPTY;
    let p = Prepared::new(row.name, args, &mut room)?;
    for_number!(p.dtype, p.op, T => {
        expect_defined::<T, N>(p.op, row)?;
        if let Some(gpu) = p.device().gpu()? {
            return Tensor::build_on_gpu(gpu, *p.layout, p.dtype, |out| {
                Ok(gpu_kernels::apply(gpu, row, params, p.gpu_operands()?, gpu_output(p.layout, out))?)
            });
        }
        Tensor::build_like::<T>(p.device(), p.layout, |out| {
            kernels::apply(row, params, p.operands::<T>()?, p.output(out));
            Ok(())
        })
    })
}

/// The row's function of one tensor.
pub(super) fn map(x: &Tensor, row: &Row<1>) -> Result<Tensor> {
    apply(row, [0.0; 2], [Arg::Tensor(x)])
}

/// The row's function of two tensors.
pub(super) fn zip(a: &Tensor, b: &Tensor, row: &Row<2>) -> Result<Tensor> {
    apply(row, [0.0; 2], [Arg::Tensor(a), Arg::Tensor(b)])
}

/// `row(a, b)`, or `row(b, a)` if `swapped`, in the memory of `a`, if that is possible: nobody else holds it, the result has its shape,
/// and no derivative is wanted. `false` if not, with `a` unchanged.
pub(super) fn apply_in_place(row: &Row<2>, a: &mut Tensor, b: Arg, swapped: bool) -> Result<bool> {
    let tracked = a.is_tracked() || b.tensor().is_some_and(Tensor::is_tracked);
    let fits = b.tensor().is_none_or(|b| b.dtype() == a.dtype() && b.layout().broadcast_to(row.name, a.shape()).is_ok());
    if tracked || !fits || !a.dtype().is_float() {
        return Ok(false);
    }
    let running = running(row.name, &[Arg::Tensor(a), b]);
    let (layout, dtype) = (a.layout().dense_like(), a.dtype());
    let other = b.tensor().map(|b| b.layout().broadcast_to(row.name, layout.shape())).transpose()?;
    if let Some(gpu) = a.gpu()? {
        let b = gpu_operand(&b, &other)?;
        let Some(data) = a.donate_on_gpu()? else {
            running.cancel();
            return Ok(false);
        };
        writing(&layout, dtype);
        let operands = if swapped { [b, gpu_kernels::Operand::Output] } else { [gpu_kernels::Operand::Output, b] };
        gpu_kernels::apply(gpu, row, [0.0; 2], operands, gpu_output(&layout, data))?;
        return Ok(true);
    }
    for_float!(a.dtype(), row.name, T => {
        let b = operand::<T>(row.name, &b, &other)?;
        let Some(data) = a.donate::<T>() else {
            running.cancel();
            return Ok(false);
        };
        writing(&layout, dtype);
        let operands = if swapped { [b, Operand::Output] } else { [Operand::Output, b] };
        kernels::apply(row, [0.0; 2], operands, Output { data, shape: layout.shape().dims(), strides: layout.strides() });
        Ok(true)
    })
}

/// The truth of a relation between two operands.
pub(super) fn compare(row: &RelationRow, a: Arg, b: Arg) -> Result<Tensor> {
    let _running = running(row.name, &[a, b]);
    let mut room = Room::EMPTY;
    let p = Prepared::new(row.name, [a, b], &mut room)?;
    if let Some(gpu) = p.device().gpu()? {
        return Tensor::build_on_gpu(gpu, *p.layout, DType::Bool, |out| {
            Ok(gpu_kernels::relate(gpu, row, p.dtype.gpu_type(), p.gpu_operands()?, gpu_output(p.layout, out))?)
        });
    }
    for_any!(p.dtype, T => Tensor::build_like::<Bool>(p.device(), p.layout, |out| {
        kernels::relate(row, p.operands::<T>()?, p.output(out));
        Ok(())
    }))
}

/// The number as an element of the dtype.
fn rounded(dtype: DType, value: f64) -> f64 {
    for_any!(dtype, T => <T as Element>::from_f64(value).to_f64())
}

/// The truth of a relation between the elements and a number: of floats the nearest in their dtype; of integers it need not be one.
pub(super) fn compare_scalar(row: &RelationRow, x: &Tensor, value: f64) -> Result<Tensor> {
    let exact = match x.dtype() {
        DType::Bool => value == 0.0 || value == 1.0,
        dtype => dtype.is_float() || holds(dtype, value),
    };
    if exact {
        let value = if x.dtype().is_float() { rounded(x.dtype(), value) } else { value };
        return compare(row, Arg::Tensor(x), Arg::Scalar(value));
    }
    compare(row, Arg::Tensor(&x.detach().to_dtype(DType::F64)?), Arg::Scalar(value))
}

/// Whether the integer `dtype` has this number.
pub(super) fn holds(dtype: DType, value: f64) -> bool {
    let (low, high) = match dtype {
        DType::U8 => (0.0, 255.0),
        DType::I32 => (i32::MIN as f64, i32::MAX as f64),
        // The largest f64 below 2⁶³.
        _ => (i64::MIN as f64, 9_223_372_036_854_774_784.0),
    };
    value.fract() == 0.0 && (low..=high).contains(&value)
}

/// `a` where `mask`, else `b`, which broadcast together.
pub(super) fn select(op: &'static str, mask: &Tensor, a: Arg, b: Arg) -> Result<Tensor> {
    let _running = operation_with(op, || [Some(mask), a.tensor(), b.tensor()].into_iter().flatten().collect(), || Cost::NONE);
    let args = [a, b];
    let tensors = || args.iter().filter_map(Arg::tensor);
    let dtype = leading(op, &args)?.dtype();
    let shape = broadcast_shapes(op, &common_shape(op, tensors())?, mask.shape())?;
    let mut room = Room::EMPTY;
    let p = Prepared::broadcast(op, args, dtype, result_layout(&shape, tensors()), &mut room)?;
    let mask_layout = mask.layout().broadcast_to(op, &shape)?;
    if mask.device() != p.device() {
        return Err(Error::device_mismatch(op, mask.device(), p.device()));
    }
    if let Some(gpu) = p.device().gpu()? {
        return Tensor::build_on_gpu(gpu, *p.layout, p.dtype, |out| {
            let [a, b] = p.gpu_operands()?;
            Ok(gpu_kernels::select(gpu, mask.gpu_view_as(&mask_layout)?, a, b, gpu_output(p.layout, out))?)
        });
    }
    let mask = view::<Bool>(op, mask, &mask_layout)?;
    for_any!(p.dtype, T => Tensor::build_like::<T>(p.device(), p.layout, |out| {
        let [a, b] = p.operands::<T>()?;
        kernels::select(mask, a, b, p.output(out));
        Ok(())
    }))
}

/// The elements in another dtype.
pub(super) fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let _running = operation("to_dtype", &[x], || Cost::NONE);
    let layout = x.layout().dense_like();
    if let Some(gpu) = x.gpu()? {
        return Tensor::build_on_gpu(gpu, layout, dtype, |out| Ok(gpu_kernels::cast(gpu, x.gpu_view()?, gpu_output(&layout, out))?));
    }
    for_any!(x.dtype(), A => for_any!(dtype, B => Tensor::build_with_layout::<B>(x.device(), layout, |out| {
        kernels::cast(x.view_of::<A>()?, Output { data: out, shape: layout.shape().dims(), strides: layout.strides() });
        Ok(())
    })))
}

/// A derivative in one pass, for when it is not to be differentiated itself.
#[derive(Clone, Copy)]
pub(super) struct Fused {
    pub(super) row: Backward,
    pub(super) params: Params,
}

impl Fused {
    /// The derivative `row(saved, grad)` without parameters.
    pub(super) fn new(row: Backward) -> Option<Self> {
        Self::with(row, [0.0; 2])
    }

    /// The derivative `row(saved, grad)` with parameters.
    pub(super) fn with(row: Backward, params: Params) -> Option<Self> {
        Some(Self { row, params })
    }
}

/// A rule that is one function of a saved tensor and the gradient: in plain operations, and as a fused row where there is one.
struct FromSaved<R> {
    name: &'static str,
    saved: Tensor,
    saved_is_output: bool,
    fused: Option<Fused>,
    rule: R,
}

impl<R: Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static> Op for FromSaved<R> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let saved = || if self.saved_is_output { ctx.output(&self.saved) } else { self.saved.clone() };
        let gradient = match self.fused {
            Some(Fused { row, params }) if !is_grad_enabled() => apply(row, params, [Arg::Tensor(&self.saved), Arg::Tensor(grad)])?,
            Some(_) => in_accumulator(&self.rule, &saved(), grad)?,
            None => (self.rule)(&saved(), grad)?,
        };
        Ok(vec![Some(gradient)])
    }
}

/// `rule(saved, grad)`, of half types in f32 as the fused rows do: what lies between may be out of their range.
fn in_accumulator(rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor>, saved: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (dtype, wide) = (saved.dtype(), saved.dtype().accumulator());
    if dtype == wide || !dtype.is_float() {
        return rule(saved, grad);
    }
    rule(&saved.to_dtype(wide)?, &grad.to_dtype(wide)?)?.to_dtype(dtype)
}

/// A rule that is one function of the gradient alone; `None` is a derivative of zero.
struct FromGrad<R> {
    name: &'static str,
    rule: Option<R>,
}

impl<R: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static> Op for FromGrad<R> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![self.rule.as_ref().map(|rule| rule(grad)).transpose()?])
    }
}

/// Records `out = f(x)` with the gradient `rule(x, grad)`, which `fused` computes in one pass.
pub(super) fn record_input(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    fused: Option<Fused>,
    rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    record(name, out, &[x], |_| FromSaved { name, saved: x.clone(), saved_is_output: false, fused, rule })
}

/// Records `out = f(x)` with the gradient `rule(out, grad)`, which `fused` computes in one pass.
pub(super) fn record_output(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    fused: Option<Fused>,
    rule: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let saved = out.clone();
    record(name, out, &[x], |_| FromSaved { name, saved, saved_is_output: true, fused, rule })
}

/// Records `out = f(x)` with the gradient `rule(grad)`.
pub(super) fn record_linear(
    name: &'static str,
    out: Tensor,
    x: &Tensor,
    rule: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    record(name, out, &[x], |_| FromGrad { name, rule: Some(rule) })
}

/// Records `out = f(x)` whose derivative is zero wherever it exists.
pub(super) fn record_flat(name: &'static str, out: Tensor, x: &Tensor) -> Result<Tensor> {
    record(name, out, &[x], |_| FromGrad { name, rule: None::<fn(&Tensor) -> Result<Tensor>> })
}
