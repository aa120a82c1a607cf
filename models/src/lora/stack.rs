//! Several files of updates in one model, each with a weight of its own.

use super::conv::{extents, product, update};
use super::host::Host;
use super::nearest::nearest;
use super::select::below;
use super::weights::{LoraPart, LoraWeights, ModuleName, Update};
use crate::diffusion::ldm::{layers_per_block, ldm_modules};
use crate::nn::{Adapter, Conv2d, Linear, Param, Params};
use kiln_tensor::{Error, Result, Tensor};
use std::collections::BTreeMap;
use std::sync::Arc;

/// scale · up · down.
#[derive(Clone)]
struct Term {
    down: Tensor,
    up: Tensor,
    scale: f64,
}

/// The terms of one layer.
struct Terms(Vec<Term>);

impl Adapter<Linear> for Terms {
    fn is_active(&self) -> bool {
        true
    }

    fn forward(&self, layer: &Linear, x: &Tensor) -> Result<Tensor> {
        let mut y = layer.base(x)?;
        for Term { down, up, scale } in &self.0 {
            let update = x.to_dtype(down.dtype())?.linear(down, None)?.mul_scalar(*scale)?.linear(up, None)?;
            y = y.add(&update.to_dtype(y.dtype())?)?;
        }
        Ok(y)
    }
}

impl Adapter<Conv2d> for Terms {
    fn is_active(&self) -> bool {
        true
    }

    fn forward(&self, layer: &Conv2d, x: &Tensor) -> Result<Tensor> {
        let mut y = layer.base(x)?;
        for Term { down, up, scale } in &self.0 {
            y = y.add(&update(layer, &x.to_dtype(down.dtype())?, down, up, *scale)?.to_dtype(y.dtype())?)?;
        }
        Ok(y)
    }
}

/// A file in the stack.
struct Entry {
    name: String,
    weight: f64,
    /// By the number of the layer.
    terms: BTreeMap<usize, Term>,
}

/// The low-rank updates of several files in one model, for drawing: y = W·x + b + Σ weight · scale · up·down·x over the files. (A
/// [`Lora`](super::Lora) is one that is trained.)
///
/// Dropping this handle leaves the updates in the model.
pub struct LoraStack {
    part: LoraPart,
    layers: Vec<(String, Host)>,
    entries: Vec<Entry>,
    /// While merged: the weights from before.
    originals: Vec<(Param, Tensor)>,
}

impl LoraStack {
    /// An empty stack for the model below `params`, which is that part of a pipeline.
    pub fn new(params: &Params, part: LoraPart) -> Self {
        let named = |host: Host| (below(params, host.name()).to_owned(), host);
        let layers = Host::all(params).into_iter().filter(|host| !matches!(host, Host::Embedding(_))).map(named).collect();
        Self { part, layers, entries: Vec::new(), originals: Vec::new() }
    }

    /// Puts the file's updates of this part into the model, under a name, times `weight`. Returns how many there are; files can have none
    /// for a part.
    ///
    /// # Errors
    /// If the name is taken, the weights are merged, a layer has another adapter, or an update fits no module of the model: the error
    /// lists the closest names. The model then stays as it was.
    pub fn add(&mut self, name: &str, file: &LoraWeights, weight: f64) -> Result<usize> {
        self.expect_unmerged()?;
        if self.entries.iter().any(|entry| entry.name == name) {
            return Err(Error::argument("lora", format!("there is a LoRA `{name}` in the {} already", self.part)));
        }
        let terms = self.resolve(name, file)?;
        let count = terms.len();
        let is_other = |i: &&usize| !self.entries.iter().any(|entry| entry.terms.contains_key(*i)) && self.is_adapted(**i);
        if let Some(taken) = terms.keys().find(is_other) {
            return Err(Error::argument(
                "lora",
                format!("`{}` has another adapter; detach it or merge it for good first", self.name(*taken)),
            ));
        }
        self.entries.push(Entry { name: name.to_owned(), weight: finite(weight)?, terms });
        self.install();
        Ok(count)
    }

    /// Changes the weight of a file in the stack.
    ///
    /// # Errors
    /// If there is none of that name, or the weights are merged.
    pub fn set_weight(&mut self, name: &str, weight: f64) -> Result<()> {
        self.expect_unmerged()?;
        let part = self.part;
        let entry = self.entries.iter_mut().find(|entry| entry.name == name).ok_or_else(|| missing(name, part))?;
        entry.weight = finite(weight)?;
        self.install();
        Ok(())
    }

