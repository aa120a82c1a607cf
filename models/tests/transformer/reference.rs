//! Every family: logits, loss and the gradients of all parameters are the reference's, also of padded batches, and a model that is
//! saved comes back with the same bits. `fixtures/check_saved.py` has the reference read what is saved here.

use crate::{Expected, Scratch, expect_close, folder, next_token_loss, token_loss};
use kiln_autograd::{TensorExt, no_grad};
use kiln_models::nn::{Params, ParamsOptions};
use kiln_models::transformer::{
    BertConfig, CausalConfig, CausalLm, KvCache, MaskedLm, Pass, Pretrained, Seq2SeqCache, Seq2SeqConfig, Seq2SeqLm, SequenceClassifier,
    load, load_for_tuning, load_pretrained, load_seq2seq, save_pretrained,
};
use kiln_tensor::{DType, Result, Tensor, autocast};
use std::path::Path;

const CAUSAL: [&str; 9] = ["gpt2", "gpt2_untied", "llama", "llama_dynamic", "mistral", "qwen2", "qwen3", "opt", "opt_350m"];
const SEQ2SEQ: [&str; 3] = ["t5", "t5_gated", "m2m100"];

/// The same tensors with the same bits.
fn expect_same_bits(a: &Params, b: &Params) -> Result<()> {
    let (a, b) = (a.state_dict(), b.state_dict());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, tensor) in &a {
        assert!(tensor.to_vec::<f32>()? == b[name].to_vec::<f32>()?, "{name}");
    }
    Ok(())
}

/// Saves whole and in shards, and loads both.
fn check_saving<C: Pretrained>(name: &str, config: &C, params: &Params) -> Result<()> {
    for limit in [u64::MAX, 1500] {
        let scratch = Scratch::new(&format!("{name}-{limit}"));
        save_pretrained(&scratch.0, config, params, limit)?;
        let again = Params::new();
        let (read, _) = load_pretrained::<C>(&scratch.0, &again)?;
        assert_eq!(read.layout().architecture, config.layout().architecture);
        expect_same_bits(params, &again)?;
    }
    Ok(())
}

fn check_causal(name: &str) -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of(name)?);
    let (config, model) = load(folder(name), &params)?;
    params.eval();
    let (tokens, mask, labels) = (expected.get("tokens"), expected.mask()?, expected.get("labels"));
    let pass = || Pass { key_mask: Some(&mask), ..Pass::default() };
    let logits = model.forward(tokens, pass())?;
    expected.check_logits(&logits, Some(&mask))?;
    expected.check_loss(&next_token_loss(&logits, labels)?, &params, &config.layout())?;

    // Frequencies that change as the sequence grows leave other keys in a cache.
    if name != "llama_dynamic" {
        check_in_parts(&model, &expected)?;
    }
    check_saving(name, &config, &params)
}

/// The padded batch, three tokens first and then one at a time.
fn check_in_parts(model: &impl CausalLm, expected: &Expected) -> Result<()> {
    let (tokens, mask) = (expected.get("tokens"), expected.mask()?);
    let [batch, len] = tokens.dims_n("test")?;
    no_grad(|| {
        let mut cache = KvCache::new(model.shape(), batch, len, ())?;
        let mut parts = Vec::new();
        for (start, added) in std::iter::once((0, 3)).chain((3..len).map(|start| (start, 1))) {
            let seen = mask.narrow(1, 0, start + added)?;
            let pass = Pass { key_mask: Some(&seen), cache: Some(&mut cache), ..Pass::default() };
            parts.push(model.forward(&tokens.narrow(1, start, added)?, pass)?);
        }
        expected.check_logits(&Tensor::cat(&parts, 1)?, Some(&mask))
    })
}

#[test]
fn decoder_only_models_are_the_reference() -> Result<()> {
    CAUSAL.into_iter().try_for_each(|name| check_causal(name).map_err(|e| e.with_source(std::io::Error::other(name))))
}

fn check_seq2seq(name: &str) -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of(name)?);
    let (config, model) = load_seq2seq(folder(name), &params)?;
    params.eval();
    let (source, mask, tokens) = (expected.get("source"), expected.mask()?, expected.get("tokens"));
    let logits = model.forward(source, Some(&mask), tokens)?;
    expected.check_logits(&logits, None)?;
    expected.check_loss(&token_loss(&logits, expected.get("labels"))?, &params, &config.layout())?;

    // In parts, with rows that change places between them.
    no_grad(|| {
        let mut encoded = model.encode(source, Some(&mask))?;
        let (mut cache, mut parts) = (Seq2SeqCache::new(model.shape(), 2, tokens.dim(1)?, ())?, Vec::new());
        let mut order = [0, 1];
        for (start, added) in [(0, 2), (2, 1), (3, 1), (4, 2)] {
            let index = Tensor::from_vec(order.map(|row| row as i64).to_vec(), [2])?;
            let part = tokens.narrow(1, start, added)?.index_select(0, &index)?;
            // A swap is its own inverse.
            parts.push(model.logits(&model.decode(&part, &encoded, Some(&mut cache))?)?.index_select(0, &index)?);
            cache.reorder(&[1, 0])?;
            encoded = encoded.select(&[1, 0])?;
            order.swap(0, 1);
        }
        expected.check_logits(&Tensor::cat(&parts, 1)?, None)
    })?;
    check_saving(name, &config, &params)
}

