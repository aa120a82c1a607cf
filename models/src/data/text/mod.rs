//! Text as data: corpora, windows of long token vectors, packed and padded batches, and readers of JSONL and CSV files.
//! Tokenizers and chat templates live in [`crate::text`].

mod blocks;
mod classify;
mod corpus;
mod grammar;
mod jsonl;
mod labelled;
mod masked;
pub mod moods;
mod packed;
mod padded;
mod reviews;

pub use blocks::{TokenBatch, TokenBlocks};
pub use classify::{TextClassification, read_text_csv};
pub use corpus::{Corpus, CorpusOrigin, CorpusSource};
pub use jsonl::{
    Class, Conversation, Demonstration, JsonRecord, LabelledText, PlainText, Preference, Prompt, PromptCompletion, Turns, read_jsonl,
};
pub use labelled::{LabelledBatch, LabelledSequences};
pub use masked::{MaskOptions, MaskedBatch, MaskedSequences};
pub use packed::{Overlong, PackOptions, PackedBatch, PackedSequences, Packing};
pub use padded::{IGNORE_INDEX, PaddedBatch, PaddedSequences, PaddingSide, TokenSequence, pad_sequences};
pub use reviews::generated_reviews;
