//! A picture from a prompt: the parts of the pipeline one after the other.

use super::control::ControlInput;
use super::denoise::{Painted, Run, first_index, time_ids};
use super::folder::{Folder, LoadOptions};
use super::picture::resize_picture;
use super::prompt::{Condition, Depth, Encoder, joined};
use super::{DrawOptions, TextualInversion, latent_preview, write_png};
use crate::clip::ClipTextModel;
use crate::diffusion::schedulers::{Scheduler, SchedulerConfig, SchedulerKind};
use crate::diffusion::unet::UNet2dConditionModel;
use crate::lora::{LoraPart, LoraStack, LoraWeights};
use crate::nn::Params;
use crate::vae::AutoencoderKl;
use kiln_autograd::no_grad;
use kiln_tensor::ops::upsample::Interpolation;
use kiln_tensor::{DType, Error, Generator, Result, Tensor};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a pipeline does at the moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The text encoder reads the prompts.
    Prompt,
    /// The autoencoder reads the initial picture.
    Encode,
    /// The U-Net takes the noise away, step by step.
    Denoise,
    /// The autoencoder draws the picture.
    Decode,
}

/// How far a picture is.
pub struct Step<'a> {
    /// What is being done.
    pub phase: Phase,
    /// Steps of this phase that are done; 0 as it begins.
    pub done: usize,
    /// All steps of this phase.
    pub total: usize,
    /// The scaled latent (1, 4, H / 8, W / 8) after a step of [`Phase::Denoise`].
    pub latents: Option<&'a Tensor>,
    is_xl: bool,
}

impl Step<'_> {
    /// A rough picture of the latent, an eighth of the size, (1, 3, H / 8, W / 8) in [−1, 1].
    ///
    /// # Errors
    /// If the latent has not four channels.
    pub fn preview(&self) -> Result<Option<Tensor>> {
        self.latents.map(|latents| latent_preview(latents, self.is_xl)).transpose()
    }
}

/// A picture that was drawn.
pub struct Drawn {
    /// (1, 3, H, W) in [−1, 1].
    pub picture: Tensor,
    /// The scaled latent that it was decoded from.
    pub latents: Tensor,
    /// The prompt, the seed and the settings by name: all that it takes to draw it again, but for tensors and networks that were given.
    pub texts: BTreeMap<String, String>,
    /// The ends of the prompt and of the negative prompt that were not read: text encoders take 77 tokens.
    pub unread: Vec<String>,
}

impl Drawn {
    /// Writes a PNG that carries the prompt, the seed and the settings: [`read_png_text`](super::read_png_text) reads them.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        write_png(path, &self.picture, &self.texts)
    }
}

/// A low-rank update of the pipeline's networks.
struct Update {
    name: String,
    weights: LoraWeights,
    weight: f64,
}

/// Networks that stay in memory.
#[derive(Default)]
struct Kept {
    encoders: [Option<Arc<ClipTextModel>>; 2],
    unet: Option<Arc<UNet2dConditionModel>>,
    vae: Option<Arc<AutoencoderKl>>,
}

/// Stable Diffusion 1, 2 or XL, or a latent consistency model of its kind: draws what a prompt says. From the same noise the pictures are those of `diffusers`, and for the same seed.
///
/// Loading reads configurations and vocabularies only. Each network is read when its part of a picture comes, and dropped after it, unless
/// [`LoadOptions::keep`] is set.
///
/// ```no_run
/// use kiln_models::diffusion::pipeline::{DrawOptions, LoadOptions, StableDiffusion};
/// # fn main() -> kiln_tensor::Result<()> {
/// let pipeline = StableDiffusion::load("stable-diffusion-v1-5", LoadOptions::default())?;
/// let options = DrawOptions { prompt: "a lighthouse at dusk".into(), seed: 7, ..DrawOptions::default() };
/// pipeline.draw(&options, &mut |_| Ok(()))?.save("lighthouse.png")?;
/// # Ok(()) }
/// ```
///
/// Sources: Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, 2022; Podell et al., *SDXL*, 2023.
pub struct StableDiffusion {
    folder: Folder,
    scheduler: SchedulerConfig,
    updates: Vec<Update>,
    words: Vec<TextualInversion>,
    kept: Mutex<Kept>,
}

