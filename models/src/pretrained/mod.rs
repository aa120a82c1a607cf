//! Models as folders of Hugging Face's layout: `config.json` beside the weights, in one safetensors file or in shards, read and written as
//! `transformers` and `diffusers` do.

mod json;
mod layout;
mod load;
mod weights;

pub(crate) use json::read_object;
pub(crate) use layout::cannot_untie;
pub use layout::{Layout, Library, Pretrained};
pub(crate) use load::{build_pretrained, read_config};
pub use load::{load_for_tuning, load_pretrained, load_pretrained_variant, save_pretrained};
