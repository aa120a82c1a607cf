//! Rotary positions of a model: its frequencies, the scaling variants that stretch its context, and the tables of angles.

use kiln_tensor::{Error, Result, Tensor};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};

/// Tables of angles reach no further than this: a place beyond it is a mistake.
const MAX_PLACES: usize = 1 << 24;

/// How the frequencies θ⁻²ⁱᐟᵈ of a rotary embedding are changed to reach further than the model was trained for. The names are
/// those of `rope_type` in a Hugging Face `config.json`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// As they are.
    #[default]
    Default,
    /// All divided by `factor`: Chen et al., *Extending Context Window of LLMs via Positional Interpolation*, 2023.
    Linear {
        /// Stretch of the positions.
        factor: f64,
    },
    /// A base that grows with the sequence, once that is longer than the original context ("NTK-aware" scaling).
    Dynamic {
        /// Stretch at full length.
        factor: f64,
    },
    /// Low frequencies are interpolated, high ones kept, scores sharpened: Peng et al., *YaRN*, 2023.
    Yarn {
        /// Stretch of the positions.
        factor: f64,
        /// Context that the model was trained with; the model's own if absent.
        #[serde(default)]
        original_max_position_embeddings: Option<usize>,
        /// Turns within the original context above which a frequency is kept; 32 if absent.
        #[serde(default)]
        beta_fast: Option<f64>,
        /// Turns below which it is interpolated fully; 1 if absent.
        #[serde(default)]
        beta_slow: Option<f64>,
        /// Factor of both tables; 0.1 ln(factor) + 1 if absent.
        #[serde(default)]
        attention_factor: Option<f64>,
        /// Scale in that logarithm, of models which give it.
        #[serde(default)]
        mscale: Option<f64>,
        /// Its counterpart for all dimensions.
        #[serde(default)]
        mscale_all_dim: Option<f64>,
        /// Whether the borders of the ramp are rounded to whole frequencies; true if absent.
        #[serde(default)]
        truncate: Option<bool>,
    },
    /// A factor for each frequency, one set for short and one for long sequences: Ding et al., *LongRoPE*, 2024.
    LongRope {
        /// Divisors of the frequencies up to the original context.
        short_factor: Vec<f64>,
        /// Divisors beyond it.
        long_factor: Vec<f64>,
        /// Stretch, which the factor of the tables is computed from; the ratio of the contexts if absent.
        #[serde(default)]
        factor: Option<f64>,
        /// Factor of both tables; √(1 + ln(stretch)/ln(original context)) if absent.
        #[serde(default)]
        attention_factor: Option<f64>,
        /// Context that the model was trained with; the model's own if absent.
        #[serde(default)]
        original_max_position_embeddings: Option<usize>,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a ramp between: Llama 3.1's.
    Llama3 {
        /// Stretch of the long wavelengths.
        factor: f64,
        /// Wavelengths above the original context divided by this are stretched fully.
        low_freq_factor: f64,
        /// Wavelengths below the original context divided by this are kept.
        high_freq_factor: f64,
        /// Context that the model was trained with.
        original_max_position_embeddings: usize,
    },
}

