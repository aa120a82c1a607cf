//! U-Nets that denoise: that of pixels ([`UNet2dModel`], of DDPM) and that of latents, which looks at a text ([`UNet2dConditionModel`], of
//! Stable Diffusion), with the networks that steer the latter by an image ([`ControlNetModel`]).

mod condition;
mod conditioning;
mod config;
mod controlnet;
mod embedding;
mod network;
mod stage;
mod unet2d;

pub use condition::{UNet2dConditionConfig, UNet2dConditionModel};
pub use conditioning::UNetConditions;
pub use config::OneOrMore;
pub use controlnet::{Control, ControlNetConfig, ControlNetInput, ControlNetModel, MultiControlNet, Residuals};
pub use unet2d::{UNet2dConfig, UNet2dModel};
