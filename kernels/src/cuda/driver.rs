//! CUDA's driver, loaded at run time.

use super::backend::{Backend, FunctionHandle, Info};
use super::error::CudaError;
use super::launch::{Launch, TensorMap, TensorMapSpec};
use super::memory::Type;
use super::nvrtc::nvrtc;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute, CUresult};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Uploads go through pinned memory in pieces of at most this size, so that the host can go on while the last is on its way.
const PIECE: usize = 16 << 20;

/// A GPU's primary context with the one stream that all work is queued on.
pub(super) struct Driver {
    info: Info,
    context: sys::CUcontext,
    stream: sys::CUstream,
    staging: Mutex<Vec<Staging>>,
}

// SAFETY: the driver's handles may be used from any thread; the staging blocks are behind a lock.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// Pinned memory of the host, and the point in the queue after which it is free again.
struct Staging {
    memory: *mut u8,
    size: usize,
    free_after: sys::CUevent,
}

thread_local! {
    /// The context that is current in this thread, as far as this module set it.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The error that a driver's status stands for.
fn check(call: &str, status: CUresult) -> Result<(), CudaError> {
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: the driver is loaded, since it gave the status; it sets the pointer to a static string or to null.
        unsafe { get(status, &mut text) };
        // SAFETY: not null, and a string of the driver's that ends in NUL.
        (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    };
    let name = text(sys::cuGetErrorName).unwrap_or_else(|| format!("{status:?}"));
    let description = text(sys::cuGetErrorString).unwrap_or_default();
    Err(CudaError::Driver { call: call.to_string(), reason: format!("{name}: {description}") })
}

/// Calls a function of the driver and turns its status into a `Result`.
macro_rules! driver {
    ($function:ident($($arg:expr),* $(,)?)) => {
        // SAFETY: the driver is loaded; handles are live ones of its own; pointers are to locals of the documented type, or to
        // memory whose extent the caller of the enclosing function vouches for.
        check(stringify!($function), unsafe { sys::$function($($arg),*) })
    };
}

impl Driver {
    pub(super) fn new(ordinal: usize) -> Result<Self, CudaError> {
        let missing = |why: String| CudaError::Unavailable(format!("cuda:{ordinal} is not available: {why}"));
        // SAFETY: loads the driver by its name; that runs only its own initialisation.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing("NVIDIA's driver (libcuda) was not found; install it, or use the device cpu".into()));
        }
        driver!(cuInit(0)).map_err(|e| missing(e.to_string()))?;
        let mut count = 0;
        driver!(cuDeviceGetCount(&mut count))?;
        if ordinal >= count as usize {
            return Err(missing(format!("this machine has {count} GPUs, counted from 0")));
        }
        let mut device = 0;
        driver!(cuDeviceGet(&mut device, ordinal as i32))?;
        let mut context = std::ptr::null_mut();
        driver!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        driver!(cuCtxSetCurrent(context))?;
        CURRENT.set(context as usize);
        let mut stream = std::ptr::null_mut();
        driver!(cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        let info = Self::info_of(device)?;
        Ok(Self { info, context, stream, staging: Mutex::default() })
    }

    fn info_of(device: sys::CUdevice) -> Result<Info, CudaError> {
        let attribute = |attribute| {
            let mut value = 0;
            driver!(cuDeviceGetAttribute(&mut value, attribute, device)).map(|()| value as u32)
        };
        let mut name = [0 as std::ffi::c_char; 128];
        driver!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        // SAFETY: the driver ended the name in NUL within the array.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Info {
            name,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        })
    }

    /// The architecture to compile for; from Hopper on the one with the chip's own instructions.
    fn architecture(&self) -> String {
        let (major, minor) = self.info.capability;
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }

    /// A staging block of at least `size` bytes that no copy reads any more.
    fn staging(&self, size: usize) -> Result<Staging, CudaError> {
        const MOST: usize = 8;
        let mut free = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a live event of this context.
        let is_done = |s: &Staging| unsafe { sys::cuEventQuery(s.free_after) } == CUresult::CUDA_SUCCESS;
        if let Some(at) = free.iter().position(|s| s.size >= size && is_done(s)) {
            return Ok(free.swap_remove(at));
        }
        if free.len() >= MOST
            && let Some(at) = free.iter().position(|s| s.size >= size)
        {
            let staging = free.swap_remove(at);
            driver!(cuEventSynchronize(staging.free_after))?;
            return Ok(staging);
        }
        drop(free);
        let size = size.next_power_of_two().max(64 << 10);
        let mut memory = std::ptr::null_mut();
        driver!(cuMemHostAlloc(&mut memory, size, 0))?;
        let mut free_after = std::ptr::null_mut();
        driver!(cuEventCreate(&mut free_after, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32))?;
        Ok(Staging { memory: memory.cast(), size, free_after })
    }
}

impl Backend for Driver {
    fn info(&self) -> &Info {
        &self.info
    }

    fn make_current(&self) -> Result<(), CudaError> {
        let context = self.context as usize;
        if CURRENT.get() != context {
            driver!(cuCtxSetCurrent(self.context))?;
            CURRENT.set(context);
        }
        Ok(())
    }

