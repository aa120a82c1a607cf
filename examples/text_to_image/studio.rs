//! What all drawing shares: the frozen autoencoder and text tower, the noise, and the way from texts to pictures.

use crate::autoencoder::{BLOCK, from_blocks, to_blocks};
use kiln::clip::{ClipTextConfig, ClipTextModel};
use kiln::data::CaptionedPictures;
use kiln::diffusion::schedulers::{
    BetaSchedule, PredictionType, Scheduler, SchedulerClass, SchedulerConfig, SchedulerKind, TimestepSpacing,
};
use kiln::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel, UNetConditions};
use kiln::diffusion::{Denoiser, Samples, Sampling, sample};
use kiln::prelude::*;
use kiln::pretrained::load_pretrained;
use kiln::vae::{AutoencoderKl, AutoencoderKlConfig};
use kiln::{Error, Result, Tensor};
use std::ops::Range;
use std::path::Path;

/// Height and width of a latent.
const LATENT: usize = crate::SIDE / BLOCK;
/// Pictures drawn at a time.
const CHUNK: usize = 100;

/// How texts become pictures.
pub struct Studio {
    vae: AutoencoderKl,
    text: ClipTextModel,
    /// What an empty text becomes.
    pub nothing: Tensor,
    scheduler: SchedulerConfig,
    sampling: Sampling,
}

/// A U-Net that gets a text in two ways, as that of Stable Diffusion XL does: its cross-attention looks at all rows of the condition, and the
/// first of them, which stands for the whole text, joins the embedding of the time.
pub struct Painter(pub UNet2dConditionModel);

impl Denoiser for Painter {
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let whole = condition.map(whole_text).transpose()?;
        self.0.forward(x, timesteps, condition, &UNetConditions { class_labels: whole.as_ref(), ..UNetConditions::default() })
    }
}

/// The row of the states (B, 1 + S, C) of texts that stands for all of each.
pub fn whole_text(states: &Tensor) -> Result<Tensor> {
    states.select(1, 0)
}

/// Some pictures to draw: the arguments of [`sample`], and which of all they are.
pub struct Job<'a> {
    pub rows: Range<usize>,
    pub scheduler: &'a mut dyn Scheduler,
    pub noise: &'a Tensor,
    pub sampling: &'a Sampling,
    pub generator: &'a Generator,
}

/// The noise of training, as the configuration of the default way to draw.
pub fn noise_schedule() -> SchedulerConfig {
    SchedulerConfig {
        beta_schedule: Some(BetaSchedule::SquaredcosCapV2),
        // Said, because not every scheduler has these for its defaults.
        beta_start: Some(1e-4),
        beta_end: Some(0.02),
        prediction_type: Some(PredictionType::VPrediction),
        // From the last timestep, where nothing but noise is left.
        timestep_spacing: Some(TimestepSpacing::Trailing),
        // Latents are not held to -1 … 1.
        clip_sample: Some(false),
        ..SchedulerConfig::new(SchedulerClass::Ddim)
    }
}

impl Studio {
    /// With the trained autoencoder and text tower in `model`.
    pub fn open(model: &Path, scheduler: SchedulerKind, sampling: Sampling) -> Result<Self> {
        let (vae, text) = (Params::new(), Params::new());
        let (_, autoencoder) = load_pretrained::<AutoencoderKlConfig>(model.join("vae"), &vae)?;
        let (_, tower) = load_pretrained::<ClipTextConfig>(model.join("text_encoder"), &text)?;
        [&vae, &text].into_iter().for_each(Params::eval);
        let mut studio = Self {
            vae: autoencoder,
            text: tower,
            nothing: Tensor::zeros((), ())?,
            scheduler: noise_schedule().with_kind(scheduler),
            sampling,
        };
        studio.nothing = studio.read(&[""])?.squeeze(0)?;
        Ok(studio)
    }

    /// The latents of pictures, of mean 0 and variance 1 or about so.
    pub fn latents(&self, pictures: &Tensor) -> Result<Tensor> {
        no_grad(|| self.vae.scale(&self.vae.encode(&to_blocks(pictures)?)?.mode()))
    }

    /// The pictures of latents.
    pub fn pictures(&self, latents: &Tensor) -> Result<Tensor> {
        no_grad(|| from_blocks(&self.vae.decode(&self.vae.unscale(latents)?)?))
    }

    /// What the U-Net looks at, for tokens (B, 16): a row for the whole text and one for each token, (B, 17, C).
    pub fn states(&self, tokens: &Tensor) -> Result<Tensor> {
        let read = no_grad(|| self.text.forward(tokens, None))?;
        Tensor::cat(&[&read.pooler_output.unsqueeze(1)?, &read.last_hidden_state], 1)
    }

    /// The same, of texts.
    pub fn read<S: AsRef<str>>(&self, texts: &[S]) -> Result<Tensor> {
        self.states(&CaptionedPictures::tokenize(texts)?)
    }

    /// A picture (N, 3, 32, 32) for each of `texts`, from noise of `seed`, by what `network` makes of a job.
    pub fn draw<S: AsRef<str>>(&self, texts: &[S], seed: u64, mut network: impl FnMut(Job) -> Result<Samples>) -> Result<Tensor> {
        if texts.is_empty() {
            return Err(Error::argument("draw", "there are no prompts"));
        }
        let mut parts = Vec::new();
        for start in (0..texts.len()).step_by(CHUNK) {
            let rows = start..(start + CHUNK).min(texts.len());
            let generator = Generator::new(seed.wrapping_add((start as u64) << 32));
            let noise = generator.randn([rows.len(), self.vae.config().latent_channels, LATENT, LATENT], ())?;
            let condition = Some(self.read(&texts[rows.clone()])?);
            let sampling = Sampling { condition, unconditional: Some(self.nothing.clone()), ..self.sampling.clone() };
            let mut scheduler = self.scheduler.build()?;
            let job = Job { rows, scheduler: scheduler.as_mut(), noise: &noise, sampling: &sampling, generator: &generator };
            let latents = network(job)?.pictures;
            parts.push(self.pictures(&latents)?.clamp(-1.0, 1.0)?);
        }
        Tensor::cat(&parts, 0)
    }

    /// The same, by a U-Net.
    pub fn draw_with<S: AsRef<str>>(&self, unet: &Painter, texts: &[S], seed: u64) -> Result<Tensor> {
        self.draw(texts, seed, |job| sample(unet, job.scheduler, job.noise, job.sampling, job.generator))
    }
}

/// The trained U-Net in `model`, with its parameters.
pub fn open_unet(model: &Path) -> Result<(Params, Painter)> {
    let params = Params::new();
    let (_, unet) = load_pretrained::<UNet2dConditionConfig>(model.join("unet"), &params)?;
    params.eval();
    Ok((params, Painter(unet)))
}
