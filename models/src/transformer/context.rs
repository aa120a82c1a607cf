//! What every block of a pass needs besides its input: which keys each query sees, and where the tokens stand.

use super::Pass;
use super::rope::{Positions, Rope};
use kiln_tensor::{DType, Device, Error, Result, Tensor};

/// Which keys the queries of a pass see.
#[derive(Clone, Default)]
pub(super) struct Visible {
    /// Bool, broadcast to (B, nh, T, S); `None` if all that `causal` leaves.
    pub mask: Option<Tensor>,
    /// Query i sees the keys 0 to i only.
    pub causal: bool,
}

impl Visible {
    /// All keys that `mask`, bool (B, S), does not hide.
    pub fn padded(mask: Option<&Tensor>) -> Result<Self> {
        let mask = mask.map(|mask| mask.unsqueeze(1)?.unsqueeze(1)).transpose()?;
        Ok(Self { mask, causal: false })
    }
}

/// The batch and the length of tokens (B, T), which must be i64 and not empty.
pub(super) fn expect_tokens(tokens: &Tensor) -> Result<[usize; 2]> {
    let [batch, len] = tokens.dims_n("transformer")?;
    if tokens.dtype() != DType::I64 {
        return Err(Error::unsupported_dtype("transformer", tokens.dtype(), "tokens of i64"));
    }
    if batch == 0 || len == 0 {
        let message = format!("tokens {} hold nothing; start with a token, such as the BOS", tokens.shape());
        return Err(Error::shape("transformer", message));
    }
    Ok([batch, len])
}

/// The mask of a batch of tokens (B, S), checked; `None` if it hides nothing.
pub(super) fn expect_mask(mask: Option<&Tensor>, tokens: &Tensor) -> Result<Option<Tensor>> {
    let Some(mask) = mask else { return Ok(None) };
    if mask.shape() != tokens.shape() || mask.dtype() != DType::Bool {
        let message = format!("the mask {} {} must be bool {}", mask.dtype(), mask.shape(), tokens.shape());
        return Err(Error::shape("transformer", message));
    }
    Ok(mask.to_vec()?.contains(&false).then(|| mask.clone()))
}

/// Shared by all blocks of a pass.
#[derive(Clone, Default)]
pub(super) struct Context {
    /// For layers that look at the whole sequence.
    pub full: Visible,
    /// For layers of a sliding window.
    pub windowed: Option<Visible>,
    /// Cosines and sines.
    pub rotary: Option<[Tensor; 2]>,
}

/// Tokens of this pass, and how many the cache holds before them.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub batch: usize,
    pub added: usize,
    pub past: usize,
    /// The place of the first: what the cache holds and what it has dropped.
    pub start: usize,
    pub device: Device,
}

impl Extent {
    fn keys(&self) -> usize {
        self.past + self.added
    }
}

/// Where the tokens of `pass` stand.
pub(super) fn positions(extent: Extent, pass: &Pass<'_>) -> Result<Positions> {
    let Extent { batch, added, past, start, device } = extent;
    let of_rows = |values: Vec<i64>| Ok(Positions::Given(Tensor::from_vec(values, [batch, added])?.to_device(device)?));
    if let Some(given) = pass.positions {
        let fits = given.dims() == [added] || given.dims() == [batch, added];
        if given.dtype() != DType::I64 || !fits {
            let message = format!("positions {} {} must be i64 [{added}] or [{batch}, {added}]", given.dtype(), given.shape());
            return Err(Error::shape("transformer", message));
        }
        return Ok(Positions::Given(given.clone()));
    }
    if let Some(mask) = key_mask(extent, pass)? {
        let counts = mask.chunks_exact(extent.keys().max(1)).flat_map(|row| {
            let mut seen = 0;
            let places: Vec<i64> = row
                .iter()
                .map(|&real| {
                    seen += real as i64;
                    (seen - 1).max(0)
                })
                .collect();
            places[past..].to_vec()
        });
        return of_rows(counts.collect());
    }
    if let Some(segments) = segments(extent, pass)? {
        let places = segments.chunks_exact(added.max(1)).flat_map(|row| {
            let mut place = 0;
            (0..row.len()).map(move |i| {
                place = if i > 0 && row[i] == row[i - 1] { place + 1 } else { 0 };
                place
            })
        });
        return of_rows(places.collect());
    }
    Ok(Positions::From(start))
}

