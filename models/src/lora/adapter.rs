//! An adapter in a model: put in, switched off and on, merged into the weights and taken out again.

use super::config::LoraConfig;
use super::host::Adapted;
use super::layer::Shared;
use super::select::{Companion, Target};
use crate::nn::{LoadMode, Param, Params, ParamsOptions, StateDict};
use kiln_tensor::{DType, Error, Generator, Result, Tensor};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A low-rank adapter in a model: y = W·x + b + s·B·A·dropout(x) in each adapted [`Linear`](crate::nn::Linear), where only A
/// (r, inputs), B (outputs, r) and, with DoRA, a magnitude (outputs) are trained. The table of an adapted
/// [`Embedding`](crate::nn::Embedding) is W + s·(B·A)ᵀ; an output head that is tied to it keeps W, until they are merged. In a
/// [`Conv2d`](crate::nn::Conv2d), A is a convolution as its own to r channels, and B one of 1×1 from them.
///
/// The base model is frozen, whether its weights are dense or quantised; a gradient passes through it. The matrices are in f32 (in f64 for
/// models in f64), in a scope of their own under the names of the file: the model's own state dictionary stays what it was.
/// Dropping this handle leaves the adapter in the model.
///
/// Sources: Hu et al., *LoRA*, 2021; Kalajdzievski, *A Rank Stabilization Scaling Factor*, 2023; Liu et al., *DoRA*, 2024; Dettmers et
/// al., *QLoRA*, 2023.
///
/// ```
/// # use kiln_models::lora::{Lora, LoraConfig};
/// # use kiln_models::nn::{Linear, Module, Params};
/// # use kiln_tensor::{Generator, Result, Tensor};
/// # fn main() -> Result<()> {
/// let params = Params::seeded(0);
/// let layer = Linear::new(&params.scope("q_proj"), 16, 16, true)?;
/// let config = LoraConfig { r: 2, target_modules: ["q_proj"].into(), ..LoraConfig::default() };
/// let lora = Lora::attach(&params, &config, &Generator::new(1))?;
/// let names: Vec<_> = lora.trainable().iter().map(|p| p.name().to_owned()).collect();
/// assert_eq!(names, ["base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"]);
/// // An optimiser takes `lora.trainable()`. The reference model's outputs:
/// let off = lora.disable()?;
/// let reference = layer.forward(&Tensor::ones([1, 16], ())?)?;
/// # drop((off, reference));
/// # Ok(()) }
/// ```
pub struct Lora {
    config: LoraConfig,
    /// The adapter's own scope.
    params: Params,
    layers: Vec<Adapted>,
    companions: Vec<Companion>,
    /// The base model's contents of what is trained in place, in the order of `companions`.
    originals: Vec<Swap>,
    /// While merged: the weights of the base model.
    unmerged: Vec<Swap>,
    /// What was not frozen before.
    thawed: Vec<Param>,
    on: Arc<AtomicBool>,
    off: Mutex<Off>,
}

/// A parameter and another content of it.
struct Swap {
    param: Param,
    content: Tensor,
}

impl Swap {
    fn now(param: &Param) -> Self {
        Self { param: param.clone(), content: param.get().detach() }
    }

    fn put(&self) -> Result<()> {
        self.param.set(&self.content)
    }
}

/// How many guards hold the adapter off, and what they have replaced.
#[derive(Default)]
struct Off {
    guards: usize,
    trained: Vec<Swap>,
}

/// Where an adapter's tensors come from.
pub(super) enum Source<'a> {
    /// Initialisers, which draw from this generator.
    Fresh(&'a Generator),
    /// A file: the adapter's own tensors, and those of the companions in their order.
    File(StateDict, Vec<Tensor>),
}

impl Lora {
    /// Puts a new adapter into the layers of `config` below `params`, and freezes everything else there. Initial values and dropout
    /// draw from `generator`: give it `params.generator()`, and a trainer that saves the model's generator resumes exactly.
    ///
    /// # Errors
    /// If the configuration is wrong or matches no layer, or one of the layers has an adapter. The model then stays as it was.
    pub fn attach(params: &Params, config: &LoraConfig, generator: &Generator) -> Result<Self> {
        let targets = config.targets(params)?;
        let companions = config.companions(params, &targets)?;
        Self::build(params, config, targets, companions, Source::Fresh(generator))
    }

    pub(super) fn build(
        params: &Params,
        config: &LoraConfig,
        targets: Vec<Target>,
        companions: Vec<Companion>,
        source: Source<'_>,
    ) -> Result<Self> {
        if let Some(taken) = targets.iter().find(|target| target.layer.is_adapted()) {
            let message = format!("`{}` has an adapter already; detach it or merge it for good first", taken.name);
            return Err(Error::argument("lora", message));
        }
        let options = params.options();
        let dtype = if options.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let generator = if let Source::Fresh(generator) = source { generator } else { params.generator() }.clone();
        let own = Params::with(ParamsOptions { dtype, device: options.device, generator: generator.clone() });
        let on = Arc::new(AtomicBool::new(true));
        let shared = Shared { on: on.clone(), mode: params.mode(), generator, dropout: config.lora_dropout };
        let build = |own: &Params| targets.into_iter().map(|target| Adapted::new(own, target, config, &shared)).collect();
        let originals = companions.iter().map(|companion| Swap::now(&companion.param)).collect();
        let layers = match source {
            Source::Fresh(_) => build(&own)?,
            Source::File(state, contents) => {
                let layers = own.build_from(state, LoadMode::Strict, build)?.0;
                for (companion, content) in companions.iter().zip(&contents) {
                    companion.param.set(&content.to_dtype(companion.param.dtype())?)?;
                }
                layers
            }
        };
        let thawed: Vec<Param> = params.params().into_iter().filter(|param| !param.is_frozen()).collect();
        thawed.iter().for_each(Param::freeze);
        companions.iter().for_each(|companion| companion.param.unfreeze());
        let lora = Self {
            config: config.clone(),
            params: own,
            layers,
            companions,
            originals,
            unmerged: Vec::new(),
            thawed,
            on,
            off: Mutex::default(),
        };
        lora.layers.iter().for_each(Adapted::install);
        Ok(lora)
    }

