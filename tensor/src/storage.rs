//! A tensor's bytes: reference-counted, on a device. The only room of this crate that may hold `unsafe`.

use crate::{Device, Error, Result};
use kiln_kernels::cpu::alloc::Buffer;
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

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
pub(crate) struct Storage {
    buffer: Arc<Buffer>,
    device: Device,
}

impl Storage {
    /// Room for `bytes` bytes of unspecified, initialised content.
    pub(crate) fn buffer(bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(bytes)?)
    }

    pub(crate) fn from_buffer(buffer: Buffer) -> Self {
        Self { buffer: Arc::new(buffer), device: Device::Cpu }
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn get(&self) -> &Buffer {
        &self.buffer
    }

    /// The bytes to write, if no other tensor shares them.
    pub(crate) fn get_mut(&mut self) -> Option<&mut Buffer> {
        Arc::get_mut(&mut self.buffer)
    }

    /// Whether both are the same bytes.
    pub(crate) fn ptr_eq(&self, other: &Storage) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }
}
