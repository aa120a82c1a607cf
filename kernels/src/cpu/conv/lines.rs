//! A gather with three neighbouring taps along the last axis, for vectors of AVX-512: each source pixel of a line is multiplied
//! by the weights of all three taps at once, so that a value that is read serves three multiply-adds instead of one. The three sums of a pixel
//! belong to three neighbouring targets, which are put together as the line runs by. A tile of one vector that holds targets instead reads a
//! value for each multiply-add, as fast as the machine can read.

#![allow(clippy::needless_range_loop, reason = "arrays of registers, whose loops are unrolled")]

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::MicroKernels;
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel::{self, SharedMut};
use super::super::simd::{F32s, Simd};
use super::pack::{InMemory, Weights};
use super::{Gather, part_start};
use std::ops::Range;

/// Taps along the last axis.
const TAPS: usize = 3;

/// Source pixels of a tile at most: with the weights of a channel, their sums fill 32 registers.
const MAX_ROWS: usize = 9;

/// Bytes of weights at most: they are read for each line, from L2.
const MOST_WEIGHTS: usize = 256 << 10;

/// Multiply-adds of a task: some 10 µs.
const TASK_MACS: usize = 1 << 20;

/// Tasks that a call of few lines is cut into if they are long enough.
const MIN_TASKS: usize = 16;

/// Targets of a part of a line at least: the sources at its ends are multiplied for both neighbours.
const MIN_PART: usize = 64;

/// Lanes of the vectors of AVX-512. With the 16 registers of AVX2 there is room for four pixels only: half as fast as tiles of targets.
const LANES: usize = 16;

/// Whether this takes less time than tiles of targets.
pub(super) fn pays(g: &Gather) -> bool {
    let lanes = MicroKernels::get().lanes;
    let weights = size_of::<f32>() * g.taps() * g.cin * g.cout.next_multiple_of(lanes);
    lanes == LANES && g.cin > 0 && 2 * g.cout > lanes && weights <= MOST_WEIGHTS && neighbours(g).is_some()
}

/// The first source of the first target, and the taps by rising source, if those of the last axis are three neighbours of each target.
fn neighbours(g: &Gather) -> Option<(isize, [usize; TAPS])> {
    let source = |target: usize, tap: usize| g.axes[2].source(target, tap);
    if g.kernel[2] != TAPS || source(1, 0)? - source(0, 0)? != 1 {
        return None;
    }
    let order = if source(0, 0)? < source(0, 1)? { [0, 1, 2] } else { [2, 1, 0] };
    let first = source(0, order[0])?;
    let follow = (1..TAPS).all(|i| source(0, order[i]) == Some(first + i as isize));
    (follow && (1 - TAPS as isize..=0).contains(&first)).then_some((first, order))
}

/// See [`super::forward`]; `x` and `y` are the source and target images of a gather for which this [`pays`].
pub(super) fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    let Some((first, order)) = neighbours(g) else { return Ok(()) };
    let lanes = MicroKernels::get().lanes;
    let order: Vec<usize> = (0..g.kernel[0] * g.kernel[1]).flat_map(|line| order.map(|tap| line * TAPS + tap)).collect();
    let (panels, panel) = (g.cout.div_ceil(lanes), order.len() * g.cin * lanes);
    let mut weights = Buffer::new(size_of::<f32>() * g.groups * panels * panel)?;
    let weights = &mut weights.as_slice_mut::<f32>()[..g.groups * panels * panel];
    for (i, panel) in weights.chunks_exact_mut(panel).enumerate() {
        let (group, first) = (i / panels, i % panels * lanes);
        InMemory { g, w }.pack(&order, group, first, lanes.min(g.cout - first), lanes, panel);
    }
    let lines = g.n * g.target[0] * g.target[1];
    let macs = g.target_pixels() * g.groups * g.cout * g.cin * g.taps();
    let parts = MIN_TASKS.div_ceil(lines).min(g.target[2] / MIN_PART).max(1);
    let tasks = macs.div_ceil(TASK_MACS).clamp(1, lines * parts);
    let (y, weights) = (SharedMut::new(y), &*weights);
    parallel::for_each(tasks, macs / 50, |i| {
        let some = part_start(lines * parts, tasks, i)..part_start(lines * parts, tasks, i + 1);
        dispatch(Lines { g, x, weights, bias, first, parts, some, y });
    });
    Ok(())
}

struct Lines<'a> {
    g: &'a Gather,
    x: &'a [f32],
    /// `[group][panel][tap by line and rising source][source channel][lane]`
    weights: &'a [f32],
    bias: Option<&'a [f32]>,
    /// The source of the first target of a line under the first tap.
    first: isize,
    /// How many parts each line of targets is cut into, and those that this task computes, counted through all lines.
    parts: usize,
    some: Range<usize>,
    y: SharedMut<f32>,
}

/// A line of sources under the taps of one line of the kernel: where it starts in the image, and where their weights do in a panel.
type Source = (usize, usize);

/// A panel of weights and the group of source channels that it multiplies.
#[derive(Clone, Copy)]
struct Panel<'a> {
    x: *const f32,
    weights: &'a [f32],
}

