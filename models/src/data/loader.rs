//! Shuffled batches, made ahead of time on a worker thread, that can be resumed in the middle of an epoch.
//!
//! The order of samples is a function of seed and epoch alone, and a batch's random numbers one of seed, epoch and batch:
//! that is why a position of two numbers is all the state there is.

use super::dataset::Dataset;
use super::rng::Rng;
use crate::nn::StateDict;
use kiln_tensor::io::safetensors;
use kiln_tensor::{Error, Result, Tensor, profile};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

/// How a [`Loader`] makes batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoaderOptions {
    /// Samples in a batch; at least 1.
    pub batch_size: usize,
    /// Whether each epoch has an order of its own; otherwise it is that of the data set.
    pub shuffle: bool,
    /// The seed of the order and of augmentation.
    pub seed: u64,
    /// Whether an incomplete last batch is left out.
    pub drop_last: bool,
    /// Batches made ahead of time; 0 makes each batch on the caller's thread when it is asked for.
    pub prefetch: usize,
}

impl Default for LoaderOptions {
    /// Batches of 128, shuffled with seed 0, the last one kept, two made ahead.
    fn default() -> Self {
        Self { batch_size: 128, shuffle: true, seed: 0, drop_last: false, prefetch: 2 }
    }
}

/// Where a [`Loader`] stands: save it with a checkpoint, and [`Loader::resume`] goes on with the next batch, bit for bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoaderState {
    /// The seed of the order.
    pub seed: u64,
    /// The epoch, counted from 0.
    pub epoch: u64,
    /// The batch of that epoch that comes next, counted from 0.
    pub batch: u64,
    /// Samples in the data set; a state fits only a data set of the same length.
    pub samples: u64,
    /// Samples in a batch; a state fits only a loader with the same.
    pub batch_size: u64,
}

impl LoaderState {
    /// The five numbers as a tensor of i64, to save among others.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn to_tensor(self) -> Result<Tensor> {
        let Self { seed, epoch, batch, samples, batch_size } = self;
        Tensor::from_vec([seed, epoch, batch, samples, batch_size].map(|v| v as i64).to_vec(), 5)
    }

    /// What [`to_tensor`](LoaderState::to_tensor) gave.
    ///
    /// # Errors
    /// If it is no tensor of five numbers of i64.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let [seed, epoch, batch, samples, batch_size] = tensor.to_vec::<i64>()?[..] else {
            return Err(Error::format("loader", format!("a position is five numbers, found {}", tensor.shape())));
        };
        let [seed, epoch, batch, samples, batch_size] = [seed, epoch, batch, samples, batch_size].map(|v| v as u64);
        Ok(Self { seed, epoch, batch, samples, batch_size })
    }

    /// Writes a checkpoint: a safetensors file of a trainer's `state`, and this position in the data as `loader.position`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_with(self, path: impl AsRef<Path>, mut state: StateDict) -> Result<()> {
        state.insert(POSITION.into(), self.to_tensor()?);
        safetensors::save(path, &state, &BTreeMap::new())
    }

    /// What [`save_with`](LoaderState::save_with) wrote: the trainer's state, and the position.
    ///
    /// # Errors
    /// If the file is missing or malformed, or has no position.
    pub fn load_with(path: impl AsRef<Path>) -> Result<(StateDict, Self)> {
        let mut state = safetensors::load(&path)?;
        let missing = || Error::format("resume", format!("{} holds no {POSITION}", path.as_ref().display()));
        let position = Self::from_tensor(&state.remove(POSITION).ok_or_else(missing)?)?;
        Ok((state, position))
    }
}

/// Where a checkpoint has the position.
const POSITION: &str = "loader.position";

/// An iterator over the batches of a data set, epoch after epoch.
///
/// It ends at the end of each epoch and then stands at the start of the next, so `for batch in &mut loader { … }` is one epoch.
/// A batch that fails is delivered as an error in its place; the batch after it comes next.
///
/// ```
/// use kiln_models::data::{ImageSet, Loader, LoaderOptions};
/// let digits = ImageSet::new(vec![0; 10 * 4], (0..10).collect(), [1, 2, 2])?;
/// let mut loader = Loader::new(digits, LoaderOptions { batch_size: 4, ..Default::default() })?;
/// for epoch in 0..2 {
///     for batch in &mut loader {
///         assert!(batch?.labels.numel() <= 4);
///     }
/// }
/// assert_eq!(loader.state().epoch, 2);
/// # Ok::<(), kiln_tensor::Error>(())
/// ```
pub struct Loader<D: Dataset> {
    plan: Arc<Plan<D>>,
    position: Position,
    worker: Option<Worker<D::Batch>>,
}

