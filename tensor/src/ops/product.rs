//! Matrix products: matmul, linear, and the vector products that are one of them.
//!
//! Factors of any strides go to the kernel as they are: a transposed or broadcast factor is never copied, so neither are
//! the transposes in the gradients.

use crate::autocast::{lowered, lowered_option};
use crate::graph::{Ctx, Grads, Op, RecordMode, is_anomaly_mode, record, record_mode};
use crate::profile::{self, operation_with};
use crate::{Activation, DType, Error, Layout, Result, Shape, Tensor, WithDType, broadcast_shapes};
use kiln_kernels::cpu::gemm::{self, Gemm, GemmElement, matmul_precision};
use kiln_kernels::cuda::{Gpu, gemm as gpu_gemm};
use kiln_kernels::view::MatView;

/// dA = dC · Bᵀ and dB = Aᵀ · dC. Each factor is saved only if the other one is tracked.
struct MatMul {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let a = self.b.as_ref().filter(|_| ctx.needs(0)).map(|b| grad.matmul(&b.transpose(-2, -1)?));
        let b = self.a.as_ref().filter(|_| ctx.needs(1)).map(|a| a.transpose(-2, -1)?.matmul(grad));
        Ok(vec![a.transpose()?, b.transpose()?])
    }
}

/// y = x · Wᵀ + bias over rows x: dx = dy · W, dW = dyᵀ · x, d bias = the sum of the rows of dy.
struct Linear {
    x: Option<Tensor>,
    weight: Option<Tensor>,
    has_bias: bool,
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let x = self.weight.as_ref().filter(|_| ctx.needs(0)).map(|weight| grad.matmul(weight));
        let weight = self.x.as_ref().filter(|_| ctx.needs(1)).map(|x| grad.t()?.matmul(x));
        let mut grads = vec![x.transpose()?, weight.transpose()?];
        if self.has_bias {
            grads.push(ctx.needs(2).then(|| grad.sum(0)).transpose()?);
        }
        Ok(grads)
    }
}

/// Where each item of a batch begins: the offsets of a broadcast layout's leading dimensions, in row-major order.
fn batch_offsets(batch: &[usize], strides: &[usize]) -> Vec<usize> {
    let mut offsets = vec![0];
    for (&extent, &stride) in batch.iter().zip(strides) {
        offsets = offsets.iter().flat_map(|&o| (0..extent).map(move |i| o + i * stride)).collect();
    }
    offsets
}

/// A factor as the kernel takes it: the matrix of its last two dimensions, and where each item of `batch` begins.
pub(super) fn factor<'a, T: WithDType>(x: &'a Tensor, batch: &[usize]) -> Result<(MatView<'a, T>, Vec<usize>)> {
    let matrix = &x.dims()[x.rank() - 2..];
    let shape = Shape::new(&[batch, matrix].concat())?;
    let layout = x.layout().broadcast_to("matmul", &shape)?;
    let (batch_strides, strides) = layout.strides().split_at(batch.len());
    let data = x.view_of::<T>()?.data().get(layout.offset()..).unwrap_or(&[]);
    let view = MatView::new(data, matrix[0], matrix[1], strides[0], strides[1]);
    let view = view.ok_or_else(|| Error::shape("matmul", format!("layout {layout:?} leaves its storage")))?;
    Ok((view, batch_offsets(batch, batch_strides)))
}

/// As [`factor`], of a tensor of a GPU.
fn gpu_factor<'a>(x: &'a Tensor, batch: &[usize]) -> Result<(gpu_gemm::Matrix<'a>, Vec<usize>)> {
    let matrix = &x.dims()[x.rank() - 2..];
    let shape = Shape::new(&[batch, matrix].concat())?;
    let layout = x.layout().broadcast_to("matmul", &shape)?;
    let (batch_strides, strides) = layout.strides().split_at(batch.len());
    let view = gpu_gemm::Matrix::new(x.gpu_data()?, matrix[0], matrix[1], strides[0], strides[1]);
    let view = view.ok_or_else(|| Error::shape("matmul", format!("layout {layout:?} leaves its storage")))?;
    Ok((view, batch_offsets(batch, batch_strides)))
}

