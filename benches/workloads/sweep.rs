//! The sizes between the workloads (`--sweep`): small, odd, and not powers of two, where a choice of path or of threads shows.
//! Names and shapes as in `benches/compare/torch_sweep.py`.

use crate::Bench;
use kiln::nn::{Conv2d, ConvOptions};
use kiln::prelude::*;
use kiln::{AttentionOptions, Result};

pub fn run(bench: &Bench) -> Result<()> {
    products(bench)?;
    pointwise(bench)?;
    rows(bench)?;
    movement(bench)?;
    convolutions(bench)?;
    attention(bench)
}

fn normal(shape: &[usize]) -> Result<Tensor> {
    Tensor::randn(shape, DType::F32)
}

fn products(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        for n in [1, 3, 17, 32, 64, 100, 333, 1000, 1536, 3000] {
            let name = format!("gemm_{tag}_{n}");
            if bench.wants(&name) {
                let (x, y) = (Tensor::randn([n, n], dtype)?, Tensor::randn([n, n], dtype)?);
                bench.run(&name, || x.matmul(&y))?;
            }
        }
        for (batch, n) in [(64, 3), (64, 17), (64, 32), (64, 64), (64, 100), (7, 333)] {
            let (x, y) = (Tensor::randn([batch, n, n], dtype)?, Tensor::randn([batch, n, n], dtype)?);
            bench.run(&format!("bmm_{tag}_{batch}x{n}"), || x.matmul(&y))?;
        }
        for (k, n) in [(64, 64), (100, 10), (784, 512), (1024, 1024)] {
            let (w, b) = (Tensor::randn([n, k], dtype)?, Tensor::randn([n], dtype)?);
            for m in [1, 2, 3, 8, 16, 33, 64, 256] {
                let x = Tensor::randn([m, k], dtype)?;
                bench.run(&format!("linear_bias_{tag}_{m}x{k}x{n}"), || x.linear(&w, Some(&b)))?;
            }
        }
    }
    Ok(())
}

fn pointwise(bench: &Bench) -> Result<()> {
    for n in [1, 17, 64, 333, 1000, 4096, 10_000, 32_768, 100_000, 262_144, 1 << 20] {
        let (x, y) = (normal(&[n])?, normal(&[n])?);
        bench.run(&format!("add_n{n}"), || x.add(&y))?;
        bench.run(&format!("add_scalar_n{n}"), || x.add_scalar(1.5))?;
        bench.run(&format!("relu_n{n}"), || x.relu())?;
        bench.run(&format!("exp_n{n}"), || x.exp())?;
        bench.run(&format!("gelu_n{n}"), || x.gelu())?;
        bench.run(&format!("gt_n{n}"), || x.gt(&y))?;
        bench.run(&format!("to_bf16_n{n}"), || x.to_dtype(DType::BF16))?;
        bench.run(&format!("sum_n{n}"), || x.sum(()))?;
        bench.run(&format!("max_n{n}"), || x.max(()))?;
        let leaf = x.requires_grad_()?;
        bench.run(&format!("add_recorded_n{n}"), || leaf.add(&y))?;
        bench.run(&format!("exp_fwdbwd_n{n}"), || {
            leaf.zero_grad();
            leaf.exp()?.sum(())?.backward()
        })?;
    }
    for (m, n) in [(8, 8), (64, 17), (333, 333), (1000, 1000)] {
        let (x, row, column) = (normal(&[m, n])?, normal(&[n])?, normal(&[m, 1])?);
        bench.run(&format!("add_row_{m}x{n}"), || x.add(&row))?;
        bench.run(&format!("add_column_{m}x{n}"), || x.add(&column))?;
    }
    Ok(())
}

fn rows(bench: &Bench) -> Result<()> {
    let near = [1, 3, 17, 100, 333, 1000, 4096].into_iter().flat_map(|n| [1, 16, 1024].map(|m| (m, n)));
    // The last lies beyond the caches.
    for (m, n) in near.chain([(65_536, 256)]) {
        let (x, w, b) = (normal(&[m, n])?, normal(&[n])?, normal(&[n])?);
        let leaf = x.requires_grad_()?;
        bench.run(&format!("softmax_{m}x{n}"), || x.softmax(-1))?;
        bench.run(&format!("log_softmax_{m}x{n}"), || x.log_softmax(-1))?;
        bench.run(&format!("layernorm_{m}x{n}"), || x.layer_norm([n], Some(&w), Some(&b), 1e-5))?;
        bench.run(&format!("layernorm_fwdbwd_{m}x{n}"), || {
            leaf.zero_grad();
            leaf.layer_norm([n], Some(&w), Some(&b), 1e-5)?.sum(())?.backward()
        })?;
        bench.run(&format!("sum_last_{m}x{n}"), || x.sum(-1))?;
        bench.run(&format!("sum_first_{m}x{n}"), || x.sum(0))?;
        bench.run(&format!("max_last_{m}x{n}"), || x.max(-1))?;
    }
    Ok(())
}