    /// Takes a file out of the stack.
    ///
    /// # Errors
    /// As [`set_weight`](Self::set_weight).
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.expect_unmerged()?;
        let at = self.entries.iter().position(|entry| entry.name == name).ok_or_else(|| missing(name, self.part))?;
        let entry = self.entries.remove(at);
        entry.terms.keys().for_each(|&i| self.set_terms(i, Vec::new()));
        self.install();
        Ok(())
    }

    /// The names of the files with their weights.
    pub fn names(&self) -> Vec<(&str, f64)> {
        self.entries.iter().map(|entry| (entry.name.as_str(), entry.weight)).collect()
    }

    /// Whether the model's weights hold the updates.
    pub fn is_merged(&self) -> bool {
        !self.originals.is_empty()
    }

    /// Adds all updates to the weights: the layers are then as fast as without. The weights from before are kept, so that
    /// [`unmerge`](Self::unmerge) restores every bit.
    ///
    /// # Errors
    /// If the weight of a layer is quantised. Nothing is merged then.
    pub fn merge(&mut self) -> Result<()> {
        if self.is_merged() {
            return Ok(());
        }
        let mut merged = Vec::new();
        for i in 0..self.layers.len() {
            let terms = self.terms(i);
            if !terms.is_empty() {
                merged.push((i, self.sum(i, &terms)?));
            }
        }
        for (i, (param, sum)) in merged {
            self.originals.push((param.clone(), param.get().detach()));
            param.set(&sum)?;
            self.set_terms(i, Vec::new());
        }
        Ok(())
    }

    /// Undoes [`merge`](Self::merge).
    ///
    /// # Errors
    /// If a weight has been given another dtype since.
    pub fn unmerge(&mut self) -> Result<()> {
        self.originals.iter().try_for_each(|(param, content)| param.set(content))?;
        self.originals.clear();
        self.install();
        Ok(())
    }

    fn expect_unmerged(&self) -> Result<()> {
        if self.is_merged() {
            return Err(Error::argument("lora", format!("the updates of the {} are merged; unmerge them first", self.part)));
        }
        Ok(())
    }

    fn name(&self, layer: usize) -> &str {
        self.layers.get(layer).map_or("", |(name, _)| name)
    }

    fn is_adapted(&self, layer: usize) -> bool {
        self.layers.get(layer).is_some_and(|(_, host)| host.is_adapted())
    }

    /// The terms of a layer with the weights of their files.
    fn terms(&self, layer: usize) -> Vec<Term> {
        let term = |entry: &Entry| entry.terms.get(&layer).map(|term| Term { scale: term.scale * entry.weight, ..term.clone() });
        self.entries.iter().filter_map(term).collect()
    }

    fn install(&self) {
        for i in 0..self.layers.len() {
            let terms = self.terms(i);
            if !terms.is_empty() {
                self.set_terms(i, terms);
            }
        }
    }

    /// Gives a layer an adapter of these terms, or none.
    fn set_terms(&self, layer: usize, terms: Vec<Term>) {
        let terms = (!terms.is_empty()).then(|| Arc::new(Terms(terms)));
        match self.layers.get(layer) {
            Some((_, Host::Linear(layer))) => drop(layer.set_adapter(terms.map(|t| t as Arc<dyn Adapter<Linear>>))),
            Some((_, Host::Conv(layer))) => drop(layer.set_adapter(terms.map(|t| t as Arc<dyn Adapter<Conv2d>>))),
            _ => {}
        }
    }

    /// A layer's weight and its sum with the terms.
    fn sum(&self, layer: usize, terms: &[Term]) -> Result<(Param, Tensor)> {
        let quantised = || Error::argument("merge", format!("the weight of `{}` is quantised: the update would be lost", self.name(layer)));
        let (param, is_conv) = match self.layers.get(layer) {
            Some((_, Host::Linear(layer))) => (layer.weight().ok_or_else(quantised)?, false),
            Some((_, Host::Conv(layer))) => (layer.weight().clone(), true),
            _ => return Err(Error::argument("merge", "no such layer")),
        };
        let mut sum = param.get().detach();
        for Term { down, up, scale } in terms {
            let change = if is_conv { product(down, up)? } else { up.matmul(down)? };
            sum = sum.add(&change.mul_scalar(*scale)?.to_dtype(sum.dtype())?)?;
        }
        Ok((param, sum))
    }

    /// The layer of each update of this part.
    fn resolve(&self, name: &str, file: &LoraWeights) -> Result<BTreeMap<usize, Term>> {
        let (dotted, flat) = self.indices();
        let find = |module: &ModuleName| match module {
            ModuleName::Dotted(name) => dotted.get(name).or_else(|| dotted.get(&format!("text_model.{name}"))),
            ModuleName::Flat(name) => flat.get(name),
        };
        let (mut terms, mut unknown) = (BTreeMap::new(), Vec::new());
        for update in file.updates.iter().filter(|update| update.part == self.part) {
            let Some((i, (_, host))) = find(&update.module).and_then(|&i| Some((i, self.layers.get(i)?))) else {
                unknown.push(&update.module);
                continue;
            };
            if terms.insert(i, fitted(update, host)?).is_some() {
                return Err(Error::format("lora", format!("{name}: two updates are for `{}` of the {}", self.name(i), self.part)));
            }
        }
        match unknown.first() {
            None => Ok(terms),
            Some(first) => Err(self.unmatched(name, first, unknown.len(), &flat)),
        }
    }

    /// The numbers of the layers by their names, and by their names as kohya writes them: of the U-Net also those of SDXL's own code.
    fn indices(&self) -> (BTreeMap<String, usize>, BTreeMap<String, usize>) {
        let (mut dotted, mut flat) = (BTreeMap::new(), BTreeMap::new());
        let depth = layers_per_block(self.layers.iter().map(|(name, _)| name.as_str()));
        for (i, (name, _)) in self.layers.iter().enumerate() {
            dotted.insert(name.clone(), i);
            flat.insert(name.replace('.', "_"), i);
            if self.part == LoraPart::Unet {
                flat.extend(ldm_modules(name, depth).into_iter().map(|old| (old.replace('.', "_"), i)));
            }
        }
        (dotted, flat)
    }

    fn unmatched(&self, name: &str, module: &ModuleName, count: usize, flat: &BTreeMap<String, usize>) -> Error {
        let close = match module {
            ModuleName::Dotted(name) => nearest(name, self.layers.iter().map(|(name, _)| name.as_str()), 3),
            ModuleName::Flat(name) => nearest(name, flat.keys().map(String::as_str), 3),
        };
        let message = format!(
            "{name}: {count} updates fit no module of the {}, the first is for `{}`; the closest modules are {}",
            self.part,
            module.text(),
            close.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
        );
        Error::argument("lora", message)
    }
}

