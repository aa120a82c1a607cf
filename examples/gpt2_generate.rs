//! Continues a prompt with a language model from a Hugging Face folder or a GGUF file. `cargo run --example gpt2_generate -- FOLDER`

use clap::Parser;
use kiln::generate::{GenerationConfig, TextStream};
use kiln::gguf::Gguf;
use kiln::prelude::*;
use kiln::text::{ChatTemplate, Message, Tokenizer, Variables};
use kiln::transformer::{CausalLm, Decoder, load, load_gguf};
use kiln::{Error, Quantization, Result, set_default_device};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Continues a prompt with a language model: GPT-2, Llama, Mistral, Qwen2, Qwen3, OPT.
///
/// The text appears as it is made. `gpt_shakespeare` leaves such a folder in out/gpt_shakespeare/model.
#[derive(Parser)]
struct Args {
    /// Folder with config.json, model.safetensors (or its shards) and a tokenizer, or a .gguf file, which holds all of this.
    model: PathBuf,
    /// The text to continue; `-` reads it from standard input.
    #[arg(long, default_value = "\n")]
    prompt: String,
    /// Treat the prompt as a user's message, laid out by the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Folder of the tokenizer and the chat template, where they are not the model's.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// New tokens at most.
    #[arg(long, default_value_t = 100)]
    max_new_tokens: usize,
    /// 0 takes the most likely token each time.
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Draw among the k most likely tokens.
    #[arg(long)]
    top_k: Option<usize>,
    /// Draw among the fewest tokens whose probabilities sum to this.
    #[arg(long)]
    top_p: Option<f32>,
    /// Draw among tokens at least this times as likely as the likeliest.
    #[arg(long)]
    min_p: Option<f32>,
    /// More than 1 makes tokens that are there already less likely.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,
    /// End once the text holds this. May be given several times.
    #[arg(long)]
    stop: Vec<String>,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Dtype of the weights: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    dtype: DType,
    /// Keep the matrices of linear layers and of the logits in 8 or 4 bits.
    #[arg(long, value_name = "8|4", value_parser = quantization)]
    bits: Option<Quantization>,
    /// Threads; all cores by default. The result does not depend on it.
    #[arg(long)]
    threads: Option<usize>,
    /// Device: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: Device,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(threads) = args.threads {
        kiln::set_threads(threads)?;
    }
    set_default_device(args.device);
    // What a text can be refused for comes before the weights, which take their time.
    let (tokenizer, template) = load_text(&args)?;
    let prompt = prompt(&args, &tokenizer, template.as_ref())?;
    let started = Instant::now();
    let model = load_model(&args)?;
    let shape = model.shape();
    eprintln!(
        "{} layers, {} wide, {} parameters in {}; loaded in {:.1} s",
        shape.num_layers,
        shape.hidden_size,
        model.params().num_parameters(),
        args.dtype,
        started.elapsed().as_secs_f64()
    );
    speak(&args, &model, &tokenizer, prompt)
}

/// How weights are kept in so many bits.
fn quantization(bits: &str) -> Result<Quantization, &'static str> {
    match bits {
        "8" => Ok(Quantization::Int8 { group: 64 }),
        "4" => Ok(Quantization::Int4 { group: 64 }),
        _ => Err("there are 8 and 4"),
    }
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "gguf")
}

/// The tokenizer, and with --chat the template: those of a folder, or the model file's own.
fn load_text(args: &Args) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    if args.tokenizer.is_none() && is_gguf(&args.model) {
        let file = Gguf::open(&args.model)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        let template = args.chat.then(|| ChatTemplate::from_gguf(&file, &tokenizer)).transpose()?;
        return Ok((tokenizer, template));
    }
    let folder = args.tokenizer.as_ref().unwrap_or(&args.model);
    let template = args.chat.then(|| ChatTemplate::from_folder(folder)).transpose()?;
    Ok((Tokenizer::from_folder(folder)?, template))
}

fn load_model(args: &Args) -> Result<Decoder> {
    let params = Params::with(kiln::nn::ParamsOptions { dtype: args.dtype, ..Default::default() });
    let (_, model) = if is_gguf(&args.model) { load_gguf(&args.model, &params)? } else { load(&args.model, &params)? };
    let Some(kind) = args.bits else { return Ok(model) };
    let count = params.quantize_linears_if(|layer| layer.weight().is_some(), kind)?;
    // A plain matrix that still gives the logits is the table of tokens, which is no linear layer.
    let is_tied = model.logits_weight().is_some();
    if is_tied {
        model.quantize_tied_head(kind)?;
    }
    eprintln!("{count} layers{} quantised", if is_tied { " and the matrix of the logits" } else { "" });
    Ok(model)
}

/// The ids of the prompt.
fn prompt(args: &Args, tokenizer: &Tokenizer, template: Option<&ChatTemplate>) -> Result<Vec<u32>> {
    let mut text = args.prompt.clone();
    if text == "-" {
        text.clear();
        std::io::stdin().read_to_string(&mut text).map_err(|e| Error::io("prompt", "standard input", e))?;
    }
    match template {
        Some(template) => template.encode(tokenizer, &[Message::new("user", text)], true, &Variables::default()),
        None => tokenizer.encode_with_specials(&text),
    }
}

/// Prints the prompt and what follows, and then how fast it was.
fn speak(args: &Args, model: &Decoder, tokenizer: &Tokenizer, prompt: Vec<u32>) -> Result<()> {
    let config = GenerationConfig {
        max_new_tokens: Some(args.max_new_tokens),
        do_sample: args.temperature > 0.0,
        temperature: if args.temperature > 0.0 { args.temperature } else { 1.0 },
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        eos_token_id: tokenizer.special_tokens().eos.clone(),
        pad_token_id: tokenizer.pad(),
        seed: args.seed,
        ..GenerationConfig::default()
    };
    let shown = |text: &str| {
        print!("{text}");
        std::io::stdout().flush().map_err(|e| Error::io("print", "standard output", e))
    };
    if !args.chat {
        shown(&tokenizer.decode(&prompt, true)?)?;
    }
    let mut stream = TextStream::of_tokens(model, tokenizer, &prompt, &config, &args.stop)?;
    // When the first text came, and after how many tokens.
    let (started, mut first) = (Instant::now(), None);
    while let Some(text) = stream.next() {
        first.get_or_insert((started.elapsed(), stream.tokens()));
        shown(&text?)?;
    }
    println!();
    let (prefill, count) = (first.map_or(started.elapsed(), |(time, _)| time), stream.tokens());
    let decode = (started.elapsed() - prefill).as_secs_f64();
    eprintln!("prompt: {} tokens, {:.0} tokens/s", prompt.len(), prompt.len() as f64 / prefill.as_secs_f64().max(1e-9));
    if let Some(rest) = first.map(|(_, shown)| count - shown).filter(|&rest| rest > 0) {
        eprintln!("answer: {count} tokens, {:.1} tokens/s", rest as f64 / decode.max(1e-9));
    }
    Ok(())
}
