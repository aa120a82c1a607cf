//! Figures that say how good a generator is.

mod eigen;
mod frechet;
mod judge;

pub use frechet::{FeatureStatistics, frechet_distance};
pub use judge::{DigitJudge, Verdict};
