//! A GPU: its memory, its queue, and the kernels compiled for it.

use super::alloc::{Block, Cache, MemoryStats, class_of};
use super::backend::Backend;
use super::compile::{self, Source};
use super::driver::Driver;
use super::emulator::Emulator;
use super::error::CudaError;
use super::launch::{Module, ModuleInner, TensorMap, TensorMapSpec, is_joined};
use super::memory::{DeviceBuffer, Slice, SliceMut};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

const MAX_GPUS: usize = 64;

/// One GPU. There is one value for each that is ever used; it lives as long as the program.
pub struct Gpu {
    ordinal: usize,
    backend: Box<dyn Backend>,
    emulated: bool,
    cache: Mutex<Cache>,
    modules: Modules,
    /// The pool that a capture in progress allocates from, or 0.
    pool: AtomicU64,
}

/// The modules by what they were made from: buckets by a hash of it, since every launch looks here.
struct Modules(Box<[RwLock<Vec<Slot>>]>);

const BUCKETS: usize = 256;

/// The place of one module, and what it is found by.
#[derive(Clone)]
struct Slot {
    key: Arc<str>,
    /// Empty while nobody has compiled it.
    module: Arc<OnceLock<Module>>,
    /// Held during compilation.
    compiling: Arc<Mutex<()>>,
}

impl Modules {
    fn new() -> Self {
        Self((0..BUCKETS).map(|_| RwLock::default()).collect())
    }

