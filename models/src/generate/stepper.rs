//! A model at work on a batch: prompts in, logits of the next tokens out, token by token.

use crate::nn::Params;
use crate::transformer::{CausalLm, KvCache, Pass};
use kiln_autograd::no_grad;
use kiln_tensor::{Device, Error, Result, Tensor, TensorOptions, autocast_dtype};

/// What sampling and beam search know of a model.
pub(super) trait Stepper {
    /// The logits (B, V) after the prompts.
    fn start(&mut self) -> Result<Tensor>;

    /// The logits (B, V) after one more token of each row.
    fn step(&mut self, tokens: &[u32]) -> Result<Tensor>;

    /// Makes row i what row `rows[i]` is.
    fn reorder(&mut self, rows: &[usize]) -> Result<()>;
}

/// Runs `f` without recording and in evaluation mode, which is undone after.
pub(super) fn inference<R>(params: &Params, f: impl FnOnce() -> R) -> R {
    params.evaluating(|| no_grad(f))
}

/// The dtype that keys and values will have, and the model's device.
pub(super) fn cache_options(params: &Params) -> TensorOptions {
    let weights = params.params();
    let first = weights.iter().find(|param| param.dtype().is_float());
    let dtype = autocast_dtype().or(first.map(|param| param.dtype())).unwrap_or(params.options().dtype);
    TensorOptions { dtype, device: device_of(params) }
}

/// Where the weights are.
pub(super) fn device_of(params: &Params) -> Device {
    params.params().first().map_or(params.options().device, |param| param.get().device())
}

/// Checks prompts before anything is computed. `what` names the argument in errors.
pub(super) fn check_prompts(what: &str, prompts: &[Vec<u32>], vocab_size: usize) -> Result<()> {
    if prompts.is_empty() {
        return Err(Error::argument("generate", format!("there is no {what}")));
    }
    for (i, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(Error::argument("generate", format!("{what} {i} is empty; start with a token, such as the BOS")));
        }
        if let Some((place, token)) = prompt.iter().enumerate().find(|(_, token)| **token as usize >= vocab_size) {
            let message = format!("{what} {i}: token {token} at place {place} is not in the vocabulary of {vocab_size}");
            return Err(Error::index("generate", message));
        }
    }
    Ok(())
}

/// Tokens (B, T) of i64 on `device`.
pub(super) fn tokens_on(tokens: impl Iterator<Item = u32>, [rows, columns]: [usize; 2], device: Device) -> Result<Tensor> {
    Tensor::from_vec(tokens.map(i64::from).collect(), [rows, columns])?.to_device(device)
}

/// A cache for `rows` sequences of at most `tokens` tokens, the last `slack` of which may be truncated; of a window only if that is less.
pub(super) fn make_cache(model: &dyn CausalLm, rows: usize, tokens: usize, slack: usize) -> Result<KvCache> {
    let (shape, options) = (model.shape(), cache_options(model.params()));
    match model.attention_span().map(|window| window.saturating_add(slack)) {
        Some(window) if tokens > window.saturating_mul(2) => KvCache::windowed(shape, rows, window, window * 2, options),
        _ => KvCache::new(shape, rows, tokens, options),
    }
}

/// Reads more tokens of a single sequence, in as many passes as the cache needs; the hidden states (1, T, C) of the last pass, which is the
/// only one if there are not more tokens than a window.
pub(super) fn feed(model: &dyn CausalLm, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor> {
    let device = device_of(model.params());
    let mut rest = tokens;
    loop {
        let (part, after) = rest.split_at(rest.len().min(cache.room().max(1)));
        let hidden = model.hidden_states(&tokens_on(part.iter().copied(), [1, part.len()], device)?, Pass::cached(cache))?;
        if after.is_empty() {
            return Ok(hidden);
        }
        rest = after;
    }
}

/// A decoder-only model with its cache. Prompts of different lengths are padded on the left.
pub(super) struct CausalStepper<'a> {
    model: &'a dyn CausalLm,
    prompts: Vec<Vec<u32>>,
    cache: Option<KvCache>,
    /// Tokens after the prompt at most.
    room: usize,
    /// How many places at the left of each row are padding.
    padding: Vec<usize>,
    pad: u32,
}

