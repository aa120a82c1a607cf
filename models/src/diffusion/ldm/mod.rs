//! Names of the first Stable Diffusion code (LDM, and SGM for SDXL), as they are in checkpoints of a single file, turned into those of
//! `diffusers`. Each function takes the tensors of one network, with the prefix of the whole taken away.

mod unet;
mod vae;

pub use unet::{controlnet_from_ldm, unet_from_ldm};
pub(crate) use unet::{layers_per_block, ldm_modules};
pub use vae::vae_from_ldm;
