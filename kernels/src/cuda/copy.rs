//! Copies between layouts: see `copy.cu`.

use super::compile::Source;
use super::launch::{Launch, impl_arg};
use super::memory::{DevicePtr, SliceMut, Strided, View};
use super::{CudaError, Gpu};

const SOURCE: Source = Source { name: "copy", text: include_str!("copy.cu") };

/// `Layouts` of `copy.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Layouts {
    shape: [i64; 8],
    from: [i64; 8],
    to: [i64; 8],
    rank: i32,
    width: i32,
    numel: i64,
}

impl_arg!(Layouts);

/// Copies the elements of `from`, in row-major order, to `to`.
///
/// # Panics
/// If `to` has not as many elements of the same type.
pub fn copy_strided(gpu: &'static Gpu, from: View<'_>, to: SliceMut<'_>) -> Result<(), CudaError> {
    assert!(from.numel() == to.len(), "as many elements on both sides");
    let mut strides = vec![1; from.shape().len()];
    for d in (1..strides.len()).rev() {
        strides[d - 1] = strides[d] * from.shape()[d];
    }
    copy_into_strided(gpu, from, to, 0, &strides)
}

/// Copies the elements of `from` to where `offset` and `strides` say in `to`.
///
/// # Panics
/// If the types differ, or the region leaves `to`.
pub fn copy_into_strided(gpu: &'static Gpu, from: View<'_>, to: SliceMut<'_>, offset: usize, strides: &[usize]) -> Result<(), CudaError> {
    let size = from.ty().size();
    assert!(from.ty() == to.ty() && strides.len() == from.shape().len(), "one type, as many strides as dimensions");
    if from.numel() == 0 {
        return Ok(());
    }
    let last = from.shape().iter().zip(strides).map(|(d, s)| (d - 1) * s).sum::<usize>() + offset;
    assert!(last < to.len(), "the region leaves the output");
    // In the order of the target's memory, so that stores are coalesced.
    let mut order: Vec<usize> = (0..from.shape().len()).collect();
    order.sort_by_key(|&d| std::cmp::Reverse(strides[d]));
    let pick = |of: &[usize]| order.iter().map(|&d| of[d]).collect::<Vec<_>>();
    let [source, target] = Strided::together(&pick(from.shape()), [&pick(from.strides()), &pick(strides)]);
    let layouts = Layouts {
        shape: source.shape(),
        from: source.strides(),
        to: target.strides(),
        rank: source.rank() as i32,
        width: 1,
        numel: from.numel() as i64,
    };
    layouts.launch(gpu, size, from.ptr(), to.ptr().add_bytes(offset * size))
}

impl Layouts {
    fn launch(mut self, gpu: &'static Gpu, size: usize, from: DevicePtr, to: DevicePtr) -> Result<(), CudaError> {
        let rank = self.rank as usize;
        let module = gpu.module(&SOURCE, &[("T", ["u8", "u16", "u32", "u64"][size.trailing_zeros() as usize])])?;
        if let Some(along) = self.transposed() {
            // The dimension that is contiguous in the source comes next to last.
            for strides in [&mut self.shape, &mut self.from, &mut self.to] {
                strides[along..rank - 1].rotate_left(1);
            }
            let tiles = |d: usize| (self.shape[d] as usize).div_ceil(32);
            let outer: usize = self.shape[..rank - 2].iter().map(|&d| d as usize).product();
            let launch = Launch::blocks(outer * tiles(rank - 2) * tiles(rank - 1), 256);
            // SAFETY: the layouts lie inside of both buffers (a checked view, an asserted region), and the kernel touches indices of the shape.
            return unsafe { module.kernel("copy_transposed")?.launch(launch, &[&self, &from, &to]) };
        }
        let wide = 16 / size as i64;
        let inner = rank.saturating_sub(1);
        let even = |strides: &[i64; 8]| strides[inner] == 1 && strides[..inner].iter().all(|s| s % wide == 0);
        if rank > 0 && self.shape[inner] % wide == 0 && even(&self.from) && even(&self.to) && from.is_aligned(16) && to.is_aligned(16) {
            self.width = wide as i32;
        }
        let launch = Launch::blocks((self.numel as usize).div_ceil(256 * 4 * self.width as usize), 256);
        // SAFETY: as above.
        unsafe { module.kernel("copy_strided")?.launch(launch, &[&self, &from, &to]) }
    }

    /// The dimension that is contiguous in the source, if the last one is contiguous in the target only and tiles are worth it.
    fn transposed(&self) -> Option<usize> {
        const WORTH: i64 = 16;
        let last = (self.rank as usize).checked_sub(1)?;
        let along = (0..last).find(|&d| self.from[d] == 1)?;
        (self.to[last] == 1 && self.from[last] > 1 && self.shape[last] >= WORTH && self.shape[along] >= WORTH).then_some(along)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Type;
    use super::super::testing::{Values, device};
    use super::*;

    #[test]
    fn every_layout_keeps_its_elements() {
        let Some(gpu) = device() else { return };
        let (a, b, c) = (5, 33, 48);
        let values: Vec<f64> = (0..a * b * c).map(|i| (i % 251) as f64).collect();
        for ty in [Type::F32, Type::F64, Type::BF16, Type::U8] {
            let x = Values::new(gpu, ty, &values);
            for (shape, strides) in [
                ([a, b, c], [b * c, c, 1]),
                ([c, b, a], [1, c, b * c]),
                ([a, c, b], [b * c, 1, c]),
                ([b, a, c], [c, b * c, 1]),
                ([b, c, 3], [c, 1, 0]),
            ] {
                let view = View::new(x.buffer(), ty, 0, &shape, &strides).unwrap();
                let mut out = Values::unwritten(gpu, ty, shape.iter().product());
                copy_strided(gpu, view, out.slice_mut()).unwrap();
                let [_, q, r] = shape;
                let expected: Vec<f64> = (0..shape.iter().product::<usize>())
                    .map(|i| values[i / (q * r) * strides[0] + i / r % q * strides[1] + i % r * strides[2]])
                    .collect();
                assert_eq!(out.read(), expected, "{ty:?} {shape:?} {strides:?}");
            }
        }
    }

    #[test]
    fn a_region_is_written_and_nothing_beside_it() {
        let Some(gpu) = device() else { return };
        let x = Values::new(gpu, Type::F32, &[1.0, 2.0, 3.0, 4.0]);
        let mut out = Values::new(gpu, Type::F32, &[0.0; 12]);
        let view = View::new(x.buffer(), Type::F32, 0, &[2, 2], &[2, 1]).unwrap();
        copy_into_strided(gpu, view, out.slice_mut(), 1, &[6, 2]).unwrap();
        assert_eq!(out.read(), [0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0, 0.0, 0.0]);
    }
}
