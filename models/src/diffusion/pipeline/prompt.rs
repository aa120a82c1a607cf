//! Prompts as what the U-Net looks at.

use super::TextualInversion;
use crate::clip::ClipTextModel;
use crate::text::Tokenizer;
use kiln_tensor::{Error, Result, Tensor};

/// What the U-Net is told, for the negative prompt first where there is guidance: B is 1 or 2.
pub(super) struct Condition {
    /// (B, T, C).
    pub context: Tensor,
    /// SDXL's pooled text, (B, P).
    pub pooled: Option<Tensor>,
}

/// One text encoder's part.
pub(super) struct Encoder<'a> {
    pub model: &'a ClipTextModel,
    pub tokenizer: &'a Tokenizer,
    pub words: &'a [TextualInversion],
}

/// The states that a model looks at.
#[derive(Clone, Copy)]
pub(super) struct Depth {
    /// Blocks left out.
    pub clip_skip: usize,
    /// SDXL: one more is left out, and the last norm.
    pub is_xl: bool,
}

impl Encoder<'_> {
    /// The ids (1, T): start, at most T − 2 of the text, end, and padding up to the model's length.
    fn tokens(&self, text: &str) -> Result<Tensor> {
        let length = self.model.max_length();
        let role = |id: Option<u32>, name: &str| {
            let missing = || Error::format("prompt", format!("the tokenizer's files name no {name}"));
            id.map(i64::from).ok_or_else(missing)
        };
        let (bos, eos) = (role(self.tokenizer.bos(), "bos_token")?, role(self.tokenizer.eos(), "eos_token")?);
        let pad = self.tokenizer.pad().map_or(eos, i64::from);
        let entries = self.model.token_embedding().weight().shape().dims().first().copied().unwrap_or(0);
        let mut ids = TextualInversion::prompt_ids(self.words, text, entries, &|text| self.tokenizer.encode(text))?;
        ids.truncate(length.saturating_sub(2));
        ids.insert(0, bos);
        ids.push(eos);
        ids.resize(length, pad);
        Tensor::from_vec(ids, [1, length])
    }

    /// The states (1, T, C) and, with a projection, the pooled vector (1, P).
    pub fn encode(&self, text: &str, depth: Depth) -> Result<(Tensor, Option<Tensor>)> {
        let weight = self.model.token_embedding().weight().get();
        let output = self.model.forward(&self.tokens(text)?.to_device(weight.device())?, None)?;
        let states = match depth {
            Depth { is_xl: true, clip_skip } => output.skipped(clip_skip.saturating_add(1))?.clone(),
            Depth { clip_skip: 0, .. } => output.last_hidden_state,
            Depth { clip_skip, .. } => self.model.final_norm(output.skipped(clip_skip)?)?,
        };
        Ok((states, output.text_embeds))
    }
}

/// The states of several encoders beside each other, and the last pooled vector.
pub(super) fn joined(parts: Vec<(Tensor, Option<Tensor>)>) -> Result<Condition> {
    let states: Vec<&Tensor> = parts.iter().map(|(states, _)| states).collect();
    let context = Tensor::cat(&states, -1)?;
    let pooled = parts.into_iter().filter_map(|(_, pooled)| pooled).next_back();
    Ok(Condition { context, pooled })
}

impl Condition {
    /// All zeros.
    pub fn zeros_like(&self) -> Result<Self> {
        Ok(Self { context: self.context.zeros_like()?, pooled: self.pooled.as_ref().map(Tensor::zeros_like).transpose()? })
    }

    /// This one, then the other.
    pub fn before(self, other: &Condition) -> Result<Self> {
        let pooled = match (&self.pooled, &other.pooled) {
            (Some(a), Some(b)) => Some(Tensor::cat(&[a, b], 0)?),
            _ => None,
        };
        Ok(Self { context: Tensor::cat(&[&self.context, &other.context], 0)?, pooled })
    }
}
