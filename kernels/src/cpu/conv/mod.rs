//! Convolution over channels-last images `[n][d][h][w][c]` in one, two or three dimensions (missing axes have extent 1), with
//! stride, padding, dilation and groups. Nowhere is an im2col matrix made.
//!
//! Forward pass and input gradient (which is the transposed convolution) are one thing here, a [`Gather`]: each target
//! pixel sums over kernel taps a source pixel times the tap's matrix of weights. They differ in where a tap's source lies
//! ([`axis`]) and in the order of the weights. A gather runs in one of these ways, chosen by the shape alone:
//!
//! - `direct`: tiles of target pixels × target channels in the registers of the GEMM's micro-kernel, one segment a tap;
//!   with few source channels the taps of a tile are copied side by side first, so that the inner loop stays long.
//! - `fold`: with few target channels the taps become columns of a product per source pixel, whose entries are then summed.
//! - `few`: with few targets the weights are read where they lie, by one product.
//! - `pixels`: with one source channel neighbouring targets are the lanes of a vector instead of the channels.
//! - `lines`: with three taps along a line and few weights, each source is multiplied by all three at once.
//! - `depthwise`: one channel a group: plain loops over channels.
//! - `pairs`: `direct` on pairs of bf16, where a machine has them and the values are bf16, or may be rounded to it.
//! - `tiles`: on matrix tiles, where a machine has them.
//! - `winograd`: 3×3 taps of stride 1 and 4×4 of stride 2, with fewer multiplications.
//! - `plain`: the same in simple loops for f64.
//!
//! Halves are widened by the caller, unless a way takes them as they are (`half`).
//!
//! The weight gradient (`weight`) sums outer products of pixels by the micro-kernel's outer form; of bf16 (`pairs`), those of two images at once.

mod axis;
mod class;
mod depthwise;
mod direct;
mod few;
mod fold;
mod half;
mod lines;
mod pack;
mod pairs;
mod patch;
mod pixels;
mod plain;
#[cfg(target_arch = "x86_64")]
mod tiles;
mod weight;
mod winograd;

use super::alloc::OutOfMemory;
use super::gemm::MatmulPrecision;
use super::gemm::micro::MicroKernels;
use super::resample::Real;
use axis::Axis;
pub use half::{HalfElement, Pass, half, takes_bf16_weight_grad, takes_half, weight_grad_bf16};

/// A convolution: an input image of `ci` channels, an output image of `co`, and how the kernel slides.
///
/// Weights are `[co][ci / groups][kd][kh][kw]`, contiguous. A transposed convolution is described by the convolution whose
/// input gradient it is: its own input is this one's output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ConvShape {
    /// Number of images.
    pub n: usize,
    /// Channels of the input.
    pub ci: usize,
    /// Channels of the output.
    pub co: usize,
    /// Groups of channels that are convolved apart; divides `ci` and `co`.
    pub groups: usize,
    /// Depth, height and width of the input.
    pub input: [usize; 3],
    /// Depth, height and width of the output.
    pub output: [usize; 3],
    /// Taps along each axis.
    pub kernel: [usize; 3],
    /// Distance of neighbouring outputs, in inputs.
    pub stride: [usize; 3],
    /// Zeros added at both ends of each axis.
    pub padding: [usize; 3],
    /// Distance of neighbouring taps, in inputs.
    pub dilation: [usize; 3],
    /// How exact products of f32 must be, where bf16 makes them faster. Values that are bf16 or f16, widened, lose nothing by `Medium` or `High`.
    pub precision: MatmulPrecision,
}

/// Extent of a convolution's output along one axis: `⌊(input + 2·padding − dilation·(kernel − 1) − 1) / stride⌋ + 1`,
/// or `None` if the kernel does not fit or a parameter is 0.
pub fn output_extent(input: usize, kernel: usize, stride: usize, padding: usize, dilation: usize) -> Option<usize> {
    let span = kernel.checked_sub(1)?.checked_mul(dilation)?.checked_add(1)?;
    let room = padding.checked_mul(2)?.checked_add(input)?.checked_sub(span)?;
    (dilation > 0).then_some(())?;
    room.checked_div(stride)?.checked_add(1)
}

