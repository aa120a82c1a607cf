//! NumPy's indexing in Rust: `x.i((.., 3, 1..-1))?`.

use crate::shape::within;
use crate::{DType, Error, Result, Tensor};
use std::ops::{Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};

/// In an index: a new dimension of extent 1.
#[derive(Clone, Copy, Debug)]
pub struct NewAxis;

/// In an index: all dimensions that the other items leave over.
#[derive(Clone, Copy, Debug)]
pub struct Ellipsis;

/// One item of an index.
#[derive(Clone, Debug)]
pub enum IndexItem {
    /// One element of the dimension, which the result lacks.
    At(isize),
    /// Every `step`th element from `start` up to `end` (not included). Negative bounds count from the end.
    Slice {
        /// The first element.
        start: isize,
        /// Behind the last element; `None` is the end of the dimension.
        end: Option<isize>,
        /// Distance of the elements.
        step: usize,
    },
    /// The elements that an i64 tensor of one dimension names, or where a bool tensor is true.
    Tensor(Tensor),
    /// A new dimension.
    NewAxis,
    /// All dimensions left over.
    Ellipsis,
}

impl From<NewAxis> for IndexItem {
    fn from(_: NewAxis) -> Self {
        IndexItem::NewAxis
    }
}
impl From<Ellipsis> for IndexItem {
    fn from(_: Ellipsis) -> Self {
        IndexItem::Ellipsis
    }
}
impl From<&Tensor> for IndexItem {
    fn from(index: &Tensor) -> Self {
        IndexItem::Tensor(index.clone())
    }
}
impl From<RangeFull> for IndexItem {
    fn from(_: RangeFull) -> Self {
        IndexItem::Slice { start: 0, end: None, step: 1 }
    }
}

/// The end of an inclusive range; -1 is the last element, behind which there is none to name.
fn behind(last: isize) -> Option<isize> {
    if last == -1 { None } else { Some(last.saturating_add(1)) }
}

macro_rules! index_from {
    ($($t:ty),*) => { $(
        impl From<$t> for IndexItem {
            fn from(at: $t) -> Self { IndexItem::At(within(at)) }
        }
        impl From<Range<$t>> for IndexItem {
            fn from(r: Range<$t>) -> Self { IndexItem::Slice { start: within(r.start), end: Some(within(r.end)), step: 1 } }
        }
        impl From<RangeInclusive<$t>> for IndexItem {
            fn from(r: RangeInclusive<$t>) -> Self { IndexItem::Slice { start: within(*r.start()), end: behind(within(*r.end())), step: 1 } }
        }
        impl From<RangeFrom<$t>> for IndexItem {
            fn from(r: RangeFrom<$t>) -> Self { IndexItem::Slice { start: within(r.start), end: None, step: 1 } }
        }
        impl From<RangeTo<$t>> for IndexItem {
            fn from(r: RangeTo<$t>) -> Self { IndexItem::Slice { start: 0, end: Some(within(r.end)), step: 1 } }
        }
        impl From<RangeToInclusive<$t>> for IndexItem {
            fn from(r: RangeToInclusive<$t>) -> Self { IndexItem::Slice { start: 0, end: behind(within(r.end)), step: 1 } }
        }
    )* };
}
index_from!(i32, i64, isize, usize);

/// A range with a step: `x.i((.., (1..9, 2)))`.
impl<R: Into<IndexItem>> From<(R, usize)> for IndexItem {
    fn from((range, step): (R, usize)) -> Self {
        match range.into() {
            IndexItem::Slice { start, end, .. } => IndexItem::Slice { start, end, step },
            other => other,
        }
    }
}

/// What can be given as an index: one item, or a tuple of up to eight.
pub trait IntoIndex {
    /// The items in order.
    fn into_items(self) -> Vec<IndexItem>;
}

