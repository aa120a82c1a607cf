//! Max pooling over channels-last images, as [`crate::cpu::pool`] describes it. Average pooling is [`resample`](super::resample::resample).

use super::axis_maps::upload;
use super::{Arg, CudaError, Gpu, Kernel, Launch, Slice, SliceMut, Source, Type};
use crate::cpu::pool::MaxPool;
use crate::cpu::resample::AxisMap;

const SOURCE: Source = Source { name: "pool", text: include_str!("pool.cu") };

/// The kernel of this name for four channels a thread, or for one; and for how many elements a thread stands.
fn kernel(gpu: &'static Gpu, name: &str, ty: Type, c: usize, aligned: bool) -> Result<(Kernel, usize), CudaError> {
    let four = c.is_multiple_of(4) && aligned;
    let kernel = gpu.module(&SOURCE, &[("T", ty.name()), ("CHANNELS", if four { "4" } else { "1" })])?.kernel(name)?;
    Ok((kernel, if four { 4 } else { 1 }))
}

fn by_four(ty: Type) -> u64 {
    4 * ty.size() as u64
}

fn positions(maps: &[AxisMap; 3], extent: fn(&AxisMap) -> usize) -> usize {
    maps.iter().map(extent).product()
}

/// The maximum of each window, and where its first occurrence lies: see [`MaxPool::forward`]. `indices` are i32.
pub fn forward(
    gpu: &'static Gpu,
    pool: &MaxPool<'_>,
    x: Slice<'_>,
    values: &mut SliceMut<'_>,
    indices: &mut SliceMut<'_>,
) -> Result<(), CudaError> {
    let ty = values.ty();
    assert!(ty.is_float() && x.ty() == ty && indices.ty() == Type::I32, "one float type, and i32");
    assert!(x.len() == pool.input_len() && values.len() == pool.output_len() && indices.len() == values.len());
    assert!(positions(pool.windows, AxisMap::inputs) <= i32::MAX as usize);
    if values.is_empty() {
        return Ok(());
    }
    let windows = upload(gpu, pool.windows, ty)?;
    let aligned = x.ptr().is_aligned(by_four(ty)) && values.ptr().is_aligned(by_four(ty)) && indices.ptr().is_aligned(16);
    let (kernel, each) = kernel(gpu, "max_pool", ty, pool.c, aligned)?;
    let count = values.len() / each;
    let args: [&dyn Arg; 7] =
        [&windows.tables, &windows.numbers, &x.ptr(), &values.ptr(), &indices.ptr(), &(count as i64), &(pool.c as i32)];
    // SAFETY: the lengths are those of the windows' extents, and every tap's index is one of its axis.
    unsafe { kernel.launch(Launch::over(count, 256), &args) }
}

/// Sends each window's gradient to the input that `indices` names: see [`MaxPool::backward`].
pub fn backward(gpu: &'static Gpu, pool: &MaxPool<'_>, gy: Slice<'_>, indices: Slice<'_>, gx: &mut SliceMut<'_>) -> Result<(), CudaError> {
    let ty = gx.ty();
    assert!(ty.is_float() && gy.ty() == ty && indices.ty() == Type::I32, "one float type, and i32");
    assert!(gx.len() == pool.input_len() && gy.len() == pool.output_len() && indices.len() == gy.len());
    if gx.is_empty() {
        return Ok(());
    }
    let cover = upload(gpu, &pool.windows.each_ref().map(AxisMap::transpose), ty)?;
    let aligned = gy.ptr().is_aligned(by_four(ty)) && gx.ptr().is_aligned(by_four(ty)) && indices.ptr().is_aligned(16);
    let (kernel, each) = kernel(gpu, "max_pool_backward", ty, pool.c, aligned)?;
    let count = gx.len() / each;
    let args: [&dyn Arg; 7] = [&cover.tables, &cover.numbers, &gy.ptr(), &indices.ptr(), &gx.ptr(), &(count as i64), &(pool.c as i32)];
    // SAFETY: the lengths are those of the windows' extents; the transposed maps' indices are outputs.
    unsafe { kernel.launch(Launch::over(count, 256), &args) }
}