impl StableDiffusion {
    /// Opens a folder of `diffusers`: `model_index.json` and a folder for each part.
    ///
    /// # Errors
    /// If a part is missing, or a configuration malformed or of a kind that is not known.
    pub fn load(folder: impl AsRef<Path>, options: LoadOptions) -> Result<Self> {
        Self::open(Folder::open(folder.as_ref(), None, options)?)
    }

    /// Opens a checkpoint of a single file in LDM's names, whose configurations and vocabularies are in `folder`, as [`load`](Self::load)
    /// takes it, but without weights.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_single_file(file: impl AsRef<Path>, folder: impl AsRef<Path>, options: LoadOptions) -> Result<Self> {
        let file = file.as_ref();
        std::fs::metadata(file).map_err(|e| Error::io("stable diffusion", file.display(), e))?;
        Self::open(Folder::open(folder.as_ref(), Some(file), options)?)
    }

    fn open(folder: Folder) -> Result<Self> {
        let scheduler = folder.scheduler()?;
        scheduler.build()?;
        folder.unet_config()?;
        folder.vae_config()?;
        (0..if folder.is_xl() { 2 } else { 1 }).try_for_each(|i| folder.tokenizer(i).map(|_| ()))?;
        Ok(Self { folder, scheduler, updates: Vec::new(), words: Vec::new(), kept: Mutex::default() })
    }

    /// Whether it is SDXL.
    pub fn is_xl(&self) -> bool {
        self.folder.is_xl()
    }

    /// The configuration of the folder's scheduler, or of the one that was chosen as it was loaded.
    pub fn scheduler(&self) -> &SchedulerConfig {
        &self.scheduler
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops the networks that updates change, so that they are read anew.
    fn forget_adapted(&self) {
        let mut kept = self.kept();
        kept.encoders = Default::default();
        kept.unet = None;
    }

    /// Adds low-rank updates to the networks, times `weight`; several add up. Whether each fits a module is seen as its network is read.
    ///
    /// # Errors
    /// If the name is taken, or the file has updates of a text encoder that the pipeline lacks.
    pub fn add_lora(&mut self, name: &str, weights: &LoraWeights, weight: f64) -> Result<()> {
        if self.updates.iter().any(|update| update.name == name) {
            return Err(Error::argument("lora", format!("there is a LoRA `{name}` already")));
        }
        if !self.is_xl() && weights.parts().contains(&LoraPart::TextEncoder2) {
            return Err(Error::argument("lora", format!("{name} has updates of a second text encoder: it was made for SDXL")));
        }
        self.updates.push(Update { name: name.to_owned(), weights: weights.clone(), weight });
        self.forget_adapted();
        Ok(())
    }

    /// Takes all low-rank updates away.
    pub fn clear_loras(&mut self) {
        self.updates.clear();
        self.forget_adapted();
    }

    /// Adds a word that prompts can hold.
    ///
    /// # Errors
    /// If there is such a word already.
    pub fn add_word(&mut self, word: TextualInversion) -> Result<()> {
        if self.words.iter().any(|other| other.token() == word.token()) {
            return Err(Error::argument("textual inversion", format!("there is a word `{}` already", word.token())));
        }
        self.words.push(word);
        self.kept().encoders = Default::default();
        Ok(())
    }

    fn adapt(&self, params: &Params, part: LoraPart) -> Result<()> {
        let mut stack = LoraStack::new(params, part);
        self.updates.iter().try_for_each(|update| stack.add(&update.name, &update.weights, update.weight).map(|_| ()))
    }

    fn encoder(&self, number: usize) -> Result<Arc<ClipTextModel>> {
        let kept = self.kept().encoders.get(number).cloned().flatten();
        if let Some(model) = kept {
            return Ok(model);
        }
        let (model, params) = self.folder.text_encoder(number)?;
        self.adapt(&params, if number == 0 { LoraPart::TextEncoder } else { LoraPart::TextEncoder2 })?;
        TextualInversion::attach(&self.words, model.token_embedding(), number)?;
        let model = Arc::new(model);
        if let Some(slot) = self.kept().encoders.get_mut(number).filter(|_| self.folder.keeps()) {
            *slot = Some(model.clone());
        }
        Ok(model)
    }

    fn unet(&self) -> Result<Arc<UNet2dConditionModel>> {
        let kept = self.kept().unet.clone();
        if let Some(model) = kept {
            return Ok(model);
        }
        let (model, params) = self.folder.unet()?;
        self.adapt(&params, LoraPart::Unet)?;
        let model = Arc::new(model);
        if self.folder.keeps() {
            self.kept().unet = Some(model.clone());
        }
        Ok(model)
    }

    fn vae(&self) -> Result<Arc<AutoencoderKl>> {
        let kept = self.kept().vae.clone();
        if let Some(model) = kept {
            return Ok(model);
        }
        let model = Arc::new(self.folder.vae()?);
        if self.folder.keeps() {
            self.kept().vae = Some(model.clone());
        }
        Ok(model)
    }

    /// Draws one picture. `seen` is told of every step; an error from it ends the drawing.
    ///
    /// # Errors
    /// If an option makes no sense (such as a size that is no multiple of 8), a file is missing or malformed, or a LoRA or ControlNet does
    /// not fit.
    pub fn draw(&self, options: &DrawOptions, seen: &mut dyn FnMut(&Step<'_>) -> Result<()>) -> Result<Drawn> {
        options.check()?;
        options.controls.iter().try_for_each(ControlInput::check)?;
        let size = self.size(options)?;
        no_grad(|| self.draw_sized(options, size, seen))
    }

    fn draw_sized(&self, options: &DrawOptions, size: [usize; 2], seen: &mut dyn FnMut(&Step<'_>) -> Result<()>) -> Result<Drawn> {
        let is_xl = self.is_xl();
        let mut tell = |phase, done, total, latents: Option<&Tensor>| seen(&Step { phase, done, total, latents, is_xl });
        let generator = options.generator.clone().unwrap_or_else(|| Generator::torch_cpu(options.seed));
        let mut scheduler = self.run_scheduler(options)?;
        tell(Phase::Prompt, 0, 1, None)?;
        let condition = self.condition(options)?;
        tell(Phase::Prompt, 1, 1, None)?;
        let config = self.folder.unet_config()?;
        let start =
            self.start(options, size, config.in_channels, scheduler.as_ref(), &generator, &mut |done| tell(Phase::Encode, done, 1, None))?;
        let controls = sized_controls(&options.controls, size)?;
        tell(Phase::Denoise, 0, scheduler.timesteps().len().saturating_sub(start.first), None)?;
        let unet = self.unet()?;
        let ids = is_xl.then(|| time_ids(size, self.folder.dtype())?.to_device(self.folder.device())).transpose()?;
        let run = Run {
            unet: &unet,
            condition: &condition,
            options,
            controls: &controls,
            generator: &generator,
            time_ids: ids,
            painted: start.painted.as_ref(),
            noise: start.noise,
            first: start.first,
        };
        let latents =
            run.run(scheduler.as_mut(), start.latents, &mut |done, total, latents| tell(Phase::Denoise, done, total, Some(latents)))?;
        drop(unet);
        tell(Phase::Decode, 0, 1, None)?;
        let vae = self.vae()?;
        let picture = vae.decode(&vae.unscale(&latents.to_dtype(vae.last_weight().dtype())?)?)?.clamp(-1.0, 1.0)?;
        tell(Phase::Decode, 1, 1, None)?;
        Ok(Drawn { picture, latents, texts: self.texts(options, size, scheduler.config())?, unread: condition.unread })
    }

    /// Height and width, multiples of 8.
    fn size(&self, options: &DrawOptions) -> Result<[usize; 2]> {
        let factor = self.folder.vae_config()?.vae_scale_factor();
        let trained =
            || Ok::<_, Error>(self.folder.unet_config()?.sample_size.and_then(|size| size.first()).unwrap_or(64).saturating_mul(factor));
        let default = match &options.image {
            Some(image) => {
                let [_, _, h, w] = image.dims_n("draw")?;
                [h / factor * factor, w / factor * factor]
            }
            None => [trained()?; 2],
        };
        let size = [options.height.unwrap_or(default[0]), options.width.unwrap_or(default[1])];
        let multiple = factor.max(8);
        if size.iter().any(|&extent| extent == 0 || extent % multiple != 0 || extent > 1 << 14) {
            let message = format!("height {} and width {} must be multiples of {multiple}, and not 0", size[0], size[1]);
            return Err(Error::argument("draw", message));
        }
        Ok(size)
    }

    fn run_scheduler(&self, options: &DrawOptions) -> Result<Box<dyn Scheduler>> {
        let config = match options.scheduler {
            Some(kind) => self.folder.brought_up_to_date(self.scheduler.with_kind(kind)),
            None => self.scheduler.clone(),
        };
        let mut scheduler = config.build()?;
        scheduler.set_eta(options.eta)?;
        scheduler.set_timesteps(options.num_inference_steps)?;
        Ok(scheduler)
    }

    /// What the U-Net is told of the prompts. The text encoders are in memory one at a time.
    fn condition(&self, options: &DrawOptions) -> Result<Condition> {
        let is_xl = self.is_xl();
        let depth = Depth { clip_skip: options.clip_skip, is_xl };
        let zeros = is_xl && options.negative_prompt.is_none() && self.folder.forces_zeros();
        let guides = options.guides() && self.folder.unet_config()?.time_cond_proj_dim.is_none();
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for number in 0..if is_xl { 2 } else { 1 } {
            let (model, tokenizer) = (self.encoder(number)?, self.folder.tokenizer(number)?);
            let encoder = Encoder { model: &model, tokenizer: &tokenizer, words: &self.words };
            with.push(encoder.encode(&options.prompt, depth)?);
            if guides && !zeros {
                // As the reference does, negative prompts are read to the end.
                without.push(encoder.encode(options.negative_prompt.as_deref().unwrap_or_default(), Depth { clip_skip: 0, ..depth })?);
            }
        }
        let with = joined(with)?;
        match (guides, zeros) {
            (false, _) => Ok(with),
            (true, true) => with.zeros_like()?.before(&with),
            (true, false) => joined(without)?.before(&with),
        }
    }

    /// What the steps start from. Noise is drawn in the order of `diffusers`.
    fn start(
        &self,
        options: &DrawOptions,
        size: [usize; 2],
        channels: usize,
        scheduler: &dyn Scheduler,
        generator: &Generator,
        seen: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Start> {
        let vae_config = self.folder.vae_config()?;
        let factor = vae_config.vae_scale_factor();
        let shape = [1, vae_config.latent_channels, size[0] / factor, size[1] / factor];
        let draw = || generator.randn(shape, self.folder.dtype())?.to_device(self.folder.device());
        let given = || match &options.latents {
            Some(latents) if latents.dims() == shape => latents.to_dtype(self.folder.dtype())?.to_device(self.folder.device()).map(Some),
            Some(latents) => Err(Error::shape("draw", format!("latents {} are not {shape:?}", latents.shape()))),
            None => Ok(None),
        };
        let Some(image) = &options.image else {
            let noise = given()?.map_or_else(draw, Ok)?;
            return Ok(Start { latents: noise.mul_scalar(scheduler.init_noise_sigma())?, noise, painted: None, first: 0 });
        };
        seen(0)?;
        let vae = self.vae()?;
        let image = resize_picture(image, size)?.to_device(self.folder.device())?;
        let encode = |image: &Tensor| {
            let dtype = vae.last_weight().dtype();
            let posterior = vae.encode(&image.to_dtype(dtype)?)?;
            let noise = generator.randn(shape, dtype)?.to_device(self.folder.device())?;
            vae.scale(&posterior.sample_from(&noise)?)?.to_dtype(self.folder.dtype())
        };
        let steps = options.num_inference_steps;
        let strength = options.strength();
        let first = first_index(scheduler, steps, strength)?;
        let all = options.mask.is_some() && strength == 1.0;
        // A network that sees the masked picture needs nothing of the whole one, where all is drawn anew.
        let sees_masked = options.mask.is_some() && channels == 2 * shape[1] + 1;
        let latent = if all && sees_masked { None } else { Some(encode(&image)?) };
        let noise = given()?.map_or_else(draw, Ok)?;
        let latents = match &latent {
            Some(latent) if !all => scheduler.add_noise_at(latent, &noise, first)?,
            _ => noise.mul_scalar(scheduler.init_noise_sigma())?,
        };
        let painted = match &options.mask {
            None => None,
            Some(mask) => {
                let mask = sized_mask(mask, size)?.to_device(self.folder.device())?;
                let visible = mask.mul_scalar(-1.0)?.add_scalar(1.0)?;
                let masked = if sees_masked {
                    Some(encode(&image.mul(&visible)?)?)
                } else {
                    // diffusers encodes the masked picture in any case; only its noise is seen here.
                    draw()?;
                    None
                };
                let small = mask.interpolate([shape[2], shape[3]], Interpolation::Nearest)?.to_dtype(self.folder.dtype())?;
                Some(Painted { latent: latent.unwrap_or_else(|| noise.clone()), mask: small, masked_latent: masked })
            }
        };
        seen(1)?;
        Ok(Start { latents, noise, painted, first })
    }

    /// What a picture's file says of how it was drawn.
    fn texts(&self, options: &DrawOptions, [height, width]: [usize; 2], scheduler: &SchedulerConfig) -> Result<BTreeMap<String, String>> {
        let kind = options.scheduler.or(self.folder.chosen_scheduler());
        let config = serde_json::to_string(scheduler).map_err(|e| Error::format("draw", format!("the scheduler's configuration: {e}")))?;
        let mut texts = BTreeMap::from([
            ("model", self.folder.name()),
            ("prompt", options.prompt.clone()),
            ("steps", options.num_inference_steps.to_string()),
            ("guidance_scale", options.guidance_scale.to_string()),
            ("scheduler", kind.map_or(scheduler.class.name(), SchedulerKind::name).to_owned()),
            ("scheduler_config", config),
            ("size", format!("{width}x{height}")),
            ("dtype", self.folder.dtype().to_string()),
            ("Software", format!("Kiln {}", env!("CARGO_PKG_VERSION"))),
        ]);
        let seed = options.seed;
        match (&options.latents, &options.generator) {
            (None, None) => texts.insert("seed", seed.to_string()),
            (Some(_), None) => texts.insert("noise", format!("given as latents, all other of seed {seed}")),
            (None, Some(_)) => texts.insert("noise", "of a given generator".to_owned()),
            (Some(_), Some(_)) => texts.insert("noise", "given as latents, all other of a given generator".to_owned()),
        };
        let listed = |names: Vec<String>, between: &str| (!names.is_empty()).then(|| names.join(between));
        let given = |is_given: bool| is_given.then(|| "given".to_owned());
        let settings = [
            ("negative_prompt", options.negative_prompt.clone()),
            ("guidance_rescale", (options.guidance_rescale != 0.0).then(|| options.guidance_rescale.to_string())),
            ("eta", (options.eta != 0.0).then(|| options.eta.to_string())),
            ("clip_skip", (options.clip_skip > 0).then(|| options.clip_skip.to_string())),
            ("image", given(options.image.is_some())),
            ("strength", options.image.is_some().then(|| options.strength().to_string())),
            ("mask", given(options.mask.is_some())),
            ("controlnet", listed(options.controls.iter().map(ControlInput::text).collect(), "; ")),
            ("lora", listed(self.updates.iter().map(|update| format!("{}:{}", update.name, update.weight)).collect(), ", ")),
            ("textual_inversion", listed(self.words.iter().map(|word| word.token().to_owned()).collect(), ", ")),
            ("variant", self.folder.variant().map(str::to_owned)),
            ("vae_tiling", self.folder.vae_tiling().then(|| "on".to_owned())),
        ];
        texts.extend(settings.into_iter().filter_map(|(key, text)| Some((key, text?))));
        Ok(texts.into_iter().map(|(key, text)| (key.to_owned(), text)).collect())
    }
}

/// What the steps start from.
struct Start {
    latents: Tensor,
    noise: Tensor,
    painted: Option<Painted>,
    first: usize,
}

/// The mask at the size that is drawn: 1 where it is at least ½, else 0.
fn sized_mask(mask: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    let [b, c, _, _] = mask.dims_n("mask")?;
    if b != 1 || c != 1 {
        return Err(Error::shape("mask", format!("expected (1, 1, H, W), got {}", mask.shape())));
    }
    // Pictures are resized in [−1, 1].
    let resized = resize_picture(&mask.mul_scalar(2.0)?.add_scalar(-1.0)?, size)?;
    resized.ge_scalar(0.0)?.to_dtype(DType::F32)
}

/// The controls with their pictures at the size that is drawn.
fn sized_controls(controls: &[ControlInput], size: [usize; 2]) -> Result<Vec<ControlInput>> {
    let sized = |control: &ControlInput| {
        let [_, channels, h, w] = control.image.dims_n("controlnet")?;
        let image = if [h, w] == size || !(channels == 1 || channels == 3) {
            control.image.clone()
        } else {
            resize_picture(&control.image.mul_scalar(2.0)?.add_scalar(-1.0)?, size)?.add_scalar(1.0)?.mul_scalar(0.5)?
        };
        Ok(ControlInput { image, ..control.clone() })
    };
    controls.iter().map(sized).collect()
}