/// The mask of padding in row-major order, (B, S).
fn key_mask(extent: Extent, pass: &Pass<'_>) -> Result<Option<Vec<bool>>> {
    let Some(mask) = pass.key_mask else { return Ok(None) };
    if mask.dims() != [extent.batch, extent.keys()] || mask.dtype() != DType::Bool {
        let message = format!(
            "key_mask {} {} must be bool [{}, {}]: sequences × (tokens in the cache + new ones)",
            mask.dtype(),
            mask.shape(),
            extent.batch,
            extent.keys()
        );
        return Err(Error::shape("transformer", message));
    }
    Ok(Some(mask.to_vec()?))
}

/// The numbers of the packed sequences in row-major order, (B, T).
fn segments(extent: Extent, pass: &Pass<'_>) -> Result<Option<Vec<i64>>> {
    let Some(segments) = pass.segments else { return Ok(None) };
    if segments.dims() != [extent.batch, extent.added] || segments.dtype() != DType::I64 {
        let message = format!("segments {} {} must be i64 [{}, {}]", segments.dtype(), segments.shape(), extent.batch, extent.added);
        return Err(Error::shape("transformer", message));
    }
    if extent.past > 0 {
        return Err(Error::argument("transformer", "packed sequences do not go with a cache that holds tokens"));
    }
    Ok(Some(segments.to_vec()?))
}

/// What a causal model's queries see; with a window, only the last `window` keys.
pub(super) fn visible(extent: Extent, pass: &Pass<'_>, window: Option<usize>) -> Result<Visible> {
    let Extent { batch, added, past, device, .. } = extent;
    let keys = extent.keys();
    let window = window.filter(|&window| window < keys);
    let (padding, segments) = (key_mask(extent, pass)?, segments(extent, pass)?);
    // The kernel's own causal rule counts from the first key, which holds if none is in the cache; a single query sees all.
    let causal = past == 0 && added > 1;
    let by_order = window.is_some() || !(causal || added == 1);
    if !by_order && segments.is_none() {
        let mask = pass.key_mask.filter(|_| padding.is_some_and(|mask| mask.contains(&false)));
        let mask = mask.map(|mask| mask.reshape([batch, 1, 1, keys])?.to_device(device)).transpose()?;
        return Ok(Visible { mask, causal });
    }
    let sees = |row: usize, query: usize, key: usize| {
        let place = past + query;
        key <= place
            && window.is_none_or(|window| place - key < window)
            && padding.as_ref().is_none_or(|mask| mask[row * keys + key])
            && segments.as_ref().is_none_or(|numbers| numbers[row * added + query] == numbers[row * added + key])
    };
    let rows = if padding.is_some() || segments.is_some() { batch } else { 1 };
    let mut mask = Vec::with_capacity(rows * added * keys);
    for row in 0..rows {
        for query in 0..added {
            mask.extend((0..keys).map(|key| sees(row, query, key)));
        }
    }
    Ok(Visible { mask: Some(Tensor::from_vec(mask, [rows, 1, added, keys])?.to_device(device)?), causal })
}

impl Context {
    /// The context of a causal pass.
    pub fn causal(extent: Extent, pass: &Pass<'_>, positions: &Positions, rope: Option<&Rope>, window: Option<usize>) -> Result<Self> {
        let rotary = rope.map(|rope| rope.tables(positions, extent.added, extent.device)).transpose()?;
        let windowed = window.map(|window| visible(extent, pass, Some(window))).transpose()?;
        Ok(Self { full: visible(extent, pass, None)?, windowed, rotary })
    }
}
