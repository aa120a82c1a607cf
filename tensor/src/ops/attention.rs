//! Attention, composed of products and a softmax.

use crate::{DType, Error, Result, Tensor};

/// What [`scaled_dot_product_attention`](Tensor::scaled_dot_product_attention) takes besides query, key and value.
#[derive(Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Broadcasts to `[.., L, S]`. Of bools: true where a query may look at a key; of floats: added to the scores.
    pub mask: Option<&'a Tensor>,
    /// Query i looks at the keys 0 to i only. Together with a mask, both must allow a key.
    pub causal: bool,
    /// Factor of the scores; 1/√E if `None`.
    pub scale: Option<f64>,
}

const NAME: &str = "scaled_dot_product_attention";

/// `[L, S]`, true up to the diagonal.
fn causal_mask(queries: usize, keys: usize) -> Result<Tensor> {
    Tensor::from_vec((0..queries).flat_map(|i| (0..keys).map(move |j| j <= i)).collect::<Vec<bool>>(), [queries, keys])
}

/// Which keys each query may look at, from the options; `None` if all.
fn allowed(options: &AttentionOptions<'_>, queries: usize, keys: usize) -> Result<Option<Tensor>> {
    let causal = if options.causal { Some(causal_mask(queries, keys)?) } else { None };
    let mask = match options.mask {
        Some(mask) if mask.dtype() == DType::Bool => Some(mask.clone()),
        // A score of -∞ is a key that is shut off, too.
        Some(mask) => Some(mask.detach().ne_scalar(f64::NEG_INFINITY)?),
        None => None,
    };
    match (causal, mask) {
        (Some(causal), Some(mask)) => Ok(Some(causal.logical_and(&mask)?)),
        (causal, mask) => Ok(causal.or(mask)),
    }
}

impl Tensor {
    /// Attention of queries `[.., L, E]` (this tensor) over keys `[.., S, E]` and values `[.., S, V]`:
    /// `softmax(scale · Q · Kᵀ + mask) · V`, of shape `[.., L, V]`. Leading dimensions (batch, heads) broadcast.
    /// A query that may look at no key gives zeros, as in PyTorch, and sends no gradient.
    ///
    /// Source: Vaswani et al., *Attention Is All You Need*, 2017, equation 1.
    pub fn scaled_dot_product_attention(&self, key: &Tensor, value: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
        self.check_attention(key, value)?;
        let (queries, width, keys) = (self.dim(-2)?, self.dim(-1)?, key.dim(-2)?);
        let scale = options.scale.unwrap_or(1.0 / (width as f64).sqrt());
        // Scaling the queries touches L × E elements, scaling the scores L × S.
        let mut scores = self.mul_scalar(scale)?.matmul(&key.transpose(-2, -1)?)?;
        if let Some(mask) = options.mask.filter(|mask| mask.dtype() != DType::Bool) {
            // Shut keys are filled below: an infinity in the sum would make the gradient of a shut row NaN.
            let finite = mask.masked_fill(&mask.detach().eq_scalar(f64::NEG_INFINITY)?, 0.0)?;
            scores = scores.add(&finite)?;
        }
        let Some(allowed) = allowed(options, queries, keys)? else {
            return scores.softmax(-1)?.matmul(value);
        };
        let open = allowed.expand(crate::broadcast_shapes(NAME, allowed.shape(), &crate::Shape::new(&[queries, keys])?)?)?;
        // A row without any key is computed over all of them and then cleared, so that no 0/0 enters it or its gradient.
        let shut_rows = open.to_dtype(DType::I64)?.sum_keepdim(-1)?.eq_scalar(0.0)?;
        let shut_keys = open.logical_or(&shut_rows)?.logical_not()?;
        scores.masked_fill(&shut_keys, f64::NEG_INFINITY)?.softmax(-1)?.matmul(value)?.masked_fill(&shut_rows, 0.0)
    }

    fn check_attention(&self, key: &Tensor, value: &Tensor) -> Result<()> {
        self.expect_same(NAME, key)?;
        self.expect_same(NAME, value)?;
        if !self.dtype().is_float() {
            return Err(Error::unsupported_dtype(NAME, self.dtype(), "a float dtype"));
        }
        let describe = || format!("query {}, key {} and value {}", self.shape(), key.shape(), value.shape());
        if self.rank() < 2 || key.rank() < 2 || value.rank() < 2 {
            return Err(Error::shape(NAME, format!("{} must have at least two dimensions", describe())));
        }
        if self.dim(-1)? != key.dim(-1)? {
            return Err(Error::shape(NAME, format!("the last dimensions of query and key must be equal: {}", describe())));
        }
        if key.dim(-2)? != value.dim(-2)? {
            return Err(Error::shape(NAME, format!("key and value must have as many rows: {}", describe())));
        }
        Ok(())
    }
}
