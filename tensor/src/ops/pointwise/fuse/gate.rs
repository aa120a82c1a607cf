//! Gated linear units: one half of the features, gated by a function of the other (Dauphin et al. 2017; Shazeer 2020, *GLU Variants Improve
//! Transformer*). Each is a fused chain: one pass over memory forward, and one for both gradients.

use super::run::{Chained, run};
use super::{Expr, Fused, fused_as};
use crate::graph::{Ctx, Grads, Op, record};
use crate::{Error, Result, Tensor};
use std::sync::LazyLock;

/// An operation that is traced when it is first called.
type Gate = LazyLock<Fused<2>>;

static SWIGLU: Gate = LazyLock::new(|| fused_as("swiglu", |[gate, up]: [Expr; 2]| gate.silu() * up));
static GEGLU: Gate = LazyLock::new(|| fused_as("geglu", |[gate, up]: [Expr; 2]| gate.gelu() * up));
static GEGLU_TANH: Gate = LazyLock::new(|| fused_as("geglu_tanh", |[gate, up]: [Expr; 2]| gate.gelu_tanh() * up));
static GLU: Gate = LazyLock::new(|| fused_as("glu", |[x, gate]: [Expr; 2]| x * gate.sigmoid()));

/// The two halves of `x` along `dim`, as views.
fn halves(x: &Tensor, dim: usize) -> Result<[Tensor; 2]> {
    let half = x.dims()[dim] / 2;
    Ok([x.narrow(dim as isize, 0, half)?, x.narrow(dim as isize, half, half)?])
}

/// A chain of the halves of one tensor. Its gradient is put together from theirs: cheaper than two that are zero elsewhere.
struct OfHalves {
    fused: Fused<2>,
    x: Tensor,
    dim: usize,
}

impl Op for OfHalves {
    fn name(&self) -> &'static str {
        self.fused.program.name
    }
    fn vjp(&self, _: &Ctx, grad: &Tensor) -> Result<Grads> {
        let [a, b] = halves(&self.x, self.dim)?;
        let program = &self.fused.program;
        let chained = Chained::new(program.clone(), &[&a, &b], *grad.shape(), None, |_| true);
        let gradients = chained.gradients(&vec![true; chained.inputs.len()], grad)?;
        let of_operand = |operand: usize| {
            let found = chained.inputs.iter().zip(&gradients).find(|(input, _)| program.inputs[**input].operand == operand);
            found.and_then(|(_, gradient)| gradient.as_ref()).ok_or_else(|| Error::graph(program.name, "a half without a gradient"))
        };
        Ok(vec![Some(Tensor::cat(&[of_operand(0)?, of_operand(1)?], self.dim as isize)?)])
    }
}

impl Fused<2> {
    /// The function, of which each operand is used once, of the halves of `x` along `dim`.
    fn call_halves(&self, x: &Tensor, dim: usize) -> Result<Tensor> {
        let program = &self.program;
        let Some(pass) = program.pass.as_ref().filter(|_| x.dtype().is_float()) else {
            return program.result(&halves(x, dim)?.each_ref());
        };
        let [a, b] = halves(&x.detach(), dim)?;
        let out = run(program.name, pass, &[Some(&a), Some(&b)], a.shape())?;
        record(program.name, out, &[x], |_| OfHalves { fused: self.clone(), x: x.clone(), dim })
    }
}

impl Tensor {
    /// SwiGLU's product silu(gate) · up, where `self` is the gate: what Llama's feed-forward layer has between its matrices. The two broadcast
    /// together. Float dtypes; bit for bit `self.silu()?.mul(up)`.
    ///
    /// Source: Shazeer, *GLU Variants Improve Transformer*, 2020.
    ///
    /// ```
    /// # use kiln_tensor::{Tensor, Result};
    /// # fn main() -> Result<()> {
    /// let (gate, up) = (Tensor::randn([4, 8], ())?, Tensor::randn([4, 8], ())?);
    /// assert_eq!(gate.swiglu(&up)?.to_vec::<f32>()?, gate.silu()?.mul(&up)?.to_vec::<f32>()?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the shapes do not broadcast, or the dtypes differ or are no floats.
    pub fn swiglu(&self, up: &Tensor) -> Result<Tensor> {
        SWIGLU.call([self, up])
    }

    /// GEGLU's product gelu(gate) · up, where `self` is the gate, with the exact GELU; otherwise as [`swiglu`](Tensor::swiglu).
    pub fn geglu(&self, up: &Tensor) -> Result<Tensor> {
        GEGLU.call([self, up])
    }

    /// [`geglu`](Tensor::geglu) with GELU's approximation by tanh, as Gemma has it.
    pub fn geglu_tanh(&self, up: &Tensor) -> Result<Tensor> {
        GEGLU_TANH.call([self, up])
    }

    /// The gated linear unit a · σ(b) of the two halves a and b of `dim`, which the result has half as long. Float dtypes.
    ///
    /// Source: Dauphin et al., *Language Modeling with Gated Convolutional Networks*, 2017.
    ///
    /// # Errors
    /// If there is no such dimension, its extent is odd, or the dtype is no float.
    pub fn glu(&self, dim: isize) -> Result<Tensor> {
        let dim = self.shape().dim("glu", dim)?;
        if !self.dims()[dim].is_multiple_of(2) {
            return Err(Error::shape("glu", format!("dimension {dim} of shape {} has no two halves", self.shape())));
        }
        GLU.call_halves(self, dim)
    }
}
