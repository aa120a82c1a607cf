//! The walk from results back to inputs.
//!
//! Nodes are visited in descending order of their ids. An input's id is always smaller than its output's, so when a node's
//! turn comes its gradient is complete. The order of summation follows from the ids alone: the same bits every time.

use kiln_tensor::graph::{Ctx, Edge, Leaf, Node, RecordMode, Source, first_non_finite, is_anomaly_mode, set_record_mode};
use kiln_tensor::{Error, Result, Tensor, profile, with_autocast};
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

/// How a walk treats the graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GradOptions {
    /// Records the walk itself, so that its results can be differentiated again. Keeps the graph.
    pub create_graph: bool,
    /// Keeps what the operations saved, for another walk. Without it, memory is given back as the walk goes.
    pub retain_graph: bool,
}

/// The gradient of a scalar with respect to each of `inputs` (leaves or not), without touching any `.grad()`.
///
/// An input that `output` does not depend on gets zeros.
///
/// # Errors
/// If `output` is not a tracked scalar, an input is not tracked, or the graph was freed already.
///
/// ```
/// # use kiln_tensor::{Tensor, Result};
/// # fn main() -> Result<()> {
/// let x = Tensor::from_vec(vec![1f32, 2.0], 2)?.requires_grad_()?;
/// let y = x.mul(&x)?.sum(())?;
/// let g = kiln_autograd::grad(&y, &[&x])?;
/// assert_eq!(g[0].to_vec::<f32>()?, [2.0, 4.0]);
/// # Ok(()) }
/// ```
pub fn grad(output: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    grad_with(&[output], &[None], inputs, GradOptions::default())
}

/// [`grad`] of several outputs, each weighted by a gradient of its shape (`None`: the output is a scalar, weight 1).
pub fn grad_with(outputs: &[&Tensor], grad_outputs: &[Option<&Tensor>], inputs: &[&Tensor], options: GradOptions) -> Result<Vec<Tensor>> {
    let sources = inputs.iter().map(|t| t.source().ok_or_else(|| not_tracked("grad", "an input"))).collect::<Result<Vec<_>>>()?;
    let targets = Targets { ids: sources.iter().map(|s| s.id()).collect(), partial: false };
    let roots = roots("grad", outputs, grad_outputs)?;
    let found = walk(roots, Some(&targets), options)?;
    let gradient =
        |(source, input): (&&Source, &&Tensor)| found.gradients.get(&source.id()).cloned().map_or_else(|| input.zeros_like(), Ok);
    sources.iter().zip(inputs).map(gradient).collect()
}

/// What users call on tensors; in the prelude.
pub trait TensorExt {
    /// Adds the gradient of this scalar to the `.grad()` of every leaf it depends on, and frees the graph as it goes.
    fn backward(&self) -> Result<()>;

    /// [`backward`](TensorExt::backward) with options, from a gradient of this tensor's shape (`None`: a scalar, weight 1).
    fn backward_with(&self, grad: Option<&Tensor>, options: GradOptions) -> Result<()>;
}

impl TensorExt for Tensor {
    fn backward(&self) -> Result<()> {
        self.backward_with(None, GradOptions::default())
    }

    fn backward_with(&self, grad: Option<&Tensor>, options: GradOptions) -> Result<()> {
        let found = walk(roots("backward", &[self], &[grad])?, None, options)?;
        let _mode = set_record_mode(if options.create_graph { RecordMode::On } else { RecordMode::Off });
        for (leaf, gradient) in found.leaves {
            let mut sum = gradient;
            // Another thread may have put one there since the last was taken.
            while let Some(before) = leaf.put_grad(&sum) {
                sum = sum_of(before, &sum)?;
            }
        }
        Ok(())
    }
}

fn not_tracked(op: &str, what: &str) -> Error {
    Error::graph(op, format!("{what} is not tracked: nothing it was computed from called .requires_grad_(), or it was made under no_grad"))
}

/// The gradients to start from.
fn roots(op: &str, outputs: &[&Tensor], weights: &[Option<&Tensor>]) -> Result<Vec<(Source, Tensor)>> {
    if outputs.len() != weights.len() {
        return Err(Error::argument(op, format!("{} outputs with {} gradients", outputs.len(), weights.len())));
    }
    let root = |(output, weight): (&&Tensor, &Option<&Tensor>)| {
        let source = output.source().ok_or_else(|| not_tracked(op, "the output"))?;
        let weight = match weight {
            Some(w) if w.shape() != output.shape() || w.dtype() != output.dtype() => {
                let message = format!("a gradient of {} {} for an output of {} {}", w.shape(), w.dtype(), output.shape(), output.dtype());
                return Err(Error::shape(op, message));
            }
            Some(w) => (*w).clone(),
            None if output.numel() != 1 => {
                let message =
                    format!("the output has shape {}; only a scalar needs no gradient to start from: sum it, or give one", output.shape());
                return Err(Error::shape(op, message));
            }
            None => output.ones_like()?,
        };
        Ok((source.clone(), weight))
    };
    outputs.iter().zip(weights).map(root).collect()
}

