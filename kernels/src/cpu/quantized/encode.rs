//! Quantises weights to this library's own formats.

use super::Quantization;
use super::formats::WORDS;
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
use crate::cpu::simd::Simd;
use half::bf16;
use std::fmt;

/// The largest group.
const MAX_GROUP: usize = 128;

/// A weight that is infinite or not a number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotFinite;

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a weight is infinite or not a number")
    }
}

impl std::error::Error for NotFinite {}

/// Quantises row-major `[rows, cols]` weights to `Int8` or `Int4` in `out`, which is all written.
///
/// # Errors
/// If a weight is not finite; `out` is then unspecified.
///
/// # Panics
/// If the form is another one, or a length does not fit.
pub fn quantize(kind: Quantization, rows: usize, cols: usize, weights: &[f32], out: &mut [u8]) -> Result<(), NotFinite> {
    let Some(places) = kind.places(rows, cols) else { panic!("a matrix of {rows} rows of {cols} in {kind}") };
    assert!(weights.len() == rows * cols && out.len() == places.total, "lengths");
    if weights.iter().any(|w| !w.is_finite()) {
        return Err(NotFinite);
    }
    if weights.is_empty() {
        out.fill(0);
        return Ok(());
    }
    let (codes, scales) = out.split_at_mut(rows * places.codes);
    let (codes, scales) = (SharedMut::new(codes), SharedMut::new(scales));
    for_each(rows, rows * cols * 4, |row| {
        // SAFETY: each row has its own stretch of both parts, which are as long as all rows together.
        let (codes, scales) = unsafe {
            (
                std::slice::from_raw_parts_mut(codes.get().add(row * places.codes), places.codes),
                std::slice::from_raw_parts_mut(scales.get().add(row * places.scales), places.scales),
            )
        };
        let weights = &weights[row * cols..][..cols];
        codes.fill(0);
        scales.fill(0);
        match kind {
            Quantization::Int8 { group } => dispatch(Int8Row { group, weights, codes, scales }),
            Quantization::Int4 { group } => dispatch(Int4Row { group, weights, codes, scales }),
            _ => panic!("{kind} is only read"),
        }
    });
    Ok(())
}

struct Int8Row<'a> {
    group: usize,
    weights: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl WithSimd for Int8Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let groups = self.weights.chunks(self.group).zip(self.codes.chunks_mut(self.group));
        for ((weights, codes), scale) in groups.zip(self.scales.chunks_exact_mut(2)) {
            let largest = weights.iter().fold(0f32, |most, w| most.max(w.abs()));
            let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
            let bits = round_up_to_bf16(largest / 127.0);
            // At the end of the range of f32 the next lower one, so that no code means infinity.
            let bits = if (127.0 * value(bits)).is_finite() { bits } else { bits - 1 };
            scale.copy_from_slice(&bits.to_le_bytes());
            let inverse = inverse_of(value(bits));
            for (code, w) in codes.iter_mut().zip(weights) {
                *code = (f64::from(*w) * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            }
        }
    }
}

/// 1 / x, and 0 for 0. In f64, since f32 has no inverse of its smallest values.
fn inverse_of(x: f32) -> f64 {
    if x == 0.0 { 0.0 } else { 1.0 / f64::from(x) }
}

/// The least bf16 that is not less than x ≥ 0, as bits.
fn round_up_to_bf16(x: f32) -> u16 {
    ((x.to_bits() + 0xFFFF) >> 16) as u16
}

