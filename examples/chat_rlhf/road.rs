//! The stages, one after the other. Each reads the folder of the one before and writes its own.

use crate::evaluation::Evaluation;
use crate::{Args, Judge, Method};
use kiln::align::{
    Completion, DpoLossOptions, DpoOptions, DpoTrainer, GrpoLossOptions, GrpoOptions, GrpoTrainer, KlControl, PpoOptions, PpoTrainer,
    PreferencePair, RecordEncoder, RewardConfig, RewardModel, RewardOptions, RewardTrainer, SftOptions, SftTrainer, TrainOptions,
    linear_decay, sampler,
};
use kiln::data::moods::{self, Request, Verdict};
use kiln::data::{Demonstration, Loader, LoaderOptions, PlainText, Prompt, Rng, TokenBlocks, TokenSequence, read_jsonl};
use kiln::lora::{Lora, LoraConfig};
use kiln::prelude::*;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves};
use kiln::text::json::Value;
use kiln::text::{ChatTemplate, SpecialTokens, Tokenizer, train_bpe};
use kiln::transformer::{
    CausalConfig, CausalLm, Decoder, Gpt2Config, LmTrainer, LmTrainerOptions, Pretrained, load, load_for_tuning, load_pretrained,
    save_pretrained,
};
use kiln::{Error, Result};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What generated data there is of each kind.
const TEXT_BYTES: usize = 1 << 20;
const DEMONSTRATIONS: usize = 20_000;
const PREFERENCES: usize = 20_000;
/// The share of demonstrations that are of the right mood, and of preferences whose order is wrong.
const RIGHT: f32 = 0.65;
const NOISE: f32 = 0.08;
/// What is measured on prompts that are held out while a policy is aligned.
static HELD_OUT: [(&str, Judge); 2] = [("success held out", Judge::Program), ("reward held out", Judge::Model)];
/// What is measured of rollouts: what is drawn, and what else there is.
const ROLLOUTS: ([&str; 2], [&str; 3]) = (["score", "KL"], ["entropy", "length", "finished"]);
/// No shard of a saved model is larger.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// What all stages share.
pub struct Road {
    pub args: Args,
    pub tokenizer: Tokenizer,
    template: ChatTemplate,
    pub eos: Vec<u32>,
    /// Prompts to align on, and those held out.
    pub prompts: [Vec<Vec<u32>>; 2],
    /// What the program knows prompts by; empty for a user's own.
    pub requests: HashMap<Vec<u32>, Request>,
}

impl Road {
    /// Opens the prompts, and pre-trains.
    pub fn new(args: Args) -> Result<Self> {
        if args.batch_size == 0 || args.eval_every == 0 || args.eval_samples == 0 {
            return Err(Error::argument("chat_rlhf", "--batch-size, --eval-every and --eval-samples must be at least 1"));
        }
        let folder = args.out.join("pretrained");
        let is_there = args.reuse && folder.join("config.json").exists();
        let text = if is_there { Vec::new() } else { args.texts()? };
        let tokenizer = if is_there { Tokenizer::from_folder(&folder)? } else { learn_vocabulary(&text, args.vocab_size)? };
        let template = ChatTemplate::from_folder(&folder).ok().filter(|_| is_there).unwrap_or_else(ChatTemplate::chatml);
        let Some(eos) = tokenizer.eos() else {
            return Err(Error::argument("chat_rlhf", "the tokenizer has no token that ends a text"));
        };
        let mut road = Self { args, tokenizer, template, eos: vec![eos], prompts: Default::default(), requests: HashMap::new() };
        road.open_prompts()?;
        if !is_there {
            road.pretrain(&text)?;
        }
        Ok(road)
    }

