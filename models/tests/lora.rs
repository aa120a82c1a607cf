//! Low-rank adapters against `peft` (`fixtures/lora.py`), and what training, merging and files of them promise.

use kiln_autograd::TensorExt;
use kiln_models::align::{DpoOptions, DpoTrainer, PreferencePair, TrainOptions};
use kiln_models::data::TokenSequence;
use kiln_models::lora::*;
use kiln_models::nn::*;
use kiln_models::optim::{AdamWOptions, GroupOptimizer, Optimizer};
use kiln_models::transformer::{self, CausalLm, Decoder, Gpt2Config, LmBatch, LmTrainer, LmTrainerOptions, Pass};
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Generator, Quantization, Result, Tensor, autocast};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const CASES: [&str; 6] = ["lora", "rslora", "dora", "patterns", "lora_only", "companions"];

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora")
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lora-{name}"))
}

struct Block {
    q_proj: Linear,
    o_proj: Linear,
    norm: LayerNorm,
}

/// The script's model.
struct Net {
    params: Params,
    layers: Vec<Block>,
    score: Linear,
}

impl Net {
    fn build(params: &Params) -> Result<Self> {
        let block = |i| {
            let params = params.scope("layers").index(i);
            Ok(Block {
                q_proj: Linear::new(&params.scope("q_proj"), 6, 8, true)?,
                o_proj: Linear::new(&params.scope("o_proj"), 8, 6, false)?,
                norm: LayerNorm::new(&params.scope("norm"), 6)?,
            })
        };
        let layers = (0..2).map(block).collect::<Result<_>>()?;
        Ok(Self { params: params.clone(), layers, score: Linear::new(&params.scope("score"), 6, 3, true)? })
    }

    /// With the script's weights, in a scope, in evaluation mode.
    fn load(dtype: DType) -> Self {
        let params = Params::with(ParamsOptions { dtype, generator: Generator::new(3), ..ParamsOptions::default() });
        let state = base().into_iter().filter(|(name, _)| name.starts_with("model.")).collect();
        let net = params.build_from(state, LoadMode::Strict, |params| Self::build(&params.scope("model"))).unwrap().0;
        params.eval();
        net
    }

    fn run(&self, x: &Tensor) -> Tensor {
        let mut x = x.clone();
        for layer in &self.layers {
            let update = layer.o_proj.forward(&layer.q_proj.forward(&x).unwrap().gelu().unwrap()).unwrap();
            x = layer.norm.forward(&x.add(&update).unwrap()).unwrap();
        }
        self.score.forward(&x).unwrap()
    }

    fn loss(&self, dtype: DType) -> Tensor {
        let [x, target] = ["x", "target"].map(|name| base()[name].to_dtype(dtype).unwrap());
        self.run(&x).sub(&target).unwrap().square().unwrap().mean(()).unwrap()
    }

    fn output(&self) -> Vec<f32> {
        values(&self.run(&base()["x"].to_dtype(self.score.bias().unwrap().dtype()).unwrap()))
    }
}

fn base() -> StateDict {
    safetensors::load(fixtures().join("base.safetensors")).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().to_vec().unwrap()
}

/// Within 1e-5 of the largest expected value.
fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-5 * largest, "{what}: {found} {expected} of {largest}");
    }
}

fn attach(net: &Net, config: &LoraConfig) -> Lora {
    Lora::attach(&net.params, config, &Generator::new(11)).unwrap()
}

fn both() -> LoraConfig {
    LoraConfig { r: 3, target_modules: ["q_proj", "o_proj"].into(), init_lora_weights: LoraInit::Random, ..LoraConfig::default() }
}

