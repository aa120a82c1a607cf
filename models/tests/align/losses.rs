//! Losses, gradients, advantages and metrics against TRL's (`fixtures/align.py`), in f64 and in f32.

use kiln_autograd::{TensorExt, gradcheck};
use kiln_models::align::*;
use kiln_models::data::IGNORE_INDEX;
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Result, Tensor};
use std::collections::BTreeMap;

/// TRL's tensors in a dtype, and how near ours must be, relative to the largest element of what is compared.
struct Fixture {
    tensors: BTreeMap<String, Tensor>,
    dtype: DType,
    tolerance: f64,
}

impl Fixture {
    fn both() -> [Fixture; 2] {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/align.safetensors");
        let tensors = safetensors::load(path).unwrap();
        let with = |dtype, tolerance| Fixture { tensors: tensors.clone(), dtype, tolerance };
        [with(DType::F64, 1e-10), with(DType::F32, 1e-5)]
    }

    fn get(&self, name: &str) -> Tensor {
        let tensor = self.tensors.get(name).unwrap_or_else(|| panic!("{name} is not in the fixture"));
        if tensor.dtype().is_float() { tensor.to_dtype(self.dtype).unwrap() } else { tensor.clone() }
    }

    fn leaf(&self, name: &str) -> Tensor {
        self.get(name).requires_grad_().unwrap()
    }

    #[track_caller]
    fn close(&self, name: &str, got: &Tensor) {
        self.close_within(name, got, self.tolerance);
    }

    #[track_caller]
    fn close_within(&self, name: &str, got: &Tensor, tolerance: f64) {
        let numbers = |x: &Tensor| x.detach().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
        let (expected, found) = (numbers(&self.tensors[name]), numbers(got));
        assert_eq!(self.tensors[name].dims(), got.dims(), "{name}");
        let scale = expected.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
            assert!((e - f).abs() <= tolerance * scale, "{name}[{i}] in {}: {f} instead of {e}", self.dtype);
        }
    }

    #[track_caller]
    fn number(&self, name: &str, got: f64) {
        let expected = self.tensors[name].item_f64().unwrap();
        // TRL takes shares of tokens in f32.
        assert!(
            (got - expected).abs() <= self.tolerance.max(1e-7) * expected.abs().max(1.0),
            "{name} in {}: {got} instead of {expected}",
            self.dtype
        );
    }

    /// The loss and its gradient.
    #[track_caller]
    fn check(&self, name: &str, loss: &Tensor, variable: &Tensor) {
        self.check_within(name, loss, variable, self.tolerance);
    }

    #[track_caller]
    fn check_within(&self, name: &str, loss: &Tensor, variable: &Tensor, tolerance: f64) {
        self.close_within(&format!("{name}.loss"), loss, tolerance);
        variable.zero_grad();
        loss.backward().unwrap();
        self.close_within(&format!("{name}.grad.0"), &variable.grad().unwrap(), tolerance);
    }

    /// Log-probabilities of the answers' tokens at the places of their predictions, (B, T − 1).
    fn log_probs(&self, logits: &Tensor) -> Result<Tensor> {
        let targets = shift_labels(&mask_labels(&self.get("tokens"), &self.get("mask"))?)?;
        token_log_probs(&logits.narrow(1, 0, targets.dim(1)?)?, &targets)
    }

    /// The same behind the prompts of two tokens.
    fn answers(&self, logits: &Tensor) -> Result<Tensor> {
        self.log_probs(logits)?.narrow(1, 1, 5)
    }

    fn answers_mask(&self) -> Tensor {
        self.get("mask").narrow(1, 2, 5).unwrap()
    }

    /// Rows `from` and the next as answers of a preference.
    fn pair(&self, log_probs: &Tensor, from: usize) -> Result<Completions> {
        let rows = |x: &Tensor| x.narrow(0, from, 2)?.sum(1);
        let lengths = rows(&self.get("mask"))?.to_dtype(self.dtype)?;
        Ok(Completions { log_probs: rows(log_probs)?, reference: rows(&self.get("reference.log_probs"))?, lengths })
    }
}

