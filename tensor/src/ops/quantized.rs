//! Products with weights that are kept in 8, 6 or 4 bits ([`QuantizedMatrix`]): decoding at the bandwidth of what is stored, adapters over
//! frozen weights (QLoRA), and the blocks of GGUF files.
//!
//! The matrix itself is a constant: gradients flow to the input and the bias. Its bytes stay on the host. For a tensor of a GPU the weights
//! are dequantised and copied there at each call: right, and slow.

use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation, operation_with};
use crate::{DType, Device, Error, Result, Shape, Tensor, WithDType};
use kiln_kernels::cpu::index::check_indices;
use kiln_kernels::cpu::quantized::{self as kernel, Blocks, Input};
use std::fmt;
use std::sync::Arc;

pub use kiln_kernels::cpu::quantized::Quantization;

/// The first bytes of [`QuantizedMatrix::to_tensor`].
const MAGIC: [u8; 4] = *b"KQM1";

/// Bytes before the codes in [`QuantizedMatrix::to_tensor`]: the magic, the form, its group, rows and columns, padded to a cache line.
const HEADER: usize = 64;

/// A constant matrix `[rows, cols]`, outputs by inputs as the weight of a layer, whose values are stored in 4 to 9 bits.
///
/// Cheap to clone: clones share the bytes.
///
/// ```
/// # use kiln_tensor::{DType, Quantization, QuantizedMatrix, Result, Tensor};
/// # fn main() -> Result<()> {
/// let (weight, x) = (Tensor::randn([6, 256], ())?, Tensor::randn([2, 256], ())?);
/// let quantized = QuantizedMatrix::quantize(&weight, Quantization::Int8 { group: 64 })?;
/// let (y, exact) = (quantized.linear(&x, None)?, x.linear(&weight, None)?);
/// assert!(y.sub(&exact)?.abs()?.max(())?.item::<f32>()? < 0.5);
/// assert!(quantized.nbytes() < weight.numel() * 4 / 3);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct QuantizedMatrix(Arc<Inner>);

struct Inner {
    kind: Quantization,
    shape: Shape,
    rows: usize,
    cols: usize,
    /// All of it, u8 on the host.
    bytes: Tensor,
}

impl fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QuantizedMatrix({}, {})", self.shape(), self.kind())
    }
}

/// y = x · Wᵀ + bias: dx = dy · W, d bias = the sum of the rows of dy.
struct QuantizedLinear {
    weight: QuantizedMatrix,
    has_bias: bool,
}

impl Op for QuantizedLinear {
    fn name(&self) -> &'static str {
        "quantized_linear"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let mut grads = vec![ctx.needs(0).then(|| self.weight.transposed_rows(grad)).transpose()?];
        if self.has_bias {
            grads.push(ctx.needs(1).then(|| grad.sum(0)).transpose()?);
        }
        Ok(grads)
    }
}

/// y = x · W: dx = dy · Wᵀ.
struct QuantizedTransposed {
    weight: QuantizedMatrix,
}

impl Op for QuantizedTransposed {
    fn name(&self) -> &'static str {
        "quantized_linear_transposed"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(self.weight.linear_rows(grad, None)?)])
    }
}

/// The last dimension is summed over: the others as one.
fn as_rows(op: &str, x: &Tensor, cols: usize, what: &str, shape: &Shape) -> Result<Tensor> {
    if x.dims().last() != Some(&cols) {
        return Err(Error::shape(op, format!("last dimension of {} must equal the {what} of the weight {shape}", x.shape())));
    }
    x.reshape([x.dims()[..x.rank() - 1].iter().product(), cols])
}

