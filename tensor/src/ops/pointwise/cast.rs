//! Other dtypes.

use super::kernel::record_linear;
use crate::{DType, Result, Tensor};
use kiln_kernels::element::Element;

impl Tensor {
    /// The elements in another dtype: floats round to nearest even, integers truncate towards zero and saturate, bool is x ≠ 0.
    /// A gradient is converted back. Casts to integers and bool cut the graph, as their derivative is zero.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        let from = self.dtype();
        if dtype == from {
            return Ok(self.clone());
        }
        let out = for_any!(from, T => {
            let x = self.detach().contiguous()?;
            let x = x.as_slice::<T>()?;
            for_any!(dtype, U => Tensor::build::<U>(self.shape(), |out| {
                for (o, &x) in out.iter_mut().zip(x) {
                    *o = <U as Element>::from_f64(x.to_f64());
                }
                Ok(())
            }))
        })?;
        if !dtype.is_float() || !from.is_float() {
            return Ok(out);
        }
        record_linear("to_dtype", out, self, move |g| g.to_dtype(from))
    }
}
