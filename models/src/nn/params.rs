//! The scope that layers take their parameters from, and everything that concerns all of them: names, modes, freezing, groups, saving.

use super::linear::Weight;
use super::load::{LoadMode, LoadReport, StateDict};
use super::quantize::{QuantizedWeight, restore};
use super::{Buffer, Conv2d, Embedding, Init, Linear, Param};
use kiln_tensor::{DType, Device, Error, Generator, IntoShape, QuantizedMatrix, Result, Shape, Tensor, TensorOptions, default_device};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a [`Params`] gives its tensors.
#[derive(Clone, Debug)]
pub struct ParamsOptions {
    /// Dtype of parameters and floating-point buffers.
    pub dtype: DType,
    /// Device of parameters and buffers.
    pub device: Device,
    /// Where initialisers and dropout draw from.
    pub generator: Generator,
}

impl Default for ParamsOptions {
    /// f32 on the default device, drawing from the global generator.
    fn default() -> Self {
        Self { dtype: DType::F32, device: default_device(), generator: Generator::global().clone() }
    }
}

/// Whether layers behave as in training (dropout drops, batch norm uses the batch's statistics). Clones share one switch.
#[derive(Clone, Debug)]
pub struct Mode(Arc<AtomicBool>);

impl Mode {
    /// Whether training mode is on.
    pub fn is_training(&self) -> bool {
        self.0.load(Relaxed)
    }
}

#[derive(Clone)]
enum Entry {
    Param(Param),
    Buffer(Buffer),
    Quantized(QuantizedWeight),
}

impl Entry {
    fn name(&self) -> &str {
        match self {
            Entry::Param(p) => p.name(),
            Entry::Buffer(b) => b.name(),
            Entry::Quantized(w) => &w.name,
        }
    }

    fn get(&self) -> Result<Tensor> {
        match self {
            Entry::Param(p) => Ok(p.get().detach()),
            Entry::Buffer(b) => Ok(b.get()),
            Entry::Quantized(w) => w.saved(),
        }
    }

    /// What [`set`](Entry::set) takes, made of a tensor that has the dtype and shape of [`get`](Entry::get)'s. All that can be wrong is
    /// found here.
    fn content(&self, tensor: Tensor) -> Result<Content> {
        match self {
            Entry::Param(_) | Entry::Buffer(_) => Ok(Content::Tensor(tensor)),
            Entry::Quantized(w) => w.restored(&tensor).map(Content::Quantized),
        }
    }

    fn set(&self, content: &Content) -> Result<()> {
        match (self, content) {
            (Entry::Param(p), Content::Tensor(tensor)) => p.set(tensor),
            (Entry::Buffer(b), Content::Tensor(tensor)) => b.set(tensor),
            (Entry::Quantized(w), Content::Quantized(matrix)) => {
                w.layer.set_weight(Weight::Quantized(matrix.clone()));
                Ok(())
            }
            _ => Err(Error::argument("load_state_dict", format!("`{}` changed its form meanwhile", self.name()))),
        }
    }
}

/// A new content of an entry.
enum Content {
    Tensor(Tensor),
    Quantized(QuantizedMatrix),
}

/// A state dictionary that is being built from.
struct Loading {
    state: StateDict,
    mode: LoadMode,
    report: LoadReport,
}

/// Tensors that do not fit a strict loading before it gives up: a file may claim any number of layers.
const MAX_LISTED: usize = 4096;

#[derive(Default)]
struct Registry {
    entries: Vec<Entry>,
    names: HashSet<String>,
    linears: Vec<Linear>,
    embeddings: Vec<Embedding>,
    convs: Vec<Conv2d>,
    loading: Option<Loading>,
}

struct Root {
    options: ParamsOptions,
    mode: Mode,
    registry: Mutex<Registry>,
}

