//! Generation against transformers' on tiny random models, and what holds for any model: batches, caches, seeds, bad input.

use kiln_autograd::no_grad;
use kiln_models::generate::{EarlyStopping, FinishReason, Generate, Generation, GenerationConfig, LogitsProcessor, Place, Processors};
use kiln_models::generate::{TextStream, generate, generate_seq2seq, generate_speculative, stop_at_text};
use kiln_models::nn::Params;
use kiln_models::text::{SpecialTokens, train_bpe};
use kiln_models::transformer::{CausalLm, Decoder, Gpt2Config, KvCache, Pass, load, load_seq2seq};
use kiln_tensor::{DType, Result, Tensor};
use serde_json::Value;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/generate").join(name)
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name)).expect("the fixture is there");
    serde_json::from_str(&text).expect("the fixture is JSON")
}

/// The model of a fixture; training mode is left on, for generation to see to it.
fn model(kind: &str) -> Result<Decoder> {
    Ok(load(fixture(kind), &Params::new())?.1)
}

/// A fresh GPT-2 with wide weights, so that distributions are sharp.
fn gpt2(seed: u64, vocab_size: usize, n_positions: usize) -> Result<Decoder> {
    let config = Gpt2Config { vocab_size, n_positions, n_embd: 16, n_layer: 2, n_head: 2, initializer_range: 0.3, ..Gpt2Config::default() };
    config.build(&Params::seeded(seed))
}

fn tokens(value: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(value.clone()).expect("lists of tokens")
}

/// Compares with transformers' answers in the cases of `kind` for which `wanted` holds.
fn compare(
    kind: &str,
    wanted: impl Fn(&GenerationConfig) -> bool,
    answer: impl Fn(&[Vec<u32>], &GenerationConfig) -> Result<Vec<Generation>>,
) -> Result<usize> {
    let mut compared = 0;
    for case in json(&format!("{kind}/answers.json")).as_array().expect("cases") {
        let config = GenerationConfig::from_json(&case["config"].to_string())?;
        if !wanted(&config) {
            continue;
        }
        let answers = answer(&tokens(&case["prompts"]), &config)?;
        let ours: Vec<_> = answers.iter().map(|answer| answer.tokens.clone()).collect();
        assert_eq!(ours, tokens(&case["answers"]), "{kind}: {}", case["config"]);
        for (answer, score) in answers.iter().zip(case["scores"].as_array().into_iter().flatten()) {
            let (ours, theirs) = (f64::from(answer.score.unwrap_or(f32::NAN)), score.as_f64().unwrap_or(0.0));
            assert!((ours - theirs).abs() < 1e-4 * theirs.abs().max(1.0), "{kind}: {}: {ours} {theirs}", case["config"]);
        }
        compared += 1;
    }
    Ok(compared)
}

#[test]
fn greedy_answers_are_those_of_transformers() -> Result<()> {
    for (kind, count) in [("gpt2", 11), ("llama", 11), ("mistral", 3)] {
        let model = model(kind)?;
        assert_eq!(compare(kind, |config| config.num_beams == 1, |prompts, config| generate(&model, prompts, config))?, count);
    }
    Ok(())
}

#[test]
fn beams_are_those_of_transformers() -> Result<()> {
    for (kind, count) in [("gpt2", 21), ("llama", 21), ("mistral", 3)] {
        let model = model(kind)?;
        assert_eq!(compare(kind, |config| config.num_beams > 1, |prompts, config| generate(&model, prompts, config))?, count);
    }
    Ok(())
}

