//! Shapes that fill a GPU: names as in `benches/compare/torch_bench.py`. On a processor they are left out.

use crate::Bench;
use kiln::autograd::{GradOptions, grad_with};
use kiln::prelude::*;
use kiln::{AttentionOptions, Result, fuse};

pub fn run(bench: &Bench) -> Result<()> {
    if !bench.on_gpu() {
        return Ok(());
    }
    products(bench)?;
    memory_bound(bench)?;
    attention(bench)
}

fn products(bench: &Bench) -> Result<()> {
    for (dtype, tag, sizes) in [(DType::BF16, "bf16", &[4096, 8192][..]), (DType::F32, "f32", &[4096])] {
        for &n in sizes {
            let name = format!("gemm_{tag}_{n}");
            if bench.wants(&name) {
                let (x, y) = (Tensor::randn([n, n], dtype)?, Tensor::randn([n, n], dtype)?);
                bench.run(&name, || x.matmul(&y))?;
            }
        }
    }
    Ok(())
}

/// A gibibyte of f32: far beyond any cache.
fn memory_bound(bench: &Bench) -> Result<()> {
    let (rows, cols) = (65536, 4096);
    if ![
        "copy_1GiB",
        "add_1GiB",
        "gelu_1GiB",
        "bias_gelu_residual_1GiB",
        "softmax_1GiB",
        "layernorm_1GiB",
        "sum_last_1GiB",
        "sum_first_1GiB",
    ]
    .iter()
    .any(|name| bench.wants(name))
    {
        return Ok(());
    }
    let normal = |shape: &[usize]| Tensor::randn(shape, DType::F32);
    let (x, y, w, b) = (normal(&[rows, cols])?, normal(&[rows, cols])?, normal(&[cols])?, normal(&[cols])?);
    bench.run("copy_1GiB", || x.copy())?;
    bench.run("add_1GiB", || x.add(&y))?;
    bench.run("gelu_1GiB", || x.gelu())?;
    let bias_gelu_residual = fuse(|[x, b, y]| y + (x + b).gelu())?;
    bench.run("bias_gelu_residual_1GiB", || bias_gelu_residual.call([&x, &b, &y]))?;
    bench.run("softmax_1GiB", || x.softmax(-1))?;
    bench.run("layernorm_1GiB", || x.layer_norm([cols], Some(&w), Some(&b), 1e-5))?;
    bench.run("sum_last_1GiB", || x.sum(-1))?;
    bench.run("sum_first_1GiB", || x.sum(0))
}

fn attention(bench: &Bench) -> Result<()> {
    for (d, heads) in [(64, 32), (128, 16)] {
        for causal in [true, false] {
            let kind = if causal { "causal" } else { "full" };
            let name = |pass: &str| format!("attn_{kind}_{pass}_bf16_1x{heads}x16384x{d}");
            if !bench.wants(&format!("{} {}", name("fwd"), name("fwdbwd"))) {
                continue;
            }
            let leaf = || Tensor::randn([1, heads, 16384, d], DType::BF16)?.requires_grad_();
            let (q, k, v) = (leaf()?, leaf()?, leaf()?);
            let options = AttentionOptions { causal, ..AttentionOptions::default() };
            let attend = || q.scaled_dot_product_attention(&k, &v, &options);
            bench.run(&name("fwd"), || no_grad(attend))?;
            let grad = Tensor::randn([1, heads, 16384, d], DType::BF16)?;
            bench.run(&name("fwdbwd"), || grad_with(&[&attend()?], &[Some(&grad)], &[&q, &k, &v], GradOptions::default()))?;
        }
    }
    Ok(())
}
