//! CLIP: a text tower and an image tower that agree on what belongs together. Both with the names and the numbers of Hugging Face's
//! `CLIPModel`, their contrastive loss, and what is done with their embeddings: retrieval and zero-shot classification.
//!
//! Source: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, 2021.

mod config;
mod encoder;
mod model;
mod open_clip;
mod preprocess;
mod retrieval;
mod text;
mod vision;

pub use config::{ClipConfig, ClipTextConfig, ClipVisionConfig, WithProjection};
pub use model::{ClipModel, ClipOutput, contrastive_loss};
pub use open_clip::from_open_clip;
pub use preprocess::ClipImageProcessor;
pub use retrieval::{normalize, recall_at, similarity, zero_shot_classes};
pub use text::{ClipTextModel, ClipTextOutput};
pub use vision::{ClipVisionModel, ClipVisionOutput};
