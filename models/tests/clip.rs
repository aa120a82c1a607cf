//! CLIP against the reference: states, embeddings, loss and the gradients of all parameters; files of other layouts; the pictures that
//! the image tower sees; and files that are not what they claim. `fixtures/clip/make.py` made the reference.

use kiln_autograd::TensorExt;
use kiln_models::clip::{
    ClipConfig, ClipImageProcessor, ClipModel, ClipTextConfig, ClipVisionConfig, WithProjection, contrastive_loss, from_open_clip,
    similarity,
};
use kiln_models::nn::{LoadMode, Params, ParamsOptions};
use kiln_models::transformer::{Layout, Pretrained, load_pretrained, save_pretrained};
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Result, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Largest difference from the reference, in units of the tensor's largest value.
const TOLERANCE: f64 = 1e-5;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/clip").join(name)
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max(())?.item_f64()
}

#[track_caller]
fn expect_close(what: &str, found: &Tensor, expected: &Tensor, most: f64) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let difference = largest(&found.sub(expected).unwrap()).unwrap();
    assert!(difference <= TOLERANCE * most, "{what}: differs by {difference:e}, its largest value is {most:e}");
}

/// What the reference computed of one batch.
struct Expected(BTreeMap<String, Tensor>);

impl Expected {
    fn of(name: &str) -> Result<Self> {
        Ok(Self(safetensors::load(folder(name).join("expected.safetensors"))?))
    }

    #[track_caller]
    fn check(&self, name: &str, found: &Tensor) -> Result<()> {
        expect_close(name, found, &self.0[name], largest(&self.0[name])?);
        Ok(())
    }

    fn check_states(&self, prefix: &str, hidden: &[Tensor], last: &Tensor) -> Result<()> {
        let count = self.0.keys().filter(|name| name.starts_with(&format!("{prefix}.hidden."))).count();
        assert_eq!(hidden.len(), count, "{prefix}");
        for (i, state) in hidden.iter().enumerate() {
            self.check(&format!("{prefix}.hidden.{i}"), state)?;
        }
        self.check(&format!("{prefix}.last_hidden_state"), last)
    }

    /// Compares the loss, and after a backward pass the gradients of all parameters, whose names must be the reference's.
    fn check_loss(&self, loss: &Tensor, params: &Params, layout: &Layout) -> Result<()> {
        self.check("loss", &loss.reshape([1])?)?;
        loss.backward()?;
        // The reference's towers have no scope around them.
        let is_bare = !self.0.keys().any(|name| name.starts_with(&format!("grad.{}", layout.prefix)));
        let of_file = |name: &str| format!("grad.{}", if is_bare { name.strip_prefix(layout.prefix).unwrap_or(name) } else { name });
        let names: BTreeSet<String> = params.params().iter().map(|param| of_file(param.name())).collect();
        assert_eq!(names, self.0.keys().filter(|name| name.starts_with("grad.")).cloned().collect());
        for param in params.params() {
            let grad = param.grad().unwrap_or_else(|| panic!("{} has no gradient", param.name()));
            // That of a key's bias is 0 but for rounding, as softmax ignores what all scores have in common: the query's counts.
            let size = largest(&self.0[&of_file(&param.name().replace("k_proj.bias", "q_proj.bias"))])?;
            expect_close(param.name(), &grad, &self.0[&of_file(param.name())], size);
        }
        Ok(())
    }
}

/// Saves and loads again: the same configuration, the same bits.
fn check_saving<C: Pretrained + PartialEq + std::fmt::Debug>(name: &str, config: &C, params: &Params) -> Result<()> {
    let scratch = std::env::temp_dir().join(format!("kiln-clip-{name}-{}", std::process::id()));
    for limit in [u64::MAX, 1500] {
        save_pretrained(&scratch, config, params, limit)?;
        let again = Params::new();
        let (read, _) = load_pretrained::<C>(&scratch, &again)?;
        assert_eq!(read.layout().architecture, config.layout().architecture);
        let (a, b) = (params.state_dict(), again.state_dict());
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
        assert!(a.iter().all(|(name, tensor)| tensor.to_vec::<f32>().unwrap() == b[name].to_vec::<f32>().unwrap()), "{name}");
    }
    std::fs::remove_dir_all(&scratch).unwrap();
    Ok(())
}

