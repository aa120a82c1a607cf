//! The cross-entropy of a layer's logits, without ever holding all of them.

use super::Reduction;
use super::classification::{Classes, CrossEntropyOptions, RowLoss, place};
use crate::autocast::{lowered, lowered_option, raises};
use crate::graph::{Ctx, Grads, Op, RecordMode, is_grad_enabled, record, record_mode};
use crate::ops::product::add_product;
use crate::{DType, Device, Error, Result, Shape, Tensor};
use std::sync::Arc;

/// Logits that exist at a time unless the caller says otherwise.
const LOGITS: usize = 1 << 24;

/// Σ wᵢ·(−log softmax(xᵢ·Wᵀ + b) at the target). Its gradients were computed with its value, while there were logits.
struct LinearCrossEntropy {
    x: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
    classes: Arc<Classes>,
    /// The factor of each row, [N, 1].
    factors: Tensor,
    /// Of x, W and b, for a gradient of 1; `None` where none is wanted.
    grads: [Option<Tensor>; 3],
}

impl Op for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let inputs = 2 + usize::from(self.bias.is_some());
        if is_grad_enabled() {
            return self.differentiable(ctx, grad, inputs);
        }
        // As a rule this is the loss itself, and a matrix of the vocabulary's size needs no second copy.
        let is_one = grad.device() == Device::Cpu && grad.item_f64()? == 1.0;
        let scaled = |value: &Tensor| if is_one { Ok(value.clone()) } else { value.mul(&grad.to_dtype(value.dtype())?) };
        let of = |i: usize| self.grads[i].as_ref().filter(|_| ctx.needs(i)).map(scaled).transpose();
        (0..inputs).map(of).collect()
    }
}

impl LinearCrossEntropy {
    /// The gradients as functions of everything, from logits that are all there.
    fn differentiable(&self, ctx: &Ctx, grad: &Tensor, inputs: usize) -> Result<Grads> {
        let Self { x, weight, bias, classes, factors, .. } = self;
        let logits = x.linear(weight, bias.as_ref())?.to_dtype(factors.dtype())?;
        let each = factors.mul(&grad.to_dtype(factors.dtype())?)?;
        let placed = place(&each, classes)?.reshape(logits.shape())?;
        let of_logits = logits.softmax(1)?.mul(&placed.sum_keepdim(1)?)?.sub(&placed)?.to_dtype(x.dtype())?;
        let of_x = ctx.needs(0).then(|| of_logits.matmul(weight));
        let of_weight = ctx.needs(1).then(|| of_logits.t()?.matmul(x));
        let of_bias = ctx.needs(2).then(|| of_logits.sum(0));
        [of_x, of_weight, of_bias].into_iter().take(inputs).map(Option::transpose).collect()
    }
}

/// What a pass over all rows gives, a chunk at a time: the loss, and the gradients of x, W and b that are `wanted`.
fn pass(
    [x, weight]: [&Tensor; 2],
    bias: Option<&Tensor>,
    classes: &Classes,
    factors: &Tensor,
    rows: usize,
    wanted: [bool; 3],
) -> Result<(Tensor, [Option<Tensor>; 3])> {
    let (count, wide) = (x.dim(0)?, factors.dtype());
    let mut loss: Option<Tensor> = None;
    let (mut of_x, mut of_weight, mut of_bias) = (Vec::new(), None, None);
    for start in (0..count).step_by(rows) {
        let own = rows.min(count - start);
        let (x, factors, classes) = (x.narrow(0, start, own)?, factors.narrow(0, start, own)?.contiguous()?, classes.rows(start, own)?);
        let logits = x.linear(weight, bias)?.to_dtype(wide)?;
        let (losses, rule) = RowLoss::of(&logits, &Arc::new(classes))?;
        let sum = losses.mul(&factors)?.sum(())?;
        loss = Some(loss.map_or(Ok(sum.clone()), |loss| loss.add(&sum))?);
        if !wanted.contains(&true) {
            continue;
        }
        let of_logits = rule.fused(&factors)?;
        drop((logits, rule));
        let of_logits = of_logits.to_dtype(x.dtype())?;
        if wanted[0] {
            of_x.push(of_logits.matmul(weight)?);
        }
        if wanted[1] {
            of_weight = Some(add_product(of_weight, &of_logits.t()?, &x, wide)?);
        }
        if wanted[2] {
            let sum = of_logits.to_dtype(wide)?.sum(0)?;
            of_bias = Some(of_bias.map_or(Ok(sum.clone()), |before: Tensor| before.add(&sum))?);
        }
    }
    let loss = loss.map_or_else(|| Tensor::zeros((), wide)?.to_device(x.device()), Ok)?;
    let of_x = if of_x.is_empty() { None } else { Some(Tensor::cat(&of_x, 0)?) };
    let narrow = |grad: Option<Tensor>| grad.map(|grad| grad.to_dtype(x.dtype())).transpose();
    Ok((loss, [of_x, narrow(of_weight)?, narrow(of_bias)?]))
}