/// Reads what `indices` names: see [`MaxPool::gather`]. The indices are those that [`forward`] gave for these windows.
pub fn gather(gpu: &'static Gpu, pool: &MaxPool<'_>, x: Slice<'_>, indices: Slice<'_>, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    let ty = out.ty();
    assert!(ty.is_float() && x.ty() == ty && indices.ty() == Type::I32, "one float type, and i32");
    assert!(x.len() == pool.input_len() && out.len() == pool.output_len() && indices.len() == out.len());
    if out.is_empty() {
        return Ok(());
    }
    let (kernel, _) = kernel(gpu, "max_pool_gather", ty, pool.c, false)?;
    let (outputs, inputs) = (positions(pool.windows, AxisMap::outputs) as i64, positions(pool.windows, AxisMap::inputs) as i64);
    let args: [&dyn Arg; 7] = [&x.ptr(), &indices.ptr(), &out.ptr(), &(out.len() as i64), &outputs, &inputs, &(pool.c as i32)];
    // SAFETY: the lengths are those of the windows' extents; the kernel reads nothing for an index that is not one of the image's positions.
    unsafe { kernel.launch(Launch::over(out.len(), 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Values, device};
    use super::*;
    use crate::cpu::pool::PoolAxis;

    #[test]
    fn maxima_and_what_is_moved_by_their_indices_agree_with_the_processor() {
        let Some(gpu) = device() else { return };
        let axis = PoolAxis { kernel: 3, stride: 2, padding: 1, dilation: 1, ceil_mode: false };
        let cases = [
            (axis, [1, 7, 9]),
            (PoolAxis { kernel: 2, padding: 0, ..axis }, [1, 1, 8]),
            (PoolAxis { ceil_mode: true, ..axis }, [4, 6, 5]),
            (PoolAxis { kernel: 2, dilation: 3, stride: 1, padding: 1, ceil_mode: false }, [2, 4, 5]),
        ];
        let special = [f64::NAN, f64::NEG_INFINITY, f64::INFINITY, -0.0, 0.0];
        for (axis, extents) in cases {
            let windows = extents.map(|e| if e == 1 { AxisMap::unit() } else { axis.map(e, axis.outputs(e).unwrap(), false) });
            for (c, ty) in [(1, Type::F32), (8, Type::F32), (5, Type::F64), (4, Type::F16), (12, Type::BF16), (3, Type::BF16)] {
                let pool = MaxPool { n: 2, c, windows: &windows };
                // Few distinct values, so that windows have ties.
                let x: Vec<f64> =
                    (0..pool.input_len()).map(|i| if i % 17 == 5 { special[i / 17 % 5] } else { (i * 7919 % 13) as f64 - 6.0 }).collect();
                let (mut values, mut indices) = (vec![0.0; pool.output_len()], vec![0; pool.output_len()]);
                pool.forward(&x, &mut values, &mut indices);
                let on_gpu = Values::new(gpu, ty, &x);
                let (mut got, mut at) = (Values::unwritten(gpu, ty, values.len()), Values::unwritten(gpu, Type::I32, values.len()));
                forward(gpu, &pool, on_gpu.slice(), &mut got.slice_mut(), &mut at.slice_mut()).unwrap();
                let same = |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a.is_nan() && b.is_nan()));
                assert!(same(&got.read(), &values), "values of {extents:?}, {c} channels of {ty:?}");
                assert!(at.read().iter().zip(&indices).all(|(&a, &b)| a == b as f64), "indices of {extents:?}, {c} channels of {ty:?}");

                let gy: Vec<f64> = (0..values.len()).map(|i| (i % 7) as f64 - 3.0).collect();
                let mut gx = vec![0.0; x.len()];
                pool.backward(&gy, &indices, &mut gx);
                let mut moved = Values::unwritten(gpu, ty, gx.len());
                backward(gpu, &pool, Values::new(gpu, ty, &gy).slice(), at.slice(), &mut moved.slice_mut()).unwrap();
                assert!(same(&moved.read(), &gx), "gradient of {extents:?}, {c} channels of {ty:?}");

                let mut read = vec![0.0; values.len()];
                pool.gather(&x, &indices, &mut read);
                let mut moved = Values::unwritten(gpu, ty, read.len());
                gather(gpu, &pool, on_gpu.slice(), at.slice(), &mut moved.slice_mut()).unwrap();
                assert!(same(&moved.read(), &read), "what is read of {extents:?}, {c} channels of {ty:?}");
            }
        }
    }
}
