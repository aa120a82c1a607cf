//! Transformers: every family against the reference implementation, passes in parts against whole ones, and files that are not what
//! they claim. `fixtures/transformer.py` made the reference.

mod cache;
mod hostile;
mod numbers;
mod reference;

use kiln_autograd::TensorExt;
use kiln_models::nn::Params;
use kiln_models::transformer::Layout;
use kiln_tensor::io::safetensors;
use kiln_tensor::{CrossEntropyOptions, Result, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Largest difference from the reference, in units of the tensor's largest value.
const TOLERANCE: f64 = 1e-5;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/transformer").join(name)
}

/// A directory that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kiln-transformer-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max(())?.item_f64()
}

#[track_caller]
fn expect_close(what: &str, found: &Tensor, expected: &Tensor) -> Result<()> {
    expect_close_at(what, found, expected, largest(expected)?)
}

/// As [`expect_close`], of numbers of the size `most`.
#[track_caller]
fn expect_close_at(what: &str, found: &Tensor, expected: &Tensor, most: f64) -> Result<()> {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let difference = largest(&found.sub(expected)?)?;
    assert!(difference <= TOLERANCE * most, "{what}: differs by {difference:e}, its largest value is {most:e}");
    Ok(())
}

/// What the reference computed of one batch.
struct Expected(BTreeMap<String, Tensor>);

impl Expected {
    fn of(name: &str) -> Result<Self> {
        Ok(Self(safetensors::load(folder(name).join("expected.safetensors"))?))
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.0[name]
    }

    fn mask(&self) -> Result<Tensor> {
        self.get("mask").ne_scalar(0.0)
    }

    /// Compares logits at the places where `real` is true.
    fn check_logits(&self, logits: &Tensor, real: Option<&Tensor>) -> Result<()> {
        let kept = |x: &Tensor| match real {
            Some(real) => x.masked_fill(&real.logical_not()?.unsqueeze(-1)?, 0.0),
            None => Ok(x.clone()),
        };
        expect_close("logits", &kept(logits)?, &kept(self.get("logits"))?)
    }

    /// Compares the loss, and after a backward pass the gradients of all parameters, whose names must be the reference's.
    fn check_loss(&self, loss: &Tensor, params: &Params, layout: &Layout) -> Result<()> {
        expect_close("loss", &loss.reshape([1])?, self.get("loss"))?;
        params.zero_grad();
        loss.backward()?;
        let names: BTreeSet<_> = self.0.keys().filter_map(|name| name.strip_prefix("grad.")).map(str::to_owned).collect();
        assert_eq!(params.params().iter().map(|p| p.name().to_owned()).collect::<BTreeSet<_>>(), names);
        for param in params.params() {
            let grad = param.grad().unwrap_or_else(|| panic!("{} has no gradient", param.name()));
            let lies_transposed = layout.transposed.iter().any(|end| param.name().ends_with(end));
            let grad = if lies_transposed { grad.t()? } else { grad };
            let expected = self.get(&format!("grad.{}", param.name()));
            expect_close_at(param.name(), &grad, expected, self.size_of_grad(param.name())?)?;
        }
        Ok(())
    }

    /// The largest value of a gradient. That of a key's bias is 0 but for rounding, where positions do not turn (softmax ignores what
    /// all scores have in common): then it is the query's that counts.
    fn size_of_grad(&self, name: &str) -> Result<f64> {
        let of = |name: &str| largest(self.get(&format!("grad.{name}")));
        let of_query = name.replace("k_proj.bias", "q_proj.bias").replace("key.bias", "query.bias");
        let (own, of_query) = (of(name)?, of(&of_query)?);
        Ok(if own < 1e-5 * of_query { of_query } else { own })
    }
}

/// Cross-entropy of (B, T, V) with labels (B, T), of which −100 counts for nothing.
fn token_loss(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let options = CrossEntropyOptions { ignore_index: -100, ..Default::default() };
    logits.flatten(0, 1)?.cross_entropy_with(&labels.flatten(0, 1)?, &options)
}

/// The same, of the logits before each label.
fn next_token_loss(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let len = labels.dim(1)?;
    token_loss(&logits.narrow(1, 0, len - 1)?, &labels.narrow(1, 1, len - 1)?)
}
