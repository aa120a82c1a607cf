//! Weights rearranged into the panels that the micro-kernel reads: blocks of up to NR columns, row after row.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::{MAX_NR, MicroKernels};
use super::super::gemm::pack::{Strip, pack};
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel;
use super::super::simd::Simd;
use super::Gather;

/// For each group a matrix of `depth` rows and `cols` columns, cut into panels of NR columns (the last may be narrower);
/// a panel's rows are contiguous, columns beyond the matrix are 0.
pub(super) struct Panels {
    buffer: Buffer,
    depth: usize,
    cols: usize,
    nr: usize,
    /// Width of the last panel.
    last: usize,
}

/// Packs a panel of [`Panels::by_tap`]; `w` begins at its first column.
struct ByTap<'a> {
    g: &'a Gather,
    w: &'a [f32],
    order: &'a [usize],
    cols: usize,
    width: usize,
    panel: &'a mut [f32],
}

impl WithSimd for ByTap<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (g, taps) = (self.g, self.g.taps());
        if taps == 1 && !self.order.is_empty() {
            let strip = Strip { src: self.w.as_ptr(), lanes: self.cols, lane_stride: g.out_stride, k: g.cin, k_stride: g.in_stride };
            // SAFETY: the strip's weights are those between existing channels; the panel has `cin` rows.
            unsafe { pack(s, strip, self.width, self.panel.as_mut_ptr()) };
        } else if g.in_stride == taps {
            self.by_target(s);
        } else {
            self.by_source();
        }
    }
}

impl ByTap<'_> {
    /// All weights of a target channel follow one another: some source channels' of all columns are transposed at once.
    #[inline(always)]
    fn by_target<S: Simd>(self, s: S) {
        const CHANNELS: usize = 16;
        let (g, taps, width) = (self.g, self.g.taps(), self.width);
        let mut turned = vec![0f32; CHANNELS.min(g.cin) * taps * width];
        for first in (0..g.cin).step_by(CHANNELS) {
            let channels = CHANNELS.min(g.cin - first);
            let src = self.w[first * taps..].as_ptr();
            let strip = Strip { src, lanes: self.cols, lane_stride: g.out_stride, k: channels * taps, k_stride: 1 };
            // SAFETY: the strip's weights are those between existing channels; as many rows were allocated.
            unsafe { pack(s, strip, width, turned.as_mut_ptr()) };
            for (slot, tap) in self.order.iter().enumerate() {
                for c in 0..channels {
                    let to = &mut self.panel[(slot * g.cin + first + c) * width..][..width];
                    to.copy_from_slice(&turned[(c * taps + tap) * width..][..width]);
                }
            }
        }
    }

    /// All weights of a source channel follow one another. A run of taps is transposed on the stack, so that both reads and writes are runs.
    fn by_source(self) {
        const TAPS: usize = 16;
        let (g, cols, width) = (self.g, self.cols, self.width);
        let mut tile = [[0f32; MAX_NR]; TAPS];
        for c in 0..g.cin {
            for (run, taps) in self.order.chunks(TAPS).enumerate() {
                for j in 0..cols {
                    let w = &self.w[c * g.in_stride + j * g.out_stride..][..g.taps()];
                    for (row, &tap) in tile.iter_mut().zip(taps) {
                        row[j] = w[tap];
                    }
                }
                for (slot, row) in tile[..taps.len()].iter().enumerate() {
                    let at = ((run * TAPS + slot) * g.cin + c) * width;
                    self.panel[at..at + cols].copy_from_slice(&row[..cols]);
                    self.panel[at + cols..at + width].fill(0.0);
                }
            }
        }
    }
}

/// One panel: row `k` lies at `data[k * stride..]`.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    /// Its first column in the matrix.
    pub first: usize,
    /// Columns that belong to the matrix.
    pub cols: usize,
}

impl Panels {
    /// Rows are `(tap, source channel)` in the given order of taps, columns are target channels.
    pub fn by_tap(kernels: &MicroKernels, g: &Gather, w: &[f32], order: &[usize]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(kernels, g.groups, order.len() * g.cin, g.cout)?;
        panels.fill(g.groups, |group, first, cols, width, panel| {
            let w = &w[g.group_start(group) + first * g.out_stride..];
            dispatch(ByTap { g, w, order, cols, width, panel });
        });
        Ok(panels)
    }

    /// Rows are source channels, columns are `(tap, target channel)`.
    pub fn by_channel(g: &Gather, w: &[f32]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(MicroKernels::get(), g.groups, g.cin, g.taps() * g.cout)?;
        panels.fill(g.groups, |group, first, cols, width, panel| {
            for (c, row) in panel.chunks_mut(width).enumerate() {
                let start = g.group_start(group) + c * g.in_stride;
                for (j, out) in row[..cols].iter_mut().enumerate() {
                    let (tap, channel) = ((first + j) / g.cout, (first + j) % g.cout);
                    *out = w[start + channel * g.out_stride + tap];
                }
                row[cols..].fill(0.0);
            }
        });
        Ok(panels)
    }

    /// For `groups` matrices, not filled.
    pub fn new(kernels: &MicroKernels, groups: usize, depth: usize, cols: usize) -> Result<Self, OutOfMemory> {
        let nr = kernels.nr;
        let last = kernels.panel_width((cols - 1) % nr + 1);
        let buffer = Buffer::new(size_of::<f32>() * groups * depth * ((cols - 1) / nr * nr + last))?;
        Ok(Self { buffer, depth, cols, nr, last })
    }

    /// Elements of a group's matrix.
    fn group_len(&self) -> usize {
        self.depth * ((self.count() - 1) * self.nr + self.last)
    }

    /// Number of panels of a group.
    pub fn count(&self) -> usize {
        self.cols.div_ceil(self.nr)
    }

    /// Panel `i` of `group`.
    pub fn panel(&self, group: usize, i: usize) -> Panel<'_> {
        let stride = if i + 1 == self.count() { self.last } else { self.nr };
        let start = group * self.group_len() + i * self.depth * self.nr;
        let first = i * self.nr;
        let data = &self.buffer.as_slice()[start..start + self.depth * stride];
        Panel { data, stride, first, cols: (self.cols - first).min(self.nr) }
    }

    /// Calls `pack(group, first column, columns, width, panel)` for each panel.
    pub fn fill(&mut self, groups: usize, pack: impl Fn(usize, usize, usize, usize, &mut [f32]) + Sync) {
        let (depth, cols, nr, count, group_len) = (self.depth, self.cols, self.nr, self.count(), self.group_len());
        let last = self.last;
        let data = self.buffer.as_slice_mut::<f32>();
        let mut panels: Vec<&mut [f32]> = Vec::with_capacity(groups * count);
        for group in data.chunks_mut(group_len.max(1)) {
            panels.extend(group.chunks_mut((depth * nr).max(1)));
        }
        // About a nanosecond an element.
        let ns = panels.iter().map(|p| p.len()).sum();
        parallel::for_each_chunk(&mut panels, 1, ns, |i, panel| {
            let (group, first) = (i / count, i % count * nr);
            let width = if i % count + 1 == count { last } else { nr };
            pack(group, first, (cols - first).min(nr), width, panel[0]);
        });
    }
}