impl Tensor {
    /// The cross-entropy of the logits `x·Wᵀ + b` of rows x `[N, C]`, with a weight `[V, C]`, a bias `[V]` and integer classes `[N]`: what
    /// [`linear`](Tensor::linear) and [`cross_entropy_with`](Tensor::cross_entropy_with) give one after the other, up to rounding. Where a
    /// vocabulary is large the logits are most of what training holds; here only those of `rows` rows exist at a time (`None`: 2²⁴ logits, 64 MiB
    /// of f32). The gradients are computed together with the loss, so nothing is computed twice.
    ///
    /// All logits are computed at once if they are so few, for [`Reduction::None`], class weights, label smoothing and f16 (whose gradients need
    /// the scale of the loss).
    ///
    /// Source: Wijmans et al., *Cut Your Losses in Large-Vocabulary Language Models*, 2024, and Hsu et al., *Liger Kernel*, 2024, from whom the
    /// chunks are.
    ///
    /// ```
    /// # use kiln_tensor::{CrossEntropyOptions, Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let (x, w) = (Tensor::randn([6, 8], ())?, Tensor::randn([100, 8], ())?);
    /// let target = Tensor::from_vec(vec![3i64, 1, 4, 1, 5, 99], 6)?;
    /// let loss = x.linear_cross_entropy(&w, None, &target, &CrossEntropyOptions::default(), Some(2))?;
    /// let same = x.linear(&w, None)?.cross_entropy(&target)?;
    /// assert!((loss.item_f64()? - same.item_f64()?).abs() < 1e-5);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of the two, and if `rows` is 0.
    pub fn linear_cross_entropy(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        target: &Tensor,
        options: &CrossEntropyOptions<'_>,
        rows: Option<usize>,
    ) -> Result<Tensor> {
        let op = "linear_cross_entropy";
        let ([count, _], [vocabulary, _]) = (self.dims_n::<2>(op)?, weight.dims_n::<2>(op)?);
        if rows == Some(0) {
            return Err(Error::argument(op, "chunks of 0 rows"));
        }
        let rows = rows.unwrap_or(LOGITS / vocabulary.max(1)).max(1);
        let (x, w, b) = (lowered(self)?, lowered(weight)?, lowered_option(bias)?);
        let is_plain = options.weight.is_none() && options.label_smoothing == 0.0 && options.reduction != Reduction::None;
        let is_wide = matches!(x.dtype(), DType::F32 | DType::F64 | DType::BF16);
        if rows >= count || !is_plain || !is_wide || target.dtype().is_float() {
            return x.linear(&w, b.as_deref())?.cross_entropy_with(target, options);
        }
        // Chunks of about the same size.
        let rows = count.div_ceil(count.div_ceil(rows));
        let wide = x.dtype().accumulator();
        let classes = Arc::new(Classes::new(op, &x, Shape::new(&[count, vocabulary])?, target, options.ignore_index)?);
        let (factors, total) = classes.weights(op, &Tensor::zeros((), wide)?.to_device(x.device())?, None)?;
        let factors = if options.reduction == Reduction::Mean { total.mean(&factors)? } else { factors };
        let inputs: Vec<&Tensor> = [&*x, &*w].into_iter().chain(b.as_deref()).collect();
        let recorded = record_mode() == RecordMode::On;
        let wanted = std::array::from_fn(|i| recorded && inputs.get(i).is_some_and(|input| input.is_tracked()));
        let bare = b.as_deref().map(Tensor::detach);
        let (loss, grads) = pass([&x.detach(), &w.detach()], bare.as_ref(), &classes, &factors, rows, wanted)?;
        let loss = if raises(&x) { loss } else { loss.to_dtype(x.dtype())? };
        record(op, loss, &inputs, |_| LinearCrossEntropy {
            x: x.clone().into_owned(),
            weight: w.clone().into_owned(),
            bias: b.as_deref().cloned(),
            classes,
            factors,
            grads,
        })
    }
}
