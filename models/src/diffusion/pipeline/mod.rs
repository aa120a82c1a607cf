//! Stable Diffusion as a whole: a folder or single file of `diffusers`' or LDM's layout in, pictures out.

mod control;
mod denoise;
mod draw;
mod folder;
mod inversion;
mod options;
mod picture;
mod png;
mod pretrained;
mod preview;
mod prompt;

pub use control::ControlInput;
pub use draw::{Drawn, Phase, StableDiffusion, Step};
pub use folder::LoadOptions;
pub use inversion::TextualInversion;
pub use options::DrawOptions;
pub use picture::{load_picture, picture_bytes, resize_picture};
pub use png::{read_png_text, write_png};
pub use preview::latent_preview;
