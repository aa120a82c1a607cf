//! Target pixels sorted into classes whose members use the same taps, and a walk over a class.

use super::super::gemm::micro::MicroKernels;
use super::Gather;
use super::axis::AxisClass;
use std::ops::Range;

/// Targets of equal taps in all three dimensions.
pub(super) struct Class<'a> {
    pub axes: [&'a AxisClass; 3],
    /// Images × targets.
    pub pixels: usize,
    /// How many taps along the last axis make one segment: all, if their sources are neighbours in memory and inside of the image for every
    /// target.
    pub run: usize,
    /// Whether sources along the last axis may lie in the padding.
    padded: bool,
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

    /// Some of the pixels, line by line.
    pub fn lines(&self, pixels: Range<usize>) -> impl Iterator<Item = Line> {
        let [d, h, w] = self.axes.map(|axis| axis.count);
        let (mut pixel, first) = (pixels.start, pixels.start / w);
        let (mut image, mut at) = (first / h / d, [first / h % d, first % h, pixel % w]);
        std::iter::from_fn(move || {
            let line = Line { image, at, count: (w - at[2]).min(pixels.end.checked_sub(pixel).filter(|&left| left > 0)?) };
            pixel += line.count;
            at = [at[0], at[1] + 1, 0];
            if at[1] == h {
                at = [at[0] + 1, 0, 0];
            }
            if at[0] == d {
                (image, at) = (image + 1, [0; 3]);
            }
            Some(line)
        })
    }

    /// The index in the target image of a line's first pixel; those of the next are [`target_step`](Self::target_step) apart.
    pub fn first_target(&self, g: &Gather, line: &Line) -> usize {
        (0..3).fold(line.image, |pixel, axis| pixel * g.target[axis] + self.axes[axis].target(line.at[axis]))
    }

    /// Distance between the targets of a line.
    pub fn target_step(&self) -> usize {
        self.axes[2].target(1) - self.axes[2].target(0)
    }

    /// Which of a line's pixels have a source inside of the line of sources under tap `tap` of the last axis.
    pub fn inside(&self, g: &Gather, line: &Line, tap: usize) -> Range<usize> {
        if !self.padded {
            return 0..line.count;
        }
        let w = self.axes[2];
        let first = w.first(line.at[2]) + tap as isize * w.step;
        let count = |below: isize| (below.max(0) as usize).div_ceil(w.advance as usize).min(line.count);
        count(-first)..count(g.source[2] as isize - first)
    }
}

/// Pixels of a class that follow one another along the last axis.
pub(super) struct Line {
    pub image: usize,
    /// The first pixel: index into each axis' targets.
    pub at: [usize; 3],
    pub count: usize,
}

/// Whether a class of the last axis has sources in the padding.
fn is_padded(g: &Gather, class: &AxisClass) -> bool {
    let last = class.first(class.count - 1) + class.taps.len().saturating_sub(1) as isize * class.step;
    class.first(0) < 0 || last >= g.source[2] as isize
}

/// The classes of a gather from those of its axes.
pub(super) fn classes<'a>(g: &Gather, axes: &'a [Vec<AxisClass>; 3]) -> Vec<Class<'a>> {
    let mut classes = Vec::new();
    for d in &axes[0] {
        for h in &axes[1] {
            for w in &axes[2] {
                let padded = is_padded(g, w);
                let run = if g.groups == 1 && w.step == 1 && !padded { w.taps.len().max(1) } else { 1 };
                classes.push(Class { axes: [d, h, w], run, padded, pixels: g.n * d.count * h.count * w.count });
            }
        }
    }
    classes
}

pub(super) fn phases(g: &Gather) -> [Vec<AxisClass>; 3] {
    std::array::from_fn(|i| g.axes[i].phases(g.target[i], g.kernel[i]))
}

/// Exact classes, unless they are so small (many taps over a small image) that cut tiles cost more than what the padding does.
pub(super) fn exact_classes_if_large(g: &Gather) -> [Vec<AxisClass>; 3] {
    // Sorting costs a few nanoseconds for each target and tap of an axis, and only borders gain by it.
    const LONG_AXIS: usize = 1 << 16;
    let phases = phases(g);
    if (0..3).any(|i| g.target[i] * g.kernel[i] > LONG_AXIS) {
        return phases;
    }
    let exact: [_; 3] = std::array::from_fn(|i| g.axes[i].exact_classes(g.target[i], g.source[i], g.kernel[i]));
    if exact.iter().map(Vec::len).product::<usize>() * 4 > g.target_pixels() {
        return phases;
    }
    let tiles = |pixels: usize| MicroKernels::get().row_tiles(pixels).count;
    let cost = |axes| classes(g, axes).iter().map(|class| tiles(class.pixels) * class.tap_count()).sum::<usize>();
    if cost(&exact) <= cost(&phases) { exact } else { phases }
}
