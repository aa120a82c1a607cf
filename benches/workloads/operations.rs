//! One workload for each operation, in f32 and bf16 (part of `--sweep`), so that none is slow unseen.
//! Names and shapes as in `benches/compare/torch_operations.py`.

use crate::Bench;
use kiln::prelude::*;
use kiln::{CrossEntropyOptions, Interpolation, PadMode, PoolOptions, Result};

/// Operations of one dtype, named after it.
struct Operations<'a> {
    bench: &'a Bench,
    dtype: DType,
    tag: &'static str,
}

pub fn run(bench: &Bench) -> Result<()> {
    for (dtype, tag) in [(DType::F32, "f32"), (DType::BF16, "bf16")] {
        let of = Operations { bench, dtype, tag };
        of.unary()?;
        of.binary()?;
        of.reductions()?;
        of.movement()?;
        of.images()?;
        of.losses()?;
        of.random()?;
    }
    Ok(())
}

impl Operations<'_> {
    fn normal(&self, shape: &[usize]) -> Result<Tensor> {
        Tensor::randn(shape, self.dtype)
    }

    fn forward<R>(&self, name: &str, f: impl Fn() -> Result<R>) -> Result<()> {
        self.bench.run(&format!("op_{name}_{}", self.tag), f)
    }

    /// The function and its gradient, from a gradient of ones.
    fn both(&self, name: &str, leaf: &Tensor, f: impl Fn() -> Result<Tensor>) -> Result<()> {
        self.bench.run(&format!("op_{name}_fwdbwd_{}", self.tag), || {
            leaf.zero_grad();
            f()?.sum(())?.backward()
        })
    }

    fn unary(&self) -> Result<()> {
        let x = self.normal(&[1024, 1024])?;
        let p = x.abs()?.add_scalar(0.1)?;
        self.forward("abs", || x.abs())?;
        self.forward("neg", || x.neg())?;
        self.forward("square", || x.square())?;
        self.forward("sqrt", || p.sqrt())?;
        self.forward("rsqrt", || p.rsqrt())?;
        self.forward("recip", || p.recip())?;
        self.forward("exp", || x.exp())?;
        self.forward("expm1", || x.expm1())?;
        self.forward("log", || p.log())?;
        self.forward("log1p", || p.log1p())?;
        self.forward("sin", || x.sin())?;
        self.forward("cos", || x.cos())?;
        self.forward("tanh", || x.tanh())?;
        self.forward("sigmoid", || x.sigmoid())?;
        self.forward("erf", || x.erf())?;
        self.forward("gelu_tanh", || x.gelu_tanh())?;
        self.forward("silu", || x.silu())?;
        self.forward("softplus", || x.softplus())?;
        self.forward("mish", || x.mish())?;
        self.forward("elu", || x.elu(1.0))?;
        self.forward("leaky_relu", || x.leaky_relu(0.1))?;
        self.forward("hardswish", || x.hardswish())?;
        self.forward("floor", || x.floor())?;
        self.forward("sign", || x.sign())?;
        self.forward("clamp", || x.clamp(-0.5, 0.5))?;
        self.forward("powf_3", || p.powf(3.0))?;
        self.forward("powf_2.5", || p.powf(2.5))?;
        let leaf = x.requires_grad_()?;
        self.both("tanh", &leaf, || leaf.tanh())?;
        self.both("sigmoid", &leaf, || leaf.sigmoid())?;
        self.both("silu", &leaf, || leaf.silu())?;
        self.both("gelu", &leaf, || leaf.gelu())?;
        self.both("softplus", &leaf, || leaf.softplus())?;
        self.both("square", &leaf, || leaf.square())
    }

    fn binary(&self) -> Result<()> {
        let (x, y) = (self.normal(&[1024, 1024])?, self.normal(&[1024, 1024])?);
        let p = x.abs()?.add_scalar(0.1)?;
        let (row, mask) = (self.normal(&[1024])?, x.gt(&y)?);
        self.forward("sub", || x.sub(&y))?;
        self.forward("mul", || x.mul(&y))?;
        self.forward("div", || x.div(&p))?;
        self.forward("mul_row", || x.mul(&row))?;
        self.forward("maximum", || x.maximum(&y))?;
        self.forward("pow", || p.pow(&y))?;
        self.forward("atan2", || x.atan2(&y))?;
        self.forward("rem", || x.rem(&p))?;
        self.forward("lerp", || x.lerp(&y, &p))?;
        self.forward("eq", || x.eq(&y))?;
        self.forward("gt_scalar", || x.gt_scalar(0.5))?;
        self.forward("where", || mask.where_cond(&x, &y))?;
        self.forward("masked_fill", || x.masked_fill(&mask, 0.0))?;
        self.forward("logical_and", || mask.logical_and(&mask))?;
        let leaf = x.requires_grad_()?;
        self.both("mul", &leaf, || leaf.mul(&y))?;
        self.both("div", &leaf, || leaf.div(&p))?;
        self.both("mul_row", &leaf, || leaf.mul(&row))?;
        let weight = row.requires_grad_()?;
        self.both("mul_by_row", &weight, || x.mul(&weight))
    }

    fn reductions(&self) -> Result<()> {
        let x = self.normal(&[1024, 1024])?;
        let narrow = self.normal(&[1 << 20, 3])?;
        self.forward("sum_last", || x.sum(-1))?;
        self.forward("sum_first", || x.sum(0))?;
        self.forward("sum_narrow_last", || narrow.sum(-1))?;
        self.forward("sum_narrow_first", || narrow.sum(0))?;
        self.forward("max_narrow_last", || narrow.max(-1))?;
        self.forward("mean", || x.mean(()))?;
        self.forward("var_last", || x.var(-1, 1.0))?;
        self.forward("var_first", || x.var(0, 1.0))?;
        self.forward("norm", || x.norm(2.0, ()))?;
        self.forward("norm_last", || x.norm(2.0, -1))?;
        self.forward("prod", || x.prod(-1))?;
        self.forward("argmax_last", || x.argmax(-1))?;
        self.forward("argmax_first", || x.argmax(0))?;
        self.forward("max_dim", || x.max_dim(-1))?;
        self.forward("any", || x.gt_scalar(9.0)?.any(-1))?;
        self.forward("logsumexp", || x.logsumexp(-1))?;
        self.forward("softmax_first", || x.softmax(0))?;
        self.forward("log_softmax", || x.log_softmax(-1))?;
        self.forward("cumsum_last", || x.cumsum(-1))?;
        self.forward("cumsum_first", || x.cumsum(0))?;
        self.forward("rms_norm", || x.rms_norm([1024], None, 1e-5))?;
        let leaf = x.requires_grad_()?;
        self.both("softmax", &leaf, || leaf.softmax(-1))?;
        self.both("log_softmax", &leaf, || leaf.log_softmax(-1))?;
        self.both("logsumexp", &leaf, || leaf.logsumexp(-1))?;
        self.both("var", &leaf, || leaf.var(-1, 1.0))?;
        self.both("max", &leaf, || leaf.max(-1))?;
        self.both("cumsum", &leaf, || leaf.cumsum(-1))
    }

    fn movement(&self) -> Result<()> {
        let (x, y) = (self.normal(&[1024, 1024])?, self.normal(&[1024, 1024])?);
        let index = Tensor::randint(0, 1024, [1024])?;
        let indices = Tensor::randint(0, 1024, [1024, 1024])?;
        let mask = x.gt(&y)?;
        self.forward("flip", || x.flip(-1)?.contiguous())?;
        self.forward("roll", || x.roll(5, 1))?;
        self.forward("tril", || x.tril(0))?;
        self.forward("repeat", || x.repeat(&[2, 2]))?;
        self.forward("cat", || Tensor::cat(&[&x, &y], 1))?;
        self.forward("pad", || x.pad(&[3, 3, 3, 3], PadMode::Constant(0.0)))?;
        self.forward("index_select", || x.index_select(0, &index))?;
        self.forward("index_select_last", || x.index_select(1, &index))?;
        self.forward("gather", || x.gather(1, &indices))?;
        self.forward("scatter_add", || x.scatter_add(1, &indices, &y))?;
        self.forward("index_add", || x.index_add(0, &index, &y))?;
        self.forward("masked_select", || x.masked_select(&mask))?;
        self.forward("nonzero", || mask.nonzero())?;
        self.forward("one_hot", || index.one_hot(1024))?;
        self.forward("sort", || x.sort(-1, false))?;
        self.forward("argsort", || x.argsort(-1, true))?;
        self.forward("topk", || x.topk(10, -1, true))?;
        self.forward("permute_copy", || x.reshape([32, 32, 32, 32])?.permute(&[0, 2, 3, 1])?.contiguous())?;
        self.forward("einsum", || Tensor::einsum("bij,bkj->bik", &[&x.reshape([16, 64, 1024])?, &y.reshape([16, 64, 1024])?]))?;
        self.forward("outer", || x.select(0, 0)?.outer(&y.select(0, 0)?))?;
        self.forward("mv", || x.mv(&y.select(0, 0)?))?;
        let leaf = x.requires_grad_()?;
        self.both("index_select", &leaf, || leaf.index_select(0, &index))?;
        self.both("gather", &leaf, || leaf.gather(1, &indices))?;
        self.both("cat", &leaf, || Tensor::cat(&[&leaf, &y], 1))?;
        let (tokens, table) = (Tensor::randint(0, 10_000, [8, 512])?, self.normal(&[10_000, 256])?.requires_grad_()?);
        self.both("embedding", &table, || tokens.embedding(&table))
    }

    fn images(&self) -> Result<()> {
        for (layout, order) in [("nchw", [0, 1, 2, 3]), ("nhwc", [0, 2, 3, 1])] {
            let x = self.normal(&[8, 64, 56, 56])?.to_memory_order(&order)?.requires_grad_()?;
            let (w, b) = (self.normal(&[64])?.requires_grad_()?, self.normal(&[64])?.requires_grad_()?);
            let (pool, size) = (PoolOptions::new(3).stride(2).padding(1), [112, 112]);
            let run = |name: &str, f: &dyn Fn() -> Result<Tensor>| {
                self.forward(&format!("{name}_{layout}"), || no_grad(f))?;
                self.both(&format!("{name}_{layout}"), &x, f)
            };
            run("max_pool2d", &|| x.max_pool2d(pool))?;
            run("avg_pool2d", &|| x.avg_pool2d(2))?;
            run("adaptive_avg_pool2d", &|| x.adaptive_avg_pool2d(1))?;
            run("upsample_nearest", &|| x.upsample_nearest(2))?;
            run("upsample_bilinear", &|| x.interpolate(size, Interpolation::Linear { align_corners: false }))?;
            run("batch_norm", &|| Ok(x.batch_norm(Some(&w), Some(&b), 1e-5)?.output))?;
            run("group_norm", &|| x.group_norm(8, Some(&w), Some(&b), 1e-5))?;
            run("mean_pixels", &|| x.mean([2, 3]))?;
        }
        Ok(())
    }

    fn losses(&self) -> Result<()> {
        let (x, y) = (self.normal(&[1024, 1000])?.requires_grad_()?, self.normal(&[1024, 1000])?);
        let (target, labels) = (y.sigmoid()?, Tensor::randint(0, 1000, [1024])?);
        let smoothed = CrossEntropyOptions { label_smoothing: 0.1, ..Default::default() };
        self.both("mse_loss", &x, || x.mse_loss(&y))?;
        self.both("l1_loss", &x, || x.l1_loss(&y))?;
        self.both("smooth_l1_loss", &x, || x.smooth_l1_loss(&y))?;
        self.both("huber_loss", &x, || x.huber_loss(&y))?;
        self.both("bce_with_logits", &x, || x.bce_with_logits(&target))?;
        self.both("cross_entropy", &x, || x.cross_entropy(&labels))?;
        self.both("cross_entropy_smoothed", &x, || x.cross_entropy_with(&labels, &smoothed))?;
        self.both("cosine_similarity", &x, || x.cosine_similarity(&y, -1, 1e-8))
    }

    fn random(&self) -> Result<()> {
        let x = self.normal(&[1024, 1024])?;
        self.forward("rand", || Tensor::rand([1024, 1024], self.dtype))?;
        self.forward("randn", || Tensor::randn([1024, 1024], self.dtype))?;
        self.forward("dropout", || x.dropout(0.1, true))?;
        let leaf = x.requires_grad_()?;
        self.both("dropout", &leaf, || leaf.dropout(0.1, true))?;
        if self.dtype == DType::F32 {
            self.forward("randint", || Tensor::randint(0, 1000, [1024, 1024]))?;
            self.forward("randperm", || Tensor::randperm(1 << 20))?;
        }
        Ok(())
    }
}
