//! Folders, configurations and prompts that are not what they should be: an error that names the key or the field, never a panic.
//! And folders of older forms, which are.

use crate::{Scratch, folder};
use kiln_autograd::no_grad;
use kiln_models::nn::{LoadMode, Params, StateDict};
use kiln_models::transformer::{
    BertConfig, CausalConfig, CausalLm, Encoded, Gpt2Config, KvCache, MaskedLm, Pass, Pretrained, Seq2SeqCache, Seq2SeqConfig, Seq2SeqLm,
    SequenceClassifier, load, load_pretrained, load_seq2seq,
};
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Result, Tensor};
use serde_json::{Map, Value, json};
use std::fs;

fn config_of(name: &str) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

fn weights_of(name: &str) -> StateDict {
    safetensors::load(folder(name).join("model.safetensors")).unwrap()
}

/// A folder with these contents.
fn written(scratch: &str, config: &Map<String, Value>, weights: &StateDict) -> Scratch {
    let scratch = Scratch::new(scratch);
    fs::write(scratch.0.join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
    safetensors::save(scratch.0.join("model.safetensors"), weights, &Default::default()).unwrap();
    scratch
}

/// The error of a result, which must say all of `words`.
#[track_caller]
fn expect_error<T>(result: Result<T>, words: &[&str]) {
    let error = result.err().unwrap_or_else(|| panic!("no error that says {words:?}")).to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} are not in: {error}");
}

/// The error of a folder whose configuration has `key` set to `value`.
#[track_caller]
fn expect_wrong_field(name: &str, key: &str, value: Value, words: &[&str]) {
    let mut config = config_of(name);
    config.insert(key.into(), value);
    let scratch = written(&format!("field-{name}-{key}"), &config, &weights_of(name));
    match name {
        "t5" | "m2m100" => expect_error(load_seq2seq(&scratch.0, &Params::new()), words),
        "bert_mlm" => expect_error(load_pretrained::<MaskedLm<BertConfig>>(&scratch.0, &Params::new()), words),
        _ => expect_error(load(&scratch.0, &Params::new()), words),
    }
}

#[test]
fn a_config_that_claims_a_giant_is_an_error_before_memory() {
    let config = Gpt2Config { n_embd: 1 << 20, n_head: 16, n_layer: 1 << 40, vocab_size: 1 << 30, ..Gpt2Config::default() };
    let built = Params::new().build_from(StateDict::new(), LoadMode::Strict, |params| config.build(params));
    expect_error(built, &["transformer.wte.weight"]);
}