#[test]
fn encoder_decoders_are_the_reference() -> Result<()> {
    SEQ2SEQ.into_iter().try_for_each(|name| check_seq2seq(name).map_err(|e| e.with_source(std::io::Error::other(name))))
}

#[test]
fn bert_is_the_reference() -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of("bert_mlm")?);
    let (config, model) = load_pretrained::<MaskedLm<BertConfig>>(folder("bert_mlm"), &params)?;
    params.eval();
    let mask = expected.mask()?;
    let logits = model.forward(expected.get("tokens"), Some(&mask), Some(expected.get("types")))?;
    expected.check_logits(&logits, None)?;
    expected.check_loss(&token_loss(&logits, expected.get("labels"))?, &params, &config.layout())?;
    check_saving("bert_mlm", &config, &params)?;

    let (params, expected) = (Params::new(), Expected::of("bert_classifier")?);
    let (config, model) = load_pretrained::<SequenceClassifier<BertConfig>>(folder("bert_classifier"), &params)?;
    params.eval();
    let mask = expected.mask()?;
    let logits = model.forward(expected.get("tokens"), Some(&mask), Some(expected.get("types")))?;
    expect_close("logits", &logits, expected.get("logits"))?;
    expected.check_loss(&logits.cross_entropy(expected.get("labels"))?, &params, &config.layout())?;
    check_saving("bert_classifier", &config, &params)
}

/// A classifier on the body of a masked language model: its head starts fresh, the rest is that of the file.
#[test]
fn a_head_starts_fresh() -> Result<()> {
    let params = Params::seeded(1);
    let labels = |config: &mut SequenceClassifier<BertConfig>| config.0.set_labels(["a", "b", "c", "d"]);
    let (config, model) = load_for_tuning(folder("bert_mlm"), &params, labels)?;
    let expected = Expected::of("bert_mlm")?;
    assert_eq!(model.forward(expected.get("tokens"), None, None)?.dims(), [2, 4]);
    let body = Params::new();
    load_pretrained::<MaskedLm<BertConfig>>(folder("bert_mlm"), &body)?;
    let (tuned, body) = (params.state_dict(), body.state_dict());
    for (name, tensor) in body.iter().filter(|(name, _)| name.starts_with("bert.")) {
        assert!(tensor.to_vec::<f32>()? == tuned[name].to_vec::<f32>()?, "{name}");
    }
    check_saving("tuned", &config, &params)?;
    assert!(load_for_tuning::<SequenceClassifier<BertConfig>>(folder("bert_mlm"), &Params::new(), |c| c.0.hidden_size = 1 << 40).is_err());
    Ok(())
}

/// The gradients of a training pass, dropout included.
fn training_grads(name: &str, checkpointing: bool) -> Result<Vec<Vec<f32>>> {
    let (params, expected) = (Params::seeded(3), Expected::of(name)?);
    let (_, model) = load(folder(name), &params)?;
    model.set_activation_checkpointing(checkpointing);
    let logits = model.forward(expected.get("tokens"), Pass { key_mask: Some(&expected.mask()?), ..Pass::default() })?;
    next_token_loss(&logits, expected.get("labels"))?.backward()?;
    params.params().iter().map(|p| p.grad().map_or(Ok(Vec::new()), |grad| grad.to_vec())).collect()
}

#[test]
fn activations_computed_again_give_the_same_bits() -> Result<()> {
    for name in CAUSAL {
        assert!(training_grads(name, false)? == training_grads(name, true)?, "{name}");
    }
    Ok(())
}

/// What was saved last is what is loaded, whole over shards and shards over whole.
#[test]
fn a_later_save_replaces_an_earlier() -> Result<()> {
    let (scratch, params) = (Scratch::new("again"), Params::new());
    let (config, _) = load(folder("llama"), &params)?;
    let weight = params.named("model.norm.weight").expect("the norm");
    for limit in [u64::MAX, 1500, 3000, u64::MAX, 1500] {
        weight.set(&weight.get().add_scalar(1.0)?)?;
        save_pretrained(&scratch.0, &config, &params, limit)?;
        let again = Params::new();
        load(&scratch.0, &again)?;
        expect_same_bits(&params, &again)?;
    }
    Ok(())
}

