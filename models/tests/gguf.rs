//! GGUF files: values as gguf-py has them, models and tokenizers as transformers has them, and files that are not what they claim.

use kiln_autograd::no_grad;
use kiln_models::gguf::{Array, Gguf, Storage, Value};
use kiln_models::nn::Params;
use kiln_models::text::json::{Value as Json, from_str, from_value};
use kiln_models::text::{ChatTemplate, Message, Tokenizer, Variables};
use kiln_models::transformer::{CausalConfig, CausalLm, Decoder, Gpt2Config, Pass, gguf_config, load_gguf};
use kiln_tensor::{DType, Quantization, QuantizedMatrix, Result, Tensor};
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

/// A file with these bytes, gone with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("kiln-gguf-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn metadata_of_every_type_is_read() -> Result<()> {
    let file = Gguf::open(fixture("all.gguf"))?;
    let at = |key: &str| file.metadata()[&format!("test.{key}")].clone();
    for (key, value) in [("u8", 200), ("u16", 60000), ("u32", 4000000000), ("u64", (1 << 63) + 1)] {
        assert_eq!(at(key), Value::Unsigned(value));
    }
    for (key, value) in [("i8", -100), ("i16", -30000), ("i32", -2000000000), ("i64", -(1 << 62))] {
        assert_eq!(at(key), Value::Signed(value));
    }
    assert_eq!((at("f32"), at("f64"), at("bool")), (Value::Float(0.5), Value::Float(0.1), Value::Bool(true)));
    assert_eq!(file.get_str("test.string")?, "naïve ▁token");
    assert_eq!(file.get_strings("test.strings")?, ["a", "", "ĠĊ"]);
    assert_eq!(at("numbers"), Value::Array(Array::Signed(vec![1, -2, 3])));
    assert_eq!(at("floats"), Value::Array(Array::Float(vec![0.5, -1.5])));
    assert_eq!((file.version(), file.get_str("general.architecture")?, file.get_u64("test.u8")?), (3, "test", 200));
    assert_eq!((file.find_bool("test.bool")?, file.find_u64("test.none")?, file.get_f64("test.i8")?), (Some(true), None, -100.0));
    let error = file.get_u64("test.i8").unwrap_err().to_string();
    assert!(error.contains("test.i8") && error.contains("expected an integer from 0 on"), "{error}");
    assert!(file.get_str("test.none").unwrap_err().to_string().contains("\"test.none\" is missing"));
    Ok(())
}

#[test]
fn tensors_have_the_values_of_gguf_py() -> Result<()> {
    let file = Gguf::open(fixture("all.gguf"))?;
    assert_eq!(file.tensor_names()[..4], ["f32", "f16", "bf16", "vector"]);
    for (name, kind) in
        [("q8_0", Quantization::Q8_0), ("q4_0", Quantization::Q4_0), ("q4_k", Quantization::Q4K), ("q6_k", Quantization::Q6K)]
    {
        let expected = file.tensor(&format!("{name}.expected"))?;
        let (got, matrix) = (file.tensor(name)?, file.quantized(name)?.expect("a matrix"));
        assert_eq!((got.shape(), got.dtype(), matrix.kind()), (expected.shape(), DType::F32, kind));
        assert_eq!(got.to_vec::<f32>()?, expected.to_vec::<f32>()?, "{name}");
        assert!(expected.to_vec::<f32>()?.iter().any(|&x| x.abs() > 1e-3));
    }
    let values = file.tensor("f32")?;
    assert_eq!(values.dims(), [3, 64]);
    for (name, dtype) in [("f16", DType::F16), ("bf16", DType::BF16)] {
        let half = file.tensor(name)?;
        assert_eq!((half.dtype(), half.dims()), (dtype, &[3, 64][..]));
        assert_eq!(half.to_dtype(DType::F32)?.to_vec::<f32>()?, values.to_dtype(dtype)?.to_dtype(DType::F32)?.to_vec::<f32>()?);
        assert!(file.quantized(name)?.is_none());
    }
    assert_eq!(file.tensor("vector")?.to_vec::<f32>()?, values.to_vec::<f32>()?[..64]);
    let error = file.tensor("q5_0").unwrap_err().to_string();
    assert!(error.contains("q5_0") && error.contains("type Q5_0 (6)"), "{error}");
    assert_eq!(file.info("q5_0")?.storage, Storage::Unknown("Q5_0", 6));
    assert!(file.tensor("none").unwrap_err().to_string().contains("\"none\""));
    Ok(())
}

