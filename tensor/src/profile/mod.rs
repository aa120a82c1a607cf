//! [`profile`]: which operations ran, for how long, and how near to what the machine can do.
//!
//! An operation holds an [`Operation`] while it runs: [`operation`] at its entry. A derivative rule, an optimiser's step and the like hold a
//! [`composite`]: what runs inside of it is its doing, and counted under its name. Nothing is recorded, and nothing paid but a load of one flag, while no
//! profile is running. What is recorded here is put together in [`report`], and written for a viewer in [`trace`].

mod cost;
mod report;
mod session;
mod trace;

pub use kiln_kernels::cpu::peak::{Peaks, peaks};

pub use cost::{Cost, attention, convolution, product};
pub use report::{Grouping, Report, Row};
pub use session::{Profiler, profile};

use crate::graph::is_recomputing;
use crate::{DType, Layout, Shape, Tensor};
use kiln_kernels::cuda::{Event as GpuEvent, Gpu};
use session::{is_profiling, log};
use std::borrow::Cow;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// What a recorded span of time was.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// One operation on tensors. What it calls is recorded apart.
    Operation,
    /// The derivative rule of an operation, with all that it calls.
    Backward,
    /// Something else that is made of operations, and counted as one: a step of an optimiser.
    Composite,
    /// What the program named with [`profile_scope`].
    Scope,
}

/// A span of time in which something ran, on one thread.
#[derive(Clone, Debug)]
struct Event {
    id: u64,
    /// The span that this one lies in, on the same thread.
    parent: Option<u64>,
    kind: Kind,
    name: Cow<'static, str>,
    recomputed: bool,
    thread: usize,
    /// Nanoseconds since [`origin`].
    start: u64,
    end: u64,
    inputs: Arc<[(Shape, DType)]>,
    cost: Cost,
    bytes_read: u64,
    bytes_written: u64,
    elements_written: u64,
    /// Bytes that were in use on the device afterwards, less those before.
    memory: i64,
    gpu: Option<GpuSpan>,
}

/// The points in a GPU's queue before and after an operation's kernels.
#[derive(Clone, Debug)]
struct GpuSpan {
    ordinal: usize,
    start: Arc<GpuEvent>,
    end: Arc<GpuEvent>,
}

impl Event {
    fn ns(&self) -> u64 {
        self.end - self.start
    }

    /// What tables and traces call it.
    fn title(&self) -> String {
        let backward = if self.kind == Kind::Backward { " backward" } else { "" };
        let recomputed = if self.recomputed { " (recomputed)" } else { "" };
        format!("{}{backward}{recomputed}", self.name)
    }

    fn flop(&self) -> u64 {
        self.cost.flop(self.elements_written)
    }

    fn bytes(&self) -> u64 {
        self.cost.bytes_moved().unwrap_or(self.bytes_read + self.bytes_written)
    }
}

