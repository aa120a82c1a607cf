//! The recorded graph: what an operation leaves behind so that its derivative can be found later.
//!
//! An operation with a tracked input calls [`record`], which gives its output a [`Node`]: the rule ([`Op`]) and the
//! edges to the inputs. Walking the graph is the business of `kiln-autograd`.
//!
//! Identity: every tracked tensor has a source (a [`Leaf`] or a [`Node`]) with an id from one ever-growing counter, so an
//! input's id is always smaller than its output's.

mod mode;

pub use mode::{GradModeGuard, RecordMode, anomaly_mode, first_non_finite, is_anomaly_mode, is_grad_enabled, is_recomputing};
pub use mode::{recomputing, record_mode, set_record_mode};

use crate::{DType, Error, Result, Shape, Tensor};
use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The gradients that a rule returns, one for each input; `None` for an input that needs none or gets zero.
pub type Grads = Vec<Option<Tensor>>;

/// The derivative rule of an operation, with what it saved from the forward pass.
///
/// Anyone may implement it: an operation from outside of Kiln computes its output from detached inputs and calls [`record`].
pub trait Op: Send + Sync + 'static {
    /// The operation's name, as errors and profiles show it.
    fn name(&self) -> &'static str;

    /// The vector-Jacobian product: given the gradient of a scalar with respect to the output, the gradients with respect
    /// to the inputs, in the inputs' order. Written in differentiable Tensor operations, so that it can be differentiated again.
    ///
    /// Gradients may keep the shape that the inputs were broadcast to: the engine sums them down.
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads>;
}

/// What a rule may ask for while it runs.
pub struct Ctx {
    node: Arc<Node>,
    needs: Vec<bool>,
}

impl Ctx {
    /// For the engine: the context of `node`, in which input `i` wants a gradient if `needs[i]`.
    pub fn new(node: Arc<Node>, needs: Vec<bool>) -> Self {
        Self { node, needs }
    }

    /// Whether input `i` wants a gradient.
    pub fn needs(&self, i: usize) -> bool {
        self.needs.get(i).copied().unwrap_or(false)
    }

    /// The operation's output, from its data that the rule saved. Rules save outputs without their node (a node that holds
    /// itself would never be freed); here it gets its node back, so that second derivatives flow through it.
    pub fn output(&self, data: &Tensor) -> Tensor {
        data.with_source(Some(Source::Node(self.node.clone())))
    }
}

/// Which inputs of an operation are tracked: a rule saves only what it will read.
pub struct Needs<'a> {
    inputs: &'a [&'a Tensor],
}

