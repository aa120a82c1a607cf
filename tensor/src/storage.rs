//! A tensor's bytes: reference-counted, on a device. The only room of this crate that may hold `unsafe`.

use crate::{Device, Result};
use kiln_kernels::cpu::alloc::Buffer;
use std::sync::Arc;

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
