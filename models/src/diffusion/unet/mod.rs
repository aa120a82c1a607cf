//! U-Nets that denoise: that of pixels ([`UNet2dModel`], of DDPM).

mod config;
mod embedding;
mod network;
mod stage;
mod unet2d;

pub use config::OneOrMore;
pub use unet2d::{UNet2dConfig, UNet2dModel};
