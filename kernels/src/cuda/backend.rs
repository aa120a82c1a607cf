//! What the runtime asks of a machine: CUDA's driver answers it ([`driver`](super::driver)), or the emulator does.

use super::error::CudaError;
use super::launch::{Launch, TensorMap, TensorMapSpec};
use std::ffi::c_void;
use std::path::Path;

/// A kernel, as its backend knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FunctionHandle(pub(super) u64);

/// What is known of a GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) name: String,
    pub(super) capability: (u32, u32),
    pub(super) multiprocessors: u32,
    /// The most dynamic shared memory that a block can get.
    pub(super) shared: u32,
}

/// A machine that runs kernels. Work is queued in the order of the calls; addresses are those that [`alloc`](Backend::alloc) gave.
pub(super) trait Backend: Send + Sync {
    fn info(&self) -> &Info;

    /// Makes the GPU the calling thread's.
    fn make_current(&self) -> Result<(), CudaError>;

    /// New memory; `None` if there is none left.
    fn alloc(&self, bytes: usize) -> Result<Option<u64>, CudaError>;

    /// Takes note of how much of a block from [`alloc`](Backend::alloc) a kernel may touch from now on: 0 when the block returns to the cache.
    fn lend(&self, _address: u64, _bytes: usize) {}

    /// Gives memory back, after all queued work is done.
    fn free(&self, address: u64);

    /// Bytes of free memory, and of all.
    fn memory(&self) -> Result<(usize, usize), CudaError>;

    /// Queues a copy from the host; the source may be changed as soon as this returns.
    ///
    /// # Safety
    /// `to` must have room for it.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError>;

    /// Copies to the host and waits for it.
    ///
    /// # Safety
    /// As many bytes must be readable at `from`.
    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), CudaError>;

    /// Queues a copy.
    ///
    /// # Safety
    /// Both must hold as many bytes, and not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError>;

    /// Queues zeroing.
    ///
    /// # Safety
    /// `to` must have room.
    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), CudaError>;

    /// Waits for all queued work; faults of kernels show here at the latest.
    fn synchronize(&self) -> Result<(), CudaError>;

    /// What compiled code depends on beside its source: compiler, its version, architecture, options.
    fn target(&self) -> Result<String, CudaError>;

    /// Compiles the text of a kernel file (headers expanded) to the file `out`. Only where `contract` says so may a product and a sum become one
    /// operation.
    fn compile(&self, name: &str, source: &str, contract: bool, out: &Path) -> Result<(), CudaError>;

    /// Loads compiled code.
    fn load(&self, name: &str, file: &Path) -> Result<u64, CudaError>;

    /// A kernel of a loaded module.
    fn function(&self, module: u64, name: &str) -> Result<FunctionHandle, CudaError>;

    /// Queues a kernel.
    ///
    /// # Safety
    /// See [`Kernel::launch`](super::launch::Kernel::launch).
    unsafe fn launch(&self, kernel: FunctionHandle, launch: Launch, args: &mut [*mut c_void]) -> Result<(), CudaError>;

    /// Encodes a tensor map.
    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, CudaError>;

    /// A point in the queue, for timing.
    fn event(&self) -> Result<u64, CudaError>;

    /// Milliseconds between two such points; waits for the later one.
    fn elapsed_ms(&self, from: u64, to: u64) -> Result<f32, CudaError>;

    /// Gives a point's handle back.
    fn drop_event(&self, event: u64);

    /// Queued work is recorded instead of run, until [`end_capture`](Backend::end_capture).
    fn begin_capture(&self) -> Result<(), CudaError>;

    /// The recorded work.
    fn end_capture(&self) -> Result<u64, CudaError>;

    /// Queues recorded work.
    fn replay(&self, graph: u64) -> Result<(), CudaError>;

    /// Gives a recording back.
    fn drop_graph(&self, graph: u64);
}
