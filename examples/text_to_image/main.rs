//! Text to image, the whole of it in small: an autoencoder, CLIP's text tower and a latent U-Net learn captioned pictures, and draw what a
//! sentence says. `cargo run --example text_to_image`
//!
//! Writes to `out/text_to_image/`: for each stage a folder with its loss curve, `metrics.csv`, pictures and a checkpoint that `--resume`
//! continues bit for bit; the networks in `model/`, each as Hugging Face's libraries read it; and `samples.png`, whose prompts ask for
//! combinations that were kept from training. A classifier judges them. Then `--prompt` draws, `--lora` learns a style from a few pictures,
//! and `--controlnet` learns to follow edges.

mod autoencoder;
mod control;
mod data;
mod judge;
mod painter;
mod stage;
mod studio;
mod style;
mod towers;

use clap::Parser;
use kiln::data::{Mnist, Source, Style};
use kiln::diffusion::Sampling;
use kiln::diffusion::schedulers::SchedulerKind;
use kiln::lora::Lora;
use kiln::prelude::*;
use kiln::report::stop_on_ctrl_c;
use kiln::{Error, Result, set_default_device};
use stage::{Stage, checkpoint};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use studio::{Studio, open_unet};

/// Height and width of a picture.
const SIDE: usize = 32;
/// Real pictures that the judge is measured on, for each drawn one that it judges.
const REAL_PER_DRAWN: usize = 4;
/// The stages, in order.
const STAGES: [&str; 4] = ["vae", "clip", "judge", "unet"];

