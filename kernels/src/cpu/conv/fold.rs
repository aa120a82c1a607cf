//! A gather with few target channels: the taps become columns. For a band of source pixels the product with the weights
//! `[source channel][tap · target channel]` is made, and each target sums its entries of it, tap after tap.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::micro::{Init, MAX_MR, MicroKernels, Output, Tile, Values};
use super::super::parallel::{self, SharedMut};
use super::Gather;
use super::axis::AxisClass;
use super::pack::Panels;

/// Values of the product that a band holds at once: 256 KiB, a part of L2.
const BAND: usize = 64 * 1024;

/// Most target channels that are folded: beyond, vectors are full anyway.
const MAX_CHANNELS: usize = 16;

/// Fewest source channels: each entry is the sum over them.
const MIN_DEPTH: usize = 8;

/// Whether folding costs less than tiles whose vectors are mostly padding.
pub(super) fn pays(g: &Gather) -> bool {
    let kernels = MicroKernels::get();
    let padded = |cols: usize| cols.div_ceil(kernels.lanes) * kernels.lanes;
    // Summing an entry costs about as much as two multiply-adds of a vector.
    let sums = g.target_pixels() * g.taps_per_target() * g.cout * 2 * kernels.lanes;
    let folded = g.source_pixels() * padded(g.taps() * g.cout) * g.cin + sums;
    let direct = g.target_pixels() * g.taps_per_target() * padded(g.cout) * g.cin;
    g.cout <= MAX_CHANNELS && g.cin >= MIN_DEPTH && folded < direct
}

/// A box of targets: all of the last axis, ranges of the others.
struct Band {
    image: usize,
    target: [std::ops::Range<usize>; 2],
    source: [std::ops::Range<usize>; 2],
}

/// See [`super::forward`]; `x` and `y` are the source and target images.
pub(super) fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    let panels = Panels::by_channel(g, w)?;
    let axes: [Vec<AxisClass>; 3] = std::array::from_fn(|i| g.axes[i].exact_classes(g.target[i], g.source[i], g.kernel[i]));
    let targets: [Vec<Target>; 2] = std::array::from_fn(|i| by_target(g.target[i], &axes[i]));
    let bands = bands(g, &targets);
    let run = Fold { g, x, bias, y: SharedMut::new(y), panels: &panels, targets: &targets, rows: &axes[2] };
    let ns = g.source_pixels() * g.groups * g.taps() * g.cout * g.cin / 50 + g.target_pixels() * g.taps_per_target();
    let failed = std::sync::Mutex::new(None);
    parallel::for_each(bands.len() * g.groups, ns, |i| {
        if let Err(error) = run.band(&bands[i / g.groups], i % g.groups) {
            *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
        }
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

/// The taps of one target along an axis, with their sources: tap `taps[i]` reads `first + i · step`.
#[derive(Clone, Copy)]
struct Target<'a> {
    taps: &'a [usize],
    first: usize,
    step: usize,
}

fn by_target<'a>(targets: usize, classes: &'a [AxisClass]) -> Vec<Target<'a>> {
    let mut all = vec![Target { taps: &[], first: 0, step: 1 }; targets];
    for class in classes {
        for (target, first) in class.targets() {
            all[target] = Target { taps: &class.taps, first: first.max(0) as usize, step: class.step as usize };
        }
    }
    all
}

/// The sources that a range of targets reads.
fn sources(targets: &[Target]) -> std::ops::Range<usize> {
    let used = targets.iter().filter(|t| !t.taps.is_empty());
    let low = used.clone().map(|t| t.first).min().unwrap_or(0);
    let high = used.map(|t| t.first + (t.taps.len() - 1) * t.step + 1).max().unwrap_or(low);
    low..high
}

/// Cuts the targets of each image so that the product of a band's sources stays below [`BAND`], or at one target row.
fn bands(g: &Gather, targets: &[Vec<Target>; 2]) -> Vec<Band> {
    let row = g.source[2] * g.taps() * g.cout;
    let plane = row * g.source[1];
    // Neighbouring bands both compute the sources that they share, so a band is as large as fits.
    let depth = fitting(&targets[0], BAND / plane.max(1));
    let height = if depth > 1 { g.target[1] } else { fitting(&targets[1], BAND / row.max(1)) };
    let mut bands = Vec::new();
    for image in 0..g.n {
        for d in (0..g.target[0]).step_by(depth) {
            for h in (0..g.target[1]).step_by(height) {
                let target = [d..(d + depth).min(g.target[0]), h..(h + height).min(g.target[1])];
                let source = [sources(&targets[0][target[0].clone()]), sources(&targets[1][target[1].clone()])];
                bands.push(Band { image, target, source });
            }
        }
    }
    bands
}

/// How many targets in a row read at most `limit` sources; at least 1.
fn fitting(targets: &[Target], limit: usize) -> usize {
    let mut count = targets.len();
    while count > 1 && (0..targets.len()).step_by(count).any(|t| sources(&targets[t..(t + count).min(targets.len())]).len() > limit) {
        count = count.div_ceil(2);
    }
    count
}

struct Fold<'a> {
    g: &'a Gather,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    y: SharedMut<f32>,
    panels: &'a Panels,
    /// Along depth and height.
    targets: &'a [Vec<Target<'a>>; 2],
    /// Along width.
    rows: &'a [AxisClass],
}