#[test]
fn token_log_probs_and_entropy() -> Result<()> {
    for f in Fixture::both() {
        f.close("reference.log_probs", &f.log_probs(&f.get("reference_logits"))?);
        f.close("entropy", &entropy(&f.get("logits"))?);
    }
    Ok(())
}

#[test]
fn sft() -> Result<()> {
    for f in Fixture::both() {
        let logits = f.leaf("logits");
        let labels = mask_labels(&f.get("tokens"), &f.get("mask"))?;
        f.check("sft", &sft_loss(&logits, &labels, None)?, &logits);
        f.check("sft.part", &sft_loss(&logits, &labels, Some(29))?, &logits);
        f.number("sft.accuracy", token_accuracy(&logits, &labels)?);
    }
    Ok(())
}

#[test]
fn reward() -> Result<()> {
    for f in Fixture::both() {
        let (scores, margin) = (f.leaf("scores"), f.get("margin"));
        let full = RewardLossOptions { margin: Some(&margin), center_rewards_coefficient: Some(0.01) };
        for (name, options) in [("reward", RewardLossOptions::default()), ("reward.full", full)] {
            let out = reward_loss(&scores.narrow(0, 0, 4)?, &scores.narrow(0, 4, 4)?, &options)?;
            f.check(name, &out.loss, &scores);
            f.number(&format!("{name}.accuracy"), out.accuracy()?);
            f.number(&format!("{name}.margin"), out.margin()?);
        }
    }
    Ok(())
}

#[test]
fn dpo() -> Result<()> {
    for f in Fixture::both() {
        let logits = f.leaf("logits");
        for loss in [DpoLoss::Sigmoid, DpoLoss::Ipo, DpoLoss::Hinge] {
            let log_probs = f.log_probs(&logits)?;
            let options = DpoLossOptions { loss, beta: 0.3, ..Default::default() };
            let out = dpo_loss(&f.pair(&log_probs, 0)?, &f.pair(&log_probs, 2)?, &options)?;
            f.check(&format!("dpo.{loss}"), &out.loss, &logits);
            f.number(&format!("dpo.{loss}.rewards/accuracies"), out.accuracy()?);
            f.number(&format!("dpo.{loss}.rewards/margins"), out.margin()?);
            f.number(&format!("dpo.{loss}.rewards/chosen"), out.chosen_rewards.mean(())?.item_f64()?);
        }
        let log_probs = f.log_probs(&logits)?;
        let options = DpoLossOptions { beta: 0.3, label_smoothing: 0.1, ..Default::default() };
        f.check("dpo.smoothed", &dpo_loss(&f.pair(&log_probs, 0)?, &f.pair(&log_probs, 2)?, &options)?.loss, &logits);
    }
    Ok(())
}

#[test]
fn orpo() -> Result<()> {
    for f in Fixture::both() {
        let logits = f.leaf("logits");
        let log_probs = f.log_probs(&logits)?;
        let mask = f.get("mask").narrow(1, 1, 6)?;
        let mean = |from| masked_mean(&log_probs.narrow(0, from, 2)?, &mask.narrow(0, from, 2)?, 1);
        let labels = mask_labels(&f.get("tokens"), &f.get("attention_mask"))?.narrow(0, 0, 2)?;
        let chosen_nll = sft_loss(&logits.narrow(0, 0, 2)?, &labels, None)?;
        let out = orpo_loss(&OrpoLogProbs { chosen: mean(0)?, rejected: mean(2)?, chosen_nll }, 0.25)?;
        // TRL rounds the log-probabilities to f32.
        let tolerance = f.tolerance.max(1e-6);
        f.check_within("orpo", &out.loss, &logits, tolerance);
        f.close_within("orpo.rewards/margins", &Tensor::scalar(out.margin()?, DType::F64)?, tolerance);
    }
    Ok(())
}

#[test]
fn kto() -> Result<()> {
    for f in Fixture::both() {
        let logits = f.leaf("logits");
        let kl = kto_kl(&f.get("kto.kl_logps"), &f.get("kto.ref_kl_logps"))?;
        f.number("kto.kl", kl.item_f64()?);
        let desirable = Tensor::from_vec(vec![true, false, false, true], 4)?;
        let options = KtoLossOptions { beta: 0.3, desirable_weight: 1.25, undesirable_weight: 0.75 };
        let reference = f.get("reference.log_probs").sum(1)?;
        f.check("kto", &kto_loss(&f.log_probs(&logits)?.sum(1)?, &reference, &desirable, &kl, &options)?, &logits);
    }
    Ok(())
}

