//! A GPU made of the host's C++ compiler and processor, for tests where there is none: kernel files are compiled against
//! `emulate.cuh` and run a block at a time, a fiber for each thread. Results and synchronisation are those of a GPU; speed is not.
//!
//! It stands for a GPU of `KILN_EMULATE_CAPABILITY` (`9.0` by default), so that each level of kernels can be chosen.

use super::backend::{Backend, FunctionHandle, Info};
use super::error::CudaError;
use super::launch::{Launch, TensorMap, TensorMapSpec};
use super::memory::Type;
use libloading::Library;
use std::alloc::{alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a kernel's exported launcher looks like: grid, block, bytes of shared memory, arguments, and room for a message.
type Launcher = unsafe extern "C" fn(*const u32, *const u32, u32, *mut *mut c_void, *mut c_char, u64) -> c_int;

/// Fills an emulated tensor map: type size, rank, address, dims, strides, tile, swizzle bytes.
type TensorMapFiller = unsafe extern "C" fn(*mut TensorMap, u32, u32, u64, *const u64, *const u64, *const u32, u32) -> c_int;

/// Tells a module of memory that kernels may touch (`bytes` > 0), or no longer may (0).
type MemoryHook = unsafe extern "C" fn(u64, u64);

pub(super) struct Emulator {
    info: Info,
    state: Mutex<State>,
    /// One kernel at a time: the emulated machine is one.
    running: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Live memory and its size.
    memory: HashMap<u64, usize>,
    modules: Vec<Library>,
}

impl Emulator {
    pub(super) fn new() -> Self {
        let asked = std::env::var("KILN_EMULATE_CAPABILITY").ok();
        let asked = asked.as_deref().and_then(|text| text.split_once('.')).and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        // Few multiprocessors, so that persistent kernels have several tiles each.
        let info = Info { name: "emulator".into(), capability: asked.unwrap_or((9, 0)), multiprocessors: 3, shared: 227 << 10 };
        Self { info, state: Mutex::default(), running: Mutex::new(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layout(bytes: usize) -> Option<std::alloc::Layout> {
        std::alloc::Layout::from_size_align(bytes, 256).ok()
    }

    fn compiler() -> String {
        std::env::var("CXX").unwrap_or_else(|_| "g++".into())
    }

    /// Tells every module of memory that came or went.
    fn announce(state: &State, address: u64, bytes: usize) {
        for module in &state.modules {
            // SAFETY: the signature is that of emulate.cuh.
            if let Ok(hook) = unsafe { module.get::<MemoryHook>(b"kiln_emulate_memory") } {
                // SAFETY: the hook only takes note of the numbers.
                unsafe { hook(address, bytes as u64) };
            }
        }
    }
}

impl Backend for Emulator {
    fn info(&self) -> &Info {
        &self.info
    }

    fn make_current(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn alloc(&self, bytes: usize) -> Result<Option<u64>, CudaError> {
        let Some(layout) = Self::layout(bytes.max(1)) else { return Ok(None) };
        // SAFETY: the size is not zero.
        let address = unsafe { alloc(layout) } as u64;
        if address == 0 {
            return Ok(None);
        }
        let mut state = self.state();
        state.memory.insert(address, bytes);
        Self::announce(&state, address, bytes);
        Ok(Some(address))
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        if let Some(layout) = state.memory.remove(&address).and_then(|bytes| Self::layout(bytes.max(1))) {
            Self::announce(&state, address, 0);
            // SAFETY: it came from `alloc` with this layout, and was removed from the list just now.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }

    fn memory(&self) -> Result<(usize, usize), CudaError> {
        let used: usize = self.state().memory.values().sum();
        let total = 8 << 30;
        Ok((usize::saturating_sub(total, used), total))
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        unsafe { std::ptr::write_bytes(to as *mut u8, 0, bytes) };
        Ok(())
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn target(&self) -> Result<String, CudaError> {
        Ok(format!("emulator {}", Self::compiler()))
    }

    fn compile(&self, name: &str, source: &str, _: bool, out: &Path) -> Result<(), CudaError> {
        let text = out.with_extension("cpp");
        let failed = |log: String| CudaError::Compile { name: name.to_string(), log };
        std::fs::write(&text, source).map_err(|e| failed(e.to_string()))?;
        let output = Command::new(Self::compiler())
            .args([
                "-std=c++17",
                "-O1",
                "-fno-strict-aliasing",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-w",
                "-DKILN_EMULATE",
                "-x",
                "c++",
            ])
            .arg(&text)
            .arg("-o")
            .arg(out)
            .output()
            .map_err(|e| CudaError::Unavailable(format!("the emulator needs a C++ compiler (g++, or the one that CXX names): {e}")))?;
        if !output.status.success() {
            return Err(failed(String::from_utf8_lossy(&output.stderr).chars().take(4000).collect()));
        }
        // A text that compiled is of no further use; one that does not stays, to be looked at.
        let _ = std::fs::remove_file(&text);
        Ok(())
    }

    fn load(&self, name: &str, file: &Path) -> Result<u64, CudaError> {
        // SAFETY: a library that this module compiled, whole by its digest; loading it runs the initialisation of emulate.cuh.
        let library = unsafe { Library::new(file) };
        let library = library.map_err(|e| CudaError::Unavailable(format!("{name}: {e}")))?;
        let mut state = self.state();
        // SAFETY: the signature is that of emulate.cuh.
        if let Ok(hook) = unsafe { library.get::<MemoryHook>(b"kiln_emulate_memory") } {
            for (&address, &bytes) in &state.memory {
                // SAFETY: the hook only takes note of the numbers.
                unsafe { hook(address, bytes as u64) };
            }
        }
        state.modules.push(library);
        Ok(state.modules.len() as u64 - 1)
    }

    fn function(&self, module: u64, name: &str) -> Result<FunctionHandle, CudaError> {
        let state = self.state();
        // SAFETY: the signature is that of KILN_KERNEL in emulate.cuh.
        let launcher = unsafe { state.modules[module as usize].get::<Launcher>(format!("{name}__launch").as_bytes()) };
        let launcher = launcher.map_err(|e| CudaError::Unavailable(format!("kernel {name}: {e}")))?;
        Ok(FunctionHandle(*launcher as usize as u64))
    }

    unsafe fn launch(&self, kernel: FunctionHandle, launch: Launch, args: &mut [*mut c_void]) -> Result<(), CudaError> {
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut message = [0 as c_char; 1024];
        // SAFETY: the handle is the address of a launcher of this signature, in a library that is never unloaded.
        let launcher = unsafe { std::mem::transmute::<usize, Launcher>(kernel.0 as usize) };
        // SAFETY: the caller vouches for the arguments; the message has its length.
        let status = unsafe {
            launcher(
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared,
                args.as_mut_ptr(),
                message.as_mut_ptr(),
                message.len() as u64,
            )
        };
        if status == 0 {
            return Ok(());
        }
        let text: String = message.iter().take_while(|&&c| c != 0).map(|&c| c as u8 as char).collect();
        Err(CudaError::Driver { call: "emulated launch".into(), reason: text })
    }

    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, CudaError> {
        let state = self.state();
        let missing = || CudaError::Unavailable("the emulator makes tensor maps once a module is loaded".into());
        let module = state.modules.last().ok_or_else(missing)?;
        // SAFETY: the signature is that of emulate.cuh.
        let fill = unsafe { module.get::<TensorMapFiller>(b"kiln_emulate_tensor_map") }.map_err(|_| missing())?;
        let mut map = TensorMap([0; 16]);
        let ty: Type = spec.ty;
        // SAFETY: the arrays have `rank` entries, the strides one less.
        let status = unsafe {
            fill(
                &mut map,
                ty.size() as u32,
                spec.dims.len() as u32,
                spec.ptr.address(),
                spec.dims.as_ptr(),
                spec.strides.as_ptr(),
                spec.tile.as_ptr(),
                spec.swizzle,
            )
        };
        match status {
            0 => Ok(map),
            _ => Err(CudaError::Driver { call: "tensor map".into(), reason: format!("{spec:?} is not one that the copy engine takes") }),
        }
    }

    fn event(&self) -> Result<u64, CudaError> {
        Ok(0)
    }

    fn elapsed_ms(&self, _: u64, _: u64) -> Result<f32, CudaError> {
        Err(CudaError::Unavailable("the emulator keeps no time".into()))
    }

    fn drop_event(&self, _: u64) {}

    fn begin_capture(&self) -> Result<(), CudaError> {
        Err(CudaError::Unavailable("the emulator runs kernels at once and records none".into()))
    }

    fn end_capture(&self) -> Result<u64, CudaError> {
        Err(CudaError::Unavailable("nothing is recorded".into()))
    }

    fn replay(&self, _: u64) -> Result<(), CudaError> {
        Err(CudaError::Unavailable("nothing is recorded".into()))
    }

    fn drop_graph(&self, _: u64) {}
}
