//! A GPT-2 to time: the model of `benches/compare/torch_bench.py`, with its weights tied and its step (loss, clipping, AdamW).

use crate::Bench;
use kiln::nn::{Embedding, Init, LayerNorm, Linear};
use kiln::optim::{AdamW, AdamWOptions};
use kiln::prelude::*;
use kiln::{AttentionOptions, Result, autocast};

struct Block {
    norms: [LayerNorm; 2],
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    heads: usize,
}

impl Block {
    fn new(params: &Params, width: usize, heads: usize) -> Result<Self> {
        let linear = |name: &str, inputs, outputs| {
            let init = Init::Normal { mean: 0.0, std: 0.02 };
            Linear::with_init(&params.scope(name), inputs, outputs, init, Some(Init::Zeros))
        };
        Ok(Self {
            norms: [LayerNorm::new(&params.scope("norm0"), width)?, LayerNorm::new(&params.scope("norm1"), width)?],
            qkv: linear("qkv", width, 3 * width)?,
            out: linear("out", width, width)?,
            up: linear("up", width, 4 * width)?,
            down: linear("down", 4 * width, width)?,
            heads,
        })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [b, t, c] = x.dims_n("gpt")?;
        // (B, T, C) each, then (B, nh, T, hs).
        let parts = self.qkv.forward(&self.norms[0].forward(x)?)?.chunk(3, -1)?;
        let heads = |x: &Tensor| x.reshape([b, t, self.heads, c / self.heads])?.transpose(1, 2);
        let causal = AttentionOptions { causal: true, ..AttentionOptions::default() };
        let y = heads(&parts[0])?.scaled_dot_product_attention(&heads(&parts[1])?, &heads(&parts[2])?, &causal)?;
        let x = x.add(&self.out.forward(&y.transpose(1, 2)?.reshape([b, t, c])?)?)?;
        x.add(&self.down.forward(&self.up.forward(&self.norms[1].forward(&x)?)?.gelu_tanh()?)?)
    }
}

struct Gpt {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
}

/// Batch, time steps, layers, heads, width, vocabulary.
type Size = [usize; 6];

impl Gpt {
    fn new(params: &Params, [_, t, layers, heads, width, vocabulary]: Size) -> Result<Self> {
        let embedding =
            |name: &str, entries| Embedding::with_init(&params.scope(name), entries, width, Init::Normal { mean: 0.0, std: 0.02 });
        Ok(Self {
            tokens: embedding("tokens", vocabulary)?,
            positions: embedding("positions", t)?,
            blocks: (0..layers).map(|i| Block::new(&params.scope("blocks").index(i), width, heads)).collect::<Result<_>>()?,
            norm: LayerNorm::new(&params.scope("norm"), width)?,
        })
    }

    /// Logits (B·T, V) of tokens (B, T).
    fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let [b, t] = tokens.dims_n("gpt")?;
        let positions = self.positions.forward(&Tensor::arange(0.0, t as f64, 1.0, DType::I64)?)?;
        let x = self.tokens.forward(tokens)?.add(&positions)?;
        let x = self.norm.forward(&self.blocks.iter().try_fold(x, |x, block| block.forward(&x))?)?;
        x.reshape([(b * t) as isize, -1])?.linear(&self.tokens.weight().get(), None)
    }
}

/// Times a training step of a model of this size, in f32 or with products in bf16.
fn step(bench: &Bench, name: &str, size: Size, half: bool) -> Result<()> {
    if !bench.wants(name) {
        return Ok(());
    }
    let params = Params::new();
    let model = Gpt::new(&params, size)?;
    let mut optimizer = AdamW::new(params.params(), AdamWOptions { lr: 3e-4, ..AdamWOptions::default() })?;
    let tokens = Tensor::randint(0, size[5] as i64, [size[0], size[1] + 1])?;
    let (input, target) = (tokens.narrow(1, 0, size[1])?.contiguous()?, tokens.narrow(1, 1, size[1])?.contiguous()?.flatten(0, 1)?);
    bench.run(name, || {
        params.zero_grad();
        let loss = || model.forward(&input)?.cross_entropy(&target);
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
    if bench.on_gpu() {
        step(bench, "train_gpt2_124m_bf16_b8_t1024", [8, 1024, 12, 12, 768, 50257], true)?;
    }
    Ok(())
}
