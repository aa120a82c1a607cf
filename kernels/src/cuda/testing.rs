//! For tests of kernels: the GPU that they run on, and values to and from it.

use super::{DeviceBuffer, Gpu, Slice, SliceMut, Type, gpu};
use crate::element::Element;

/// The emulator where `KILN_CUDA=emulate`, the GPU where `KILN_TEST_DEVICE=cuda`; `None` otherwise: tests then have nothing to run on.
pub(crate) fn device() -> Option<&'static Gpu> {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|v| v == value);
    (is("KILN_CUDA", "emulate") || is("KILN_TEST_DEVICE", "cuda")).then(|| gpu(0).expect("the GPU that the environment asks for"))
}

/// Values on a GPU.
pub(crate) struct Values {
    buffer: DeviceBuffer,
    ty: Type,
    len: usize,
}

impl Values {
    /// The numbers rounded to `ty`.
    pub(crate) fn new(gpu: &'static Gpu, ty: Type, values: &[f64]) -> Self {
        fn bytes<T: Element>(values: &[f64], to: impl Fn(T) -> Vec<u8>) -> Vec<u8> {
            values.iter().flat_map(|&x| to(T::from_f64(x))).collect()
        }
        let bytes = match ty {
            Type::F32 => bytes::<f32>(values, |x| x.to_le_bytes().to_vec()),
            Type::F64 => bytes::<f64>(values, |x| x.to_le_bytes().to_vec()),
            Type::F16 => bytes::<half::f16>(values, |x| x.to_le_bytes().to_vec()),
            Type::BF16 => bytes::<half::bf16>(values, |x| x.to_le_bytes().to_vec()),
            Type::I64 => bytes::<i64>(values, |x| x.to_le_bytes().to_vec()),
            Type::I32 => bytes::<i32>(values, |x| x.to_le_bytes().to_vec()),
            Type::U8 | Type::Bool => bytes::<u8>(values, |x| vec![x]),
        };
        Self { buffer: gpu.upload(&bytes).unwrap(), ty, len: values.len() }
    }

    /// `len` elements that are NaN or garbage, so that one that is not written shows.
    pub(crate) fn unwritten(gpu: &'static Gpu, ty: Type, len: usize) -> Self {
        Self { buffer: gpu.upload(&vec![0xff; len * ty.size()]).unwrap(), ty, len }
    }

    pub(crate) fn buffer(&self) -> &DeviceBuffer {
        &self.buffer
    }

    pub(crate) fn slice(&self) -> Slice<'_> {
        Slice::new(&self.buffer, self.ty, 0, self.len).unwrap()
    }

    pub(crate) fn slice_mut(&mut self) -> SliceMut<'_> {
        SliceMut::new(&mut self.buffer, self.ty, 0, self.len).unwrap()
    }

    /// The values, as f64.
    pub(crate) fn read(&self) -> Vec<f64> {
        let mut bytes = vec![0u8; self.len * self.ty.size()];
        self.buffer.gpu().download(&self.buffer, 0, &mut bytes).unwrap();
        let each = bytes.chunks_exact(self.ty.size());
        match self.ty {
            Type::F32 => each.map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Type::F64 => each.map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
            Type::F16 => each.map(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
            Type::BF16 => each.map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
            Type::I64 => each.map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Type::I32 => each.map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
            Type::U8 | Type::Bool => each.map(|b| b[0] as f64).collect(),
        }
    }
}
