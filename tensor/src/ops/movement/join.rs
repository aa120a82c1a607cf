//! Several tensors, or several copies of one, side by side: cat, stack, repeat, pad, roll, flip; and triangles of matrices.

use crate::autocast::raised;
use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{DType, Device, Dims, Error, Layout, MAX_RANK, Result, Shape, Tensor};
use kiln_kernels::cpu::copy::{copy_into_strided, fill_around};
use kiln_kernels::cpu::index::{Triangle, flip, triangle};
use kiln_kernels::cuda;
use kiln_kernels::element::Element;

/// How [`Tensor::pad`] fills the border.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum PadMode {
    /// This value.
    Constant(f64),
    /// Mirrored at the outermost element, which is not repeated.
    Reflect,
    /// The outermost element, repeated.
    Replicate,
    /// The other end.
    Circular,
}

/// The gradient of each part is its part of the gradient.
struct Cat {
    dim: usize,
    extents: Vec<usize>,
}

impl Op for Cat {
    fn name(&self) -> &'static str {
        "cat"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let mut start = 0;
        let mut part = |(i, &len): (usize, &usize)| {
            start += len;
            ctx.needs(i).then(|| grad.narrow(self.dim as isize, start - len, len)).transpose()
        };
        self.extents.iter().enumerate().map(&mut part).collect()
    }
}

/// A constant border: its inverse crops, so the gradient is padded by the negative amounts.
struct PadConstant {
    amounts: Vec<(isize, isize)>,
}

impl Op for PadConstant {
    fn name(&self) -> &'static str {
        "pad"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let back: Vec<_> = self.amounts.iter().map(|&(before, after)| (-before, -after)).collect();
        Ok(vec![Some(pad_constant(grad, &back, 0.0)?)])
    }
}

struct Flip {
    dims: Vec<usize>,
}

impl Op for Flip {
    fn name(&self) -> &'static str {
        "flip"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.flip(self.dims.as_slice())?)])
    }
}

struct KeepTriangle {
    kept: Triangle,
}

impl Op for KeepTriangle {
    fn name(&self) -> &'static str {
        "tril"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(keep_triangle(grad, self.kept)?)])
    }
}

fn keep_triangle(x: &Tensor, kept: Triangle) -> Result<Tensor> {
    let [.., rows, cols] = *x.dims() else {
        return Err(Error::shape("tril", format!("expected a matrix or a batch of them, got shape {}", x.shape())));
    };
    let _running = operation("tril", &[x], || Cost::NONE);
    let dense = x.detach().contiguous()?;
    let out = match x.gpu()? {
        Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*x.shape()), x.dtype(), |mut out| {
            Ok(cuda::index::triangle(gpu, dense.gpu_slice()?, rows, cols, kept, &mut out)?)
        }),
        None => for_any!(x.dtype(), T => Tensor::build::<T>(Device::Cpu, x.shape(), |out| {
            triangle(dense.as_slice::<T>()?, rows, cols, kept, out);
            Ok(())
        })),
    }?;
    record("tril", out, &[x], |_| KeepTriangle { kept })
}

