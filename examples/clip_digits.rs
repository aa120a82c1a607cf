//! Trains CLIP's two towers on captioned pictures and asks them about combinations they never saw. `cargo run --example clip_digits`
//!
//! Writes to `out/clip_digits/`: loss and accuracy curves, `metrics.csv`, a grid of the pictures that prompts found, a checkpoint that
//! `--resume` continues bit for bit, and the model as a folder that `--prompt` and Hugging Face's transformers load.

use clap::Parser;
use kiln::clip::{
    ClipConfig, ClipModel, ClipTextConfig, ClipVisionConfig, contrastive_loss, normalize, recall_at, similarity, zero_shot_classes,
};
use kiln::data::{
    Attributes, CaptionedOptions, CaptionedPictures, Combinations, Dataset, Loader, LoaderOptions, LoaderState, Mnist, Rng, Source,
};
use kiln::nn::{LoadMode, Params, StateDict};
use kiln::optim::{AdamW, AdamWOptions, Schedule};
use kiln::prelude::*;
use kiln::pretrained::{load_pretrained, save_pretrained};
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, save_grid, stop_on_ctrl_c};
use kiln::text::WordTokenizer;
use kiln::{Error, Result, io, set_default_device};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

/// Pictures of an epoch; each is drawn when it is asked for.
const SAMPLES: usize = 1 << 20;
/// Steps between checkpoints.
const SAVE_EVERY: u64 = 100;
/// Steps of rising learning rate.
const WARMUP: u64 = 100;
/// Prompts in the grid, and pictures that are shown for each.
const GRID: (usize, usize) = (8, 8);
/// Pictures or texts at a time in evaluation.
const CHUNK: usize = 500;
/// What the numbers of a picture's labels are called.
const NAMES: [&str; 4] = ["size", "colour", "object", "place"];

/// Trains CLIP on captioned pictures: digits and coloured shapes, "a small red seven on the left".
///
/// The digits are MNIST's where it is found (KILN_DATA, the cache folder, a download), and generated ones otherwise. It says which. Every
/// seventh combination of size, colour, object and place is kept from training and measured with. Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Training steps.
    #[arg(long, default_value_t = 4000)]
    steps: u64,
    /// Pictures in a step; the more, the more there are to tell apart.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// Pictures of a step that differ in one attribute only, by turns the object and the place; with 1 the others tell nearly all apart.
    #[arg(long, default_value_t = 8)]
    alike: usize,
    /// Highest learning rate.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Width of both towers.
    #[arg(long, default_value_t = 96)]
    width: usize,
    /// Blocks of the image tower; the text tower has half as many.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Seed of the weights and of the pictures.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Steps between measurements.
    #[arg(long, default_value_t = 250)]
    eval_every: u64,
    /// Pictures to measure with.
    #[arg(long, default_value_t = 1000)]
    eval_samples: usize,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/clip_digits")]
    out: PathBuf,
    /// Continue from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
    /// Find the pictures that fit these texts best, with the model in --out, instead of training.
    #[arg(long, num_args = 1.., value_name = "TEXT")]
    prompt: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    if args.eval_every == 0 || args.eval_samples == 0 || args.layers == 0 {
        return Err(Error::argument("clip_digits", "--eval-every, --eval-samples and --layers must be at least 1"));
    }
    set_default_device(args.device);
    let mnist = Mnist::open(args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("digits: {mnist}");
    if !args.prompt.is_empty() {
        return answer(&args, &mnist);
    }
    let mut run = Run::new(&args, &mnist)?;
    if !run.train(&args)? {
        println!("stopped at step {}; continue with: {}", run.step, resume_command(&args));
        return Ok(());
    }
    println!("{} pictures of held-out combinations: {}", run.exam.pictures.dim(0)?, run.exam.judge(&run.model)?);
    let prompts: Vec<String> = run.exam.attributes.iter().take(GRID.0).map(Attributes::to_string).collect();
    let grid = args.out.join("retrieval.png");
    show(&run.model, &prompts, &run.exam.pictures, &run.exam.attributes, &grid)?;
    save_pretrained(args.out.join("model"), &run.config, &run.params, u64::MAX)?;
    CaptionedPictures::tokenizer()?.save(args.out.join("model/words.json"))?;
    println!("everything is in {}", args.out.display());
    Ok(())
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example clip_digits -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["clip_digits"]);
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("steps", args.steps.to_string(), defaults.steps.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("alike", args.alike.to_string(), defaults.alike.to_string());
    add("lr", args.lr.to_string(), defaults.lr.to_string());
    add("width", args.width.to_string(), defaults.width.to_string());
    add("layers", args.layers.to_string(), defaults.layers.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("eval-every", args.eval_every.to_string(), defaults.eval_every.to_string());
    add("eval-samples", args.eval_samples.to_string(), defaults.eval_samples.to_string());
    add("device", args.device.to_string(), defaults.device.to_string());
    if let Some(data) = &args.data {
        add("data", data.display().to_string(), String::new());
    }
    command
}

/// With `--prompt`: the best of fresh pictures of all combinations.
fn answer(args: &Args, mnist: &Mnist) -> Result<()> {
    let params = Params::new();
    let (_, model) = load_pretrained::<ClipConfig>(args.out.join("model"), &params)?;
    params.eval();
    let (samples, seed) = (args.eval_samples, args.seed.wrapping_add(2));
    let options = CaptionedOptions { samples, seed, combinations: Combinations::All, ..Default::default() };
    let gallery = CaptionedPictures::new(&mnist.test, options)?;
    let batch = gallery.batch(&(0..args.eval_samples).collect::<Vec<_>>(), &mut Rng::new(0))?;
    show(&model, &args.prompt, &batch.pictures, &batch.attributes, &args.out.join("prompt.png"))
}

/// Draws a row of the pictures that fit each prompt best, and says what they show.
fn show(model: &ClipModel, prompts: &[String], pictures: &Tensor, attributes: &[Attributes], path: &std::path::Path) -> Result<()> {
    let scores = similarity(&embed_texts(model, prompts)?, &embed_pictures(model, pictures)?)?;
    let columns = GRID.1.min(attributes.len());
    let (best, found) = scores.topk(columns, 1, true)?;
    save_grid(path, &pictures.index_select(0, &found.flatten(0, 1)?)?, columns)?;
    let (best, found) = (best.to_vec::<f32>()?, found.to_vec::<i64>()?);
    println!("the best pictures, a row for each prompt, are in {}", path.display());
    for (i, prompt) in prompts.iter().enumerate() {
        let at = i * columns;
        println!("  {prompt}: {} ({:.3})", attributes[found[at] as usize], best[at]);
    }
    Ok(())
}

fn embed_texts<S: AsRef<str>>(model: &ClipModel, texts: &[S]) -> Result<Tensor> {
    let parts = texts.chunks(CHUNK).map(|part| no_grad(|| model.text_embeds(&CaptionedPictures::tokenize(part)?, None)));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?.iter().collect::<Vec<_>>(), 0)
}