impl QuantizedMatrix {
    /// Quantises a float matrix `[rows, cols]` to [`Quantization::Int8`] or [`Quantization::Int4`].
    ///
    /// Of int4, each group's scale and minimum are those of least squared error among several spans, so that an outlier does not cost the
    /// others their resolution.
    ///
    /// # Errors
    /// If `weight` is no float matrix or holds a value that is not finite, or the form is one of ggml's, which are only read.
    pub fn quantize(weight: &Tensor, kind: Quantization) -> Result<Self> {
        let op = "quantize";
        if !matches!(kind, Quantization::Int8 { .. } | Quantization::Int4 { .. }) {
            return Err(Error::argument(op, format!("{kind} is only read from files; quantise to int8 or int4")));
        }
        if !weight.dtype().is_float() {
            return Err(Error::unsupported_dtype(op, weight.dtype(), "a float dtype"));
        }
        let [rows, cols] = weight.dims_n(op)?;
        let _running = operation(op, &[weight], || Cost::NONE);
        let weight = weight.detach().to_device(Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        Self::build(op, kind, rows, cols, |out| {
            kernel::quantize(kind, rows, cols, weight.as_slice()?, out).map_err(|e| Error::argument(op, e.to_string()).with_source(e))
        })
    }

    /// The matrix whose bytes are given: blocks of ggml, row by row, or what [`as_bytes`](Self::as_bytes) gave.
    ///
    /// # Errors
    /// If the form cannot have so many columns, or the bytes are not as many as it takes.
    pub fn from_blocks(kind: Quantization, rows: usize, cols: usize, bytes: &[u8]) -> Result<Self> {
        let op = "from_blocks";
        if kind.refuses(cols).is_none() && kind.nbytes(rows, cols) != Some(bytes.len()) {
            return Err(Error::format(op, format!("[{rows}, {cols}] weights in {kind} are not {} bytes", bytes.len())));
        }
        let _running = operation(op, &[], || Cost::NONE);
        Self::build(op, kind, rows, cols, |out| {
            out.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// A matrix whose bytes `fill` writes; memory is taken only for extents that the form can have.
    fn build(op: &str, kind: Quantization, rows: usize, cols: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Self> {
        if let Some(reason) = kind.refuses(cols) {
            return Err(Error::argument(op, reason));
        }
        let shape = Shape::new(&[rows, cols])?;
        let overflow = || Error::shape(op, format!("{shape} weights in {kind} overflow"));
        let bytes = kind.nbytes(rows, cols).ok_or_else(overflow)?;
        let bytes = Tensor::build::<u8>(Device::Cpu, &Shape::new(&[bytes])?, fill)?;
        Ok(Self(Arc::new(Inner { kind, shape, rows, cols, bytes })))
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// How the values are stored.
    pub fn kind(&self) -> Quantization {
        self.0.kind
    }

    /// Bytes of codes and scales.
    pub fn nbytes(&self) -> usize {
        self.0.bytes.numel()
    }

    /// Codes and scales.
    ///
    /// # Errors
    /// None for a matrix that was made: they are on the host.
    pub fn as_bytes(&self) -> Result<&[u8]> {
        self.0.bytes.as_slice()
    }

    /// The matrix as one u8 tensor that says what it is, to be saved in a file of tensors.
    ///
    /// A header of 64 bytes: `KQM1`; the form in a byte (0 Int8, 1 Int4, 2 Q8_0, 3 Q4_0, 4 Q4_K, 5 Q6_K); three of zeros; the group (0 for
    /// ggml's), rows and columns as little-endian u64; zeros. Then [`as_bytes`](Self::as_bytes).
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let _running = operation("to_tensor", &[&self.0.bytes], || Cost::NONE);
        let (code, group) = match self.kind() {
            Quantization::Int8 { group } => (0, group),
            Quantization::Int4 { group } => (1, group),
            Quantization::Q8_0 => (2, 0),
            Quantization::Q4_0 => (3, 0),
            Quantization::Q4K => (4, 0),
            Quantization::Q6K => (5, 0),
            other => return Err(Error::argument("to_tensor", format!("{other} has no number"))),
        };
        let bytes = self.as_bytes()?;
        Tensor::build::<u8>(Device::Cpu, &Shape::new(&[HEADER + bytes.len()])?, |out| {
            let (header, rest) = out.split_at_mut(HEADER);
            header.fill(0);
            header[..4].copy_from_slice(&MAGIC);
            header[4] = code;
            for (at, x) in [(8, group), (16, self.0.rows), (24, self.0.cols)] {
                header[at..at + 8].copy_from_slice(&(x as u64).to_le_bytes());
            }
            rest.copy_from_slice(bytes);
            Ok(())
        })
    }

    /// The matrix that [`to_tensor`](Self::to_tensor) made a tensor of.
    ///
    /// # Errors
    /// If the tensor is none of those.
    pub fn from_tensor(saved: &Tensor) -> Result<Self> {
        let op = "from_tensor";
        let wrong = |what: &str| Error::format(op, format!("the tensor {} of {} {what}", saved.shape(), saved.dtype()));
        if saved.dtype() != DType::U8 || saved.rank() != 1 {
            return Err(wrong("is no saved quantised matrix: expected one dimension of u8"));
        }
        let saved = saved.detach().to_device(Device::Cpu)?.contiguous()?;
        let (header, bytes) = saved.as_slice::<u8>()?.split_at_checked(HEADER).ok_or_else(|| wrong("is shorter than a header"))?;
        let word = |at: usize| {
            let value = header[at..at + 8].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
            usize::try_from(value).map_err(|_| wrong("claims an extent that no matrix has"))
        };
        let (group, rows, cols) = (word(8)?, word(16)?, word(24)?);
        let kind = match (header[4], group) {
            _ if header[..4] != MAGIC => return Err(wrong("does not begin as a saved quantised matrix does")),
            (0, group) => Quantization::Int8 { group },
            (1, group) => Quantization::Int4 { group },
            (2, 0) => Quantization::Q8_0,
            (3, 0) => Quantization::Q4_0,
            (4, 0) => Quantization::Q4K,
            (5, 0) => Quantization::Q6K,
            (form, group) => return Err(wrong(&format!("names an unknown form {form} with groups of {group}"))),
        };
        if kind.nbytes(rows, cols) != Some(bytes.len()) {
            return Err(wrong(&format!("claims [{rows}, {cols}] weights in {kind}, which are not {} bytes", bytes.len())));
        }
        Self::from_blocks(kind, rows, cols, bytes)
    }

    fn blocks(&self) -> Result<Blocks<'_>> {
        let Inner { kind, rows, cols, .. } = *self.0;
        Blocks::new(kind, rows, cols, self.as_bytes()?).ok_or_else(|| Error::format("quantized", format!("{self:?} has another size")))
    }

    /// The matrix of the rows that `order` names, in its order, with the same codes.
    ///
    /// # Errors
    /// If a row is out of range, or there is no memory for the result.
    pub fn select_rows(&self, order: &[usize]) -> Result<Self> {
        let op = "select_rows";
        let _running = operation(op, &[&self.0.bytes], || Cost::NONE);
        if let Some(row) = order.iter().find(|row| **row >= self.0.rows) {
            return Err(Error::index(op, format!("row {row} is out of range for {} rows", self.0.rows)));
        }
        let lost = || Error::format(op, format!("{self:?} has another size"));
        let parts = self.kind().row_bytes(self.0.cols).ok_or_else(lost)?;
        let (codes, scales) = self.as_bytes()?.split_at_checked(self.0.rows * parts[0]).ok_or_else(lost)?;
        Self::build(op, self.kind(), order.len(), self.0.cols, |out| {
            let (out_codes, out_scales) = out.split_at_mut_checked(order.len() * parts[0]).ok_or_else(lost)?;
            for ((from, out), size) in [(codes, out_codes), (scales, out_scales)].into_iter().zip(parts) {
                if size > 0 {
                    out.chunks_exact_mut(size).zip(order).for_each(|(out, &row)| out.copy_from_slice(&from[row * size..][..size]));
                }
            }
            Ok(())
        })
    }

    /// The values, rounded once to `dtype` (exact in f32 and f64), on the default device.
    ///
    /// # Errors
    /// If `dtype` is no float, or there is no memory for them.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        self.dequantize_on(dtype, crate::default_device())
    }

    fn dequantize_on(&self, dtype: DType, device: Device) -> Result<Tensor> {
        let _running = operation("dequantize", &[&self.0.bytes], || Cost::NONE);
        let blocks = self.blocks()?;
        for_float!(dtype, "dequantize", T => Tensor::build::<T>(device, self.shape(), |out| {
            blocks.dequantize(&(0..blocks.rows()), 0..blocks.cols(), out);
            Ok(())
        }))
    }

    /// The rows that `indices` (i64) name, as of a table of embeddings: (…) → (…, cols) in `dtype`, on the device of the indices.
    ///
    /// # Errors
    /// If an index is out of range, or `dtype` is no float.
    pub fn rows(&self, indices: &Tensor, dtype: DType) -> Result<Tensor> {
        let op = "quantized_rows";
        let _running = operation(op, &[indices], || Cost::NONE);
        if indices.dtype() != DType::I64 {
            return Err(Error::unsupported_dtype(op, indices.dtype(), "i64 indices"));
        }
        let list = indices.to_vec::<i64>()?;
        check_indices(&list, self.0.rows).map_err(|e| Error::index(op, e.to_string()).with_source(e))?;
        let shape = indices.shape().with_inserted(indices.rank(), self.0.cols)?;
        let blocks = self.blocks()?;
        for_float!(dtype, op, T => Tensor::build::<T>(indices.device(), &shape, |out| {
            blocks.dequantize(&list, 0..blocks.cols(), out);
            Ok(())
        }))
    }

    /// The affine map of a layer, as [`Tensor::linear`] with the values of this matrix: x · Wᵀ + bias, (…, cols) → (…, rows).
    ///
    /// Up to 16 rows of f32, f16 or bf16 are multiplied by the exact weights in f32, which streams the stored bytes once, and rounded
    /// once. For more, and for f64, panels of weights are rounded to the input's dtype first. Inside of
    /// [`autocast`](crate::autocast()) the input and the bias are cast as those of `linear`.
    ///
    /// # Errors
    /// If the last dimension of x is not the weight's, or the bias is not as long as the weight has rows, or has another dtype than x.
    pub fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let op = "quantized_linear";
        let (x, bias) = (crate::autocast::lowered(x)?, crate::autocast::lowered_option(bias)?);
        let (x, bias) = (&*x, bias.as_deref());
        if let Some(bias) = bias {
            x.expect_same(op, bias)?;
            if bias.dims() != [self.0.rows] {
                let message = format!("the bias {} must be as long as the weight {} has rows", bias.shape(), self.shape());
                return Err(Error::shape(op, message));
            }
        }
        let rows = as_rows(op, x, self.0.cols, "columns", self.shape())?;
        self.linear_rows(&rows, bias)?.reshape([&x.dims()[..x.rank() - 1], &[self.0.rows]].concat())
    }

    /// The transposed product: x · W, (…, rows) → (…, cols). It is the gradient of [`linear`](Self::linear).
    ///
    /// # Errors
    /// If the last dimension of x is not as long as the weight has rows.
    pub fn linear_transposed(&self, x: &Tensor) -> Result<Tensor> {
        let op = "quantized_linear_transposed";
        let x = &*crate::autocast::lowered(x)?;
        let rows = as_rows(op, x, self.0.rows, "rows", self.shape())?;
        self.transposed_rows(&rows)?.reshape([&x.dims()[..x.rank() - 1], &[self.0.cols]].concat())
    }

    /// [`linear`](Self::linear) of checked arguments: x `[b, cols]`.
    fn linear_rows(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let op = "quantized_linear";
        let inputs: Vec<&Tensor> = [x].into_iter().chain(bias).collect();
        let out = match x.device() {
            Device::Cpu => {
                let _running = operation_with(op, || inputs.clone(), || self.cost(x));
                for_float!(x.dtype(), op, T => self.run_linear::<T>(x, bias))?
            }
            device => {
                let weight = self.dequantize_on(x.dtype(), device)?;
                x.detach().linear(&weight, bias.map(Tensor::detach).as_ref())?
            }
        };
        record(op, out, &inputs, |_| QuantizedLinear { weight: self.clone(), has_bias: bias.is_some() })
    }

    fn run_linear<T: WithDType + Input>(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let (dense, blocks) = (x.detach().contiguous()?, self.blocks()?);
        let bias = bias.map(|bias| bias.detach().contiguous()).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.as_slice::<T>()).transpose()?;
        Tensor::build::<T>(Device::Cpu, &Shape::new(&[x.dims()[0], self.0.rows])?, |out| Ok(blocks.linear(dense.as_slice()?, bias, out)?))
    }

    /// [`linear_transposed`](Self::linear_transposed) of a checked argument: x `[b, rows]`.
    fn transposed_rows(&self, x: &Tensor) -> Result<Tensor> {
        let op = "quantized_linear_transposed";
        let out = match x.device() {
            Device::Cpu => {
                let _running = operation(op, &[x], || self.cost(x));
                for_float!(x.dtype(), op, T => self.run_transposed::<T>(x))?
            }
            device => x.detach().matmul(&self.dequantize_on(x.dtype(), device)?)?,
        };
        record(op, out, &[x], |_| QuantizedTransposed { weight: self.clone() })
    }

    fn run_transposed<T: WithDType + Input>(&self, x: &Tensor) -> Result<Tensor> {
        let (dense, blocks) = (x.detach().contiguous()?, self.blocks()?);
        Tensor::build::<T>(Device::Cpu, &Shape::new(&[x.dims()[0], self.0.cols])?, |out| {
            Ok(blocks.linear_transposed(dense.as_slice()?, out)?)
        })
    }

    fn cost(&self, x: &Tensor) -> Cost {
        let (count, Inner { rows, cols, .. }) = (x.dims()[0], &*self.0);
        let moved = self.nbytes() + count * (rows + cols) * x.dtype().size();
        Cost::flops(2 * (count * rows) as u64 * *cols as u64).bytes(moved as u64)
    }
}
