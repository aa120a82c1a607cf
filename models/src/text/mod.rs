//! Text for language models: tokenizers (Hugging Face files, GGUF files, characters, byte-level BPE of one's own), decoding as a stream, and
//! chat templates with the mask of the assistant's tokens. Corpora and data sets of text live in [`crate::data`].

mod assistant;
mod bpe;
mod character;
mod chat;
mod clip;
mod folder;
mod gguf;
mod python;
mod special;
mod stream;
mod tokenizer;
mod words;

pub use bpe::train_bpe;
pub use character::CharTokenizer;
pub use chat::{ChatTemplate, Content, Message, Variables};
pub use serde_json as json;
pub use special::SpecialTokens;
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
pub use words::WordTokenizer;
