//! Figures that say how good a generator or a classifier is.

mod classification;
mod eigen;
mod frechet;
mod judge;

pub use classification::ConfusionMatrix;
pub use frechet::{FeatureStatistics, frechet_distance};
pub use judge::{DigitJudge, Verdict};
