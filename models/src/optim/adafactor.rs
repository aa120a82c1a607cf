//! Adafactor.

use super::group::{Field, GroupOptimizer, Method, Work, unless, unless_positive};
use kiln_tensor::ops::optim::global_norm;
use kiln_tensor::{DType, Result, Shape, Tensor};

/// Adafactor (Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018): Adam's second moment for
/// matrices as the outer product of its row and column means, at step t:
///
/// ```text
/// w ← t^beta2_decay                             (weight of the new gradient)
/// ρ ← min(lr, 1/√t)  if relative_step, else lr
/// α ← max(ε₂, RMS(p)) · ρ  if scale_parameter, else ρ
/// p ← p · (1 − lr · weight_decay)
/// R ← R + w (mean of g² over the last dimension − R)
/// C ← C + w (mean of g² over the last but one − C)
/// V ← R C / max(mean(R), ε₁)
/// U ← g / √max(V, ε₁²)
/// p ← p − α / max(1, RMS(U) / clip) · U
/// ```
///
/// Parameters of one dimension or none keep a plain V. States: `row_var` R and `col_var` C, or `variance` V.
pub type Adafactor = GroupOptimizer<AdafactorOptions>;

/// Hyper-parameters of [`Adafactor`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdafactorOptions {
    /// Learning rate; with `relative_step`, its upper bound.
    pub lr: f64,
    /// Exponent, at most 0, of the step in the weight of the new gradient.
    pub beta2_decay: f64,
    /// ε₁ keeps the second moment from zero (0 stands for the machine epsilon of the dtype that the step computes in), ε₂ the step of
    /// parameters that are nearly zero.
    pub eps: (f64, f64),
    /// Largest root mean square of an update, at least 1.
    pub clip: f64,
    /// Strength of the decoupled decay.
    pub weight_decay: f64,
    /// Lets the rate fall with 1/√t.
    pub relative_step: bool,
    /// Scales the rate with the root mean square of the parameter.
    pub scale_parameter: bool,
}

impl Default for AdafactorOptions {
    /// PyTorch's: 1e-2, −0.8, (machine epsilon, 1e-3), 1, both switches on.
    fn default() -> Self {
        Self { lr: 1e-2, beta2_decay: -0.8, eps: (0.0, 1e-3), clip: 1.0, weight_decay: 0.0, relative_step: true, scale_parameter: true }
    }
}

/// √(Σ x² / n).
fn rms(x: &Tensor) -> Result<f64> {
    Ok(global_norm(std::slice::from_ref(x))? / (x.numel() as f64).sqrt())
}

/// Mean of the squares over one dimension, which stays with extent 1.
fn mean_square(x: &Tensor, dim: isize) -> Result<Tensor> {
    x.square()?.sum_keepdim(dim)?.div_scalar(x.dim(dim)? as f64)
}

/// `average + weight · (value − average)`.
fn averaged(average: &Tensor, value: &Tensor, weight: f64) -> Result<Tensor> {
    average.add(&value.sub(average)?.mul_scalar(weight)?)?.contiguous()
}

impl AdafactorOptions {
    /// V from the new gradient; moves the states.
    fn second_moment(&self, grad: &Tensor, states: &mut [&mut Tensor], weight: f64, eps: f64) -> Result<Tensor> {
        match states {
            [row, col] => {
                **row = averaged(row, &mean_square(grad, -1)?, weight)?;
                **col = averaged(col, &mean_square(grad, -2)?, weight)?;
                let mean = row.sum_keepdim(-2)?.div_scalar(row.dim(-2)? as f64)?.clamp(eps, None)?;
                row.mul(col)?.div(&mean)
            }
            states => {
                for variance in states.iter_mut() {
                    **variance = averaged(variance, &grad.square()?, weight)?;
                }
                Ok(states.first().map_or_else(|| grad.clone(), |v| (**v).clone()))
            }
        }
    }

    fn step(&self, work: Work<'_>) -> Result<()> {
        let t = work.step as f64;
        let rate = if self.relative_step { self.lr.min(1.0 / t.sqrt()) } else { self.lr };
        work.replace(|param, grad, states| {
            let scale = if self.scale_parameter { rms(param)?.max(self.eps.1) } else { 1.0 };
            let epsilon = if param.dtype() == DType::F64 { f64::EPSILON } else { f32::EPSILON as f64 };
            let eps = if self.eps.0 == 0.0 { epsilon } else { self.eps.0 };
            let moment = self.second_moment(grad, states, t.powf(self.beta2_decay), eps)?;
            let update = moment.clamp(eps * eps, None)?.rsqrt()?.mul(grad)?;
            let step = scale * rate / (rms(&update)? / self.clip).max(1.0);
            param.mul_scalar(1.0 - self.lr * self.weight_decay)?.sub(&update.mul_scalar(step)?)
        })
    }
}

impl Method for AdafactorOptions {
    const NAME: &'static str = "Adafactor";

    fn fields(&mut self) -> Vec<(&'static str, Field<'_>)> {
        vec![
            ("lr", Field::Number(&mut self.lr)),
            ("beta2_decay", Field::Number(&mut self.beta2_decay)),
            ("eps1", Field::Number(&mut self.eps.0)),
            ("eps2", Field::Number(&mut self.eps.1)),
            ("clip", Field::Number(&mut self.clip)),
            ("weight_decay", Field::Number(&mut self.weight_decay)),
            ("relative_step", Field::Flag(&mut self.relative_step)),
            ("scale_parameter", Field::Flag(&mut self.scale_parameter)),
        ]
    }

    fn invalid(&self) -> Option<String> {
        unless_positive("lr", self.lr)
            .or_else(|| unless(self.beta2_decay <= 0.0, "beta2_decay", self.beta2_decay, "a value ≤ 0"))
            .or_else(|| unless_positive("eps1", self.eps.0))
            .or_else(|| unless_positive("eps2", self.eps.1))
            .or_else(|| unless(self.clip >= 1.0, "clip", self.clip, "a value ≥ 1"))
            .or_else(|| unless_positive("weight_decay", self.weight_decay))
    }

    fn states(&self, shape: &Shape) -> Vec<(&'static str, Shape)> {
        let rank = shape.rank();
        let without = |dim: usize| shape.with_dim(dim, 1);
        match (rank >= 2).then(|| (without(rank - 1), without(rank - 2))) {
            Some((Ok(row), Ok(col))) => vec![("row_var", row), ("col_var", col)],
            _ => vec![("variance", *shape)],
        }
    }

    fn update(&self, work: Vec<Work<'_>>) -> Result<()> {
        work.into_iter().try_for_each(|work| self.step(work))
    }
}
