//! One walk over N operands of the same shape and different strides: dimensions of one element are dropped, neighbours that
//! all operands can step through as one are merged, and what remains is handed out as inner runs, each with an offset per operand.
//! Every strided kernel uses it. It touches no memory: offsets are numbers, bounds are the business of the views they index.

use std::ops::Range;

/// The merged loop nest over `N` operands. Elements are numbered in walk order, so any range of them is a task for a thread.
///
/// The numbering is row-major over the shape ([`Walk::new`]), or over the shape with its dimensions ordered by the first
/// operand's strides ([`Walk::in_memory_order`]). Operand `k`'s elements of a run lie at `offset[k] + i · inner_strides()[k]`.
#[derive(Clone, Debug)]
pub struct Walk<const N: usize> {
    /// Merged dimensions outside of the run, outermost first: extent, and each operand's stride.
    outer: Vec<(usize, [usize; N])>,
    run_len: usize,
    inner_strides: [usize; N],
    offsets: [usize; N],
    runs: usize,
}

impl<const N: usize> Walk<N> {
    /// Walks `shape` in row-major order; operand `k` has `strides[k]` and begins at `offsets[k]`.
    ///
    /// # Panics
    /// If a stride list has another length than `shape`.
    pub fn new(shape: &[usize], strides: [&[usize]; N], offsets: [usize; N]) -> Self {
        Self::merged(dimensions(shape, strides), offsets)
    }

    /// Walks `shape` in the order in which the first operand lies in memory (largest stride outermost, ties in row-major order),
    /// so that a dense but permuted output, such as one in channels-last order, is written front to back.
    ///
    /// # Panics
    /// If a stride list has another length than `shape`.
    pub fn in_memory_order(shape: &[usize], strides: [&[usize]; N], offsets: [usize; N]) -> Self {
        let mut dims = dimensions(shape, strides);
        dims.sort_by(|a, b| b.1[0].cmp(&a.1[0]));
        Self::merged(dims, offsets)
    }

    fn merged(dims: Vec<(usize, [usize; N])>, offsets: [usize; N]) -> Self {
        let mut outer: Vec<(usize, [usize; N])> = Vec::with_capacity(dims.len());
        for (extent, strides) in dims {
            match outer.last_mut() {
                // The outer dimension continues where the inner one ends, for every operand.
                Some((merged, of)) if (0..N).all(|k| of[k] == strides[k].wrapping_mul(extent)) => {
                    *merged = merged.saturating_mul(extent);
                    *of = strides;
                }
                _ => outer.push((extent, strides)),
            }
        }
        let (run_len, inner_strides) = outer.pop().unwrap_or((1, [1; N]));
        let runs = outer.iter().map(|d| d.0).product();
        Self { outer, run_len, inner_strides, offsets, runs }
    }

    /// The merged dimensions, outermost first, the run last: extent, and each operand's stride.
    pub fn dimensions(&self) -> Vec<(usize, [usize; N])> {
        self.outer.iter().copied().chain([(self.run_len, self.inner_strides)]).collect()
    }

    /// Elements of a run.
    #[inline]
    pub fn run_len(&self) -> usize {
        self.run_len
    }

    /// Distance between neighbouring elements of a run, for each operand. 1 is contiguous, 0 repeats one element.
    #[inline]
    pub fn inner_strides(&self) -> [usize; N] {
        self.inner_strides
    }

    /// Number of runs.
    #[inline]
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Number of elements.
    #[inline]
    pub fn numel(&self) -> usize {
        self.runs * self.run_len
    }

    /// Where run `run` begins, for each operand.
    pub fn offsets_of_run(&self, run: usize) -> [usize; N] {
        let (mut at, mut rest) = (self.offsets, run);
        for (extent, strides) in self.outer.iter().rev() {
            let i = rest % extent;
            rest /= extent;
            at = moved(at, *strides, i);
        }
        at
    }

    /// Where element `i` (in walk order) lies, for each operand.
    pub fn offsets_of(&self, i: usize) -> [usize; N] {
        moved(self.offsets_of_run(i / self.run_len), self.inner_strides, i % self.run_len)
    }

    /// Distance between a run and the next, for each operand, as long as there are [`runs_alike`](Self::runs_alike); 0 if there is one.
    pub fn run_strides(&self) -> [usize; N] {
        self.outer.last().map_or([0; N], |(_, strides)| *strides)
    }

