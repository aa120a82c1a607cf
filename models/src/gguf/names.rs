//! What llama.cpp calls the tensors of a model that Hugging Face has other names for, and how it lays their rows.

/// A tensor of a GGUF file as Hugging Face has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counterpart {
    /// Its name there.
    pub name: String,
    /// Which of its rows are in another order.
    pub rows: RowOrder,
}

/// The order of a matrix's rows in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RowOrder {
    /// As Hugging Face's.
    Same,
    /// Of each query head, neighbours are a pair that is turned together; at Hugging Face, a pair is a row of the first half of the head and
    /// one of the second.
    QueryPairs,
    /// The same of each head of keys.
    KeyPairs,
}

impl RowOrder {
    /// Which row of the file is row i of Hugging Face's matrix, for a matrix of `rows` rows in `heads` heads. `None` if it has no such heads.
    pub fn undo(rows: usize, heads: usize) -> Option<Vec<usize>> {
        let width = rows.checked_div(heads).filter(|width| width * heads == rows && width.is_multiple_of(2))?;
        let half = width / 2;
        Some((0..rows).map(|row| row / width * width + row % width % half * 2 + row % width / half).collect())
    }
}

/// The names of an architecture: llama.cpp's, Hugging Face's.
struct Family {
    architecture: &'static str,
    /// What Hugging Face's list of blocks is called.
    layers: &'static str,
    whole: &'static [(&'static str, &'static str)],
    parts: &'static [(&'static str, &'static str)],
}

const FAMILIES: [Family; 2] = [
    Family {
        architecture: "llama",
        layers: "model.layers",
        whole: &[("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")],
        parts: &[
            ("attn_norm", "input_layernorm"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ],
    },
    Family {
        architecture: "gpt2",
        layers: "transformer.h",
        whole: &[
            ("token_embd", "transformer.wte"),
            ("position_embd", "transformer.wpe"),
            ("output_norm", "transformer.ln_f"),
            ("output", "lm_head"),
        ],
        parts: &[
            ("attn_norm", "ln_1"),
            ("attn_qkv", "attn.c_attn"),
            ("attn_output", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn_up", "mlp.c_fc"),
            ("ffn_down", "mlp.c_proj"),
        ],
    },
];

/// What Hugging Face calls the tensor `name` of a model of `architecture` (`llama`, `gpt2`); `None` for a tensor that it has not.
///
/// All matrices of a GGUF file are (outputs, inputs), those of GPT-2 too, which Hugging Face keeps as (inputs, outputs).
///
/// ```
/// # use kiln_models::gguf::{RowOrder, counterpart};
/// let query = counterpart("llama", "blk.3.attn_q.weight");
/// assert!(query.is_some_and(|q| q.name == "model.layers.3.self_attn.q_proj.weight" && q.rows == RowOrder::QueryPairs));
/// ```
pub fn counterpart(architecture: &str, name: &str) -> Option<Counterpart> {
    let family = FAMILIES.iter().find(|family| family.architecture == architecture)?;
    let (stem, kind) = name.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let find = |table: &[(&str, &'static str)], stem: &str| table.iter().find(|(gguf, _)| *gguf == stem).map(|(_, name)| *name);
    let Some(in_block) = stem.strip_prefix("blk.") else {
        return Some(Counterpart { name: format!("{}.{kind}", find(family.whole, stem)?), rows: RowOrder::Same });
    };
    let (layer, part) = in_block.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let rows = match (architecture, part) {
        ("llama", "attn_q") => RowOrder::QueryPairs,
        ("llama", "attn_k") => RowOrder::KeyPairs,
        _ => RowOrder::Same,
    };
    Some(Counterpart { name: format!("{}.{layer}.{}.{kind}", family.layers, find(family.parts, part)?), rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_counterparts() {
        let name = |architecture: &str, name: &str| counterpart(architecture, name).map(|found| found.name);
        assert_eq!(name("llama", "output.weight").as_deref(), Some("lm_head.weight"));
        assert_eq!(name("llama", "blk.11.ffn_down.weight").as_deref(), Some("model.layers.11.mlp.down_proj.weight"));
        assert_eq!(name("gpt2", "blk.0.attn_qkv.bias").as_deref(), Some("transformer.h.0.attn.c_attn.bias"));
        assert_eq!(name("gpt2", "position_embd.weight").as_deref(), Some("transformer.wpe.weight"));
        for other in ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.1.weight", "blk.1", "", "blk.0.attn_q.scale", "blk.-1.attn_q.weight"]
        {
            assert_eq!(name("llama", other), None, "{other}");
        }
        assert_eq!(name("bert", "output.weight"), None);
    }

    #[test]
    fn pairs_go_back_to_halves() {
        // Two heads of four: the file has rows 0, 2, 1, 3 of each.
        assert_eq!(RowOrder::undo(8, 2), Some(vec![0, 2, 1, 3, 4, 6, 5, 7]));
        assert_eq!(RowOrder::undo(6, 1), Some(vec![0, 2, 4, 1, 3, 5]));
        assert_eq!(RowOrder::undo(0, 1), Some(vec![]));
        assert!(RowOrder::undo(8, 0).is_none() && RowOrder::undo(9, 2).is_none() && RowOrder::undo(6, 2).is_none());
    }
}
