//! Rotary position embedding: see [`crate::cpu::rotary`].

use super::compile::Source;
use super::launch::{Launch, impl_arg};
use super::memory::{SliceMut, Strided, View};
use super::{Arg, CudaError, Gpu, Type};
use crate::cpu::rotary::Rotary;

const SOURCE: Source = Source { name: "rotary", text: include_str!("rotary.cu") };

/// `Rows` of `rotary.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Rows {
    shape: [i64; 8],
    x: [i64; 8],
    cos: [i64; 8],
    sin: [i64; 8],
    rank: i32,
}

impl_arg!(Rows);

/// Writes each row of `x` to `out`, in row-major order, with its pairs turned: see [`crate::cpu::rotary::rotate`]. The tables have the type that
/// `T` is computed in.
///
/// # Panics
/// If `x` has no dimensions, there are more pairs than a row has, a table does not fit the input in shape or type, elements of a row of either
/// are not neighbours in memory, or `out` has not as many elements as `x`.
pub fn rotate(gpu: &'static Gpu, rotary: Rotary, [cos, sin]: [View<'_>; 2], x: View<'_>, out: SliceMut<'_>) -> Result<(), CudaError> {
    let Some((&width, rows)) = x.shape().split_last() else { panic!("rotary needs rows") };
    let pairs = cos.shape().last().copied().unwrap_or(0);
    assert!(2 * pairs <= width && out.len() == x.numel() && out.ty() == x.ty(), "rows of {width} have no {pairs} pairs");
    if out.is_empty() {
        return Ok(());
    }
    let computed = if x.ty() == Type::F64 { Type::F64 } else { Type::F32 };
    for table in [cos, sin] {
        assert!(table.shape().split_last() == Some((&pairs, rows)) && table.ty() == computed, "a table fits the input");
        assert!(pairs < 2 || table.strides().last() == Some(&1), "angles of a row are neighbours");
    }
    assert!(width < 2 || x.strides().last() == Some(&1), "elements of a row are neighbours");
    let outer = [x.strides(), cos.strides(), sin.strides()].map(|strides| &strides[..rows.len()]);
    let [of_x, of_cos, of_sin] = Strided::together(rows, outer);
    let (shape, rank) = (of_x.shape(), of_x.rank() as i32);
    let rows = Rows { shape, x: of_x.strides(), cos: of_cos.strides(), sin: of_sin.strides(), rank };
    let rest = width - 2 * pairs;
    let vec = 16 / x.ty().size();
    let divides = |extent: usize| extent.is_multiple_of(vec);
    let aligned = outer[0].iter().all(|&stride| divides(stride)) && x.ptr().is_aligned(16) && out.ptr().is_aligned(16);
    let vec = if divides(pairs) && divides(rest) && aligned { vec } else { 1 };
    let defines = [("T", x.ty().name()), ("VEC", &vec.to_string()), ("INTERLEAVED", if rotary.interleaved { "1" } else { "0" })];
    let kernel = gpu.exact_module(&SOURCE, &defines)?.kernel("rotate")?;
    let count = out.len() / width * ((pairs + rest) / vec);
    let sign = if rotary.inverse { -1i32 } else { 1 };
    let args: [&dyn Arg; 9] =
        [&rows, &x.ptr(), &cos.ptr(), &sin.ptr(), &out.ptr(), &(count as i64), &(pairs as i32), &(rest as i32), &sign];
    // SAFETY: the views were checked to lie in their buffers and to have the extents that the kernel walks; `out` has a row of `width` elements for
    // each of `x`; accesses of VEC elements stay inside of pairs or rest, of which VEC is a divisor.
    unsafe { kernel.launch(Launch::over(count, 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Values, device};
    use super::*;
    use crate::cpu::rotary::{Tables, rotate as on_cpu};
    use crate::cpu::testing::values;
    use crate::view::StridedView;

    #[test]
    fn rows_turn_as_on_the_processor() {
        let Some(gpu) = device() else { return };
        for (width, pairs) in [(32, 16), (24, 4), (7, 3), (5, 0)] {
            let shape = [2, 3, 5, width];
            let strides = [15 * width, width, 3 * width, 1];
            let (table_shape, table_strides) = ([2, 3, 5, pairs], [0, 0, pairs, 1]);
            let round = |x: Vec<f64>| x.into_iter().map(|x| x as f32 as f64).collect::<Vec<f64>>();
            let (x, cos, sin) = (round(values(30 * width, 1.0)), round(values(5 * pairs, 1.0)), round(values(5 * pairs, 2.0)));
            for (ty, tolerance) in [(Type::F32, 1e-6), (Type::F64, 1e-15), (Type::BF16, 2e-2), (Type::F16, 2e-3)] {
                let computed = if ty == Type::F64 { Type::F64 } else { Type::F32 };
                for (interleaved, inverse) in [(false, false), (true, false), (false, true), (true, true)] {
                    let rotary = Rotary { interleaved, inverse };
                    fn table<'a>(data: &'a [f64], shape: &'a [usize], strides: &'a [usize]) -> StridedView<'a, f64> {
                        StridedView::new(data, 0, shape, strides).unwrap()
                    }
                    let tables = Tables { cos: table(&cos, &table_shape, &table_strides), sin: table(&sin, &table_shape, &table_strides) };
                    let mut expected = vec![9.0; x.len()];
                    on_cpu(rotary, tables, StridedView::new(&x, 0, &shape, &strides).unwrap(), &mut expected);
                    let (x, cos, sin) = (Values::new(gpu, ty, &x), Values::new(gpu, computed, &cos), Values::new(gpu, computed, &sin));
                    let tables = [&cos, &sin].map(|t| View::new(t.buffer(), computed, 0, &table_shape, &table_strides).unwrap());
                    let mut out = Values::unwritten(gpu, ty, expected.len());
                    rotate(gpu, rotary, tables, View::new(x.buffer(), ty, 0, &shape, &strides).unwrap(), out.slice_mut()).unwrap();
                    for (got, want) in out.read().into_iter().zip(&expected) {
                        assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{ty:?} {width} {rotary:?}: {got}, not {want}");
                    }
                }
            }
        }
    }
}