/// Extent of a transposed convolution's output along one axis: `(input − 1)·stride − 2·padding + dilation·(kernel − 1) + output_padding + 1`,
/// or `None` if that is negative, a parameter is 0, or `output_padding` reaches beyond `stride` and `dilation`.
pub fn transposed_extent(
    input: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    dilation: usize,
    output_padding: usize,
) -> Option<usize> {
    let span = kernel.checked_sub(1)?.checked_mul(dilation)?.checked_add(output_padding)?.checked_add(1)?;
    let steps = input.checked_sub(1)?.checked_mul(stride)?;
    if stride == 0 || dilation == 0 || output_padding >= stride.max(dilation) {
        return None;
    }
    steps.checked_add(span)?.checked_sub(padding.checked_mul(2)?)
}

impl ConvShape {
    pub(crate) fn assert_valid(&self) {
        assert!(self.groups > 0 && self.ci.is_multiple_of(self.groups) && self.co.is_multiple_of(self.groups));
        for axis in 0..3 {
            assert!(self.kernel[axis] > 0 && self.stride[axis] > 0 && self.dilation[axis] > 0);
            let extents = [self.input, self.output, self.kernel, self.stride, self.padding, self.dilation].map(|v| v[axis]);
            assert!(extents.iter().all(|&e| e <= i32::MAX as usize), "positions are computed in isize");
        }
    }

    pub(crate) fn input_len(&self) -> usize {
        self.n * self.ci * self.input.iter().product::<usize>()
    }

    pub(crate) fn output_len(&self) -> usize {
        self.n * self.co * self.output.iter().product::<usize>()
    }

    pub(crate) fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    pub(crate) fn weight_len(&self) -> usize {
        self.co * (self.ci / self.groups) * self.taps()
    }

    /// The forward pass: targets are outputs, sources are inputs.
    fn forward_gather(&self) -> Gather {
        let (ci, taps) = (self.ci / self.groups, self.taps());
        Gather {
            n: self.n,
            groups: self.groups,
            cin: ci,
            cout: self.co / self.groups,
            source: self.input,
            target: self.output,
            kernel: self.kernel,
            axes: std::array::from_fn(|i| Axis::forward(self.stride[i], self.padding[i], self.dilation[i])),
            in_stride: taps,
            out_stride: ci * taps,
            precision: self.precision,
        }
    }

    /// The input gradient: targets are inputs, sources are outputs.
    fn transposed_gather(&self) -> Gather {
        let (ci, taps) = (self.ci / self.groups, self.taps());
        Gather {
            n: self.n,
            groups: self.groups,
            cin: self.co / self.groups,
            cout: ci,
            source: self.output,
            target: self.input,
            kernel: self.kernel,
            axes: std::array::from_fn(|i| Axis::transposed(self.stride[i], self.padding[i], self.dilation[i])),
            in_stride: ci * taps,
            out_stride: taps,
            precision: self.precision,
        }
    }
}

/// `target[o][j] = bias[j] + Σ_tap Σ_c source[s(o, tap)][c] · w[c, j, tap]`, where `s` is given by an [`Axis`] a dimension.
#[derive(Clone, Debug)]
struct Gather {
    n: usize,
    groups: usize,
    /// Source channels of a group.
    cin: usize,
    /// Target channels of a group.
    cout: usize,
    source: [usize; 3],
    target: [usize; 3],
    kernel: [usize; 3],
    axes: [Axis; 3],
    /// Weight `(group, c, j, tap)` lies at `group · cin · cout · taps + c · in_stride + j · out_stride + tap`.
    in_stride: usize,
    out_stride: usize,
    precision: MatmulPrecision,
}

impl Gather {
    fn taps(&self) -> usize {
        self.kernel.iter().product()
    }

    fn target_pixels(&self) -> usize {
        self.n * self.target.iter().product::<usize>()
    }

    fn source_pixels(&self) -> usize {
        self.n * self.source.iter().product::<usize>()
    }

    /// Where the weights of a group start.
    fn group_start(&self, group: usize) -> usize {
        group * self.cin * self.cout * self.taps()
    }

    fn is_depthwise(&self) -> bool {
        self.cin == 1 && self.cout == 1 && self.groups > 1
    }

