//! Tokenizers from GGUF files, whose metadata holds the vocabulary: byte-level BPE, and the pieces of SentencePiece with their scores.
//!
//! The keys, and what is assumed where one is missing, are llama.cpp's; texts get the ids that they have in transformers.

use super::bpe::byte_level;
use super::chat::ChatTemplate;
use super::special::SpecialTokens;
use super::tokenizer::{Tokenizer, guard};
use crate::gguf::{Gguf, shorten};
use kiln_tensor::Result;
use std::collections::{HashMap, HashSet};
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BpeBuilder, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

const MODEL: &str = "tokenizer.ggml.model";
const RULE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const SCORES: &str = "tokenizer.ggml.scores";
const TEMPLATE: &str = "tokenizer.chat_template";

/// What to do without the file's vocabulary.
const INSTEAD: &str = "take the tokenizer of a folder (Tokenizer::from_folder; --tokenizer of gpt2_generate)";

/// ggml's kinds of tokens that are no plain text.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6;

/// The id of a role that no token has: −1, as a file writes it.
const NONE: u64 = u32::MAX as u64;

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";

/// The longest piece that merges may lead to: there are as many ways to cut one as it has bytes. SentencePiece makes none of more than 16
/// characters unless it is told to.
const MAX_PIECE: usize = 256;

/// What is a word for Llama 3: contractions, letters with a sign before them, up to three digits, signs, line breaks, spaces.
const LLAMA3: &str =
    concat!(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");

/// For Qwen2: the same with single digits.
const QWEN2: &str =
    concat!(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+");

/// Which algorithm a vocabulary is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    /// Bytes are merged within words.
    ByteLevel(Words),
    /// Characters are merged into the pieces of the best scores.
    SentencePiece,
}

impl Family {
    fn of(file: &Gguf) -> Result<Self> {
        let missing = || file.wrong(format!("the key {MODEL:?} is missing, as in a file without a tokenizer; {INSTEAD}"));
        match file.find_str(MODEL)?.ok_or_else(missing)? {
            "llama" => Ok(Self::SentencePiece),
            "gpt2" => {
                let name = file.find_str(RULE)?.unwrap_or("default");
                let unknown = || {
                    let known = "default, gpt-2, smollm, llama-bpe and qwen2 are";
                    file.wrong(format!("the key {RULE:?} is {:?}, a rule that is not known here; {known}; {INSTEAD}", shorten(name)))
                };
                Words::named(name).map(Self::ByteLevel).ok_or_else(unknown)
            }
            other => {
                Err(file.wrong(format!("the key {MODEL:?} is {:?}, which is not read; gpt2 and llama are; {INSTEAD}", shorten(other))))
            }
        }
    }

    /// Whether a text begins with `bos` where the file does not say.
    fn begins_texts(self) -> bool {
        matches!(self, Self::SentencePiece | Self::ByteLevel(Words::Llama3))
    }
}

/// The rule by which a text is cut into words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Words {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
}

impl Words {
    fn named(name: &str) -> Option<Self> {
        match name {
            "default" | "gpt-2" => Some(Self::Gpt2),
            "smollm" => Some(Self::SmolLm),
            "llama-bpe" | "llama3" | "llama-v3" => Some(Self::Llama3),
            "qwen2" => Some(Self::Qwen2),
            _ => None,
        }
    }
}

/// The tokenizer in `file` with its special tokens.
pub(super) fn load(file: &Gguf) -> Result<Tokenizer> {
    let family = Family::of(file)?;
    let vocabulary = Vocabulary::read(file)?;
    let special = vocabulary.roles(family)?;
    let mut inner = match family {
        Family::ByteLevel(words) => vocabulary.byte_level(words)?,
        Family::SentencePiece => vocabulary.sentence_piece(special.unk)?,
    };
    vocabulary.add_special(&mut inner, &special)?;
    let bos = vocabulary.end("add_bos_token", "bos_token_id", special.bos, family.begins_texts())?;
    let eos = vocabulary.end("add_eos_token", "eos_token_id", special.eos.first().copied(), false)?;
    vocabulary.put_ends(&mut inner, bos, eos)?;
    Ok(Tokenizer::wrap(inner, special))
}