fn movement(bench: &Bench) -> Result<()> {
    for dim in [3, 64, 333] {
        let table = normal(&[1000, dim])?;
        for count in [1, 17, 1000] {
            let index = Tensor::randint(0, 1000, [count])?;
            bench.run(&format!("embedding_{count}x{dim}"), || index.embedding(&table))?;
        }
    }
    for n in [3, 8, 64, 333, 1000] {
        let (x, y) = (normal(&[n, n])?, normal(&[n, n])?);
        bench.run(&format!("cat_first_{n}"), || Tensor::cat(&[&x, &y], 0))?;
        bench.run(&format!("cat_last_{n}"), || Tensor::cat(&[&x, &y], -1))?;
        bench.run(&format!("stack_{n}"), || Tensor::stack(&[&x, &y], 0))?;
        bench.run(&format!("transposed_copy_{n}"), || x.t()?.contiguous())?;
        bench.run(&format!("column_copy_{n}"), || x.narrow(1, 1, n - 1)?.contiguous())?;
    }
    let x = normal(&[8, 64])?;
    bench.run("view_transpose", || x.t())?;
    bench.run("view_slice", || x.narrow(0, 2, 4))?;
    bench.run("view_reshape", || x.reshape([16, 32]))?;
    bench.run("view_unsqueeze", || x.unsqueeze(1))?;
    bench.run("view_permute", || x.permute(&[1, 0]))?;
    let leaf = x.requires_grad_()?;
    bench.run("view_recorded_transpose", || leaf.t())?;
    bench.run("view_recorded_slice", || leaf.narrow(0, 2, 4))?;
    bench.run("view_recorded_reshape", || leaf.reshape([16, 32]))
}

/// The most arithmetic and the most elements of a convolution that one round can afford.
const CONV_FLOP: usize = 8_000_000_000;
const CONV_ELEMENTS: usize = 32 << 20;

fn convolutions(bench: &Bench) -> Result<()> {
    for (ci, co) in [(1, 8), (3, 64), (16, 16), (64, 64), (256, 256), (1024, 1024)] {
        for size in [7, 14, 28, 56, 112, 224] {
            for batch in [1, 8, 32, 256] {
                let pixels = batch * size * size;
                let name = format!("{ci}to{co}_{size}_b{batch}");
                let (fwd, fwdbwd) = (format!("conv_fwd_{name}"), format!("conv_fwdbwd_{name}"));
                let affordable = 18 * pixels * ci * co <= CONV_FLOP && pixels * ci.max(co) <= CONV_ELEMENTS;
                if !affordable || !bench.wants(&format!("{fwd} {fwdbwd}")) {
                    continue;
                }
                let params = Params::new();
                let conv = Conv2d::new(&params, ci, co, 3, ConvOptions::new().with_padding(1))?;
                let x = normal(&[batch, ci, size, size])?.to_memory_order(&[0, 2, 3, 1])?.requires_grad_()?;
                bench.run(&fwd, || no_grad(|| conv.forward(&x)))?;
                bench.run(&fwdbwd, || {
                    params.zero_grad();
                    x.zero_grad();
                    conv.forward(&x)?.sum(())?.backward()
                })?;
            }
        }
    }
    Ok(())
}

fn attention(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        // Queries and keys: as many of both, or one query that looks at all keys.
        for (heads, queries, keys) in
            [(8, 1, 1), (8, 3, 3), (8, 17, 17), (8, 100, 100), (8, 1000, 1000), (2, 4096, 4096), (2, 8192, 8192), (8, 1, 100), (8, 1, 4096)]
        {
            let shape = if queries == keys { format!("{heads}x{keys}x64") } else { format!("{heads}x{queries}of{keys}x64") };
            let name = |pass: &str| format!("attn_{pass}_{tag}_{shape}");
            if !bench.wants(&format!("{} {}", name("fwd"), name("fwdbwd"))) {
                continue;
            }
            let leaf = |length| Tensor::randn([1, heads, length, 64], dtype)?.requires_grad_();
            let (q, k, v) = (leaf(queries)?, leaf(keys)?, leaf(keys)?);
            let options = AttentionOptions { causal: queries == keys, ..AttentionOptions::default() };
            let attend = || q.scaled_dot_product_attention(&k, &v, &options);
            bench.run(&name("fwd"), || no_grad(attend))?;
            bench.run(&name("fwdbwd"), || {
                [&q, &k, &v].into_iter().for_each(Tensor::zero_grad);
                attend()?.sum(())?.backward()
            })?;
        }
    }
    Ok(())
}