fn numbers(file: &Gguf, key: &str) -> Vec<f64> {
    match &file.metadata()[key] {
        Value::Array(Array::Float(x)) => x.clone(),
        Value::Array(Array::Signed(x)) => x.iter().map(|&x| x as f64).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn models_give_the_logits_of_transformers() -> Result<()> {
    for name in ["llama.gguf", "gpt2.gguf"] {
        let file = Gguf::open(fixture(name))?;
        let (tokens, expected) = (numbers(&file, "test.tokens"), numbers(&file, "test.logits"));
        let params = Params::new();
        let (config, model) = load_gguf(fixture(name), &params)?;
        params.eval();
        match &config {
            CausalConfig::Llama(config) => {
                assert_eq!((config.num_key_value_heads, config.rope_theta, config.tie_word_embeddings), (Some(2), 5000.0, false));
            }
            CausalConfig::Gpt2(config) => {
                assert_eq!((config.n_positions, config.n_inner, config.tie_word_embeddings), (64, Some(128), true))
            }
            other => panic!("{other:?}"),
        }
        // Quantised weights of layers stay so; others and tables are plain.
        let quantized = |name: &str| params.linear_named(name).expect(name).quantized().map(|matrix| matrix.kind());
        let (kinds, plain) = match &config {
            CausalConfig::Llama(_) => (
                vec![("model.layers.1.self_attn.q_proj", Quantization::Q8_0), ("model.layers.0.self_attn.k_proj", Quantization::Q4_0)],
                "model.layers.1.self_attn.v_proj",
            ),
            _ => (vec![("transformer.h.0.attn.c_attn", Quantization::Q8_0)], "transformer.h.1.mlp.c_fc"),
        };
        kinds.into_iter().for_each(|(name, kind)| assert_eq!(quantized(name), Some(kind), "{name}"));
        assert_eq!(quantized(plain), None);
        let tokens = Tensor::from_vec(tokens.iter().map(|&t| t as i64).collect(), [1, tokens.len()])?;
        let logits = no_grad(|| model.forward(&tokens, Pass::default()))?.to_vec::<f32>()?;
        let size = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
        assert_eq!(logits.len(), expected.len());
        for (got, want) in logits.iter().zip(&expected) {
            assert!((f64::from(*got) - want).abs() < 1e-5 * size, "{name}: {got} {want}");
        }
        assert_eq!(file.get_strings("tokenizer.ggml.tokens")?.len(), 48);
        assert_eq!(file.get_strings("tokenizer.ggml.merges")?, ["t 1", "t 2"]);
    }
    Ok(())
}

#[test]
fn a_tied_head_can_be_quantised() -> Result<()> {
    let params = Params::seeded(3);
    let config =
        Gpt2Config { vocab_size: 70, n_positions: 8, n_embd: 64, n_layer: 1, n_head: 2, initializer_range: 0.3, ..Gpt2Config::default() };
    let model = config.build(&params)?;
    params.eval();
    let tokens = Tensor::from_vec(vec![3i64, 69, 0], [1, 3])?;
    let logits = |model: &Decoder| no_grad(|| model.forward(&tokens, Pass::default()));
    let exact = logits(&model)?;
    model.quantize_tied_head(Quantization::Int8 { group: 64 })?;
    let near = logits(&model)?;
    let error = near.sub(&exact)?.abs()?.max(())?.item::<f32>()?;
    assert!(error > 0.0 && error < 0.02 * exact.abs()?.max(())?.item::<f32>()?, "{error}");
    let other = QuantizedMatrix::quantize(&Tensor::zeros([70, 32], ())?, Quantization::Int8 { group: 64 })?;
    assert!(model.set_quantized_head(Some(other)).is_err());
    model.set_quantized_head(None)?;
    assert_eq!(logits(&model)?.to_vec::<f32>()?, exact.to_vec::<f32>()?);
    let own = Gpt2Config { tie_word_embeddings: false, ..config }.build(&Params::seeded(3))?;
    assert!(own.quantize_tied_head(Quantization::Int8 { group: 64 }).is_err());
    Ok(())
}

/// Everything that can be asked of a file.
fn use_all(path: &Path) {
    if let Ok(file) = Gguf::open(path) {
        for name in file.tensor_names() {
            let _ = (file.tensor(name), file.quantized(name));
        }
        let _ = gguf_config(&file);
        if let Ok(tokenizer) = Tokenizer::from_gguf(&file) {
            let _ = tokenizer.encode_with_specials("a text\n<s> 11").and_then(|ids| tokenizer.decode(&ids, true));
            let _ = ChatTemplate::from_gguf(&file, &tokenizer);
        }
    }
}

#[test]
fn no_damage_leads_to_a_panic() {
    let whole = std::fs::read(fixture("all.gguf")).unwrap();
    let path = Scratch::new("damaged", &[]);
    let header = whole.windows(8).rposition(|w| w == b"expected").unwrap() + 64;
    for len in (0..header).chain([whole.len() / 2]) {
        std::fs::write(&path.0, &whole[..len]).unwrap();
        assert!(Gguf::open(&path.0).is_err(), "cut at {len}");
    }
    let mut state = 1u64;
    for at in 0..header {
        let mut bytes = whole.clone();
        bytes[at] ^= [0xFF, 1, 0x80][at % 3];
        // In every third file, another byte as well, anywhere in the header.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        if at % 3 == 1 {
            bytes[(state >> 33) as usize % header] = (state >> 8) as u8;
        }
        std::fs::write(&path.0, &bytes).unwrap();
        use_all(&path.0);
    }
    let llama = std::fs::read(fixture("llama.gguf")).unwrap();
    let header = llama.windows(6).rposition(|w| w == b"attn_q").unwrap() + 64;
    for at in (0..header).step_by(11) {
        let mut bytes = llama.clone();
        bytes[at] ^= 0x81;
        std::fs::write(&path.0, &bytes).unwrap();
        let _ = load_gguf(&path.0, &Params::new());
    }
}

/// A file of this metadata and these tensors, each a name, extents in the file's order, a type and an offset, and `data` bytes behind.
fn made(keys: &[(&str, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((keys.len() as u64).to_le_bytes());
    let text = |bytes: &mut Vec<u8>, text: &str| {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    };
    for (key, value) in keys {
        text(&mut bytes, key);
        bytes.extend(value);
    }
    for (name, dims, kind, offset) in tensors {
        text(&mut bytes, name);
        bytes.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| bytes.extend(d.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
    }
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

/// A value of a metadata type: its number and its bytes.
fn value(kind: u32, parts: &[&[u8]]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &parts.concat()].concat()
}

#[test]
fn lies_are_errors_that_name_the_culprit() {
    let huge = u64::MAX.to_le_bytes();
    let many = (1u64 << 40).to_le_bytes();
    let one = 1u64.to_le_bytes();
    let (array, text, byte) = (9u32.to_le_bytes(), 8u32.to_le_bytes(), 0u32.to_le_bytes());
    let nested: Vec<u8> = value(9, &[&[&array[..], &one].concat().repeat(9), &byte, &one, &[7]]);
    type Tensors<'a> = &'a [(&'a str, &'a [u64], u32, u64)];
    /// Metadata, tensors, bytes of data, and what the error says.
    type Lie<'a> = (Vec<(&'a str, Vec<u8>)>, Tensors<'a>, usize, &'a str);
    let cases: Vec<Lie<'_>> = vec![
        (vec![("key.a", value(8, &[&huge]))], &[], 0, "key.a"),
        (vec![("key.b", value(9, &[&byte, &many]))], &[], 0, "key.b"),
        (vec![("key.c", value(9, &[&text, &many]))], &[], 0, "key.c"),
        (vec![("key.d", nested)], &[], 0, "more than 4 deep"),
        (vec![("key.e", value(8, &[&one, &[0xFF]]))], &[], 0, "UTF-8"),
        (vec![("key.f", value(99, &[]))], &[], 0, "unknown type 99"),
        (vec![("key.g", value(7, &[&[2]]))], &[], 0, "neither true"),
        (vec![("k", value(0, &[&[2]])), ("k", value(0, &[&[2]]))], &[], 0, "\"k\" is there twice"),
        (vec![("general.alignment", value(4, &[&[0; 4]]))], &[], 0, "general.alignment"),
        (vec![("general.alignment", value(4, &[&48u32.to_le_bytes()]))], &[], 0, "general.alignment"),
        (vec![], &[("t", &[8], 0, 16)], 99, "alignment"),
        (vec![], &[("t", &[8], 0, 0), ("t", &[8], 0, 32)], 99, "\"t\" is there twice"),
        (vec![], &[("a", &[16], 0, 0), ("b", &[8], 0, 32)], 99, "overlap"),
        (vec![], &[("long", &[1 << 20], 0, 0)], 99, "outside of the file"),
        (vec![], &[("far", &[8], 0, 1 << 62)], 99, "outside of the file"),
        (vec![], &[("wide", &[1 << 32, 1 << 32], 0, 0)], 99, "wide"),
        (vec![], &[("deep", &[1; 5], 0, 0)], 99, "5 dimensions"),
        (vec![], &[("odd", &[33, 2], 8, 0)], 99, "33 columns"),
        (vec![], &[("blocks", &[1 << 32, 1 << 31], 12, 0)], 99, "blocks"),
    ];
    for (keys, tensors, data, expected) in cases {
        let path = Scratch::new("lie", &made(&keys, tensors, data));
        let error = Gguf::open(&path.0).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "expected {expected:?}: {error:?}");
    }
    let sound = made(&[], &[("empty", &[0, 4], 0, 0), ("scalar", &[], 0, 0)], 4);
    let path = Scratch::new("sound", &sound);
    let file = Gguf::open(&path.0).unwrap();
    assert_eq!(file.tensor("empty").unwrap().dims(), [4, 0]);
    assert_eq!(file.tensor("scalar").unwrap().item::<f32>().unwrap(), 0.0);
    // Counts that no file could hold.
    for at in [8, 16] {
        let mut bytes = sound.clone();
        bytes[at..at + 8].copy_from_slice(&huge);
        std::fs::write(&path.0, &bytes).unwrap();
        assert!(Gguf::open(&path.0).is_err());
    }
    for version in [1u32, 4, 3u32.swap_bytes()] {
        let mut bytes = sound.clone();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        std::fs::write(&path.0, &bytes).unwrap();
        assert!(Gguf::open(&path.0).err().unwrap().to_string().contains("version"));
    }
}

