//! Weights rearranged into the panels that the micro-kernel reads: blocks of up to NR columns, row after row.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::MicroKernels;
use super::super::parallel;
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
    pub fn by_tap(g: &Gather, w: &[f32], order: &[usize]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(g.groups, order.len() * g.cin, g.cout)?;
        panels.fill(g.groups, |group, first, cols, width, panel| {
            // A run of taps is transposed on the stack, so that both reads and writes are runs.
            const TAPS: usize = 16;
            let mut tile = [[0f32; super::super::gemm::micro::MAX_NR]; TAPS];
            for c in 0..g.cin {
                let start = g.group_start(group) + c * g.in_stride + first * g.out_stride;
                for (run, taps) in order.chunks(TAPS).enumerate() {
                    for j in 0..cols {
                        let w = &w[start + j * g.out_stride..][..g.taps()];
                        for (row, &tap) in tile.iter_mut().zip(taps) {
                            row[j] = w[tap];
                        }
                    }
                    for (slot, row) in tile[..taps.len()].iter().enumerate() {
                        let at = ((run * TAPS + slot) * g.cin + c) * width;
                        panel[at..at + cols].copy_from_slice(&row[..cols]);
                        panel[at + cols..at + width].fill(0.0);
                    }
                }
            }
        });
        Ok(panels)
    }

    /// Rows are source channels, columns are `(tap, target channel)`.
    pub fn by_channel(g: &Gather, w: &[f32]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(g.groups, g.cin, g.taps() * g.cout)?;
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

    fn new(groups: usize, depth: usize, cols: usize) -> Result<Self, OutOfMemory> {
        let kernels = MicroKernels::get();
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
    fn fill(&mut self, groups: usize, pack: impl Fn(usize, usize, usize, usize, &mut [f32]) + Sync) {
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
