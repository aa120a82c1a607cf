//! The blocks that U-Nets and autoencoders of images are stacked from, with the names of `diffusers`. Images are (B, C, H, W), sequences
//! (B, T, C).

mod attention;
mod embedding;
mod resnet;

pub(crate) use attention::{Attention, AttentionShape, SpatialAttention, SpatialAttentionOptions, Transformer2d, Transformer2dOptions};
pub(crate) use embedding::{TimestepEmbedding, timestep_waves};
pub(crate) use resnet::{Downsample, ResnetBlock, ResnetOptions, Upsample};
