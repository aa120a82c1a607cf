//! Tensors from one device to another.

use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::storage::Storage;
use crate::{DType, Device, Layout, Result, Tensor};

/// The gradient goes back to where the tensor came from.
struct ToDevice {
    from: Device,
}

impl Op for ToDevice {
    fn name(&self) -> &'static str {
        "to_device"
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        Ok(vec![Some(grad.to_device(self.from)?)])
    }
}

impl Tensor {
    /// The least and the greatest of i64 elements that the host holds, or limits that are known of a GPU's.
    fn known_bounds(&self) -> Result<Option<(i64, i64)>> {
        if self.device() != Device::Cpu {
            return Ok(self.storage().known_bounds());
        }
        let values = self.detach().contiguous()?;
        let values = values.as_slice::<i64>()?;
        Ok(values.iter().min().copied().zip(values.iter().max().copied()))
    }

    /// The same elements on `device`: itself if they are there already, else a row-major copy.
    pub fn to_device(&self, device: Device) -> Result<Tensor> {
        if self.device() == device {
            return Ok(self.clone());
        }
        let _running = operation("to_device", &[self], || Cost::NONE.bytes(2 * (self.numel() * self.dtype().size()) as u64));
        let storage = for_any!(self.dtype(), T => {
            let dense = self.detach().contiguous()?;
            let mut buffer = Storage::buffer(dense.numel() * self.dtype().size())?;
            dense.storage().read(dense.layout().offset(), buffer.as_slice_mut::<T>())?;
            Ok::<_, crate::Error>(match device.gpu()? {
                Some(gpu) => Storage::from_device(gpu.upload(buffer.as_bytes())?),
                None => Storage::from_buffer(buffer, Device::Cpu)?,
            })
        })?;
        if self.dtype() == DType::I64
            && let Some(bounds) = self.known_bounds()?
        {
            storage.set_bounds(bounds);
        }
        let out = Tensor::from_storage(storage, Layout::contiguous(*self.shape()), self.dtype());
        record("to_device", out, &[self], |_| ToDevice { from: self.device() })
    }
}
