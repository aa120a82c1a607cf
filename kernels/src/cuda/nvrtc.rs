//! NVRTC, CUDA's run-time compiler, loaded when a kernel must be compiled. It is not part of the driver.

use super::error::CudaError;
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

type Program = *mut c_void;

const MISSING: &str = "NVRTC, which compiles kernels, was not found: `pip install nvidia-cuda-nvrtc`, or set KILN_NVRTC to libnvrtc.so";

/// The loaded library.
pub(super) struct Nvrtc {
    library: Library,
    version: (i32, i32),
}

/// NVRTC, loaded at the first call.
pub(super) fn nvrtc() -> Result<&'static Nvrtc, CudaError> {
    static NVRTC: OnceLock<Result<Nvrtc, CudaError>> = OnceLock::new();
    NVRTC.get_or_init(Nvrtc::open).as_ref().map_err(Clone::clone)
}

/// Where pip and the toolkit put the library, most particular first.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("KILN_NVRTC") {
        return vec![path.into()];
    }
    let names = ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"];
    let mut found: Vec<PathBuf> = names.iter().map(PathBuf::from).collect();
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).chain(["/usr/local/cuda".into()]);
    let mut folders: Vec<PathBuf> = toolkits.flat_map(|toolkit| [toolkit.join("lib64"), toolkit.join("lib")]).collect();
    let environments = variable("VIRTUAL_ENV").into_iter().chain(variable("HOME").map(|home| home.join(".local")));
    for environment in environments.chain(["/usr/local".into(), "/usr".into()]) {
        let Ok(pythons) = std::fs::read_dir(environment.join("lib")) else { continue };
        let pythons = pythons.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
        for packages in pythons.flat_map(|python| [python.path().join("site-packages"), python.path().join("dist-packages")]) {
            folders.extend(["cu13", "cuda_nvrtc"].map(|package| packages.join("nvidia").join(package).join("lib")));
        }
    }
    found.extend(folders.iter().flat_map(|folder| names.map(|name| folder.join(name))).filter(|path| path.exists()));
    found
}

/// Loads the part of NVRTC that it looks up by name when it compiles, from its own folder: some versions do not look there.
fn load_builtins(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so") {
            // SAFETY: NVIDIA's by name, beside the library that needs it. It stays loaded, so that NVRTC finds it.
            if let Ok(library) = unsafe { Library::new(entry.path()) } {
                std::mem::forget(library);
            }
        }
    }
}

impl Nvrtc {
    fn open() -> Result<Self, CudaError> {
        for path in candidates() {
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                load_builtins(folder);
            }
            // SAFETY: the library is NVIDIA's by name (or the user's choice); loading it runs only its own initialisation.
            let Ok(library) = (unsafe { Library::new(&path) }) else { continue };
            let (mut major, mut minor) = (0, 0);
            // SAFETY: the documented signature; both integers are written.
            let status = unsafe {
                let Ok(version): Result<Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>, _> = library.get(b"nvrtcVersion")
                else {
                    continue;
                };
                version(&mut major, &mut minor)
            };
            if status == 0 {
                return Ok(Self { library, version: (major, minor) });
            }
        }
        Err(CudaError::Unavailable(MISSING.to_string()))
    }

    /// Version, e.g. `(13, 0)`.
    pub(super) fn version(&self) -> (i32, i32) {
        self.version
    }

    /// A function of the library.
    fn symbol<F: Copy>(&self, name: &str) -> Result<F, CudaError> {
        // SAFETY: every caller names the documented C signature of the function.
        let symbol = unsafe { self.library.get::<F>(name.as_bytes()) };
        symbol.map(|symbol| *symbol).map_err(|e| CudaError::Unavailable(format!("NVRTC has no {name}: {e}")))
    }

    /// Machine code (a CUBIN) of a kernel file for `arch` (`sm_90a`) and what the compiler said of it, or its messages as an error.
    pub(super) fn compile(&self, name: &str, text: &str, contract: bool, arch: &str) -> Result<(Vec<u8>, String), CudaError> {
        let broken = |log: String| CudaError::Compile { name: name.to_string(), log };
        let source = CString::new(text).map_err(|e| broken(e.to_string()))?;
        let file = CString::new(format!("{name}.cu")).map_err(|e| broken(e.to_string()))?;
        let options = [
            format!("--gpu-architecture={arch}"),
            "--std=c++17".into(),
            format!("--fmad={contract}"),
            "--device-int128".into(),
            "--ptxas-options=--verbose".into(),
        ];
        let options: Vec<CString> = options.into_iter().filter_map(|option| CString::new(option).ok()).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        type Create =
            unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char) -> c_int;
        let create: Create = self.symbol("nvrtcCreateProgram")?;
        let compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int = self.symbol("nvrtcCompileProgram")?;
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int = self.symbol("nvrtcDestroyProgram")?;
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the strings end in NUL and outlive the call; no headers are given.
        let status = unsafe { create(&mut program, source.as_ptr(), file.as_ptr(), 0, std::ptr::null(), std::ptr::null()) };
        if status != 0 {
            return Err(broken(format!("nvrtcCreateProgram gave {status}")));
        }
        // SAFETY: a program made above, and as many options as counted.
        let status = unsafe { compile(program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self
            .bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
            .map(|log| CStr::from_bytes_until_nul(&log).map_or_else(|_| "no log".into(), |log| log.to_string_lossy().into_owned()));
        let result = log.and_then(|log| match status {
            0 => Ok((self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")?, log)),
            _ => Err(broken(format!("for {arch}: {log}"))),
        });
        // SAFETY: made above, used for the last time.
        unsafe { destroy(&mut program) };
        result
    }

    /// What a pair of NVRTC's functions, one for the size and one for the content, give of a program.
    fn bytes(&self, program: Program, size: &str, content: &str) -> Result<Vec<u8>, CudaError> {
        let size_of: unsafe extern "C" fn(Program, *mut usize) -> c_int = self.symbol(size)?;
        let get: unsafe extern "C" fn(Program, *mut c_char) -> c_int = self.symbol(content)?;
        let mut len = 0;
        // SAFETY: a live program; the length is written.
        let status = unsafe { size_of(program, &mut len) };
        let mut bytes = vec![0u8; len];
        // SAFETY: a live program, and room for as many bytes as it said.
        if status != 0 || unsafe { get(program, bytes.as_mut_ptr().cast()) } != 0 {
            return Err(CudaError::Driver { call: content.to_string(), reason: "failed".into() });
        }
        Ok(bytes)
    }
}
