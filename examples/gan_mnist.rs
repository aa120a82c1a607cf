//! Trains a DCGAN on handwritten digits and judges what it draws. `cargo run --example gan_mnist`
//!
//! Writes to `out/gan_mnist/`: a grid of samples per epoch, loss curves, `metrics.csv`, and a checkpoint that `--resume`
//! continues bit for bit. At the end a classifier that was trained on the real digits says which digits were drawn, how
//! sure it is of them, and how far they are from real ones.

use clap::Parser;
use kiln::data::{Dataset, ImageSet, Loader, LoaderOptions, LoaderState, Mnist, Scale, Source};
use kiln::gan::{GanLoss, GanTrainer, GanTrainerOptions};
use kiln::metrics::DigitJudge;
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, save_grid, stop_on_ctrl_c};
use kiln::{Error, Profiler, Result, io, set_default_device};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

/// Rows and columns of a sample grid; a column is a class in a conditional model.
const GRID: (usize, usize) = (8, 10);
/// Steps between checkpoints within an epoch.
const SAVE_EVERY: u64 = 50;
/// Steps before a profile begins: the first ones fill the allocator's cache.
const PROFILE_AFTER: u64 = 10;

/// Trains a DCGAN on handwritten digits and judges what it draws.
///
/// Without options it trains on MNIST where it finds it (KILN_DATA, the cache folder, a download), and on generated
/// digits otherwise. It says which. Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Optimiser steps of the discriminator.
    #[arg(long, default_value_t = 3500)]
    steps: u64,
    /// Passes over the training images, instead of --steps.
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Images in a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Seed of the weights, of the noise and of the order of the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The objective: bce, hinge or wgan-gp (five critic steps for each of the generator's).
    #[arg(long, default_value = "bce")]
    loss: GanLoss,
    /// Draw the digit that is asked for: generator and discriminator get the labels.
    #[arg(long)]
    conditional: bool,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/gan_mnist")]
    out: PathBuf,
    /// Continue from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
    /// Samples to judge at the end; 0 leaves the judgement out.
    #[arg(long, default_value_t = 2000)]
    judge_samples: usize,
    /// Print what this many steps spend their time on, and write it to trace.json in --out for chrome://tracing or ui.perfetto.dev.
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "20")]
    profile: Option<u64>,
    /// Only judge the pictures in this .npy file, of shape (N, 1, 28, 28) with values in [-1, 1].
    #[arg(long)]
    judge: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    if args.judge_samples == 1 {
        return Err(Error::argument("gan_mnist", "--judge-samples must be 0 or at least 2: one picture has no spread to compare"));
    }
    set_default_device(args.device);
    let mnist = Mnist::open(args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("data: {mnist}");
    if let Some(path) = &args.judge {
        println!("{}", judge(&mnist, args.seed)?.judge(&io::npy::load(path)?)?);
        return Ok(());
    }
    let mut run = Run::new(&args, &mnist.train)?;
    if !run.train(&args)? {
        println!("stopped at step {}; continue with: {}", run.trainer.steps(), resume_command(&args));
        return Ok(());
    }
    if args.judge_samples > 0 {
        println!("training a classifier on the training digits to judge the drawn ones …");
        let judge = judge(&mnist, args.seed)?;
        println!("the classifier names {:.2} % of the test digits correctly", 100.0 * judge.accuracy());
        let (pictures, labels) = run.samples(args.judge_samples, args.seed.wrapping_add(1))?;
        println!("{} drawn digits: {}", args.judge_samples, judge.judge(&pictures)?);
        if let Some(labels) = labels {
            println!("{:.1} % of them are the digit that was asked for", 100.0 * judge.agreement(&pictures, &labels)?);
        }
    }
    println!("everything is in {}", args.out.display());
    Ok(())
}

fn judge(mnist: &Mnist, seed: u64) -> Result<DigitJudge> {
    DigitJudge::train(&mnist.train, &mnist.test, 4, seed)
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example gan_mnist -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["gan_mnist"]);
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("steps", args.steps.to_string(), defaults.steps.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("loss", args.loss.to_string(), defaults.loss.to_string());
    add("device", args.device.to_string(), defaults.device.to_string());
    add("judge-samples", args.judge_samples.to_string(), defaults.judge_samples.to_string());
    if let Some(epochs) = args.epochs {
        add("epochs", epochs.to_string(), String::new());
    }
    if let Some(data) = &args.data {
        add("data", data.display().to_string(), String::new());
    }
    if args.conditional {
        command += " --conditional";
    }
    command
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    trainer: GanTrainer,
    loader: Loader<ImageSet>,
    metrics: MetricsCsv,
    /// Noise and labels of the sample grids: the same in every epoch, so that one sees each drawing improve.
    grid_noise: Tensor,
    grid_labels: Option<Tensor>,
    out: PathBuf,
}

