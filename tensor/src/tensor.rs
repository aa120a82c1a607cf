//! The tensor: bytes, a layout, a dtype, and where it comes from in the recorded graph.

use crate::device::expect_host_allowed;
use crate::graph::{Hook, Leaf, Source, is_grad_enabled};
use crate::profile::building;
use crate::storage::Storage;
use crate::{DType, Device, Error, ErrorKind, Layout, Result, Scalar, Shape, WithDType};
use kiln_kernels::cpu::alloc::Buffer;
use kiln_kernels::cuda::{Gpu, Slice, SliceMut, View};
use kiln_kernels::view::StridedView;
use std::sync::Arc;

/// An n-dimensional array. Cheap to clone (clones share the data) and immutable to its holder; views share the data too.
///
/// A tensor is *tracked* if it was marked with [`requires_grad_`](Tensor::requires_grad_) or computed from one that was:
/// gradients flow to it.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    storage: Storage,
    layout: Layout,
    dtype: DType,
    source: Option<Source>,
}

impl Tensor {
    pub(crate) fn from_storage(storage: Storage, layout: Layout, dtype: DType) -> Self {
        Self(Arc::new(Inner { storage, layout, dtype, source: None }))
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.0.storage
    }

    /// This (i64) tensor, all of whose elements are known to lie between two values: as an index it needs no check.
    pub(crate) fn within(self, least: i64, greatest: i64) -> Self {
        self.0.storage.set_bounds((least, greatest));
        self
    }

    /// A tensor over the same data with another layout, untracked: the caller records the operation.
    pub(crate) fn with_layout(&self, layout: Layout) -> Self {
        Self::from_storage(self.0.storage.clone(), layout, self.0.dtype)
    }

    pub(crate) fn with_source(&self, source: Option<Source>) -> Self {
        Self(Arc::new(Inner { storage: self.0.storage.clone(), layout: self.0.layout, dtype: self.0.dtype, source }))
    }

