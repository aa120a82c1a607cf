//! Kernels for the host: SIMD by hand, threads from the current rayon pool.

pub mod alloc;
#[cfg(target_arch = "x86_64")]
pub mod amx;
pub mod attention;
pub mod cast;
pub mod conv;
pub mod copy;
pub mod cross_entropy;
pub mod cumulative;
pub mod gemm;
pub mod gradient;
pub mod index;
pub mod isa;
pub mod lanes;
pub mod math;
pub mod norm;
pub mod optim;
pub mod parallel;
pub mod peak;
pub mod pointwise;
pub mod pool;
pub mod quantized;
pub mod random;
pub mod reduce;
pub mod resample;
pub mod rotary;
pub mod simd;
pub mod softmax;
pub mod sort;
#[cfg(test)]
pub(crate) mod testing;
pub mod upsample;