    fn encoder(&self) -> RecordEncoder<'_> {
        RecordEncoder::new(&self.tokenizer, &self.template)
    }

    pub fn folder(&self, stage: &str) -> PathBuf {
        self.args.out.join(stage)
    }

    /// Whether a stage is to be left as it is.
    fn is_done(&self, stage: &str) -> bool {
        let done = self.args.reuse && self.folder(stage).join("config.json").exists();
        if done {
            println!("{stage}: taken from {}", self.folder(stage).display());
        }
        done
    }

    fn open_prompts(&mut self) -> Result<()> {
        let record = |request: Request| Prompt { prompt: request.prompt(), tools: Vec::new() };
        let [train, held_out]: [Vec<Prompt>; 2] = match &self.args.data_prompts {
            Some(path) => {
                let mut prompts: Vec<Prompt> = read_jsonl(path)?;
                Rng::new(self.args.seed).shuffle(&mut prompts);
                let held_out = prompts.split_off(prompts.len() - prompts.len().div_ceil(10));
                [prompts, held_out]
            }
            None => [false, true].map(|held_out| Request::all(held_out).into_iter().map(record).collect()),
        };
        let encode = |prompts: &[Prompt]| prompts.iter().map(|prompt| self.encoder().prompt_record(prompt)).collect::<Result<Vec<_>>>();
        self.prompts = [encode(&train)?, encode(&held_out)?];
        if self.args.data_prompts.is_none() {
            for request in [false, true].into_iter().flat_map(Request::all) {
                self.requests.insert(self.encoder().prompt(&request.prompt())?, request);
            }
        }
        match self.prompts.iter().any(Vec::is_empty) {
            true => Err(Error::argument("chat_rlhf", "there must be two prompts or more: one to align on, and one to measure on")),
            false => Ok(()),
        }
    }

    fn pretrain(&self, text: &[String]) -> Result<()> {
        let args = &self.args;
        let mut tokens = Vec::new();
        for document in text {
            tokens.extend(self.tokenizer.encode(document)?);
            tokens.extend(self.tokenizer.pad());
        }
        let role = |name: &str, id: Option<u32>| (name.to_owned(), id.map_or(Value::Null, Value::from));
        let (eos, pad) = (self.tokenizer.eos(), self.tokenizer.pad());
        let config = Gpt2Config {
            vocab_size: self.tokenizer.vocab_size(),
            n_positions: args.context,
            n_embd: args.width,
            n_layer: args.layers,
            n_head: args.heads,
            resid_pdrop: 0.0,
            embd_pdrop: 0.0,
            attn_pdrop: 0.0,
            other: [role("bos_token_id", eos), role("eos_token_id", eos), role("pad_token_id", pad)].into_iter().collect(),
            ..Gpt2Config::default()
        };
        let model = config.build(&Params::seeded(args.seed))?;
        println!(
            "{} parameters, {} tokens in the vocabulary, {} of text",
            model.params().num_parameters(),
            config.vocab_size,
            tokens.len()
        );
        let options = LoaderOptions { batch_size: args.batch_size, seed: args.seed, drop_last: true, ..LoaderOptions::default() };
        let windows = (tokens.len() / args.context).max(args.batch_size);
        let mut loader = Loader::new(TokenBlocks::random(tokens, args.context, windows)?, options)?;
        let steps = args.steps_pretrain;
        let options = LmTrainerOptions { lr: 2e-3, betas: (0.9, 0.99), steps, warmup_steps: steps / 20, ..LmTrainerOptions::default() };
        let mut trainer = LmTrainer::new(model, options)?;
        self.stage("pretrained", &["loss"], &[], steps, |_| {
            loop {
                // Between epochs the loader ends once.
                if let Some(batch) = loader.next() {
                    return Ok(vec![Some(trainer.step(&[batch?.into()])?.loss)]);
                }
            }
        })?;
        self.save("pretrained", &CausalConfig::from(config), trainer.model().params())
    }

    pub fn supervised(&self) -> Result<()> {
        if self.is_done("sft") {
            return Ok(());
        }
        let samples = match &self.args.data_sft {
            Some(path) => read_jsonl(path)?.iter().map(|record| self.demonstration(record)).collect::<Result<Vec<_>>>()?,
            None => {
                let records = moods::demonstrations(self.args.seed, DEMONSTRATIONS, RIGHT);
                records.iter().map(|record| self.encoder().prompt_completion(record)).collect::<Result<_>>()?
            }
        };
        let samples = samples.into_iter().map(|sample| sample.truncated(self.args.context)).filter(is_learned).collect();
        let mut samples = Shuffled::new("demonstrations", samples, self.args.seed)?;
        let (config, model) = self.open("pretrained")?;
        let options = SftOptions { train: self.training(1e-3, self.args.steps_sft), ..SftOptions::default() };
        let mut trainer = SftTrainer::new(model.clone(), options)?;
        self.stage("sft", &["loss"], &[], self.args.steps_sft, |_| {
            let done = trainer.step(&samples.next(self.args.batch_size))?;
            Ok(vec![Some(done.loss)])
        })?;
        self.save("sft", &config, model.params())
    }

    fn demonstration(&self, record: &Demonstration) -> Result<TokenSequence> {
        match record {
            Demonstration::PromptCompletion(record) => self.encoder().prompt_completion(record),
            Demonstration::Conversation(record) => self.encoder().conversation(record),
        }
    }

    /// Pairs in a random order, but for some that are held out.
    fn preferences(&self) -> Result<(Shuffled<PreferencePair>, Vec<PreferencePair>)> {
        let records = match &self.args.data_preferences {
            Some(path) => read_jsonl(path)?,
            None => moods::preferences(self.args.seed, PREFERENCES, NOISE),
        };
        let context = self.args.context;
        let cut = |pair: PreferencePair| PreferencePair {
            chosen: pair.chosen.truncated(context),
            rejected: pair.rejected.truncated(context),
            ..pair
        };
        let pairs: Vec<_> = records.iter().map(|record| Ok(cut(self.encoder().preference(record)?))).collect::<Result<_>>()?;
        let mut pairs: Vec<_> = pairs.into_iter().filter(|pair| is_learned(&pair.chosen) && is_learned(&pair.rejected)).collect();
        let held_out = pairs.split_off(pairs.len() - (pairs.len() / 10).min(400));
        Ok((Shuffled::new("preferences", pairs, self.args.seed)?, held_out))
    }

    pub fn reward_model(&self) -> Result<()> {
        if self.is_done("reward") {
            return Ok(());
        }
        let (mut pairs, held_out) = self.preferences()?;
        let (config, model) = load_for_tuning::<RewardConfig>(self.folder("sft"), &Params::seeded(self.args.seed), |_| ())?;
        let train = TrainOptions { disable_dropout: true, ..self.training(5e-4, self.args.steps_reward) };
        // Scores around zero, which a value model need not learn first.
        let options = RewardOptions { train, center_rewards_coefficient: Some(0.01) };
        let mut trainer = RewardTrainer::new(model, options)?;
        self.stage("reward", &["loss", "accuracy"], &[], self.args.steps_reward, |_| {
            let done = trainer.step(&pairs.next(self.args.batch_size))?;
            Ok(vec![Some(done.loss), Some(done.accuracy)])
        })?;
        if !held_out.is_empty() {
            println!("reward: agrees with {:.1} % of {} preferences held out", 100.0 * trainer.evaluate(&held_out)?, held_out.len());
        }
        self.save("reward", &config, trainer.model().params())
    }

    pub fn align(&self) -> Result<()> {
        let (config, policy) = self.open("sft")?;
        let mut evaluation = Evaluation::new(self)?;
        let before = evaluation.report(&*policy)?;
        let adapter = self.args.lora.map(|rank| self.adapter(policy.params(), rank)).transpose()?;
        match self.args.method {
            Method::Ppo => self.ppo(&policy, &mut evaluation)?,
            Method::Grpo => self.grpo(&policy, &mut evaluation)?,
            Method::Dpo => self.dpo(&policy, &mut evaluation)?,
        }
        if let Some(adapter) = adapter {
            adapter.save(self.folder("adapter"))?;
            adapter.merge_and_unload()?;
        }
        self.save("policy", &config, policy.params())?;
        let after = evaluation.report(&*policy)?;
        evaluation.show(&*policy)?;
        evaluation.table(&[("sft", before), (&format!("{:?}", self.args.method).to_lowercase(), after)])?;
        println!("everything is in {}", self.args.out.display());
        Ok(())
    }

    fn adapter(&self, params: &Params, rank: usize) -> Result<Lora> {
        let base_model_name_or_path = Some(self.folder("sft").display().to_string());
        let config = LoraConfig {
            r: rank,
            lora_alpha: 2.0 * rank as f64,
            target_modules: "all-linear".into(),
            base_model_name_or_path,
            ..LoraConfig::default()
        };
        Lora::attach(params, &config, params.generator())
    }

    fn ppo(&self, policy: &Arc<Decoder>, evaluation: &mut Evaluation<'_>) -> Result<()> {
        let (rounds, judge) = (self.args.steps.unwrap_or(80), self.judge(Judge::Model)?);
        let options = PpoOptions {
            train: TrainOptions { disable_dropout: true, ..self.training(self.args.lr.unwrap_or(2e-4), 8 * rounds) },
            value_lr: Some(5e-4),
            num_ppo_epochs: 4,
            num_mini_batches: 2,
            kl: KlControl::Fixed(self.args.kl_coef.unwrap_or(0.1)),
            missing_eos_penalty: Some(2.0),
            temperature: 1.0,
            response_length: self.args.max_new_tokens,
            seed: self.args.seed,
            ..PpoOptions::default()
        };
        // The value model starts as the reward model, which knows what answers are worth.
        let (_, value) = load_pretrained::<RewardConfig>(self.folder("reward"), &Params::seeded(self.args.seed))?;
        let mut trainer = PpoTrainer::new(policy.clone(), evaluation.reference.clone(), value, options)?;
        let mut prompts = Shuffled::new("prompts", self.prompts[0].clone(), self.args.seed)?;
        let generate = sampler(&self.eos);
        self.stage("policy", &self.drawn(ROLLOUTS.0), &ROLLOUTS.1, rounds, |round| {
            let score = |prompts: &[Vec<u32>], answers: &[Completion]| self.scores(judge, &evaluation.reward, prompts, answers);
            let done = trainer.step(&prompts.next(self.args.answers), &generate, score)?;
            let rollouts = [done.score, done.kl, done.entropy, done.length, done.finished];
            Ok([evaluation.now_and_then(round, rounds, &**policy)?, rollouts.map(Some).to_vec()].concat())
        })
    }

    fn grpo(&self, policy: &Arc<Decoder>, evaluation: &mut Evaluation<'_>) -> Result<()> {
        let (rounds, judge) = (self.args.steps.unwrap_or(120), self.judge(Judge::Program)?);
        let beta = self.args.kl_coef.unwrap_or(0.04);
        let options = GrpoOptions {
            train: TrainOptions { disable_dropout: true, ..self.training(self.args.lr.unwrap_or(3e-4), 4 * rounds) },
            loss: GrpoLossOptions { beta, max_completion_length: self.args.max_new_tokens, ..GrpoLossOptions::default() },
            num_generations: self.args.group_size,
            num_iterations: 2,
            num_mini_batches: 2,
            seed: self.args.seed,
            ..GrpoOptions::default()
        };
        let mut trainer = GrpoTrainer::new(policy.clone(), Some(evaluation.reference.clone()), options)?;
        let mut prompts = Shuffled::new("prompts", self.prompts[0].clone(), self.args.seed)?;
        let per_round = self.args.answers.div_ceil(self.args.group_size.max(1));
        let generate = sampler(&self.eos);
        self.stage("policy", &self.drawn(ROLLOUTS.0), &ROLLOUTS.1, rounds, |round| {
            let score = |prompts: &[Vec<u32>], answers: &[Completion]| self.scores(judge, &evaluation.reward, prompts, answers);
            let done = trainer.step(&prompts.next(per_round), &generate, score)?;
            let rollouts = [done.reward, done.kl * done.length, done.entropy, done.length, done.finished];
            Ok([evaluation.now_and_then(round, rounds, &**policy)?, rollouts.map(Some).to_vec()].concat())
        })
    }

    fn dpo(&self, policy: &Arc<Decoder>, evaluation: &mut Evaluation<'_>) -> Result<()> {
        let steps = self.args.steps.unwrap_or(300);
        let (mut pairs, _) = self.preferences()?;
        let options = DpoOptions {
            train: TrainOptions { disable_dropout: true, ..self.training(self.args.lr.unwrap_or(1e-4), steps) },
            loss: DpoLossOptions { beta: self.args.kl_coef.unwrap_or(0.1), ..DpoLossOptions::default() },
        };
        let mut trainer = DpoTrainer::new(policy.clone(), Some(evaluation.reference.clone()), options)?;
        self.stage("policy", &self.drawn(["accuracy", "loss"]), &["margin"], steps, |step| {
            let done = trainer.step(&pairs.next(self.args.batch_size))?;
            let of_pairs = [done.accuracy, done.loss, done.margin];
            Ok([evaluation.now_and_then(step, steps, &**policy)?, of_pairs.map(Some).to_vec()].concat())
        })
    }

    fn training(&self, lr: f64, steps: u64) -> TrainOptions {
        TrainOptions { schedule: linear_decay(steps, steps / 20), ..TrainOptions::new(lr) }
    }

    /// Whether the program can judge answers: it knows nothing of a user's own prompts.
    pub fn has_program(&self) -> bool {
        !self.requests.is_empty()
    }

    /// What can be measured on prompts that are held out, and what judges it.
    pub fn held_out(&self) -> &'static [(&'static str, Judge)] {
        if self.has_program() { &HELD_OUT } else { &HELD_OUT[1..] }
    }

    /// The curves of an alignment: what is measured on prompts that are held out, and `others`.
    fn drawn(&self, others: [&'static str; 2]) -> Vec<&'static str> {
        self.held_out().iter().map(|&(name, _)| name).chain(others).collect()
    }

    /// What gives the rewards.
    fn judge(&self, default: Judge) -> Result<Judge> {
        let has_program = self.has_program();
        match self.args.reward {
            Some(Judge::Program) if !has_program => {
                Err(Error::argument("chat_rlhf", "no program judges answers to --data-prompts; take --reward model"))
            }
            Some(judge) => Ok(judge),
            None => Ok(if has_program { default } else { Judge::Model }),
        }
    }

    pub fn scores(&self, judge: Judge, reward: &RewardModel, prompts: &[Vec<u32>], answers: &[Completion]) -> Result<Vec<f64>> {
        match judge {
            Judge::Program => Ok(self.verdicts(prompts, answers)?.iter().map(|verdict| f64::from(verdict.is_right())).collect()),
            Judge::Model => reward.score_completions(prompts, answers),
        }
    }

    /// What the program says of answers; an answer that does not end is no sentence.
    pub fn verdicts(&self, prompts: &[Vec<u32>], answers: &[Completion]) -> Result<Vec<Verdict>> {
        let judge = |(prompt, answer): (&Vec<u32>, &Completion)| {
            let text = self.tokenizer.decode(&answer.tokens, true)?;
            let verdict = self.requests.get(prompt).map_or_else(Verdict::default, |request| request.judge(&text));
            Ok(Verdict { well_formed: verdict.well_formed && answer.finished, ..verdict })
        };
        prompts.iter().zip(answers).map(judge).collect()
    }

    pub fn open(&self, stage: &str) -> Result<(CausalConfig, Arc<Decoder>)> {
        let (config, model) = load(self.folder(stage), &Params::seeded(self.args.seed))?;
        Ok((config, Arc::new(model)))
    }

    fn save(&self, stage: &str, config: &impl Pretrained, params: &Params) -> Result<()> {
        let folder = self.folder(stage);
        save_pretrained(&folder, config, params, MAX_SHARD_BYTES)?;
        self.tokenizer.save_to_folder(&folder)?;
        let path = folder.join("chat_template.jinja");
        std::fs::write(&path, self.template.source()).map_err(|e| Error::io("save", path.display(), e))
    }

    /// Runs the steps of a stage, which give numbers by these names where they measured them: a table of all, and curves of some.
    fn stage(
        &self,
        name: &str,
        drawn: &[&str],
        others: &[&str],
        steps: u64,
        mut step: impl FnMut(u64) -> Result<Vec<Option<f64>>>,
    ) -> Result<()> {
        let columns = [drawn, others].concat();
        let mut table = MetricsCsv::create(&self.args.out.join(format!("{name}.csv")), &[&["step"], &columns[..]].concat())?;
        let progress = Progress::new(steps, name);
        for i in 1..=steps {
            let numbers = step(i)?;
            let row: Vec<f64> = [Some(i as f64)].iter().chain(&numbers).map(|number| number.unwrap_or(f64::NAN)).collect();
            table.write(&row)?;
            table.flush()?;
            progress.set_measured(i, &columns.iter().copied().zip(numbers).collect::<Vec<_>>());
        }
        progress.finish();
        let curves: Vec<_> = drawn.iter().map(|name| Curve::new(*name, table.column(name))).collect();
        plot_curves(&self.args.out.join(format!("{name}.png")), name, &curves)
    }
}

impl Args {
    /// The texts to pre-train on.
    fn texts(&self) -> Result<Vec<String>> {
        let Some(path) = &self.data_pretrain else { return Ok(vec![moods::stories(self.seed, TEXT_BYTES)]) };
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            return Ok(read_jsonl(path)?.into_iter().map(|record: PlainText| record.text).collect());
        }
        Ok(vec![std::fs::read_to_string(path).map_err(|e| Error::io("read", path.display(), e))?])
    }
}

