//! A gather as tiles of target pixels × target channels held in registers while all taps and source channels are summed.
//!
//! Targets are sorted into classes that use the same taps, so that a strided transposed convolution does no work for taps
//! that miss and, where the classes are large enough, no work for the padding. Tiles are made of any pixels of a class:
//! the micro-kernel takes an address per row.

use super::super::alloc::OutOfMemory;
use super::super::gemm::micro::{Init, MicroKernels, Output, RowTiles, Tile};
use super::super::parallel::{self, SharedMut};
use super::axis::AxisClass;
use super::pack::{Panel, Panels};
use super::{Gather, part_start};

/// Below this many source channels the taps of a pixel are copied side by side: a segment as short as this would spend
/// as long on its row addresses as on its products.
pub(super) const PATCH_CHANNELS: usize = 8;

/// Pixels of a task: eight full tiles of AVX-512. Their addresses, and a panel of weights, stay in L2 for all panels.
const BLOCK: usize = 96;

/// Fewer tasks than this are split further by target channels: enough for some threads to share evenly.
const MIN_TASKS: usize = 16;

/// Targets of equal taps in all three dimensions.
pub(super) struct Class<'a> {
    pub axes: [&'a AxisClass; 3],
    /// Images × targets.
    pub pixels: usize,
}

impl Class<'_> {
    /// The taps, as indices into the kernel's `kd · kh · kw`, in the order in which a tile sums them.
    pub fn taps(&self, kernel: [usize; 3]) -> impl Iterator<Item = usize> {
        let [d, h, w] = self.axes;
        d.taps
            .iter()
            .flat_map(move |kd| h.taps.iter().flat_map(move |kh| w.taps.iter().map(move |kw| (kd * kernel[1] + kh) * kernel[2] + kw)))
    }

    pub fn tap_count(&self) -> usize {
        self.axes.iter().map(|a| a.taps.len()).product()
    }

    /// The image and the index into each axis' targets of a pixel.
    pub fn locate(&self, pixel: usize) -> (usize, [usize; 3]) {
        let [d, h, w] = self.axes.map(|a| a.targets.len());
        (pixel / (d * h * w), [pixel / (h * w) % d, pixel / w % h, pixel % w])
    }
}

/// The classes of a gather from those of its axes.
pub(super) fn classes<'a>(n: usize, axes: &'a [Vec<AxisClass>; 3]) -> Vec<Class<'a>> {
    let mut classes = Vec::new();
    for d in &axes[0] {
        for h in &axes[1] {
            for w in &axes[2] {
                classes.push(Class { axes: [d, h, w], pixels: n * d.targets.len() * h.targets.len() * w.targets.len() });
            }
        }
    }
    classes
}

pub(super) fn phases(g: &Gather) -> [Vec<AxisClass>; 3] {
    std::array::from_fn(|i| g.axes[i].phases(g.target[i], g.kernel[i]))
}

/// Exact classes, unless they would be so small (many taps over a small image) that most tiles would be, too.
fn exact_classes_if_large(g: &Gather) -> [Vec<AxisClass>; 3] {
    // Sorting costs a few nanoseconds for each target and tap of an axis, and only borders gain by it.
    const LONG_AXIS: usize = 1 << 16;
    if (0..3).any(|i| g.target[i] * g.kernel[i] > LONG_AXIS) {
        return phases(g);
    }
    let exact: [_; 3] = std::array::from_fn(|i| g.axes[i].exact_classes(g.target[i], g.source[i], g.kernel[i]));
    let count: usize = exact.iter().map(Vec::len).product();
    if count * 4 <= g.target_pixels() { exact } else { phases(g) }
}

struct Task {
    class: usize,
    pixels: std::ops::Range<usize>,
}