    /// The bucket of what the parts give, one after the other.
    fn bucket<'a>(&self, key: impl Iterator<Item = &'a str>) -> &RwLock<Vec<Slot>> {
        let hash = key.flat_map(|part| part.as_bytes().chunks(8)).fold(0u64, |hash, chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            // Fibonacci hashing: an odd number near 2⁶⁴ over the golden ratio.
            (hash.rotate_left(5) ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        &self.0[(hash >> 32) as usize % BUCKETS]
    }
}

/// The GPU number `ordinal`; with `KILN_CUDA=emulate`, the emulator as number 0.
///
/// # Errors
/// If the driver or that GPU is not there.
pub fn gpu(ordinal: usize) -> Result<&'static Gpu, CudaError> {
    static GPUS: [OnceLock<Gpu>; MAX_GPUS] = [const { OnceLock::new() }; MAX_GPUS];
    let missing = || CudaError::Unavailable(format!("cuda:{ordinal}: there is no GPU of this number"));
    let slot = GPUS.get(ordinal).ok_or_else(missing)?;
    if let Some(gpu) = slot.get() {
        return Ok(gpu);
    }
    let emulated = std::env::var("KILN_CUDA").is_ok_and(|v| v == "emulate");
    let backend: Box<dyn Backend> = match (emulated, ordinal) {
        (true, 0) => Box::new(Emulator::new()),
        (true, _) => return Err(missing()),
        (false, _) => Box::new(Driver::new(ordinal)?),
    };
    Ok(slot.get_or_init(|| Gpu { ordinal, backend, emulated, cache: Mutex::default(), modules: Modules::new(), pool: AtomicU64::new(0) }))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// The GPU's number.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Its name, e.g. `NVIDIA H100 80GB HBM3`.
    pub fn name(&self) -> &str {
        &self.backend.info().name
    }

    /// Whether this is the emulator.
    pub fn is_emulated(&self) -> bool {
        self.emulated
    }

    /// The compute capability, e.g. `(9, 0)`.
    pub fn capability(&self) -> (u32, u32) {
        self.backend.info().capability
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.backend.info().multiprocessors
    }

    /// The most shared memory that a block can ask for, in bytes.
    pub fn shared_memory(&self) -> u32 {
        self.backend.info().shared
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    pub(super) fn make_current(&self) -> Result<(), CudaError> {
        self.backend.make_current()
    }

    /// `bytes` bytes of stale content.
    pub fn alloc(&'static self, bytes: usize) -> Result<DeviceBuffer, CudaError> {
        let pool = self.pool.load(Relaxed);
        let Some(size) = class_of(bytes) else { return Err(self.out_of_memory(bytes)) };
        let cached = lock(&self.cache).take(size, pool);
        if let Some(block) = cached {
            self.backend.lend(block.address, bytes);
            return Ok(DeviceBuffer { gpu: self, block, bytes });
        }
        self.make_current()?;
        let mut address = self.backend.alloc(size)?;
        if address.is_none() && pool == 0 {
            self.empty_cache()?;
            address = self.backend.alloc(size)?;
        }
        let address = address.ok_or_else(|| self.out_of_memory(bytes))?;
        let block = lock(&self.cache).adopt(address, size, pool);
        self.backend.lend(address, bytes);
        Ok(DeviceBuffer { gpu: self, block, bytes })
    }

    fn out_of_memory(&self, requested: usize) -> CudaError {
        let stats = self.memory_stats();
        let (free, total) = self.backend.memory().unwrap_or((0, 0));
        CudaError::OutOfMemory { ordinal: self.ordinal, requested, in_use: stats.in_use, held: stats.held, free, total }
    }

    pub(super) fn release(&self, block: Block) {
        self.backend.lend(block.address, 0);
        lock(&self.cache).give(block);
    }

    /// What the allocator holds.
    pub fn memory_stats(&self) -> MemoryStats {
        lock(&self.cache).stats
    }

    /// Makes the current use the new peak.
    pub fn reset_peak(&self) {
        let mut cache = lock(&self.cache);
        cache.stats.peak = cache.stats.in_use;
    }

    /// Gives every cached block back to the driver, once queued work is done.
    pub fn empty_cache(&self) -> Result<(), CudaError> {
        self.free_pool(0)
    }

    /// Allocations come from `pool` until the next call; gives the pool from before.
    pub(super) fn set_pool(&self, pool: u64) -> u64 {
        self.pool.swap(pool, Relaxed)
    }

    pub(super) fn free_pool(&self, pool: u64) -> Result<(), CudaError> {
        self.make_current()?;
        let addresses = lock(&self.cache).drain(pool);
        if !addresses.is_empty() {
            self.backend.synchronize()?;
        }
        addresses.into_iter().for_each(|address| self.backend.free(address));
        Ok(())
    }

    /// Whether queued work is being recorded for a [`Graph`](super::Graph): nothing may wait for it then.
    pub fn is_capturing(&self) -> bool {
        self.pool.load(Relaxed) != 0
    }

    /// Copies bytes from the host into new memory. The copy is queued; `bytes` may be changed at once.
    pub fn upload(&'static self, bytes: &[u8]) -> Result<DeviceBuffer, CudaError> {
        if self.pool.load(Relaxed) != 0 {
            // A replay would read whatever the memory of the copy holds by then.
            return Err(CudaError::Unavailable(
                "a copy from the host cannot be recorded: make the tensor before the recording begins".into(),
            ));
        }
        let buffer = self.alloc(bytes.len())?;
        if !bytes.is_empty() {
            self.make_current()?;
            // SAFETY: the buffer was made for as many bytes.
            unsafe { self.backend.upload(buffer.block.address, bytes)? };
        }
        Ok(buffer)
    }

    /// Copies a buffer's bytes from byte `offset` on to the host; waits for all that is queued.
    pub fn download(&self, from: &DeviceBuffer, offset: usize, to: &mut [u8]) -> Result<(), CudaError> {
        let fits = offset.checked_add(to.len()).is_some_and(|end| end <= from.bytes);
        assert!(fits && std::ptr::eq(self, from.gpu), "bytes inside of the buffer, of this GPU");
        if to.is_empty() {
            return Ok(());
        }
        self.make_current()?;
        // SAFETY: checked above.
        unsafe { self.backend.download(to, from.block.address + offset as u64) }
    }

    /// Queues a copy of elements.
    pub fn copy(&self, from: Slice<'_>, to: &mut SliceMut<'_>) -> Result<(), CudaError> {
        assert!(from.len() == to.len() && from.ty() == to.ty(), "as many elements of one type");
        if from.is_empty() {
            return Ok(());
        }
        self.make_current()?;
        // SAFETY: both slices have these bytes, and one is borrowed mutably, so they do not overlap.
        unsafe { self.backend.copy(to.ptr().address(), from.ptr().address(), from.len() * from.ty().size()) }
    }

    /// Queues zeroing of elements.
    pub fn zero(&self, to: &mut SliceMut<'_>) -> Result<(), CudaError> {
        if to.is_empty() {
            return Ok(());
        }
        self.make_current()?;
        // SAFETY: the slice has these bytes.
        unsafe { self.backend.zero(to.ptr().address(), to.len() * to.ty().size()) }
    }

    /// Waits for all queued work.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.make_current()?;
        self.backend.synchronize()
    }

    /// The kernel file compiled with these macros: from memory, from disk, or anew.
    pub(crate) fn module(&'static self, source: &'static Source, defines: &[(&str, &str)]) -> Result<Module, CudaError> {
        self.module_with(source, defines, true)
    }

    /// As [`module`](Self::module), with every product rounded before it is added: for sums whose terms may cancel to zero.
    pub(crate) fn exact_module(&'static self, source: &'static Source, defines: &[(&str, &str)]) -> Result<Module, CudaError> {
        self.module_with(source, defines, false)
    }

    fn module_with(&'static self, source: &'static Source, defines: &[(&str, &str)], contract: bool) -> Result<Module, CudaError> {
        let defines_of = defines.iter().flat_map(|(name, value)| [" ", name, "=", value]);
        self.module_of(std::iter::once(source.name).chain(defines_of), source.name, contract, || compile::expand(source, defines))
    }

    /// The module that the parts of `key`, one after the other, stand for, from `text()` (a kernel file with its headers expanded) if it is not
    /// loaded yet. Only where `contract` says so may a product and a sum become one operation.
    pub(crate) fn module_of<'a>(
        &'static self,
        key: impl Iterator<Item = &'a str> + Clone,
        name: &'static str,
        contract: bool,
        text: impl FnOnce() -> String,
    ) -> Result<Module, CudaError> {
        let bucket = self.modules.bucket(key.clone());
        let find = |slots: &[Slot]| slots.iter().position(|slot| is_joined(&slot.key, key.clone()));
        let known = |slots: &[Slot]| find(slots).and_then(|i| slots[i].module.get().copied());
        if let Some(module) = known(&bucket.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(module);
        }
        let slot = {
            let mut slots = bucket.write().unwrap_or_else(PoisonError::into_inner);
            let i = find(&slots).unwrap_or_else(|| {
                slots.push(Slot { key: key.clone().collect::<String>().into(), module: Arc::default(), compiling: Arc::default() });
                slots.len() - 1
            });
            slots[i].clone()
        };
        // A second thread that wants the same kernel waits for it, one that wants another does not.
        let _compiling = lock(&slot.compiling);
        if let Some(module) = slot.module.get() {
            return Ok(*module);
        }
        self.make_current()?;
        let handle = compile::load(self.backend(), name, contract, &text())?;
        // Lives as long as its GPU: as long as the program.
        let made = Module(Box::leak(Box::new(ModuleInner { gpu: self, name, handle, kernels: RwLock::default() })));
        Ok(*slot.module.get_or_init(|| made))
    }

    /// Encodes a tile-wise view of a tensor for the copy engine.
    pub(crate) fn tensor_map(&self, spec: &TensorMapSpec<'_>) -> Result<TensorMap, CudaError> {
        self.make_current()?;
        self.backend.tensor_map(spec)
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu(cuda:{}, {})", self.ordinal, self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::device;
    use super::super::{Slice, SliceMut, Type};
    use super::*;

    #[test]
    fn memory_is_reused_counted_and_refused_in_words() {
        let Some(gpu) = device() else { return };
        // A size that no other test uses.
        let bytes = 5 << 20;
        let first = gpu.alloc(bytes).unwrap();
        let before = gpu.memory_stats();
        assert!(before.in_use >= bytes && before.held >= before.in_use && before.peak >= before.in_use);
        let address = first.ptr();
        drop(first);
        assert_eq!(gpu.alloc(bytes).unwrap().ptr(), address);
        let error = gpu.alloc(1 << 46).unwrap_err();
        assert!(matches!(error, CudaError::OutOfMemory { requested, .. } if requested == 1 << 46), "{error}");
        let text = error.to_string();
        assert!(text.contains("were asked for") && text.contains("are held") && text.contains("are free"), "{text}");
        assert!(gpu.alloc(usize::MAX).is_err());
    }

    #[test]
    fn bytes_go_and_come_back() {
        let Some(gpu) = device() else { return };
        // More than one piece of the pinned memory that uploads go through.
        let bytes: Vec<u8> = (0..40 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let buffer = gpu.upload(&bytes).unwrap();
        let mut back = vec![0; bytes.len() - 7];
        gpu.download(&buffer, 7, &mut back).unwrap();
        assert!(back == bytes[7..]);
        let mut copy = gpu.alloc(bytes.len()).unwrap();
        let from = Slice::new(&buffer, Type::U8, 0, bytes.len()).unwrap();
        gpu.copy(from, &mut SliceMut::new(&mut copy, Type::U8, 0, bytes.len()).unwrap()).unwrap();
        gpu.zero(&mut SliceMut::new(&mut copy, Type::U8, 0, 3).unwrap()).unwrap();
        let mut back = vec![1; 5];
        gpu.download(&copy, 0, &mut back).unwrap();
        assert_eq!(back, [0, 0, 0, bytes[3], bytes[4]]);
    }

    #[test]
    fn a_gpu_that_is_not_there_is_an_error() {
        assert!(gpu(63).is_err() && gpu(1000).is_err());
        if device().is_none() && !std::path::Path::new("/dev/nvidia0").exists() {
            let error = gpu(0).unwrap_err().to_string();
            assert!(error.starts_with("cuda:0 is not available"), "{error}");
        }
    }
}
