//! Trains a GPT on Shakespeare, character by character, and lets it speak. `cargo run --example gpt_shakespeare`
//!
//! Writes to `out/gpt_shakespeare/`: loss curves, `metrics.csv`, what the model says as it learns, a checkpoint that `--resume` continues
//! bit for bit, and the trained model as a folder that `gpt2_generate` and Hugging Face's transformers load.

use clap::{Parser, ValueEnum};
use kiln::data::{Corpus, CorpusSource, Loader, LoaderOptions, LoaderState, TokenBlocks};
use kiln::generate::{Generate, GenerationConfig};
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, stop_on_ctrl_c};
use kiln::text::{CharTokenizer, Tokenizer, train_bpe};
use kiln::transformer::{
    CausalConfig, CausalLm, Decoder, Gpt2Config, LmBatch, LmTrainer, LmTrainerOptions, save_pretrained, training_flops_per_token,
};
use kiln::{Error, Result, profile, set_default_device};
use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

/// Tokens of validation text that the loss is measured on while training; at the end all of it is read.
const QUICK_TOKENS: usize = 16 * 1024;
/// No shard of the saved model is larger.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// Trains a GPT on Shakespeare, character by character, and lets it speak.
///
/// Without options it trains on Tiny Shakespeare where it finds it (KILN_DATA, the cache folder, a download), and on generated
/// dialogue otherwise. It says which. Ctrl-C saves; --resume continues.
#[derive(Parser)]
struct Args {
    /// The model and how long it trains.
    #[arg(long, value_enum, default_value = "small")]
    preset: Preset,
    /// A text file to train on instead.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Steps, instead of the preset's.
    #[arg(long)]
    steps: Option<u64>,
    /// Sequences in a pass, instead of the preset's.
    #[arg(long)]
    batch_size: Option<usize>,
    /// Passes that make a step: as if the batch were that much larger.
    #[arg(long, default_value_t = 1)]
    accumulate: usize,
    /// The highest learning rate, instead of the preset's.
    #[arg(long)]
    lr: Option<f64>,
    /// Products in this half type: bf16 or f16.
    #[arg(long)]
    autocast: Option<DType>,
    /// Compute each block again in the backward pass: less memory, more time.
    #[arg(long)]
    checkpoint_activations: bool,
    /// Steps between measurements of the validation loss, samples and checkpoints.
    #[arg(long, default_value_t = 250)]
    eval_every: u64,
    /// What samples begin with.
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Tokens in a sample.
    #[arg(long, default_value_t = 300)]
    sample_tokens: usize,
    /// Seed of the weights, of the order of the text, of dropout and of the samples.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = "out/gpt_shakespeare")]
    out: PathBuf,
    /// Continue from the checkpoint in --out.
    #[arg(long)]
    resume: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Preset {
    /// 4 layers, 128 wide, characters: five minutes on two cores.
    Small,
    /// 6 layers, 384 wide, characters: an hour and a half on two cores, minutes on a GPU.
    Char,
    /// The shape of GPT-2, 124 million parameters, with a vocabulary of byte pairs learned from the text: for a GPU.
    Gpt2,
}

/// What a preset stands for.
struct Setup {
    model: Gpt2Config,
    trainer: LmTrainerOptions,
    batch_size: usize,
}

impl Preset {
    fn setup(self, args: &Args, vocab_size: usize) -> Setup {
        let (layers, heads, width, context, dropout, batch_size, steps, lr) = match self {
            Preset::Small => (4, 4, 128, 128, 0.0, 16, 5000, 2e-3),
            Preset::Char => (6, 6, 384, 256, 0.2, 64, 1500, 1e-3),
            Preset::Gpt2 => (12, 12, 768, 1024, 0.1, 8, 5000, 6e-4),
        };
        let model = Gpt2Config {
            vocab_size,
            n_positions: context,
            n_embd: width,
            n_layer: layers,
            n_head: heads,
            resid_pdrop: dropout,
            embd_pdrop: dropout,
            attn_pdrop: dropout,
            ..Gpt2Config::default()
        };
        let steps = args.steps.unwrap_or(steps);
        let trainer = LmTrainerOptions {
            lr: args.lr.unwrap_or(lr),
            betas: (0.9, 0.99),
            steps,
            warmup_steps: 100.min(steps / 10),
            autocast: args.autocast,
            ..LmTrainerOptions::default()
        };
        Setup { model, trainer, batch_size: args.batch_size.unwrap_or(batch_size) }
    }

