//! Shapes, the dimensions that an operation is told to work on, and the one broadcasting rule.

use crate::{Error, Result};
use std::fmt;
use std::ops::Deref;

/// The most dimensions a tensor can have. A fixed bound keeps shapes out of the heap.
pub const MAX_RANK: usize = 8;

/// The extents of a tensor's dimensions. Their product fits a `usize`.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Shape {
    rank: u8,
    /// 0 beyond the rank.
    dims: [usize; MAX_RANK],
}

impl Shape {
    /// A shape from its extents: an error if there are more than [`MAX_RANK`], or their product overflows.
    pub fn new(dims: &[usize]) -> Result<Self> {
        if dims.len() > MAX_RANK {
            return Err(Error::shape("shape", format!("{} dimensions; at most {MAX_RANK} are supported", dims.len())));
        }
        // Zeros must not hide an overflow of the rest: strides are products of the other extents.
        let product = dims.iter().filter(|&&d| d != 0).try_fold(1usize, |n, &d| n.checked_mul(d));
        if product.is_none_or(|n| n > isize::MAX as usize) {
            return Err(Error::shape("shape", format!("the number of elements of {dims:?} overflows")));
        }
        Ok(Self::from_checked(dims))
    }

    /// A shape whose rank and size are known to be in range.
    pub(crate) fn from_checked(dims: &[usize]) -> Self {
        let mut shape = Self { rank: dims.len() as u8, ..Self::default() };
        shape.dims[..dims.len()].copy_from_slice(dims);
        shape
    }

    /// The extents.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    pub(crate) fn dims_mut(&mut self) -> &mut [usize] {
        &mut self.dims[..self.rank as usize]
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// Number of elements: the product of the extents, 1 for a scalar.
    pub fn numel(&self) -> usize {
        self.dims().iter().product()
    }

    /// Row-major strides, in elements.
    pub fn contiguous_strides(&self) -> Shape {
        let mut strides = *self;
        let mut step = 1;
        for d in (0..self.rank()).rev() {
            strides.dims[d] = step;
            step *= self.dims[d].max(1);
        }
        strides
    }

    /// The dimension that `dim` names, negative ones counted from the end.
    pub fn dim(&self, op: &str, dim: isize) -> Result<usize> {
        let rank = self.rank() as isize;
        let at = if dim < 0 { dim + rank } else { dim };
        if (0..rank).contains(&at) {
            Ok(at as usize)
        } else {
            Err(Error::index(op, format!("dimension {dim} is out of range for shape {self}")))
        }
    }

    /// An error if `order` does not name each dimension once.
    pub(crate) fn named_once(&self, op: &str, order: &[usize]) -> Result<()> {
        if order.len() == self.rank() && (0..self.rank()).all(|d| order.contains(&d)) {
            return Ok(());
        }
        Err(Error::index(op, format!("{order:?} does not name each dimension of shape {self} once")))
    }

    /// The number of elements before, in and after dimension `at`: row-major memory seen as three dimensions.
    pub(crate) fn around(&self, at: usize) -> (usize, usize, usize) {
        (self[..at].iter().product(), self[at], self[at + 1..].iter().product())
    }

    /// The shape with `extent` put in before dimension `at`.
    pub fn with_inserted(&self, at: usize, extent: usize) -> Result<Shape> {
        let mut dims = self.dims().to_vec();
        dims.insert(at.min(dims.len()), extent);
        Shape::new(&dims)
    }

    /// The shape without dimension `at`.
    pub fn without(&self, at: usize) -> Shape {
        let mut dims = self.dims().to_vec();
        if at < dims.len() {
            dims.remove(at);
        }
        Shape::from_checked(&dims)
    }

    /// The shape with dimension `at` set to `extent`.
    pub fn with_dim(&self, at: usize, extent: usize) -> Result<Shape> {
        let mut shape = *self;
        shape.dims_mut()[at] = extent;
        Shape::new(shape.dims())
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        self.dims()
    }
}

impl PartialEq<[usize]> for Shape {
    fn eq(&self, other: &[usize]) -> bool {
        self.dims() == other
    }
}

impl<const N: usize> PartialEq<[usize; N]> for Shape {
    fn eq(&self, other: &[usize; N]) -> bool {
        self.dims() == other
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// What can be given as a shape: arrays, slices and vectors of extents, one extent, `()` for a scalar.
pub trait IntoShape {
    /// The shape, or an error if it is too large.
    fn into_shape(self) -> Result<Shape>;
}

impl IntoShape for Shape {
    fn into_shape(self) -> Result<Shape> {
        Ok(self)
    }
}
impl IntoShape for &Shape {
    fn into_shape(self) -> Result<Shape> {
        Ok(*self)
    }
}
impl IntoShape for () {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&[])
    }
}
impl IntoShape for usize {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&[self])
    }
}
impl<const N: usize> IntoShape for [usize; N] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}
impl<const N: usize> IntoShape for &[usize; N] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}
impl IntoShape for &[usize] {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}
impl IntoShape for Vec<usize> {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(&self)
    }
}
impl IntoShape for &Vec<usize> {
    fn into_shape(self) -> Result<Shape> {
        Shape::new(self)
    }
}

/// The dimensions that a reduction works on: `()` for all, one number, or an array of them; negative ones count from the end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Dims {
    /// Every dimension.
    All,
    /// These dimensions.
    Some(Vec<isize>),
}

