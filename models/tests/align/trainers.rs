//! Trainers on tiny models: each improves what it optimises, resumes bit for bit, and steps as the losses say.

use kiln_autograd::no_grad;
use kiln_models::align::*;
use kiln_models::data::{IGNORE_INDEX, PaddingSide, TokenSequence, pad_sequences};
use kiln_models::lora::{Lora, LoraConfig, WithoutAdapter};
use kiln_models::nn::{LoadMode, Params, ParamsOptions, StateDict};
use kiln_models::transformer::{CausalConfig, CausalLm, Decoder, Gpt2Config, Pass, load_for_tuning, load_pretrained, save_pretrained};
use kiln_tensor::{DType, Error, Generator, Result, Tensor};
use std::sync::Arc;

const VOCAB: usize = 9;
const EOS: u32 = 8;

fn model(seed: u64, dropout: f64) -> Result<Arc<Decoder>> {
    let config = Gpt2Config {
        vocab_size: VOCAB,
        n_positions: 12,
        n_embd: 32,
        n_layer: 1,
        n_head: 2,
        resid_pdrop: dropout,
        embd_pdrop: dropout,
        attn_pdrop: dropout,
        initializer_range: 0.1,
        ..Gpt2Config::default()
    };
    let generator = Generator::new(seed);
    Ok(Arc::new(config.build(&Params::with(ParamsOptions { generator, ..ParamsOptions::default() }))?))
}

/// A model of its own with the same weights.
fn copy(of: &Decoder) -> Result<Arc<Decoder>> {
    let copy = model(99, 0.0)?;
    copy.params().load_state_dict(&of.params().state_dict(), LoadMode::Partial)?;
    Ok(copy)
}

fn train(lr: f64) -> TrainOptions {
    TrainOptions::new(lr)
}

/// Prompts of one to three tokens.
fn prompts(seed: u64, count: usize) -> Vec<Vec<u32>> {
    let numbers = Generator::new(seed).randint(0, 8, [count, 4]).unwrap().to_vec::<i64>().unwrap();
    numbers.chunks(4).map(|row| row[1..2 + row[0] as usize % 3].iter().map(|&x| x as u32).collect()).collect()
}

/// What is to be said after a prompt: its last token plus 1, then the end.
fn right(prompt: &[u32]) -> Vec<u32> {
    vec![(prompt[prompt.len() - 1] + 1) % 8, EOS]
}

fn wrong(prompt: &[u32]) -> Vec<u32> {
    vec![(prompt[prompt.len() - 1] + 5) % 8, prompt[0], EOS]
}

fn texts(seed: u64, count: usize) -> Vec<TokenSequence> {
    prompts(seed, count).iter().map(|prompt| TokenSequence::completion(prompt, &right(prompt))).collect()
}

fn pairs(seed: u64, count: usize) -> Vec<PreferencePair> {
    let pair = |prompt: &Vec<u32>| PreferencePair {
        chosen: TokenSequence::completion(prompt, &right(prompt)),
        rejected: TokenSequence::completion(prompt, &wrong(prompt)),
        ..PreferencePair::default()
    };
    prompts(seed, count).iter().map(pair).collect()
}

fn sample(model: &dyn CausalLm, request: &RolloutRequest<'_>) -> Result<Vec<Completion>> {
    sampler(&[EOS])(model, request)
}

/// 1 for a first token that is odd or even as the prompt's last, and half as much again if the answer comes to an end.
fn judge(prompts: &[Vec<u32>], answers: &[Completion]) -> Result<Vec<f64>> {
    let score = |(prompt, answer): (&Vec<u32>, &Completion)| match (prompt.last(), &answer.tokens[..]) {
        (Some(last), &[first, ..]) if first != EOS && first % 2 == last % 2 => {
            if answer.finished {
                1.5
            } else {
                1.0
            }
        }
        _ => 0.0,
    };
    Ok(prompts.iter().zip(answers).map(score).collect())
}

