//! Trained adapters as one file of `diffusers`.

use super::Lora;
use super::select::PREFIX;
use super::weights::LoraPart;
use crate::nn::StateDict;
use kiln_tensor::io::safetensors;
use kiln_tensor::{Error, Result, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Saves adapters of the parts of a pipeline as one file that `pipe.load_lora_weights` of `diffusers` reads (it looks for
/// `pytorch_lora_weights.safetensors` in a folder).
///
/// The scale α/r is multiplied into the matrices, so that every reader sees 1; where ranks differ, zeros make them equal, as readers
/// take one α for all.
///
/// # Errors
/// If an adapter has what the format cannot hold (DoRA's magnitudes, tables, biases, modules trained in full), or the file cannot be
/// written.
pub fn save_lora_weights(path: impl AsRef<Path>, adapters: &[(LoraPart, &Lora)]) -> Result<()> {
    let mut tensors = StateDict::new();
    for (part, lora) in adapters {
        if !lora.companions().is_empty() {
            return Err(Error::argument("lora", "the format of diffusers has no place for biases and modules trained in full"));
        }
        let state = lora.params().state_dict();
        let ranks = state.iter().filter(|(name, _)| name.ends_with(".lora_A.weight"));
        let rank = ranks.map(|(_, a)| a.dim(0)).collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0);
        for (name, tensor) in state {
            let (module, matrix) =
                split(&name).ok_or_else(|| Error::argument("lora", format!("the format of diffusers has no `{name}`")))?;
            let (axis, tensor) = match matrix {
                "lora_A" => (0, tensor),
                _ => (1, tensor.mul_scalar(lora.config().scale(module)?)?),
            };
            tensors.insert(format!("{part}.{module}.{matrix}.weight"), padded(&tensor, axis, rank)?);
        }
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::save(path, &tensors, &metadata)
}

/// The module and the matrix that a name is of.
fn split(name: &str) -> Option<(&str, &str)> {
    let (module, matrix) = name.strip_prefix(PREFIX)?.strip_prefix('.')?.strip_suffix(".weight")?.rsplit_once('.')?;
    matches!(matrix, "lora_A" | "lora_B").then_some((module, matrix))
}

/// `tensor` with zeros at the end of an axis, up to `rank`.
fn padded(tensor: &Tensor, axis: isize, rank: usize) -> Result<Tensor> {
    let more = rank.saturating_sub(tensor.dim(axis)?);
    if more == 0 {
        return tensor.contiguous();
    }
    let zeros = tensor.narrow(axis, 0, 1)?.zeros_like()?;
    Tensor::cat(&[vec![tensor], vec![&zeros; more]].concat(), axis)
}
