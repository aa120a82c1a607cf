//! An adapter as a folder: `adapter_config.json` and `adapter_model.safetensors`, as `peft` writes and reads them.

use super::adapter::{Lora, Source};
use super::config::{LoraConfig, Modules};
use super::select::{Companion, PREFIX, Target};
use crate::nn::{LoadReport, Mismatch, Params, StateDict};
use kiln_tensor::io::safetensors::{self, SafetensorsFile};
use kiln_tensor::io::write_atomic;
use kiln_tensor::{DType, Error, Result, Shape, Tensor};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

impl Lora {
    /// Saves the adapter in `folder`, which is made if it is missing: `PeftModel.from_pretrained(model, folder)` loads it, if the model's
    /// layers have Hugging Face's names.
    ///
    /// # Errors
    /// If the adapter is disabled, or a file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        if !self.is_enabled() {
            return Err(Error::argument(
                "lora",
                "the adapter is disabled: what is trained in place has its old values; save it after that",
            ));
        }
        std::fs::create_dir_all(folder).map_err(|e| Error::io("lora", folder.display(), e))?;
        let mut tensors = self.params().state_dict();
        tensors.extend(self.companions().iter().map(|companion| (companion.saved_as.clone(), companion.param.get().detach())));
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        safetensors::save(folder.join(TENSORS), &tensors, &metadata)?;
        let text = LoraConfig { target_modules: self.explicit_targets(), ..self.config().clone() }.to_json()?;
        let path = folder.join(CONFIG);
        write_atomic(&path, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("save", path.display(), e)))
    }

    /// The targets as `peft` understands them: it has no `*` in names, and another rule for heads.
    fn explicit_targets(&self) -> Modules {
        match &self.config().target_modules {
            Modules::Pattern(pattern) if !pattern.eq_ignore_ascii_case("all-linear") => Modules::Pattern(pattern.clone()),
            Modules::Names(names) if names.iter().all(|name| !name.contains('*')) => Modules::Names(names.clone()),
            _ => Modules::Names(self.layer_names().into_iter().map(str::to_owned).collect()),
        }
    }

    /// Puts the adapter that was saved in `folder` into the model whose scope is `params`, as [`attach`](Lora::attach) does with a new one.
    ///
    /// # Errors
    /// If a file is missing or malformed, or its tensors are not exactly those that the configuration and the model call for: the error lists
    /// what is missing, unexpected or of another shape. The model then stays as it was.
    pub fn load(params: &Params, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("lora", path.display(), e))?;
        let config = LoraConfig::from_json(&text)?;
        let targets = config.targets(params)?;
        let companions = config.companions(params, &targets)?;
        let path = folder.join(TENSORS);
        let file = SafetensorsFile::open(&path)?;
        // Before memory is allocated for a rank that the configuration merely claims.
        let report = fit(&file, &config, &targets, &companions)?;
        if !report.is_complete() {
            return Err(Error::argument("lora", format!("{} does not fit the model: {report}", path.display())));
        }
        expect_same_base(&file, &targets)?;
        let contents: Vec<Tensor> = companions.iter().map(|companion| file.tensor(&companion.saved_as)).collect::<Result<_>>()?;
        let own = |name: &String| !companions.iter().any(|companion| companion.saved_as == *name);
        let state: StateDict =
            own_names(&file).into_iter().filter(own).map(|name| file.tensor(&name).map(|tensor| (name, tensor))).collect::<Result<_>>()?;
        Self::build(params, &config, targets, companions, Source::File(state, contents))
    }
}

/// The end of a base weight's name.
const BASE: &str = ".base_layer.weight";

/// The names in `file` but those that `peft` repeats: with `bias: all`, the biases of modules to save as they are called in its memory,
/// and the base weights of adapted embeddings and heads.
fn own_names(file: &SafetensorsFile) -> Vec<String> {
    let repeated =
        |name: &String| [".original_module.", ".modules_to_save."].iter().any(|part| name.contains(part)) || name.ends_with(BASE);
    file.names().into_iter().filter(|name| !repeated(name)).collect()
}

/// An error unless the base weights in `file` are those of the model: `peft` saves them because they may have been resized.
fn expect_same_base(file: &SafetensorsFile, targets: &[Target]) -> Result<()> {
    for name in file.names().into_iter().filter(|name| name.ends_with(BASE)) {
        let target = targets.iter().find(|target| format!("{PREFIX}.{}{BASE}", target.name) == name);
        let weight = target.map(|target| target.layer.weight_values()).transpose()?;
        let (shape, _) = file.info(&name)?;
        let same = match weight.filter(|weight| *weight.shape() == shape) {
            Some(weight) => file.tensor(&name)?.to_dtype(weight.dtype())?.eq(&weight.detach())?.all(())?.item::<bool>()?,
            None => false,
        };
        if !same {
            return Err(Error::argument("lora", format!("{name}: the adapter was trained over another weight than the model's")));
        }
    }
    Ok(())
}

/// How the tensors of `file` fit.
fn fit(file: &SafetensorsFile, config: &LoraConfig, targets: &[Target], companions: &[Companion]) -> Result<LoadReport> {
    let mut found: BTreeMap<String, (DType, Shape)> = BTreeMap::new();
    for name in own_names(file) {
        let (shape, dtype) = file.info(&name)?;
        found.insert(name, (dtype, shape));
    }
    let mut report = LoadReport::default();
    for (name, shape) in expected(config, targets, companions)? {
        match found.remove(&name) {
            None => report.missing.push(name),
            Some((dtype, other)) if other != shape || !dtype.is_float() => {
                report.mismatched.push(Mismatch { name, expected: (DType::F32, shape), found: (dtype, other) });
            }
            Some(_) => report.loaded += 1,
        }
    }
    report.unexpected = found.into_keys().collect();
    Ok(report)
}

/// Names and shapes of all tensors of an adapter.
fn expected(config: &LoraConfig, targets: &[Target], companions: &[Companion]) -> Result<Vec<(String, Shape)>> {
    let mut all = Vec::new();
    for Target { layer, name, rank, .. } in targets {
        let tensors = layer.tensors(*rank, config.use_dora)?;
        all.extend(tensors.into_iter().map(|(part, shape)| (format!("{PREFIX}.{name}.{part}"), shape)));
    }
    all.extend(companions.iter().map(|companion| (companion.saved_as.clone(), companion.param.shape())));
    Ok(all)
}
