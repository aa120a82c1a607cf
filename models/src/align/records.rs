//! Records of data sets (prompts, answers, chats, pairs) as the token sequences that the trainers take.

use super::PreferencePair;
use crate::data::{Conversation, Preference, Prompt, PromptCompletion, TokenSequence, Turns};
use crate::text::{ChatTemplate, Message, Tokenizer, Variables};
use kiln_tensor::{Error, Result};
use serde_json::Value;

/// Writes records as tokens: chats by a template, plain texts as they are, followed by the token that ends a text. These are TRL's rules.
///
/// An answer ends with the tokenizer's end token if it holds one: what a template writes behind it is left out, as a model's own answers lack it.
///
/// ```
/// # use kiln_models::align::RecordEncoder;
/// # use kiln_models::data::Turns;
/// # use kiln_models::text::{ChatTemplate, Message, train_bpe};
/// # fn main() -> kiln_tensor::Result<()> {
/// let tokenizer = train_bpe(["hello"], 300, &["<|im_end|>", "<|im_start|>"])?;
/// let template = ChatTemplate::chatml();
/// let encoder = RecordEncoder::new(&tokenizer, &template);
/// let turn = |role: &str, text: &str| Turns::Messages(vec![Message::new(role, text)]);
/// let sample = encoder.sample(&turn("user", "Hi"), &turn("assistant", "hello"))?;
/// assert!(sample.tokens().starts_with(&encoder.prompt(&turn("user", "Hi"))?));
/// assert_eq!(sample.tokens().last().copied(), tokenizer.eos());
/// # Ok(()) }
/// ```
#[derive(Clone, Copy)]
pub struct RecordEncoder<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
}

impl<'a> RecordEncoder<'a> {
    /// Of a tokenizer and the template of its chats.
    pub fn new(tokenizer: &'a Tokenizer, template: &'a ChatTemplate) -> Self {
        Self { tokenizer, template }
    }

    /// A prompt; of a text, with the special tokens that the tokenizer puts before it, of a chat, with the beginning of the answer.
    ///
    /// # Errors
    /// If the template refuses it or the tokenizer cannot express it.
    pub fn prompt(&self, prompt: &Turns) -> Result<Vec<u32>> {
        self.prompt_with(prompt, &Variables::new())
    }

    /// [`prompt`](Self::prompt) of a record.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn prompt_record(&self, record: &Prompt) -> Result<Vec<u32>> {
        self.prompt_with(&record.prompt, &with_tools(&record.tools))
    }

    fn prompt_with(&self, prompt: &Turns, variables: &Variables) -> Result<Vec<u32>> {
        match prompt {
            Turns::Text(text) => self.beginning(text),
            Turns::Messages(messages) => self.template.encode(self.tokenizer, messages, true, variables),
        }
    }

    /// A prompt and its answer, which alone counts; of a chat, what the assistant says in it.
    ///
    /// # Errors
    /// If one is a text and the other a chat, and as [`prompt`](Self::prompt).
    pub fn sample(&self, prompt: &Turns, completion: &Turns) -> Result<TokenSequence> {
        self.sample_with(prompt, completion, &Variables::new())
    }

    fn sample_with(&self, prompt: &Turns, completion: &Turns, variables: &Variables) -> Result<TokenSequence> {
        match (prompt, completion) {
            (Turns::Text(prompt), Turns::Text(completion)) => {
                let given = self.beginning(prompt)?;
                // Read as one text: alone, an answer may begin with tokens that never follow the prompt.
                let mut tokens = self.beginning(&[prompt.as_str(), completion].concat())?;
                tokens.extend(self.tokenizer.eos().filter(|eos| tokens.last() != Some(eos)));
                let shared = given.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
                let (given, answer) = tokens.split_at(shared);
                Ok(TokenSequence::completion(given, answer))
            }
            (Turns::Messages(prompt), Turns::Messages(completion)) => {
                let given = self.template.encode(self.tokenizer, prompt, true, variables)?.len();
                self.chat(&[&prompt[..], completion].concat(), given, variables)
            }
            _ => Err(Error::argument("record", "prompt and answer must both be texts or both be lists of messages")),
        }
    }

    /// A text that goes on, behind the special tokens that begin one.
    fn beginning(&self, text: &str) -> Result<Vec<u32>> {
        let mut tokens = self.tokenizer.encode_with_specials(text)?;
        let ends = |tokens: &[u32]| tokens.iter().rev().take_while(|&&token| Some(token) == self.tokenizer.eos()).count();
        // Some tokenizers also end each text.
        if ends(&tokens) > ends(&self.tokenizer.encode(text)?) {
            tokens.pop();
        }
        Ok(tokens)
    }

    /// [`sample`](Self::sample) of a record.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn prompt_completion(&self, record: &PromptCompletion) -> Result<TokenSequence> {
        self.sample_with(&record.prompt, &record.completion, &with_tools(&record.tools))
    }

    /// A chat, in which all that the assistant says counts.
    ///
    /// # Errors
    /// As [`prompt`](Self::prompt).
    pub fn conversation(&self, record: &Conversation) -> Result<TokenSequence> {
        self.chat(&record.messages, 0, &with_tools(&record.tools))
    }

    /// Two answers to a prompt, with the record's margin; where it does not say the prompt apart, that is what both begin with.
    ///
    /// # Errors
    /// If some are texts and others chats, and as [`prompt`](Self::prompt).
    pub fn preference(&self, record: &Preference) -> Result<PreferencePair> {
        let (prompt, chosen, rejected) = match (&record.prompt, &record.chosen, &record.rejected) {
            (Some(prompt), chosen, rejected) => (prompt.clone(), chosen.clone(), rejected.clone()),
            (None, Turns::Text(chosen), Turns::Text(rejected)) => split_texts(chosen, rejected),
            (None, Turns::Messages(chosen), Turns::Messages(rejected)) => split_chats(chosen, rejected),
            _ => return Err(Error::argument("record", "both answers must be texts, or both lists of messages")),
        };
        let variables = with_tools(&record.tools);
        let [chosen, rejected] = [chosen, rejected].map(|answer| self.sample_with(&prompt, &answer, &variables));
        let (chosen, rejected) = (chosen?, rejected?);
        Ok(PreferencePair { chosen, rejected, margin: record.margin, ..PreferencePair::default() })
    }

    /// A chat, of which the first `given` tokens do not count.
    fn chat(&self, messages: &[Message], given: usize, variables: &Variables) -> Result<TokenSequence> {
        let (mut tokens, mut mask) = self.template.encode_with_mask(self.tokenizer, messages, variables)?;
        // The last answer ends at its end token, or else with its last token.
        let last = mask.iter().rposition(|&counts| counts);
        let start = last.and_then(|last| mask[..last].iter().rposition(|&counts| !counts)).map_or(0, |before| before + 1);
        let end = (start..tokens.len()).find(|&i| mask[i] && Some(tokens[i]) == self.tokenizer.eos()).or(last);
        let length = end.map_or(tokens.len(), |end| end + 1);
        tokens.truncate(length);
        mask.truncate(length);
        mask.iter_mut().take(given).for_each(|counts| *counts = false);
        TokenSequence::masked(tokens, mask)
    }
}