fn equal(a: &StateDict, b: &StateDict) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, x) in a {
        let bits = |x: &Tensor| match x.dtype() {
            DType::I64 => x.to_vec::<i64>().unwrap(),
            _ => x.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap().iter().map(|x| x.to_bits() as i64).collect(),
        };
        assert!(bits(x) == bits(&b[name]), "{name} differs");
    }
}

/// Two steps, a checkpoint, two more; and the last two again by another trainer of other weights that loads the checkpoint.
fn resumes<T>(
    make: impl Fn(u64) -> Result<T>,
    step: impl Fn(&mut T, u64) -> Result<()>,
    save: impl Fn(&T) -> Result<StateDict>,
    load: impl Fn(&mut T, &StateDict) -> Result<()>,
) -> Result<()> {
    let mut first = make(1)?;
    (0..2).try_for_each(|i| step(&mut first, i))?;
    let checkpoint = save(&first)?;
    // A copy, since the weights go on in place.
    let checkpoint: StateDict = checkpoint.iter().map(|(name, x)| Ok((name.clone(), x.copy()?))).collect::<Result<_>>()?;
    (2..4).try_for_each(|i| step(&mut first, i))?;
    let mut second = make(2)?;
    step(&mut second, 7)?;
    load(&mut second, &checkpoint)?;
    equal(&checkpoint, &save(&second)?);
    (2..4).try_for_each(|i| step(&mut second, i))?;
    equal(&save(&first)?, &save(&second)?);
    let mut cut = checkpoint.clone();
    cut.pop_last();
    assert!(load(&mut second, &cut).is_err());
    Ok(())
}

#[test]
fn sft_learns_answers_and_nothing_else() -> Result<()> {
    for bf16 in [false, true] {
        let model = model(0, 0.0)?;
        let mut trainer = SftTrainer::new(model, SftOptions { train: TrainOptions { bf16, ..train(1e-2) }, ..Default::default() })?;
        let first = trainer.evaluate(&texts(50, 32))?;
        let mut last = trainer.step(&texts(0, 16))?;
        for i in 1..150 {
            last = trainer.step(&texts(i, 16))?;
        }
        let after = trainer.evaluate(&texts(50, 32))?;
        assert!(first > 1.5 && after < 0.3 && last.accuracy > 0.8, "bf16 {bf16}: {first} to {after}, {last:?}");
        assert_eq!((trainer.steps(), last.tokens), (150, 32));
    }
    Ok(())
}

/// The trainer computes logits at some places only; the loss on all of them is the same.
#[test]
fn sft_steps_by_the_loss_of_the_whole_batch() -> Result<()> {
    let (samples, model) = (texts(3, 5), model(4, 0.0)?);
    let batch = pad_sequences(&samples, 0, PaddingSide::Right)?;
    let (tokens, width) = (batch.inputs, batch.key_mask.dim(1)?);
    // The padded batch has a target at the place before it.
    let mask = batch.targets.ne_scalar(IGNORE_INDEX as f64)?.narrow(1, 0, width - 1)?;
    let mask = Tensor::cat(&[&mask.narrow(1, 0, 1)?.zeros_like()?, &mask], 1)?;
    let labels = mask_labels(&tokens, &mask)?;
    let logits = no_grad(|| model.forward(&tokens, Pass::default()))?;
    let expected = sft_loss(&logits, &labels, None)?.item_f64()?;
    let accuracy = token_accuracy(&logits, &labels)?;
    let other = copy(&model)?;
    let mut whole = SftTrainer::new(model, SftOptions { train: train(1e-3), ..Default::default() })?;
    let accumulated = TrainOptions { gradient_accumulation_steps: 3, ..train(1e-3) };
    let mut parts = SftTrainer::new(other, SftOptions { train: accumulated, ..Default::default() })?;
    assert!((whole.evaluate(&samples)? - expected).abs() < 1e-6);
    let (a, b) = (whole.step(&samples)?, parts.step(&samples)?);
    assert!((a.loss - expected).abs() < 1e-6 && (b.loss - expected).abs() < 1e-6 && (a.accuracy - accuracy).abs() < 1e-12);
    assert!((a.grad_norm - b.grad_norm).abs() < 1e-5 * a.grad_norm);
    Ok(())
}

