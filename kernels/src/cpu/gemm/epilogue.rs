//! What happens to finished sums while they are in the cache: an activation, rounded as the function on its own would round it.

use super::blocked::{Part, Place, Sums, Target};
use super::{Gemm, Out};
use crate::cpu::alloc::OutOfMemory;
use crate::cpu::cast::Stored;
use crate::cpu::parallel::SharedMut;
use crate::cpu::pointwise::apply_stretch;
use crate::pointwise::{Params, Row};

/// A function of the pointwise table, of every element of C: see [`Gemm::activation`].
#[derive(Clone, Copy, Debug)]
pub struct Activation<B> {
    row: &'static Row<1>,
    params: Params,
    /// If the sums are kept: where C begins, which holds them, and where the results begin, in the same order.
    kept: Option<(SharedMut<B>, SharedMut<B>)>,
}

impl<B: Stored> Activation<B> {
    /// The function of this row.
    pub const fn new(row: &'static Row<1>, params: Params) -> Self {
        Self { row, params, kept: None }
    }

    /// With results elsewhere than in C.
    pub(super) fn keeping(self, c: SharedMut<B>, results: SharedMut<B>) -> Self {
        Self { kept: Some((c, results)), ..self }
    }

    /// Whether the function is defined for elements of this type.
    pub fn is_defined(&self) -> bool {
        self.row.tile::<B::Compute>().is_some()
    }

    /// Computes the results of `len` elements of C.
    ///
    /// # Safety
    /// They must be readable and writable, as must be their counterparts if the sums are kept, and belong to this task.
    pub(super) unsafe fn finish(&self, c: *mut B, len: usize) {
        let to = match self.kept {
            None => c,
            // SAFETY: both addresses lie in C.
            Some((first, results)) => results.get().wrapping_offset(unsafe { c.offset_from(first.get()) }),
        };
        // SAFETY: the caller's contract.
        unsafe { apply_stretch(self.row, self.params, [c.cast_const()], to, len) }
    }
}

impl<T, B: Stored> Gemm<'_, T, B> {
    /// Lets the activation, if there is one, follow finished sums in some rows and columns of C.
    ///
    /// # Safety
    /// As for [`Activation::finish`], for each row's part.
    pub(super) unsafe fn finish(&self, out: Out<B>, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) {
        if let Some(activation) = &self.activation {
            for row in rows {
                // SAFETY: the caller's contract.
                unsafe { activation.finish(out.at(row, cols.start), cols.len()) }
            }
        }
    }
}

/// C whose parts an activation follows.
pub(super) struct Activated<'a, T> {
    pub sums: Sums,
    pub gemm: &'a Gemm<'a, T, f32>,
}

impl<T: Sync> Target for Activated<'_, T> {
    fn takes_whole_sums(&self) -> bool {
        true
    }

    fn take(&self, part: &Part, compute: &dyn Fn(Place) -> Result<(), OutOfMemory>) -> Result<(), OutOfMemory> {
        self.sums.take(part, compute)?;
        // SAFETY: the part lies in C, whose extent `Gemm::run` checked, and no two tasks share a part.
        unsafe { self.gemm.finish(self.sums.item(part.item), part.rows.clone(), part.cols.clone()) };
        Ok(())
    }
}