#[test]
fn peft_computes_the_same() {
    for case in CASES {
        let net = Net::load(DType::F32);
        let expected = safetensors::load(fixtures().join(case).join("expected.safetensors")).unwrap();
        let plain = net.output();
        assert_near(case, &plain, &values(&expected["base_out"]));
        let mut lora = Lora::load(&net.params, fixtures().join(case)).unwrap();
        assert_near(case, &net.output(), &values(&expected["out"]));
        let loss = net.loss(DType::F32);
        assert_near(case, &values(&loss), &values(&expected["loss"]));
        loss.backward().unwrap();

        let grads: BTreeMap<String, Tensor> =
            expected.iter().filter_map(|(k, t)| Some((k.strip_prefix("grad.")?.to_owned(), t.clone()))).collect();
        let saved = |param: &Param| match param.name().strip_prefix("model.") {
            Some(name) if name.ends_with("_proj.bias") => {
                format!("base_model.model.{}", name.replace("_proj.bias", "_proj.base_layer.bias"))
            }
            Some(name) => format!("base_model.model.{name}"),
            None => param.name().to_owned(),
        };
        let ours: BTreeMap<String, Tensor> = lora.trainable().iter().map(|p| (saved(p), p.grad().unwrap())).collect();
        assert_eq!(ours.keys().collect::<Vec<_>>(), grads.keys().collect::<Vec<_>>());
        for (name, grad) in &grads {
            assert_near(&format!("{case} {name}"), &values(&ours[name]), &values(grad));
        }
        let trained: Vec<_> = lora.trainable().iter().map(|p| p.name().to_owned()).collect();
        for param in net.params.params() {
            assert_eq!(param.grad().is_some(), trained.contains(&param.name().to_owned()), "{case} {}", param.name());
        }

        {
            let _off = lora.disable().unwrap();
            assert_eq!(net.output(), plain);
        }
        lora.merge().unwrap();
        for (name, weight) in net.params.state_dict() {
            let name = name.replace("model.", "merged.");
            assert_near(&format!("{case} {name}"), &values(&weight), &values(&expected[&name]));
        }
        assert_near(case, &net.output(), &values(&expected["out"]));
    }
}

#[test]
fn an_adapter_of_gpt2_computes_the_same() {
    let folder = fixtures().join("gpt2");
    let params = Params::new();
    let (_, model) = transformer::load(folder.join("base"), &params).unwrap();
    params.eval();
    let expected = safetensors::load(folder.join("expected.safetensors")).unwrap();
    let mut lora = Lora::load(&params, folder.join("adapter")).unwrap();
    let tokens = &expected["tokens"];
    let logits = model.forward(tokens, Pass::default()).unwrap();
    assert_near("logits", &values(&logits), &values(&expected["logits"]));
    let (ahead, next) = (logits.narrow(1, 0, 6).unwrap(), tokens.narrow(1, 1, 6).unwrap());
    let loss = ahead.reshape([-1, 13]).unwrap().cross_entropy(&next.reshape([-1]).unwrap()).unwrap();
    assert_near("loss", &values(&loss), &values(&expected["loss"]));
    loss.backward().unwrap();
    assert_eq!(lora.trainable().len(), expected.keys().filter(|name| name.starts_with("grad.")).count());
    for param in lora.trainable() {
        assert_near(param.name(), &values(&param.grad().unwrap()), &values(&expected[&format!("grad.{}", param.name())]));
    }
    lora.merge().unwrap();
    for layer in params.linears() {
        let merged = &expected[&format!("merged.{}", layer.name())];
        assert_near(layer.name(), &values(&layer.weight().unwrap().get()), &values(merged));
    }
    assert_near("merged", &values(&model.forward(tokens, Pass::default()).unwrap()), &values(&expected["logits"]));
}

#[test]
fn an_adapter_of_a_table_computes_the_same() {
    for case in ["embedding", "embedding_dora"] {
        let folder = fixtures().join(case);
        let expected = safetensors::load(folder.join("expected.safetensors")).unwrap();
        let state: StateDict = expected.iter().filter_map(|(k, t)| Some((k.strip_prefix("model.")?.to_owned(), t.clone()))).collect();
        let build =
            |params: &Params| Ok((Embedding::new(&params.scope("embed_tokens"), 7, 6)?, Linear::new(&params.scope("score"), 6, 3, true)?));
        let params = Params::new();
        let ((table, score), _) = params.build_from(state, LoadMode::Strict, build).unwrap();
        params.eval();
        let run = || score.forward(&table.forward(&expected["x"]).unwrap().gelu().unwrap()).unwrap();
        let plain = values(&run());
        let mut lora = Lora::load(&params, &folder).unwrap();
        assert_near(case, &values(&run()), &values(&expected["out"]));
        let loss = run().sub(&expected["target"]).unwrap().square().unwrap().mean(()).unwrap();
        assert_near(case, &values(&loss), &values(&expected["loss"]));
        loss.backward().unwrap();
        assert_eq!(lora.trainable().len(), expected.keys().filter(|name| name.starts_with("grad.")).count());
        for param in lora.trainable() {
            assert_near(param.name(), &values(&param.grad().unwrap()), &values(&expected[&format!("grad.{}", param.name())]));
        }
        assert_eq!(params.trainable().len(), lora.trainable().len());
        lora.save(self::folder(case)).unwrap();
        lora.merge().unwrap();
        for (name, weight) in params.state_dict() {
            assert_near(&name, &values(&weight), &values(&expected[&format!("merged.{name}")]));
        }
        assert_near(case, &values(&run()), &values(&expected["out"]));
        lora.detach().unwrap();
        assert_eq!(values(&run()), plain);
        let lora = Lora::load(&params, self::folder(case)).unwrap();
        assert_near(case, &values(&run()), &values(&expected["out"]));
        lora.detach().unwrap();
        // Of the input embedding, peft's file holds the base table too: it must be the model's.
        params.named("embed_tokens.weight").unwrap().set(&Tensor::ones([7, 6], ()).unwrap()).unwrap();
        let error = Lora::load(&params, &folder).err().unwrap().to_string();
        assert!(error.contains("embed_tokens.base_layer.weight") && error.contains("another weight"), "{error}");
    }
}