macro_rules! into_index_single {
    ($($t:ty),*) => { $(
        impl IntoIndex for $t {
            fn into_items(self) -> Vec<IndexItem> { vec![self.into()] }
        }
    )* };
}
into_index_single!(
    i32,
    i64,
    isize,
    usize,
    RangeFull,
    NewAxis,
    Ellipsis,
    &Tensor,
    Range<i32>,
    Range<isize>,
    Range<usize>,
    RangeFrom<i32>,
    RangeFrom<isize>,
    RangeFrom<usize>,
    RangeTo<i32>,
    RangeTo<isize>,
    RangeTo<usize>,
    RangeInclusive<i32>,
    RangeInclusive<isize>,
    RangeInclusive<usize>
);

impl IntoIndex for Vec<IndexItem> {
    fn into_items(self) -> Vec<IndexItem> {
        self
    }
}

macro_rules! into_index_tuple {
    ($($name:ident)+) => {
        impl<$($name: Into<IndexItem>),+> IntoIndex for ($($name,)+) {
            #[allow(non_snake_case)]
            fn into_items(self) -> Vec<IndexItem> {
                let ($($name,)+) = self;
                vec![$($name.into()),+]
            }
        }
    };
}
into_index_tuple!(A);
into_index_tuple!(A B);
into_index_tuple!(A B C);
into_index_tuple!(A B C D);
into_index_tuple!(A B C D E);
into_index_tuple!(A B C D E F);
into_index_tuple!(A B C D E F G);
into_index_tuple!(A B C D E F G H);

impl Tensor {
    /// The part that `index` names, one item a dimension; dimensions without an item are taken whole. Items are integers (the dimension
    /// goes away), ranges (`2..`, `..-1`, `(.., 2)` for every second element), `..` for a whole dimension, [`NewAxis`], [`Ellipsis`] for all
    /// dimensions that the others leave over, and a tensor: i64 positions, or a bool mask of one dimension.
    ///
    /// All but tensors give views.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, DType, Result, ops::movement::NewAxis};
    /// # fn main() -> Result<()> {
    /// let x = Tensor::arange(0., 24., 1., DType::F32)?.reshape([2, 3, 4])?;
    /// assert_eq!(x.i((.., 2, 1..3))?.to_vec::<f32>()?, [9., 10., 21., 22.]);
    /// assert_eq!(x.i((-1, .., NewAxis))?.dims(), [3, 1, 4]);
    /// # Ok(()) }
    /// ```
    pub fn i(&self, index: impl IntoIndex) -> Result<Tensor> {
        let mut items = index.into_items();
        let named = items.iter().filter(|i| !matches!(i, IndexItem::NewAxis | IndexItem::Ellipsis)).count();
        let left = self.rank().checked_sub(named);
        let left =
            left.ok_or_else(|| Error::index("i", format!("{named} items for shape {} of {} dimensions", self.shape(), self.rank())))?;
        if let Some(at) = items.iter().position(|i| matches!(i, IndexItem::Ellipsis)) {
            items.splice(at..=at, std::iter::repeat_with(|| IndexItem::from(..)).take(left));
        }
        let (mut out, mut dim) = (self.clone(), 0);
        for item in items {
            match item {
                IndexItem::At(at) => {
                    out = out.select(dim, at)?;
                    continue;
                }
                IndexItem::Slice { start, end, step } => out = out.slice(dim, start, end.unwrap_or(isize::MAX), step)?,
                IndexItem::Tensor(at) => out = out.index_select(dim, &positions(&at)?)?,
                IndexItem::NewAxis => out = out.unsqueeze(dim)?,
                IndexItem::Ellipsis => return Err(Error::index("i", "at most one ellipsis may stand in an index")),
            }
            dim += 1;
        }
        Ok(out)
    }
}

/// The positions that an index tensor names.
fn positions(index: &Tensor) -> Result<Tensor> {
    if index.dtype() != DType::Bool {
        return Ok(index.clone());
    }
    if index.rank() != 1 {
        return Err(Error::index(
            "i",
            format!("a mask of shape {}; only one dimension can be masked, see .masked_select(..)", index.shape()),
        ));
    }
    index.nonzero()?.flatten(0, -1)
}