/// `amounts` a dimension, before and after; negative amounts crop.
fn pad_constant(x: &Tensor, amounts: &[(isize, isize)], value: f64) -> Result<Tensor> {
    let _running = operation("pad", &[x], || Cost::NONE);
    let error = || Error::argument("pad", format!("amounts {amounts:?} do not fit shape {}", x.shape()));
    let mut extents = x.dims().to_vec();
    let mut inner = x.detach();
    for (d, &(before, after)) in amounts.iter().enumerate() {
        let n = extents[d] as isize;
        if before < -n || after < -n {
            return Err(error());
        }
        extents[d] = n.checked_add(before).and_then(|n| n.checked_add(after)).and_then(|n| usize::try_from(n).ok()).ok_or_else(error)?;
        let (start, end) = ((-before).clamp(0, n), n - (-after).clamp(0, n));
        inner = inner.narrow(d as isize, start as usize, usize::try_from(end - start).map_err(|_| error())?)?;
    }
    let shape = Shape::new(&extents)?;
    let layout = Layout::with_memory_order(shape, &x.layout().dense_like().memory_order());
    let offset = amounts.iter().zip(layout.strides()).map(|(&(before, _), stride)| before.max(0) as usize * stride).sum();
    let out = match x.gpu()? {
        Some(gpu) => Tensor::build_on_gpu(gpu, layout, x.dtype(), |mut out| {
            cuda::fill::fill(gpu, &mut out, value)?;
            Ok(cuda::copy::copy_into_strided(gpu, inner.gpu_view()?, out, offset, layout.strides())?)
        }),
        None => for_any!(x.dtype(), T => Tensor::build_with_layout::<T>(Device::Cpu, layout, |out| {
            let value = <T as Element>::from_f64(value);
            if inner.numel() == 0 {
                out.fill(value);
            } else {
                fill_around(out, value, inner.dims(), offset, layout.strides());
                copy_into_strided(inner.view_of::<T>()?, out, offset, layout.strides());
            }
            Ok(())
        })),
    }?;
    record("pad", out, &[x], |_| PadConstant { amounts: amounts.to_vec() })
}

/// Where each element of a padded dimension of `n` elements comes from, as positions.
fn border_map(device: Device, mode: PadMode, n: usize, before: isize, after: isize) -> Result<Tensor> {
    let most = match mode {
        PadMode::Reflect => n.saturating_sub(1),
        PadMode::Circular => n,
        _ => usize::MAX,
    };
    let added = |amount: isize| usize::try_from(amount).ok().filter(|&a| a <= most && n > 0);
    let extent = added(before).zip(added(after)).and_then(|(before, after)| n.checked_add(before)?.checked_add(after));
    let Some(extent) = extent else {
        let message = format!("{before} and {after} elements cannot be added to a dimension of {n} by {mode:?}");
        return Err(Error::argument("pad", message));
    };
    let n = n as i64;
    let _running = operation("arange", &[], || Cost::NONE);
    Tensor::build::<i64>(device, &Shape::new(&[extent])?, |map| {
        for (out, i) in map.iter_mut().zip(-before as i64..) {
            *out = match mode {
                PadMode::Reflect if i < 0 => -i,
                PadMode::Reflect if i >= n => 2 * (n - 1) - i,
                PadMode::Circular => i.rem_euclid(n),
                _ => i.clamp(0, n - 1),
            };
        }
        Ok(())
    })
}

impl Tensor {
    /// The tensors one behind the other along dimension `dim`; their other extents must agree.
    pub fn cat<T: AsRef<Tensor>>(tensors: &[T], dim: isize) -> Result<Tensor> {
        Self::cat_all(&tensors.iter().map(AsRef::as_ref).collect::<Vec<_>>(), dim)
    }

    fn cat_all(tensors: &[&Tensor], dim: isize) -> Result<Tensor> {
        if tensors.iter().any(|t| t.dtype() == DType::F32) && tensors.iter().any(|t| t.dtype() != DType::F32) {
            // Only inside of a scope does this change anything.
            let raised = tensors.iter().map(|&t| raised(t)).collect::<Result<Vec<_>>>()?;
            return Self::cat_of_one_dtype(&raised.iter().map(|t| &**t).collect::<Vec<_>>(), dim);
        }
        Self::cat_of_one_dtype(tensors, dim)
    }