fn embed_pictures(model: &ClipModel, pictures: &Tensor) -> Result<Tensor> {
    let count = pictures.dim(0)?;
    let part = |start: usize| no_grad(|| model.image_embeds(&pictures.narrow(0, start, CHUNK.min(count - start))?));
    let parts = (0..count).step_by(CHUNK).map(part).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)
}

/// Pictures of combinations that training never shows, of digits that it never shows.
struct Exam {
    pictures: Tensor,
    captions: Vec<String>,
    attributes: Vec<Attributes>,
}

/// What a model makes of an exam, as shares of 1.
struct Marks {
    /// Size, colour, object, place.
    zero_shot: [f64; 4],
    /// All four, chosen among all combinations at once.
    combination: f64,
    text_to_image: f64,
    image_to_text: f64,
}

impl Exam {
    fn new(args: &Args, mnist: &Mnist) -> Result<Self> {
        let combinations = Combinations::HeldOut;
        let options = CaptionedOptions { samples: args.eval_samples, seed: args.seed.wrapping_add(1), combinations, ..Default::default() };
        let set = CaptionedPictures::new(&mnist.test, options)?;
        let batch = set.batch(&(0..args.eval_samples).collect::<Vec<_>>(), &mut Rng::new(0))?;
        Ok(Self { pictures: batch.pictures, captions: batch.captions, attributes: batch.attributes })
    }

