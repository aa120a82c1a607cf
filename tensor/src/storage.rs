//! A tensor's bytes: reference-counted, on a device. The only room of this crate that may hold `unsafe`.

use crate::{Device, Error, ErrorKind, Result, WithDType};
use kiln_kernels::cpu::alloc::Buffer;
use kiln_kernels::cuda::{self, DeviceBuffer, Gpu, Slice, Type};
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The file at `path`, mapped to be read. An empty file gives an empty map.
pub(crate) fn map_file(path: &Path) -> Result<Mmap> {
    let failed = |e| Error::io("load", path.display(), e);
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the map is read-only and its bytes are only ever copied or parsed with every index checked, so that a value which
    // another process changes meanwhile gives wrong numbers at worst. (If the file is cut short meanwhile, the system ends
    // this process at the first read beyond its end: a crash, not an access to other memory.)
    unsafe { Mmap::map(&file) }.map_err(failed)
}

/// Shared bytes on a device. Views of one tensor share one storage.
#[derive(Clone, Debug)]
pub(crate) struct Storage(Arc<Bytes>);

#[derive(Debug)]
enum Bytes {
    Host(Buffer),
    /// Apart, since it is large and most tensors of a program on the processor would carry its size.
    Gpu(Box<OnGpu>),
}

/// Bytes at home on a GPU. At least one of both copies exists, and where both do they are equal: what is shared is never written, and
/// who writes a copy that is not shared drops the other. So an operation that the GPU has no kernel for can work on the host's copy,
/// and nothing is copied before somebody asks.
#[derive(Debug)]
struct OnGpu {
    gpu: &'static Gpu,
    device: OnceLock<DeviceBuffer>,
    host: OnceLock<Buffer>,
    /// Limits of the i64 that the bytes hold, once somebody knew or asked: dropped with the first write.
    bounds: OnceLock<(i64, i64)>,
}

impl OnGpu {
    fn new(gpu: &'static Gpu, device: OnceLock<DeviceBuffer>, host: OnceLock<Buffer>) -> Self {
        Self { gpu, device, host, bounds: OnceLock::new() }
    }

    fn device(&self) -> Result<&DeviceBuffer> {
        if let (None, Some(host)) = (self.device.get(), self.host.get()) {
            // If another thread was faster, its copy is the same.
            let _ = self.device.set(self.gpu.upload(host.as_bytes())?);
        }
        self.device.get().ok_or_else(missing)
    }

    fn host(&self) -> Result<&Buffer> {
        if let (None, Some(device)) = (self.host.get(), self.device.get()) {
            let mut host = Buffer::new(device.len())?;
            self.gpu.download(device, 0, host.as_bytes_mut())?;
            let _ = self.host.set(host);
        }
        self.host.get().ok_or_else(missing)
    }
}

fn missing() -> Error {
    Error::new(ErrorKind::Device, "storage", "the tensor has no copy on any device")
}

