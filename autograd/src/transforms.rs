//! Derivatives of functions of tensors: products with the Jacobian from either side, and whole matrices of derivatives.

use crate::enable_grad;
use crate::engine::{GradOptions, depends_on_others, grad_with};
use kiln_tensor::{DType, Error, Result, Tensor};

const KEEP: GradOptions = GradOptions { create_graph: true, retain_graph: true };

/// Fresh leaves over the inputs' data, or the inputs themselves where they are tracked already, so that transforms nest.
fn leaves(inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    inputs.iter().map(|x| if x.is_tracked() { x.identity() } else { x.requires_grad_() }).collect()
}

/// Those of the leaves that are no input of the caller's graph.
fn fresh(leaves: &[Tensor], inputs: &[&Tensor]) -> Vec<Tensor> {
    leaves.iter().zip(inputs).filter(|(_, input)| !input.is_tracked()).map(|(leaf, _)| leaf.clone()).collect()
}

/// Results stay part of the graph where they depend on more than the leaves that were made here: on inputs that the caller tracks, on weights
/// that the function uses, on a vector.
fn finish(result: Tensor, own: &[Tensor]) -> Tensor {
    if depends_on_others(&result, own) { result } else { result.detach() }
}

/// The output of `f` at `inputs`, and the product of `v` (of the output's shape) with its Jacobian: vᵀ·∂f/∂xᵢ for each input.
pub fn vjp(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[&Tensor], v: &Tensor) -> Result<(Tensor, Vec<Tensor>)> {
    enable_grad(|| {
        let xs = leaves(inputs)?;
        let y = f(&xs)?;
        if !y.is_tracked() {
            let zeros = inputs.iter().map(|x| x.zeros_like()).collect::<Result<_>>()?;
            return Ok((y, zeros));
        }
        let products = grad_with(&[&y], &[Some(v)], &xs.iter().collect::<Vec<_>>(), KEEP)?;
        let own = fresh(&xs, inputs);
        Ok((finish(y, &own), products.into_iter().map(|product| finish(product, &own)).collect()))
    })
}

/// The output of `f` at `inputs`, and its derivative in the direction `tangents` (one for each input): Σᵢ ∂f/∂xᵢ·tᵢ.
///
/// Computed as the gradient of the vector-Jacobian product with respect to its vector, in which it is linear.
pub fn jvp(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[&Tensor], tangents: &[&Tensor]) -> Result<(Tensor, Tensor)> {
    if inputs.len() != tangents.len() {
        return Err(Error::argument("jvp", format!("{} inputs with {} tangents", inputs.len(), tangents.len())));
    }
    enable_grad(|| {
        let xs = leaves(inputs)?;
        let y = f(&xs)?;
        if !y.is_tracked() {
            let zeros = y.zeros_like()?;
            return Ok((y, zeros));
        }
        let v = y.zeros_like()?.requires_grad_()?;
        let products = grad_with(&[&y], &[Some(&v)], &xs.iter().collect::<Vec<_>>(), KEEP)?;
        let tracked: Vec<(&Tensor, Option<&Tensor>)> =
            products.iter().zip(tangents).filter(|(p, _)| p.is_tracked()).map(|(p, t)| (p, Some(*t))).collect();
        let tangent = if tracked.is_empty() {
            y.zeros_like()?
        } else {
            let (products, tangents): (Vec<_>, Vec<_>) = tracked.into_iter().unzip();
            grad_with(&products, &tangents, &[&v], KEEP)?.remove(0)
        };
        let own = [fresh(&xs, inputs), vec![v]].concat();
        Ok((finish(y, &own), finish(tangent, &own)))
    })
}

/// The value of a scalar function at `x`, and the product of its Hessian with `v`.
pub fn hvp(f: impl Fn(&Tensor) -> Result<Tensor>, x: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    enable_grad(|| {
        let xs = leaves(&[x])?;
        let y = f(&xs[0])?;
        let product = if y.is_tracked() {
            let gradient = grad_with(&[&y], &[None], &[&xs[0]], KEEP)?.remove(0);
            if gradient.is_tracked() { grad_with(&[&gradient], &[Some(v)], &[&xs[0]], KEEP)?.remove(0) } else { x.zeros_like()? }
        } else {
            x.zeros_like()?
        };
        let own = fresh(&xs, &[x]);
        Ok((finish(y, &own), finish(product, &own)))
    })
}

/// The matrix of all partial derivatives ∂yᵢ/∂xⱼ, of shape `[y's shape…, x's shape…]`. One backward pass for each element of y.
pub fn jacobian(f: impl Fn(&Tensor) -> Result<Tensor>, x: &Tensor) -> Result<Tensor> {
    enable_grad(|| {
        let xs = leaves(&[x])?;
        let y = f(&xs[0])?;
        let shape = [y.dims(), x.dims()].concat();
        if !y.is_tracked() {
            return Tensor::zeros(shape, x);
        }
        let flat = y.reshape(-1)?;
        let mut rows = Vec::with_capacity(y.numel());
        for i in 0..y.numel() {
            let unit = one_hot(i, y.numel(), y.dtype())?;
            rows.push(grad_with(&[&flat], &[Some(&unit)], &[&xs[0]], KEEP)?.remove(0));
        }
        if rows.is_empty() {
            return Tensor::zeros(shape, x);
        }
        Ok(finish(Tensor::stack(&rows, 0)?.reshape(shape)?, &fresh(&xs, &[x])))
    })
}

/// The matrix of second derivatives of a scalar function, of shape `[x's shape…, x's shape…]`.
pub fn hessian(f: impl Fn(&Tensor) -> Result<Tensor>, x: &Tensor) -> Result<Tensor> {
    jacobian(
        |x| {
            let y = f(x)?;
            if !y.is_tracked() { x.zeros_like() } else { Ok(grad_with(&[&y], &[None], &[x], KEEP)?.remove(0)) }
        },
        x,
    )
}

fn one_hot(i: usize, n: usize, dtype: DType) -> Result<Tensor> {
    let values: Vec<f64> = (0..n).map(|j| (i == j) as u8 as f64).collect();
    Tensor::from_vec(values, n)?.to_dtype(dtype)
}