impl<'a> CausalStepper<'a> {
    /// `room` is how many tokens will follow the prompts.
    pub fn new(model: &'a dyn CausalLm, prompts: &[Vec<u32>], room: usize, pad: u32) -> Self {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let padding = prompts.iter().map(|prompt| longest - prompt.len()).collect();
        Self { model, prompts: prompts.to_vec(), cache: None, room, padding, pad }
    }

    /// Hidden states of the next tokens (B, T), given row by row.
    fn advance(&mut self, columns: usize, tokens: Vec<u32>) -> Result<Tensor> {
        let Self { model, cache: Some(cache), padding, .. } = self else {
            return Err(Error::argument("generate", "a step before the start"));
        };
        let rows = padding.len();
        let device = device_of(model.params());
        let tokens = tokens_on(tokens.into_iter(), [rows, columns], device)?;
        if padding.iter().all(|&padding| padding == 0) {
            return model.hidden_states(&tokens, Pass::cached(cache));
        }
        cache.make_room(columns)?;
        let (first, seen) = (cache.seen() - cache.len(), cache.seen());
        // Rows that have ended are carried along; they stay in the last place that there is.
        let last = model.shape().context_length.saturating_sub(1);
        let places = |from: usize| (0..columns).map(move |i| (seen + i).saturating_sub(from).min(last) as i64);
        let positions = Tensor::from_vec(padding.iter().flat_map(|&padding| places(padding)).collect(), [rows, columns])?;
        let keys = cache.len() + columns;
        let mask = padding.iter().flat_map(|&padding| (0..keys).map(move |key| first + key >= padding)).collect();
        let mask = Tensor::from_vec(mask, [rows, keys])?.to_device(device)?;
        let pass = Pass { positions: Some(&positions.to_device(device)?), key_mask: Some(&mask), cache: Some(cache), ..Pass::default() };
        model.hidden_states(&tokens, pass)
    }

    /// The logits (B, V) at the last place of hidden states (B, T, C).
    fn last_logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let [_, t, _] = hidden.dims_n("generate")?;
        self.model.logits(&hidden.select(1, t as isize - 1)?)
    }
}

impl Stepper for CausalStepper<'_> {
    fn start(&mut self) -> Result<Tensor> {
        let prompts = std::mem::take(&mut self.prompts);
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        inference(self.model.params(), || {
            self.cache = Some(make_cache(self.model, prompts.len(), longest + self.room.saturating_sub(1), 0)?);
            let padded: Vec<Vec<u32>> = prompts
                .iter()
                .map(|prompt| std::iter::repeat_n(self.pad, longest - prompt.len()).chain(prompt.iter().copied()).collect())
                .collect();
            let mut hidden = None;
            let mut from = 0;
            // A cache that is shorter than the prompts takes them in parts.
            while from < longest {
                let room = self.cache.as_ref().map_or(1, KvCache::room);
                let to = longest.min(from + room.max(1));
                hidden = Some(self.advance(to - from, padded.iter().flat_map(|row| row[from..to].iter().copied()).collect())?);
                from = to;
            }
            let hidden = hidden.ok_or_else(|| Error::argument("generate", "the prompts are empty"))?;
            self.last_logits(&hidden)
        })
    }

    fn step(&mut self, tokens: &[u32]) -> Result<Tensor> {
        inference(self.model.params(), || {
            let hidden = self.advance(1, tokens.to_vec())?;
            self.last_logits(&hidden)
        })
    }

    fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        if rows.iter().copied().eq(0..self.padding.len()) {
            return Ok(());
        }
        let padding = rows.iter().map(|&row| self.padding.get(row).copied()).collect::<Option<_>>();
        self.padding = padding.ok_or_else(|| Error::index("generate", format!("rows {rows:?} of {}", self.padding.len())))?;
        let cache = self.cache.as_mut();
        cache.map_or(Ok(()), |cache| no_grad(|| cache.reorder(rows)))
    }
}
