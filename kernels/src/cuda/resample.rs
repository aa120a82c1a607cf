//! Linear maps of images that factor over the spatial axes, as [`crate::cpu::resample`] describes them.

use super::axis_maps::upload;
use super::{CudaError, Gpu, Launch, Slice, SliceMut, Source};
use crate::cpu::resample::AxisMap;

const SOURCE: Source = Source { name: "resample", text: include_str!("resample.cu") };

/// Applies one map an axis to `n` images of `c` channels: see [`crate::cpu::resample::resample`].
pub fn resample(gpu: &'static Gpu, maps: &[AxisMap; 3], n: usize, c: usize, x: Slice<'_>, out: &mut SliceMut<'_>) -> Result<(), CudaError> {
    let positions = |extent: fn(&AxisMap) -> usize| maps.iter().map(extent).product::<usize>();
    assert_eq!(x.len(), n * c * positions(AxisMap::inputs));
    assert_eq!(out.len(), n * c * positions(AxisMap::outputs));
    let ty = out.ty();
    assert!(ty.is_float() && x.ty() == ty, "one float type");
    if out.is_empty() {
        return Ok(());
    }
    let maps = upload(gpu, maps, ty)?;
    let line = 4 * ty.size() as u64;
    let four = c.is_multiple_of(4) && x.ptr().is_aligned(line) && out.ptr().is_aligned(line);
    let kernel = gpu.exact_module(&SOURCE, &[("T", ty.name()), ("CHANNELS", if four { "4" } else { "1" })])?.kernel("resample")?;
    let count = if four { out.len() / 4 } else { out.len() };
    let args: [&dyn super::Arg; 7] = [&maps.tables, &maps.factors, &maps.numbers, &x.ptr(), &out.ptr(), &(count as i64), &(c as i32)];
    // SAFETY: `x` and `out` have as many elements as the maps' extents say, and every tap's index is one of its axis.
    unsafe { kernel.launch(Launch::over(count, 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::super::Type;
    use super::super::testing::{Values, device};
    use super::*;
    use crate::cpu::pool::{PoolAxis, adaptive_axis};
    use crate::cpu::resample::resample as on_cpu;
    use crate::cpu::upsample::{linear_axis, nearest_axis};

    #[test]
    fn maps_and_their_transposes_agree_with_the_processor() {
        let Some(gpu) = device() else { return };
        let pool = PoolAxis { kernel: 3, stride: 2, padding: 1, dilation: 1, ceil_mode: true };
        let cases = [
            [AxisMap::unit(), nearest_axis(3, 6), nearest_axis(4, 8)],
            [nearest_axis(2, 2), linear_axis(3, 5, false), linear_axis(4, 7, true)],
            [pool.map(4, pool.outputs(4).unwrap(), true), pool.map(5, pool.outputs(5).unwrap(), false), AxisMap::unit()],
            [AxisMap::unit(), adaptive_axis(7, 3), adaptive_axis(5, 1)],
        ];
        for maps in cases {
            for maps in [maps.each_ref().map(AxisMap::transpose), maps] {
                for c in [1, 4, 7] {
                    let inputs = maps.iter().map(AxisMap::inputs).product::<usize>();
                    let outputs = maps.iter().map(AxisMap::outputs).product::<usize>();
                    for (ty, tolerance) in [(Type::F32, 1e-6), (Type::F64, 1e-14), (Type::BF16, 4e-3), (Type::F16, 5e-4)] {
                        let x: Vec<f64> = (0..2 * inputs * c).map(|i| if i % 11 == 3 { -0.0 } else { (i * 7 % 13) as f64 - 6.0 }).collect();
                        let mut expected = vec![9.0; 2 * outputs * c];
                        on_cpu(&maps, 2, c, &x, &mut expected);
                        let mut out = Values::unwritten(gpu, ty, expected.len());
                        resample(gpu, &maps, 2, c, Values::new(gpu, ty, &x).slice(), &mut out.slice_mut()).unwrap();
                        for (got, want) in out.read().into_iter().zip(&expected) {
                            assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{ty:?} {maps:?}: {got}, not {want}");
                            assert!(
                                got != 0.0 || *want != 0.0 || got.is_sign_negative() == want.is_sign_negative(),
                                "{ty:?} {maps:?}: {got}, not {want}"
                            );
                        }
                    }
                }
            }
        }
    }
}
