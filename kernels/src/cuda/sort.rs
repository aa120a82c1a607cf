//! Sorting rows on a GPU: argsort and top-k, stable, with the processor's order (see [`cpu::sort`](crate::cpu::sort)). And sorting of keys with their places, for kernels that
//! must take what belongs together in a fixed order.

use super::Source;
use super::error::CudaError;
use super::gpu::Gpu;
use super::launch::{Arg, Launch, Module};
use super::memory::{DeviceBuffer, DevicePtr, Slice, SliceMut, Type};

const SOURCE: Source = Source { name: "sort", text: include_str!("sort.cu") };

/// Items that a block sorts in shared memory, and its threads: as in the kernel file.
const TILE: usize = 2048;
const TILE_THREADS: u32 = 1024;
const THREADS: u32 = 256;
const DIGITS: usize = 256;

/// The most elements of a row: places are 32 bits wide.
const MOST: usize = u32::MAX as usize;

/// Unsigned numbers in the order of a type's values.
#[derive(Clone, Copy)]
struct Keys {
    /// The type's name in kernel files.
    element: &'static str,
    is_bool: bool,
    /// How many of a key's bits count.
    bits: u32,
}

impl Keys {
    fn of(ty: Type) -> Self {
        Self { element: ty.name(), is_bool: ty == Type::Bool, bits: if ty == Type::Bool { 1 } else { 8 * ty.size() as u32 } }
    }

    fn is_wide(self) -> bool {
        self.bits > 32
    }

    /// Bytes of a key.
    fn size(self) -> usize {
        if self.is_wide() { 8 } else { 4 }
    }

    /// Bytes of a key with its place.
    fn item_size(self) -> usize {
        if self.is_wide() { 16 } else { 8 }
    }

    fn module(self, gpu: &'static Gpu) -> Result<Module, CudaError> {
        let defines = [("T", self.element), ("KEY", if self.is_wide() { "u64" } else { "u32" }), ("BOOL", "1")];
        gpu.module(&SOURCE, if self.is_bool { &defines } else { &defines[..2] })
    }
}

/// A mask that turns the order of keys around, or none.
struct Flip {
    wide: bool,
    mask: u64,
    narrow: u32,
}

impl Flip {
    fn new(keys: Keys, descending: bool) -> Self {
        let mask = if descending { u64::MAX >> (64 - keys.bits) } else { 0 };
        Self { wide: keys.is_wide(), mask, narrow: mask as u32 }
    }

    fn arg(&self) -> &dyn Arg {
        if self.wide { &self.mask } else { &self.narrow }
    }
}

/// Writes, for each row of `len` elements of `x`, the places of its `k` first elements in sorted order to `out` (i64).
/// `k = len` sorts the whole row. Equal elements keep their order, descending too.
///
/// # Errors
/// If a row has 2³² elements or more.
///
/// # Panics
/// If `k > len`, or the lengths do not fit.
pub fn argsort(gpu: &'static Gpu, x: Slice<'_>, len: usize, k: usize, descending: bool, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    assert!(k <= len && x.len().is_multiple_of(len.max(1)) && out.ty() == Type::I64);
    if out.is_empty() {
        return Ok(());
    }
    let rows = x.len() / len;
    assert_eq!(rows * k, out.len());
    if len >= MOST {
        return Err(CudaError::Unavailable(format!("sorting rows of {len} elements: a GPU sorts fewer than 2^32 - 1")));
    }
    let keys = Keys::of(x.ty());
    let flip = Flip::new(keys, descending);
    // Sorting runs for their first k pays while each pass leaves a quarter at most.
    if len <= TILE || 4 * k <= TILE {
        sort_runs(gpu, x, rows, len, k, keys, &flip, out)
    } else {
        sort_digits(gpu, x, rows, len, k, keys, &flip, out)
    }
}

/// Runs of rows are sorted for their first `k` elements, the runs of those again, until one run a row is left.
#[allow(clippy::too_many_arguments)]
fn sort_runs(
    gpu: &'static Gpu,
    x: Slice<'_>,
    rows: usize,
    len: usize,
    k: usize,
    keys: Keys,
    flip: &Flip,
    out: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let kernel = keys.module(gpu)?.kernel("sort_runs")?;
    let (mut len, mut from): (usize, Option<DeviceBuffer>) = (len, None);
    loop {
        let run = len.next_power_of_two().clamp(2, TILE);
        let parts = len.div_ceil(run);
        let kept = (parts - 1) * k + k.min(len - (parts - 1) * run);
        let items = if parts > 1 { Some(gpu.alloc(rows * kept * keys.item_size())?) } else { None };
        let address = |buffer: &Option<DeviceBuffer>| buffer.as_ref().map_or(DevicePtr::NULL, |buffer| buffer.ptr());
        let places = if parts > 1 { DevicePtr::NULL } else { out.ptr() };
        let launch = Launch::blocks((rows * parts).div_ceil(TILE / run), TILE_THREADS);
        // SAFETY: `x`, or `from` after the first pass, has `len` elements a row. What is kept of each row has room: in `items`, or, of the last pass, which keeps
        // `k`, in `out`.
        unsafe {
            let (rows, len, run, parts, k) = (rows as i64, len as i64, run as i32, parts as i64, k as i32);
            let args: [&dyn Arg; 10] = [&x.ptr(), &address(&from), &rows, &len, &run, &parts, &k, flip.arg(), &address(&items), &places];
            kernel.launch(launch, &args)?;
        }
        if parts == 1 {
            return Ok(());
        }
        (len, from) = (kept, items);
    }
}

