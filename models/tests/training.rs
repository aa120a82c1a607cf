//! Ten training steps from the same weights as PyTorch: `fixtures/train.json`, made by `fixtures/train.py`.
//!
//! In f64, losses and final weights agree to 1e-9. In f32 only losses are compared: Adam turns the rounding of near-zero
//! gradients into whole steps. Ten steps of the GAN also give the same bits on 1, 2 and 7 threads.

use kiln_autograd::TensorExt;
use kiln_models::classifier::DigitMlp;
use kiln_models::gan::{GanLoss, GanTrainer, GanTrainerOptions};
use kiln_models::nn::{Module, Params, ParamsOptions};
use kiln_models::optim::{Adam, AdamOptions, Optimizer};
use kiln_tensor::{DType, Result, Shape, Tensor};
use serde_json::Value;

/// The hash of `train.py`: uniform in [-scale, scale).
fn hashed(shape: &[usize], seed: u64, scale: f64, dtype: DType) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let value = |i: u64| {
        let h = (i * 2_654_435_761 + seed * 40_503 + 12_345) & 0xFFFF_FFFF;
        let h = ((h ^ (h >> 15)) * 2_246_822_519) & 0xFFFF_FFFF;
        let h = h ^ (h >> 13);
        ((h >> 8) as f64 / (1 << 24) as f64 * 2.0 - 1.0) * scale
    };
    Tensor::from_vec((0..n as u64).map(value).collect::<Vec<f64>>(), shape)?.to_dtype(dtype)
}

fn fill(params: &Params, seed: u64) -> Result<()> {
    for (k, param) in params.params().iter().enumerate() {
        let base = if param.name().starts_with('b') && param.name().ends_with("weight") { 1.0 } else { 0.0 };
        param.set(&hashed(param.shape().dims(), seed + k as u64, 0.05, DType::F64)?.add_scalar(base)?.to_dtype(param.dtype())?)?;
    }
    Ok(())
}

fn fixture() -> Value {
    serde_json::from_str(include_str!("fixtures/train.json")).unwrap()
}

fn expect_losses(found: &[f64], expected: &Value, tolerance: f64) {
    let expected: Vec<f64> = expected["losses"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
        assert!((f - e).abs() <= tolerance, "loss {i} is {f}, PyTorch has {e}");
    }
}

fn expect_weights(params: &Params, expected: &Value) -> Result<()> {
    for param in params.params() {
        let weight = param.get().detach();
        let digest = [weight.sum(())?, weight.mul(&hashed(param.shape().dims(), 999, 1.0, DType::F64)?)?.sum(())?];
        for (found, expected) in digest.iter().zip(expected[param.name()].as_array().unwrap()) {
            let (found, expected) = (found.item::<f64>()?, expected.as_f64().unwrap());
            assert!((found - expected).abs() <= 1e-9 * (1.0 + expected.abs()), "{}: {found}, PyTorch has {expected}", param.name());
        }
    }
    Ok(())
}

fn train_mlp(dtype: DType) -> Result<(Vec<f64>, Params)> {
    let params = Params::with(ParamsOptions { dtype, ..ParamsOptions::default() });
    let model = DigitMlp::new(&params, 10)?;
    fill(&params, 100)?;
    let mut optimizer = Adam::new(params.params(), AdamOptions::default())?;
    let labels = Tensor::from_vec((0..32).map(|i| i * 7 % 10).collect::<Vec<i64>>(), 32)?;
    let mut losses = Vec::new();
    for step in 0..10 {
        params.zero_grad();
        let loss = model.forward(&hashed(&[32, 784], 200 + step, 1.0, dtype)?)?.cross_entropy(&labels)?;
        loss.backward()?;
        optimizer.step()?;
        losses.push(loss.item_f64()?);
    }
    Ok((losses, params))
}

fn train_dcgan(dtype: DType) -> Result<(Vec<f64>, GanTrainer)> {
    let mut options = GanTrainerOptions::new(GanLoss::Bce, None, 0);
    options.model.width = 16;
    options.dtype = dtype;
    let mut trainer = GanTrainer::new(options)?;
    fill(trainer.generator_params(), 300)?;
    fill(trainer.discriminator_params(), 400)?;
    let mut losses = Vec::new();
    for step in 0..10 {
        let real = hashed(&[16, 1, 28, 28], 500 + step, 1.0, dtype)?;
        let step = trainer.step_from(&real, None, &hashed(&[16, 100], 600 + step, 2.0, dtype)?)?;
        losses.extend([step.discriminator, step.generator]);
    }
    Ok((losses, trainer))
}

#[test]
fn a_perceptron_trains_as_in_pytorch() -> Result<()> {
    let (losses, params) = train_mlp(DType::F64)?;
    expect_losses(&losses, &fixture()["mlp"], 1e-9);
    expect_weights(&params, &fixture()["mlp"]["weights"])?;
    expect_losses(&train_mlp(DType::F32)?.0, &fixture()["mlp"], 1e-4);
    Ok(())
}

#[test]
fn a_dcgan_trains_as_in_pytorch() -> Result<()> {
    let (losses, trainer) = train_dcgan(DType::F64)?;
    expect_losses(&losses, &fixture()["dcgan"], 1e-9);
    expect_weights(trainer.generator_params(), &fixture()["dcgan"]["generator"])?;
    expect_weights(trainer.discriminator_params(), &fixture()["dcgan"]["discriminator"])?;
    expect_losses(&train_dcgan(DType::F32)?.0, &fixture()["dcgan"], 1e-4);
    Ok(())
}

#[test]
fn ten_steps_of_the_gan_have_the_same_bits_on_any_number_of_threads() -> Result<()> {
    let run = |threads: usize| -> Result<Vec<Vec<u32>>> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = GanTrainer::new(GanTrainerOptions::new(GanLoss::Bce, None, 3))?;
            let real = hashed(&[32, 1, 28, 28], 1, 1.0, DType::F32)?;
            for _ in 0..10 {
                trainer.step(&real, None)?;
            }
            let state = trainer.state_dict()?;
            state
                .values()
                .filter(|t| t.dtype() == DType::F32)
                .map(|t| Ok(t.to_vec::<f32>()?.iter().map(|x| x.to_bits()).collect()))
                .collect()
        })
    };
    let one = run(1)?;
    assert!(one == run(2)? && one == run(7)?);
    Ok(())
}

#[test]
fn a_wasserstein_critic_with_gradient_penalty_trains() -> Result<()> {
    let mut options = GanTrainerOptions::new(GanLoss::WganGp, Some(10), 5);
    options.model.width = 8;
    let mut trainer = GanTrainer::new(options)?;
    let labels = Tensor::from_vec((0..16).map(|i| i % 10).collect::<Vec<i64>>(), 16)?;
    // Real pictures are bright discs: a critic that learns scores them above noise soon.
    let disc = |i: usize| if (i / 28).abs_diff(14).pow(2) + (i % 28).abs_diff(14).pow(2) < 60 { 1f32 } else { -1.0 };
    let real = Tensor::from_vec((0..16 * 784).map(|i| disc(i % 784)).collect::<Vec<f32>>(), Shape::new(&[16, 1, 28, 28])?)?;
    let first = trainer.step(&real, Some(&labels))?.discriminator;
    let mut last = first;
    for _ in 0..30 {
        last = trainer.step(&real, Some(&labels))?.discriminator;
    }
    assert!(last.is_finite() && last < first, "the critic's loss went from {first} to {last}");
    Ok(())
}