/// See [`super::forward`]; `x` and `y` are the source and target images.
pub(super) fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    let patches = g.cin < PATCH_CHANNELS;
    let axes = if patches { phases(g) } else { exact_classes_if_large(g) };
    let classes = classes(g.n, &axes);
    // Where each class' weights start. A patch is multiplied in one segment, so its taps lie together (no tap is in two phases).
    let order: Vec<usize> = if patches { classes.iter().flat_map(|c| c.taps(g.kernel)).collect() } else { (0..g.taps()).collect() };
    let mut slot_of_tap = vec![0; g.taps()];
    for (slot, &tap) in order.iter().enumerate() {
        slot_of_tap[tap] = slot;
    }
    let panels = Panels::by_tap(g, w, &order)?;

    let mut tasks = Vec::new();
    for (class, pixels) in classes.iter().map(|c| c.pixels).enumerate() {
        let blocks = pixels.div_ceil(BLOCK);
        tasks.extend((0..blocks).map(|b| Task { class, pixels: part_start(pixels, blocks, b)..part_start(pixels, blocks, b + 1) }));
    }
    let splits = MIN_TASKS.div_ceil(tasks.len() * g.groups).min(panels.count());
    let zeros = vec![0f32; g.cin];
    let run =
        Direct { g, x, bias, y: SharedMut::new(y), classes: &classes, panels: &panels, slot_of_tap: &slot_of_tap, zeros: &zeros, patches };
    let multiplications = g.target_pixels() * g.groups * g.cout * g.cin * g.taps_per_target();
    parallel::for_each(tasks.len() * g.groups * splits, multiplications / 50 + g.target_pixels(), |i| {
        let (i, split) = (i / splits, i % splits);
        let (task, group) = (&tasks[i / g.groups], i % g.groups);
        run.task(task, group, part_start(panels.count(), splits, split)..part_start(panels.count(), splits, split + 1));
    });
    Ok(())
}

struct Direct<'a> {
    g: &'a Gather,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
    classes: &'a [Class<'a>],
    panels: &'a Panels,
    slot_of_tap: &'a [usize],
    /// A source pixel in the padding.
    zeros: &'a [f32],
    patches: bool,
}

impl Direct<'_> {
    /// One block of pixels of one group, for a range of panels.
    fn task(&self, task: &Task, group: usize, panels: std::ops::Range<usize>) {
        let (g, class) = (self.g, &self.classes[task.class]);
        let kernels = MicroKernels::get();
        let tiles = kernels.row_tiles(task.pixels.len());
        let (segments, kc) = if self.patches { (1, class.tap_count() * g.cin) } else { (class.tap_count(), g.cin) };
        let mut patches = Vec::new();
        let rows = if self.patches {
            self.patch_rows(class, group, task.pixels.clone(), kc, &mut patches)
        } else {
            self.source_rows(class, group, task.pixels.start, tiles, segments)
        };
        let targets: Vec<usize> = task.pixels.clone().map(|p| self.target_offset(class, group, p)).collect();
        // The taps of a patch lie together in the panel, from its first on.
        let slots: Vec<usize> = class.taps(g.kernel).take(segments).map(|tap| self.slot_of_tap[tap]).collect();
        let segments = slots.len();
        for panel in panels {
            let panel = self.panels.panel(group, panel);
            let weights: Vec<*const f32> = slots.iter().map(|slot| panel.data[slot * g.cin * panel.stride..].as_ptr()).collect();
            for tile in 0..tiles.count {
                let (start, height) = (tiles.start(tile), tiles.height(tile));
                let rows = &rows[start * segments..(start + height) * segments];
                self.tile(group, rows, kc, &weights, panel, &targets[start..start + height]);
            }
        }
    }

    /// Copies a patch for each pixel; the addresses of the patches.
    fn patch_rows(
        &self,
        class: &Class,
        group: usize,
        pixels: std::ops::Range<usize>,
        len: usize,
        patches: &mut Vec<f32>,
    ) -> Vec<*const f32> {
        patches.resize(pixels.len() * len, 0.0);
        for (i, pixel) in pixels.clone().enumerate() {
            copy_patch(self.g, self.x, class, group, pixel, &mut patches[i * len..][..len]);
        }
        (0..pixels.len()).map(|i| patches[i * len..].as_ptr()).collect()
    }

    /// For each tile the addresses of its pixels' sources, segment by segment.
    fn source_rows(&self, class: &Class, group: usize, first: usize, tiles: RowTiles, segments: usize) -> Vec<*const f32> {
        let mut rows = vec![self.zeros.as_ptr(); tiles.start(tiles.count) * segments];
        if segments == 0 {
            return rows;
        }
        for tile in 0..tiles.count {
            let (start, height) = (tiles.start(tile), tiles.height(tile));
            let rows = &mut rows[start * segments..(start + height) * segments];
            for r in 0..height {
                self.pixel_sources(class, group, first + start + r, &mut rows[r..], height);
            }
        }
        rows
    }

    /// Writes the address of a pixel's source under each tap that does not hit the padding to `rows[0]`, `rows[height]`, …
    fn pixel_sources(&self, class: &Class, group: usize, pixel: usize, rows: &mut [*const f32], height: usize) {
        let g = self.g;
        let (image, at) = class.locate(pixel);
        let [d, h, w] = class.axes;
        let source = |axis: &AxisClass, at: usize, tap: usize| axis.first[at] + tap as isize * axis.step;
        let channels = g.groups * g.cin;
        let mut slot = 0;
        for kd in 0..d.taps.len() {
            let sd = source(d, at[0], kd);
            for kh in 0..h.taps.len() {
                let sh = source(h, at[1], kh);
                let inside = (0..g.source[0] as isize).contains(&sd) && (0..g.source[1] as isize).contains(&sh);
                let line = if inside { ((image * g.source[0] + sd as usize) * g.source[1] + sh as usize) * g.source[2] } else { 0 };
                for kw in 0..w.taps.len() {
                    let sw = source(w, at[2], kw);
                    if inside && (0..g.source[2] as isize).contains(&sw) {
                        rows[slot] = self.x[(line + sw as usize) * channels + group * g.cin..].as_ptr();
                    }
                    slot += height;
                }
            }
        }
    }

    fn target_offset(&self, class: &Class, group: usize, pixel: usize) -> usize {
        let g = self.g;
        let (image, at) = class.locate(pixel);
        let [d, h, w] = std::array::from_fn(|i| class.axes[i].targets[at[i]]);
        (((image * g.target[0] + d) * g.target[1] + h) * g.target[2] + w) * g.groups * g.cout + group * g.cout
    }

    #[inline(always)]
    fn tile(&self, group: usize, rows: &[*const f32], kc: usize, weights: &[*const f32], panel: Panel, targets: &[usize]) {
        let mut c = [std::ptr::null_mut(); super::super::gemm::micro::MAX_MR];
        for (c, &target) in c.iter_mut().zip(targets) {
            *c = self.y.get().wrapping_add(target + panel.first);
        }
        let init = match self.bias {
            Some(bias) => Init::Bias(bias[group * self.g.cout + panel.first..][..panel.cols].as_ptr()),
            None => Init::Zero,
        };
        let out = Output { c: c.as_ptr(), cols: panel.cols, alpha: 1.0, init };
        let tile = Tile { segments: weights.len(), kc, a: rows.as_ptr(), a_stride: 1, b: weights.as_ptr(), b_stride: panel.stride, out };
        // SAFETY: `rows` holds an address per segment and row, each of `kc` readable values: a source pixel's channels, zeros, or a
        // patch. Each weight address has `kc` rows of a panel as wide as `panel_width(cols)`. Classes and blocks part the target
        // pixels, panels and groups part the channels, so each value of `y` is written by one tile only, and no tile reads `y`.
        unsafe { MicroKernels::get().tile(targets.len(), &tile) }
    }
}

