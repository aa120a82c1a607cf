//! Order: sort, argsort, topk. Stable; NaN counts as the largest value. Places are i64 and carry no gradient; values are gathered by them.

use crate::profile::{Cost, operation};
use crate::{DType, Device, Error, Layout, Result, Tensor};
use kiln_kernels::cpu::sort::argsort;
use kiln_kernels::cuda;

/// The places of the first `k` elements of dimension `dim` in sorted order.
fn places(op: &'static str, x: &Tensor, dim: isize, k: Option<usize>, descending: bool) -> Result<Tensor> {
    if x.rank() == 0 {
        return places(op, &x.reshape([1usize])?, dim, k, descending)?.reshape(());
    }
    let dim = x.shape().dim(op, dim)? as isize;
    let _running = operation(op, &[x], || Cost::NONE);
    let rows = x.detach().movedim(dim, -1)?.contiguous()?;
    let len = rows.dims()[rows.rank() - 1];
    let k = k.unwrap_or(len);
    if k > len {
        return Err(Error::argument(op, format!("{k} elements were asked for, dimension {dim} of shape {} has {len}", x.shape())));
    }
    let shape = rows.shape().with_dim(rows.rank() - 1, k)?;
    let sorted = match x.gpu()? {
        Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(shape), DType::I64, |mut out| {
            Ok(cuda::sort::argsort(gpu, rows.gpu_slice()?, len, k, descending, &mut out)?)
        })
        .map(|places| places.within(0, len as i64 - 1)),
        None => for_any!(x.dtype(), T => Tensor::build::<i64>(Device::Cpu, &shape, |out| {
            argsort(rows.as_slice::<T>()?, len, k, descending, out);
            Ok(())
        })),
    }?;
    sorted.movedim(-1, dim)
}

impl Tensor {
    /// The elements along `dim` in ascending (or descending) order, and the places (i64) that they had. Equal elements keep their order.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let (values, places) = Tensor::from_vec(vec![3f32, 1., 2.], [3])?.sort(0, true)?;
    /// assert_eq!(values.to_vec::<f32>()?, [3., 2., 1.]);
    /// assert_eq!(places.to_vec::<i64>()?, [0, 2, 1]);
    /// # Ok(()) }
    /// ```
    pub fn sort(&self, dim: isize, descending: bool) -> Result<(Tensor, Tensor)> {
        let places = places("sort", self, dim, None, descending)?;
        Ok((self.at_places(dim, &places)?, places))
    }

    /// The places (i64) of the elements along `dim` in ascending (or descending) order. Equal elements keep their order.
    pub fn argsort(&self, dim: isize, descending: bool) -> Result<Tensor> {
        places("argsort", self, dim, None, descending)
    }

    /// The `k` largest (or smallest) elements along `dim`, the most extreme first, and their places (i64). Of equal elements the first come first.
    pub fn topk(&self, k: usize, dim: isize, largest: bool) -> Result<(Tensor, Tensor)> {
        let places = places("topk", self, dim, Some(k), largest)?;
        Ok((self.at_places(dim, &places)?, places))
    }

    fn at_places(&self, dim: isize, places: &Tensor) -> Result<Tensor> {
        if self.rank() == 0 { Ok(self.clone()) } else { self.gather(dim, places) }
    }
}
