//! Keys and values of the tokens so far, in memory that is allocated once; through a sliding window, of the last tokens.

use super::LmShape;
use kiln_tensor::{Error, Result, Shape, Tensor, TensorOptions};

/// The keys and values of each layer, (B, nkv, capacity, hs), of which the first `len` are filled.
pub struct KvCache {
    layers: Vec<[Tensor; 2]>,
    batch: usize,
    capacity: usize,
    len: usize,
    /// Tokens that a new one may still see, if the model looks through a window.
    span: Option<usize>,
    /// Tokens that were here once.
    dropped: usize,
}

impl KvCache {
    /// An empty cache for `batch` sequences of at most `capacity` tokens.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(shape: LmShape, batch: usize, capacity: usize, options: impl Into<TensorOptions>) -> Result<Self> {
        let options = options.into();
        let extents = [batch, shape.num_key_value_heads, capacity, shape.head_dim];
        let layer = || Ok([Tensor::zeros(extents, options)?, Tensor::zeros(extents, options)?]);
        Ok(Self { layers: (0..shape.num_layers).map(|_| layer()).collect::<Result<_>>()?, batch, capacity, len: 0, span: None, dropped: 0 })
    }

    /// An empty cache for a model all of whose layers see no further than `window` keys, the query's own included
    /// ([`attention_span`](super::CausalLm::attention_span)). It takes any number of tokens: when it is full, the last `window` − 1 move to
    /// its front and those before them are forgotten. With a capacity of 2 · `window` or more each token is moved at most once on average.
    ///
    /// # Errors
    /// If the capacity is less than the window, or there is no memory for it.
    pub fn windowed(shape: LmShape, batch: usize, window: usize, capacity: usize, options: impl Into<TensorOptions>) -> Result<Self> {
        if window == 0 || capacity < window {
            let message = format!("a window of {window} tokens needs a capacity of as many at least, and one or more; got {capacity}");
            return Err(Error::argument("kv_cache", message));
        }
        Ok(Self { span: Some(window - 1), ..Self::new(shape, batch, capacity, options)? })
    }

    /// How many tokens of each sequence it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many it has been given: those it holds and, behind a window, those it has dropped. The place of the next token.
    pub fn seen(&self) -> usize {
        self.dropped + self.len
    }

    /// How many tokens of a sequence one pass can add, once [`make_room`](KvCache::make_room) has made what room there can be.
    pub fn room(&self) -> usize {
        self.capacity - self.span.map_or(self.len, |span| self.len.min(span))
    }

    /// Drops tokens that no new one sees, if that is needed to add `added`. A model does this at the start of a pass; who gives it a mask
    /// of the keys does it before, to know how many they are.
    ///
    /// # Errors
    /// If there is no memory for the move.
    pub fn make_room(&mut self, added: usize) -> Result<()> {
        let Some(span) = self.span.filter(|&span| self.len > span && self.capacity - self.len < added) else { return Ok(()) };
        let first = self.len - span;
        for held in self.layers.iter_mut().flatten().filter(|_| span > 0) {
            let last = held.narrow(2, first, span)?.copy()?;
            held.write_slice(2, 0, &last)?;
        }
        self.dropped += first;
        self.len = span;
        Ok(())
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many it has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many sequences it serves.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Writes the keys and values (B, nkv, T, hs) of new tokens behind those that `layer` holds, and returns all of the layer,
    /// (B, nkv, len + T, hs) each. Every layer of a pass is written at the same place; [`advance`](KvCache::advance) ends the pass.
    ///
    /// # Errors
    /// If there is no room, or the extents are not the cache's.
    pub fn append(&mut self, layer: usize, key: &Tensor, value: &Tensor) -> Result<[Tensor; 2]> {
        let [batch, _, added, _] = key.dims_n("kv_cache")?;
        let end = self.len + added;
        if end > self.capacity || batch != self.batch {
            let message = format!(
                "{added} tokens of {batch} sequences after {} do not fit a cache of {} sequences of {} tokens",
                self.len, self.batch, self.capacity
            );
            return Err(Error::shape("kv_cache", message));
        }
        let held = self.layers.get_mut(layer).ok_or_else(|| Error::index("kv_cache", format!("there is no layer {layer}")))?;
        let [keys, values] = held;
        for (held, new) in [(&mut *keys, key), (&mut *values, value)] {
            held.write_slice(2, self.len, new)?;
        }
        Ok([keys.narrow(2, 0, end)?, values.narrow(2, 0, end)?])
    }

    /// Counts `added` tokens as held, once all layers have written them.
    pub fn advance(&mut self, added: usize) {
        self.len = (self.len + added).min(self.capacity);
    }

    /// Forgets all tokens after the first `len` of those that it holds.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Makes row i what row `rows[i]` is, as a beam search needs it.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        self.layers.iter_mut().try_for_each(|layer| select_rows(layer, rows))?;
        self.batch = rows.len();
        Ok(())
    }

    /// Shape of a layer's keys, as allocated.
    pub fn layer_shape(&self) -> Option<Shape> {
        self.layers.first().map(|[keys, _]| *keys.shape())
    }
}

/// Makes row i of both what row `rows[i]` is.
fn select_rows(pair: &mut [Tensor; 2], rows: &[usize]) -> Result<()> {
    let index = Tensor::from_vec(rows.iter().map(|&row| row as i64).collect(), [rows.len()])?;
    for held in pair {
        *held = held.index_select(0, &index.to_device(held.device())?)?;
    }
    Ok(())
}

/// What a decoder with an encoder keeps between passes: its own keys and values, and those of the source, which the first pass computes.
/// Another source needs another cache.
pub struct Seq2SeqCache {
    own: KvCache,
    /// Of each layer that has read the source, (B, nkv, S, hs).
    source: Vec<[Tensor; 2]>,
}

impl Seq2SeqCache {
    /// An empty cache for `batch` sequences of at most `capacity` tokens, the first included; `shape` is the decoder's.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(shape: LmShape, batch: usize, capacity: usize, options: impl Into<TensorOptions>) -> Result<Self> {
        Ok(Self { own: KvCache::new(shape, batch, capacity, options)?, source: Vec::new() })
    }

    /// How many tokens of each sequence it holds.
    pub fn len(&self) -> usize {
        self.own.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// How many it has room for.
    pub fn capacity(&self) -> usize {
        self.own.capacity()
    }

    /// How many sequences it serves.
    pub fn batch(&self) -> usize {
        self.own.batch()
    }

    /// Forgets all tokens after the first `len`; the source stays.
    pub fn truncate(&mut self, len: usize) {
        self.own.truncate(len);
    }

    /// Makes row i what row `rows[i]` is, of the source as well.
    ///
    /// # Errors
    /// If a row is out of range.
    pub fn reorder(&mut self, rows: &[usize]) -> Result<()> {
        self.own.reorder(rows)?;
        self.source.iter_mut().try_for_each(|layer| select_rows(layer, rows))
    }

    /// The decoder's own keys and values.
    pub(super) fn own(&mut self) -> &mut KvCache {
        &mut self.own
    }

    /// The source's keys and values in `layer`, which `project` makes the first time.
    pub(super) fn source(&mut self, layer: usize, project: impl FnOnce() -> Result<[Tensor; 2]>) -> Result<[Tensor; 2]> {
        if let Some(held) = self.source.get(layer) {
            return Ok(held.clone());
        }
        let made = project()?;
        self.source.push(made.clone());
        Ok(made)
    }
}