/// Positions without padding are read as a run of rows, with it as a lookup: an adapter of their table takes part in both.
#[test]
fn an_adapter_of_positions_takes_part_in_every_pass() {
    let params = Params::seeded(3);
    let config = Gpt2Config { vocab_size: 13, n_positions: 8, n_embd: 8, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
    let model = config.build(&params).unwrap();
    let wanted = LoraConfig { target_modules: ["wpe"].into(), init_lora_weights: LoraInit::Random, ..LoraConfig::default() };
    let tokens = Tensor::from_vec(vec![1i64, 5, 2, 9, 0, 3], [2, 3]).unwrap();
    let run = |pass: Pass<'_>| model.forward(&tokens, pass).unwrap();
    let base = values(&run(Pass::default()));
    let mut lora = Lora::attach(&params, &wanted, &Generator::new(1)).unwrap();
    params.eval();
    let mask = Tensor::ones([2, 3], DType::Bool).unwrap();
    let (plain, masked) = (run(Pass::default()), run(Pass { key_mask: Some(&mask), ..Pass::default() }));
    assert!(values(&plain).iter().zip(&base).any(|(a, b)| (a - b).abs() > 1e-3));
    assert_near("masked", &values(&masked), &values(&plain));
    plain.square().unwrap().mean(()).unwrap().backward().unwrap();
    for param in lora.trainable() {
        assert!(values(&param.grad().unwrap()).iter().any(|&g| g != 0.0), "{}", param.name());
    }
    lora.merge().unwrap();
    assert_near("merged", &values(&run(Pass::default())), &values(&plain));
    lora.detach().unwrap();
    for (field, config) in [
        ("target_modules", LoraConfig { target_modules: ["c_attn", "lm_head"].into(), ..LoraConfig::default() }),
        (
            "modules_to_save",
            LoraConfig { target_modules: ["c_attn"].into(), modules_to_save: Some(vec!["lm_head".into()]), ..LoraConfig::default() },
        ),
    ] {
        let error = Lora::attach(&params, &config, &Generator::new(1)).err().unwrap().to_string();
        assert!(error.contains(field) && error.contains("lm_head"), "{error}");
    }
}

/// `peft` trains the table and leaves the output as it was, which one weight for both cannot be.
#[test]
fn a_table_that_is_also_the_output_is_not_trained_in_full() {
    let wanted = LoraConfig { target_modules: ["c_attn"].into(), modules_to_save: Some(vec!["wte".into()]), ..LoraConfig::default() };
    let tied = Gpt2Config { vocab_size: 13, n_positions: 8, n_embd: 8, n_layer: 1, n_head: 2, ..Gpt2Config::default() };
    let attach = |config: &Gpt2Config, scored: bool| {
        let params = Params::seeded(3);
        let _model = config.build(&params)?;
        let _score = scored.then(|| Linear::new(&params.scope("score"), 8, 1, false)).transpose()?;
        Lora::attach(&params, &wanted, &Generator::new(1))
    };
    let error = attach(&tied, false).err().unwrap().to_string();
    assert!(error.contains("modules_to_save: `wte` means `transformer.wte`, which is tied"), "{error}");
    // A head of its own, or one that scores texts, leaves the table to the tokens.
    assert!(attach(&Gpt2Config { tie_word_embeddings: false, ..tied.clone() }, false).is_ok());
    assert!(attach(&tied, true).is_ok());
}

#[test]
fn merging_is_undone_to_the_bit() {
    for dtype in [DType::F32, DType::BF16] {
        let net = Net::load(dtype);
        let (before, plain) = (net.params.state_dict(), net.output());
        let config = LoraConfig { use_dora: true, bias: Bias::All, modules_to_save: Some(vec!["score".into()]), ..both() };
        let mut lora = attach(&net, &config);
        lora.trainable().iter().for_each(|p| p.set(&p.get().add_scalar(0.25).unwrap()).unwrap());
        let adapted = net.output();
        assert_ne!(adapted, plain);
        lora.merge().unwrap();
        lora.merge().unwrap();
        assert!(lora.is_merged());
        let merged = net.output();
        let off = lora.disable().unwrap();
        let twice = lora.disable().unwrap();
        assert_eq!(net.output(), plain);
        drop(off);
        assert_eq!(net.output(), plain);
        assert!(!lora.is_enabled() && lora.save(folder("disabled")).unwrap_err().to_string().contains("disabled"));
        drop(twice);
        assert_eq!(net.output(), merged);
        lora.unmerge().unwrap();
        assert_eq!(net.output(), adapted);
        lora.merge().unwrap();
        assert_eq!(net.output(), merged);
        lora.detach().unwrap();
        assert_eq!(net.output(), plain);
        for (name, weight) in net.params.state_dict() {
            assert_eq!(values(&weight), values(&before[&name]), "{name}");
        }
        assert!(net.params.params().iter().all(|p| !p.is_frozen()));

        let lora = attach(&net, &config);
        lora.merge_and_unload().unwrap();
        assert!(net.params.linears().iter().all(|layer| layer.adapter().is_none()));
        assert_ne!(net.output(), plain);
    }
}

#[test]
fn an_adapter_starts_as_the_base_model_and_training_lowers_the_loss() {
    for config in [both(), LoraConfig { use_dora: true, lora_dropout: 0.1, ..both() }] {
        let config = LoraConfig { init_lora_weights: LoraInit::KaimingUniform, r: 4, lora_alpha: 16.0, ..config };
        let net = Net::load(DType::F32);
        let (plain, before) = (net.output(), net.params.state_dict());
        let lora = attach(&net, &config);
        assert_near("start", &net.output(), &plain);
        net.params.train();
        let first = net.loss(DType::F32).item::<f32>().unwrap();
        let mut optimizer = GroupOptimizer::new(lora.trainable(), AdamWOptions { lr: 0.02, ..Default::default() }).unwrap();
        for _ in 0..60 {
            net.loss(DType::F32).backward().unwrap();
            optimizer.step().unwrap();
            lora.trainable().iter().for_each(Param::zero_grad);
        }
        net.params.eval();
        let last = net.loss(DType::F32).item::<f32>().unwrap();
        assert!(last < 0.8 * first, "{first} {last}");
        for (name, weight) in net.params.state_dict() {
            assert_eq!(values(&weight), values(&before[&name]), "{name}");
        }
    }
}

#[test]
fn dropout_drops_in_training_only() {
    for use_dora in [false, true] {
        let net = Net::load(DType::F32);
        let _lora = attach(&net, &LoraConfig { lora_dropout: 0.5, use_dora, ..both() });
        let still = net.output();
        assert_eq!(net.output(), still);
        net.params.train();
        let (a, b) = (net.output(), net.output());
        assert!(a != b && a != still);
        // The base layer's own product is not dropped: the mean is that of evaluation, for one layer is linear.
        let layer = &net.layers[0].q_proj;
        let x = base()["x"].clone();
        let mut mean = vec![0f32; 4 * 5 * 8];
        for _ in 0..4000 {
            mean.iter_mut().zip(values(&layer.forward(&x).unwrap())).for_each(|(m, v)| *m += v / 4000.0);
        }
        net.params.eval();
        let expected = values(&layer.forward(&x).unwrap());
        assert!(mean.iter().zip(expected).all(|(m, e)| (m - e).abs() < 0.1), "dora {use_dora}");
    }
}

#[test]
fn names_patterns_and_heads_select() {
    let select = |modules: Modules| {
        let net = Net::load(DType::F32);
        let lora = Lora::attach(&net.params, &LoraConfig { target_modules: modules, ..both() }, &Generator::new(0))?;
        lora.save(folder("select"))?;
        let names: Vec<String> = lora.layer_names().into_iter().map(str::to_owned).collect();
        lora.detach()?;
        // The file means the same layers.
        assert_eq!(Lora::load(&net.params, folder("select"))?.layer_names(), names);
        Ok::<_, kiln_tensor::Error>(names.join(" "))
    };
    let all = "layers.0.q_proj layers.0.o_proj layers.1.q_proj layers.1.o_proj";
    assert_eq!(select("all-linear".into()).unwrap(), all);
    assert_eq!(select(["layers.*"].into()).unwrap(), all);
    assert_eq!(select(["1.q_proj", "score"].into()).unwrap(), "layers.1.q_proj score");
    assert_eq!(select(["*.0.q*"].into()).unwrap(), "layers.0.q_proj");
    assert_eq!(select(r".*\.(q|v)_proj".into()).unwrap(), "layers.0.q_proj layers.1.q_proj");
    for (modules, message) in [
        (Modules::from(["proj"]), "matches no layer; there are layers.0.q_proj"),
        (Modules::from(["norm", "q_proj"]), "`norm` means `layers.0.norm`, which is no Linear, Embedding or Conv2d layer"),
        (Modules::from("q_proj"), "matches no layer"),
        (Modules::from("(q_proj"), "no regular expression"),
    ] {
        let error = select(modules).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let net = Net::load(DType::F32);
    let _first = attach(&net, &both());
    let error = Lora::attach(&net.params, &both(), &Generator::new(0)).err().unwrap().to_string();
    assert!(error.contains("`layers.0.q_proj` has an adapter already"), "{error}");
}

#[test]
fn half_weights_and_autocast_keep_adapters_in_f32() {
    let config = LoraConfig { use_dora: true, ..both() };
    for (dtype, cast) in [(DType::BF16, false), (DType::F32, true), (DType::F64, false)] {
        let net = Net::load(dtype);
        let lora = attach(&net, &config);
        let own = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        assert!(lora.trainable().iter().all(|p| p.dtype() == own));
        let exact = Net::load(DType::F32);
        let reference = attach(&exact, &config);
        // DoRA's magnitudes follow the weights, the matrices the generator, which draws otherwise in f64.
        for (param, exact) in lora.trainable().iter().zip(reference.trainable()) {
            param.set(&exact.get().to_dtype(own).unwrap()).unwrap();
        }
        let loss = if cast { autocast(DType::BF16, || net.loss(dtype)).unwrap() } else { net.loss(dtype) };
        loss.backward().unwrap();
        exact.loss(DType::F32).backward().unwrap();
        for (param, exact) in lora.trainable().iter().zip(reference.trainable()) {
            let (found, expected) = (values(&param.grad().unwrap()), values(&exact.grad().unwrap()));
            let largest = expected.iter().fold(0f32, |l, x| l.max(x.abs()));
            let near = if own == DType::F64 { 1e-4 } else { 0.08 };
            assert!(found.iter().zip(expected).all(|(f, e)| (f - e).abs() <= near * largest), "{dtype} {}", param.name());
        }
    }
}

/// 64 → 64 → 3, and the loss on some data.
fn wide(params: &Params, dtype: DType) -> (impl Fn() -> Tensor, [Linear; 2]) {
    let layers = [Linear::new(&params.scope("up"), 64, 64, true).unwrap(), Linear::new(&params.scope("down"), 64, 3, false).unwrap()];
    let generator = Generator::new(9);
    let [x, y] = [64, 3].map(|n| generator.randn([8, n], dtype).unwrap());
    let [up, down] = layers.clone();
    let loss = move || {
        let out = down.forward(&up.forward_activated(&x, kiln_tensor::Activation::Gelu).unwrap()).unwrap();
        out.sub(&y).unwrap().square().unwrap().mean(()).unwrap()
    };
    (loss, layers)
}

#[test]
fn adapters_train_over_quantised_weights() {
    for kind in [Quantization::Int4 { group: 64 }, Quantization::Int8 { group: 64 }] {
        for use_dora in [false, true] {
            let config = LoraConfig {
                r: 4,
                use_dora,
                target_modules: "all-linear".into(),
                init_lora_weights: LoraInit::Random,
                ..LoraConfig::default()
            };
            let (params, dense) = (Params::seeded(7), Params::seeded(7));
            let ((loss, layers), (dense_loss, _)) = (wide(&params, DType::F32), wide(&dense, DType::F32));
            for params in [&params, &dense] {
                params.quantize_linears("*", kind).unwrap();
            }
            dense.dequantize_linears("*", DType::F32).unwrap();
            let mut lora = Lora::attach(&params, &config, &Generator::new(1)).unwrap();
            let over_dense = Lora::attach(&dense, &config, &Generator::new(1)).unwrap();
            assert!(params.quantize_linears("*", kind).is_ok_and(|changed| changed == 0));
            loss().backward().unwrap();
            dense_loss().backward().unwrap();
            assert_near("loss", &values(&loss()), &values(&dense_loss()));
            for (param, exact) in lora.trainable().iter().zip(over_dense.trainable()) {
                assert_near(param.name(), &values(&param.grad().unwrap()), &values(&exact.grad().unwrap()));
            }
            assert!(params.params().iter().all(|p| p.grad().is_none()));

            let first = loss().item::<f32>().unwrap();
            let mut optimizer = GroupOptimizer::new(lora.trainable(), AdamWOptions { lr: 0.01, ..Default::default() }).unwrap();
            for _ in 0..30 {
                lora.trainable().iter().for_each(Param::zero_grad);
                loss().backward().unwrap();
                optimizer.step().unwrap();
            }
            let last = loss().item::<f32>().unwrap();
            assert!(last < 0.5 * first, "{kind} {first} {last}");

            let error = lora.merge().unwrap_err().to_string();
            assert!(error.contains("`up` is quantised") && !lora.is_merged(), "{error}");
            assert_eq!(params.dequantize_linears("*", DType::F32).unwrap(), 2);
            lora.merge().unwrap();
            assert!((loss().item::<f32>().unwrap() - last).abs() < 1e-5 * first);
            assert!(params.quantize_linears("*", kind).unwrap_err().to_string().contains("has an adapter"));
            lora.merge_and_unload().unwrap();
            assert!(layers.iter().all(|layer| layer.adapter().is_none()));
        }
    }
    // Half-precision activations over 4 bits: the adapter stays in f32.
    let params = Params::with(ParamsOptions { dtype: DType::BF16, generator: Generator::new(7), ..ParamsOptions::default() });
    let (loss, _) = wide(&params, DType::BF16);
    params.quantize_linears("*", Quantization::Int4 { group: 64 }).unwrap();
    let lora =
        Lora::attach(&params, &LoraConfig { target_modules: "all-linear".into(), ..LoraConfig::default() }, &Generator::new(1)).unwrap();
    let value = loss();
    value.backward().unwrap();
    assert_eq!(value.dtype(), DType::BF16);
    assert!(lora.trainable().iter().all(|p| p.dtype() == DType::F32 && p.grad().is_some_and(|g| g.dtype() == DType::F32)));
}

fn save_case(name: &str, config: &LoraConfig) -> (PathBuf, Vec<f32>) {
    let net = Net::load(DType::F32);
    let lora = attach(&net, config);
    lora.trainable().iter().for_each(|p| p.set(&p.get().mul_scalar(1.25).unwrap()).unwrap());
    let folder = folder("peft").join(name);
    lora.save(&folder).unwrap();
    let out = net.run(&base()["x"]);
    safetensors::save(folder.join("out.safetensors"), [("out", &out)], &BTreeMap::new()).unwrap();
    (folder, values(&out))
}

#[test]
fn a_saved_adapter_loads_to_the_bit() {
    for (name, config) in saved_cases() {
        let (folder, out) = save_case(name, &config);
        let net = Net::load(DType::F32);
        let lora = Lora::load(&net.params, folder).unwrap();
        assert_eq!(net.output(), out, "{name}");
        assert_eq!((lora.config().r, lora.config().use_dora), (config.r, config.use_dora));
    }
}

fn saved_cases() -> Vec<(&'static str, LoraConfig)> {
    let saved = LoraConfig { bias: Bias::LoraOnly, modules_to_save: Some(vec!["score".into()]), ..both() };
    vec![
        ("plain", both()),
        ("all", LoraConfig { target_modules: "all-linear".into(), use_rslora: true, lora_alpha: 3.5, ..both() }),
        ("dora", LoraConfig { use_dora: true, rank_pattern: vec![("1.q_proj".into(), 2)], ..both() }),
        ("saved", saved),
        ("bias", LoraConfig { bias: Bias::All, alpha_pattern: vec![("o_proj".into(), 2.5)], ..both() }),
    ]
}

/// For `fixtures/lora.py FOLDER`, which loads these with `peft`.
#[test]
#[ignore = "writes a folder for a script"]
fn adapters_for_peft() {
    for (name, config) in saved_cases() {
        save_case(name, &config);
    }
    println!("{}", folder("peft").display());
}

#[test]
fn a_wrong_folder_is_an_error_that_names_what_is_wrong() {
    let (good, _) = save_case("hostile", &LoraConfig { use_dora: true, ..both() });
    let text = std::fs::read_to_string(good.join("adapter_config.json")).unwrap();
    let tensors = safetensors::load(good.join("adapter_model.safetensors")).unwrap();
    let bad = folder("bad");
    std::fs::create_dir_all(&bad).unwrap();
    let error = |text: &str, tensors: &StateDict| {
        std::fs::write(bad.join("adapter_config.json"), text).unwrap();
        safetensors::save(bad.join("adapter_model.safetensors"), tensors, &BTreeMap::new()).unwrap();
        let net = Net::load(DType::F32);
        let plain = net.output();
        let error = Lora::load(&net.params, &bad).err().unwrap().to_string();
        assert_eq!(net.output(), plain);
        assert!(net.params.params().iter().all(|p| !p.is_frozen()));
        error
    };
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{text}");
        text.replace(from, to)
    };
    for (text, message) in [
        (String::new(), "EOF"),
        ("[]".to_owned(), "object is expected"),
        ("[".repeat(100_000), "recursion limit"),
        (with(r#""r": 3"#, r#""r": 0"#), "a rank is at least 1"),
        (with(r#""r": 3"#, r#""r": -3"#), "-3"),
        (with(r#""r": 3"#, r#""r": 1000000000000"#), "expected f32 [1000000000000, 6], found f32 [3, 6]"),
        (with(r#""r": 3"#, r#""r": 18446744073709551615"#), "overflows"),
        (with(r#""r": 3,"#, ""), "`r` is missing"),
        (with("LORA", "IA3"), r#"peft_type "IA3""#),
        (with(r#""bias": "none""#, r#""bias": "some""#), "some"),
        (with(r#""bias": "none""#, r#""layer_replication": [[0, 1]]"#), "`layer_replication`"),
        (with(r#""bias": "none""#, r#""ensure_weight_tying": true"#), "`ensure_weight_tying`"),
        (with(r#""init_lora_weights": false"#, r#""init_lora_weights": "pissa""#), "pissa"),
        (with(r#""lora_dropout": 0.0"#, r#""lora_dropout": 7"#), "lora_dropout 7"),
        (with(r#""use_dora": true"#, r#""use_dora": false"#), "4 unexpected: base_model.model.layers.0.o_proj.lora_magnitude_vector"),
        (with("\"q_proj\",", ""), "6 unexpected"),
        (with("\"q_proj\"", "\"score\", \"q_proj\""), "3 missing: base_model.model.score.lora_A.weight"),
        (with(r#""rank_pattern": {}"#, r#""rank_pattern": {"(": 2}"#), "rank_pattern: `(`"),
        (with(r#""rank_pattern": {}"#, r#""rank_pattern": {"(?<!x)(.+)+(.+)+(.+)+!": 2}"#), "acktrack"),
    ] {
        let error = error(&text, &tensors);
        assert!(error.contains(message), "{message}: {error}");
    }
    let name = "base_model.model.layers.1.q_proj.lora_B.weight";
    let change = |f: &dyn Fn(&mut StateDict)| {
        let mut tensors = tensors.clone();
        f(&mut tensors);
        error(&text, &tensors)
    };
    let error = change(&|tensors| {
        tensors.remove(name);
        tensors.insert("what".into(), Tensor::ones([2], ()).unwrap());
        tensors.insert(name.replace("_B", "_A"), Tensor::ones([3, 6], DType::I64).unwrap());
    });
    for part in [format!("1 missing: {name}"), "1 unexpected: what".to_owned(), "found i64 [3, 6]".to_owned()] {
        assert!(error.contains(&part), "{error}");
    }
    std::fs::write(bad.join("adapter_config.json"), &text).unwrap();
    std::fs::write(bad.join("adapter_model.safetensors"), [255u8; 40]).unwrap();
    assert!(Lora::load(&Net::load(DType::F32).params, &bad).err().unwrap().to_string().contains("adapter_model.safetensors"));
    std::fs::remove_file(bad.join("adapter_model.safetensors")).unwrap();
    assert!(Lora::load(&Net::load(DType::F32).params, &bad).is_err());
    assert!(Lora::load(&Net::load(DType::F32).params, bad.join("none")).err().unwrap().to_string().contains("adapter_config.json"));
}

/// A trainer of adapters over an int8 GPT-2, which counts.
fn counting_trainer() -> LmTrainer<Decoder> {
    let config = Gpt2Config { vocab_size: 13, n_positions: 16, n_embd: 64, n_layer: 2, n_head: 4, ..Gpt2Config::default() };
    let params = Params::seeded(3);
    let model = config.build(&params).unwrap();
    params.quantize_linears("transformer.h", Quantization::Int8 { group: 64 }).unwrap();
    let config =
        LoraConfig { r: 4, lora_alpha: 16.0, lora_dropout: 0.1, target_modules: "all-linear".into(), use_dora: true, ..Default::default() };
    let lora = Lora::attach(&params, &config, params.generator()).unwrap();
    model.set_activation_checkpointing(true);
    let trainer = LmTrainer::new(model, LmTrainerOptions { lr: 0.02, steps: 40, warmup_steps: 2, ..LmTrainerOptions::default() }).unwrap();
    assert_eq!(params.trainable().len(), lora.trainable().len());
    trainer
}

#[test]
fn the_base_model_is_the_reference_of_the_adapted_one() {
    let config = Gpt2Config { vocab_size: 13, n_positions: 16, n_embd: 16, n_layer: 2, n_head: 2, ..Gpt2Config::default() };
    let policy: Arc<dyn CausalLm> = Arc::new(config.build(&Params::seeded(3)).unwrap());
    let tokens = Tensor::from_vec((0..12i64).collect(), [2, 6]).unwrap();
    let logits = |model: &dyn CausalLm| values(&model.forward(&tokens, Pass::default()).unwrap());
    policy.params().eval();
    let base = logits(&*policy);
    let config = LoraConfig { r: 4, bias: Bias::All, target_modules: ["c_attn", "wte"].into(), ..LoraConfig::default() };
    let lora = Arc::new(Lora::attach(policy.params(), &config, policy.params().generator()).unwrap());
    let reference = Arc::new(WithoutAdapter::new(policy.clone(), lora.clone()));
    let options = DpoOptions { train: TrainOptions { disable_dropout: true, ..TrainOptions::new(0.02) }, ..DpoOptions::default() };
    let mut trainer = DpoTrainer::new(policy.clone(), Some(reference.clone()), options).unwrap();
    let sample = |last: u32| TokenSequence::completion(&[1, 2, 3], &[4, last]);
    let pairs = [PreferencePair { chosen: sample(5), rejected: sample(6), ..PreferencePair::default() }];
    let losses: Vec<f64> = (0..10).map(|_| trainer.step(&pairs).unwrap().loss).collect();
    // The policy starts as the reference: −log σ(0).
    assert!((losses[0] - 2f64.ln()).abs() < 1e-6 && losses.windows(2).all(|pair| pair[1] < pair[0]), "{losses:?}");
    assert_eq!(logits(&*reference), base);
    assert_ne!(logits(&*policy), base);
    assert!(lora.is_enabled());
    let state = trainer.state_dict().unwrap();
    assert!(state.keys().any(|name| name.starts_with("adapter.base_model.model.transformer.wte.lora_embedding_A")));
    trainer.load_state_dict(&state).unwrap();
}

#[test]
fn a_trainer_trains_adapters_and_resumes_to_the_bit() {
    let batch = |seed: i64| {
        let count = |shift: i64| (0..4 * 12).map(|i| (i / 12 * 5 + i % 12 + seed + shift) % 13).collect::<Vec<i64>>();
        let [tokens, targets] = [0, 1].map(|shift| Tensor::from_vec(count(shift), [4, 12]).unwrap());
        vec![LmBatch { tokens, targets, segments: None }]
    };
    let mut trainer = counting_trainer();
    let before = trainer.model().params().state_dict();
    let losses: Vec<f64> = (0..12).map(|i| trainer.step(&batch(i)).unwrap().loss).collect();
    assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
    let state = trainer.state_dict().unwrap();
    let mut resumed = counting_trainer();
    resumed.load_state_dict(&state).unwrap();
    for i in 12..15 {
        assert_eq!(trainer.step(&batch(i)).unwrap().loss, resumed.step(&batch(i)).unwrap().loss);
    }
    let [a, b] = [&trainer, &resumed].map(|trainer| trainer.model().params().adapter_state_dict());
    assert!(a.len() == 24 && a.iter().all(|(name, x)| values(x) == values(&b[name])));
    for (name, tensor) in trainer.model().params().state_dict() {
        assert_eq!(values(&tensor), values(&before[&name]), "{name}");
    }
    let without = state.into_iter().filter(|(name, _)| !name.ends_with("lora_magnitude_vector")).collect();
    assert!(resumed.load_state_dict(&without).unwrap_err().to_string().contains("8 missing"));
}
