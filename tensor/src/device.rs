//! Where a tensor's bytes live, and where new tensors are made.

use crate::{Error, ErrorKind, Result};
use kiln_kernels::cuda::{self, CudaError, Gpu};
use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The host's processor.
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// The default device as a number: 0 for the processor, a GPU's number plus 1 otherwise.
static DEFAULT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static HOST_FORBIDDEN: Cell<bool> = const { Cell::new(false) };
}

impl Device {
    /// The GPU number `ordinal`.
    ///
    /// # Errors
    /// If NVIDIA's driver or that GPU is not there; the text says which.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        cuda::gpu(ordinal).map_err(|e| Error::from(e).at("device"))?;
        Ok(Device::Cuda(ordinal))
    }

    /// The GPU behind the device; `None` for the processor.
    pub fn gpu(self) -> Result<Option<&'static Gpu>> {
        match self {
            Device::Cpu => Ok(None),
            Device::Cuda(ordinal) => Ok(Some(cuda::gpu(ordinal)?)),
        }
    }

    /// Waits until everything that was queued on the device is done; nothing to do for the processor.
    pub fn synchronize(self) -> Result<()> {
        Ok(self.gpu()?.map_or(Ok(()), Gpu::synchronize)?)
    }
}

/// Where tensors are made that are not told a device: the processor, unless [`set_default_device`] said otherwise.
pub fn default_device() -> Device {
    DEFAULT.load(Relaxed).checked_sub(1).map_or(Device::Cpu, Device::Cuda)
}

/// Makes new tensors on `device` from now on, in the whole program, unless they are told another.
pub fn set_default_device(device: Device) {
    DEFAULT.store(if let Device::Cuda(ordinal) = device { ordinal + 1 } else { 0 }, Relaxed);
}

/// Runs `f` so that an operation without a kernel for the GPU is an error in this thread. Otherwise such an operation copies its operands
/// to the host and computes there: the same values, slowly. For tests, and to find what slows a program down.
pub fn forbid_host<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            HOST_FORBIDDEN.set(self.0);
        }
    }
    let _restore = Restore(HOST_FORBIDDEN.replace(true));
    f()
}

/// An error if the elements of a tensor of `device` may not be touched by the host now.
pub(crate) fn expect_host_allowed(op: &str, device: Device) -> Result<()> {
    if device == Device::Cpu || !HOST_FORBIDDEN.get() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Device, op, format!("no kernel for {device}: the host would compute this, which forbid_host rules out")))
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':').unwrap_or((text, "0")) {
            ("cpu", "0") => Ok(Device::Cpu),
            ("cuda", ordinal) if ordinal.parse::<usize>().is_ok() => Self::cuda(ordinal.parse().unwrap_or(0)),
            _ => Err(Error::argument("device", format!("{text:?} is not a device; expected cpu, cuda or cuda:N"))),
        }
    }
}

impl From<CudaError> for Error {
    fn from(e: CudaError) -> Self {
        let kind = if matches!(e, CudaError::OutOfMemory { .. }) { ErrorKind::OutOfMemory } else { ErrorKind::Device };
        Error::new(kind, "cuda", e.to_string()).with_source(e)
    }
}
