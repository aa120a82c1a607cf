//! Memory for time: a part of the network whose intermediate values are computed again in the backward pass.

use crate::engine::{GradOptions, dependencies, grad_to_sources};
use kiln_tensor::generator::DrawLog;
use kiln_tensor::graph::{Ctx, Edge, Grads, Op, RecordMode, Source, id_mark, is_grad_enabled, recomputing, record_edges, set_record_mode};
use kiln_tensor::{DType, Error, Result, Tensor, autocast_dtype, with_autocast};
use std::sync::Arc;

type Segment = Arc<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

/// `f(inputs)`, of which only the inputs and the result are kept: the backward pass runs `f` again.
///
/// Gradients flow to the inputs and to every tracked tensor that `f` captured, weights included. Random numbers drawn inside
/// of `f` are drawn again exactly, and the running statistics of batch norm are updated by the first run only. For the rest, `f`
/// must be a pure function of its inputs and of what it captured.
pub fn checkpoint(f: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static, inputs: &[&Tensor]) -> Result<Tensor> {
    let inputs: Vec<Tensor> = inputs.iter().map(|&x| x.clone()).collect();
    if !is_grad_enabled() {
        return f(&inputs);
    }
    let start = id_mark();
    let segment: Segment = Arc::new(f);
    // Edges only: this pass finds what the result depends on, and saves nothing.
    let (output, draws) = DrawLog::record(|| {
        let _mode = set_record_mode(RecordMode::EdgesOnly);
        segment(&inputs)
    });
    let output = output?;
    let edges: Vec<Edge> = dependencies(&output, start);
    let sources = edges.iter().map(|e| e.source.clone()).collect();
    let rule = Checkpoint { segment, inputs, draws, sources, autocast: autocast_dtype() };
    Ok(record_edges("checkpoint", output.detach(), edges, rule))
}

struct Checkpoint {
    segment: Segment,
    inputs: Vec<Tensor>,
    draws: DrawLog,
    sources: Vec<Source>,
    autocast: Option<DType>,
}

impl Op for Checkpoint {
    fn name(&self) -> &'static str {
        "checkpoint"
    }

    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let create_graph = is_grad_enabled();
        let output = {
            let _mode = set_record_mode(RecordMode::On);
            recomputing(|| self.draws.replay(|| with_autocast(self.autocast, || (self.segment)(&self.inputs))))?
        };
        if output.shape() != grad.shape() || !output.is_tracked() {
            return Err(Error::graph("checkpoint", "the function gave another result when it ran again; it must be pure"));
        }
        let wanted: Vec<Source> = self.sources.iter().enumerate().filter(|(i, _)| ctx.needs(*i)).map(|(_, s)| s.clone()).collect();
        let options = GradOptions { create_graph, retain_graph: false };
        let mut found = grad_to_sources(&output, grad, &wanted, options)?.into_iter();
        Ok((0..self.sources.len()).map(|i| if ctx.needs(i) { found.next().flatten() } else { None }).collect())
    }
}
