//! A stage of training: its loop with progress, curves, checkpoints and Ctrl-C, whatever is trained.

use crate::data::{Batch, ENDLESS, Pictures};
use kiln::data::{Dataset, Loader, LoaderOptions, LoaderState};
use kiln::nn::StateDict;
use kiln::report::{Curve, MetricsCsv, Progress, plot_curves};
use kiln::{Error, Result, io};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Steps between checkpoints.
const SAVE_EVERY: u64 = 100;
/// Steps between looks at what has been learnt.
const SHOW_EVERY: u64 = 500;

/// What a stage trains.
pub trait Training {
    /// What [`step`](Training::step) returns; the first is drawn as a curve.
    const COLUMNS: &'static [&'static str];

    /// Steps so far.
    fn steps(&self) -> u64;

    /// One step.
    fn step(&mut self, batch: &Batch) -> Result<Vec<f64>>;

    /// Everything that the next step depends on.
    fn state_dict(&self) -> Result<StateDict>;

    /// Continues from a saved state.
    fn load_state_dict(&mut self, state: &StateDict) -> Result<()>;

    /// Writes pictures of what has been learnt into `folder`.
    fn show(&mut self, _folder: &Path) -> Result<()> {
        Ok(())
    }
}

/// How a stage goes about it.
pub struct Stage<'a> {
    pub name: &'a str,
    /// Where its checkpoint, curves and pictures go.
    pub folder: PathBuf,
    pub total: u64,
    pub batch_size: usize,
    pub seed: u64,
    /// Whether to continue from its checkpoint, if there is one.
    pub resume: bool,
    pub stop: &'a AtomicBool,
}

/// The checkpoint of the stage in `folder`.
pub fn checkpoint(folder: &Path) -> PathBuf {
    folder.join("checkpoint.safetensors")
}

/// A stage on its way.
struct Run<'a, T> {
    stage: &'a Stage<'a>,
    training: &'a mut T,
    loader: Loader<Pictures>,
    metrics: MetricsCsv,
}

impl Stage<'_> {
    /// Trains to the end; `false` if Ctrl-C stopped it.
    pub fn train<T: Training>(&self, training: &mut T, pictures: Pictures) -> Result<bool> {
        // Pictures without end are random in order, and those that are alike must meet in a batch.
        let shuffle = pictures.len() < ENDLESS;
        let options = LoaderOptions { batch_size: self.batch_size, shuffle, seed: self.seed, drop_last: true, ..LoaderOptions::default() };
        let loader = Loader::new(pictures, options)?;
        if loader.batches() == 0 {
            return Err(Error::argument(self.name, format!("there are too few pictures for a batch of {}", self.batch_size)));
        }
        let columns: Vec<&str> = ["step"].into_iter().chain(T::COLUMNS.iter().copied()).collect();
        let metrics = MetricsCsv::create(&self.folder.join("metrics.csv"), &columns)?;
        let mut run = Run { stage: self, training, loader, metrics };
        if self.resume && checkpoint(&self.folder).exists() {
            run.restore()?;
        }
        run.train()
    }
}

impl<T: Training> Run<'_, T> {
    fn train(&mut self) -> Result<bool> {
        let Stage { name, total, .. } = *self.stage;
        if self.training.steps() >= total {
            println!("{name}: done at step {}", self.training.steps());
            return Ok(true);
        }
        let progress = Progress::new(total, name);
        while self.training.steps() < total {
            // An epoch's end: the next one begins.
            let Some(batch) = self.loader.next().transpose()? else { continue };
            let values = self.training.step(&batch)?;
            let step = self.training.steps();
            progress.set(step, &[(T::COLUMNS[0], values[0])]);
            self.metrics.write(&[vec![step as f64], values].concat())?;
            let stopped = self.stage.stop.load(Relaxed);
            if step.is_multiple_of(SHOW_EVERY) || step == total {
                self.training.show(&self.stage.folder)?;
                let curve = Curve::new(T::COLUMNS[0], self.metrics.column(T::COLUMNS[0]));
                plot_curves(&self.stage.folder.join("loss.png"), name, &[curve])?;
            }
            if stopped || step.is_multiple_of(SAVE_EVERY) || step == total {
                self.save()?;
            }
            if stopped {
                progress.abandon();
                println!("{name}: stopped at step {step}");
                return Ok(false);
            }
        }
        progress.finish();
        Ok(true)
    }

    fn save(&mut self) -> Result<()> {
        let mut state = self.training.state_dict()?;
        state.insert("loader.position".into(), self.loader.state().to_tensor()?);
        self.metrics.flush()?;
        io::safetensors::save(checkpoint(&self.stage.folder), &state, &BTreeMap::new())
    }

    fn restore(&mut self) -> Result<()> {
        let path = checkpoint(&self.stage.folder);
        let mut state = io::safetensors::load(&path)?;
        let missing = || Error::format("resume", format!("{} holds no loader.position", path.display()));
        let position = state.remove("loader.position").ok_or_else(missing)?;
        self.training.load_state_dict(&state)?;
        self.loader.resume(LoaderState::from_tensor(&position)?)?;
        println!("{}: resumed at step {}", self.stage.name, self.training.steps());
        // What was written after the checkpoint will be written again.
        let steps = self.training.steps() as f64;
        self.metrics.restore(|row| row[0] <= steps)
    }
}
