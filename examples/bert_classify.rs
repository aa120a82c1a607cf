//! Teaches a BERT to classify texts from a CSV file, and measures it on texts that it never saw. `cargo run --example bert_classify`
//!
//! Writes to `out/bert_classify/`: loss and accuracy curves, `metrics.csv`, a checkpoint that `--resume` continues bit for bit, and the
//! model as a folder that `--classify` and Hugging Face's transformers load.

use clap::Parser;
use kiln::align::{TrainOptions, linear_decay};
use kiln::classifier::{BertTask, BertTrainer, NaiveBayes};
use kiln::data::{
    Dataset, LabelledSequences, Loader, LoaderOptions, LoaderState, MaskOptions, MaskedSequences, TextClassification, generated_reviews,
    read_text_csv,
};
use kiln::metrics::ConfusionMatrix;
use kiln::nn::{LoadMode, StateDict};
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves, stop_on_ctrl_c};
use kiln::text::{SpecialTokens, Tokenizer, train_bpe};
use kiln::transformer::{
    BertConfig, BertForMaskedLm, BertForSequenceClassification, MaskedLm, SequenceClassifier, load_for_tuning, load_pretrained,
    save_pretrained,
};
use kiln::{Error, Result, io, set_default_device};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Texts that are made up where no file is given.
const GENERATED: usize = 20_000;
/// Where everything is written by default.
const OUT: &str = "out/bert_classify";
/// No shard of the saved model is larger.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// Teaches a BERT to classify texts.
///
/// Give it a CSV file with a header and the columns text and label (--data), and a BERT to tune (--model, a folder of Hugging Face's
/// layout). Without --model it trains a small one from nothing; without --data it takes generated product reviews, whose classes
/// cannot be told from their words alone. It says which. Ctrl-C saves; --resume continues; --classify uses what was learned.
#[derive(Parser)]
struct Args {
    /// CSV file to learn from.
    #[arg(long)]
    data: Option<PathBuf>,
    /// CSV file to measure with, instead of a part of --data.
    #[arg(long, requires = "data")]
    test: Option<PathBuf>,
    /// The column that holds the texts.
    #[arg(long, default_value = "text")]
    text_column: String,
    /// The column that holds the classes: names or numbers.
    #[arg(long, default_value = "label")]
    label_column: String,
    /// The share of each class that is held out to measure with.
    #[arg(long, default_value_t = 0.2)]
    validation: f64,
    /// Folder of the BERT to tune, with its tokenizer; with --classify, the folder of the classifier (--out has one otherwise).
    #[arg(long)]
    model: Option<PathBuf>,
    /// Say what these texts are, instead of training.
    #[arg(long, num_args = 1.., value_name = "TEXT")]
    classify: Vec<String>,
    /// Layers of a new model.
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Width of a new model.
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Attention heads of a new model.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Dropout of a new model: more for few texts.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Entries of a new model's vocabulary, byte pairs that are learned from the texts.
    #[arg(long, default_value_t = 1000)]
    vocab_size: usize,
    /// Tokens that are read of a text at most.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Steps in which the model fills hidden words of the texts in, before it learns the classes.
    #[arg(long, default_value_t = 0)]
    pretrain_steps: u64,
    /// Steps in which it learns the classes.
    #[arg(long, default_value_t = 3000)]
    steps: u64,
    /// Texts in a step.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// The highest learning rate: 5e-4 by default for a new model, 5e-5 to tune one.
    #[arg(long)]
    lr: Option<f64>,
    /// Steps of the linear rise to it, as a share of all; then it falls to zero.
    #[arg(long, default_value_t = 0.1)]
    warmup: f64,
    /// Half type of the matrix products. Without it they are f32.
    #[arg(long, value_parser = ["bf16"])]
    autocast: Option<String>,
    /// Steps between measurements on the texts that are held out, and checkpoints.
    #[arg(long, default_value_t = 250)]
    eval_every: u64,
    /// Seed of the weights, of which texts are held out, of their order and of dropout.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device to train on: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Folder for everything that is written.
    #[arg(long, default_value = OUT)]
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
    if !args.classify.is_empty() {
        return classify(&args);
    }
    let run = Run::new(&args)?;
    let Some(body) = run.pretrain()? else { return Ok(()) };
    let (config, model) = run.classifier(&body)?;
    println!("{} parameters, {} tokens in the vocabulary", model.params().num_parameters(), config.0.vocab_size);
    let Some(model) = run.tune(model)? else { return Ok(()) };
    let folder = args.out.join("model");
    save_pretrained(&folder, &config, model.params(), MAX_SHARD_BYTES)?;
    run.tokenizer.save_to_folder(&folder)?;
    let mine = if args.out == Path::new(OUT) { String::new() } else { format!(" --out {}", args.out.display()) };
    println!("everything is in {}; try it: cargo run --example bert_classify --{mine} --classify \"…\"", args.out.display());
    Ok(())
}