#[test]
fn translations_are_those_of_transformers() -> Result<()> {
    for kind in ["m2m100", "t5"] {
        let (_, model) = load_seq2seq(fixture(kind), &Params::new())?;
        let answer = |sources: &[Vec<u32>], config: &GenerationConfig| generate_seq2seq(&model, sources, config);
        assert_eq!(compare(kind, |_| true, answer)?, 5);
        let config = GenerationConfig {
            max_new_tokens: Some(4),
            num_return_sequences: 3,
            do_sample: true,
            temperature: 9.0,
            ..GenerationConfig::default()
        };
        let drawn = generate_seq2seq(&model, &[vec![4, 5], vec![6]], &config)?;
        assert!(drawn.len() == 6 && drawn[3..].iter().any(|answer| answer.tokens != drawn[3].tokens));
        for (sources, named) in [(vec![vec![]], "source 0 is empty"), (vec![vec![1], vec![40]], "source 1: token 40")] {
            let error = generate_seq2seq(&model, &sources, &config).expect_err(named).to_string();
            assert!(error.contains(named), "{error}");
        }
    }
    Ok(())
}

#[test]
fn processors_are_those_of_transformers() -> Result<()> {
    let file = json("processors.json");
    let rows = |value: &Value| -> Vec<Vec<f32>> {
        let rows: Vec<Vec<Option<f32>>> = serde_json::from_value(value.clone()).expect("rows");
        rows.into_iter().map(|row| row.into_iter().map(|v| v.unwrap_or(f32::NEG_INFINITY)).collect()).collect()
    };
    let check = |fields: Value, after: &Value, what: &str| -> Result<()> {
        let mut config = GenerationConfig::from_json(&fields.to_string())?;
        config.do_sample = true;
        config.eos_token_id = if what == "min_new_tokens" { vec![1, 2] } else { vec![1] };
        let processors = Processors::new(&config);
        for ((context, mut row), after) in tokens(&file["tokens"]).iter().zip(rows(&file["before"])).zip(rows(after)) {
            let prompt_len = if what == "begin_suppress_tokens" { 9 } else { 4 };
            processors.process(Place { tokens: context, prompt_len, limit: 20 }, &mut row)?;
            assert!(row.iter().any(|logit| logit.is_finite()));
            for (ours, theirs) in row.iter().zip(&after) {
                assert!(ours == theirs || (ours - theirs).abs() < 1e-6 * theirs.abs().max(1.0), "{what}: {ours} for {theirs}");
            }
        }
        Ok(())
    };
    for single in file["single"].as_array().expect("cases") {
        let field = single["field"].as_str().expect("a name");
        check(serde_json::json!({field: single["value"]}), &single["after"], field)?;
    }
    check(file["chain"].clone(), &file["chain_after"], "the chain")
}

