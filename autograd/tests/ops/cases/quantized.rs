//! Products with constant weights in few bits, against plain sums over what the weights mean.

use crate::harness::{Case, case};
use crate::reference::Array;
use kiln_tensor::{DType, Quantization, QuantizedMatrix, Result, Tensor};

const INT8: Quantization = Quantization::Int8 { group: 64 };
const INT4: Quantization = Quantization::Int4 { group: 128 };

/// A fixed matrix.
fn weight(kind: Quantization, rows: usize, cols: usize) -> Result<QuantizedMatrix> {
    if let Quantization::Q4K = kind {
        // Codes without a pattern, d = 2⁻⁶ and dₘ = 2⁻⁴ in f16.
        let mut bytes: Vec<u8> = (0..rows * cols / 256 * 144).map(|i| (i * i * 31 + i * 7 + 3) as u8).collect();
        bytes.chunks_exact_mut(144).for_each(|block| block[..4].copy_from_slice(&[0, 0x24, 0, 0x2C]));
        return QuantizedMatrix::from_blocks(kind, rows, cols, &bytes);
    }
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919 + i / 3) % 101) as f32 / 50.0 - 1.0).collect();
    QuantizedMatrix::quantize(&Tensor::from_vec(values, [rows, cols])?, kind)
}

/// What the matrix stands for.
fn meant(kind: Quantization, rows: usize, cols: usize) -> Array {
    let values = weight(kind, rows, cols).unwrap().dequantize(DType::F64).unwrap();
    Array::new(&[rows, cols], values.to_vec().unwrap())
}

/// Rows of the weight: as the bias says, or four.
fn rows_of(bias: Option<usize>) -> usize {
    bias.unwrap_or(4)
}

fn last<T: Copy>(dims: &[T]) -> T {
    dims[dims.len() - 1]
}

fn linear(kind: Quantization, label: &'static str) -> Case {
    let f = move |x: &[Tensor]| {
        let (cols, rows) = (last(x[0].dims()), rows_of(x.get(1).map(|bias| bias.dims()[0])));
        weight(kind, rows, cols)?.linear(&x[0], x.get(1))
    };
    let reference = move |x: &[Array]| {
        let (cols, rows) = (last(&x[0].shape), rows_of(x.get(1).map(|bias| bias.shape[0])));
        let w = meant(kind, rows, cols);
        let shape = [&x[0].shape[..x[0].shape.len() - 1], &[rows]].concat();
        Array::from_fn(&shape, |i| {
            let (lead, row) = (&i[..i.len() - 1], last(i));
            let sum: f64 = (0..cols).map(|c| x[0].at(&[lead, &[c]].concat()) * w.at(&[row, c])).sum();
            sum + x.get(1).map_or(0.0, |bias| bias.at(&[row]))
        })
    };
    case("linear", f, reference).label(label)
}

fn transposed(kind: Quantization, label: &'static str, cols: usize) -> Case {
    let f = move |x: &[Tensor]| weight(kind, last(x[0].dims()), cols)?.linear_transposed(&x[0]);
    let reference = move |x: &[Array]| {
        let rows = last(&x[0].shape);
        let w = meant(kind, rows, cols);
        let shape = [&x[0].shape[..x[0].shape.len() - 1], &[cols]].concat();
        Array::from_fn(&shape, |i| {
            let (lead, col) = (&i[..i.len() - 1], last(i));
            (0..rows).map(|r| x[0].at(&[lead, &[r]].concat()) * w.at(&[r, col])).sum()
        })
    };
    case("linear_transposed", f, reference).label(label)
}

pub fn cases() -> Vec<Case> {
    let shapes = |case: Case| {
        case.sample(&[&[2, 3], &[5]])
            .sample(&[&[3], &[2]])
            .sample(&[&[2, 1, 3]])
            .sample(&[&[0, 3], &[4]])
            .sample(&[&[3, 0], &[4]])
            .sample(&[&[18, 2], &[2]])
            .large(&[&[3, 700], &[1000]])
    };
    vec![
        shapes(linear(INT8, "int8")),
        shapes(linear(INT4, "int4")),
        linear(INT4, "int4, many rows").sample(&[&[1, 2], &[3]]).large(&[&[80, 784], &[512]]),
        linear(Quantization::Q4K, "Q4_K").sample(&[&[1, 256], &[2]]).large(&[&[2, 768], &[600]]),
        transposed(INT8, "int8", 3).sample(&[&[2, 3]]).sample(&[&[2]]).sample(&[&[0, 2]]).sample(&[&[2, 0]]),
        transposed(INT4, "int4", 700).sample(&[&[1, 2]]).large(&[&[40, 300]]),
    ]
}