/// A scope that hands out named parameters and buffers. Clones and child scopes share one list; methods that
/// concern a list of parameters ([`params`](Params::params), [`state_dict`](Params::state_dict), [`freeze`](Params::freeze), …)
/// see those below this scope, with their full names.
///
/// ```
/// # use kiln_models::nn::{Init, LoadMode, Params};
/// # use kiln_tensor::Result;
/// # fn main() -> Result<()> {
/// let params = Params::seeded(0);
/// let block = params.scope("blocks").index(0);
/// block.param("weight", [4, 3], Init::Ones)?;
/// block.param("bias", [4], Init::Zeros)?;
/// let names: Vec<_> = params.params().iter().map(|p| p.name().to_owned()).collect();
/// assert_eq!(names, ["blocks.0.weight", "blocks.0.bias"]);
/// assert_eq!(params.num_parameters(), 16);
///
/// // The same constructor loads: every name must be found, or the error lists all that is wrong.
/// let state = params.state_dict();
/// let loaded = Params::new();
/// let (bias, report) = loaded.build_from(state, LoadMode::Partial, |p| p.scope("blocks").index(0).param("bias", [4], Init::Zeros))?;
/// assert_eq!(report.unexpected, ["blocks.0.weight"]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Params {
    root: Arc<Root>,
    /// The scope's name with a dot at its end, or nothing for the root.
    prefix: String,
}

impl Default for Params {
    fn default() -> Self {
        Self::new()
    }
}

impl Params {
    /// An empty root: f32 on the CPU, drawing from the global generator.
    pub fn new() -> Self {
        Self::with(ParamsOptions::default())
    }

    /// An empty root: f32 on the CPU, drawing from a generator of its own with this seed.
    pub fn seeded(seed: u64) -> Self {
        Self::with(ParamsOptions { generator: Generator::new(seed), ..ParamsOptions::default() })
    }

    /// An empty root with these options.
    pub fn with(options: ParamsOptions) -> Self {
        let mode = Mode(Arc::new(AtomicBool::new(true)));
        Self { root: Arc::new(Root { options, mode, registry: Mutex::default() }), prefix: String::new() }
    }

    /// The child scope `name`: what it hands out is called `name.…`.
    pub fn scope(&self, name: impl fmt::Display) -> Params {
        Params { root: self.root.clone(), prefix: format!("{}{name}.", self.prefix) }
    }

    /// The child scope of item `i` of a list.
    pub fn index(&self, i: usize) -> Params {
        self.scope(i)
    }

    /// The scope's full name; nothing for the root.
    pub fn name(&self) -> &str {
        self.prefix.strip_suffix('.').unwrap_or(&self.prefix)
    }

    /// The dtype and device of what this scope hands out.
    pub fn options(&self) -> TensorOptions {
        TensorOptions { dtype: self.root.options.dtype, device: self.root.options.device }
    }

    /// The generator of initialisers and dropout.
    pub fn generator(&self) -> &Generator {
        &self.root.options.generator
    }

    /// The switch between training and evaluation, for a layer to keep.
    pub fn mode(&self) -> Mode {
        self.root.mode.clone()
    }

    /// Training mode for all layers of this root (the state at the start).
    pub fn train(&self) {
        self.root.mode.0.store(true, Relaxed);
    }

