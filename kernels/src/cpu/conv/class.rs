//! Target pixels sorted into classes whose members use the same taps, and a walk over a class.

use super::Gather;
use super::axis::AxisClass;

/// Targets of equal taps in all three dimensions.
pub(super) struct Class<'a> {
    pub axes: [&'a AxisClass; 3],
    /// Images × targets.
    pub pixels: usize,
    /// How many taps along the last axis make one segment: all, if their sources are neighbours in memory and inside of the image for every
    /// target.
    pub run: usize,
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

    /// A cursor over the pixels, from one on.
    pub fn pixels_from(&self, pixel: usize) -> Cursor<'_> {
        let extents = self.axes.map(|a| a.targets.len());
        let [d, h, w] = extents;
        Cursor { class: self, extents, image: pixel / (d * h * w), at: [pixel / (h * w) % d, pixel / w % h, pixel % w] }
    }
}

/// See [`Class::run`], for a class of the last axis.
fn run(g: &Gather, class: &AxisClass) -> usize {
    let AxisClass { taps, first, step, .. } = class;
    let inside = |first: &isize| *first >= 0 && (*first as usize) + taps.len() <= g.source[2];
    if g.groups == 1 && *step == 1 && first.iter().all(inside) { taps.len().max(1) } else { 1 }
}

/// The classes of a gather from those of its axes.
pub(super) fn classes<'a>(g: &Gather, axes: &'a [Vec<AxisClass>; 3]) -> Vec<Class<'a>> {
    let mut classes = Vec::new();
    for d in &axes[0] {
        for h in &axes[1] {
            for w in &axes[2] {
                classes.push(Class { axes: [d, h, w], run: run(g, w), pixels: g.n * d.targets.len() * h.targets.len() * w.targets.len() });
            }
        }
    }
    classes
}

pub(super) fn phases(g: &Gather) -> [Vec<AxisClass>; 3] {
    std::array::from_fn(|i| g.axes[i].phases(g.target[i], g.kernel[i]))
}

/// Exact classes, unless they would be so small (many taps over a small image) that most tiles would be, too.
pub(super) fn exact_classes_if_large(g: &Gather) -> [Vec<AxisClass>; 3] {
    // Sorting costs a few nanoseconds for each target and tap of an axis, and only borders gain by it.
    const LONG_AXIS: usize = 1 << 16;
    if (0..3).any(|i| g.target[i] * g.kernel[i] > LONG_AXIS) {
        return phases(g);
    }
    let exact: [_; 3] = std::array::from_fn(|i| g.axes[i].exact_classes(g.target[i], g.source[i], g.kernel[i]));
    let count: usize = exact.iter().map(Vec::len).product();
    if count * 4 <= g.target_pixels() { exact } else { phases(g) }
}

/// A walk over the pixels of a class that counts instead of dividing.
pub(super) struct Cursor<'a> {
    class: &'a Class<'a>,
    extents: [usize; 3],
    pub image: usize,
    /// Index into each axis' targets.
    pub at: [usize; 3],
}

impl Cursor<'_> {
    #[inline(always)]
    pub fn advance(&mut self) {
        for axis in [2, 1, 0] {
            self.at[axis] += 1;
            if self.at[axis] < self.extents[axis] {
                return;
            }
            self.at[axis] = 0;
        }
        self.image += 1;
    }

    /// The pixel's index in the target image.
    #[inline(always)]
    pub fn target(&self, g: &Gather) -> usize {
        let mut pixel = self.image;
        for axis in 0..3 {
            pixel = pixel * g.target[axis] + self.class.axes[axis].targets[self.at[axis]];
        }
        pixel
    }
}
