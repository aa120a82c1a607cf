//! Autoencoders against `diffusers` (`fixtures/vae.py`), and what their training promises.

use kiln_autograd::TensorExt;
use kiln_models::classifier::DigitCnn;
use kiln_models::gan::GanLoss;
use kiln_models::nn::{LoadMode, Module, Params, StateDict};
use kiln_models::vae::*;
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Generator, Result, Tensor};
use std::path::{Path, PathBuf};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vae").join(name)
}

fn weights(name: &str) -> StateDict {
    safetensors::load(folder(name).join("diffusion_pytorch_model.safetensors")).unwrap()
}

fn expected(name: &str) -> StateDict {
    safetensors::load(folder(name).join("expected.safetensors")).unwrap()
}

fn config(name: &str) -> AutoencoderKlConfig {
    serde_json::from_slice(&std::fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

fn load(name: &str) -> (Params, AutoencoderKl) {
    let params = Params::new();
    let (model, _) = params.build_from(weights(name), LoadMode::Strict, |params| config(name).build(params)).unwrap();
    (params, model)
}

/// The largest difference is at most `tolerance` of the largest element.
#[track_caller]
fn expect_within(what: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    assert_eq!(actual.dims(), expected.dims(), "{what}");
    let difference = most(&actual.detach().sub(expected).unwrap());
    assert!(difference <= tolerance * most(expected), "{what}: {difference} of {}", most(expected));
}

fn most(x: &Tensor) -> f64 {
    x.abs().unwrap().max(()).unwrap().item_f64().unwrap()
}

/// Gradients of all parameters are `grad.<name>` of `expected`, within 1e-5 of their largest element. Of some, such as the keys' biases, the
/// terms cancel: there it is within 1e-7 of the largest element of all.
#[track_caller]
fn expect_gradients(case: &str, params: &Params, expected: &StateDict) {
    let largest = expected.iter().filter(|(name, _)| name.starts_with("grad.")).map(|(_, grad)| most(grad)).fold(0.0, f64::max);
    for param in params.params() {
        let grad = param.grad().unwrap_or_else(|| panic!("{case}: {} has no gradient", param.name()));
        let wanted = &expected[&format!("grad.{}", param.name())];
        let difference = most(&grad.sub(wanted).unwrap());
        assert!(difference <= (1e-5 * most(wanted)).max(1e-7 * largest), "{case} {}: {difference} of {}", param.name(), most(wanted));
    }
}

#[test]
fn outputs_and_gradients_are_diffusers() -> Result<()> {
    for name in ["kl", "kl_plain"] {
        let (params, model) = load(name);
        let e = expected(name);
        let x = e["x"].requires_grad_()?;
        let posterior = model.encode(&x)?;
        let moments = e["moments"].chunk(2, 1)?;
        expect_within("mean", &posterior.mean, &moments[0], 1e-5);
        expect_within("logvar", &posterior.logvar, &moments[1].clamp(-30.0, 20.0)?, 1e-5);
        expect_within("decoded", &model.decode(&e["z"])?, &e["decoded"], 1e-5);
        let z = posterior.sample_from(&e["noise"])?;
        expect_within("z", &z, &e["z"], 1e-5);
        let (kl, nll) = (posterior.kl()?, posterior.nll(&e["noise"])?);
        expect_within("kl", &kl, &e["kl"], 1e-5);
        expect_within("nll", &nll, &e["nll"], 1e-5);
        let loss = model.decode(&z)?.mul(&e["weight"])?.sum(())?.add(&kl.sum(())?)?.add(&nll.sum(())?.mul_scalar(0.1)?)?;
        loss.backward()?;
        expect_within("loss", &loss.reshape([1])?, &e["loss"], 1e-5);
        expect_within("grad_x", &x.grad().unwrap(), &e["grad_x"], 1e-5);
        expect_gradients(name, &params, &e);
    }
    Ok(())
}

#[test]
fn tiles_are_diffusers() -> Result<()> {
    let (_, mut model) = load("kl");
    let e = expected("kl");
    let whole = model.encode(&e["large"])?.mean;
    model.enable_tiling();
    let posterior = model.encode(&e["large"])?;
    let moments = e["large_moments"].chunk(2, 1)?;
    expect_within("mean", &posterior.mean, &moments[0], 1e-5);
    expect_within("logvar", &posterior.logvar, &moments[1].clamp(-30.0, 20.0)?, 1e-5);
    expect_within("decoded", &model.decode(&e["large_z"])?, &e["large_decoded"], 1e-5);
    // Seams are near what the whole picture gives, not the same; a picture of one tile is.
    let difference = posterior.mean.sub(&whole)?.abs()?.max(())?.item_f64()?;
    assert!(difference > 1e-3, "{difference}");
    expect_within("one tile", &model.encode(&e["x"])?.mean, &e["moments"].narrow(1, 0, 2)?, 1e-5);
    Ok(())
}

#[test]
fn tiles_that_cannot_cover_a_picture_are_errors() {
    let (_, mut model) = load("kl");
    let fine = model.config().tiling();
    for tiling in [
        Tiling { sample_min_size: 0, ..fine },
        Tiling { latent_min_size: 0, ..fine },
        Tiling { overlap_factor: 1.0, ..fine },
        Tiling { overlap_factor: -0.5, ..fine },
        Tiling { overlap_factor: f64::NAN, ..fine },
    ] {
        assert!(model.set_tiling(Some(tiling)).unwrap_err().to_string().contains("tiling"), "{tiling:?}");
    }
    assert!(model.set_tiling(Some(fine)).is_ok() && model.set_tiling(None).is_ok());
}

#[test]
fn slices_are_the_batch() -> Result<()> {
    let (_, mut model) = load("kl");
    let e = expected("kl");
    model.set_slicing(true);
    expect_within("mean", &model.encode(&e["x"])?.mean, &e["moments"].narrow(1, 0, 2)?, 1e-5);
    expect_within("decoded", &model.decode(&e["z"])?, &e["decoded"], 1e-5);
    Ok(())
}

#[test]
fn files_of_before_have_other_names_of_attention() -> Result<()> {
    let pairs = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    let old = |name: String| pairs.iter().fold(name, |name, (new, old)| name.replace(new, old));
    let state: StateDict = weights("kl").into_iter().map(|(name, tensor)| (old(name), tensor)).collect();
    assert!(state.contains_key("encoder.mid_block.attentions.0.query.weight"));
    let build = |state| Params::new().build_from(state, LoadMode::Strict, |params| config("kl").build(params)).map(|(model, _)| model);
    assert!(build(state.clone()).is_err());
    let model = build(rename_old_attention(state))?;
    let e = expected("kl");
    expect_within("decoded", &model.decode(&e["z"])?, &e["decoded"], 1e-5);
    Ok(())
}

#[test]
fn a_sample_scatters_about_the_mean_and_scaling_is_undone() -> Result<()> {
    let moments = Tensor::cat(&[Tensor::full([1, 1, 64, 64], 3.0, ())?, Tensor::full([1, 1, 64, 64], 0.25f64.ln(), ())?], 1)?;
    let posterior = DiagonalGaussian::new(&moments)?;
    let sample = posterior.sample(&Generator::new(1))?;
    let (mean, std) = (sample.mean(())?.item_f64()?, sample.std((), 0.0)?.item_f64()?);
    assert!((mean - 3.0).abs() < 0.03 && (std - 0.5).abs() < 0.02, "{mean} {std}");
    assert_eq!(sample.to_vec::<f32>()?, posterior.sample(&Generator::new(1))?.to_vec::<f32>()?);
    assert!(DiagonalGaussian::new(&Tensor::zeros([1, 3, 2, 2], ())?).is_err());
    let (_, model) = load("kl_plain");
    let scaled = model.scale(&sample)?;
    expect_within("scaled", &scaled, &sample.add_scalar(-0.1)?.mul_scalar(0.18215)?, 1e-6);
    expect_within("unscaled", &model.unscale(&scaled)?, &sample, 1e-6);
    Ok(())
}

/// (z − mean) · scaling_factor / std, as `diffusers`' pipelines of SDXL have it.
#[test]
fn latents_are_normed_by_channel() -> Result<()> {
    let fields = |mean: &[f64], std: &[f64]| AutoencoderKlConfig {
        latents_mean: Some(mean.to_vec()),
        latents_std: Some(std.to_vec()),
        scaling_factor: 0.5,
        ..config("kl")
    };
    let build = |config: &AutoencoderKlConfig| Params::new().build_from(weights("kl"), LoadMode::Strict, |params| config.build(params));
    let (model, _) = build(&fields(&[1.0, -2.0], &[2.0, 0.25]))?;
    let z = Tensor::from_vec(vec![3f32, 0.0, 1.0, -2.0], [1, 2, 1, 2])?;
    let scaled = model.scale(&z)?;
    assert_eq!(scaled.to_vec::<f32>()?, [0.5, -0.25, 6.0, 0.0]);
    assert_eq!(model.unscale(&scaled)?.to_vec::<f32>()?, z.to_vec::<f32>()?);
    assert!(model.scale(&z.narrow(1, 0, 1)?).is_err() && model.unscale(&z.squeeze(0)?).is_err());
    let alone = AutoencoderKlConfig { latents_std: None, ..fields(&[1.0, -2.0], &[]) };
    for (config, part) in [
        (alone, "latents_std: missing"),
        (fields(&[1.0], &[2.0, 0.25]), "latents_mean: 1 numbers"),
        (fields(&[1.0, f64::NAN], &[2.0, 0.25]), "latents_mean: NaN"),
        (fields(&[1.0, -2.0], &[2.0, 0.0]), "latents_std: 0"),
    ] {
        let error = build(&config).err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn configurations_that_cannot_be_are_errors() {
    let text = std::fs::read_to_string(folder("kl").join("config.json")).unwrap();
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let fine = serde_json::to_value(config("kl")).unwrap();
    assert!(fields.iter().all(|(name, value)| fine.get(name) == Some(value)), "{fine}");
    for (name, value, part) in [
        ("block_out_channels", serde_json::json!([4]), "block_out_channels has 1"),
        ("block_out_channels", serde_json::json!([4, 7]), "2 groups do not divide 7 channels"),
        ("block_out_channels", serde_json::json!([4, u64::MAX / 2]), ""),
        ("norm_num_groups", 0.into(), "0 groups"),
        ("latent_channels", (u64::MAX / 2 + 5).into(), "latent_channels"),
        ("layers_per_block", (u64::MAX).into(), "missing"),
        ("act_fn", "relu".into(), "act_fn `relu`"),
    ] {
        let old = fields.insert(name.into(), value.clone());
        let config: AutoencoderKlConfig = serde_json::from_value(fields.clone().into()).unwrap();
        let error = Params::new().build_from(weights("kl"), LoadMode::Strict, |params| config.build(params)).err();
        let error = error.unwrap_or_else(|| panic!("{name} = {value}")).to_string();
        assert!(error.contains(part), "{name} = {value}: {error}");
        fields.insert(name.into(), old.unwrap());
    }
    fields.insert("down_block_types".into(), serde_json::json!(["DownEncoderBlock3D", "DownEncoderBlock2D"]));
    let error = serde_json::from_value::<AutoencoderKlConfig>(fields.into()).unwrap_err().to_string();
    assert!(error.contains("DownEncoderBlock3D"), "{error}");
    let empty = AutoencoderKlConfig {
        block_out_channels: vec![],
        down_block_types: vec![],
        up_block_types: vec![],
        ..AutoencoderKlConfig::default()
    };
    assert!(empty.build(&Params::new()).err().unwrap().to_string().contains("at least one level"));
}

fn load_vq(codebook: CodebookOptions) -> (Params, VqVae) {
    let config: VqVaeConfig = serde_json::from_slice(&std::fs::read(folder("vq").join("config.json")).unwrap()).unwrap();
    let config = VqVaeConfig { codebook, ..config };
    let params = Params::seeded(1);
    let (model, _) = params.build_from(weights("vq"), LoadMode::Partial, |params| config.build(params)).unwrap();
    (params, model)
}

#[test]
fn codes_outputs_and_gradients_are_diffusers() -> Result<()> {
    let (params, model) = load_vq(CodebookOptions { legacy: true, ..CodebookOptions::default() });
    let e = expected("vq");
    let x = e["x"].requires_grad_()?;
    expect_within("latents", &model.encode(&x)?, &e["latents"], 1e-5);
    let (decoded, quantized) = model.forward(&x)?;
    assert_eq!(quantized.indices.to_vec::<i64>()?, e["indices"].to_vec::<i64>()?);
    expect_within("decoded", &decoded, &e["decoded"], 1e-5);
    expect_within("from indices", &model.decode_indices(&e["indices"])?, &e["decoded"], 1e-5);
    expect_within("commitment", &quantized.loss.reshape([1])?, &e["commit_loss"], 1e-5);
    let loss = decoded.mul(&e["weight"])?.sum(())?.add(&quantized.loss.mul_scalar(50.0)?)?;
    loss.backward()?;
    expect_within("loss", &loss.reshape([1])?, &e["loss"], 1e-5);
    expect_within("grad_x", &x.grad().unwrap(), &e["grad_x"], 1e-5);
    expect_gradients("vq", &params, &e);
    assert!(model.decode_indices(&Tensor::full([1, 2, 2], 11.0, DType::I64)?).is_err());
    Ok(())
}

#[test]
fn a_codebook_by_itself_is_diffusers() -> Result<()> {
    let e = safetensors::load(folder("quantizer.safetensors"))?;
    let params = Params::new();
    let quantizer = VectorQuantizer::new(&params, 7, 3, CodebookOptions { beta: 0.4, ..CodebookOptions::default() })?;
    let table = params.named("embedding.weight").unwrap();
    table.set(&e["table"])?;
    let z = e["z"].requires_grad_()?;
    let q = quantizer.forward(&z)?;
    assert_eq!(q.indices.to_vec::<i64>()?, e["indices"].to_vec::<i64>()?);
    expect_within("output", &q.output, &e["output"], 1e-6);
    expect_within("loss", &q.loss.reshape([1])?, &e["loss"], 1e-6);
    q.output.mul(&e["weight"])?.sum(())?.add(&q.loss.mul_scalar(30.0)?)?.backward()?;
    expect_within("grad_z", &z.grad().unwrap(), &e["grad_z"], 1e-5);
    expect_within("grad_table", &table.grad().unwrap(), &e["grad_table"], 1e-5);
    assert!(quantizer.forward(&Tensor::zeros([1, 2, 4, 4], ())?).is_err());
    Ok(())
}

#[test]
fn averages_are_of_the_vectors_that_fall_to_a_code() -> Result<()> {
    let params = Params::seeded(3);
    let decay = 0.75;
    let options = CodebookOptions { ema_decay: Some(decay), ..CodebookOptions::default() };
    let quantizer = VectorQuantizer::new(&params, 3, 1, options)?;
    let table = params.named("embedding.weight").unwrap();
    table.set(&Tensor::from_vec(vec![-1f32, 0.0, 10.0], [3, 1])?)?;
    let sums = params.buffers().into_iter().find(|b| b.name() == "ema_embedding").unwrap();
    sums.set(&table.get())?;
    let z = Tensor::from_vec(vec![-2f32, 0.25, -3.0, 0.125], [1, 1, 2, 2])?.requires_grad_()?;
    let q = quantizer.forward(&z)?;
    assert_eq!(q.indices.to_vec::<i64>()?, [0, 1, 0, 1]);
    // Counts 1 → 0.75 + 0.25·(2, 2, 0); sums e → 0.75 e + 0.25·(−5, 0.375, 0).
    let (counts, sums) = ([1.25, 1.25, 0.75], [-0.75 - 1.25, 0.09375, 7.5]);
    let total: f64 = counts.iter().sum();
    let new: Vec<f64> = table.get().to_vec::<f32>()?.into_iter().map(f64::from).collect();
    for i in 0..3 {
        let smooth = total * (counts[i] + 1e-5) / (total + 3e-5);
        assert!((new[i] - sums[i] / smooth).abs() < 1e-5, "{new:?}");
    }
    // Only the commitment is left of the loss, and the codebook has no gradient.
    q.loss.backward()?;
    let commitment = (1.0 + 0.0625 + 4.0 + 0.015625) / 4.0;
    assert!((q.loss.item_f64()? - 0.25 * commitment).abs() < 1e-6 && table.grad().is_none() && z.grad().is_some());
    // In evaluation nothing moves.
    params.eval();
    let before = params.state_dict();
    quantizer.forward(&z)?;
    for (name, tensor) in params.state_dict() {
        assert_eq!(tensor.to_vec::<f32>()?, before[&name].to_vec::<f32>()?, "{name}");
    }
    Ok(())
}

#[test]
fn dead_codes_restart_at_vectors_of_the_batch() -> Result<()> {
    let generator = Generator::new(4);
    // Sixteen clusters far from where the codes begin: without restarts they fall to a code or two.
    let centres = generator.randn([16, 2, 1, 1], ())?.mul_scalar(5.0)?;
    let batch = || centres.index_select(0, &generator.randint(0, 16, [64])?)?.add(&generator.randn([64, 2, 4, 4], ())?.mul_scalar(0.1)?);
    for ema_decay in [None, Some(0.9)] {
        let used = |restart_below: Option<f64>| -> Result<CodebookUse> {
            let params = Params::seeded(7);
            let options = CodebookOptions { ema_decay, restart_below, ..CodebookOptions::default() };
            let quantizer = VectorQuantizer::new(&params, 16, 2, options)?;
            for _ in 0..200 {
                quantizer.forward(&batch()?)?;
            }
            CodebookUse::of(&quantizer.forward(&batch()?)?.indices, 16)
        };
        let (with, without) = (used(Some(1.0))?, used(None)?);
        assert!(with.used > 0.7 && with.perplexity > 6.0, "{ema_decay:?}: {with:?}");
        assert!(with.used > without.used + 0.2, "{ema_decay:?}: {with:?}, without {without:?}");
    }
    let even = CodebookUse::of(&Tensor::from_vec(vec![0i64, 1, 0, 1], [1, 2, 2])?, 4)?;
    assert!((even.perplexity - 2.0).abs() < 1e-12 && even.used == 0.5);
    assert!(CodebookUse::of(&Tensor::from_vec(vec![4i64], 1)?, 4).is_err());
    for options in [
        CodebookOptions { ema_decay: Some(1.0), ..CodebookOptions::default() },
        CodebookOptions { beta: f64::NAN, ..CodebookOptions::default() },
    ] {
        assert!(VectorQuantizer::new(&Params::new(), 4, 2, options).is_err());
    }
    assert!(VectorQuantizer::new(&Params::new(), 0, 2, CodebookOptions::default()).is_err());
    Ok(())
}

#[test]
fn the_discriminator_and_its_losses_are_the_references() -> Result<()> {
    let e = safetensors::load(folder("patch_gan.safetensors"))?;
    let state = e.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("state.")?.to_owned(), tensor.clone()))).collect();
    let params = Params::new();
    let config = PatchGanConfig { channels: 1, width: 3, layers: 2 };
    let (critic, _) = params.build_from(state, LoadMode::Strict, |params| PatchGan::new(params, config))?;
    let last = e["last"].requires_grad_()?;
    let output = e["h"].conv2d(&last, None, kiln_tensor::ConvOptions::new().padding(1))?;
    let scores = critic.forward(&output)?;
    expect_within("scores", &scores, &e["scores"], 1e-5);
    let weight = adaptive_weight(&output.mse_loss(&e["x"])?, &GanLoss::Hinge.generator(&scores)?, &last)?;
    let expected = e["adaptive"].to_vec::<f32>()?[0];
    assert!((weight / f64::from(expected) - 1.0).abs() < 1e-4, "{weight} {expected}");
    let hinge = GanLoss::Hinge.discriminator(&critic.forward(&e["x"])?, &critic.forward(&output)?)?.mul_scalar(0.5)?;
    expect_within("hinge", &hinge.reshape([1])?, &e["hinge"], 1e-5);
    assert!(PatchGan::new(&Params::new(), PatchGanConfig { layers: 0, ..config }).is_err());
    assert!(PatchGan::new(&Params::new(), PatchGanConfig { width: usize::MAX, ..config }).is_err());
    Ok(())
}

/// Smooth pictures (B, 1, 28, 28) in [−1, 1].
fn pictures(batch: usize, seed: u64) -> Tensor {
    let coarse = Generator::new(seed).rand([batch, 1, 7, 7], ()).unwrap().mul_scalar(2.0).unwrap().add_scalar(-1.0).unwrap();
    coarse.upsample_bilinear(4, false).unwrap()
}

fn adversarial() -> VaeTrainerOptions {
    let critic = PatchGanConfig { channels: 1, width: 4, layers: 2 };
    let adversarial = AdversarialOptions { model: critic, weight: 0.5, start: 2 };
    VaeTrainerOptions { adversarial: Some(adversarial), steps: Some(40), ..VaeTrainerOptions::default() }
}

/// With a perceptual loss in the features of an untrained classifier.
fn digit_trainer(seed: u64, options: VaeTrainerOptions) -> Result<VaeTrainer<DigitVae>> {
    let features = Params::seeded(9);
    let classifier = DigitCnn::new(&features, 10)?;
    features.eval();
    features.freeze("*")?;
    let params = Params::seeded(seed);
    let model = DigitVae::new(&params, DigitVaeConfig { latent: 4, width: 4 })?;
    Ok(VaeTrainer::new(model, params, options)?.with_features(Box::new(move |x| Ok(vec![classifier.features(x)?]))))
}

fn vq_trainer(seed: u64, options: VaeTrainerOptions) -> Result<VaeTrainer<VqVae>> {
    let params = Params::seeded(seed);
    let config = VqVaeConfig {
        in_channels: 1,
        out_channels: 1,
        down_block_types: vec![CoderBlock::Plain; 2],
        up_block_types: vec![CoderBlock::Plain; 2],
        block_out_channels: vec![4, 8],
        norm_num_groups: 2,
        num_vq_embeddings: 16,
        codebook: CodebookOptions { ema_decay: Some(0.9), restart_below: Some(1.0), ..CodebookOptions::default() },
        ..VqVaeConfig::default()
    };
    VaeTrainer::new(config.build(&params)?, params, options)
}

/// Ten steps are the five before saving and the five after loading elsewhere, to the bit.
fn expect_exact_resume<M: Autoencoder>(make: impl Fn(u64) -> Result<VaeTrainer<M>>) -> Result<()> {
    let mut whole = make(1)?;
    let mut half = None;
    let mut losses = Vec::new();
    for i in 0..10 {
        if i == 5 {
            half = Some(whole.state_dict()?);
        }
        losses.push(whole.step(&pictures(4, i))?);
        // Looking at the model in between changes nothing.
        whole.evaluate(|model| model.reconstruct(&pictures(2, 99), &Generator::new(8)))?;
    }
    let mut resumed = make(2)?;
    resumed.load_state_dict(&half.unwrap())?;
    assert_eq!(resumed.steps(), 5);
    for i in 5..10 {
        assert_eq!(resumed.step(&pictures(4, i))?, losses[i as usize]);
    }
    let (a, b) = (whole.state_dict()?, resumed.state_dict()?);
    assert!(a.keys().eq(b.keys()));
    for (name, tensor) in a {
        assert!(tensor.eq(&b[&name])?.all(())?.item::<bool>()?, "{name}");
    }
    let mut cut = b;
    cut.remove("trainer.counters");
    assert!(resumed.load_state_dict(&cut).unwrap_err().to_string().contains("trainer.counters"));
    Ok(())
}

#[test]
fn a_resumed_run_ends_with_the_same_bits() -> Result<()> {
    expect_exact_resume(|seed| digit_trainer(seed, adversarial()))?;
    expect_exact_resume(|seed| digit_trainer(seed, VaeTrainerOptions::default()))?;
    expect_exact_resume(|seed| vq_trainer(seed, adversarial()))
}

#[test]
fn training_learns_pictures() -> Result<()> {
    let same = pictures(8, 3);
    let plain = VaeTrainerOptions { lr: 3e-3, penalty_weight: 1e-3, ..VaeTrainerOptions::default() };
    let mut trainer = digit_trainer(5, plain)?;
    let (first, last) = losses_of(&mut trainer, &same, 120)?;
    assert!(last.reconstruction < 0.5 * first.reconstruction && last.perceptual < first.perceptual, "{first:?} {last:?}");
    let l1 = VaeTrainerOptions { reconstruction: ReconstructionLoss::L1, penalty_weight: 1.0, ..plain };
    let (first, last) = losses_of(&mut vq_trainer(5, l1)?, &same, 50)?;
    assert!(last.reconstruction < 0.7 * first.reconstruction, "{first:?} {last:?}");
    let (first, last) = losses_of(&mut digit_trainer(5, VaeTrainerOptions { lr: 3e-3, ..adversarial() })?, &same, 40)?;
    assert!(first.discriminator == 0.0 && first.adversarial_weight == 0.0, "{first:?}");
    // The critic knows what is drawn: its scores are negative. (One that knows it well has a hinge loss of 0.)
    assert!(last.adversarial > 0.5 && last.adversarial_weight > 0.0 && last.perceptual < first.perceptual, "{last:?}");
    let wrong = VaeTrainerOptions { penalty_weight: f64::NAN, ..plain };
    assert!(digit_trainer(5, wrong).err().unwrap().to_string().contains("penalty_weight"));
    Ok(())
}

fn losses_of<M: Autoencoder>(trainer: &mut VaeTrainer<M>, x: &Tensor, steps: usize) -> Result<(VaeStep, VaeStep)> {
    let first = trainer.step(x)?;
    let rest = (1..steps).map(|_| trainer.step(x)).collect::<Result<Vec<_>>>()?;
    Ok((first, rest.last().copied().unwrap_or(first)))
}

#[test]
fn a_perceptual_loss_is_of_directions() -> Result<()> {
    let features: Features = Box::new(|x: &Tensor| Ok(vec![x.clone(), x.avg_pool2d(2)?]));
    let x = Generator::new(2).randn([2, 3, 4, 4], ())?;
    let zero = perceptual_loss(&features, &x.mul_scalar(3.0)?, &x)?.item_f64()?;
    assert!(zero.abs() < 1e-6, "{zero}");
    // Opposite directions are 2 apart, in both maps.
    let far = perceptual_loss(&features, &x.neg()?, &x)?.item_f64()?;
    assert!((far - 8.0).abs() < 1e-4, "{far}");
    let none: Features = Box::new(|_: &Tensor| Ok(vec![]));
    assert!(perceptual_loss(&none, &x, &x).is_err());
    Ok(())
}

#[test]
fn colours_come_apart_and_together() -> Result<()> {
    let rgb = Tensor::from_vec(vec![1f32, 0.5, -1.0, -1.0, 0.5, 1.0, -1.0, 0.5, -1.0], [1, 3, 1, 3])?; // red, grey, green
    let (grey, chroma) = split_colour(&rgb)?;
    let expected = Tensor::from_vec(vec![-0.402f32, 0.5, 0.174], [1, 1, 1, 3])?;
    expect_within("grey", &grey, &expected, 1e-5);
    assert!(most(&chroma.narrow(3, 1, 1)?) < 1e-6);
    expect_within("again", &join_colour(&grey, &chroma)?, &rgb, 1e-5);
    assert!(split_colour(&grey).is_err());
    let params = Params::seeded(1);
    let model = Colorizer::new(&params, ColorizerConfig { width: 4, levels: 2 })?;
    let odd = Generator::new(1).randn([1, 1, 9, 7], ())?;
    let coloured = model.forward(&odd)?;
    assert_eq!(coloured.dims(), [1, 3, 9, 7]);
    expect_within("brightness", &split_colour(&coloured)?.0, &odd, 1e-5);
    assert!(Colorizer::new(&Params::new(), ColorizerConfig { width: 6, levels: 2 }).is_err());
    assert!(Colorizer::new(&Params::new(), ColorizerConfig { width: 4, levels: usize::MAX }).is_err());
    Ok(())
}