fn check_both(name: &str) -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of(name)?);
    let (config, model) = load_pretrained::<ClipConfig>(folder(name), &params)?;
    params.eval();
    let (tokens, pictures) = (&expected.0["tokens"], &expected.0["pictures"]);
    let text = model.text().forward(tokens, None)?;
    expected.check_states("text", &text.hidden_states, &text.last_hidden_state)?;
    let vision = model.vision().forward(pictures)?;
    expected.check_states("vision", &vision.hidden_states, &vision.last_hidden_state)?;
    // The states without the last blocks, and normed what the tower gives.
    assert_eq!(text.skipped(1)?.to_vec::<f32>()?, text.hidden_states[2].to_vec::<f32>()?);
    expected.check("text.last_hidden_state", &model.text().final_norm(text.skipped(0)?)?)?;
    assert!(text.skipped(4).is_err());

    let output = model.forward(tokens, None, pictures)?;
    expected.check("text_embeds", &output.text_embeds)?;
    expected.check("image_embeds", &output.image_embeds)?;
    expected.check("logits_per_text", &output.logits_per_text)?;
    let scaled = similarity(&model.image_embeds(pictures)?, &output.text_embeds)?.mul_scalar(model.scale()?)?;
    expect_close("logits_per_image", &scaled, &output.logits_per_image, largest(&scaled)?);
    expected.check_loss(&contrastive_loss(&output.logits_per_text)?, &params, &config.layout())?;
    check_saving(name, &config, &params)
}

#[test]
fn both_towers_are_the_reference() -> Result<()> {
    check_both("clip_quick")?;
    check_both("clip_gelu")
}

/// The loss of a tower's fixture: every state counts.
fn tower_loss(result: &Tensor, last: &Tensor) -> Result<Tensor> {
    result.square()?.sum(())?.add(&last.sin()?.sum(())?)
}

#[test]
fn single_towers_are_the_reference() -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of("text")?);
    let (config, model) = load_pretrained::<ClipTextConfig>(folder("text"), &params)?;
    let output = model.forward(&expected.0["input"], Some(&expected.0["mask"].ne_scalar(0.0)?))?;
    expected.check_states("text", &output.hidden_states, &output.last_hidden_state)?;
    expected.check("text.pooler_output", &output.pooler_output)?;
    assert!(output.text_embeds.is_none());
    expected.check_loss(&tower_loss(&output.pooler_output, &output.last_hidden_state)?, &params, &config.layout())?;
    check_saving("text", &config, &params)?;

    let (params, expected) = (Params::new(), Expected::of("text_projection")?);
    let (config, model) = load_pretrained::<WithProjection<ClipTextConfig>>(folder("text_projection"), &params)?;
    let output = model.forward(&expected.0["input"], None)?;
    expected.check_states("text", &output.hidden_states, &output.last_hidden_state)?;
    let embeds = output.text_embeds.expect("a projection");
    expected.check("text.embeds", &embeds)?;
    expected.check_loss(&tower_loss(&embeds, &output.last_hidden_state)?, &params, &config.layout())?;
    check_saving("text_projection", &config, &params)?;
    // Its file serves the tower without projection as well.
    load_pretrained::<ClipTextConfig>(folder("text_projection"), &Params::new())?;

    let (params, expected) = (Params::new(), Expected::of("vision")?);
    let (config, model) = load_pretrained::<ClipVisionConfig>(folder("vision"), &params)?;
    let output = model.forward(&expected.0["input"])?;
    expected.check_states("vision", &output.hidden_states, &output.last_hidden_state)?;
    expected.check("vision.pooler_output", &output.pooler_output)?;
    expected.check_loss(&tower_loss(&output.pooler_output, &output.last_hidden_state)?, &params, &config.layout())?;
    check_saving("vision", &config, &params)?;

    let (params, expected) = (Params::new(), Expected::of("vision_projection")?);
    let (config, model) = load_pretrained::<WithProjection<ClipVisionConfig>>(folder("vision_projection"), &params)?;
    let output = model.forward(&expected.0["input"])?;
    expected.check_states("vision", &output.hidden_states, &output.last_hidden_state)?;
    let embeds = output.image_embeds.expect("a projection");
    expected.check("vision.embeds", &embeds)?;
    expected.check_loss(&tower_loss(&embeds, &output.last_hidden_state)?, &params, &config.layout())?;
    check_saving("vision_projection", &config, &params)
}