/// The sources whose gradients are wanted.
struct Targets {
    ids: HashSet<u64>,
    /// Stops at a target: what flows on from one target to another does not count.
    partial: bool,
}

/// What a walk found: gradients of the targets by id, or of all leaves.
#[derive(Default)]
struct Found {
    gradients: HashMap<u64, Tensor>,
    leaves: Vec<(Arc<Leaf>, Tensor)>,
}

/// Heap entry, ordered by id: the youngest source comes first.
struct Pending(Source);

impl PartialEq for Pending {
    fn eq(&self, other: &Self) -> bool {
        self.0.id() == other.0.id()
    }
}
impl Eq for Pending {}
impl PartialOrd for Pending {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Pending {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.id().cmp(&other.0.id())
    }
}

/// Carries gradients from `roots` down: to the `targets` and no further than needed, or to every leaf.
/// Without autocast: gradients have the dtypes of their tensors.
fn walk(roots: Vec<(Source, Tensor)>, targets: Option<&Targets>, options: GradOptions) -> Result<Found> {
    with_autocast(None, || walk_graph(roots, targets, options))
}

fn walk_graph(roots: Vec<(Source, Tensor)>, targets: Option<&Targets>, options: GradOptions) -> Result<Found> {
    let useful = targets.map(|targets| leading_to(roots.iter().map(|(s, _)| s), targets));
    let wanted = |source: &Source| useful.as_ref().is_none_or(|useful| useful.contains(&source.id()));
    let _mode = set_record_mode(if options.create_graph { RecordMode::On } else { RecordMode::Off });

    let mut sums: HashMap<u64, Tensor> = HashMap::new();
    let mut queue = BinaryHeap::new();
    let mut found = Found::default();
    for (source, gradient) in roots {
        if wanted(&source) {
            accumulate(&mut sums, &mut queue, source, gradient)?;
        }
    }
    while let Some(Pending(source)) = queue.pop() {
        let Some(mut gradient) = sums.remove(&source.id()) else { continue };
        let is_target = targets.is_some_and(|targets| targets.ids.contains(&source.id()));
        let is_passed_on = is_target && targets.is_some_and(|targets| targets.partial);
        // Where only a part of a target's gradient is asked for, its hooks wait for the whole.
        for hook in if is_passed_on { Vec::new() } else { source.hooks() } {
            gradient = match hook(&gradient)? {
                Some(other) => expect_like(&gradient, other)?,
                None => gradient,
            };
        }
        if is_target {
            found.gradients.insert(source.id(), gradient.clone());
            if is_passed_on {
                continue;
            }
        }
        match source {
            Source::Leaf(leaf) if targets.is_none() => found.leaves.push((leaf, gradient)),
            Source::Leaf(_) => {}
            Source::Node(node) => {
                let needs: Vec<bool> = node.inputs().iter().map(|e| e.as_ref().is_some_and(|e| wanted(&e.source))).collect();
                if !needs.contains(&true) {
                    continue;
                }
                for (edge, gradient) in apply(node, needs, &gradient, options)? {
                    accumulate(&mut sums, &mut queue, edge.source, gradient)?;
                }
            }
        }
    }
    Ok(found)
}

/// What a hook put in the place of a gradient, which it must be like.
fn expect_like(gradient: &Tensor, other: Tensor) -> Result<Tensor> {
    if other.shape() != gradient.shape() || other.dtype() != gradient.dtype() || other.device() != gradient.device() {
        let text = |x: &Tensor| format!("{} {} on {}", x.dtype(), x.shape(), x.device());
        return Err(Error::shape("backward", format!("a hook replaced a gradient of {} by one of {}", text(gradient), text(&other))));
    }
    Ok(other)
}

/// Whether `root` depends on a leaf that is not among `own`.
pub(crate) fn depends_on_others(root: &Tensor, own: &[Tensor]) -> bool {
    let mut known: HashSet<u64> = own.iter().filter_map(|leaf| leaf.source().map(Source::id)).collect();
    let mut stack: Vec<Source> = root.source().cloned().into_iter().collect();
    while let Some(source) = stack.pop() {
        if !known.insert(source.id()) {
            continue;
        }
        match source {
            Source::Leaf(_) => return true,
            Source::Node(node) => stack.extend(node.inputs().iter().flatten().map(|edge| edge.source.clone())),
        }
    }
    false
}

