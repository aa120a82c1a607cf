//! A row of the table over a stretch of memory, on the thread that has just written it: what follows another operation in the same pass.

use crate::cpu::cast::Stored;
use crate::pointwise::input::Input;
use crate::pointwise::{Params, Row};
use half::bf16;
use std::any::TypeId;
use std::mem::MaybeUninit;

/// Elements that are widened at a time.
const TILE: usize = 256;

/// `to = row(from…)` for `len` elements; f16 and bf16 are computed in f32 and rounded once. Nothing, if the row is not defined for `T`.
///
/// # Safety
/// All pointers must be valid for `len` elements; an input may equal the output but not overlap it otherwise.
pub(crate) unsafe fn apply_stretch<T: Stored, const N: usize>(row: &Row<N>, params: Params, from: [*const T; N], to: *mut T, len: usize) {
    let Some(tile) = row.tile::<T::Compute>() else { return };
    if !T::CONVERTS {
        // SAFETY: the caller's contract; the two types are one.
        return unsafe { tile(from.map(|from| Input::of(from.cast())), to.cast(), [1, len], params) };
    }
    if TypeId::of::<T>() == TypeId::of::<bf16>() {
        // SAFETY: the caller's contract; `T` is bf16.
        return unsafe { (row.bf16)(from.map(|from| Input::of(from.cast())), to.cast(), [1, len], params) };
    }
    let mut wide = MaybeUninit::<[[T::Compute; TILE]; N]>::uninit();
    let wide = wide.as_mut_ptr().cast::<T::Compute>();
    for start in (0..len).step_by(TILE) {
        let count = TILE.min(len - start);
        // SAFETY: the caller's contract, for a part that each of the N tiles has room for.
        unsafe {
            for (k, from) in from.iter().enumerate() {
                T::widen(from.add(start), wide.add(k * TILE), count);
            }
            tile(std::array::from_fn(|k| Input::of(wide.add(k * TILE))), wide, [1, count], params);
            T::narrow(wide, to.add(start), count);
        }
    }
}