#[test]
fn reward_model_learns_preferences() -> Result<()> {
    let reward = RewardModel::new(model(0, 0.0)?)?;
    assert!(reward.params().named("score.weight").is_some_and(|w| w.shape().dims() == [1, 32]));
    assert!(RewardModel::new(reward.backbone().clone()).is_err());
    let options = RewardOptions { train: train(1e-2), center_rewards_coefficient: Some(0.01) };
    let mut trainer = RewardTrainer::new(reward, options)?;
    let before = trainer.step(&pairs(0, 16))?.loss;
    for i in 1..80 {
        trainer.step(&pairs(i, 16))?;
    }
    let after = trainer.step(&pairs(100, 32))?;
    assert!(after.loss < 0.35 * before && after.margin > 1.0 && trainer.evaluate(&pairs(60, 64))? > 0.95, "{before}, {after:?}");
    // Neither what stands beside a text nor its padding has a part in its score.
    let (short, long) = (vec![1, 2, 3], vec![1, 2, 3, 4, 5, 6]);
    let (alone, beside) = (trainer.model().score(std::slice::from_ref(&short))?, trainer.model().score(&[short, long])?);
    assert!((alone[0] - beside[0]).abs() < 1e-5);
    let answers = [Completion { tokens: vec![2, 3], finished: true }];
    assert_eq!(trainer.model().score_completions(&[vec![1]], &answers)?, alone);
    let with = |margin| PreferencePair { margin, ..pairs(0, 1).remove(0) };
    assert!(trainer.step(&[with(Some(0.5)), with(None)]).unwrap_err().to_string().contains("1 of 2 pairs have a margin"));
    assert!(trainer.step(&[with(Some(0.5)), with(Some(1.0))])?.loss.is_finite());
    Ok(())
}

#[test]
fn reward_models_have_folders_in_the_reference_layout() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("kiln-reward-{}", std::process::id()));
    let (base, own) = (folder.join("base"), folder.join("reward"));
    let config = Gpt2Config { vocab_size: VOCAB, n_positions: 12, n_embd: 32, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
    let language_model = config.build(&Params::seeded(5))?;
    save_pretrained(&base, &CausalConfig::from(config), language_model.params(), 1 << 20)?;
    let (config, fresh) = load_for_tuning::<RewardConfig>(&base, &Params::seeded(6), |_| ())?;
    save_pretrained(&own, &config, fresh.params(), 1 << 20)?;
    let (_, again) = load_pretrained::<RewardConfig>(&own, &Params::seeded(7))?;
    let texts = prompts(8, 4);
    assert_eq!(fresh.score(&texts)?, again.score(&texts)?);
    assert!(fresh.score(&texts)?.iter().any(|score| *score != 0.0));
    let described = std::fs::read_to_string(own.join("config.json")).unwrap();
    assert!(described.contains("GPT2ForSequenceClassification") && described.contains("LABEL_0"), "{described}");
    // A language model's folder has no head for scores.
    assert!(load_pretrained::<RewardConfig>(&base, &Params::seeded(7)).is_err());
    std::fs::remove_dir_all(folder).unwrap();
    Ok(())
}

