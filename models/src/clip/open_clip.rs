//! Checkpoints of OpenCLIP (and of OpenAI's own code, which names its tensors alike), told in the names of this house.

use crate::nn::StateDict;
use kiln_tensor::{Error, Result, Tensor};

/// Buffers and counts that hold no weights.
const IGNORED: [&str; 4] = ["attn_mask", "input_resolution", "context_length", "vocab_size"];

/// The tensors of an OpenCLIP checkpoint under the names of [`ClipModel`](super::ClipModel): fused query, key and value matrices are split,
/// the raw projections transposed. A file may hold one tower only, as those of Stable Diffusion 2 and XL do. Tensors that it does not know
/// keep their names, so that loading lists them.
///
/// # Errors
/// If a fused tensor is not three of a kind, or a projection no matrix.
pub fn from_open_clip(state: StateDict) -> Result<StateDict> {
    let mut out = StateDict::new();
    for (name, tensor) in state {
        // Newer models keep their text tower in a scope of its own.
        let name = name.strip_prefix("text.").unwrap_or(&name);
        if IGNORED.contains(&name) {
            continue;
        }
        if let Some((tower, rest)) = in_block(name) {
            put_in_block(&mut out, &tower, rest, tensor)?;
        } else if let Some((new, transposed)) = outside(name) {
            out.insert(new.to_owned(), if transposed { turned(name, &tensor)? } else { tensor });
        } else {
            out.insert(name.to_owned(), tensor);
        }
    }
    Ok(out)
}

/// The scope of the block that a tensor is in, and its name there.
fn in_block(name: &str) -> Option<(String, &str)> {
    let (tower, rest) = match name.strip_prefix("visual.transformer.resblocks.") {
        Some(rest) => ("vision_model", rest),
        None => ("text_model", name.strip_prefix("transformer.resblocks.")?),
    };
    let (layer, rest) = rest.split_once('.')?;
    Some((format!("{tower}.encoder.layers.{layer}"), rest))
}

fn put_in_block(out: &mut StateDict, scope: &str, name: &str, tensor: Tensor) -> Result<()> {
    if let Some(kind) = name.strip_prefix("attn.in_proj_") {
        let rows = tensor.dim(0)?;
        if !rows.is_multiple_of(3) {
            return Err(Error::shape("open_clip", format!("{scope}: {name} {} is not query, key and value", tensor.shape())));
        }
        for (part, tensor) in ["q", "k", "v"].into_iter().zip(tensor.chunk(3, 0)?) {
            out.insert(format!("{scope}.self_attn.{part}_proj.{kind}"), tensor.contiguous()?);
        }
        return Ok(());
    }
    let renamed =
        [("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn", "self_attn"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")];
    let new = renamed.iter().find_map(|(old, new)| Some(format!("{new}{}", name.strip_prefix(old).filter(|rest| rest.starts_with('.'))?)));
    out.insert(format!("{scope}.{}", new.as_deref().unwrap_or(name)), tensor);
    Ok(())
}

/// The name of a tensor outside of the blocks, and whether it lies transposed.
fn outside(name: &str) -> Option<(&'static str, bool)> {
    Some(match name {
        "token_embedding.weight" => ("text_model.embeddings.token_embedding.weight", false),
        "positional_embedding" => ("text_model.embeddings.position_embedding.weight", false),
        "ln_final.weight" => ("text_model.final_layer_norm.weight", false),
        "ln_final.bias" => ("text_model.final_layer_norm.bias", false),
        "text_projection" => ("text_projection.weight", true),
        "visual.class_embedding" => ("vision_model.embeddings.class_embedding", false),
        "visual.positional_embedding" => ("vision_model.embeddings.position_embedding.weight", false),
        "visual.conv1.weight" => ("vision_model.embeddings.patch_embedding.weight", false),
        "visual.ln_pre.weight" => ("vision_model.pre_layrnorm.weight", false),
        "visual.ln_pre.bias" => ("vision_model.pre_layrnorm.bias", false),
        "visual.ln_post.weight" => ("vision_model.post_layernorm.weight", false),
        "visual.ln_post.bias" => ("vision_model.post_layernorm.bias", false),
        "visual.proj" => ("visual_projection.weight", true),
        _ => return None,
    })
}

fn turned(name: &str, tensor: &Tensor) -> Result<Tensor> {
    if tensor.rank() != 2 {
        return Err(Error::shape("open_clip", format!("{name} {} is no matrix", tensor.shape())));
    }
    tensor.t()?.contiguous()
}
