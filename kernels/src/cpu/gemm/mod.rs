//! Matrix products: micro-kernels, packing, blocking.

pub mod micro;
