//! GPT-2 to train: the model of `benches/compare/torch_bench.py` (no dropout, weights tied) and its step (loss, clipping, AdamW).

use crate::Bench;
use kiln::optim::{AdamW, AdamWOptions};
use kiln::prelude::*;
use kiln::transformer::{CausalLm, Decoder, Gpt2Config, Pass};
use kiln::{CrossEntropyOptions, Result, autocast};

/// Batch, time steps, layers, heads, width, vocabulary.
type Size = [usize; 6];

/// A model of this size without dropout, as the workloads of PyTorch are.
pub fn model(params: &Params, [_, n_positions, n_layer, n_head, n_embd, vocab_size]: Size) -> Result<Decoder> {
    let (resid_pdrop, embd_pdrop, attn_pdrop) = (0.0, 0.0, 0.0);
    let sizes = Gpt2Config { n_positions, n_layer, n_head, n_embd, vocab_size, ..Gpt2Config::default() };
    Gpt2Config { resid_pdrop, embd_pdrop, attn_pdrop, ..sizes }.build(params)
}

/// Times a training step of a model of this size, in f32 or with products in bf16.
fn step(bench: &Bench, name: &str, size: Size, half: bool) -> Result<()> {
    if !bench.wants(name) {
        return Ok(());
    }
    let params = Params::new();
    let model = model(&params, size)?;
    let mut optimizer = AdamW::new(params.params(), AdamWOptions { lr: 3e-4, ..AdamWOptions::default() })?;
    let tokens = Tensor::randint(0, size[5] as i64, [size[0], size[1] + 1])?;
    let (input, target) = (tokens.narrow(1, 0, size[1])?.contiguous()?, tokens.narrow(1, 1, size[1])?.contiguous()?);
    bench.run(name, || {
        params.zero_grad();
        let loss = || model.loss(&input, &target, Pass::default(), &CrossEntropyOptions::default());
        let loss = if half { autocast(DType::BF16, loss)?? } else { loss()? };
        loss.backward()?;
        optimizer.step_clipped(1.0)?;
        Ok(())
    })
}

pub fn run(bench: &Bench) -> Result<()> {
    step(bench, "train_gpt_char_cpu_b12_t64_l4_h4_c128_v65", [12, 64, 4, 4, 128, 65], false)?;
    step(bench, "train_gpt_char_b16_t256_l6_h6_c384_v65", [16, 256, 6, 6, 384, 65], false)?;
    step(bench, "train_gpt_char_bf16_b16_t256_l6_h6_c384_v65", [16, 256, 6, 6, 384, 65], true)?;
    step(bench, "train_gpt2_124m_b1_t256", [1, 256, 12, 12, 768, 50257], false)?;
    step(bench, "train_gpt2_124m_b1_t1024", [1, 1024, 12, 12, 768, 50257], false)?;
    if bench.on_gpu() {
        step(bench, "train_gpt2_124m_bf16_b8_t1024", [8, 1024, 12, 12, 768, 50257], true)?;
    }
    Ok(())
}
