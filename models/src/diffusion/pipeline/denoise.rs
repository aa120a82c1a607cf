//! The steps from noise to a latent.

use super::DrawOptions;
use super::control::{ControlInput, Question, residuals};
use super::prompt::Condition;
use crate::diffusion::blocks::timestep_waves;
use crate::diffusion::guidance;
use crate::diffusion::schedulers::Scheduler;
use crate::diffusion::unet::{UNet2dConditionModel, UNetConditions};
use kiln_tensor::{DType, Error, Generator, Result, Tensor};

/// What is kept of a picture that is drawn anew in part.
pub(super) struct Painted {
    /// Its scaled latent, (1, 4, h, w).
    pub latent: Tensor,
    /// 1 where it is drawn anew, (1, 1, h, w).
    pub mask: Tensor,
    /// The latent of the picture without what is drawn anew: for networks of 9 channels.
    pub masked_latent: Option<Tensor>,
}

/// Everything that a run of steps starts from.
pub(super) struct Run<'a> {
    pub unet: &'a UNet2dConditionModel,
    pub condition: &'a Condition,
    pub options: &'a DrawOptions,
    pub controls: &'a [ControlInput],
    pub generator: &'a Generator,
    /// Numbers that SDXL is told, (1, 6).
    pub time_ids: Option<Tensor>,
    pub painted: Option<&'a Painted>,
    /// The noise that the latent started from.
    pub noise: Tensor,
    /// The first timestep's index.
    pub first: usize,
}

impl Run<'_> {
    /// From the latent at the first timestep to that without noise. `seen` gets each step's number and latent.
    pub fn run(
        &self,
        scheduler: &mut dyn Scheduler,
        mut latent: Tensor,
        seen: &mut dyn FnMut(usize, usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let timesteps = scheduler.timesteps().to_vec();
        let count = timesteps.len().saturating_sub(self.first);
        let guides = self.guides();
        let time_ids = self.time_ids.as_ref().map(|ids| if guides { Tensor::cat(&[ids, ids], 0) } else { Ok(ids.clone()) }).transpose()?;
        let guidance = self.guidance_waves(&latent)?;
        for (step, (index, &timestep)) in timesteps.iter().enumerate().skip(self.first).enumerate() {
            let input = scheduler.scale_model_input(&latent, index)?;
            let input = if guides { Tensor::cat(&[&input, &input], 0)? } else { input };
            let time = Tensor::from_vec(vec![timestep as f32], [1])?.to_device(input.device())?;
            let conditions = UNetConditions {
                text_embeds: self.condition.pooled.as_ref().filter(|_| time_ids.is_some()),
                time_ids: time_ids.as_ref(),
                timestep_cond: guidance.as_ref(),
                ..UNetConditions::default()
            };
            let context = &self.condition.context;
            let question = Question { sample: &input, timestep: &time, context, conditions };
            let said = residuals(self.controls, &question, step, count)?;
            let conditions = said.as_ref().map_or(conditions, |said| said.with(conditions));
            let output = self.unet.forward(&self.with_masked(&input)?, &time, context, &conditions)?;
            let output = if guides { self.guided(&output)? } else { output };
            latent = scheduler.step(&output, index, &latent, self.generator)?;
            let next = Some(index + 1).filter(|&next| next < timesteps.len());
            latent = self.kept(scheduler, latent, next)?;
            seen(step + 1, count, &latent)?;
        }
        Ok(latent)
    }

    /// A network that was distilled to take the scale needs no second answer.
    fn guides(&self) -> bool {
        self.options.guides() && self.unet.config().time_cond_proj_dim.is_none()
    }

    /// The guidance scale of such a network as waves, (1, width).
    fn guidance_waves(&self, like: &Tensor) -> Result<Option<Tensor>> {
        let Some(width) = self.unet.config().time_cond_proj_dim else { return Ok(None) };
        let scale = Tensor::from_vec(vec![(1000.0 * (self.options.guidance_scale - 1.0)) as f32], [1])?;
        timestep_waves(&scale, width, false, 1.0)?.to_dtype(like.dtype())?.to_device(like.device()).map(Some)
    }

    fn guided(&self, output: &Tensor) -> Result<Tensor> {
        let (without, with) = (output.narrow(0, 0, 1)?, output.narrow(0, 1, 1)?);
        let guided = guidance::classifier_free(&without, &with, self.options.guidance_scale)?;
        if self.options.guidance_rescale == 0.0 {
            return Ok(guided);
        }
        guidance::rescale(&guided, &with, self.options.guidance_rescale)
    }

    /// A network of 9 channels sees the mask and the masked picture too.
    fn with_masked(&self, input: &Tensor) -> Result<Tensor> {
        let Some(Painted { mask, masked_latent: Some(masked), .. }) = self.painted else { return Ok(input.clone()) };
        let batch = input.dim(0)?;
        let repeated = |x: &Tensor| Tensor::cat(&vec![x; batch], 0);
        Tensor::cat(&[input, &repeated(mask)?, &repeated(masked)?], 1)
    }

    /// Outside of the mask the picture stays as it was, with the noise of the timestep of index `next`.
    fn kept(&self, scheduler: &dyn Scheduler, latent: Tensor, next: Option<usize>) -> Result<Tensor> {
        let Some(Painted { latent: original, mask, masked_latent: None }) = self.painted else { return Ok(latent) };
        let noisy = match next {
            Some(index) => scheduler.add_noise_at(original, &self.noise, index)?,
            None => original.clone(),
        };
        mask.mul_scalar(-1.0)?.add_scalar(1.0)?.mul(&noisy)?.add(&mask.mul(&latent)?)
    }
}

/// The first timestep's index for a picture of which `strength` is drawn anew.
///
/// # Errors
/// If that is less than one step.
pub(super) fn first_index(scheduler: &dyn Scheduler, steps: usize, strength: f64) -> Result<usize> {
    let drawn = ((steps as f64 * strength) as usize).min(steps);
    let first = (steps - drawn) * scheduler.order();
    if drawn == 0 || first >= scheduler.timesteps().len() {
        return Err(Error::argument("draw", format!("strength {strength} of {steps} steps is less than one step")));
    }
    Ok(first)
}

/// SDXL's numbers: the original size, the corner of the crop, and the size that is drawn.
pub(super) fn time_ids([height, width]: [usize; 2], dtype: DType) -> Result<Tensor> {
    let numbers = [height, width, 0, 0, height, width].map(|n| n as f32);
    Tensor::from_vec(numbers.to_vec(), [1, 6])?.to_dtype(dtype)
}
