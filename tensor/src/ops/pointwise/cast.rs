//! Other dtypes.

use super::kernel::{cast, record_linear};
use crate::{DType, Result, Tensor};

impl Tensor {
    /// The elements in another dtype: floats round to nearest even, or truncate towards zero and saturate where they become integers (NaN: 0);
    /// integers wrap where they become narrower ones; bool is x ≠ 0. A gradient is converted back. Casts to integers and bool cut the
    /// graph, as their derivative is zero.
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        let from = self.dtype();
        if dtype == from {
            return Ok(self.clone());
        }
        let out = cast(self, dtype)?;
        if !dtype.is_float() || !from.is_float() {
            return Ok(out);
        }
        record_linear("to_dtype", out, self, move |g| g.to_dtype(from))
    }
}
