//! A gather with one source channel: neighbouring targets of a line are the lanes of a vector. A tap's sources are then a vector of memory, and
//! its weights for some target channels multiply it one by one; the sums are turned as they are written. Where channels are lanes, a few
//! taps of one channel are too short a sum for what each tile costs, and few target channels leave lanes empty.

use super::super::gemm::micro::MicroKernels;
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel::{self, SharedMut};
use super::super::simd::{F32s, MAX_LANES, Simd};
use super::{Gather, part_start};
use std::ops::Range;

/// Multiply-adds of a task: some 10 µs.
const TASK_MACS: usize = 1 << 18;

/// Whether this takes less time than tiles of channels: lines of targets must fill vectors, and channels not more than one.
pub(super) fn pays(g: &Gather) -> bool {
    let (lanes, width) = (MicroKernels::get().lanes, g.target[2]);
    let fills = 4 * width >= 3 * width.next_multiple_of(lanes);
    let neighbours = g.axes[2].source(0, 0).zip(g.axes[2].source(1, 0)).is_some_and(|(first, second)| second - first == 1);
    lanes >= 8 && g.groups == 1 && g.cin == 1 && (lanes / 4..=lanes).contains(&g.cout) && neighbours && fills
}

/// See [`super::forward`]; `x` and `y` are the source and target images.
pub(super) fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let lines = g.n * g.target[0] * g.target[1];
    let macs = g.target_pixels() * g.cout * g.taps();
    let tasks = macs.div_ceil(TASK_MACS).clamp(1, lines);
    let (y, channels, taps) = (SharedMut::new(y), Channels::of(g, w, bias), Taps::of(g));
    parallel::for_each(tasks, macs / 50 + g.target_pixels(), |i| {
        let lines = part_start(lines, tasks, i)..part_start(lines, tasks, i + 1);
        dispatch(Lines { g, x, channels: &channels, taps: &taps, lines, y });
    });
}

/// The target channels: as many as a vector has lanes, or half or a quarter of that, of which those beyond the gather's have no weights.
struct Channels {
    width: usize,
    /// `[tap][width]`
    weights: Vec<f32>,
    bias: Vec<f32>,
}

impl Channels {
    fn of(g: &Gather, w: &[f32], bias: Option<&[f32]>) -> Self {
        let (lanes, taps) = (MicroKernels::get().lanes, g.taps());
        let width = [lanes / 4, lanes / 2].into_iter().find(|&width| g.cout <= width).unwrap_or(lanes);
        let mut weights = vec![0.0; taps * width];
        for (tap, weights) in weights.chunks_exact_mut(width).enumerate() {
            weights.iter_mut().zip(w[tap..].iter().step_by(g.out_stride)).for_each(|(to, &from)| *to = from);
        }
        let mut bias = bias.unwrap_or_default().to_vec();
        bias.resize(width, 0.0);
        Self { width, weights, bias }
    }
}

/// Where the sources of the taps of a line lie in a copy of it with zeros for the padding.
struct Taps {
    /// Values of a copy.
    len: usize,
    /// The source with which it begins.
    start: isize,
    /// For each tap of the last axis, where in the copy the first target's source lies.
    at: Vec<usize>,
}

impl Taps {
    fn of(g: &Gather) -> Self {
        let firsts: Vec<isize> = (0..g.kernel[2]).map(|tap| g.axes[2].source(0, tap).unwrap_or(0)).collect();
        let start = firsts.iter().copied().min().unwrap_or(0);
        let at: Vec<usize> = firsts.iter().map(|first| (first - start) as usize).collect();
        Self { len: g.target[2].next_multiple_of(MAX_LANES) + at.iter().copied().max().unwrap_or(0), start, at }
    }

    /// Copies a line of sources.
    fn copy(&self, line: &[f32], to: &mut [f32]) {
        let (before, to) = to.split_at_mut(((-self.start).max(0) as usize).min(self.len));
        let from = line.get(self.start.max(0) as usize..).unwrap_or_default();
        let (inside, after) = to.split_at_mut(from.len().min(to.len()));
        before.fill(0.0);
        inside.copy_from_slice(&from[..inside.len()]);
        after.fill(0.0);
    }
}

struct Lines<'a> {
    g: &'a Gather,
    x: &'a [f32],
    channels: &'a Channels,
    taps: &'a Taps,
    lines: Range<usize>,
    y: SharedMut<f32>,
}

impl Lines<'_> {
    /// Copies the sources of a line of targets, and lists for each tap that does not lie in the padding altogether its number, and where its sources are.
    fn sources(&self, line: usize, copies: &mut [f32], rows: &mut Vec<(usize, usize)>) {
        let g = self.g;
        rows.clear();
        g.for_each_source_line(line, |i, source| {
            let copy = &mut copies[i * self.taps.len..][..self.taps.len];
            self.taps.copy(&self.x[source * g.source[2]..][..g.source[2]], copy);
            rows.extend(self.taps.at.iter().enumerate().map(|(tap, at)| (i * g.kernel[2] + tap, i * self.taps.len + at)));
        });
    }

    /// The targets of a line, of `N` channels that are computed.
    #[inline(always)]
    fn line<S: Simd, const N: usize>(&self, s: S, line: usize, copies: &[f32], rows: &[(usize, usize)]) {
        let (width, channels) = (self.g.target[2], self.g.cout);
        let weights = self.channels.weights.as_chunks::<N>().0;
        let to = self.y.get().wrapping_add(line * width * channels);
        let (mut sums, mut turned) = ([0f32; MAX_LANES * MAX_LANES], [0f32; MAX_LANES * MAX_LANES]);
        for at in (0..width).step_by(S::LANES) {
            let mut acc = [s.zero(); N];
            for &(tap, from) in rows {
                let (x, weights) = (s.load_slice(&copies[from + at..]), &weights[tap]);
                for j in 0..N {
                    acc[j] = x.mul_add(s.splat(weights[j]), acc[j]);
                }
            }
            for j in 0..N {
                (acc[j] + s.splat(self.channels.bias[j])).store_slice(&mut sums[j * S::LANES..], S::LANES);
            }
            // SAFETY: the arrays have room for LANES rows of LANES values; `to` has the channels of the targets that are left of the line, and the
            // line is this task's.
            unsafe {
                s.transpose(sums.as_ptr(), S::LANES, turned.as_mut_ptr(), S::LANES);
                for i in 0..S::LANES.min(width - at) {
                    s.load_slice(&turned[i * S::LANES..]).store_partial(to.wrapping_add((at + i) * channels), channels);
                }
            }
        }
    }
}

impl WithSimd for Lines<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let g = self.g;
        assert!(self.x.len() == g.source_pixels() && self.channels.width <= S::LANES && g.cout <= self.channels.width);
        let mut copies = vec![0f32; g.kernel[0] * g.kernel[1] * self.taps.len];
        let mut rows = Vec::with_capacity(g.taps());
        for line in self.lines.clone() {
            self.sources(line, &mut copies, &mut rows);
            match self.channels.width {
                16 => self.line::<S, 16>(s, line, &copies, &rows),
                8 => self.line::<S, 8>(s, line, &copies, &rows),
                4 => self.line::<S, 4>(s, line, &copies, &rows),
                _ => self.line::<S, 2>(s, line, &copies, &rows),
            }
        }
    }
}