    /// Evaluation mode for all layers of this root.
    pub fn eval(&self) {
        self.root.mode.0.store(false, Relaxed);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.root.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new parameter of this scope: its content comes from the state dictionary while one is built from, else from `init`.
    /// An error if the name is taken.
    pub fn param(&self, name: &str, shape: impl IntoShape, init: Init) -> Result<Param> {
        let (options, shape) = (self.options(), shape.into_shape()?);
        self.param_with(name, (options.dtype, shape), || init.make(&shape, options, self.generator()))
    }

    /// A new parameter that starts with the data (and dtype) of `tensor`, unless a state dictionary has another.
    pub fn param_from(&self, name: &str, tensor: &Tensor) -> Result<Param> {
        self.param_with(name, (tensor.dtype(), *tensor.shape()), || Ok(tensor.clone()))
    }

    /// A new buffer of this scope, of the scope's dtype. An error if the name is taken.
    pub fn buffer(&self, name: &str, shape: impl IntoShape, init: Init) -> Result<Buffer> {
        let (options, shape) = (self.options(), shape.into_shape()?);
        self.buffer_with(name, (options.dtype, shape), || init.make(&shape, options, self.generator()))
    }

    /// A new buffer that starts with the data (and dtype) of `tensor`, unless a state dictionary has another.
    pub fn buffer_from(&self, name: &str, tensor: &Tensor) -> Result<Buffer> {
        self.buffer_with(name, (tensor.dtype(), *tensor.shape()), || Ok(tensor.clone()))
    }

    fn param_with(&self, name: &str, kind: (DType, Shape), first: impl FnOnce() -> Result<Tensor>) -> Result<Param> {
        let name = format!("{}{name}", self.prefix);
        let param = Param::of_content(name.as_str(), self.first_content(&name, kind, first)?)?;
        self.register(name, Entry::Param(param.clone()))?;
        Ok(param)
    }

    fn buffer_with(&self, name: &str, kind: (DType, Shape), first: impl FnOnce() -> Result<Tensor>) -> Result<Buffer> {
        let name = format!("{}{name}", self.prefix);
        let buffer = Buffer::of_content(name.as_str(), self.first_content(&name, kind, first)?);
        self.register(name, Entry::Buffer(buffer.clone()))?;
        Ok(buffer)
    }

    fn first_content(&self, name: &str, kind: (DType, Shape), first: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if let Some(loading) = &mut self.registry().loading {
            let found = loading.state.remove(name);
            if let Some(tensor) = loading.report.fit(name, kind, found.as_ref())? {
                return tensor.detach().contiguous()?.to_device(self.options().device);
            }
            if loading.mode == LoadMode::Strict {
                // The building will end in an error; until then the shape is all that matters, and takes no memory.
                let report = &loading.report;
                if report.missing.len() + report.mismatched.len() > MAX_LISTED {
                    return Err(std::mem::take(&mut loading.report).refusal());
                }
                return Tensor::zeros((), kind.0)?.expand(kind.1);
            }
        }
        first()?.detach().contiguous()?.to_device(self.options().device)
    }

    fn register(&self, name: String, entry: Entry) -> Result<()> {
        let mut registry = self.registry();
        if !registry.names.insert(name.clone()) {
            return Err(taken(&name));
        }
        registry.entries.push(entry);
        Ok(())
    }

    pub(super) fn register_linear(&self, layer: &Linear) {
        self.registry().linears.push(layer.clone());
    }

    pub(super) fn register_embedding(&self, layer: &Embedding) {
        self.registry().embeddings.push(layer.clone());
    }

    pub(super) fn register_conv(&self, layer: &Conv2d) {
        self.registry().convs.push(layer.clone());
    }

    /// Whether a layer of that name is this scope or below it.
    fn holds(&self, name: &str) -> bool {
        name == self.name() || name.starts_with(&self.prefix)
    }

    /// Builds a model whose parameters and buffers come from `state` (full names, as [`state_dict`](Params::state_dict) of the
    /// root gives them) instead of their initialisers. Floats are converted to the scope's dtype.
    ///
    /// In strict mode, names that are missing, unexpected or of another shape are one error that lists them all.
    pub fn build_from<M>(&self, state: StateDict, mode: LoadMode, build: impl FnOnce(&Params) -> Result<M>) -> Result<(M, LoadReport)> {
        self.registry().loading = Some(Loading { state, mode, report: LoadReport::default() });
        let model = build(self);
        let loading = self.registry().loading.take();
        let model = model?;
        let Some(Loading { state, mut report, .. }) = loading else {
            return Err(Error::argument("build_from", "a model was built from a state dictionary while building from another"));
        };
        report.unexpected = state.into_keys().collect();
        Ok((model, report.accept(mode)?))
    }

    fn entries(&self) -> Vec<Entry> {
        let registry = self.registry();
        let quantized = registry.linears.iter().filter_map(|layer| QuantizedWeight::of(layer).map(Entry::Quantized));
        registry.entries.iter().cloned().chain(quantized).filter(|e| e.name().starts_with(&self.prefix)).collect()
    }

    /// Takes the weight of `layer` off the list of parameters; its name stays taken.
    pub(super) fn withdraw(&self, param: &Param) {
        self.registry().entries.retain(|entry| !matches!(entry, Entry::Param(p) if p.is_same(param)));
    }

    /// Puts a parameter on the list whose name is taken already.
    pub(super) fn reinstate(&self, param: Param) {
        self.registry().entries.push(Entry::Param(param));
    }

    /// The quantised matrix that the state dictionary that is being built from has for a parameter of this scope, if it has one of these
    /// extents.
    pub(super) fn loaded_quantized(&self, name: &str, shape: [usize; 2]) -> Result<Option<QuantizedMatrix>> {
        let name = format!("{}{name}", self.prefix);
        let mut registry = self.registry();
        let Some(loading) = &mut registry.loading else { return Ok(None) };
        let Some(saved) = loading.state.get(&name).filter(|saved| saved.dtype() == DType::U8) else { return Ok(None) };
        let matrix = restore(&name, saved)?;
        if matrix.shape().dims() != shape {
            return Ok(None);
        }
        loading.state.remove(&name);
        loading.report.loaded += 1;
        if !registry.names.insert(name.clone()) {
            return Err(taken(&name));
        }
        Ok(Some(matrix))
    }

    /// The parameters in the order in which they were made.
    pub fn params(&self) -> Vec<Param> {
        let params = |entry| if let Entry::Param(p) = entry { Some(p) } else { None };
        self.entries().into_iter().filter_map(params).collect()
    }

    /// The parameters that are not frozen, and those of the adapters in its layers: what an optimiser takes.
    pub fn trainable(&self) -> Vec<Param> {
        self.params().into_iter().chain(self.adapter_params()).filter(|param| !param.is_frozen()).collect()
    }

    /// The parameters of the adapters in the [`Linear`], [`Embedding`] and [`Conv2d`] layers. They have names of their own and are in no other list.
    pub fn adapter_params(&self) -> Vec<Param> {
        let linears = self.linears().into_iter().filter_map(|layer| Some(layer.adapter()?.params()));
        let embeddings = self.embeddings().into_iter().filter_map(|layer| Some(layer.adapter()?.params()));
        let convs = self.convs().into_iter().filter_map(|layer| Some(layer.adapter()?.params()));
        linears.chain(embeddings).chain(convs).flatten().collect()
    }

    /// The buffers in the order in which they were made.
    pub fn buffers(&self) -> Vec<Buffer> {
        let buffers = |entry| if let Entry::Buffer(b) = entry { Some(b) } else { None };
        self.entries().into_iter().filter_map(buffers).collect()
    }

    /// The parameter of that full name.
    pub fn named(&self, name: &str) -> Option<Param> {
        self.params().into_iter().find(|p| p.name() == name)
    }

    /// The [`Linear`] layers of this scope and below it, in the order in which they were made.
    pub fn linears(&self) -> Vec<Linear> {
        self.registry().linears.iter().filter(|layer| self.holds(layer.name())).cloned().collect()
    }

    /// The [`Embedding`] layers of this scope and below it, in the order in which they were made.
    pub fn embeddings(&self) -> Vec<Embedding> {
        self.registry().embeddings.iter().filter(|layer| self.holds(layer.name())).cloned().collect()
    }

    /// The [`Conv2d`] layers of this scope and below it, in the order in which they were made.
    pub fn convs(&self) -> Vec<Conv2d> {
        self.registry().convs.iter().filter(|layer| self.holds(layer.name())).cloned().collect()
    }

    /// The [`Linear`] layer of that full name.
    pub fn linear_named(&self, name: &str) -> Option<Linear> {
        self.linears().into_iter().find(|layer| layer.name() == name)
    }

    /// The [`Linear`] layers that `pattern` matches, as [`freeze`](Params::freeze) reads it. An error if there is none.
    pub fn linears_matching(&self, pattern: &str) -> Result<Vec<Linear>> {
        let layers = self.linears();
        let found: Vec<Linear> = layers.iter().filter(|layer| matches(pattern, layer.name())).cloned().collect();
        if found.is_empty() {
            let some: Vec<&str> = layers.iter().take(8).map(Linear::name).collect();
            return Err(Error::argument("linears", format!("no layer matches `{pattern}`; there are {}, …", some.join(", "))));
        }
        Ok(found)
    }

    /// Number of elements of all parameters.
    pub fn num_parameters(&self) -> usize {
        self.params().iter().map(Param::numel).sum()
    }

    /// Forgets the gradients of all parameters.
    pub fn zero_grad(&self) {
        self.params().iter().for_each(Param::zero_grad);
    }

    /// Converts all parameters and floating-point buffers to another float dtype, e.g. to bf16 for inference. Quantised weights stay.
    pub fn to_dtype(&self, dtype: DType) -> Result<()> {
        for entry in self.entries() {
            match entry {
                Entry::Param(p) => p.to_dtype(dtype)?,
                Entry::Buffer(b) if b.dtype().is_float() => b.to_dtype(dtype)?,
                Entry::Buffer(_) | Entry::Quantized(_) => {}
            }
        }
        Ok(())
    }

    /// The contents of all parameters and buffers by full name. They share the memory of the cells until the next update.
    ///
    /// A quantised weight is a copy in the form of [`QuantizedMatrix::to_tensor`]: it loads into a layer that is quantised likewise, and
    /// a model that is [built from](Params::build_from) it is made quantised. Without memory for the copy, it is missing.
    pub fn state_dict(&self) -> StateDict {
        self.entries().iter().filter_map(|e| Some((e.name().to_owned(), e.get().ok()?))).collect()
    }

    /// Replaces the contents of parameters and buffers by those of `state`, by full name; floats are converted to the dtype of the cell.
    /// In strict mode anything that does not fit is an error, and nothing is changed.
    pub fn load_state_dict(&self, state: &StateDict, mode: LoadMode) -> Result<LoadReport> {
        load_entries(self.entries(), state, mode)
    }

    /// The contents of the [`adapter_params`](Params::adapter_params), by name.
    pub fn adapter_state_dict(&self) -> StateDict {
        self.adapter_params().iter().map(|param| (param.name().to_owned(), param.get().detach())).collect()
    }

    /// Replaces the contents of the [`adapter_params`](Params::adapter_params), as [`load_state_dict`](Params::load_state_dict) does those of
    /// the model.
    pub fn load_adapter_state_dict(&self, state: &StateDict, mode: LoadMode) -> Result<LoadReport> {
        load_entries(self.adapter_params().into_iter().map(Entry::Param).collect(), state, mode)
    }

    fn matching(&self, op: &str, pattern: &str) -> Result<Vec<Param>> {
        let found: Vec<Param> = self.params().into_iter().filter(|p| matches(pattern, p.name())).collect();
        if found.is_empty() {
            let some: Vec<String> = self.params().iter().take(8).map(|p| p.name().to_owned()).collect();
            return Err(Error::argument(op, format!("no parameter matches `{pattern}`; there are {}, …", some.join(", "))));
        }
        Ok(found)
    }

    /// Freezes the parameters that `pattern` matches and returns how many these are: a name, the name of a scope (then all below it), or a
    /// pattern in which `*` stands for any text, e.g. `encoder`, `*.bias`, `blocks.*.norm`. An error if nothing matches.
    pub fn freeze(&self, pattern: &str) -> Result<usize> {
        let found = self.matching("freeze", pattern)?;
        found.iter().for_each(Param::freeze);
        Ok(found.len())
    }

    /// Undoes [`freeze`](Params::freeze).
    pub fn unfreeze(&self, pattern: &str) -> Result<usize> {
        let found = self.matching("unfreeze", pattern)?;
        found.iter().for_each(Param::unfreeze);
        Ok(found.len())
    }

    /// Runs `f` in evaluation mode. The mode is as before after it, after a panic too.
    ///
    /// ```
    /// # use kiln_models::nn::Params;
    /// let params = Params::new();
    /// assert!(!params.evaluating(|| params.mode().is_training()));
    /// assert!(params.mode().is_training());
    /// ```
    pub fn evaluating<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Restore<'a>(&'a Params);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                self.0.train();
            }
        }
        let _restore = self.mode().is_training().then(|| {
            self.eval();
            Restore(self)
        });
        f()
    }

    /// Runs `f` while none of the parameters is trained, as a discriminator only judges in the generator's step: without gradients of its
    /// weights, the backward pass leaves their products out. Those that were frozen before stay so; the others are not, after a panic too.
    pub fn while_frozen<R>(&self, f: impl FnOnce() -> R) -> R {
        struct Thaw(Vec<Param>);
        impl Drop for Thaw {
            fn drop(&mut self) {
                self.0.iter().for_each(Param::unfreeze);
            }
        }
        let thaw = Thaw(self.trainable());
        thaw.0.iter().for_each(Param::freeze);
        f()
    }

    /// The parameters by the group that `key` puts them in, e.g. `|p| p.shape().rank() >= 2` to decay matrices only.
    pub fn groups<K: Ord>(&self, key: impl Fn(&Param) -> K) -> BTreeMap<K, Vec<Param>> {
        let mut groups = BTreeMap::new();
        for param in self.params() {
            groups.entry(key(&param)).or_insert_with(Vec::new).push(param);
        }
        groups
    }
}

