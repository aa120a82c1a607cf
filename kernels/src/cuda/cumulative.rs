//! Cumulative sums along the middle of `[outer, n, inner]`; see [`cpu::cumulative`](crate::cpu::cumulative).

use super::compile::number;
use super::memory::{Slice, SliceMut};
use super::reduce::total_type;
use super::{CudaError, Gpu, Launch, Source};
pub use crate::cpu::softmax::Axis;

const SOURCE: Source = Source { name: "cumulative", text: include_str!("cumulative.cu") };

/// As in the kernel file.
const THREADS: usize = 256;
const TILE: usize = THREADS * 8;

/// Threads that keep every multiprocessor of the largest GPUs busy: below, lines are cut into parts.
const ENOUGH_THREADS: usize = 1 << 18;

/// Steps of a column that are worth a part.
const COLUMN_PART: usize = 64;

/// Σ of the elements up to and including each, in f64 or i64; of those from it on if `reverse`.
pub fn cumsum(gpu: &'static Gpu, axis: Axis, reverse: bool, x: Slice<'_>, y: SliceMut<'_>) -> Result<(), CudaError> {
    assert!(x.len() == axis.numel() && y.len() == x.len() && y.ty() == total_type(x.ty()));
    if x.is_empty() {
        return Ok(());
    }
    let Axis { outer, n, inner } = axis;
    let lines = outer * inner;
    let module = gpu.module(&SOURCE, &[("T", x.ty().name()), ("REVERSE", number(reverse.into()))])?;
    let parts_of = |threads: usize, step: usize| {
        let parts = (ENOUGH_THREADS / threads).min(n / (2 * step)).clamp(1, 1024);
        let part = n.div_ceil(parts).next_multiple_of(step);
        (n.div_ceil(part), part)
    };
    let (lines_arg, n_arg, inner_arg) = (lines as i64, n as i64, inner as i64);
    if inner == 1 {
        let (parts, part) = parts_of(lines * THREADS, TILE);
        let totals = gpu.alloc(if parts > 1 { lines * parts * 8 } else { 0 })?;
        let launch = Launch::blocks(lines * parts, THREADS as u32);
        let (parts, part) = (parts as i64, part as i64);
        if parts > 1 {
            // SAFETY: x has `lines · n` elements, `totals` a number for each part of each line.
            unsafe { module.kernel("line_totals")?.launch(launch, &[&x.ptr(), &totals.ptr(), &lines_arg, &n_arg, &parts, &part])? };
        }
        // SAFETY: as above, y is as long as x, and with one part no totals are read.
        return unsafe {
            module.kernel("scan_lines")?.launch(launch, &[&x.ptr(), &y.ptr(), &totals.ptr(), &lines_arg, &n_arg, &parts, &part])
        };
    }
    let (parts, part) = parts_of(lines, COLUMN_PART);
    let totals = gpu.alloc(if parts > 1 { lines * parts * 8 } else { 0 })?;
    let launch = Launch::blocks((lines * parts).div_ceil(THREADS), THREADS as u32);
    let (parts, part) = (parts as i64, part as i64);
    if parts > 1 {
        // SAFETY: x has `lines · n` elements, `totals` a number for each part of each line.
        unsafe {
            module.kernel("column_totals")?.launch(launch, &[&x.ptr(), &totals.ptr(), &lines_arg, &n_arg, &inner_arg, &parts, &part])?
        };
    }
    // SAFETY: as above, y is as long as x, and with one part no totals are read.
    unsafe {
        module.kernel("scan_columns")?.launch(launch, &[&x.ptr(), &y.ptr(), &totals.ptr(), &lines_arg, &n_arg, &inner_arg, &parts, &part])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Type;
    use crate::cuda::testing::{Values, device};

    #[test]
    fn scans_match_a_plain_loop() {
        let Some(gpu) = device() else { return };
        for (outer, n, inner) in
            [(1, 1, 1), (3, 17, 1), (2, 9, 5), (1, 20_000, 1), (2, 2048, 1), (1, 700, 3), (40, 130, 1), (0, 3, 1), (2, 0, 3)]
        {
            let axis = Axis { outer, n, inner };
            for ty in [Type::F32, Type::F64, Type::I64, Type::U8, Type::Bool] {
                let raw = (0..axis.numel()).map(|i| ((i * 7919 + i / 3) % 61) as f64 - 30.0);
                // Multiples of 1/16, whose sums are exact in f32.
                let x: Vec<f64> = match ty {
                    Type::F32 | Type::F64 => raw.map(|x| x / 16.0).collect(),
                    Type::I64 => raw.collect(),
                    Type::Bool => raw.map(|x| (x > 0.0) as u8 as f64).collect(),
                    _ => raw.map(f64::abs).collect(),
                };
                let on_gpu = Values::new(gpu, ty, &x);
                for reverse in [false, true] {
                    let mut y = Values::unwritten(gpu, total_type(ty), x.len());
                    cumsum(gpu, axis, reverse, on_gpu.slice(), y.slice_mut()).unwrap();
                    let y = y.read();
                    for line in 0..outer * inner {
                        let mut total = 0.0;
                        for i in 0..n {
                            let row = if reverse { n - 1 - i } else { i };
                            let at = (line / inner * n + row) * inner + line % inner;
                            total += x[at];
                            assert_eq!(y[at], total, "element {row} of line {line} of {axis:?}, {ty:?}, reverse {reverse}");
                        }
                    }
                }
            }
        }
    }
}
