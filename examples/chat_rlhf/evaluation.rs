//! What a policy is worth, on prompts that no stage has seen.

use crate::Judge;
use crate::road::Road;
use kiln::align::{Completion, RewardConfig, RewardModel, RolloutRequest, sampler, sequence_log_probs};
use kiln::data::TokenSequence;
use kiln::data::moods::Verdict;
use kiln::prelude::*;
use kiln::transformer::{CausalLm, Decoder, load_pretrained};
use kiln::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// Answers that are generated at once.
const CHUNK: usize = 128;

/// What a policy is worth on prompts that are held out, beside the fine-tuned model's answers to them.
pub struct Evaluation<'a> {
    road: &'a Road,
    pub reference: Arc<Decoder>,
    pub reward: RewardModel,
    prompts: Vec<Vec<u32>>,
    answers: Vec<Completion>,
}

/// The columns of the table.
pub const COLUMNS: [&str; 9] = ["success", "mood", "topic", "form", "reward", "KL", "wins", "length", "finished"];

impl<'a> Evaluation<'a> {
    pub fn new(road: &'a Road) -> Result<Self> {
        let (_, reference) = road.open("sft")?;
        let (_, reward) = load_pretrained::<RewardConfig>(road.folder("reward"), &Params::seeded(road.args.seed))?;
        let prompts = road.prompts[1].iter().cycle().take(road.args.eval_samples).cloned().collect();
        let mut evaluation = Self { road, reference, reward, prompts, answers: Vec::new() };
        evaluation.answers = evaluation.answers(&*evaluation.reference, evaluation.prompts.len(), 1)?;
        Ok(evaluation)
    }

    /// Answers to the first prompts, drawn at temperature 1.
    fn answers(&self, model: &dyn CausalLm, count: usize, seed: u64) -> Result<Vec<Completion>> {
        let generate = sampler(&self.road.eos);
        let max_new_tokens = self.road.args.max_new_tokens;
        let chunk = |(i, prompts): (usize, &[Vec<u32>])| {
            generate(model, &RolloutRequest { prompts, max_new_tokens, temperature: 1.0, seed: seed.wrapping_add(1000 * i as u64) })
        };
        let chunks = self.prompts[..count].chunks(CHUNK).enumerate().map(chunk).collect::<Result<Vec<_>>>()?;
        Ok(chunks.concat())
    }

    /// What each of [`Road::held_out`] says, at some steps.
    pub fn now_and_then(&self, step: u64, steps: u64, policy: &dyn CausalLm) -> Result<Vec<Option<f64>>> {
        let judges = self.road.held_out();
        if !step.is_multiple_of(self.road.args.eval_every) && step != steps {
            return Ok(vec![None; judges.len()]);
        }
        let count = self.prompts.len().div_ceil(4);
        let answers = self.answers(policy, count, 2)?;
        let scores = |judge: Judge| self.road.scores(judge, &self.reward, &self.prompts[..count], &answers);
        judges.iter().map(|&(_, judge)| scores(judge).map(|scores| Some(mean(scores)))).collect()
    }

    /// A row of the table.
    pub fn report(&self, policy: &dyn CausalLm) -> Result<[f64; COLUMNS.len()]> {
        let answers = self.answers(policy, self.prompts.len(), 3)?;
        let has_program = self.road.has_program();
        let verdicts = self.road.verdicts(&self.prompts, &answers)?;
        let share = |f: fn(&Verdict) -> bool| if has_program { mean(verdicts.iter().map(|v| f64::from(f(v)))) } else { f64::NAN };
        let judge = if has_program { Judge::Program } else { Judge::Model };
        let scores = |answers: &[Completion]| self.road.scores(judge, &self.reward, &self.prompts, answers);
        let (own, other) = (scores(&answers)?, scores(&self.answers)?);
        // A draw is half a win.
        let win = |(own, other): (&f64, &f64)| if own == other { 0.5 } else { f64::from(own > other) };
        let texts = self.prompts.iter().zip(&answers).map(|(prompt, answer)| TokenSequence::completion(prompt, &answer.tokens));
        let texts: Vec<_> = texts.collect();
        let (log_probs, reference) = (sequence_log_probs(policy, &texts)?, sequence_log_probs(&*self.reference, &texts)?);
        Ok([
            share(|verdict| verdict.is_right()),
            share(|verdict| verdict.right_mood),
            share(|verdict| verdict.on_topic),
            share(|verdict| verdict.well_formed),
            mean(self.road.scores(Judge::Model, &self.reward, &self.prompts, &answers)?),
            mean(log_probs.iter().zip(&reference).map(|(own, reference)| own - reference)),
            mean(own.iter().zip(&other).map(win)),
            mean(answers.iter().map(|answer| answer.tokens.len() as f64)),
            mean(answers.iter().map(|answer| f64::from(answer.finished))),
        ])
    }

    /// Prints some answers of both models side by side.
    pub fn show(&self, policy: &dyn CausalLm) -> Result<()> {
        let count = self.prompts.len().min(8);
        let answers = self.answers(policy, count, 4)?;
        let verdicts = [&self.answers[..count], &answers[..]].map(|answers| self.road.verdicts(&self.prompts, answers));
        let [before, after] = verdicts;
        let text = |tokens: &[u32]| self.road.tokenizer.decode(tokens, true);
        for (i, (before, after)) in before?.iter().zip(after?).enumerate() {
            let sign = |verdict: &Verdict| match verdict.is_right() {
                _ if !self.road.has_program() => "",
                true => "right",
                false => "wrong",
            };
            let prompt = &self.prompts[i];
            println!("\n{}", self.road.requests.get(prompt).map_or_else(|| text(prompt), |request| Ok(request.to_string()))?);
            println!("  sft     {} {}", sign(before), text(&self.answers[i].tokens)?);
            println!("  policy  {} {}", sign(&after), text(&answers[i].tokens)?);
        }
        Ok(())
    }

    /// Prints the table and writes it as CSV.
    pub fn table(&self, rows: &[(&str, [f64; COLUMNS.len()])]) -> Result<()> {
        println!("\n{} answers to prompts that were held out:", self.prompts.len());
        let (mut csv, mut text) = (format!("model,{}\n", COLUMNS.join(",")), format!("{:8}", ""));
        COLUMNS.iter().for_each(|name| text += &format!("{name:>9}"));
        for (name, row) in rows {
            text += &format!("\n{name:8}");
            for number in row {
                text += &if number.is_nan() { format!("{:>9}", "-") } else { format!("{number:>9.3}") };
            }
            csv += &format!("{name},{}\n", row.map(|number| number.to_string()).join(","));
        }
        println!("{text}");
        write(&self.road.args.out.join("table.csv"), &csv)
    }
}

fn mean(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let (sum, count) = numbers.into_iter().fold((0.0, 0.0), |(sum, count), number| (sum + number, count + 1.0));
    sum / count
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|e| Error::io("write", path.display(), e))
}
