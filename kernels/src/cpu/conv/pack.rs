//! Weights rearranged into the panels that the micro-kernel reads: blocks of up to NR columns, row after row.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::{MAX_NR, MicroKernels};
use super::super::gemm::pack::{Strip, pack};
use super::super::isa::{WithSimd, dispatch};
use super::super::parallel::{self, SharedMut};
use super::super::simd::{F32s, I32s, Simd};
use super::Gather;
use half::bf16;

/// For each group a matrix of `depth` rows and `cols` columns, cut into panels of NR columns (the last may be narrower);
/// a panel's rows are contiguous, columns beyond the matrix are 0.
pub(super) struct Panels {
    buffer: Buffer,
    cut: Cut,
}

/// How a matrix is cut into panels.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    depth: usize,
    cols: usize,
    nr: usize,
    /// Width of the last panel.
    last: usize,
}

impl Cut {
    pub fn new(kernels: &MicroKernels, depth: usize, cols: usize) -> Self {
        Self { depth, cols, nr: kernels.nr, last: kernels.panel_width((cols - 1) % kernels.nr + 1) }
    }

    /// Number of panels.
    pub fn count(self) -> usize {
        self.cols.div_ceil(self.nr)
    }

    /// Elements of all panels.
    fn len(self) -> usize {
        self.depth * ((self.count() - 1) * self.nr + self.last)
    }

    fn width(self, i: usize) -> usize {
        if i + 1 == self.count() { self.last } else { self.nr }
    }

    /// The panel that `data` holds.
    fn panel(self, i: usize, data: &[f32]) -> Panel<'_> {
        let first = i * self.nr;
        Panel { data, stride: self.width(i), first, cols: (self.cols - first).min(self.nr) }
    }
}

/// Weights as a gather's micro-kernels multiply them.
pub(super) trait Weights: Sync {
    /// The micro-kernels.
    fn kernels(&self) -> &'static MicroKernels;

    /// Packs the panel of `cols` target channels of a group from `first` on, `width` wide: rows are `(tap, source word)` in the given order of
    /// taps.
    fn pack(&self, order: &[usize], group: usize, first: usize, cols: usize, width: usize, panel: &mut [f32]);

    /// One panel, into a buffer of its own.
    fn packed<'a>(
        &self,
        order: &[usize],
        group: usize,
        cut: Cut,
        i: usize,
        buffer: &'a mut Option<Buffer>,
    ) -> Result<Panel<'a>, OutOfMemory> {
        let data = buffer.insert(Buffer::new(size_of::<f32>() * cut.depth * cut.width(i))?).as_slice_mut();
        self.pack(order, group, i * cut.nr, (cut.cols - i * cut.nr).min(cut.nr), cut.width(i), data);
        Ok(cut.panel(i, data))
    }
}

/// Weights as memory holds them. Source words are the channels of f32, or two neighbouring channels of bf16, of which there is an even number;
/// `g` counts channels.
pub(super) struct InMemory<'a, T> {
    pub g: &'a Gather,
    pub w: &'a [T],
}

impl<T> InMemory<'_, T> {
    /// A panel of a group from target channel `first` on, to be packed.
    fn panel<'a>(
        &'a self,
        order: &'a [usize],
        group: usize,
        first: usize,
        cols: usize,
        width: usize,
        panel: &'a mut [f32],
    ) -> ByTap<'a, T> {
        let g = self.g;
        ByTap { g, w: &self.w[g.group_start(group) + first * g.out_stride..], order, cols, width, panel }
    }
}

impl Weights for InMemory<'_, f32> {
    fn kernels(&self) -> &'static MicroKernels {
        MicroKernels::get()
    }
    fn pack(&self, order: &[usize], group: usize, first: usize, cols: usize, width: usize, panel: &mut [f32]) {
        dispatch(self.panel(order, group, first, cols, width, panel));
    }
}

