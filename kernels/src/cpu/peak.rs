//! What this machine can do at most, measured: multiply-adds of registers, and streams through memory. Reports set what kernels reach
//! beside it; no kernel depends on it.

#[cfg(target_arch = "x86_64")]
use super::isa::{Isa, isa};
use super::isa::{WithSimd, dispatch};
use super::simd::{F32s, Simd};
use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

/// The most that the current pool's threads reach together.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// f32 multiply-adds, in 10⁹ operations a second (two for each multiply-add).
    pub f32_gflops: f64,
    /// Products of bf16 that are summed in f32, on the units that products of bf16 use here: tiles, or the f32 unit.
    pub bf16_gflops: f64,
    /// Bytes read and written beyond the caches, in 10⁹ a second.
    pub bandwidth_gbs: f64,
}

/// The peaks, measured at the first call, which takes some tenths of a second: with the threads of that call's pool, at the level of [`isa`].
pub fn peaks() -> Peaks {
    static MEASURED: OnceLock<Peaks> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let f32_gflops = on_all_threads(ROUNDS, || dispatch(MultiplyAdds));
        let bf16_gflops = tile_products().unwrap_or(f32_gflops);
        Peaks { f32_gflops, bf16_gflops, bandwidth_gbs: streams() }
    })
}

/// The fastest of as many runs counts: what else the machine does only slows them down.
const ROUNDS: usize = 10;

/// 10⁹ units a second of all threads together, each of which runs `work` and is told how many units that was.
fn on_all_threads(rounds: usize, work: impl Fn() -> f64 + Sync) -> f64 {
    let mut best: f64 = 0.0;
    for _ in 0..rounds {
        let start = Instant::now();
        let units: f64 = rayon::broadcast(|_| work()).into_iter().sum();
        best = best.max(units / start.elapsed().as_secs_f64() / 1e9);
    }
    best
}

/// Chains of multiply-adds, none waiting for another: two units of a latency of four or five need eight to ten in flight, and sixteen
/// registers are all that AVX2 has.
const CHAINS: usize = 12;

struct MultiplyAdds;

impl WithSimd for MultiplyAdds {
    /// How many operations ran.
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> f64 {
        // Some five milliseconds of one thread.
        const STEPS: usize = 1 << 20;
        let steps = if S::LANES == 1 { STEPS / 8 } else { STEPS };
        let (x, y) = (s.splat(black_box(0.999)), s.splat(black_box(0.001)));
        let mut sums = [s.splat(black_box(1.0)); CHAINS];
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = sum.mul_add(x, y);
            }
        }
        let mut lanes = [0.0; super::simd::MAX_LANES];
        for sum in sums {
            sum.store_slice(&mut lanes, S::LANES);
            black_box(lanes);
        }
        (2 * CHAINS * S::LANES * steps) as f64
    }
}

/// Products of tiles whose panels stay in the first-level cache, if the level is AMX.
#[cfg(target_arch = "x86_64")]
fn tile_products() -> Option<f64> {
    use super::amx::{CHUNK, ENTRIES, SIDE, Session, Sums, bf16_products};
    /// A panel of 24 KiB, which is both factors.
    const STEPS: usize = 12;
    (isa() == Isa::Amx).then(|| {
        on_all_threads(ROUNDS, || {
            let panel = vec![0u8; STEPS * CHUNK];
            let (session, mut sums) = (Session::begin(), Sums::default());
            const CALLS: usize = 1 << 13;
            for _ in 0..CALLS {
                // SAFETY: the panel has all chunks of its steps, and the sums are a block.
                unsafe { bf16_products(&session, black_box(&panel).as_ptr(), black_box(&panel).as_ptr(), STEPS, sums.block()) };
            }
            black_box(&sums);
            (2 * SIDE * SIDE * 2 * ENTRIES * STEPS * CALLS) as f64
        })
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn tile_products() -> Option<f64> {
    None
}

/// The better of reading alone and of adding two streams into a third.
fn streams() -> f64 {
    // Per stream and thread: three streams of all threads are larger than the last level's cache.
    let bytes = ((64 << 20) / rayon::current_num_threads()).max(8 << 20);
    let len = bytes / size_of::<f32>();
    let buffers: Vec<std::sync::Mutex<[Vec<f32>; 3]>> =
        (0..rayon::current_num_threads()).map(|_| std::sync::Mutex::new([const { Vec::new() }; 3])).collect();
    let with_buffers = |work: &(dyn Fn(&mut [Vec<f32>; 3]) -> f64 + Sync)| {
        let index = rayon::current_thread_index().unwrap_or(0);
        let mut buffers = buffers[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        work(&mut buffers)
    };
    let run = |rounds, work: &(dyn Fn(&mut [Vec<f32>; 3]) -> f64 + Sync)| on_all_threads(rounds, || with_buffers(work));
    run(1, &|buffers| {
        *buffers = std::array::from_fn(|_| vec![1.0; len]);
        1.0
    });
    let add = run(ROUNDS / 2, &|[a, b, c]| {
        dispatch(Add(a, b, c));
        3.0 * bytes as f64
    });
    let read = run(ROUNDS / 2, &|[a, ..]| {
        black_box(dispatch(Sum(a)));
        bytes as f64
    });
    add.max(read)
}

struct Add<'a>(&'a [f32], &'a [f32], &'a mut [f32]);

impl WithSimd for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(a, b, c) = self;
        for ((c, a), b) in c.iter_mut().zip(a).zip(b) {
            *c = a + b;
        }
        black_box(c);
    }
}

struct Sum<'a>(&'a [f32]);

impl WithSimd for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) -> f32 {
        let mut sums = [s.splat(0.0); 4];
        for block in self.0.chunks_exact(4 * S::LANES) {
            for (sum, x) in sums.iter_mut().zip(block.chunks_exact(S::LANES)) {
                *sum = *sum + s.load_slice(x);
            }
        }
        ((sums[0] + sums[1]) + (sums[2] + sums[3])).reduce_sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_those_of_a_machine() {
        let Peaks { f32_gflops, bf16_gflops, bandwidth_gbs } = peaks();
        assert!(f32_gflops.is_finite() && f32_gflops > 0.0 && bf16_gflops >= f32_gflops / 2.0 && bandwidth_gbs > 0.0);
    }
}