    fn judge(&self, model: &ClipModel) -> Result<Marks> {
        let images = normalize(&embed_pictures(model, &self.pictures)?)?;
        let texts = embed_texts(model, &self.captions)?;
        let scores = similarity(&texts, &images)?;
        let same = |a: usize, b: usize| self.attributes[a] == self.attributes[b];

        // Every combination in every phrasing: a class of one attribute is the mean of all that say it.
        let phrasings = Attributes::PHRASINGS;
        let all: Vec<Attributes> = (0..Attributes::COMBINATIONS).map(Attributes::of).collect();
        let sentences: Vec<String> = all.iter().flat_map(|a| (0..phrasings).map(|i| a.caption(i))).collect();
        let combinations = zero_shot_classes(&embed_texts(model, &sentences)?, phrasings)?; // (combinations, P)
        let right = |classes: &Tensor, is_right: &dyn Fn(usize, usize) -> bool| -> Result<f64> {
            let chosen = similarity(&images, classes)?.argmax(1)?.to_vec::<i64>()?;
            let hits = chosen.iter().enumerate().filter(|(picture, class)| is_right(*picture, **class as usize)).count();
            Ok(hits as f64 / chosen.len() as f64)
        };
        // How likely each value of an attribute is: the sum over all captions that say it.
        let captions = similarity(&images, &combinations)?.mul_scalar(model.scale()?)?.softmax(-1)?; // (B, combinations)
        let mut zero_shot = [0.0; 4];
        for (attribute, classes) in Attributes::CLASSES.into_iter().enumerate() {
            let says = |i: usize, class: usize| if Attributes::of(i).labels()[attribute] == class { 1f32 } else { 0.0 };
            let members: Vec<f32> = (0..all.len()).flat_map(|i| (0..classes).map(move |class| says(i, class))).collect();
            let members = Tensor::from_vec(members, [all.len(), classes])?.to_device(images.device())?;
            let chosen = captions.matmul(&members)?.argmax(1)?.to_vec::<i64>()?;
            let hits = chosen.iter().zip(&self.attributes).filter(|(class, truth)| truth.labels()[attribute] == **class as usize).count();
            zero_shot[attribute] = hits as f64 / chosen.len().max(1) as f64;
        }
        Ok(Marks {
            zero_shot,
            combination: right(&combinations, &|picture, class| self.attributes[picture] == all[class])?,
            text_to_image: recall_at(&scores, 1, same)?,
            image_to_text: recall_at(&scores.t()?, 1, same)?,
        })
    }
}

impl std::fmt::Display for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "zero-shot")?;
        for (name, share) in NAMES.iter().zip(self.zero_shot) {
            write!(f, " {name} {:.1} %,", 100.0 * share)?;
        }
        let percent = [self.combination, self.text_to_image, self.image_to_text].map(|share| 100.0 * share);
        write!(f, " all four {:.1} %; recall@1 text to image {:.1} %, image to text {:.1} %", percent[0], percent[1], percent[2])
    }
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    config: ClipConfig,
    model: ClipModel,
    params: Params,
    optimizer: AdamW,
    loader: Loader<CaptionedPictures>,
    exam: Exam,
    metrics: MetricsCsv,
    /// A row for each measurement.
    marks: MetricsCsv,
    step: u64,
    out: PathBuf,
}

fn configure(args: &Args) -> Result<ClipConfig> {
    let (width, act) = (args.width, "gelu".to_owned());
    let text = ClipTextConfig {
        vocab_size: CaptionedPictures::tokenizer()?.vocab_size(),
        hidden_size: width,
        intermediate_size: 4 * width,
        num_hidden_layers: args.layers.div_ceil(2),
        num_attention_heads: 4,
        max_position_embeddings: CaptionedPictures::TEXT_LENGTH,
        projection_dim: 64,
        hidden_act: act.clone(),
        pad_token_id: Some(WordTokenizer::PAD.into()),
        bos_token_id: Some(WordTokenizer::BOS.into()),
        eos_token_id: Some(WordTokenizer::EOS.into()),
        ..ClipTextConfig::default()
    };
    let vision = ClipVisionConfig {
        hidden_size: width,
        intermediate_size: 4 * width,
        num_hidden_layers: args.layers,
        num_attention_heads: 4,
        image_size: CaptionedOptions::default().side,
        patch_size: 4,
        projection_dim: 64,
        hidden_act: act,
        ..ClipVisionConfig::default()
    };
    Ok(ClipConfig { text_config: text, vision_config: vision, projection_dim: 64, ..ClipConfig::default() })
}

