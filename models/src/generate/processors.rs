//! What is done to a row of logits before a token is chosen, in the order and with the meaning of transformers' `LogitsProcessor`s.

use super::GenerationConfig;
use kiln_tensor::Result;

/// Where a sequence stands when its next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Prompt and answer so far, without padding.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt_len: usize,
    /// How many there can be at most.
    pub limit: usize,
}

/// Changes the logits of a sequence's next token; −∞ excludes one.
pub trait LogitsProcessor: Send + Sync {
    /// `logits` holds one value for each entry of the vocabulary. It depends on nothing but its arguments, so that a sequence's tokens do
    /// not depend on those beside it.
    ///
    /// # Errors
    /// As the processor says; generation ends with it.
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()>;
}

impl<F: Fn(Place<'_>, &mut [f32]) -> Result<()> + Send + Sync> LogitsProcessor for F {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        self(place, logits)
    }
}

fn exclude(logits: &mut [f32], token: u32) {
    if let Some(logit) = logits.get_mut(token as usize) {
        *logit = f32::NEG_INFINITY;
    }
}

/// Excludes everything else; those named get 0, as if they were certain.
fn force(logits: &mut [f32], tokens: &[u32]) {
    logits.fill(f32::NEG_INFINITY);
    for &token in tokens {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = 0.0;
        }
    }
}

/// Adds to the logit of each sequence's last token where the text ends with the tokens before it; of single tokens, everywhere.
#[derive(Clone, Debug)]
pub struct SequenceBias(
    /// Sequences and what is added.
    pub Vec<(Vec<u32>, f32)>,
);

impl LogitsProcessor for SequenceBias {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        for (sequence, bias) in &self.0 {
            let Some((&last, prefix)) = sequence.split_last() else { continue };
            if let Some(logit) = logits.get_mut(last as usize).filter(|_| place.tokens.ends_with(prefix)) {
                *logit += bias;
            }
        }
        Ok(())
    }
}

/// Divides positive and multiplies negative logits of tokens that occur already.
#[derive(Clone, Copy, Debug)]
pub struct RepetitionPenalty(
    /// Above 1 to discourage.
    pub f32,
);

impl LogitsProcessor for RepetitionPenalty {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let mut seen = vec![false; logits.len()];
        for &token in place.tokens {
            let Some(seen) = seen.get_mut(token as usize).filter(|seen| !**seen) else { continue };
            *seen = true;
            let logit = &mut logits[token as usize];
            *logit = if *logit < 0.0 { *logit * self.0 } else { *logit / self.0 };
        }
        Ok(())
    }
}

/// Excludes tokens that would complete a run of so many tokens that occurs already.
#[derive(Clone, Copy, Debug)]
pub struct NoRepeatNGram(
    /// Length of the run.
    pub usize,
);

impl LogitsProcessor for NoRepeatNGram {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let tokens = place.tokens;
        if self.0 == 0 || tokens.len() < self.0 {
            return Ok(());
        }
        let prefix = &tokens[tokens.len() + 1 - self.0..];
        for run in tokens.windows(self.0) {
            if let Some((&last, _)) = run.split_last().filter(|(_, before)| *before == prefix) {
                exclude(logits, last);
            }
        }
        Ok(())
    }
}

/// Excludes the end of the sequence before so many tokens.
#[derive(Clone, Debug)]
pub struct MinLength {
    /// Tokens of prompt and answer at least.
    pub min_length: usize,
    /// New tokens at least.
    pub min_new_tokens: usize,
    /// The tokens that end a sequence.
    pub eos_token_id: Vec<u32>,
}

impl LogitsProcessor for MinLength {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let (all, new) = (place.tokens.len(), place.tokens.len().saturating_sub(place.prompt_len));
        if all < self.min_length || new < self.min_new_tokens {
            self.eos_token_id.iter().for_each(|&token| exclude(logits, token));
        }
        Ok(())
    }
}

