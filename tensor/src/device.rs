//! Where a tensor's bytes live.

use crate::{Error, ErrorKind, Result};
use std::fmt;
use std::str::FromStr;

/// A device. The processor is the only one so far; the type is there so that programs name it from the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
#[non_exhaustive]
pub enum Device {
    /// The host's processor.
    #[default]
    Cpu,
}

impl Device {
    /// The GPU number `ordinal`: an error as long as Kiln has no CUDA kernels.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Err(Error::new(
            ErrorKind::Device,
            "device",
            format!("cuda:{ordinal} is not available: this version of Kiln has CPU kernels only; use cpu"),
        ))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
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
