//! Data: readers of files (IDX, image folders, CSV, JSONL), the MNIST family with a built-in generator of
//! handwritten digits, corpora of text and batches of tokens, and the loader that shuffles, batches and prefetches. No layer or model lives here.
//!
//! Every reader treats its file as hostile: it checks what a header claims against what the file can
//! hold before memory is allocated for it, and says which file and which field are wrong.

mod captioned;
mod csv;
mod dataset;
pub mod digits;
mod download;
mod error;
mod folder;
pub mod idx;
mod images;
pub mod landscapes;
mod loader;
mod mnist;
mod rng;
mod text;

pub use captioned::{Attributes, CaptionedBatch, CaptionedOptions, CaptionedPictures, Combinations, Style, edges};
pub use csv::{CsvOptions, CsvTable, Label, read_csv};
pub use dataset::{Dataset, Subset};
pub(crate) use folder::read_upright;
pub use folder::{FolderOptions, ImageFolder};
pub use images::{ImageBatch, ImageSet, Scale};
pub use loader::{Loader, LoaderOptions, LoaderState};
pub use mnist::{FashionMnist, Mnist, Origin, Source, Split};
pub use rng::Rng;
pub use text::moods;
pub use text::{
    Class, Conversation, Corpus, CorpusOrigin, CorpusSource, Demonstration, IGNORE_INDEX, JsonRecord, LabelledBatch, LabelledSequences,
    LabelledText, MaskOptions, MaskedBatch, MaskedSequences, Overlong, PackOptions, PackedBatch, PackedSequences, Packing, PaddedBatch,
    PaddedSequences, PaddingSide, PlainText, Preference, Prompt, PromptCompletion, TextClassification, TokenBatch, TokenBlocks,
    TokenSequence, Turns, generated_reviews, pad_sequences, read_jsonl, read_text_csv,
};
