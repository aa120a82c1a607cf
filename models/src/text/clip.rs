//! CLIP's vocabulary: byte-level BPE of lower-case words that end in `</w>`, between `<|startoftext|>` and `<|endoftext|>`.

use super::tokenizer::guard;
use kiln_tensor::{Error, Result};
use tokenizers::models::bpe::{BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::{Lowercase, NFC, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::roberta::RobertaProcessing;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

const START: &str = "<|startoftext|>";
const END: &str = "<|endoftext|>";

/// What is a word: contractions, letters, single digits, and runs of other signs.
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// The tokenizer of a vocabulary and its merges.
///
/// # Errors
/// If the tokens of start and end are missing, or the merges do not fit the vocabulary.
pub(super) fn clip(vocab: Vocab, merges: Merges) -> Result<tokenizers::Tokenizer> {
    let id = |token: &str| -> Result<(String, u32)> {
        let missing = || Error::format("tokenizer", format!("vocab.json: CLIP's token {token:?} is missing"));
        Ok((token.to_owned(), vocab.get(token).copied().ok_or_else(missing)?))
    };
    let (start, end) = (id(START)?, id(END)?);
    let builder = BpeBuilder::new().vocab_and_merges(vocab, merges).unk_token(END.to_owned()).end_of_word_suffix("</w>".to_owned());
    let model = guard("tokenizer", || builder.build())?;
    let pattern = |text: &str| SplitPattern::Regex(text.to_owned());
    let words = guard("tokenizer", || Split::new(pattern(WORDS), SplitDelimiterBehavior::Removed, true))?;
    let spaces = guard("tokenizer", || Replace::new(tokenizers::normalizers::replace::ReplacePattern::Regex(r"\s+".into()), " "))?;
    let normal = vec![NormalizerWrapper::NFC(NFC), spaces.into(), NormalizerWrapper::Lowercase(Lowercase)];
    let mut inner = tokenizers::Tokenizer::new(model);
    inner
        .with_normalizer(Some(NormalizerWrapper::Sequence(Normalizers::new(normal))))
        .map_err(|e| Error::format("tokenizer", e.to_string()))?;
    let steps = vec![PreTokenizerWrapper::Split(words), PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, true))];
    inner.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(PreTokenizers::new(steps))));
    let ends = RobertaProcessing::new(end, start).add_prefix_space(false).trim_offsets(false);
    inner.with_post_processor(Some(PostProcessorWrapper::Roberta(ends)));
    inner.with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::new(true, true, true))));
    Ok(inner)
}
