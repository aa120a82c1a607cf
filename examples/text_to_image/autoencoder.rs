//! The first stage: an autoencoder, in whose latents all drawing happens. It sees all styles, as a large one sees all kinds of pictures.

use crate::data::{Batch, ENDLESS, Pictures};
use crate::stage::{Stage, Training};
use kiln::data::{Combinations, ImageSet, Style};
use kiln::nn::StateDict;
use kiln::prelude::*;
use kiln::pretrained::save_pretrained;
use kiln::report::save_grid;
use kiln::vae::{AutoencoderKl, AutoencoderKlConfig, VaeTrainer, VaeTrainerOptions};
use kiln::{Result, Tensor, default_device};
use std::path::Path;

/// Pictures that are shown with their reconstructions.
const SHOWN: usize = 16;
/// Pictures whose latents say how far latents spread.
const MEASURED: usize = 512;

/// Height and width of the blocks of pixels that the autoencoder sees as channels of one: it learns flat colours much sooner than through
/// levels of convolutions.
pub const BLOCK: usize = 4;
/// Numbers of a latent, for a block of 48: small digits are drawn with few blocks.
pub const LATENT_CHANNELS: usize = 8;
/// Of the latents at first.
const LOG_VARIANCE: f32 = -6.0;

struct Autoencoding {
    trainer: VaeTrainer<AutoencoderKl>,
    shown: Tensor,
}

impl Training for Autoencoding {
    const COLUMNS: &'static [&'static str] = &["reconstruction", "divergence", "grad_norm"];

    fn steps(&self) -> u64 {
        self.trainer.steps()
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        let done = self.trainer.step(&to_blocks(&batch.pictures)?)?;
        Ok(vec![done.reconstruction, done.penalty, done.grad_norm])
    }

    fn state_dict(&self) -> Result<StateDict> {
        self.trainer.state_dict()
    }

    fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.trainer.load_state_dict(state)
    }

    /// Pictures above their reconstructions.
    fn show(&mut self, folder: &Path) -> Result<()> {
        let vae = self.trainer.model();
        let again = no_grad(|| from_blocks(&vae.decode(&vae.encode(&to_blocks(&self.shown)?)?.mode())?))?;
        save_grid(&folder.join("reconstructions.png"), &Tensor::cat(&[&self.shown, &again], 0)?, SHOWN)
    }
}

/// One level: the blocks have brought the pictures to the latents' resolution.
fn config() -> AutoencoderKlConfig {
    let channels = 3 * BLOCK * BLOCK;
    AutoencoderKlConfig {
        in_channels: channels,
        out_channels: channels,
        latent_channels: LATENT_CHANNELS,
        norm_num_groups: 8,
        mid_block_add_attention: false,
        sample_size: crate::SIDE / BLOCK,
        ..AutoencoderKlConfig::default()
    }
}

/// Trains the autoencoder and saves it in `model`; `false` if Ctrl-C stopped it.
pub fn train(stage: &Stage, digits: &ImageSet, model: &Path) -> Result<bool> {
    let (mut config, params) = (config(), Params::seeded(stage.seed));
    let options =
        VaeTrainerOptions { lr: 2e-3, betas: (0.9, 0.95), penalty_weight: 3e-4, steps: Some(stage.total), ..VaeTrainerOptions::default() };
    let vae = config.build(&params)?;
    if let Some(bias) = params.named("quant_conv.bias") {
        // Latents that start as little more than noise would be learnt from slowly.
        let moments = [vec![0f32; config.latent_channels], vec![LOG_VARIANCE; config.latent_channels]].concat();
        bias.set(&Tensor::from_vec(moments, 2 * config.latent_channels)?.to_device(default_device())?)?;
    }
    let trainer = VaeTrainer::new(vae, params.clone(), options)?;
    let shown = Pictures::new(digits, &Style::ALL, Combinations::All, SHOWN, stage.seed.wrapping_add(1))?.first(SHOWN)?.pictures;
    let mut training = Autoencoding { trainer, shown };
    if !stage.train(&mut training, Pictures::new(digits, &Style::ALL, Combinations::All, ENDLESS, stage.seed)?)? {
        return Ok(false);
    }
    // The diffusion model expects latents of mean 0 and variance 1.
    let plain = Pictures::new(digits, &[Style::Plain], Combinations::Training, MEASURED, stage.seed.wrapping_add(1))?.first(MEASURED)?;
    let latents = no_grad(|| Ok::<_, kiln::Error>(training.trainer.model().encode(&to_blocks(&plain.pictures)?)?.mode()))?;
    config.shift_factor = Some(latents.mean(())?.item_f64()?);
    config.scaling_factor = 1.0 / latents.std((), 1.0)?.item_f64()?.max(1e-6);
    save_pretrained(model.join("vae"), &config, &params, u64::MAX)?;
    Ok(true)
}

/// Pictures (B, C, H, W) with each block of pixels as channels.
pub fn to_blocks(pictures: &Tensor) -> Result<Tensor> {
    let ([b, c, h, w], k) = (pictures.dims_n("to_blocks")?, BLOCK);
    let split = pictures.reshape([b, c, h / k, k, w / k, k])?.permute(&[0, 1, 3, 5, 2, 4])?;
    split.reshape([b, c * k * k, h / k, w / k])
}

/// The inverse of [`to_blocks`].
pub fn from_blocks(blocks: &Tensor) -> Result<Tensor> {
    let ([b, c, h, w], k) = (blocks.dims_n("from_blocks")?, BLOCK);
    let split = blocks.reshape([b, c / (k * k), k, k, h, w])?.permute(&[0, 1, 4, 2, 5, 3])?;
    split.reshape([b, c / (k * k), h * k, w * k])
}
