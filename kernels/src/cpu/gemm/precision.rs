//! How exact products of f32 must be.

use std::sync::atomic::{AtomicU8, Ordering};

/// How exact products and convolutions of f32 must be, where a machine has faster ones of bf16 (matrix tiles: AMX; for convolutions at
/// [`Medium`](Self::Medium) also fast pairs). Others compute all as [`Highest`](Self::Highest).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum MatmulPrecision {
    /// As exact as a sequence of f32 multiply-adds: on tiles more so, but for a quarter where single terms outweigh all others. Without tiles large
    /// convolutions of 3 × 3 go Winograd's way, whose rounding is relative to the largest number of a patch of 5 × 5 pixels: what lies beside a
    /// pixel that is 10⁶ times as large as its neighbours keeps few digits, beside one of 10⁹ times none, also in outputs that it does not enter.
    #[default]
    Highest,
    /// About 2⁻¹⁶ of the factors' sizes: a factor is the sum of two bf16.
    High,
    /// Factors are rounded to bf16, sums are f32.
    Medium,
}

static PRECISION: AtomicU8 = AtomicU8::new(MatmulPrecision::Highest as u8);

/// Sets how exact this process's products of f32 must be from now on.
pub fn set_matmul_precision(precision: MatmulPrecision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
}

/// How exact this process's products of f32 must be.
pub fn matmul_precision() -> MatmulPrecision {
    match PRECISION.load(Ordering::Relaxed) {
        x if x == MatmulPrecision::High as u8 => MatmulPrecision::High,
        x if x == MatmulPrecision::Medium as u8 => MatmulPrecision::Medium,
        _ => MatmulPrecision::Highest,
    }
}