impl Lines<'_> {
    /// The sums of `R` source pixels from `at` on for each tap.
    ///
    /// # Safety
    /// The pixels must lie in the lines of `sources`, which must be lines of `x`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&self, s: S, panel: Panel, sources: &[Source], at: usize) -> [[S::F32; TAPS]; R] {
        let (cin, step) = (self.g.cin, self.g.groups * self.g.cin);
        let mut acc = [[s.zero(); TAPS]; R];
        for &(x, weights) in sources {
            let (x, weights) = (panel.x.wrapping_add(x + at * step), panel.weights[weights..].as_ptr());
            for c in 0..cin {
                let mut w = [s.zero(); TAPS];
                for j in 0..TAPS {
                    // SAFETY: a line of taps has the weights of three taps, a vector for each channel.
                    w[j] = unsafe { s.load(weights.add((j * cin + c) * S::LANES)) };
                }
                for r in 0..R {
                    // SAFETY: the caller's word: pixel `at + r` lies in the line, and `c` is one of its channels.
                    let a = s.splat(unsafe { *x.add(r * step + c) });
                    for j in 0..TAPS {
                        acc[r][j] = a.mul_add(w[j], acc[r][j]);
                    }
                }
            }
        }
        acc
    }

    /// The `targets` of a line, `cols` of their channels from `first` on.
    #[inline(always)]
    fn part<S: Simd>(&self, s: S, panel: Panel, [first, cols]: [usize; 2], line: usize, targets: Range<usize>, sources: &[Source]) {
        let g = self.g;
        let bias = match self.bias {
            Some(bias) => s.load_slice_partial(&bias[first..first + cols]),
            None => s.zero(),
        };
        let to = self.y.get().wrapping_add(line * g.target[2] * g.groups * g.cout + first);
        // A target's last source lies so much further on than itself.
        let ahead = self.first + TAPS as isize - 1;
        let within = |at: isize| at.clamp(0, g.source[2] as isize) as usize;
        let (start, end) = (within(targets.start as isize + self.first), within(targets.end as isize + ahead));
        let rest = end as isize..targets.end as isize + ahead;
        let mut sums = Sums::<S> { to, step: g.groups * g.cout, cols, targets, bias, one: s.zero(), two: s.zero() };
        let count = (end - start).div_ceil(MAX_ROWS);
        for tile in 0..count {
            let [at, next] = [tile, tile + 1].map(|tile| start + part_start(end - start, count, tile));
            let target = at as isize - ahead;
            macro_rules! rows {
                ($($rows:literal),*) => {
                    match next - at {
                        // SAFETY: these pixels lie in the lines of sources.
                        $($rows => sums.add::<$rows>(target, unsafe { self.tile::<S, $rows>(s, panel, sources, at) }),)*
                        _ => {}
                    }
                };
            }
            rows!(1, 2, 3, 4, 5, 6, 7, 8, 9);
        }
        for at in rest {
            sums.add::<1>(at - ahead, [[s.zero(); TAPS]]);
        }
    }
}

/// Puts the sums of source pixels together as a line runs by.
struct Sums<S: Simd> {
    to: *mut f32,
    /// From a target to the next.
    step: usize,
    cols: usize,
    /// Those that are written.
    targets: Range<usize>,
    bias: S::F32,
    /// What the sources so far make of the target that has seen one of three, and of that which has seen two.
    one: S::F32,
    two: S::F32,
}

impl<S: Simd> Sums<S> {
    /// Adds neighbouring source pixels; the first is the last source of `target`.
    #[inline(always)]
    fn add<const R: usize>(&mut self, target: isize, sums: [[S::F32; TAPS]; R]) {
        for r in 0..R {
            let [first, second, third] = sums[r];
            let value = self.two + third + self.bias;
            (self.one, self.two) = (first, self.one + second);
            let target = (target + r as isize) as usize;
            if self.targets.contains(&target) {
                let to = self.to.wrapping_add(target * self.step);
                // SAFETY: a target of the line, which is this task's, has `cols` channels, at most a vector's lanes.
                unsafe { if self.cols == S::LANES { value.store(to) } else { value.store_partial(to, self.cols) } }
            }
        }
    }
}

impl WithSimd for Lines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let g = self.g;
        assert!(self.x.len() == g.source_pixels() * g.groups * g.cin);
        assert!(self.weights.len() == g.groups * g.cout.div_ceil(S::LANES) * g.taps() * g.cin * S::LANES);
        let mut sources = Vec::with_capacity(g.kernel[0] * g.kernel[1]);
        let (panels, taps) = (g.cout.div_ceil(S::LANES), TAPS * g.cin * S::LANES);
        for part in self.some.clone() {
            let (line, part) = (part / self.parts, part % self.parts);
            let targets = part_start(g.target[2], self.parts, part)..part_start(g.target[2], self.parts, part + 1);
            sources.clear();
            g.for_each_source_line(line, |tap, line| sources.push((line * g.source[2] * g.groups * g.cin, tap * taps)));
            for (i, weights) in self.weights.chunks_exact(taps * g.kernel[0] * g.kernel[1]).enumerate() {
                let (group, first) = (i / panels, i % panels * S::LANES);
                let panel = Panel { x: self.x.as_ptr().wrapping_add(group * g.cin), weights };
                self.part(s, panel, [group * g.cout + first, S::LANES.min(g.cout - first)], line, targets.clone(), &sources);
            }
        }
    }
}
