//! Trains a variational autoencoder on handwritten digits and judges what it draws. `cargo run --example vae_mnist`
//!
//! Writes to `out/vae_mnist/`: reconstructions (`reconstructions.png`, originals in every other row), samples, loss curves, `metrics.csv`,
//! and a checkpoint that `--resume` continues bit for bit. A second model, with latents of two numbers only, gives a map of its latent plane
//! in `map/`: what is drawn at each place, and where the test digits lie. At the end a classifier that was trained on the real digits says
//! how many reconstructions are still the same digit, and how far samples are from real digits.

use clap::Parser;
use kiln::data::{Dataset, ImageBatch, ImageSet, Loader, LoaderOptions, LoaderState, Mnist, Rng, Scale, Source};
use kiln::metrics::DigitJudge;
use kiln::prelude::*;
use kiln::report::{Cloud, Curve, MetricsCsv, Progress, plot_clouds, plot_curves, save_grid, stop_on_ctrl_c};
use kiln::vae::{DigitVae, DigitVaeConfig, VaeTrainer, VaeTrainerOptions};
use kiln::{Error, Result, set_default_device};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Columns of the grids of reconstructions and samples.
const COLUMNS: usize = 12;
/// Pictures along each side of the latent map.
const MAP: usize = 20;
/// Test digits in the picture of where they lie.
const SCATTERED: usize = 2000;
/// Steps between checkpoints within an epoch.
const SAVE_EVERY: u64 = 100;

/// Trains a variational autoencoder on handwritten digits and judges what it draws.
///
/// Without options it trains on MNIST where it finds it (KILN_DATA, the cache folder, a download), and on generated digits otherwise. It
/// says which. Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Optimiser steps of each model.
    #[arg(long, default_value_t = 2100)]
    steps: u64,
    /// Passes over the training images, instead of --steps.
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Images in a step.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// Seed of the weights, of the noise and of the order of the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Length of a latent vector.
    #[arg(long, default_value_t = 16)]
    latent: usize,
    /// Channels of the larger feature map.
    #[arg(long, default_value_t = 32)]
    width: usize,
    /// Adam's learning rate; it falls to a tenth along a cosine.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Weight of the divergence: twice the variance that pixels are taken to have about the reconstruction.
    #[arg(long, default_value_t = 0.5)]
    kl_weight: f64,
    /// Leave the model with two latents and its map out.
    #[arg(long)]
    no_map: bool,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/vae_mnist")]
    out: PathBuf,
    /// Continue from the checkpoints in --out.
    #[arg(long)]
    resume: bool,
    /// Samples to judge at the end; 0 leaves the judgement out.
    #[arg(long, default_value_t = 2000)]
    judge_samples: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    if args.judge_samples == 1 {
        return Err(Error::argument("vae_mnist", "--judge-samples must be 0 or at least 2: one picture has no spread to compare"));
    }
    set_default_device(args.device);
    let mnist = Mnist::open(args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("data: {mnist}");
    let map = args.out.join("map");
    if !args.resume {
        // A later --resume must not find those of another run.
        for old in [checkpoint(&args.out), checkpoint(&map)].iter().filter(|old| old.exists()) {
            std::fs::remove_file(old).map_err(|e| Error::io("vae_mnist", old.display(), e))?;
        }
    }
    let stop = stop_on_ctrl_c()?;
    let Some(run) = train(&args, args.latent, args.out.clone(), &mnist, &stop)? else { return Ok(()) };
    let with_map = !args.no_map && args.latent != 2;
    if with_map && train(&args, 2, map, &mnist, &stop)?.is_none() {
        return Ok(());
    }
    if args.judge_samples > 0 {
        run.judge(&mnist, args.judge_samples, args.seed)?;
    }
    println!("everything is in {}", args.out.display());
    Ok(())
}

/// The checkpoint of the model in `folder`.
fn checkpoint(folder: &Path) -> PathBuf {
    folder.join("checkpoint.safetensors")
}

