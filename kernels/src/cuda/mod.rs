//! The GPU: a runtime over CUDA's driver, and kernels in CUDA C++ (`.cu`, beside the Rust that launches them).
//!
//! Nothing of CUDA is needed to build Kiln: the driver and NVRTC are loaded when [`gpu`] is first called, and a machine without them
//! gets an error that says what is missing. Kernels are compiled for the machine's GPU when they are first used and kept on disk.
//! With `KILN_CUDA=emulate` the same kernels are compiled by the host's C++ compiler and run on the processor (see `emulator`),
//! so that they can be tested where there is no GPU.
//!
//! Work is queued on one stream per GPU, in the order of the calls; only copies to the host wait for it.

mod alloc;
pub mod attention;
mod axis_maps;
mod backend;
mod check;
mod compile;
pub mod conv;
pub mod copy;
pub mod cross_entropy;
pub mod cumulative;
mod driver;
mod emulator;
mod error;
pub mod fill;
pub mod gemm;
mod gpu;
pub mod gradient;
mod graph;
pub mod index;
mod launch;
mod memory;
pub mod norm;
mod nvrtc;
pub mod optim;
pub mod pointwise;
pub mod pool;
pub mod random;
pub mod reduce;
pub mod resample;
pub mod rotary;
pub mod softmax;
pub mod sort;
#[cfg(test)]
mod testing;

pub use alloc::MemoryStats;
pub use error::CudaError;
pub use gpu::{Gpu, gpu};
pub use graph::{Event, Graph};
pub use launch::{Arg, Kernel, Launch, Module, TensorMap, TensorMapSpec};
pub use memory::{DeviceBuffer, DevicePtr, Slice, SliceMut, Strided, Type, View};

pub(crate) use compile::Source;