/// The texts to learn from and those to measure with.
fn read_texts(args: &Args) -> Result<(TextClassification, TextClassification)> {
    let read = |path: &Path, known: Option<&[String]>| read_text_csv(path, &args.text_column, &args.label_column, known);
    let all = match &args.data {
        Some(path) => read(path, None)?,
        None => generated_reviews(args.seed, GENERATED),
    };
    if let [only] = &all.classes[..] {
        return Err(Error::argument("bert_classify", format!("all texts are of the class {only:?}; there must be two at least")));
    }
    let (train, test) = match &args.test {
        Some(path) => {
            let test = read(path, Some(&all.classes))?;
            (all, test)
        }
        None => all.split(args.validation, args.seed)?,
    };
    let name = args.data.as_ref().map_or("generated reviews (no --data was given)".to_owned(), |path| path.display().to_string());
    println!("data: {name}: {} texts to learn from, {} held out, {} classes", train.texts.len(), test.texts.len(), train.classes.len());
    Ok((train, test))
}

/// Byte pairs of the texts, with BERT's special tokens.
fn bert_tokenizer(texts: &[String], vocab_size: usize) -> Result<Tokenizer> {
    let tokenizer = train_bpe(texts, vocab_size, &["[PAD]", "[CLS]", "[SEP]", "[MASK]"])?;
    let [pad, cls, sep, mask] = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"].map(|token| tokenizer.token_to_id(token));
    tokenizer.with_special_tokens(SpecialTokens { pad, cls, sep, mask, ..SpecialTokens::default() })?.with_bert_ends()
}

/// The token that fills up a batch; BERT's own is the first of its vocabulary.
fn pad_token(tokenizer: &Tokenizer) -> u32 {
    tokenizer.pad().or_else(|| tokenizer.token_to_id("[PAD]")).unwrap_or(0)
}

/// Texts as tokens.
struct Texts {
    tokens: Vec<Vec<u32>>,
    labels: Vec<i64>,
}

impl Texts {
    fn encode(tokenizer: &Tokenizer, texts: TextClassification, context: usize) -> Result<Self> {
        let encoded = texts.texts.iter().map(|text| tokenizer.encode_truncated(text, context)).collect::<Result<Vec<_>>>()?;
        let longer = encoded.iter().filter(|(_, is_longer)| *is_longer).count();
        if longer > 0 {
            println!("{longer} of {} texts are longer than {context} tokens: their ends are not read (--context)", encoded.len());
        }
        Ok(Self { tokens: encoded.into_iter().map(|(tokens, _)| tokens).collect(), labels: texts.labels })
    }
}

/// What both stages of a run share.
struct Run<'a> {
    args: &'a Args,
    tokenizer: Tokenizer,
    /// Of a new model, but for its classes; `None` for one that is tuned.
    config: Option<BertConfig>,
    classes: Vec<String>,
    train: Texts,
    test: Texts,
    checkpoint: Option<Checkpoint>,
    stop: Arc<AtomicBool>,
}