impl<D: Dataset + 'static> Loader<D> {
    /// A loader that stands at the first batch of epoch 0. No thread starts before the first batch is asked for.
    ///
    /// # Errors
    /// If the batch size is 0.
    pub fn new(dataset: D, options: LoaderOptions) -> Result<Self> {
        if options.batch_size == 0 {
            return Err(Error::argument("loader", "the batch size must be at least 1"));
        }
        let plan = Arc::new(Plan { dataset, options });
        Ok(Self { plan, position: Position { epoch: 0, batch: 0 }, worker: None })
    }

    /// The data set.
    pub fn dataset(&self) -> &D {
        &self.plan.dataset
    }

    /// Batches in an epoch.
    pub fn batches(&self) -> u64 {
        self.plan.batches()
    }

    /// Where the loader stands: at the batch that [`next`](Iterator::next) would give.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            seed: self.plan.options.seed,
            epoch: self.position.epoch,
            batch: self.position.batch,
            samples: self.plan.dataset.len() as u64,
            batch_size: self.plan.options.batch_size as u64,
        }
    }

    /// Goes to where another loader stood when `state` was taken from it.
    ///
    /// # Errors
    /// If the state is from another seed, batch size or length of the data set, or lies beyond the epoch's last batch.
    pub fn resume(&mut self, state: LoaderState) -> Result<()> {
        let here = self.state();
        let moved = LoaderState { epoch: state.epoch, batch: state.batch, ..here };
        if state != moved || state.batch > self.batches() {
            let batches = self.batches();
            return Err(Error::argument("loader", format!("{here:?} of {batches} batches an epoch cannot resume {state:?}")));
        }
        self.worker = None;
        self.position = Position { epoch: state.epoch, batch: state.batch };
        Ok(())
    }

    /// The next batch from the worker, which is started if there is none.
    fn fetch(&mut self) -> Result<D::Batch> {
        let mut worker = match self.worker.take() {
            Some(worker) => worker,
            None => Worker::start(self.plan.clone(), self.position)?,
        };
        let batch = worker.receive();
        self.worker = Some(worker);
        batch
    }
}

impl<D: Dataset + 'static> Iterator for Loader<D> {
    type Item = Result<D::Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.position.batch >= self.plan.batches() {
            self.position = Position { epoch: self.position.epoch.wrapping_add(1), batch: 0 };
            return None;
        }
        let _running = profile::composite(|| "Loader.next".into());
        let batch = match self.plan.options.prefetch {
            0 => self.plan.make(self.position, &self.plan.order(self.position.epoch)),
            _ => self.fetch(),
        };
        self.position.batch += 1;
        Some(batch)
    }
}

/// A batch's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    epoch: u64,
    batch: u64,
}

/// What loader and worker share: enough to make any batch.
struct Plan<D> {
    dataset: D,
    options: LoaderOptions,
}

impl<D: Dataset> Plan<D> {
    fn batches(&self) -> u64 {
        let (samples, size) = (self.dataset.len(), self.options.batch_size);
        (if self.options.drop_last { samples / size } else { samples.div_ceil(size) }) as u64
    }

    /// The order of an epoch's samples.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.dataset.len()).collect();
        if self.options.shuffle {
            Rng::keyed(self.options.seed, epoch, u64::MAX).shuffle(&mut order);
        }
        order
    }

    /// The batch at `position`, with a panic of the data set turned into an error.
    fn make(&self, position: Position, order: &[usize]) -> Result<D::Batch> {
        let _running = profile::composite(|| "Loader.batch".into());
        let Position { epoch, batch } = position;
        let start = (batch as usize).saturating_mul(self.options.batch_size).min(order.len());
        let end = start.saturating_add(self.options.batch_size).min(order.len());
        let mut rng = Rng::keyed(self.options.seed, epoch, batch);
        catch_unwind(AssertUnwindSafe(|| self.dataset.batch(&order[start..end], &mut rng))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
            Err(Error::argument("loader", format!("the data set panicked at batch {batch} of epoch {epoch}: {}", text.unwrap_or_default())))
        })
    }
}

/// The thread that makes batches ahead of time.
struct Worker<B> {
    queue: Option<Receiver<Result<B>>>,
    thread: Option<JoinHandle<()>>,
}

impl<B: Send + 'static> Worker<B> {
    /// Starts a thread that makes the batches from `position` on, across epochs, until nobody listens any more.
    fn start<D: Dataset<Batch = B> + 'static>(plan: Arc<Plan<D>>, mut position: Position) -> Result<Self> {
        // The worker holds one more batch, finished and waiting for a free place.
        let (sender, receiver) = sync_channel(plan.options.prefetch.saturating_sub(1));
        let work = move || {
            loop {
                let order = plan.order(position.epoch);
                while position.batch < plan.batches() {
                    if sender.send(plan.make(position, &order)).is_err() {
                        return;
                    }
                    position.batch += 1;
                }
                position = Position { epoch: position.epoch.wrapping_add(1), batch: 0 };
            }
        };
        let thread = std::thread::Builder::new().name("kiln-loader".to_owned()).spawn(work);
        let thread = thread.map_err(|e| Error::argument("loader", format!("its thread could not be started: {e}; use prefetch: 0")))?;
        Ok(Self { queue: Some(receiver), thread: Some(thread) })
    }
}

impl<B> Worker<B> {
    fn receive(&mut self) -> Result<B> {
        let received = self.queue.as_ref().and_then(|queue| queue.recv().ok());
        received.unwrap_or_else(|| Err(Error::argument("loader", "its thread ended unexpectedly")))
    }
}

impl<B> Drop for Worker<B> {
    /// Hangs up, which ends the thread at its next batch, and waits for it.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // Panics of the data set are caught where they happen; there is nobody to tell of any other.
            let _ = thread.join();
        }
    }
}