/// The rotary embedding of a model.
#[derive(Clone, PartialEq, Debug)]
pub struct RopeConfig {
    /// The base θ.
    pub theta: f64,
    /// Elements of a head that turn.
    pub width: usize,
    /// The model's context.
    pub max_position_embeddings: usize,
    /// The variant.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    fn plain(&self, theta: f64) -> Result<Vec<f64>> {
        Tensor::rotary_frequencies(self.width, theta)?.to_vec()
    }

    /// Whether the frequencies depend on the length of the sequence.
    fn is_dynamic(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. } | RopeScaling::LongRope { .. })
    }

    /// How long sequences may be: the model's context, or what a scaling beyond it stretches that to.
    pub fn reach(&self) -> usize {
        let stretched = match &self.scaling {
            RopeScaling::Dynamic { factor } => self.max_position_embeddings as f64 * factor,
            RopeScaling::Yarn { factor, original_max_position_embeddings: original, .. } => {
                original.unwrap_or(self.max_position_embeddings) as f64 * factor
            }
            _ => 0.0,
        };
        (stretched as usize).max(self.max_position_embeddings)
    }

    /// Frequencies of the pairs, f64 in radians a token, and the factor of cosines and sines, for sequences of `len` tokens.
    ///
    /// # Errors
    /// If the width is odd, the lists of factors do not fit it, or a frequency is not finite.
    pub fn frequencies(&self, len: usize) -> Result<(Tensor, f64)> {
        let plain = self.plain(self.theta)?;
        let (frequencies, factor) = match &self.scaling {
            RopeScaling::Default => (plain, 1.0),
            RopeScaling::Linear { factor } => (plain.iter().map(|f| f / factor).collect(), 1.0),
            RopeScaling::Dynamic { factor } => {
                let original = self.max_position_embeddings as f64;
                let (len, width) = ((len as f64).max(original), self.width as f64);
                let stretch = factor * len / original - (factor - 1.0);
                (self.plain(self.theta * stretch.powf(width / (width - 2.0)))?, 1.0)
            }
            RopeScaling::Yarn { .. } => self.yarn(&plain)?,
            RopeScaling::LongRope { .. } => self.long_rope(&plain, len)?,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = *original_max_position_embeddings as f64;
                let scaled = |f: &f64| {
                    let turns = original * f / std::f64::consts::TAU;
                    let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    kept * f + (1.0 - kept) * f / factor
                };
                (plain.iter().map(scaled).collect(), 1.0)
            }
        };
        if let Some(wrong) = frequencies.iter().chain([&factor]).find(|f| !f.is_finite()) {
            let message =
                format!("a frequency or the factor of the tables is {wrong}: check rope_theta and the numbers of {:?}", self.scaling);
            return Err(Error::argument("rope", message));
        }
        let count = frequencies.len();
        Ok((Tensor::from_vec(frequencies, [count])?, factor))
    }

    fn yarn(&self, plain: &[f64]) -> Result<(Vec<f64>, f64)> {
        let RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: original,
            beta_fast,
            beta_slow,
            attention_factor,
            mscale,
            mscale_all_dim,
            truncate,
        } = &self.scaling
        else {
            return Err(Error::argument("rope", "no YaRN"));
        };
        let original = original.unwrap_or(self.max_position_embeddings) as f64;
        let width = self.width as f64;
        // The pair that turns `turns` times within the original context.
        let pair_of = |turns: f64| width * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln());
        let (mut low, mut high) = (pair_of(beta_fast.unwrap_or(32.0)), pair_of(beta_slow.unwrap_or(1.0)));
        if truncate.unwrap_or(true) {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(width - 1.0));
        let span = if low == high { 0.001 } else { high - low };
        let blend = |(i, f): (usize, &f64)| {
            let interpolated = ((i as f64 - low) / span).clamp(0.0, 1.0);
            interpolated * f / factor + (1.0 - interpolated) * f
        };
        let sharpen = |scale: f64| if *factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        let sharpened = match (attention_factor, mscale, mscale_all_dim) {
            (Some(given), ..) => *given,
            (None, Some(scale), Some(all)) if *scale != 0.0 && *all != 0.0 => sharpen(*scale) / sharpen(*all),
            _ => sharpen(1.0),
        };
        Ok((plain.iter().enumerate().map(blend).collect(), sharpened))
    }

    fn long_rope(&self, plain: &[f64], len: usize) -> Result<(Vec<f64>, f64)> {
        let RopeScaling::LongRope { short_factor, long_factor, factor, attention_factor, original_max_position_embeddings } = &self.scaling
        else {
            return Err(Error::argument("rope", "no LongRoPE"));
        };
        let original = original_max_position_embeddings.unwrap_or(self.max_position_embeddings);
        let (name, divisors) = if len > original { ("long_factor", long_factor) } else { ("short_factor", short_factor) };
        if divisors.len() != plain.len() {
            return Err(Error::format("rope", format!("{name} has {} entries for {} frequencies", divisors.len(), plain.len())));
        }
        let stretch = factor.unwrap_or(self.max_position_embeddings as f64 / original as f64);
        let sharpened = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / (original as f64).ln()).sqrt() };
        Ok((plain.iter().zip(divisors).map(|(f, d)| f / d).collect(), attention_factor.unwrap_or(sharpened)))
    }
}