#[test]
fn dpo_learns_preferences() -> Result<()> {
    for loss in [DpoLoss::Sigmoid, DpoLoss::Ipo, DpoLoss::Hinge] {
        let policy = model(0, 0.0)?;
        let reference = copy(&policy)?;
        let options = DpoOptions { train: train(3e-3), loss: DpoLossOptions { loss, beta: 0.5, ..Default::default() } };
        let mut trainer = DpoTrainer::new(policy, Some(reference), options)?;
        let before = trainer.step(&pairs(0, 16))?;
        assert!(before.margin.abs() < 1e-5, "the policy starts as the reference: {before:?}");
        for i in 1..60 {
            trainer.step(&pairs(i, 16))?;
        }
        let after = trainer.step(&pairs(99, 32))?;
        assert!(after.loss < 0.5 * before.loss && after.accuracy > 0.95 && after.margin > 0.5, "{loss}: {before:?} to {after:?}");
        assert!(trainer.evaluate(&pairs(77, 64))? > 0.95);
    }
    Ok(())
}

/// A policy that is trained through an adapter is its own reference.
#[test]
fn adapters_are_trained_against_the_model_below() -> Result<()> {
    let options = || DpoOptions { train: train(1e-2), loss: DpoLossOptions { beta: 0.5, ..Default::default() } };
    let make = |seed| -> Result<(Arc<Decoder>, DpoTrainer)> {
        let policy = model(0, 0.0)?;
        let config = LoraConfig { r: 4, target_modules: ["c_attn", "c_fc"].into(), lora_dropout: 0.1, ..LoraConfig::default() };
        policy.params().generator().manual_seed(seed);
        let lora = Lora::attach(policy.params(), &config, policy.params().generator())?;
        let reference = WithoutAdapter::new(policy.clone(), Arc::new(lora));
        let train = TrainOptions { disable_dropout: false, ..options().train };
        Ok((policy.clone(), DpoTrainer::new(policy, Some(Arc::new(reference)), DpoOptions { train, ..options() })?))
    };
    let (policy, mut trainer) = make(1)?;
    let copied = |state: StateDict| state.iter().map(|(name, x)| Ok((name.clone(), x.copy()?))).collect::<Result<StateDict>>();
    let base = copied(policy.params().state_dict())?;
    let first = trainer.step(&pairs(0, 16))?;
    for i in 1..60 {
        trainer.step(&pairs(i, 16))?;
    }
    let last = trainer.step(&pairs(99, 32))?;
    assert!(first.margin.abs() < 1e-5 && last.accuracy > 0.9 && last.loss < 0.5 * first.loss, "{first:?} to {last:?}");
    equal(&base, &policy.params().state_dict());
    resumes(|seed| Ok(make(seed)?.1), |t, i| t.step(&pairs(i, 4)).map(drop), DpoTrainer::state_dict, DpoTrainer::load_state_dict)
}

#[test]
fn dpo_with_precomputed_references_is_the_same() -> Result<()> {
    let reference = model(5, 0.0)?;
    let make = |online: bool| {
        let online = online.then(|| reference.clone() as Arc<dyn CausalLm>);
        DpoTrainer::new(model(6, 0.0)?, online, DpoOptions { train: train(1e-3), ..Default::default() })
    };
    let plain = pairs(0, 6);
    let known: Vec<PreferencePair> = plain
        .iter()
        .zip(DpoTrainer::reference_log_probs(&*reference, &plain)?)
        .map(|(pair, reference)| PreferencePair { reference: Some(reference), ..pair.clone() })
        .collect();
    // Many texts go in several passes, to the same sums.
    let many: Vec<TokenSequence> = plain.iter().map(|pair| pair.rejected.clone()).cycle().take(70).collect();
    let sums = sequence_log_probs(&*reference, &many)?;
    assert!(sums.len() == 70 && sums.iter().zip(known.iter().cycle()).all(|(sum, pair)| (sum - pair.reference.unwrap()[1]).abs() < 1e-5));
    let (mut online, mut offline) = (make(true)?, make(false)?);
    let (a, b) = (online.step(&plain)?, offline.step(&known)?);
    assert_eq!((a.loss, a.margin), (b.loss, b.margin));
    assert!(offline.step(&plain).unwrap_err().to_string().contains("no reference log-probabilities"));
    Ok(())
}

