//! `--controlnet`: a copy of the U-Net's way down sees an edge map and steers the U-Net, which stays as it is.

use crate::data::{Batch, ENDLESS, Pictures};
use crate::judge::Judge;
use crate::painter::trainer_options;
use crate::stage::{Stage, Training};
use crate::studio::{Job, Painter, Studio, open_unet, whole_text};
use kiln::data::{Combinations, Mnist, Style, edges};
use kiln::diffusion::unet::{Control, ControlNetInput, ControlNetModel, UNetConditions};
use kiln::diffusion::{Denoiser, DiffusionTrainer, Samples};
use kiln::nn::StateDict;
use kiln::prelude::*;
use kiln::pretrained::save_pretrained;
use kiln::report::save_captioned_grid;
use kiln::{Error, Result, Tensor};
use std::path::Path;
use std::sync::Mutex;

/// The learning rate at its height.
const LR: f64 = 1e-3;
/// From this strength on an edge is one.
const EDGE: f64 = 0.3;
/// Pictures in the grid.
const SHOWN: usize = 8;

/// A U-Net that a ControlNet steers, by the edge maps that were set last.
struct Steered {
    unet: Painter,
    controlnet: ControlNetModel,
    edges: Mutex<Option<Tensor>>,
}

impl Steered {
    /// Sets the edge maps (B, 1, 32, 32) that the next passes follow.
    fn follow(&self, edges: Tensor) -> Result<()> {
        *self.edges.lock().map_err(|e| Error::argument("controlnet", e.to_string()))? = Some(edges);
        Ok(())
    }
}

impl Denoiser for Steered {
    fn predict(&self, x: &Tensor, timesteps: &Tensor, condition: Option<&Tensor>) -> Result<Tensor> {
        let edges = self.edges.lock().map_err(|e| Error::argument("controlnet", e.to_string()))?.clone();
        let edges = edges.ok_or_else(|| Error::argument("controlnet", "there are no edge maps to follow"))?;
        // Guidance asks twice for each picture, without its text and with it.
        let times = x.dim(0)? / edges.dim(0)?.max(1);
        let edges = Tensor::cat(&vec![&edges; times], 0)?;
        let whole = condition.map(whole_text).transpose()?;
        let conditions = UNetConditions { class_labels: whole.as_ref(), ..UNetConditions::default() };
        let residuals = self.controlnet.forward(x, timesteps, condition, &Control::new(&edges), &conditions)?;
        self.unet.0.forward(x, timesteps, condition, &residuals.with(conditions))
    }
}

struct Steering<'a> {
    studio: &'a Studio,
    trainer: DiffusionTrainer<Steered>,
}

impl Steering<'_> {
    fn draw(&mut self, texts: &[String], wanted: &Tensor, seed: u64) -> Result<Tensor> {
        let trainer = &mut self.trainer;
        self.studio.draw(texts, seed, |Job { rows, scheduler, noise, sampling, generator }| -> Result<Samples> {
            trainer.network().follow(wanted.narrow(0, rows.start, rows.len())?)?;
            trainer.sample(scheduler, noise, sampling, generator)
        })
    }
}

impl Training for Steering<'_> {
    const COLUMNS: &'static [&'static str] = &["loss", "grad_norm", "lr"];

    fn steps(&self) -> u64 {
        self.trainer.steps()
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>> {
        let (latents, states) = (self.studio.latents(&batch.pictures)?, self.studio.states(&batch.tokens)?);
        self.trainer.network().follow(edges(&batch.pictures)?)?;
        let done = self.trainer.step(&latents, Some(&states))?;
        Ok(vec![done.loss, done.grad_norm, done.lr])
    }

    fn state_dict(&self) -> Result<StateDict> {
        self.trainer.state_dict()
    }

    fn load_state_dict(&mut self, state: &StateDict) -> Result<()> {
        self.trainer.load_state_dict(state)
    }
}

