//! Operations that move elements, or only relabel them.

mod device;
mod indexing;
mod join;
mod slice;
mod view;

pub use indexing::{Ellipsis, IndexItem, IntoIndex, NewAxis};
pub use join::PadMode;
