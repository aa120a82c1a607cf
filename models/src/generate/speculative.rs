//! Speculative decoding: a small model proposes tokens, the large one judges several in one pass, and nothing about the result changes.

use super::processors::{LogitsProcessor, Place, Processors};
use super::sample::{Choice, Rows, largest, pick, uniform, weigh};
use super::stepper::{check_prompts, device_of, feed, inference, make_cache};
use super::{FinishReason, Generation, GenerationConfig};
use crate::transformer::{CausalLm, KvCache};
use kiln_autograd::no_grad;
use kiln_tensor::{Error, Result, Tensor};

/// Random streams of their own, so that a proposal, its judgement and a replacement are independent.
const PROPOSING: u64 = 0xA076_1D64_78BD_642F;
const JUDGING: u64 = 0xE703_7ED1_A0B4_28DB;

/// An answer, and how well the draft model guessed it.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Speculation {
    /// The answer; log-probabilities are those of the target model.
    pub generation: Generation,
    /// Tokens that the draft model proposed and the target model judged.
    pub proposed: usize,
    /// How many of them were accepted.
    pub accepted: usize,
}

/// A model and the tokens that it has read.
struct Reader<'a> {
    model: &'a dyn CausalLm,
    cache: KvCache,
}

impl<'a> Reader<'a> {
    /// `slack` is how many of its last tokens it may be told to forget.
    fn new(model: &'a dyn CausalLm, tokens: usize, slack: usize) -> Result<Self> {
        Ok(Self { model, cache: make_cache(model, 1, tokens, slack)? })
    }

    /// Reads those of `tokens` that it has not read, and gives the logits (T, V) of the last `count` places, which must be new to it.
    fn read(&mut self, tokens: &[u32], count: usize) -> Result<Tensor> {
        let new = tokens.get(self.cache.seen()..).unwrap_or_default();
        let (before, last) = new.split_at(new.len().saturating_sub(count));
        if !before.is_empty() {
            feed(self.model, &mut self.cache, before)?;
        }
        let hidden = feed(self.model, &mut self.cache, last)?;
        self.model.logits(&hidden)?.squeeze(0)
    }

    /// Forgets what it has read after the first `len` tokens.
    fn forget_after(&mut self, len: usize) {
        let excess = self.cache.seen().saturating_sub(len);
        self.cache.truncate(self.cache.len() - excess.min(self.cache.len()));
    }
}

/// What a model thinks of a place: the weights of all tokens and their sum, or, where nothing is drawn, its choice.
enum Belief {
    Certain(u32),
    Weights(Vec<f32>, f64),
}

impl Belief {
    fn of(logits: &mut [f32], draws: bool) -> Result<Self> {
        if draws {
            let sum = weigh(logits)?;
            Ok(Belief::Weights(logits.to_vec(), sum))
        } else {
            Ok(Belief::Certain(largest(logits)?))
        }
    }

    fn token(&self, draw: f64) -> Result<u32> {
        match self {
            Belief::Certain(token) => Ok(*token),
            Belief::Weights(weights, sum) => pick(weights, *sum, draw),
        }
    }

    fn probability(&self, token: u32) -> f64 {
        match self {
            Belief::Certain(certain) => f64::from(u8::from(*certain == token)),
            Belief::Weights(weights, sum) => weights.get(token as usize).map_or(0.0, |&weight| f64::from(weight) / sum),
        }
    }

    /// A token of where this believes more than `other`: max(0, p − q), made a distribution.
    fn beyond(&self, other: &Belief, draw: f64) -> Result<u32> {
        let Belief::Weights(weights, _) = self else { return self.token(draw) };
        let excess = |token: u32| (self.probability(token) - other.probability(token)).max(0.0) as f32;
        let excess: Vec<f32> = (0..weights.len() as u32).map(excess).collect();
        let sum = excess.iter().map(|&excess| f64::from(excess)).sum::<f64>();
        // Rounding may leave nothing where the two agree.
        if sum > 0.0 { pick(&excess, sum, draw) } else { self.token(draw) }
    }
}

/// The work on one answer.
struct Speculating<'a> {
    target: Reader<'a>,
    draft: Reader<'a>,
    processors: Processors,
    config: &'a GenerationConfig,
    tokens: Vec<u32>,
    prompt_len: usize,
    limit: usize,
    out: Speculation,
}

