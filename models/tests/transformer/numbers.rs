//! Rotary frequencies and a short training run.

use crate::folder;
use kiln_autograd::TensorExt;
use kiln_models::nn::Params;
use kiln_models::optim::{AdamW, AdamWOptions, Optimizer, Schedule, Scheduler};
use kiln_models::transformer::{CausalLm, Pass, RopeConfig, RopeParameters, load};
use kiln_tensor::{Result, Tensor};
use serde_json::Value;

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(name)).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

#[test]
fn rotary_frequencies_are_the_reference() -> Result<()> {
    for case in json("rope.json").as_array().unwrap() {
        let parameters: RopeParameters = serde_json::from_value(case["parameters"].clone()).unwrap();
        let theta = parameters.rope_theta.unwrap();
        let rope = RopeConfig { theta, width: 16, max_position_embeddings: 128, scaling: parameters.scaling()? };
        let length = case["length"].as_u64().unwrap();
        let (frequencies, factor) = rope.frequencies(length as usize)?;
        let expected = floats(&case["frequencies"]);
        for (found, expected) in frequencies.to_vec::<f64>()?.into_iter().zip(&expected) {
            assert!((found - expected).abs() <= 1e-6 * expected, "{case}: {found} {expected}");
        }
        assert_eq!(frequencies.numel(), expected.len());
        assert!((factor - case["factor"].as_f64().unwrap()).abs() < 1e-9, "{case}: {factor}");
    }
    Ok(())
}

/// Twenty steps of AdamW with clipped gradients and a cosine after a warm-up: the losses are PyTorch's.
#[test]
fn a_training_run_is_the_reference() -> Result<()> {
    let run = json("gpt2_run.json");
    let expected = floats(&run["losses"]);
    let params = Params::new();
    let (_, model) = load(folder("gpt2"), &params)?;
    params.eval(); // Without dropout.
    let options = AdamWOptions { lr: 0.02, betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.1, ..Default::default() };
    let mut optimizer = AdamW::new(params.params(), options)?;
    let warmup = run["warmup"].as_u64().unwrap();
    let schedule = Schedule::cosine(expected.len() as u64 - warmup, 0.0).with_warmup(warmup);
    let mut scheduler = Scheduler::new(schedule, &mut optimizer)?;
    for (step, (batch, expected)) in run["batches"].as_array().unwrap().iter().zip(expected).enumerate() {
        let rows = batch.as_array().unwrap();
        let tokens: Vec<i64> = rows.iter().flat_map(|row| row.as_array().unwrap()).map(|token| token.as_i64().unwrap()).collect();
        let len = tokens.len() / rows.len();
        let tokens = Tensor::from_vec(tokens, [rows.len(), len])?;
        let loss = crate::next_token_loss(&model.forward(&tokens, Pass::default())?, &tokens)?;
        let found = loss.item_f64()?;
        assert!((found - expected).abs() < 1e-4, "step {step}: {found} instead of {expected}");
        optimizer.zero_grad();
        loss.backward()?;
        optimizer.step_clipped(1.0)?;
        scheduler.step(&mut optimizer)?;
    }
    Ok(())
}
