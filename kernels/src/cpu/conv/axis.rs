//! Where a kernel tap's source pixel lies, along one axis, and targets sorted into classes of equal taps.

/// The source of a target under a tap, along one axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    stride: usize,
    padding: usize,
    dilation: usize,
    transposed: bool,
}

/// Targets that use the same taps, evenly spaced. The sources of neighbouring taps lie a constant apart, and so do those of neighbouring
/// targets.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct AxisClass {
    /// Number of targets, at least 1.
    pub count: usize,
    /// The first of them.
    target: usize,
    /// From a target to the next.
    period: usize,
    /// Ordered so that sources rise.
    pub taps: Vec<usize>,
    /// The source of the first target's first tap; in a class of [`Axis::phases`] it may lie outside of the image.
    source: isize,
    /// From a target's source to the next target's, at least 1.
    pub advance: isize,
    /// From the source of a tap to that of the next, at least 1.
    pub step: isize,
}

impl AxisClass {
    /// Target `i`.
    #[inline(always)]
    pub fn target(&self, i: usize) -> usize {
        self.target + i * self.period
    }

    /// The source of target `i` under the first tap.
    #[inline(always)]
    pub fn first(&self, i: usize) -> isize {
        self.source + i as isize * self.advance
    }

    /// All targets, each with the source of its first tap.
    pub fn targets(&self) -> impl Iterator<Item = (usize, isize)> {
        (0..self.count).map(|i| (self.target(i), self.first(i)))
    }
}

impl Axis {
    /// Source `o · stride + tap · dilation − padding`.
    pub fn forward(stride: usize, padding: usize, dilation: usize) -> Self {
        Self { stride, padding, dilation, transposed: false }
    }

    /// Source `(o + padding − tap · dilation) / stride` where that is whole.
    pub fn transposed(stride: usize, padding: usize, dilation: usize) -> Self {
        Self { stride, padding, dilation, transposed: true }
    }

    /// The source, which may lie outside of the image; `None` if the tap does not touch the target at all.
    pub fn source(&self, target: usize, tap: usize) -> Option<isize> {
        let shift = (tap * self.dilation) as isize - self.padding as isize;
        if !self.transposed {
            return Some((target * self.stride) as isize + shift);
        }
        let distance = target as isize - shift;
        (distance % self.stride as isize == 0).then(|| distance / self.stride as isize)
    }

    /// Targets this far apart are touched by the same taps, borders aside.
    pub fn period(&self) -> usize {
        if self.transposed { self.stride } else { 1 }
    }

    /// Positions along the axis between the sources of neighbouring taps that touch the same target.
    fn step(&self) -> isize {
        if !self.transposed {
            return self.dilation as isize;
        }
        let (mut a, mut b) = (self.stride, self.dilation);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        (self.dilation / a) as isize
    }

    /// The taps that touch `target`, by rising source.
    fn touching(&self, target: usize, kernel: usize) -> Vec<usize> {
        let taps = (0..kernel).filter(|&tap| self.source(target, tap).is_some());
        if self.transposed { taps.rev().collect() } else { taps.collect() }
    }

    /// Targets by their phase: each tap belongs to at most one class, and sources may lie in the padding.
    pub fn phases(&self, targets: usize, kernel: usize) -> Vec<AxisClass> {
        let period = self.period();
        (0..period.min(targets))
            .map(|target| {
                let taps = self.touching(target, kernel);
                let source = taps.first().and_then(|&tap| self.source(target, tap)).unwrap_or(0);
                let advance = if self.transposed { 1 } else { self.stride as isize };
                AxisClass { count: (targets - target).div_ceil(period), target, period, taps, source, advance, step: self.step() }
            })
            .collect()
    }

    /// Targets by the set of taps whose sources lie inside of the image, so that nothing is multiplied by padding.
    pub fn exact_classes(&self, targets: usize, sources: usize, kernel: usize) -> Vec<AxisClass> {
        let mut classes: Vec<AxisClass> = Vec::new();
        for phase in self.phases(targets, kernel) {
            let start = classes.len();
            for (target, first) in phase.targets() {
                let source = |i: usize| first + i as isize * phase.step;
                let inside = |i: &usize| (0..sources as isize).contains(&source(*i));
                let low = (0..phase.taps.len()).find(inside).unwrap_or(0);
                let count = (low..phase.taps.len()).take_while(inside).count();
                let taps = &phase.taps[low..low + count];
                match classes[start..].last_mut().filter(|c| c.taps == taps) {
                    Some(class) => class.count += 1,
                    None => classes.push(AxisClass { count: 1, target, taps: taps.to_vec(), source: source(low), ..phase }),
                }
            }
        }
        classes
    }

    /// The targets whose source under `tap` lies inside of the image, with that source.
    pub fn pairs(&self, tap: usize, targets: usize, sources: usize) -> Vec<(usize, usize)> {
        let inside = |target| self.source(target, tap).and_then(|s| usize::try_from(s).ok()).filter(|&s| s < sources);
        (0..targets).filter_map(|t| inside(t).map(|s| (t, s))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_cover_every_target_and_tap_once() {
        for transposed in [false, true] {
            for (stride, padding, dilation, kernel, targets, sources) in [
                (1, 1, 1, 3, 9, 9),
                (2, 1, 1, 4, 7, 14),
                (2, 1, 1, 4, 14, 7),
                (3, 2, 2, 5, 17, 11),
                (4, 0, 1, 2, 11, 3),
                (2, 3, 4, 3, 8, 5),
                (5, 1, 1, 3, 3, 2),
            ] {
                let axis = Axis { stride, padding, dilation, transposed };
                let inside = |s: isize| (0..sources as isize).contains(&s);
                for classes in [axis.exact_classes(targets, sources, kernel), axis.phases(targets, kernel)] {
                    let mut seen = vec![0; targets];
                    for class in &classes {
                        for (t, first) in class.targets() {
                            seen[t] += 1;
                            for (i, &tap) in class.taps.iter().enumerate() {
                                assert_eq!(axis.source(t, tap), Some(first + i as isize * class.step));
                            }
                            for tap in (0..kernel).filter(|&k| axis.source(t, k).is_some_and(inside)) {
                                assert!(class.taps.contains(&tap));
                            }
                        }
                    }
                    assert!(seen.iter().all(|&s| s == 1));
                }
                for class in axis.exact_classes(targets, sources, kernel) {
                    let last = (class.taps.len() as isize - 1) * class.step;
                    assert!(class.targets().all(|(_, first)| class.taps.is_empty() || (inside(first) && inside(first + last))));
                }
            }
        }
    }
}
