//! A gather as tiles of target pixels × target channels held in registers while all taps and source channels are summed.
//!
//! Targets are sorted into classes that use the same taps, so that a strided transposed convolution does no work for taps
//! that miss and, where the classes are large enough, no work for the padding. Tiles are made of any pixels of a class:
//! the micro-kernel takes an address per row.

use super::super::alloc::OutOfMemory;
use super::super::gemm::micro::{Init, MicroKernels, Output, Tile, Values};
use super::super::isa::dispatch;
use super::super::parallel::{self, SharedMut};
use super::class::{Class, Line, classes, exact_classes_if_large, phases};
use super::pack::{Cut, InMemory, Panel, Panels, Weights};
use super::patch::Patches;
use super::{Gather, part_start};
use half::bf16;
use std::ops::Range;
use std::sync::OnceLock;

/// What the micro-kernels multiply: an f32, or the bf16 of two neighbouring source channels.
pub(super) trait Word: Copy + Default + Send + Sync {}
impl Word for f32 {}
impl Word for [bf16; 2] {}

/// What sums are written as.
pub(super) trait Target: Copy + Send + Sync {
    const VALUES: Values;
}
impl Target for f32 {
    const VALUES: Values = Values::F32;
}
impl Target for bf16 {
    const VALUES: Values = Values::Bf16;
}

/// Segments shorter than this spend longer on their row addresses than on their products: with fewer source channels, and without runs of
/// taps that are longer, the taps of a pixel are copied side by side.
const MIN_SEGMENT: usize = 3;

/// Pixels of a task at least: eight full tiles of AVX-512. Their addresses, and a panel of weights, stay in L2 for all panels.
const BLOCK: usize = 96;

/// Multiply-adds of a task, some 10 µs: with few channels that takes more pixels.
const TASK_MACS: usize = 1 << 20;

/// Fewer tasks than this are split further by target channels: enough for some threads to share evenly.
const MIN_TASKS: usize = 16;

/// With so few blocks of pixels, and enough panels, each task packs one panel and multiplies all pixels by it while it is in L2: packed all together,
/// weights go to memory and back.
const FEW_BLOCKS: usize = 16;

struct Task {
    class: usize,
    pixels: Range<usize>,
}

/// See [`super::forward`]; `x` and `y` are the source and target images. Source channels are counted in words.
pub(super) fn gather<W: Word, T: Target>(
    g: &Gather,
    x: &[W],
    weights: &impl Weights,
    bias: Option<&[f32]>,
    y: &mut [T],
) -> Result<(), OutOfMemory> {
    let kernels = weights.kernels();
    let mut axes = exact_classes_if_large(g);
    let patches = g.cin < MIN_SEGMENT && !classes(g, &axes).iter().any(|c| c.run * g.cin >= MIN_SEGMENT);
    if patches {
        axes = phases(g);
    }
    let classes = classes(g, &axes);
    // Where each class' weights start. A patch is multiplied in one segment, so its taps lie together (no tap is in two phases); so do the
    // taps of a run.
    let order: Vec<usize> = if patches { classes.iter().flat_map(|c| c.taps(g.kernel)).collect() } else { by_runs(g) };
    let mut slot_of_tap = vec![0; g.taps()];
    for (slot, &tap) in order.iter().enumerate() {
        slot_of_tap[tap] = slot;
    }
    let cut = Cut::new(kernels, order.len() * g.cin, g.cout);

    let block = (TASK_MACS / (g.cin * g.cout * g.taps_per_target()).max(1)).clamp(BLOCK, 16 * BLOCK);
    let mut tasks = Vec::new();
    for (class, pixels) in classes.iter().map(|c| c.pixels).enumerate() {
        let blocks = pixels.div_ceil(block);
        tasks.extend((0..blocks).map(|b| Task { class, pixels: part_start(pixels, blocks, b)..part_start(pixels, blocks, b + 1) }));
    }
    let zeros = vec![W::default(); g.cin * classes.iter().map(|c| c.run).max().unwrap_or(1)];
    let y = SharedMut::new(y);
    let run = Direct { g, kernels, x, bias, y, classes: &classes, slot_of_tap: &slot_of_tap, zeros: &zeros, patches };
    let multiplications = g.target_pixels() * g.groups * g.cout * g.cin * g.taps_per_target();
    let estimated_ns = multiplications / 50 + g.target_pixels();
    if tasks.len() <= FEW_BLOCKS && g.groups * cut.count() >= MIN_TASKS {
        let failure = OnceLock::new();
        parallel::for_each(g.groups * cut.count(), estimated_ns, |i| {
            let (group, i) = (i / cut.count(), i % cut.count());
            match weights.packed(&order, group, cut, i, &mut None) {
                Ok(panel) => tasks.iter().for_each(|task| run.task(task, group, [panel])),
                Err(error) => drop(failure.set(error)),
            }
        });
        return failure.into_inner().map_or(Ok(()), Err);
    }
    let panels = Panels::by_tap(weights, g.groups, cut, &order)?;
    let splits = MIN_TASKS.div_ceil(tasks.len() * g.groups).min(cut.count());
    parallel::for_each(tasks.len() * g.groups * splits, estimated_ns, |i| {
        let (i, split) = (i / splits, i % splits);
        let (task, group) = (&tasks[i / g.groups], i % g.groups);
        let some = part_start(cut.count(), splits, split)..part_start(cut.count(), splits, split + 1);
        run.task(task, group, some.map(|i| panels.panel(group, i)));
    });
    Ok(())
}

