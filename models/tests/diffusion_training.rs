//! Training and drawing: a perfect network has no loss and is drawn from under every objective, guidance is its formula, a toy is learned, and a
//! run that is saved and continued has the bits of one that was not.

use kiln_autograd::TensorExt;
use kiln_models::diffusion::schedulers::{PredictionType, SchedulerClass, SchedulerConfig, SchedulerKind, TimestepSpacing};
use kiln_models::diffusion::unet::{UNet2dConfig, UNet2dModel};
use kiln_models::diffusion::{Denoiser, DiffusionTrainer, DiffusionTrainerOptions, Dit, DitConfig, Sampling, sample};
use kiln_models::nn::{Init, Params, StateDict};
use kiln_tensor::{DType, Generator, Result, Tensor};
use std::sync::Mutex;

/// Of a run that learns the toy.
const STEPS: u64 = 80;

fn randn(seed: u64, shape: &[usize]) -> Result<Tensor> {
    Generator::new(seed).randn(shape, ())
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max(())?.item_f64()
}

fn config(prediction: PredictionType) -> SchedulerConfig {
    SchedulerConfig {
        // Not every class has these for its defaults.
        beta_start: Some(1e-4),
        beta_end: Some(0.02),
        prediction_type: Some(prediction),
        timestep_spacing: Some(TimestepSpacing::Trailing),
        clip_sample: Some(false),
        ..SchedulerConfig::new(SchedulerClass::Ddpm)
    }
}

const ON_NOISE: [PredictionType; 3] = [PredictionType::Epsilon, PredictionType::Sample, PredictionType::VPrediction];

/// What a network that knows every picture says of noisy ones, from the definitions: ε = (x − √ᾱ x₀) / √(1 − ᾱ), v = √ᾱ ε − √(1 − ᾱ) x₀, and
/// of a flow, ε − x₀ = (x − x₀) / t.
fn perfect(prediction: PredictionType, original: Tensor) -> impl Denoiser {
    // β from 1e-4 to 0.02.
    let alphas = (0..1000).scan(1.0, |product, t| {
        *product *= 1.0 - (1e-4 + (0.02 - 1e-4) * t as f64 / 999.0);
        Some(*product)
    });
    let alphas = alphas.collect::<Vec<f64>>();
    move |x: &Tensor, timesteps: &Tensor, _: Option<&Tensor>| -> Result<Tensor> {
        let times = timesteps.to_dtype(DType::F64)?.to_vec::<f64>()?;
        let column = |f: &dyn Fn(f64) -> f64| Tensor::from_vec(times.iter().map(|&t| f(t)).collect::<Vec<_>>(), [times.len(), 1, 1, 1]);
        let (x, original) = (x.to_dtype(DType::F64)?, original.to_dtype(DType::F64)?);
        if prediction == PredictionType::FlowPrediction {
            return x.sub(&original)?.div(&column(&|t| t / 1000.0)?)?.to_dtype(DType::F32);
        }
        let signal = column(&|t| alphas[t as usize].sqrt())?;
        let noise = column(&|t| (1.0 - alphas[t as usize]).sqrt())?;
        let epsilon = x.sub(&original.mul(&signal)?)?.div(&noise)?;
        let output = match prediction {
            PredictionType::Sample => original,
            PredictionType::VPrediction => epsilon.mul(&signal)?.sub(&original.mul(&noise)?)?,
            _ => epsilon,
        };
        output.to_dtype(DType::F32)
    }
}

/// A trainer of a network whose only parameter does nothing.
fn trainer_of<N: Denoiser>(network: N, options: DiffusionTrainerOptions) -> Result<DiffusionTrainer<N>> {
    let params = Params::seeded(0);
    params.param("unused", [1], Init::Zeros)?;
    DiffusionTrainer::new(network, &params, options)
}

#[test]
fn a_perfect_network_has_no_loss_under_any_objective() -> Result<()> {
    let original = randn(1, &[64, 2, 3, 3])?;
    let all = [&ON_NOISE[..], &[PredictionType::FlowPrediction]].concat();
    for &prediction in &all {
        for gamma in [None, Some(5.0)] {
            let options = DiffusionTrainerOptions { min_snr_gamma: gamma, ..DiffusionTrainerOptions::new(config(prediction)) };
            if prediction == PredictionType::FlowPrediction && gamma.is_some() {
                assert!(trainer_of(perfect(prediction, original.clone()), options).is_err());
                continue;
            }
            for &said in &all {
                let trainer = trainer_of(perfect(said, original.clone()), options.clone())?;
                let loss = trainer.loss(&original, None, &Generator::new(2))?.item_f64()?;
                // One that says something else is told so. (ε of the first timesteps is a small difference, divided by √(1 − ᾱ) = 0.01.)
                assert_eq!(loss < 1e-7, said == prediction, "{prediction} {gamma:?} with {said}: {loss}");
            }
        }
    }
    Ok(())
}

