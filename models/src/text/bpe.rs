//! Training a byte-level BPE vocabulary on one's own texts.

use super::special::SpecialTokens;
use super::tokenizer::{Tokenizer, guard};
use kiln_tensor::{Error, Result};
use std::collections::HashSet;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, PostProcessorWrapper, PreTokenizerWrapper};

/// Byte values: the vocabulary before the first merge.
const BYTES: usize = 256;

/// Learns a byte-level BPE vocabulary (Sennrich et al. 2016, on bytes as in Radford et al. 2019) of `vocab_size` entries: the
/// special tokens first, in their order, then the 256 bytes, then merges. Any text has an encoding, and gets back out of it unchanged.
///
/// The result is a function of its arguments. It has fewer entries if the texts have no more pairs to merge. The first special token
/// is taken for the end of a text ([`Tokenizer::eos`]) and padding; [`Tokenizer::with_special_tokens`] says otherwise.
///
/// ```
/// let texts = ["low lower lowest", "new newer newest"];
/// let tokenizer = kiln_models::text::train_bpe(texts, 270, &["<|endoftext|>"])?;
/// let ids = tokenizer.encode("slower 😀<|endoftext|>")?;
/// assert_eq!(ids.last().copied(), tokenizer.eos());
/// assert_eq!(tokenizer.decode(&ids, true)?, "slower 😀");
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
///
/// # Errors
/// If `vocab_size` has no room for bytes and special tokens, or a special token is empty or there twice.
pub fn train_bpe<S>(texts: impl IntoIterator<Item = S>, vocab_size: usize, special_tokens: &[&str]) -> Result<Tokenizer>
where
    S: AsRef<str> + Send,
{
    check(vocab_size, special_tokens)?;
    let texts: Vec<S> = texts.into_iter().collect();
    let bytes: usize = texts.iter().map(|text| text.as_ref().len()).sum();
    let base = BYTES + special_tokens.len();
    // The trainer reserves memory for the entries asked for; a merge needs a byte of text at least.
    let vocab_size = vocab_size.min(base.saturating_add(bytes));
    let trainer = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special_tokens.iter().map(|&token| AddedToken::from(token, true)).collect())
        .show_progress(false)
        .build();
    let mut inner = byte_level(BPE::default(), false);
    let mut trainer = TrainerWrapper::from(trainer);
    guard("train_bpe", || inner.train(&mut trainer, texts.into_iter()).map(|_| ()))?;
    let first = special_tokens.first().and_then(|token| inner.token_to_id(token));
    let special = SpecialTokens { eos: first.into_iter().collect(), pad: first, ..SpecialTokens::default() };
    Ok(Tokenizer::wrap(inner, special))
}

/// A tokenizer around `model` that reads and writes bytes as GPT-2's.
pub(super) fn byte_level(model: BPE, add_prefix_space: bool) -> tokenizers::Tokenizer {
    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(ByteLevel::new(add_prefix_space, true, true))));
    inner.with_post_processor(Some(PostProcessorWrapper::ByteLevel(ByteLevel::new(true, false, true))));
    inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(true, true, true))));
    inner
}

fn check(vocab_size: usize, special_tokens: &[&str]) -> Result<()> {
    let base = BYTES + special_tokens.len();
    if vocab_size < base || u32::try_from(vocab_size).is_err() {
        let problem = format!("a vocabulary of {vocab_size} entries must hold {BYTES} bytes and {} special tokens", special_tokens.len());
        return Err(Error::argument("train_bpe", problem));
    }
    let mut seen = HashSet::new();
    match special_tokens.iter().find(|token| token.is_empty() || !seen.insert(**token)) {
        Some(token) => Err(Error::argument("train_bpe", format!("special token {token:?} is empty or there twice"))),
        None => Ok(()),
    }
}