/// Whole rows are sorted digit by digit.
#[allow(clippy::too_many_arguments)]
fn sort_digits(
    gpu: &'static Gpu,
    x: Slice<'_>,
    rows: usize,
    len: usize,
    k: usize,
    keys: Keys,
    flip: &Flip,
    out: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let unsorted = gpu.alloc(rows * len * keys.size())?;
    let kernel = keys.module(gpu)?.kernel("make_keys")?;
    // SAFETY: both have `rows * len` elements.
    unsafe { kernel.launch(Launch::over(x.len(), THREADS), &[&x.ptr(), &(x.len() as i64), flip.arg(), &unsorted.ptr()])? };
    radix_sort(gpu, keys, &unsorted, rows, len, Some((out.ptr(), k))).map(drop)
}

/// Sorted keys and the places that they had.
pub(super) struct Pairs {
    pub(super) keys: DeviceBuffer,
    pub(super) places: DeviceBuffer,
}

/// Sorts `n` keys (u32, of which the lowest `bits` count), stably.
///
/// # Errors
/// If there are 2³² − 1 keys or more.
pub(super) fn sort_pairs(gpu: &'static Gpu, keys: &DeviceBuffer, n: usize, bits: u32) -> Result<Pairs, CudaError> {
    assert!(bits <= 32 && n * 4 <= keys.len());
    if n >= MOST {
        return Err(CudaError::Unavailable(format!("an index of {n} positions: a GPU groups fewer than 2^32 - 1")));
    }
    // At least one pass, which makes the places.
    let of_u32 = Keys { element: "u32", is_bool: false, bits: bits.max(1) };
    radix_sort(gpu, of_u32, keys, 1, n, None)
}

