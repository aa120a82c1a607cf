//! Operations on tensors: their kernels, and what they cost beyond them (allocation, shapes, strides, small sizes).

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kiln::Result;
use kiln::prelude::*;

/// Adds a benchmark of `f`, having seen once that it works.
fn bench(c: &mut Criterion, name: &str, elements: usize, f: impl Fn() -> Result<Tensor>) -> Result<()> {
    f()?;
    let mut group = c.benchmark_group("tensor");
    group.throughput(Throughput::Elements(elements as u64));
    group.bench_function(name, |bench| bench.iter(&f));
    group.finish();
    Ok(())
}

fn pointwise(c: &mut Criterion) -> Result<()> {
    for n in [64, 4096, 1 << 20] {
        let (x, y) = (Tensor::randn([n], DType::F32)?, Tensor::randn([n], DType::F32)?);
        bench(c, &format!("add {n}"), n, || x.add(&y))?;
        bench(c, &format!("gelu {n}"), n, || x.gelu())?;
    }
    let x = Tensor::randn([64], DType::F32)?;
    let leaf = x.requires_grad_()?;
    bench(c, "add 64, recorded", 64, || leaf.add(&x))?;
    bench(c, "add 64, a number", 64, || x.add_scalar(2.0))?;
    bench(c, "exp 64, recorded", 64, || leaf.exp())?;
    let (x, row) = (Tensor::randn([1024, 1024], DType::F32)?, Tensor::randn([1024], DType::F32)?);
    bench(c, "add a row to 1024x1024", 1 << 20, || x.add(&row))?;
    let turned = x.t()?;
    bench(c, "add 1024x1024 to its transpose", 1 << 20, || x.add(&turned))?;
    bench(c, "cast 1024x1024 to bf16", 1 << 20, || x.to_dtype(DType::BF16))
}

fn reductions(c: &mut Criterion) -> Result<()> {
    let x = Tensor::randn([64, 128, 128], DType::F32)?;
    for (name, dims) in [("all", vec![]), ("the first dimension", vec![0]), ("the middle", vec![1]), ("the last", vec![2])] {
        bench(c, &format!("sum over {name} of 64x128x128"), x.numel(), || if dims.is_empty() { x.sum(()) } else { x.sum(&dims[..]) })?;
    }
    bench(c, "argmax over the last of 64x128x128", x.numel(), || x.argmax(-1))?;
    bench(c, "cumsum over the last of 64x128x128", x.numel(), || x.cumsum(-1))
}

fn movement(c: &mut Criterion) -> Result<()> {
    let x = Tensor::randn([32, 64, 28, 28], DType::F32)?;
    bench(c, "to channels last 32x64x28x28", x.numel(), || x.permute(&[0, 2, 3, 1])?.contiguous())?;
    bench(c, "cat two along channels 32x64x28x28", 2 * x.numel(), || Tensor::cat(&[&x, &x], 1))?;
    let (table, at) = (Tensor::randn([10_000, 256], DType::F32)?, Tensor::randint(0, 10_000, [4096])?);
    bench(c, "4096 rows of a 10000x256 table", 4096 * 256, || table.index_select(0, &at))?;
    let small = Tensor::randn([8, 8], DType::F32)?;
    bench(c, "transpose 8x8", 64, || small.t())?;
    bench(c, "reshape 8x8", 64, || small.reshape([64]))?;
    bench(c, "narrow 8x8", 64, || small.narrow(0, 2, 4))?;
    let keys = Tensor::randn([1 << 18], DType::F32)?;
    bench(c, "sort 262144", keys.numel(), || Ok(keys.sort(0, false)?.0))
}

fn all(c: &mut Criterion) {
    pointwise(c).and_then(|()| reductions(c)).and_then(|()| movement(c)).unwrap_or_else(|e| panic!("{e}"));
}

criterion_group!(benches, all);
criterion_main!(benches);