impl Weights for InMemory<'_, bf16> {
    fn kernels(&self) -> &'static MicroKernels {
        MicroKernels::bf16_pairs()
    }
    fn pack(&self, order: &[usize], group: usize, first: usize, cols: usize, width: usize, panel: &mut [f32]) {
        dispatch(self.panel(order, group, first, cols, width, panel));
    }
}

/// Packs a panel of [`InMemory`]; `w` begins at its first column.
struct ByTap<'a, T> {
    g: &'a Gather,
    w: &'a [T],
    order: &'a [usize],
    cols: usize,
    width: usize,
    panel: &'a mut [f32],
}

impl WithSimd for ByTap<'_, f32> {
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

impl ByTap<'_, f32> {
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

impl WithSimd for ByTap<'_, bf16> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        if self.order.is_empty() {
            return;
        }
        if self.g.in_stride == self.g.taps() { self.by_target(s) } else { self.by_source(s) }
    }
}

impl ByTap<'_, bf16> {
    /// All weights of a target channel follow one another: those of some source channels are transposed as the words they lie in, of which then
    /// the halves that belong together are joined.
    #[inline(always)]
    fn by_target<S: Simd>(self, s: S) {
        const CHANNELS: usize = 32;
        let (g, taps, width) = (self.g, self.g.taps(), self.width);
        let strip = |first: usize, channels: usize| {
            let (src, k) = (self.w[first * taps..].as_ptr().cast::<f32>(), channels * taps / 2);
            Strip { src, lanes: self.cols, lane_stride: g.out_stride / 2, k, k_stride: 1 }
        };
        if taps == 1 {
            // SAFETY: the strip's weights are those between existing channels; the panel has `cin / 2` rows.
            return unsafe { pack(s, strip(0, g.cin), width, self.panel.as_mut_ptr()) };
        }
        let mut turned = vec![0f32; CHANNELS.min(g.cin) * taps / 2 * width];
        for first in (0..g.cin).step_by(CHANNELS) {
            let channels = CHANNELS.min(g.cin - first);
            // SAFETY: the strip's weights are those between existing channels; as many rows were allocated.
            unsafe { pack(s, strip(first, channels), width, turned.as_mut_ptr()) };
            for (slot, tap) in self.order.iter().enumerate() {
                for c in (0..channels).step_by(2) {
                    let [low, high] = [c * taps + tap, (c + 1) * taps + tap];
                    let to = &mut self.panel[(slot * g.cin + first + c) / 2 * width..][..width];
                    join(s, &turned[low / 2 * width..][..width], low % 2 == 1, &turned[high / 2 * width..][..width], high % 2 == 1, to);
                }
            }
        }
    }

    /// All weights of a source channel follow one another: those of two are joined, and then transposed so that a tap's are neighbours.
    #[inline(always)]
    fn by_source<S: Simd>(self, s: S) {
        let (g, taps, width) = (self.g, self.g.taps(), self.width);
        let (mut words, mut turned) = (vec![0f32; self.cols * taps], vec![0f32; taps * width]);
        for c in (0..g.cin).step_by(2) {
            let [low, high] = [c, c + 1].map(|c| &self.w[c * g.in_stride..][..words.len()]);
            for ((word, low), high) in words.iter_mut().zip(low).zip(high) {
                *word = f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
            }
            let strip = Strip { src: words.as_ptr(), lanes: self.cols, lane_stride: taps, k: taps, k_stride: 1 };
            // SAFETY: there are as many words, and room for a row of each tap.
            unsafe { pack(s, strip, width, turned.as_mut_ptr()) };
            for (slot, tap) in self.order.iter().enumerate() {
                self.panel[(slot * g.cin + c) / 2 * width..][..width].copy_from_slice(&turned[tap * width..][..width]);
            }
        }
    }
}

