//! U-Nets and ControlNets against `diffusers`: what they give, and the gradients of every parameter and input. `fixtures/diffusion/unet.py`
//! made the reference.

use kiln_autograd::TensorExt;
use kiln_models::diffusion::unet::UNet2dModel;
use kiln_models::nn::{LoadMode, Params, StateDict};
use kiln_tensor::io::safetensors;
use kiln_tensor::{Result, Tensor};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Largest difference from the reference, in units of the tensor's largest value.
const TOLERANCE: f64 = 1e-5;

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

/// `fill` of the script, as a state dictionary for the parameters of `params`.
fn filled(params: &Params, prefix: &str) -> Result<StateDict> {
    let fill = |name: &str, shape: &[usize]| {
        let values = noise(&format!("{prefix}{name}"), shape)?;
        match shape {
            [_, rest @ ..] if !rest.is_empty() => {
                let scale = (3.0 / rest.iter().product::<usize>() as f64).sqrt() as f32;
                Tensor::from_vec(values.to_vec::<f32>()?.iter().map(|x| x * scale).collect(), shape)
            }
            _ if name.ends_with("weight") => values.mul_scalar(0.25)?.add_scalar(1.0),
            _ => values.mul_scalar(0.25),
        }
    };
    params.params().iter().map(|p| Ok((p.name().to_owned(), fill(p.name(), p.shape().dims())?))).collect()
}

/// Fills a model that was just made.
fn fill(params: &Params, prefix: &str) -> Result<()> {
    params.eval();
    params.load_state_dict(&filled(params, prefix)?, LoadMode::Strict)?;
    Ok(())
}

/// `fingerprint` of the script.
fn fingerprint(grad: &Tensor) -> Result<Tensor> {
    let [rows, rest @ ..] = grad.dims() else { return grad.reshape([1]) };
    if rest.is_empty() {
        return Ok(grad.clone());
    }
    let (rows, columns) = (*rows, rest.iter().product());
    let grad = grad.reshape([rows, columns])?;
    let of_rows = grad.matmul(&noise("columns", &[columns, 1])?)?.reshape([rows])?;
    let of_columns = noise("rows", &[1, rows])?.matmul(&grad)?.reshape([columns])?;
    Tensor::cat(&[of_rows, of_columns], 0)
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max(())?.item_f64()
}

#[track_caller]
fn expect_close_at(what: &str, found: &Tensor, expected: &Tensor, most: f64) -> Result<()> {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let difference = largest(&found.sub(expected)?)?;
    assert!(difference <= TOLERANCE * most, "{what}: differs by {difference:e}, its largest value is {most:e}");
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
    fn check(&self, outputs: &[(&str, &Tensor)], params: &Params) -> Result<()> {
        let mut loss = Tensor::zeros((), kiln_tensor::DType::F32)?;
        for (name, out) in outputs {
            let expected = self.get(name);
            expect_close_at(name, out, expected, largest(expected)?)?;
            loss = loss.add(&out.mul(&noise(&format!("probe.{name}"), out.dims())?)?.sum(())?)?;
        }
        loss.backward()?;
        let params = params.params();
        let of_params = params.iter().map(|p| (p.name().to_owned(), p.grad()));
        let found: BTreeMap<_, _> = of_params.chain(self.inputs.iter().map(|(name, x)| (name.clone(), x.grad()))).collect();
        let names: BTreeSet<_> = self.tensors.keys().filter_map(|name| name.strip_prefix("grad.")).map(str::to_owned).collect();
        assert_eq!(found.keys().cloned().collect::<BTreeSet<_>>(), names);
        for (name, grad) in found {
            let grad = fingerprint(&grad.unwrap_or_else(|| panic!("{name} has no gradient")))?;
            expect_close_at(&name, &grad, self.get(&format!("grad.{name}")), self.size_of_grad(&name)?)?;
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

fn pixels(name: &str) -> Result<(UNet2dModel, Params)> {
    let params = Params::new();
    let model = UNet2dModel::new(&params, &config(name))?;
    fill(&params, "")?;
    Ok((model, params))
}

#[test]
fn pixel_networks_are_those_of_diffusers() -> Result<()> {
    for name in ["ddpm", "ddpm_classes", "ddpm_scale_shift", "ddpm_identity", "ddpm_plain"] {
        println!("{name}");
        let (expected, (model, params)) = (Expected::of(name)?, pixels(name)?);
        let out = model.forward(expected.get("sample"), expected.get("timesteps"), expected.find("class_labels"))?;
        expected.check(&[("out", &out)], &params)?;
    }
    Ok(())
}
