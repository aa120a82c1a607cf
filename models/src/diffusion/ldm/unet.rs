//! The U-Net, and ControlNet, which has its first half.

use crate::nn::StateDict;
use kiln_tensor::{Error, Result};

/// What the layers of a residual block are called there and here.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
];

/// What the layers outside of blocks are called there and here.
const OUTER: [(&str, &str); 10] = [
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
    ("input_hint_block.0", "controlnet_cond_embedding.conv_in"),
    ("input_hint_block.14", "controlnet_cond_embedding.conv_out"),
    ("middle_block_out.0", "controlnet_mid_block"),
];

/// `name` with its first components `old` replaced by `new`, if it starts with them.
fn replace_start(name: &str, old: &str, new: &str) -> Option<String> {
    let rest = name.strip_prefix(old)?;
    (rest.is_empty() || rest.starts_with('.')).then(|| format!("{new}{rest}"))
}

/// The first component that is a number, and the rest.
fn number(name: &str) -> Option<(usize, &str)> {
    let (first, rest) = name.split_once('.').unwrap_or((name, ""));
    Some((first.parse().ok()?, rest))
}

/// A layer of a residual block.
fn resnet(rest: &str) -> Option<String> {
    RESNET.iter().find_map(|(old, new)| replace_start(rest, old, new))
}

