//! Trains an autoencoder that gives grey pictures their colours. `cargo run --example colorize`
//!
//! The pictures are generated landscapes, whose hues can be told from shapes, textures and places, but not from brightness; or those of a
//! folder (`--data`, a subfolder a class). Some are held out: of these `out/colorize/colours.png` shows the grey picture, the coloured one
//! and the truth, and the share of pixels whose hue is right is printed, beside that of two ways that look at nothing. Writes loss curves,
//! `metrics.csv`, and a checkpoint that `--resume` continues bit for bit.

use clap::Parser;
use kiln::data::{
    Dataset, FolderOptions, ImageBatch, ImageFolder, ImageSet, Loader, LoaderOptions, LoaderState, Rng, Scale, Subset, landscapes,
};
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, save_grid, stop_on_ctrl_c};
use kiln::vae::{Colorizer, ColorizerConfig, ReconstructionLoss, VaeTrainer, VaeTrainerOptions, join_colour, split_colour};
use kiln::{Error, Result, set_default_device};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

/// Generated pictures to train on, and to hold out.
const GENERATED: (usize, usize) = (4000, 400);
/// One in so many pictures of a folder is held out.
const HELD_OUT: usize = 10;
/// Triples of grey, coloured and true pictures in a row of the grid, and rows.
const GRID: (usize, usize) = (4, 6);
/// The largest side of a picture in the grid; larger pictures are shown at a half, a third, … of theirs.
const SHOWN_SIDE: usize = 512;
/// Steps between checkpoints within an epoch.
const SAVE_EVERY: u64 = 50;
/// Pixels with less colour than this (of at most about 0.6) have no hue to get right.
const COLOURED: f32 = 0.08;
/// A hue is right if it is no further than this from the truth, of a circle of 360 degrees.
const RIGHT_WITHIN: f32 = 30.0;
/// A pixel with less than this share of the true colour has none.
const LEAST_COLOUR: f32 = 0.3;
/// A picture is right if this share of its coloured pixels is.
const RIGHT_PICTURE: f64 = 0.9;

/// Trains an autoencoder that gives grey pictures their colours, and measures it on pictures that it never saw.
///
/// Ctrl-C saves; --resume continues.
#[derive(Parser, Debug)]
struct Args {
    /// Folder with a subfolder of PNG or JPEG files for each class, instead of generated landscapes.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Height and width that the pictures of --data are brought to.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Passes over the training pictures.
    #[arg(long, default_value_t = 8)]
    epochs: u64,
    /// Stop after this many steps instead of --epochs.
    #[arg(long)]
    steps: Option<u64>,
    /// Pictures in a step.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Channels at the full resolution.
    #[arg(long, default_value_t = 16)]
    width: usize,
    /// Adam's learning rate; it falls to a tenth along a cosine.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// The distance of pixels: l1 or mse. The first draws one of several likely colours, the second their grey mean.
    #[arg(long, default_value = "l1")]
    loss: ReconstructionLoss,
    /// Seed of the weights, of the generated pictures and of their order.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/colorize")]
    out: PathBuf,
    /// Continue from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    let (train, test) = pictures(&args)?;
    println!("{} pictures to train on, {} held out", train.len(), test.len());
    let mut run = Run::new(&args, train, test)?;
    if !run.train()? {
        println!("stopped at step {}; continue with: {}", run.trainer.steps(), resume_command(&args));
        return Ok(());
    }
    run.judge()?;
    println!("everything is in {}", args.out.display());
    Ok(())
}

fn resume_command(args: &Args) -> String {
    let mut command = format!("cargo run --example colorize -- --resume --out {}", args.out.display());
    let defaults = Args::parse_from(["colorize"]);
    let mut add = |name: &str, value: String, default: String| {
        if value != default {
            command += &format!(" --{name} {value}");
        }
    };
    add("size", args.size.to_string(), defaults.size.to_string());
    add("epochs", args.epochs.to_string(), defaults.epochs.to_string());
    add("batch-size", args.batch_size.to_string(), defaults.batch_size.to_string());
    add("width", args.width.to_string(), defaults.width.to_string());
    add("lr", args.lr.to_string(), defaults.lr.to_string());
    add("loss", args.loss.to_string(), defaults.loss.to_string());
    add("seed", args.seed.to_string(), defaults.seed.to_string());
    add("device", args.device.to_string(), defaults.device.to_string());
    if let Some(steps) = args.steps {
        add("steps", steps.to_string(), String::new());
    }
    if let Some(data) = &args.data {
        add("data", data.display().to_string(), String::new());
    }
    command
}

