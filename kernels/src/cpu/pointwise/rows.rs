//! Functions over rows that are read where they lie: elements in the output's order, a row or a number for each line of a matrix, one number for
//! all. A kernel takes as many rows at a time as have the same distance from each other.

use super::{Plan, Source, Tile, repeated};
use crate::cpu::cast::Stored;
use crate::cpu::parallel::SharedMut;
use crate::element::Element;
use crate::pointwise::input::{Input, REPEATS};

/// Rows of fewer elements are brought into tiles, many at a time: to end a row takes as long as some of its vectors.
const MIN_ROW: usize = 256;

/// What is done with rows of as many elements of each input and output.
type RunRows<'f, T, U, const N: usize, const M: usize> = &'f (dyn Fn([Input<T>; N], [*mut U; M], [usize; 2]) + Sync);

impl<T: Stored> Source<'_, T> {
    /// How many rows of `len` elements, from row `row` on, have the same distance from each other.
    fn rows_alike(&self, row: usize) -> usize {
        match self {
            Source::Strided(_, walk) => walk.runs_alike(row),
            _ => usize::MAX,
        }
    }
}

impl<T: Stored, const N: usize> Plan<'_, T, N> {
    /// How long the rows are that all sources consist of, if they can be read where they lie, as they are stored. It is all elements, if the
    /// sources lie in order.
    pub(super) fn row_len(&self) -> Option<usize> {
        let mut len = None;
        for source in &self.sources {
            if let Source::Strided(_, walk) = source {
                let run = walk.run_len();
                if walk.inner_strides()[1] > 1 || run < MIN_ROW || len.is_some_and(|len| len != run) {
                    return None;
                }
                len = Some(run);
            }
        }
        Some(len.unwrap_or(self.numel))
    }

    /// Calls `f(inputs, outs, [rows, elements of each])` until all rows of `len` elements, of which there may be a part, are done. Inputs are as
    /// they are stored; the first of `outs` is the one that an operand may be.
    pub(super) fn run_rows<U: Element, const M: usize>(&self, len: usize, shared: [SharedMut<U>; M], f: RunRows<T, U, N, M>) {
        self.tasks(len, &|from, to| {
            let mut rooms = [const { Tile::<T, REPEATS>::new() }; N];
            let mut at = from;
            while at < to {
                let (row, begin) = (at / len, at % len);
                let size = if begin > 0 || to - at < len {
                    [1, (len - begin).min(to - at)]
                } else {
                    [self.sources.iter().map(|source| source.rows_alike(row)).fold((to - at) / len, usize::min), len]
                };
                // SAFETY: as many elements as all rows have lie before `to`, which is at most the number of elements, the outputs' length.
                let outs = shared.map(|out| unsafe { out.get().add(at) });
                let mut inputs = [Input::of(std::ptr::null::<T>()); N];
                for ((source, room), input) in self.sources.iter().zip(&mut rooms).zip(&mut inputs) {
                    *input = match (source, source.number()) {
                        // SAFETY: a number has room.
                        (_, Some(x)) => unsafe { repeated(room.as_mut_ptr(), x) },
                        // SAFETY: the slice has all elements.
                        (Source::Direct(data), _) => Input::rows(unsafe { data.as_ptr().add(at) }, len),
                        (Source::Output, _) => Input::rows(outs[0].cast(), len),
                        (Source::Strided(data, walk), _) => {
                            let ([_, first], [_, step], [_, stride]) = (walk.offsets_of(at), walk.run_strides(), walk.inner_strides());
                            // SAFETY: the view that the walk was made of proved that its offsets lie inside of `data`.
                            let first = unsafe { data.as_ptr().add(first) };
                            match (stride, step) {
                                (1, _) => Input::rows(first, step),
                                // SAFETY: as above; a number has room.
                                (_, 0) => unsafe { repeated(room.as_mut_ptr(), *first) },
                                _ => Input::number_of_each_row(first, step),
                            }
                        }
                        _ => continue,
                    };
                }
                f(inputs, outs, size);
                at += size[0] * size[1];
            }
        });
    }
}