/// What a template sees of the functions that an assistant may call.
fn with_tools(tools: &[Value]) -> Variables {
    let mut variables = Variables::new();
    if !tools.is_empty() {
        variables.insert("tools".into(), tools.to_vec().into());
    }
    variables
}

/// The common beginning of two texts, up to a character, and what follows it in each.
fn split_texts(chosen: &str, rejected: &str) -> (Turns, Turns, Turns) {
    let common = chosen.char_indices().zip(rejected.chars()).find(|((_, a), b)| a != b).map(|((at, _), _)| at);
    let common = common.unwrap_or(chosen.len().min(rejected.len()));
    // A space belongs to the word behind it, as tokenizers have it.
    let common = chosen[..common].trim_end_matches(' ').len();
    let text = |text: &str| Turns::Text(text.to_owned());
    (text(&chosen[..common]), text(&chosen[common..]), text(&rejected[common..]))
}

/// The messages that two chats begin with, and what follows them in each.
fn split_chats(chosen: &[Message], rejected: &[Message]) -> (Turns, Turns, Turns) {
    let common = chosen.iter().zip(rejected).take_while(|(a, b)| a == b).count();
    let messages = |part: &[Message]| Turns::Messages(part.to_vec());
    (messages(&chosen[..common]), messages(&chosen[common..]), messages(&rejected[common..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{SpecialTokens, train_bpe};

    fn turns(messages: &[(&str, &str)]) -> Turns {
        Turns::Messages(messages.iter().map(|(role, text)| Message::new(*role, *text)).collect())
    }

    fn text(text: &str) -> Turns {
        Turns::Text(text.into())
    }

    /// The prompt of a record is what a model is asked with, special tokens before it included, and an answer is read behind it.
    #[test]
    fn plain_texts_begin_as_the_tokenizer_begins_them() {
        let plain = train_bpe(["ab ab ab"], 300, &["<s>", "</s>"]).unwrap();
        let special = SpecialTokens { eos: vec![1], ..SpecialTokens { cls: Some(0), sep: Some(1), ..SpecialTokens::default() } };
        let tokenizer = plain.clone().with_special_tokens(special).unwrap().with_bert_ends().unwrap();
        assert_eq!((tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")), (Some(0), Some(1)));
        let template = ChatTemplate::chatml();
        let encoder = RecordEncoder::new(&tokenizer, &template);
        let joined = |prompt: &str, completion: &str| {
            let sample = encoder.sample(&text(prompt), &text(completion)).unwrap();
            let learnt = (0..sample.len()).find(|&place| sample.learns(place)).unwrap();
            (sample.tokens().to_vec(), learnt)
        };
        let with_ends = |text: &str| [vec![0], plain.encode(text).unwrap(), vec![1]].concat();
        assert_eq!(encoder.prompt(&text("x ")).unwrap(), [vec![0], plain.encode("x ").unwrap()].concat());
        assert_eq!(joined("x ", "yz"), (with_ends("x yz"), 3));
        // `ab` is one token: it counts as the answer's, as the model is never given it.
        assert_eq!(plain.encode("xab").unwrap().len(), 2);
        assert_eq!(joined("xa", "b"), (with_ends("xab"), 2));
        // An end that is spelled out stays, and is not doubled.
        assert_eq!(joined("x", "y</s>"), (with_ends("xy"), 2));
        assert_eq!(encoder.prompt(&text("x</s>")).unwrap(), with_ends("x"));
    }

    #[test]
    fn records_become_the_tokens_that_count() {
        let tokenizer = train_bpe(["a b"], 300, &["<|im_end|>", "<|im_start|>"]).unwrap();
        // Without generation blocks, what the template writes behind the end token would count too.
        let bare = ChatTemplate::new(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        );
        for template in [ChatTemplate::chatml(), bare.unwrap()] {
            let encoder = RecordEncoder::new(&tokenizer, &template);
            let counted = |sample: &TokenSequence| {
                let tokens: Vec<u32> =
                    (0..sample.len()).filter(|&place| sample.learns(place)).map(|place| sample.tokens()[place]).collect();
                tokenizer.decode(&tokens, false).unwrap()
            };
            let prompt = turns(&[("user", "x"), ("assistant", "early"), ("user", "y")]);
            let sample = encoder.sample(&prompt, &turns(&[("assistant", "late")])).unwrap();
            assert_eq!(counted(&sample), "late<|im_end|>");
            assert_eq!(sample.tokens().last().copied(), tokenizer.eos());
            assert!(sample.tokens().starts_with(&encoder.prompt(&prompt).unwrap()));
            let chat = Conversation { messages: vec![Message::new("user", "x"), Message::new("assistant", "y")], tools: Vec::new() };
            assert_eq!(counted(&encoder.conversation(&chat).unwrap()), "y<|im_end|>");
            let plain = PromptCompletion { prompt: text("1+1="), completion: text("2"), tools: Vec::new() };
            assert_eq!(counted(&encoder.prompt_completion(&plain).unwrap()), "2<|im_end|>");
            let pair = |prompt, chosen, rejected| {
                encoder.preference(&Preference { prompt, chosen, rejected, margin: Some(0.5), tools: Vec::new() })
            };
            let whole = |answer| turns(&[("user", "x"), ("assistant", answer)]);
            let implicit = pair(None, whole("good"), whole("bad")).unwrap();
            assert_eq!(
                implicit,
                pair(Some(turns(&[("user", "x")])), turns(&[("assistant", "good")]), turns(&[("assistant", "bad")])).unwrap()
            );
            let implicit = pair(None, text("Who? é it"), text("Who? è")).unwrap();
            assert_eq!((counted(&implicit.chosen), counted(&implicit.rejected)), (" é it<|im_end|>".into(), " è<|im_end|>".into()));
            assert_eq!(implicit.margin, Some(0.5));
            assert!(pair(None, text("a"), whole("b")).is_err() && encoder.sample(&text("a"), &whole("b")).is_err());
        }
    }
    /// The template lists the functions that the assistant may call, whatever the record is.
    #[test]
    fn tools_are_for_the_template_to_write() {
        let tokenizer = train_bpe(["a b"], 300, &["<|im_end|>", "<|im_start|>"]).unwrap();
        let template = ChatTemplate::new(
            "{% for tool in tools or [] %}{{ tool.name }};{% endfor %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        )
        .unwrap();
        let encoder = RecordEncoder::new(&tokenizer, &template);
        let text = |sample: &TokenSequence| tokenizer.decode(sample.tokens(), false).unwrap();
        let tools = vec![serde_json::json!({"name": "f"})];
        let (asked, answer) = (turns(&[("user", "x")]), |text| turns(&[("assistant", text)]));
        let record = PromptCompletion { prompt: asked.clone(), completion: answer("y"), tools: tools.clone() };
        assert_eq!(text(&encoder.prompt_completion(&record).unwrap()), "f;x<|im_end|>y<|im_end|>");
        for prompt in [Some(asked.clone()), None] {
            let [chosen, rejected] = ["y", "z"].map(|text| match prompt {
                Some(_) => answer(text),
                None => turns(&[("user", "x"), ("assistant", text)]),
            });
            let pair = encoder.preference(&Preference { prompt, chosen, rejected, margin: None, tools: tools.clone() }).unwrap();
            assert_eq!((text(&pair.chosen), text(&pair.rejected)), ("f;x<|im_end|>y<|im_end|>".into(), "f;x<|im_end|>z<|im_end|>".into()));
        }
        let prompt = encoder.prompt_record(&Prompt { prompt: asked.clone(), tools }).unwrap();
        assert_eq!(tokenizer.decode(&prompt, false).unwrap(), "f;x<|im_end|>");
        assert_eq!(encoder.prompt_record(&Prompt { prompt: asked.clone(), tools: Vec::new() }).unwrap(), encoder.prompt(&asked).unwrap());
    }
}
