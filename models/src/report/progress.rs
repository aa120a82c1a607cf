//! A progress bar with rate, time left and losses; on anything but a terminal, a line from time to time.

use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal: a log says that a run is alive, and stays short.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// A bar over the steps of a run, on standard error. Where that is not a terminal it is a line every 30 seconds.
pub struct Progress {
    bar: ProgressBar,
    /// When the last line was written, where lines take the bar's place.
    last_line: Option<Cell<Instant>>,
}

impl Progress {
    /// A bar of `total` steps.
    pub fn new(total: u64, name: &str) -> Self {
        let bar = ProgressBar::new(total);
        let template = "{prefix} {bar:30} {pos}/{len} steps, {per_sec}, {eta} left  {msg}";
        // The template is a constant of the right form; the plain style is good enough otherwise.
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name.to_string());
        let last_line = bar.is_hidden().then(|| Cell::new(Instant::now()));
        Self { bar, last_line }
    }

    /// Moves to `step` and shows the latest losses.
    pub fn set(&self, step: u64, losses: &[(&str, f64)]) {
        if self.bar.position() == 0 && step > 1 {
            // A resumed run: the steps before are not this run's speed.
            self.bar.reset_eta();
        }
        self.bar.set_position(step);
        self.bar.set_message(losses.iter().map(|(name, value)| format!("{name} {value:.3}")).collect::<Vec<_>>().join("  "));
        if let Some(last) = &self.last_line
            && last.get().elapsed() >= LINE_EVERY
        {
            last.set(Instant::now());
            eprintln!("{}", self.line());
        }
    }

    /// As [`set`](Progress::set), of losses that may not have been measured yet: those are left out, and one that is NaN is shown.
    pub fn set_measured(&self, step: u64, losses: &[(&str, Option<f64>)]) {
        let measured = losses.iter().filter_map(|&(name, value)| Some((name, value?)));
        self.set(step, &measured.collect::<Vec<_>>());
    }

    /// What the bar says, without the bar.
    fn line(&self) -> String {
        let (bar, left) = (&self.bar, FormattedDuration(self.bar.eta()));
        let (position, total) = (bar.position(), bar.length().unwrap_or(0));
        format!("{} {position}/{total} steps, {:.2}/s, {left} left  {}", bar.prefix(), bar.per_sec(), bar.message())
    }

    /// The run has ended; the bar stays.
    pub fn finish(&self) {
        self.bar.finish();
    }

    /// The run was stopped; the bar stays where it is.
    pub fn abandon(&self) {
        self.bar.abandon();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_the_bar_shows() {
        let progress = Progress::new(40, "training");
        progress.set(10, &[("loss", 0.25), ("grad_norm", 3.0)]);
        let line = progress.line();
        assert!(line.starts_with("training 10/40 steps, "), "{line}");
        assert!(line.ends_with("left  loss 0.250  grad_norm 3.000"), "{line}");
    }

    #[test]
    fn what_is_not_measured_yet_is_left_out_and_what_is_nan_is_not() {
        let progress = Progress::new(40, "training");
        progress.set_measured(10, &[("loss", Some(f64::NAN)), ("validation", None), ("MFU", Some(0.5))]);
        let line = progress.line();
        assert!(line.ends_with("left  loss NaN  MFU 0.500"), "{line}");
    }
}
