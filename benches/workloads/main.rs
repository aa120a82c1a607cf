//! The workloads of `benches/compare/torch_bench.py`, by the same names and shapes, timed by the same protocol:
//! `cargo bench --bench workloads -- --json [--only SUBSTRING[,SUBSTRING…]] [--threads N] [--device cuda]`.
//! With `--sweep`, the sizes between them and one of each operation instead ([`sweep`], [`operations`]). On a GPU, a call's time includes the wait for its result; [`gpu`] adds
//! shapes that are too large for a processor.

mod decode;
mod diffusion;
mod gpt;
mod gpu;
mod layers;
mod operations;
mod ops;
mod sweep;
mod training;
mod unet;

use clap::Parser;
use kiln::{Device, Result, set_default_device};
use std::time::Instant;

/// Times Kiln's workloads.
#[derive(Parser, Debug)]
pub struct Args {
    /// One JSON line a workload: {"name", "ms", "ms_min"}.
    #[arg(long)]
    json: bool,
    /// Only workloads whose name contains one of these, separated by commas.
    #[arg(long, default_value = "")]
    only: String,
    /// Number of threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Device that everything runs on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Seconds of timed work per workload.
    #[arg(long, default_value_t = 3.0)]
    budget: f64,
    /// The sizes between the workloads, and each operation, instead of the workloads.
    #[arg(long)]
    sweep: bool,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Runs and prints the workloads that were asked for.
pub struct Bench {
    args: Args,
}

impl Bench {
    /// Whether `name` was asked for: set-up that is costly can be left out otherwise.
    pub fn wants(&self, name: &str) -> bool {
        self.args.only.split(',').any(|part| name.contains(part))
    }

    /// Whether the workloads run on a GPU.
    pub fn on_gpu(&self) -> bool {
        self.args.device != Device::Cpu
    }

    /// Times `f`: a warm-up, then medians of calls; very short ones are timed in groups.
    pub fn run<R>(&self, name: &str, mut f: impl FnMut() -> Result<R>) -> Result<()> {
        if !self.wants(name) {
            return Ok(());
        }
        let wait = || self.args.device.synchronize();
        f()?;
        wait()?;
        let start = Instant::now();
        f()?;
        wait()?;
        let once = start.elapsed().as_secs_f64();
        let n = ((self.args.budget / once.max(1e-6)) as usize).clamp(3, 200);
        let inner = ((2e-4 / once.max(1e-7)) as usize).max(1);
        for _ in 0..(n / 5).max(1) {
            f()?;
        }
        wait()?;
        let mut times = Vec::with_capacity(n);
        for _ in 0..n {
            let start = Instant::now();
            for _ in 0..inner {
                f()?;
            }
            wait()?;
            times.push(start.elapsed().as_secs_f64() * 1e3 / inner as f64);
        }
        times.sort_by(f64::total_cmp);
        let (median, min) = (times[n / 2], times[0]);
        if self.args.json {
            println!(r#"{{"name": "{name}", "ms": {median:.6}, "ms_min": {min:.6}}}"#);
        } else {
            println!("{name:<48} {median:>12.5} ms   (fastest {min:.5})");
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(args.threads).build().map_err(|e| kiln::Error::argument("threads", e.to_string()))?;
    set_default_device(args.device);
    let bench = Bench { args };
    pool.install(|| {
        kiln::manual_seed(0);
        if bench.args.sweep {
            sweep::run(&bench)?;
            return operations::run(&bench);
        }
        ops::products(&bench)?;
        ops::memory_bound(&bench)?;
        layers::convolutions(&bench)?;
        layers::attention(&bench)?;
        layers::fused(&bench)?;
        training::run(&bench)?;
        gpt::run(&bench)?;
        decode::run(&bench)?;
        unet::run(&bench)?;
        diffusion::run(&bench)?;
        gpu::run(&bench)
    })
}
