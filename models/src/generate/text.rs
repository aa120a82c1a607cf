//! Text in, text out: a tokenizer before and behind the generation of tokens, and ends of answers that are found in the text.

use super::{FinishReason, Generate, GenerationConfig};
use crate::text::{StreamDecoder, Tokenizer};
use crate::transformer::CausalLm;
use kiln_tensor::{Error, Result};
use std::collections::{BTreeMap, VecDeque};

/// Looks for the first of some strings in a text that comes in pieces, and holds back what may be the start of one.
#[derive(Clone, Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
    is_over: bool,
}

impl StopStrings {
    /// Text passes until one of `strings` occurs.
    ///
    /// # Errors
    /// If one is empty: it would end every text.
    pub fn new(strings: &[String]) -> Result<Self> {
        if strings.iter().any(String::is_empty) {
            return Err(Error::argument("generate", "a stop string is empty"));
        }
        Ok(Self { strings: strings.to_vec(), held: String::new(), is_over: false })
    }

    /// Takes the next piece; returns the text that is before any stop string for certain. Once one has come, it and all after it are dropped.
    pub fn push(&mut self, piece: &str) -> String {
        if self.is_over {
            return String::new();
        }
        self.held.push_str(piece);
        if let Some(at) = self.strings.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.is_over = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let starts = |stop: &String| stop.char_indices().map(|(len, _)| len).skip(1).filter(|&len| self.held.ends_with(&stop[..len])).max();
        let kept = self.strings.iter().filter_map(starts).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether a stop string has come.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// What is held back, when no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// A rule for [`Generate::stop_when`]: an answer ends once its text holds one of `strings`, even if that begins or ends inside of a token.
///
/// # Errors
/// If one is empty.
pub fn stop_at_text<'a>(tokenizer: &'a Tokenizer, strings: &[String]) -> Result<impl FnMut(usize, &[u32]) -> Result<bool> + use<'a>> {
    let fresh = StopStrings::new(strings)?;
    let mut answers: BTreeMap<usize, (StreamDecoder<'a>, StopStrings, usize)> = BTreeMap::new();
    Ok(move |row: usize, tokens: &[u32]| {
        let (decoder, stop, read) = answers.entry(row).or_insert_with(|| (tokenizer.stream(false), fresh.clone(), 0));
        for &token in tokens.get(*read..).unwrap_or_default() {
            stop.push(&decoder.push(token)?);
            *read += 1;
        }
        Ok(stop.is_over())
    })
}

/// Text that is looked at with its special tokens and shown without them.
struct Shown<'a> {
    with_special: StreamDecoder<'a>,
    without: StreamDecoder<'a>,
    stop: StopStrings,
    /// Pieces that `stop` holds back at least in part: how many bytes of each it has not given out, and what is to be shown of it.
    held: VecDeque<(usize, String)>,
}

impl<'a> Shown<'a> {
    fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Result<Self> {
        let (with_special, without) = (tokenizer.stream(false), tokenizer.stream(true));
        Ok(Self { with_special, without, stop: StopStrings::new(stop)?, held: VecDeque::new() })
    }

    fn push(&mut self, token: u32) -> Result<String> {
        let piece = (self.with_special.push(token)?, self.without.push(token)?);
        Ok(self.pass(piece))
    }

    /// What was held back, when no more text comes.
    fn finish(&mut self) -> Result<String> {
        let piece = (self.with_special.finish()?, self.without.finish()?);
        let text = self.pass(piece);
        let rest = self.stop.finish().len();
        Ok(text + &self.release(rest))
    }

    fn pass(&mut self, (whole, shown): (String, String)) -> String {
        let passed = self.stop.push(&whole).len();
        self.held.push_back((whole.len(), shown));
        self.release(passed)
    }

    /// What is to be shown of the next `bytes` bytes.
    fn release(&mut self, mut bytes: usize) -> String {
        let mut text = String::new();
        while let Some((whole, shown)) = self.held.front_mut() {
            if *whole > bytes {
                // The string that stops lies within this piece, or may: it shows as much of its text as comes before, a special token nothing.
                let cut = (0..=bytes.min(shown.len())).rev().find(|&at| shown.is_char_boundary(at));
                text.extend(shown.drain(..cut.unwrap_or(0)));
                *whole -= bytes;
                return text;
            }
            bytes -= *whole;
            text.push_str(shown);
            self.held.pop_front();
        }
        text
    }
}