impl Speculating<'_> {
    fn uniform(&self, stream: u64, place: usize) -> f64 {
        uniform(self.config.seed ^ stream, self.config.first_row, place - self.prompt_len)
    }

    fn processed(&self, tokens: &[u32], rows: &mut Rows, row: usize) -> Result<Belief> {
        let place = Place { tokens, prompt_len: self.prompt_len, limit: self.limit };
        let logits = rows.row(row, place)?;
        self.processors.process(place, logits)?;
        Belief::of(logits, self.config.do_sample)
    }

    /// `count` tokens of the draft model behind those that are there, with its beliefs.
    fn propose(&mut self, count: usize) -> Result<(Vec<u32>, Vec<Belief>)> {
        let (mut tokens, mut beliefs) = (self.tokens.clone(), Vec::with_capacity(count));
        for _ in 0..count {
            let mut rows = Rows::new(&self.draft.read(&tokens, 1)?, 1.0)?;
            let belief = self.processed(&tokens, &mut rows, 0)?;
            tokens.push(belief.token(self.uniform(PROPOSING, tokens.len()))?);
            beliefs.push(belief);
        }
        Ok((tokens, beliefs))
    }

    /// One round: proposals, their judgement, and a token of the target model's own. Says why the answer ends, if it does.
    fn round(&mut self, count: usize) -> Result<Option<FinishReason>> {
        let start = self.tokens.len();
        let (proposed, beliefs) = self.propose(count)?;
        let temperature = if self.config.do_sample { self.config.temperature } else { 1.0 };
        let mut rows = Rows::new(&self.target.read(&proposed, count + 1)?, temperature)?;
        for i in 0..=count {
            let so_far = proposed.get(..start + i).unwrap_or_default();
            let place = Place { tokens: so_far, prompt_len: self.prompt_len, limit: self.limit };
            let raw = rows.row(i, place)?.to_vec();
            let belief = self.processed(so_far, &mut rows, i)?;
            let at = start + i;
            let judged = beliefs.get(i).zip(proposed.get(at).copied());
            let is_accepted = judged.is_some_and(|(guess, token)| {
                // Accepted with probability min(1, p/q).
                self.uniform(JUDGING, at) * guess.probability(token) < belief.probability(token)
            });
            let token = match judged {
                Some((_, token)) if is_accepted => token,
                Some((guess, _)) => belief.beyond(guess, self.uniform(0, at))?,
                None => belief.token(self.uniform(0, at))?,
            };
            self.out.proposed += usize::from(judged.is_some());
            self.out.accepted += usize::from(is_accepted);
            let finish = self.push(rows.choice(i, token, &raw));
            if finish.is_some() {
                return Ok(finish);
            }
            if !is_accepted {
                break;
            }
        }
        let read = self.tokens.len() - 1;
        self.target.forget_after(read);
        self.draft.forget_after(read);
        Ok(None)
    }

    fn push(&mut self, choice: Choice) -> Option<FinishReason> {
        let Choice { token, logprob, scaled_logprob } = choice;
        self.tokens.push(token);
        let out = &mut self.out.generation;
        out.tokens.push(token);
        out.logprobs.push(logprob);
        out.scaled_logprobs.push(scaled_logprob);
        if self.config.eos_token_id.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.config.stop_sequences.iter().any(|end| out.tokens.ends_with(end)) {
            Some(FinishReason::Stop)
        } else {
            (self.tokens.len() >= self.limit).then_some(FinishReason::Length)
        }
    }
}

/// Answers one prompt with `target`, faster: `draft`, a smaller model of the same vocabulary, proposes `num_draft_tokens` at a time, which
/// `target` judges in a single pass. Greedy, the answer is what [`generate`](super::generate) gives with `target` alone; drawn, it has the
/// same distribution (but other draws).
///
/// Source: Leviathan, Kalman, Matias, *Fast Inference from Transformers via Speculative Decoding*, 2023.
///
/// # Errors
/// As [`generate`](super::generate); if the vocabularies differ, `num_draft_tokens` is 0, or `config` asks for beams or several answers.
pub fn generate_speculative(
    target: &dyn CausalLm,
    draft: &dyn CausalLm,
    prompt: &[u32],
    config: &GenerationConfig,
    num_draft_tokens: usize,
) -> Result<Speculation> {
    let (shape, drafts) = (target.shape(), draft.shape());
    config.validate(shape.vocab_size)?;
    check_prompts("prompt", &[prompt.to_vec()], shape.vocab_size)?;
    let wrong = |message: String| Err(Error::argument("generate", message));
    if shape.vocab_size != drafts.vocab_size {
        return wrong(format!("the draft model has {} tokens, the target model {}", drafts.vocab_size, shape.vocab_size));
    }
    if config.num_beams > 1 || config.num_return_sequences > 1 {
        return wrong("num_beams and num_return_sequences must be 1 for speculative decoding".into());
    }
    if num_draft_tokens == 0 {
        return wrong("num_draft_tokens is 0; it must be 1 or more".into());
    }
    if device_of(target.params()) != device_of(draft.params()) {
        return wrong("the draft model is on another device than the target model".into());
    }
    let limit = config.limit("the prompt", prompt.len(), shape.context_length)?;
    let most = num_draft_tokens.min(limit - prompt.len());
    let run = || {
        let reads = limit.min(drafts.context_length);
        let mut work = Speculating {
            target: Reader::new(target, limit, most + 1)?,
            draft: Reader::new(draft, reads, most + 1)?,
            processors: Processors::new(config),
            config,
            tokens: prompt.to_vec(),
            prompt_len: prompt.len(),
            limit,
            out: Speculation::default(),
        };
        loop {
            // A round ends with a token of the target's own; a draft model of a shorter context is silent beyond it.
            let len = work.tokens.len();
            let count = most.min(limit - len - 1).min((drafts.context_length + 1).saturating_sub(len));
            if let Some(finish) = work.round(count)? {
                work.out.generation.finish = finish;
                return Ok(work.out);
            }
        }
    };
    inference(target.params(), || inference(draft.params(), || no_grad(run)))
}
