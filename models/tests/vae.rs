//! Autoencoders against `diffusers` (`fixtures/vae.py`), and what their training promises.

use kiln_autograd::TensorExt;
use kiln_models::nn::{LoadMode, Params, StateDict};
use kiln_models::vae::*;
use kiln_tensor::io::safetensors;
use kiln_tensor::{Generator, Result, Tensor};
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

#[test]
fn configurations_that_cannot_be_are_errors() {
    let text = std::fs::read_to_string(folder("kl").join("config.json")).unwrap();
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text).unwrap();
    let fine = serde_json::to_value(config("kl")).unwrap();
    assert!(fields.iter().all(|(name, value)| fine.get(name) == Some(value)), "{fine}");
    for (name, value, part) in [
        ("block_out_channels", serde_json::json!([4]), "block_out_channels 1"),
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
