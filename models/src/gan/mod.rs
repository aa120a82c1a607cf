//! Generative adversarial networks: a generator that draws, and a discriminator that tells its drawings from real ones.
//!
//! Goodfellow et al. 2014; the convolutional form is Radford et al. 2015, the critic with a gradient penalty Gulrajani et al. 2017.

mod dcgan;
mod loss;
mod trainer;

pub use dcgan::{DcganConfig, DcganDiscriminator, DcganGenerator};
pub use loss::{GanLoss, gradient_penalty};
pub(crate) use trainer::initialise;
pub use trainer::{GanTrainer, GanTrainerOptions, StepLosses};
