//! Trains two classifiers of handwritten digits, a perceptron and a small convolutional network, and measures both on
//! digits that they never saw. `cargo run --example classify_mnist`

use clap::Parser;
use kiln::classifier::{DigitCnn, DigitMlp};
use kiln::data::{Dataset, ImageSet, Loader, LoaderOptions, Mnist, Rng, Source};
use kiln::optim::{Adam, AdamOptions, Schedule};
use kiln::prelude::*;
use kiln::report::{MetricsCsv, Progress};
use kiln::{Result, set_default_device};
use std::path::PathBuf;

/// Classifies handwritten digits with a 784-512-256-10 perceptron and with a small convolutional network.
///
/// Without options it trains on MNIST where it finds it (KILN_DATA, the cache folder, a download), and on generated
/// digits otherwise. It says which.
#[derive(Parser)]
struct Args {
    /// Folder that holds MNIST's IDX files.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Passes over the training images.
    #[arg(long, default_value_t = 12)]
    epochs: u64,
    /// Stop each model after this many steps.
    #[arg(long)]
    steps: Option<u64>,
    /// Images in a step.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// Seed of the weights, of dropout and of the order of the images.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores by default.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for metrics.csv.
    #[arg(long, default_value = "out/classify_mnist")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    let mnist = Mnist::open(args.data.clone().map_or(Source::Auto, Source::Folder))?;
    println!("data: {mnist}");
    for name in ["perceptron", "convolutional"] {
        let params = Params::seeded(args.seed);
        let model: Box<dyn Module> = match name {
            "perceptron" => Box::new(DigitMlp::new(&params, 10)?),
            _ => Box::new(DigitCnn::new(&params, 10)?),
        };
        train(&args, name, &params, model.as_ref(), &mnist.train)?;
        params.eval();
        println!("{name}: {:.2} % of {} test digits are named correctly", 100.0 * accuracy(model.as_ref(), &mnist.test)?, mnist.test.len());
    }
    Ok(())
}

fn train(args: &Args, name: &str, params: &Params, model: &dyn Module, images: &ImageSet) -> Result<()> {
    let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, ..LoaderOptions::default() };
    let mut loader = Loader::new(images.clone(), options)?;
    let total = args.steps.unwrap_or(args.epochs.saturating_mul(loader.batches()));
    let mut optimizer = Adam::new(params.params(), AdamOptions::default())?;
    let schedule = Schedule::cosine(total, 0.0);
    let mut metrics = MetricsCsv::create(&args.out.join(format!("{name}.csv")), &["step", "loss"])?;
    let progress = Progress::new(total, name);
    let mut step = 0;
    while step < total {
        for batch in &mut loader {
            let batch = batch?;
            optimizer.set_lr(1e-3 * schedule.factor(step))?;
            params.zero_grad();
            let loss = model.forward(&batch.images)?.cross_entropy(&batch.labels)?;
            loss.backward()?;
            optimizer.step()?;
            step += 1;
            let loss = loss.item::<f32>()?;
            metrics.write(&[step as f64, loss as f64])?;
            progress.set(step, &[("loss", loss as f64)]);
            if step == total {
                break;
            }
        }
    }
    progress.finish();
    Ok(())
}

/// The share of `images` that the model names correctly.
fn accuracy(model: &dyn Module, images: &ImageSet) -> Result<f64> {
    let mut hits = 0.0;
    let all: Vec<usize> = (0..images.len()).collect();
    for part in all.chunks(500) {
        let batch = images.batch(part, &mut Rng::new(0))?;
        let named = no_grad(|| model.forward(&batch.images)?.argmax(1))?;
        hits += named.eq(&batch.labels)?.to_dtype(DType::F64)?.sum(())?.item::<f64>()?;
    }
    Ok(hits / images.len().max(1) as f64)
}
