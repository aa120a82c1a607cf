//! Layers, the named cells that hold their weights, and the scope that both are made from.
//!
//! A layer is built from a [`Params`] scope, which gives its weights their names (PyTorch's) and their first values, from
//! an initialiser or from a checkpoint. Weights live in [`Param`]s and running statistics in [`Buffer`]s: shared cells that
//! are read at every forward pass, so an optimiser's step is seen by every holder.

mod activation;
mod adapter;
mod conv;
mod dropout;
mod embedding;
mod init;
mod linear;
mod load;
mod module;
mod norm;
mod param;
mod params;
mod pool;
mod quantize;
mod sequential;

pub use activation::{Elu, Flatten, Gelu, GeluTanh, Hardswish, Identity, LeakyRelu, Mish, Relu, Sigmoid, Silu, Softmax, Softplus, Tanh};
pub use adapter::Adapter;
pub use conv::{Conv, Conv1d, Conv2d, Conv3d, ConvOptions, ConvTranspose, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, IntoKernel};
pub use dropout::{ChannelDropout, Dropout};
pub use embedding::Embedding;
pub use init::{Fan, Init, Nonlinearity};
pub use linear::Linear;
pub use load::{LoadMode, LoadReport, Mismatch, StateDict};
pub use module::Module;
pub use norm::{BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormOptions, GroupNorm, InstanceNorm, LayerNorm, RmsNorm};
pub use param::{Buffer, Param};
pub(crate) use params::matches_whole;
pub use params::{Mode, Params, ParamsOptions};
pub use pool::{
    AdaptiveAvgPool, AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d, AvgPool, AvgPool1d, AvgPool2d, AvgPool3d, MaxPool, MaxPool1d,
    MaxPool2d, MaxPool3d, Upsample,
};
pub use sequential::Sequential;
