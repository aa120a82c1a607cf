//! Arithmetic on raw strided views of memory: the ground floor of Kiln.
//!
//! Nothing here knows of tensors, shapes that broadcast, or gradients. A kernel is an argument struct (or a function)
//! over slices and [`view`]s; the floors above choose shapes, allocate outputs and record derivatives.
//! Each kernel gives the same bits for any number of threads: work is cut by shape and dtype only.

pub mod cpu;
pub mod cuda;
pub mod element;
pub mod iter;
pub mod pointwise;
pub mod view;