/// Byte pairs and ChatML's tokens. What fills up a batch is not what ends an answer: the reference reads a text's score at its last token
/// that is no padding.
fn learn_vocabulary(text: &[String], vocab_size: usize) -> Result<Tokenizer> {
    let tokenizer = train_bpe(text, vocab_size, &["<|im_end|>", "<|im_start|>", "<|endoftext|>"])?;
    let special = SpecialTokens { pad: tokenizer.token_to_id("<|endoftext|>"), ..tokenizer.special_tokens().clone() };
    tokenizer.with_special_tokens(special)
}

/// Whether anything of a text counts.
fn is_learned(text: &TokenSequence) -> bool {
    (1..text.len()).any(|place| text.learns(place))
}

/// Items in a random order, over and over.
struct Shuffled<T> {
    items: Vec<T>,
    at: usize,
    rng: Rng,
}

impl<T: Clone> Shuffled<T> {
    fn new(what: &str, items: Vec<T>, seed: u64) -> Result<Self> {
        if items.is_empty() {
            return Err(Error::argument("chat_rlhf", format!("there are no {what} to train on")));
        }
        Ok(Self { items, at: 0, rng: Rng::new(seed) })
    }

    fn next(&mut self, count: usize) -> Vec<T> {
        let item = |_| {
            if self.at.is_multiple_of(self.items.len()) {
                self.rng.shuffle(&mut self.items);
            }
            self.at += 1;
            self.items[(self.at - 1) % self.items.len()].clone()
        };
        (0..count).map(item).collect()
    }
}