#[test]
fn wrong_fields_are_named() {
    expect_wrong_field("llama", "hidden_size", json!("8"), &["hidden_size", "8"]);
    expect_wrong_field("llama", "num_hidden_layers", json!(-1), &["num_hidden_layers", "-1"]);
    expect_wrong_field("llama", "rms_norm_eps", json!([1]), &["rms_norm_eps"]);
    expect_wrong_field("llama", "num_attention_heads", json!(3), &["3"]);
    expect_wrong_field("llama", "num_key_value_heads", json!(3), &["3"]);
    expect_wrong_field("llama", "num_attention_heads", json!(0), &["num_attention_heads"]);
    expect_wrong_field("llama", "head_dim", json!(5), &["5"]);
    expect_wrong_field("llama", "hidden_act", json!("sine"), &["sine", "silu"]);
    expect_wrong_field("llama", "model_type", json!("llama5"), &["model_type", "llama5", "qwen3"]);
    expect_wrong_field("llama", "model_type", json!(7), &["model_type"]);
    expect_wrong_field("llama", "rope_parameters", json!({"rope_type": "spiral", "rope_theta": 10.0}), &["spiral"]);
    expect_wrong_field("llama", "rope_parameters", json!({"rope_type": "linear", "rope_theta": 10.0}), &["linear", "factor"]);
    expect_wrong_field("llama", "rope_parameters", json!({"rope_type": "linear", "factor": 0.0}), &["rope"]);
    let too_short = json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0});
    expect_wrong_field("llama", "rope_parameters", too_short, &["short_factor", "1"]);
    let ones = [1.0; 4];
    let endless = json!({"rope_type": "longrope", "short_factor": ones, "long_factor": ones, "original_max_position_embeddings": 0});
    expect_wrong_field("llama", "rope_parameters", endless, &["rope", "factor"]);
    expect_wrong_field("mistral", "sliding_window", json!(0), &["sliding_window"]);
    expect_wrong_field("qwen2", "layer_types", json!(["full_attention", "chunked_attention"]), &["layer_types", "chunked_attention"]);
    expect_wrong_field("gpt2_untied", "n_head", json!(3), &["n_embd", "3"]);
    expect_wrong_field("gpt2_untied", "resid_pdrop", json!(1.5), &["1.5"]);
    expect_wrong_field("gpt2_untied", "activation_function", json!(null), &["activation_function"]);
    expect_wrong_field("opt", "num_attention_heads", json!(5), &["num_attention_heads", "5"]);
    expect_wrong_field("t5", "feed_forward_proj", json!("odd-relu"), &["feed_forward_proj", "odd-relu"]);
    expect_wrong_field("t5", "relative_attention_num_buckets", json!(2), &["buckets"]);
    expect_wrong_field("t5", "num_heads", json!("two"), &["num_heads"]);
    expect_wrong_field("t5", "model_type", json!("bart"), &["model_type", "bart", "m2m_100"]);
    expect_wrong_field("m2m100", "pad_token_id", json!(40), &["pad_token_id", "40"]);
    expect_wrong_field("m2m100", "decoder_attention_heads", json!(3), &["decoder_attention_heads"]);
    expect_wrong_field("bert_mlm", "num_attention_heads", json!(3), &["num_attention_heads"]);
    expect_wrong_field("bert_mlm", "model_type", json!("gpt2"), &["model_type", "gpt2", "bert"]);
    expect_wrong_field("bert_mlm", "position_embedding_type", json!("relative_key"), &["position_embedding_type"]);
    expect_wrong_field("m2m100", "encoder_layerdrop", json!(-0.5), &["encoder_layerdrop", "-0.5"]);
    expect_wrong_field("llama", "partial_rotary_factor", json!(0.5), &["partial_rotary_factor"]);
    expect_error(load_pretrained::<Gpt2Only>(folder("llama"), &Params::new()), &["model_type", "llama", "gpt2"]);
}

/// A configuration of one family, which knows no other.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
struct Gpt2Only(Gpt2Config);

impl Pretrained for Gpt2Only {
    type Model = kiln_models::transformer::Decoder;

    fn layout(&self) -> kiln_models::transformer::Layout {
        CausalConfig::Gpt2(self.0.clone()).layout()
    }

    fn model_type(&self) -> &'static str {
        "gpt2"
    }

    fn build_model(&self, params: &Params) -> Result<Self::Model> {
        self.0.build(params)
    }
}

#[test]
fn wrong_tensors_are_named() -> Result<()> {
    let (config, weights) = (config_of("llama"), weights_of("llama"));
    let name = "model.layers.1.mlp.up_proj.weight";
    let load_with = |scratch: &str, change: &dyn Fn(&mut StateDict)| {
        let mut weights = weights.clone();
        change(&mut weights);
        load(&written(scratch, &config, &weights).0, &Params::new())
    };
    let put = |tensor: Tensor| move |weights: &mut StateDict| drop(weights.insert(name.to_owned(), tensor.clone()));
    let missing = load_with("missing", &|weights| drop(weights.remove(name)));
    expect_error(missing, &["1 missing", name]);
    let extra = load_with("extra", &|weights| drop(weights.insert("model.layers.2.x".into(), weights[name].clone())));
    expect_error(extra, &["1 unexpected", "model.layers.2.x"]);
    expect_error(load_with("shape", &put(Tensor::zeros([12, 9], ())?)), &[name, "[12, 8]", "[12, 9]"]);
    expect_error(load_with("dtype", &put(Tensor::zeros([12, 8], DType::I64)?)), &[name, "i64"]);
    expect_error(load_with("transposed", &put(Tensor::zeros([8, 12], ())?)), &[name, "[12, 8]", "[8, 12]"]);

    // A head that differs from the embedding is the model's own, as the reference has it; other repetitions must be what they repeat.
    let own = |weights: &mut StateDict, name: &str, like: &str| {
        let other = weights[like].mul_scalar(2.0).unwrap();
        weights.insert(name.to_owned(), other);
    };
    let (config, mut weights) = (config_of("qwen2"), weights_of("qwen2"));
    own(&mut weights, "lm_head.weight", "model.embed_tokens.weight");
    let params = Params::new();
    let (CausalConfig::Llama(config), _) = load(&written("untied", &config, &weights).0, &params)? else { panic!("no Llama") };
    assert!(!config.tie_word_embeddings && params.named("lm_head.weight").is_some());
    let (config, mut weights) = (config_of("t5"), weights_of("t5"));
    own(&mut weights, "encoder.embed_tokens.weight", "shared.weight");
    expect_error(load_seq2seq(&written("tied", &config, &weights).0, &Params::new()), &["encoder.embed_tokens.weight"]);
    Ok(())
}