#[test]
fn ppo() -> Result<()> {
    for f in Fixture::both() {
        let (mask, old) = (f.answers_mask(), f.get("ppo.old"));
        let reference = f.get("reference.log_probs").narrow(1, 1, 5)?;
        let mut last = None;
        for (name, estimator) in [("k1", KlEstimator::K1), ("k3", KlEstimator::K3)] {
            for whitened in [false, true] {
                let name = format!("ppo.{name}{}", if whitened { ".whitened" } else { "" });
                let kl = estimator.estimate(&old, &reference)?;
                let mut rewards = token_rewards(&kl, &f.get("ppo.scores"), &mask, 0.07)?;
                if whitened {
                    rewards = whiten(&rewards, &mask, false)?;
                }
                let (advantages, returns) = gae(&rewards, &f.get("ppo.old_values"), &mask, 0.97, 0.9)?;
                let advantages = whiten(&advantages, &mask, true)?;
                f.close(&format!("{name}.rewards"), &rewards);
                f.close(&format!("{name}.advantages"), &advantages);
                f.close(&format!("{name}.returns"), &returns);
                last = Some((advantages, returns));
            }
        }
        let (advantages, returns) = last.unwrap();
        let logits = f.leaf("logits");
        let policy = policy_loss(&f.answers(&logits)?, &old, &advantages, &mask, 0.2)?;
        f.check("ppo.policy", &policy.loss, &logits);
        f.number("ppo.policy.clip_fraction", policy.clip_fraction.item_f64()?);
        let values = f.leaf("ppo.values");
        let value = value_loss(&values, &f.get("ppo.old_values"), &returns, &mask, 0.3)?;
        f.check("ppo.value", &value.loss, &values);
        f.number("ppo.value.clip_fraction", value.clip_fraction.item_f64()?);
        assert!(
            policy.clip_fraction.item_f64()? > 0.0 && value.clip_fraction.item_f64()? > 0.0,
            "nothing is clipped: the test shows little"
        );
    }
    Ok(())
}

#[test]
fn grpo() -> Result<()> {
    let base = GrpoLossOptions { epsilon_high: 0.28, max_completion_length: 9, ..Default::default() };
    let sequence = GrpoLossOptions { importance_sampling: ImportanceSampling::Sequence, ..base };
    let cases = [
        ("grpo", GrpoLossOptions { loss: GrpoLoss::Grpo, ..base }),
        ("bnpo", GrpoLossOptions { loss: GrpoLoss::Bnpo, ..base }),
        ("dr_grpo", GrpoLossOptions { loss: GrpoLoss::DrGrpo, ..base }),
        ("dapo", base),
        ("on_policy", GrpoLossOptions { beta: 0.04, ..base }),
        ("kl", GrpoLossOptions { beta: 0.2, ..base }),
        ("kl_biased", GrpoLossOptions { beta: 0.2, use_bias_correction_kl: false, ..base }),
        ("sequence", GrpoLossOptions { loss: GrpoLoss::Grpo, beta: 0.1, ..sequence }),
        ("sequence_bnpo", GrpoLossOptions { loss: GrpoLoss::Bnpo, ..sequence }),
        ("delta", GrpoLossOptions { delta: Some(1.5), ..base }),
    ];
    for f in Fixture::both() {
        for (name, scale) in [("group", RewardScale::Group), ("batch", RewardScale::Batch), ("none", RewardScale::None)] {
            f.close(&format!("grpo.advantages.{name}"), &group_advantages(&f.get("grpo.rewards"), 2, scale)?);
        }
        let logits = f.leaf("logits");
        for (name, options) in &cases {
            let tokens = GrpoTokens {
                log_probs: f.answers(&logits)?,
                old_log_probs: (*name != "on_policy").then(|| f.get("grpo.old")),
                reference: (options.beta != 0.0).then(|| f.get("reference.log_probs").narrow(1, 1, 5)).transpose()?,
                mask: f.answers_mask(),
            };
            let out = grpo_loss(&tokens, &f.get("grpo.advantages"), Some(17), options)?;
            f.check(&format!("grpo.{name}"), &out.loss, &logits);
            f.number(&format!("grpo.{name}.clip_ratio/low_mean"), out.clip_low.item_f64()?);
            f.number(&format!("grpo.{name}.clip_ratio/high_mean"), out.clip_high.item_f64()?);
            if options.beta != 0.0 {
                f.number(&format!("grpo.{name}.kl"), out.kl.item_f64()?);
            }
        }
    }
    Ok(())
}

