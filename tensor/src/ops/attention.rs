//! Attention: a fused kernel in both directions, and the same composed of products and a softmax. The composed form gives second
//! derivatives, and serves what the kernel does not: f64, a tracked mask, keys of no width, on a GPU a single query.

use super::product::factor;
use super::random::{dropped, stream};
use crate::autocast::lowered;
use crate::graph::{Ctx, Grads, Op, is_grad_enabled, record};
use crate::profile::{self, Cost, operation};
use crate::{Bool, DType, Error, ErrorKind, Generator, Result, Shape, Tensor, WithDType, bf16, broadcast_shapes, f16};
use std::borrow::Cow;

use kiln_kernels::cpu::attention::{self, Attended, Attention, Gradients, Heads, Mask};
use kiln_kernels::cpu::random::{self, Dropout};
use kiln_kernels::cuda::{Gpu, attention as gpu_attention};

/// What [`scaled_dot_product_attention`](Tensor::scaled_dot_product_attention) takes besides query, key and value.
#[derive(Clone, Copy, Default)]
pub struct AttentionOptions<'a> {
    /// Broadcasts to `[.., L, S]`. Of bools: true where a query may look at a key; of floats: added to the scores.
    pub mask: Option<&'a Tensor>,
    /// Query i looks at the keys 0 to i only, however many queries and keys there are: PyTorch's `is_causal`. (Queries that continue the
    /// keys, as in decoding, need a mask: `j <= i + S - L`.) Together with a mask, both must allow a key.
    pub causal: bool,
    /// Factor of the scores; 1/√E if `None`.
    pub scale: Option<f64>,
    /// Grouped queries: the heads (dimension -3) of the query may be a multiple of those of key and value, whose every head then
    /// serves as many neighbouring heads of the query.
    pub enable_gqa: bool,
    /// Each weight, after the softmax, is zeroed with this probability, in [0, 1), and multiplied by `1 / (1 − p)` otherwise. No mask is
    /// stored: it is the one that [`Tensor::dropout`] of the weights `[.., L, S]` would draw from the same place of the generator, and the
    /// backward pass draws it again. 0 (in evaluation) draws nothing.
    pub dropout_p: f64,
    /// What dropout draws from; [`Generator::global`] if `None`.
    pub generator: Option<&'a Generator>,
}

const NAME: &str = "scaled_dot_product_attention";
const BACKWARD: &str = "scaled_dot_product_attention_backward";

/// `[L, S]`, true up to the diagonal.
fn causal_mask(queries: usize, keys: usize) -> Result<Tensor> {
    Tensor::from_vec((0..queries).flat_map(|i| (0..keys).map(move |j| j <= i)).collect::<Vec<bool>>(), [queries, keys])
}