impl Run {
    fn new(args: &Args, images: &ImageSet) -> Result<Self> {
        let trainer = GanTrainer::new(GanTrainerOptions::new(args.loss, args.conditional.then_some(10), args.seed))?;
        let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let loader = Loader::new(images.clone().with_scale(Scale::Signed), options)?;
        if loader.batches() == 0 {
            return Err(Error::argument("gan_mnist", format!("{} images do not fill a batch of {}", images.len(), args.batch_size)));
        }
        let grid = GRID.0 * GRID.1;
        let grid_noise = Generator::new(args.seed ^ 0x6121D).randn([grid, trainer.options().model.latent], DType::F32)?;
        let grid_labels = args.conditional.then(|| class_labels(grid)).transpose()?;
        let csv = args.out.join("metrics.csv");
        let columns = ["step", "epoch", "discriminator_loss", "generator_loss"];
        let mut run =
            Self { trainer, loader, metrics: MetricsCsv::create(&csv, &columns)?, grid_noise, grid_labels, out: args.out.clone() };
        if args.resume {
            run.restore()?;
            println!("resumed at step {}", run.trainer.steps());
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self, args: &Args) -> Result<bool> {
        let total = args.epochs.map_or(args.steps, |epochs| epochs.saturating_mul(self.loader.batches()));
        let stop = stop_on_ctrl_c()?;
        let progress = Progress::new(total, "training");
        let mut profile = args.profile.map(|steps| ProfiledSteps::new(self.trainer.steps() + PROFILE_AFTER, steps));
        while self.trainer.steps() < total {
            let epoch = self.loader.state().epoch;
            loop {
                if let Some(profile) = &mut profile {
                    profile.before_step(self.trainer.steps(), &self.out)?;
                }
                let Some(batch) = self.loader.next().transpose()? else { break };
                let labels = args.conditional.then_some(&batch.labels);
                let losses = self.trainer.step(&batch.images, labels)?;
                let step = self.trainer.steps();
                self.metrics.write(&[step as f64, epoch as f64, losses.discriminator, losses.generator])?;
                progress.set(step, &[("D", losses.discriminator), ("G", losses.generator)]);
                if stop.load(Relaxed) {
                    self.save()?;
                    progress.abandon();
                    return Ok(false);
                }
                if step == total {
                    break;
                }
                if step.is_multiple_of(SAVE_EVERY) {
                    self.save()?;
                }
            }
            let pictures = self.trainer.sample(&self.grid_noise, self.grid_labels.as_ref())?;
            save_grid(&self.out.join(format!("epoch_{:03}.png", epoch + 1)), &pictures, GRID.1)?;
            self.plot()?;
            self.save()?;
        }
        progress.finish();
        Ok(true)
    }

    fn plot(&self) -> Result<()> {
        let curves = [
            Curve::new("discriminator", self.metrics.column("discriminator_loss")),
            Curve::new("generator", self.metrics.column("generator_loss")),
        ];
        plot_curves(&self.out.join("losses.png"), "loss", &curves)
    }

    fn checkpoint(&self) -> PathBuf {
        self.out.join("checkpoint.safetensors")
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.flush()?;
        self.loader.state().save_with(self.checkpoint(), self.trainer.state_dict()?)
    }

    fn restore(&mut self) -> Result<()> {
        let (state, position) = LoaderState::load_with(self.checkpoint())?;
        self.trainer.load_state_dict(&state)?;
        self.loader.resume(position)?;
        // What was written after the checkpoint will be written again.
        let steps = self.trainer.steps() as f64;
        self.metrics.restore(|row| row[0] <= steps)
    }

    /// Fresh drawings, and for a conditional model the digits that were asked for.
    fn samples(&self, count: usize, seed: u64) -> Result<(Tensor, Option<Vec<i64>>)> {
        let noise = Generator::new(seed).randn([count, self.trainer.options().model.latent], DType::F32)?;
        let labels = if self.grid_labels.is_some() { Some(class_labels(count)?) } else { None };
        let pictures = self.trainer.sample(&noise, labels.as_ref())?;
        Ok((pictures, labels.map(|l| l.to_vec::<i64>()).transpose()?))
    }
}

/// The steps of `--profile`.
struct ProfiledSteps {
    first: u64,
    end: u64,
    running: Option<Profiler>,
}

impl ProfiledSteps {
    fn new(first: u64, count: u64) -> Self {
        Self { first, end: first.saturating_add(count), running: None }
    }

    /// Starts before the first step; prints and writes before the one after the last.
    fn before_step(&mut self, step: u64, out: &Path) -> Result<()> {
        if step == self.first {
            self.running = Some(Profiler::start());
        }
        if step < self.end {
            return Ok(());
        }
        let Some(profiler) = self.running.take() else { return Ok(()) };
        let report = profiler.stop();
        println!("\nsteps {} to {}:\n{report}\n", self.first + 1, self.end);
        report.write_chrome_trace(out.join("trace.json"))
    }
}

/// 0, 1, …, 9, 0, 1, …
fn class_labels(count: usize) -> Result<Tensor> {
    Tensor::from_vec((0..count as i64).map(|i| i % 10).collect::<Vec<i64>>(), count)
}