/// A row that is all padding has no influence and no NaN, in either direction.
#[test]
fn a_row_of_padding_is_harmless() -> Result<()> {
    let finite = |params: &Params, logits: &Tensor| -> Result<()> {
        logits.sum(())?.backward()?;
        let grads = params.params().into_iter().filter_map(|p| p.grad());
        for x in grads.chain([logits.detach()]) {
            assert!(x.to_vec::<f32>()?.iter().all(|x| x.is_finite()));
        }
        Ok(())
    };
    let mask = Tensor::from_vec(vec![true, true, true, false, false, false], [2, 3])?;
    let tokens = Tensor::from_vec(vec![4i64, 5, 6, 0, 0, 0], [2, 3])?;
    for name in SEQ2SEQ {
        let params = Params::new();
        params.eval();
        let (_, model) = load_seq2seq(folder(name), &params)?;
        finite(&params, &model.forward(&tokens, Some(&mask), &tokens)?)?;
    }
    for name in ["gpt2", "llama", "mistral"] {
        let params = Params::new();
        params.eval();
        let (_, model) = load(folder(name), &params)?;
        finite(&params, &model.forward(&tokens, Pass { key_mask: Some(&mask), ..Pass::default() })?)?;
    }
    let params = Params::new();
    params.eval();
    let (_, model) = load_pretrained::<MaskedLm<BertConfig>>(folder("bert_mlm"), &params)?;
    finite(&params, &model.forward(&tokens, Some(&mask), None)?)
}

/// Logits and loss of a fixture's batch, whatever the family.
fn run(name: &str, params: &Params) -> Result<[Tensor; 2]> {
    let expected = Expected::of(name)?;
    let (mask, tokens, labels) = (expected.mask()?, expected.get("tokens"), expected.get("labels"));
    if SEQ2SEQ.contains(&name) {
        let (_, model) = load_seq2seq(folder(name), params)?;
        let logits = model.forward(expected.get("source"), Some(&mask), tokens)?;
        let loss = token_loss(&logits, labels)?;
        return Ok([logits, loss]);
    }
    if name == "bert_mlm" {
        let (_, model) = load_pretrained::<MaskedLm<BertConfig>>(folder(name), params)?;
        let logits = model.forward(tokens, Some(&mask), Some(expected.get("types")))?;
        let loss = token_loss(&logits, labels)?;
        return Ok([logits, loss]);
    }
    let (_, model) = load(folder(name), params)?;
    let logits = model.forward(tokens, Pass { key_mask: Some(&mask), ..Pass::default() })?;
    let loss = next_token_loss(&logits, labels)?;
    // What padding says is nobody's.
    Ok([logits.masked_fill(&mask.logical_not()?.unsqueeze(-1)?, 0.0)?, loss])
}

/// In bf16, as weights or by autocast, every family says about the same; in training every gradient is finite.
#[test]
fn half_precision_and_training_run() -> Result<()> {
    for name in CAUSAL.into_iter().chain(SEQ2SEQ).chain(["bert_mlm"]) {
        let evaluated = |dtype: DType| {
            let params = Params::with(ParamsOptions { dtype, ..ParamsOptions::default() });
            params.eval();
            (run(name, &params), params)
        };
        let close = |loss: &Tensor, expected: f64| -> Result<()> {
            let found = loss.item_f64()?;
            assert!((found - expected).abs() < 0.05 * expected, "{name}: {found} {expected}");
            Ok(())
        };
        let expected = evaluated(DType::F32).0?[1].item_f64()?;
        let (half, _) = evaluated(DType::BF16);
        let [logits, loss] = half?;
        assert_eq!(logits.dtype(), DType::BF16, "{name}");
        close(&loss, expected)?;
        let (cast, params) = autocast(DType::BF16, || evaluated(DType::F32))?;
        let [_, loss] = cast?;
        close(&loss, expected)?;
        loss.backward()?;
        let training = Params::seeded(2);
        run(name, &training)?[1].backward()?;
        for grad in params.params().iter().chain(&training.params()).filter_map(|p| p.grad()) {
            assert!(grad.to_dtype(DType::F64)?.to_vec::<f64>()?.iter().all(|x| x.is_finite()), "{name}");
        }
    }
    Ok(())
}

/// Writes every model to the folder that `KILN_SAVED` names, for `fixtures/check_saved.py`.
#[test]
#[ignore = "its result is for check_saved.py to judge"]
fn save_all_for_the_reference() -> Result<()> {
    let root = std::env::var("KILN_SAVED").expect("KILN_SAVED names a folder");
    for name in CAUSAL {
        save_again::<CausalConfig>(&root, name)?;
    }
    for name in SEQ2SEQ {
        save_again::<Seq2SeqConfig>(&root, name)?;
    }
    save_again::<MaskedLm<BertConfig>>(&root, "bert_mlm")?;
    save_again::<SequenceClassifier<BertConfig>>(&root, "bert_classifier")?;
    Ok(())
}

fn save_again<C: Pretrained>(root: &str, name: &str) -> Result<()> {
    let params = Params::new();
    let (config, _) = load_pretrained::<C>(folder(name), &params)?;
    save_pretrained(Path::new(root).join(name), &config, &params, 3000)
}