fn grpo_options(lr: f64) -> GrpoOptions {
    let loss = GrpoLossOptions { max_completion_length: 4, ..Default::default() };
    GrpoOptions { train: train(lr), loss, ..Default::default() }
}

#[test]
fn grpo_raises_the_reward() -> Result<()> {
    let cases = [
        grpo_options(4e-3),
        GrpoOptions {
            loss: GrpoLossOptions {
                loss: GrpoLoss::DrGrpo,
                beta: 0.01,
                importance_sampling: ImportanceSampling::Sequence,
                ..grpo_options(0.0).loss
            },
            scale_rewards: RewardScale::None,
            num_iterations: 2,
            num_mini_batches: 2,
            ..grpo_options(4e-3)
        },
    ];
    for (rounds, options) in [50, 25].into_iter().zip(cases) {
        let policy = model(0, 0.0)?;
        let reference = copy(&policy)?;
        let mut trainer = GrpoTrainer::new(policy, Some(reference), options)?;
        let first = trainer.step(&prompts(0, 12), sample, judge)?;
        let mut last = first;
        for i in 1..rounds {
            last = trainer.step(&prompts(i, 12), sample, judge)?;
        }
        assert!(last.reward > first.reward + 0.4 && last.reward > 1.2, "{first:?} to {last:?}");
        assert!(last.finished > 0.8 && last.entropy < first.entropy);
    }
    Ok(())
}

#[test]
fn grpo_accumulates_and_masks() -> Result<()> {
    for loss in [GrpoLoss::Grpo, GrpoLoss::Bnpo, GrpoLoss::DrGrpo, GrpoLoss::Dapo] {
        let run = |parts| -> Result<GrpoMetrics> {
            let policy = model(3, 0.0)?;
            let base = grpo_options(1e-3);
            let loss = GrpoLossOptions { loss, beta: 0.1, ..base.loss };
            let train = TrainOptions { gradient_accumulation_steps: parts, ..base.train };
            let options = GrpoOptions { train, loss, mask_truncated_completions: true, num_generations: 4, ..base };
            GrpoTrainer::new(policy, Some(model(4, 0.0)?), options)?.step(&prompts(1, 4), sample, judge)
        };
        let (whole, parts) = (run(1)?, run(3)?);
        assert!(whole.grad_norm > 0.0 && (whole.grad_norm - parts.grad_norm).abs() < 1e-4 * whole.grad_norm, "{loss}: {whole:?} {parts:?}");
        assert!((whole.kl - parts.kl).abs() < 1e-6 && (whole.entropy - parts.entropy).abs() < 1e-6);
    }
    // Where every answer is cut off, and cut answers do not count, nothing is learned and nothing fails.
    let options = GrpoOptions { mask_truncated_completions: true, ..grpo_options(1e-3) };
    let mut trainer = GrpoTrainer::new(model(3, 0.0)?, None, options)?;
    let endless = |_: &dyn CausalLm, request: &RolloutRequest<'_>| {
        Ok(request.prompts.iter().map(|_| Completion { tokens: vec![1, 2], finished: false }).collect())
    };
    assert_eq!(trainer.step(&prompts(0, 2), endless, judge)?.loss, 0.0);
    assert_eq!(trainer.steps(), 0);
    Ok(())
}

fn ppo(seed: u64, options: PpoOptions) -> Result<PpoTrainer> {
    let policy = model(seed, 0.0)?;
    let reference = copy(&policy)?;
    PpoTrainer::new(policy, reference, ValueModel::new(model(seed + 1, 0.0)?)?, options)
}

fn ppo_options(lr: f64) -> PpoOptions {
    let train = TrainOptions { lr, ..PpoOptions::default().train };
    PpoOptions { train, kl: KlControl::Fixed(0.01), temperature: 1.0, response_length: 4, num_mini_batches: 2, ..Default::default() }
}

