//! Where the parts of a pipeline are, and how each is built.

use crate::clip::{ClipTextConfig, ClipTextModel, WithProjection, from_open_clip};
use crate::diffusion::ldm::{unet_from_ldm, vae_from_ldm};
use crate::diffusion::schedulers::{SchedulerConfig, SchedulerKind};
use crate::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel};
use crate::nn::{Params, ParamsOptions, StateDict};
use crate::pretrained::{Pretrained, build_pretrained, load_pretrained_variant, read_config, read_object};
use crate::text::Tokenizer;
use crate::vae::{AutoencoderKl, AutoencoderKlConfig};
use kiln_tensor::io::safetensors::SafetensorsFile;
use kiln_tensor::{DType, Device, Error, ErrorKind, Generator, Result, default_device};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// How a pipeline is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Dtype of the networks. An autoencoder whose configuration says `force_upcast` stays in f32 where this is f16.
    pub dtype: DType,
    /// Device of the networks.
    pub device: Device,
    /// The variant of the files, such as `fp16`; otherwise the plain files, or a variant where they are missing.
    pub variant: Option<String>,
    /// Whether the networks stay in memory after their part of a picture is done. If not, each is read again for the next picture.
    pub keep: bool,
    /// Another scheduler than the folder's, for the pictures that do not choose one: whatever class the folder names, known here or not.
    pub scheduler: Option<SchedulerKind>,
    /// Whether the autoencoder takes pictures that are larger than those of its training apart into tiles: less memory, nearly the same
    /// picture.
    pub vae_tiling: bool,
}

impl Default for LoadOptions {
    /// f32 on the default device, one network in memory at a time.
    fn default() -> Self {
        Self { dtype: DType::F32, device: default_device(), variant: None, keep: false, scheduler: None, vae_tiling: false }
    }
}

/// The classes of pipelines that are known here.
const CLASSES: [&str; 9] = [
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
];

/// The files of a pipeline.
pub(super) struct Folder {
    folder: PathBuf,
    /// A checkpoint of a single file, in LDM's names.
    single: Option<PathBuf>,
    options: LoadOptions,
    /// `model_index.json`.
    index: Map<String, Value>,
}

impl Folder {
    /// # Errors
    /// If `model_index.json` is missing or names another kind of pipeline, or a part is missing.
    pub fn open(folder: &Path, single: Option<&Path>, options: LoadOptions) -> Result<Self> {
        let index = folder.join("model_index.json");
        if !index.exists() {
            let message = format!("{} holds no model_index.json: it is no folder of a diffusers pipeline", folder.display());
            return Err(Error::new(ErrorKind::Io, "stable diffusion", message));
        }
        let index = read_object(&index)?;
        let found = Self { folder: folder.to_owned(), single: single.map(Path::to_owned), options, index };
        if !CLASSES.contains(&found.class()) {
            let message = format!("model_index.json: _class_name is `{}`; there are {}", found.class(), CLASSES.join(", "));
            return Err(Error::format("stable diffusion", message));
        }
        found.expect_parts()?;
        Ok(found)
    }

