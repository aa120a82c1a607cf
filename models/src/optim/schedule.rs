//! Learning-rate schedules: pure functions from the step to a factor of the base learning rate, and the driver that applies one.

use super::Optimizer;
use super::state::{Reader, put_count, put_number};
use crate::nn::StateDict;
use kiln_tensor::{Error, Result};
use std::f64::consts::PI;
use std::fmt;
use std::sync::Arc;

/// A function from the step (0 is the first) to a factor of each parameter group's base learning rate.
///
/// The formulas are PyTorch's, with `min` as a share of the base rate. After its last step a schedule keeps its final value.
///
/// ```
/// # use kiln_models::optim::Schedule;
/// // Warm up for 100 steps, then decay to a tenth along a cosine until step 1000.
/// let schedule = Schedule::cosine(900, 0.1).with_warmup(100);
/// assert_eq!(schedule.factor(99), 1.0);
/// assert_eq!(schedule.factor(1000), 0.1);
/// ```
#[derive(Clone)]
pub struct Schedule(Arc<dyn Fn(u64) -> f64 + Send + Sync>);

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule(0 → {}, …)", self.factor(0))
    }
}

/// Share of a span of `total` steps that is over after `step` of them; a span of no steps is over.
fn progress(step: u64, total: u64) -> f64 {
    if step >= total { 1.0 } else { step as f64 / total as f64 }
}

/// From `start` to `end` along half a cosine; the progress through a span of no steps may be NaN, and is over.
fn cosine_between(start: f64, end: f64, progress: f64) -> f64 {
    if progress.is_nan() || progress >= 1.0 { end } else { end + (start - end) * (1.0 + (PI * progress).cos()) / 2.0 }
}

impl Schedule {
    /// Any function of the step.
    pub fn lambda(f: impl Fn(u64) -> f64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }

    /// The factor at `step`.
    pub fn factor(&self, step: u64) -> f64 {
        (self.0)(step)
    }

    /// 1 at every step.
    pub fn constant() -> Self {
        Self::lambda(|_| 1.0)
    }

    /// `start + (1 − start) · t / steps`, then 1 (PyTorch's `LinearLR`).
    pub fn linear_warmup(steps: u64, start: f64) -> Self {
        Self::lambda(move |t| start + (1.0 - start) * progress(t, steps))
    }

    /// `min + (1 − min) · (1 + cos(π t / steps)) / 2`, then `min` (Loshchilov and Hutter, "SGDR", 2017, without restarts).
    pub fn cosine(steps: u64, min: f64) -> Self {
        Self::lambda(move |t| cosine_between(1.0, min, progress(t, steps)))
    }

    /// Cosines from 1 to `min`, the first of `steps` steps, each `multiplier` times as long as the one before
    /// (Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017).
    pub fn cosine_with_restarts(steps: u64, multiplier: u64, min: f64) -> Self {
        let (first, multiplier) = (steps.max(1), multiplier.max(1));
        Self::lambda(move |t| {
            let (mut start, mut length) = (0u64, first);
            if multiplier == 1 {
                start = t / first * first;
            } else {
                // Lengths at least double, so at most 64 rounds.
                while t - start >= length {
                    start += length;
                    length = length.saturating_mul(multiplier);
                }
            }
            cosine_between(1.0, min, progress(t - start, length))
        })
    }

    /// One cycle of cosines (Smith and Topin, "Super-convergence", 2018; PyTorch's `OneCycleLR`): from `1 / div` up to 1 over the
    /// first `rise` (a share, usually 0.3) of `steps`, then down to `1 / (div · final_div)` (usually 25 and 10⁴) at the last step.
    pub fn one_cycle(steps: u64, rise: f64, div: f64, final_div: f64) -> Self {
        let (start, end) = (1.0 / div, 1.0 / (div * final_div));
        let (top, last) = (rise * steps as f64 - 1.0, steps as f64 - 1.0);
        Self::lambda(move |t| {
            let t = t as f64;
            if t < top { cosine_between(start, 1.0, t / top) } else { cosine_between(1.0, end, (t - top) / (last - top)) }
        })
    }

    /// `gamma^⌊t / size⌋`.
    pub fn step(size: u64, gamma: f64) -> Self {
        let size = size.max(1);
        Self::lambda(move |t| gamma.powf((t / size) as f64))
    }

    /// `gamma^k` after `k` of the `milestones`.
    pub fn multi_step(milestones: impl Into<Vec<u64>>, gamma: f64) -> Self {
        let milestones = milestones.into();
        Self::lambda(move |t| gamma.powf(milestones.iter().filter(|&&m| t >= m).count() as f64))
    }

    /// `gammaᵗ`.
    pub fn exponential(gamma: f64) -> Self {
        Self::lambda(move |t| gamma.powf(t as f64))
    }

    /// This schedule before step `at`, and from there `next`, which counts from 0 (PyTorch's `SequentialLR`).
    pub fn then(self, at: u64, next: Schedule) -> Self {
        Self::lambda(move |t| if t < at { self.factor(t) } else { next.factor(t - at) })
    }

    /// A linear rise over `steps` steps, `(t + 1) / steps`, so that the first step moves too; then this schedule from its beginning.
    pub fn with_warmup(self, steps: u64) -> Self {
        Self::lambda(move |t| progress(t + 1, steps)).then(steps, self)
    }
}

