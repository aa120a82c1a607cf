//! Trains a diffusion model on handwritten digits and judges what it draws. `cargo run --example diffusion_mnist`
//!
//! Writes to `out/diffusion_mnist/`: a grid of samples per epoch, the loss curve, `metrics.csv`, and a checkpoint that `--resume` continues
//! bit for bit; at the end `samples.png`, a column for each digit, and `film.png`, the way from noise to digits. A classifier that was
//! trained on the real digits then says which digits were drawn, whether they are those that were asked for, and how far they are from real
//! ones.

use clap::{Parser, ValueEnum};
use kiln::data::{Dataset, ImageSet, Loader, LoaderOptions, LoaderState, Mnist, Scale, Source};
use kiln::diffusion::schedulers::{BetaSchedule, PredictionType, SchedulerClass, SchedulerConfig, SchedulerKind, TimestepSpacing};
use kiln::diffusion::unet::{UNet2dConfig, UNet2dModel};
use kiln::diffusion::{Denoiser, DiffusionTrainer, DiffusionTrainerOptions, Dit, DitConfig, Sampling};
use kiln::metrics::DigitJudge;
use kiln::nn::Params;
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, save_grid, stop_on_ctrl_c};
use kiln::{Error, Profiler, Result, set_default_device};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;

/// Rows and columns of a sample grid; a column is a class.
const GRID: (usize, usize) = (8, 10);
/// Digits, and the label that stands for none of them.
const CLASSES: i64 = 10;
/// Pictures on the film, and states of each.
const FILM: (usize, usize) = (10, 13);
/// Height and width of a picture.
const SIDE: usize = 28;
/// Height and width of the blocks of pixels that the network sees as channels of one: a fourth of the arithmetic.
const BLOCK: usize = 2;
/// Steps between checkpoints within an epoch.
const SAVE_EVERY: u64 = 50;
/// Steps before a profile begins: the first ones fill the allocator's cache.
const PROFILE_AFTER: u64 = 10;
/// Pictures drawn at a time when many are judged.
const CHUNK: usize = 100;

/// What the network predicts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Prediction {
    /// The noise.
    Epsilon,
    /// The velocity of the noise schedule, which is of one size at all timesteps.
    V,
    /// The picture.
    X0,
    /// The direction of the straight way from picture to noise (rectified flow).
    Flow,
}

impl From<Prediction> for PredictionType {
    fn from(prediction: Prediction) -> Self {
        match prediction {
            Prediction::Epsilon => PredictionType::Epsilon,
            Prediction::V => PredictionType::VPrediction,
            Prediction::X0 => PredictionType::Sample,
            Prediction::Flow => PredictionType::FlowPrediction,
        }
    }
}

/// The network.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Model {
    /// Convolutions at two resolutions, attention in the middle.
    Unet,
    /// A transformer of patches.
    Dit,
}

