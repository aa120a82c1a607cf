//! Autoencoders of images: to a distribution of latents (KL), to a list of codes (VQ), and plain.

mod config;
mod gaussian;
mod kl;
mod load;
mod networks;
mod tiling;

pub use config::{AutoencoderKlConfig, CoderBlock};
pub use gaussian::DiagonalGaussian;
pub use kl::AutoencoderKl;
pub use load::rename_old_attention;
pub use tiling::Tiling;