#[test]
fn log_probabilities_are_those_of_the_uncached_model() -> Result<()> {
    let model = model("gpt2")?;
    let prompts = [vec![3u32, 8, 1], vec![7; 9], vec![20]];
    let config = GenerationConfig { max_new_tokens: Some(8), do_sample: true, temperature: 0.7, seed: 3, ..GenerationConfig::default() };
    let answers = generate(&model, &prompts, &config)?;
    model.params().eval();
    for (prompt, answer) in prompts.iter().zip(&answers) {
        let all: Vec<i64> = prompt.iter().chain(&answer.tokens).map(|&token| i64::from(token)).collect();
        let logits = model.forward(&Tensor::from_vec(all.clone(), [1, all.len()])?, Pass::default())?;
        for (temperature, ours) in [(1.0, &answer.logprobs), (0.7, &answer.scaled_logprobs)] {
            let table = logits.div_scalar(temperature)?.log_softmax(-1)?.to_vec::<f32>()?;
            for (i, ours) in ours.iter().enumerate() {
                let at = prompt.len() + i;
                let theirs = table[(at - 1) * 40 + all[at] as usize];
                assert!((ours - theirs).abs() < 1e-4, "{temperature} {i}: {ours} {theirs}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_prompt_is_answered_in_a_batch_as_alone() -> Result<()> {
    let model = model("llama")?;
    let prompts = [vec![3u32, 8, 1, 4, 4], vec![7], vec![20, 21], vec![9, 9, 2]];
    let config = GenerationConfig {
        max_new_tokens: Some(20),
        do_sample: true,
        temperature: 1.3,
        top_k: Some(20),
        eos_token_id: vec![4, 5, 6],
        num_return_sequences: 2,
        seed: 11,
        ..GenerationConfig::default()
    };
    let together = generate(&model, &prompts, &config)?;
    assert!(together.iter().any(|answer| answer.finish == FinishReason::Eos && answer.tokens.len() < 10));
    for (i, prompt) in prompts.iter().enumerate() {
        let config = GenerationConfig { first_row: 2 * i as u64, ..config.clone() };
        let alone = generate(&model, std::slice::from_ref(prompt), &config)?;
        for (alone, together) in alone.iter().zip(&together[2 * i..]) {
            assert_eq!(alone.tokens, together.tokens, "prompt {i}");
            assert_eq!(alone.finish, together.finish);
        }
        assert_ne!(alone[0].tokens, alone[1].tokens, "draws of one prompt differ");
    }
    Ok(())
}

#[test]
fn a_seed_gives_the_same_tokens_for_any_number_of_threads() -> Result<()> {
    let model = gpt2(1, 40, 64)?;
    let config = GenerationConfig { max_new_tokens: Some(12), do_sample: true, seed: 5, ..GenerationConfig::default() };
    let run = |threads: usize, seed: u64| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| generate(&model, &[vec![1, 2, 3], vec![4]], &GenerationConfig { seed, ..config.clone() }))
    };
    let once = run(1, 5)?;
    assert_eq!(once, run(2, 5)?);
    assert_eq!(once, run(3, 5)?);
    assert_ne!(once, run(1, 6)?);
    Ok(())
}

#[test]
fn training_mode_and_recording_come_back() -> Result<()> {
    let model = gpt2(2, 20, 16)?;
    let config = GenerationConfig { max_new_tokens: Some(3), ..GenerationConfig::default() };
    assert!(model.params().mode().is_training());
    let first = generate(&model, &[vec![1, 2]], &config)?;
    assert!(model.params().mode().is_training());
    // Dropout of 0.1 would change the log-probabilities.
    assert_eq!(first, generate(&model, &[vec![1, 2]], &config)?);
    model.params().eval();
    generate(&model, &[vec![1, 2]], &config)?;
    assert!(!model.params().mode().is_training());
    let logits = model.forward(&Tensor::from_vec(vec![1i64, 2], [1, 2])?, Pass::default())?;
    assert!(logits.is_tracked());
    Ok(())
}

#[test]
fn stop_sequences_and_rules_end_an_answer() -> Result<()> {
    let model = model("gpt2")?;
    let prompt = [vec![5u32, 9, 2]];
    let base = GenerationConfig { max_new_tokens: Some(14), ..GenerationConfig::default() };
    let whole = generate(&model, &prompt, &base)?.remove(0);
    assert_eq!((whole.finish, whole.tokens.len()), (FinishReason::Length, 14));
    let end = whole.tokens[4..7].to_vec();
    let at = whole.tokens.windows(3).position(|run| run == end).map(|start| start + 3).expect("it is there");
    let stopped = generate(&model, &prompt, &GenerationConfig { stop_sequences: vec![end], ..base.clone() })?.remove(0);
    assert_eq!((stopped.finish, &stopped.tokens[..]), (FinishReason::Stop, &whole.tokens[..at]));
    let ruled = Generate::new(&model, &prompt, &base)?.stop_when(|row, new| Ok(row == 0 && new.len() == 6)).collect_all()?.remove(0);
    assert_eq!((ruled.finish, &ruled.tokens[..]), (FinishReason::Stop, &whole.tokens[..6]));
    Ok(())
}

#[test]
fn text_streams_and_stops_inside_of_tokens() -> Result<()> {
    let corpus = "the cat sat on the mat, naïve café; the dog sat on the log. ".repeat(20);
    let tokenizer = train_bpe([corpus.as_str()], 300, &["<|end|>"])?;
    let model = gpt2(12, tokenizer.vocab_size(), 64)?;
    let config = GenerationConfig { max_new_tokens: Some(30), do_sample: true, seed: 4, ..GenerationConfig::default() };
    let prompt = tokenizer.encode("the cat")?;
    let answer = generate(&model, std::slice::from_ref(&prompt), &config)?.remove(0);
    let whole = tokenizer.decode(&answer.tokens, true)?;
    let mut stream = TextStream::new(&model, &tokenizer, "the cat", &config, &[])?;
    let pieces = stream.by_ref().collect::<Result<Vec<_>>>()?;
    assert!(pieces.len() > 10 && pieces.concat() == whole, "{pieces:?} {whole}");
    assert_eq!((stream.tokens(), stream.finish_reason()), (30, Some(FinishReason::Length)));
    // Three characters from the middle of the text, wherever the tokens end.
    let stop: String = whole.chars().skip(whole.chars().count() / 2).take(3).collect();
    let before = whole.split(&stop).next().unwrap_or_default();
    let mut stream = TextStream::new(&model, &tokenizer, "the cat", &config, std::slice::from_ref(&stop))?;
    assert_eq!(stream.by_ref().collect::<Result<String>>()?, before);
    assert_eq!(stream.finish_reason(), Some(FinishReason::Stop));
    let rule = stop_at_text(&tokenizer, std::slice::from_ref(&stop))?;
    let ruled = Generate::new(&model, &[prompt.clone(), prompt], &config)?.stop_when(rule).collect_all()?;
    assert_eq!(ruled[0].finish, FinishReason::Stop);
    assert_eq!(ruled[0].tokens.len(), stream.tokens());
    assert!(tokenizer.decode(&ruled[0].tokens, false)?.contains(&stop));
    Ok(())
}

#[test]
fn special_tokens_end_text_streams() -> Result<()> {
    let corpus = "the cat sat on the mat; the dog sat on the log. ".repeat(20);
    let tokenizer = train_bpe([corpus.as_str()], 300, &["<|end|>", "<|turn|>"])?;
    let specials = ["<|end|>", "<|turn|>"].map(|token| tokenizer.token_to_id(token).expect("it was trained with it"));
    let model = gpt2(12, tokenizer.vocab_size(), 64)?;
    // Whole characters, and both of these often.
    let is_part = |token: &u32| tokenizer.decode(&[*token], false).map_or(true, |text| text.contains(char::REPLACEMENT_CHARACTER));
    let config = GenerationConfig {
        max_new_tokens: Some(30),
        do_sample: true,
        logit_bias: specials.map(|token| (token, 4.0)).into(),
        suppress_tokens: (0..tokenizer.vocab_size() as u32).filter(is_part).collect(),
        ..GenerationConfig::default()
    };
    let prompt = tokenizer.encode("the cat")?;
    // A token that never comes, so that the tokenizer's own do not end the answer.
    let never = [config.suppress_tokens[0]];
    let whole = |seed| -> Result<Vec<u32>> {
        let config = GenerationConfig { seed, eos_token_id: never.to_vec(), ..config.clone() };
        Ok(generate(&model, std::slice::from_ref(&prompt), &config)?.remove(0).tokens)
    };
    let answer = |eos: &[u32], seed: u64, stop: &[String]| -> Result<(String, usize, Option<FinishReason>)> {
        let config = GenerationConfig { seed, eos_token_id: eos.to_vec(), ..config.clone() };
        let named = SpecialTokens { eos: specials.to_vec(), ..tokenizer.special_tokens().clone() };
        let tokenizer = tokenizer.clone().with_special_tokens(named)?;
        let mut stream = TextStream::new(&model, &tokenizer, "the cat", &config, stop)?;
        Ok((stream.by_ref().collect::<Result<String>>()?, stream.tokens(), stream.finish_reason()))
    };
    let mut seen = 0;
    for seed in 0..20 {
        let tokens = whole(seed)?;
        let [Some(end), Some(turn)] = specials.map(|token| tokens.iter().position(|&t| t == token)) else { continue };
        seen += 1;
        let text = |count: usize| tokenizer.decode(&tokens[..count], true);
        // Any of the tokenizer's end tokens.
        let place = end.min(turn);
        assert_eq!(answer(&[], seed, &[])?, (text(place)?, place + 1, Some(FinishReason::Eos)));
        // A special token as a stop string, alone and with what is before it.
        let place = turn;
        assert_eq!(answer(&never, seed, &["<|turn|>".into()])?, (text(place)?, place + 1, Some(FinishReason::Stop)));
        let before = tokenizer.decode(&tokens[..place], false)?;
        if let Some(last) = before.chars().last().filter(|&last| last != '>').map(String::from) {
            let (shown, count, finish) = answer(&never, seed, &[format!("{last}<|turn|>")])?;
            assert_eq!((count, finish), (place + 1, Some(FinishReason::Stop)));
            assert_eq!(shown + &last, text(place)?);
        }
    }
    assert!(seen > 3, "{seen} answers hold both");
    Ok(())
}

#[test]
fn the_least_length_and_the_forced_beginning_are_kept() -> Result<()> {
    let process = |config: &GenerationConfig, tokens: &[u32], prompt_len: usize| -> Result<Vec<f32>> {
        let mut row = vec![0.0; 8];
        Processors::new(config).process(Place { tokens, prompt_len, limit: 20 }, &mut row)?;
        Ok(row)
    };
    let config = GenerationConfig { min_length: 4, eos_token_id: vec![2, 5], ..GenerationConfig::default() };
    for (tokens, is_open) in [(vec![1, 1, 1], false), (vec![1; 4], true)] {
        let row = process(&config, &tokens, 2)?;
        assert!([2, 5].iter().all(|&token| row[token].is_finite() == is_open) && row[3] == 0.0, "{row:?}");
    }
    // Behind the forced token, as in the reference; with a longer prompt nothing is forced.
    let config = GenerationConfig { forced_bos_token_id: Some(6), begin_suppress_tokens: vec![3, 6], ..GenerationConfig::default() };
    assert!(process(&config, &[1], 1)?.iter().enumerate().all(|(token, logit)| logit.is_finite() == (token == 6)));
    for (tokens, prompt_len, suppressed) in [(vec![1, 6], 1, true), (vec![1, 6, 4], 1, false), (vec![1, 4], 2, true)] {
        let row = process(&config, &tokens, prompt_len)?;
        assert_eq!([3, 6].map(|token: usize| row[token].is_finite()), [!suppressed; 2], "{tokens:?} after {prompt_len}");
    }
    Ok(())
}

#[test]
fn the_context_bounds_an_answer() -> Result<()> {
    let model = gpt2(3, 20, 16)?;
    let config = GenerationConfig { max_new_tokens: Some(usize::MAX), ..GenerationConfig::default() };
    let answers = generate(&model, &[vec![1; 10], vec![2; 3], vec![3; 15]], &config)?;
    assert_eq!(answers.iter().map(|answer| answer.tokens.len()).collect::<Vec<_>>(), [6, 13, 1]);
    assert!(answers.iter().all(|answer| answer.finish == FinishReason::Length));
    Ok(())
}

#[test]
fn a_processor_of_ones_own_takes_part() -> Result<()> {
    let model = gpt2(4, 20, 16)?;
    let config = GenerationConfig { max_new_tokens: Some(4), ..GenerationConfig::default() };
    let only_even = |_: Place<'_>, logits: &mut [f32]| {
        logits.iter_mut().skip(1).step_by(2).for_each(|logit| *logit = f32::NEG_INFINITY);
        Ok(())
    };
    let answers = Generate::new(&model, &[vec![1], vec![3]], &config)?.with_processor(only_even).collect_all()?;
    assert!(answers.iter().flat_map(|answer| &answer.tokens).all(|token| token % 2 == 0));
    Ok(())
}

#[test]
fn half_precision_generates_too() -> Result<()> {
    let model = gpt2(5, 20, 32)?;
    let config = GenerationConfig { max_new_tokens: Some(6), ..GenerationConfig::default() };
    let prompts = [vec![1u32, 2, 3], vec![4]];
    let full = generate(&model, &prompts, &config)?;
    let cast = kiln_tensor::autocast(DType::BF16, || generate(&model, &prompts, &config))??;
    model.params().to_dtype(DType::BF16)?;
    let half = generate(&model, &prompts, &config)?;
    for ((full, half), cast) in full.iter().zip(&half).zip(&cast) {
        assert!((full.logprobs[0] - half.logprobs[0]).abs() < 0.1 && (full.logprobs[0] - cast.logprobs[0]).abs() < 0.1);
        assert_eq!((half.tokens.len(), cast.tokens.len()), (6, 6));
    }
    Ok(())
}

#[test]
fn a_sliding_cache_holds_two_windows_and_gives_what_none_gives() -> Result<()> {
    let model = model("mistral")?;
    model.params().eval();
    let window = model.attention_span().expect("all layers look through a window");
    assert_eq!((window, self::model("llama")?.attention_span()), (5, None));
    let tokens = Tensor::randint(0, 40, [2, 50])?;
    no_grad(|| {
        let whole = model.forward(&tokens, Pass::default())?;
        let mut cache = KvCache::windowed(model.shape(), 2, window, 2 * window, ())?;
        let (mut parts, mut from) = (Vec::new(), 0);
        for len in [1, 3, 6, 1, 6, 2, 4].into_iter().chain(std::iter::repeat_n(1, 27)) {
            parts.push(model.forward(&tokens.narrow(1, from, len)?, Pass::cached(&mut cache))?);
            from += len;
            assert!(cache.len() <= 10 && cache.seen() == from);
        }
        let difference = Tensor::cat(&parts, 1)?.sub(&whole)?.abs()?.max(())?.item_f64()?;
        assert!(from == 50 && difference < 1e-4, "{from} {difference}");
        assert!(model.forward(&tokens.narrow(1, 0, 7)?, Pass::cached(&mut cache)).is_err(), "7 tokens and the 4 before are more than 10");
        assert!(KvCache::windowed(model.shape(), 2, window, 4, ()).is_err());
        Ok(())
    })
}

#[test]
fn speculation_changes_nothing_of_a_greedy_answer() -> Result<()> {
    for (kind, len) in [("gpt2", 40), ("mistral", 55)] {
        let (target, draft) = (model(kind)?, gpt2(8, 40, 32)?);
        let config =
            GenerationConfig { max_length: Some(len), repetition_penalty: 1.1, eos_token_id: vec![2], ..GenerationConfig::default() };
        for prompt in [vec![5u32, 9, 2], vec![7], (0..20).collect()] {
            let alone = generate(&target, std::slice::from_ref(&prompt), &config)?.remove(0);
            for count in [1, 4, 100] {
                let guessed = generate_speculative(&target, &draft, &prompt, &config, count)?;
                assert_eq!(guessed.generation.tokens, alone.tokens, "{kind} {count}");
                assert_eq!(guessed.generation.finish, alone.finish);
                for (guessed, alone) in guessed.generation.logprobs.iter().zip(&alone.logprobs) {
                    assert!((guessed - alone).abs() < 1e-3, "{guessed} {alone}");
                }
                assert!(guessed.proposed > 0 && guessed.accepted < guessed.proposed.max(4), "{guessed:?}");
                let own = generate_speculative(&target, &target, &prompt, &config, count)?;
                assert_eq!((own.generation.tokens, own.accepted), (alone.tokens.clone(), own.proposed));
            }
        }
    }
    let (target, other) = (model("gpt2")?, gpt2(8, 30, 32)?);
    for (draft, count, named) in [(&other, 4, "30 tokens"), (&target, 0, "num_draft_tokens")] {
        let error = generate_speculative(&target, draft, &[1], &GenerationConfig::default(), count).expect_err(named).to_string();
        assert!(error.contains(named), "{error}");
    }
    Ok(())
}

const DICE: usize = 5;

/// χ² of how often each pair of tokens came first, against the probabilities that `model` gives it at `temperature`; 24 degrees of freedom.
fn chi_square(model: &Decoder, prompt: &[u32], temperature: f64, pairs: &[Vec<u32>]) -> Result<f64> {
    let rows = (0..DICE as i64).flat_map(|first| prompt.iter().map(|&token| i64::from(token)).chain([first])).collect();
    let logits = no_grad(|| model.forward(&Tensor::from_vec(rows, [DICE, prompt.len() + 1])?, Pass::default()))?;
    let table = logits.div_scalar(temperature)?.softmax(-1)?.to_vec::<f32>()?;
    let at = |row: usize, place: usize, token: usize| f64::from(table[(row * (prompt.len() + 1) + place) * DICE + token]);
    let mut sum = 0.0;
    for first in 0..DICE {
        for second in 0..DICE {
            let expected = at(first, prompt.len() - 1, first) * at(first, prompt.len(), second) * pairs.len() as f64;
            let seen = pairs.iter().filter(|pair| pair[..2] == [first as u32, second as u32]).count() as f64;
            sum += (seen - expected).powi(2) / expected;
        }
    }
    Ok(sum)
}

/// Of 24 degrees of freedom, exceeded with a probability of 1e-4.
const CHI_SQUARE_LIMIT: f64 = 60.0;

#[test]
fn draws_follow_the_distribution() -> Result<()> {
    let model = gpt2(10, DICE, 16)?;
    let config = GenerationConfig {
        max_new_tokens: Some(2),
        do_sample: true,
        temperature: 0.9,
        num_return_sequences: 4000,
        ..GenerationConfig::default()
    };
    let pairs: Vec<_> = generate(&model, &[vec![1, 3]], &config)?.into_iter().map(|answer| answer.tokens).collect();
    model.params().eval();
    let statistic = chi_square(&model, &[1, 3], 0.9, &pairs)?;
    assert!(statistic < CHI_SQUARE_LIMIT, "{statistic}");
    Ok(())
}

#[test]
fn speculation_does_not_change_the_distribution() -> Result<()> {
    let (target, draft) = (gpt2(10, DICE, 16)?, gpt2(11, DICE, 16)?);
    let (mut pairs, mut accepted, mut proposed) = (Vec::new(), 0, 0);
    for seed in 0..1000 {
        let config = GenerationConfig { max_new_tokens: Some(3), do_sample: true, temperature: 0.9, seed, ..GenerationConfig::default() };
        let drawn = generate_speculative(&target, &draft, &[1, 3], &config, 2)?;
        (accepted, proposed) = (accepted + drawn.accepted, proposed + drawn.proposed);
        pairs.push(drawn.generation.tokens);
    }
    target.params().eval();
    let statistic = chi_square(&target, &[1, 3], 0.9, &pairs)?;
    let rate = f64::from(accepted as u32) / f64::from(proposed as u32);
    assert!(statistic < CHI_SQUARE_LIMIT, "{statistic}");
    // Both acceptance and rejection have had their part.
    assert!((0.2..0.95).contains(&rate), "{rate}");
    Ok(())
}

#[test]
fn configurations_are_read_and_written() -> Result<()> {
    let text = r#"{"eos_token_id": [1, 2], "pad_token_id": null, "top_p": 0.9, "early_stopping": "never", "transformers_version": "5.0",
        "typical_p": 1.0, "logit_bias": {"7": -1.5}, "sequence_bias": [[[3, 4], 2.0]], "do_sample": true}"#;
    let config = GenerationConfig::from_json(text)?;
    assert_eq!((config.early_stopping, &config.eos_token_id[..]), (EarlyStopping::Never, &[1, 2][..]));
    assert_eq!((config.logit_bias.get(&7), config.sequence_bias.len(), config.num_beams), (Some(&-1.5), 1, 1));
    let off = r#"{"renormalize_logits": false, "remove_invalid_values": false, "force_words_ids": [], "guidance_scale": 1.0}"#;
    assert_eq!(GenerationConfig::from_json(off)?, GenerationConfig::default());
    let again = serde_json::to_string(&config).expect("it can be written");
    assert_eq!(GenerationConfig::from_json(&again)?, config);
    assert_eq!(GenerationConfig::from_json(r#"{"eos_token_id": 50256}"#)?.eos_token_id, [50256]);
    for (text, named) in [
        (r#"{"typical_p": 0.5}"#, "typical_p"),
        (r#"{"stop_strings": ["\n"]}"#, "stop_strings"),
        (r#"{"renormalize_logits": true}"#, "renormalize_logits"),
        (r#"{"force_words_ids": [[[5]]]}"#, "force_words_ids"),
        (r#"{"max_time": 3.0}"#, "max_time"),
        (r#"{"early_stopping": "soon"}"#, "early_stopping"),
        (r#"{"top_k": -3}"#, "generation_config"),
        ("[]", "object"),
        ("{", "generation_config"),
    ] {
        let error = GenerationConfig::from_json(text).expect_err(text).to_string();
        assert!(error.contains(named), "{error}");
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let model = gpt2(6, 20, 16)?;
    let base = GenerationConfig { max_new_tokens: Some(2), ..GenerationConfig::default() };
    let refused = |prompts: &[Vec<u32>], config: GenerationConfig, named: &str| {
        let error = generate(&model, prompts, &config).expect_err(named).to_string();
        assert!(error.contains(named), "{named}: {error}");
    };
    refused(&[], base.clone(), "no prompt");
    refused(&[vec![1], vec![]], base.clone(), "prompt 1 is empty");
    refused(&[vec![1, 20]], base.clone(), "token 20 at place 1");
    refused(&[vec![1; 16]], base.clone(), "context of 16");
    let prompt = [vec![1u32]];
    let sampling = GenerationConfig { do_sample: true, ..base.clone() };
    refused(&prompt, GenerationConfig { num_beams: 0, ..base.clone() }, "num_beams");
    refused(&prompt, GenerationConfig { num_return_sequences: 2, ..base.clone() }, "num_return_sequences");
    refused(&prompt, GenerationConfig { num_return_sequences: usize::MAX, ..sampling.clone() }, "num_return_sequences");
    refused(&prompt, GenerationConfig { max_new_tokens: Some(0), ..base.clone() }, "max_new_tokens");
    refused(&prompt, GenerationConfig { max_new_tokens: None, max_length: Some(1), ..base.clone() }, "max_length");
    refused(&prompt, GenerationConfig { min_new_tokens: 3, ..base.clone() }, "min_new_tokens");
    refused(&prompt, GenerationConfig { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty");
    refused(&prompt, GenerationConfig { eos_token_id: vec![20], ..base.clone() }, "eos_token_id");
    refused(&prompt, GenerationConfig { logit_bias: [(3, f32::NAN)].into(), ..base.clone() }, "logit_bias");
    refused(&prompt, GenerationConfig { bad_words_ids: vec![vec![]], ..base.clone() }, "bad_words_ids");
    refused(&prompt, GenerationConfig { suppress_tokens: (0..20).collect(), ..base.clone() }, "every token is excluded");
    for temperature in [0.0, -1.0, 1e-30, f32::NAN] {
        refused(&prompt, GenerationConfig { temperature, ..sampling.clone() }, "temperature");
    }
    for top_p in [0.0, 1.5, f32::NAN] {
        refused(&prompt, GenerationConfig { top_p: Some(top_p), ..sampling.clone() }, "top_p");
    }
    refused(&prompt, GenerationConfig { min_p: Some(1.5), ..sampling.clone() }, "min_p");
    refused(&prompt, GenerationConfig { repetition_penalty: 1e-40, ..sampling }, "penalties");
    let (_, t5) = load_seq2seq(fixture("t5"), &Params::new())?;
    let endless = GenerationConfig { max_new_tokens: Some(usize::MAX), ..base.clone() };
    assert!(generate_seq2seq(&t5, &prompt, &endless).is_err(), "a cache larger than any memory");
    let weight = model.params().named("transformer.wte.weight").expect("the embedding");
    weight.set(&weight.get().mul_scalar(f64::NAN)?)?;
    refused(&prompt, base, "NaN");
    Ok(())
}