#[test]
fn open_clip_files_are_the_same_model() -> Result<()> {
    let (params, expected) = (Params::new(), Expected::of("clip_gelu")?);
    let (config, _) = load_pretrained::<ClipConfig>(folder("clip_gelu"), &Params::new())?;
    let state = safetensors::load(folder("open_clip.safetensors"))?;
    let (model, _) = params.build_from(from_open_clip(state.clone())?, LoadMode::Strict, |params| ClipModel::new(&config, params))?;
    let output = model.forward(&expected.0["tokens"], None, &expected.0["pictures"])?;
    expected.check("logits_per_text", &output.logits_per_text)?;
    // A text tower in a scope of its own.
    let scoped = state.iter().map(|(name, tensor)| {
        let is_text = !name.starts_with("visual.") && name != "logit_scale";
        (if is_text { format!("text.{name}") } else { name.clone() }, tensor.clone())
    });
    assert_eq!(from_open_clip(scoped.collect())?.len(), params.params().len());
    // What it does not know stays, so that loading says so.
    let other = BTreeMap::from([("transformer.resblocks.0.ls_1.gamma".to_owned(), Tensor::zeros([8], ())?)]);
    assert!(from_open_clip(other)?.contains_key("text_model.encoder.layers.0.ls_1.gamma"));
    for (name, shape) in [("transformer.resblocks.0.attn.in_proj_weight", &[8, 8][..]), ("text_projection", &[8]), ("visual.proj", &[])] {
        assert!(from_open_clip(BTreeMap::from([(name.to_owned(), Tensor::zeros(shape, ())?)])).is_err(), "{name}");
    }
    let scalar = BTreeMap::from([("transformer.resblocks.0.attn.in_proj_bias".to_owned(), Tensor::zeros((), DType::F32)?)]);
    assert!(from_open_clip(scalar).is_err());
    Ok(())
}

