//! What every block of a pass needs besides its input: which keys each query sees, and where the tokens stand.

use super::Pass;
use super::rope::{Positions, Rope};
use kiln_tensor::{DType, Device, Error, Result, Tensor};

/// Which keys the queries of a pass see.
#[derive(Clone, Default)]
pub(crate) struct Visible {
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
pub(crate) fn expect_tokens(tokens: &Tensor) -> Result<[usize; 2]> {
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
pub(crate) fn expect_mask(mask: Option<&Tensor>, tokens: &Tensor) -> Result<Option<Tensor>> {
    let Some(mask) = mask else { return Ok(None) };
    if mask.shape() != tokens.shape() || mask.dtype() != DType::Bool {
        let message = format!("the mask {} {} must be bool {}", mask.dtype(), mask.shape(), tokens.shape());
        return Err(Error::shape("transformer", message));
    }
    Ok(mask.to_vec()?.contains(&false).then(|| mask.clone()))
}

/// Shared by all blocks of a pass.
#[derive(Clone, Default)]
pub(crate) struct Context {
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
    if let Some(given) = pass.positions {
        let fits = given.dims() == [added] || given.dims() == [batch, added];
        if given.dtype() != DType::I64 || !fits {
            let message = format!("positions {} {} must be i64 [{added}] or [{batch}, {added}]", given.dtype(), given.shape());
            return Err(Error::shape("transformer", message));
        }
        return Ok(Positions::Given(given.clone()));
    }
    let (mask, segments) = (key_mask(extent, pass)?, segments(extent, pass)?);
    if mask.is_none() && segments.is_none() {
        return Ok(Positions::From(start));
    }
    if start > past {
        return Err(Error::argument("transformer", "beside a cache that has dropped tokens, a key_mask needs the positions given"));
    }
    let keys = extent.keys();
    let mut places = Vec::with_capacity(batch * added);
    for row in 0..batch {
        let mut seen = 0;
        for key in 0..keys {
            let begins = segments.as_ref().is_some_and(|numbers| key > 0 && numbers[row * keys + key] != numbers[row * keys + key - 1]);
            let is_real = mask.as_ref().is_none_or(|mask| mask[row * keys + key]);
            seen = if begins { 0 } else { seen } + i64::from(is_real);
            if key >= past {
                places.push((seen - 1).max(0));
            }
        }
    }
    Ok(Positions::Given(Tensor::from_vec(places, [batch, added])?.to_device(device)?))
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
    pub(super) fn causal(
        extent: Extent,
        pass: &Pass<'_>,
        positions: &Positions,
        rope: Option<&Rope>,
        window: Option<usize>,
    ) -> Result<Self> {
        let rotary = rope.map(|rope| rope.tables(positions, extent.added, extent.device)).transpose()?;
        let windowed = window.map(|window| visible(extent, pass, Some(window))).transpose()?;
        Ok(Self { full: visible(extent, pass, None)?, windowed, rotary })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_tensor::Generator;

    const BATCH: usize = 3;

    /// One combination: every query and key, and every place, against the definition.
    fn check(past: usize, added: usize, window: Option<usize>, mask: Option<&Tensor>, segments: Option<&Tensor>) -> Result<()> {
        let extent = Extent { batch: BATCH, added, past, start: past, device: Device::Cpu };
        let pass = Pass { key_mask: mask, segments, ..Pass::default() };
        let keys = past + added;
        let is_real: Vec<bool> = mask.map_or(Ok(vec![true; BATCH * keys]), Tensor::to_vec)?;
        let numbers: Vec<i64> = segments.map_or(Ok(vec![0; BATCH * keys]), Tensor::to_vec)?;

        let Visible { mask: found, causal } = visible(extent, &pass, window)?;
        let found: Vec<bool> = match found {
            Some(found) => found.expand([BATCH, 1, added, keys])?.to_vec()?,
            None => vec![true; BATCH * added * keys],
        };
        let places: Vec<i64> = match positions(extent, &pass)? {
            Positions::From(start) => (0..BATCH).flat_map(|_| start as i64..(start + added) as i64).collect(),
            Positions::Given(given) => given.to_vec()?,
        };
        for row in 0..BATCH {
            for query in 0..added {
                let at = past + query;
                let together = |key: usize| numbers[row * keys + key] == numbers[row * keys + at];
                let before = (0..at).filter(|&key| is_real[row * keys + key] && together(key)).count() as i64;
                if is_real[row * keys + at] {
                    assert_eq!(places[row * added + query], before, "place of {row}, {query} of {past} + {added}");
                }
                for key in 0..keys {
                    let is_near = key <= at && at - key < window.unwrap_or(usize::MAX);
                    let expected = is_near && is_real[row * keys + key] && together(key);
                    let sees = found[(row * added + query) * keys + key] && (!causal || key <= query);
                    assert_eq!(sees, expected, "row {row}, query {query}, key {key} of {past} + {added}, window {window:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn every_combination_is_the_definition() -> Result<()> {
        let generator = Generator::new(5);
        for (past, added) in [(0, 1), (0, 2), (0, 7), (3, 1), (3, 4), (6, 1), (1, 6)] {
            let keys = past + added;
            let mask = generator.rand_bool(0.6, [BATCH, keys])?;
            let all = Tensor::full([BATCH, keys], 1.0, DType::Bool)?;
            // Runs of random lengths.
            let segments = generator.rand_bool(0.4, [BATCH, keys])?.to_dtype(DType::I64)?.cumsum(1)?;
            for window in [None, Some(1), Some(2), Some(5), Some(100)] {
                for mask in [None, Some(&mask), Some(&all)] {
                    check(past, added, window, mask, None)?;
                    if past == 0 {
                        check(past, added, window, mask, Some(&segments))?;
                    }
                }
            }
        }
        Ok(())
    }
}