/// Copies the sources of a target pixel under all taps of its class side by side, zeros for the padding.
pub(super) fn copy_patch(g: &Gather, x: &[f32], class: &Class, group: usize, pixel: usize, patch: &mut [f32]) {
    let (image, at) = class.locate(pixel);
    let [d, h, w] = class.axes;
    let channels = g.groups * g.cin;
    let first = w.first[at[2]];
    let taps = w.taps.len();
    // Taps of the row whose sources lie inside of the image: a range, as sources rise.
    let low = if first >= 0 { 0 } else { ((-first) as usize).div_ceil(w.step as usize) }.min(taps);
    let inside = g.source[2] as isize - first;
    let high = if inside <= 0 { low } else { (inside as usize).div_ceil(w.step as usize).clamp(low, taps) };
    let mut patch = patch.chunks_exact_mut((taps * g.cin).max(1));
    for kd in 0..d.taps.len() {
        let sd = d.first[at[0]] + kd as isize * d.step;
        for kh in 0..h.taps.len() {
            let sh = h.first[at[1]] + kh as isize * h.step;
            let Some(row) = patch.next() else { return };
            if low == high || !(0..g.source[0] as isize).contains(&sd) || !(0..g.source[1] as isize).contains(&sh) {
                row.fill(0.0);
                continue;
            }
            row[..low * g.cin].fill(0.0);
            row[high * g.cin..].fill(0.0);
            let line = ((image * g.source[0] + sd as usize) * g.source[1] + sh as usize) * g.source[2];
            let start = (line as isize + first + low as isize * w.step) as usize * channels + group * g.cin;
            let row = &mut row[low * g.cin..high * g.cin];
            if w.step == 1 && channels == g.cin {
                row.copy_from_slice(&x[start..start + row.len()]);
            } else {
                for (tap, pixel) in row.chunks_exact_mut(g.cin).enumerate() {
                    pixel.copy_from_slice(&x[start + tap * w.step as usize * channels..][..g.cin]);
                }
            }
        }
    }
}