    /// Whether each target has one source, at the same place.
    #[cfg(target_arch = "x86_64")]
    fn has_no_windows(&self) -> bool {
        self.taps() == 1
            && self.source == self.target
            && (0..3).all(|i| self.axes[i].source(0, 0) == Some(0) && self.axes[i].source(1, 0) == Some(1))
    }

    /// Calls `f` for a line of targets, counted through all images, with each line of the kernel whose sources do not lie in the padding, and with
    /// that line of sources, counted alike.
    #[inline(always)]
    fn for_each_source_line(&self, line: usize, mut f: impl FnMut(usize, usize)) {
        let (image, d, h) = (line / (self.target[0] * self.target[1]), line / self.target[1] % self.target[0], line % self.target[1]);
        let source = |axis: usize, target: usize, tap: usize| {
            self.axes[axis].source(target, tap).and_then(|at| usize::try_from(at).ok()).filter(|&at| at < self.source[axis])
        };
        for (kd, d) in (0..self.kernel[0]).filter_map(|kd| Some((kd, source(0, d, kd)?))) {
            for (kh, h) in (0..self.kernel[1]).filter_map(|kh| Some((kh, source(1, h, kh)?))) {
                f(kd * self.kernel[1] + kh, (image * self.source[0] + d) * self.source[1] + h);
            }
        }
    }

    /// Products of a channel pair that a target pixel needs on average.
    fn taps_per_target(&self) -> usize {
        let phases = self.axes.iter().map(Axis::period).fold(1, usize::saturating_mul);
        self.taps().div_ceil(phases)
    }
}

mod sealed {
    use super::{Gather, OutOfMemory};

    /// The algorithms of an element type. Lengths were checked against the shapes.
    pub trait Algorithms: Sized {
        #[allow(private_interfaces)]
        fn gather(g: &Gather, x: &[Self], w: &[Self], bias: Option<&[Self]>, y: &mut [Self]) -> Result<(), OutOfMemory>;
        /// Both gathers describe the same weights; an algorithm may take either.
        #[allow(private_interfaces)]
        fn weight_grad(forward: &Gather, transposed: &Gather, x: &[Self], gy: &[Self], gw: &mut [Self]) -> Result<(), OutOfMemory>;
    }
}

/// Elements that can be convolved directly: f32 and f64.
pub trait ConvElement: Real + sealed::Algorithms {}
impl ConvElement for f32 {}
impl ConvElement for f64 {}

/// A gather of f32 on vectors.
fn on_vectors(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
    if g.is_depthwise() {
        depthwise::gather(g, x, w, bias, y)
    } else if pixels::pays(g) {
        pixels::gather(g, x, w, bias, y);
        Ok(())
    } else if fold::pays(g) {
        fold::gather(g, x, w, bias, y)
    } else if few::pays(g) {
        few::gather(g, x, w, bias, y)
    } else if pairs::pay(g) {
        pairs::gather_rounded(g, x, w, bias, y)
    } else {
        let windows = |g: &Gather, x: &[f32], y: &mut [f32]| direct::gather_singles(g, x, w, bias, y);
        match winograd::plan(g) {
            Some(grid) => winograd::gather(&grid, g, x, w, bias, y, windows),
            None if lines::pays(g) => lines::gather(g, x, w, bias, y),
            None => windows(g, x, y),
        }
    }
}

