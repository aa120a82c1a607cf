//! Beam search: the likeliest whole answers instead of the likeliest next tokens, as transformers' `generate` searches them.

use super::processors::{LogitsProcessor, Place, Processors};
use super::stepper::Stepper;
use super::{EarlyStopping, FinishReason, Generation, GenerationConfig};
use kiln_autograd::no_grad;
use kiln_tensor::{DType, Error, Result, Tensor};

/// The score of what cannot be chosen while anything else can.
const UNWANTED: f32 = -1e9;

/// An answer in the making, or a finished one.
#[derive(Clone)]
struct Beam {
    /// With the prompt.
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// The sum of log-probabilities; once finished, divided by its length to the power of the penalty.
    score: f32,
    finish: FinishReason,
}

/// A token that may follow a running beam.
#[derive(Clone, Copy)]
struct Candidate {
    beam: usize,
    token: u32,
    score: f32,
    logprob: f32,
}

/// The search for the answers to one prompt.
struct Search<'a> {
    config: &'a GenerationConfig,
    processors: &'a Processors,
    prompt_len: usize,
    limit: usize,
    running: Vec<Beam>,
    /// The best first.
    finished: Vec<Beam>,
    can_improve: bool,
    is_over: bool,
}

impl<'a> Search<'a> {
    fn new(config: &'a GenerationConfig, processors: &'a Processors, prompt: &[u32], limit: usize) -> Self {
        let start = |i: usize| Beam {
            tokens: prompt.to_vec(),
            logprobs: Vec::new(),
            // All beams are the same at first, so only one may be continued.
            score: if i == 0 { 0.0 } else { UNWANTED },
            finish: FinishReason::Length,
        };
        let running = (0..config.num_beams).map(start).collect();
        let prompt_len = prompt.len();
        Self { config, processors, prompt_len, limit, running, finished: Vec::new(), can_improve: true, is_over: false }
    }

    fn penalty(&self, len: usize) -> f32 {
        (len as f64).powf(f64::from(self.config.length_penalty)) as f32
    }

    fn is_full(&self) -> bool {
        self.finished.len() >= self.config.num_beams
    }

    /// The best continuations of all running beams, of log-probabilities (beams, V): so many that as many as are followed go on.
    fn candidates(&self, logprobs: &mut [f32], vocab: usize) -> Result<Vec<Candidate>> {
        let count = self.config.num_beams * (1 + self.config.eos_token_id.len()).max(2);
        let mut best: Vec<Candidate> = Vec::with_capacity(count + 1);
        for ((i, beam), row) in self.running.iter().enumerate().zip(logprobs.chunks_exact_mut(vocab)) {
            let raw = row.to_vec();
            self.processors.process(Place { tokens: &beam.tokens, prompt_len: self.prompt_len, limit: self.limit }, row)?;
            for (token, (&logprob, raw)) in row.iter().zip(raw).enumerate() {
                let score = logprob + beam.score;
                if best.len() == count && best.last().is_none_or(|last| last.score >= score) {
                    continue;
                }
                let at = best.partition_point(|better| better.score >= score);
                best.insert(at, Candidate { beam: i, token: token as u32, score, logprob: raw });
                best.truncate(count);
            }
        }
        if best.first().is_none_or(|first| first.score.is_nan() || first.score == f32::NEG_INFINITY) {
            let message = "every continuation is excluded; loosen bad_words_ids, suppress_tokens, logit_bias or the processors";
            return Err(Error::argument("generate", message));
        }
        Ok(best)
    }

    /// Why a beam ends with this candidate, if it does.
    fn finish(&self, beam: &Beam) -> Option<FinishReason> {
        if beam.tokens.last().is_some_and(|token| self.config.eos_token_id.contains(token)) {
            return Some(FinishReason::Eos);
        }
        let new = beam.tokens.get(self.prompt_len..).unwrap_or_default();
        if self.config.stop_sequences.iter().any(|end| new.ends_with(end)) {
            return Some(FinishReason::Stop);
        }
        (beam.tokens.len() >= self.limit).then_some(FinishReason::Length)
    }