/// The tokens of a file.
struct Vocabulary<'a> {
    file: &'a Gguf,
    /// By their ids.
    tokens: &'a [String],
    /// ggml's kind of each; none if the file does not say.
    kinds: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Gguf) -> Result<Self> {
        let tokens = file.get_strings(TOKENS)?;
        if tokens.is_empty() || u32::try_from(tokens.len()).is_err() {
            return Err(file.wrong(format!("the key {TOKENS:?} has {} tokens", tokens.len())));
        }
        let mut vocabulary = Self { file, tokens, kinds: Vec::new() };
        if let Some(kinds) = file.find_u64s(KINDS)? {
            vocabulary.expect_one_each(KINDS, kinds.len())?;
            vocabulary.kinds = kinds;
        }
        Ok(vocabulary)
    }

    /// The tokens with their ids.
    fn ids(&self) -> Result<Vocab> {
        let mut ids = Vocab::new();
        for (id, token) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                let what = format!("the key {TOKENS:?} has {:?} twice, as elements {first} and {id}", shorten(token));
                return Err(self.file.wrong(what));
            }
        }
        Ok(ids)
    }

    fn expect_one_each(&self, key: &str, count: usize) -> Result<()> {
        if count == self.tokens.len() {
            return Ok(());
        }
        Err(self.file.wrong(format!("the key {key:?} has {count} elements for the {} tokens of {TOKENS:?}", self.tokens.len())))
    }

    fn is(&self, id: usize, kinds: &[u64]) -> bool {
        self.kinds.get(id).is_some_and(|kind| kinds.contains(kind))
    }

    fn text(&self, id: Option<u32>) -> Option<&'a String> {
        self.tokens.get(id? as usize)
    }

    /// The tokens that have a role, those that SentencePiece gives one by default included.
    fn roles(&self, family: Family) -> Result<SpecialTokens> {
        let usual = |id: u32| Some(id).filter(|_| family == Family::SentencePiece && (id as usize) < self.tokens.len());
        let mut eos: Vec<u32> = Vec::new();
        let ends = [self.role("eos_token_id")?.or(usual(2)), self.role("eot_token_id")?, self.role("eom_token_id")?];
        for id in ends.into_iter().flatten() {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        Ok(SpecialTokens {
            bos: self.role("bos_token_id")?.or(usual(1)),
            eos,
            pad: self.role("padding_token_id")?,
            unk: self.role("unknown_token_id")?.or(usual(0)),
            ..SpecialTokens::default()
        })
    }

    fn role(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}");
        let Some(id) = self.file.find_u64(&key)?.filter(|id| *id != NONE) else { return Ok(None) };
        let known = u32::try_from(id).ok().filter(|id| (*id as usize) < self.tokens.len());
        known.map(Some).ok_or_else(|| self.file.wrong(format!("the key {key:?} is {id}, of {} tokens", self.tokens.len())))
    }

    /// `id`, if the flag `name` says that a text gets it, or `assumed` does where there is no flag.
    fn end(&self, name: &str, role: &str, id: Option<u32>, assumed: bool) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}");
        match (self.file.find_bool(&key)?, id) {
            (Some(true), None) => Err(self.file.wrong(format!("the key {key:?} asks for the token that {role:?} is to name"))),
            (flag, id) => Ok(id.filter(|_| flag.unwrap_or(assumed))),
        }
    }

    /// Runs code of the `tokenizers` crate; its errors name the file.
    fn checked<T>(&self, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
        guard("tokenizer", run).map_err(|e| self.file.wrong(e))
    }

    fn byte_level(&self, words: Words) -> Result<tokenizers::Tokenizer> {
        let ids = self.ids()?;
        let merges = self.merges(&ids)?;
        // Llama 3 takes a word that is a token whole, whatever the merges.
        let builder = BpeBuilder::new().vocab_and_merges(ids, merges).ignore_merges(words == Words::Llama3);
        let mut inner = byte_level(self.checked(|| builder.build())?, false);
        let bytes = |cuts: bool| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, cuts));
        let pattern = |text: &str| {
            let pattern = SplitPattern::Regex(text.to_owned());
            self.checked(|| Split::new(pattern, SplitDelimiterBehavior::Isolated, false)).map(PreTokenizerWrapper::Split)
        };
        let steps = match words {
            Words::Gpt2 => return Ok(inner),
            Words::SmolLm => vec![PreTokenizerWrapper::Digits(Digits::new(true)), bytes(true)],
            Words::Llama3 => vec![pattern(LLAMA3)?, bytes(false)],
            Words::Qwen2 => vec![pattern(QWEN2)?, bytes(false)],
        };
        inner.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(PreTokenizers::new(steps))));
        Ok(inner)
    }

    /// The merges that the file lists, each two tokens with a space between them.
    fn merges(&self, ids: &Vocab) -> Result<Merges> {
        let (mut merges, mut seen) = (Merges::new(), HashSet::new());
        for (i, text) in self.file.get_strings(MERGES)?.iter().enumerate() {
            let wrong = |what: &str| self.file.wrong(format!("the key {MERGES:?}: element {i}, {:?}, {what}", shorten(text)));
            let pair = text.split_once(' ').filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '));
            let (left, right) = pair.ok_or_else(|| wrong("is not two tokens with a space between them"))?;
            if [left, right, &format!("{left}{right}")].into_iter().any(|token| !ids.contains_key(token)) {
                return Err(wrong(&format!("is not made of tokens, or makes none of {TOKENS:?}")));
            }
            if !seen.insert(text.as_str()) {
                return Err(wrong("is there twice"));
            }
            merges.push((left.to_owned(), right.to_owned()));
        }
        Ok(merges)
    }

    fn sentence_piece(&self, unknown: Option<u32>) -> Result<tokenizers::Tokenizer> {
        let builder = BpeBuilder::new().vocab_and_merges(self.ids()?, self.merges_by_score()?).fuse_unk(true).byte_fallback(true);
        let builder = match self.text(unknown) {
            Some(token) => builder.unk_token(token.clone()),
            None => builder,
        };
        let mut inner = tokenizers::Tokenizer::new(self.checked(|| builder.build())?);
        let replaced = |from: &str, to: &str| self.checked(|| Replace::new(from, to));
        let mut normal = vec![NormalizerWrapper::Replace(replaced(" ", SPACE)?)];
        let mut decoding = vec![
            DecoderWrapper::Replace(replaced(SPACE, " ")?),
            DecoderWrapper::ByteFallback(ByteFallback::new()),
            DecoderWrapper::Fuse(Fuse::new()),
        ];
        if self.file.find_bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true) {
            normal.insert(0, NormalizerWrapper::Prepend(Prepend::new(SPACE.to_owned())));
            decoding.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
        }
        let normal = NormalizerWrapper::Sequence(Normalizers::new(normal));
        self.checked(|| inner.with_normalizer(Some(normal)).map(|_| ()))?;
        inner.with_decoder(Some(DecoderWrapper::Sequence(Decoders::new(decoding))));
        Ok(inner)
    }

    /// The merges that the scores amount to: each way to put a piece together from two others, those of the best piece first, and of equal
    /// scores those with the longer left half (`generate_merges` of transformers).
    ///
    /// What is no plain text is left out: it is found in a text before anything is merged, or stands for a byte.
    fn merges_by_score(&self) -> Result<Merges> {
        let scores = self.file.get_f64s(SCORES)?;
        self.expect_one_each(SCORES, scores.len())?;
        let is_plain = |id: usize| !self.is(id, &[UNKNOWN, CONTROL, USER_DEFINED, BYTE]);
        let plain: Vec<(usize, &String)> = self.tokens.iter().enumerate().filter(|(id, _)| is_plain(*id)).collect();
        let ids: HashMap<&str, usize> = plain.iter().map(|(id, token)| (token.as_str(), *id)).collect();
        let mut ways = Vec::new();
        for &(id, piece) in &plain {
            if piece.len() > MAX_PIECE {
                let what = format!("the key {TOKENS:?}: element {id} is a piece of {} bytes, of {MAX_PIECE} at most", piece.len());
                return Err(self.file.wrong(what));
            }
            let score = scores.get(id).copied().unwrap_or_default();
            for (length, (at, _)) in piece.char_indices().enumerate().skip(1) {
                let (left, right) = piece.split_at(at);
                if let (Some(&a), Some(&b)) = (ids.get(left), ids.get(right)) {
                    ways.push(Way { score, lengths: [length, right.chars().count()], ids: [id, a, b], halves: [left, right] });
                }
            }
        }
        ways.sort_unstable_by(|a, b| {
            let by_score = b.score.total_cmp(&a.score);
            by_score.then_with(|| b.lengths.cmp(&a.lengths)).then_with(|| a.ids.cmp(&b.ids))
        });
        Ok(ways.into_iter().map(|way| (way.halves[0].to_owned(), way.halves[1].to_owned())).collect())
    }

    /// Marks the tokens that are taken whole out of a text: those of a role and of control, which are special, and those of the user.
    fn add_special(&self, inner: &mut tokenizers::Tokenizer, special: &SpecialTokens) -> Result<()> {
        let roles: Vec<usize> = special.ids().map(|id| id as usize).collect();
        let mut added = Vec::new();
        for (id, token) in self.tokens.iter().enumerate() {
            let is_special = self.is(id, &[UNKNOWN, CONTROL]) || roles.contains(&id);
            if is_special || self.is(id, &[USER_DEFINED]) {
                added.push(AddedToken::from(token.as_str(), is_special).normalized(false));
            }
        }
        self.checked(|| inner.add_tokens(added).map(|_| ()))
    }

    /// Has `bos` put before each text and `eos` behind it, where they are there.
    fn put_ends(&self, inner: &mut tokenizers::Tokenizer, bos: Option<u32>, eos: Option<u32>) -> Result<()> {
        let (mut parts, mut pair, mut named) = (vec!["$A:0"], vec!["$B:1"], Vec::new());
        for (name, id) in [("bos", bos), ("eos", eos)] {
            if let (Some(id), Some(token)) = (id, self.text(id)) {
                named.push(self.checked(|| SpecialToken::new(name.to_owned(), vec![id], vec![token.clone()]))?);
            }
        }
        if named.is_empty() {
            return Ok(());
        }
        if bos.is_some() {
            parts.insert(0, "bos:0");
            pair.insert(0, "bos:1");
        }
        if eos.is_some() {
            parts.push("eos:0");
            pair.push("eos:1");
        }
        let both = [parts.clone(), pair].concat();
        let template = self.checked(|| {
            let mut template = TemplateProcessing::builder();
            Ok(template.try_single(parts)?.try_pair(both)?.special_tokens(named).build()?)
        })?;
        inner.with_post_processor(Some(PostProcessorWrapper::Template(template)));
        Ok(())
    }
}

/// A piece as two others.
struct Way<'a> {
    score: f64,
    /// Characters of the halves.
    lengths: [usize; 2],
    /// Of the piece and its halves.
    ids: [usize; 3],
    halves: [&'a str; 2],
}

impl ChatTemplate {
    /// The template of a GGUF file, `tokenizer.chat_template`. The special tokens of `tokenizer`, which is the file's as a rule, are variables:
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    ///
    /// # Errors
    /// If there is none, or it is not Jinja.
    pub fn from_gguf(file: &Gguf, tokenizer: &Tokenizer) -> Result<Self> {
        let missing = || file.wrong(format!("the key {TEMPLATE:?} is missing; ChatTemplate::chatml() is one for models of your own"));
        let source = file.find_str(TEMPLATE)?.ok_or_else(missing)?;
        let mut template = Self::new(source).map_err(|e| file.wrong(format!("the key {TEMPLATE:?}: {e}")))?;
        let unk = tokenizer.special_tokens().unk;
        let named = [("bos_token", tokenizer.bos()), ("eos_token", tokenizer.eos()), ("unk_token", unk), ("pad_token", tokenizer.pad())];
        for (name, id) in named {
            if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
                template = template.with_variable(name, token);
            }
        }
        Ok(template)
    }
}
