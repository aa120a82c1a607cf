//! What the kernels' tests share: reproducible values, and runs at several numbers of threads that must agree bit for bit.

/// `n` values from −`scale` to `scale` with no pattern.
pub fn values(n: usize, scale: f64) -> Vec<f64> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..n)
        .map(|_| {
            // Xorshift64* (Vigna, 2016).
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            let bits = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11;
            (bits as f64 / (1u64 << 52) as f64 - 1.0) * scale
        })
        .collect()
}

/// The result of `f`, which must have the same bits (by its `Debug` form, which tells all finite values apart) with 1, 2 and 7 threads.
pub fn at_thread_counts<R: std::fmt::Debug + Send>(f: impl Fn() -> R + Sync) -> R {
    let run = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&f);
    let one = run(1);
    let debug = format!("{one:?}");
    for threads in [2, 7] {
        assert_eq!(format!("{:?}", run(threads)), debug, "{threads} threads");
    }
    one
}
