//! Training of language models: what accumulates, what resumes, what is saved.

use kiln_autograd::TensorExt;
use kiln_models::data::IGNORE_INDEX;
use kiln_models::nn::Params;
use kiln_models::transformer::{CausalLm, Decoder, Gpt2Config, LmBatch, LmTrainer, LmTrainerOptions, Pass};
use kiln_tensor::{CrossEntropyOptions, DType, Generator, Result, Tensor, with_autocast};

fn trainer(options: LmTrainerOptions, dropout: f64) -> Result<LmTrainer<Decoder>> {
    let config = Gpt2Config {
        vocab_size: 11,
        n_positions: 8,
        n_embd: 16,
        n_layer: 2,
        n_head: 2,
        resid_pdrop: dropout,
        embd_pdrop: dropout,
        attn_pdrop: dropout,
        ..Gpt2Config::default()
    };
    LmTrainer::new(config.build(&Params::seeded(3))?, options)
}

/// Sequences that count up, from random starts.
fn counting(seed: u64, batch: usize) -> Result<LmBatch> {
    let starts = Generator::new(seed).randint(0, 11, [batch])?.to_vec::<i64>()?;
    let at = |shift: i64| starts.iter().flat_map(|s| (0..8).map(move |i| (s + i + shift) % 11)).collect::<Vec<_>>();
    Ok(LmBatch { tokens: Tensor::from_vec(at(0), [batch, 8])?, targets: Tensor::from_vec(at(1), [batch, 8])?, segments: None })
}

fn options() -> LmTrainerOptions {
    LmTrainerOptions { lr: 1e-2, steps: 40, warmup_steps: 4, ..LmTrainerOptions::default() }
}

#[test]
fn a_model_learns_to_count() -> Result<()> {
    for autocast in [None, Some(DType::BF16), Some(DType::F16)] {
        let mut trainer = trainer(LmTrainerOptions { autocast, steps: 100, ..options() }, 0.0)?;
        let first = trainer.evaluate(&[counting(100, 4)?])?;
        for step in 0..100 {
            trainer.step(&[counting(step, 4)?])?;
        }
        let last = trainer.evaluate(&[counting(100, 4)?])?;
        assert!(first > 2.0 && last < 0.2, "{autocast:?}: {first} {last}");
    }
    Ok(())
}

#[test]
fn a_scaled_loss_reports_the_norm_of_the_gradient_itself() -> Result<()> {
    let (mut plain, mut scaled) = (trainer(options(), 0.0)?, trainer(LmTrainerOptions { autocast: Some(DType::F16), ..options() }, 0.0)?);
    let (plain, scaled) = (plain.step(&[counting(1, 4)?])?.grad_norm, scaled.step(&[counting(1, 4)?])?.grad_norm);
    assert!((plain - scaled).abs() < 0.02 * plain, "{plain} {scaled}");
    Ok(())
}

#[test]
fn accumulated_batches_are_one_batch() -> Result<()> {
    let (mut whole, mut parts) = (trainer(options(), 0.0)?, trainer(options(), 0.0)?);
    let batch = counting(1, 6)?;
    let rows = |start, len| -> Result<LmBatch> {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        Ok(LmBatch { tokens: part(&batch.tokens)?, targets: part(&batch.targets)?, segments: None })
    };
    let one = whole.step(std::slice::from_ref(&batch))?;
    let two = parts.step(&[rows(0, 2)?, rows(2, 4)?])?;
    assert!((one.loss - two.loss).abs() < 1e-6 && (one.grad_norm - two.grad_norm).abs() < 1e-5 * one.grad_norm);
    assert_eq!((one.tokens, two.tokens), (48, 48));
    Ok(())
}

