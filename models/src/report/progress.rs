//! A progress bar with rate, time left and losses.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over the steps of a run. On anything but a terminal it prints nothing.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar of `total` steps.
    pub fn new(total: u64, name: &str) -> Self {
        let bar = ProgressBar::new(total);
        let template = "{prefix} {bar:30} {pos}/{len} steps, {per_sec}, {eta} left  {msg}";
        // The template is a constant of the right form; the plain style is good enough otherwise.
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(name.to_string());
        Self(bar)
    }

    /// Moves to `step` and shows the latest losses.
    pub fn set(&self, step: u64, losses: &[(&str, f64)]) {
        if self.0.position() == 0 && step > 1 {
            // A resumed run: the steps before are not this run's speed.
            self.0.reset_eta();
        }
        self.0.set_position(step);
        self.0.set_message(losses.iter().map(|(name, value)| format!("{name} {value:.3}")).collect::<Vec<_>>().join("  "));
    }

    /// The run has ended; the bar stays.
    pub fn finish(&self) {
        self.0.finish();
    }

    /// The run was stopped; the bar stays where it is.
    pub fn abandon(&self) {
        self.0.abandon();
    }
}
