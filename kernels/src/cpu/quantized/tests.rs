//! Every format against a plain decoder that follows ggml's description, and products against sums in f64.

use super::*;
use crate::cpu::alloc::Buffer;
use crate::cpu::testing::{at_thread_counts, values};
use half::{bf16, f16};

const ALL: [Quantization; 8] = [
    Quantization::Int8 { group: 64 },
    Quantization::Int8 { group: 128 },
    Quantization::Int4 { group: 64 },
    Quantization::Int4 { group: 128 },
    Quantization::Q8_0,
    Quantization::Q4_0,
    Quantization::Q4K,
    Quantization::Q6K,
];

/// Random codes, with scales of moderate size where the format has floats.
fn random(kind: Quantization, rows: usize, cols: usize) -> Vec<u8> {
    let total = kind.nbytes(rows, cols).unwrap();
    let mut bytes: Vec<u8> = values(total, 128.0).into_iter().map(|x| x as i8 as u8).collect();
    let mut floats = values(total, 0.01).into_iter();
    let mut put = |at: &mut [u8], brain: bool| {
        let x = floats.next().unwrap() as f32;
        let bits = if brain { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
        at.copy_from_slice(&bits.to_le_bytes());
    };
    match kind {
        Quantization::Int8 { .. } | Quantization::Int4 { .. } => {
            let places = kind.places(rows, cols).unwrap();
            bytes[rows * places.codes..].chunks_exact_mut(2).for_each(|at| put(at, true));
        }
        _ => {
            let [_, size] = kind.block().unwrap();
            for block in bytes.chunks_exact_mut(size) {
                match kind {
                    Quantization::Q6K => put(&mut block[208..210], false),
                    Quantization::Q4K => {
                        put(&mut block[..2], false);
                        put(&mut block[2..4], false);
                    }
                    _ => put(&mut block[..2], false),
                }
            }
        }
    }
    bytes
}

fn f16_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn bf16_at(b: &[u8], at: usize) -> f32 {
    bf16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Value `i` of a block of ggml.
fn value_of_block(kind: Quantization, b: &[u8], i: usize) -> f32 {
    match kind {
        Quantization::Q8_0 => f16_at(b, 0) * f32::from(b[2 + i] as i8),
        Quantization::Q4_0 => f16_at(b, 0) * (f32::from(b[2 + i % 16] >> (i / 16 * 4) & 15) - 8.0),
        Quantization::Q4K => {
            let j = i / 32;
            let s = &b[4..16];
            let (scale, min) = if j < 4 {
                (s[j] & 63, s[j + 4] & 63)
            } else {
                ((s[j + 4] & 15) | (s[j - 4] >> 6) << 4, (s[j + 4] >> 4) | (s[j] >> 6) << 4)
            };
            let code = b[16 + i / 64 * 32 + i % 32] >> (j % 2 * 4) & 15;
            f16_at(b, 0) * f32::from(scale) * f32::from(code) - f16_at(b, 2) * f32::from(min)
        }
        Quantization::Q6K => {
            let (of, run, l) = (i / 128, i % 128 / 32, i % 32);
            let low = b[64 * of + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
            let high = b[128 + 32 * of + l] >> (2 * run) & 3;
            let code = f32::from((low | high << 4) as i8) - 32.0;
            f16_at(b, 208) * f32::from(b[192 + i / 16] as i8) * code
        }
        _ => unreachable!(),
    }
}

/// A weight by the description of its format.
fn value(kind: Quantization, [rows, cols]: [usize; 2], bytes: &[u8], row: usize, col: usize) -> f32 {
    match kind {
        Quantization::Int8 { group } => {
            let (stride, groups) = (cols.next_multiple_of(64), cols.div_ceil(group));
            let scale = bf16_at(bytes, rows * stride + (row * groups + col / group) * 2);
            scale * f32::from(bytes[row * stride + col] as i8)
        }
        Quantization::Int4 { group } => {
            let padded = cols.next_multiple_of(128);
            let at = rows * padded / 2 + (row * (padded / group) + col / group) * 4;
            let (unit, within) = (col / 128, col % 128);
            let word = &bytes[row * padded / 2 + unit * 64 + within % 16 * 4..][..4];
            let code = u32::from_le_bytes(word.try_into().unwrap()) >> (within / 16 * 4) & 15;
            (code as f32).mul_add(bf16_at(bytes, at), bf16_at(bytes, at + 2))
        }
        _ => {
            let [block, size] = kind.block().unwrap();
            let first = (row * (cols / block) + col / block) * size;
            value_of_block(kind, &bytes[first..first + size], col % block)
        }
    }
}

#[test]
fn codes_mean_what_the_formats_say() {
    for kind in ALL {
        for (rows, cols) in [(3, 512), (2, 768), (5, if kind.block().is_none() { 333 } else { 256 }), (40, 1280)] {
            let bytes = random(kind, rows, cols);
            let matrix = Blocks::new(kind, rows, cols, &bytes).unwrap();
            let all = at_thread_counts(|| {
                let mut out = vec![f32::NAN; rows * cols];
                matrix.dequantize(&(0..rows), 0..cols, &mut out);
                out
            });
            for (i, &got) in all.iter().enumerate() {
                let want = value(kind, [rows, cols], &bytes, i / cols, i % cols);
                assert_eq!(got, want, "{kind}: row {} column {}", i / cols, i % cols);
            }
            // A part of the columns of some rows, in another type.
            let end = cols.min(300);
            let mut part = vec![bf16::NAN; 2 * (end - 256)];
            if end > 256 {
                matrix.dequantize(&vec![1, 0], 256..end, &mut part);
                for (i, got) in part.iter().enumerate() {
                    let (row, col) = (1 - i / (end - 256), 256 + i % (end - 256));
                    assert_eq!(*got, bf16::from_f32(all[row * cols + col]), "{kind}");
                }
            }
        }
    }
}

#[test]
fn products_are_those_of_the_decoded_weights() {
    for kind in ALL {
        for (rows, cols, count) in [(9, 512, 1), (6, 256, 3), (7, 768, 16), (5, 256, 17), (300, 1024, 2), (260, 256, 40)] {
            let cols = if kind.block().is_none() { cols - 13 } else { cols };
            let bytes = random(kind, rows, cols);
            let matrix = Blocks::new(kind, rows, cols, &bytes).unwrap();
            let mut weights = vec![0f64; rows * cols];
            matrix.dequantize(&(0..rows), 0..cols, &mut weights);
            let x: Vec<f32> = values(count * cols, 1.0).into_iter().map(|x| x as f32).collect();
            let bias: Vec<f32> = values(rows, 1.0).into_iter().map(|x| x as f32).collect();
            let want = |b: usize, r: usize| {
                let terms = (0..cols).map(|c| f64::from(x[b * cols + c]) * weights[r * cols + c]);
                f64::from(bias[r]) + terms.sum::<f64>()
            };
            let size = (0..rows * count).map(|i| want(i / rows, i % rows).abs()).fold(0.0, f64::max);
            let out = at_thread_counts(|| {
                let mut out = vec![f32::NAN; count * rows];
                matrix.linear(&x, Some(&bias), &mut out).unwrap();
                out
            });
            for (i, &got) in out.iter().enumerate() {
                // A scalar machine adds a thousand terms one after the other.
                assert!((f64::from(got) - want(i / rows, i % rows)).abs() < 1e-5 * size, "{kind} {rows}x{cols} {count}: {i}: {got}");
            }
            let brains: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut out = vec![bf16::NAN; count * rows];
            matrix.linear(&brains, None, &mut out).unwrap();
            for (i, got) in out.iter().enumerate() {
                let want = want(i / rows, i % rows) - f64::from(bias[i % rows]);
                assert!((f64::from(got.to_f32()) - want).abs() < 2e-2 * size, "{kind} bf16 {rows}x{cols} {count}: {i}: {got}");
            }
            // Back: a row of ones and the like on the left.
            let g: Vec<f64> = values(count * rows, 1.0);
            let mut back = vec![f64::NAN; count * cols];
            matrix.linear_transposed(&g, &mut back).unwrap();
            for (i, &got) in back.iter().enumerate() {
                let want: f64 = (0..rows).map(|r| g[i / cols * rows + r] * weights[r * cols + i % cols]).sum();
                assert!((got - want).abs() < 1e-11 * size.max(1.0), "{kind} back {i}: {got} {want}");
            }
        }
    }
}

#[test]
fn one_row_has_the_bits_that_it_has_among_others() {
    for kind in ALL {
        let bytes = random(kind, 10, 512);
        let matrix = Blocks::new(kind, 10, 512, &bytes).unwrap();
        let x: Vec<f32> = values(6 * 512, 1.0).into_iter().map(|x| x as f32).collect();
        let mut all = vec![0f32; 60];
        matrix.linear(&x, None, &mut all).unwrap();
        for (b, want) in all.chunks(10).enumerate() {
            let mut one = vec![0f32; 10];
            matrix.linear(&x[b * 512..][..512], None, &mut one).unwrap();
            assert_eq!(one, want, "{kind}");
        }
    }
}

/// ‖w − ŵ‖ / ‖w‖ of normal-like weights.
fn error_of(kind: Quantization, weights: &[f32], [rows, cols]: [usize; 2]) -> f64 {
    let mut bytes = Buffer::new(kind.nbytes(rows, cols).unwrap()).unwrap();
    quantize(kind, rows, cols, weights, bytes.as_slice_mut()).unwrap();
    let mut back = vec![0f32; rows * cols];
    Blocks::new(kind, rows, cols, bytes.as_bytes()).unwrap().dequantize(&(0..rows), 0..cols, &mut back);
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let error = squares(&mut weights.iter().zip(&back).map(|(a, b)| f64::from(a - b)));
    (error / squares(&mut weights.iter().map(|&w| f64::from(w)))).sqrt()
}

#[test]
fn weights_come_back_nearly() {
    let shape = [16, 1000];
    // Sums of four uniforms are near enough to normal.
    let parts = values(4 * shape[0] * shape[1], 0.02);
    let weights: Vec<f32> = parts.chunks(4).map(|x| x.iter().sum::<f64>() as f32).collect();
    for (kind, most) in [
        (Quantization::Int8 { group: 64 }, 0.006),
        (Quantization::Int8 { group: 128 }, 0.0066),
        (Quantization::Int4 { group: 64 }, 0.092),
        (Quantization::Int4 { group: 128 }, 0.1),
    ] {
        let error = error_of(kind, &weights, shape);
        assert!(error < most, "{kind}: {error}");
    }
}

#[test]
fn extreme_weights_are_kept() {
    for (kind, largest) in [(Quantization::Int8 { group: 64 }, 3.4e38), (Quantization::Int4 { group: 64 }, 3e38)] {
        for scale in [0.0, 1e-44, 1e-38, 1e30, largest] {
            let weights: Vec<f32> = values(130, 1.0).into_iter().map(|x| (x * scale) as f32).collect();
            let mut bytes = vec![0; kind.nbytes(1, 130).unwrap()];
            quantize(kind, 1, 130, &weights, &mut bytes).unwrap();
            let mut back = vec![f32::NAN; 130];
            Blocks::new(kind, 1, 130, &bytes).unwrap().dequantize(&(0..1), 0..130, &mut back);
            // Int4 may cut off the outermost weights.
            for (w, b) in weights.iter().zip(&back) {
                assert!((f64::from(w - b)).abs() <= 0.2 * scale + 1e-40, "{kind} {scale:e}: {w:e} {b:e}");
            }
        }
        let constant = [0.37f32; 70];
        assert!(error_of(kind, &constant, [1, 70]) < 0.005);
        assert_eq!(quantize(kind, 1, 2, &[1.0, f32::NAN], &mut vec![0; kind.nbytes(1, 2).unwrap()]), Err(NotFinite));
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    assert!(Quantization::Q4K.refuses(255).is_some() && Quantization::Q4K.nbytes(1, 255).is_none());
    assert!(Quantization::Int4 { group: 63 }.refuses(64).is_some());
    assert_eq!(Quantization::Int8 { group: 64 }.nbytes(usize::MAX, 64), None);
    assert_eq!(Quantization::Int8 { group: 64 }.nbytes(1, usize::MAX), None);
    assert_eq!(Quantization::Q8_0.nbytes(usize::MAX / 8, 64), None);
    assert!(Blocks::new(Quantization::Q8_0, 2, 32, &[0; 67]).is_none());
    let empty = Blocks::new(Quantization::Q8_0, 0, 32, &[]).unwrap();
    empty.linear::<f32>(&[], None, &mut []).unwrap();
    let narrow = Blocks::new(Quantization::Int4 { group: 64 }, 3, 0, &[]).unwrap();
    let mut out = [7f32; 6];
    narrow.linear(&[], Some(&[1.0, 2.0, 3.0]), &mut out).unwrap();
    assert_eq!(out, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
}