struct Int4Row<'a> {
    group: usize,
    weights: &'a [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl WithSimd for Int4Row<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (g, (weights, meaning)) in self.weights.chunks(self.group).zip(self.scales.chunks_exact_mut(4)).enumerate() {
            let [scale, min] = fit(weights);
            meaning[..2].copy_from_slice(&bf16::to_le_bytes(scale));
            meaning[2..].copy_from_slice(&bf16::to_le_bytes(min));
            let (inverse, min) = (inverse_of(scale.to_f32()), f64::from(min.to_f32()));
            for (i, w) in weights.iter().enumerate() {
                let code = ((f64::from(*w) - min) * inverse).round_ties_even().clamp(0.0, 15.0) as u8;
                let at = g * self.group + i;
                let (unit, within) = (at / (8 * WORDS), at % (8 * WORDS));
                let (word, shift) = (within % WORDS, within / WORDS * 4);
                self.codes[(unit * WORDS + word) * 4 + shift / 8] |= code << (shift % 8);
            }
        }
    }
}

/// How much of a group's range the codes span in the trials of [`fit`]. A narrower span cuts off the outermost weights and resolves the
/// others better.
const SPANS: [f32; 6] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75];

/// The scale and the minimum of a group: of all [`SPANS`], each followed by the least squares for its codes, the one with the least error.
#[inline(always)]
fn fit(weights: &[f32]) -> [bf16; 2] {
    let (mut least, mut most) = (f32::MAX, f32::MIN);
    for &w in weights {
        (least, most) = (least.min(w), most.max(w));
    }
    if least == most {
        // All the same: code 15 of a range from zero.
        return [bf16::from_f32(least / 15.0), bf16::ZERO];
    }
    let (least, range) = (f64::from(least), f64::from(most) - f64::from(least));
    let mut placed = [0f32; MAX_GROUP];
    for (place, &w) in placed.iter_mut().zip(weights) {
        *place = ((f64::from(w) - least) / range) as f32;
    }
    let placed = &placed[..weights.len()];
    let mut best = (f32::INFINITY, [1.0 / 15.0, 0.0]);
    for span in SPANS {
        let trial = least_squares(placed, [span / 15.0, (1.0 - span) / 2.0]);
        let error = squared_error(placed, trial);
        if error < best.0 {
            best = (error, trial);
        }
    }
    let [scale, min] = best.1.map(f64::from);
    [bf16::from_f64(scale * range), finite(least + min * range)]
}

/// The nearest bf16 that is finite.
fn finite(x: f64) -> bf16 {
    let most = f64::from(bf16::MAX.to_f32());
    bf16::from_f64(x.clamp(-most, most))
}

/// Partial sums, which the compiler adds up side by side.
const PARTS: usize = 8;

#[inline(always)]
fn code_of(x: f32, [inverse, min]: [f32; 2]) -> f32 {
    ((x - min) * inverse).round_ties_even().clamp(0.0, 15.0)
}

/// The scale and minimum with the least squared error for the codes that the given ones lead to.
#[inline(always)]
fn least_squares(placed: &[f32], [scale, min]: [f32; 2]) -> [f32; 2] {
    let mut sums = [[0f32; PARTS]; 4];
    for chunk in placed.chunks(PARTS) {
        for (i, &x) in chunk.iter().enumerate() {
            let code = code_of(x, [1.0 / scale, min]);
            sums[0][i] += code;
            sums[1][i] += code * code;
            sums[2][i] += x;
            sums[3][i] += code * x;
        }
    }
    let [codes, squares, xs, products] = sums.map(|parts| parts.iter().sum::<f32>());
    let n = placed.len() as f32;
    let variance = n * squares - codes * codes;
    let fitted = (n * products - codes * xs) / variance;
    if variance > 0.0 && fitted > 0.0 { [fitted, (xs - fitted * codes) / n] } else { [scale, min] }
}

#[inline(always)]
fn squared_error(placed: &[f32], [scale, min]: [f32; 2]) -> f32 {
    let mut sums = [0f32; PARTS];
    for chunk in placed.chunks(PARTS) {
        for (sum, &x) in sums.iter_mut().zip(chunk) {
            let error = x - (code_of(x, [1.0 / scale, min]) * scale + min);
            *sum += error * error;
        }
    }
    sums.iter().sum()
}