    /// Takes in the log-probabilities of the next tokens; returns which running beam each of the new ones continues.
    fn advance(&mut self, logprobs: &mut [f32], vocab: usize) -> Result<Vec<usize>> {
        let num_beams = self.config.num_beams;
        let closed = !self.can_improve || (self.is_full() && self.config.early_stopping == EarlyStopping::Yes);
        let (mut running, mut parents) = (Vec::with_capacity(num_beams), Vec::with_capacity(num_beams));
        for (rank, candidate) in self.candidates(logprobs, vocab)?.into_iter().enumerate() {
            let Candidate { beam: parent, token, score, logprob } = candidate;
            let mut beam = self.running[parent].clone();
            beam.tokens.push(token);
            beam.logprobs.push(logprob);
            beam.score = score;
            match self.finish(&beam) {
                // Those behind the first are there to go on only.
                Some(finish) if rank < num_beams && !closed => {
                    beam.score = score / self.penalty(beam.logprobs.len());
                    self.finished.push(Beam { finish, ..beam });
                }
                Some(_) => {}
                None if running.len() < num_beams => {
                    running.push(beam);
                    parents.push(parent);
                }
                None => {}
            }
        }
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(num_beams);
        self.running = running;
        self.is_over = self.decide();
        Ok(parents)
    }

    /// Whether the search is over, after a step.
    fn decide(&mut self) -> bool {
        let Some(best) = self.running.first() else { return true };
        let len = match self.config.early_stopping {
            EarlyStopping::Never if self.config.length_penalty > 0.0 => self.limit - self.prompt_len,
            _ => best.logprobs.len(),
        };
        let worst = self.finished.last().filter(|_| self.is_full()).map_or(UNWANTED, |worst| worst.score);
        self.can_improve &= best.score / self.penalty(len) > worst;
        !self.can_improve || (self.is_full() && self.config.early_stopping == EarlyStopping::Yes)
    }

    fn answers(self) -> impl Iterator<Item = Generation> + 'a {
        let prompt_len = self.prompt_len;
        self.finished.into_iter().take(self.config.num_return_sequences).map(move |beam| Generation {
            tokens: beam.tokens.get(prompt_len..).unwrap_or_default().to_vec(),
            scaled_logprobs: beam.logprobs.clone(),
            logprobs: beam.logprobs,
            finish: beam.finish,
            score: Some(beam.score),
        })
    }
}

/// The `num_return_sequences` best answers to each prompt, the best first. `limits` are the lengths that end each.
///
/// Source: the algorithm of transformers' `_beam_search`, from log-probabilities in f32; with `early_stopping = Never` and a penalty of 0
/// it is the textbook's.
pub(super) fn beam_search(
    stepper: &mut dyn Stepper,
    prompts: &[Vec<u32>],
    limits: &[usize],
    config: &GenerationConfig,
) -> Result<Vec<Generation>> {
    let processors = Processors::new(config);
    let mut searches: Vec<_> = prompts.iter().zip(limits).map(|(prompt, &limit)| Search::new(config, &processors, prompt, limit)).collect();
    let logits = stepper.start()?;
    // Every beam of a prompt starts from the same row.
    let mut rows: Vec<usize> = (0..searches.len()).flat_map(|i| std::iter::repeat_n(i, config.num_beams)).collect();
    stepper.reorder(&rows)?;
    let index = Tensor::from_vec(rows.iter().map(|&row| row as i64).collect(), [rows.len()])?.to_device(logits.device())?;
    let mut logits = no_grad(|| logits.index_select(0, &index))?;
    loop {
        let [_, vocab] = logits.dims_n("generate")?;
        let mut logprobs: Vec<f32> = no_grad(|| logits.to_dtype(DType::F32)?.log_softmax(-1)?.to_vec())?;
        if logprobs.iter().any(|logprob| logprob.is_nan()) {
            return Err(Error::argument("generate", "logits are NaN or infinite; check the weights and their dtype"));
        }
        rows.clear();
        let (mut first, mut next) = (0, Vec::new());
        for search in searches.iter_mut().filter(|search| !search.is_over) {
            let end = first + search.running.len();
            let own = logprobs.get_mut(first * vocab..end * vocab).unwrap_or_default();
            let parents = search.advance(own, vocab)?;
            if !search.is_over {
                rows.extend(parents.iter().map(|parent| first + parent));
                next.extend(search.running.iter().filter_map(|beam| beam.tokens.last().copied()));
            }
            first = end;
        }
        if rows.is_empty() {
            return Ok(searches.into_iter().flat_map(Search::answers).collect());
        }
        stepper.reorder(&rows)?;
        logits = stepper.step(&next)?;
    }
}