#[test]
fn ppo_raises_the_score() -> Result<()> {
    for seed in 0..3 {
        let mut trainer = ppo(10 * seed, PpoOptions { missing_eos_penalty: Some(0.5), seed, ..ppo_options(5e-3) })?;
        let mut round = |i| trainer.step(&prompts(100 * seed + i, 32), sample, judge);
        let first = round(0)?;
        let rounds = (1..18).map(&mut round).collect::<Result<Vec<_>>>()?;
        let last = &rounds[16];
        // One round has 32 answers: its score alone moves by a quarter.
        let score = rounds[13..].iter().map(|round| round.score).sum::<f64>() / 4.0;
        assert!(score > first.score + 0.4 && score > 1.05, "seed {seed}: {first:?} to {score}, {last:?}");
        assert!(last.kl > first.kl && last.finished > 0.8 && last.value_loss.is_finite());
        assert_eq!(trainer.steps(), 18 * 8);
    }
    Ok(())
}

#[test]
fn ppo_starts_at_the_reference_and_learns_its_values() -> Result<()> {
    let options = PpoOptions { num_ppo_epochs: 1, num_mini_batches: 1, ..ppo_options(1e-2) };
    let mut trainer = ppo(0, options)?;
    let first = trainer.step(&prompts(0, 16), sample, judge)?;
    assert!(first.kl.abs() < 1e-5 && first.approx_kl < 1e-10 && first.clip_fraction == 0.0, "{first:?}");
    assert!((first.reward - first.score).abs() < 1e-5);
    // The policy moved; the same scores for all leave it, but for the KL, while the values find them.
    let constant = |_: &[Vec<u32>], answers: &[Completion]| Ok(vec![1.0; answers.len()]);
    let mut trainer = ppo(0, PpoOptions { kl: KlControl::Fixed(0.0), value_lr: Some(2e-2), ..ppo_options(1e-4) })?;
    let losses: Vec<f64> = (0..30).map(|i| Ok(trainer.step(&prompts(i, 16), sample, constant)?.value_loss)).collect::<Result<_>>()?;
    assert!(losses[29] < 0.05 * losses[0], "{losses:?}");
    Ok(())
}

#[test]
fn ppo_moves_the_price_of_kl() -> Result<()> {
    let kl = KlControl::Adaptive { init: 0.1, target: 1.0, horizon: 64.0 };
    let mut trainer = ppo(0, PpoOptions { kl, ..ppo_options(1e-3) })?;
    trainer.step(&prompts(0, 16), sample, judge)?;
    // No KL at first: e = −0.2, 16 answers of 64.
    assert!((trainer.kl_coef() - 0.1 * (1.0 - 0.2 * 16.0 / 64.0)).abs() < 1e-12);
    assert!(ppo(0, PpoOptions { kl: KlControl::Adaptive { init: 0.1, target: 0.0, horizon: 1.0 }, ..ppo_options(1e-3) }).is_err());
    Ok(())
}