/// Trains a text-to-image model on captioned pictures of digits and coloured shapes: "a small red seven on the left".
///
/// The digits are MNIST's where it is found (KILN_DATA, the cache folder, a download), and generated ones otherwise. It says which. Every
/// seventh combination of size, colour, object and place is kept from training, and asked for at the end. Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Steps of the U-Net.
    #[arg(long, default_value_t = 5000)]
    steps: u64,
    /// Steps of the autoencoder.
    #[arg(long, default_value_t = 4000)]
    vae_steps: u64,
    /// Steps of CLIP's towers.
    #[arg(long, default_value_t = 2500)]
    clip_steps: u64,
    /// Steps of the classifier that judges.
    #[arg(long, default_value_t = 3000)]
    judge_steps: u64,
    /// Pictures in a step of the U-Net.
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// The U-Net's learning rate at its height; it falls along a cosine.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Seed of all weights, noise and pictures.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[arg(long, default_value = "ddim", help = format!("How pictures are drawn: {}", SchedulerKind::names()))]
    scheduler: SchedulerKind,
    /// Steps from noise to a picture.
    #[arg(long, default_value_t = 20)]
    sample_steps: usize,
    /// How much more the text counts than the network says; 1 for no guidance.
    #[arg(long, default_value_t = 3.0)]
    guidance: f64,
    /// Half type of the U-Net's products: bf16 or f16. Without it they are f32.
    #[arg(long)]
    autocast: Option<DType>,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/text_to_image")]
    out: PathBuf,
    /// Continue from the checkpoints in --out.
    #[arg(long)]
    resume: bool,
    /// Pictures to draw and judge at the end.
    #[arg(long, default_value_t = 500)]
    judge_samples: usize,
    /// Draw these texts with the model in --out instead of training; can be repeated. With --lora, in the style that was learnt.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Learn a style from a few pictures with the model in --out: outline, pastel or inverted.
    #[arg(long, value_name = "STYLE", num_args = 0..=1, default_missing_value = "outline")]
    lora: Option<Style>,
    /// Steps of --lora.
    #[arg(long, default_value_t = 1200)]
    lora_steps: u64,
    /// Pictures that --lora learns from.
    #[arg(long, default_value_t = 48)]
    lora_pictures: usize,
    /// Rank of --lora's matrices.
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// Learn to follow edge maps with the model in --out.
    #[arg(long, conflicts_with = "lora")]
    controlnet: bool,
    /// Steps of --controlnet.
    #[arg(long, default_value_t = 600)]
    control_steps: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    if args.judge_samples == 0 || args.batch_size == 0 {
        return Err(Error::argument("text_to_image", "--judge-samples and --batch-size must be at least 1"));
    }
    set_default_device(args.device);
    let program = Program { stop: stop_on_ctrl_c()?, args };
    if !program.args.prompt.is_empty() {
        return program.draw();
    }
    let mnist = Mnist::open(program.args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("digits: {mnist}");
    let done = match program.args {
        Args { lora: Some(style), .. } => program.learn_style(&mnist, style)?,
        Args { controlnet: true, .. } => program.learn_edges(&mnist)?,
        _ => program.train(&mnist)?,
    };
    match done {
        true => println!("everything is in {}", program.args.out.display()),
        false => println!("continue with: {}", resume_command(&program.args)),
    }
    Ok(())
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example text_to_image -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["text_to_image"]);
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("steps", args.steps.to_string(), defaults.steps.to_string());
    add("vae-steps", args.vae_steps.to_string(), defaults.vae_steps.to_string());
    add("clip-steps", args.clip_steps.to_string(), defaults.clip_steps.to_string());
    add("judge-steps", args.judge_steps.to_string(), defaults.judge_steps.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("lr", args.lr.to_string(), defaults.lr.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("scheduler", args.scheduler.to_string(), defaults.scheduler.to_string());
    add("sample-steps", args.sample_steps.to_string(), defaults.sample_steps.to_string());
    add("guidance", args.guidance.to_string(), defaults.guidance.to_string());
    add("judge-samples", args.judge_samples.to_string(), defaults.judge_samples.to_string());
    add("lora-steps", args.lora_steps.to_string(), defaults.lora_steps.to_string());
    add("lora-pictures", args.lora_pictures.to_string(), defaults.lora_pictures.to_string());
    add("lora-rank", args.lora_rank.to_string(), defaults.lora_rank.to_string());
    add("control-steps", args.control_steps.to_string(), defaults.control_steps.to_string());
    add("device", args.device.to_string(), defaults.device.to_string());
    let mut add_given = |name: &str, value: Option<String>| add(name, value.unwrap_or_default(), String::new());
    add_given("lora", args.lora.map(|style| style.to_string()));
    add_given("autocast", args.autocast.map(|dtype| dtype.to_string()));
    add_given("data", args.data.as_ref().map(|folder| folder.display().to_string()));
    if args.controlnet {
        command += " --controlnet";
    }
    command
}

/// What was asked for, and the flag that Ctrl-C raises.
struct Program {
    args: Args,
    stop: Arc<AtomicBool>,
}

impl Program {
    fn stage<'a>(&'a self, name: &'a str, total: u64, batch_size: usize) -> Stage<'a> {
        let folder = self.args.out.join(name);
        Stage { name, folder, total, batch_size, seed: self.args.seed, resume: self.args.resume, stop: &self.stop }
    }

    fn model(&self) -> PathBuf {
        self.args.out.join("model")
    }

    fn studio(&self) -> Result<Studio> {
        let Args { sample_steps, guidance, autocast, scheduler, .. } = self.args;
        Studio::open(&self.model(), scheduler, Sampling { steps: sample_steps, guidance, autocast, ..Sampling::default() })
    }

    /// An error unless the U-Net has been trained.
    fn expect_model(&self) -> Result<()> {
        let config = self.model().join("unet/config.json");
        match config.exists() {
            true => Ok(()),
            false => Err(Error::argument("text_to_image", format!("{} is missing: train first, without options", config.display()))),
        }
    }

    /// All stages and the judgement; `false` if Ctrl-C stopped it.
    fn train(&self, mnist: &Mnist) -> Result<bool> {
        let (args, model) = (&self.args, self.model());
        let first = checkpoint(&args.out.join(STAGES[0]));
        if args.resume && !first.exists() {
            return Err(Error::argument("text_to_image", format!("{} is missing: there is nothing to resume", first.display())));
        }
        if !args.resume {
            // A later --resume must not find those of another run.
            for old in STAGES.map(|stage| checkpoint(&args.out.join(stage))).iter().filter(|old| old.exists()) {
                std::fs::remove_file(old).map_err(|e| Error::io("text_to_image", old.display(), e))?;
            }
        }
        if !autoencoder::train(&self.stage("vae", args.vae_steps, 32), &mnist.train, &model)?
            || !towers::train(&self.stage("clip", args.clip_steps, 128), &mnist.train, &model)?
        {
            return Ok(false);
        }
        let Some(judge) = self.judge(mnist, args.resume)? else { return Ok(false) };
        let studio = self.studio()?;
        if !painter::train(&self.stage("unet", args.steps, args.batch_size), &studio, mnist, &model, args.lr, args.autocast)? {
            return Ok(false);
        }
        painter::examine(&studio, &judge, mnist, &model, &args.out, args.judge_samples, args.seed.wrapping_add(10))?;
        Ok(true)
    }

    /// The judge, if Ctrl-C does not stop its training; with `resume`, the one that was trained.
    fn judge(&self, mnist: &Mnist, resume: bool) -> Result<Option<judge::Judge>> {
        let stage = Stage { resume, ..self.stage("judge", self.args.judge_steps, 64) };
        judge::train(&stage, mnist, REAL_PER_DRAWN * self.args.judge_samples)
    }

    fn learn_style(&self, mnist: &Mnist, style: Style) -> Result<bool> {
        self.expect_model()?;
        let Some(judge) = self.judge(mnist, true)? else { return Ok(false) };
        let Args { lora_rank: rank, lora_pictures: pictures, judge_samples: judged, .. } = self.args;
        let name = format!("lora_{style}");
        let stage = self.stage(&name, self.args.lora_steps, pictures.min(16));
        style::learn(&stage, &self.studio()?, &judge, mnist, &self.model(), &style::Wanted { style, rank, pictures, judged })
    }

    fn learn_edges(&self, mnist: &Mnist) -> Result<bool> {
        self.expect_model()?;
        let Some(judge) = self.judge(mnist, true)? else { return Ok(false) };
        let stage = self.stage("controlnet", self.args.control_steps, self.args.batch_size);
        control::learn(&stage, &self.studio()?, &judge, mnist, &self.model(), self.args.judge_samples)
    }

    /// With `--prompt`.
    fn draw(&self) -> Result<()> {
        self.expect_model()?;
        let (params, unet) = open_unet(&self.model())?;
        let adapter = |style| Lora::load(&params, self.args.out.join(format!("lora_{style}/adapter")));
        let _lora = self.args.lora.map(adapter).transpose()?;
        painter::draw_prompts(&self.studio()?, &unet, &self.args.prompt, &self.args.out.join("prompt.png"), self.args.seed)
    }
}