impl sealed::Algorithms for f32 {
    #[allow(private_interfaces)]
    fn gather(g: &Gather, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32]) -> Result<(), OutOfMemory> {
        #[cfg(target_arch = "x86_64")]
        if let Some(parts) = tiles::pay(g) {
            let vectors = |g: &Gather, x: &[f32], y: &mut [f32]| on_vectors(g, x, w, bias, y);
            return match parts {
                1 => tiles::gather::<1>(g, x, w, bias, y, vectors),
                2 => tiles::gather::<2>(g, x, w, bias, y, vectors),
                _ => tiles::gather::<3>(g, x, w, bias, y, vectors),
            };
        }
        on_vectors(g, x, w, bias, y)
    }

    #[allow(private_interfaces)]
    fn weight_grad(forward: &Gather, transposed: &Gather, x: &[f32], gy: &[f32], gw: &mut [f32]) -> Result<(), OutOfMemory> {
        #[cfg(target_arch = "x86_64")]
        let done = match tiles::pay(forward) {
            Some(1) => tiles::weight_grad::<1>(forward, x, gy, gw)?,
            Some(2) => tiles::weight_grad::<2>(forward, x, gy, gw)?,
            Some(_) => tiles::weight_grad::<3>(forward, x, gy, gw)?,
            None => false,
        };
        #[cfg(target_arch = "x86_64")]
        if done {
            return Ok(());
        }
        if winograd::weight_grad(forward, transposed, x, gy, gw)? {
            return Ok(());
        }
        if forward.is_depthwise() {
            depthwise::weight_grad(forward, x, gy, gw)
        } else {
            weight::weight_grad(MicroKernels::get(), forward, transposed, x, gy, gw)
        }
    }
}

impl sealed::Algorithms for f64 {
    #[allow(private_interfaces)]
    fn gather(g: &Gather, x: &[f64], w: &[f64], bias: Option<&[f64]>, y: &mut [f64]) -> Result<(), OutOfMemory> {
        if g.is_depthwise() { depthwise::gather(g, x, w, bias, y) } else { plain::gather(g, x, w, bias, y) }
    }

    #[allow(private_interfaces)]
    fn weight_grad(forward: &Gather, _: &Gather, x: &[f64], gy: &[f64], gw: &mut [f64]) -> Result<(), OutOfMemory> {
        if forward.is_depthwise() { depthwise::weight_grad(forward, x, gy, gw) } else { plain::weight_grad(forward, x, gy, gw) }
    }
}

/// The convolution: `y[o][j] = bias[j] + Σ_tap Σ_c x[o·stride + tap·dilation − padding][c] · w[j][c][tap]`.
///
/// `x` is `[n][input][ci]`, `y` is `[n][output][co]` and is fully written. Fails only if there is no memory for the packed weights.
pub fn forward<T: ConvElement>(shape: &ConvShape, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    shape.assert_valid();
    assert!(x.len() == shape.input_len() && w.len() == shape.weight_len() && y.len() == shape.output_len());
    assert!(bias.is_none_or(|b| b.len() == shape.co));
    if y.is_empty() {
        return Ok(());
    }
    T::gather(&shape.forward_gather(), x, w, bias, y)
}

/// The gradient of [`forward`] by its input, given `gy` by its output: the transposed convolution of `gy`, to which a `bias` of
/// `ci` values may be added.
pub fn input_grad<T: ConvElement>(shape: &ConvShape, gy: &[T], w: &[T], bias: Option<&[T]>, gx: &mut [T]) -> Result<(), OutOfMemory> {
    shape.assert_valid();
    assert!(gx.len() == shape.input_len() && w.len() == shape.weight_len() && gy.len() == shape.output_len());
    assert!(bias.is_none_or(|b| b.len() == shape.ci));
    if gx.is_empty() {
        return Ok(());
    }
    T::gather(&shape.transposed_gather(), gy, w, bias, gx)
}

/// The gradient of [`forward`] by its weights: `gw[j][c][tap] = Σ_o x[o·stride + tap·dilation − padding][c] · gy[o][j]`.
pub fn weight_grad<T: ConvElement>(shape: &ConvShape, x: &[T], gy: &[T], gw: &mut [T]) -> Result<(), OutOfMemory> {
    shape.assert_valid();
    assert!(x.len() == shape.input_len() && gw.len() == shape.weight_len() && gy.len() == shape.output_len());
    if x.is_empty() || gy.is_empty() {
        gw.fill(T::zero());
        return Ok(());
    }
    if gw.is_empty() {
        return Ok(());
    }
    T::weight_grad(&shape.forward_gather(), &shape.transposed_gather(), x, gy, gw)
}

/// The start of part `i` of `total` things cut into `parts` nearly equal parts; `total` for `i == parts`.
fn part_start(total: usize, parts: usize, i: usize) -> usize {
    let (size, larger) = (total / parts, total % parts);
    i * size + i.min(larger)
}

#[cfg(test)]
pub(crate) mod tests;