fn text(s: &str) -> Vec<u8> {
    value(8, &[&(s.len() as u64).to_le_bytes(), s.as_bytes()])
}

#[test]
fn a_factor_without_a_type_is_a_linear_one() {
    let (extent, number) = (|n: u32| value(4, &[&n.to_le_bytes()]), |x: f32| value(6, &[&x.to_le_bytes()]));
    let read = |more: Vec<(&str, Vec<u8>)>| {
        let extents = ["embedding_length", "attention.head_count", "feed_forward_length", "block_count", "context_length"];
        let names = extents.map(|name| format!("llama.{name}"));
        let mut keys = vec![("general.architecture", text("llama")), ("llama.attention.layer_norm_rms_epsilon", number(0.5))];
        keys.extend(names.iter().map(|name| (name.as_str(), extent(4))));
        keys.extend(more);
        let path = Scratch::new("scaled", &made(&keys, &[("token_embd.weight", &[4, 2], 0, 0)], 32));
        let config = match gguf_config(&Gguf::open(&path.0)?)? {
            CausalConfig::Llama(config) => config,
            other => panic!("{other:?}"),
        };
        Ok::<_, kiln_tensor::Error>(config.rope_parameters.map(|rope| {
            let factor = rope.fields["factor"].as_f64();
            (rope.fields["rope_type"].as_str().unwrap().to_owned(), factor.unwrap())
        }))
    };
    let scaling = |more| read(more).unwrap();
    let kind = |name| ("llama.rope.scaling.type", text(name));
    let factor = || ("llama.rope.scaling.factor", number(4.0));
    let linear = Some(("linear".to_owned(), 4.0));
    assert_eq!(scaling(vec![]), None);
    assert_eq!(scaling(vec![factor()]), linear);
    assert_eq!(scaling(vec![("llama.rope.scale_linear", number(4.0))]), linear);
    assert_eq!(scaling(vec![factor(), kind("linear")]), linear);
    assert_eq!(scaling(vec![factor(), kind("yarn")]), Some(("yarn".to_owned(), 4.0)));
    assert_eq!(scaling(vec![factor(), kind("none")]), None);
    assert_eq!(scaling(vec![("llama.rope.scaling.factor", number(0.0)), ("llama.rope.scaling.attn_factor", number(1.0))]), None);
    for (more, part) in [
        (vec![kind("linear")], "\"llama.rope.scaling.factor\" is missing"),
        (vec![factor(), kind("yarn"), ("llama.rope.scaling.attn_factor", number(0.5))], "\"llama.rope.scaling.attn_factor\" is 0.5"),
    ] {
        let error = read(more).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_model_that_is_not_known_is_an_error() {
    for (architecture, expected) in
        [("mamba", "\"mamba\" is not known"), ("llama", "llama.embedding_length"), ("gpt2", "token_embd.weight")]
    {
        let path = Scratch::new("unknown", &made(&[("general.architecture", text(architecture))], &[], 0));
        let error = load_gguf(&path.0, &Params::new()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(expected), "{architecture}: {error}");
    }
}

/// Keys of the metadata.
type Keys = Vec<(&'static str, Vec<u8>)>;

fn texts<S: AsRef<str>>(all: &[S]) -> Vec<u8> {
    let mut bytes = value(9, &[&8u32.to_le_bytes(), &(all.len() as u64).to_le_bytes()]);
    for text in all {
        bytes.extend((text.as_ref().len() as u64).to_le_bytes());
        bytes.extend(text.as_ref().as_bytes());
    }
    bytes
}

fn array(kind: u32, elements: &[[u8; 4]]) -> Vec<u8> {
    value(9, &[&kind.to_le_bytes(), &(elements.len() as u64).to_le_bytes(), &elements.concat()])
}

fn integers(all: &[i32]) -> Vec<u8> {
    array(5, &all.iter().map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

fn floats(all: &[f32]) -> Vec<u8> {
    array(6, &all.iter().map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

fn id(id: u32) -> Vec<u8> {
    value(4, &[&id.to_le_bytes()])
}

fn flag(on: bool) -> Vec<u8> {
    value(7, &[&[u8::from(on)]])
}

/// `keys` with another value of one of them, or without it.
fn with(keys: &[(&'static str, Vec<u8>)], key: &'static str, value: Option<Vec<u8>>) -> Keys {
    let others = keys.iter().filter(|(name, _)| *name != key).cloned();
    others.chain(value.map(|value| (key, value))).collect()
}

fn read_tokenizer(name: &str, keys: &[(&'static str, Vec<u8>)]) -> Result<Tokenizer> {
    let path = Scratch::new(name, &made(keys, &[], 0));
    Tokenizer::from_gguf(&Gguf::open(&path.0)?)
}

fn read_json(path: &str) -> Json {
    from_str(&std::fs::read_to_string(fixture(path)).unwrap()).unwrap()
}

fn strings(list: &Json) -> Vec<String> {
    from_value(list.clone()).unwrap()
}

fn by_id(vocabulary: &Json) -> Vec<String> {
    let mut entries: Vec<(u64, &String)> =
        vocabulary.as_object().unwrap().iter().map(|(token, id)| (id.as_u64().unwrap(), token)).collect();
    entries.sort_unstable();
    entries.into_iter().map(|(_, token)| token.clone()).collect()
}

/// The vocabulary of fixtures/text/gpt2 with `extra` tokens and merges, as fixtures/gguf/tokenizers.py gives it to transformers.
fn byte_level(rule: &str, extra: &Json) -> Keys {
    let mut tokens = by_id(&read_json("../text/gpt2/vocab.json"));
    tokens.extend(strings(&extra["tokens"]));
    let list = std::fs::read_to_string(fixture("../text/gpt2/merges.txt")).unwrap();
    let mut merges: Vec<String> = list.lines().skip(1).map(String::from).collect();
    merges.extend(strings(&extra["merges"]));
    let end = tokens.len() as u32;
    let kinds = [vec![1; tokens.len() - 5], vec![3; 3], vec![4; 2]].concat();
    vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text(rule)),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.merges", texts(&merges)),
        ("tokenizer.ggml.token_type", integers(&kinds)),
        ("tokenizer.ggml.bos_token_id", id(end - 5)),
        ("tokenizer.ggml.eos_token_id", id(end - 3)),
        ("tokenizer.ggml.eot_token_id", id(end - 4)),
        ("tokenizer.ggml.padding_token_id", id(u32::MAX)),
        ("tokenizer.ggml.add_bos_token", flag(true)),
        ("tokenizer.ggml.add_eos_token", flag(true)),
    ]
}

#[test]
fn tokenizers_of_bytes_give_the_ids_of_transformers() -> Result<()> {
    let expected = read_json("tokenizers.json");
    for (rule, ids) in expected["bpe"].as_object().unwrap() {
        let tokenizer = read_tokenizer("bytes", &byte_level(rule, &expected["extra"]))?;
        let ids: Vec<Vec<u32>> = from_value(ids.clone()).unwrap();
        let (bos, eos) = (tokenizer.token_to_id("<|endoftext|>").unwrap(), tokenizer.token_to_id("<|im_end|>").unwrap());
        assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), (432, Some(bos), Some(eos), None));
        assert_eq!(tokenizer.special_tokens().eos, [eos, tokenizer.token_to_id("<|im_start|>").unwrap()]);
        for (text, ids) in strings(&expected["texts"]).iter().zip(&ids) {
            assert_eq!(tokenizer.encode(text)?, *ids, "{rule}: {text:?}");
            let whole = tokenizer.encode_with_specials(text)?;
            assert_eq!(whole, [&[bos][..], ids, &[eos]].concat(), "{rule}: {text:?}");
            assert_eq!(tokenizer.decode(ids, false)?, *text, "{rule}");
            // Of the special tokens, those of the user are text.
            assert_eq!(tokenizer.decode(&whole, true)?, text.replace("<|endoftext|>", ""), "{rule}");
        }
    }
    Ok(())
}

#[test]
fn what_a_byte_level_file_does_not_say_depends_on_its_rule() -> Result<()> {
    let expected = read_json("tokenizers.json");
    for (rule, begins) in [("gpt-2", false), ("llama-bpe", true)] {
        let keys = byte_level(rule, &expected["extra"]);
        let keys = with(&with(&keys, "tokenizer.ggml.add_bos_token", None), "tokenizer.ggml.add_eos_token", None);
        let tokenizer = read_tokenizer("ends", &keys)?;
        let mut whole: Vec<u32> = tokenizer.bos().filter(|_| begins).into_iter().collect();
        whole.extend(tokenizer.encode("the dog")?);
        assert_eq!(tokenizer.encode_with_specials("the dog")?, whole, "{rule}");
    }
    let unsaid = with(&byte_level("gpt-2", &expected["extra"]), "tokenizer.ggml.pre", None);
    let (tokenizer, text) = (read_tokenizer("rule", &unsaid)?, "it's 11111\n\nDOG'S(x)");
    assert_eq!(tokenizer.encode(text)?, read_tokenizer("rule", &byte_level("gpt-2", &expected["extra"]))?.encode(text)?);
    assert_ne!(tokenizer.encode(text)?, read_tokenizer("rule", &byte_level("qwen2", &expected["extra"]))?.encode(text)?);
    Ok(())
}

/// The vocabulary of fixtures/text/metaspace with scores.
fn sentence_piece() -> Keys {
    let tokens = by_id(&read_json("../text/metaspace/tokenizer.json")["model"]["vocab"]);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id.saturating_sub(259) as f32)).collect();
    let kinds = [vec![2, 3, 3], vec![6; 256], vec![1; tokens.len() - 259]].concat();
    vec![
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.pre", text("default")),
        ("tokenizer.ggml.tokens", texts(&tokens)),
        ("tokenizer.ggml.scores", floats(&scores)),
        ("tokenizer.ggml.token_type", integers(&kinds)),
    ]
}

#[test]
fn pieces_with_scores_give_the_ids_of_transformers() -> Result<()> {
    let expected = read_json("tokenizers.json");
    let tokenizer = read_tokenizer("pieces", &sentence_piece())?;
    let special = tokenizer.special_tokens();
    assert_eq!((special.unk, special.bos, &special.eos[..], tokenizer.vocab_size()), (Some(0), Some(1), &[2][..], 520));
    let ids: Vec<Vec<u32>> = from_value(expected["llama"].clone()).unwrap();
    let [whole, plain] = ["llama_decoded", "llama_decoded_plain"].map(|key| strings(&expected[key]));
    for (i, text) in strings(&expected["texts"]).iter().enumerate() {
        assert_eq!(tokenizer.encode(text)?, ids[i], "{text:?}");
        let with_bos = [&[1u32][..], &ids[i]].concat();
        assert_eq!(tokenizer.encode_with_specials(text)?, with_bos, "{text:?}");
        assert_eq!((tokenizer.decode(&with_bos, false)?, tokenizer.decode(&with_bos, true)?), (whole[i].clone(), plain[i].clone()));
    }
    let mut bare = sentence_piece();
    bare.extend([("tokenizer.ggml.add_space_prefix", flag(false)), ("tokenizer.ggml.add_bos_token", flag(false))]);
    let bare = read_tokenizer("pieces", &bare)?;
    assert_eq!(bare.encode_with_specials(" hello")?, tokenizer.encode("hello")?);
    assert_ne!(bare.encode("hello")?, tokenizer.encode("hello")?);
    assert_eq!(bare.decode(&bare.encode(" the  fox")?, true)?, " the  fox");
    Ok(())
}

#[test]
fn a_file_brings_its_chat_template_along() -> Result<()> {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{{ eos_token }}";
    let with_template = |source: Option<&str>| {
        let keys = with(&sentence_piece(), "tokenizer.chat_template", source.map(text));
        let path = Scratch::new("template", &made(&keys, &[], 0));
        let file = Gguf::open(&path.0)?;
        let tokenizer = Tokenizer::from_gguf(&file)?;
        ChatTemplate::from_gguf(&file, &tokenizer).map(|template| (tokenizer, template))
    };
    let (tokenizer, template) = with_template(Some(source))?;
    let chat = [Message::new("user", "the fox")];
    assert_eq!(template.render(&chat, false, &Variables::new())?, "<s>[user] the fox</s>");
    let ids = template.encode(&tokenizer, &chat, false, &Variables::new())?;
    assert_eq!((ids.first(), ids.last()), (Some(&1), Some(&2)));
    for source in [None, Some("{% for %}")] {
        let error = with_template(source).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("tokenizer.chat_template"), "{error}");
    }
    Ok(())
}

/// Small vocabularies of both kinds.
fn small() -> [Keys; 2] {
    let bytes = vec![
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>"])),
        ("tokenizer.ggml.merges", texts(&["a b"])),
        ("tokenizer.ggml.token_type", integers(&[1, 1, 1, 3])),
        ("tokenizer.ggml.eos_token_id", id(3)),
    ];
    let pieces = vec![
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.tokens", texts(&["<unk>", "<s>", "</s>", "a", "aa"])),
        ("tokenizer.ggml.scores", floats(&[0.0, 0.0, 0.0, f32::NAN, -1.0])),
        ("tokenizer.ggml.token_type", integers(&[2, 3, 3, 1, 1])),
    ];
    [bytes, pieces]
}

#[test]
fn tokenizers_that_do_not_fit_together_are_errors_that_name_the_key() {
    let [bytes, pieces] = small();
    let nothing: [&str; 0] = [];
    let long = "x".repeat(300);
    let cases = [
        (&bytes, "tokenizer.ggml.model", None, "is missing"),
        (&bytes, "tokenizer.ggml.model", Some(text("bert")), "is \"bert\", which is not read"),
        (&bytes, "tokenizer.ggml.model", Some(text("bert")), "--tokenizer"),
        (&bytes, "tokenizer.ggml.pre", Some(text("tekken")), "is \"tekken\""),
        (&bytes, "tokenizer.ggml.pre", Some(id(3)), "expected a text"),
        (&bytes, "tokenizer.ggml.tokens", None, "is missing"),
        (&bytes, "tokenizer.ggml.tokens", Some(integers(&[1, 2, 3, 4])), "is an array of signed integers, expected an array of texts"),
        (&bytes, "tokenizer.ggml.tokens", Some(texts(&nothing)), "has 0 tokens"),
        (&bytes, "tokenizer.ggml.tokens", Some(texts(&["a", "b", "ab", "a"])), "has \"a\" twice, as elements 0 and 3"),
        (&bytes, "tokenizer.ggml.token_type", Some(integers(&[1, 1, 1])), "has 3 elements for the 4 tokens"),
        (&bytes, "tokenizer.ggml.token_type", Some(integers(&[1, 1, 1, -3])), "expected an array of integers from 0 on"),
        (&bytes, "tokenizer.ggml.merges", None, "is missing"),
        (&bytes, "tokenizer.ggml.merges", Some(floats(&[1.0])), "is an array of floats, expected an array of texts"),
        (&bytes, "tokenizer.ggml.merges", Some(texts(&["ab"])), "element 0, \"ab\", is not two tokens"),
        (&bytes, "tokenizer.ggml.merges", Some(texts(&["a b", "a  b"])), "element 1, \"a  b\", is not two tokens"),
        (&bytes, "tokenizer.ggml.merges", Some(texts(&["b a"])), "makes none of \"tokenizer.ggml.tokens\""),
        (&bytes, "tokenizer.ggml.merges", Some(texts(&["a b", "a b"])), "element 1, \"a b\", is there twice"),
        (&bytes, "tokenizer.ggml.bos_token_id", Some(id(4)), "is 4, of 4 tokens"),
        (&bytes, "tokenizer.ggml.eot_token_id", Some(value(5, &[&(-1i32).to_le_bytes()])), "expected an integer from 0 on"),
        (&bytes, "tokenizer.ggml.add_bos_token", Some(flag(true)), "\"bos_token_id\""),
        (&pieces, "tokenizer.ggml.scores", None, "is missing"),
        (&pieces, "tokenizer.ggml.scores", Some(floats(&[0.0])), "has 1 elements for the 5 tokens"),
        (&pieces, "tokenizer.ggml.scores", Some(texts(&["0"; 5])), "expected an array of numbers"),
        (&pieces, "tokenizer.ggml.tokens", Some(texts(&["<unk>", "<s>", "</s>", "a", &long])), "element 4 is a piece of 300 bytes"),
        (&pieces, "tokenizer.ggml.tokens", Some(texts(&["<unk>", "<s>", "</s>", "a", "<s>"])), "has \"<s>\" twice"),
        (&pieces, "tokenizer.ggml.unknown_token_id", Some(id(9)), "is 9, of 5 tokens"),
        (&pieces, "tokenizer.ggml.add_space_prefix", Some(id(1)), "expected true or false"),
    ];
    for (keys, key, value, part) in cases {
        let error = read_tokenizer("unfit", &with(keys, key, value)).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(key) && error.contains(part), "{key}, {part}: {error:?}");
    }
    assert_eq!(read_tokenizer("unfit", &bytes).unwrap().encode("ab<s>").unwrap(), [2, 3]);
    assert_eq!(read_tokenizer("unfit", &pieces).unwrap().encode("aa").unwrap(), [0, 4]);
}

#[test]
fn no_damage_to_a_tokenizer_leads_to_a_panic() {
    for keys in small() {
        let whole = made(&keys, &[], 0);
        let path = Scratch::new("damaged-tokenizer", &whole);
        for at in 0..whole.len() {
            for mask in [1, 4, 0xFF] {
                let mut bytes = whole.clone();
                bytes[at] ^= mask;
                std::fs::write(&path.0, &bytes).unwrap();
                use_all(&path.0);
            }
        }
    }
}
