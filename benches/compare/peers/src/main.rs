//! Workloads of `benches/workloads` in other Rust libraries, by the same names and shapes, timed by the same protocol:
//! `peers candle|burn [--only SUBSTRING[,SUBSTRING…]] [--threads N] [--budget SECONDS]`; one JSON line a workload.
//! A library lacks the names that it has no way to run.

mod burn;
mod candle;

use std::time::Instant;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The convolutions: name, then images, input channels, output channels, extent, kernel, stride.
pub const CONVOLUTIONS: [(&str, [usize; 6]); 5] = [
    ("3x3_64c_28", [32, 64, 64, 28, 3, 1]),
    ("3x3_128c_14", [32, 128, 128, 14, 3, 1]),
    ("1x1_256c_16", [16, 256, 256, 16, 1, 1]),
    ("4x4s2_64to128_14", [128, 64, 128, 14, 4, 2]),
    ("3x3_3to64_64", [16, 3, 64, 64, 3, 1]),
];
/// Rows, inner and outer extent of the linear layers.
pub const LINEAR: [[usize; 3]; 5] = [[1, 768, 3072], [16, 768, 3072], [512, 768, 3072], [1, 4096, 4096], [49, 1152, 64]];
/// Extents of the square products.
pub const SQUARE: [usize; 5] = [128, 256, 512, 1024, 2048];

/// What was asked for.
pub struct Bench {
    only: String,
    budget: f64,
}

impl Bench {
    /// Whether a workload of this name, or of one of several in one string, was asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.only.split(',').any(|part| name.contains(part))
    }

    /// Times `f` as `benches/workloads` does and prints the line.
    pub fn run<R>(&self, name: &str, mut f: impl FnMut() -> Result<R>) -> Result<()> {
        if !self.wants(name) {
            return Ok(());
        }
        f()?;
        let start = Instant::now();
        f()?;
        let once = start.elapsed().as_secs_f64();
        let n = ((self.budget / once.max(1e-6)) as usize).clamp(3, 200);
        let inner = ((2e-4 / once.max(1e-7)) as usize).max(1);
        for _ in 0..(n / 5).max(1) {
            f()?;
        }
        let mut times = Vec::with_capacity(n);
        for _ in 0..n {
            let start = Instant::now();
            for _ in 0..inner {
                f()?;
            }
            times.push(start.elapsed().as_secs_f64() * 1e3 / inner as f64);
        }
        times.sort_by(f64::total_cmp);
        println!(r#"{{"name": "{name}", "ms": {:.5}, "ms_min": {:.5}}}"#, times[n / 2], times[0]);
        Ok(())
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let library = arguments.next().ok_or("which library: candle or burn?")?;
    let mut bench = Bench { only: String::new(), budget: 3.0 };
    let mut threads = 2;
    while let (Some(option), Some(value)) = (arguments.next(), arguments.next()) {
        match option.as_str() {
            "--only" => bench.only = value,
            "--budget" => bench.budget = value.parse()?,
            "--threads" => threads = value.parse()?,
            _ => return Err(format!("unknown option {option}").into()),
        }
    }
    // Both libraries run on rayon's global pool.
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    match library.as_str() {
        "candle" => candle::run(&bench),
        "burn" => burn::run(&bench),
        other => Err(format!("{other} is neither candle nor burn").into()),
    }
}
