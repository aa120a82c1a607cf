//! Views: other layouts over the same memory. Only `contiguous`, and `reshape` where it must, copy.

use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{Device, Error, IntoShape, Layout, ReshapeDims, Result, Shape, Tensor};
use kiln_kernels::cpu::copy::copy_strided;
use kiln_kernels::cuda;

/// A relabelling of the same elements in the same order: the gradient takes the input's shape back.
struct Reshape {
    from: Shape,
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.reshape(self.from)?)])
    }
}

struct Expand;

impl Op for Expand {
    fn name(&self) -> &'static str {
        "expand"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        // The engine sums a gradient down to the input's shape: nothing remains to be done.
        Ok(vec![Some(grad.clone())])
    }
}

struct Permute {
    order: Vec<usize>,
}

impl Op for Permute {
    fn name(&self) -> &'static str {
        "permute"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let mut inverse = vec![0isize; self.order.len()];
        for (to, &from) in self.order.iter().enumerate() {
            inverse[from] = to as isize;
        }
        Ok(vec![Some(grad.permute(&inverse)?)])
    }
}

/// The same values in the same shape: elsewhere in memory, or another tensor of the graph.
struct Identity;

impl Op for Identity {
    fn name(&self) -> &'static str {
        "identity"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.clone())])
    }
}