impl Storage {
    /// Room for `bytes` bytes of unspecified, initialised content.
    pub(crate) fn buffer(bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(bytes)?)
    }

    /// Bytes that the host wrote, for a tensor of `device`.
    pub(crate) fn from_buffer(buffer: Buffer, device: Device) -> Result<Self> {
        let bytes = match device.gpu()? {
            None => Bytes::Host(buffer),
            Some(gpu) => Bytes::Gpu(Box::new(OnGpu::new(gpu, OnceLock::new(), OnceLock::from(buffer)))),
        };
        Ok(Self(Arc::new(bytes)))
    }

    /// Bytes of a GPU.
    pub(crate) fn from_device(buffer: DeviceBuffer) -> Self {
        Self(Arc::new(Bytes::Gpu(Box::new(OnGpu::new(buffer.gpu(), OnceLock::from(buffer), OnceLock::new())))))
    }

    pub(crate) fn device(&self) -> Device {
        match &*self.0 {
            Bytes::Host(_) => Device::Cpu,
            Bytes::Gpu(bytes) => Device::Cuda(bytes.gpu.ordinal()),
        }
    }

    /// The bytes on the host, copied there first if need be.
    pub(crate) fn host(&self) -> Result<&Buffer> {
        match &*self.0 {
            Bytes::Host(buffer) => Ok(buffer),
            Bytes::Gpu(bytes) => bytes.host(),
        }
    }

    /// The bytes on the host to write, if no other tensor shares them.
    pub(crate) fn host_mut(&mut self) -> Result<Option<&mut Buffer>> {
        match Arc::get_mut(&mut self.0) {
            None => Ok(None),
            Some(Bytes::Host(buffer)) => Ok(Some(buffer)),
            Some(Bytes::Gpu(bytes)) => {
                bytes.host()?;
                bytes.device.take();
                bytes.bounds.take();
                Ok(bytes.host.get_mut())
            }
        }
    }

    /// The bytes on the GPU, copied there first if need be: an error for bytes at home on the host.
    pub(crate) fn on_gpu(&self) -> Result<&DeviceBuffer> {
        match &*self.0 {
            Bytes::Host(_) => Err(Error::new(ErrorKind::Device, "storage", "the tensor is on the cpu; move it with .to_device(..)")),
            Bytes::Gpu(bytes) => bytes.device(),
        }
    }

    /// The bytes on the GPU to write, if no other tensor shares them and they are at home there.
    pub(crate) fn on_gpu_mut(&mut self) -> Result<Option<&mut DeviceBuffer>> {
        match Arc::get_mut(&mut self.0) {
            None | Some(Bytes::Host(_)) => Ok(None),
            Some(Bytes::Gpu(bytes)) => {
                bytes.device()?;
                bytes.host.take();
                bytes.bounds.take();
                Ok(bytes.device.get_mut())
            }
        }
    }

    /// Reads `out.len()` elements from element `offset` on, without leaving a copy of the whole on the host.
    pub(crate) fn read<T: WithDType>(&self, offset: usize, out: &mut [T]) -> Result<()> {
        if out.is_empty() {
            // A view without elements may begin anywhere.
            return Ok(());
        }
        if let Bytes::Gpu(on_gpu) = &*self.0
            && let (Some(device), None) = (on_gpu.device.get(), on_gpu.host.get())
        {
            let bytes = size_of_val(out);
            // SAFETY: the slice's own bytes, of an element type: any bytes make valid elements.
            let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), bytes) };
            return Ok(on_gpu.gpu.download(device, offset * size_of::<T>(), out)?);
        }
        let all = self.host()?.as_slice::<T>();
        out.copy_from_slice(all.get(offset..offset + out.len()).ok_or_else(missing)?);
        Ok(())
    }

    /// Limits between which all i64 lie that a GPU's bytes hold, which must be some: as they were [told](Self::set_bounds), or else the least and the greatest, which
    /// waits for the GPU unless the host has a copy. They are remembered, so that an index is looked through once. `None` for bytes at home on the host.
    pub(crate) fn bounds(&self) -> Result<Option<(i64, i64)>> {
        let Bytes::Gpu(bytes) = &*self.0 else { return Ok(None) };
        if bytes.bounds.get().is_none() {
            let found = match bytes.host.get() {
                Some(host) => host.as_slice::<i64>().iter().fold((i64::MAX, i64::MIN), |(least, most), &i| (least.min(i), most.max(i))),
                None => {
                    let device = bytes.device()?;
                    let all = Slice::new(device, Type::I64, 0, device.len() / 8).ok_or_else(missing)?;
                    cuda::index::bounds(bytes.gpu, all)?.ok_or_else(missing)?
                }
            };
            let _ = bytes.bounds.set(found);
        }
        Ok(bytes.bounds.get().copied())
    }

    /// The limits, if they are known.
    pub(crate) fn known_bounds(&self) -> Option<(i64, i64)> {
        if let Bytes::Gpu(bytes) = &*self.0 { bytes.bounds.get().copied() } else { None }
    }

    /// Remembers limits that whoever made the bytes knows.
    pub(crate) fn set_bounds(&self, bounds: (i64, i64)) {
        if let Bytes::Gpu(bytes) = &*self.0 {
            let _ = bytes.bounds.set(bounds);
        }
    }

    /// Whether nobody else holds the bytes.
    pub(crate) fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some()
    }

    /// Whether both are the same bytes.
    pub(crate) fn ptr_eq(&self, other: &Storage) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// A number that tells this block from others that live at the same time.
    pub(crate) fn address(&self) -> usize {
        match &*self.0 {
            Bytes::Host(buffer) => buffer.as_bytes().as_ptr() as usize,
            Bytes::Gpu(_) => Arc::as_ptr(&self.0) as usize,
        }
    }
}
