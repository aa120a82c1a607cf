//! GPT-2 124M at work: a prompt of 512 tokens in one pass, and 16 tokens one by one behind 128 in the cache, in f32 and in bf16.

use crate::{Bench, gpt};
use kiln::prelude::*;
use kiln::transformer::{CausalLm, KvCache, Pass};
use kiln::{Result, TensorOptions};

/// Tokens before the first, and tokens of a run.
const PAST: usize = 128;
const TOKENS: usize = 16;

fn rows(bench: &Bench, tag: &str, dtype: DType) -> Result<()> {
    let (decode, prefill) = (format!("decode_gpt2_124m_{tag}"), format!("prefill_gpt2_124m_{tag}_512"));
    if !bench.wants(&decode) && !bench.wants(&prefill) {
        return Ok(());
    }
    let params = Params::new();
    let model = gpt::model(&params, [1, 1024, 12, 12, 768, 50257])?;
    params.to_dtype(dtype)?;
    params.eval();
    let options = TensorOptions { dtype, ..params.options() };
    let mut cache = KvCache::new(model.shape(), 1, 1024, options)?;
    cache.advance(PAST);
    let token = Tensor::randint(0, 50257, [1, 1])?;
    let prompt = Tensor::randint(0, 50257, [1, 512])?;
    no_grad(|| {
        bench.run(&decode, || {
            cache.truncate(PAST);
            (0..TOKENS).try_for_each(|_| model.forward(&token, Pass::cached(&mut cache)).map(drop))
        })?;
        bench.run(&prefill, || model.forward(&prompt, Pass::default()))
    })
}

pub fn run(bench: &Bench) -> Result<()> {
    rows(bench, "f32", DType::F32)?;
    rows(bench, "bf16", DType::BF16)
}
