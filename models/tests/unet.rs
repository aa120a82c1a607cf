//! U-Nets and ControlNets against `diffusers`: what they give, and the gradients of every parameter and input. `fixtures/diffusion/unet.py`
//! made the reference.

use kiln_autograd::TensorExt;
use kiln_models::diffusion::unet::{
    Control, ControlNetModel, MultiControlNet, Residuals, UNet2dConditionModel, UNet2dModel, UNetConditions,
};
use kiln_models::nn::{LoadMode, Params};
use kiln_tensor::io::safetensors;
use kiln_tensor::{Result, Tensor};
use serde::de::DeserializeOwned;
use serde_json::Value;
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
        let mut loss = Tensor::zeros((), kiln_tensor::DType::F32)?;
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
    let params = Params::new();
    let model = UNet2dModel::new(&params, &config(name))?;
    fill(&params)?;
    Ok((model, params))
}

fn latents(name: &str) -> Result<(UNet2dConditionModel, Params)> {
    let params = Params::new();
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
