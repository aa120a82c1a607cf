//! The layers that an adapter can change, as one thing.

use super::config::LoraConfig;
use super::conv::{LoraConv, extents};
use super::embedding::LoraEmbedding;
use super::layer::{LoraLinear, Shared};
use super::select::{PREFIX, Target};
use crate::nn::{Conv2d, Embedding, Linear, Param, Params};
use kiln_tensor::{Error, Result, Shape, Tensor};
use std::sync::Arc;

/// A layer of the base model.
#[derive(Clone)]
pub(super) enum Host {
    Linear(Linear),
    Embedding(Embedding),
    Conv(Conv2d),
}

impl Host {
    /// The layers below `params`.
    pub fn all(params: &Params) -> Vec<Host> {
        let linears = params.linears().into_iter().map(Host::Linear);
        let embeddings = params.embeddings().into_iter().map(Host::Embedding);
        linears.chain(embeddings).chain(params.convs().into_iter().map(Host::Conv)).collect()
    }

    /// The full name.
    pub fn name(&self) -> &str {
        match self {
            Host::Linear(layer) => layer.name(),
            Host::Embedding(layer) => layer.name(),
            Host::Conv(layer) => layer.name(),
        }
    }

    pub fn is_linear(&self) -> bool {
        matches!(self, Host::Linear(_))
    }

    pub fn bias(&self) -> Option<&Param> {
        match self {
            Host::Linear(layer) => layer.bias(),
            Host::Embedding(_) => None,
            Host::Conv(layer) => layer.bias(),
        }
    }

    /// The weight's values; those of a quantised one are rounded.
    pub fn weight_values(&self) -> Result<Tensor> {
        match self {
            Host::Linear(layer) => layer.weight_values(),
            Host::Embedding(layer) => Ok(layer.weight().get()),
            Host::Conv(layer) => Ok(layer.weight().get()),
        }
    }

    pub fn is_adapted(&self) -> bool {
        match self {
            Host::Linear(layer) => layer.adapter().is_some(),
            Host::Embedding(layer) => layer.adapter().is_some(),
            Host::Conv(layer) => layer.adapter().is_some(),
        }
    }

    /// Names and shapes of the tensors of an adapter of this rank, as the file has them below the layer's name.
    pub fn tensors(&self, rank: usize, use_dora: bool) -> Result<Vec<(&'static str, Shape)>> {
        let matrices = ["lora_A.weight", "lora_B.weight"];
        let (names, a, b, magnitudes): (_, &[usize], &[usize], &[usize]) = match self {
            Host::Linear(layer) => (matrices, &[rank, layer.inputs()], &[layer.outputs(), rank], &[layer.outputs()]),
            Host::Embedding(layer) => {
                let [entries, width] = layer.weight().get().dims_n("lora")?;
                (["lora_embedding_A", "lora_embedding_B"], &[rank, entries], &[width, rank], &[width])
            }
            Host::Conv(layer) => {
                let [outputs, inputs, kh, kw] = extents(layer)?;
                (matrices, &[rank, inputs, kh, kw], &[outputs, rank, 1, 1], &[1, outputs, 1, 1])
            }
        };
        let mut all = vec![(names[0], Shape::new(a)?), (names[1], Shape::new(b)?)];
        if use_dora {
            all.push(("lora_magnitude_vector", Shape::new(magnitudes)?));
        }
        Ok(all)
    }
}

/// A layer and its adapter.
pub(super) struct Adapted {
    /// The layer's name below the model's scope.
    pub name: String,
    pair: Pair,
}

enum Pair {
    Linear(Linear, Arc<LoraLinear>),
    Embedding(Embedding, Arc<LoraEmbedding>),
    Conv(Conv2d, Arc<LoraConv>),
}

impl Adapted {
    /// An adapter in the scope `own`, not in the layer yet.
    pub fn new(own: &Params, target: Target, config: &LoraConfig, shared: &Shared) -> Result<Self> {
        let scope = own.scope(PREFIX).scope(&target.name);
        let pair = match &target.layer {
            Host::Linear(layer) => Pair::Linear(layer.clone(), Arc::new(LoraLinear::new(&scope, layer, &target, config, shared)?)),
            Host::Embedding(layer) => Pair::Embedding(layer.clone(), Arc::new(LoraEmbedding::new(&scope, layer, &target, config, shared)?)),
            Host::Conv(layer) => Pair::Conv(layer.clone(), Arc::new(LoraConv::new(&scope, layer, &target, config, shared)?)),
        };
        Ok(Self { name: target.name, pair })
    }

    /// Puts the adapter into the layer.
    pub fn install(&self) {
        match &self.pair {
            Pair::Linear(layer, adapter) => drop(layer.set_adapter(Some(adapter.clone()))),
            Pair::Embedding(layer, adapter) => drop(layer.set_adapter(Some(adapter.clone()))),
            Pair::Conv(layer, adapter) => drop(layer.set_adapter(Some(adapter.clone()))),
        }
    }

    /// Takes the layer's adapter away.
    pub fn remove(&self) {
        match &self.pair {
            Pair::Linear(layer, _) => drop(layer.set_adapter(None)),
            Pair::Embedding(layer, _) => drop(layer.set_adapter(None)),
            Pair::Conv(layer, _) => drop(layer.set_adapter(None)),
        }
    }

    /// The layer's weight, and the values that give the same outputs without the adapter.
    ///
    /// # Errors
    /// If the weight is quantised.
    pub fn merged(&self) -> Result<(Param, Tensor)> {
        let (weight, merged) = match &self.pair {
            Pair::Linear(layer, adapter) => {
                let hint = "the update would be lost in its rounding; `dequantize_linears` first";
                let quantised = || Error::argument("merge", format!("the weight of `{}` is quantised: {hint}", layer.name()));
                (layer.weight().ok_or_else(quantised)?, adapter.merged(layer)?)
            }
            Pair::Embedding(layer, adapter) => (layer.weight().clone(), adapter.merged(layer)?),
            Pair::Conv(layer, adapter) => (layer.weight().clone(), adapter.merged(layer)?),
        };
        let merged = merged.to_dtype(weight.dtype())?;
        Ok((weight, merged))
    }
}
