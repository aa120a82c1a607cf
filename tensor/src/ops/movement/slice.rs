//! Parts of a tensor as views: narrow, slice, select, split, diagonals, sliding windows. The gradient of a part is zero
//! everywhere else.

use crate::graph::{Ctx, Grads, Op, record};
use crate::ops::index::index_sum;
use crate::profile::{Cost, operation};
use crate::{Device, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::copy::{copy_into_strided, fill_around};
use kiln_kernels::cuda;

/// Which elements of a tensor a view shows, each at most once.
#[derive(Clone, Copy)]
enum Part {
    Slice { dim: usize, start: usize, len: usize, step: usize },
    Diagonal { offset: isize, rows: usize, cols: usize },
}

impl Part {
    fn of(self, layout: &Layout) -> Layout {
        match self {
            Part::Slice { dim, start, len, step } => layout.slice(dim, start, len, step),
            Part::Diagonal { offset, rows, cols } => layout.diagonal(offset, rows, cols),
        }
    }
}

/// `part` of a tensor of shape `from`.
struct TakePart {
    name: &'static str,
    part: Part,
    from: Shape,
}

impl Op for TakePart {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(put_part(self.name, grad, self.part, self.from)?)])
    }
}

/// Zeros of a shape with the input in `part`: the adjoint of [`TakePart`].
struct PutPart {
    name: &'static str,
    part: Part,
}

impl Op for PutPart {
    fn name(&self) -> &'static str {
        self.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(take_part(self.name, grad, self.part)?)])
    }
}

fn take_part(name: &'static str, x: &Tensor, part: Part) -> Result<Tensor> {
    let out = x.with_layout(part.of(x.layout()));
    record(name, out, &[x], |_| TakePart { name, part, from: *x.shape() })
}

fn put_part(name: &'static str, x: &Tensor, part: Part, shape: Shape) -> Result<Tensor> {
    let _running = operation(name, &[x], || Cost::NONE);
    let region = part.of(&Layout::contiguous(shape));
    let out = match x.gpu()? {
        Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(shape), x.dtype(), |mut out| {
            gpu.zero(&mut out)?;
            Ok(cuda::copy::copy_into_strided(gpu, x.gpu_view()?, out, region.offset(), region.strides())?)
        }),
        None => for_any!(x.dtype(), T => Tensor::build::<T>(Device::Cpu, &shape, |out| {
            if x.numel() == 0 {
                out.fill(T::default());
            } else {
                fill_around(out, T::default(), x.dims(), region.offset(), region.strides());
                copy_into_strided(x.view_of::<T>()?, out, region.offset(), region.strides());
            }
            Ok(())
        })),
    }?;
    record(name, out, &[x], |_| PutPart { name, part })
}

/// The gradient of sliding windows: each element gets the sum over the windows that show it.
struct Unfold {
    dim: usize,
    step: usize,
    from: Shape,
}

impl Op for Unfold {
    fn name(&self) -> &'static str {
        "unfold"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let (windows, size) = (grad.dims()[self.dim], grad.dims()[grad.rank() - 1]);
        let positions: Vec<i64> = (0..windows).flat_map(|w| (0..size).map(move |i| (w * self.step + i) as i64)).collect();
        let positions = Tensor::from_vec(positions, windows * size)?.to_device(grad.device())?;
        let dim = self.dim as isize;
        let flat = grad.movedim(-1, dim + 1)?.flatten(dim, dim + 1)?;
        Ok(vec![Some(index_sum(self.from, self.dim, &positions, &flat)?)])
    }
}

impl Tensor {
    /// The elements `start..start + len` of dimension `dim`, as a view.
    pub fn narrow(&self, dim: isize, start: usize, len: usize) -> Result<Tensor> {
        let dim = self.shape().dim("narrow", dim)?;
        if start.checked_add(len).is_none_or(|end| end > self.shape()[dim]) {
            let message = format!("{len} elements from {start} on leave dimension {dim} of shape {}", self.shape());
            return Err(Error::index("narrow", message));
        }
        self.part_of_dim("narrow", dim, start, len, 1)
    }

    /// Every `step`th element of `start..end` in dimension `dim`, as a view. Negative bounds count from the end; bounds beyond the
    /// ends are moved to them.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::arange(0., 10., 1., DType::I64)?;
    /// assert_eq!(x.slice(0, 1, -1, 3)?.to_vec::<i64>()?, [1, 4, 7]);
    /// # Ok(()) }
    /// ```
    pub fn slice(&self, dim: isize, start: isize, end: isize, step: usize) -> Result<Tensor> {
        let dim = self.shape().dim("slice", dim)?;
        if step == 0 {
            return Err(Error::argument("slice", "the step must not be zero"));
        }
        let n = self.shape()[dim];
        let clamp = |at: isize| if at < 0 { n.saturating_sub(at.unsigned_abs()) } else { (at as usize).min(n) };
        let (start, end) = (clamp(start), clamp(end));
        self.part_of_dim("slice", dim, start, end.saturating_sub(start).div_ceil(step), step)
    }

    fn part_of_dim(&self, name: &'static str, dim: usize, start: usize, len: usize, step: usize) -> Result<Tensor> {
        if start == 0 && len == self.shape()[dim] && step == 1 {
            return Ok(self.clone());
        }
        take_part(name, self, Part::Slice { dim, start, len, step })
    }

    /// The elements at `index` of dimension `dim`, which the result lacks. A negative index counts from the end.
    pub fn select(&self, dim: isize, index: isize) -> Result<Tensor> {
        let dim = self.shape().dim("select", dim)?;
        let n = self.shape()[dim];
        let at = if index < 0 { n.checked_sub(index.unsigned_abs()) } else { Some(index as usize) };
        let at = at.filter(|&at| at < n);
        let at = at.ok_or_else(|| {
            Error::index("select", format!("index {index} is out of range for dimension {dim} of shape {}", self.shape()))
        })?;
        self.part_of_dim("select", dim, at, 1, 1)?.reshape(self.shape().without(dim))
    }