    /// How many runs, from run `run` on, have the same distance from each other.
    pub fn runs_alike(&self, run: usize) -> usize {
        self.outer.last().map_or(1, |(extent, _)| extent - run % extent)
    }

    /// Whether operand `k` takes the same elements in every run.
    pub fn repeats(&self, k: usize) -> bool {
        self.outer.iter().all(|(_, strides)| strides[k] == 0)
    }

    /// The stretches from element `start` on, to be taken piece by piece.
    #[inline]
    pub fn stretches(&self, start: usize) -> Stretches<'_, N> {
        if start == 0 || self.outer.is_empty() {
            // Within the first run: no division, since short rows are walked one by one.
            return Stretches { cursor: Cursor::new(self, 0), skip: start };
        }
        let run_len = self.run_len.max(1);
        Stretches { cursor: Cursor::new(self, start / run_len), skip: start % run_len }
    }

    /// Each stretch of a run that lies in the range of elements, in order: offsets and length. The range's ends may cut runs.
    #[inline]
    pub fn stretches_of(&self, elements: Range<usize>) -> StretchesOf<'_, N> {
        StretchesOf { left: elements.len(), stretches: self.stretches(elements.start) }
    }
}

/// The stretches of a range of elements.
#[derive(Clone, Debug)]
pub struct StretchesOf<'a, const N: usize> {
    stretches: Stretches<'a, N>,
    left: usize,
}

impl<const N: usize> Iterator for StretchesOf<'_, N> {
    type Item = ([usize; N], usize);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let stretch = self.stretches.next(self.left);
        self.left -= stretch.1;
        Some(stretch)
    }
}

/// A place in a walk.
#[derive(Clone, Debug)]
pub struct Stretches<'a, const N: usize> {
    cursor: Cursor<'a, N>,
    skip: usize,
}

impl<const N: usize> Stretches<'_, N> {
    /// The next stretch, of at most `max > 0` elements: offsets and length. The caller stops at the walk's end.
    #[inline]
    pub fn next(&mut self, max: usize) -> ([usize; N], usize) {
        let walk = self.cursor.walk;
        let at = moved(self.cursor.at, walk.inner_strides, self.skip);
        let len = max.min(walk.run_len - self.skip);
        self.skip += len;
        if self.skip == walk.run_len {
            self.skip = 0;
            self.cursor.next();
        }
        (at, len)
    }
}

/// The offsets after `steps` steps of the given strides.
#[inline(always)]
fn moved<const N: usize>(at: [usize; N], strides: [usize; N], steps: usize) -> [usize; N] {
    let mut to = at;
    for k in 0..N {
        to[k] += steps * strides[k];
    }
    to
}

/// The dimensions that have not one element: extent, and each operand's stride. A dimension of none stays, alone.
fn dimensions<const N: usize>(shape: &[usize], strides: [&[usize]; N]) -> Vec<(usize, [usize; N])> {
    assert!(strides.iter().all(|s| s.len() == shape.len()), "every operand needs a stride for each dimension");
    if shape.contains(&0) {
        return vec![(0, [1; N])];
    }
    (0..shape.len()).filter(|&d| shape[d] != 1).map(|d| (shape[d], std::array::from_fn(|k| strides[k][d]))).collect()
}

/// An odometer over the outer dimensions.
#[derive(Clone, Debug)]
struct Cursor<'a, const N: usize> {
    walk: &'a Walk<N>,
    index: Vec<usize>,
    at: [usize; N],
}

impl<'a, const N: usize> Cursor<'a, N> {
    fn new(walk: &'a Walk<N>, run: usize) -> Self {
        let mut index = vec![0; walk.outer.len()];
        let mut rest = run;
        for (i, (extent, _)) in index.iter_mut().zip(&walk.outer).rev() {
            *i = rest % (*extent).max(1);
            rest /= (*extent).max(1);
        }
        let mut at = walk.offsets;
        for (&i, (_, strides)) in index.iter().zip(&walk.outer) {
            at = moved(at, *strides, i);
        }
        Self { walk, index, at }
    }

