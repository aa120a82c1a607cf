//! Group norm of many images with channels last, a sample at a time: each pass finds in the second-level cache what the one before left there, and
//! a sample's constants are computed by its task.

use super::channels::{
    Activated, Apply, Channels, Coefficients, ColumnSums, ENOUGH_TASKS, Grouping, P, ROWS, Statistics, forward_coefficients,
    gradient_coefficients, totals,
};
use super::{Activation, parameter};
use crate::cpu::cast::Stored;
use crate::cpu::lanes::{FloatElement, Lane};
use crate::cpu::parallel::{self, SharedMut};

/// Elements of a stretch of pixels that stays in the first-level cache through several passes.
const STRETCH: usize = 4096;

/// Pixels of a stretch at least: for each stretch, sums in f64 are read and written.
const MIN_PIXELS: usize = 32;

/// Samples, whose statistics are their own, with channels last.
#[derive(Clone, Copy)]
pub(super) struct Samples {
    layout: Channels,
    groups: usize,
}

impl Samples {
    /// `None` if there are not enough of them to keep threads busy, or it is no group norm.
    pub fn of(layout: Channels, grouping: Grouping) -> Option<Self> {
        match grouping {
            Grouping::Groups(groups) if layout.channels_last && layout.n >= ENOUGH_TASKS => Some(Self { layout, groups }),
            _ => None,
        }
    }

    /// A sample's layout.
    fn one(self) -> Channels {
        Channels { n: 1, ..self.layout }
    }

    /// Elements of a sample.
    fn len(self) -> usize {
        self.one().numel()
    }

    /// Elements of a stretch: whole pixels, as many as sums take at once.
    fn stretch(self) -> usize {
        let c = self.layout.c;
        (STRETCH / c.max(1)).max(MIN_PIXELS).next_multiple_of(ROWS) * c
    }

    fn statistics<L>(self, all: Statistics<'_, L>, sample: usize) -> Statistics<'_, L> {
        let own = sample * self.groups..(sample + 1) * self.groups;
        Statistics { grouping: all.grouping, mean: &all.mean[own.clone()], rstd: &all.rstd[own] }
    }

    /// See [`super::normalize`].
    pub fn normalize<T: FloatElement + Stored>(
        self,
        statistics: Statistics<'_, T::Lane>,
        weight: Option<&[T]>,
        bias: Option<&[T]>,
        activation: Option<Activation>,
        x: &[T],
        y: &mut [T],
    ) {
        assert!(x.len() == self.layout.numel() && y.len() == x.len());
        if y.is_empty() {
            return;
        }
        parallel::for_each_chunk(y, self.len(), x.len() / 4, |sample, y| {
            let x = &x[sample * self.len()..][..self.len()];
            let coefficients = forward_coefficients(self.one(), self.statistics(statistics, sample), weight, bias);
            for (i, (x, y)) in x.chunks(self.stretch()).zip(y.chunks_mut(self.stretch())).enumerate() {
                self.apply(&coefficients, i, P::None, x, y);
                if let Some(activation) = activation {
                    activation.apply(y);
                }
            }
        });
    }

    /// Stretch `i` of a sample.
    fn apply<T: FloatElement>(self, coefficients: &Coefficients<T::Lane>, i: usize, p: P<'_, T>, q: &[T], out: &mut [T]) {
        let first = i * self.stretch() / self.layout.c;
        T::Lane::dispatch(Apply { layout: self.one(), coefficients, first, p, q, out });
    }

    /// See [`super::normalize_backward`].
    #[allow(clippy::too_many_arguments)] // The operands of one formula.
    pub fn backward<T: FloatElement + Stored>(
        self,
        statistics: Statistics<'_, T::Lane>,
        fixed: bool,
        weight: Option<&[T]>,
        activated: Option<Activated<'_, T>>,
        g: &[T],
        x: &[T],
        dx: Option<&mut [T]>,
        dw: Option<&mut [T]>,
        db: Option<&mut [T]>,
    ) {
        let Channels { n, c, .. } = self.layout;
        assert!(x.len() == self.layout.numel() && g.len() == x.len() && dx.as_ref().is_none_or(|dx| dx.len() == x.len()));
        let w = parameter(weight, c, T::Lane::ONE);
        let mut parameters = vec![[0f64; 2]; n * c];
        let dx = dx.map(SharedMut::new);
        parallel::for_each_chunk(&mut parameters, c, x.len() / 2, |sample, parameters| {
            let first = sample * self.len();
            let (g, x) = (&g[first..][..self.len()], &x[first..][..self.len()]);
            // SAFETY: a sample belongs to one task, and there is room for all of them.
            let mut dx = dx.map(|dx| unsafe { std::slice::from_raw_parts_mut(dx.get().add(first), self.len()) });
            let statistics = self.statistics(statistics, sample);
            let before = activated.map(|of| (of.activation, forward_coefficients(self.one(), statistics, weight, of.bias)));
            let centres: Vec<T::Lane> = (0..c).map(|c| statistics.mean[self.one().statistic_of(statistics.grouping, 0, c)]).collect();
            let mut sums = vec![0f64; 2 * c];
            let stretches = || (0..self.len()).step_by(self.stretch()).map(|at| at..self.len().min(at + self.stretch())).enumerate();
            for (i, range) in stretches() {
                let g = match (&before, &mut dx) {
                    (Some((activation, coefficients)), Some(dx)) => {
                        let dx = &mut dx[range.clone()];
                        self.apply(coefficients, i, P::None, &x[range.clone()], dx);
                        activation.gradient(dx, &g[range.clone()]);
                        dx
                    }
                    _ => &g[range.clone()],
                };
                T::Lane::dispatch(ColumnSums { centres: &centres, g, x: &x[range], totals: &mut sums });
            }
            let pairs: Vec<[f64; 2]> = (0..c).map(|i| [sums[i], sums[c + i]]).collect();
            let mut groups = vec![[0f64; 2]; self.groups];
            totals(self.one(), statistics, &w, &pairs, &mut groups, parameters);
            let Some(dx) = dx else { return };
            let coefficients = gradient_coefficients(self.one(), statistics, fixed, &w, &groups);
            for (i, range) in stretches() {
                let p = if before.is_some() { P::Out } else { P::From(&g[range.clone()]) };
                self.apply(&coefficients, i, p, &x[range.clone()], &mut dx[range]);
            }
        });
        for (which, out) in [dw, db].into_iter().enumerate() {
            let Some(out) = out else { continue };
            for (channel, out) in out.iter_mut().enumerate() {
                *out = T::total(parameters[channel..].iter().step_by(c).map(|sums| sums[which]).sum());
            }
        }
    }
}