/// Draws with a network that knows the pictures.
fn check_drawing(noise: &SchedulerConfig, said: PredictionType, kind: SchedulerKind) -> Result<()> {
    let original = randn(1, &[3, 2, 3, 3])?;
    let mut scheduler = noise.with_kind(kind).build()?;
    let sampling = Sampling { steps: 20, frames: 5, ..Sampling::default() };
    let start = randn(4, original.dims())?;
    let drawn = sample(&perfect(said, original.clone()), scheduler.as_mut(), &start, &sampling, &Generator::new(3))?;
    let difference = largest(&drawn.pictures.sub(&original)?)?;
    // Some tell the network a whole timestep: a thousandth of a flow's time.
    assert!(difference < 5e-3, "{said} {kind}: {difference}");
    assert_eq!(drawn.frames.len(), 5);
    assert_eq!(drawn.frames[4].to_vec::<f32>()?, drawn.pictures.to_vec::<f32>()?);
    assert!(largest(&drawn.frames[0].sub(&start)?)? < 0.02, "{said} {kind}: the first frame is the noise");
    assert!(!drawn.pictures.is_tracked());
    Ok(())
}

#[test]
fn a_perfect_network_draws_its_pictures_under_every_objective() -> Result<()> {
    use SchedulerKind::*;
    for prediction in ON_NOISE {
        for kind in [Ddpm, Ddim, Euler, EulerAncestral, Heun, DpmSolver2M, DpmSolver2MSde, DpmSolver3M, UniPc] {
            check_drawing(&config(prediction), prediction, kind)?;
        }
    }
    for shift in [1.0, 3.0] {
        let flow = SchedulerConfig { shift: Some(shift), ..SchedulerConfig::new(SchedulerClass::FlowEuler) };
        for kind in [FlowEuler, DpmSolver2M, UniPc] {
            check_drawing(&flow, PredictionType::FlowPrediction, kind)?;
        }
    }
    Ok(())
}

/// The mean of the rows' numbers as a constant picture: a linear function of the condition, so that guidance is known.
fn by_condition(x: &Tensor, _: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
    let values = condition.expect("a condition").to_dtype(DType::F32)?.reshape([x.dim(0)?, 1])?;
    values.expand(*x.shape())
}

#[test]
fn guidance_sees_both_in_one_batch() -> Result<()> {
    let calls = Mutex::new(Vec::new());
    let network = |x: &Tensor, t: &Tensor, condition: Option<&Tensor>| {
        calls.lock().unwrap().push((x.dim(0)?, condition.unwrap().to_vec::<i64>()?));
        by_condition(x, t, condition)
    };
    let labels = Tensor::from_vec(vec![1i64, 2, 5], 3)?;
    let draw = |guidance: f64, unconditional: Option<i64>| -> Result<Vec<f32>> {
        let unconditional = unconditional.map(|label| Tensor::from_vec(vec![label], ())).transpose()?;
        let sampling = Sampling { steps: 2, condition: Some(labels.clone()), unconditional, guidance, ..Sampling::default() };
        let mut scheduler = config(PredictionType::Sample).with_kind(SchedulerKind::Ddim).build()?;
        sample(&network, scheduler.as_mut(), &randn(1, &[3, 1])?, &sampling, &Generator::new(0))?.pictures.to_vec()
    };
    assert_eq!(draw(1.0, None)?, [1.0, 2.0, 5.0]);
    // u + s (c − u)
    assert_eq!(draw(3.0, Some(4))?, [4.0 - 9.0, 4.0 - 6.0, 4.0 + 3.0]);
    assert_eq!(draw(0.0, Some(4))?, [4.0; 3]);
    let calls = calls.into_inner().unwrap();
    assert_eq!(calls[0], (3, vec![1, 2, 5]));
    assert_eq!(calls[2], (6, vec![4, 4, 4, 1, 2, 5]));
    assert_eq!(calls.len(), 6);
    Ok(())
}