/// Applies a [`Schedule`] to an optimiser: each group's rate is its base rate times the factor of the step.
///
/// ```
/// # use kiln_models::nn::Param;
/// # use kiln_models::optim::{Optimizer, Schedule, Scheduler, Sgd};
/// # use kiln_autograd::TensorExt;
/// # use kiln_tensor::{Result, Tensor};
/// # fn main() -> Result<()> {
/// # let w = Param::new("w", &Tensor::ones([3], ())?)?;
/// let mut optimizer = Sgd::with_lr([w.clone()], 0.1)?;
/// let mut scheduler = Scheduler::new(Schedule::exponential(0.5), &mut optimizer)?;
/// for _ in 0..2 {
///     optimizer.zero_grad();
///     w.get().square()?.sum(())?.backward()?;
///     optimizer.step()?;
///     scheduler.step(&mut optimizer)?;
/// }
/// assert_eq!(optimizer.lr(), 0.025);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Scheduler {
    schedule: Schedule,
    base: Vec<f64>,
    step: u64,
}

impl Scheduler {
    /// Takes the optimiser's rates as the base, and sets them for step 0.
    pub fn new(schedule: Schedule, optimizer: &mut dyn Optimizer) -> Result<Self> {
        let scheduler = Self { schedule, base: optimizer.lrs(), step: 0 };
        scheduler.apply(optimizer)?;
        Ok(scheduler)
    }

    /// Moves to the next step: to be called after each step of the optimiser.
    pub fn step(&mut self, optimizer: &mut dyn Optimizer) -> Result<()> {
        self.step += 1;
        self.apply(optimizer)
    }

    /// Sets the optimiser's rates for the current step.
    fn apply(&self, optimizer: &mut dyn Optimizer) -> Result<()> {
        let factor = self.factor();
        let rates: Vec<f64> = self.base.iter().map(|base| base * factor).collect();
        optimizer.set_lrs(&rates)
    }

    /// Number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The factor of the current step.
    pub fn factor(&self) -> f64 {
        self.schedule.factor(self.step)
    }

    /// The step and the base rates. The schedule is code: [`new`](Self::new) gets it again.
    pub fn state_dict(&self) -> Result<StateDict> {
        let mut dict = StateDict::new();
        put_count(&mut dict, "step", self.step)?;
        for (i, &lr) in self.base.iter().enumerate() {
            put_number(&mut dict, format!("base_lr.{i}"), lr)?;
        }
        Ok(dict)
    }

    /// Restores what [`state_dict`](Self::state_dict) gave. The optimiser's rates are the optimiser's to restore.
    pub fn load_state_dict(&mut self, dict: &StateDict) -> Result<()> {
        let reader = Reader::new(dict);
        let step = reader.count("step")?;
        let base = (0..self.base.len()).map(|i| reader.number(&format!("base_lr.{i}"))).collect::<Result<Vec<_>>>()?;
        reader.finish()?;
        if base.iter().any(|lr| !lr.is_finite()) {
            return Err(Error::format("load_state_dict", "a base rate is not finite"));
        }
        (self.step, self.base) = (step, base);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(schedule: &Schedule, expected: &[f64]) {
        for (t, &e) in expected.iter().enumerate() {
            let got = schedule.factor(t as u64);
            assert!((got - e).abs() < 1e-12, "step {t}: {got} instead of {e}");
        }
    }

    /// Values of `torch.optim.lr_scheduler` 2.15 with a base rate of 1.
    #[test]
    fn as_in_pytorch() {
        close(&Schedule::linear_warmup(4, 0.2), &[0.2, 0.4, 0.6, 0.8, 1.0, 1.0]);
        close(&Schedule::cosine(4, 0.1), &[1.0, 0.8681980515339464, 0.55, 0.23180194846605368, 0.1, 0.1]);
        let restarts = [1.0, 0.525, 1.0, 0.8608757210636101, 0.525, 0.18912427893638994, 1.0];
        close(&Schedule::cosine_with_restarts(2, 2, 0.05), &restarts);
        close(&Schedule::cosine_with_restarts(2, 1, 0.05), &[1.0, 0.525, 1.0, 0.525, 1.0]);
        close(&Schedule::step(2, 0.5), &[1.0, 1.0, 0.5, 0.5, 0.25]);
        close(&Schedule::multi_step([1, 3, 3], 0.5), &[1.0, 0.5, 0.5, 0.125, 0.125]);
        close(&Schedule::exponential(0.5), &[1.0, 0.5, 0.25]);
        let fall = [1.0, 0.9504846320134737, 0.8117456539497631, 0.6112620219362893, 0.38874197806371075, 0.18825834605023697];
        let cycle = [&[0.04, 0.52], &fall[..], &[0.049519367986526286, 4e-6]].concat();
        close(&Schedule::one_cycle(10, 0.3, 25.0, 1e4), &cycle);
    }

    #[test]
    fn composed() {
        let schedule = Schedule::cosine(4, 0.1).with_warmup(2);
        close(&schedule, &[0.5, 1.0, 1.0, 0.8681980515339464, 0.55, 0.23180194846605368, 0.1, 0.1]);
        close(&Schedule::constant().then(2, Schedule::exponential(0.5)), &[1.0, 1.0, 1.0, 0.5]);
    }

    #[test]
    fn no_steps() {
        for schedule in [Schedule::cosine(0, 0.5), Schedule::linear_warmup(0, 0.1), Schedule::constant().with_warmup(0)] {
            assert!(schedule.factor(0).is_finite() && schedule.factor(u64::MAX - 1).is_finite());
        }
        for (steps, multiplier) in [(0, 0), (1, 1), (1, 2), (u64::MAX, u64::MAX)] {
            assert!(Schedule::cosine_with_restarts(steps, multiplier, 0.0).factor(u64::MAX).is_finite());
        }
        assert!(Schedule::one_cycle(1, 0.3, 25.0, 1e4).factor(0).is_finite() && Schedule::step(0, 0.5).factor(3).is_finite());
    }
}
