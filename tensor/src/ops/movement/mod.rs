//! Operations that move elements, or only relabel them.

mod indexing;
mod device;
mod join;
mod slice;
mod view;

pub use indexing::{Ellipsis, IndexItem, IntoIndex, NewAxis};
pub use join::PadMode;