/// Nanoseconds since the first call.
fn now() -> u64 {
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    ORIGIN.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// An event that is not over.
struct Frame {
    event: Event,
    gpu: Option<(&'static Gpu, Option<GpuEvent>)>,
    memory: usize,
}

thread_local! {
    /// What is running on this thread, the innermost last.
    static RUNNING: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
    /// This thread's place among [`thread_names`].
    static THREAD: usize = {
        let mut names = thread_names();
        let number = names.len();
        names.push(std::thread::current().name().map_or_else(|| format!("thread {number}"), str::to_owned));
        number
    };
}

fn this_thread() -> usize {
    THREAD.with(|thread| *thread)
}

/// The names of all threads that ever ran something in a profile.
fn thread_names() -> MutexGuard<'static, Vec<String>> {
    static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());
    NAMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something that is running, until this is dropped; nothing if no profile ran when it began.
#[must_use = "what runs is recorded until this is dropped"]
pub struct Operation {
    /// 0 for nothing.
    id: u64,
    /// It belongs to the thread that it began on.
    _thread: PhantomData<*const ()>,
}

impl Operation {
    const NOTHING: Operation = Operation { id: 0, _thread: PhantomData };

    /// It turned out that there is nothing to do: nothing is recorded.
    pub(crate) fn cancel(mut self) {
        if self.id != 0 {
            let _ = end(std::mem::take(&mut self.id));
        }
    }
}

impl Drop for Operation {
    #[inline]
    fn drop(&mut self) {
        if self.id != 0 {
            finish(self.id);
        }
    }
}

/// The operation `name` of `inputs` begins; `cost` says what it takes.
///
/// What [`Tensor::build`] and its like make until the end is what it writes. An operation from outside of Kiln appears in profiles if it does the same.
///
/// ```
/// use kiln_tensor::profile::{Cost, operation, profile};
/// # use kiln_tensor::{Tensor, Result};
/// fn softsign(x: &Tensor) -> Result<Tensor> {
///     let _running = operation("softsign", &[x], || Cost::per_element(3));
///     x.div(&x.abs()?.add_scalar(1.0)?)
/// }
/// # fn main() -> Result<()> {
/// let x = Tensor::ones([2, 3], ())?;
/// let (y, report) = profile(|| softsign(&x));
/// assert_eq!(y?.dims(), [2, 3]);
/// assert_eq!(report.rows().iter().find(|row| row.name == "softsign").map(|row| row.calls), Some(1));
/// # Ok(()) }
/// ```
#[inline]
pub fn operation(name: &'static str, inputs: &[&Tensor], cost: impl FnOnce() -> Cost) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    begin(Kind::Operation, Cow::Borrowed(name), inputs, cost())
}

/// [`operation`] whose inputs are not at hand as a slice.
#[inline]
pub(crate) fn operation_with<'a>(name: &'static str, inputs: impl FnOnce() -> Vec<&'a Tensor>, cost: impl FnOnce() -> Cost) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    begin(Kind::Operation, Cow::Borrowed(name), &inputs(), cost())
}

/// The derivative rule of the operation `name` begins, given the gradient of its result.
#[inline]
pub fn backward(name: &'static str, grad: &Tensor) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    begin(Kind::Backward, Cow::Borrowed(name), &[grad], Cost::NONE)
}

/// Something made of operations begins, and is counted as one: all that it calls is its own.
#[inline]
pub fn composite(name: impl FnOnce() -> Cow<'static, str>) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    begin(Kind::Composite, name(), &[], Cost::NONE)
}

/// Names what runs on this thread until the result is dropped: it gets a row and a span of its own. Scopes nest.
///
/// ```
/// # use kiln_tensor::{Tensor, Result, profile::{profile, profile_scope}};
/// # fn main() -> Result<()> {
/// let (_, report) = profile(|| {
///     let _scope = profile_scope("generator");
///     Tensor::ones(3, ())?.exp()
/// });
/// assert!(report.scopes().iter().any(|row| row.name == "generator"));
/// # Ok(()) }
/// ```
pub fn profile_scope(name: impl Into<Cow<'static, str>>) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    begin(Kind::Scope, name.into(), &[], Cost::NONE)
}

/// The memory of a new tensor is about to be written: by the operation that is running, or else by one that has no name.
#[inline]
pub(crate) fn building(layout: &Layout, dtype: DType) -> Operation {
    if !is_profiling() {
        return Operation::NOTHING;
    }
    note_result(layout.numel(), layout.numel() * dtype.size())
}

/// The running operation writes over memory that exists, as [`building`] says it of new memory.
#[inline]
pub(crate) fn writing(layout: &Layout, dtype: DType) {
    let _nameless = building(layout, dtype);
}

#[cold]
fn note_result(elements: usize, bytes: usize) -> Operation {
    let named = RUNNING.with_borrow_mut(|running| match running.last_mut() {
        Some(Frame { event, .. }) if event.kind != Kind::Scope => {
            event.bytes_written += bytes as u64;
            event.elements_written += elements as u64;
            true
        }
        _ => false,
    });
    if named {
        return Operation::NOTHING;
    }
    let operation = begin(Kind::Operation, Cow::Borrowed(NAMELESS), &[], Cost::NONE);
    let _ = note_result(elements, bytes);
    operation
}