    /// This tensor, made by `source`: the same one, if nobody else holds it.
    pub(crate) fn tracked_by(mut self, source: Source) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.source = Some(source);
            return self;
        }
        self.with_source(Some(source))
    }

    /// A new row-major tensor of `shape` on `device`, whose elements `fill` writes on the host (all of them; they are stale before).
    pub fn build<T: WithDType>(device: Device, shape: &Shape, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<Self> {
        Self::build_with_layout(device, Layout::contiguous(*shape), fill)
    }

    /// A new tensor with a dense `layout` (offset 0, no gaps), whose elements `fill` writes on the host in the order of memory.
    pub fn build_with_layout<T: WithDType>(device: Device, layout: Layout, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<Self> {
        Self::build_like(device, &layout, fill)
    }

    /// [`build_with_layout`](Self::build_with_layout) of a layout that may be another tensor's.
    pub(crate) fn build_like<T: WithDType>(device: Device, layout: &Layout, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<Self> {
        debug_assert!(layout.is_dense() && layout.offset() == 0);
        let _running = building(layout, T::DTYPE);
        let mut buffer = Self::buffer_for(layout, T::DTYPE)?;
        fill(buffer.as_slice_mut())?;
        Ok(Self::from_storage(Storage::from_buffer(buffer, device)?, *layout, T::DTYPE))
    }

    /// A new tensor of a GPU with a dense `layout` (offset 0, no gaps), whose elements `fill` queues the writing of, in the order of memory.
    pub fn build_on_gpu(gpu: &'static Gpu, layout: Layout, dtype: DType, fill: impl FnOnce(SliceMut<'_>) -> Result<()>) -> Result<Self> {
        debug_assert!(layout.is_dense() && layout.offset() == 0);
        let _running = building(&layout, dtype);
        let mut buffer = gpu.alloc(Self::bytes_of(&layout, dtype)?)?;
        let out = SliceMut::new(&mut buffer, dtype.gpu_type(), 0, layout.numel());
        fill(out.ok_or_else(|| Error::shape("allocate", format!("{} elements of {dtype} overflow", layout.shape())))?)?;
        Ok(Self::from_storage(Storage::from_device(buffer), layout, dtype))
    }

    /// A new row-major tensor of a GPU whose elements are stale: for [`gpu_slice_mut`](Self::gpu_slice_mut) to be filled.
    pub(crate) fn stale_on_gpu(gpu: &'static Gpu, shape: Shape, dtype: DType) -> Result<Self> {
        Self::build_on_gpu(gpu, Layout::contiguous(shape), dtype, |_| Ok(()))
    }

    fn bytes_of(layout: &Layout, dtype: DType) -> Result<usize> {
        let bytes = layout.numel().checked_mul(dtype.size());
        bytes.ok_or_else(|| Error::shape("allocate", format!("{} elements of {dtype} overflow", layout.shape())))
    }

    fn buffer_for(layout: &Layout, dtype: DType) -> Result<Buffer> {
        Storage::buffer(Self::bytes_of(layout, dtype)?)
    }

    /// Extents of the dimensions.
    pub fn shape(&self) -> &Shape {
        self.0.layout.shape()
    }

    /// The extents as a slice.
    pub fn dims(&self) -> &[usize] {
        self.0.layout.shape().dims()
    }

    /// The extent of one dimension; negative ones count from the end.
    pub fn dim(&self, dim: isize) -> Result<usize> {
        Ok(self.shape()[self.shape().dim("dim", dim)?])
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape().rank()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape().numel()
    }

    /// The extents of a tensor of exactly `N` dimensions, e.g. `let [b, c, h, w] = x.dims_n("conv2d")?`.
    pub fn dims_n<const N: usize>(&self, op: &str) -> Result<[usize; N]> {
        self.dims().try_into().map_err(|_| Error::shape(op, format!("expected {N} dimensions, got shape {}", self.shape())))
    }

    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The device that holds the data.
    pub fn device(&self) -> Device {
        self.0.storage.device()
    }

    /// How the elements lie in memory.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }

    /// Whether the elements lie in row-major order without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.0.layout.is_contiguous()
    }

    /// Whether both tensors are views of the same memory.
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        self.0.storage.ptr_eq(&other.0.storage)
    }

    /// Address of the memory block, to see whether two results share one; never to be read through.
    pub fn storage_address(&self) -> usize {
        self.0.storage.address()
    }

    fn expect_dtype<T: WithDType>(&self, op: &str) -> Result<()> {
        if T::DTYPE == self.dtype() {
            return Ok(());
        }
        let message = format!("the tensor is {}, {} was asked for; convert with .to_dtype(..)", self.dtype(), T::DTYPE);
        Err(Error::new(ErrorKind::DType, op, message))
    }

    /// The elements as a strided view of the host's memory, for kernels of the processor. A tensor of a GPU is copied to the host first, unless
    /// [`forbid_host`](crate::forbid_host) rules it out.
    pub fn view_of<T: WithDType>(&self) -> Result<StridedView<'_, T>> {
        expect_host_allowed("view_of", self.device())?;
        self.expect_dtype::<T>("view_of")?;
        let (layout, data) = (&self.0.layout, self.0.storage.host()?.as_slice::<T>());
        StridedView::new(data, layout.offset(), layout.shape().dims(), layout.strides())
            .ok_or_else(|| Error::shape("view_of", format!("layout {layout:?} leaves its storage of {} elements", data.len())))
    }

    /// The GPU that holds the data, if one does.
    pub fn gpu(&self) -> Result<Option<&'static Gpu>> {
        self.device().gpu()
    }

    /// The elements as a strided view of a GPU's memory, for its kernels.
    pub fn gpu_view(&self) -> Result<View<'_>> {
        self.gpu_view_as(&self.0.layout)
    }

    /// The elements seen through `layout`, such as a broadcast of the tensor's own.
    pub(crate) fn gpu_view_as<'a>(&'a self, layout: &'a Layout) -> Result<View<'a>> {
        let buffer = self.0.storage.on_gpu()?;
        View::new(buffer, self.dtype().gpu_type(), layout.offset(), layout.shape().dims(), layout.strides())
            .ok_or_else(|| Error::shape("gpu_view", format!("layout {layout:?} leaves its storage of {} bytes", buffer.len())))
    }

    /// All that a GPU's buffer holds from the tensor's first element on.
    pub(crate) fn gpu_data(&self) -> Result<Slice<'_>> {
        let (buffer, ty, offset) = (self.0.storage.on_gpu()?, self.dtype().gpu_type(), self.0.layout.offset());
        let len = (buffer.len() / ty.size()).saturating_sub(offset);
        Slice::new(buffer, ty, offset, len).ok_or_else(|| Error::shape("gpu_data", format!("{:?} leaves its storage", self.0.layout)))
    }

    /// The elements of a row-major tensor in a GPU's memory: an error if it is not contiguous.
    pub fn gpu_slice(&self) -> Result<Slice<'_>> {
        if !self.is_contiguous() {
            return Err(Error::shape("gpu_slice", format!("the tensor of shape {} is not contiguous; call .contiguous()", self.shape())));
        }
        self.gpu_dense_slice()
    }

    /// The elements of a dense tensor in a GPU's memory, in the order of memory: an error if it has gaps or repeats.
    pub fn gpu_dense_slice(&self) -> Result<Slice<'_>> {
        let buffer = self.0.storage.on_gpu()?;
        let slice = Slice::new(buffer, self.dtype().gpu_type(), self.0.layout.offset(), self.numel()).filter(|_| self.0.layout.is_dense());
        slice.ok_or_else(|| Error::shape("gpu_dense_slice", format!("the tensor of shape {} is not dense", self.shape())))
    }

    /// The elements of a row-major tensor in a GPU's memory, to write, as [`as_slice_mut`](Self::as_slice_mut) gives them on the host.
    pub fn gpu_slice_mut(&mut self) -> Result<SliceMut<'_>> {
        self.make_unique("gpu_slice_mut")?;
        let (numel, dtype) = (self.numel(), self.dtype());
        let inner = Arc::get_mut(&mut self.0).ok_or_else(|| Error::graph("gpu_slice_mut", "the tensor is shared"))?;
        let offset = inner.layout.offset();
        let buffer = inner.storage.on_gpu_mut()?.ok_or_else(|| Error::graph("gpu_slice_mut", "the storage is shared"))?;
        SliceMut::new(buffer, dtype.gpu_type(), offset, numel).ok_or_else(|| Error::shape("gpu_slice_mut", "the layout leaves its storage"))
    }

    /// As [`donate`](Self::donate), of a tensor of a GPU.
    pub fn donate_on_gpu(&mut self) -> Result<Option<SliceMut<'_>>> {
        if self.0.source.is_some() || !self.0.layout.is_dense() || self.device() == Device::Cpu {
            return Ok(None);
        }
        let (numel, dtype) = (self.numel(), self.dtype());
        let Some(inner) = Arc::get_mut(&mut self.0) else { return Ok(None) };
        let offset = inner.layout.offset();
        Ok(inner.storage.on_gpu_mut()?.and_then(|buffer| SliceMut::new(buffer, dtype.gpu_type(), offset, numel)))
    }

    /// Moves this tensor to a copy of its own, row-major, unless it has one already. A leaf stays the same leaf.
    fn make_unique(&mut self, op: &str) -> Result<()> {
        if is_grad_enabled() && matches!(self.0.source, Some(Source::Node(_))) {
            return Err(Error::graph(op, "nothing is recorded here, and a gradient would be wrong; use no_grad or .detach()"));
        }
        let unique = Arc::get_mut(&mut self.0).is_some_and(|i| i.storage.is_unique() && i.layout.is_contiguous());
        if !unique {
            let copy = self.detach().copy()?;
            *self = copy.with_source(self.0.source.clone());
            // `copy` shares the new storage until it is dropped here.
        }
        Ok(())
    }

    /// The elements of a row-major tensor as a slice: an error if it is not contiguous.
    pub fn as_slice<T: WithDType>(&self) -> Result<&[T]> {
        let view = self.view_of::<T>()?;
        view.as_contiguous()
            .ok_or_else(|| Error::shape("as_slice", format!("the tensor of shape {} is not contiguous; call .contiguous()", self.shape())))
    }

    /// The elements of a dense tensor in the order of memory (see [`Layout::is_dense`]): an error if it has gaps or repeats.
    pub fn as_dense_slice<T: WithDType>(&self) -> Result<&[T]> {
        let view = self.view_of::<T>()?;
        if !self.0.layout.is_dense() {
            return Err(Error::shape("as_dense_slice", format!("the tensor of shape {} is not dense", self.shape())));
        }
        Ok(&view.data()[view.offset().min(view.data().len())..][..self.numel()])
    }

    /// The elements of a row-major tensor, to write. If the data is shared with another tensor or held by a live graph, this
    /// tensor moves to a copy first, so no other holder ever sees a change. A leaf stays the same leaf. What an operation recorded is
    /// written under [`no_grad`](crate::graph) only: the gradient would be that of the old elements.
    pub fn as_slice_mut<T: WithDType>(&mut self) -> Result<&mut [T]> {
        self.expect_dtype::<T>("as_slice_mut")?;
        expect_host_allowed("as_slice_mut", self.device())?;
        self.make_unique("as_slice_mut")?;
        let numel = self.numel();
        let inner = Arc::get_mut(&mut self.0).ok_or_else(|| Error::graph("as_slice_mut", "the tensor is shared"))?;
        let offset = inner.layout.offset();
        let buffer = inner.storage.host_mut()?.ok_or_else(|| Error::graph("as_slice_mut", "the storage is shared"))?;
        Ok(&mut buffer.as_slice_mut::<T>()[offset..offset + numel])
    }

    /// The memory of a dense, untracked tensor that nobody else holds, in the order of memory, to reuse for a result of the
    /// same size: `None` if the tensor is tracked, shared, or on a GPU.
    pub fn donate<T: WithDType>(&mut self) -> Option<&mut [T]> {
        if self.device() != Device::Cpu || T::DTYPE != self.0.dtype || self.0.source.is_some() || !self.0.layout.is_dense() {
            return None;
        }
        let numel = self.numel();
        let inner = Arc::get_mut(&mut self.0)?;
        let offset = inner.layout.offset();
        let data = inner.storage.host_mut().ok()??.as_slice_mut::<T>();
        data.get_mut(offset..offset + numel)
    }

    /// The elements in row-major order. `T` must match the dtype (`bool` for [`DType::Bool`]).
    pub fn to_vec<T: Scalar>(&self) -> Result<Vec<T>> {
        self.expect_dtype::<T::Stored>("to_vec")?;
        Ok(self.stored_values::<T::Stored>()?.into_iter().map(T::from_stored).collect())
    }

    /// The elements in row-major order, as they are stored.
    pub(crate) fn stored_values<T: WithDType>(&self) -> Result<Vec<T>> {
        self.expect_dtype::<T>("to_vec")?;
        let dense = self.detach().contiguous()?;
        let mut values = vec![T::default(); dense.numel()];
        dense.0.storage.read(dense.0.layout.offset(), &mut values)?;
        Ok(values)
    }

    /// The only element.
    pub fn item<T: Scalar>(&self) -> Result<T> {
        self.expect_dtype::<T::Stored>("item")?;
        if self.numel() != 1 {
            return Err(Error::shape("item", format!("the tensor of shape {} has {} elements, not one", self.shape(), self.numel())));
        }
        let mut value = [T::Stored::default()];
        self.0.storage.read(self.0.layout.offset(), &mut value)?;
        Ok(T::from_stored(value[0]))
    }

    /// The only element, whatever the dtype, as f64.
    pub fn item_f64(&self) -> Result<f64> {
        use kiln_kernels::element::Element;
        for_any!(self.dtype(), T => {
            if self.numel() != 1 {
                return Err(Error::shape("item", format!("the tensor of shape {} has {} elements, not one", self.shape(), self.numel())));
            }
            let mut value = [T::default()];
            self.0.storage.read(self.0.layout.offset(), &mut value)?;
            Ok(value[0].to_f64())
        })
    }

    /// Whether gradients flow to this tensor.
    pub fn is_tracked(&self) -> bool {
        self.0.source.is_some()
    }

    /// Whether this is a leaf: tracked, and not the result of an operation.
    pub fn is_leaf(&self) -> bool {
        matches!(self.0.source, Some(Source::Leaf(_)))
    }

    /// Where the tensor comes from in the graph, if it is tracked.
    pub fn source(&self) -> Option<&Source> {
        self.0.source.as_ref()
    }

    /// The leaf, if this is one.
    pub fn leaf(&self) -> Option<&Arc<Leaf>> {
        match &self.0.source {
            Some(Source::Leaf(leaf)) => Some(leaf),
            _ => None,
        }
    }

    /// The same data as a new leaf of the graph: `backward` will leave its gradient in [`grad`](Tensor::grad).
    pub fn requires_grad_(&self) -> Result<Tensor> {
        if !self.dtype().is_float() {
            let message = format!("only float tensors carry gradients, this one is {}", self.dtype());
            return Err(Error::new(ErrorKind::DType, "requires_grad_", message));
        }
        Ok(self.with_source(Some(Source::Leaf(Arc::new(Leaf::new())))))
    }

    /// `data` as the new content of this leaf, whose gradient and hooks stay: for cells that hold parameters.
    pub fn with_data(&self, data: &Tensor) -> Result<Tensor> {
        self.expect_same("with_data", data)?;
        if !self.is_leaf() || self.shape() != data.shape() {
            let message = format!("the content of a leaf of shape {} can only be replaced by as much, got {}", self.shape(), data.shape());
            return Err(Error::shape("with_data", if self.is_leaf() { message } else { "the tensor is not a leaf".into() }));
        }
        Ok(data.with_source(self.0.source.clone()))
    }

    /// The same data, untracked.
    pub fn detach(&self) -> Tensor {
        if self.is_tracked() { self.with_source(None) } else { self.clone() }
    }

    /// The gradient that `backward` accumulated in this leaf.
    pub fn grad(&self) -> Option<Tensor> {
        self.leaf().and_then(|leaf| leaf.grad())
    }

    /// Forgets the accumulated gradient.
    pub fn zero_grad(&self) {
        if let Some(leaf) = self.leaf() {
            leaf.set_grad(None);
        }
    }

    /// Calls `hook` with the complete gradient of this tensor in each backward pass; what it returns replaces the gradient.
    pub fn register_hook(&self, hook: impl Fn(&Tensor) -> Result<Option<Tensor>> + Send + Sync + 'static) -> Result<()> {
        let source = self.source().ok_or_else(|| Error::graph("register_hook", "the tensor is not tracked"))?;
        let hook: Hook = Arc::new(hook);
        source.add_hook(hook);
        Ok(())
    }

    /// An error unless both have one dtype and one device.
    pub(crate) fn expect_same(&self, op: &str, other: &Tensor) -> Result<()> {
        if self.dtype() != other.dtype() {
            return Err(Error::dtype_mismatch(op, self.dtype(), other.dtype()));
        }
        if self.device() != other.device() {
            return Err(Error::device_mismatch(op, self.device(), other.device()));
        }
        Ok(())
    }
}
