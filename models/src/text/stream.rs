//! Decoding token by token: text is given out as soon as no later token can change it.

use super::tokenizer::Tokenizer;
use kiln_tensor::Result;

/// A decoder that takes ids one by one and gives out their text as soon as its characters are complete.
///
/// Byte-level vocabularies split a character across tokens; its parts are held back until the last has come, so that no U+FFFD is
/// ever shown for a character that is on its way. What [`push`](StreamDecoder::push) and [`finish`](StreamDecoder::finish) give is,
/// put together, what [`Tokenizer::decode`] gives for all ids, where a token's text depends on no token after it (as in all vocabularies of
/// language models; WordPiece's decoder, for one, draws `do`, `n't` together afterwards).
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    pending: Pending,
}

/// What has come and is not given out.
enum Pending {
    /// The first bytes of a character.
    Bytes(Vec<u8>),
    /// For decoders in which a token's text depends on its neighbours: the last tokens, and how many of them are given out. They
    /// are decoded with those that follow, which then keep their leading spaces.
    Tokens { ids: Vec<u32>, given: usize },
}

impl<'a> StreamDecoder<'a> {
    /// A decoder at the beginning of a text; with `skip_special` special tokens give no text.
    pub fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        let pending = match tokenizer.concatenates_bytes() {
            true => Pending::Bytes(Vec::new()),
            false => Pending::Tokens { ids: Vec::new(), given: 0 },
        };
        Self { tokenizer, skip_special, pending }
    }

    /// Takes the next id; returns the text that is complete with it, often a word and sometimes nothing.
    ///
    /// # Errors
    /// If the id is not in the vocabulary.
    pub fn push(&mut self, id: u32) -> Result<String> {
        match &mut self.pending {
            Pending::Bytes(bytes) => {
                bytes.extend(self.tokenizer.token_bytes(id, self.skip_special)?);
                Ok(take_complete(bytes))
            }
            Pending::Tokens { ids, given } => {
                let before = self.tokenizer.decode(&ids[..*given], self.skip_special)?;
                ids.push(id);
                let after = self.tokenizer.decode(ids, self.skip_special).inspect_err(|_| {
                    ids.pop();
                })?;
                if after.len() <= before.len() || after.ends_with(char::REPLACEMENT_CHARACTER) {
                    return Ok(String::new());
                }
                ids.drain(..*given);
                *given = ids.len();
                Ok(beyond(&before, &after).to_owned())
            }
        }
    }

    /// Ends the text: what was held back, with U+FFFD for bytes that never became a character. The decoder is then at a beginning again.
    ///
    /// # Errors
    /// If the tokenizer cannot decode.
    pub fn finish(&mut self) -> Result<String> {
        match &mut self.pending {
            Pending::Bytes(bytes) => Ok(String::from_utf8_lossy(&std::mem::take(bytes)).into_owned()),
            Pending::Tokens { ids, given } => {
                let before = self.tokenizer.decode(&ids[..*given], self.skip_special)?;
                let after = self.tokenizer.decode(&std::mem::take(ids), self.skip_special)?;
                *given = 0;
                Ok(beyond(&before, &after).to_owned())
            }
        }
    }
}

/// What `after` has beyond its common beginning with `before`, which is all of that unless a decoder changes what came earlier.
fn beyond<'t>(before: &str, after: &'t str) -> &'t str {
    let common = before.chars().zip(after.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    after.get(common..).unwrap_or_default()
}

/// Takes from `bytes` all that is a character or can become none (given as U+FFFD); the start of a character stays.
fn take_complete(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut rest = bytes.as_slice();
    loop {
        let error = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                rest = &[];
                break;
            }
            Err(error) => error,
        };
        let (valid, after) = rest.split_at(error.valid_up_to());
        text.push_str(&String::from_utf8_lossy(valid));
        rest = after;
        let Some(wrong) = error.error_len() else { break };
        text.push(char::REPLACEMENT_CHARACTER);
        rest = &rest[wrong..];
    }
    let kept = rest.len();
    bytes.drain(..bytes.len() - kept);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All bytes one by one, in pairs and in threes, against the standard library's lossy decoding of the whole.
    #[test]
    fn bytes_come_out_as_they_would_at_once() {
        let texts: [&[u8]; 6] = [
            "aé😀\u{301}z".as_bytes(),
            b"\xff\xfe",
            b"\xe2\x82",
            b"\xf0\x9f\x98x\xe2\x82\xac",
            b"\xc3\xc3\xa9\x80",
            b"\xed\xa0\x80\xf4\x90",
        ];
        for bytes in texts {
            for step in 1..=3 {
                let (mut held, mut text) = (Vec::new(), String::new());
                for part in bytes.chunks(step) {
                    held.extend(part);
                    text.push_str(&take_complete(&mut held));
                    assert!(held.len() < 4);
                }
                text.push_str(&String::from_utf8_lossy(&held));
                assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?} by {step}");
            }
        }
    }
}
