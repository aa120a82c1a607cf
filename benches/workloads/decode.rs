//! GPT-2 124M at work: a prompt of 512 tokens in one pass, and 16 tokens one by one behind 128 in the cache; with weights in f32, bf16, int8
//! and 4 bits, and beside them 16 plain reads of as many bytes as the weights of a token.

use crate::{Bench, gpt};
use kiln::prelude::*;
use kiln::transformer::{CausalLm, KvCache, Pass};
use kiln::{Quantization, QuantizedMatrix, Result, TensorOptions};

/// Tokens before the first, and tokens of a run.
const PAST: usize = 128;
const TOKENS: usize = 16;

/// How the weights are kept.
#[derive(Clone, Copy)]
enum Weights {
    Dense(DType),
    Quantized(Quantization),
}

fn rows(bench: &Bench, tag: &str, weights: Weights) -> Result<()> {
    let (decode, prefill) = (format!("decode_gpt2_124m_{tag}"), format!("prefill_gpt2_124m_{tag}_512"));
    let read = format!("read_gpt2_124m_{tag}");
    if ![&decode, &prefill, &read].iter().any(|name| bench.wants(name)) {
        return Ok(());
    }
    let params = Params::new();
    let model = gpt::model(&params, [1, 1024, 12, 12, 768, 50257])?;
    params.eval();
    let dtype = match weights {
        Weights::Dense(dtype) => dtype,
        Weights::Quantized(kind) => {
            params.quantize_linears("*", kind)?;
            model.quantize_tied_head(kind)?;
            DType::F32
        }
    };
    params.to_dtype(dtype)?;
    let mut cache = KvCache::new(model.shape(), 1, 1024, TensorOptions { dtype, ..params.options() })?;
    cache.advance(PAST);
    let token = Tensor::randint(0, 50257, [1, 1])?;
    let prompt = Tensor::randint(0, 50257, [1, 512])?;
    no_grad(|| {
        bench.run(&decode, || {
            cache.truncate(PAST);
            (0..TOKENS).try_for_each(|_| model.forward(&token, Pass::cached(&mut cache)).map(drop))
        })?;
        bench.run(&prefill, || model.forward(&prompt, Pass::default()))?;
        // What a step of decoding cannot be faster than: its weights, read once a token.
        let weights = Tensor::zeros(bytes_of_a_token(&params, weights)? / 4, DType::F32)?;
        bench.run(&read, || (0..TOKENS).try_for_each(|_| weights.sum(()).map(drop)))
    })
}

/// Bytes of weights that a token reads: every matrix, the table of tokens as the head's; of the positions, one row.
fn bytes_of_a_token(params: &Params, weights: Weights) -> Result<usize> {
    let dense: Vec<_> = params.params().into_iter().filter(|param| !param.name().ends_with("wpe.weight")).collect();
    let numel: usize = dense.iter().map(|param| param.numel()).sum();
    let kind = match weights {
        Weights::Dense(dtype) => return Ok(numel * dtype.size()),
        Weights::Quantized(kind) => kind,
    };
    let layers: usize = params.linears().iter().filter_map(|layer| layer.quantized()).map(|matrix| matrix.nbytes()).sum();
    let table: usize = dense.iter().filter(|param| param.name().ends_with("wte.weight")).map(|param| param.numel()).sum();
    let row = QuantizedMatrix::quantize(&Tensor::zeros([1, 768], ())?, kind)?;
    Ok((numel - table) * 4 + layers + table / 768 * row.nbytes())
}

pub fn run(bench: &Bench) -> Result<()> {
    rows(bench, "f32", Weights::Dense(DType::F32))?;
    rows(bench, "bf16", Weights::Dense(DType::BF16))?;
    rows(bench, "int8", Weights::Quantized(Quantization::Int8 { group: 64 }))?;
    rows(bench, "int4", Weights::Quantized(Quantization::Int4 { group: 64 }))
}
