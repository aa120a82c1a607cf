//! The passes of a traced function: one for its result, and one for the gradient of each operand.

use super::{Argument, Trace, composed_one, composed_two, gradient_of_one, gradient_of_two};
use crate::graph::{Ctx, Source};
use crate::{Error, Result, Shape, Tensor};
use kiln_kernels::cpu::pointwise::chain::{Chain, Function, Step, Value};
use kiln_kernels::pointwise::binary;

/// Where a chain reads one of its operands.
#[derive(Clone, Copy)]
struct Use {
    step: usize,
    arg: usize,
}

/// What a recorded chain has a gradient for: one or all uses of an operand.
pub(super) struct Input {
    pub(super) operand: usize,
    /// By index into the uses.
    uses: Vec<usize>,
    /// By index into the passes.
    pub(super) pass: usize,
}

/// A chain over the operands, the result's gradient being one more.
pub(super) struct Pass {
    pub(super) chain: Chain,
    /// The operands in the order in which the result takes the first dense one's layout, as that of the steps would.
    pub(super) order: Vec<usize>,
}

impl Pass {
    /// The pass that leads to `step`, if there is one.
    fn new(steps: &[Step], step: usize) -> Option<Self> {
        let mut order = Vec::new();
        let mut at = Some(step);
        while let Some(step) = at.take() {
            for arg in steps[step].used_args() {
                match *arg {
                    Value::Operand(operand) => order.push(operand),
                    Value::Step(from) => {
                        // A step's result is dense.
                        at = Some(from);
                        break;
                    }
                    Value::Scalar(_) => {}
                }
            }
        }
        Some(Self { chain: Chain::new(steps, &[step])?, order })
    }
}

/// What makes a gradient: a pass, or nothing if it is the result's gradient itself.
pub(super) struct GradientPass {
    pub(super) pass: Option<Pass>,
    /// Which operands it reads.
    pub(super) reads: Vec<usize>,
}

/// Several gradients in one pass.
pub(super) struct Joint {
    /// Those of these passes, in their order.
    pub(super) passes: Vec<usize>,
    pub(super) chain: Chain,
}

pub(super) struct Program {
    /// The operation's name, as errors and the graph show it.
    pub(super) name: &'static str,
    /// Of the function alone.
    steps: Vec<Step>,
    result: Value,
    /// That of the result.
    pub(super) pass: Option<Pass>,
    /// The last step's first: the order in which the engine adds gradients.
    uses: Vec<Use>,
    /// One for each use, in that order; then one for each operand of several uses whose gradients one pass can add up.
    pub(super) inputs: Vec<Input>,
    pub(super) passes: Vec<GradientPass>,
    /// All gradients together, where they fit: with each operand's uses as one input, and with each as its own.
    pub(super) joint: Vec<Joint>,
}

impl Program {
    pub(super) fn new(name: &'static str, steps: Vec<Step>, result: Value, operands: usize) -> Self {
        let last = if let Value::Step(last) = result { last } else { usize::MAX };
        let pass = if last < steps.len() { Pass::new(&steps, last) } else { None };
        let (uses, inputs, passes, joint) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut program = Self { name, steps, result, pass, uses, inputs, passes, joint };
        if program.pass.is_some() && program.add_gradients(last, operands).is_none() {
            program.pass = None;
        }
        program
    }