impl Fold<'_> {
    fn band(&self, band: &Band, group: usize) -> Result<(), OutOfMemory> {
        let g = self.g;
        let cols = g.taps() * g.cout;
        let row_len = g.source[2] * cols;
        let lines = band.source[0].len() * band.source[1].len();
        let mut product = Buffer::new(size_of::<f32>() * lines * row_len)?;
        let product = product.as_slice_mut::<f32>();
        for (i, d) in band.source[0].clone().enumerate() {
            let start = ((band.image * g.source[0] + d) * g.source[1] + band.source[1].start) * g.source[2];
            let plane = &mut product[i * band.source[1].len() * row_len..][..band.source[1].len() * row_len];
            self.multiply(group, start, plane);
        }
        let mut row = vec![0f32; g.target[2] * g.cout];
        for d in band.target[0].clone() {
            for h in band.target[1].clone() {
                self.sum_row(band, group, d, h, product, &mut row);
            }
        }
        Ok(())
    }

    /// The product of the weights with neighbouring source pixels, from `start` on.
    fn multiply(&self, group: usize, start: usize, product: &mut [f32]) {
        let (g, kernels) = (self.g, MicroKernels::get());
        let cols = g.taps() * g.cout;
        let channels = g.groups * g.cin;
        let tiles = kernels.row_tiles(product.len() / cols);
        for tile in 0..tiles.count {
            let (first, height) = (tiles.start(tile), tiles.height(tile));
            let mut a = [std::ptr::null(); MAX_MR];
            for (r, a) in a[..height].iter_mut().enumerate() {
                *a = self.x[(start + first + r) * channels + group * g.cin..][..g.cin].as_ptr();
            }
            for i in 0..self.panels.count() {
                let panel = self.panels.panel(group, i);
                let mut c = [std::ptr::null_mut(); MAX_MR];
                for (r, c) in c[..height].iter_mut().enumerate() {
                    *c = product[(first + r) * cols + panel.first..][..panel.cols].as_mut_ptr();
                }
                let b = panel.data.as_ptr();
                let out = Output { c: c.as_ptr(), offset: 0, values: Values::F32, cols: panel.cols, alpha: 1.0, init: Init::Zero };
                let tile = Tile { segments: 1, kc: g.cin, a: a.as_ptr(), a_step: 0, a_stride: 1, b: &b, b_stride: panel.stride, out };
                // SAFETY: each row address has `cin` readable values, the panel has `cin` rows of its width, and each row of
                // the product has room for the panel's columns.
                unsafe { kernels.tile(height, &tile) }
            }
        }
    }

    /// Sums the entries of one row of targets, tap after tap.
    fn sum_row(&self, band: &Band, group: usize, d: usize, h: usize, product: &[f32], row: &mut [f32]) {
        let g = self.g;
        let (td, th) = (self.targets[0][d], self.targets[1][h]);
        let cols = g.taps() * g.cout;
        let bias = self.bias.map(|bias| &bias[group * g.cout..][..g.cout]);
        let mut taps = Vec::with_capacity(g.taps());
        for class in self.rows {
            taps.clear();
            for (i, kd) in td.taps.iter().enumerate() {
                let sd = td.first + i * td.step - band.source[0].start;
                for (i, kh) in th.taps.iter().enumerate() {
                    let sh = th.first + i * th.step - band.source[1].start;
                    let line = (sd * band.source[1].len() + sh) * g.source[2];
                    let tap = (kd * g.kernel[1] + kh) * g.kernel[2];
                    let entry = |(i, kw): (usize, &usize)| (line + i * class.step as usize) * cols + (tap + kw) * g.cout;
                    taps.extend(class.taps.iter().enumerate().map(entry));
                }
            }
            let entries = Entries { class, taps: &taps, cols };
            match g.cout {
                1 => entries.sum::<1>(product, bias, row),
                2 => entries.sum::<2>(product, bias, row),
                3 => entries.sum::<3>(product, bias, row),
                4 => entries.sum::<4>(product, bias, row),
                _ => entries.sum_any(product, bias, row, g.cout),
            }
        }
        let line = ((band.image * g.target[0] + d) * g.target[1] + h) * g.target[2];
        // Without groups the pixels of a line are neighbours.
        let run = if g.groups == 1 { row.len() } else { g.cout };
        for (i, run) in row.chunks_exact(run).enumerate() {
            let at = (line + i) * g.groups * g.cout + group * g.cout;
            // SAFETY: bands and groups part the targets, so these channels are written here only; `y` holds all targets.
            unsafe { std::slice::from_raw_parts_mut(self.y.get().add(at), run.len()) }.copy_from_slice(run);
        }
    }
}

/// The entries of the targets of a class along a row.
struct Entries<'a> {
    class: &'a AxisClass,
    /// Where the entry of each tap lies for a target whose first source is the first of its line.
    taps: &'a [usize],
    /// Columns of the product.
    cols: usize,
}

impl Entries<'_> {
    #[inline(always)]
    fn sum<const C: usize>(&self, product: &[f32], bias: Option<&[f32]>, row: &mut [f32]) {
        let mut start = [0.0; C];
        if let Some(bias) = bias {
            start.copy_from_slice(bias);
        }
        for (target, first) in self.class.targets() {
            let mut sum = start;
            for tap in self.taps {
                let values = &product[tap + first as usize * self.cols..][..C];
                for j in 0..C {
                    sum[j] += values[j];
                }
            }
            row[target * C..][..C].copy_from_slice(&sum);
        }
    }

    fn sum_any(&self, product: &[f32], bias: Option<&[f32]>, row: &mut [f32], channels: usize) {
        for (target, first) in self.class.targets() {
            let sums = &mut row[target * channels..][..channels];
            match bias {
                Some(bias) => sums.copy_from_slice(bias),
                None => sums.fill(0.0),
            }
            for tap in self.taps {
                for (sum, value) in sums.iter_mut().zip(&product[tap + first as usize * self.cols..][..channels]) {
                    *sum += value;
                }
            }
        }
    }
}