impl<'a> Run<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        if args.eval_every == 0 || args.context < 3 || !(0.0..=1.0).contains(&args.warmup) {
            let problem = "--eval-every must be at least 1, --context 3 ([CLS], a token, [SEP]), and --warmup from 0 to 1";
            return Err(Error::argument("bert_classify", problem));
        }
        let (train, test) = read_texts(args)?;
        let tokenizer = match &args.model {
            Some(folder) => Tokenizer::from_folder(folder)?,
            None => bert_tokenizer(&train.texts, args.vocab_size)?,
        };
        let config = BertConfig {
            vocab_size: tokenizer.vocab_size(),
            hidden_size: args.width,
            num_hidden_layers: args.layers,
            num_attention_heads: args.heads,
            intermediate_size: args.width.saturating_mul(4),
            max_position_embeddings: args.context,
            hidden_dropout_prob: args.dropout,
            attention_probs_dropout_prob: args.dropout,
            // BERT's 0.02 is for its width of 768; a narrow model starts to attend later with it.
            initializer_range: 0.06,
            ..BertConfig::default()
        };
        Ok(Self {
            args,
            config: args.model.is_none().then_some(config),
            classes: train.classes.clone(),
            train: Texts::encode(&tokenizer, train, args.context)?,
            test: Texts::encode(&tokenizer, test, args.context)?,
            tokenizer,
            checkpoint: args.resume.then(|| Checkpoint::load(&args.out)).transpose()?,
            stop: stop_on_ctrl_c()?,
        })
    }

    /// Has a model fill hidden words in, if that is asked for, and returns its weights; `None` if Ctrl-C stopped it.
    fn pretrain(&self) -> Result<Option<StateDict>> {
        if self.args.pretrain_steps == 0 || self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.stage == TUNING.number) {
            return Ok(Some(StateDict::new()));
        }
        let model = self.masked_lm()?;
        let data = |texts: &Texts| MaskedSequences::new(texts.tokens.clone(), self.mask_options()?);
        let mut training = Training::new(self, PRETRAINING, model, data(&self.train)?, data(&self.test)?)?;
        if !training.run(self)? {
            return Ok(None);
        }
        let mut body = training.trainer.model().params().state_dict();
        body.retain(|name, _| !name.starts_with("cls."));
        Ok(Some(body))
    }

    fn mask_options(&self) -> Result<MaskOptions> {
        let special = self.tokenizer.special_tokens();
        let named = |id: Option<u32>, token: &str| id.or_else(|| self.tokenizer.token_to_id(token));
        let missing = || Error::argument("bert_classify", "the tokenizer has no [MASK], which --pretrain-steps needs");
        let (mask, pad) = (named(special.mask, "[MASK]").ok_or_else(missing)?, pad_token(&self.tokenizer));
        let others = [named(special.cls, "[CLS]"), named(special.sep, "[SEP]"), named(special.unk, "[UNK]")];
        let never_hidden = others.into_iter().flatten().chain([mask, pad]).collect();
        Ok(MaskOptions::bert(mask, pad, never_hidden, self.tokenizer.vocab_size()))
    }

    /// The model that fills hidden words in.
    fn masked_lm(&self) -> Result<BertForMaskedLm> {
        let params = Params::seeded(self.args.seed);
        let (config, model) = match (&self.args.model, &self.config) {
            (Some(folder), _) => load_pretrained::<MaskedLm<BertConfig>>(folder, &params)?,
            (None, config) => {
                let config = config.clone().unwrap_or_default();
                (MaskedLm(config.clone()), config.masked_lm(&params)?)
            }
        };
        expect_fit(&self.tokenizer, &config.0, self.args.context)?;
        Ok(model)
    }

    /// The model that is to learn the classes, with the weights of `body` as far as there are such.
    fn classifier(&self, body: &StateDict) -> Result<(SequenceClassifier<BertConfig>, BertForSequenceClassification)> {
        let params = Params::seeded(self.args.seed);
        let name_classes = |config: &mut SequenceClassifier<BertConfig>| config.0.set_labels(&self.classes);
        let (config, model) = match (&self.args.model, &self.config) {
            (Some(folder), _) => load_for_tuning(folder, &params, name_classes)?,
            (None, config) => {
                let mut config = SequenceClassifier(config.clone().unwrap_or_default());
                name_classes(&mut config);
                let model = config.0.sequence_classifier(&params)?;
                (config, model)
            }
        };
        expect_fit(&self.tokenizer, &config.0, self.args.context)?;
        params.load_state_dict(body, LoadMode::Partial)?;
        Ok((config, model))
    }

    /// Teaches the model the classes, and says how good it is; `None` if Ctrl-C stopped it.
    fn tune(&self, model: BertForSequenceClassification) -> Result<Option<BertForSequenceClassification>> {
        let data = |texts: &Texts| LabelledSequences::new(texts.tokens.clone(), texts.labels.clone(), pad_token(&self.tokenizer));
        let mut training = Training::new(self, TUNING, model, data(&self.train)?, data(&self.test)?)?;
        if !training.run(self)? {
            return Ok(None);
        }
        let evaluation = training.trainer.evaluate(&training.held_out)?;
        let table = ConfusionMatrix::new(&evaluation.targets, &evaluation.predictions, self.classes.len())?;
        let count = |labels: &[i64], class: i64| labels.iter().filter(|&&label| label == class).count();
        let most = (0..self.classes.len() as i64).max_by_key(|&class| count(&self.train.labels, class)).unwrap_or(0);
        let words = NaiveBayes::fit(&self.train.tokens, &self.train.labels, self.classes.len())?;
        let by_words = self.test.tokens.iter().map(|tokens| words.predict(tokens)).zip(&self.test.labels).filter(|(a, b)| a == *b);
        let percent = |count: usize| 100.0 * count as f64 / self.test.labels.len() as f64;
        println!("\n{}", table.table(&self.classes));
        println!("of {} texts held out:", self.test.labels.len());
        println!("  BERT                           {:5.1} % right, macro-F1 {:.3}", 100.0 * table.accuracy(), table.macro_f1());
        println!("  words alone (naive Bayes)      {:5.1} %", percent(by_words.count()));
        println!("  always the most frequent class {:5.1} %", percent(count(&self.test.labels, most)));
        Ok(Some(training.trainer.into_model()))
    }
}