/// How well the edges of pictures follow the maps that were asked for.
struct Match {
    /// Of the pixels with drawn edges, the share with wanted ones; of those with wanted ones, that with drawn ones.
    precision: f64,
    recall: f64,
}

impl Match {
    fn of(pictures: &Tensor, wanted: &Tensor) -> Result<Self> {
        let is_edge = |map: &Tensor| map.ge_scalar(EDGE)?.to_dtype(DType::F32);
        let (drawn, wanted) = (is_edge(&edges(pictures)?)?, is_edge(wanted)?);
        let both = drawn.mul(&wanted)?.sum(())?.item_f64()?;
        let share = |of: &Tensor| Ok::<_, Error>(both / of.sum(())?.item_f64()?.max(1.0));
        Ok(Self { precision: share(&drawn)?, recall: share(&wanted)? })
    }
}

impl std::fmt::Display for Match {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let f1 = 2.0 * self.precision * self.recall / (self.precision + self.recall).max(1e-9);
        write!(f, "F1 of edges {f1:.3} (precision {:.3}, recall {:.3})", self.precision, self.recall)
    }
}

/// Learns to follow edges and says how well it does; `false` if Ctrl-C stopped it.
pub fn learn(stage: &Stage, studio: &Studio, judge: &Judge, mnist: &Mnist, model: &Path, judged: usize) -> Result<bool> {
    let (frozen, unet) = open_unet(model)?;
    frozen.freeze("*")?;
    let params = Params::seeded(stage.seed);
    let input = ControlNetInput { conditioning_channels: 1, conditioning_embedding_out_channels: vec![16, 32, 64], ..Default::default() };
    let controlnet = ControlNetModel::from_unet(&params, &unet.0, &input)?;
    let config = controlnet.config().clone();
    println!("{} numbers in a copy beside the U-Net's {}", params.num_parameters(), frozen.num_parameters());
    let network = Steered { unet, controlnet, edges: Mutex::new(None) };
    let trainer = DiffusionTrainer::new(network, &params, trainer_options(stage, studio, LR, None))?;
    let mut training = Steering { studio, trainer };
    let lessons = Pictures::new(&mnist.train, &[Style::Plain], Combinations::Training, ENDLESS, stage.seed.wrapping_add(8))?;
    if !stage.train(&mut training, lessons)? {
        return Ok(false);
    }
    training.trainer.ema().evaluate(|| save_pretrained(model.join("controlnet"), &config, &params, u64::MAX))?;

    let real = Pictures::new(&mnist.test, &[Style::Plain], Combinations::HeldOut, judged, stage.seed.wrapping_add(9))?.first(judged)?;
    let wanted = edges(&real.pictures)?;
    let again = studio.pictures(&studio.latents(&real.pictures)?)?;
    let free = studio.draw_with(&training.trainer.network().unet, &real.captions, stage.seed)?;
    let steered = training.draw(&real.captions, &wanted, stage.seed)?;
    println!("against the edges of {judged} real pictures of held-out combinations, pixel for pixel:");
    for (name, pictures) in [("the pictures through the autoencoder", &again), ("without control", &free), ("with control", &steered)] {
        let marks = judge.marks(pictures, &real.attributes, Style::Plain)?;
        println!("  {name}: {}; {marks}", Match::of(pictures, &wanted)?);
    }
    let shown = SHOWN.min(judged);
    let as_picture = wanted.mul_scalar(2.0)?.add_scalar(-1.0)?.expand([judged, 3, crate::SIDE, crate::SIDE])?;
    let rows = [&real.pictures, &as_picture, &free, &steered].map(|pictures| pictures.narrow(0, 0, shown));
    let rows = Tensor::cat(&rows.into_iter().collect::<Result<Vec<_>>>()?, 0)?;
    let path = stage.folder.join("edges.png");
    save_captioned_grid(&path, &rows, shown, &["real pictures", "their edges", "drawn from the caption", "and from the edges"])?;
    println!("{} shows some", path.display());
    Ok(true)
}
