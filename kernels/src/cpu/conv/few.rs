//! A gather with few targets and many weights: the time goes into reading the weights, so they are multiplied where they lie, as the right
//! factor of one product, whose left factor is the targets' sources under all taps.

use super::super::alloc::{Buffer, OutOfMemory};
use super::super::gemm::{Gemm, GemmElement};
use super::super::parallel;
use super::Gather;
use crate::view::MatView;

/// With more targets the weights are worth rearranging.
const MOST_TARGETS: usize = 96;

/// Fewer weights stay in cache however they are read.
const FEWEST_WEIGHTS: usize = 1 << 17;

/// Whether this takes less time than rearranging the weights. All weights of a target channel must follow one another.
pub(super) fn pays(g: &Gather) -> bool {
    let weights = g.cin * g.taps() * g.cout;
    g.groups == 1 && g.in_stride == g.taps() && g.taps() > 1 && g.target_pixels() <= MOST_TARGETS && weights >= FEWEST_WEIGHTS
}

/// See [`super::forward`], here for any element that matrices are multiplied in: halves are summed in f32 and rounded once.
pub(super) fn gather<T: GemmElement>(g: &Gather, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    let (targets, len) = (g.target_pixels(), g.cin * g.taps());
    let mut rows = Buffer::new(size_of::<T>() * targets * len)?;
    let rows = rows.as_slice_mut::<T>();
    parallel::for_each_chunk(rows, len, targets * len, |target, row| sources(g, x, target, row));
    let factors = MatView::row_major(rows, targets, len).zip(MatView::row_major(w, g.cout, len));
    let Some((a, b)) = factors else { unreachable!("lengths were checked against the shape") };
    Gemm { bias, ..Gemm::new(a, b.t()) }.run(y, g.cout)
}

/// The sources of a target as its weights lie: `[channel][tap]`, with zeros for the padding.
fn sources<T: Copy + Default>(g: &Gather, x: &[T], target: usize, row: &mut [T]) {
    let [depth, height, width] = g.target;
    let (image, at) = (target / (depth * height * width), [target / (height * width) % depth, target / width % height, target % width]);
    let taps = g.taps();
    for tap in 0..taps {
        let by_axis = [tap / (g.kernel[1] * g.kernel[2]), tap / g.kernel[2] % g.kernel[1], tap % g.kernel[2]];
        let source = |i: usize| {
            let source = usize::try_from(g.axes[i].source(at[i], by_axis[i])?).ok()?;
            (source < g.source[i]).then_some(source)
        };
        let to = row[tap..].iter_mut().step_by(taps);
        match (source(0), source(1), source(2)) {
            (Some(d), Some(h), Some(w)) => {
                let pixel = ((image * g.source[0] + d) * g.source[1] + h) * g.source[2] + w;
                to.zip(&x[pixel * g.cin..][..g.cin]).for_each(|(to, &from)| *to = from);
            }
            _ => to.for_each(|to| *to = T::default()),
        }
    }
}
