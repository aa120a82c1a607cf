//! Token by token: the iterator that greedy decoding and sampling are.

use super::processors::{LogitsProcessor, Place, Processors};
use super::sample::{Choice, Rows, uniform};
use super::stepper::{CausalStepper, Stepper, check_prompts};
use super::{FinishReason, Generation, GenerationConfig};
use crate::transformer::CausalLm;
use kiln_tensor::{Error, Result};

/// Says of an answer so far (its number, and its new tokens) whether it ends here. An error ends all.
pub type StopRule<'a> = Box<dyn FnMut(usize, &[u32]) -> Result<bool> + 'a>;

/// A token that a step added to an answer.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct NewToken {
    /// The answer's number: prompt · `num_return_sequences` + its place among that prompt's answers.
    pub row: usize,
    /// The token.
    pub token: u32,
    /// Its log-probability under the model.
    pub logprob: f32,
    /// Its log-probability under the model with logits divided by the temperature; other processors are left out of it.
    pub scaled_logprob: f32,
    /// Why the answer ends here, if it does.
    pub finish: Option<FinishReason>,
}

/// What a step of all answers that have not ended adds, in their order.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// One for each of those answers.
    pub tokens: Vec<NewToken>,
}

/// One answer at work.
struct Answer {
    tokens: Vec<u32>,
    prompt_len: usize,
    limit: usize,
}

impl Answer {
    fn place(&self) -> Place<'_> {
        Place { tokens: &self.tokens, prompt_len: self.prompt_len, limit: self.limit }
    }

    fn new_tokens(&self) -> &[u32] {
        self.tokens.get(self.prompt_len..).unwrap_or_default()
    }
}

/// Answers to prompts as they grow: yields a [`Step`] until every answer has ended. The model runs without recording and in evaluation
/// mode during each step; in between it is free for other uses, but its weights must not change.
///
/// ```
/// # use kiln_models::generate::{Generate, GenerationConfig};
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::Gpt2Config;
/// # fn main() -> kiln_tensor::Result<()> {
/// # let config = Gpt2Config { vocab_size: 50, n_positions: 32, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
/// let model = config.build(&Params::seeded(0))?;
/// let config = GenerationConfig { max_new_tokens: Some(4), ..GenerationConfig::default() };
/// let mut answer = Vec::new();
/// for step in Generate::new(&model, &[vec![1, 2, 3]], &config)? {
///     answer.extend(step?.tokens.iter().map(|new| new.token));
/// }
/// assert_eq!(answer.len(), 4);
/// # Ok(()) }
/// ```
pub struct Generate<'a> {
    stepper: Box<dyn Stepper + 'a>,
    config: GenerationConfig,
    processors: Processors,
    stop: Option<StopRule<'a>>,
    answers: Vec<Answer>,
    /// The answers that the model's rows are, and the token that each is to take in.
    rows: Vec<usize>,
    next: Vec<u32>,
    ended: Vec<bool>,
    state: State,
}

/// Checks what is asked for, and makes the model ready for it: with the lengths that end each answer.
pub(super) fn prepare<'a>(
    model: &'a dyn CausalLm,
    prompts: &[Vec<u32>],
    config: &GenerationConfig,
) -> Result<(CausalStepper<'a>, Vec<usize>)> {
    let shape = model.shape();
    config.validate(shape.vocab_size)?;
    check_prompts("prompt", prompts, shape.vocab_size)?;
    let limit = |(i, prompt): (usize, &Vec<u32>)| config.limit(&format!("prompt {i}"), prompt.len(), shape.context_length);
    let limits = prompts.iter().enumerate().map(limit).collect::<Result<Vec<_>>>()?;
    let room = prompts.iter().zip(&limits).map(|(prompt, limit)| limit - prompt.len()).max().unwrap_or(1);
    Ok((CausalStepper::new(model, prompts, room, config.pad()), limits))
}

#[derive(PartialEq)]
enum State {
    Fresh,
    Running,
    Over,
}

impl<'a> Generate<'a> {
    /// Prompts of any lengths. Nothing is computed before the first step.
    ///
    /// # Errors
    /// If a prompt is empty, leaves no room in the context or holds a token that is not in the vocabulary, or `config` is out of range or
    /// asks for a beam search, which has nothing to show before its end.
    pub fn new(model: &'a dyn CausalLm, prompts: &[Vec<u32>], config: &GenerationConfig) -> Result<Self> {
        let (stepper, limits) = prepare(model, prompts, config)?;
        Self::over(Box::new(stepper), prompts, &limits, config)
    }

