//! A GPU made of the host's C++ compiler and processor, for tests where there is none: kernel files are compiled against
//! `emulate.cuh` and run a block at a time, a fiber for each thread. Results and synchronisation are those of a GPU; speed is not.
//!
//! With `KILN_EMULATE_CHECK=1` every access to memory is checked: accesses outside of buffers and races between threads are errors of the launch.
//! `KILN_EMULATE_SHUFFLE=seed` runs threads and blocks in a random order.
//!
//! It stands for a GPU of `KILN_EMULATE_CAPABILITY` (`9.0` by default), so that each level of kernels can be chosen.

use super::backend::{Backend, FunctionHandle, Info};
use super::error::CudaError;
use super::launch::{Launch, TensorMap, TensorMapSpec};
use super::memory::Type;
use super::{check, compile};
use libloading::Library;
use std::alloc::{alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// What a kernel's exported launcher looks like: grid, block, bytes of shared memory, arguments, and room for a message.
type Launcher = unsafe extern "C" fn(*const u32, *const u32, u32, *mut *mut c_void, *mut c_char, u64) -> c_int;

/// Fills an emulated tensor map: type size, rank, address, dims, strides, tile, swizzle bytes.
type TensorMapFiller = unsafe extern "C" fn(*mut TensorMap, u32, u32, u64, *const u64, *const u64, *const u32, u32) -> c_int;

/// Tells the runtime of memory that kernels may touch (`bytes` > 0), or no longer may (0).
type MemoryHook = unsafe extern "C" fn(u64, u64);

/// The name of the runtime among compiled files: the part of the emulator that kernels call.
const RUNTIME: &str = "emulate";

/// How a library is made of a file. Kernels see CUDA's rules: any object may be read as another type, and nothing is contracted that is not asked for.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-w",
    "-Wno-psabi",
    "-g1",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-ffp-contract=off",
    "-fno-math-errno",
];
const RUNTIME_FLAGS: &[&str] = &["-O3", "-fno-semantic-interposition"];
const KERNEL_FLAGS: &[&str] =
    &["-O1", "-DKILN_EMULATE", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-nostartfiles"];
/// The compiler reports each access to the runtime, which answers in the place of the sanitizer's own library.
const CHECK_FLAGS: &[&str] =
    &["-DKILN_EMULATE_CHECK", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-nodefaultlibs", "-lm", "-lc", "-lgcc"];

fn flags(name: &str, checked: bool) -> Vec<&'static str> {
    let own: &[&[&'static str]] = match (name == RUNTIME, checked) {
        (true, _) => &[RUNTIME_FLAGS],
        (false, true) => &[KERNEL_FLAGS, CHECK_FLAGS],
        (false, false) => &[KERNEL_FLAGS],
    };
    [FLAGS].iter().chain(own).flat_map(|list| list.iter().copied()).collect()
}

pub(super) struct Emulator {
    info: Info,
    checked: bool,
    state: Mutex<State>,
    /// One kernel at a time: the emulated machine is one.
    running: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Memory from the host and its size.
    memory: HashMap<u64, usize>,
    modules: Vec<Library>,
}

/// The process's one runtime: the loader gives its symbols to every kernel file.
#[derive(Default)]
struct Runtime {
    library: Option<Library>,
    /// What kernels may touch.
    lent: HashMap<u64, usize>,
}

static THE_RUNTIME: LazyLock<Mutex<Runtime>> = LazyLock::new(Mutex::default);

impl Runtime {
    fn lock() -> MutexGuard<'static, Self> {
        THE_RUNTIME.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the library of memory that came or went.
    fn announce(library: &Library, address: u64, bytes: usize) {
        // SAFETY: the signature is that of emulate_check.cpp.
        if let Ok(hook) = unsafe { library.get::<MemoryHook>(b"kiln_emulate_memory") } {
            // SAFETY: the hook only takes note of the numbers.
            unsafe { hook(address, bytes as u64) };
        }
    }
}

impl Emulator {
    pub(super) fn new() -> Self {
        Self::with_checks(std::env::var("KILN_EMULATE_CHECK").is_ok_and(|value| !value.is_empty() && value != "0"))
    }

    /// An emulator that checks every access, or does not.
    pub(super) fn with_checks(checked: bool) -> Self {
        let asked = std::env::var("KILN_EMULATE_CAPABILITY").ok();
        let asked = asked.as_deref().and_then(|text| text.split_once('.')).and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let capability = asked.unwrap_or((9, 0));
        // Few multiprocessors, so that persistent kernels have several tiles each.
        let info = Info { name: "emulator".into(), capability, multiprocessors: 3, shared: shared_memory(capability) };
        Self { info, checked, state: Mutex::default(), running: Mutex::new(()) }
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

    /// Loads the runtime, unless it is.
    fn start(&self) -> Result<MutexGuard<'static, Runtime>, CudaError> {
        let mut runtime = Runtime::lock();
        if runtime.library.is_none() {
            let file =
                compile::build(self, RUNTIME, false, &compile::expand_file("emulate.cpp", include_str!("emulator/emulate.cpp"), &[]))?;
            let library = Self::open(RUNTIME, &file)?;
            runtime.lent.iter().for_each(|(&address, &bytes)| Runtime::announce(&library, address, bytes));
            runtime.library = Some(library);
        }
        Ok(runtime)
    }

    /// Opens a compiled library; all see the runtime's symbols, and only we those of a kernel file.
    #[cfg(unix)]
    fn open(name: &str, file: &Path) -> Result<Library, CudaError> {
        use libloading::os::unix;
        let visibility = if name == RUNTIME { unix::RTLD_GLOBAL } else { unix::RTLD_LOCAL };
        // SAFETY: a library that this module compiled, whole by its digest; loading it initialises plain data.
        let library = unsafe { unix::Library::open(Some(file), unix::RTLD_NOW | visibility) };
        library.map(Library::from).map_err(|e| CudaError::Unavailable(format!("{name}: {e}")))
    }

    #[cfg(not(unix))]
    fn open(name: &str, _file: &Path) -> Result<Library, CudaError> {
        Err(CudaError::Unavailable(format!("{name}: the emulator needs a system with the loader of Unix")))
    }
}

/// The most shared memory that a block may have on GPUs of this capability (CUDA C++ Programming Guide, *Technical specifications*), in bytes.
fn shared_memory(capability: (u32, u32)) -> u32 {
    let kibibytes = match capability {
        (0..=7, _) => 64,
        (8, 0 | 7) => 163,
        (8, _) | (12.., _) => 99,
        _ => 227,
    };
    kibibytes << 10
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
        self.state().memory.insert(address, bytes);
        Ok(Some(address))
    }

    fn lend(&self, address: u64, bytes: usize) {
        let mut runtime = Runtime::lock();
        match bytes {
            0 => runtime.lent.remove(&address),
            _ => runtime.lent.insert(address, bytes),
        };
        if let Some(library) = &runtime.library {
            Runtime::announce(library, address, bytes);
        }
    }

    fn free(&self, address: u64) {
        let mut state = self.state();
        if let Some(layout) = state.memory.remove(&address).and_then(|bytes| Self::layout(bytes.max(1))) {
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
        Ok(format!("emulator {} {:?} {:?} {:?}", Self::compiler(), flags(RUNTIME, false), flags("", self.checked), check::architectures()))
    }

    fn compile(&self, name: &str, source: &str, contract: bool, out: &Path) -> Result<(), CudaError> {
        if name != RUNTIME {
            check::check(name, source, contract)?;
        }
        let mut text = out.as_os_str().to_os_string();
        text.push(".cpp");
        let failed = |log: String| CudaError::Compile { name: name.to_string(), log };
        std::fs::write(&text, source).map_err(|e| failed(e.to_string()))?;
        let output = Command::new(Self::compiler())
            .args(["-x", "c++"])
            .arg(&text)
            .args(["-x", "none"])
            .args(flags(name, self.checked))
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
        drop(self.start()?);
        let library = Self::open(name, file)?;
        let mut state = self.state();
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
        if launch.shared > self.info.shared {
            let reason = format!("{} bytes of shared memory for a block, of {} there are", launch.shared, self.info.shared);
            return Err(CudaError::Driver { call: "emulated launch".into(), reason });
        }
        let _running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let mut message = [0 as c_char; 4096];
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
        let text: String = message.iter().take_while(|&&c| c != 0).map(|&c| char::from(u8::from_ne_bytes(c.to_ne_bytes()))).collect();
        Err(CudaError::Driver { call: "emulated launch".into(), reason: text })
    }

    fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, CudaError> {
        let runtime = self.start()?;
        let missing = || CudaError::Unavailable("the emulator's runtime makes no tensor maps".into());
        let library = runtime.library.as_ref().ok_or_else(missing)?;
        // SAFETY: the signature is that of emulate_async.cpp.
        let fill = unsafe { library.get::<TensorMapFiller>(b"kiln_emulate_tensor_map") }.map_err(|_| missing())?;
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

#[cfg(test)]
mod tests;