/// Colour pictures from either source.
enum Pictures {
    Generated(ImageSet),
    Folder(Subset<ImageFolder>),
}

impl Dataset for Pictures {
    type Batch = ImageBatch;

    fn len(&self) -> usize {
        match self {
            Pictures::Generated(set) => set.len(),
            Pictures::Folder(set) => set.len(),
        }
    }

    fn batch(&self, indices: &[usize], rng: &mut Rng) -> Result<ImageBatch> {
        match self {
            Pictures::Generated(set) => set.batch(indices, rng),
            Pictures::Folder(set) => set.batch(indices, rng),
        }
    }
}

/// Pictures to train on, and those held out.
fn pictures(args: &Args) -> Result<(Pictures, Pictures)> {
    let Some(folder) = &args.data else {
        println!("data: generated landscapes");
        let set = |count, seed| -> Result<_> { Ok(Pictures::Generated(landscapes::generate(count, seed)?.with_scale(Scale::Signed))) };
        return Ok((set(GENERATED.0, args.seed)?, set(GENERATED.1, args.seed ^ 0x7E57)?));
    };
    println!("data: {}", folder.display());
    let options = FolderOptions { size: Some((args.size, args.size)), channels: 3, scale: Scale::Signed };
    let all = ImageFolder::open(folder, options)?;
    let (test, train): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(|i| i.is_multiple_of(HELD_OUT));
    Ok((Pictures::Folder(Subset::new(all.clone(), train)?), Pictures::Folder(Subset::new(all, test)?)))
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    trainer: VaeTrainer<Colorizer>,
    loader: Loader<Pictures>,
    test: Pictures,
    metrics: MetricsCsv,
    total: u64,
    out: PathBuf,
}