/// Autocast computes the same steps, but for rounding.
#[test]
fn steps_in_bf16() -> Result<()> {
    let train = |bf16| TrainOptions { bf16, ..train(1e-3) };
    let losses = |bf16| -> Result<[f64; 4]> {
        let reference = || -> Result<Arc<dyn CausalLm>> { Ok(model(1, 0.0)?) };
        let reward = RewardModel::new(model(0, 0.0)?)?;
        let mut reward = RewardTrainer::new(reward, RewardOptions { train: train(bf16), ..Default::default() })?;
        let mut dpo = DpoTrainer::new(model(0, 0.0)?, Some(reference()?), DpoOptions { train: train(bf16), ..Default::default() })?;
        let loss = GrpoLossOptions { beta: 0.5, ..grpo_options(0.0).loss };
        let options = GrpoOptions { train: train(bf16), loss, scale_rewards: RewardScale::None, ..grpo_options(0.0) };
        let mut grpo = GrpoTrainer::new(model(0, 0.0)?, Some(reference()?), options)?;
        let value = ValueModel::new(model(2, 0.0)?)?;
        let options = PpoOptions { train: train(bf16), kl: KlControl::Fixed(1.0), num_ppo_epochs: 1, ..ppo_options(0.0) };
        let mut ppo = PpoTrainer::new(model(0, 0.0)?, reference()?, value, options)?;
        // The rollout is given, so that both precisions judge the same answers.
        let fixed = |_: &dyn CausalLm, request: &RolloutRequest<'_>| {
            let answer = |i: usize| Completion { tokens: vec![i as u32 % 8, (i / 2) as u32 % 8, EOS], finished: true };
            Ok((0..request.prompts.len()).map(answer).collect::<Vec<_>>())
        };
        let pairs = pairs(0, 8);
        let (reward, dpo) = (reward.step(&pairs)?.loss, dpo.step(&pairs)?.loss);
        Ok([reward, dpo, grpo.step(&prompts(0, 2), fixed, judge)?.loss, ppo.step(&prompts(0, 8), fixed, judge)?.value_loss])
    };
    let (full, half) = (losses(false)?, losses(true)?);
    for (i, (full, half)) in full.iter().zip(half).enumerate() {
        assert!(*full != half && (full - half).abs() < 0.03 * (1.0 + full.abs()), "{i}: {full} {half}");
    }
    Ok(())
}

#[test]
fn runs_resume_bit_for_bit() -> Result<()> {
    let schedule = linear_decay(10, 2);
    let train = || TrainOptions { schedule: schedule.clone(), disable_dropout: false, gradient_accumulation_steps: 2, ..train(1e-2) };
    resumes(
        |seed| SftTrainer::new(model(seed, 0.2)?, SftOptions { train: train(), ..Default::default() }),
        |t, i| t.step(&texts(i, 6)).map(drop),
        SftTrainer::state_dict,
        SftTrainer::load_state_dict,
    )?;
    resumes(
        |seed| RewardTrainer::new(RewardModel::new(model(seed, 0.2)?)?, RewardOptions { train: train(), ..Default::default() }),
        |t, i| t.step(&pairs(i, 6)).map(drop),
        RewardTrainer::state_dict,
        RewardTrainer::load_state_dict,
    )?;
    let reference = model(9, 0.0)?;
    resumes(
        |seed| DpoTrainer::new(model(seed, 0.2)?, Some(reference.clone()), DpoOptions { train: train(), ..Default::default() }),
        |t, i| t.step(&pairs(i, 6)).map(drop),
        DpoTrainer::state_dict,
        DpoTrainer::load_state_dict,
    )?;
    resumes(
        |seed| {
            let base = grpo_options(1e-2);
            let loss = GrpoLossOptions { beta: 0.1, ..base.loss };
            let options = GrpoOptions { train: train(), loss, num_generations: 2, num_mini_batches: 2, seed, ..base };
            GrpoTrainer::new(model(seed, 0.2)?, Some(reference.clone()), options)
        },
        |t, i| t.step(&prompts(i, 4), sample, judge).map(drop),
        GrpoTrainer::state_dict,
        GrpoTrainer::load_state_dict,
    )?;
    resumes(
        |seed| {
            let kl = KlControl::Adaptive { init: 0.1, target: 1.0, horizon: 64.0 };
            let options = PpoOptions { train: train(), kl, seed, num_ppo_epochs: 2, ..ppo_options(1e-2) };
            PpoTrainer::new(model(seed, 0.2)?, reference.clone(), ValueModel::new(model(seed + 10, 0.2)?)?, options)
        },
        |t, i| t.step(&prompts(i, 6), sample, judge).map(drop),
        PpoTrainer::state_dict,
        PpoTrainer::load_state_dict,
    )
}