    fn tokenizer(self, text: &str) -> Result<Tokenizer> {
        match self {
            Preset::Small | Preset::Char => Ok(CharTokenizer::new(text)?.into()),
            Preset::Gpt2 => train_bpe([text], 8192, &["<|endoftext|>"]),
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    let corpus = Corpus::open(args.data.clone().map_or(CorpusSource::Auto, CorpusSource::File))?;
    println!("data: {corpus}");
    let mut run = Run::new(&args, &corpus)?;
    if !run.train(&args)? {
        println!("stopped at step {}; --resume continues with the same options", run.trainer.steps());
        return Ok(());
    }
    let started = Instant::now();
    let loss = run.trainer.evaluate(&run.validation)?;
    println!(
        "validation loss {loss:.4} nats a token over {} tokens, read in {:.1} s",
        run.validation_tokens(),
        started.elapsed().as_secs_f64()
    );
    run.save_model()?;
    println!(
        "everything is in {}; speak with it: cargo run --example gpt2_generate -- {}",
        args.out.display(),
        run.model_folder().display()
    );
    Ok(())
}

/// A training run: everything that a checkpoint holds, and where results go.
struct Run {
    trainer: LmTrainer<Decoder>,
    config: Gpt2Config,
    tokenizer: Tokenizer,
    loader: Loader<TokenBlocks>,
    /// All of the validation text, in batches.
    validation: Vec<LmBatch>,
    metrics: MetricsCsv,
    out: PathBuf,
}

impl Run {
    fn new(args: &Args, corpus: &Corpus) -> Result<Self> {
        if args.accumulate == 0 || args.eval_every == 0 {
            return Err(Error::argument("gpt_shakespeare", "--accumulate and --eval-every must be at least 1"));
        }
        let tokenizer = args.preset.tokenizer(&corpus.text)?;
        let Setup { model: config, trainer, batch_size } = args.preset.setup(args, tokenizer.vocab_size());
        let model = config.build(&Params::seeded(args.seed))?;
        model.set_activation_checkpointing(args.checkpoint_activations);
        println!("{} parameters, {} tokens in the vocabulary", model.params().num_parameters(), config.vocab_size);
        let (train, validation) = corpus.split();
        let (train, validation) = (tokenizer.encode(train)?, tokenizer.encode(validation)?);
        let windows = (train.len() / config.n_positions).max(batch_size);
        let blocks = TokenBlocks::random(train, config.n_positions, windows)?;
        let options = LoaderOptions { batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let metrics = MetricsCsv::create(&args.out.join("metrics.csv"), &["step", "loss", "validation_loss", "lr", "grad_norm"])?;
        let mut run = Self {
            trainer: LmTrainer::new(model, trainer)?,
            loader: Loader::new(blocks, options)?,
            validation: batches_of(validation, config.n_positions, batch_size)?,
            config,
            tokenizer,
            metrics,
            out: args.out.clone(),
        };
        if args.resume {
            run.restore()?;
            println!("resumed at step {}", run.trainer.steps());
        }
        Ok(run)
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn train(&mut self, args: &Args) -> Result<bool> {
        let total = self.trainer.options().steps;
        let stop = stop_on_ctrl_c()?;
        let progress = Progress::new(total, "training");
        let mut speed = Speed::new(&self.trainer, args.autocast);
        let mut validation_loss = None;
        while self.trainer.steps() < total {
            let batches = (0..args.accumulate).map(|_| self.next_batch()).collect::<Result<Vec<_>>>()?;
            let done = self.trainer.step(&batches)?;
            let step = self.trainer.steps();
            speed.count(done.tokens);
            let is_stopped = stop.load(Relaxed);
            let is_measured = step.is_multiple_of(args.eval_every) || step == total;
            let mut row = [step as f64, done.loss, f64::NAN, done.lr, done.grad_norm];
            if is_measured {
                speed.pause(|| {
                    row[2] = self.quick_loss()?;
                    validation_loss = Some(row[2]);
                    self.sample(args, step, row[2])
                })?;
            }
            self.metrics.write(&row)?;
            let (tokens, utilization) = speed.rates();
            let shown = [("loss", Some(done.loss)), ("validation", validation_loss), ("tokens/s", Some(tokens)), ("MFU", utilization)];
            progress.set_measured(step, &shown);
            if is_measured || is_stopped {
                speed.pause(|| {
                    self.plot()?;
                    self.save()
                })?;
            }
            if is_stopped && step < total {
                progress.abandon();
                return Ok(false);
            }
        }
        progress.finish();
        println!("{}", speed.summary());
        Ok(true)
    }

    fn next_batch(&mut self) -> Result<LmBatch> {
        loop {
            // Between epochs the loader ends once.
            if let Some(batch) = self.loader.next() {
                return Ok(batch?.into());
            }
        }
    }

    fn validation_tokens(&self) -> usize {
        self.validation.iter().map(|batch| batch.targets.numel()).sum()
    }

    /// The loss of the first part of the validation text.
    fn quick_loss(&self) -> Result<f64> {
        let per_batch = self.validation.first().map_or(1, |batch| batch.targets.numel().max(1));
        let count = QUICK_TOKENS.div_ceil(per_batch).min(self.validation.len());
        self.trainer.evaluate(&self.validation[..count])
    }

    /// Says what the model makes of the prompt, and appends it to `samples.txt`.
    fn sample(&self, args: &Args, step: u64, loss: f64) -> Result<()> {
        let config = GenerationConfig {
            max_new_tokens: Some(args.sample_tokens.min(self.config.n_positions.saturating_sub(1))),
            do_sample: true,
            temperature: 0.8,
            seed: args.seed,
            ..GenerationConfig::default()
        };
        let prompt = self.tokenizer.encode(&args.prompt)?;
        let mut stream = self.tokenizer.stream(true);
        let mut text = String::new();
        for new in Generate::new(self.trainer.model(), &[prompt], &config)? {
            for new in new?.tokens {
                text += &stream.push(new.token)?;
            }
        }
        text += &stream.finish()?;
        let text = format!("── step {step}, validation loss {loss:.3}\n{}{text}\n", args.prompt.trim_start());
        println!("\n{text}");
        let path = self.out.join("samples.txt");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        let mut file = file.map_err(|e| Error::io("sample", path.display(), e))?;
        writeln!(file, "{text}").map_err(|e| Error::io("sample", path.display(), e))
    }

    fn plot(&self) -> Result<()> {
        let curves =
            [Curve::new("training", self.metrics.column("loss")), Curve::new("validation", self.metrics.column("validation_loss"))];
        plot_curves(&self.out.join("losses.png"), "nats a token", &curves)
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

    fn model_folder(&self) -> PathBuf {
        self.out.join("model")
    }

    fn save_model(&self) -> Result<()> {
        let folder = self.model_folder();
        save_pretrained(&folder, &CausalConfig::from(self.config.clone()), self.trainer.model().params(), MAX_SHARD_BYTES)?;
        self.tokenizer.save_to_folder(&folder)
    }
}

/// All windows of a text, in batches.
fn batches_of(tokens: Vec<u32>, context: usize, batch_size: usize) -> Result<Vec<LmBatch>> {
    let options = LoaderOptions { batch_size, shuffle: false, prefetch: 0, ..LoaderOptions::default() };
    Loader::new(TokenBlocks::consecutive(tokens, context)?, options)?.map(|batch| Ok(batch?.into())).collect()
}

/// Tokens a second, and which share of the machine's peak they are.
struct Speed {
    tokens: u64,
    working: Duration,
    since: Instant,
    flops_per_token: f64,
    /// Operations a second; `None` where the peak is not known.
    peak: Option<f64>,
}

impl Speed {
    fn new(trainer: &LmTrainer<Decoder>, autocast: Option<DType>) -> Self {
        let (shape, parameters) = (trainer.model().shape(), trainer.model().params().num_parameters());
        let peak = (kiln::default_device() == Device::Cpu).then(|| {
            let peaks = profile::peaks();
            1e9 * if autocast.is_some() { peaks.bf16_gflops } else { peaks.f32_gflops }
        });
        let flops_per_token = training_flops_per_token(shape, parameters, shape.context_length);
        Self { tokens: 0, working: Duration::ZERO, since: Instant::now(), flops_per_token, peak }
    }

    fn count(&mut self, tokens: u64) {
        self.tokens += tokens;
    }

    /// Runs `f` without counting its time.
    fn pause<R>(&mut self, f: impl FnOnce() -> R) -> R {
        self.working += self.since.elapsed();
        let result = f();
        self.since = Instant::now();
        result
    }

    /// Tokens a second, and the model's arithmetic as a share of the peak ("MFU") where that is known.
    fn rates(&self) -> (f64, Option<f64>) {
        let tokens = self.tokens as f64 / (self.working + self.since.elapsed()).as_secs_f64().max(1e-9);
        (tokens, self.peak.map(|peak| tokens * self.flops_per_token / peak))
    }

    fn summary(&self) -> String {
        let (tokens, utilization) = self.rates();
        let seconds = (self.working + self.since.elapsed()).as_secs_f64();
        let share = utilization.map(|share| format!(", {:.0} % of the measured peak (MFU)", 100.0 * share)).unwrap_or_default();
        format!("{} tokens in {seconds:.0} s: {tokens:.0} tokens/s{share}", self.tokens)
    }
}
