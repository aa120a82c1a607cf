//! Tensors in files: safetensors, npy and npz. A file is checked against what it can hold before memory is allocated for what
//! it claims; a file is written beside its place and moved there when it is whole.

mod atomic;
pub mod npy;
pub mod npz;
pub mod safetensors;

pub use atomic::write_atomic;

use crate::device::default_device;
use crate::storage::{Storage, map_file};
use crate::{DType, Error, Layout, Result, Shape, Tensor};
use memmap2::Mmap;
use std::ops::Deref;
use std::path::Path;

/// A file's bytes, which the system reads as they are touched.
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the file at `path`, to be read. Should it be cut short meanwhile, the system ends the process at the first read beyond its end.
    ///
    /// # Errors
    /// If it cannot be opened or mapped.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        map_file(path.as_ref()).map(Self)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A row-major tensor, on the default device, of elements in little-endian bytes.
///
/// # Errors
/// If the bytes are not as many as the elements take.
pub fn tensor_from_le_bytes(dtype: DType, shape: Shape, bytes: &[u8]) -> Result<Tensor> {
    if shape.numel().checked_mul(dtype.size()) != Some(bytes.len()) {
        return Err(Error::format("tensor_from_le_bytes", format!("{} bytes are no {shape} of {dtype}", bytes.len())));
    }
    tensor_from_bytes(dtype, shape, |out| {
        out.copy_from_slice(bytes);
        Ok(())
    })
}

/// A new row-major tensor whose bytes (little-endian elements) `fill` writes, all of them.
fn tensor_from_bytes(dtype: DType, shape: Shape, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Tensor> {
    let bytes = shape.numel().checked_mul(dtype.size());
    let bytes = bytes.ok_or_else(|| Error::shape("load", format!("{dtype} elements of shape {shape} overflow")))?;
    let mut buffer = Storage::buffer(bytes)?;
    fill(buffer.as_bytes_mut())?;
    swap_to_native(buffer.as_bytes_mut(), dtype.size(), true);
    if dtype == DType::Bool {
        // Kernels may count on 0 and 1.
        buffer.as_bytes_mut().iter_mut().for_each(|b| *b = u8::from(*b != 0));
    }
    Ok(Tensor::from_storage(Storage::from_buffer(buffer, default_device())?, Layout::contiguous(shape), dtype))
}

/// Calls `write` with the tensor's elements, row-major and little-endian.
fn with_bytes<R>(tensor: &Tensor, write: impl FnOnce(&[u8]) -> Result<R>) -> Result<R> {
    let dense = tensor.detach().contiguous()?;
    let size = dense.dtype().size();
    let start = dense.layout().offset() * size;
    let stored = dense.storage().host()?.as_bytes();
    let bytes = &stored[start.min(stored.len())..][..dense.numel() * size];
    if cfg!(target_endian = "little") {
        return write(bytes);
    }
    let mut swapped = bytes.to_vec();
    swap_to_native(&mut swapped, size, true);
    write(&swapped)
}

/// Turns elements of `size` bytes between this machine's order and little-endian (or big-endian) order.
fn swap_to_native(bytes: &mut [u8], size: usize, little: bool) {
    if size > 1 && little != cfg!(target_endian = "little") {
        bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
    }
}
