//! Kiln's [`Tensor`], and every operation with its derivative rule beside it.
//!
//! Below: `kiln-kernels`, which knows slices and views only. Above: `kiln-autograd`, which walks the graph that the
//! operations here record.

#[macro_use]
mod dtype;
mod autocast;
mod creation;
mod device;
mod display;
mod error;
pub mod generator;
pub mod graph;
pub mod io;
mod layout;
pub mod ops;
pub mod profile;
mod shape;
mod storage;
mod tensor;
mod torch_cpu;

pub use autocast::{autocast, autocast_dtype, with_autocast};
pub use creation::TensorOptions;
pub use device::{Device, default_device, forbid_host, set_default_device};
pub use dtype::{DType, Scalar, WithDType};
pub use error::{Error, ErrorKind, Result};
pub use generator::{Generator, manual_seed};
pub use layout::Layout;
pub use ops::PerAxis;
pub use ops::attention::AttentionOptions;
pub use ops::conv::ConvOptions;
pub use ops::loss::{BceOptions, CosineEmbeddingOptions, CrossEntropyOptions, KlDivOptions, Reduction, TripletMarginOptions};
pub use ops::movement::{Ellipsis, IndexItem, IntoIndex, NewAxis, PadMode};
pub use ops::norm::BatchNorm;
pub use ops::pointwise::{Activation, Expr, Fused, fuse};
pub use ops::pool::PoolOptions;
pub use ops::quantized::{Quantization, QuantizedMatrix};
pub use ops::upsample::Interpolation;
pub use profile::{Profiler, profile, profile_scope};
pub use shape::{Dims, IntoShape, MAX_RANK, ReshapeDims, Shape, broadcast_shapes};
pub use tensor::Tensor;

pub use half::{bf16, f16};
pub use kiln_kernels::cpu::alloc::{MemoryStats, empty_cache, memory_stats, reset_peak};
pub use kiln_kernels::cpu::gemm::{MatmulPrecision, matmul_precision, set_matmul_precision};
pub use kiln_kernels::cuda;
pub use kiln_kernels::element::Bool;

/// Uses `count` threads for all operations outside of an explicit rayon pool. Results do not depend on it.
///
/// # Errors
/// If operations have run already: the pool is made at the first.
pub fn set_threads(count: usize) -> Result<()> {
    if kiln_kernels::cpu::parallel::set_threads(count) {
        return Ok(());
    }
    Err(Error::argument("set_threads", "the threads are running already; call it before the first operation"))
}