#[test]
fn guidance_takes_contexts_and_gives_contrast_back() -> Result<()> {
    let network = |x: &Tensor, _: &Tensor, context: Option<&Tensor>| {
        let tone = context.unwrap().mean([1, 2])?.reshape([x.dim(0)?, 1, 1, 1])?;
        x.zeros_like()?.add(&tone)?.add(&Tensor::from_vec(vec![-1f32, 1.0, -1.0, 1.0], [2, 2])?.mul(&tone)?)
    };
    let context = randn(5, &[2, 3, 4])?;
    let empty = Tensor::zeros([3, 4], ())?;
    let draw = |guidance_rescale: f64| -> Result<Tensor> {
        let sampling = Sampling {
            steps: 1,
            condition: Some(context.clone()),
            unconditional: Some(empty.clone()),
            guidance: 4.0,
            guidance_rescale,
            ..Sampling::default()
        };
        let mut scheduler = config(PredictionType::Sample).with_kind(SchedulerKind::Ddim).build()?;
        Ok(sample(&network, scheduler.as_mut(), &randn(1, &[2, 1, 2, 2])?, &sampling, &Generator::new(0))?.pictures)
    };
    // With nothing for no condition all is four times as much, and of four times the deviation; taken back, as much as without guidance.
    let (guided, back) = (draw(0.0)?, draw(1.0)?);
    let tone = context.mean([1, 2])?.reshape([2, 1, 1, 1])?;
    let expected = Tensor::from_vec(vec![0f32, 2.0, 0.0, 2.0], [2, 2])?.mul(&tone)?;
    assert!(largest(&guided.sub(&expected.mul_scalar(4.0)?)?)? < 1e-5);
    assert!(largest(&back.sub(&expected)?)? < 1e-5);
    Ok(())
}

#[test]
fn frames_are_spread_from_noise_to_picture() -> Result<()> {
    let network = |x: &Tensor, _: &Tensor, _: Option<&Tensor>| x.zeros_like();
    for (steps, frames, expected) in [(4, 0, 0), (4, 1, 1), (4, 2, 2), (4, 5, 5), (4, 9, 5), (4, usize::MAX, 5), (25, 13, 13)] {
        let mut scheduler = config(PredictionType::Sample).with_kind(SchedulerKind::Ddim).build()?;
        let sampling = Sampling { steps, frames, ..Sampling::default() };
        let drawn = sample(&network, scheduler.as_mut(), &randn(1, &[8, 32])?, &sampling, &Generator::new(0))?;
        assert_eq!(drawn.frames.len(), expected);
        let sizes = drawn.frames.iter().map(largest).collect::<Result<Vec<_>>>()?;
        assert!(sizes.windows(2).all(|pair| pair[1] < pair[0]), "{sizes:?}");
        assert!(sizes.last().is_none_or(|&size| size == 0.0));
    }
    Ok(())
}

fn tiny_unet(params: &Params) -> Result<UNet2dModel> {
    let names = |kind: &str| vec![kind.to_owned(); 2];
    let config = UNet2dConfig {
        in_channels: 1,
        out_channels: 1,
        block_out_channels: vec![8, 16],
        down_block_types: names("DownBlock2D"),
        up_block_types: names("UpBlock2D"),
        layers_per_block: 1,
        norm_num_groups: 4,
        dropout: 0.1,
        num_class_embeds: Some(3),
        ..UNet2dConfig::default()
    };
    UNet2dModel::new(params, &config)
}

fn tiny_dit(params: &Params) -> Result<Dit> {
    let config = DitConfig {
        num_attention_heads: 2,
        attention_head_dim: 8,
        in_channels: 1,
        num_layers: 2,
        dropout: 0.1,
        sample_size: 8,
        num_embeds_ada_norm: 2,
        ..DitConfig::default()
    };
    Dit::new(params, &config)
}

/// Two kinds of pictures: dark ones with a bright left half, and the other way round.
fn halves(count: usize) -> Result<(Tensor, Tensor)> {
    let labels = (0..count as i64).map(|i| i % 2).collect::<Vec<_>>();
    let pixel = |i: usize| if (i % 8 < 4) == (labels[i / 64] == 0) { 1f32 } else { -1.0 };
    let pictures = Tensor::from_vec((0..count * 64).map(pixel).collect(), [count, 1, 8, 8])?;
    Ok((pictures, Tensor::from_vec(labels, count)?))
}