/// Trains a model with latents of `latent` numbers and draws what it does; nothing if Ctrl-C stopped it.
fn train(args: &Args, latent: usize, out: PathBuf, mnist: &Mnist, stop: &Arc<AtomicBool>) -> Result<Option<Run>> {
    println!("a model with {latent} latents, in {}", out.display());
    let mut run = Run::new(args, latent, out, mnist)?;
    if !run.train(stop)? {
        println!("stopped at step {}; continue with: {}", run.trainer.steps(), resume_command(args));
        return Ok(None);
    }
    if latent == 2 {
        run.draw_map()?;
    }
    Ok(Some(run))
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example vae_mnist -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["vae_mnist"]);
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("steps", args.steps.to_string(), defaults.steps.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("latent", args.latent.to_string(), defaults.latent.to_string());
    add("width", args.width.to_string(), defaults.width.to_string());
    add("lr", args.lr.to_string(), defaults.lr.to_string());
    add("kl-weight", args.kl_weight.to_string(), defaults.kl_weight.to_string());
    add("device", args.device.to_string(), defaults.device.to_string());
    add("judge-samples", args.judge_samples.to_string(), defaults.judge_samples.to_string());
    if let Some(epochs) = args.epochs {
        add("epochs", epochs.to_string(), String::new());
    }
    if let Some(data) = &args.data {
        add("data", data.display().to_string(), String::new());
    }
    if args.no_map {
        command += " --no-map";
    }
    command
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    trainer: VaeTrainer<DigitVae>,
    loader: Loader<ImageSet>,
    metrics: MetricsCsv,
    total: u64,
    test: ImageSet,
    /// Noise of the samples: the same in every epoch, so that one sees each drawing improve.
    grid_noise: Tensor,
    out: PathBuf,
}

