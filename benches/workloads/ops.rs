//! Single operations: matrix products, and what is bound by memory.

use crate::Bench;
use kiln::optim::{AdamW, AdamWOptions};
use kiln::prelude::*;
use kiln::{Quantization, QuantizedMatrix, Result, fuse};

pub fn products(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        for n in [128, 256, 512, 1024, 2048] {
            let (x, y) = (Tensor::randn([n, n], dtype)?, Tensor::randn([n, n], dtype)?);
            bench.run(&format!("gemm_{tag}_{n}"), || x.matmul(&y))?;
        }
        for (m, k, n) in [(1, 768, 3072), (16, 768, 3072), (512, 768, 3072), (1, 4096, 4096), (49, 1152, 64)] {
            let (x, w) = (Tensor::randn([m, k], dtype)?, Tensor::randn([n, k], dtype)?);
            bench.run(&format!("linear_{tag}_{m}x{k}x{n}"), || x.linear(&w, None))?;
        }
        let (x, y) = (Tensor::randn([96, 256, 64], dtype)?, Tensor::randn([96, 64, 256], dtype)?);
        bench.run(&format!("bmm_{tag}_96x256x64x256"), || x.matmul(&y))?;
    }
    quantized(bench)
}

/// One row times weights in few bits, as in decoding: beside `linear_f32_1x4096x4096`, which streams four and eight times as much.
fn quantized(bench: &Bench) -> Result<()> {
    for (kind, tag) in [(Quantization::Int8 { group: 128 }, "int8"), (Quantization::Int4 { group: 128 }, "int4")] {
        let name = format!("quant_{tag}_1x4096x4096");
        if bench.wants(&name) {
            let weight = QuantizedMatrix::quantize(&Tensor::randn([4096, 4096], DType::F32)?, kind)?;
            let x = Tensor::randn([1, 4096], DType::F32)?;
            bench.run(&name, || weight.linear(&x, None))?;
        }
    }
    Ok(())
}

pub fn memory_bound(bench: &Bench) -> Result<()> {
    let normal = |shape: &[usize]| Tensor::randn(shape, DType::F32);
    let (x, y, w, b) = (normal(&[4096, 1024])?, normal(&[4096, 1024])?, normal(&[1024])?, normal(&[1024])?);
    bench.run("add_4M", || x.add(&y))?;
    bench.run("gelu_4M", || x.gelu())?;
    bench.run("exp_4M", || x.exp())?;
    bench.run("softmax_4096x1024", || x.softmax(-1))?;
    bench.run("layernorm_4096x1024", || x.layer_norm([1024], Some(&w), Some(&b), 1e-5))?;
    bench.run("sum_last_4096x1024", || x.sum(-1))?;
    bench.run("sum_first_4096x1024", || x.sum(0))?;
    bench.run("transpose_copy_4096x1024", || x.t()?.contiguous())?;
    let bias_gelu_residual = fuse(|[x, b, y]| y + (x + b).gelu())?;
    bench.run("bias_gelu_residual_4M", || bias_gelu_residual.call([&x, &b, &y]))?;
    bench.run("randn_4M", || normal(&[4096, 1024]))?;
    let s = normal(&[64])?;
    bench.run("add_64", || s.add(&s))?;
    if bench.wants("adamw_8M") {
        let params = Params::new();
        for i in 0..8 {
            params.param_from(&format!("p{i}"), &normal(&[1024, 1024])?)?.set_grad(Some(normal(&[1024, 1024])?))?;
        }
        let mut optimizer = AdamW::new(params.params(), AdamWOptions::default())?;
        bench.run("adamw_8M", || optimizer.step())?;
        bench.run("adamw_8M_clipped", || optimizer.step_clipped(1.0))?;
    }
    let leaf = x.requires_grad_()?;
    bench.run("layernorm_fwdbwd_4096x1024", || {
        leaf.zero_grad();
        leaf.layer_norm([1024], Some(&w), Some(&b), 1e-5)?.sum(())?.backward()
    })?;
    bench.run("mse_fwdbwd_4M", || {
        leaf.zero_grad();
        leaf.mse_loss(&y)?.backward()
    })?;
    let target = y.sigmoid()?;
    bench.run("bce_fwdbwd_4M", || {
        leaf.zero_grad();
        leaf.bce_with_logits(&target)?.backward()
    })
}