    /// Overwrites the elements `start..start + n` of dimension `dim` by `src`, whose extent there is n, in place if nobody else holds this
    /// tensor's memory, in a copy otherwise: for buffers that are filled piece by piece, such as a cache of keys. Nothing is recorded.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let mut x = Tensor::zeros([2, 3], ())?;
    /// x.write_slice(1, 1, &Tensor::ones([2, 1], ())?)?;
    /// assert_eq!(x.to_vec::<f32>()?, [0., 1., 0., 0., 1., 0.]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If either tensor is tracked (a gradient would be lost), the extents do not fit, or dtypes or devices differ.
    pub fn write_slice(&mut self, dim: isize, start: usize, src: &Tensor) -> Result<()> {
        let op = "write_slice";
        let _running = operation(op, &[src], || Cost::NONE);
        let dim = self.shape().dim(op, dim)?;
        if self.is_tracked() || src.is_tracked() {
            return Err(Error::graph(op, "nothing is recorded here, and a gradient would be lost; use no_grad or .detach(), or cat"));
        }
        if src.dtype() != self.dtype() {
            return Err(Error::dtype_mismatch(op, self.dtype(), src.dtype()));
        }
        if src.device() != self.device() {
            return Err(Error::device_mismatch(op, self.device(), src.device()));
        }
        let len = src.dims().get(dim).copied().unwrap_or(0);
        let fits = src.rank() == self.rank() && src.shape().without(dim) == self.shape().without(dim);
        if !fits || start.checked_add(len).is_none_or(|end| end > self.shape()[dim]) {
            let message = format!("{} from place {start} of dimension {dim} on does not fit {}", src.shape(), self.shape());
            return Err(Error::shape(op, message));
        }
        if src.numel() == 0 {
            return Ok(());
        }
        let region = Layout::contiguous(*self.shape()).slice(dim, start, len, 1);
        match src.gpu()? {
            Some(gpu) => cuda::copy::copy_into_strided(gpu, src.gpu_view()?, self.gpu_slice_mut()?, region.offset(), region.strides())?,
            None => for_any!(src.dtype(), T => {
                copy_into_strided(src.view_of::<T>()?, self.as_slice_mut::<T>()?, region.offset(), region.strides());
                Ok::<(), Error>(())
            })?,
        }
        Ok(())
    }

    /// Consecutive parts of dimension `dim` with the given extents, which must add up to its own.
    pub fn split(&self, sizes: &[usize], dim: isize) -> Result<Vec<Tensor>> {
        let axis = self.shape().dim("split", dim)?;
        if sizes.iter().try_fold(0usize, |sum, &n| sum.checked_add(n)) != Some(self.shape()[axis]) {
            return Err(Error::shape("split", format!("sizes {sizes:?} do not add up to dimension {axis} of shape {}", self.shape())));
        }
        let mut start = 0;
        let mut part = |&len: &usize| {
            start += len;
            self.narrow(dim, start - len, len)
        };
        sizes.iter().map(&mut part).collect()
    }

    /// Dimension `dim` cut into at most `count` parts of equal extent; the last may be shorter.
    pub fn chunk(&self, count: usize, dim: isize) -> Result<Vec<Tensor>> {
        let axis = self.shape().dim("chunk", dim)?;
        if count == 0 {
            return Err(Error::argument("chunk", "the number of chunks must not be zero"));
        }
        let n = self.shape()[axis];
        let len = n.div_ceil(count).max(1);
        let sizes: Vec<usize> = (0..n.max(1)).step_by(len).map(|at| len.min(n - at)).collect();
        self.split(&sizes, dim)
    }

    /// The diagonal of the matrices that dimensions `dim1` (rows) and `dim2` (columns) span, as a new last dimension in place of both.
    /// A positive `offset` starts that many columns to the right, a negative one rows below.
    pub fn diagonal(&self, offset: isize, dim1: isize, dim2: isize) -> Result<Tensor> {
        let (rows, cols) = (self.shape().dim("diagonal", dim1)?, self.shape().dim("diagonal", dim2)?);
        if rows == cols {
            return Err(Error::index("diagonal", format!("dimension {dim1} is given twice")));
        }
        take_part("diagonal", self, Part::Diagonal { offset, rows, cols })
    }

    /// Sliding windows of `size` elements, `step` apart, along dimension `dim`, as a view: the windows take the dimension's place,
    /// their elements are a new last dimension.
    pub fn unfold(&self, dim: isize, size: usize, step: usize) -> Result<Tensor> {
        let dim = self.shape().dim("unfold", dim)?;
        if step == 0 || size > self.shape()[dim] {
            let message = format!("windows of {size} elements, {step} apart, do not fit dimension {dim} of shape {}", self.shape());
            return Err(Error::argument("unfold", message));
        }
        let out = self.with_layout(self.layout().windows(dim, size, step)?);
        record("unfold", out, &[self], |_| Unfold { dim, step, from: *self.shape() })
    }

    /// Dimension `from` moved to place `to`; the others keep their order.
    pub fn movedim(&self, from: isize, to: isize) -> Result<Tensor> {
        let (from, to) = (self.shape().dim("movedim", from)?, self.shape().dim("movedim", to)?);
        let mut order: Vec<isize> = (0..self.rank() as isize).collect();
        let moved = order.remove(from);
        order.insert(to, moved);
        self.permute(&order)
    }
}
