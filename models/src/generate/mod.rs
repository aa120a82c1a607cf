//! Text generation with language models: greedy, sampling, beam search, token by token or whole answers.
//!
//! All of it works on token ids; [`TextStream`] puts a tokenizer before and behind.

mod beam;
mod config;
pub mod processors;
mod sample;
mod seq2seq;
mod speculative;
mod stepper;
mod stream;
mod text;

pub use config::{EarlyStopping, GenerationConfig};
pub use processors::{LogitsProcessor, Place, Processors};
pub use seq2seq::generate_seq2seq;
pub use speculative::{Speculation, generate_speculative};
pub use stream::{Generate, NewToken, Step, StopRule};
pub use text::{StopStrings, TextStream, stop_at_text};

use crate::transformer::CausalLm;
use kiln_tensor::Result;

/// Why an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FinishReason {
    /// With a token of `eos_token_id`, which is its last.
    Eos,
    /// At the limit of its length, or of the model's context.
    #[default]
    Length,
    /// With one of `stop_sequences`, or because a rule said so.
    Stop,
}

/// An answer.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Generation {
    /// The new tokens, with the one that ended them.
    pub tokens: Vec<u32>,
    /// The log-probability of each under the model.
    pub logprobs: Vec<f32>,
    /// The log-probability of each under the model with logits divided by the temperature: what a policy gradient at this temperature
    /// needs. Other processors are left out of it.
    pub scaled_logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Of a beam search: the sum of log-probabilities (after processors), divided by its length to the power `length_penalty`.
    pub score: Option<f32>,
}

/// Answers to prompts of any lengths, `num_return_sequences` each, in the order of the prompts. A prompt's answers do not depend on those
/// beside it (but with dynamic and LongRoPE scaling of positions, where the longest row decides, as in transformers).
///
/// ```
/// # use kiln_models::generate::{FinishReason, GenerationConfig, generate};
/// # use kiln_models::nn::Params;
/// # use kiln_models::transformer::Gpt2Config;
/// # fn main() -> kiln_tensor::Result<()> {
/// # let config = Gpt2Config { vocab_size: 50, n_positions: 32, n_embd: 16, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
/// let model = config.build(&Params::seeded(0))?;
/// let config = GenerationConfig { max_new_tokens: Some(5), do_sample: true, top_p: Some(0.9), seed: 1, ..GenerationConfig::default() };
/// let answers = generate(&model, &[vec![1, 2, 3], vec![4]], &config)?;
/// assert_eq!((answers[1].tokens.len(), answers[1].finish), (5, FinishReason::Length));
/// # Ok(()) }
/// ```
///
/// # Errors
/// If a prompt is empty, leaves no room in the context or holds a token that is not in the vocabulary, `config` is out of range, or the
/// model's logits are not finite.
pub fn generate(model: &dyn CausalLm, prompts: &[Vec<u32>], config: &GenerationConfig) -> Result<Vec<Generation>> {
    if config.num_beams > 1 {
        let (mut stepper, limits) = stream::prepare(model, prompts, config)?;
        return beam::beam_search(&mut stepper, prompts, &limits, config);
    }
    Generate::new(model, prompts, config)?.collect_all()
}
