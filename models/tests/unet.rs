//! U-Nets and ControlNets against `diffusers`: what they give, and the gradients of every parameter and input. `fixtures/diffusion/unet.py`
//! made the reference.

use kiln_autograd::TensorExt;
use kiln_models::diffusion::unet::{
    Control, ControlNetInput, ControlNetModel, MultiControlNet, Residuals, UNet2dConditionConfig, UNet2dConditionModel, UNet2dModel,
    UNetConditions,
};
use kiln_models::nn::{LoadMode, Params, StateDict};
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Result, Tensor, autocast};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Largest difference from the reference, in units of the tensor's largest value.
const TOLERANCE: f64 = 1e-5;

/// The same for gradients, which rounding goes through twice.
const OF_GRADIENTS: f64 = 3e-5;

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/diffusion/unet").join(name)
}

fn config<C: DeserializeOwned>(name: &str) -> C {
    let text = std::fs::read_to_string(file(&format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// `noise` of the script.
fn noise(name: &str, dims: &[usize]) -> Result<Tensor> {
    let seed = name.bytes().fold(2166136261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16777619));
    let value = |i: u32| {
        let mut x = i.wrapping_mul(2654435761).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x85ebca6b);
        x = (x ^ (x >> 13)).wrapping_mul(0xc2b2ae35);
        x ^= x >> 16;
        (x >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    Tensor::from_vec((0..dims.iter().product::<usize>() as u32).map(value).collect(), dims)
}

/// Fills a model that was just made as `fill` of the script does, by the names of its parameters (those of a U-Net beside ControlNets
/// without its scope).
fn fill(params: &Params) -> Result<()> {
    let fill = |name: &str, shape: &[usize]| {
        let values = noise(name.strip_prefix("unet.").unwrap_or(name), shape)?;
        match shape {
            [_, rest @ ..] if !rest.is_empty() => {
                let scale = (3.0 / rest.iter().product::<usize>() as f64).sqrt() as f32;
                Tensor::from_vec(values.to_vec::<f32>()?.iter().map(|x| x * scale).collect(), shape)
            }
            _ if name.ends_with("weight") => values.mul_scalar(0.25)?.add_scalar(1.0),
            _ => values.mul_scalar(0.25),
        }
    };
    params.eval();
    let state = params.params().iter().map(|p| Ok((p.name().to_owned(), fill(p.name(), p.shape().dims())?))).collect::<Result<_>>()?;
    params.load_state_dict(&state, LoadMode::Strict)?;
    Ok(())
}

/// `fingerprint` of the script.
fn fingerprint(grad: &Tensor) -> Result<Tensor> {
    match *grad.dims() {
        [] | [_] => Ok(grad.clone()),
        [rows, ref rest @ ..] => {
            let columns = rest.iter().product();
            grad.reshape([rows, columns])?.matmul(&noise("columns", &[columns, 1])?)?.reshape([rows])
        }
    }
}

/// The largest norm of a row of a gradient of two dimensions or more: the size of what its fingerprint sums, much of which may cancel.
fn largest_row(grad: &Tensor) -> Result<f64> {
    if grad.rank() < 2 { Ok(0.0) } else { grad.square()?.flatten(1, -1)?.sum(1)?.max(())?.sqrt()?.item_f64() }
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max(())?.item_f64()
}

#[track_caller]
fn expect_close(what: &str, found: &Tensor, expected: &Tensor, allowed: f64) -> Result<()> {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let difference = largest(&found.sub(expected)?)?;
    assert!(difference <= allowed, "{what}: differs by {difference:e}, {allowed:e} is allowed");
    Ok(())
}

/// What the reference computed of one batch.
struct Expected {
    tensors: BTreeMap<String, Tensor>,
    /// The inputs that gradients are taken for.
    inputs: BTreeMap<String, Tensor>,
}

impl Expected {
    fn of(name: &str) -> Result<Self> {
        let tensors = safetensors::load(file(&format!("{name}.safetensors")))?;
        let tracked = tensors.iter().filter(|(name, _)| tensors.contains_key(&format!("grad.{name}")));
        let inputs = tracked.map(|(name, x)| (name.clone(), x.requires_grad_().unwrap())).collect();
        Ok(Self { tensors, inputs })
    }

    fn find(&self, name: &str) -> Option<&Tensor> {
        self.inputs.get(name).or_else(|| self.tensors.get(name))
    }

    fn get(&self, name: &str) -> &Tensor {
        self.find(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// Compares what a network gave, then the gradients of its parameters, which must be the reference's, and of the inputs.
    fn check<'a>(&self, outputs: impl IntoIterator<Item = (String, &'a Tensor)>, params: &Params) -> Result<()> {
        let mut loss = Tensor::zeros((), DType::F32)?;
        for (name, out) in outputs {
            let expected = self.get(&name);
            expect_close(&name, out, expected, TOLERANCE * largest(expected)?)?;
            loss = loss.add(&out.mul(&noise(&format!("probe.{name}"), out.dims())?)?.sum(())?)?;
        }
        loss.backward()?;
        let params = params.params();
        let of_params = params.iter().map(|p| (p.name().to_owned(), p.grad()));
        let found: BTreeMap<_, _> = of_params.chain(self.inputs.iter().map(|(name, x)| (name.clone(), x.grad()))).collect();
        let names: BTreeSet<_> = self.tensors.keys().filter_map(|name| name.strip_prefix("grad.")).map(str::to_owned).collect();
        assert_eq!(found.keys().cloned().collect::<BTreeSet<_>>(), names);
        for (name, grad) in found {
            let grad = grad.unwrap_or_else(|| panic!("{name} has no gradient"));
            let size = self.size_of_grad(&name)?.max(largest_row(&grad)?);
            expect_close(&name, &fingerprint(&grad)?, self.get(&format!("grad.{name}")), OF_GRADIENTS * size)?;
        }
        Ok(())
    }

    /// The largest value of a gradient. That of a key's bias is 0 but for rounding (softmax ignores what all scores have in common): then
    /// it is the query's that counts.
    fn size_of_grad(&self, name: &str) -> Result<f64> {
        let of = |name: &str| largest(self.get(&format!("grad.{name}")));
        let (own, of_query) = (of(name)?, of(&name.replace("to_k.bias", "to_q.bias"))?);
        Ok(if own < 1e-5 * of_query { of_query } else { own })
    }
}

/// What the fixture's batch is told besides the sample, the time and the context.
fn conditions(expected: &Expected) -> UNetConditions<'_> {
    UNetConditions {
        class_labels: expected.find("class_labels"),
        text_embeds: expected.find("text_embeds"),
        time_ids: expected.find("time_ids"),
        timestep_cond: expected.find("timestep_cond"),
        ..UNetConditions::default()
    }
}

fn pixels(name: &str) -> Result<(UNet2dModel, Params)> {
    let params = Params::seeded(7);
    let model = UNet2dModel::new(&params, &config(name))?;
    fill(&params)?;
    Ok((model, params))
}

fn latents(name: &str) -> Result<(UNet2dConditionModel, Params)> {
    let params = Params::seeded(7);
    let model = UNet2dConditionModel::new(&params, &config(name))?;
    fill(&params)?;
    Ok((model, params))
}

#[test]
fn pixel_networks_are_those_of_diffusers() -> Result<()> {
    for name in ["ddpm", "ddpm_classes", "ddpm_scale_shift", "ddpm_identity", "ddpm_plain"] {
        println!("{name}");
        let (expected, (model, params)) = (Expected::of(name)?, pixels(name)?);
        let out = model.forward(expected.get("sample"), expected.get("timesteps"), expected.find("class_labels"))?;
        expected.check([("out".into(), &out)], &params)?;
    }
    Ok(())
}

const LATENTS: [&str; 9] = ["sd1", "sd1_odd", "sd1_classes", "sd2", "sd2_projection", "sdxl", "lcm", "latents_plain", "latents_no_mid"];

fn run(model: &UNet2dConditionModel, expected: &Expected) -> Result<Tensor> {
    model.forward(expected.get("sample"), expected.get("timesteps"), expected.find("context"), &conditions(expected))
}

#[test]
fn latent_networks_are_those_of_diffusers() -> Result<()> {
    for name in LATENTS {
        println!("{name}");
        let (expected, (model, params)) = (Expected::of(name)?, latents(name)?);
        expected.check([("out".into(), &run(&model, &expected)?)], &params)?;
    }
    Ok(())
}

/// A U-Net and its ControlNets, in scopes of one root, with what the fixture says of each.
struct Controlled {
    params: Params,
    unet: UNet2dConditionModel,
    nets: MultiControlNet,
    controls: Vec<Value>,
    expected: Expected,
}

impl Controlled {
    fn new(name: &str) -> Result<Self> {
        let file: Value = config(name);
        let params = Params::new();
        let of = |value: &Value| value.clone();
        let unet = UNet2dConditionModel::new(&params.scope("unet"), &serde_json::from_value(of(&file["unet"])).unwrap())?;
        let nets = file["nets"].as_array().unwrap().iter().enumerate();
        let nets = nets.map(|(i, net)| {
            let scope = params.scope(format!("net{i}"));
            ControlNetModel::new(&scope, &serde_json::from_value(of(net)).unwrap())
        });
        let nets = MultiControlNet::new(nets.collect::<Result<_>>()?)?;
        fill(&params)?;
        let controls = file["controls"].as_array().unwrap().clone();
        Ok(Self { params, unet, nets, controls, expected: Expected::of(name)? })
    }

    fn residuals(&self) -> Result<Residuals> {
        let is_guess = self.controls.iter().any(|control| control["guess"] == true);
        let images: Vec<_> = (0..self.controls.len()).map(|i| self.expected.get(&format!("image.{i}"))).collect();
        let controls: Vec<_> = images
            .into_iter()
            .zip(&self.controls)
            .map(|(image, control)| Control { image, conditioning_scale: control["scale"].as_f64().unwrap(), guess_mode: is_guess })
            .collect();
        let e = &self.expected;
        self.nets.forward(e.get("sample"), e.get("timesteps"), e.find("context"), &controls, &conditions(e))
    }
}

#[test]
fn controlled_networks_are_those_of_diffusers() -> Result<()> {
    for name in ["controlnet_sd1", "controlnet_sdxl", "controlnet_two"] {
        println!("{name}");
        let all = Controlled::new(name)?;
        let (e, residuals) = (&all.expected, all.residuals()?);
        let given = residuals.with(conditions(e));
        let out = all.unet.forward(e.get("sample"), e.get("timesteps"), e.find("context"), &given)?;
        let down = residuals.down.iter().enumerate().map(|(i, x)| (format!("down.{i}"), x));
        e.check(down.chain([("mid".into(), &residuals.mid), ("out".into(), &out)]), &all.params)?;
    }
    Ok(())
}

/// The gradients of a training pass, dropout included, must not depend on whether layers are computed again, but for the order of sums.
fn check_recomputing(params: &Params, forward: impl Fn() -> Result<Tensor>, recompute: impl Fn()) -> Result<()> {
    params.train();
    let draws = params.generator().state();
    let grads = || -> Result<Vec<(String, Tensor)>> {
        params.zero_grad();
        params.generator().set_state(draws);
        forward()?.square()?.mean(())?.backward()?;
        Ok(params.params().iter().map(|p| (p.name().to_owned(), p.grad().unwrap())).collect())
    };
    let kept = grads()?;
    recompute();
    for ((name, found), (_, kept)) in grads()?.iter().zip(&kept) {
        // The biases of keys have none but for rounding.
        expect_close(name, found, kept, 1e-5 * largest(kept)?.max(1e-3))?;
    }
    Ok(())
}

#[test]
fn layers_computed_again_give_the_same() -> Result<()> {
    let (expected, (model, params)) = (Expected::of("ddpm")?, pixels("ddpm")?);
    assert!(model.config().dropout > 0.0);
    let forward = || model.forward(expected.get("sample"), expected.get("timesteps"), None);
    check_recomputing(&params, forward, || model.set_activation_checkpointing(true))?;
    let (expected, (model, params)) = (Expected::of("sdxl")?, latents("sdxl")?);
    check_recomputing(&params, || run(&model, &expected), || model.set_activation_checkpointing(true))
}

/// A ControlNet made from a U-Net holds its way down and says nothing, but learns; its scopes may have any names.
#[test]
fn a_controlnet_starts_as_a_silent_copy() -> Result<()> {
    let root = Params::seeded(0);
    let unet = UNet2dConditionModel::new(&root.scope("a").scope("unet"), &config("sdxl"))?;
    let input = ControlNetInput { conditioning_embedding_out_channels: vec![4, 6], ..ControlNetInput::default() };
    let net = ControlNetModel::from_unet(&root.scope("control"), &unet, &input)?;
    let mut copied = 0;
    for param in net.params().params() {
        let name = param.name().strip_prefix("control.").unwrap();
        if let Some(twin) = root.named(&format!("a.unet.{name}")) {
            assert!(param.get().to_vec::<f32>()? == twin.get().to_vec::<f32>()?, "{name}");
            assert!(!param.is_same(&twin));
            copied += 1;
        } else {
            assert!(name.starts_with("controlnet_"), "{name}");
        }
    }
    let is_above = |name: &str| ["up_blocks", "conv_norm_out", "conv_out"].iter().any(|scope| name.contains(&format!("unet.{scope}.")));
    assert_eq!(copied, unet.params().params().iter().filter(|p| !is_above(p.name())).count());
    let expected = Expected::of("sdxl")?;
    let (e, image) = (&expected, noise("image", &[2, 3, 16, 16])?);
    let given = conditions(e);
    let said = net.forward(e.get("sample"), e.get("timesteps"), e.find("context"), &Control::new(&image), &given)?;
    assert!(said.down.iter().chain([&said.mid]).all(|x| largest(x).unwrap() == 0.0));
    let steered = unet.forward(e.get("sample"), e.get("timesteps"), e.find("context"), &said.with(given))?;
    assert!(steered.to_vec::<f32>()? == run(&unet, e)?.to_vec::<f32>()?);
    steered.square()?.mean(())?.backward()?;
    let learns = |name: &str| -> Result<bool> { Ok(largest(&root.named(name).unwrap().grad().unwrap())? > 0.0) };
    assert!(learns("control.controlnet_mid_block.weight")? && learns("control.controlnet_down_blocks.0.weight")?);
    Ok(())
}

/// What a configuration says is what it says after it was written, with the fields that are not known here.
#[test]
fn configurations_are_kept() {
    for name in LATENTS {
        let read: UNet2dConditionConfig = config(name);
        let written = serde_json::to_value(&read).unwrap();
        assert_eq!(written["attention_type"], "default");
        assert_eq!(serde_json::from_value::<UNet2dConditionConfig>(written).unwrap(), read);
    }
    let default: UNet2dConditionConfig = serde_json::from_value(json!({})).unwrap();
    assert_eq!(default, UNet2dConditionConfig::default());
}

/// In bf16, as weights or by autocast, the networks say about the same.
#[test]
fn half_precision_runs() -> Result<()> {
    let expected = Expected::of("sdxl")?;
    let close = |out: &Tensor| -> Result<()> {
        let out = out.to_dtype(DType::F32)?;
        let difference = largest(&out.sub(expected.get("out"))?)?;
        assert!(difference < 0.1 * largest(expected.get("out"))?, "{difference}");
        Ok(())
    };
    let (model, params) = latents("sdxl")?;
    close(&autocast(DType::BF16, || run(&model, &expected))??)?;
    params.to_dtype(DType::BF16)?;
    let half = |name: &str| expected.get(name).to_dtype(DType::BF16);
    let given = UNetConditions { text_embeds: Some(&half("text_embeds")?), ..conditions(&expected) };
    let out = model.forward(&half("sample")?, expected.get("timesteps"), &half("context")?, &given)?;
    assert_eq!(out.dtype(), DType::BF16);
    close(&out)
}

#[track_caller]
fn expect_error<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn inputs_that_do_not_fit_are_errors() -> Result<()> {
    let ones = |dims: &[usize]| Tensor::ones(dims, ()).unwrap();
    let (sample, step, context) = (ones(&[2, 4, 8, 8]), Tensor::from_vec(vec![5i64], [1])?, ones(&[2, 5, 6]));
    let none = UNetConditions::default();
    let (model, _) = latents("sd1")?;
    let forward =
        |sample: &Tensor, step: &Tensor, context: Option<&Tensor>, given: UNetConditions<'_>| model.forward(sample, step, context, &given);
    forward(&sample, &step, Some(&context), none)?;
    expect_error(forward(&ones(&[2, 3, 8, 8]), &step, Some(&context), none), &["[2, 3, 8, 8]", "(B, 4, H, W)"]);
    expect_error(forward(&ones(&[4, 8, 8]), &step, Some(&context), none), &["[4, 8, 8]"]);
    expect_error(forward(&ones(&[2, 4, 0, 8]), &step, Some(&context), none), &["[2, 4, 0, 8]"]);
    expect_error(forward(&sample, &ones(&[3]), Some(&context), none), &["timesteps", "[3]"]);
    expect_error(forward(&sample, &step, None, none), &["encoder_hidden_states", "(2, S, 6)"]);
    expect_error(forward(&sample, &step, Some(&ones(&[2, 5, 7])), none), &["encoder_hidden_states", "(2, S, 6)"]);
    expect_error(forward(&sample, &step, Some(&ones(&[1, 5, 6])), none), &["encoder_hidden_states"]);
    let labels = Tensor::from_vec(vec![0i64, 1], [2])?;
    expect_error(forward(&sample, &step, Some(&context), UNetConditions { class_labels: Some(&labels), ..none }), &["class_labels"]);
    expect_error(forward(&sample, &step, Some(&context), UNetConditions { time_ids: Some(&labels), ..none }), &["time_ids"]);
    expect_error(forward(&sample, &step, Some(&context), UNetConditions { timestep_cond: Some(&labels), ..none }), &["timestep_cond"]);
    let few = [ones(&[2, 8, 8, 8])];
    expect_error(
        forward(&sample, &step, Some(&context), UNetConditions { down_residuals: Some(&few), ..none }),
        &["1 down residuals", "6"],
    );
    expect_error(forward(&sample, &step, Some(&context), UNetConditions { mid_residual: Some(&few[0]), ..none }), &["mid residual"]);

    let (model, _) = latents("sd1_classes")?;
    expect_error(model.forward(&sample, &step, &context, &none), &["class_labels"]);
    let outside = Tensor::from_vec(vec![0i64, 5], [2])?;
    expect_error(
        model.forward(&sample, &step, &context, &UNetConditions { class_labels: Some(&outside), ..none }),
        &["class_labels", "0..5"],
    );
    let (model, _) = latents("sdxl")?;
    expect_error(model.forward(&sample, &step, &context, &none), &["text_embeds", "time_ids"]);
    let (text, ids) = (ones(&[2, 10]), ones(&[2, 5]));
    let given = UNetConditions { text_embeds: Some(&text), time_ids: Some(&ids), ..none };
    expect_error(model.forward(&sample, &step, &context, &given), &["[2, 10]", "[2, 5]", "46"]);

    let all = Controlled::new("controlnet_sd1")?;
    let net = &all.nets.nets()[0];
    let control = |image: &Tensor, given: UNetConditions<'_>| net.forward(&sample, &step, &context, &Control::new(image), &given);
    let image = ones(&[2, 3, 16, 16]);
    control(&image, none)?;
    expect_error(control(&ones(&[2, 3, 64, 64]), none), &["[2, 3, 64, 64]", "8×8"]);
    expect_error(control(&ones(&[2, 1, 16, 16]), none), &["[2, 1, 16, 16]"]);
    expect_error(control(&image, UNetConditions { down_residuals: Some(&few), ..none }), &["MultiControlNet"]);
    expect_error(all.nets.forward(&sample, &step, &context, &[], &none), &["0 images for 1 networks"]);
    expect_error(MultiControlNet::new(Vec::new()), &["one network"]);
    Ok(())
}

/// Every configuration that is not understood is an error that names the field and what it says.
#[test]
fn configurations_that_do_not_fit_are_errors() {
    let latents: Value = config("sd1");
    let wrong = [
        ("act_fn", json!("gelu")),
        ("attention_head_dim", json!(3)),
        ("attention_head_dim", json!([2, 2, 2])),
        ("attention_head_dim", json!(0)),
        ("block_out_channels", json!([8, 1u64 << 62])),
        ("block_out_channels", json!([])),
        ("block_out_channels", json!([8, 10])),
        ("layers_per_block", json!([1])),
        ("layers_per_block", json!(0)),
        ("norm_num_groups", json!(0)),
        ("cross_attention_dim", json!([6, 7])),
        ("cross_attention_dim", json!(0)),
        ("down_block_types", json!(["CrossAttnDownBlock2D", "KDownBlock2D"])),
        ("down_block_types", json!(["DownBlock2D"])),
        ("up_block_types", json!(["UpBlock2D"])),
        ("up_block_types", json!(["UpBlock2D", "AttnUpBlock2D"])),
        ("mid_block_type", json!("UNetMidBlock2DSimpleCrossAttn")),
        ("mid_block_scale_factor", json!(0)),
        ("only_cross_attention", json!([false, true])),
        ("dual_cross_attention", json!(true)),
        ("encoder_hid_dim_type", json!("image_proj")),
        ("time_embedding_type", json!("fourier")),
        ("resnet_time_scale_shift", json!("spatial")),
        ("class_embed_type", json!("simple_projection")),
        ("class_embed_type", json!("projection")),
        ("addition_embed_type", json!("text")),
        ("addition_embed_type", json!("text_time")),
        ("conv_in_kernel", json!(4)),
        ("conv_out_kernel", json!(0)),
        ("downsample_padding", json!(2)),
        ("out_channels", json!(0)),
        ("in_channels", json!(1u64 << 60)),
        ("time_cond_proj_dim", json!(0)),
        ("time_embedding_dim", json!(1u64 << 60)),
        ("num_class_embeds", json!(1u64 << 60)),
    ];
    for (field, value) in wrong {
        let mut fields = latents.clone();
        fields[field] = value.clone();
        let config = serde_json::from_value(fields).unwrap();
        println!("{field} {value}");
        expect_error(UNet2dConditionModel::new(&Params::new(), &config), &[field]);
    }
    let pixels: Value = config("ddpm");
    for (field, value) in [
        ("attention_head_dim", json!(3)),
        ("attention_head_dim", json!(0)),
        ("class_embed_type", json!("projection")),
        ("downsample_type", json!("resnet")),
        ("mid_block_scale_factor", json!(0.0)),
        ("time_embedding_type", json!("learned")),
        ("mid_block_type", json!("UNetMidBlock2DCrossAttn")),
        ("up_block_types", json!(["SkipUpBlock2D", "UpBlock2D"])),
        ("down_block_types", json!(["DownBlock2D", "CrossAttnDownBlock2D"])),
    ] {
        let mut fields = pixels.clone();
        fields[field] = value;
        expect_error(UNet2dModel::new(&Params::new(), &serde_json::from_value(fields).unwrap()), &[field]);
    }
    let control: Value = config("controlnet_sd1");
    for (field, value) in [
        ("controlnet_conditioning_channel_order", json!("hsv")),
        ("conditioning_embedding_out_channels", json!([])),
        ("conditioning_channels", json!(0)),
    ] {
        let mut fields = control["nets"][0].clone();
        fields[field] = value;
        expect_error(ControlNetModel::new(&Params::new(), &serde_json::from_value(fields).unwrap()), &[field]);
    }
}

/// Whatever a file claims, building from it is an error at worst, and takes no memory for weights that are not there.
#[test]
fn hostile_configurations_do_no_harm() {
    let values = [
        json!(null),
        json!(-1),
        json!(0),
        json!(1),
        json!(u64::MAX),
        json!(1u64 << 33),
        json!(-1e308),
        json!("x"),
        json!([]),
        json!([[1]]),
        json!([0, u64::MAX]),
        json!(["DownBlock2D", 3]),
        json!({"a": 1}),
    ];
    fn build<C: DeserializeOwned, M>(fields: Value, new: impl Fn(&Params, &C) -> Result<M>) {
        let Ok(config) = serde_json::from_value::<C>(fields) else { return };
        assert!(Params::new().build_from(StateDict::new(), LoadMode::Strict, |params| new(params, &config)).is_err());
    }
    let files = [config("ddpm"), config("sdxl"), config::<Value>("controlnet_sdxl")["nets"][0].clone()];
    for (i, file) in files.into_iter().enumerate() {
        for (field, _) in file.as_object().unwrap() {
            for value in &values {
                let mut fields = file.clone();
                fields[field] = value.clone();
                match i {
                    0 => build(fields, UNet2dModel::new),
                    1 => build(fields, UNet2dConditionModel::new),
                    _ => build(fields, ControlNetModel::new),
                }
            }
        }
    }
}
