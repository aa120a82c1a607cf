//! What can go wrong on the way to the GPU.

/// An error of the runtime: a missing library, a refused allocation, a kernel that does not compile or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The driver, NVRTC or the GPU itself is not there; the text says which, and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The GPU has no such memory left.
    #[error(
        "out of memory on cuda:{ordinal}: {requested} bytes were asked for, {in_use} are in use, {held} are held with the cache, {free} of {total} are free"
    )]
    OutOfMemory {
        /// The GPU's number.
        ordinal: usize,
        /// Bytes asked for.
        requested: usize,
        /// Bytes in live buffers.
        in_use: usize,
        /// Bytes taken from the driver: in live buffers or cached.
        held: usize,
        /// Bytes that the driver reports as free.
        free: usize,
        /// Bytes of the GPU's memory.
        total: usize,
    },
    /// A kernel's source did not compile.
    #[error("kernel file {name}: {log}")]
    Compile {
        /// The kernel file.
        name: String,
        /// What the compiler printed.
        log: String,
    },
    /// A call of the driver failed. Kernels run later than they are launched: the fault may be that of an earlier one.
    #[error("{call}: {reason}")]
    Driver {
        /// The call.
        call: String,
        /// The driver's name and description of the fault.
        reason: String,
    },
}
