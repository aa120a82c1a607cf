//! Answers that the policy itself writes, and their rewards: the caller's functions generate and judge.

use crate::data::TokenSequence;
use crate::generate::{FinishReason, GenerationConfig, generate};
use crate::transformer::CausalLm;
use kiln_autograd::no_grad;
use kiln_tensor::{Error, Generator, Result};

/// What a trainer asks of the function that generates.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct RolloutRequest<'a> {
    /// The prompts, one for each answer that is wanted: a prompt of several answers stands there several times.
    pub prompts: &'a [Vec<u32>],
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// What logits are to be divided by; the draw is to be from all of the vocabulary.
    pub temperature: f64,
    /// Of the draws: another at each step, the same after a resume.
    pub seed: u64,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Completion {
    /// The new tokens, with the one that ended them.
    pub tokens: Vec<u32>,
    /// Whether the answer came to an end (EOS) rather than to the limit of its length.
    pub finished: bool,
}

/// The usual function that generates: draws from all of the vocabulary, by [`generate`], until one of these tokens ends an answer.
///
/// ```
/// # use kiln_models::align::{GrpoLossOptions, GrpoOptions, GrpoTrainer, sampler};
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::Gpt2Config;
/// # use std::sync::Arc;
/// # fn main() -> kiln_tensor::Result<()> {
/// # let config = Gpt2Config { vocab_size: 7, n_positions: 8, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
/// let policy = Arc::new(config.build(&Params::seeded(0))?);
/// let loss = GrpoLossOptions { max_completion_length: 4, ..GrpoLossOptions::default() };
/// let mut trainer = GrpoTrainer::new(policy, None, GrpoOptions { loss, ..GrpoOptions::default() })?;
/// // Short answers are better.
/// let reward = |_: &[Vec<u32>], answers: &[_]| Ok(answers.iter().map(|a: &kiln_models::align::Completion| -(a.tokens.len() as f64)).collect());
/// let metrics = trainer.step(&[vec![1, 2], vec![3]], sampler(&[6]), reward)?;
/// assert!(metrics.reward < 0.0 && metrics.length <= 4.0);
/// # Ok(()) }
/// ```
pub fn sampler(eos_token_id: &[u32]) -> impl Fn(&dyn CausalLm, &RolloutRequest<'_>) -> Result<Vec<Completion>> + Clone + use<> {
    let eos_token_id = eos_token_id.to_vec();
    move |model, request| {
        let config = GenerationConfig {
            max_new_tokens: Some(request.max_new_tokens),
            do_sample: true,
            temperature: request.temperature as f32,
            seed: request.seed,
            eos_token_id: eos_token_id.clone(),
            ..GenerationConfig::default()
        };
        let answers = generate(model, request.prompts, &config)?.into_iter();
        Ok(answers.map(|answer| Completion { finished: answer.finish != FinishReason::Length, tokens: answer.tokens }).collect())
    }
}

/// Prompts with the policy's answers and their scores.
pub(super) struct Rollout {
    pub completions: Vec<Completion>,
    pub samples: Vec<TokenSequence>,
    pub scores: Vec<f64>,
}

impl Rollout {
    /// Asks for the answers and for their scores.
    pub fn collect(
        op: &str,
        policy: &dyn CausalLm,
        request: &RolloutRequest<'_>,
        mut generate: impl FnMut(&dyn CausalLm, &RolloutRequest<'_>) -> Result<Vec<Completion>>,
        mut score: impl FnMut(&[Vec<u32>], &[Completion]) -> Result<Vec<f64>>,
    ) -> Result<Self> {
        let prompts = request.prompts;
        if prompts.is_empty() {
            return Err(Error::argument(op, "there are no prompts"));
        }
        if let Some(i) = prompts.iter().position(Vec::is_empty) {
            return Err(Error::argument(op, format!("prompt {i} is empty; start with a token, such as the BOS")));
        }
        let completions = policy.params().evaluating(|| no_grad(|| generate(policy, request)))?;
        if completions.len() != prompts.len() {
            return Err(Error::argument(op, format!("{} answers were generated for {} prompts", completions.len(), prompts.len())));
        }
        let scores = no_grad(|| score(prompts, &completions))?;
        if scores.len() != prompts.len() {
            return Err(Error::argument(op, format!("{} scores were given for {} answers", scores.len(), prompts.len())));
        }
        if let Some(i) = scores.iter().position(|score| !score.is_finite()) {
            return Err(Error::argument(op, format!("the score of answer {i} is {}", scores[i])));
        }
        let samples = prompts.iter().zip(&completions).map(|(prompt, answer)| TokenSequence::completion(prompt, &answer.tokens)).collect();
        Ok(Self { completions, samples, scores })
    }

    /// The mean number of tokens of an answer.
    pub fn mean_length(&self) -> f64 {
        mean(self.completions.iter().map(|c| c.tokens.len() as f64))
    }

    /// The share of answers that came to an end.
    pub fn finished(&self) -> f64 {
        mean(self.completions.iter().map(|c| f64::from(u8::from(c.finished))))
    }
}

/// The mean; 0 of nothing.
pub(super) fn mean(numbers: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = numbers.len().max(1) as f64;
    numbers.sum::<f64>() / count
}

/// A seed for the next rollout.
pub(super) fn next_seed(generator: &Generator) -> u64 {
    let state = generator.reserve(1);
    // SplitMix64's step and mix, so that neighbouring seeds share nothing.
    let mut z = state.seed.wrapping_add(state.offset.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// An order of `count` rows.
pub(super) fn shuffled(generator: &Generator, count: usize) -> Result<Vec<usize>> {
    Ok(generator.randperm(count)?.to_vec::<i64>()?.into_iter().map(|i| i.unsigned_abs() as usize).collect())
}
