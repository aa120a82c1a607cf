//! The engine: what recording and walking a graph cost, and the transforms on top.

use criterion::{Criterion, criterion_group, criterion_main};
use kiln::Result;
use kiln::autograd::{checkpoint, hvp, jacobian, jvp, vjp};
use kiln::prelude::*;

/// Adds a benchmark of `f`, having seen once that it works.
fn bench<R>(c: &mut Criterion, name: &str, f: impl Fn() -> Result<R>) -> Result<()> {
    f()?;
    c.bench_function(&format!("autograd/{name}"), |bench| bench.iter(&f));
    Ok(())
}

/// Overheads: the tensors are too small for arithmetic to matter.
fn engine(c: &mut Criterion) -> Result<()> {
    let x = Tensor::ones([8], DType::F32)?.requires_grad_()?;
    let chain = |x: &Tensor| (0..1000).try_fold(x.clone(), |y, _| y.mul_scalar(0.999));
    bench(c, "1000 chained operations, not recorded", || no_grad(|| chain(&x)))?;
    bench(c, "1000 chained operations, recorded", || chain(&x))?;
    bench(c, "1000 chained operations and their gradient", || grad(&chain(&x)?.sum(())?, &[&x]))?;
    let wide = |x: &Tensor| (0..1000).try_fold(x.clone(), |sum, i| sum.add(&x.mul_scalar(i as f64)?));
    bench(c, "the gradient of 1000 uses of one tensor", || grad(&wide(&x)?.sum(())?, &[&x]))
}

fn transforms(c: &mut Criterion) -> Result<()> {
    let (x, w) = (Tensor::randn([64, 256], DType::F32)?, Tensor::randn([256, 256], DType::F32)?);
    let layer = {
        let w = w.clone();
        move |x: &Tensor| x.matmul(&w)?.tanh()
    };
    let deep = |x: &Tensor| (0..4).try_fold(x.clone(), |y, _| layer(&y));
    let v = Tensor::ones([64, 256], DType::F32)?;
    bench(c, "vjp of four layers", || vjp(|x| deep(&x[0]), &[&x], &v))?;
    bench(c, "jvp of four layers", || jvp(|x| deep(&x[0]), &[&x], &[&v]))?;
    bench(c, "hvp of four layers", || hvp(|x| deep(x)?.sum(()), &x, &v))?;
    let leaf = x.requires_grad_()?;
    bench(c, "gradient of four layers, checkpointed", || {
        let layer = layer.clone();
        let y = checkpoint(move |x| (0..4).try_fold(x[0].clone(), |y, _| layer(&y)), &[&leaf])?;
        grad(&y.sum(())?, &[&leaf])
    })?;
    let small = Tensor::randn([16], DType::F32)?;
    bench(c, "jacobian of 16 to 16", || jacobian(|x| x.tanh()?.mul(x), &small))
}

fn all(c: &mut Criterion) {
    engine(c).and_then(|()| transforms(c)).unwrap_or_else(|e| panic!("{e}"));
}

criterion_group!(benches, all);
criterion_main!(benches);
