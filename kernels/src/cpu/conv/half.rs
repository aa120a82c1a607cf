//! Convolution of halves as they are: summed in f32, and rounded once.

use super::super::alloc::OutOfMemory;
use super::super::gemm::GemmElement;
use super::{ConvShape, Gather, few, pairs};
use half::{bf16, f16};

/// The two passes whose results are images.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// [`forward`](super::forward).
    Forward,
    /// [`input_grad`](super::input_grad).
    InputGrad,
}

impl Pass {
    fn gather(self, shape: &ConvShape) -> Gather {
        match self {
            Self::Forward => shape.forward_gather(),
            Self::InputGrad => shape.transposed_gather(),
        }
    }

    /// Elements of the image that is read, and of that which is written; channels of the latter.
    fn extents(self, shape: &ConvShape) -> [usize; 3] {
        match self {
            Self::Forward => [shape.input_len(), shape.output_len(), shape.co],
            Self::InputGrad => [shape.output_len(), shape.input_len(), shape.ci],
        }
    }
}

mod sealed {
    use super::{Gather, OutOfMemory};

    pub trait Halves: Sized {
        /// Whether there is a way for them.
        #[allow(private_interfaces)]
        fn pay(g: &Gather) -> bool;
        #[allow(private_interfaces)]
        fn gather(g: &Gather, x: &[Self], w: &[Self], bias: Option<&[Self]>, y: &mut [Self]) -> Result<(), OutOfMemory>;
    }
}

/// Elements of half the size of those that they are summed in: f16, bf16.
pub trait HalfElement: GemmElement + sealed::Halves {}
impl HalfElement for f16 {}
impl HalfElement for bf16 {}

impl sealed::Halves for f16 {
    #[allow(private_interfaces)]
    fn pay(g: &Gather) -> bool {
        few::pays(g)
    }
    #[allow(private_interfaces)]
    fn gather(g: &Gather, x: &[Self], w: &[Self], bias: Option<&[Self]>, y: &mut [Self]) -> Result<(), OutOfMemory> {
        few::gather(g, x, w, bias, y)
    }
}

impl sealed::Halves for bf16 {
    #[allow(private_interfaces)]
    fn pay(g: &Gather) -> bool {
        few::pays(g) || pairs::pay(g)
    }
    #[allow(private_interfaces)]
    fn gather(g: &Gather, x: &[Self], w: &[Self], bias: Option<&[Self]>, y: &mut [Self]) -> Result<(), OutOfMemory> {
        if few::pays(g) {
            return few::gather(g, x, w, bias, y);
        }
        let bias = bias.map(|bias| bias.iter().map(|b| b.to_f32()).collect::<Vec<_>>());
        pairs::gather(g, x, w, bias.as_deref(), y)
    }
}

/// Whether [`half`] computes this pass, and faster than the pass of widened values takes.
pub fn takes_half<T: HalfElement>(shape: &ConvShape, pass: Pass) -> bool {
    shape.assert_valid();
    T::pay(&pass.gather(shape))
}

/// A pass of halves, with a `bias` for each channel of its results; only if [`takes_half`] says so.
pub fn half<T: HalfElement>(shape: &ConvShape, pass: Pass, x: &[T], w: &[T], bias: Option<&[T]>, y: &mut [T]) -> Result<(), OutOfMemory> {
    assert!(takes_half::<T>(shape, pass));
    let [read, written, channels] = pass.extents(shape);
    assert!(x.len() == read && w.len() == shape.weight_len() && y.len() == written && bias.is_none_or(|b| b.len() == channels));
    if y.is_empty() { Ok(()) } else { T::gather(&pass.gather(shape), x, w, bias, y) }
}

/// Whether [`weight_grad_bf16`] computes this gradient, and faster than that of widened values takes.
pub fn takes_bf16_weight_grad(shape: &ConvShape) -> bool {
    shape.assert_valid();
    pairs::pay_for_weights(&shape.forward_gather())
}

/// [`weight_grad`](super::weight_grad) of bf16, not rounded; only if [`takes_bf16_weight_grad`] says so.
pub fn weight_grad_bf16(shape: &ConvShape, x: &[bf16], gy: &[bf16], gw: &mut [f32]) -> Result<(), OutOfMemory> {
    assert!(takes_bf16_weight_grad(shape));
    assert!(x.len() == shape.input_len() && gw.len() == shape.weight_len() && gy.len() == shape.output_len());
    if x.is_empty() || gy.is_empty() {
        gw.fill(0.0);
        return Ok(());
    }
    if gw.is_empty() { Ok(()) } else { pairs::weight_grad(&shape.forward_gather(), &shape.transposed_gather(), x, gy, gw) }
}