/// An activation that follows a product.
#[derive(Clone, Copy)]
struct Follows {
    activation: Activation,
    /// Whether what it is computed from is wanted, too.
    keep: bool,
}

/// What a product gives: what the activation was computed from, if it is kept, and the values.
type Results = (Option<Tensor>, Tensor);

fn run_on_gpu(
    gpu: &'static Gpu,
    [a, b]: [&Tensor; 2],
    bias: Option<&Tensor>,
    follows: Option<Follows>,
    batch: &Shape,
    shape: &Shape,
) -> Result<Results> {
    let (n, dtype) = (b.dims()[b.rank() - 1], a.dtype());
    let ((a, a_offsets), (b, b_offsets)) = (gpu_factor(a, batch)?, gpu_factor(b, batch)?);
    let bias = bias.map(Tensor::gpu_slice).transpose()?;
    // The kernel's epilogue rounds once, after the activation: only ReLU has the same values either way.
    let fused = follows.filter(|f| f.activation == Activation::Relu && !f.keep && dtype.is_float());
    let activation = fused.map(|f| f.activation.row().0);
    let gemm = gpu_gemm::Gemm { bias, activation, precision: matmul_precision(), ..gpu_gemm::Gemm::batched(a, &a_offsets, b, &b_offsets) };
    let out = Tensor::build_on_gpu(gpu, Layout::contiguous(*shape), dtype, |mut out| Ok(gemm.run(gpu, &mut out, n)?))?;
    match follows {
        Some(Follows { activation, keep }) if fused.is_none() => {
            let values = activation.of(&out)?;
            Ok((keep.then_some(out), values))
        }
        _ => Ok((None, out)),
    }
}

/// `a · b (+ bias)` of checked factors of at least two dimensions, whose leading dimensions broadcast, and an activation; not recorded.
fn product(op: &'static str, a: &Tensor, b: &Tensor, bias: Option<&Tensor>, follows: Option<Follows>) -> Result<Results> {
    let lead = |x: &Tensor| Shape::new(&x.dims()[..x.rank() - 2]);
    let batch = broadcast_shapes(op, &lead(a)?, &lead(b)?)?;
    let (m, n) = (a.dims()[a.rank() - 2], b.dims()[b.rank() - 1]);
    let shape = Shape::new(&[&batch[..], &[m, n]].concat())?;
    let _running = operation_with(
        op,
        || [Some(a), Some(b), bias].into_iter().flatten().collect(),
        || profile::product(batch.numel(), [m, a.dims()[a.rank() - 1], n]),
    );
    let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
    match a.gpu()? {
        Some(gpu) if a.dtype() != DType::Bool => run_on_gpu(gpu, [a, b], bias.as_ref(), follows, &batch, &shape),
        _ => for_number!(a.dtype(), op, T => run::<T>([a, b], bias.as_ref(), follows, &batch, &shape)),
    }
}

fn run<T: WithDType + GemmElement>(
    [a, b]: [&Tensor; 2],
    bias: Option<&Tensor>,
    follows: Option<Follows>,
    batch: &Shape,
    shape: &Shape,
) -> Result<Results> {
    let device = a.device();
    let ((a, a_offsets), (b, b_offsets)) = (factor::<T>(a, batch)?, factor::<T>(b, batch)?);
    let bias = bias.map(|bias| bias.as_slice::<T>()).transpose()?;
    let n = b.cols();
    let activation = follows.map(|f| f.activation.row()).map(|(row, params)| gemm::Activation::new(row, params));
    if let (Some(follows), Some(false)) = (follows, activation.map(|a: gemm::Activation<T>| a.is_defined())) {
        return Err(Error::unsupported_dtype(follows.activation.row().0.name, T::DTYPE, "a float dtype"));
    }
    let gemm = Gemm { bias, activation, ..Gemm::batched(a, &a_offsets, b, &b_offsets) };
    if follows.is_none_or(|f| !f.keep) {
        return Ok((None, Tensor::build::<T>(device, shape, |out| Ok(gemm.run(out, n)?))?));
    }
    let mut values = None;
    let sums = Tensor::build::<T>(device, shape, |sums| {
        values = Some(Tensor::build::<T>(device, shape, |out| Ok(gemm.run_keeping(sums, out, n)?))?);
        Ok(())
    })?;
    let values = values.ok_or_else(|| Error::graph("linear", "values that were not computed"))?;
    Ok((Some(sums), values))
}

