//! A packed image as tiles read it: a grid of cells on which a class' targets, taken row by row as one flat run, find the sources of any tap
//! a constant distance away.
//!
//! Along an axis, the sources of neighbouring targets are `increment` positions apart. Positions count from the first source that any tap of
//! any target reads, padding included. Those that leave the same rest when divided by `increment` form a phase: a phase's cells are neighbours, so that the
//! cell of target `i` is that of target 0 plus `i`. Targets whose sources would lie beyond the end of a row read what comes next; they do not
//! exist, and what is computed for them is left out.

use super::super::Gather;
use super::super::axis::AxisClass;
use super::super::class::Class;
use std::ops::Range;

/// The positions along an axis.
#[derive(Clone, Copy, Debug)]
pub(super) struct AxisGrid {
    /// From a target's sources to the next target's.
    pub increment: usize,
    /// Positions in front of source 0.
    low: usize,
    /// Positions that the taps of a target span.
    span: usize,
    sources: usize,
    /// The most targets that a class has.
    pub targets: usize,
}

impl AxisGrid {
    fn new(sources: usize, classes: &[AxisClass]) -> Self {
        let read = || classes.iter().filter(|c| !c.taps.is_empty());
        let low = read().map(|c| -c.first(0)).max().unwrap_or(0).max(0);
        let span = read().map(|c| c.first(0) + low + (c.taps.len() as isize - 1) * c.step + 1).max().unwrap_or(1);
        Self {
            increment: classes.first().map_or(1, |c| c.advance as usize),
            low: low as usize,
            span: span as usize,
            sources,
            targets: classes.iter().map(|c| c.count).max().unwrap_or(0),
        }
    }

    /// Cells of a phase for so many targets.
    fn cells(&self, targets: usize) -> usize {
        ((targets - 1) * self.increment + self.span).div_ceil(self.increment)
    }

    /// The cells, of those below `cells`, of a phase that hold sources, if target `start` is the first; and the source of the first of them.
    pub fn inside(&self, start: usize, phase: usize, cells: usize) -> (Range<usize>, usize) {
        let shift = (start * self.increment + phase) as isize - self.low as isize;
        let increment = self.increment as isize;
        let from = if shift < 0 { (-shift + increment - 1) / increment } else { 0 };
        let to = (self.sources as isize - shift + increment - 1).div_euclid(increment).clamp(from, (cells as isize).max(from));
        (from as usize..to as usize, (from * increment + shift) as usize)
    }
}

/// The cells of a unit: some targets of an image along one axis, all along the others.
#[derive(Clone, Debug)]
pub(super) struct Grid {
    pub axes: [AxisGrid; 3],
    /// The most targets of a unit.
    pub band: [usize; 3],
    /// Cells of a phase.
    pub cells: [usize; 3],
}

impl Grid {
    /// The grid of whole images; `even` asks for rows of an even number of cells.
    pub fn new(g: &Gather, axes: &[Vec<AxisClass>; 3], even: bool) -> Self {
        let axes = std::array::from_fn(|i| AxisGrid::new(g.source[i], &axes[i]));
        let mut grid = Self { axes, band: axes.map(|a| a.targets), cells: [0; 3] };
        grid.set_cells(even);
        grid
    }

    fn set_cells(&mut self, even: bool) {
        self.cells = std::array::from_fn(|i| self.axes[i].cells(self.band[i]));
        if even {
            self.cells[2] = self.cells[2].next_multiple_of(2);
        }
    }

    /// The axis along which images are cut: the outermost that has several targets.
    pub fn cut_axis(&self) -> usize {
        (0..3).find(|&i| self.axes[i].targets > 1).unwrap_or(2)
    }

    /// Cuts images into bands of at most `most` targets along [`cut_axis`](Self::cut_axis), nearly equal ones.
    pub fn cut(&mut self, most: usize, even: bool) {
        let axis = self.cut_axis();
        let targets = self.axes[axis].targets;
        self.band[axis] = targets.div_ceil(targets.div_ceil(most.max(1)));
        self.set_cells(even);
    }

    /// Bands of an image.
    pub fn bands(&self) -> usize {
        let axis = self.cut_axis();
        self.axes[axis].targets.div_ceil(self.band[axis])
    }

    /// The first targets of a band.
    pub fn start(&self, band: usize) -> [usize; 3] {
        let mut start = [0; 3];
        start[self.cut_axis()] = band * self.band[self.cut_axis()];
        start
    }

    /// Cells of all phases.
    pub fn len(&self) -> usize {
        self.cells.iter().product::<usize>() * self.phases().iter().product::<usize>()
    }

    pub fn phases(&self) -> [usize; 3] {
        self.axes.map(|a| a.increment)
    }

    /// Where a row of cells begins.
    pub fn row(&self, phase: [usize; 3], depth: usize, height: usize) -> usize {
        let phases = self.phases();
        let phase = (phase[0] * phases[1] + phase[1]) * phases[2] + phase[2];
        ((phase * self.cells[0] + depth) * self.cells[1] + height) * self.cells[2]
    }

    /// The cell of the first target's source, for each tap of a class in its order.
    pub fn offsets(&self, class: &Class) -> Vec<usize> {
        let along = |i: usize| {
            let (axis, class) = (self.axes[i], class.axes[i]);
            let first = class.first(0) + axis.low as isize;
            (0..class.taps.len()).map(move |tap| (first + tap as isize * class.step) as usize)
        };
        let phases = self.phases();
        let cell = |at: [usize; 3]| {
            let phase = std::array::from_fn(|i| at[i] % phases[i]);
            let [d, h, w] = std::array::from_fn(|i| at[i] / phases[i]);
            self.row(phase, d, h) + w
        };
        along(0).flat_map(|d| along(1).flat_map(move |h| along(2).map(move |w| cell([d, h, w])))).collect()
    }

    /// How many targets of a class a band has.
    pub fn targets(&self, class: &Class, start: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|i| class.axes[i].count.saturating_sub(start[i]).min(self.band[i]))
    }

    /// Length of the flat run of cells that holds so many targets: from the first to the last.
    pub fn run(&self, targets: [usize; 3]) -> usize {
        if targets.contains(&0) {
            return 0;
        }
        ((targets[0] - 1) * self.cells[1] + targets[1] - 1) * self.cells[2] + targets[2]
    }
}