impl Needs<'_> {
    /// Whether input `i` is tracked.
    pub fn input(&self, i: usize) -> bool {
        self.inputs.get(i).is_some_and(|t| t.is_tracked())
    }

    /// A handle on `tensor` if input `i` is tracked.
    pub fn save_for(&self, i: usize, tensor: &Tensor) -> Option<Tensor> {
        self.input(i).then(|| tensor.clone())
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

fn next_id() -> u64 {
    NEXT_ID.fetch_add(1, Relaxed)
}

/// Runs when the gradient of a tensor is complete; may replace it.
pub type Hook = Arc<dyn Fn(&Tensor) -> Result<Option<Tensor>> + Send + Sync>;

/// A tensor that the user asked to track: where `backward` accumulates.
#[derive(Default)]
pub struct Leaf {
    id: u64,
    grad: Mutex<Option<Tensor>>,
    hooks: Mutex<Vec<Hook>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leaf {
    pub(crate) fn new() -> Self {
        Self { id: next_id(), ..Self::default() }
    }

    /// The accumulated gradient.
    pub fn grad(&self) -> Option<Tensor> {
        lock(&self.grad).clone()
    }

    /// Replaces the accumulated gradient.
    pub fn set_grad(&self, grad: Option<Tensor>) {
        *lock(&self.grad) = grad;
    }

    /// Makes `grad` the accumulated gradient if there is none; else takes the one that is there out, for the sum to be tried again.
    pub fn put_grad(&self, grad: &Tensor) -> Option<Tensor> {
        let mut place = lock(&self.grad);
        let before = place.take();
        if before.is_none() {
            *place = Some(grad.clone());
        }
        before
    }
}

/// An operation that was recorded.
pub struct Node {
    id: u64,
    name: &'static str,
    shape: Shape,
    dtype: DType,
    inputs: Vec<Option<Edge>>,
    op: Mutex<Option<Arc<dyn Op>>>,
    hooks: Mutex<Vec<Hook>>,
    origin: Option<Backtrace>,
}

impl Node {
    /// The operation's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The output's shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The output's dtype.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The edges to the inputs; `None` for those that are not tracked.
    pub fn inputs(&self) -> &[Option<Edge>] {
        &self.inputs
    }

    /// Where the operation was called, if it ran under [`anomaly_mode`].
    pub fn origin(&self) -> Option<&Backtrace> {
        self.origin.as_ref()
    }

    /// The rule, kept for another pass.
    pub fn op(&self) -> Result<Arc<dyn Op>> {
        lock(&self.op).clone().ok_or_else(|| self.freed())
    }

    /// The rule, taken out: what it saved is freed when the caller drops it.
    pub fn take_op(&self) -> Result<Arc<dyn Op>> {
        lock(&self.op).take().ok_or_else(|| self.freed())
    }

    fn freed(&self) -> Error {
        Error::graph(self.name, "the graph was freed by an earlier backward pass; use retain_graph to walk it again")
    }
}

/// Where a tracked tensor comes from.
#[derive(Clone)]
pub enum Source {
    /// It is a leaf.
    Leaf(Arc<Leaf>),
    /// An operation made it.
    Node(Arc<Node>),
}

impl Source {
    /// The identity of the tensor in the graph.
    pub fn id(&self) -> u64 {
        match self {
            Source::Leaf(leaf) => leaf.id,
            Source::Node(node) => node.id,
        }
    }

    /// The hooks on the tensor.
    pub fn hooks(&self) -> Vec<Hook> {
        match self {
            Source::Leaf(leaf) => lock(&leaf.hooks).clone(),
            Source::Node(node) => lock(&node.hooks).clone(),
        }
    }

    /// Adds a hook.
    pub fn add_hook(&self, hook: Hook) {
        match self {
            Source::Leaf(leaf) => lock(&leaf.hooks).push(hook),
            Source::Node(node) => lock(&node.hooks).push(hook),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Leaf(leaf) => write!(f, "leaf {}", leaf.id),
            Source::Node(node) => write!(f, "{} {}", node.name, node.id),
        }
    }
}

/// An input of a node: its source, and the shape that its gradient must be summed to.
#[derive(Clone, Debug)]
pub struct Edge {
    /// Where the input came from.
    pub source: Source,
    /// The input's shape.
    pub shape: Shape,
    /// The input's dtype.
    pub dtype: DType,
}

/// Gives `out`, computed from `inputs`, its node: `rule` builds the derivative rule. Without a tracked input, or under
/// `no_grad`, `out` is returned as it is and `rule` is never called, so nothing is saved.
///
/// Under [`anomaly_mode`] a value that is not finite is an error that names the operation.
pub fn record<O: Op>(name: &'static str, out: Tensor, inputs: &[&Tensor], rule: impl FnOnce(&Needs<'_>) -> O) -> Result<Tensor> {
    if is_anomaly_mode() {
        mode::check_finite(name, &out, inputs)?;
    }
    let mode = record_mode();
    if mode == RecordMode::Off || !inputs.iter().any(|t| t.is_tracked()) {
        return Ok(out);
    }
    if !out.dtype().is_float() {
        return Err(Error::graph(name, format!("a result of dtype {} cannot carry a gradient", out.dtype())));
    }
    let op: Option<Arc<dyn Op>> = (mode == RecordMode::On).then(|| Arc::new(rule(&Needs { inputs })) as _);
    let edge = |t: &&Tensor| t.source().map(|s| Edge { source: s.clone(), shape: *t.shape(), dtype: t.dtype() });
    Ok(attach(name, out, inputs.iter().map(edge).collect(), op))
}

/// [`record`] for a rule whose inputs are known by their sources only.
pub fn record_edges<O: Op>(name: &'static str, out: Tensor, inputs: Vec<Edge>, rule: O) -> Tensor {
    let mode = record_mode();
    if mode == RecordMode::Off || inputs.is_empty() {
        return out;
    }
    let op: Option<Arc<dyn Op>> = if mode == RecordMode::On { Some(Arc::new(rule)) } else { None };
    attach(name, out, inputs.into_iter().map(Some).collect(), op)
}

fn attach(name: &'static str, out: Tensor, inputs: Vec<Option<Edge>>, op: Option<Arc<dyn Op>>) -> Tensor {
    let node = Node {
        id: next_id(),
        name,
        shape: *out.shape(),
        dtype: out.dtype(),
        inputs,
        op: Mutex::new(op),
        hooks: Mutex::new(Vec::new()),
        origin: is_anomaly_mode().then(Backtrace::force_capture),
    };
    out.tracked_by(Source::Node(Arc::new(node)))
}

/// An id that is larger than those of all sources so far and smaller than those of all to come.
pub fn id_mark() -> u64 {
    next_id()
}

/// For an operation without a derivative: an error that names it if an input is tracked and recording is on.
pub fn refuse_tracked(name: &'static str, inputs: &[&Tensor]) -> Result<()> {
    if is_grad_enabled() && inputs.iter().any(|t| t.is_tracked()) {
        return Err(Error::graph(name, "has no derivative; call .detach() on its input, or use no_grad, if none is wanted"));
    }
    Ok(())
}

/// What a dropped node held.
struct Remains {
    _op: Option<Arc<dyn Op>>,
    _inputs: Vec<Option<Edge>>,
    _hooks: Vec<Hook>,
}

thread_local! {
    /// What nodes held that were dropped while another one, further up the stack, is being emptied.
    static DROPPED: RefCell<Option<Vec<Remains>>> = const { RefCell::new(None) };
}

/// Drops `remains` without recursion: dropping a node may drop the last handle on its inputs' nodes, and so on for as
/// many operations as were chained. Nested calls only queue; the outermost one empties the queue.
fn drop_flat(remains: Remains) {
    let outermost = DROPPED.try_with(|queue| match &mut *queue.borrow_mut() {
        Some(pending) => {
            pending.push(remains);
            None
        }
        none => {
            *none = Some(Vec::new());
            Some(remains)
        }
    });
    if let Ok(Some(first)) = outermost {
        let mut next = Some(first);
        while next.is_some() {
            drop(next);
            next = DROPPED.with(|queue| queue.borrow_mut().as_mut().and_then(Vec::pop));
        }
        DROPPED.with(|queue| *queue.borrow_mut() = None);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop_flat(Remains {
            _op: self.op.get_mut().unwrap_or_else(PoisonError::into_inner).take(),
            _inputs: std::mem::take(&mut self.inputs),
            _hooks: std::mem::take(self.hooks.get_mut().unwrap_or_else(PoisonError::into_inner)),
        });
    }
}
