//! Encoder-decoder models at work: sources are read once, and answers grow from the decoder's start token.

use super::stepper::{Stepper, cache_options, check_prompts, device_of, inference, tokens_on};
use super::{Generate, Generation, GenerationConfig, beam};
use crate::transformer::{Encoded, Seq2SeqCache, Seq2SeqLm};
use kiln_autograd::no_grad;
use kiln_tensor::{Error, Result, Tensor};

struct Seq2SeqStepper<'a> {
    model: &'a dyn Seq2SeqLm,
    sources: Vec<Vec<u32>>,
    start: u32,
    pad: u32,
    /// Tokens of an answer at most.
    room: usize,
    state: Option<(Encoded, Seq2SeqCache)>,
}

impl Seq2SeqStepper<'_> {
    /// The sources as the encoder made them; shorter ones are padded on the right.
    fn encode(&self) -> Result<Encoded> {
        let device = device_of(self.model.params());
        let longest = self.sources.iter().map(Vec::len).max().unwrap_or(0);
        let extents = [self.sources.len(), longest];
        let padded =
            self.sources.iter().flat_map(|source| source.iter().copied().chain(std::iter::repeat_n(self.pad, longest - source.len())));
        let tokens = tokens_on(padded, extents, device)?;
        if self.sources.iter().all(|source| source.len() == longest) {
            return self.model.encode(&tokens, None);
        }
        let mask = self.sources.iter().flat_map(|source| (0..longest).map(|place| place < source.len())).collect();
        self.model.encode(&tokens, Some(&Tensor::from_vec(mask, extents)?.to_device(device)?))
    }

    fn advance(&mut self, tokens: &[u32]) -> Result<Tensor> {
        let Some((encoded, cache)) = &mut self.state else {
            return Err(Error::argument("generate", "a step before the start"));
        };
        let tokens = tokens_on(tokens.iter().copied(), [tokens.len(), 1], device_of(self.model.params()))?;
        let hidden = self.model.decode(&tokens, encoded, Some(cache))?;
        self.model.logits(&hidden.select(1, 0)?)
    }
}

impl Stepper for Seq2SeqStepper<'_> {
    fn start(&mut self) -> Result<Tensor> {
        let (model, rows) = (self.model, self.sources.len());
        inference(model.params(), || {
            let cache = Seq2SeqCache::new(model.shape(), rows, self.room, cache_options(model.params()))?;
            self.state = Some((self.encode()?, cache));
            self.advance(&vec![self.start; rows])
        })
    }

    fn step(&mut self, tokens: &[u32]) -> Result<Tensor> {
        inference(self.model.params(), || self.advance(tokens))
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        let Some((encoded, cache)) = &mut self.state else { return Ok(()) };
        if rows.iter().copied().eq(0..cache.batch()) {
            return Ok(());
        }
        no_grad(|| {
            *encoded = encoded.select(rows)?;
            cache.reorder(rows)
        })
    }
}

/// The model made ready for its sources, the prompts of its decoder, and the lengths that end each.
fn prepare<'a>(
    model: &'a dyn Seq2SeqLm,
    sources: &[Vec<u32>],
    config: &GenerationConfig,
) -> Result<(Seq2SeqStepper<'a>, Vec<Vec<u32>>, Vec<usize>)> {
    let shape = model.shape();
    config.validate(shape.vocab_size)?;
    check_prompts("source", sources, shape.vocab_size)?;
    if let Some((i, source)) = sources.iter().enumerate().find(|(_, source)| source.len() > shape.context_length) {
        let message = format!("source {i} has {} tokens, more than the context of {}; shorten it", source.len(), shape.context_length);
        return Err(Error::argument("generate", message));
    }
    let start = config.decoder_start_token_id.map_or_else(
        || u32::try_from(model.start_token()).map_err(|_| Error::argument("generate", "decoder_start_token_id is negative")),
        Ok,
    )?;
    let limit = config.limit("the decoder's start", 1, shape.context_length)?;
    let stepper = Seq2SeqStepper { model, sources: sources.to_vec(), start, pad: config.pad(), room: limit, state: None };
    Ok((stepper, vec![vec![start]; sources.len()], vec![limit; sources.len()]))
}

impl<'a> Generate<'a> {
    /// Answers of an encoder-decoder model to sources of any lengths, which start from `decoder_start_token_id` or else from what the model
    /// says. `max_length` and the penalties count the decoder's tokens only.
    ///
    /// # Errors
    /// As [`new`](Generate::new).
    pub fn seq2seq(model: &'a dyn Seq2SeqLm, sources: &[Vec<u32>], config: &GenerationConfig) -> Result<Self> {
        let (stepper, prompts, limits) = prepare(model, sources, config)?;
        Self::over(Box::new(stepper), &prompts, &limits, config)
    }
}

/// As [`generate`](super::generate), of an encoder-decoder model: the answers (translations, summaries) to sources, without the start token.
///
/// # Errors
/// As [`generate`](super::generate).
pub fn generate_seq2seq(model: &dyn Seq2SeqLm, sources: &[Vec<u32>], config: &GenerationConfig) -> Result<Vec<Generation>> {
    if config.num_beams > 1 {
        let (mut stepper, prompts, limits) = prepare(model, sources, config)?;
        return beam::beam_search(&mut stepper, &prompts, &limits, config);
    }
    Generate::seq2seq(model, sources, config)?.collect_all()
}