/// An error unless the model has a row for each token and a place for each of a text.
fn expect_fit(tokenizer: &Tokenizer, config: &BertConfig, context: usize) -> Result<()> {
    if tokenizer.vocab_size() > config.vocab_size {
        let message = format!("the tokenizer has {} tokens, the model knows {}", tokenizer.vocab_size(), config.vocab_size);
        return Err(Error::format("bert_classify", format!("{message}: they do not belong together")));
    }
    if context > config.max_position_embeddings {
        let message = format!("--context {context} is more than the {} places of the model", config.max_position_embeddings);
        return Err(Error::argument("bert_classify", message));
    }
    Ok(())
}

/// A part of a run.
#[derive(Clone, Copy)]
struct Stage {
    number: i64,
    name: &'static str,
    /// What names of its files begin with.
    prefix: &'static str,
    steps: fn(&Args) -> u64,
}

const PRETRAINING: Stage = Stage { number: 0, name: "filling words in", prefix: "pretraining_", steps: |args| args.pretrain_steps };
const TUNING: Stage = Stage { number: 1, name: "learning classes", prefix: "", steps: |args| args.steps };

/// One stage's model, data and results.
struct Training<M: BertTask, D: Dataset> {
    stage: Stage,
    total: u64,
    trainer: BertTrainer<M>,
    loader: Loader<D>,
    held_out: Vec<D::Batch>,
    metrics: MetricsCsv,
    out: PathBuf,
}