impl Run {
    fn new(args: &Args, latent: usize, out: PathBuf, mnist: &Mnist) -> Result<Self> {
        let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let loader = Loader::new(mnist.train.clone().with_scale(Scale::Signed), options)?;
        if loader.batches() == 0 {
            return Err(Error::argument("vae_mnist", format!("{} images do not fill a batch of {}", mnist.train.len(), args.batch_size)));
        }
        let total = args.epochs.map_or(args.steps, |epochs| epochs.saturating_mul(loader.batches()));
        let params = Params::seeded(args.seed);
        let model = DigitVae::new(&params, DigitVaeConfig { latent, width: args.width })?;
        let options = VaeTrainerOptions { lr: args.lr, steps: Some(total), penalty_weight: args.kl_weight, ..VaeTrainerOptions::default() };
        let metrics = MetricsCsv::create(&out.join("metrics.csv"), &["step", "epoch", "loss", "reconstruction", "kl"])?;
        let grid_noise = Generator::new(args.seed ^ 0x6121D).randn([8 * COLUMNS, latent], DType::F32)?;
        let test = mnist.test.clone().with_scale(Scale::Signed);
        let trainer = VaeTrainer::new(model, params, options)?;
        let mut run = Self { trainer, loader, metrics, total, test, grid_noise, out };
        // The map's model may not have begun when the run was stopped.
        if args.resume && (latent == args.latent || checkpoint(&run.out).exists()) {
            run.restore()?;
            println!("resumed at step {}", run.trainer.steps());
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self, stop: &AtomicBool) -> Result<bool> {
        let progress = Progress::new(self.total, "training");
        while self.trainer.steps() < self.total {
            let epoch = self.loader.state().epoch;
            while let Some(batch) = self.loader.next().transpose()? {
                let losses = self.trainer.step(&batch.images)?;
                let step = self.trainer.steps();
                // In nats a picture.
                let kl = losses.penalty * (batch.images.numel() / batch.images.dim(0)?) as f64;
                self.metrics.write(&[step as f64, epoch as f64, losses.loss, losses.reconstruction, kl])?;
                progress.set(step, &[("error", losses.reconstruction), ("KL", kl)]);
                if stop.load(Relaxed) {
                    self.save()?;
                    progress.abandon();
                    return Ok(false);
                }
                if step == self.total {
                    break;
                }
                if step.is_multiple_of(SAVE_EVERY) {
                    self.save()?;
                }
            }
            self.draw()?;
            self.save()?;
        }
        progress.finish();
        Ok(true)
    }

    /// The first `count` test digits.
    fn test_digits(&self, count: usize) -> Result<ImageBatch> {
        let indices: Vec<usize> = (0..count.min(self.test.len())).collect();
        self.test.batch(&indices, &mut Rng::new(0))
    }

    /// What becomes of pictures that are encoded and decoded.
    fn reconstructed(&self, pictures: &Tensor) -> Result<Tensor> {
        self.trainer.evaluate(|model| model.decode(&model.encode(pictures)?.mode()))
    }

    fn draw(&self) -> Result<()> {
        let originals = self.test_digits(4 * COLUMNS)?.images;
        let decoded = self.reconstructed(&originals)?;
        let count = originals.dim(0)?;
        let mut rows = Vec::new();
        for start in (0..count).step_by(COLUMNS).filter(|start| start + COLUMNS <= count) {
            rows.push(originals.narrow(0, start, COLUMNS)?);
            rows.push(decoded.narrow(0, start, COLUMNS)?);
        }
        if !rows.is_empty() {
            save_grid(&self.out.join("reconstructions.png"), &Tensor::cat(&rows, 0)?, COLUMNS)?;
        }
        let samples = self.trainer.evaluate(|model| model.decode(&self.grid_noise))?;
        save_grid(&self.out.join("samples.png"), &samples, COLUMNS)?;
        let curve = |title: &str, name: &str| {
            plot_curves(&self.out.join(format!("{name}.png")), title, &[Curve::new(title, self.metrics.column(name))])
        };
        curve("squared error of a pixel", "reconstruction")?;
        curve("divergence of the latents (nats)", "kl")
    }

    /// The plane of two latents: what is drawn at its quantiles, and where test digits lie.
    fn draw_map(&self) -> Result<()> {
        let axis = normal_quantiles(MAP)?;
        let points = (0..MAP * MAP).flat_map(|i| [axis[i % MAP], axis[MAP - 1 - i / MAP]]).collect::<Vec<f32>>();
        let points = Tensor::from_vec(points, [MAP * MAP, 2])?;
        let drawn = self.trainer.evaluate(|model| model.decode(&points))?;
        save_grid(&self.out.join("latent_map.png"), &drawn, MAP)?;
        let digits = self.test_digits(SCATTERED)?;
        let places = self.trainer.evaluate(|model| model.encode(&digits.images))?.mean.to_vec::<f32>()?;
        let labels = digits.labels.to_vec::<i64>()?;
        let cloud = |class: i64| {
            let of_class = places.chunks_exact(2).zip(&labels).filter(|(_, label)| **label == class);
            Cloud::new(class.to_string(), of_class.map(|(place, _)| (f64::from(place[0]), f64::from(place[1]))).collect())
        };
        plot_clouds(&self.out.join("latent_digits.png"), "latents of test digits", &(0..10).map(cloud).collect::<Vec<_>>())
    }

    /// What a classifier says of reconstructions and samples.
    fn judge(&self, mnist: &Mnist, count: usize, seed: u64) -> Result<()> {
        println!("training a classifier on the training digits to judge the drawn ones …");
        let judge = DigitJudge::train(&mnist.train, &mnist.test, 4, seed)?;
        let real = self.test_digits(count)?;
        let labels = real.labels.to_vec::<i64>()?;
        let decoded = self.reconstructed(&real.images)?;
        let (before, after) = (judge.agreement(&real.images, &labels)?, judge.agreement(&decoded, &labels)?);
        let error = decoded.mse_loss(&real.images)?.item_f64()?;
        println!("squared error of a pixel of {} test digits, of a range of 2: {error:.4}", labels.len());
        println!("the classifier names {:.2} % of them correctly, and {:.2} % of their reconstructions", 100.0 * before, 100.0 * after);
        println!("reconstructions: {}", judge.judge(&decoded)?);
        let noise = Generator::new(seed.wrapping_add(1)).randn([count, self.trainer.model().config().latent], DType::F32)?;
        println!("samples: {}", judge.judge(&self.trainer.evaluate(|model| model.decode(&noise))?)?);
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        self.metrics.flush()?;
        self.loader.state().save_with(checkpoint(&self.out), self.trainer.state_dict()?)
    }

    fn restore(&mut self) -> Result<()> {
        let (state, position) = LoaderState::load_with(checkpoint(&self.out))?;
        self.trainer.load_state_dict(&state)?;
        self.loader.resume(position)?;
        // What was written after the checkpoint will be written again.
        let steps = self.trainer.steps() as f64;
        self.metrics.restore(|row| row[0] <= steps)
    }
}

/// The points of the standard normal distribution between which lie equal shares: Φ⁻¹((i + ½) / n), by bisection.
fn normal_quantiles(n: usize) -> Result<Vec<f32>> {
    let shares = Tensor::from_vec((0..n).map(|i| (i as f64 + 0.5) / n as f64).collect(), n)?;
    let (mut low, mut high) = (shares.full_like(-8.0)?, shares.full_like(8.0)?);
    for _ in 0..60 {
        let middle = low.add(&high)?.mul_scalar(0.5)?;
        // Φ(x) = ½ (1 + erf(x / √2))
        let below = middle.mul_scalar(std::f64::consts::FRAC_1_SQRT_2)?.erf()?.add_scalar(1.0)?.mul_scalar(0.5)?.lt(&shares)?;
        (low, high) = (below.where_cond(&middle, &low)?, below.where_cond(&high, &middle)?);
    }
    Ok(low.to_vec::<f64>()?.into_iter().map(|x| x as f32).collect())
}
