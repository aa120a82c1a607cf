//! Which tokens of a chat are the assistant's: what supervised fine-tuning learns from.

use super::chat::{ChatTemplate, Message, Variables};
use super::tokenizer::Tokenizer;
use kiln_tensor::{Error, Result};
use std::ops::Range;

impl ChatTemplate {
    /// The token ids of a chat, and for each whether it belongs to an answer of the assistant.
    ///
    /// If the template has generation blocks (`{% generation %}` … `{% endgeneration %}`), a token belongs to an answer if it shares
    /// a character with the output of one, as in `apply_chat_template(…, return_assistant_tokens_mask=True)` of `transformers`. Otherwise an
    /// answer is what the chat up to it, rendered, has more than the chat before it with the beginning of an answer asked for: its
    /// content and all that the template writes behind it.
    ///
    /// # Errors
    /// As [`encode`](ChatTemplate::encode); and if the template has no generation blocks and writes the beginning of a chat
    /// differently once more follows (some leave out earlier reasoning).
    pub fn encode_with_mask(&self, tokenizer: &Tokenizer, messages: &[Message], variables: &Variables) -> Result<(Vec<u32>, Vec<bool>)> {
        let (text, marked) = self.render_marked(messages, false, variables)?;
        let spans = if self.has_generation_blocks() { marked } else { self.answers(&text, messages, variables)? };
        let spans = in_characters(&text, &spans);
        let tokens = tokenizer.encode_with_offsets(&text)?;
        let mask = tokens.iter().map(|(_, place)| spans.iter().any(|span| place.start < span.end && place.end > span.start)).collect();
        Ok((tokens.into_iter().map(|(id, _)| id).collect(), mask))
    }

    /// The bytes of the answers in `whole`, the chat as text, found by rendering what comes before and with each.
    fn answers(&self, whole: &str, messages: &[Message], variables: &Variables) -> Result<Vec<Range<usize>>> {
        let mut spans = Vec::new();
        for (i, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
            let before = self.render(&messages[..i], true, variables)?;
            let with = self.render(&messages[..=i], false, variables)?;
            if !with.starts_with(&before) || !whole.starts_with(&with) {
                let problem = format!(
                    "the text of the chat up to message {i} is not how the text with more messages begins, so the answer cannot be found in it; \
                     put {{% generation %}} blocks around what the assistant says in the template"
                );
                return Err(Error::format("chat_template", problem));
            }
            spans.push(before.len()..with.len());
        }
        Ok(spans)
    }
}

/// Places in bytes as places in characters.
fn in_characters(text: &str, spans: &[Range<usize>]) -> Vec<Range<usize>> {
    let place = |byte: usize| text.get(..byte).map_or(0, |before| before.chars().count());
    spans.iter().map(|span| place(span.start)..place(span.end)).collect()
}
