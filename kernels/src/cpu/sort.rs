//! Sorting rows: argsort and top-k. Stable, NaN counts as the largest value (as in PyTorch), −0 equals 0.
//!
//! A value becomes an unsigned key of the same order, and the key with its place behind it one integer. No two are equal, so an
//! unstable sort of the integers is a stable sort of the values, and its result does not depend on how it is done.

use super::parallel;
use crate::element::{Bool, Element};
use half::{bf16, f16};
use rayon::slice::ParallelSliceMut;

/// Rows at least this long are sorted by several threads together.
const LONG_ROW: usize = 64 * 1024;

/// An element with an order.
pub trait SortKey: Element {
    /// An unsigned number of the same order, at most `BITS` wide.
    fn key(self) -> u64;
    /// Width of the keys.
    const BITS: u32;
}

macro_rules! float_key {
    ($($t:ty: $bits:ty;)*) => { $(
        impl SortKey for $t {
            const BITS: u32 = <$bits>::BITS;
            #[inline(always)]
            fn key(self) -> u64 {
                const SIGN: $bits = 1 << (<$bits>::BITS - 1);
                let bits = self.to_bits();
                let magnitude = bits & !SIGN;
                let infinity = <$t>::INFINITY.to_bits();
                // Without a branch: signs are hard to foresee.
                let flips = if bits == magnitude { SIGN } else { <$bits>::MAX };
                let number = if magnitude == 0 { SIGN } else { bits ^ flips };
                (if magnitude > infinity { <$bits>::MAX } else { number }) as u64
            }
        }
    )* };
}
float_key! { f32: u32; f64: u64; f16: u16; bf16: u16; }

impl SortKey for i64 {
    const BITS: u32 = 64;
    #[inline(always)]
    fn key(self) -> u64 {
        self as u64 ^ (1 << 63)
    }
}
impl SortKey for i32 {
    const BITS: u32 = 32;
    #[inline(always)]
    fn key(self) -> u64 {
        (self as u32 ^ (1 << 31)) as u64
    }
}
impl SortKey for u8 {
    const BITS: u32 = 8;
    #[inline(always)]
    fn key(self) -> u64 {
        self as u64
    }
}
impl SortKey for Bool {
    const BITS: u32 = 8;
    #[inline(always)]
    fn key(self) -> u64 {
        self.get() as u64
    }
}

/// A key with the place of its element behind it.
trait Packed: Copy + Ord + Send {
    fn pack(key: u64, place: usize) -> Self;
    fn place(self) -> i64;
}

/// For keys of 32 bits and rows of fewer than 2³² elements.
impl Packed for u64 {
    #[inline(always)]
    fn pack(key: u64, place: usize) -> Self {
        key << 32 | place as u64
    }
    #[inline(always)]
    fn place(self) -> i64 {
        self as u32 as i64
    }
}

impl Packed for u128 {
    #[inline(always)]
    fn pack(key: u64, place: usize) -> Self {
        (key as u128) << 64 | place as u128
    }
    #[inline(always)]
    fn place(self) -> i64 {
        self as i64
    }
}

/// Writes, for each row of `len` elements of `x`, the places of its `k` first elements in sorted order to `out`.
/// `k = len` sorts the whole row. Equal elements keep their order, descending too.
///
/// # Panics
/// If `k > len`, or the lengths do not fit.
pub fn argsort<T: SortKey>(x: &[T], len: usize, k: usize, descending: bool, out: &mut [i64]) {
    assert!(k <= len && x.len().is_multiple_of(len.max(1)));
    if out.is_empty() {
        return;
    }
    assert_eq!(x.len() / len * k, out.len());
    if T::BITS <= 32 && len <= u32::MAX as usize {
        argsort_packed::<T, u64>(x, len, k, descending, out);
    } else {
        argsort_packed::<T, u128>(x, len, k, descending, out);
    }
}

fn argsort_packed<T: SortKey, P: Packed>(x: &[T], len: usize, k: usize, descending: bool, out: &mut [i64]) {
    let flip = if descending { u64::MAX >> (64 - T::BITS) } else { 0 };
    let sort_row = |row: usize, out: &mut [i64]| {
        let mut keys: Vec<P> = x[row * len..][..len].iter().enumerate().map(|(i, v)| P::pack(v.key() ^ flip, i)).collect();
        if k < len {
            keys.select_nth_unstable(k);
            keys.truncate(k);
        }
        if keys.len() >= LONG_ROW {
            keys.par_sort_unstable();
        } else {
            keys.sort_unstable();
        }
        out.iter_mut().zip(keys).for_each(|(o, key)| *o = key.place());
    };
    // A comparison costs about a nanosecond; a short row much of an allocation besides.
    let ns = x.len() * (len.ilog2() as usize + 1) + x.len() / len * 50;
    parallel::for_each_chunk(out, k, ns, |row, out| sort_row(row, out));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: SortKey>(x: &[T], len: usize) {
        for descending in [false, true] {
            for k in [len, len / 2, 1] {
                let mut out = vec![0; x.len() / len * k];
                argsort(x, len, k, descending, &mut out);
                for (row, out) in x.chunks(len).zip(out.chunks(k)) {
                    let mut expected: Vec<usize> = (0..len).collect();
                    expected.sort_by(|&a, &b| {
                        let (a, b) = (row[a].to_f64(), row[b].to_f64());
                        let order = a.is_nan().cmp(&b.is_nan()).then(a.partial_cmp(&b).unwrap_or(std::cmp::Ordering::Equal));
                        if descending { order.reverse() } else { order }
                    });
                    assert!(out.iter().zip(expected).all(|(&a, e)| a == e as i64), "{len} {k} {descending}");
                }
            }
        }
    }

    #[test]
    fn rows_are_sorted_stably_with_nan_last() {
        let values = [3.0, -0.0, f64::NAN, 0.0, f64::INFINITY, -1.5, f64::NEG_INFINITY, 3.0, -f64::NAN, 1e-40, -1e-40, 2.0];
        check::<f64>(&values, 12);
        check::<f32>(&values.map(|v| v as f32), 6);
        check::<f16>(&values.map(f16::from_f64), 12);
        check::<bf16>(&values.map(bf16::from_f64), 4);
        check::<i64>(&[3, -1, i64::MAX, i64::MIN, 3, 0], 6);
        check::<i32>(&[3, -1, i32::MAX, i32::MIN, 3, 0], 3);
        check::<u8>(&[255, 0, 3, 3], 2);
        check::<Bool>(&[Bool(1), Bool(0), Bool(7), Bool(0)], 4);
        let long: Vec<f32> = (0..200_000u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48) as f32).collect();
        check::<f32>(&long, 200_000);
        check::<f32>(&long, 100);
    }

    #[test]
    fn nothing_is_sorted_to_nothing() {
        argsort::<f32>(&[], 0, 0, false, &mut []);
        argsort::<f32>(&[], 5, 5, false, &mut []);
        argsort::<f32>(&[1.0, 2.0], 2, 0, false, &mut []);
    }
}
