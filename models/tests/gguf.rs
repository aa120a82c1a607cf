//! GGUF files: values as gguf-py has them, models as transformers has them, and files that are not what they claim.

use kiln_autograd::no_grad;
use kiln_models::gguf::{Array, Gguf, Storage, Value};
use kiln_models::nn::Params;
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