    fn alloc(&self, bytes: usize) -> Result<Option<u64>, CudaError> {
        let mut address = 0;
        // SAFETY: the address is written.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Ok(None),
            status => check("cuMemAlloc", status).map(|()| Some(address)),
        }
    }

    fn free(&self, address: u64) {
        // A failure means that the context is gone, and the memory with it.
        let _ = driver!(cuMemFree_v2(address));
    }

    fn memory(&self) -> Result<(usize, usize), CudaError> {
        let (mut free, mut total) = (0, 0);
        driver!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free, total))
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError> {
        for (i, piece) in from.chunks(PIECE).enumerate() {
            let staging = self.staging(piece.len())?;
            // SAFETY: the block has at least this size, and no queued copy reads it any more.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), staging.memory, piece.len()) };
            driver!(cuMemcpyHtoDAsync_v2(to + (i * PIECE) as u64, staging.memory.cast(), piece.len(), self.stream))?;
            driver!(cuEventRecord(staging.free_after, self.stream))?;
            self.staging.lock().unwrap_or_else(PoisonError::into_inner).push(staging);
        }
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), CudaError> {
        driver!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream))?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        driver!(cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream))
    }

    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), CudaError> {
        driver!(cuMemsetD8Async(to, 0, bytes, self.stream))
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        driver!(cuStreamSynchronize(self.stream))
    }

    fn target(&self) -> Result<String, CudaError> {
        let (major, minor) = nvrtc()?.version();
        Ok(format!("nvrtc {major}.{minor} {}", self.architecture()))
    }

    fn compile(&self, name: &str, source: &str, contract: bool, out: &Path) -> Result<(), CudaError> {
        let (code, _) = nvrtc()?.compile(name, source, contract, &self.architecture())?;
        std::fs::write(out, code).map_err(|e| CudaError::Unavailable(format!("{}: {e}", out.display())))
    }

    fn load(&self, name: &str, file: &Path) -> Result<u64, CudaError> {
        let code = std::fs::read(file).map_err(|e| CudaError::Unavailable(format!("{name}: {}: {e}", file.display())))?;
        let mut module = std::ptr::null_mut();
        driver!(cuModuleLoadData(&mut module, code.as_ptr().cast()))?;
        Ok(module as u64)
    }

    fn function(&self, module: u64, name: &str) -> Result<FunctionHandle, CudaError> {
        let text = CString::new(name).map_err(|_| CudaError::Unavailable(format!("{name:?} is no name of a kernel")))?;
        let mut function = std::ptr::null_mut();
        driver!(cuModuleGetFunction(&mut function, module as sys::CUmodule, text.as_ptr()))
            .map_err(|e| CudaError::Unavailable(format!("kernel {name}: {e}")))?;
        // A block may ask for all the shared memory there is.
        let mut used = 0;
        driver!(cuFuncGetAttribute(&mut used, FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))?;
        let most = self.info.shared as i32 - used;
        driver!(cuFuncSetAttribute(function, FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most))?;
        Ok(FunctionHandle(function as u64))
    }

    unsafe fn launch(&self, kernel: FunctionHandle, launch: Launch, args: &mut [*mut c_void]) -> Result<(), CudaError> {
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let function = kernel.0 as sys::CUfunction;
        driver!(cuLaunchKernel(function, gx, gy, gz, bx, by, bz, launch.shared, self.stream, args.as_mut_ptr(), std::ptr::null_mut()))
    }

    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, CudaError> {
        use sys::CUtensorMapDataType as Data;
        let data = match spec.ty {
            Type::F32 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Type::F64 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
            Type::F16 => Data::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Type::BF16 => Data::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Type::I64 => Data::CU_TENSOR_MAP_DATA_TYPE_INT64,
            Type::I32 => Data::CU_TENSOR_MAP_DATA_TYPE_INT32,
            Type::U8 | Type::Bool => Data::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match spec.swizzle {
            32 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let rank = spec.dims.len();
        assert!(
            rank <= 5 && spec.strides.len() + 1 == rank && spec.tile.len() == rank,
            "up to five extents, as many tiles, one stride less"
        );
        let steps = [1u32; 5];
        let mut map = TensorMap([0; 16]);
        driver!(cuTensorMapEncodeTiled(
            std::ptr::from_mut(&mut map).cast(),
            data,
            rank as u32,
            spec.ptr.address() as *mut c_void,
            spec.dims.as_ptr(),
            spec.strides.as_ptr(),
            spec.tile.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ))?;
        Ok(map)
    }

    fn event(&self) -> Result<u64, CudaError> {
        let mut event = std::ptr::null_mut();
        driver!(cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DEFAULT as u32))?;
        driver!(cuEventRecord(event, self.stream))?;
        Ok(event as u64)
    }

    fn elapsed_ms(&self, from: u64, to: u64) -> Result<f32, CudaError> {
        driver!(cuEventSynchronize(to as sys::CUevent))?;
        let mut milliseconds = 0.0;
        driver!(cuEventElapsedTime(&mut milliseconds, from as sys::CUevent, to as sys::CUevent))?;
        Ok(milliseconds)
    }

    fn drop_event(&self, event: u64) {
        let _ = driver!(cuEventDestroy_v2(event as sys::CUevent));
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        // Relaxed: memory may be allocated and kernels may be loaded meanwhile.
        driver!(cuStreamBeginCapture_v2(self.stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED))
    }

    fn end_capture(&self) -> Result<u64, CudaError> {
        let mut graph = std::ptr::null_mut();
        driver!(cuStreamEndCapture(self.stream, &mut graph))?;
        let mut executable = std::ptr::null_mut();
        let made = driver!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        driver!(cuGraphDestroy(graph))?;
        made.map(|()| executable as u64)
    }

    fn replay(&self, graph: u64) -> Result<(), CudaError> {
        driver!(cuGraphLaunch(graph as sys::CUgraphExec, self.stream))
    }

    fn drop_graph(&self, graph: u64) {
        let _ = driver!(cuGraphExecDestroy(graph as sys::CUgraphExec));
    }
}
