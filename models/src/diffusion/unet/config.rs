//! What the configurations of the networks have in common: values for each stage, and options that are not supported.

use super::embedding::Waves;
use super::network::Plan;
use super::stage::{AttentionPlan, StagePlan};
use crate::diffusion::blocks::ResnetOptions;
use kiln_tensor::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Extents beyond this are no network's, and their products could not be computed.
const MAX_EXTENT: usize = 1 << 20;

/// One value for all stages, or one for each.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore<T> {
    /// For all.
    One(T),
    /// For each, from the first on the way down.
    More(Vec<T>),
}

impl<T> From<T> for OneOrMore<T> {
    fn from(value: T) -> Self {
        OneOrMore::One(value)
    }
}

impl<T, const N: usize> From<[T; N]> for OneOrMore<T> {
    fn from(values: [T; N]) -> Self {
        OneOrMore::More(values.into())
    }
}

impl<T: Copy> OneOrMore<T> {
    /// The value, or the first of several.
    pub(crate) fn first(&self) -> Option<T> {
        match self {
            OneOrMore::One(value) => Some(*value),
            OneOrMore::More(values) => values.first().copied(),
        }
    }

    /// One value for each of `stages`.
    pub(super) fn each(&self, field: &str, stages: usize) -> Result<Vec<T>> {
        match self {
            OneOrMore::One(value) => Ok(vec![*value; stages]),
            OneOrMore::More(values) if values.len() == stages => Ok(values.clone()),
            OneOrMore::More(values) => Err(wrong(format!("{field} has {} values for {stages} stages", values.len()))),
        }
    }
}

/// An error in a configuration.
pub(super) fn wrong(message: impl Into<String>) -> Error {
    Error::format("config.json", message)
}

/// An error for a value that is not supported.
pub(super) fn unsupported(field: &str, value: impl std::fmt::Debug, expected: &str) -> Error {
    wrong(format!("{field} {value:?} is not supported; it must be {expected}"))
}

/// An error if a field of `other` has a value that changes the network in a way that is not supported: those that may be there are
/// listed with the JSON values that they may have.
pub(super) fn expect_supported(other: &Map<String, Value>, allowed: &[(&str, &[&str])]) -> Result<()> {
    for (field, values) in allowed {
        let Some(value) = other.get(*field) else { continue };
        let of_all = |value: &Value| values.contains(&value.to_string().as_str());
        let fits = match value {
            Value::Array(each) => !each.is_empty() && each.iter().all(of_all),
            value => of_all(value),
        };
        if !fits {
            return Err(wrong(format!("{field} {value} is not supported; it must be {}", values.join(" or "))));
        }
    }
    Ok(())
}

/// What every network's configuration says, for [`Common::plan`].
pub(super) struct Common<'a> {
    pub in_channels: usize,
    pub conv_in_kernel: usize,
    pub channels: &'a [usize],
    pub layers: Vec<usize>,
    pub down_block_types: &'a [String],
    pub downsample_padding: usize,
    pub groups: usize,
    pub eps: f64,
    pub dropout: f64,
    pub resnet_time_scale_shift: &'a str,
    pub act_fn: &'a str,
    pub time_width: usize,
}

impl Common<'_> {
    /// Residual blocks as all stages have them.
    pub fn resnet(&self) -> Result<ResnetOptions> {
        let scale_shift = match self.resnet_time_scale_shift {
            "default" => false,
            "scale_shift" => true,
            other => return Err(unsupported("resnet_time_scale_shift", other, "\"default\" or \"scale_shift\"")),
        };
        if !matches!(self.act_fn, "silu" | "swish") {
            return Err(unsupported("act_fn", self.act_fn, "\"silu\" or \"swish\""));
        }
        let Self { groups, eps, time_width, dropout, .. } = *self;
        Ok(ResnetOptions { groups, eps, time_width: Some(time_width), scale_shift, dropout, output_scale: 1.0 })
    }

    fn check_extents(&self) -> Result<()> {
        let fits = |field: &str, value: usize| match value {
            1..=MAX_EXTENT => Ok(()),
            _ => Err(wrong(format!("{field} {value} must lie in 1..={MAX_EXTENT}"))),
        };
        fits("in_channels", self.in_channels)?;
        fits("norm_num_groups", self.groups)?;
        self.channels.iter().try_for_each(|&value| fits("block_out_channels", value))?;
        self.layers.iter().try_for_each(|&value| fits("layers_per_block", value))?;
        if let Some(odd) = self.channels.iter().find(|&&channels| !channels.is_multiple_of(self.groups)) {
            return Err(wrong(format!("norm_num_groups {} does not divide the {odd} of block_out_channels", self.groups)));
        }
        expect_kernel("conv_in_kernel", self.conv_in_kernel)
    }

    /// The way down, with the attention that `attention(type, stage)` gives for the stages.
    pub fn plan(&self, mid: Option<(usize, StagePlan)>, attention: impl Fn(&str, usize) -> Result<AttentionPlan>) -> Result<Plan> {
        self.check_extents()?;
        let (stages, resnet) = (self.channels.len(), self.resnet()?);
        expect_count("down_block_types", self.down_block_types.len(), stages)?;
        let stage = |(i, kind): (usize, &String)| Ok(StagePlan { attention: attention(kind, i)?, resnet });
        let pads_ends = match self.downsample_padding {
            0 => true,
            1 => false,
            other => return Err(unsupported("downsample_padding", other, "0 or 1")),
        };
        Ok(Plan {
            in_channels: self.in_channels,
            conv_in_kernel: self.conv_in_kernel,
            channels: self.channels.to_vec(),
            layers: self.layers.clone(),
            down: self.down_block_types.iter().enumerate().map(stage).collect::<Result<_>>()?,
            mid,
            pads_ends,
        })
    }
}

/// An error unless `field` has one value for each stage.
pub(super) fn expect_count(field: &str, count: usize, stages: usize) -> Result<()> {
    if count == stages { Ok(()) } else { Err(wrong(format!("{field} has {count} values, block_out_channels {stages}"))) }
}

/// An error unless a convolution with this kernel can keep the resolution.
pub(super) fn expect_kernel(field: &str, kernel: usize) -> Result<()> {
    if kernel % 2 == 1 && kernel <= 99 { Ok(()) } else { Err(unsupported(field, kernel, "odd and less than 100")) }
}

/// An error unless an extent is one that a network can have.
pub(super) fn expect_extent(field: &str, value: usize) -> Result<usize> {
    if (1..=MAX_EXTENT).contains(&value) { Ok(value) } else { Err(wrong(format!("{field} {value} must lie in 1..={MAX_EXTENT}"))) }
}

/// What sums are divided by: an error unless that can be done.
pub(super) fn expect_scale(field: &str, value: f64) -> Result<f64> {
    if value.is_normal() { Ok(value) } else { Err(unsupported(field, value, "a number other than 0")) }
}

/// The waves of the timesteps, and the width of their embedding: four times that of the first stage if the configuration has no other.
pub(super) fn time_extents(channels: &[usize], width: Option<usize>, flip: bool, shift: i64) -> Result<(Waves, usize)> {
    let first = *channels.first().ok_or_else(|| wrong("block_out_channels is empty: there must be one stage at least"))?;
    let first = expect_extent("block_out_channels", first)?;
    let width = width.map_or(Ok(4 * first), |width| expect_extent("time_embedding_dim", width))?;
    Ok((Waves { width: first, flip, shift: shift as f64 }, width))
}