/// The name in `diffusers` of a tensor or module of a U-Net or ControlNet with `layers` residual blocks in each level of its first half.
fn renamed(name: &str, layers: usize) -> Option<String> {
    if let Some(found) = OUTER.iter().find_map(|(old, new)| replace_start(name, old, new)) {
        return Some(found);
    }
    if let Some(rest) = name.strip_prefix("input_blocks.") {
        let (i, rest) = number(rest)?;
        let (level, layer) = (i.checked_sub(1)? / (layers + 1), (i - 1) % (layers + 1));
        return match number(rest)? {
            (0, op) if op.starts_with("op") => replace_start(op, "op", &format!("down_blocks.{level}.downsamplers.0.conv")),
            (0, rest) => Some(format!("down_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
            (1, rest) => Some(format!("down_blocks.{level}.attentions.{layer}.{rest}")),
            _ => None,
        };
    }
    if let Some(rest) = name.strip_prefix("output_blocks.") {
        let (i, rest) = number(rest)?;
        let (level, layer) = (i / (layers + 1), i % (layers + 1));
        return match number(rest)? {
            (0, rest) => Some(format!("up_blocks.{level}.resnets.{layer}.{}", resnet(rest)?)),
            (1 | 2, conv) if conv.starts_with("conv") => replace_start(conv, "conv", &format!("up_blocks.{level}.upsamplers.0.conv")),
            (1, rest) => Some(format!("up_blocks.{level}.attentions.{layer}.{rest}")),
            _ => None,
        };
    }
    if let Some(rest) = name.strip_prefix("middle_block.") {
        return match number(rest)? {
            (1, rest) => Some(format!("mid_block.attentions.0.{rest}")),
            (i @ (0 | 2), rest) => Some(format!("mid_block.resnets.{}.{}", i / 2, resnet(rest)?)),
            _ => None,
        };
    }
    if let Some(rest) = name.strip_prefix("zero_convs.") {
        let (i, rest) = number(rest)?;
        return replace_start(rest, "0", &format!("controlnet_down_blocks.{i}"));
    }
    let (i, rest) = number(name.strip_prefix("input_hint_block.")?)?;
    (i % 2 == 0).then(|| format!("controlnet_cond_embedding.blocks.{}.{rest}", (i / 2).saturating_sub(1)))
}

/// The names that a module of a U-Net in `diffusers` can have in LDM's code: there can be two, as an upsampler's depends on whether its
/// level has attention.
pub(crate) fn ldm_modules(module: &str, layers: usize) -> Vec<String> {
    if let Some(found) = OUTER.iter().find_map(|(old, new)| replace_start(module, new, old)) {
        return vec![found];
    }
    let old_resnet = |rest: &str| RESNET.iter().find_map(|(old, new)| replace_start(rest, new, old));
    let part = |rest: &str, base: usize| -> Option<Vec<String>> {
        if let Some(rest) = rest.strip_prefix("resnets.") {
            let (layer, rest) = number(rest)?;
            return Some(vec![format!("{}.0.{}", base + layer, old_resnet(rest)?)]);
        }
        if let Some(rest) = rest.strip_prefix("attentions.") {
            let (layer, rest) = number(rest)?;
            return Some(vec![format!("{}.1.{rest}", base + layer)]);
        }
        None
    };
    let find = || -> Option<Vec<String>> {
        if let Some(rest) = module.strip_prefix("down_blocks.") {
            let (level, rest) = number(rest)?;
            let names = match rest {
                "downsamplers.0.conv" => vec![format!("{}.0.op", (level + 1) * (layers + 1))],
                _ => part(rest, 1 + level * (layers + 1))?,
            };
            return Some(names.into_iter().map(|name| format!("input_blocks.{name}")).collect());
        }
        if let Some(rest) = module.strip_prefix("up_blocks.") {
            let (level, rest) = number(rest)?;
            let last = level * (layers + 1) + layers;
            let names = match rest {
                "upsamplers.0.conv" => vec![format!("{last}.1.conv"), format!("{last}.2.conv")],
                _ => part(rest, level * (layers + 1))?,
            };
            return Some(names.into_iter().map(|name| format!("output_blocks.{name}")).collect());
        }
        let rest = module.strip_prefix("mid_block.")?;
        if let Some(rest) = rest.strip_prefix("resnets.") {
            let (i, rest) = number(rest)?;
            return Some(vec![format!("middle_block.{}.{}", 2 * i, old_resnet(rest)?)]);
        }
        Some(vec![format!("middle_block.1.{}", rest.strip_prefix("attentions.0.")?)])
    };
    find().unwrap_or_default()
}

/// How many residual blocks the first level has, by the names of modules or tensors in `diffusers`.
pub(crate) fn layers_per_block<'a>(names: impl Iterator<Item = &'a str>) -> usize {
    let layer = |name: &str| number(name.strip_prefix("down_blocks.0.resnets.")?)?.0.checked_add(1);
    names.filter_map(layer).max().unwrap_or(2)
}

fn rename(op: &str, state: StateDict, layers: usize) -> Result<StateDict> {
    if layers == usize::MAX {
        return Err(Error::format(op, format!("layers_per_block {layers} is none of a U-Net's")));
    }
    let mut renamed_state = StateDict::new();
    let mut unknown = Vec::new();
    for (name, tensor) in state {
        match renamed(&name, layers) {
            Some(new) => drop(renamed_state.insert(new, tensor)),
            None => unknown.push(name),
        }
    }
    if unknown.is_empty() {
        return Ok(renamed_state);
    }
    let some = unknown.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    Err(Error::format(op, format!("{} names are none of LDM's: {some}", unknown.len())))
}

/// The tensors of a U-Net (below `model.diffusion_model.`) under the names of `UNet2DConditionModel`. `layers_per_block` is that of its
/// configuration.
///
/// # Errors
/// If a name is none of LDM's, or `layers_per_block` is none that can be.
pub fn unet_from_ldm(state: StateDict, layers_per_block: usize) -> Result<StateDict> {
    rename("unet_from_ldm", state, layers_per_block)
}

/// The tensors of a ControlNet (below `control_model.`) under the names of `ControlNetModel`.
///
/// # Errors
/// As [`unet_from_ldm`].
pub fn controlnet_from_ldm(state: StateDict, layers_per_block: usize) -> Result<StateDict> {
    rename("controlnet_from_ldm", state, layers_per_block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_tensor::Tensor;

    #[test]
    fn both_directions_are_inverse() {
        for name in [
            "conv_in",
            "time_embedding.linear_2",
            "add_embedding.linear_1",
            "down_blocks.0.resnets.1.conv1",
            "down_blocks.2.attentions.0.transformer_blocks.3.attn1.to_q",
            "down_blocks.1.downsamplers.0.conv",
            "mid_block.resnets.1.time_emb_proj",
            "mid_block.attentions.0.proj_in",
            "up_blocks.1.resnets.2.conv_shortcut",
            "up_blocks.2.attentions.1.proj_out",
            "up_blocks.0.upsamplers.0.conv",
        ] {
            let old = ldm_modules(name, 2);
            assert!(!old.is_empty(), "{name}");
            for old in old {
                assert_eq!(renamed(&old, 2).as_deref(), Some(name));
            }
        }
        assert_eq!(renamed("input_blocks.x.0.op", 2), None);
        assert_eq!(renamed("", 2), None);
        assert_eq!(renamed("input_hint_block.4.weight", 2).as_deref(), Some("controlnet_cond_embedding.blocks.1.weight"));
    }

    #[test]
    fn layers_beyond_counting_are_errors() {
        let state = || StateDict::from([("input_blocks.1.0.in_layers.0.weight".to_owned(), Tensor::zeros([1], ()).unwrap())]);
        for convert in [unet_from_ldm, controlnet_from_ldm] {
            assert!(convert(state(), usize::MAX).unwrap_err().to_string().contains("layers_per_block 18446744073709551615"));
            assert!(convert(state(), usize::MAX - 1).unwrap().contains_key("down_blocks.0.resnets.0.norm1.weight"));
        }
        assert_eq!(layers_per_block([format!("down_blocks.0.resnets.{}.conv1", usize::MAX).as_str()].into_iter()), 2);
    }
}
