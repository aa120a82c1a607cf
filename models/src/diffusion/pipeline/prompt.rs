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
    /// The ends of the texts that are longer than what is read, that of the prompt first.
    pub unread: Vec<String>,
}

/// What one text encoder makes of a text.
pub(super) struct Reading {
    /// (1, T, C).
    states: Tensor,
    /// With a projection, (1, P).
    pooled: Option<Tensor>,
    /// The end of the text, if it is longer than what the encoder reads.
    unread: Option<String>,
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
    /// The ids (1, T): start, at most T − 2 of the text, end, and padding up to the model's length. And what is left of the text.
    fn tokens(&self, text: &str) -> Result<(Tensor, Option<String>)> {
        let length = self.model.max_length();
        let role = |id: Option<u32>, name: &str| {
            let missing = || Error::format("prompt", format!("the tokenizer's files name no {name}"));
            id.map(i64::from).ok_or_else(missing)
        };
        let (bos, eos) = (role(self.tokenizer.bos(), "bos_token")?, role(self.tokenizer.eos(), "eos_token")?);
        let pad = self.tokenizer.pad().map_or(eos, i64::from);
        let entries = self.model.token_embedding().weight().shape().dims().first().copied().unwrap_or(0);
        let mut ids = TextualInversion::prompt_ids(self.words, text, entries, &|text| self.tokenizer.encode(text))?;
        let rest = ids.split_off(length.saturating_sub(2).min(ids.len()));
        ids.insert(0, bos);
        ids.push(eos);
        ids.resize(length, pad);
        let unread = if rest.is_empty() { None } else { Some(self.spelt(&rest, entries)?) };
        Ok((Tensor::from_vec(ids, [1, length])?, unread))
    }

    /// The text of ids of the table's own `entries`, as the tokenizer reads it.
    fn spelt(&self, ids: &[i64], entries: usize) -> Result<String> {
        let own = |id: &i64| u32::try_from(*id).ok().filter(|&id| (id as usize) < entries);
        let text = self.tokenizer.decode(&ids.iter().filter_map(own).collect::<Vec<_>>(), false)?;
        // How CLIP marks the end of a word.
        Ok(text.replace("</w>", " ").trim().to_owned())
    }

    /// What the model says of the text.
    pub fn encode(&self, text: &str, depth: Depth) -> Result<Reading> {
        let weight = self.model.token_embedding().weight().get();
        let (ids, unread) = self.tokens(text)?;
        let output = self.model.forward(&ids.to_device(weight.device())?, None)?;
        let states = match depth {
            Depth { is_xl: true, clip_skip } => output.skipped(clip_skip.saturating_add(1))?.clone(),
            Depth { clip_skip: 0, .. } => output.last_hidden_state,
            Depth { clip_skip, .. } => self.model.final_norm(output.skipped(clip_skip)?)?,
        };
        Ok(Reading { states, pooled: output.text_embeds, unread })
    }
}

/// The states of several encoders beside each other, and the last pooled vector.
pub(super) fn joined(parts: Vec<Reading>) -> Result<Condition> {
    let states: Vec<&Tensor> = parts.iter().map(|part| &part.states).collect();
    let context = Tensor::cat(&states, -1)?;
    // All encoders read one text, up to the same place.
    let unread = parts.iter().find_map(|part| part.unread.clone()).into_iter().collect();
    let pooled = parts.into_iter().filter_map(|part| part.pooled).next_back();
    Ok(Condition { context, pooled, unread })
}

impl Condition {
    /// All zeros.
    pub fn zeros_like(&self) -> Result<Self> {
        let pooled = self.pooled.as_ref().map(Tensor::zeros_like).transpose()?;
        Ok(Self { context: self.context.zeros_like()?, pooled, unread: Vec::new() })
    }

    /// This one, then the other.
    pub fn before(self, other: &Condition) -> Result<Self> {
        let pooled = match (&self.pooled, &other.pooled) {
            (Some(a), Some(b)) => Some(Tensor::cat(&[a, b], 0)?),
            _ => None,
        };
        let context = Tensor::cat(&[&self.context, &other.context], 0)?;
        Ok(Self { context, pooled, unread: [other.unread.clone(), self.unread].concat() })
    }
}