#[test]
fn broken_files_are_errors() -> Result<()> {
    let whole = fs::read(folder("llama").join("config.json")).unwrap();
    let scratch = written("broken", &config_of("llama"), &weights_of("llama"));
    for len in [0, 1, whole.len() / 2, whole.len() - 3] {
        fs::write(scratch.0.join("config.json"), &whole[..len]).unwrap();
        expect_error(load(&scratch.0, &Params::new()), &["config.json"]);
    }
    for text in ["[]", "null", "7", "{}", "{\"model_type\": null}", "\u{feff}{}"] {
        fs::write(scratch.0.join("config.json"), text).unwrap();
        expect_error(load(&scratch.0, &Params::new()), &["config.json"]);
    }
    fs::write(scratch.0.join("config.json"), &whole).unwrap();
    let tensors = fs::read(folder("llama").join("model.safetensors")).unwrap();
    for len in [0, 7, 100, tensors.len() / 2, tensors.len() - 1] {
        fs::write(scratch.0.join("model.safetensors"), &tensors[..len]).unwrap();
        expect_error(load(&scratch.0, &Params::new()), &["model.safetensors"]);
    }
    fs::remove_file(scratch.0.join("model.safetensors")).unwrap();
    expect_error(load(&scratch.0, &Params::new()), &["model.safetensors.index.json"]);
    expect_error(load(scratch.0.join("nowhere"), &Params::new()), &["config.json"]);

    let index = |text: &str| {
        fs::write(scratch.0.join("model.safetensors.index.json"), text).unwrap();
        load(&scratch.0, &Params::new())
    };
    expect_error(index("{\"weight_map\": {\"a\": \"gone.safetensors\"}}"), &["gone.safetensors"]);
    for outside in ["../model.safetensors", "/etc/passwd", "", ".", "..", "C:\\x", "a/b"] {
        expect_error(index(&json!({"weight_map": {"a": outside}}).to_string()), &["index.json", "no name of a file"]);
    }
    expect_error(index("{\"weight_map\": {\"a\": 7}}"), &["index.json"]);
    expect_error(index("{\"metadata\": {}}"), &["weight_map"]);
    expect_error(index("{\"weight_map\": {\"a\": "), &["index.json"]);
    fs::write(scratch.0.join("shard.safetensors"), &tensors).unwrap();
    expect_error(index("{\"weight_map\": {\"not.there\": \"shard.safetensors\"}}"), &["not.there", "shard.safetensors"]);
    expect_error(index("{\"weight_map\": {\"model.norm.weight\": \"shard.safetensors\"}}"), &["missing", "model.embed_tokens.weight"]);
    Ok(())
}