    /// Derives the gradient of each use of an operand; `None` if one has no pass.
    fn add_gradients(&mut self, last: usize, operands: usize) -> Option<()> {
        let seed = Value::Operand(operands);
        let mut trace = Trace { steps: self.steps.clone(), mixed: false };
        let mut gradients: Vec<Option<Value>> = vec![None; self.steps.len()];
        gradients[last] = Some(seed);
        let mut of_uses: Vec<(usize, Value)> = Vec::new();
        for (i, step) in self.steps.iter().enumerate().rev() {
            let Some(gradient) = gradients[i] else { continue };
            let rule = match step.function {
                Function::One(row) => gradient_of_one(row),
                Function::Two(row) => gradient_of_two(row),
            }?;
            let of_args = rule(&mut trace, step.args, Value::Step(i), step.params, gradient);
            for (arg, (&value, new)) in step.used_args().iter().zip(of_args).enumerate() {
                match (value, new) {
                    (Value::Operand(operand), Some(new)) => {
                        self.uses.push(Use { step: i, arg });
                        of_uses.push((operand, new));
                    }
                    (Value::Step(from), Some(new)) => {
                        gradients[from] = Some(match gradients[from] {
                            Some(before) => trace.two(binary::Add::ROW, before, new),
                            None => new,
                        });
                    }
                    _ => {}
                }
            }
        }
        let mut known = Vec::new();
        for (u, &(operand, gradient)) in of_uses.iter().enumerate() {
            let pass = self.gradient_pass(&mut known, &trace, gradient, operands)?;
            self.inputs.push(Input { operand, uses: vec![u], pass });
        }
        for operand in 0..operands {
            let uses: Vec<usize> = (0..of_uses.len()).filter(|&u| of_uses[u].0 == operand).collect();
            if let [first, others @ ..] = uses.as_slice()
                && !others.is_empty()
            {
                let total = others.iter().fold(of_uses[*first].1, |sum, &u| trace.two(binary::Add::ROW, sum, of_uses[u].1));
                if let Some(pass) = self.gradient_pass(&mut known, &trace, total, operands) {
                    self.inputs.push(Input { operand, uses, pass });
                }
            }
        }
        for is_full in [true, false] {
            let inputs = self.inputs_for(|_| is_full);
            let mut passes: Vec<usize> = inputs.iter().map(|&input| self.inputs[input].pass).collect();
            passes.sort_unstable();
            passes.dedup();
            let step = |&pass: &usize| if let Value::Step(step) = known[pass] { Some((pass, step)) } else { None };
            let (passes, steps): (Vec<usize>, Vec<usize>) = passes.iter().filter_map(step).unzip();
            if passes.len() > 1
                && let Some(chain) = Chain::new(&trace.steps, &steps)
            {
                self.joint.push(Joint { passes, chain });
            }
        }
        Some(())
    }

    /// The pass that makes `gradient`, one of the `known` or a new one; `None` if it would not fit.
    fn gradient_pass(&mut self, known: &mut Vec<Value>, trace: &Trace, gradient: Value, operands: usize) -> Option<usize> {
        if let Some(pass) = known.iter().position(|&v| v == gradient) {
            return Some(pass);
        }
        let pass = match gradient {
            Value::Step(step) => Some(Pass::new(&trace.steps, step)?),
            Value::Operand(_) | Value::Scalar(_) => None,
        };
        known.push(gradient);
        self.passes.push(GradientPass { pass, reads: operands_of(&trace.steps, gradient, operands) });
        Some(self.passes.len() - 1)
    }

    /// The inputs of a recorded chain: all uses of an operand as one where `is_full` says that it has the result's shape (the engine sums the gradient
    /// of another down to its shape, one use at a time).
    pub(super) fn inputs_for(&self, is_full: impl Fn(usize) -> bool) -> Vec<usize> {
        let (uses, totals) = self.inputs.split_at(self.uses.len());
        let mut chosen: Vec<usize> = Vec::with_capacity(uses.len());
        for (u, input) in uses.iter().enumerate() {
            let total = totals.iter().position(|total| total.operand == input.operand).filter(|_| is_full(input.operand));
            let input = total.map_or(u, |total| uses.len() + total);
            if !chosen.contains(&input) {
                chosen.push(input);
            }
        }
        chosen
    }