/// Pictures are within two levels of 255 of PIL's, which rounds to 8 bits between the two passes of its filter.
#[test]
fn pictures_are_prepared_as_the_reference_does() -> Result<()> {
    let json = std::fs::read_to_string(folder("preprocessor_config.json")).unwrap();
    let processor: ClipImageProcessor = serde_json::from_str(&json).unwrap();
    assert_eq!(processor, ClipImageProcessor { shortest_edge: 16, crop_size: [16, 16], ..ClipImageProcessor::default() });
    let saved = serde_json::to_string(&processor).unwrap();
    assert_eq!(serde_json::from_str::<ClipImageProcessor>(&saved).unwrap(), processor);
    let pictures = safetensors::load(folder("picture.safetensors"))?;
    let level = 1.0 / 255.0 / processor.image_std.iter().copied().fold(1.0, f64::min);
    for name in ["tall", "wide", "small", "same"] {
        let found = processor.preprocess(&pictures[name])?;
        let difference = found.sub(&pictures[&format!("{name}.expected")])?.abs()?;
        let (most, mean) = (largest(&difference)?, difference.mean(())?.item_f64()?);
        let allowed = if name == "same" { 1e-4 } else { 2.01 };
        assert!(most <= allowed * level && mean <= 0.3 * level, "{name}: {} levels, {} in the mean", most / level, mean / level);
    }
    // A crop that is larger than the picture is filled with black.
    let around = ClipImageProcessor { shortest_edge: 16, crop_size: [20, 19], ..ClipImageProcessor::default() };
    let wider = around.preprocess(&pictures["same"])?;
    let black = ((0.0 - around.image_mean[0]) / around.image_std[0]) as f32;
    assert_eq!((wider.dims(), wider.to_vec::<f32>()?[0]), (&[1, 3, 20, 19][..], black));
    let inner = wider.narrow(2, 2, 16)?.narrow(3, 2, 16)?;
    assert_eq!(inner.to_vec::<f32>()?, processor.preprocess(&pictures["same"])?.to_vec::<f32>()?);

    let broken = |processor: &ClipImageProcessor, shape: &[usize], dtype: DType| processor.preprocess(&Tensor::zeros(shape, dtype)?);
    for (shape, dtype) in [(&[3, 4, 4][..], DType::F32), (&[1, 4, 4], DType::U8), (&[3, 0, 4], DType::U8), (&[4, 4], DType::U8)] {
        assert!(broken(&processor, shape, dtype).is_err(), "{shape:?}");
    }
    // A line of pixels would be scaled to a picture of gigabytes.
    assert!(broken(&processor, &[3, 1, 40_000], DType::U8).is_err());
    let huge = ClipImageProcessor { shortest_edge: usize::MAX, crop_size: [usize::MAX, 1], ..ClipImageProcessor::default() };
    assert!(broken(&huge, &[3, 4, 4], DType::U8).is_err());
    assert!(serde_json::from_str::<ClipImageProcessor>(r#"{"size": {"longest_edge": 3}}"#).is_err());
    Ok(())
}

#[test]
fn pictures_are_prepared_by_the_steps_that_the_file_names() -> Result<()> {
    let read = |text: &str| serde_json::from_str::<ClipImageProcessor>(text).unwrap();
    let levels: Vec<u8> = (0..18).map(|i| i * 10).collect();
    let picture = Tensor::from_vec(levels.clone(), [3, 2, 3])?;
    // Nothing is left to do.
    let bare = read(r#"{"do_resize": false, "do_center_crop": false, "do_rescale": false, "do_normalize": false, "image_std": [0, 0, 0]}"#);
    let found = bare.preprocess(&picture)?;
    assert_eq!(found.dims(), [1, 3, 2, 3]);
    assert_eq!(found.to_vec::<f32>()?, levels.iter().map(|&level| f32::from(level)).collect::<Vec<_>>());
    let halves = ClipImageProcessor { do_rescale: true, rescale_factor: 0.5, do_center_crop: true, crop_size: [2, 1], ..bare.clone() };
    assert_eq!(halves.preprocess(&picture)?.to_vec::<f32>()?, [5.0, 20.0, 35.0, 50.0, 65.0, 80.0]);
    // A step up, in the middle of two pixels that become four: the filters differ in how far they reach.
    let step = Tensor::from_vec([0u8, 200].repeat(6), [3, 2, 2])?;
    let scaled = |resample: u8| ClipImageProcessor { do_resize: true, shortest_edge: 4, resample, ..bare.clone() }.preprocess(&step);
    assert_eq!(scaled(2)?.to_vec::<f32>()?[..4], [0.0, 50.0, 150.0, 200.0]);
    assert_ne!(scaled(3)?.to_vec::<f32>()?, scaled(2)?.to_vec::<f32>()?);
    for (processor, field) in [
        (ClipImageProcessor { resample: 0, ..ClipImageProcessor::default() }, "resample 0"),
        (ClipImageProcessor { image_std: [1.0, 0.0, 1.0], ..ClipImageProcessor::default() }, "image_std 0"),
        (ClipImageProcessor { image_mean: [f64::NAN; 3], ..ClipImageProcessor::default() }, "image_mean NaN"),
        (ClipImageProcessor { rescale_factor: f64::INFINITY, ..ClipImageProcessor::default() }, "rescale_factor inf"),
    ] {
        let error = processor.preprocess(&picture).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
    Ok(())
}

/// Old files describe the towers twice.
#[test]
fn the_dictionaries_of_old_files_describe_the_towers() {
    let text = r#"{
        "text_config": {"hidden_size": 8, "num_hidden_layers": 3, "id": "kept"},
        "text_config_dict": {"hidden_size": 768, "projection_dim": 768, "word": 1},
        "vision_config": {"hidden_size": 16, "patch_size": 4},
        "vision_config_dict": null,
        "projection_dim": 768
    }"#;
    let config: ClipConfig = serde_json::from_str(text).unwrap();
    let tower = &config.text_config;
    assert_eq!((tower.hidden_size, tower.projection_dim, tower.num_hidden_layers), (768, 768, ClipTextConfig::default().num_hidden_layers));
    assert_eq!((&tower.other["id"], &tower.other["word"]), (&"kept".into(), &1.into()));
    assert_eq!((config.vision_config.hidden_size, config.vision_config.patch_size, config.projection_dim), (16, 4, 768));
    let saved = serde_json::to_string(&config).unwrap();
    assert!(!saved.contains("_dict"), "{saved}");
    assert_eq!(serde_json::from_str::<ClipConfig>(&saved).unwrap(), config);
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let (config, model) = load_pretrained::<ClipConfig>(folder("clip_gelu"), &Params::new())?;
    let tokens = |values: Vec<i64>| Tensor::from_vec(values.clone(), [1, values.len()]);
    assert!(model.text_embeds(&tokens(vec![0; 8])?, None).unwrap_err().to_string().contains("7 places"));
    assert!(model.text_embeds(&tokens(vec![30])?, None).is_err() && model.text_embeds(&tokens(vec![-1])?, None).is_err());
    assert!(model.text_embeds(&tokens(vec![])?, None).is_err());
    let error = model.image_embeds(&Tensor::zeros([1, 3, 8, 12], ())?).unwrap_err().to_string();
    assert!(error.contains("[at least 1, 3, 8, 8]"), "{error}");
    assert!(contrastive_loss(&Tensor::zeros([2, 3], ())?).is_err());

    let refused = |change: &dyn Fn(&mut ClipConfig)| {
        let mut config = config.clone();
        change(&mut config);
        ClipModel::new(&config, &Params::new()).err().expect("an error").to_string()
    };
    assert!(refused(&|config| config.text_config.num_attention_heads = 3).contains("multiple of num_attention_heads 3"));
    assert!(refused(&|config| config.vision_config.num_attention_heads = 0).contains("multiple of num_attention_heads 0"));
    assert!(refused(&|config| config.vision_config.patch_size = 3).contains("multiple of patch_size 3"));
    assert!(refused(&|config| config.vision_config.patch_size = 0).contains("patch_size 0"));
    assert!(refused(&|config| config.text_config.hidden_act = "sine".into()).contains("`sine`"));
    // Extents that no tensor of the file confirms are not allocated.
    let state = || safetensors::load(folder("clip_gelu").join("model.safetensors"));
    for change in [
        (|config| config.text_config.vocab_size = 1 << 50) as fn(&mut ClipConfig),
        |config| config.vision_config.image_size = 1 << 40,
        |config| config.text_config.num_hidden_layers = usize::MAX,
    ] {
        let mut config = config.clone();
        change(&mut config);
        assert!(Params::new().build_from(state()?, LoadMode::Strict, |params| ClipModel::new(&config, params)).is_err());
    }
    Ok(())
}

/// In bf16 both towers say about the same, and the factor is held to its limit.
#[test]
fn half_precision_and_the_limit_of_the_factor() -> Result<()> {
    let expected = Expected::of("clip_gelu")?;
    let params = Params::with(ParamsOptions { dtype: DType::BF16, ..ParamsOptions::default() });
    let (_, model) = load_pretrained::<ClipConfig>(folder("clip_gelu"), &params)?;
    let output = model.forward(&expected.0["tokens"], None, &expected.0["pictures"].to_dtype(DType::BF16)?)?;
    assert_eq!(output.logits_per_text.dtype(), DType::BF16);
    let difference = output.logits_per_text.to_dtype(DType::F32)?.sub(&expected.0["logits_per_text"])?;
    assert!(largest(&difference)? < 0.05 * largest(&expected.0["logits_per_text"])?);

    let (_, model) = load_pretrained::<ClipConfig>(folder("clip_gelu"), &Params::new())?;
    let scale = model.params().named("logit_scale").expect("the factor");
    let first = model.scale()?;
    model.clamp_logit_scale()?;
    assert_eq!(model.scale()?, first);
    scale.set(&Tensor::full((), 5.0, DType::F32)?)?;
    model.clamp_logit_scale()?;
    assert!((model.scale()? - 100.0).abs() < 1e-4, "{}", model.scale()?);
    Ok(())
}

/// Writes every model to the folder that `KILN_SAVED` names, for `fixtures/clip/check_saved.py`.
#[test]
#[ignore = "its result is for check_saved.py to judge"]
fn save_all_for_the_reference() -> Result<()> {
    fn again<C: Pretrained>(name: &str) -> Result<()> {
        let root = std::env::var("KILN_SAVED").expect("KILN_SAVED names a folder");
        let params = Params::new();
        let (config, _) = load_pretrained::<C>(folder(name), &params)?;
        save_pretrained(Path::new(&root).join(name), &config, &params, 3000)
    }
    again::<ClipConfig>("clip_quick")?;
    again::<ClipConfig>("clip_gelu")?;
    again::<ClipTextConfig>("text")?;
    again::<WithProjection<ClipTextConfig>>("text_projection")?;
    again::<ClipVisionConfig>("vision")?;
    again::<WithProjection<ClipVisionConfig>>("vision_projection")
}