    fn expect_parts(&self) -> Result<()> {
        let mut needed = vec!["unet", "vae", "scheduler", "tokenizer", "text_encoder"];
        if self.is_xl() {
            needed.extend(["tokenizer_2", "text_encoder_2"]);
        }
        let missing: Vec<&str> = needed.into_iter().filter(|part| !self.folder.join(part).is_dir()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let left_out: Vec<&str> = missing.iter().copied().filter(|part| self.does_without(part)).collect();
        if !left_out.is_empty() {
            let message = format!(
                "{}: by its model_index.json the pipeline does without {}, as SDXL's refiner does; such pipelines are not supported",
                self.folder.display(),
                left_out.join(", ")
            );
            return Err(Error::format("stable diffusion", message));
        }
        let message = format!("{} lacks the folders {} that its model_index.json calls for", self.folder.display(), missing.join(", "));
        Err(Error::new(ErrorKind::Io, "stable diffusion", message))
    }

    /// Whether `model_index.json` says that there is no such part.
    fn does_without(&self, part: &str) -> bool {
        matches!(self.index.get(part), Some(Value::Array(names)) if names.iter().all(Value::is_null))
    }

    fn class(&self) -> &str {
        self.index.get("_class_name").and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether it is SDXL, with two text encoders.
    pub fn is_xl(&self) -> bool {
        self.class().contains("XL")
    }

    /// Whether an absent negative prompt is zeros instead of the text "".
    pub fn forces_zeros(&self) -> bool {
        self.index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(true)
    }

    /// The name that a picture's metadata give.
    pub fn name(&self) -> String {
        let path = self.single.as_ref().unwrap_or(&self.folder);
        path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn params(&self, dtype: DType) -> Params {
        // Nothing is drawn: all weights come from files.
        let params = Params::with(ParamsOptions { dtype, device: self.options.device, generator: Generator::new(0) });
        params.eval();
        params
    }

    pub fn dtype(&self) -> DType {
        self.options.dtype
    }

    pub fn device(&self) -> Device {
        self.options.device
    }

    pub fn keeps(&self) -> bool {
        self.options.keep
    }

    pub fn vae_tiling(&self) -> bool {
        self.options.vae_tiling
    }

    pub fn variant(&self) -> Option<&str> {
        self.options.variant.as_deref()
    }

    pub fn chosen_scheduler(&self) -> Option<SchedulerKind> {
        self.options.scheduler
    }

    /// The folder's scheduler, or the one that was chosen in its place.
    pub fn scheduler(&self) -> Result<SchedulerConfig> {
        let path = self.folder.join("scheduler");
        let config = match self.options.scheduler {
            Some(kind) => SchedulerConfig::load_as(path, kind)?,
            None => SchedulerConfig::load(path)?,
        };
        Ok(self.brought_up_to_date(config))
    }

    /// What the reference's pipelines of Stable Diffusion 1 and 2 make of a scheduler's configuration: the oldest files leave out what these
    /// models were trained with.
    pub fn brought_up_to_date(&self, mut config: SchedulerConfig) -> SchedulerConfig {
        match self.class() {
            "StableDiffusionPipeline" | "StableDiffusionImg2ImgPipeline" => config.clip_sample = Some(false),
            "StableDiffusionInpaintPipeline" => config.skip_prk_steps = Some(true),
            _ => return config,
        }
        config.steps_offset = Some(1);
        config
    }

    pub fn tokenizer(&self, number: usize) -> Result<Tokenizer> {
        Tokenizer::from_folder(self.folder.join(["tokenizer", "tokenizer_2"][number.min(1)]))
    }

    pub fn unet_config(&self) -> Result<UNet2dConditionConfig> {
        read_config(&self.folder.join("unet"))
    }

    pub fn vae_config(&self) -> Result<AutoencoderKlConfig> {
        read_config(&self.folder.join("vae"))
    }

    pub fn unet(&self) -> Result<(UNet2dConditionModel, Params)> {
        let params = self.params(self.options.dtype);
        let model = self.part::<UNet2dConditionConfig>("unet", &params, |config, tensors| {
            let layers = config.layers_per_block.first().unwrap_or(2);
            unet_from_ldm(tensors(&["model.diffusion_model."])?, layers)
        })?;
        Ok((model, params))
    }

    pub fn vae(&self) -> Result<AutoencoderKl> {
        let upcast = self.options.dtype == DType::F16 && self.vae_config()?.force_upcast;
        let params = self.params(if upcast { DType::F32 } else { self.options.dtype });
        let mut model =
            self.part::<AutoencoderKlConfig>("vae", &params, |_, tensors| vae_from_ldm(tensors(&["first_stage_model.", "vae."])?))?;
        if self.options.vae_tiling {
            let tiling = model.config().tiling();
            model.set_tiling(Some(tiling))?;
        }
        Ok(model)
    }

    /// The text encoder of SD 1 and 2, or the first or second of SDXL.
    pub fn text_encoder(&self, number: usize) -> Result<(ClipTextModel, Params)> {
        let params = self.params(self.options.dtype);
        let model = if number == 0 {
            self.part::<ClipTextConfig>("text_encoder", &params, |config, tensors| {
                let clip = tensors(&["cond_stage_model.transformer.", "conditioner.embedders.0.transformer."])?;
                if !clip.is_empty() {
                    return Ok(clip);
                }
                open_clip(tensors(&["cond_stage_model.model."])?, config)
            })?
        } else {
            self.part::<WithProjection<ClipTextConfig>>("text_encoder_2", &params, |config, tensors| {
                open_clip(tensors(&["conditioner.embedders.1.model."])?, &config.0)
            })?
        };
        Ok((model, params))
    }

    /// A part from its folder; or from the single file, whose tensors below some prefixes `convert` turns into the part's.
    fn part<C: Pretrained>(
        &self,
        name: &str,
        params: &Params,
        convert: impl FnOnce(&C, &dyn Fn(&[&str]) -> Result<StateDict>) -> Result<StateDict>,
    ) -> Result<C::Model> {
        let folder = self.folder.join(name);
        let Some(single) = &self.single else {
            return Ok(load_pretrained_variant::<C>(&folder, self.options.variant.as_deref(), params)?.1);
        };
        let config = read_config::<C>(&folder)?;
        let file = SafetensorsFile::open(single)?;
        let state = convert(&config, &|prefixes| below(&file, prefixes))?;
        let wrong = |e: Error| Error::format("stable diffusion", format!("{}, {name}: {e}", single.display())).with_source(e);
        Ok(build_pretrained(config, state, params).map_err(wrong)?.1)
    }
}

/// The tensors below one of the prefixes, without it.
fn below(file: &SafetensorsFile, prefixes: &[&str]) -> Result<StateDict> {
    let strip = |name: &str| prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)).map(str::to_owned);
    file.names().into_iter().filter_map(|name| Some((strip(&name)?, name))).map(|(new, name)| Ok((new, file.tensor(&name)?))).collect()
}

/// OpenCLIP's tensors under CLIP's names: Stable Diffusion 2 uses one block fewer than its file has.
fn open_clip(state: StateDict, config: &ClipTextConfig) -> Result<StateDict> {
    let mut state = from_open_clip(state)?;
    let layer = |name: &str| name.strip_prefix("text_model.encoder.layers.")?.split('.').next()?.parse::<usize>().ok();
    state.retain(|name, _| name != "logit_scale" && layer(name).is_none_or(|layer| layer < config.num_hidden_layers));
    Ok(state)
}