/// Leaves only this token after a single one.
#[derive(Clone, Copy, Debug)]
pub struct ForcedBos(
    /// The token.
    pub u32,
);

impl LogitsProcessor for ForcedBos {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        if place.tokens.len() == 1 {
            force(logits, &[self.0]);
        }
        Ok(())
    }
}

/// Leaves only these tokens for the last place.
#[derive(Clone, Debug)]
pub struct ForcedEos(
    /// The tokens.
    pub Vec<u32>,
);

impl LogitsProcessor for ForcedEos {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        if place.tokens.len() + 1 == place.limit {
            force(logits, &self.0);
        }
        Ok(())
    }
}

/// Excludes tokens, everywhere or at the beginning of the answer.
#[derive(Clone, Debug)]
pub struct SuppressTokens {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Only where the answer begins.
    pub at_begin: bool,
    /// Whether the token after a prompt of one token is forced ([`ForcedBos`]): the answer then begins behind it.
    pub after_forced: bool,
}

impl LogitsProcessor for SuppressTokens {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let begin = place.prompt_len + usize::from(self.after_forced && place.prompt_len == 1);
        if !self.at_begin || place.tokens.len() == begin {
            self.tokens.iter().for_each(|&token| exclude(logits, token));
        }
        Ok(())
    }
}

/// Divides all logits.
#[derive(Clone, Copy, Debug)]
pub struct Temperature(
    /// Below 1 to sharpen, above to flatten.
    pub f32,
);

impl LogitsProcessor for Temperature {
    fn process(&self, _: Place<'_>, logits: &mut [f32]) -> Result<()> {
        logits.iter_mut().for_each(|logit| *logit /= self.0);
        Ok(())
    }
}

/// Excludes all below the k-th largest; equals of it stay.
#[derive(Clone, Copy, Debug)]
pub struct TopK(
    /// How many stay.
    pub usize,
);

impl LogitsProcessor for TopK {
    fn process(&self, _: Place<'_>, logits: &mut [f32]) -> Result<()> {
        if self.0 == 0 || self.0 >= logits.len() {
            return Ok(());
        }
        let mut values = logits.to_vec();
        let (_, &mut least, _) = values.select_nth_unstable_by(self.0 - 1, |a, b| b.total_cmp(a));
        logits.iter_mut().filter(|logit| **logit < least).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }
}

/// Leaves the fewest tokens, likeliest first, whose probabilities sum to at least this.
#[derive(Clone, Copy, Debug)]
pub struct TopP(
    /// The sum, in (0, 1].
    pub f32,
);

impl LogitsProcessor for TopP {
    fn process(&self, _: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if self.0 >= 1.0 || !largest.is_finite() {
            return Ok(());
        }
        let weight = |logit: f32| f64::from((logit - largest).exp());
        let enough = logits.iter().map(|&logit| weight(logit)).sum::<f64>() * f64::from(self.0);
        let mut order: Vec<u32> = (0..logits.len() as u32).filter(|&token| logits[token as usize] > f32::NEG_INFINITY).collect();
        let (mut kept, mut sum) = (0, 0.0);
        // The nucleus is mostly a handful of tokens: sort a growing head of the order instead of all of it.
        let mut sorted = 0;
        let mut block = 64;
        let ascending = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        while kept < order.len() && (kept == 0 || sum < enough) {
            if kept == sorted {
                let rest = &mut order[sorted..];
                let count = block.min(rest.len());
                if count < rest.len() {
                    rest.select_nth_unstable_by(count - 1, ascending);
                }
                rest[..count].sort_unstable_by(ascending);
                sorted += count;
                block *= 4;
            }
            sum += weight(logits[order[kept] as usize]);
            kept += 1;
        }
        for &token in &order[kept..] {
            logits[token as usize] = f32::NEG_INFINITY;
        }
        Ok(())
    }
}

/// Excludes tokens less than so many times as likely as the likeliest.
#[derive(Clone, Copy, Debug)]
pub struct MinP(
    /// The factor, in 0 to 1.
    pub f32,
);