/// Sorts rows of keys by their digits, the least significant first. With `finish`, an address and k, the places of each row's first k keys are written there (i64); the pairs
/// are then only partly sorted.
fn radix_sort(
    gpu: &'static Gpu,
    keys: Keys,
    unsorted: &DeviceBuffer,
    rows: usize,
    len: usize,
    finish: Option<(DevicePtr, usize)>,
) -> Result<Pairs, CudaError> {
    let part = THREADS as usize * if keys.is_wide() { 8 } else { 16 };
    let parts = len.div_ceil(part);
    let module = keys.module(gpu)?;
    let (count, scan, move_keys) = (module.kernel("count_digits")?, module.kernel("scan_counts")?, module.kernel("move_keys")?);
    let pairs =
        || -> Result<Pairs, CudaError> { Ok(Pairs { keys: gpu.alloc(rows * len * keys.size())?, places: gpu.alloc(rows * len * 4)? }) };
    let passes = keys.bits.div_ceil(8);
    // Passes write to these in turn.
    let (mut to, mut other) = (pairs()?, if passes > 1 { Some(pairs()?) } else { None });
    let counted = parts > 1;
    let counts = gpu.alloc(if counted { rows * DIGITS * parts * 4 } else { 0 })?;
    let totals = gpu.alloc(if counted { rows * DIGITS * 4 } else { 0 })?;
    let (rows_of_digits, blocks) = (Launch::blocks(rows * DIGITS, THREADS), Launch::blocks(rows * parts, THREADS));
    let shared = (part * (keys.size() + 4)) as u32;
    let (len, parts) = (len as i64, parts as i64);
    let mut from = (unsorted.ptr(), DevicePtr::NULL);
    for pass in 0..passes {
        let shift = 8 * pass as i32;
        let (last, k) = finish.filter(|_| pass + 1 == passes).unwrap_or((DevicePtr::NULL, 0));
        let (counts, totals) = if counted { (counts.ptr(), totals.ptr()) } else { (DevicePtr::NULL, DevicePtr::NULL) };
        // SAFETY: keys and places have `rows * len` elements on either side, and `from` is not `to`; there are `DIGITS` counts for each part of a row, and as many
        // totals a row. Where the sort ends, `finish` has room for `k` places a row.
        unsafe {
            if counted {
                count.launch(blocks, &[&from.0, &len, &parts, &shift, &counts])?;
                scan.launch(rows_of_digits, &[&counts, &parts, &totals])?;
            }
            let args: [&dyn Arg; 11] =
                [&from.0, &from.1, &len, &parts, &shift, &counts, &totals, &to.keys.ptr(), &to.places.ptr(), &last, &(k as i64)];
            move_keys.launch(blocks.with_shared(shared), &args)?;
        }
        from = (to.keys.ptr(), to.places.ptr());
        if let Some(other) = other.as_mut().filter(|_| pass + 1 < passes) {
            std::mem::swap(&mut to, other);
        }
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::sort::SortKey;
    use crate::cuda::testing::{Values, device};
    use crate::element::{Bool, Element};
    use half::{bf16, f16};

    const ALL: [Type; 8] = [Type::F32, Type::F64, Type::F16, Type::BF16, Type::I64, Type::I32, Type::U8, Type::Bool];

    fn on_host<T: SortKey + Element>(x: &[f64], len: usize, k: usize, descending: bool) -> Vec<f64> {
        let x: Vec<T> = x.iter().map(|&x| T::from_f64(x)).collect();
        let mut out = vec![0; x.len() / len.max(1) * k];
        crate::cpu::sort::argsort(&x, len, k, descending, &mut out);
        out.into_iter().map(|i| i as f64).collect()
    }

    fn check(gpu: &'static Gpu, ty: Type, x: &[f64], len: usize, k: usize) {
        let x = &if ty == Type::Bool { x.iter().map(|&x| (x != 0.0) as u8 as f64).collect() } else { x.to_vec() };
        let on_gpu = Values::new(gpu, ty, x);
        for descending in [false, true] {
            let mut out = Values::unwritten(gpu, Type::I64, x.len() / len.max(1) * k);
            argsort(gpu, on_gpu.slice(), len, k, descending, &mut out.slice_mut()).unwrap();
            let expected = match ty {
                Type::F32 => on_host::<f32>(x, len, k, descending),
                Type::F64 => on_host::<f64>(x, len, k, descending),
                Type::F16 => on_host::<f16>(x, len, k, descending),
                Type::BF16 => on_host::<bf16>(x, len, k, descending),
                Type::I64 => on_host::<i64>(x, len, k, descending),
                Type::I32 => on_host::<i32>(x, len, k, descending),
                Type::U8 => on_host::<u8>(x, len, k, descending),
                Type::Bool => on_host::<Bool>(x, len, k, descending),
            };
            assert!(out.read() == expected, "{ty:?}: {k} of {len}, descending {descending}");
        }
    }

    /// Many equal values, NaN and infinities of both signs, zeros of both signs, denormals.
    fn values(n: usize) -> Vec<f64> {
        let special = [0.0, -0.0, f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e-40, -1e-40, 1e300];
        let number = |i: usize| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
        (0..n).map(|i| if number(i) % 11 == 0 { special[i % 9] } else { number(i + 7) as f64 / 65536.0 - 100.0 }).collect()
    }

    #[test]
    fn short_rows() {
        let Some(gpu) = device() else { return };
        for ty in ALL {
            for (rows, len) in [(0, 5), (1, 1), (3, 1), (700, 3), (5, 64), (3, 100), (2, 2048)] {
                for k in [len, len / 2] {
                    check(gpu, ty, &values(rows * len), len, k);
                }
            }
        }
    }

    #[test]
    fn long_rows() {
        let Some(gpu) = device() else { return };
        for ty in ALL {
            for (rows, len, k) in [(1, 2049, 2049), (2, 4096, 4096), (2, 9000, 9000), (1, 20_000, 1000)] {
                check(gpu, ty, &values(rows * len), len, k);
            }
        }
    }

    #[test]
    fn the_first_of_long_rows() {
        let Some(gpu) = device() else { return };
        for ty in [Type::F32, Type::F64, Type::U8] {
            for (rows, len, k) in [(2, 2049, 1), (3, 5000, 50), (1, 40_000, 512)] {
                check(gpu, ty, &values(rows * len), len, k);
            }
        }
    }

    #[test]
    fn pairs_are_sorted_stably() {
        let Some(gpu) = device() else { return };
        for (n, most) in [(1, 1), (3000, 7), (5000, 1000), (9000, 100_000)] {
            let keys: Vec<u32> = (0..n).map(|i: u32| i.wrapping_mul(2_654_435_761) % most).collect();
            let bytes: Vec<u8> = keys.iter().flat_map(|k| k.to_le_bytes()).collect();
            let sorted = sort_pairs(gpu, &gpu.upload(&bytes).unwrap(), n as usize, u32::BITS - most.leading_zeros()).unwrap();
            let read = |buffer: &DeviceBuffer| -> Vec<u32> {
                let mut bytes = vec![0; n as usize * 4];
                gpu.download(buffer, 0, &mut bytes).unwrap();
                bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
            };
            let mut expected: Vec<u32> = (0..n).collect();
            expected.sort_by_key(|&i| keys[i as usize]);
            assert_eq!(read(&sorted.places), expected);
            assert!(read(&sorted.keys).is_sorted());
        }
    }
}