/// Where the tokens of a pass stand in their sequences.
#[derive(Clone)]
pub(super) enum Positions {
    /// At consecutive places from here on, in every sequence.
    From(usize),
    /// At these: i64 (B, T) or (T).
    Given(Tensor),
}

/// Makes the tables, and keeps those that serve every pass.
pub(super) struct Rope {
    config: RopeConfig,
    tables: Mutex<Option<[Tensor; 2]>>,
}

impl Rope {
    pub fn new(config: RopeConfig) -> Result<Self> {
        config.frequencies(1)?;
        Ok(Self { config, tables: Mutex::new(None) })
    }

    /// Cosines and sines (T, pairs) or (B, 1, T, pairs) for `added` tokens of each sequence at `positions`.
    pub fn tables(&self, positions: &Positions, added: usize, device: kiln_tensor::Device) -> Result<[Tensor; 2]> {
        let len = match positions {
            Positions::From(start) => start + added,
            Positions::Given(positions) => places_of(positions)?,
        };
        match positions {
            _ if self.config.is_dynamic() => {
                // The reference counts the places in use, not the padding.
                let places = match positions {
                    Positions::From(start) => consecutive(*start, added)?,
                    Positions::Given(positions) => positions.clone(),
                };
                both(&self.make(&places, len)?, |table| with_heads(table)?.to_device(device))
            }
            Positions::From(start) => both(&self.upto(len, device)?, |table| table.narrow(0, *start, added)),
            Positions::Given(positions) => both(&self.upto(len, device)?, |table| with_heads(&positions.embedding(table)?)),
        }
    }

    fn make(&self, positions: &Tensor, len: usize) -> Result<[Tensor; 2]> {
        let (frequencies, factor) = self.config.frequencies(len)?;
        let (cos, sin) = positions.rotary_tables(&frequencies)?;
        if factor == 1.0 { Ok([cos, sin]) } else { Ok([cos.mul_scalar(factor)?, sin.mul_scalar(factor)?]) }
    }

    /// Tables of the places below `len` at least.
    fn upto(&self, len: usize, device: kiln_tensor::Device) -> Result<[Tensor; 2]> {
        let mut kept = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(tables) if tables[0].dims()[0] >= len && tables[0].device() == device => Ok(tables.clone()),
            _ => {
                // Each growth doubles, so that a sequence of one token more at a time makes few tables.
                let len = len.next_power_of_two().max(64);
                let [cos, sin] = self.make(&consecutive(0, len)?, len)?;
                let tables = [cos.to_device(device)?, sin.to_device(device)?];
                Ok(kept.insert(tables).clone())
            }
        }
    }
}

/// One more than the furthest of `positions`.
fn places_of(positions: &Tensor) -> Result<usize> {
    let furthest = positions.max(())?.item_f64()?;
    if (0.0..MAX_PLACES as f64).contains(&furthest) {
        return Ok(furthest as usize + 1);
    }
    Err(Error::index("rope", format!("position {furthest} is not in 0 to {MAX_PLACES}")))
}

/// The places `start`, `start + 1`, …
pub(super) fn consecutive(start: usize, count: usize) -> Result<Tensor> {
    Tensor::from_vec((start as i64..(start + count) as i64).collect(), [count])
}

/// (B, T, pairs) as (B, 1, T, pairs), to broadcast over heads.
fn with_heads(table: &Tensor) -> Result<Tensor> {
    if table.rank() == 3 { table.unsqueeze(1) } else { Ok(table.clone()) }
}

/// `f` of both tables.
fn both(tables: &[Tensor; 2], f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[Tensor; 2]> {
    let [cos, sin] = tables;
    Ok([f(cos)?, f(sin)?])
}