    /// What the adapter was made from.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The scope of the adapter's matrices; [`trainable`](Lora::trainable) has these and what else is trained.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Everything that is trained: the matrices, and the biases and modules of the base model that the configuration names. The model's
    /// [`trainable`](Params::trainable) lists the same.
    pub fn trainable(&self) -> Vec<Param> {
        self.params.params().into_iter().chain(self.companions.iter().map(|companion| companion.param.clone())).collect()
    }

    /// Names of the adapted layers, as seen from the model's scope.
    pub fn layer_names(&self) -> Vec<&str> {
        self.layers.iter().map(|adapted| adapted.name.as_str()).collect()
    }

    /// The parameters of the base model that are trained along, with their names in the file.
    pub(super) fn companions(&self) -> &[Companion] {
        &self.companions
    }

    fn off(&self) -> MutexGuard<'_, Off> {
        self.off.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the model computes with the adapter: not while [`disable`](Lora::disable)d.
    pub fn is_enabled(&self) -> bool {
        self.off().guards == 0
    }

    /// Makes the model the base model, for every holder, until the last guard is dropped: biases and modules that are trained along
    /// have their old values, and merged weights too.
    ///
    /// ```text
    /// let reference = { let _off = lora.disable()?; model.forward(&tokens, Pass::default())? };
    /// ```
    ///
    /// # Errors
    /// If a parameter of the base model has been given another dtype since.
    pub fn disable(&self) -> Result<Disabled<'_>> {
        let mut off = self.off();
        if off.guards == 0 {
            let bases = || self.originals.iter().chain(&self.unmerged);
            off.trained = bases().map(|base| Swap::now(&base.param)).collect();
            for base in bases() {
                if let Err(error) = base.put() {
                    off.trained.drain(..).try_for_each(|trained| trained.put())?;
                    return Err(error);
                }
            }
            self.on.store(false, Relaxed);
        }
        off.guards += 1;
        Ok(Disabled { lora: self })
    }

    /// Whether the weights hold the update.
    pub fn is_merged(&self) -> bool {
        !self.unmerged.is_empty()
    }

    /// Adds the update to the weights: the layers then are as fast as without an adapter. The weights of the base model are kept, as much
    /// memory again, so that [`unmerge`](Lora::unmerge) restores every bit. Training goes on only after that.
    ///
    /// # Errors
    /// If the weight of a layer is quantised. Nothing is merged then.
    pub fn merge(&mut self) -> Result<()> {
        if self.is_merged() {
            return Ok(());
        }
        let mut kept = Vec::new();
        for adapted in &self.layers {
            let merged = adapted.merged().and_then(|(param, merged)| {
                kept.push(Swap::now(&param));
                param.set(&merged)
            });
            if let Err(error) = merged {
                kept.iter().try_for_each(Swap::put)?;
                return Err(error);
            }
        }
        self.unmerged = kept;
        self.on.store(false, Relaxed);
        Ok(())
    }

    /// Undoes [`merge`](Lora::merge): the weights are those from before, bit for bit.
    ///
    /// # Errors
    /// If a weight has been given another dtype since.
    pub fn unmerge(&mut self) -> Result<()> {
        self.unmerged.iter().try_for_each(Swap::put)?;
        self.unmerged.clear();
        self.on.store(true, Relaxed);
        Ok(())
    }

    /// Merges for good: the model keeps what was learnt as its own weights, without an adapter, and is no longer frozen.
    ///
    /// # Errors
    /// As [`merge`](Lora::merge).
    pub fn merge_and_unload(mut self) -> Result<()> {
        self.merge()?;
        self.leave();
        Ok(())
    }

    /// Takes the adapter out: the model is the base model again, and no longer frozen.
    ///
    /// # Errors
    /// If a parameter of the base model has been given another dtype since.
    pub fn detach(mut self) -> Result<()> {
        self.unmerge()?;
        self.originals.iter().try_for_each(Swap::put)?;
        self.leave();
        Ok(())
    }

    fn leave(&self) {
        self.layers.iter().for_each(Adapted::remove);
        self.companions.iter().for_each(|companion| companion.param.freeze());
        self.thawed.iter().for_each(Param::unfreeze);
    }
}

/// While it lives, the adapter is off: see [`Lora::disable`].
#[must_use = "the adapter is on again when the guard is dropped"]
pub struct Disabled<'a> {
    lora: &'a Lora,
}

impl Drop for Disabled<'_> {
    fn drop(&mut self) {
        let mut off = self.lora.off();
        off.guards -= 1;
        if off.guards == 0 {
            for trained in off.trained.drain(..) {
                // Only a change of the dtype meanwhile can make this fail; the converted base content then stays.
                let _ = trained.put();
            }
            self.lora.on.store(!self.lora.is_merged(), Relaxed);
        }
    }
}