fn missing(name: &str, part: LoraPart) -> Error {
    Error::argument("lora", format!("there is no LoRA `{name}` in the {part}"))
}

fn finite(weight: f64) -> Result<f64> {
    if weight.is_finite() { Ok(weight) } else { Err(Error::argument("lora", format!("{weight} is no weight of a LoRA"))) }
}

/// The matrices of an update in the form, the dtype and on the device that the layer takes.
fn fitted(update: &Update, host: &Host) -> Result<Term> {
    let weight = host.weight_values()?;
    let rank = update.down.dim(0)?;
    let (down, up) = match host {
        Host::Conv(layer) => {
            let [outputs, inputs, kh, kw] = extents(layer)?;
            ([rank, inputs, kh, kw].to_vec(), [outputs, rank, 1, 1].to_vec())
        }
        _ => {
            let [outputs, inputs] = weight.dims_n("lora")?;
            ([rank, inputs].to_vec(), [outputs, rank].to_vec())
        }
    };
    // A linear layer can be written as a convolution of 1×1, and the other way round.
    let squeezed = |dims: &[usize]| match dims {
        [a, b, 1, 1] => vec![*a, *b],
        other => other.to_vec(),
    };
    let fit = |tensor: &Tensor, dims: &[usize]| {
        if squeezed(tensor.dims()) != squeezed(dims) {
            let message = format!("the update of `{}` has a matrix {}, the layer takes {dims:?}", host.name(), tensor.shape());
            return Err(Error::shape("lora", message));
        }
        tensor.reshape(dims)?.to_dtype(weight.dtype())?.to_device(weight.device())?.contiguous()
    };
    Ok(Term { down: fit(&update.down, &down)?, up: fit(&update.up, &up)?, scale: update.scale })
}