/// The ids of all sources under `roots` from which one of `targets` can be reached, the targets included.
fn leading_to<'a>(roots: impl Iterator<Item = &'a Source>, targets: &Targets) -> HashSet<u64> {
    let mut nodes: HashMap<u64, Arc<Node>> = HashMap::new();
    let mut useful: HashSet<u64> = HashSet::new();
    let mut stack: Vec<Source> = roots.cloned().collect();
    let oldest = targets.ids.iter().min().copied().unwrap_or(0);
    while let Some(source) = stack.pop() {
        let id = source.id();
        if targets.ids.contains(&id) {
            useful.insert(id);
            if targets.partial {
                continue;
            }
        }
        if let Source::Node(node) = source
            && id > oldest
            && !nodes.contains_key(&id)
        {
            stack.extend(node.inputs().iter().flatten().map(|e| e.source.clone()));
            nodes.insert(id, node);
        }
    }
    // Inputs are older than outputs, so in ascending order of ids one pass decides.
    let mut order: Vec<_> = nodes.into_iter().collect();
    order.sort_unstable_by_key(|(id, _)| *id);
    for (id, node) in order {
        if node.inputs().iter().flatten().any(|e| useful.contains(&e.source.id())) {
            useful.insert(id);
        }
    }
    useful
}

/// Runs the rule of `node`: the gradients of those inputs that need one, in the inputs' shapes.
fn apply(node: Arc<Node>, needs: Vec<bool>, gradient: &Tensor, options: GradOptions) -> Result<Vec<(Edge, Tensor)>> {
    let _running = profile::backward(node.name(), gradient);
    let op = if options.create_graph || options.retain_graph { node.op()? } else { node.take_op()? };
    let edges: Vec<Option<Edge>> = node.inputs().to_vec();
    let ctx = Ctx::new(node.clone(), needs);
    let gradients = op.vjp(&ctx, gradient)?;
    drop(op);
    if gradients.len() != edges.len() {
        return Err(Error::graph(node.name(), format!("the rule returned {} gradients for {} inputs", gradients.len(), edges.len())));
    }
    let mut out = Vec::with_capacity(edges.len());
    for (i, (edge, gradient)) in edges.into_iter().zip(gradients).enumerate() {
        if let (Some(edge), Some(gradient), true) = (edge, gradient, ctx.needs(i)) {
            check(&node, i, &edge, &gradient)?;
            let gradient = gradient.sum_to_shape(&edge.shape)?;
            out.push((edge, gradient));
        }
    }
    Ok(out)
}

fn check(node: &Node, i: usize, edge: &Edge, gradient: &Tensor) -> Result<()> {
    if gradient.dtype() != edge.dtype {
        let message = format!("the rule returned a gradient of dtype {} for input {i} of dtype {}", gradient.dtype(), edge.dtype);
        return Err(Error::graph(node.name(), message));
    }
    if is_anomaly_mode()
        && let Some(value) = first_non_finite(gradient)?
    {
        let origin = node.origin().map(|o| format!("; the operation was called at\n{o}")).unwrap_or_default();
        return Err(Error::graph(
            node.name(),
            format!("anomaly: the gradient of input {i}, shape {}, holds {value}{origin}", gradient.shape()),
        ));
    }
    Ok(())
}

/// Two gradients of one tensor, added up: in the memory of the first, if nobody else holds it.
fn sum_of(a: Tensor, b: &Tensor) -> Result<Tensor> {
    let _running = profile::composite(|| "accumulate_grad".into());
    a + b
}

fn accumulate(sums: &mut HashMap<u64, Tensor>, queue: &mut BinaryHeap<Pending>, source: Source, gradient: Tensor) -> Result<()> {
    match sums.remove(&source.id()) {
        Some(before) => {
            sums.insert(source.id(), sum_of(before, &gradient)?);
        }
        None => {
            sums.insert(source.id(), gradient);
            queue.push(Pending(source));
        }
    }
    Ok(())
}

/// The tracked tensors from outside that `output` depends on: those with an id below `start`, each once, oldest first.
pub(crate) fn dependencies(output: &Tensor, start: u64) -> Vec<Edge> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let root = |source: &Source| Edge { source: source.clone(), shape: *output.shape(), dtype: output.dtype() };
    let mut stack: Vec<Edge> = output.source().map(root).into_iter().collect();
    while let Some(edge) = stack.pop() {
        if !seen.insert(edge.source.id()) {
            continue;
        }
        match &edge.source {
            Source::Node(node) if edge.source.id() > start => stack.extend(node.inputs().iter().flatten().cloned()),
            _ => found.push(edge),
        }
    }
    found.sort_unstable_by_key(|edge| edge.source.id());
    found
}

/// The partial derivatives of `output` with respect to `sources`, the dependence of one source on another left out; `None`
/// where it does not depend on one.
pub(crate) fn grad_to_sources(output: &Tensor, weight: &Tensor, sources: &[Source], options: GradOptions) -> Result<Vec<Option<Tensor>>> {
    let targets = Targets { ids: sources.iter().map(Source::id).collect(), partial: true };
    let mut found = walk(roots("grad", &[output], &[Some(weight)])?, Some(&targets), options)?;
    Ok(sources.iter().map(|s| found.gradients.remove(&s.id())).collect())
}