impl Run {
    fn new(args: &Args, train: Pictures, test: Pictures) -> Result<Self> {
        let count = train.len();
        let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let loader = Loader::new(train, options)?;
        if loader.batches() == 0 {
            return Err(Error::argument("colorize", format!("{count} pictures do not fill a batch of {}", args.batch_size)));
        }
        let params = Params::seeded(args.seed);
        let model = Colorizer::new(&params, ColorizerConfig { width: args.width, ..ColorizerConfig::default() })?;
        // The rate's fall is part of the run: with --steps it still ends where --epochs says, so that a longer run continues a shorter one.
        let all_epochs = args.epochs.saturating_mul(loader.batches());
        let options = VaeTrainerOptions { lr: args.lr, steps: Some(all_epochs), reconstruction: args.loss, ..VaeTrainerOptions::default() };
        let metrics = MetricsCsv::create(&args.out.join("metrics.csv"), &["step", "epoch", "loss"])?;
        let total = args.steps.unwrap_or(all_epochs);
        let trainer = VaeTrainer::new(model, params, options)?;
        let mut run = Self { trainer, loader, test, metrics, total, out: args.out.clone() };
        if args.resume {
            run.restore()?;
            println!("resumed at step {}", run.trainer.steps());
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self) -> Result<bool> {
        let stop = stop_on_ctrl_c()?;
        let progress = Progress::new(self.total, "training");
        while self.trainer.steps() < self.total {
            let epoch = self.loader.state().epoch;
            while let Some(batch) = self.loader.next().transpose()? {
                let losses = self.trainer.step(&batch.images)?;
                let step = self.trainer.steps();
                self.metrics.write(&[step as f64, epoch as f64, losses.loss])?;
                progress.set(step, &[("loss", losses.loss)]);
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
            // A picture that cannot be drawn shall not cost the epoch.
            self.save()?;
            self.draw()?;
        }
        progress.finish();
        Ok(true)
    }

    /// The held-out pictures `from`..`to`.
    fn held_out(&self, from: usize, to: usize) -> Result<Tensor> {
        let indices: Vec<usize> = (from..to.min(self.test.len())).collect();
        Ok(self.test.batch(&indices, &mut Rng::new(0))?.images)
    }

    fn draw(&self) -> Result<()> {
        let truth = self.held_out(0, GRID.0 * GRID.1)?;
        let (grey, _) = split_colour(&truth)?;
        let coloured = self.trainer.evaluate(|model| model.forward(&grey))?;
        let mut triples = Tensor::stack(&[grey.expand(*truth.shape())?, coloured, truth], 1)?.flatten(0, 1)?;
        let [_, _, height, width] = triples.dims_n("colours")?;
        if height.max(width) > SHOWN_SIDE {
            triples = triples.avg_pool2d(height.max(width).div_ceil(SHOWN_SIDE))?;
        }
        save_grid(&self.out.join("colours.png"), &triples, 3 * GRID.0)?;
        plot_curves(&self.out.join("loss.png"), "distance of a pixel", &[Curve::new("loss", self.metrics.column("loss"))])
    }

    /// How many hues are right, of the model and of what looks at nothing.
    fn judge(&self) -> Result<()> {
        let mean = self.mean_colour()?;
        let (mut model, mut constant, mut grey_only) = (Hues::default(), Hues::default(), Hues::default());
        for start in (0..self.test.len()).step_by(100) {
            let truth = self.held_out(start, start + 100)?;
            let (grey, chroma) = split_colour(&truth)?;
            // As it is drawn: colours that leave the range are held to it.
            let drawn = self.trainer.evaluate(|model| model.forward(&grey))?.clamp(-1.0, 1.0)?;
            model.add(&split_colour(&drawn)?.1, &chroma)?;
            let flat = join_colour(&grey, &mean.expand(*chroma.shape())?)?.clamp(-1.0, 1.0)?;
            constant.add(&split_colour(&flat)?.1, &chroma)?;
            grey_only.add(&chroma.zeros_like()?, &chroma)?;
        }
        println!("held-out pictures, hues within {RIGHT_WITHIN} degrees:");
        println!("  coloured by the model: {model}");
        println!("  all in the mean colour of the training pictures: {constant}");
        println!("  left grey: {grey_only}");
        Ok(())
    }

    /// The mean colour differences (1, 2, 1, 1) of at most a thousand training pictures.
    fn mean_colour(&self) -> Result<Tensor> {
        let train = self.loader.dataset();
        let indices: Vec<usize> = (0..train.len().min(1000)).collect();
        split_colour(&train.batch(&indices, &mut Rng::new(0))?.images)?.1.mean_keepdim([0, 2, 3])
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

/// Counts of pixels and pictures that have colour, and of those whose hue is right.
#[derive(Default)]
struct Hues {
    pixels: [u64; 2],
    pictures: [u64; 2],
}

impl Hues {
    /// Takes in drawn and true colour differences, both (B, 2, H, W).
    fn add(&mut self, drawn: &Tensor, truth: &Tensor) -> Result<()> {
        let [_, _, height, width] = truth.dims_n("hues")?;
        let area = height * width;
        let (drawn, truth) = (drawn.to_vec::<f32>()?, truth.to_vec::<f32>()?);
        for (drawn, truth) in drawn.chunks_exact(2 * area).zip(truth.chunks_exact(2 * area)) {
            let at = |colours: &[f32], i: usize| (colours[i], colours[area + i]);
            let coloured: Vec<usize> = (0..area).filter(|&i| length(at(truth, i)) >= COLOURED).collect();
            let right = coloured.iter().filter(|&&i| is_right(at(drawn, i), at(truth, i))).count();
            self.pixels[0] += coloured.len() as u64;
            self.pixels[1] += right as u64;
            if !coloured.is_empty() {
                self.pictures[0] += 1;
                self.pictures[1] += u64::from(right as f64 >= RIGHT_PICTURE * coloured.len() as f64);
            }
        }
        Ok(())
    }
}

fn length((cb, cr): (f32, f32)) -> f32 {
    cb.hypot(cr)
}

/// Whether a colour has the hue of the true one.
fn is_right(drawn: (f32, f32), truth: (f32, f32)) -> bool {
    let cos = (drawn.0 * truth.0 + drawn.1 * truth.1) / (length(drawn) * length(truth)).max(1e-12);
    length(drawn) >= LEAST_COLOUR * length(truth) && cos >= RIGHT_WITHIN.to_radians().cos()
}

impl fmt::Display for Hues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |[all, right]: [u64; 2]| 100.0 * right as f64 / all.max(1) as f64;
        let share = 100.0 * RIGHT_PICTURE;
        write!(f, "{:.1} % of the pixels, {:.1} % of the pictures in {share:.0} % of theirs", percent(self.pixels), percent(self.pictures))
    }
}