    /// Moves to the next run; past the last one it is back at the first.
    #[inline]
    fn next(&mut self) {
        for (i, (extent, strides)) in self.index.iter_mut().zip(&self.walk.outer).rev() {
            *i += 1;
            if *i < *extent {
                self.at = moved(self.at, *strides, 1);
                return;
            }
            *i = 0;
            for (at, stride) in self.at.iter_mut().zip(strides) {
                *at -= (extent - 1) * stride;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row_major(shape: &[usize]) -> Vec<usize> {
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        strides
    }

    fn naive(shape: &[usize], strides: &[usize], offset: usize) -> Vec<usize> {
        let n: usize = shape.iter().product();
        let of = row_major(shape);
        (0..n).map(|i| offset + (0..shape.len()).map(|d| i / of[d].max(1) % shape[d] * strides[d]).sum::<usize>()).collect()
    }

    #[test]
    fn every_element_is_visited_in_order() {
        let cases: &[(&[usize], &[usize], &[usize])] = &[
            (&[2, 3, 4], &[12, 4, 1], &[0, 1, 0]),
            (&[2, 3, 4], &[1, 8, 2], &[12, 4, 1]),
            (&[2, 1, 4, 5], &[20, 99, 5, 1], &[20, 7, 5, 1]),
            (&[], &[], &[]),
            (&[1, 1], &[5, 6], &[0, 0]),
            (&[3, 0, 2], &[1, 1, 1], &[0, 0, 0]),
            (&[7], &[3], &[0]),
        ];
        for &(shape, a, b) in cases {
            let walk = Walk::new(shape, [a, b], [5, 0]);
            let (ra, rb) = (naive(shape, a, 5), naive(shape, b, 0));
            assert_eq!(walk.numel(), ra.len());
            let expand = |elements: Range<usize>| {
                let (mut va, mut vb) = (vec![], vec![]);
                for (at, len) in walk.stretches_of(elements) {
                    let [sa, sb] = walk.inner_strides();
                    va.extend((0..len).map(|i| at[0] + i * sa));
                    vb.extend((0..len).map(|i| at[1] + i * sb));
                }
                (va, vb)
            };
            for start in 0..=ra.len() {
                for end in start..=ra.len() {
                    assert_eq!(expand(start..end), (ra[start..end].to_vec(), rb[start..end].to_vec()), "{shape:?} {start}..{end}");
                }
            }
            for (i, (&a, &b)) in ra.iter().zip(&rb).enumerate() {
                assert_eq!(walk.offsets_of(i), [a, b]);
            }
            if walk.numel() > 0 {
                let begins: Vec<_> = (0..walk.runs()).map(|run| walk.offsets_of_run(run)).collect();
                let stretches: Vec<_> = walk.stretches_of(0..walk.numel()).map(|(at, _)| at).collect();
                assert_eq!(stretches, begins);
                for (run, begin) in begins.iter().enumerate() {
                    let alike = walk.runs_alike(run);
                    assert!(alike > 0 && run + alike <= walk.runs());
                    for i in 0..alike {
                        assert_eq!(begins[run + i], moved(*begin, walk.run_strides(), i));
                    }
                }
            }
        }
    }

    #[test]
    fn dimensions_merge_where_all_operands_allow() {
        assert_eq!(Walk::new(&[2, 3, 4], [&[12, 4, 1], &[12, 4, 1]], [0, 0]).runs(), 1);
        // A bias along the last dimension merges the leading ones.
        let bias = Walk::new(&[2, 3, 4], [&[12, 4, 1], &[0, 0, 1]], [0, 0]);
        assert_eq!((bias.runs(), bias.run_len(), bias.inner_strides()), (6, 4, [1, 1]));
        // A bias along the channels is constant over a run of pixels.
        let channels = Walk::new(&[2, 3, 4, 4], [&[48, 16, 4, 1], &[0, 1, 0, 0]], [0, 0]);
        assert_eq!((channels.runs(), channels.run_len(), channels.inner_strides()), (6, 16, [1, 0]));
    }

    #[test]
    fn memory_order_makes_channels_last_contiguous() {
        let nhwc: &[usize] = &[48, 1, 12, 3];
        let walk = Walk::in_memory_order(&[2, 3, 4, 4], [nhwc, nhwc], [0, 0]);
        assert_eq!((walk.runs(), walk.inner_strides()), (1, [1, 1]));
        let bias = Walk::in_memory_order(&[2, 3, 4, 4], [nhwc, &[0, 1, 0, 0]], [0, 0]);
        assert_eq!((bias.runs(), bias.run_len(), bias.inner_strides()), (32, 3, [1, 1]));
    }
}