    /// Of a model that has been told its prompts; `limits` are the lengths that end each.
    pub(super) fn over(stepper: Box<dyn Stepper + 'a>, prompts: &[Vec<u32>], limits: &[usize], config: &GenerationConfig) -> Result<Self> {
        if config.num_beams > 1 {
            return Err(Error::argument("generate", "num_beams is more than 1: a beam search does not stream; call generate"));
        }
        let several = config.num_return_sequences;
        let starts = prompts.iter().zip(limits).flat_map(|start| std::iter::repeat_n(start, several));
        let answers: Vec<_> = starts.map(|(prompt, &limit)| Answer { tokens: prompt.clone(), prompt_len: prompt.len(), limit }).collect();
        Ok(Self {
            stepper,
            config: config.clone(),
            processors: Processors::new(config),
            stop: None,
            rows: (0..answers.len()).collect(),
            next: vec![config.pad(); answers.len()],
            ended: vec![false; answers.len()],
            answers,
            state: State::Fresh,
        })
    }

    /// Adds a processor of the logits, behind the penalties and bans of the configuration and before temperature and what follows it.
    pub fn with_processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.processors.add(processor);
        self
    }

    /// Ends an answer, with [`FinishReason::Stop`], once `rule` says so of its number and new tokens. The token that made it say so stays.
    pub fn stop_when(mut self, rule: impl FnMut(usize, &[u32]) -> Result<bool> + 'a) -> Self {
        self.stop = Some(Box::new(rule));
        self
    }

    /// The new tokens of answer `row` so far.
    pub fn new_tokens(&self, row: usize) -> &[u32] {
        self.answers.get(row).map(Answer::new_tokens).unwrap_or_default()
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// If a step fails.
    pub fn collect_all(mut self) -> Result<Vec<Generation>> {
        let mut out: Vec<_> = self.answers.iter().map(|_| Generation::default()).collect();
        for step in self.by_ref() {
            for new in step?.tokens {
                let Some(answer) = out.get_mut(new.row) else { continue };
                answer.tokens.push(new.token);
                answer.logprobs.push(new.logprob);
                answer.scaled_logprobs.push(new.scaled_logprob);
                answer.finish = new.finish.unwrap_or(answer.finish);
            }
        }
        Ok(out)
    }

    fn step(&mut self) -> Result<Step> {
        let logits = if self.state == State::Fresh {
            self.state = State::Running;
            let logits = self.stepper.start()?;
            let several = self.config.num_return_sequences;
            if several > 1 {
                // The prompts are read once, and their answers start from copies.
                let rows: Vec<usize> = (0..self.answers.len()).map(|row| row / several).collect();
                self.stepper.reorder(&rows)?;
                let index = kiln_tensor::Tensor::from_vec(rows.iter().map(|&row| row as i64).collect(), [rows.len()])?;
                kiln_autograd::no_grad(|| logits.index_select(0, &index.to_device(logits.device())?))?
            } else {
                logits
            }
        } else {
            self.leave_ended()?;
            self.stepper.step(&self.next)?
        };
        let temperature = if self.config.do_sample { self.config.temperature } else { 1.0 };
        let mut logits = kiln_autograd::no_grad(|| Rows::new(&logits, temperature))?;
        let mut tokens = Vec::new();
        for slot in 0..self.rows.len() {
            let row = self.rows[slot];
            if self.ended[row] {
                continue;
            }
            let answer = &self.answers[row];
            let draw = self.config.do_sample.then(|| {
                let stream = self.config.first_row.wrapping_add(row as u64);
                uniform(self.config.seed, stream, answer.new_tokens().len())
            });
            let Choice { token, logprob, scaled_logprob } = logits.choose(slot, answer.place(), &self.processors, draw)?;
            self.answers[row].tokens.push(token);
            let finish = self.finish(row, token)?;
            self.ended[row] = finish.is_some();
            self.next[slot] = if finish.is_some() { self.config.pad() } else { token };
            tokens.push(NewToken { row, token, logprob, scaled_logprob, finish });
        }
        Ok(Step { tokens })
    }

    fn finish(&mut self, row: usize, token: u32) -> Result<Option<FinishReason>> {
        let answer = &self.answers[row];
        let new = answer.new_tokens();
        if self.config.eos_token_id.contains(&token) {
            return Ok(Some(FinishReason::Eos));
        }
        let is_stop = self.config.stop_sequences.iter().any(|end| new.ends_with(end));
        if is_stop || self.stop.as_mut().map_or(Ok(false), |stop| stop(row, new))? {
            return Ok(Some(FinishReason::Stop));
        }
        Ok((answer.tokens.len() >= answer.limit).then_some(FinishReason::Length))
    }

    /// Frees the model of rows that have ended, once they are half of all: moving the cache costs about a step.
    fn leave_ended(&mut self) -> Result<()> {
        let going: Vec<usize> = (0..self.rows.len()).filter(|&slot| !self.ended[self.rows[slot]]).collect();
        if going.len() * 2 > self.rows.len() {
            return Ok(());
        }
        self.stepper.reorder(&going)?;
        self.rows = going.iter().map(|&slot| self.rows[slot]).collect();
        self.next = going.iter().map(|&slot| self.next[slot]).collect();
        Ok(())
    }
}

impl Iterator for Generate<'_> {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Over {
            return None;
        }
        let step = self.step();
        if step.is_err() || self.ended.iter().all(|&ended| ended) {
            self.state = State::Over;
        }
        Some(step)
    }
}
