//! What a picture is to be.

use super::control::ControlInput;
use crate::diffusion::schedulers::SchedulerKind;
use kiln_tensor::{Error, Generator, Result, Tensor};

/// What to draw and how. The names are those of the arguments in `diffusers`.
#[derive(Clone)]
pub struct DrawOptions {
    /// What the picture shows.
    pub prompt: String,
    /// What it shall not show.
    pub negative_prompt: Option<String>,
    /// Steps of the scheduler.
    pub num_inference_steps: usize,
    /// How much more the prompt counts than the network says; without guidance up to 1.
    pub guidance_scale: f64,
    /// φ of Lin et al., *Common Diffusion Noise Schedules and Sample Steps are Flawed*, 2024: brings the contrast back that guidance raised.
    pub guidance_rescale: f64,
    /// Seed of all noise, which is then that of `torch.Generator("cpu").manual_seed(seed)`.
    pub seed: u64,
    /// Height, a multiple of 8; that of the model's training if absent (of the initial picture, if there is one).
    pub height: Option<usize>,
    /// Width, as the height.
    pub width: Option<usize>,
    /// Another scheduler than the folder's.
    pub scheduler: Option<SchedulerKind>,
    /// The share η of DDPM's noise that DDIM adds.
    pub eta: f64,
    /// Blocks of the text encoder to leave out at its end.
    pub clip_skip: usize,
    /// A picture to start from, (1, 3, H, W) in [−1, 1]; brought to the size that is drawn.
    pub image: Option<Tensor>,
    /// How much of it is drawn anew, up to 1: all. 0.8 if absent, and 1 with a mask.
    pub strength: Option<f64>,
    /// What of the picture is drawn anew, (1, 1, H, W): there where it is at least ½.
    pub mask: Option<Tensor>,
    /// Pictures that steer, each with its network.
    pub controls: Vec<ControlInput>,
    /// The noise to start from, (1, 4, H / 8, W / 8), in place of that of the seed.
    pub latents: Option<Tensor>,
    /// Where all other noise comes from, in place of the seed's generator.
    pub generator: Option<Generator>,
}

impl Default for DrawOptions {
    /// 50 steps with guidance 7.5.
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative_prompt: None,
            num_inference_steps: 50,
            guidance_scale: 7.5,
            guidance_rescale: 0.0,
            seed: 0,
            height: None,
            width: None,
            scheduler: None,
            eta: 0.0,
            clip_skip: 0,
            image: None,
            strength: None,
            mask: None,
            controls: Vec::new(),
            latents: None,
            generator: None,
        }
    }
}

impl DrawOptions {
    /// How much of the initial picture is drawn anew.
    pub fn strength(&self) -> f64 {
        self.strength.unwrap_or(if self.mask.is_some() { 1.0 } else { 0.8 })
    }

    /// An error unless every number is one that makes sense.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::argument("draw", message));
        if self.num_inference_steps == 0 {
            return wrong("at least one step is needed".into());
        }
        if !self.guidance_scale.is_finite() {
            return wrong(format!("guidance_scale {} is no number", self.guidance_scale));
        }
        if !(0.0..=1.0).contains(&self.guidance_rescale) {
            return wrong(format!("guidance_rescale {} does not lie in 0 to 1", self.guidance_rescale));
        }
        if !(0.0..=1.0).contains(&self.strength()) {
            return wrong(format!("strength {} does not lie in 0 to 1", self.strength()));
        }
        if self.mask.is_some() && self.image.is_none() {
            return wrong("a mask says what of a picture is drawn anew: it needs an initial picture".into());
        }
        if self.strength.is_some() && self.image.is_none() {
            return wrong("strength is for an initial picture, and there is none".into());
        }
        Ok(())
    }

    /// Whether the network is asked without the prompt as well.
    pub(super) fn guides(&self) -> bool {
        self.guidance_scale > 1.0
    }
}