    fn cat_of_one_dtype(tensors: &[&Tensor], dim: isize) -> Result<Tensor> {
        let _running = operation("cat", tensors, || Cost::NONE);
        let first = *tensors.first().ok_or_else(|| Error::argument("cat", "no tensors were given"))?;
        let axis = first.shape().dim("cat", dim)?;
        let mut extent: usize = 0;
        for t in tensors {
            first.expect_same("cat", t)?;
            if t.rank() != first.rank() || (0..t.rank()).any(|d| d != axis && t.shape()[d] != first.shape()[d]) {
                let message = format!("shapes {} and {} differ in another dimension than {axis}", first.shape(), t.shape());
                return Err(Error::shape("cat", message));
            }
            extent = t.shape()[axis]
                .checked_add(extent)
                .ok_or_else(|| Error::shape("cat", format!("the extents of dimension {axis} overflow")))?;
        }
        let shape = first.shape().with_dim(axis, extent)?;
        let layout = Layout::with_memory_order(shape, &first.layout().dense_like().memory_order());
        let starts = tensors.iter().scan(0, |end, t| Some(std::mem::replace(end, *end + t.shape()[axis])));
        let parts = || tensors.iter().zip(starts.clone()).filter(|(t, _)| t.numel() > 0);
        let offset = |start: usize| start * layout.strides()[axis];
        let out = match first.gpu()? {
            Some(gpu) => Tensor::build_on_gpu(gpu, layout, first.dtype(), |mut out| {
                for (t, start) in parts() {
                    cuda::copy::copy_into_strided(gpu, t.gpu_view()?, out.reborrow(), offset(start), layout.strides())?;
                }
                Ok(())
            }),
            None => for_any!(first.dtype(), T => Tensor::build_with_layout::<T>(Device::Cpu, layout, |out| {
                for (t, start) in parts() {
                    copy_into_strided(t.view_of::<T>()?, out, offset(start), layout.strides());
                }
                Ok(())
            })),
        }?;
        record("cat", out, tensors, |_| Cat { dim: axis, extents: tensors.iter().map(|t| t.shape()[axis]).collect() })
    }

