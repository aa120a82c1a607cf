//! `--lora`: low-rank matrices beside the U-Net's layers learn a style from a few pictures.

use crate::data::Pictures;
use crate::judge::Judge;
use crate::painter::{Painting, held_out, trainer_options};
use crate::stage::Stage;
use crate::studio::{Studio, open_unet};
use kiln::data::{Combinations, Mnist, Style};
use kiln::diffusion::DiffusionTrainer;
use kiln::lora::{Lora, LoraConfig};
use kiln::prelude::*;
use kiln::report::{save_captioned_grid, save_grid};
use kiln::{Result, Tensor};
use std::path::Path;

/// The layers that get an adapter: the convolutions where the latents are widest, at the way in and the way out. How something is drawn is local;
/// what is drawn and where is decided below, by attention and narrower layers, which few pictures would teach those pictures only.
const TARGETS: &str = r"(conv_in|conv_out|(down_blocks\.0|up_blocks\.2)\..*(conv1|conv2|conv_shortcut))";
/// Prompts that are drawn before and after.
const SHOWN: usize = 8;
/// The learning rate at its height.
const LR: f64 = 2e-3;

/// What is learnt.
pub struct Wanted {
    pub style: Style,
    pub rank: usize,
    /// Pictures to learn from.
    pub pictures: usize,
    /// Pictures to judge by.
    pub judged: usize,
}

/// Learns a style and says what came of it; `false` if Ctrl-C stopped it.
pub fn learn(stage: &Stage, studio: &Studio, judge: &Judge, mnist: &Mnist, model: &Path, wanted: &Wanted) -> Result<bool> {
    let (params, unet) = open_unet(model)?;
    let style = wanted.style;
    let (attributes, captions) = held_out(mnist, wanted.judged, stage.seed.wrapping_add(6))?;
    let before = studio.draw_with(&unet, &captions, stage.seed)?;
    println!("before, judged as {style} pictures: {}", judge.marks(&before, &attributes, style)?);

    let config = LoraConfig { r: wanted.rank, lora_alpha: wanted.rank as f64, target_modules: TARGETS.into(), ..LoraConfig::default() };
    let lora = Lora::attach(&params, &config, &Generator::new(stage.seed))?;
    let trained: usize = lora.trainable().iter().map(|param| param.shape().numel()).sum();
    println!("rank {}: {trained} numbers beside the U-Net's {}", wanted.rank, params.num_parameters());
    let pictures = Pictures::new(&mnist.train, &[style], Combinations::Training, wanted.pictures, stage.seed.wrapping_add(7))?;
    save_grid(&stage.folder.join("lessons.png"), &pictures.first(wanted.pictures)?.pictures, 2 * SHOWN)?;
    let trainer = DiffusionTrainer::new(unet, &params, trainer_options(stage, studio, LR, None))?;
    let mut training = Painting { studio, trainer, prompts: captions.iter().take(SHOWN).cloned().collect() };
    if !stage.train(&mut training, pictures)? {
        return Ok(false);
    }
    training.trainer.ema().evaluate(|| lora.save(stage.folder.join("adapter")))?;
    let after = training.draw(&captions, stage.seed)?;
    println!("after, from the same noise: {}", judge.marks(&after, &attributes, style)?);
    let shown = SHOWN.min(wanted.judged);
    let rows = Tensor::cat(&[&before.narrow(0, 0, shown)?, &after.narrow(0, 0, shown)?], 0)?;
    let path = stage.folder.join("before_after.png");
    save_captioned_grid(&path, &rows, shown, &["before", &format!("after {} pictures in the style {style}", wanted.pictures)])?;
    println!("{} and the adapter are in {}", path.display(), stage.folder.display());
    Ok(true)
}