/// `sum + a · b` of two matrices in the dtype `wide` of their sums, in the memory of `sum` where the kernel can; not recorded.
pub(super) fn add_product(sum: Option<Tensor>, a: &Tensor, b: &Tensor, wide: DType) -> Result<Tensor> {
    let Some(mut sum) = sum else { return a.matmul(b)?.to_dtype(wide) };
    if a.dtype() != wide || a.gpu()?.is_some() {
        return sum.add(&a.matmul(b)?.to_dtype(wide)?);
    }
    let _running = operation_with("add_product", || vec![a, b], || profile::product(1, [a.dims()[0], a.dims()[1], b.dims()[1]]));
    let batch = Shape::new(&[])?;
    for_float!(wide, "add_product", T => {
        let ((a, a_offsets), (b, b_offsets)) = (factor::<T>(a, &batch)?, factor::<T>(b, &batch)?);
        Gemm { accumulate: true, ..Gemm::batched(a, &a_offsets, b, &b_offsets) }.run(sum.as_slice_mut()?, b.cols())?;
        Ok(sum)
    })
}

/// The error for inner extents that differ, with the usual remedy if it would help.
fn inner_mismatch(op: &str, a: &Tensor, b: &Tensor) -> Error {
    let (a_dims, b_dims) = (a.dims(), b.dims());
    let (Some(&k), Some(&last)) = (a_dims.last(), b_dims.last()) else {
        return Error::shape(op, "the operands must have at least one dimension; multiply by a scalar with .mul(..)");
    };
    let hint = match (b_dims.len(), k == last) {
        (2, true) => "; did you mean .t()?",
        (3.., true) => "; did you mean .transpose(-2, -1)?",
        _ => "",
    };
    let which = if b_dims.len() == 1 { "the extent" } else { "the second to last" };
    Error::shape(op, format!("last dimension of {} must equal {which} of {}{hint}", a.shape(), b.shape()))
}

impl Tensor {
    /// The matrix product, by PyTorch's rules for shapes:
    ///
    /// - `[.., m, k]` times `[.., k, n]` is `[.., m, n]`; the leading dimensions broadcast;
    /// - a vector `[k]` on the left is a row, on the right a column, which the result lacks again: two vectors give a scalar.
    ///
    /// Defined for all dtypes but bool. f16 and bf16 sum in f32 and round once; integers wrap around.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let a = Tensor::from_vec(vec![1f32, 2., 3., 4.], [2, 2])?;
    /// assert_eq!(a.matmul(&a.t()?)?.to_vec::<f32>()?, [5., 11., 11., 25.]);
    /// # Ok(()) }
    /// ```
    pub fn matmul(&self, other: &Tensor) -> Result<Tensor> {
        lowered(self)?.matmul_of_one_dtype(&*lowered(other)?)
    }