/// Words of a half of those of `low` and a half of those of `high`: the upper ones if so said.
#[inline(always)]
fn join<S: Simd>(s: S, low: &[f32], low_is_upper: bool, high: &[f32], high_is_upper: bool, to: &mut [f32]) {
    let len = to.len();
    assert!(low.len() == len && high.len() == len);
    for at in (0..len).step_by(S::LANES) {
        let count = S::LANES.min(len - at);
        // SAFETY: `count` words follow in all three.
        unsafe {
            let low = s.load_partial(low.as_ptr().add(at), count).to_bits();
            let high = s.load_partial(high.as_ptr().add(at), count).to_bits();
            let low = if low_is_upper { low.shr_logical::<16>() } else { low & s.splat_i32(0xFFFF) };
            let high = if high_is_upper { high & s.splat_i32(!0xFFFF) } else { high.shl::<16>() };
            (low | high).from_bits().store_partial(to.as_mut_ptr().add(at), count);
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
    /// Rows are `(tap, source word)` in the given order of taps, columns are target channels.
    pub fn by_tap(weights: &impl Weights, groups: usize, cut: Cut, order: &[usize]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(groups, cut)?;
        panels.fill(groups, |group, first, cols, width, panel| weights.pack(order, group, first, cols, width, panel));
        Ok(panels)
    }

    /// Rows are source channels, columns are `(tap, target channel)`.
    pub fn by_channel(g: &Gather, w: &[f32]) -> Result<Self, OutOfMemory> {
        let mut panels = Self::new(g.groups, Cut::new(MicroKernels::get(), g.cin, g.taps() * g.cout))?;
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
    pub fn new(groups: usize, cut: Cut) -> Result<Self, OutOfMemory> {
        Ok(Self { buffer: Buffer::new(size_of::<f32>() * groups * cut.len())?, cut })
    }

    /// Number of panels of a group.
    pub fn count(&self) -> usize {
        self.cut.count()
    }

    /// Panel `i` of `group`.
    pub fn panel(&self, group: usize, i: usize) -> Panel<'_> {
        let Cut { depth, nr, .. } = self.cut;
        let start = group * self.cut.len() + i * depth * nr;
        self.cut.panel(i, &self.buffer.as_slice()[start..][..depth * self.cut.width(i)])
    }

    /// Calls `pack(part, first column, columns, width, panel)` for each of so many parts of each panel of the first group; together they write
    /// all of it.
    pub fn fill_parts(&mut self, parts: usize, pack: impl Fn(usize, usize, usize, usize, SharedMut<f32>) + Sync) {
        let cut = self.cut;
        let data = SharedMut::new(&mut self.buffer.as_slice_mut::<f32>()[..cut.len()]);
        // About a nanosecond an element.
        parallel::for_each(parts * cut.count(), cut.len(), |i| {
            let (panel, part) = (i / parts, i % parts);
            let first = panel * cut.nr;
            // SAFETY: the panel lies in the buffer.
            pack(part, first, (cut.cols - first).min(cut.nr), cut.width(panel), unsafe { data.add(cut.depth * first) });
        });
    }

    /// Calls `pack(group, first column, columns, width, panel)` for each panel.
    pub fn fill(&mut self, groups: usize, pack: impl Fn(usize, usize, usize, usize, &mut [f32]) + Sync) {
        let cut = self.cut;
        let Cut { depth, cols, nr, .. } = cut;
        let count = cut.count();
        let data = self.buffer.as_slice_mut::<f32>();
        let mut panels: Vec<&mut [f32]> = Vec::with_capacity(groups * count);
        for group in data.chunks_mut(cut.len().max(1)) {
            panels.extend(group.chunks_mut((depth * nr).max(1)));
        }
        // About a nanosecond an element.
        let ns = panels.iter().map(|p| p.len()).sum();
        parallel::for_each_chunk(&mut panels, 1, ns, |i, panel| {
            let (group, first) = (i / count, i % count * nr);
            pack(group, first, (cols - first).min(nr), cut.width(i % count), panel[0]);
        });
    }
}