/// The name of a result whose operation did not say that it runs, or began before the profile did.
pub const NAMELESS: &str = "nameless";

/// The elements of `x` that memory holds: those that a broadcast repeats count once.
fn stored_elements(x: &Tensor) -> usize {
    let layout = x.layout();
    layout.shape().dims().iter().zip(layout.strides()).map(|(&extent, &stride)| if stride == 0 { extent.min(1) } else { extent }).product()
}

/// The bytes that `inputs` hold, the same tensor twice counted once.
fn bytes_of(inputs: &[&Tensor]) -> u64 {
    let same = |a: &Tensor, b: &Tensor| a.storage().ptr_eq(b.storage()) && a.layout() == b.layout();
    let first = inputs.iter().enumerate().filter(|&(i, x)| !inputs[..i].iter().any(|y| same(x, y)));
    first.map(|(_, x)| (stored_elements(x) * x.dtype().size()) as u64).sum()
}

/// The GPU that an operation on `inputs` runs on. One that makes a tensor from nothing runs on the default device.
fn gpu_of(kind: Kind, inputs: &[&Tensor], parent: Option<&Frame>) -> Option<&'static Gpu> {
    let device = match (inputs.first(), kind, parent) {
        (Some(x), ..) => x.device(),
        (None, _, Some(parent)) => return parent.gpu.as_ref().map(|(gpu, _)| *gpu),
        (None, ..) => crate::default_device(),
    };
    device.gpu().ok().flatten()
}

fn memory_in_use(gpu: Option<&'static Gpu>) -> usize {
    gpu.map_or_else(|| crate::memory_stats().in_use, |gpu| gpu.memory_stats().in_use)
}

/// The point in the queue, unless the queue is being recorded, where a point means nothing.
fn gpu_now(gpu: &'static Gpu) -> Option<GpuEvent> {
    if gpu.is_capturing() { None } else { gpu.event().ok() }
}

#[cold]
fn begin(kind: Kind, name: Cow<'static, str>, inputs: &[&Tensor], cost: Cost) -> Operation {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Relaxed);
    RUNNING.with_borrow_mut(|running| {
        let gpu = gpu_of(kind, inputs, running.last());
        let event = Event {
            id,
            parent: running.last().map(|frame| frame.event.id),
            kind,
            name,
            recomputed: is_recomputing(),
            thread: this_thread(),
            start: 0,
            end: 0,
            inputs: inputs.iter().map(|x| (*x.shape(), x.dtype())).collect(),
            cost,
            bytes_read: bytes_of(inputs),
            bytes_written: 0,
            elements_written: 0,
            memory: 0,
            gpu: None,
        };
        let gpu = gpu.map(|gpu| (gpu, gpu_now(gpu)));
        running.push(Frame { event, memory: memory_in_use(gpu.as_ref().map(|(gpu, _)| *gpu)), gpu });
        // Last, so that what is measured is the operation and as little as can be besides.
        if let Some(frame) = running.last_mut() {
            frame.event.start = now();
        }
    });
    Operation { id, _thread: PhantomData }
}

/// Takes the frame `id` off the stack, and with it what began later and is not over: two scopes may end in any order.
fn end(id: u64) -> Option<Frame> {
    RUNNING.with_borrow_mut(|running| {
        let at = running.iter().rposition(|frame| frame.event.id == id)?;
        running.truncate(at + 1);
        running.pop()
    })
}

#[cold]
fn finish(id: u64) {
    let over = now();
    let Some(Frame { mut event, gpu, memory }) = end(id) else { return };
    event.end = over;
    event.memory = memory_in_use(gpu.as_ref().map(|(gpu, _)| *gpu)) as i64 - memory as i64;
    event.gpu = gpu.and_then(|(gpu, start)| {
        let (start, end) = (Arc::new(start?), Arc::new(gpu_now(gpu)?));
        Some(GpuSpan { ordinal: gpu.ordinal(), start, end })
    });
    log(event);
}