#[test]
fn a_resumed_run_gives_the_same_bits() -> Result<()> {
    let bits = |trainer: &LmTrainer<Decoder>| -> Result<Vec<Vec<f32>>> {
        trainer.model().params().state_dict().values().map(|tensor| tensor.to_vec::<f32>()).collect()
    };
    let mut straight = trainer(options(), 0.1)?;
    let mut resumed = trainer(options(), 0.1)?;
    for step in 0..3 {
        straight.step(&[counting(step, 4)?])?;
    }
    resumed.load_state_dict(&straight.state_dict()?)?;
    for step in 3..6 {
        assert_eq!(straight.step(&[counting(step, 4)?])?, resumed.step(&[counting(step, 4)?])?);
    }
    assert_eq!(bits(&straight)?, bits(&resumed)?);
    assert_eq!(resumed.steps(), 6);
    assert!(resumed.load_state_dict(&Default::default()).is_err());
    Ok(())
}

#[test]
fn activation_checkpointing_changes_no_bit() -> Result<()> {
    let (mut kept, mut recomputed) = (trainer(options(), 0.1)?, trainer(options(), 0.1)?);
    recomputed.model().set_activation_checkpointing(true);
    for step in 0..2 {
        assert_eq!(kept.step(&[counting(step, 4)?])?, recomputed.step(&[counting(step, 4)?])?);
    }
    Ok(())
}

#[test]
fn a_step_without_targets_is_an_error() -> Result<()> {
    let mut trainer = trainer(options(), 0.0)?;
    let mut batch = counting(0, 2)?;
    batch.targets = batch.targets.full_like(-100.0)?;
    assert!(trainer.step(&[batch.clone()]).is_err() && trainer.evaluate(&[batch]).is_err() && trainer.step(&[]).is_err());
    Ok(())
}

/// Loss and gradients of a vocabulary whose logits are computed in chunks, against logits that are all there; with targets that do not count.
#[test]
fn the_loss_of_a_large_vocabulary_is_that_of_its_logits() -> Result<()> {
    const VOCABULARY: i64 = 40_000;
    let (length, plain) = (500, CrossEntropyOptions::default());
    let sizes =
        Gpt2Config { n_positions: length, n_layer: 1, n_head: 2, n_embd: 8, vocab_size: VOCABULARY as usize, ..Gpt2Config::default() };
    for dtype in [None, Some(DType::BF16)] {
        let params = Params::seeded(1);
        let model = sizes.clone().build(&params)?;
        params.eval();
        let generator = Generator::new(2);
        let tokens = generator.randint(0, VOCABULARY, [1, length])?;
        let ignored = generator.rand([1, length], ())?.lt_scalar(0.3)?;
        let targets = ignored
            .where_cond(&Tensor::full([1, length], IGNORE_INDEX as f64, DType::I64)?, &generator.randint(0, VOCABULARY, [1, length])?)?;
        let mut results = Vec::new();
        for whole in [true, false] {
            params.zero_grad();
            let loss = with_autocast(dtype, || match whole {
                true => model.forward(&tokens, Pass::default())?.flatten(0, 1)?.cross_entropy(&targets.flatten(0, 1)?),
                false => model.loss(&tokens, &targets, Pass::default(), &plain),
            })?;
            loss.mul_scalar(3.0)?.backward()?;
            let all = params.params();
            let grads = all.iter().map(|param| Ok(param.grad().map(|grad| grad.to_vec::<f32>()).transpose()?.unwrap_or_default()));
            results.push((loss.item_f64()?, grads.collect::<Result<Vec<_>>>()?));
        }
        let ((loss, grads), (chunked, chunked_grads)) = (&results[0], &results[1]);
        let tolerance = if dtype.is_none() { 1e-5 } else { 1e-2 };
        assert!((loss - chunked).abs() < tolerance * loss, "{loss} and {chunked}");
        for ((a, b), param) in grads.iter().zip(chunked_grads).zip(params.params()) {
            let length = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let difference: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
            assert!(length(a) > 0.0 && length(&difference) < tolerance * length(a), "{} in {dtype:?}", param.name());
        }
    }
    Ok(())
}