impl LogitsProcessor for MinP {
    fn process(&self, _: Place<'_>, logits: &mut [f32]) -> Result<()> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let least = largest + self.0.ln();
        logits.iter_mut().filter(|logit| **logit < least).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    }
}

/// A chain of processors.
#[derive(Default)]
pub struct Processors {
    chain: Vec<Box<dyn LogitsProcessor>>,
    /// How many come before those that shape the distribution of a draw.
    before_draws: usize,
}

impl Processors {
    /// What `config` asks for: biases, penalties and bans, and to draw also temperature, top-k, top-p and min-p, in this order.
    pub fn new(config: &GenerationConfig) -> Self {
        let mut chain = Self::default();
        let biases = config.logit_bias.iter().map(|(&token, &bias)| (vec![token], bias)).chain(config.sequence_bias.iter().cloned());
        chain.push_if(!config.logit_bias.is_empty() || !config.sequence_bias.is_empty(), || SequenceBias(biases.collect()));
        chain.push_if(config.repetition_penalty != 1.0, || RepetitionPenalty(config.repetition_penalty));
        chain.push_if(config.no_repeat_ngram_size > 0, || NoRepeatNGram(config.no_repeat_ngram_size));
        chain.push_if(!config.bad_words_ids.is_empty(), || bad_words(config));
        let (min_length, min_new_tokens, eos_token_id) = (config.min_length, config.min_new_tokens, config.eos_token_id.clone());
        chain.push_if(min_length.max(min_new_tokens) > 0, || MinLength { min_length, min_new_tokens, eos_token_id });
        if let Some(token) = config.forced_bos_token_id {
            chain.push(ForcedBos(token));
        }
        chain.push_if(!config.forced_eos_token_id.is_empty(), || ForcedEos(config.forced_eos_token_id.clone()));
        let after_forced = config.forced_bos_token_id.is_some();
        for (tokens, at_begin) in [(&config.suppress_tokens, false), (&config.begin_suppress_tokens, true)] {
            chain.push_if(!tokens.is_empty(), || SuppressTokens { tokens: tokens.clone(), at_begin, after_forced });
        }
        let before_draws = chain.chain.len();
        if config.do_sample {
            chain.push_if(config.temperature != 1.0, || Temperature(config.temperature));
            if let Some(k) = config.top_k.filter(|&k| k > 0) {
                chain.push(TopK(k));
            }
            if let Some(p) = config.top_p.filter(|&p| p < 1.0) {
                chain.push(TopP(p));
            }
            if let Some(p) = config.min_p.filter(|&p| p > 0.0) {
                chain.push(MinP(p));
            }
        }
        Self { before_draws, ..chain }
    }

    /// Puts a processor behind those that penalise and ban, and before temperature and what follows it.
    pub fn add(&mut self, processor: impl LogitsProcessor + 'static) {
        self.chain.insert(self.before_draws, Box::new(processor));
        self.before_draws += 1;
    }

    fn push(&mut self, processor: impl LogitsProcessor + 'static) {
        self.chain.push(Box::new(processor));
    }

    fn push_if<P: LogitsProcessor + 'static>(&mut self, wanted: bool, processor: impl FnOnce() -> P) {
        if wanted {
            self.push(processor());
        }
    }
}

/// A ban of a sequence is a bias of −∞; single ends of the sequence are not banned, as in the reference implementation.
fn bad_words(config: &GenerationConfig) -> SequenceBias {
    let is_end = |word: &[u32]| matches!(word, [token] if config.eos_token_id.contains(token));
    let words = config.bad_words_ids.iter().filter(|word| !is_end(word));
    SequenceBias(words.map(|word| (word.clone(), f32::NEG_INFINITY)).collect())
}

impl LogitsProcessor for Processors {
    fn process(&self, place: Place<'_>, logits: &mut [f32]) -> Result<()> {
        self.chain.iter().try_for_each(|processor| processor.process(place, logits))
    }
}