    fn matmul_of_one_dtype(&self, other: &Tensor) -> Result<Tensor> {
        self.expect_same("matmul", other)?;
        let (a_rank, b_rank) = (self.rank(), other.rank());
        let inner = if b_rank > 0 { other.dims()[b_rank.saturating_sub(2)] } else { 0 };
        if a_rank == 0 || b_rank == 0 || self.dims()[a_rank - 1] != inner {
            return Err(inner_mismatch("matmul", self, other));
        }
        if a_rank == 1 {
            return self.unsqueeze(0)?.matmul(other)?.squeeze(if b_rank == 1 { 0 } else { -2 });
        }
        if b_rank == 1 {
            return self.matmul(&other.unsqueeze(-1)?)?.squeeze(-1);
        }
        if a_rank > 2 && b_rank == 2 {
            // One tall matrix: its gradient for the right factor sums over the batch inside the product.
            let (rows, k) = (self.numel().checked_div(inner).unwrap_or(0), inner);
            let shape = [&self.dims()[..a_rank - 1], &other.dims()[1..]].concat();
            if k > 0 {
                return self.reshape([rows, k])?.matmul(other)?.reshape(shape);
            }
        }
        let (_, out) = product("matmul", &self.detach(), &other.detach(), None, None)?;
        record("matmul", out, &[self, other], |needs| MatMul { a: needs.save_for(1, self), b: needs.save_for(0, other) })
    }

    /// The affine map of a layer: `x · weightᵀ + bias` for x `[.., in]`, weight `[out, in]`, bias `[out]`; the result is `[.., out]`.
    pub fn linear(&self, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        lowered(self)?.linear_of_one_dtype(&*lowered(weight)?, lowered_option(bias)?.as_deref(), None)
    }

    /// [`linear`](Tensor::linear) and an activation of the result, in one pass over it: bit for bit what the two give one after the other.
    ///
    /// For a backward pass the same pass also keeps what the activation was computed from (not for ReLU, whose derivative its values tell):
    /// writing that once costs less than computing it again, a product of the same size, or than the pass that would read it.
    ///
    /// ```
    /// # use kiln_tensor::{Activation, Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let (x, w, b) = (Tensor::randn([4, 8], ())?, Tensor::randn([16, 8], ())?, Tensor::randn(16, ())?);
    /// let y = x.linear_activation(&w, Some(&b), Activation::Gelu)?;
    /// assert_eq!(y.to_vec::<f32>()?, x.linear(&w, Some(&b))?.gelu()?.to_vec::<f32>()?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of `linear`, and if the activation is not defined for the dtype.
    pub fn linear_activation(&self, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        if is_anomaly_mode() {
            // Where each operation's values are looked at, there must be those of both.
            return self.linear(weight, bias)?.activate(activation);
        }
        lowered(self)?.linear_of_one_dtype(&*lowered(weight)?, lowered_option(bias)?.as_deref(), Some(activation))
    }

    fn linear_of_one_dtype(&self, weight: &Tensor, bias: Option<&Tensor>, activation: Option<Activation>) -> Result<Tensor> {
        self.expect_same("linear", weight)?;
        let [out, k] = weight.dims_n::<2>("linear")?;
        if self.dims().last() != Some(&k) {
            let hint = if self.dims().last() == Some(&out) { "; a weight is [out, in]: did you mean .t()?" } else { "" };
            let message = format!("last dimension of {} must equal the last of the weight {}{hint}", self.shape(), weight.shape());
            return Err(Error::shape("linear", message));
        }
        if let Some(bias) = bias {
            self.expect_same("linear", bias)?;
            if bias.dims() != [out] {
                return Err(Error::shape(
                    "linear",
                    format!("the bias {} must be as long as the weight {} has rows", bias.shape(), weight.shape()),
                ));
            }
        }
        let lead = &self.dims()[..self.rank() - 1];
        let x = self.reshape([lead.iter().product(), k])?;
        let inputs: Vec<&Tensor> = [&x, weight].into_iter().chain(bias).collect();
        let recorded = record_mode() == RecordMode::On && inputs.iter().any(|x| x.is_tracked());
        let follows = activation.map(|activation| Follows { activation, keep: recorded && activation.reads_input() });
        let (sums, y) = product("linear", &x.detach(), &weight.detach().t()?, bias, follows)?;
        // The graph is that of two operations. If the first one's values were not kept, nothing reads them.
        let y_linear = record("linear", sums.unwrap_or_else(|| y.clone()), &inputs, |needs| Linear {
            x: needs.save_for(1, &x),
            weight: needs.save_for(0, weight),
            has_bias: bias.is_some(),
        })?;
        let y = activation.map_or_else(|| Ok(y_linear.clone()), |activation| activation.record(y, &y_linear))?;
        y.reshape([lead, &[out]].concat())
    }