/// What a mask hides can be anything: neither losses nor gradients know of it.
#[test]
fn hidden_values_are_never_read() -> Result<()> {
    let f = &Fixture::both()[0];
    let mask = f.answers_mask();
    let poisoned = |x: Tensor| x.masked_fill(&mask.logical_not()?, f64::NAN);
    let logits = f.leaf("logits");
    let (clean, advantages) = (f.answers(&logits)?, f.get("ppo.k3.advantages"));
    let loss = policy_loss(&clean, &f.get("ppo.old"), &advantages, &mask, 0.2)?.loss.item_f64()?;
    let leaf = poisoned(clean.detach())?.requires_grad_()?;
    let dirty = policy_loss(&leaf, &poisoned(f.get("ppo.old"))?, &poisoned(advantages)?, &mask, 0.2)?.loss;
    assert_eq!(loss, dirty.item_f64()?);
    dirty.backward()?;
    assert!(leaf.grad().unwrap().to_vec::<f64>()?.iter().all(|x| x.is_finite()));
    let tokens = |log_probs: Tensor, old: Tensor| GrpoTokens { log_probs, old_log_probs: Some(old), reference: None, mask: mask.clone() };
    let options = GrpoLossOptions { importance_sampling: ImportanceSampling::Sequence, ..Default::default() };
    let a = grpo_loss(&tokens(clean.detach(), f.get("grpo.old")), &f.get("grpo.advantages"), None, &options)?;
    let b = grpo_loss(&tokens(leaf.detach(), poisoned(f.get("grpo.old"))?), &f.get("grpo.advantages"), None, &options)?;
    assert_eq!(a.loss.item_f64()?, b.loss.item_f64()?);
    let (adv, ret) = gae(&poisoned(f.get("ppo.k1.rewards"))?, &poisoned(f.get("ppo.old_values"))?, &mask, 0.9, 0.9)?;
    assert!(adv.to_vec::<f64>()?.iter().chain(&ret.to_vec::<f64>()?).all(|x| x.is_finite()));
    Ok(())
}

/// Certain answers, far log-ratios, empty masks and single tokens give finite numbers.
#[test]
fn extremes() -> Result<()> {
    let vector = |x: Vec<f64>| {
        let n = x.len();
        Tensor::from_vec(x, n)
    };
    let nll = Tensor::scalar(1.0, DType::F64)?;
    let chosen = vector(vec![0.0, -1e-12, -700.0])?.requires_grad_()?;
    let rejected = vector(vec![-800.0, 0.0, -1e-3])?.requires_grad_()?;
    let loss = orpo_loss(&OrpoLogProbs { chosen: chosen.clone(), rejected: rejected.clone(), chosen_nll: nll }, 0.1)?.loss;
    loss.backward()?;
    let all = [loss.detach().reshape([1])?, chosen.grad().unwrap(), rejected.grad().unwrap()];
    assert!(Tensor::cat(&all, 0)?.to_vec::<f64>()?.iter().all(|x| x.is_finite()));

    let far = vector(vec![1e4, -1e4])?.requires_grad_()?;
    let loss = reward_loss(&far, &far.detach().neg()?, &RewardLossOptions::default())?.loss;
    assert_eq!(loss.item_f64()?, 1e4);
    loss.backward()?;
    assert_eq!(far.grad().unwrap().to_vec::<f64>()?, [0.0, -0.5]);

    let none = Tensor::from_vec(vec![false; 4], [2, 2])?;
    let x = Tensor::ones([2, 2], DType::F64)?;
    assert_eq!(masked_mean(&x, &none, ())?.item_f64()?, 0.0);
    assert_eq!(whiten(&x, &none, true)?.to_vec::<f64>()?, [0.0; 4]);
    assert_eq!(token_rewards(&x, &vector(vec![5.0, 6.0])?, &none, 1.0)?.to_vec::<f64>()?, [0.0; 4]);
    let one = Tensor::from_vec(vec![true, false, false, false], [2, 2])?;
    assert_eq!(whiten(&x.mul_scalar(3.0)?, &one, true)?.to_vec::<f64>()?, [0.0; 4]);
    assert_eq!(whiten(&x.mul_scalar(3.0)?, &one, false)?.to_vec::<f64>()?, [3.0, 0.0, 0.0, 0.0]);
    let labels = Tensor::full([1, 3], IGNORE_INDEX as f64, DType::I64)?;
    assert_eq!(sft_loss(&Tensor::ones([1, 3, 4], ())?, &labels, None)?.item_f64()?, 0.0);
    Ok(())
}