impl<M: BertTask, D: Dataset<Batch = M::Batch> + 'static> Training<M, D> {
    fn new(run: &Run, stage: Stage, model: M, train: D, test: D) -> Result<Self> {
        let (args, total) = (run.args, (stage.steps)(run.args));
        let lr = args.lr.unwrap_or(if args.model.is_some() { 5e-5 } else { 5e-4 });
        let warmup = (args.warmup * total as f64) as u64;
        let bf16 = args.autocast.is_some();
        let options = TrainOptions { bf16, schedule: linear_decay(total, warmup), ..TrainOptions::new(lr) };
        let loading = LoaderOptions { batch_size: args.batch_size, seed: args.seed, ..LoaderOptions::default() };
        let in_order = LoaderOptions { shuffle: false, prefetch: 0, ..loading.clone() };
        let columns = ["step", "loss", "held_out_loss", "accuracy", "lr", "grad_norm"];
        Ok(Self {
            stage,
            total,
            trainer: BertTrainer::new(model, &options)?,
            loader: Loader::new(train, loading)?,
            held_out: Loader::new(test, in_order)?.collect::<Result<_>>()?,
            metrics: MetricsCsv::create(&args.out.join(format!("{}metrics.csv", stage.prefix)), &columns)?,
            out: args.out.clone(),
        })
    }

    /// Trains to the end; `false` if Ctrl-C stopped it.
    fn run(&mut self, run: &Run) -> Result<bool> {
        if let Some(checkpoint) = run.checkpoint.as_ref().filter(|checkpoint| checkpoint.stage == self.stage.number) {
            self.restore(checkpoint)?;
            println!("resumed {} at step {}", self.stage.name, self.trainer.steps());
        }
        let progress = Progress::new(self.total, self.stage.name);
        let mut shown = [None; 2];
        while self.trainer.steps() < self.total {
            let batch = self.next_batch()?;
            let done = self.trainer.step(&batch)?;
            let step = self.trainer.steps();
            let is_stopped = run.stop.load(Relaxed);
            let is_measured = step.is_multiple_of(run.args.eval_every) || step == self.total;
            let mut measured = [f64::NAN; 2];
            if is_measured {
                let evaluation = self.trainer.evaluate(&self.held_out)?;
                measured = [evaluation.loss, evaluation.accuracy()];
                shown = measured.map(Some);
            }
            self.metrics.write(&[step as f64, done.loss, measured[0], measured[1], done.lr, done.grad_norm])?;
            progress.set_measured(step, &[("loss", Some(done.loss)), ("held out", shown[0]), ("accuracy", shown[1])]);
            if is_measured || is_stopped {
                self.plot()?;
                self.save()?;
            }
            if is_stopped && step < self.total {
                progress.abandon();
                println!("stopped {} at step {step}; --resume continues with the same options", self.stage.name);
                return Ok(false);
            }
        }
        progress.finish();
        Ok(true)
    }

    fn next_batch(&mut self) -> Result<M::Batch> {
        loop {
            // Between epochs the loader ends once.
            if let Some(batch) = self.loader.next() {
                return batch;
            }
        }
    }

    fn plot(&self) -> Result<()> {
        let curve = |name: &str, column: &str| Curve::new(name, self.metrics.column(column));
        let file = |name: &str| self.out.join(format!("{}{name}", self.stage.prefix));
        plot_curves(&file("losses.png"), "loss (nats)", &[curve("training", "loss"), curve("held out", "held_out_loss")])?;
        plot_curves(&file("accuracy.png"), "share named correctly", &[curve("held out", "accuracy")])
    }

    fn save(&mut self) -> Result<()> {
        let mut state = self.trainer.state_dict()?;
        state.insert("loader.position".into(), self.loader.state().to_tensor()?);
        state.insert("run.stage".into(), Tensor::from_vec(vec![self.stage.number], 1)?);
        self.metrics.flush()?;
        io::safetensors::save(Checkpoint::path(&self.out), &state, &BTreeMap::new())
    }

    fn restore(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        self.trainer.load_state_dict(&checkpoint.state)?;
        self.loader.resume(checkpoint.position)?;
        // What was written after the checkpoint will be written again.
        let steps = self.trainer.steps() as f64;
        self.metrics.restore(|row| row[0] <= steps)
    }
}

/// What a run continues from.
struct Checkpoint {
    stage: i64,
    position: LoaderState,
    state: StateDict,
}

impl Checkpoint {
    fn path(out: &Path) -> PathBuf {
        out.join("checkpoint.safetensors")
    }

    fn load(out: &Path) -> Result<Self> {
        let path = Self::path(out);
        let mut state = io::safetensors::load(&path)?;
        let mut take =
            |name: &str| state.remove(name).ok_or_else(|| Error::format("resume", format!("{} holds no {name}", path.display())));
        let (stage, position) = (take("run.stage")?.item::<i64>()?, take("loader.position")?);
        Ok(Self { stage, position: LoaderState::from_tensor(&position)?, state })
    }
}

/// Prints what each text is, the likeliest first.
fn classify(args: &Args) -> Result<()> {
    let folder = args.model.clone().unwrap_or_else(|| args.out.join("model"));
    let params = Params::new();
    let (SequenceClassifier(config), model) = load_pretrained::<SequenceClassifier<BertConfig>>(&folder, &params)?;
    let tokenizer = Tokenizer::from_folder(&folder)?;
    let context = config.max_position_embeddings;
    expect_fit(&tokenizer, &config, context)?;
    params.eval();
    for text in &args.classify {
        let (tokens, is_longer) = tokenizer.encode_truncated(text, context)?;
        let tokens: Vec<i64> = tokens.into_iter().map(i64::from).collect();
        let tokens = Tensor::from_vec(tokens.clone(), [1, tokens.len()])?;
        let probabilities = no_grad(|| model.forward(&tokens, None, None)?.softmax(-1))?.to_vec::<f32>()?;
        let mut named: Vec<(f32, String)> = probabilities.into_iter().zip((0..).map(|class| class_name(&config, class))).collect();
        named.sort_by(|a, b| b.0.total_cmp(&a.0));
        println!("{text}{}", if is_longer { "  (its end is not read)" } else { "" });
        named.iter().for_each(|(probability, name)| println!("  {:5.1} %  {name}", 100.0 * probability));
    }
    Ok(())
}

fn class_name(config: &BertConfig, class: usize) -> String {
    let known = config.id2label.as_ref().and_then(|names| names.get(&class.to_string()));
    known.cloned().unwrap_or_else(|| class.to_string())
}
