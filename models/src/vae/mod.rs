//! Autoencoders of images: to a distribution of latents (KL), to a list of codes (VQ), and plain. Their losses and their training.

mod config;
mod digit;
mod gaussian;
mod kl;
mod load;
mod loss;
mod networks;
mod patch_gan;
mod quantizer;
mod tiling;
mod trainer;
mod vq;

pub use config::{AutoencoderKlConfig, CoderBlock};
pub use digit::{DigitVae, DigitVaeConfig};
pub use gaussian::DiagonalGaussian;
pub use kl::AutoencoderKl;
pub use load::rename_old_attention;
pub use loss::{Features, ReconstructionLoss, adaptive_weight, perceptual_loss};
pub use patch_gan::{PatchGan, PatchGanConfig};
pub use quantizer::{CodebookOptions, CodebookUse, Quantized, VectorQuantizer};
pub use tiling::Tiling;
pub use trainer::{AdversarialOptions, Autoencoder, Reconstruction, VaeStep, VaeTrainer, VaeTrainerOptions};
pub use vq::{VqVae, VqVaeConfig};