    /// Tensors of one shape as the slices of a new dimension `dim`.
    pub fn stack<T: AsRef<Tensor>>(tensors: &[T], dim: isize) -> Result<Tensor> {
        let first = tensors.first().ok_or_else(|| Error::argument("stack", "no tensors were given"))?.as_ref();
        let places = first.rank() as isize + 1;
        if !(-places..places).contains(&dim) {
            return Err(Error::argument(
                "stack",
                format!("dimension {dim} is not in {} to {} for shapes {}", -places, places - 1, first.shape()),
            ));
        }
        let at = if dim < 0 { dim + places } else { dim };
        for t in tensors.iter().map(AsRef::as_ref) {
            if t.shape() != first.shape() {
                return Err(Error::shape("stack", format!("shapes {} and {} differ", first.shape(), t.shape())));
            }
        }
        let slices = tensors.iter().map(|t| t.as_ref().unsqueeze(at)).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&slices, at)
    }

    /// The tensor repeated `counts[d]` times along each dimension. More counts than dimensions put new ones in front.
    pub fn repeat(&self, counts: &[usize]) -> Result<Tensor> {
        let lead = counts.len().checked_sub(self.rank());
        let lead =
            lead.ok_or_else(|| Error::shape("repeat", format!("{counts:?} has fewer counts than shape {} dimensions", self.shape())))?;
        let mut out = self.reshape([&vec![1; lead], self.dims()].concat())?;
        let repeated = counts.iter().filter(|&&count| count != 1).count();
        if repeated > 1 && counts.len() + repeated <= MAX_RANK {
            return out.repeat_at_once(counts);
        }
        for (d, &count) in counts.iter().enumerate().filter(|&(_, &count)| count != 1) {
            // As three dimensions, so that the new one does not add to the rank.
            let (outer, n, inner) = out.shape().around(d);
            let shape = out.shape().with_dim(d, self.repeated_extent(n, count, counts)?)?;
            out = out.reshape([outer, 1, n * inner])?.expand([outer, count, n * inner])?.reshape(shape)?;
        }
        Ok(out)
    }

    /// As many counts as dimensions, in one copy: each repeated dimension with one of its own before it.
    fn repeat_at_once(&self, counts: &[usize]) -> Result<Tensor> {
        let (mut one, mut many, mut shape) = (vec![], vec![], vec![]);
        for (&n, &count) in self.dims().iter().zip(counts) {
            if count != 1 {
                one.push(1);
                many.push(count);
            }
            one.push(n);
            many.push(n);
            shape.push(self.repeated_extent(n, count, counts)?);
        }
        self.reshape(one)?.expand(many)?.reshape(shape)
    }

    fn repeated_extent(&self, n: usize, count: usize, counts: &[usize]) -> Result<usize> {
        n.checked_mul(count).ok_or_else(|| Error::shape("repeat", format!("{counts:?} times shape {} overflows", self.shape())))
    }

    /// A border around the last dimensions. `amounts` are pairs (before, after), the last dimension's first, as in PyTorch:
    /// `[left, right, top, bottom]`. Negative amounts crop ([`PadMode::Constant`] only).
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result, ops::movement::PadMode};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::arange(1., 4., 1., DType::I64)?;
    /// assert_eq!(x.pad(&[2, 1], PadMode::Reflect)?.to_vec::<i64>()?, [3, 2, 1, 2, 3, 2]);
    /// # Ok(()) }
    /// ```
    pub fn pad(&self, amounts: &[isize], mode: PadMode) -> Result<Tensor> {
        let (pairs, rest) = amounts.as_chunks::<2>();
        if !rest.is_empty() || pairs.len() > self.rank() {
            let message = format!("{amounts:?} is not a pair for each of the last dimensions of shape {}", self.shape());
            return Err(Error::argument("pad", message));
        }
        let mut by_dim = vec![(0, 0); self.rank()];
        for (pair, slot) in pairs.iter().zip(by_dim.iter_mut().rev()) {
            *slot = (pair[0], pair[1]);
        }
        if let PadMode::Constant(value) = mode {
            return pad_constant(self, &by_dim, value);
        }
        let mut out = self.clone();
        for (d, &(before, after)) in by_dim.iter().enumerate().filter(|(_, pair)| **pair != (0, 0)) {
            out = out.index_select(d as isize, &border_map(self.device(), mode, self.shape()[d], before, after)?)?;
        }
        Ok(out)
    }

    /// The elements in reverse order along `dims`.
    pub fn flip(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        self.flipped(dims.into())
    }

    fn flipped(&self, dims: Dims) -> Result<Tensor> {
        let _running = operation("flip", &[self], || Cost::NONE);
        let dims = dims.resolve("flip", self.shape())?;
        let mut out = self.detach().contiguous()?;
        for &d in &dims {
            let (outer, n, inner) = out.shape().around(d);
            if self.device() != Device::Cpu {
                let reversed = Tensor::arange(n as f64 - 1.0, -1.0, -1.0, (DType::I64, self.device()))?;
                out = out.index_select(d as isize, &reversed)?;
                continue;
            }
            out = for_any!(self.dtype(), T => Tensor::build::<T>(Device::Cpu, self.shape(), |o| {
                flip(out.as_slice::<T>()?, [outer, n, inner], o);
                Ok(())
            }))?;
        }
        record("flip", out, &[self], |_| Flip { dims: dims.clone() })
    }

    /// The elements moved `shift` places towards the end of dimension `dim`; those that leave it come back at the start.
    pub fn roll(&self, shift: isize, dim: isize) -> Result<Tensor> {
        let axis = self.shape().dim("roll", dim)?;
        let n = self.shape()[axis];
        if n == 0 {
            return Ok(self.clone());
        }
        let shift = shift.rem_euclid(n as isize) as usize;
        if shift == 0 {
            return Ok(self.clone());
        }
        Tensor::cat(&[self.narrow(dim, n - shift, shift)?, self.narrow(dim, 0, n - shift)?], dim)
    }

    /// The lower triangle of the matrices in the last two dimensions, zero elsewhere. `diagonal` of the diagonals above the main one
    /// are kept too (fewer if it is negative).
    pub fn tril(&self, diagonal: isize) -> Result<Tensor> {
        keep_triangle(self, Triangle::Lower(diagonal))
    }

    /// The upper triangle of the matrices in the last two dimensions, zero elsewhere, from diagonal number `diagonal` (0 is the main
    /// one, positive ones lie above) on.
    pub fn triu(&self, diagonal: isize) -> Result<Tensor> {
        keep_triangle(self, Triangle::Upper(diagonal))
    }
}

impl AsRef<Tensor> for Tensor {
    fn as_ref(&self) -> &Tensor {
        self
    }
}