impl fmt::Debug for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.params()).entries(self.buffers()).finish()
    }
}

fn load_entries(entries: Vec<Entry>, state: &StateDict, mode: LoadMode) -> Result<LoadReport> {
    let mut report = LoadReport::default();
    let mut contents = Vec::new();
    for entry in &entries {
        let now = entry.get()?;
        let fitting = report.fit(entry.name(), (now.dtype(), *now.shape()), state.get(entry.name()))?;
        contents.push(fitting.map(|tensor| entry.content(tensor.to_device(now.device())?)).transpose()?);
    }
    let known: HashSet<&str> = entries.iter().map(Entry::name).collect();
    report.unexpected = state.keys().filter(|name| !known.contains(name.as_str())).cloned().collect();
    let report = report.accept(mode)?;
    for (entry, content) in entries.iter().zip(contents) {
        if let Some(content) = content {
            entry.set(&content)?;
        }
    }
    Ok(report)
}

fn taken(name: &str) -> Error {
    Error::argument("params", format!("the name `{name}` is taken; give each layer a scope of its own"))
}

/// Whether `pattern` (`*` for any text) matches `name` or a scope that it is in.
fn matches(pattern: &str, name: &str) -> bool {
    let ends = name.match_indices('.').map(|(i, _)| i).chain([name.len()]);
    ends.into_iter().any(|end| matches_whole(pattern, &name[..end]))
}