/// [`gather`] of f32.
pub(super) fn gather_singles(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    gather(g, x, &InMemory { g, w }, bias, y)
}

/// All taps, those of a phase of the last axis side by side in the order of their sources.
fn by_runs(g: &Gather) -> Vec<usize> {
    let last: Vec<usize> = g.axes[2].phases(g.target[2], g.kernel[2]).into_iter().flat_map(|phase| phase.taps).collect();
    (0..g.kernel[0] * g.kernel[1]).flat_map(|line| last.iter().map(move |kw| line * g.kernel[2] + kw)).collect()
}

struct Direct<'a, W, T> {
    g: &'a Gather,
    kernels: &'static MicroKernels,
    x: &'a [W],
    bias: Option<&'a [f32]>,
    y: SharedMut<T>,
    classes: &'a [Class<'a>],
    slot_of_tap: &'a [usize],
    /// The source pixels of a segment in the padding.
    zeros: &'a [W],
    patches: bool,
}

impl<W: Word, T: Target> Direct<'_, W, T> {
    /// One block of pixels of one group, for some panels.
    fn task<'p>(&self, task: &Task, group: usize, panels: impl IntoIterator<Item = Panel<'p>>) {
        let (g, class) = (self.g, &self.classes[task.class]);
        let kernels = self.kernels;
        let tiles = kernels.row_tiles(task.pixels.len());
        let run = class.run;
        let (segments, kc) = if self.patches { (1, class.tap_count() * g.cin) } else { (class.tap_count() / run, g.cin * run) };
        let mut patches = Vec::new();
        let rows = if self.patches {
            self.patch_rows(class, group, task.pixels.clone(), kc, &mut patches)
        } else {
            self.source_rows(class, group, task.pixels.clone(), segments)
        };
        let targets = self.targets(class, group, task.pixels.clone());
        // The taps of a patch lie together in the panel, from its first on.
        let slots: Vec<usize> = class.taps(g.kernel).step_by(run).take(segments).map(|tap| self.slot_of_tap[tap]).collect();
        for panel in panels {
            let weights: Vec<*const f32> = slots.iter().map(|slot| panel.data[slot * g.cin * panel.stride..].as_ptr()).collect();
            for tile in 0..tiles.count {
                let (start, height) = (tiles.start(tile), tiles.height(tile));
                // Without segments there are no rows.
                let sources = Sources { rows: &rows[start.min(rows.len())..], step: task.pixels.len(), kc };
                self.tile(group, sources, &weights, panel, &targets[start..start + height]);
            }
        }
    }

    /// Copies a patch for each pixel; the addresses of the patches.
    fn patch_rows(&self, class: &Class, group: usize, pixels: Range<usize>, len: usize, patches: &mut Vec<W>) -> Vec<*const W> {
        let count = pixels.len();
        patches.resize(count * len, W::default());
        dispatch(Patches { g: self.g, x: self.x, class, group, pixels, out: patches });
        (0..count).map(|i| patches[i * len..].as_ptr()).collect()
    }

    /// The addresses of the sources of some pixels, segment by segment.
    fn source_rows(&self, class: &Class, group: usize, pixels: Range<usize>, segments: usize) -> Vec<*const W> {
        let count = pixels.len();
        let mut rows = vec![self.zeros.as_ptr(); count * segments];
        if segments > 0 {
            let mut done = 0;
            for line in class.lines(pixels) {
                self.line_sources(class, group, &line, &mut rows[done..], count);
                done += line.count;
            }
        }
        rows
    }

    /// Writes the addresses of a line's sources under the first tap of each segment, those that do not lie in the padding, to `rows`; those of
    /// the next segment lie `step` further on.
    fn line_sources(&self, class: &Class, group: usize, line: &Line, rows: &mut [*const W], step: usize) {
        let g = self.g;
        let [d, h, w] = class.axes;
        let channels = (g.groups * g.cin) as isize;
        let advance = w.advance * channels;
        let mut segments = rows.chunks_mut(step);
        for kd in 0..d.taps.len() {
            let sd = d.first(line.at[0]) + kd as isize * d.step;
            for kh in 0..h.taps.len() {
                let sh = h.first(line.at[1]) + kh as isize * h.step;
                let inside = (0..g.source[0] as isize).contains(&sd) && (0..g.source[1] as isize).contains(&sh);
                let source = ((line.image * g.source[0]) as isize + sd) * g.source[1] as isize + sh;
                let first = source * g.source[2] as isize + w.first(line.at[2]);
                for (tap, rows) in (0..w.taps.len()).step_by(class.run).zip(segments.by_ref()) {
                    if !inside {
                        continue;
                    }
                    let first = (first + tap as isize * w.step) * channels + (group * g.cin) as isize;
                    let hit = class.inside(g, line, tap);
                    let mut source = self.x.as_ptr().wrapping_offset(first + hit.start as isize * advance);
                    for row in &mut rows[hit] {
                        *row = source;
                        source = source.wrapping_offset(advance);
                    }
                }
            }
        }
    }

    /// Where the target pixels of a block lie in `y`.
    fn targets(&self, class: &Class, group: usize, pixels: Range<usize>) -> Vec<*mut f32> {
        let g = self.g;
        let mut targets = Vec::with_capacity(pixels.len());
        let channels = g.groups * g.cout;
        for line in class.lines(pixels) {
            let first = self.y.get().wrapping_add(class.first_target(g, &line) * channels + group * g.cout);
            targets.extend((0..line.count).map(|i| first.wrapping_add(i * class.target_step() * channels).cast::<f32>()));
        }
        targets
    }

    #[inline(always)]
    fn tile(&self, group: usize, sources: Sources<W>, weights: &[*const f32], panel: Panel, targets: &[*mut f32]) {
        let init = match self.bias {
            Some(bias) => Init::Bias(bias[group * self.g.cout + panel.first..][..panel.cols].as_ptr()),
            None => Init::Zero,
        };
        let Sources { rows, step, kc } = sources;
        let out =
            Output { c: targets.as_ptr(), offset: panel.first * size_of::<T>(), values: T::VALUES, cols: panel.cols, alpha: 1.0, init };
        let (a, b) = (rows.as_ptr().cast(), weights.as_ptr());
        let tile = Tile { segments: weights.len(), kc, a, a_step: step, a_stride: 1, b, b_stride: panel.stride, out };
        // SAFETY: `rows` holds an address per segment and row, each of `kc` readable words: the channels of a run of source pixels that
        // lie inside of a line, zeros, or a patch. Each weight address has `kc` rows of a panel as wide as `panel_width(cols)`. Classes and blocks part the target
        // pixels, panels and groups part the channels, so each value of `y` is written by one tile only, and no tile reads `y`.
        unsafe { self.kernels.tile(targets.len(), &tile) }
    }
}

/// A tile's sources.
struct Sources<'a, W> {
    /// Their addresses under the first tap of the first segment; those of the next lie `step` further on.
    rows: &'a [*const W],
    step: usize,
    /// Words of a segment.
    kc: usize,
}
