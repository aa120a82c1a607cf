//! The autoencoder.

use crate::nn::StateDict;
use kiln_tensor::{Error, Result, Tensor};

const ATTENTION: [(&str, &str); 5] = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")];

/// The tensors of an autoencoder (below `first_stage_model.`) under the names of `AutoencoderKL`: its 1×1 convolutions of attention are
/// matrices there. What else the file holds there, such as a loss, is left out.
///
/// # Errors
/// If a name of encoder or decoder is none of LDM's, or counts a level that cannot be.
pub fn vae_from_ldm(state: StateDict) -> Result<StateDict> {
    let level = |name: &String| name.strip_prefix("decoder.up.")?.split('.').next()?.parse::<usize>().ok();
    let beyond = |last: usize| Error::format("vae_from_ldm", format!("`decoder.up.{last}` is no level of LDM's"));
    let last = state.keys().filter_map(level).max();
    let levels = last.map_or(Ok(0), |last| last.checked_add(1).ok_or_else(|| beyond(last)))?;
    let mut out = StateDict::new();
    for (name, tensor) in state {
        let wanted = ["encoder.", "decoder.", "quant_conv.", "post_quant_conv."].iter().any(|start| name.starts_with(start));
        if wanted {
            let new = renamed(&name, levels).ok_or_else(|| Error::format("vae_from_ldm", format!("`{name}` is no name of LDM's")))?;
            let tensor = if new.contains(".attentions.") { to_matrix(tensor)? } else { tensor };
            out.insert(new, tensor);
        }
    }
    Ok(out)
}

/// (outputs, inputs, 1, 1) → (outputs, inputs).
fn to_matrix(tensor: Tensor) -> Result<Tensor> {
    match tensor.dims() {
        &[outputs, inputs, 1, 1] | &[outputs, inputs, 1] => tensor.reshape([outputs, inputs]),
        _ => Ok(tensor),
    }
}

fn renamed(name: &str, levels: usize) -> Option<String> {
    if name.starts_with("quant_conv.") || name.starts_with("post_quant_conv.") {
        return Some(name.to_owned());
    }
    let (half, rest) = name.split_once('.')?;
    let parts: Vec<&str> = rest.split('.').collect();
    let new = match parts[..] {
        ["conv_in" | "conv_out", _] => rest.to_owned(),
        ["norm_out", end] => format!("conv_norm_out.{end}"),
        ["mid", block @ ("block_1" | "block_2"), layer, end] => {
            format!("mid_block.resnets.{}.{}.{end}", if block == "block_1" { 0 } else { 1 }, resnet(layer))
        }
        ["mid", "attn_1", layer, end] => {
            let (_, new) = ATTENTION.iter().find(|(old, _)| *old == layer)?;
            format!("mid_block.attentions.0.{new}.{end}")
        }
        ["down", i, "block", j, layer, end] => format!("down_blocks.{i}.resnets.{j}.{}.{end}", resnet(layer)),
        ["down", i, "downsample", "conv", end] => format!("down_blocks.{i}.downsamplers.0.conv.{end}"),
        ["up", i, "block", j, layer, end] => format!("up_blocks.{}.resnets.{j}.{}.{end}", mirrored(i, levels)?, resnet(layer)),
        ["up", i, "upsample", "conv", end] => format!("up_blocks.{}.upsamplers.0.conv.{end}", mirrored(i, levels)?),
        _ => return None,
    };
    Some(format!("{half}.{new}"))
}

/// LDM counts the decoder's levels from the finest one.
fn mirrored(level: &str, levels: usize) -> Option<usize> {
    levels.checked_sub(1)?.checked_sub(level.parse().ok()?)
}

fn resnet(layer: &str) -> &str {
    if layer == "nin_shortcut" { "conv_shortcut" } else { layer }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_beyond_counting_is_an_error() {
        let name = format!("decoder.up.{}.block.0.conv1.weight", usize::MAX);
        let state = StateDict::from([(name, Tensor::zeros([1], ()).unwrap())]);
        assert!(vae_from_ldm(state).unwrap_err().to_string().contains("`decoder.up.18446744073709551615`"));
    }
}