/// Trains a diffusion model on handwritten digits and judges what it draws.
///
/// Without options it trains on MNIST where it finds it (KILN_DATA, the cache folder, a download), and on generated
/// digits otherwise. It says which. Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Optimiser steps.
    #[arg(long, default_value_t = 2500)]
    steps: u64,
    /// Passes over the training images, instead of --steps.
    #[arg(long, conflicts_with = "steps")]
    epochs: Option<u64>,
    /// Images in a step.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// The learning rate at its height; it falls along a cosine.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Seed of the weights, of all noise and of the order of the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The network.
    #[arg(long, value_enum, default_value_t = Model::Unet)]
    model: Model,
    /// What the network predicts.
    #[arg(long, value_enum, default_value_t = Prediction::V)]
    prediction: Prediction,
    /// How the noise grows: squaredcos_cap_v2, linear, scaled_linear or sigmoid.
    #[arg(long, default_value_t = BetaSchedule::SquaredcosCapV2)]
    beta_schedule: BetaSchedule,
    /// Weigh timesteps by min-SNR with this γ (5 in the paper) instead of all alike.
    #[arg(long)]
    min_snr_gamma: Option<f64>,
    #[arg(long, help = format!("How pictures are drawn: {}; ddim if absent, flow-euler with --prediction flow", SchedulerKind::names()))]
    scheduler: Option<SchedulerKind>,
    /// Steps from noise to a picture.
    #[arg(long, default_value_t = 25)]
    sample_steps: usize,
    /// How much more the digit that is asked for counts than the network says; 1 for no guidance.
    #[arg(long, default_value_t = 1.25)]
    guidance: f64,
    /// Half type of the matrix products: bf16 or f16. Without it they are f32.
    #[arg(long)]
    autocast: Option<DType>,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/diffusion_mnist")]
    out: PathBuf,
    /// Continue from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
    /// Samples to judge at the end; 0 leaves the judgement out.
    #[arg(long, default_value_t = 500)]
    judge_samples: usize,
    /// Print what this many steps spend their time on, and write it to trace.json in --out for chrome://tracing or ui.perfetto.dev.
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "20")]
    profile: Option<u64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    if args.judge_samples == 1 {
        return Err(Error::argument("diffusion_mnist", "--judge-samples must be 0 or at least 2: one picture has no spread to compare"));
    }
    set_default_device(args.device);
    let mnist = Mnist::open(args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("data: {mnist}");
    let mut run = Run::new(&args, &mnist.train)?;
    if !run.train(&args)? {
        println!("stopped at step {}; continue with: {}", run.trainer.steps(), resume_command(&args));
        return Ok(());
    }
    run.draw_results()?;
    if args.judge_samples > 0 {
        println!("training a classifier on the training digits to judge the drawn ones …");
        let judge = DigitJudge::train(&mnist.train, &mnist.test, 4, args.seed)?;
        println!("the classifier names {:.2} % of the test digits correctly", 100.0 * judge.accuracy());
        let (pictures, labels) = run.many_samples(args.judge_samples, args.seed.wrapping_add(1))?;
        println!("{} drawn digits: {}", args.judge_samples, judge.judge(&pictures)?);
        println!("{:.1} % of them are the digit that was asked for", 100.0 * judge.agreement(&pictures, &labels)?);
    }
    println!("everything is in {}", args.out.display());
    Ok(())
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example diffusion_mnist -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["diffusion_mnist"]);
    let name = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("steps", args.steps.to_string(), defaults.steps.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("lr", args.lr.to_string(), defaults.lr.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("model", name(&args.model), name(&defaults.model));
    add("prediction", name(&args.prediction), name(&defaults.prediction));
    add("beta-schedule", args.beta_schedule.to_string(), defaults.beta_schedule.to_string());
    add("sample-steps", args.sample_steps.to_string(), defaults.sample_steps.to_string());
    add("guidance", args.guidance.to_string(), defaults.guidance.to_string());
    add("judge-samples", args.judge_samples.to_string(), defaults.judge_samples.to_string());
    let mut add_given = |name: &str, value: Option<String>| add(name, value.unwrap_or_default(), String::new());
    add_given("epochs", args.epochs.map(|epochs| epochs.to_string()));
    add_given("min-snr-gamma", args.min_snr_gamma.map(|gamma| gamma.to_string()));
    add_given("scheduler", args.scheduler.map(|kind| kind.to_string()));
    add_given("autocast", args.autocast.map(|dtype| dtype.to_string()));
    add_given("data", args.data.as_ref().map(|folder| folder.display().to_string()));
    add("device", args.device.to_string(), defaults.device.to_string());
    command
}

/// Pictures (B, 1, 28, 28) with each block of pixels as channels: (B, 4, 14, 14).
fn to_blocks(pictures: &Tensor) -> Result<Tensor> {
    let [b, c, h, w] = pictures.dims_n("to_blocks")?;
    let split = pictures.reshape([b, c, h / BLOCK, BLOCK, w / BLOCK, BLOCK])?.permute(&[0, 1, 3, 5, 2, 4])?;
    split.reshape([b, c * BLOCK * BLOCK, h / BLOCK, w / BLOCK])
}

/// The inverse of [`to_blocks`].
fn from_blocks(blocks: &Tensor) -> Result<Tensor> {
    let [b, c, h, w] = blocks.dims_n("from_blocks")?;
    let split = blocks.reshape([b, c / (BLOCK * BLOCK), BLOCK, BLOCK, h, w])?.permute(&[0, 1, 4, 2, 5, 3])?;
    split.reshape([b, c / (BLOCK * BLOCK), h * BLOCK, w * BLOCK])
}

/// Noise for `count` pictures, as the network sees them.
fn noise(count: usize, seed: u64) -> Result<Tensor> {
    Generator::new(seed).randn([count, BLOCK * BLOCK, SIDE / BLOCK, SIDE / BLOCK], ())
}

/// 0, 1, …, 9, 0, 1, …
fn class_labels(count: usize) -> Result<Tensor> {
    Tensor::from_vec((0..count as i64).map(|i| i % CLASSES).collect::<Vec<i64>>(), count)
}

fn network(model: Model, params: &Params) -> Result<Box<dyn Denoiser>> {
    let channels = BLOCK * BLOCK;
    Ok(match model {
        Model::Unet => {
            let config = UNet2dConfig {
                in_channels: channels,
                out_channels: channels,
                block_out_channels: vec![32, 64],
                down_block_types: vec!["DownBlock2D".into(); 2],
                up_block_types: vec!["UpBlock2D".into(); 2],
                norm_num_groups: 16,
                attention_head_dim: Some(32),
                num_class_embeds: Some(CLASSES as usize + 1),
                ..UNet2dConfig::default()
            };
            Box::new(UNet2dModel::new(params, &config)?)
        }
        Model::Dit => {
            let config = DitConfig {
                num_attention_heads: 4,
                attention_head_dim: 32,
                in_channels: channels,
                num_layers: 6,
                sample_size: SIDE / BLOCK,
                num_embeds_ada_norm: CLASSES as usize,
                ..DitConfig::default()
            };
            Box::new(Dit::new(params, &config)?)
        }
    })
}

/// The noise of training, as the configuration of the default way to draw.
fn noise_schedule(args: &Args) -> SchedulerConfig {
    if args.prediction == Prediction::Flow {
        return SchedulerConfig::new(SchedulerClass::FlowEuler);
    }
    SchedulerConfig {
        beta_schedule: Some(args.beta_schedule),
        // Said, because not every scheduler has these for its defaults.
        beta_start: Some(1e-4),
        beta_end: Some(0.02),
        prediction_type: Some(args.prediction.into()),
        // From the last timestep, where nothing but noise is left.
        timestep_spacing: Some(TimestepSpacing::Trailing),
        // DDIM takes the noise of the picture before it is clipped: with guidance, whose pictures often leave the range, each step would add ink.
        clip_sample: Some(false),
        ..SchedulerConfig::new(SchedulerClass::Ddim)
    }
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    trainer: DiffusionTrainer<Box<dyn Denoiser>>,
    loader: Loader<ImageSet>,
    metrics: MetricsCsv,
    /// How pictures are drawn.
    scheduler: SchedulerConfig,
    sampling: Sampling,
    seed: u64,
    total: u64,
    out: PathBuf,
}

impl Run {
    fn new(args: &Args, images: &ImageSet) -> Result<Self> {
        let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let loader = Loader::new(images.clone().with_scale(Scale::Signed), options)?;
        if loader.batches() == 0 {
            let message = format!("{} images do not fill a batch of {}", images.len(), args.batch_size);
            return Err(Error::argument("diffusion_mnist", message));
        }
        let total = args.epochs.map_or(args.steps, |epochs| epochs.saturating_mul(loader.batches()));
        let noise = noise_schedule(args);
        let scheduler = args.scheduler.map_or_else(|| noise.clone(), |kind| noise.with_kind(kind));
        // What cannot draw is refused before the training.
        scheduler.build()?.set_timesteps(args.sample_steps)?;
        let params = Params::seeded(args.seed);
        let options = DiffusionTrainerOptions {
            min_snr_gamma: args.min_snr_gamma,
            unconditional: Some(Tensor::from_vec(vec![CLASSES], ())?),
            lr: args.lr,
            betas: (0.9, 0.99),
            steps: total,
            warmup_steps: 100.min(total / 10),
            autocast: args.autocast,
            seed: args.seed,
            ..DiffusionTrainerOptions::new(noise)
        };
        let trainer = DiffusionTrainer::new(network(args.model, &params)?, &params, options)?;
        let metrics = MetricsCsv::create(&args.out.join("metrics.csv"), &["step", "epoch", "loss", "grad_norm", "lr"])?;
        let sampling = Sampling { steps: args.sample_steps, guidance: args.guidance, ..Sampling::default() };
        let mut run = Self { trainer, loader, metrics, scheduler, sampling, seed: args.seed, total, out: args.out.clone() };
        if args.resume {
            run.restore()?;
            println!("resumed at step {}", run.trainer.steps());
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self, args: &Args) -> Result<bool> {
        let stop = stop_on_ctrl_c()?;
        println!("{} steps of {} pictures", self.total, args.batch_size);
        let progress = Progress::new(self.total, "training");
        let mut profile = args.profile.map(|steps| ProfiledSteps::new(self.trainer.steps() + PROFILE_AFTER, steps));
        while self.trainer.steps() < self.total {
            let epoch = self.loader.state().epoch;
            loop {
                if let Some(profile) = &mut profile {
                    profile.before_step(self.trainer.steps(), &self.out)?;
                }
                let Some(batch) = self.loader.next().transpose()? else { break };
                let done = self.trainer.step(&to_blocks(&batch.images)?, Some(&batch.labels))?;
                let step = self.trainer.steps();
                self.metrics.write(&[step as f64, epoch as f64, done.loss, done.grad_norm, done.lr])?;
                progress.set(step, &[("loss", done.loss)]);
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
            let (pictures, _) = self.samples(GRID.0 * GRID.1, self.seed ^ 0x6121D, 0)?;
            save_grid(&self.out.join(format!("epoch_{:03}.png", epoch + 1)), &pictures, GRID.1)?;
            plot_curves(&self.out.join("losses.png"), "loss", &[Curve::new("training", self.metrics.column("loss"))])?;
            self.save()?;
        }
        progress.finish();
        Ok(true)
    }

    /// `count` pictures (N, 1, 28, 28) of the digits 0, 1, …, 9, 0, …, and `frames` states of each on the way.
    fn samples(&mut self, count: usize, seed: u64, frames: usize) -> Result<(Tensor, Vec<Tensor>)> {
        let mut scheduler = self.scheduler.build()?;
        let sampling = Sampling { condition: Some(class_labels(count)?), frames, ..self.sampling.clone() };
        let drawn = self.trainer.sample(scheduler.as_mut(), &noise(count, seed)?, &sampling, &Generator::new(!seed))?;
        Ok((from_blocks(&drawn.pictures)?, drawn.frames.iter().map(from_blocks).collect::<Result<_>>()?))
    }

    /// Many pictures in parts, held to the range of real ones, and the digits that were asked for.
    fn many_samples(&mut self, count: usize, seed: u64) -> Result<(Tensor, Vec<i64>)> {
        let progress = Progress::new(count as u64, "drawing");
        let mut parts = Vec::new();
        for (i, start) in (0..count).step_by(CHUNK).enumerate() {
            parts.push(self.samples(CHUNK.min(count - start), seed.wrapping_add((i as u64) << 32), 0)?.0);
            progress.set((start + CHUNK).min(count) as u64, &[]);
        }
        progress.finish();
        let pictures = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?.clamp(-1.0, 1.0)?;
        Ok((pictures, class_labels(count)?.to_vec()?))
    }

    /// A grid with a column for each digit, and the film of how some came about.
    fn draw_results(&mut self) -> Result<()> {
        let (pictures, _) = self.samples(GRID.0 * GRID.1, self.seed.wrapping_add(2), 0)?;
        save_grid(&self.out.join("samples.png"), &pictures, GRID.1)?;
        let (_, frames) = self.samples(FILM.0, self.seed.wrapping_add(3), FILM.1)?;
        let film = Tensor::stack(&frames.iter().collect::<Vec<_>>(), 1)?.flatten(0, 1)?; // a row for each picture
        save_grid(&self.out.join("film.png"), &film, frames.len())
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