impl Dims {
    /// The dimensions as ascending indices of `shape`: an error if one is out of range or named twice.
    pub fn resolve(&self, op: &str, shape: &Shape) -> Result<Vec<usize>> {
        let list = match self {
            Dims::All => return Ok((0..shape.rank()).collect()),
            Dims::Some(list) => list,
        };
        let mut dims = list.iter().map(|&d| shape.dim(op, d)).collect::<Result<Vec<_>>>()?;
        dims.sort_unstable();
        if dims.windows(2).any(|w| w[0] == w[1]) {
            return Err(Error::index(op, format!("dimensions {list:?} of shape {shape} name one dimension twice")));
        }
        Ok(dims)
    }
}

impl From<()> for Dims {
    fn from((): ()) -> Self {
        Dims::All
    }
}

/// The new extents for a reshape; at most one may be -1, which stands for whatever remains.
#[derive(Clone, Debug)]
pub struct ReshapeDims(pub(crate) Vec<isize>);

impl From<Shape> for ReshapeDims {
    fn from(shape: Shape) -> Self {
        Self(shape.iter().map(|&d| d as isize).collect())
    }
}
impl From<&Shape> for ReshapeDims {
    fn from(shape: &Shape) -> Self {
        (*shape).into()
    }
}
impl From<()> for ReshapeDims {
    fn from((): ()) -> Self {
        Self(Vec::new())
    }
}

/// A dimension, extent or index of any integer type. What is too large for `isize` is too large for every tensor, and stays so.
pub(crate) fn within(number: impl TryInto<isize>) -> isize {
    number.try_into().unwrap_or(isize::MAX)
}

macro_rules! dims_from {
    ($($t:ty),*) => { $(
        impl From<$t> for Dims {
            fn from(dim: $t) -> Self { Dims::Some(vec![within(dim)]) }
        }
        impl<const N: usize> From<[$t; N]> for Dims {
            fn from(dims: [$t; N]) -> Self { Dims::Some(dims.iter().map(|&d| within(d)).collect()) }
        }
        impl From<&[$t]> for Dims {
            fn from(dims: &[$t]) -> Self { Dims::Some(dims.iter().map(|&d| within(d)).collect()) }
        }
        impl From<Vec<$t>> for Dims {
            fn from(dims: Vec<$t>) -> Self { Dims::from(dims.as_slice()) }
        }
        impl From<$t> for ReshapeDims {
            fn from(dim: $t) -> Self { Self(vec![within(dim)]) }
        }
        impl<const N: usize> From<[$t; N]> for ReshapeDims {
            fn from(dims: [$t; N]) -> Self { Self(dims.iter().map(|&d| within(d)).collect()) }
        }
        impl From<&[$t]> for ReshapeDims {
            fn from(dims: &[$t]) -> Self { Self(dims.iter().map(|&d| within(d)).collect()) }
        }
        impl From<Vec<$t>> for ReshapeDims {
            fn from(dims: Vec<$t>) -> Self { Self::from(dims.as_slice()) }
        }
    )* };
}
dims_from!(i32, i64, isize, usize);

/// The shape that `a` and `b` broadcast to: aligned at the end, extents must be equal or 1.
pub fn broadcast_shapes(op: &str, a: &Shape, b: &Shape) -> Result<Shape> {
    if a == b {
        return Ok(*a);
    }
    let rank = a.rank().max(b.rank());
    let mut out = Shape::from_checked(&[1; MAX_RANK][..rank]);
    for i in 0..rank {
        let x = if i < a.rank() { a[a.rank() - 1 - i] } else { 1 };
        let y = if i < b.rank() { b[b.rank() - 1 - i] } else { 1 };
        out.dims_mut()[rank - 1 - i] = match (x, y) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(Error::broadcast(op, a, b)),
        };
    }
    Shape::new(out.dims())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_shapes_are_errors() {
        assert!(Shape::new(&[usize::MAX, 2]).is_err());
        assert!(Shape::new(&[0, usize::MAX, usize::MAX]).is_err());
        assert!(Shape::new(&[1; 9]).is_err());
        assert_eq!(Shape::new(&[]).unwrap().numel(), 1);
        assert_eq!(Shape::new(&[3, 0]).unwrap().numel(), 0);
    }

    #[test]
    fn shapes_broadcast_from_the_end() {
        let shape = |d: &[usize]| Shape::new(d).unwrap();
        assert_eq!(broadcast_shapes("add", &shape(&[4, 1, 3]), &shape(&[2, 1])).unwrap(), [4, 2, 3]);
        assert_eq!(broadcast_shapes("add", &shape(&[0]), &shape(&[1])).unwrap(), [0]);
        let error = broadcast_shapes("add", &shape(&[4, 3]), &shape(&[4])).unwrap_err();
        assert!(error.to_string().starts_with("add: shapes [4, 3] and [4] do not broadcast"));
    }

    #[test]
    fn dims_are_resolved_once_each() {
        let shape = Shape::new(&[2, 3, 4]).unwrap();
        assert_eq!(Dims::from([-1, 0]).resolve("sum", &shape).unwrap(), [0, 2]);
        assert!(Dims::from([-1, 2]).resolve("sum", &shape).is_err());
        assert!(Dims::from(3).resolve("sum", &shape).is_err());
        assert_eq!(Dims::from(()).resolve("sum", &shape).unwrap(), [0, 1, 2]);
    }
}