/// Which keys each query may look at; `None` if all.
fn allowed(mask: Option<&Tensor>, causal: bool, queries: usize, keys: usize) -> Result<Option<Tensor>> {
    let causal = if causal { Some(causal_mask(queries, keys)?) } else { None };
    let mask = match mask {
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

/// The arguments, checked: what both forms start from, and what the fused one's rule keeps.
#[derive(Clone)]
struct Problem {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Option<Tensor>,
    causal: bool,
    scale: f64,
    dropout: Option<Dropout>,
    queries: usize,
    keys: usize,
    /// The leading dimensions of the result, and of keys and values: the same, but for the number of heads of grouped queries.
    batch: Shape,
    key_batch: Shape,
}

impl Problem {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>) -> Result<Self> {
        let (queries, width, keys) = (q.dim(-2)?, q.dim(-1)?, k.dim(-2)?);
        let lead = |x: &Tensor| Shape::new(&x.dims()[..x.rank() - 2]);
        let mut key_batch = broadcast_shapes(NAME, &lead(k)?, &lead(v)?)?;
        let mut batch = lead(q)?;
        match (options.enable_gqa, batch.split_last(), key_batch.split_last()) {
            (true, Some((&heads, before)), Some((&key_heads, key_before))) => {
                if key_heads == 0 || !heads.is_multiple_of(key_heads) {
                    return Err(Error::shape(NAME, format!("{heads} heads of the query are no multiple of the {key_heads} of the key")));
                }
                let before = broadcast_shapes(NAME, &Shape::new(before)?, &Shape::new(key_before)?)?;
                (batch, key_batch) = (Shape::new(&[&before[..], &[heads]].concat())?, Shape::new(&[&before[..], &[key_heads]].concat())?);
            }
            (true, ..) => return Err(Error::shape(NAME, "grouped queries need a dimension of heads before the last two")),
            (false, ..) => {
                batch = broadcast_shapes(NAME, &batch, &key_batch)?;
                key_batch = batch;
            }
        }
        if let Some(mask) = options.mask {
            if mask.dtype() != DType::Bool && mask.dtype() != q.dtype() {
                let message = format!("the mask is {}; expected bool (true: look) or the query's {} (added)", mask.dtype(), q.dtype());
                return Err(Error::new(ErrorKind::DType, NAME, message));
            }
            mask.layout().broadcast_to(NAME, &Shape::new(&[&batch[..], &[queries, keys]].concat())?)?;
        }
        let dropout = if options.dropout_p > 0.0 {
            let weights = Shape::new(&[&batch[..], &[queries, keys]].concat())?;
            let groups = random::groups_of_words(weights.numel());
            let state = options.generator.unwrap_or(Generator::global()).counters(NAME, groups)?;
            Some(Dropout { stream: stream(state), p: options.dropout_p })
        } else {
            None
        };
        Ok(Self {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            mask: options.mask.cloned(),
            causal: options.causal,
            // Scaling the queries touches L × E elements, scaling the scores L × S.
            scale: options.scale.unwrap_or(1.0 / (width as f64).sqrt()),
            dropout,
            queries,
            keys,
            batch,
            key_batch,
        })
    }

    /// Keys or values with a head for each of the query's.
    fn for_each_query_head(&self, x: &Tensor) -> Result<Tensor> {
        let (Some(&heads), Some(&key_heads)) = (self.batch.last(), self.key_batch.last()) else { return Ok(x.clone()) };
        if heads == key_heads {
            return Ok(x.clone());
        }
        let matrix = &x.dims()[x.rank() - 2..];
        let (before, group) = (&self.batch[..self.batch.rank() - 1], heads / key_heads);
        let x = x.expand([&self.key_batch[..], matrix].concat())?.unsqueeze(-3)?;
        x.expand([before, &[key_heads, group], matrix].concat())?.reshape([&self.batch[..], matrix].concat())
    }

    /// The sum of the gradients of a key head's copies.
    fn for_each_key_head(&self, grad: Tensor) -> Result<Tensor> {
        let (Some(&heads), Some(&key_heads)) = (self.batch.last(), self.key_batch.last()) else { return Ok(grad) };
        if heads == key_heads {
            return Ok(grad);
        }
        let matrix = &grad.dims()[grad.rank() - 2..];
        let apart = [&self.key_batch[..], &[heads / key_heads], matrix].concat();
        grad.reshape(apart)?.sum(-3)
    }

    /// The weights, `[.., L, S]`, in differentiable operations, for keys of as many heads as the queries.
    fn weights(&self, k: &Tensor) -> Result<Tensor> {
        let mut scores = self.q.mul_scalar(self.scale)?.matmul(&k.transpose(-2, -1)?)?;
        if let Some(mask) = self.mask.as_ref().filter(|mask| mask.dtype() != DType::Bool) {
            // Shut keys are filled below: an infinity in the sum would make the gradient of a shut row NaN.
            let finite = mask.masked_fill(&mask.detach().eq_scalar(f64::NEG_INFINITY)?, 0.0)?;
            scores = scores.add(&finite)?;
        }
        let Some(allowed) = allowed(self.mask.as_ref(), self.causal, self.queries, self.keys)? else {
            return scores.softmax(-1);
        };
        let open = allowed.expand(broadcast_shapes(NAME, allowed.shape(), &Shape::new(&[self.queries, self.keys])?)?)?;
        // A row without any key is computed over all of them and then cleared, so that no 0/0 enters it or its gradient.
        let shut_rows = open.to_dtype(DType::I64)?.sum_keepdim(-1)?.eq_scalar(0.0)?;
        let shut_keys = open.logical_or(&shut_rows)?.logical_not()?;
        scores.masked_fill(&shut_keys, f64::NEG_INFINITY)?.softmax(-1)?.masked_fill(&shut_rows, 0.0)
    }

    /// Dropout of the weights, or of what has their places.
    fn dropped(&self, weights: &Tensor) -> Result<Tensor> {
        let Some(Dropout { stream, p }) = self.dropout else { return Ok(weights.clone()) };
        // Each copy has a mask of its own.
        dropped(&weights.expand([&self.batch[..], &[self.queries, self.keys]].concat())?, stream, p)
    }

    fn composed(&self) -> Result<Tensor> {
        let weights = self.weights(&self.for_each_query_head(&self.k)?)?;
        self.dropped(&weights)?.matmul(&self.for_each_query_head(&self.v)?)
    }

    /// The gradients in differentiable operations: with P the weights and D dropout, dV = D(P)ᵀ·g, dS = P∘(D(g·Vᵀ) − Σ P∘D(g·Vᵀ)),
    /// dQ = scale · dS·K and dK = scale · dSᵀ·Q.
    fn composed_gradients(&self, grad: &Tensor) -> Result<[Tensor; 3]> {
        let (k, v) = (self.for_each_query_head(&self.k)?, self.for_each_query_head(&self.v)?);
        let weights = self.weights(&k)?;
        let d_weights = self.dropped(&grad.matmul(&v.transpose(-2, -1)?)?)?;
        let along = weights.mul(&d_weights)?.sum_keepdim(-1)?;
        let d_scores = weights.mul(&d_weights.sub(&along)?)?.mul_scalar(self.scale)?;
        let dk = d_scores.transpose(-2, -1)?.matmul(&self.q)?;
        let dv = self.dropped(&weights)?.transpose(-2, -1)?.matmul(grad)?;
        Ok([d_scores.matmul(&k)?, self.for_each_key_head(dk)?, self.for_each_key_head(dv)?])
    }

    /// Calls `f` with the inputs as the kernel takes them.
    fn with_kernel_inputs<T: WithDType + Attended, R>(&self, f: impl FnOnce(&Attention<'_, T>) -> Result<R>) -> Result<R> {
        let ((q, q_at), (k, k_at)) = (factor::<T>(&self.q, &self.batch)?, factor::<T>(&self.k, &self.key_batch)?);
        let (v, v_at) = factor::<T>(&self.v, &self.key_batch)?;
        let mask = self.mask.as_ref().map(|mask| mask.expand([&self.batch[..], &[self.queries, self.keys]].concat())).transpose()?;
        let mask = match &mask {
            None => None,
            Some(mask) if mask.dtype() == DType::Bool => Some((Some(factor::<Bool>(mask, &self.batch)?), None)),
            Some(mask) => Some((None, Some(factor::<T>(mask, &self.batch)?))),
        };
        let mask = mask.as_ref().and_then(|(open, bias)| match (open, bias) {
            (Some((view, offsets)), _) => Some(Mask::Open(Heads { view: *view, offsets })),
            (_, Some((view, offsets))) => Some(Mask::Bias(Heads { view: *view, offsets })),
            _ => None,
        });
        f(&Attention {
            q: Heads { view: q, offsets: &q_at },
            k: Heads { view: k, offsets: &k_at },
            v: Heads { view: v, offsets: &v_at },
            mask,
            causal: self.causal,
            scale: self.scale as f32,
            dropout: self.dropout,
        })
    }

    /// Calls `f` with the inputs as a GPU's kernel takes them.
    fn with_gpu_inputs<R>(&self, f: impl FnOnce(&gpu_attention::Attention<'_>) -> Result<R>) -> Result<R> {
        let broadcast =
            |x: &Tensor, batch: &Shape| x.layout().broadcast_to(NAME, &Shape::new(&[&batch[..], &x.dims()[x.rank() - 2..]].concat())?);
        let (q, k, v) = (broadcast(&self.q, &self.batch)?, broadcast(&self.k, &self.key_batch)?, broadcast(&self.v, &self.key_batch)?);
        let mask = self.mask.as_ref().map(|mask| mask.expand([&self.batch[..], &[self.queries, self.keys]].concat())).transpose()?;
        let mask = match &mask {
            None => None,
            Some(mask) if mask.dtype() == DType::Bool => Some(gpu_attention::Mask::Open(mask.gpu_view()?)),
            Some(mask) => Some(gpu_attention::Mask::Bias(mask.gpu_view()?)),
        };
        let (q, k, v) = (self.q.gpu_view_as(&q)?, self.k.gpu_view_as(&k)?, self.v.gpu_view_as(&v)?);
        f(&gpu_attention::Attention { q, k, v, mask, causal: self.causal, scale: self.scale, dropout: self.dropout })
    }

    /// Pairs of a query and a key that see each other, as far as `causal` decides it.
    fn pairs(&self) -> usize {
        if self.causal { (1..=self.queries).map(|i| i.min(self.keys)).sum() } else { self.queries * self.keys }
    }

    /// The products of scores and values, as many as named, in all heads.
    fn cost(&self, of_scores: usize, of_values: usize) -> Cost {
        let width = |x: &Tensor| x.dims().last().copied().unwrap_or(0);
        profile::attention(self.batch.numel(), self.pairs(), of_scores * width(&self.q) + of_values * width(&self.v))
    }

    fn fused_on_gpu(mut self, gpu: &'static Gpu) -> Result<Tensor> {
        let _running = operation(NAME, &[&self.q, &self.k, &self.v], || self.cost(1, 1));
        self.mask = self.mask.map(|mask| mask.detach());
        let shape = Shape::new(&[&self.batch[..], &[self.queries, self.v.dim(-1)?]].concat())?;
        let mut lse = Tensor::stale_on_gpu(gpu, Shape::new(&[self.batch.numel() * self.queries])?, DType::F32)?;
        let mut out = Tensor::stale_on_gpu(gpu, shape, self.q.dtype())?;
        let (o, l) = (out.gpu_slice_mut()?, lse.gpu_slice_mut()?);
        self.with_gpu_inputs(|inputs| Ok(gpu_attention::forward(gpu, inputs, o, l)?))?;
        self.record_fused(out, lse)
    }

    fn fused<T: WithDType + Attended>(mut self) -> Result<Tensor> {
        let _running = operation(NAME, &[&self.q, &self.k, &self.v], || self.cost(1, 1));
        self.mask = self.mask.map(|mask| mask.detach());
        let mut lse = Tensor::zeros([self.batch.numel() * self.queries, 2], DType::F32)?;
        let shape = Shape::new(&[&self.batch[..], &[self.queries, self.v.dim(-1)?]].concat())?;
        let out = Tensor::build::<T>(self.q.device(), &shape, |out| {
            let lse = lse.as_slice_mut::<f32>()?.as_chunks_mut().0;
            self.with_kernel_inputs(|inputs| Ok(attention::forward::<T>(inputs, out, lse)?))
        })?;
        self.record_fused(out, lse)
    }

    fn record_fused(self, out: Tensor, lse: Tensor) -> Result<Tensor> {
        let (q, k, v) = (self.q.clone(), self.k.clone(), self.v.clone());
        let output = out.clone();
        record(NAME, out, &[&q, &k, &v], |_| Fused { problem: self, output, lse })
    }
}

/// The rule of the kernel; its reference is [`Problem::composed_gradients`].
struct Fused {
    problem: Problem,
    output: Tensor,
    lse: Tensor,
}

impl Op for Fused {
    fn name(&self) -> &'static str {
        NAME
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let gradients = match (self.output.dtype(), grad.gpu()?) {
            _ if is_grad_enabled() => self.problem.composed_gradients(grad),
            (_, Some(gpu)) => self.gpu_kernel(gpu, grad),
            (DType::F16, _) => self.kernel::<f16>(grad),
            (DType::BF16, _) => self.kernel::<bf16>(grad),
            _ => self.kernel::<f32>(grad),
        };
        Ok(gradients?.map(Some).into())
    }
}

impl Fused {
    fn gpu_kernel(&self, gpu: &'static Gpu, grad: &Tensor) -> Result<[Tensor; 3]> {
        let Problem { q, k, v, batch, key_batch, .. } = &self.problem;
        let _running = operation(BACKWARD, &[q, k, v, &self.output, grad], || self.problem.cost(3, 2));
        let grad = grad.detach().contiguous()?;
        let like = |batch: &Shape, x: &Tensor| {
            Tensor::stale_on_gpu(gpu, Shape::new(&[&batch[..], &x.dims()[x.rank() - 2..]].concat())?, x.dtype())
        };
        let (mut dq, mut dk, mut dv) = (like(batch, q)?, like(key_batch, k)?, like(key_batch, v)?);
        let given = gpu_attention::Gradients { out: self.output.gpu_slice()?, grad: grad.gpu_slice()?, lse: self.lse.gpu_slice()? };
        let (a, b, c) = (dq.gpu_slice_mut()?, dk.gpu_slice_mut()?, dv.gpu_slice_mut()?);
        self.problem.with_gpu_inputs(|inputs| Ok(gpu_attention::backward(gpu, inputs, given, a, b, c)?))?;
        Ok([dq, dk, dv])
    }

    fn kernel<T: WithDType + Attended>(&self, grad: &Tensor) -> Result<[Tensor; 3]> {
        let Problem { q, k, v, batch, key_batch, .. } = &self.problem;
        let _running = operation(BACKWARD, &[q, k, v, &self.output, grad], || self.problem.cost(3, 2));
        let grad = grad.detach().contiguous()?;
        let shape = |batch: &Shape, x: &Tensor| Shape::new(&[&batch[..], &x.dims()[x.rank() - 2..]].concat());
        let (mut dk, mut dv) = (Tensor::zeros(shape(key_batch, k)?, T::DTYPE)?, Tensor::zeros(shape(key_batch, v)?, T::DTYPE)?);
        let dq = Tensor::build::<T>(q.device(), &shape(batch, q)?, |dq| {
            let given =
                Gradients { out: self.output.as_slice::<T>()?, grad: grad.as_slice()?, lse: self.lse.as_slice::<f32>()?.as_chunks().0 };
            let (dk, dv) = (dk.as_slice_mut()?, dv.as_slice_mut()?);
            self.problem.with_kernel_inputs(|inputs| Ok(attention::backward::<T>(inputs, given, dq, dk, dv)?))
        })?;
        Ok([dq, dk, dv])
    }
}

impl Tensor {
    /// Attention of queries `[.., L, E]` (this tensor) over keys `[.., S, E]` and values `[.., S, V]`:
    /// `dropout(softmax(scale · Q · Kᵀ + mask)) · V`, of shape `[.., L, V]`. Leading dimensions (batch, heads) broadcast.
    /// A query that may look at no key gives zeros, as in PyTorch, and sends no gradient. The matrix of scores is not kept: memory
    /// grows with L and S, not with L × S (but for f64, a tracked mask, and second derivatives).
    ///
    /// Source: Vaswani et al., *Attention Is All You Need*, 2017, equation 1.
    pub fn scaled_dot_product_attention(&self, key: &Tensor, value: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
        let (query, key, value) = (lowered(self)?, lowered(key)?, lowered(value)?);
        let mask = options.mask.map(|mask| if mask.dtype().is_float() { lowered(mask) } else { Ok(Cow::Borrowed(mask)) }).transpose()?;
        query.attention_of_one_dtype(&key, &value, &AttentionOptions { mask: mask.as_deref(), ..*options })
    }

    fn attention_of_one_dtype(&self, key: &Tensor, value: &Tensor, options: &AttentionOptions<'_>) -> Result<Tensor> {
        self.check_attention(key, value)?;
        if !(0.0..1.0).contains(&options.dropout_p) {
            return Err(Error::argument(NAME, format!("dropout_p = {} is outside of [0, 1)", options.dropout_p)));
        }
        let problem = Problem::new(self, key, value, options)?;
        let fits_gpu = self.dim(-1)?.max(value.dim(-1)?) <= gpu_attention::MAX_WIDTH;
        match self.dtype() {
            _ if self.dim(-1)? == 0 => problem.composed(),
            _ if options.mask.is_some_and(|mask| mask.is_tracked() && is_grad_enabled()) => problem.composed(),
            DType::F64 => problem.composed(),
            dtype => match (self.gpu()?, dtype) {
                (Some(gpu), _) if fits_gpu && problem.queries > 1 => problem.fused_on_gpu(gpu),
                (Some(_), _) => problem.composed(),
                (None, DType::F16) => problem.fused::<f16>(),
                (None, DType::BF16) => problem.fused::<bf16>(),
                (None, _) => problem.fused::<f32>(),
            },
        }
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
