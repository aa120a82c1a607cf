//! What a training loop is made of besides its model: optimisers, clipping, data, checkpoints.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kiln::Result;
use kiln::data::{Loader, LoaderOptions, digits};
use kiln::io::safetensors;
use kiln::optim::{Adafactor, AdafactorOptions, AdamW, AdamWOptions, Lion, LionOptions, Muon, MuonOptions, Sgd, SgdOptions};
use kiln::prelude::*;

/// Four weights of 512×512, each with a gradient.
fn weights() -> Result<Params> {
    let params = Params::new();
    for i in 0..4 {
        let normal = || Tensor::randn([512, 512], DType::F32);
        params.param_from(&format!("w{i}"), &normal()?)?.set_grad(Some(normal()?))?;
    }
    Ok(params)
}

fn optimizers(c: &mut Criterion) -> Result<()> {
    let params = weights()?;
    let mut rules: Vec<(&str, Box<dyn Optimizer>)> = vec![
        ("SGD", Box::new(Sgd::new(params.params(), SgdOptions::default())?)),
        ("AdamW", Box::new(AdamW::new(params.params(), AdamWOptions::default())?)),
        ("Lion", Box::new(Lion::new(params.params(), LionOptions::default())?)),
        ("Adafactor", Box::new(Adafactor::new(params.params(), AdafactorOptions::default())?)),
        ("Muon", Box::new(Muon::new(params.params(), MuonOptions::default())?)),
    ];
    let mut group = c.benchmark_group("models/optim");
    group.throughput(Throughput::Elements(4 * 512 * 512));
    for (name, rule) in &mut rules {
        rule.step()?;
        group.bench_function(*name, |bench| bench.iter(|| rule.step()));
    }
    group.finish();
    Ok(())
}

fn files(c: &mut Criterion) -> Result<()> {
    let params = weights()?;
    let state = params.state_dict();
    let path = std::env::temp_dir().join(format!("kiln-bench-{}.safetensors", std::process::id()));
    let mut group = c.benchmark_group("models/files");
    group.throughput(Throughput::Bytes(4 * 4 * 512 * 512));
    group.bench_function("save 4 MiB", |bench| bench.iter(|| safetensors::save(&path, &state, &Default::default())));
    group.bench_function("load 4 MiB", |bench| bench.iter(|| safetensors::load(&path)));
    group.finish();
    std::fs::remove_file(&path).map_err(|e| kiln::Error::io("remove", path.display(), e))
}

fn data(c: &mut Criterion) -> Result<()> {
    let mut group = c.benchmark_group("models/data");
    group.throughput(Throughput::Elements(256));
    group.bench_function("generate 256 digits", |bench| bench.iter(|| digits::generate(256, 1)));
    let mut loader = Loader::new(digits::generate(256, 1)?, LoaderOptions { batch_size: 64, ..Default::default() })?;
    group.bench_function("load 256 digits in batches of 64", |bench| {
        bench.iter(|| loader.by_ref().map(|b| b.is_ok()).filter(|ok| *ok).count())
    });
    group.finish();
    Ok(())
}

fn all(c: &mut Criterion) {
    optimizers(c).and_then(|()| data(c)).and_then(|()| files(c)).unwrap_or_else(|e| panic!("{e}"));
}

criterion_group!(benches, all);
criterion_main!(benches);