impl Run {
    fn new(args: &Args, mnist: &Mnist) -> Result<Self> {
        let (config, params) = (configure(args)?, Params::seeded(args.seed));
        let model = ClipModel::new(&config, &params)?;
        let optimizer = AdamW::new(params.params(), AdamWOptions { lr: args.lr, weight_decay: 0.01, ..AdamWOptions::default() })?;
        let captioned = CaptionedOptions { samples: SAMPLES, seed: args.seed, alike: args.alike, ..Default::default() };
        let pictures = CaptionedPictures::new(&mnist.train, captioned)?;
        // In order, which is random enough: those that are alike must meet in a batch.
        let options =
            LoaderOptions { batch_size: args.batch_size, shuffle: false, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        println!(
            "{} combinations to train on, {} held out; {} parameters",
            pictures.combinations().len(),
            Attributes::COMBINATIONS - pictures.combinations().len(),
            params.num_parameters()
        );
        let metrics = MetricsCsv::create(&args.out.join("metrics.csv"), &["step", "loss", "scale"])?;
        let columns = ["step", "size", "colour", "object", "place", "all_four", "text_to_image", "image_to_text"];
        let marks = MetricsCsv::create(&args.out.join("held_out.csv"), &columns)?;
        let (loader, exam, out) = (Loader::new(pictures, options)?, Exam::new(args, mnist)?, args.out.clone());
        if loader.batches() == 0 {
            return Err(Error::argument("clip_digits", format!("{SAMPLES} pictures do not fill a batch of {}", args.batch_size)));
        }
        let mut run = Self { config, model, params, optimizer, loader, exam, metrics, marks, step: 0, out };
        if args.resume {
            run.restore()?;
            println!("resumed at step {}", run.step);
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self, args: &Args) -> Result<bool> {
        let stop = stop_on_ctrl_c()?;
        let progress = Progress::new(args.steps, "training");
        let schedule = Schedule::cosine(args.steps, 0.02).with_warmup(WARMUP.min(args.steps / 4));
        while self.step < args.steps {
            // An epoch's end: the next one begins.
            let Some(batch) = self.loader.next().transpose()? else { continue };
            self.optimizer.set_lr(args.lr * schedule.factor(self.step))?;
            self.params.zero_grad();
            let loss = contrastive_loss(&self.model.forward(&batch.tokens, None, &batch.pictures)?.logits_per_text)?;
            loss.backward()?;
            self.optimizer.step_clipped(1.0)?;
            self.model.clamp_logit_scale()?;
            self.step += 1;
            let loss = loss.item_f64()?;
            self.metrics.write(&[self.step as f64, loss, self.model.scale()?])?;
            progress.set(self.step, &[("loss", loss)]);
            if self.step.is_multiple_of(args.eval_every) || self.step == args.steps {
                self.measure()?;
            }
            let stopped = stop.load(Relaxed);
            if stopped || self.step.is_multiple_of(SAVE_EVERY) || self.step == args.steps {
                self.save()?;
            }
            if stopped {
                progress.abandon();
                return Ok(false);
            }
        }
        progress.finish();
        Ok(true)
    }

    fn measure(&mut self) -> Result<()> {
        self.params.eval();
        let marks = self.exam.judge(&self.model)?;
        self.params.train();
        let [size, colour, object, place] = marks.zero_shot;
        self.marks.write(&[self.step as f64, size, colour, object, place, marks.combination, marks.text_to_image, marks.image_to_text])?;
        plot_curves(&self.out.join("loss.png"), "contrastive loss", &[Curve::new("loss", self.metrics.column("loss"))])?;
        let curve = |name: &str| Curve::new(name.replace('_', " "), self.marks.column(name));
        let curves = ["size", "colour", "object", "place", "all_four", "text_to_image", "image_to_text"].map(curve);
        plot_curves(&self.out.join("held_out.png"), "shares right on held-out combinations, by measurement", &curves)
    }

    fn checkpoint(&self) -> PathBuf {
        self.out.join("checkpoint.safetensors")
    }

    fn save(&mut self) -> Result<()> {
        let mut state = StateDict::new();
        state.extend(self.params.state_dict().into_iter().map(|(name, tensor)| (format!("model.{name}"), tensor)));
        state.extend(self.optimizer.state_dict()?.into_iter().map(|(name, tensor)| (format!("optimizer.{name}"), tensor)));
        state.insert("loader.position".into(), self.loader.state().to_tensor()?);
        state.insert("step".into(), Tensor::from_vec(vec![self.step as i64], 1)?);
        self.metrics.flush()?;
        self.marks.flush()?;
        io::safetensors::save(self.checkpoint(), &state, &BTreeMap::new())
    }

    fn restore(&mut self) -> Result<()> {
        let path = self.checkpoint();
        let state = io::safetensors::load(&path)?;
        let part = |prefix: &str| -> StateDict {
            state.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(prefix)?.to_owned(), tensor.clone()))).collect()
        };
        let missing = |name: &str| Error::format("resume", format!("{} holds no {name}", path.display()));
        self.params.load_state_dict(&part("model."), LoadMode::Strict)?;
        self.optimizer.load_state_dict(&part("optimizer."))?;
        let position = state.get("loader.position").ok_or_else(|| missing("loader.position"))?;
        self.loader.resume(LoaderState::from_tensor(position)?)?;
        self.step = state.get("step").ok_or_else(|| missing("step"))?.item::<i64>()? as u64;
        // What was written after the checkpoint will be written again.
        let step = self.step as f64;
        self.metrics.restore(|row| row[0] <= step)?;
        self.marks.restore(|row| row[0] <= step)
    }
}