fn options(prediction: PredictionType) -> Result<DiffusionTrainerOptions> {
    Ok(DiffusionTrainerOptions {
        unconditional: Some(Tensor::from_vec(vec![2i64], ())?),
        condition_dropout: 0.2,
        lr: 1e-2,
        steps: STEPS,
        warmup_steps: 10,
        ema_decay: 0.95,
        seed: 7,
        ..DiffusionTrainerOptions::new(config(prediction))
    })
}

/// Trains for `STEPS` steps: the losses of the first and last ten, and the share of pixels that are right in what is drawn for each label.
fn learns<N: Denoiser>(network: impl FnOnce(&Params) -> Result<N>, options: DiffusionTrainerOptions) -> Result<(f64, f64, f64)> {
    let params = Params::seeded(1);
    let noise = SchedulerConfig { clip_sample: Some(true), ..options.noise.clone() };
    let mut trainer = DiffusionTrainer::new(network(&params)?, &params, options)?;
    let (pictures, labels) = halves(8)?;
    let losses = (0..STEPS).map(|_| Ok(trainer.step(&pictures, Some(&labels))?.loss)).collect::<Result<Vec<_>>>()?;
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let mut scheduler = noise.with_kind(SchedulerKind::Ddim).build()?;
    let sampling = Sampling { steps: 8, condition: Some(labels), guidance: 1.5, ..Sampling::default() };
    let drawn = trainer.sample(scheduler.as_mut(), &randn(3, pictures.dims())?, &sampling, &Generator::new(0))?;
    assert!(params.mode().is_training());
    let right = drawn.pictures.mul(&pictures)?.gt_scalar(0.0)?.to_dtype(DType::F32)?.mean(())?.item_f64()?;
    Ok((mean(&losses[..10]), mean(&losses[losses.len() - 10..]), right))
}

#[test]
fn a_toy_is_learned() -> Result<()> {
    let weighted = DiffusionTrainerOptions { min_snr_gamma: Some(5.0), autocast: Some(DType::BF16), ..options(PredictionType::Epsilon)? };
    let runs = [
        ("v", 0.9, learns(tiny_unet, options(PredictionType::VPrediction)?)?),
        ("x₀", 0.9, learns(tiny_unet, options(PredictionType::Sample)?)?),
        // The first steps divide an error of ε by √ᾱ = 0.006: so few steps of training do not make it small enough to draw.
        ("ε, min-SNR, bf16", 0.0, learns(tiny_dit, weighted)?),
    ];
    for (name, least, (first, last, right)) in runs {
        println!("{name}: loss {first:.3} → {last:.3}; {:.1} % of the pixels", 100.0 * right);
        assert!(last < 0.5 * first && right >= least, "{name}: {first} → {last}, {right}");
    }
    Ok(())
}

fn bits(state: &StateDict) -> Result<Vec<(String, Vec<f64>)>> {
    state.iter().map(|(name, tensor)| Ok((name.clone(), tensor.to_dtype(DType::F64)?.to_vec()?))).collect()
}

#[test]
fn a_resumed_run_has_the_same_bits() -> Result<()> {
    for autocast in [None, Some(DType::BF16), Some(DType::F16)] {
        let new = |seed: u64| -> Result<DiffusionTrainer<UNet2dModel>> {
            let params = Params::seeded(seed);
            let network = tiny_unet(&params)?;
            DiffusionTrainer::new(network, &params, DiffusionTrainerOptions { autocast, ..options(PredictionType::VPrediction)? })
        };
        let (pictures, labels) = halves(6)?;
        let mut whole = new(1)?;
        let mut saved = StateDict::new();
        for step in 0..6 {
            if step == 3 {
                saved = whole.state_dict()?;
                // What is drawn in between changes nothing.
                let sampling = Sampling { steps: 2, condition: Some(labels.clone()), ..Sampling::default() };
                let mut scheduler = config(PredictionType::VPrediction).with_kind(SchedulerKind::Ddpm).build()?;
                whole.sample(scheduler.as_mut(), &randn(3, pictures.dims())?, &sampling, &Generator::new(0))?;
            }
            whole.step(&pictures, Some(&labels))?;
        }
        // Of another seed: all that counts comes from the saved state.
        let mut resumed = new(99)?;
        resumed.load_state_dict(&saved)?;
        assert_eq!(resumed.steps(), 3);
        for _ in 0..3 {
            resumed.step(&pictures, Some(&labels))?;
        }
        assert_eq!(bits(&resumed.state_dict()?)?, bits(&whole.state_dict()?)?, "{autocast:?}");

        saved.remove("trainer.counters");
        assert!(resumed.load_state_dict(&saved).is_err());
    }
    Ok(())
}