#[test]
fn derivatives() -> Result<()> {
    let f = &Fixture::both()[0];
    let mask = f.answers_mask();
    let values = [f.get("ppo.values")];
    gradcheck(|x| whiten(&x[0], &mask, true), &values)?;
    for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
        gradcheck(|x| estimator.estimate(&x[0], &f.get("ppo.old_values")), &values)?;
    }
    gradcheck(|x| entropy(&x[0]), &[f.get("logits")])
}

#[test]
fn misuse_is_an_error_that_says_what_is_wrong() -> Result<()> {
    let vector = |n: usize| Tensor::ones([n], ());
    let message = |e: kiln_tensor::Error| e.to_string();
    let fails = |result: Result<Tensor>, words: &str| {
        let text = message(result.unwrap_err());
        assert!(text.contains(words), "{text}");
    };
    let out = |x: PreferenceLoss| x.loss;
    fails(reward_loss(&vector(2)?, &Tensor::ones([2, 1], ())?, &RewardLossOptions::default()).map(out), "rejected has shape [2, 1]");
    fails(token_log_probs(&Tensor::ones([2, 3, 4], ())?, &Tensor::zeros([3, 2], DType::I64)?), "targets have shape [3, 2]");
    fails(token_log_probs(&Tensor::ones([1, 4], ())?, &Tensor::full([1], 4.0, DType::I64)?), "target 4");
    fails(token_log_probs(&Tensor::ones((), ())?, &Tensor::full((), 4.0, DType::I64)?), "no dimensions");
    fails(shift_labels(&Tensor::zeros([2, 1], DType::I64)?), "two tokens or more");
    fails(group_advantages(&vector(6)?, 4, RewardScale::Group), "6 rewards in groups of 4");
    fails(group_advantages(&vector(6)?, 0, RewardScale::Group), "groups of 0");
    let tokens =
        GrpoTokens { log_probs: Tensor::ones([2, 3], ())?, old_log_probs: None, reference: None, mask: Tensor::ones([2, 3], DType::Bool)? };
    let grpo = |options: &GrpoLossOptions| grpo_loss(&tokens, &vector(2)?, None, options).map(|out| out.loss);
    fails(grpo(&GrpoLossOptions { beta: 0.1, ..Default::default() }), "no log-probabilities of a reference");
    fails(grpo(&GrpoLossOptions { delta: Some(1.0), ..Default::default() }), "delta = 1");
    fails(grpo(&GrpoLossOptions { epsilon_low: f64::NAN, ..Default::default() }), "epsilon_low");
    let side = Completions { log_probs: vector(2)?, reference: vector(2)?, lengths: vector(2)? };
    let short = Completions { lengths: vector(1)?, ..side.clone() };
    fails(dpo_loss(&side, &short, &DpoLossOptions::default()).map(out), "lengths has shape [1]");
    fails(dpo_loss(&side, &side, &DpoLossOptions { beta: 0.0, ..Default::default() }).map(out), "beta = 0");
    fails(dpo_loss(&side, &side, &DpoLossOptions { label_smoothing: 0.7, ..Default::default() }).map(out), "label_smoothing = 0.7");
    assert!("ppo".parse::<DpoLoss>().is_err() && "dr_grpo".parse::<GrpoLoss>()? == GrpoLoss::DrGrpo);
    Ok(())
}
