//! What a quantised matrix is besides a factor of products: made, saved, read back, looked up.

use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, ErrorKind, Generator, Quantization, QuantizedMatrix, Tensor, bf16};

const INT8: Quantization = Quantization::Int8 { group: 128 };
const INT4: Quantization = Quantization::Int4 { group: 64 };

fn normal(shape: [usize; 2]) -> Tensor {
    Generator::new(5).randn(shape, ()).unwrap()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().to_vec().unwrap()
}

/// ‖a − b‖ / ‖a‖.
fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |x: &Tensor| values(x).iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    norm(&a.sub(b).unwrap()) / norm(a)
}

#[test]
fn weights_come_back_nearly() {
    let weight = normal([32, 1000]);
    for (kind, most) in
        [(Quantization::Int8 { group: 64 }, 0.0062), (INT8, 0.0068), (INT4, 0.092), (Quantization::Int4 { group: 128 }, 0.102)]
    {
        let quantized = QuantizedMatrix::quantize(&weight, kind).unwrap();
        let error = relative(&weight, &quantized.dequantize(DType::F32).unwrap());
        eprintln!("{kind}: {error:.5}");
        assert!(error < most, "{kind}: {error}");
        assert!(quantized.nbytes() < weight.numel() * if kind == INT4 { 6 } else { 11 } / 10, "{}", quantized.nbytes());
        // Weights of a half type are those of f32 that they stand for.
        let half = QuantizedMatrix::quantize(&weight.to_dtype(DType::BF16).unwrap(), kind).unwrap();
        assert!(relative(&weight, &half.dequantize(DType::F32).unwrap()) < most + 0.001);
    }
}

#[test]
fn a_saved_matrix_is_the_same() {
    let path = std::env::temp_dir().join(format!("kiln-quantized-{}.safetensors", std::process::id()));
    let blocks: Vec<u8> = (0..4 * 210).map(|i| (i * 37 % 251) as u8).collect();
    for matrix in [
        QuantizedMatrix::quantize(&normal([5, 100]), INT8).unwrap(),
        QuantizedMatrix::quantize(&normal([5, 100]), INT4).unwrap(),
        QuantizedMatrix::from_blocks(Quantization::Q6K, 2, 512, &blocks).unwrap(),
        QuantizedMatrix::from_blocks(Quantization::Q8_0, 0, 32, &[]).unwrap(),
    ] {
        safetensors::save(&path, [("w", &matrix.to_tensor().unwrap())], &Default::default()).unwrap();
        let back = QuantizedMatrix::from_tensor(&safetensors::load(&path).unwrap()["w"]).unwrap();
        assert_eq!((back.kind(), back.shape()), (matrix.kind(), matrix.shape()));
        assert_eq!(back.as_bytes().unwrap(), matrix.as_bytes().unwrap());
    }
    std::fs::remove_file(path).unwrap();
}

#[test]
fn rows_are_those_of_the_whole() {
    let matrix = QuantizedMatrix::quantize(&normal([7, 150]), INT4).unwrap();
    let whole = matrix.dequantize(DType::BF16).unwrap();
    let indices = Tensor::from_vec(vec![6i64, 0, 6, 3], [2, 2]).unwrap();
    let rows = matrix.rows(&indices, DType::BF16).unwrap();
    assert_eq!(rows.dims(), [2, 2, 150]);
    assert_eq!(rows.to_vec::<bf16>().unwrap(), indices.embedding(&whole).unwrap().to_vec::<bf16>().unwrap());
    for bad in [-1, 7, i64::MAX] {
        let error = matrix.rows(&Tensor::from_vec(vec![bad], [1]).unwrap(), DType::F32).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Index, "{error}");
    }
    assert!(matrix.rows(&normal([1, 1]), DType::F32).is_err() && matrix.rows(&indices, DType::I64).is_err());
}

#[test]
fn what_does_not_fit_is_an_error() {
    let weight = normal([3, 8]);
    let message = |e: kiln_tensor::Error| e.to_string();
    let refused = QuantizedMatrix::quantize(&weight, Quantization::Q4K).unwrap_err();
    assert!(message(refused).contains("only read"));
    assert!(QuantizedMatrix::quantize(&weight, Quantization::Int8 { group: 0 }).is_err());
    assert!(QuantizedMatrix::quantize(&weight.reshape(-1).unwrap(), INT8).is_err());
    assert!(QuantizedMatrix::quantize(&Tensor::zeros([2, 2], DType::I64).unwrap(), INT8).is_err());
    let infinite = Tensor::full([2, 2], f64::INFINITY, ()).unwrap();
    assert!(message(QuantizedMatrix::quantize(&infinite, INT4).unwrap_err()).contains("infinite"));
    for (rows, cols) in [(1, 255), (usize::MAX, 256), (1 << 40, 1 << 40), (2, 256)] {
        assert!(QuantizedMatrix::from_blocks(Quantization::Q4K, rows, cols, &[0; 144]).is_err());
    }
    let matrix = QuantizedMatrix::quantize(&weight, INT8).unwrap();
    let wrong = matrix.linear(&normal([2, 3]), None).unwrap_err();
    assert!(message(wrong).contains("[3, 8]"));
    assert!(matrix.linear(&normal([2, 8]), Some(&Tensor::zeros([2], ()).unwrap())).is_err());
    assert!(matrix.linear(&Tensor::zeros([2, 8], DType::I64).unwrap(), None).is_err());
    assert!(matrix.linear(&Tensor::scalar(1.0, ()).unwrap(), None).is_err());
    assert!(matrix.linear_transposed(&normal([2, 8])).is_err() && matrix.dequantize(DType::I32).is_err());
}

#[test]
fn a_saved_tensor_that_lies_is_an_error() {
    let saved = QuantizedMatrix::quantize(&normal([3, 8]), INT4).unwrap().to_tensor().unwrap().to_vec::<u8>().unwrap();
    let read = |bytes: Vec<u8>| QuantizedMatrix::from_tensor(&Tensor::from_vec(bytes.clone(), [bytes.len()]).unwrap());
    for len in [0, 3, 63, 64, saved.len() - 1, saved.len() + 1] {
        let mut cut = saved.clone();
        cut.resize(len, 0);
        assert!(read(cut).is_err(), "{len}");
    }
    for at in 0..32 {
        for bit in [1, 128] {
            let mut flipped = saved.clone();
            flipped[at] ^= bit;
            // Bytes that say nothing, and a number of columns that takes as many bytes.
            let padding = (5..8).contains(&at) || (at, bit) == (24, 1);
            assert!(read(flipped).is_err() || padding, "byte {at}");
        }
    }
    assert!(QuantizedMatrix::from_tensor(&normal([2, 64])).is_err());
}