#[test]
fn conditions_are_dropped_as_often_as_asked_for() -> Result<()> {
    let seen = Mutex::new(Vec::new());
    let network = |x: &Tensor, _: &Tensor, condition: Option<&Tensor>| {
        seen.lock().unwrap().extend(condition.unwrap().to_vec::<i64>()?);
        Ok(x.clone())
    };
    let labels = Tensor::zeros(2000, DType::I64)?;
    for share in [0.0, 0.2, 1.0] {
        seen.lock().unwrap().clear();
        let trainer = trainer_of(&network, DiffusionTrainerOptions { condition_dropout: share, ..options(PredictionType::Epsilon)? })?;
        trainer.loss(&Tensor::zeros([2000, 1], ())?, Some(&labels), &Generator::new(1))?;
        let dropped = seen.lock().unwrap().iter().filter(|&&label| label == 2).count() as f64 / 2000.0;
        assert!((dropped - share).abs() < 0.03 && seen.lock().unwrap().len() == 2000, "{share}: {dropped}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let good = options(PredictionType::Epsilon)?;
    let wrong = [
        DiffusionTrainerOptions { condition_dropout: 1.5, ..good.clone() },
        DiffusionTrainerOptions { condition_dropout: f64::NAN, ..good.clone() },
        DiffusionTrainerOptions { min_snr_gamma: Some(0.0), ..good.clone() },
        DiffusionTrainerOptions { lr: -1.0, ..good.clone() },
        DiffusionTrainerOptions { ema_decay: 1.5, ..good.clone() },
        DiffusionTrainerOptions { noise: SchedulerConfig { beta_start: Some(f64::NAN), ..good.noise.clone() }, ..good.clone() },
    ];
    for options in wrong {
        assert!(trainer_of(by_condition, options.clone()).is_err(), "{options:?}");
    }
    let params = Params::seeded(0);
    let mut trainer = DiffusionTrainer::new(tiny_unet(&params)?, &params, good)?;
    let (pictures, labels) = halves(2)?;
    assert!(trainer.step(&pictures, None).is_err());
    assert!(trainer.step(&pictures, Some(&labels.narrow(0, 0, 1)?)).is_err());
    assert!(trainer.step(&pictures, Some(&labels.to_dtype(DType::F32)?)).is_err());
    assert!(trainer.step(&Tensor::zeros([0, 1, 8, 8], ())?, Some(&Tensor::zeros(0, DType::I64)?)).is_err());
    assert!(trainer.step(&Tensor::zeros(3, ())?, Some(&labels)).is_err());
    assert!(trainer.step(&pictures.mul_scalar(f64::NAN)?, Some(&labels)).is_err());

    let mut scheduler = config(PredictionType::Epsilon).with_kind(SchedulerKind::Ddim).build()?;
    let noise = randn(1, pictures.dims())?;
    let good = Sampling { steps: 2, condition: Some(labels.clone()), guidance: 2.0, ..Sampling::default() };
    let wrong = [
        Sampling { steps: 0, ..good.clone() },
        Sampling { guidance: f64::NAN, ..good.clone() },
        Sampling { condition: None, ..good.clone() },
        Sampling { condition: Some(labels.narrow(0, 0, 1)?), ..good.clone() },
        Sampling { unconditional: Some(Tensor::zeros((), ())?), ..good.clone() },
        Sampling { unconditional: Some(Tensor::zeros(2, DType::I64)?), ..good.clone() },
        Sampling { guidance_rescale: 2.0, ..good.clone() },
        Sampling { autocast: Some(DType::F64), ..good.clone() },
    ];
    for sampling in wrong {
        assert!(trainer.sample(scheduler.as_mut(), &noise, &sampling, &Generator::new(0)).is_err(), "{sampling:?}");
    }
    // After errors the trained weights are back, and the run goes on.
    trainer.sample(scheduler.as_mut(), &noise, &good, &Generator::new(0))?;
    assert!(sample(trainer.network(), scheduler.as_mut(), &noise, &good, &Generator::new(0)).is_err(), "no row for no condition");
    let loss = trainer.loss(&pictures, Some(&labels), &Generator::new(1))?;
    loss.backward()?;
    Ok(())
}
