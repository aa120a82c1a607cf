//! Compiled kernels and the one place that launches them.

use super::backend::FunctionHandle;
use super::error::CudaError;
use super::gpu::Gpu;
use super::memory::DevicePtr;
use std::ffi::c_void;
use std::sync::{PoisonError, RwLock};

/// How many threads run a kernel: blocks, threads of each, and the bytes of shared memory that a block gets beside its static ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Launch {
    /// Enough blocks of `threads` threads for one thread an item, `limit` at most: the kernel strides over the rest.
    pub fn over(items: usize, threads: u32) -> Self {
        const LIMIT: usize = 1 << 20;
        let blocks = items.div_ceil(threads as usize).clamp(1, LIMIT);
        Self::blocks(blocks, threads)
    }

    /// A row of `blocks` blocks of `threads` threads.
    pub fn blocks(blocks: usize, threads: u32) -> Self {
        Self { grid: [blocks.min(i32::MAX as usize) as u32, 1, 1], block: [threads, 1, 1], shared: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, shared: u32) -> Self {
        Self { shared, ..self }
    }
}

/// A value that a kernel takes.
///
/// # Safety
/// [`as_ptr`](Arg::as_ptr) points to a value whose size, alignment and meaning are those of the kernel's parameter type: `i32` for
/// `int`, [`DevicePtr`] for any pointer, a `#[repr(C)]` struct for the struct of the same fields.
pub unsafe trait Arg {
    /// Where the value lies.
    fn as_ptr(&self) -> *mut c_void;
}

/// Implements [`Arg`](crate::cuda::Arg) for types that look the same on both sides.
macro_rules! impl_arg {
    ($($t:ty),* $(,)?) => { $(
        // SAFETY: the type is a number, an address, or `#[repr(C)]` with the fields of the kernel file's struct of that name.
        unsafe impl $crate::cuda::Arg for $t {
            fn as_ptr(&self) -> *mut std::ffi::c_void {
                std::ptr::from_ref(self).cast_mut().cast()
            }
        }
    )* };
}
pub(crate) use impl_arg;

impl_arg!(i32, u32, i64, u64, f32, f64, DevicePtr, TensorMap);

/// A compiled kernel file. It stays loaded as long as the program runs.
#[derive(Clone, Copy)]
pub struct Module(pub(super) &'static ModuleInner);

pub(super) struct ModuleInner {
    pub(super) gpu: &'static Gpu,
    pub(super) name: &'static str,
    pub(super) handle: u64,
    /// The kernels that were asked for: a handful, so that looking through them is fastest.
    pub(super) kernels: RwLock<Vec<(String, FunctionHandle)>>,
}

impl Module {
    /// The kernel of this name.
    pub fn kernel(&self, name: &str) -> Result<Kernel, CudaError> {
        self.kernel_of(&[name])
    }

    /// The kernel whose name these parts make: they are joined only the first time.
    pub(crate) fn kernel_of(&self, name: &[&str]) -> Result<Kernel, CudaError> {
        let find = |kernels: &[(String, FunctionHandle)]| {
            kernels.iter().find(|(known, _)| is_joined(known, name.iter().copied())).map(|&(_, handle)| Kernel { gpu: self.0.gpu, handle })
        };
        if let Some(kernel) = find(&self.0.kernels.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(kernel);
        }
        let name = name.concat();
        let handle = self.0.gpu.backend().function(self.0.handle, &name)?;
        // If another thread was faster, the list names the kernel twice.
        self.0.kernels.write().unwrap_or_else(PoisonError::into_inner).push((name, handle));
        Ok(Kernel { gpu: self.0.gpu, handle })
    }
}

/// Whether `text` is what the parts give one after the other.
pub(super) fn is_joined<'a>(text: &str, mut parts: impl Iterator<Item = &'a str>) -> bool {
    parts.try_fold(text, |rest, part| rest.strip_prefix(part)) == Some("")
}

impl std::fmt::Debug for Module {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Module({})", self.0.name)
    }
}

/// A function of a compiled kernel file.
#[derive(Clone, Copy)]
pub struct Kernel {
    gpu: &'static Gpu,
    handle: FunctionHandle,
}

impl Kernel {
    /// Queues the kernel. It runs after everything queued before it; a fault inside shows at a later call.
    ///
    /// # Safety
    /// `args` are the kernel's parameters in number, order and type, and every address among them covers what the kernel
    /// touches through it, for as long as work queued until now takes (buffers may be dropped at once: their memory is reused for later work).
    pub unsafe fn launch(&self, launch: Launch, args: &[&dyn Arg]) -> Result<(), CudaError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        let mut pointers: [*mut c_void; 32] = [std::ptr::null_mut(); 32];
        assert!(args.len() <= pointers.len(), "a kernel takes at most {} arguments", pointers.len());
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = arg.as_ptr();
        }
        self.gpu.make_current()?;
        // SAFETY: the caller's; `pointers` holds one entry for each parameter.
        unsafe { self.gpu.backend().launch(self.handle, launch, &mut pointers[..args.len()]) }
    }
}

/// A tile-wise view of a tensor for Hopper's copy engine, made by [`Gpu::tensor_map`]; kernels take it as `const __grid_constant__ TensorMap`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct TensorMap(pub(super) [u64; 16]);

/// What a [`TensorMap`] describes: extents innermost first, as the copy engine counts.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapSpec<'a> {
    /// The first element; a multiple of 16.
    pub ptr: DevicePtr,
    /// Type of the elements.
    pub ty: super::memory::Type,
    /// Extents in elements, innermost first.
    pub dims: &'a [u64],
    /// Distances in bytes between neighbours of each dimension but the innermost; multiples of 16.
    pub strides: &'a [u64],
    /// Extents of a tile, innermost first.
    pub tile: &'a [u32],
    /// Bytes of the swizzle: 0, 32, 64 or 128.
    pub swizzle: u32,
}