impl Tensor {
    /// The same elements, row-major without gaps: itself if it is so already, else a copy.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        self.copy()
    }

    /// The same data as a tensor of its own in the graph: gradients with respect to it leave out other uses of the original.
    pub fn identity(&self) -> Result<Tensor> {
        record("identity", self.detach(), &[self], |_| Identity)
    }

    /// A row-major copy in memory of its own.
    pub fn copy(&self) -> Result<Tensor> {
        let _running = operation("contiguous", &[self], || Cost::NONE);
        let out = match self.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*self.shape()), self.dtype(), |out| {
                Ok(cuda::copy::copy_strided(gpu, self.gpu_view()?, out)?)
            }),
            None => for_any!(self.dtype(), T => Tensor::build::<T>(Device::Cpu, self.shape(), |out| {
                copy_strided(self.view_of::<T>()?, out);
                Ok(())
            })),
        }?;
        record("contiguous", out, &[self], |_| Identity)
    }

    /// The same elements in the memory order `order` (dimensions, slowest first: `[0, 2, 3, 1]` is channels-last), copied if they are not so already.
    pub fn to_memory_order(&self, order: &[usize]) -> Result<Tensor> {
        self.shape().named_once("to_memory_order", order)?;
        let layout = Layout::with_memory_order(*self.shape(), order);
        if layout.strides() == self.layout().strides() {
            return Ok(self.clone());
        }
        let ordered = self.layout().permute(order);
        // They may lie so already, and differ in the strides of extents of 1 alone.
        let packed = if ordered.is_contiguous() { self.detach() } else { self.detach().with_layout(ordered).copy()? };
        let layout = layout.starting_at(packed.layout().offset());
        record("contiguous", packed.with_layout(layout), &[self], |_| Identity)
    }

    /// The same elements, in the same row-major order, in another shape. One extent may be -1: it is what remains. A view
    /// where the memory allows it, else a copy.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::arange(0., 12., 1., DType::F32)?;
    /// assert_eq!(x.reshape([3, -1])?.dims(), [3, 4]);
    /// # Ok(()) }
    /// ```
    pub fn reshape(&self, shape: impl Into<ReshapeDims>) -> Result<Tensor> {
        let shape = resolve_reshape(self.shape(), &shape.into().0)?;
        if shape == *self.shape() {
            return Ok(self.clone());
        }
        let base = self.detach();
        let out = match self.layout().reshape(&shape) {
            Some(layout) => base.with_layout(layout),
            None => base.copy()?.with_layout(Layout::contiguous(shape)),
        };
        record("reshape", out, &[self], |_| Reshape { from: *self.shape() })
    }

    /// [`reshape`](Tensor::reshape) that refuses to copy.
    pub fn view(&self, shape: impl Into<ReshapeDims>) -> Result<Tensor> {
        let shape = resolve_reshape(self.shape(), &shape.into().0)?;
        if self.layout().reshape(&shape).is_none() {
            let message = format!(
                "shape {} with strides {:?} cannot be seen as {shape} without a copy; use .reshape(..)",
                self.shape(),
                self.layout().strides()
            );
            return Err(Error::shape("view", message));
        }
        self.reshape(shape)
    }

    /// Repeats dimensions of extent 1, and puts new ones in front, without copying. An extent of the result must equal the
    /// tensor's, or the tensor's must be 1.
    pub fn expand(&self, shape: impl IntoShape) -> Result<Tensor> {
        let shape = shape.into_shape()?;
        if shape == *self.shape() {
            return Ok(self.clone());
        }
        let layout = self.layout().broadcast_to("expand", &shape)?;
        record("expand", self.with_layout(layout), &[self], |_| Expand)
    }

    /// The dimensions in another order: dimension `i` of the result is dimension `order[i]` of the tensor.
    pub fn permute(&self, order: &[isize]) -> Result<Tensor> {
        let axes = order.iter().map(|&d| self.shape().dim("permute", d)).collect::<Result<Vec<_>>>()?;
        self.shape().named_once("permute", &axes)?;
        record("permute", self.with_layout(self.layout().permute(&axes)), &[self], |_| Permute { order: axes.clone() })
    }

    /// Two dimensions exchanged.
    pub fn transpose(&self, a: isize, b: isize) -> Result<Tensor> {
        let (a, b) = (self.shape().dim("transpose", a)?, self.shape().dim("transpose", b)?);
        let mut order: Vec<isize> = (0..self.rank() as isize).collect();
        order.swap(a, b);
        self.permute(&order)
    }

    /// The transposed matrix; vectors and scalars are returned as they are.
    pub fn t(&self) -> Result<Tensor> {
        match self.rank() {
            0 | 1 => Ok(self.clone()),
            2 => self.transpose(0, 1),
            _ => Err(Error::shape("t", format!("expected at most 2 dimensions, got shape {}; use .transpose(-2, -1)", self.shape()))),
        }
    }

    /// A new dimension of extent 1 before dimension `dim`; -1 puts it last.
    pub fn unsqueeze(&self, dim: isize) -> Result<Tensor> {
        let rank = self.rank() as isize;
        let at = if dim < 0 { dim + rank + 1 } else { dim };
        if !(0..=rank).contains(&at) {
            return Err(Error::index("unsqueeze", format!("dimension {dim} is out of range for shape {}", self.shape())));
        }
        self.reshape(self.shape().with_inserted(at as usize, 1)?)
    }

    /// Without dimension `dim` if its extent is 1; the tensor itself otherwise.
    pub fn squeeze(&self, dim: isize) -> Result<Tensor> {
        let at = self.shape().dim("squeeze", dim)?;
        if self.shape()[at] != 1 {
            return Ok(self.clone());
        }
        self.reshape(self.shape().without(at))
    }

    /// Dimensions `start` to `end` (both included) merged into one.
    pub fn flatten(&self, start: isize, end: isize) -> Result<Tensor> {
        if self.rank() == 0 {
            return self.reshape([1usize]);
        }
        let (start, end) = (self.shape().dim("flatten", start)?, self.shape().dim("flatten", end)?);
        if start > end {
            return Err(Error::index("flatten", format!("dimension {start} lies behind {end}")));
        }
        let dims = self.dims();
        let merged = dims[start..=end].iter().product();
        self.reshape([&dims[..start], &[merged], &dims[end + 1..]].concat())
    }

    /// The gradient of a broadcast: sums the dimensions that `shape` lacks, or has with extent 1, so that the result has shape `shape`.
    pub fn sum_to_shape(&self, shape: &Shape) -> Result<Tensor> {
        if self.shape() == shape {
            return Ok(self.clone());
        }
        // The check: `shape` must broadcast to the tensor's.
        Layout::contiguous(*shape).broadcast_to("sum_to_shape", self.shape())?;
        let lead = self.rank() - shape.rank();
        let dims: Vec<usize> = (0..self.rank()).filter(|&d| d < lead || (shape[d - lead] == 1 && self.shape()[d] != 1)).collect();
        self.sum_keepdim(dims)?.reshape(shape)
    }
}

/// Fills in the -1 and checks the number of elements.
fn resolve_reshape(from: &Shape, dims: &[isize]) -> Result<Shape> {
    let error = || Error::shape("reshape", format!("shape {from} of {} elements cannot become {dims:?}", from.numel()));
    let known = dims.iter().filter(|&&d| d != -1).try_fold(1usize, |n, &d| n.checked_mul(usize::try_from(d).ok()?));
    let known = known.ok_or_else(error)?;
    let inferred = match dims.iter().filter(|&&d| d == -1).count() {
        0 => 1,
        1 if known != 0 && from.numel().is_multiple_of(known) => from.numel() / known,
        _ => return Err(error()),
    };
    let extents: Vec<usize> = dims.iter().map(|&d| if d == -1 { inferred } else { d as usize }).collect();
    let shape = Shape::new(&extents)?;
    if shape.numel() == from.numel() { Ok(shape) } else { Err(error()) }
}