    /// The tensors of all steps, by the operations that they stand for.
    fn composed(&self, operands: &[&Tensor]) -> Result<Vec<Tensor>> {
        let mut values: Vec<Tensor> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let argument = |value: Value| match value {
                Value::Operand(i) => Argument::Tensor(operands[i]),
                Value::Step(i) => Argument::Tensor(&values[i]),
                Value::Scalar(x) => Argument::Number(x),
            };
            let value = match step.function {
                Function::One(row) => match argument(step.args[0]) {
                    Argument::Tensor(x) => composed_one(row, step.params, x),
                    Argument::Number(_) => Err(Error::argument("fuse", format!("{} of a number", row.name))),
                },
                Function::Two(row) => composed_two(row, argument(step.args[0]), argument(step.args[1])),
            }?;
            values.push(value);
        }
        Ok(values)
    }

    /// The result by the operations that the steps stand for.
    pub(super) fn result(&self, operands: &[&Tensor]) -> Result<Tensor> {
        match self.result {
            Value::Operand(i) => Ok(operands[i].clone()),
            Value::Step(i) => Ok(self.composed(operands)?.swap_remove(i)),
            Value::Scalar(_) => Err(Error::argument("fuse", "the function returns a number")),
        }
    }

    /// Whether every step has the result's shape, so that a pass over that shape does no step's work twice.
    pub(super) fn steps_are_full(&self, operands: &[&Tensor], shape: &Shape) -> Result<bool> {
        if operands.iter().all(|x| x.shape() == shape) {
            return Ok(true);
        }
        let mut shapes: Vec<Shape> = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            let mut own: Option<Shape> = None;
            for arg in step.used_args() {
                let other = match *arg {
                    Value::Operand(i) => *operands[i].shape(),
                    Value::Step(i) => shapes[i],
                    Value::Scalar(_) => continue,
                };
                own = Some(match own {
                    Some(own) => crate::broadcast_shapes("fuse", &own, &other)?,
                    None => other,
                });
            }
            shapes.push(own.unwrap_or(*shape));
        }
        Ok(shapes.iter().all(|s| s == shape))
    }

    /// The gradients of `inputs` in differentiable operations: the chain is computed again, recorded, and walked backwards.
    pub(super) fn composed_gradients(
        &self,
        operands: &[(Shape, Option<Tensor>)],
        inputs: &[usize],
        needs: &[bool],
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let stand_in = |(shape, x): &(Shape, Option<Tensor>)| match x {
            Some(x) => Ok(x.clone()),
            // No gradient depends on it; but it must be there to compute the chain, and tracked to be found in it.
            None => Tensor::scalar(0.0, grad)?.expand(shape)?.requires_grad_(),
        };
        let operands = operands.iter().map(stand_in).collect::<Result<Vec<_>>>()?;
        let of_uses = self.composed_gradients_of_uses(&operands, grad)?;
        let total = |input: &Input| {
            let mut sum: Option<Tensor> = None;
            for new in input.uses.iter().filter_map(|&u| of_uses[u].as_ref()) {
                sum = Some(match sum {
                    Some(before) => before.add(new)?,
                    None => new.clone(),
                });
            }
            Ok(sum)
        };
        inputs.iter().zip(needs).map(|(&input, &needed)| if needed { total(&self.inputs[input]) } else { Ok(None) }).collect()
    }

    /// The gradients of all uses, those that nobody needs included.
    fn composed_gradients_of_uses(&self, operands: &[Tensor], grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let values = self.composed(&operands.iter().collect::<Vec<_>>())?;
        let mut gradients: Vec<Option<Tensor>> = vec![None; values.len()];
        if let Value::Step(last) = self.result {
            gradients[last] = Some(grad.clone());
        }
        let mut of_uses: Vec<Option<Tensor>> = vec![None; self.uses.len()];
        for (i, step) in self.steps.iter().enumerate().rev() {
            let (Some(gradient), Some(Source::Node(node))) = (gradients[i].take(), values[i].source()) else { continue };
            let tensors = step.used_args().iter().enumerate().filter(|(_, arg)| !matches!(arg, Value::Scalar(_)));
            let tensors: Vec<(usize, Value)> = tensors.map(|(at, &arg)| (at, arg)).collect();
            let needs = node.inputs().iter().map(Option::is_some).collect();
            let found = node.op()?.vjp(&Ctx::new(node.clone(), needs), &gradient)?;
            for (&(at, arg), new) in tensors.iter().zip(found) {
                let Some(new) = new else { continue };
                match arg {
                    Value::Operand(_) => {
                        if let Some(u) = self.uses.iter().position(|u| u.step == i && u.arg == at) {
                            of_uses[u] = Some(new);
                        }
                    }
                    Value::Step(from) => {
                        gradients[from] = Some(match gradients[from].take() {
                            Some(before) => before.add(&new)?,
                            None => new,
                        });
                    }
                    Value::Scalar(_) => {}
                }
            }
        }
        Ok(of_uses)
    }
}

/// Which of the function's operands `value` is computed from.
fn operands_of(steps: &[Step], value: Value, operands: usize) -> Vec<usize> {
    let mut reads = vec![false; operands];
    let mut open = vec![value];
    let mut seen = vec![false; steps.len()];
    while let Some(value) = open.pop() {
        match value {
            Value::Operand(i) if i < operands => reads[i] = true,
            Value::Step(i) if !std::mem::replace(&mut seen[i], true) => open.extend(steps[i].used_args()),
            _ => {}
        }
    }
    (0..operands).filter(|&i| reads[i]).collect()
}
