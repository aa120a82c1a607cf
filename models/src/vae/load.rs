//! Older names of the tensors in files.

use crate::nn::StateDict;

/// Old and new names of the projections in an attention block.
const PROJECTIONS: [(&str, &str); 4] = [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")];

/// Gives the attention of autoencoders that were saved before `diffusers` 0.15 its present names: `query`, `key`, `value` and `proj_attn`
/// become `to_q`, `to_k`, `to_v` and `to_out.0`. Other names stay.
pub fn rename_old_attention(state: StateDict) -> StateDict {
    state.into_iter().map(|(name, tensor)| (renamed(&name).unwrap_or(name), tensor)).collect()
}

fn renamed(name: &str) -> Option<String> {
    let (scope, kind) = name.rsplit_once('.')?;
    let (block, projection) = scope.rsplit_once('.')?;
    let (list, _) = block.rsplit_once('.')?;
    if list.rsplit('.').next() != Some("attentions") {
        return None;
    }
    let (_, new) = PROJECTIONS.iter().find(|(old, _)| *old == projection)?;
    Some(format!("{block}.{new}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::renamed;

    #[test]
    fn only_the_projections_of_attention_are_renamed() {
        let block = "decoder.mid_block.attentions.0";
        assert_eq!(renamed(&format!("{block}.query.weight")), Some(format!("{block}.to_q.weight")));
        assert_eq!(renamed(&format!("{block}.proj_attn.bias")), Some(format!("{block}.to_out.0.bias")));
        for name in [&format!("{block}.group_norm.weight"), &format!("{block}.to_q.weight"), "a.query.weight", "query.weight", "query", ""]
        {
            assert_eq!(renamed(name), None, "{name}");
        }
    }
}