    /// The product of each pair of matrices: `[b, m, k]` times `[b, k, n]` is `[b, m, n]`; nothing broadcasts.
    pub fn bmm(&self, other: &Tensor) -> Result<Tensor> {
        let ([b, ..], [b2, ..]) = (self.dims_n::<3>("bmm")?, other.dims_n::<3>("bmm")?);
        if b != b2 {
            return Err(Error::shape("bmm", format!("batches of {} and {} differ; matmul broadcasts", self.shape(), other.shape())));
        }
        self.matmul(other)
    }

    /// A matrix `[m, k]` times a vector `[k]`.
    pub fn mv(&self, vector: &Tensor) -> Result<Tensor> {
        self.dims_n::<2>("mv")?;
        vector.dims_n::<1>("mv")?;
        self.matmul(vector)
    }

    /// The inner product of two vectors of one length: a scalar.
    pub fn dot(&self, other: &Tensor) -> Result<Tensor> {
        self.dims_n::<1>("dot")?;
        other.dims_n::<1>("dot")?;
        self.matmul(other)
    }

    /// The outer product of two vectors: `[m]` and `[n]` give `[m, n]`, every product of an element of each.
    pub fn outer(&self, other: &Tensor) -> Result<Tensor> {
        self.dims_n::<1>("outer")?;
        other.dims_n::<1>("outer")?;
        self.unsqueeze(-1)?.mul(&other.unsqueeze(0)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_to_do() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32).unwrap();
        let message = |r: Result<Tensor>| r.unwrap_err().to_string();
        assert_eq!(
            message(zeros(&[32, 784]).matmul(&zeros(&[512, 784]))),
            "matmul: last dimension of [32, 784] must equal the second to last of [512, 784]; did you mean .t()?"
        );
        assert!(message(zeros(&[2, 3]).matmul(&zeros(&[4]))).ends_with("last dimension of [2, 3] must equal the extent of [4]"));
        assert!(message(zeros(&[2, 3, 4]).matmul(&zeros(&[3, 4, 5]))).contains("do not broadcast"));
        assert!(message(zeros(&[]).matmul(&zeros(&[4]))).contains("at least one dimension"));
        assert!(message(zeros(&[2, 5]).linear(&zeros(&[5, 3]), None)).contains("a weight is [out, in]"));
        assert!(message(zeros(&[2, 5]).linear(&zeros(&[3, 5]), Some(&zeros(&[5])))).contains("bias"));
        assert!(zeros(&[]).linear(&zeros(&[3, 5]), None).is_err());
        assert!(zeros(&[2, 2, 2]).bmm(&zeros(&[3, 2, 2])).is_err());
        assert!(zeros(&[2, 2]).matmul(&Tensor::zeros([2, 2], DType::F64).unwrap()).is_err());
        let bools = Tensor::zeros([2, 2], DType::Bool).unwrap();
        assert!(message(bools.matmul(&bools)).contains("not defined for bool"));
    }

    #[test]
    fn empty_extents_give_empty_or_zero_results() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32).unwrap();
        for (a, b, c) in [
            (&[2, 0][..], &[0, 3][..], &[2, 3][..]),
            (&[0, 4], &[4, 3], &[0, 3]),
            (&[5, 2, 0], &[0, 3], &[5, 2, 3]),
            (&[0, 2, 4], &[4, 3], &[0, 2, 3]),
            (&[0], &[0], &[]),
        ] {
            let out = zeros(a).matmul(&zeros(b)).unwrap();
            assert_eq!(out.dims(), c);
            assert!(out.to_vec::<f32>().unwrap().iter().all(|&x| x == 0.0));
        }
        assert_eq!(zeros(&[2, 0]).linear(&zeros(&[3, 0]), Some(&zeros(&[3]))).unwrap().dims(), [2, 3]);
    }
}