/// The answer to one prompt as text that grows: yields its pieces. Characters come whole, and of a stop string nothing comes. Special tokens
/// give no text, but may be or be part of a stop string.
pub struct TextStream<'a> {
    generate: Generate<'a>,
    shown: Shown<'a>,
    tokens: usize,
    finish: Option<FinishReason>,
}

impl<'a> TextStream<'a> {
    /// Continues `prompt`, with the special tokens that the tokenizer puts around a text (a BOS, say); `stop` are strings that end the
    /// answer, be they text or special tokens. If `config` names no `eos_token_id`, the tokenizer's end it.
    ///
    /// # Errors
    /// As [`Generate::new`]; if the prompt cannot be encoded, a stop string is empty, or `config` asks for several answers.
    pub fn new(
        model: &'a dyn CausalLm,
        tokenizer: &'a Tokenizer,
        prompt: &str,
        config: &GenerationConfig,
        stop: &[String],
    ) -> Result<Self> {
        Self::of_tokens(model, tokenizer, &tokenizer.encode_with_specials(prompt)?, config, stop)
    }

    /// As [`new`](TextStream::new), after a prompt of tokens, such as an encoded chat.
    ///
    /// # Errors
    /// As [`new`](TextStream::new).
    pub fn of_tokens(
        model: &'a dyn CausalLm,
        tokenizer: &'a Tokenizer,
        prompt: &[u32],
        config: &GenerationConfig,
        stop: &[String],
    ) -> Result<Self> {
        if config.num_return_sequences > 1 {
            return Err(Error::argument("generate", "num_return_sequences is more than 1; a text stream is one answer"));
        }
        let mut config = config.clone();
        if config.eos_token_id.is_empty() {
            config.eos_token_id.extend(&tokenizer.special_tokens().eos);
        }
        Ok(Self {
            generate: Generate::new(model, &[prompt.to_vec()], &config)?,
            shown: Shown::new(tokenizer, stop)?,
            tokens: 0,
            finish: None,
        })
    }

    /// Tokens so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Why the answer ended, once it has.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish
    }

    /// The text that one more token makes certain.
    fn piece(&mut self) -> Result<String> {
        let Some(step) = self.generate.next().transpose()? else {
            return Err(Error::argument("generate", "the answer has ended"));
        };
        let Some(new) = step.tokens.first() else { return Ok(String::new()) };
        self.tokens += 1;
        let mut text = String::new();
        if new.finish != Some(FinishReason::Eos) {
            text = self.shown.push(new.token)?;
        }
        if new.finish.is_some() {
            text.push_str(&self.shown.finish()?);
        }
        self.finish = if self.shown.stop.is_over() { Some(FinishReason::Stop) } else { new.finish };
        Ok(text)
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.finish.is_none() {
            match self.piece() {
                Ok(text) if text.is_empty() => {}
                Ok(text) => return Some(Ok(text)),
                Err(error) => {
                    self.finish = Some(FinishReason::Stop);
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_are_found_across_pieces_and_never_shown() -> Result<()> {
        let stops = ["\nUser:".to_owned(), "é!".to_owned()];
        for (pieces, shown, over) in [
            (vec!["Hi", "\n", "Us", "ers\nUser", ": no"], "Hi\nUsers", true),
            (vec!["a\nUser"], "a\nUser", false),
            (vec!["x", "é", "é", "!", "y"], "xé", true),
            (vec!["\n\n\nUser:"], "\n\n", true),
        ] {
            let mut stop = StopStrings::new(&stops)?;
            let mut text: String = pieces.iter().map(|piece| stop.push(piece)).collect();
            text.push_str(&stop.finish());
            assert_eq!((text.as_str(), stop.is_over()), (shown, over), "{pieces:?}");
        }
        assert!(StopStrings::new(&[String::new()]).is_err());
        Ok(())
    }
}
