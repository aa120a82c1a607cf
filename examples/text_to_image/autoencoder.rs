//! The first stage: an autoencoder, in whose latents all drawing happens. It sees all styles, as a large one sees all kinds of pictures.

use crate::data::{Batch, ENDLESS, Pictures};
use crate::stage::{Stage, Training};
use kiln::data::{Combinations, ImageSet, Style};
use kiln::nn::StateDict;
use kiln::prelude::*;
use kiln::report::save_grid;
use kiln::transformer::save_pretrained;
use kiln::vae::{AutoencoderKl, AutoencoderKlConfig, CoderBlock, VaeTrainer, VaeTrainerOptions};
use kiln::{Result, Tensor};
use std::path::Path;

/// Pictures that are shown with their reconstructions.
const SHOWN: usize = 16;
/// Pictures whose latents say how far latents spread.
const MEASURED: usize = 512;

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
        let done = self.trainer.step(&batch.pictures)?;
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
        let again = no_grad(|| vae.decode(&vae.encode(&self.shown)?.mode()))?;
        save_grid(&folder.join("reconstructions.png"), &Tensor::cat(&[&self.shown, &again], 0)?, SHOWN)
    }
}

fn config() -> AutoencoderKlConfig {
    let levels = vec![CoderBlock::Plain; 3];
    AutoencoderKlConfig {
        down_block_types: levels.clone(),
        up_block_types: levels,
        block_out_channels: vec![16, 32, 64],
        norm_num_groups: 8,
        ..AutoencoderKlConfig::default()
    }
}

/// Trains the autoencoder and saves it in `model`; `false` if Ctrl-C stopped it.
pub fn train(stage: &Stage, digits: &ImageSet, model: &Path) -> Result<bool> {
    let (mut config, params) = (config(), Params::seeded(stage.seed));
    let options = VaeTrainerOptions { lr: 2e-3, penalty_weight: 2e-3, steps: Some(stage.total), ..VaeTrainerOptions::default() };
    let trainer = VaeTrainer::new(config.build(&params)?, params.clone(), options)?;
    let shown = Pictures::new(digits, &Style::ALL, Combinations::All, SHOWN, stage.seed + 1)?.first(SHOWN)?.pictures;
    let mut training = Autoencoding { trainer, shown };
    if !stage.train(&mut training, Pictures::new(digits, &Style::ALL, Combinations::All, ENDLESS, stage.seed)?)? {
        return Ok(false);
    }
    // The diffusion model expects latents of mean 0 and variance 1.
    let plain = Pictures::new(digits, &[Style::Plain], Combinations::Training, MEASURED, stage.seed + 1)?.first(MEASURED)?;
    let latents = no_grad(|| Ok::<_, kiln::Error>(training.trainer.model().encode(&plain.pictures)?.mode()))?;
    config.shift_factor = Some(latents.mean(())?.item_f64()?);
    config.scaling_factor = 1.0 / latents.std((), 1.0)?.item_f64()?.max(1e-6);
    save_pretrained(model.join("vae"), &config, &params, u64::MAX)?;
    Ok(true)
}