#[test]
fn misuse_is_an_error_that_says_what_is_wrong() -> Result<()> {
    fn fails<T>(result: Result<T>, words: &str) {
        let text = result.err().map(|e: Error| e.to_string()).unwrap_or_else(|| panic!("no error says {words:?}"));
        assert!(text.contains(words), "{text:?} says nothing of {words:?}");
    }
    let mut sft = SftTrainer::new(model(0, 0.0)?, SftOptions::default())?;
    // A part of a batch may have nothing to learn.
    let accumulated = TrainOptions { gradient_accumulation_steps: 2, ..train(1e-3) };
    let mut parts = SftTrainer::new(model(0, 0.0)?, SftOptions { train: accumulated, ..Default::default() })?;
    assert_eq!(parts.step(&[TokenSequence::completion(&[1, 2], &[]), TokenSequence::completion(&[1], &[2, 3])])?.tokens, 2);
    fails(sft.step(&[]), "no token of the batch counts");
    fails(sft.step(&[TokenSequence::completion(&[1, 2], &[])]), "no token of the batch counts");
    fails(sft.step(&[TokenSequence::new(vec![1, 2]), TokenSequence::default()]), "text 1 has no tokens");
    fails(sft.step(&[TokenSequence::completion(&[1], &[u32::MAX])]), "4294967295");
    fails(sft.step(&[TokenSequence::completion(&[1; 12], &[2])]), "context");
    assert_eq!(sft.step(&[TokenSequence::completion(&[1; 12], &[2; 4]).truncated(12), TokenSequence::completion(&[1], &[2])])?.tokens, 1);
    let frozen = model(0, 0.0)?;
    frozen.params().freeze("*")?;
    fails(SftTrainer::new(frozen, SftOptions::default()), "all parameters of the model are frozen");
    let mut dpo = DpoTrainer::new(model(0, 0.0)?, None, DpoOptions::default())?;
    fails(dpo.step(&[]), "no pairs");
    fails(
        dpo.step(&[PreferencePair { chosen: TokenSequence::completion(&[1], &[]), ..pairs(0, 1).remove(0) }]),
        "pair 0 has no token that counts",
    );
    let mut reward = RewardTrainer::new(RewardModel::new(model(0, 0.0)?)?, RewardOptions::default())?;
    fails(reward.step(&[]), "no pairs");
    fails(reward.evaluate(&[]), "no pairs");
    fails(reward.model().score(&[vec![]]), "text 0 has no tokens");
    let with_beta = GrpoOptions { loss: GrpoLossOptions { beta: 0.1, ..Default::default() }, ..Default::default() };
    fails(GrpoTrainer::new(model(0, 0.0)?, None, with_beta), "needs a reference");
    fails(GrpoTrainer::new(model(0, 0.0)?, None, GrpoOptions { num_generations: 1, ..Default::default() }), "two answers or more");
    fails(GrpoTrainer::new(model(0, 0.0)?, None, GrpoOptions { temperature: 0.0, ..Default::default() }), "temperature = 0");
    let mut grpo = GrpoTrainer::new(model(0, 0.0)?, None, grpo_options(1e-3))?;
    fails(grpo.step(&[], sample, judge), "there are no prompts");
    fails(grpo.step(&[vec![]], sample, judge), "prompt 0 is empty");
    fails(grpo.step(&[vec![1]], |_, _| Ok(Vec::new()), judge), "0 answers were generated for 8 prompts");
    fails(grpo.step(&[vec![1]], sample, |_, _| Ok(vec![1.0])), "1 scores were given for 8 answers");
    fails(grpo.step(&[vec![1]], sample, |_, answers| Ok(vec![f64::NAN; answers.len()])), "the score of answer 0 is NaN");
    let empty = |_: &dyn CausalLm, request: &RolloutRequest<'_>| Ok(vec![Completion::default(); request.prompts.len()]);
    fails(ppo(0, ppo_options(1e-3))?.step(&[vec![1]], empty, judge), "no answer has a token");
    Ok(())
}
