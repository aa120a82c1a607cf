//! Mixed precision by scope: inside of [`autocast`], products run in a half type, and what loses by that in f32.
//!
//! - To the half type: `matmul` and what is made of it, `linear`, convolutions, attention.
//! - To f32: softmax, norms, sums and other reductions, losses, exponentials, logarithms and powers.
//! - Elsewhere operands of a half type and f32 meet in f32.
//!
//! f64 stays what it is. The casts are operations, recorded like any other, so gradients arrive in the dtype of the parameters: keep those in f32
//! ("master weights"). The backward pass needs no scope, and takes none: a gradient has the dtype of its tensor.
//!
//! Source: Micikevicius et al., *Mixed Precision Training*, 2018; the lists are PyTorch's, but for norms, which are all in f32 here.

use crate::{DType, Error, Result, Tensor};
use std::borrow::Cow;
use std::cell::Cell;

thread_local! {
    static TARGET: Cell<Option<DType>> = const { Cell::new(None) };
}

/// Runs `f`, on this thread, with products in `dtype`.
///
/// ```
/// # use kiln_tensor::{DType, Result, Tensor, autocast};
/// # fn main() -> Result<()> {
/// let (x, w) = (Tensor::randn([4, 8], ())?, Tensor::randn([8, 8], ())?);
/// let y = autocast(DType::BF16, || x.matmul(&w))??;
/// assert_eq!(y.dtype(), DType::BF16);
/// # Ok(()) }
/// ```
///
/// # Errors
/// If `dtype` is neither bf16 nor f16.
pub fn autocast<R>(dtype: DType, f: impl FnOnce() -> R) -> Result<R> {
    if !is_half(dtype) {
        return Err(Error::unsupported_dtype("autocast", dtype, "bf16 or f16"));
    }
    Ok(with_autocast(Some(dtype), f))
}

/// Runs `f` with the scope that [`autocast_dtype`] gave elsewhere; `None`: without one.
pub fn with_autocast<R>(dtype: Option<DType>, f: impl FnOnce() -> R) -> R {
    struct Restore(Option<DType>);
    impl Drop for Restore {
        fn drop(&mut self) {
            TARGET.set(self.0);
        }
    }
    let _restore = Restore(TARGET.replace(dtype));
    f()
}

/// The half type of this thread's scope.
pub fn autocast_dtype() -> Option<DType> {
    TARGET.get()
}

fn is_half(dtype: DType) -> bool {
    matches!(dtype, DType::BF16 | DType::F16)
}

fn cast(x: &Tensor, to: DType) -> Result<Cow<'_, Tensor>> {
    if x.dtype() == to { Ok(Cow::Borrowed(x)) } else { x.to_dtype(to).map(Cow::Owned) }
}

/// An operand of a product.
pub(crate) fn lowered(x: &Tensor) -> Result<Cow<'_, Tensor>> {
    match TARGET.get() {
        Some(dtype) if is_half(x.dtype()) || x.dtype() == DType::F32 => cast(x, dtype),
        _ => Ok(Cow::Borrowed(x)),
    }
}

/// [`lowered`], of an operand that may be missing.
pub(crate) fn lowered_option(x: Option<&Tensor>) -> Result<Option<Cow<'_, Tensor>>> {
    x.map(lowered).transpose()
}

/// Whether what needs f32 takes another tensor for `x`.
pub(crate) fn raises(x: &Tensor) -> bool {
    TARGET.get().is_some() && is_half(x.dtype())
}

/// An operand of what needs f32.
pub(crate) fn raised(x: &Tensor) -> Result<Cow<'_, Tensor>> {
    if raises(x) { cast(x, DType::F32) } else { Ok(Cow::Borrowed(x)) }
}

/// [`raised`], of an operand that may be missing.
pub(crate) fn raised_option(x: Option<&Tensor>) -> Result<Option<Cow<'_, Tensor>>> {
    x.map(raised).transpose()
}

/// Operands of one operation: of one dtype if they are floats of at most 32 bits.
pub(crate) fn together<'a, const N: usize>(operands: [&'a Tensor; N]) -> Result<[Cow<'a, Tensor>; N]> {
    let mut out = operands.map(Cow::Borrowed);
    let differ = operands.iter().any(|x| x.dtype() != operands[0].dtype());
    if TARGET.get().is_some() && differ && operands.iter().all(|x| is_half(x.dtype()) || x.dtype() == DType::F32) {
        for (out, x) in out.iter_mut().zip(operands) {
            *out = cast(x, DType::F32)?;
        }
    }
    Ok(out)
}