/// Whether `pattern` (`*` for any text) matches all of `text`. A star stands for nothing at first; where the text goes on otherwise than the
/// pattern, the last star stands for a byte more: an earlier one never needs to.
pub(crate) fn matches_whole(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t, mut last_star) = (0, 0, None);
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            last_star = Some((p, t));
        } else if pattern.get(p) == Some(&text[t]) {
            (p, t) = (p + 1, t + 1);
        } else if let Some((after, taken)) = last_star {
            (p, t) = (after, taken + 1);
            last_star = Some((p, t));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A weight, a bias and a count.
    fn build(params: &Params) -> Result<(Param, Param, Buffer)> {
        let layer = params.scope("net").index(0);
        let count = layer.buffer_from("num_batches_tracked", &Tensor::zeros((), DType::I64)?)?;
        Ok((layer.param("weight", [2, 3], Init::Constant(0.5))?, layer.param("bias", [2], Init::Zeros)?, count))
    }

    #[test]
    fn names_are_dotted_ordered_and_unique() {
        let params = Params::new();
        build(&params).unwrap();
        let error = build(&params).unwrap_err().to_string();
        assert!(error.contains("`net.0.num_batches_tracked` is taken"), "{error}");
        assert_eq!(params.params().iter().map(|p| p.name().to_owned()).collect::<Vec<_>>(), ["net.0.weight", "net.0.bias"]);
        assert_eq!(params.num_parameters(), 8);
        assert_eq!(params.named("net.0.bias").unwrap().shape(), [2]);
        let other = params.scope("other");
        other.param("w", [1], Init::Ones).unwrap();
        assert_eq!(other.state_dict().into_keys().collect::<Vec<_>>(), ["other.w"]);
    }

    #[test]
    fn a_round_trip_restores_every_bit_and_keeps_the_cells() {
        let (a, b) = (Params::new(), Params::new());
        build(&a).unwrap();
        let (weight, ..) = build(&b).unwrap();
        weight.set(&Tensor::zeros([2, 3], ()).unwrap()).unwrap();
        let report = b.load_state_dict(&a.state_dict(), LoadMode::Strict).unwrap();
        assert!(report.is_complete() && report.loaded == 3);
        assert_eq!(weight.get().to_vec::<f32>().unwrap(), [0.5; 6]);
        // The state that was loaded from is not touched by later updates.
        weight.update(|t, _| t.as_slice_mut::<f32>().map(|data| data.fill(9.0))).unwrap();
        assert_eq!(a.named("net.0.weight").unwrap().get().to_vec::<f32>().unwrap(), [0.5; 6]);
    }

    fn misfit() -> StateDict {
        let zeros = |shape: &[usize], dtype: DType| Tensor::zeros(shape, dtype).unwrap();
        StateDict::from([
            ("net.0.weight".into(), zeros(&[3, 2], DType::F32)),
            ("net.0.num_batches_tracked".into(), zeros(&[], DType::F32)),
            ("net.1.weight".into(), zeros(&[1], DType::F32)),
        ])
    }

    #[test]
    fn strict_loading_lists_everything_at_once_and_changes_nothing() {
        let params = Params::new();
        let (weight, ..) = build(&params).unwrap();
        let fresh = |params: &Params| params.build_from(misfit(), LoadMode::Strict, build).map(|_| ());
        let loaded = params.load_state_dict(&misfit(), LoadMode::Strict).map(|_| ());
        for error in [loaded.unwrap_err().to_string(), fresh(&Params::new()).unwrap_err().to_string()] {
            for part in ["1 missing: net.0.bias", "1 unexpected: net.1.weight", "net.0.weight (expected f32 [2, 3], found f32 [3, 2])"] {
                assert!(error.contains(part), "{error}");
            }
            assert!(error.contains("net.0.num_batches_tracked (expected i64 [], found f32 [])"), "{error}");
        }
        assert_eq!(weight.get().to_vec::<f32>().unwrap(), [0.5; 6]);
    }

    #[test]
    fn partial_loading_takes_what_fits_and_reports_the_rest() {
        let mut state = misfit();
        state.insert("net.0.bias".into(), Tensor::ones([2], DType::F64).unwrap());
        let ((weight, bias, _), report) = Params::new().build_from(state, LoadMode::Partial, build).unwrap();
        assert_eq!(weight.get().to_vec::<f32>().unwrap(), [0.5; 6]);
        assert_eq!(bias.get().to_vec::<f32>().unwrap(), [1.0; 2]);
        assert_eq!((report.loaded, report.mismatched.len(), report.unexpected.len()), (1, 2, 1));
    }

    #[test]
    fn a_failed_build_leaves_no_state_behind() {
        let params = Params::new();
        let failed = params.build_from(misfit(), LoadMode::Strict, |_| Err::<(), _>(Error::argument("test", "no")));
        assert!(failed.is_err());
        assert_eq!(build(&params).unwrap().0.get().to_vec::<f32>().unwrap(), [0.5; 6]);
    }

    #[test]
    fn patterns_freeze_names_scopes_and_globs() {
        for (pattern, name, expected) in [
            ("net", "net.0.bias", true),
            ("ne", "net.0.bias", false),
            ("net.0.bias", "net.0.bias", true),
            ("*.bias", "net.0.bias", true),
            ("net.*.bias", "net.0.1.bias", true),
            ("*", "w", true),
            ("bias", "net.0.bias", false),
            ("net.*", "net", false),
            ("*é", "é.w", true),
            ("a*b*c", "a.bb.bc", true),
            ("a*b*c", "a.c.b", false),
            ("*ab*ab", "ab.a.ab", true),
            ("", "w", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
        // As many stars as an adapter's file likes.
        let (stars, name) = ("*".repeat(64), "layers.".repeat(16));
        assert!(matches_whole(&stars, &name) && !matches_whole(&format!("{stars}!"), &name) && !matches_whole(&"*a".repeat(64), &name));
        let params = Params::new();
        let (weight, bias, _) = build(&params).unwrap();
        assert_eq!(params.freeze("*.bias").unwrap(), 1);
        assert!(bias.is_frozen() && !weight.is_frozen());
        assert_eq!(params.unfreeze("net").unwrap(), 2);
        assert!(params.freeze("nett").unwrap_err().to_string().contains("net.0.weight"));
        let groups = params.groups(|p| p.shape().rank() >= 2);
        assert_eq!((groups[&true].len(), groups[&false].len()), (1, 1));
    }

    #[test]
    fn dtypes_convert_and_modes_are_shared() {
        let params = Params::new();
        let (weight, _, count) = build(&params).unwrap();
        params.to_dtype(DType::BF16).unwrap();
        assert_eq!((weight.dtype(), count.dtype()), (DType::BF16, DType::I64));
        assert!(weight.get().is_leaf());
        let mode = params.scope("x").mode();
        assert!(mode.is_training());
        params.eval();
        assert!(!mode.is_training());
        params.train();
        assert!(mode.is_training());
    }
}
