//! Convolutions and attention, forward and with both backward passes.

use crate::Bench;
use kiln::autograd::GradOptions;
use kiln::nn::{Conv2d, ConvOptions};
use kiln::prelude::*;
use kiln::{Activation, AttentionOptions, Result};

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

/// Operations that are computed together: gated units, rotary embedding, linear maps and norms with their activation.
pub fn fused(bench: &Bench) -> Result<()> {
    let leaf = |shape: &[usize], dtype: DType| Tensor::randn(shape, dtype)?.requires_grad_();
    let both = |leaves: &[&Tensor], y: Tensor, grad: &Tensor| {
        leaves.iter().for_each(|x| x.zero_grad());
        y.backward_with(Some(grad), GradOptions::default())
    };
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        if bench.wants(&format!("swiglu_fwd_{tag}_4M swiglu_fwdbwd_{tag}_4M geglu_fwdbwd_{tag}_4M")) {
            let (gate, up, grad) = (leaf(&[4096, 1024], dtype)?, leaf(&[4096, 1024], dtype)?, Tensor::randn([4096, 1024], dtype)?);
            bench.run(&format!("swiglu_fwd_{tag}_4M"), || no_grad(|| gate.swiglu(&up)))?;
            bench.run(&format!("swiglu_fwdbwd_{tag}_4M"), || both(&[&gate, &up], gate.swiglu(&up)?, &grad))?;
            bench.run(&format!("geglu_fwdbwd_{tag}_4M"), || both(&[&gate, &up], gate.geglu(&up)?, &grad))?;
        }
        if bench.wants(&format!("rotary_fwd_{tag}_4x8x1024x64 rotary_fwdbwd_{tag}_4x8x1024x64")) {
            let positions = Tensor::arange(0.0, 1024.0, 1.0, DType::I64)?;
            let (cos, sin) = positions.rotary_tables(&Tensor::rotary_frequencies(64, 10_000.0)?)?;
            let (x, grad) = (leaf(&[4, 8, 1024, 64], dtype)?, Tensor::randn([4, 8, 1024, 64], dtype)?);
            bench.run(&format!("rotary_fwd_{tag}_4x8x1024x64"), || no_grad(|| x.rotary_embedding(&cos, &sin, false)))?;
            bench.run(&format!("rotary_fwdbwd_{tag}_4x8x1024x64"), || both(&[&x], x.rotary_embedding(&cos, &sin, false)?, &grad))?;
        }
        for (name, activation) in [("relu", Activation::Relu), ("gelu", Activation::Gelu)] {
            let (fwd, fwdbwd) = (format!("linear_{name}_fwd_{tag}_512x768x3072"), format!("linear_{name}_fwdbwd_{tag}_512x768x3072"));
            if !bench.wants(&format!("{fwd} {fwdbwd}")) {
                continue;
            }
            let (x, w, b) = (leaf(&[512, 768], dtype)?, leaf(&[3072, 768], dtype)?, leaf(&[3072], dtype)?);
            let grad = Tensor::randn([512, 3072], dtype)?;
            bench.run(&fwd, || no_grad(|| x.linear_activation(&w, Some(&b), activation)))?;
            bench.run(&fwdbwd, || both(&[&x, &w, &b], x.linear_activation(&w, Some(&b), activation)?, &grad))?;
        }
    }
    // Channels-last, as convolutions leave their results.
    for (name, shape, activation) in
        [("batchnorm_relu", [128, 64, 14, 14], Activation::Relu), ("groupnorm_silu", [32, 64, 28, 28], Activation::Silu)]
    {
        let (fwd, fwdbwd) =
            (format!("{name}_fwd_{}x{}x{}", shape[0], shape[1], shape[2]), format!("{name}_fwdbwd_{}x{}x{}", shape[0], shape[1], shape[2]));
        if !bench.wants(&format!("{fwd} {fwdbwd}")) {
            continue;
        }
        let x = Tensor::randn(shape, DType::F32)?.to_memory_order(&[0, 2, 3, 1])?.requires_grad_()?;
        let (w, b, grad) =
            (leaf(&[64], DType::F32)?, leaf(&[64], DType::F32)?, Tensor::randn(shape, DType::F32)?.to_memory_order(&[0, 2, 3, 1])?);
        let norm = || match activation {
            Activation::Relu => Ok(x.batch_norm_activation(Some(&w), Some(&b), 1e-5, activation)?.output),
            _ => x.group_norm_activation(8, Some(&w), Some(&b), 1e-5, activation),
        };
        bench.run(&fwd, || no_grad(norm))?;
        bench.run(&fwdbwd, || both(&[&x, &w, &b], norm()?, &grad))?;
    }
    Ok(())
}
