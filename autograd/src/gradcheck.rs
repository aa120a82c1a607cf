//! Derivative rules against central differences in f64.

use crate::engine::{GradOptions, grad_with};
use crate::{enable_grad, no_grad};
use kiln_tensor::{DType, Error, ErrorKind, Result, Tensor};

/// Step and tolerances of a check.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GradCheck {
    /// Step of the central difference.
    pub eps: f64,
    /// Absolute tolerance.
    pub atol: f64,
    /// Tolerance relative to the numeric derivative.
    pub rtol: f64,
}

impl Default for GradCheck {
    /// 1e-6, 1e-7 and 1e-5: what central differences in f64 can tell apart for functions of moderate curvature.
    fn default() -> Self {
        Self { eps: 1e-6, atol: 1e-7, rtol: 1e-5 }
    }
}

/// Weights for the output's elements: fixed, all different, none zero, so that errors do not cancel.
fn weights(y: &Tensor) -> Result<Tensor> {
    let values = (0..y.numel()).map(|i| 0.5 + (i as f64 * 0.754_877_666 + 0.3).fract() * if i % 3 == 1 { -1.0 } else { 1.0 }).collect();
    Tensor::from_vec::<f64>(values, y.shape())
}

fn dot(y: &Tensor, v: &[f64]) -> Result<f64> {
    Ok(y.to_vec::<f64>()?.iter().zip(v).map(|(y, v)| y * v).sum())
}

/// Compares the gradient of `f` (weighted over its outputs) with respect to every element of `inputs` with central
/// differences: [`gradcheck`] with the default tolerances.
///
/// # Errors
/// If an input is not f64, `f` fails, or a derivative is off; the error names the input, the element and both values.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<()> {
    GradCheck::default().check(f, inputs)
}

/// [`gradcheck`] of the gradient itself: second derivatives.
pub fn gradgradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<()> {
    GradCheck::default().check_second(f, inputs)
}

impl GradCheck {
    /// See [`gradcheck`].
    pub fn check(&self, f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<()> {
        if let Some(other) = inputs.iter().find(|x| x.dtype() != DType::F64) {
            return Err(Error::unsupported_dtype("gradcheck", other.dtype(), "f64 inputs, for central differences need its precision"));
        }
        let leaves = inputs.iter().map(|x| x.detach().copy()?.requires_grad_()).collect::<Result<Vec<_>>>()?;
        let (v, analytic) = enable_grad(|| {
            let y = f(&leaves)?;
            let v = weights(&y)?;
            let analytic = if y.is_tracked() {
                grad_with(&[&y], &[Some(&v)], &leaves.iter().collect::<Vec<_>>(), GradOptions::default())?
            } else {
                inputs.iter().map(Tensor::zeros_like).collect::<Result<_>>()?
            };
            Ok::<_, Error>((v.to_vec::<f64>()?, analytic))
        })?;
        for (i, (input, analytic)) in inputs.iter().zip(&analytic).enumerate() {
            let base = input.to_vec::<f64>()?;
            let analytic = analytic.to_vec::<f64>()?;
            for at in 0..base.len() {
                let shifted = |step: f64| {
                    let mut values = base.clone();
                    values[at] += step;
                    let mut xs: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
                    // The same memory layout as the input's, which is what is being checked.
                    xs[i] = input.detach().with_values(&values)?;
                    no_grad(|| dot(&f(&xs)?, &v))
                };
                let numeric = (shifted(self.eps)? - shifted(-self.eps)?) / (2.0 * self.eps);
                let off = (numeric - analytic[at]).abs();
                if !numeric.is_finite() || off.is_nan() || off > self.atol + self.rtol * numeric.abs() {
                    let message = format!(
                        "input {i} of shape {}, element {at}: the rule gives {}, differences give {numeric}",
                        input.shape(),
                        analytic[at]
                    );
                    return Err(Error::new(ErrorKind::Graph, "gradcheck", message));
                }
            }
        }
        Ok(())
    }

    /// See [`gradgradcheck`].
    pub fn check_second(&self, f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<()> {
        let y = no_grad(|| f(&inputs.iter().map(Tensor::detach).collect::<Vec<_>>()))?;
        let mut extended = inputs.to_vec();
        extended.push(weights(&y)?);
        let keep = GradOptions { create_graph: true, retain_graph: true };
        for i in 0..inputs.len() {
            let gradient = |xs: &[Tensor]| {
                enable_grad(|| {
                    let xs =
                        xs.iter().map(|x| if x.is_tracked() { x.identity() } else { x.requires_grad_() }).collect::<Result<Vec<_>>>()?;
                    let (v, xs) = xs.split_last().ok_or_else(|| Error::graph("gradgradcheck", "no inputs"))?;
                    let y = f(xs)?;
                    if !y.is_tracked() {
                        return xs[i].zeros_like();
                    }
                    Ok(grad_with(&[&y], &[Some(v)], &[&xs[i]], keep)?.remove(0))
                })
            };
            self.check(gradient, &extended)
                .map_err(|e| Error::new(ErrorKind::Graph, "gradgradcheck", format!("the gradient of input {i}: {e}")))?;
        }
        Ok(())
    }
}
