//! ControlNets of a run.

use crate::diffusion::ldm::controlnet_from_ldm;
use crate::diffusion::unet::{Control, ControlNetConfig, ControlNetModel, Residuals, UNetConditions};
use crate::nn::{Params, StateDict};
use crate::pretrained::{build_pretrained, load_pretrained, read_config};
use kiln_tensor::io::safetensors;
use kiln_tensor::{Error, Result, Tensor};
use std::path::Path;
use std::sync::Arc;

/// A picture that steers, and the network that reads it.
#[derive(Clone)]
pub struct ControlInput {
    /// The network.
    pub network: Arc<ControlNetModel>,
    /// The picture, (1, C, H, W) in [0, 1]; brought to the size that is drawn.
    pub image: Tensor,
    /// How much it counts.
    pub conditioning_scale: f64,
    /// Lets the network lead without a prompt. One with `global_pool_conditions` always steers the answer to the prompt only.
    pub guess_mode: bool,
    /// The share of the steps at which it begins and ends.
    pub span: (f64, f64),
}

impl ControlInput {
    /// With scale 1, in all steps.
    pub fn new(network: Arc<ControlNetModel>, image: &Tensor) -> Self {
        Self { network, image: image.clone(), conditioning_scale: 1.0, guess_mode: false, span: (0.0, 1.0) }
    }

    /// Loads a ControlNet: a folder of `diffusers`.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn load_network(folder: impl AsRef<Path>, params: &Params) -> Result<Arc<ControlNetModel>> {
        params.eval();
        Ok(Arc::new(load_pretrained::<ControlNetConfig>(folder, params)?.1))
    }

    /// Loads a ControlNet of a single file in LDM's names, with the `config.json` in `folder`.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn load_network_file(file: impl AsRef<Path>, folder: impl AsRef<Path>, params: &Params) -> Result<Arc<ControlNetModel>> {
        params.eval();
        let config: ControlNetConfig = read_config(folder.as_ref())?;
        let tensors = safetensors::load(file)?;
        let own: StateDict =
            tensors.into_iter().map(|(name, t)| (name.strip_prefix("control_model.").unwrap_or(&name).to_owned(), t)).collect();
        let state = controlnet_from_ldm(own, config.layers_per_block.first().unwrap_or(2))?;
        Ok(Arc::new(build_pretrained(config, state, params)?.1))
    }

    /// An error unless scale and span make sense.
    pub(super) fn check(&self) -> Result<()> {
        let (start, end) = self.span;
        if !self.conditioning_scale.is_finite() || !(0.0..=1.0).contains(&start) || !(start..=1.0).contains(&end) {
            let message = format!("conditioning_scale {} or span {start} to {end} makes no sense", self.conditioning_scale);
            return Err(Error::argument("controlnet", message));
        }
        Ok(())
    }

    /// Its settings, as a picture's metadata give them.
    pub(super) fn text(&self) -> String {
        let (start, end) = self.span;
        let guess = if self.guess_mode { ", guess mode" } else { "" };
        format!("scale {}, from {start} to {end} of the steps{guess}", self.conditioning_scale)
    }

    /// Whether step `index` of `count` is steered.
    fn is_on(&self, index: usize, count: usize) -> bool {
        let (now, next) = (index as f64 / count as f64, (index + 1) as f64 / count as f64);
        now >= self.span.0 && next <= self.span.1
    }
}

/// What the network is asked in a step.
pub(super) struct Question<'a> {
    /// (B, C, H, W), B = 2 with guidance: without and with the prompt.
    pub sample: &'a Tensor,
    pub timestep: &'a Tensor,
    pub context: &'a Tensor,
    pub conditions: UNetConditions<'a>,
}

/// What all ControlNets that are on say, summed.
pub(super) fn residuals(controls: &[ControlInput], question: &Question<'_>, index: usize, count: usize) -> Result<Option<Residuals>> {
    let mut sum: Option<Residuals> = None;
    for control in controls.iter().filter(|control| control.is_on(index, count)) {
        let said = ask(control, question)?;
        sum = Some(match sum {
            Some(sum) => sum.add(&said)?,
            None => said,
        });
    }
    Ok(sum)
}

fn ask(control: &ControlInput, question: &Question<'_>) -> Result<Residuals> {
    let batch = question.sample.dim(0)?;
    let guesses = control.guess_mode || control.network.config().global_pool_conditions;
    let guided_guess = guesses && batch == 2;
    let last = |x: &Tensor| if guided_guess { x.narrow(0, batch - 1, 1) } else { Ok(x.clone()) };
    let (sample, context) = (last(question.sample)?, last(question.context)?);
    let text = question.conditions.text_embeds.map(last).transpose()?;
    let ids = question.conditions.time_ids.map(last).transpose()?;
    let conditions = UNetConditions { text_embeds: text.as_ref(), time_ids: ids.as_ref(), ..UNetConditions::default() };
    let image = Tensor::cat(&vec![&control.image; sample.dim(0)?], 0)?.to_dtype(sample.dtype())?.to_device(sample.device())?;
    let asked = Control { image: &image, conditioning_scale: control.conditioning_scale, guess_mode: control.guess_mode };
    let said = control.network.forward(&sample, question.timestep, &context, &asked, &conditions)?;
    if !guided_guess {
        return Ok(said);
    }
    // The network is asked with the prompt only, and says nothing without.
    let both = |x: &Tensor| Tensor::cat(&[&x.zeros_like()?, x], 0);
    Ok(Residuals { down: said.down.iter().map(both).collect::<Result<_>>()?, mid: both(&said.mid)? })
}