#[test]
fn wrong_prompts_are_errors() -> Result<()> {
    let tokens = |values: &[i64]| Tensor::from_vec(values.to_vec(), [1, values.len()]);
    for name in ["gpt2", "llama", "opt"] {
        let params = Params::new();
        let (_, model) = load(folder(name), &params)?;
        let context = model.shape().context_length;
        expect_error(model.forward(&Tensor::zeros([1, context + 1], DType::I64)?, Pass::default()), &["context", "shorten the prompt"]);
        expect_error(model.forward(&Tensor::zeros([1, 0], DType::I64)?, Pass::default()), &["hold nothing", "BOS"]);
        expect_error(model.forward(&Tensor::zeros([0, 3], DType::I64)?, Pass::default()), &["hold nothing"]);
        expect_error(model.forward(&Tensor::zeros([1, 3], ())?, Pass::default()), &["i64"]);
        expect_error(model.forward(&Tensor::zeros([3], DType::I64)?, Pass::default()), &["[3]"]);
        expect_error(model.forward(&tokens(&[4, 40])?, Pass::default()), &["40"]);
        expect_error(model.forward(&tokens(&[4, -1])?, Pass::default()), &["-1"]);
        let prompt = tokens(&[4, 5, 6])?;
        let short = Tensor::full([1, 2], 1.0, DType::Bool)?;
        expect_error(model.forward(&prompt, Pass { key_mask: Some(&short), ..Pass::default() }), &["key_mask", "[1, 3]"]);
        let floats = Tensor::zeros([1, 3], ())?;
        expect_error(model.forward(&prompt, Pass { positions: Some(&floats), ..Pass::default() }), &["positions", "i64"]);
        // OPT's table has rows before the first place.
        for place in [-3, 1 << 40, i64::MAX] {
            let places = tokens(&[0, 1, place])?;
            assert!(model.forward(&prompt, Pass { positions: Some(&places), ..Pass::default() }).is_err());
        }
        let numbers = tokens(&[0, 0])?;
        expect_error(model.forward(&prompt, Pass { segments: Some(&numbers), ..Pass::default() }), &["segments", "[1, 3]"]);
        no_grad(|| -> Result<()> {
            let mut cache = KvCache::new(model.shape(), 1, 4, ())?;
            model.forward(&prompt, Pass::cached(&mut cache))?;
            expect_error(model.forward(&prompt, Pass::cached(&mut cache)), &["do not fit a cache", "4 tokens"]);
            expect_error(model.forward(&Tensor::zeros([2, 1], DType::I64)?, Pass::cached(&mut cache)), &["2 sequences"]);
            let numbers = tokens(&[0])?;
            let pass = Pass { segments: Some(&numbers), ..Pass::cached(&mut cache) };
            expect_error(model.forward(&tokens(&[4])?, pass), &["packed", "cache"]);
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn wrong_sources_are_errors() -> Result<()> {
    let zeros = |rows: usize, len: usize| Tensor::zeros([rows, len], DType::I64);
    for name in ["t5", "m2m100"] {
        let (_, model) = load_seq2seq(folder(name), &Params::new())?;
        expect_error(model.encode(&zeros(1, 0)?, None), &["hold nothing"]);
        expect_error(model.encode(&Tensor::full([1, 2], 40.0, DType::I64)?, None), &["40"]);
        expect_error(model.encode(&zeros(1, 2)?, Some(&Tensor::full([1, 3], 1.0, DType::Bool)?)), &["mask", "[1, 2]"]);
        expect_error(model.encode(&zeros(1, 2)?, Some(&zeros(1, 2)?)), &["mask", "bool"]);
        let encoded = model.encode(&zeros(1, 2)?, None)?;
        expect_error(model.decode(&zeros(2, 1)?, &encoded, None), &["2 sequences", "1 sources"]);
        expect_error(encoded.select(&[1]).map(|_| ()), &["1"]);
        let narrow = Encoded { hidden: Tensor::zeros([1, 2, 3], ())?, mask: None };
        assert!(model.decode(&zeros(1, 1)?, &narrow, None).is_err());
        no_grad(|| -> Result<()> {
            let mut cache = Seq2SeqCache::new(model.shape(), 1, 2, ())?;
            model.decode(&zeros(1, 2)?, &encoded, Some(&mut cache))?;
            expect_error(model.decode(&zeros(1, 1)?, &encoded, Some(&mut cache)), &["do not fit a cache"]);
            Ok(())
        })?;
    }
    let (_, model) = load_seq2seq(folder("m2m100"), &Params::new())?;
    expect_error(model.encode(&zeros(1, 17)?, None), &["context of 16"]);
    let (_, model) = load_pretrained::<MaskedLm<BertConfig>>(folder("bert_mlm"), &Params::new())?;
    expect_error(model.forward(&zeros(1, 13)?, None, None), &["12", "shorten"]);
    expect_error(model.forward(&zeros(1, 2)?, None, Some(&zeros(1, 3)?)), &["token types"]);
    expect_error(model.forward(&zeros(1, 2)?, None, Some(&Tensor::full([1, 2], 2.0, DType::I64)?)), &["2"]);
    expect_error(model.forward(&zeros(1, 0)?, None, None), &["hold nothing"]);
    Ok(())
}

/// Every field of every configuration, set to values of every kind: an error or a model that runs, but no panic.
#[test]
fn no_field_causes_a_panic() -> Result<()> {
    let values = [json!(0), json!(-1), json!(u64::MAX), json!(1e300), json!(null), json!("x"), json!({})];
    let of_no_model = ["architectures", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"];
    let tokens = Tensor::from_vec(vec![4i64, 5, 6], [1, 3])?;
    let mut ran = 0;
    for name in ["gpt2_untied", "llama", "qwen2", "opt_350m", "bert_classifier", "t5", "m2m100"] {
        let (config, weights) = (config_of(name), weights_of(name));
        let scratch = written(&format!("fields-{name}"), &config, &weights);
        let run = || -> Result<Tensor> {
            let params = Params::new();
            match name {
                "t5" | "m2m100" => load_seq2seq(&scratch.0, &params)?.1.forward(&tokens, None, &tokens),
                "bert_classifier" => load_pretrained::<SequenceClassifier<BertConfig>>(&scratch.0, &params)?.1.forward(&tokens, None, None),
                _ => load(&scratch.0, &params)?.1.forward(&tokens, Pass::default()),
            }
        };
        for (key, value) in
            config.keys().filter(|key| !of_no_model.contains(&key.as_str())).flat_map(|key| values.iter().map(move |value| (key, value)))
        {
            let mut config = config.clone();
            config.insert(key.clone(), value.clone());
            fs::write(scratch.0.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
            ran += usize::from(run().is_ok());
        }
    }
    assert!(ran > 100, "{ran}");
    Ok(())
}

/// The names of older files: without the model's prefix, with buffers, with gamma and beta, with repetitions.
#[test]
fn older_names_are_known() -> Result<()> {
    let same = |a: &Params, b: &Params| -> Result<()> {
        for (name, tensor) in a.state_dict() {
            assert!(tensor.to_vec::<f32>()? == b.state_dict()[&name].to_vec::<f32>()?, "{name}");
        }
        Ok(())
    };
    let renamed = |name: &str, rename: &dyn Fn(&str) -> String| -> StateDict {
        weights_of(name).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect()
    };
    let without = |prefix: &'static str| move |name: &str| name.strip_prefix(prefix).unwrap_or(name).to_owned();
    let buffer = Tensor::zeros([1, 1, 4, 4], DType::Bool)?;

    let mut weights = renamed("gpt2_untied", &without("transformer."));
    for name in ["h.0.attn.bias", "h.1.attn.bias", "h.0.attn.masked_bias"] {
        weights.insert(name.into(), buffer.clone());
    }
    let (old, new) = (Params::new(), Params::new());
    load(&written("old-gpt2", &config_of("gpt2_untied"), &weights).0, &old)?;
    load(folder("gpt2_untied"), &new)?;
    same(&old, &new)?;

    let mut weights = renamed("opt", &without("model."));
    weights.insert("lm_head.weight".into(), weights["decoder.embed_tokens.weight"].clone());
    let (old, new) = (Params::new(), Params::new());
    load(&written("old-opt", &config_of("opt"), &weights).0, &old)?;
    load(folder("opt"), &new)?;
    same(&old, &new)?;

    let mut weights =
        renamed("bert_mlm", &|name| name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"));
    for (name, like) in [
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert.pooler.dense.bias", "cls.predictions.bias"),
        ("cls.seq_relationship.weight", "cls.predictions.bias"),
        ("cls.seq_relationship.bias", "cls.predictions.bias"),
    ] {
        weights.insert(name.into(), weights[like].clone());
    }
    weights.insert("bert.embeddings.position_ids".into(), Tensor::arange(0.0, 12.0, 1.0, DType::I64)?.unsqueeze(0)?);
    let (old, new) = (Params::new(), Params::new());
    load_pretrained::<MaskedLm<BertConfig>>(&written("old-bert", &config_of("bert_mlm"), &weights).0, &old)?;
    load_pretrained::<MaskedLm<BertConfig>>(folder("bert_mlm"), &new)?;
    same(&old, &new)?;

    let mut weights = weights_of("m2m100");
    for name in ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"] {
        weights.insert(name.into(), weights["model.shared.weight"].clone());
    }
    for name in ["model.encoder.version", "model.decoder.version", "model.encoder.embed_positions._float_tensor"] {
        weights.insert(name.into(), Tensor::zeros([1], ())?);
    }
    weights.insert("model.decoder.embed_positions.weights".into(), Tensor::zeros([18, 8], ())?);
    let (old, new) = (Params::new(), Params::new());
    let (config, _) = load_pretrained::<Seq2SeqConfig>(&written("old-m2m100", &config_of("m2m100"), &weights).0, &old)?;
    assert!(matches!(config, Seq2SeqConfig::M2m100(config) if config.tie_word_embeddings));
    load_seq2seq(folder("m2m100"), &new)?;
    same(&old, &new)
}
