//! Convolutions and attention, forward and with both backward passes.

use crate::Bench;
use kiln::nn::{Conv2d, ConvOptions};
use kiln::prelude::*;
use kiln::{AttentionOptions, Result};

pub fn convolutions(bench: &Bench) -> Result<()> {
    let shapes = [
        ("3x3_64c_28", (32, 64, 64, 28, 3, 1)),
        ("3x3_128c_14", (32, 128, 128, 14, 3, 1)),
        ("1x1_256c_16", (16, 256, 256, 16, 1, 1)),
        ("4x4s2_64to128_14", (128, 64, 128, 14, 4, 2)),
        ("3x3_3to64_64", (16, 3, 64, 64, 3, 1)),
    ];
    for (tag, (n, ci, co, size, k, stride)) in shapes {
        if !bench.wants(&format!("conv_fwd_{tag} conv_fwdbwd_{tag}")) {
            continue;
        }
        let params = Params::new();
        let options = ConvOptions::new().with_stride(stride).with_padding(usize::from(k > 1));
        let conv = Conv2d::new(&params, ci, co, k, options)?;
        // Channels-last, as the peer's input is.
        let x = Tensor::randn([n, ci, size, size], DType::F32)?.to_memory_order(&[0, 2, 3, 1])?.requires_grad_()?;
        bench.run(&format!("conv_fwd_{tag}"), || no_grad(|| conv.forward(&x)))?;
        bench.run(&format!("conv_fwdbwd_{tag}"), || {
            params.zero_grad();
            x.zero_grad();
            conv.forward(&x)?.sum(())?.backward()
        })?;
    }
    Ok(())
}

pub fn attention(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let name = |pass: &str| format!("attn_causal_{pass}_{tag}_4x8x1024x64");
        if !bench.wants(&format!("{} {}", name("fwd"), name("fwdbwd"))) {
            continue;
        }
        let leaf = || Tensor::randn([4, 8, 1024, 64], dtype)?.requires_grad_();
        let (q, k, v) = (leaf()?, leaf()?, leaf()?);
        let options = AttentionOptions { causal: true, ..AttentionOptions::default() };
        let causal = || q.scaled_dot_product_attention(&k, &v, &options);
        bench.run(&name("fwd"), || no_grad(causal))?;
        bench.run(&name("fwdbwd"), || {
            [&q, &k, &v].into_iter().for_each(Tensor::zero_grad);
            causal()?.sum(())?.backward()
        })?;
    }
    Ok(())
}
