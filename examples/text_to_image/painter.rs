//! The third stage: the U-Net learns to draw latents from what the text tower says, and is asked for combinations it never saw.

use crate::autoencoder::LATENT_CHANNELS;
use crate::data::{Batch, ENDLESS, Pictures};
use crate::judge::Judge;
use crate::stage::{Stage, Training};
use crate::studio::{Painter, Studio, noise_schedule, open_unet};
use crate::towers;
use kiln::data::{Attributes, Combinations, Mnist, Style};
use kiln::diffusion::unet::{UNet2dConditionConfig, UNet2dConditionModel};
use kiln::diffusion::{Denoiser, DiffusionTrainer, DiffusionTrainerOptions};
use kiln::nn::StateDict;
use kiln::prelude::*;
use kiln::pretrained::save_pretrained;
use kiln::report::save_captioned_grid;
use kiln::{Result, Tensor};
use std::path::Path;

/// Prompts in a grid, and pictures of each.
const GRID: (usize, usize) = (8, 8);

/// How any of the networks here is trained.
pub fn trainer_options(stage: &Stage, studio: &Studio, lr: f64, autocast: Option<DType>) -> DiffusionTrainerOptions {
    DiffusionTrainerOptions {
        unconditional: Some(studio.nothing.clone()),
        lr,
        betas: (0.9, 0.99),
        // Runs are short: an average over a thousand steps would lag behind.
        ema_decay: 0.995,
        steps: stage.total,
        warmup_steps: 100.min(stage.total / 10),
        autocast,
        seed: stage.seed,
        ..DiffusionTrainerOptions::new(noise_schedule())
    }
}

/// Prompts for combinations that training never shows, and what they ask for.
pub fn held_out(mnist: &Mnist, count: usize, seed: u64) -> Result<(Vec<Attributes>, Vec<String>)> {
    let batch = Pictures::new(&mnist.test, &[Style::Plain], Combinations::HeldOut, count, seed)?.first(count)?;
    Ok((batch.attributes, batch.captions))
}

/// The prompts of a grid, each as often as it has columns.
pub fn repeated(prompts: &[String], columns: usize) -> Vec<String> {
    prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), columns)).collect()
}

/// A denoising network in training. Also what [`style`](crate::style) trains.
pub struct Painting<'a, N> {
    pub studio: &'a Studio,
    pub trainer: DiffusionTrainer<N>,
    /// What it draws to show how far it has come.
    pub prompts: Vec<String>,
}

impl<N: Denoiser> Painting<'_, N> {
    /// A picture of each of `texts`, by the average of the weights.
    pub fn draw(&mut self, texts: &[String], seed: u64) -> Result<Tensor> {
        let trainer = &mut self.trainer;
        self.studio.draw(texts, seed, |job| trainer.sample(job.scheduler, job.noise, job.sampling, job.generator))
    }
}

impl<N: Denoiser> Training for Painting<'_, N> {
    const COLUMNS: &'static [&'static str] = &["loss", "grad_norm", "lr"];

    fn steps(&self) -> u64 {
        self.trainer.steps()
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        let (latents, states) = (self.studio.latents(&batch.pictures)?, self.studio.states(&batch.tokens)?);
        let done = self.trainer.step(&latents, Some(&states))?;
        Ok(vec![done.loss, done.grad_norm, done.lr])
    }

    fn state_dict(&self) -> Result<StateDict> {
        self.trainer.state_dict()
    }

    fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.trainer.load_state_dict(state)
    }

    fn show(&mut self, folder: &Path) -> Result<()> {
        let prompts = self.prompts.clone();
        let pictures = self.draw(&repeated(&prompts, GRID.1), self.trainer.options().seed ^ 0x6121D)?;
        save_captioned_grid(&folder.join(format!("step_{:05}.png", self.trainer.steps())), &pictures, GRID.1, &prompts)
    }
}

fn config() -> UNet2dConditionConfig {
    UNet2dConditionConfig {
        in_channels: LATENT_CHANNELS,
        out_channels: LATENT_CHANNELS,
        // Down to 2 × 2, where the zeros around tell every pixel where it is.
        block_out_channels: vec![64, 128, 128],
        // Attention costs most where there are many pixels; the text reaches those through the embedding of the time.
        down_block_types: ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"].map(Into::into).to_vec(),
        up_block_types: ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"].map(Into::into).to_vec(),
        layers_per_block: 1.into(),
        norm_num_groups: 16,
        attention_head_dim: 4.into(), // heads
        cross_attention_dim: towers::WIDTH.into(),
        class_embed_type: Some("projection".into()),
        projection_class_embeddings_input_dim: Some(towers::WIDTH),
        ..UNet2dConditionConfig::default()
    }
}

/// Trains the U-Net and saves the average of its weights in `model`; `false` if Ctrl-C stopped it.
pub fn train(stage: &Stage, studio: &Studio, mnist: &Mnist, model: &Path, lr: f64, autocast: Option<DType>) -> Result<bool> {
    let (config, params) = (config(), Params::seeded(stage.seed));
    let unet = Painter(UNet2dConditionModel::new(&params, &config)?);
    println!("{}: {} parameters", stage.name, params.num_parameters());
    let trainer = DiffusionTrainer::new(unet, &params, trainer_options(stage, studio, lr, autocast))?;
    let prompts = held_out(mnist, GRID.0, stage.seed.wrapping_add(5))?.1;
    let mut training = Painting { studio, trainer, prompts };
    if !stage.train(&mut training, Pictures::new(&mnist.train, &[Style::Plain], Combinations::Training, ENDLESS, stage.seed)?)? {
        return Ok(false);
    }
    training.trainer.ema().evaluate(|| save_pretrained(model.join("unet"), &config, &params, u64::MAX))?;
    noise_schedule().save(model.join("scheduler/scheduler_config.json"))?;
    Ok(true)
}

/// Draws combinations that training never showed, and says how many are right.
pub fn examine(studio: &Studio, judge: &Judge, mnist: &Mnist, model: &Path, out: &Path, count: usize, seed: u64) -> Result<()> {
    let (_, unet) = open_unet(model)?;
    let real = Pictures::new(&mnist.test, &[Style::Plain], Combinations::HeldOut, count, seed)?.first(count)?;
    let again = studio.pictures(&studio.latents(&real.pictures)?)?;
    println!("{count} real pictures of held-out combinations: {}", judge.marks(&real.pictures, &real.attributes, Style::Plain)?);
    println!("the same through the autoencoder: {}", judge.marks(&again, &real.attributes, Style::Plain)?);
    let (attributes, captions) = held_out(mnist, count, seed)?;
    let drawn = studio.draw_with(&unet, &captions, seed)?;
    println!("{count} drawn pictures of held-out combinations: {}", judge.marks(&drawn, &attributes, Style::Plain)?);
    draw_prompts(studio, &unet, &captions[..GRID.0.min(count)], &out.join("samples.png"), seed)
}

/// A row of pictures for each prompt.
pub fn draw_prompts(studio: &Studio, unet: &Painter, prompts: &[String], path: &Path, seed: u64) -> Result<()> {
    let pictures = studio.draw_with(unet, &repeated(prompts, GRID.1), seed)?;
    save_captioned_grid(path, &pictures, GRID.1, prompts)?;
    println!("a row for each prompt: {}", path.display());
    Ok(())
}
